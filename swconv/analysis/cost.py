"""Parameters and multiply-adds of a model, by the papers' conventions, without computing anything."""

import copy
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import timm
import torch
from timm.utils import reparameterize_model
from torch import Tensor, nn

import swconv.models  # noqa: F401  registers the models with timm
from swconv.models.mixers import StripConv2d
from swconv.ops import ShiftwiseConv2d

Form = Literal["training", "merged", "plus"]
Counting = Literal["papers", "thop", "unseen"]
SEEN = 5  # px: larger depthwise kernels have a class of their own in the released code


@dataclass(frozen=True)
class Cost:
    """What a model costs.

    Attributes
    ----------
    params : int
        Numbers that training moves; masked ones are left out.
    macs : int
        Multiply-adds of one image: convolutions and linear layers.
    parts : mapping of (str, str) to (int, int)
        (place, part) -> (params, macs); places are stem, stage 1, stage 2, ..., head, parts large kernel, pointwise,
        downsampling, squeeze-excitation, norms and scales, classifier. They add up to the whole.
    """

    params: int
    macs: int
    parts: Mapping[tuple[str, str], tuple[int, int]]


def cost(
    model: str | nn.Module,
    input_size: int | tuple[int, int] = 224,
    form: Form = "training",
    sparsity: float = 0.0,
    counting: Counting = "papers",
    **arguments: Any,
) -> Cost:
    """Count parameters and MACs.

    Parameters
    ----------
    model : str or nn.Module
        timm's name of a model, made with `arguments` on the meta device; or a model, whose zeros count as masked.
    input_size : int or (int, int)
        Height and width of the image, in pixels.
    form : str
        "training": as it trains. "merged": as the papers count it: the Rep branches of SW summed; UniRepLKNet and RepLKNet
        deployed, with their norms folded; the small kernel of SLaK added to a strip. "plus": SW and SLaK in one plus-shaped
        kernel per channel.
    sparsity : float
        Share of every weight of two or four dimensions that is masked, the same in all layers.
    counting : str
        "papers": a MAC for every tap, also where it hits the padding. "thop": also four for every element that a BatchNorm,
        or torch's own LayerNorm, gives, as the tool of that name has it (SW Table 3). "unseen": a depthwise kernel above
        5 px has all its parameters and no MACs, as for tools that do not know the class it has in the released code (SLaK
        Tables 4 and 5).

    Raises
    ------
    ValueError
        For an unknown form or counting, or a sparsity outside [0, 1).
    """
    if form not in get_args(Form) or counting not in get_args(Counting) or not 0 <= sparsity < 1:
        raise ValueError("cost needs form training, merged or plus, counting papers, thop or unseen, and sparsity in [0, 1), "
                         f"got {form!r}, {counting!r}, {sparsity}.")
    if isinstance(model, str):
        with torch.device("meta"):
            model = timm.create_model(model, **arguments)
    else:
        model = copy.deepcopy(model)
    model = _formed(model.eval(), form)
    height, width = (input_size, input_size) if isinstance(input_size, int) else input_size
    macs = _macs(model, height, width, sparsity, counting)
    parts: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    for name, weight in _weights(model):
        parts[_part(name)][0] += weight.numel() if _unseen(weight, counting) else round(_alive(weight, sparsity))
    for name, count in macs.items():
        parts[_part(name)][1] += round(count)
    found = {key: (params, count) for key, (params, count) in parts.items()}
    return Cost(sum(params for params, _ in found.values()), sum(count for _, count in found.values()), found)


def count(
    name: str, input_size: int = 224, sparsity: float = 0.0, counting: Counting = "papers",
    arguments: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """`cost` of all forms of a model, for `python -m swconv cost`: plain numbers, parts of the training form included."""
    forms = {form: cost(name, input_size, form, sparsity, counting, **(arguments or {})) for form in get_args(Form)}
    parts = [{"place": place, "part": part, "params": params, "macs": macs}
             for (place, part), (params, macs) in forms["training"].parts.items()]
    return {"model": name, "arguments": dict(arguments or {}), "input_size": input_size, "sparsity": sparsity,
            "counting": counting, "parts": parts,
            "forms": {form: {"params": found.params, "macs": found.macs} for form, found in forms.items()}}


def table(counts: Mapping[str, Any]) -> str:
    """What `count` gives, to be read."""
    lines = [f"{counts['model']} at {counts['input_size']} px", f"{'':34}{'params':>14}{'GMACs':>10}"]
    lines += [f"{form:34}{found['params']:>14,}{found['macs'] / 1e9:>10.3f}" for form, found in counts["forms"].items()]
    lines += [f"  {row['place']:10}{row['part']:22}{row['params']:>14,}{row['macs'] / 1e9:>10.3f}" for row in counts["parts"]]
    return "\n".join(lines)


def _formed(model: nn.Module, form: Form) -> nn.Module:
    if form == "plus":
        return reparameterize_model(model)
    if form == "merged":
        for layer in model.modules():
            if isinstance(layer, ShiftwiseConv2d) and layer.norm != "filter" and not layer.merged:
                layer.filters = nn.ParameterList([nn.Parameter(sum(layer.filters).detach())])
            if isinstance(layer, StripConv2d):
                layer.reparameterize()
        if not any(isinstance(layer, ShiftwiseConv2d | StripConv2d) for layer in model.modules()):
            return reparameterize_model(model)
    return model


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, and the kernels that merged layers keep as buffers; their small kernel is added to a strip."""
    yield from model.named_parameters()
    for name, layer in model.named_modules():
        if getattr(layer, "merged", None) is True:
            kernel_h, kernel_v, bias = _plus(layer)
            yield from ((f"{name}.kernel_h", kernel_h), (f"{name}.kernel_v", kernel_v), (f"{name}.bias", bias))
            if getattr(layer, "filter_bias", None) is not None:
                yield f"{name}.filter_bias", layer.filter_bias


def _plus(layer: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """Strips and bias of a merged layer, without the ghosts, which only pass by."""
    kernel_h, kernel_v, _, bias = layer.plus() if isinstance(layer, ShiftwiseConv2d) else (
        layer.kernel_h, layer.kernel_v, layer.kernel_c, layer.bias)
    return kernel_h, kernel_v, bias


def _alive(weight: Tensor, sparsity: float) -> float:
    """Values that are not masked."""
    alive = weight.numel() if weight.is_meta else int(weight.count_nonzero()) if weight.dim() > 1 else weight.numel()
    return alive * (1 - sparsity) if weight.dim() > 1 else alive


def _unseen(weight: Tensor, counting: Counting) -> bool:
    return counting == "unseen" and weight.dim() == 4 and weight.shape[1] == 1 and max(weight.shape[2:]) > SEEN


def _macs(model: nn.Module, height: int, width: int, sparsity: float, counting: Counting) -> dict[str, float]:
    """MACs of every layer that has some, by its name."""
    found: dict[str, float] = defaultdict(float)

    def watch(name: str, layer: nn.Module) -> None:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            found[name] += _layer_macs(layer, inputs[0], output, sparsity, counting)

        layer.register_forward_hook(hook)

    for name, layer in model.named_modules():
        counted = isinstance(layer, nn.Conv2d | nn.Linear | nn.BatchNorm2d | ShiftwiseConv2d | StripConv2d)
        if counted or type(layer) is nn.LayerNorm:
            watch(name, layer)
    first = next(model.parameters())
    channels = next(layer for layer in model.modules() if isinstance(layer, nn.Conv2d)).in_channels
    with torch.no_grad():
        model(torch.zeros(1, channels, height, width, device=first.device, dtype=first.dtype))
    return found


def _layer_macs(layer: nn.Module, x: Tensor, y: Tensor, sparsity: float, counting: Counting) -> float:
    def used(weight: Tensor) -> float:
        return 0 if _unseen(weight, counting) else _alive(weight, sparsity)

    match layer:
        case nn.Conv2d():
            return used(layer.weight) * y.shape[2] * y.shape[3]
        case nn.Linear():
            return used(layer.weight) * (y.numel() // y.shape[-1])
        case nn.BatchNorm2d() | nn.LayerNorm():
            return 4 * y.numel() if counting == "thop" else 0
        case _ if layer.merged:
            return sum(used(kernel) for kernel in _plus(layer)[:2]) * x.shape[2] * x.shape[3]
        case ShiftwiseConv2d():
            filters = sum(used(weight) for weight in layer.filters)
            return filters * (x.shape[2] + 2 * layer.halo) * (x.shape[3] + 2 * layer.halo)
    taller = 2 * (layer.small_kernel - 1 - layer.small_kernel // 2) if layer.laid_out else 0
    sizes = {"vertical": (x.shape[2] + taller) * x.shape[3], "horizontal": x.shape[2] * (x.shape[3] + taller),
             "small": x.shape[2] * x.shape[3]}
    return sum(used(conv.weight) * sizes[name] for name, conv in layer.convs.items())


def _part(name: str) -> tuple[str, str]:
    """Where a weight or layer belongs."""
    words = name.split(".")
    if words[0] != "stages":
        place = "stem" if words[0] == "stem" else "head"
        return place, "classifier" if words[0] == "head" else "downsampling" if place == "stem" else "norms and scales"
    place = f"stage {int(words[1]) + 1}"
    if words[2] == "downsample":
        return place, "downsampling"
    part = {"mixer": "large kernel", "pwconv1": "pointwise", "pwconv2": "pointwise", "se": "squeeze-excitation"}
    return place, part.get(words[4], "norms and scales")
