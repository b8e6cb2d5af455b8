"""The contenders: the SW operator in all its forms, the large-kernel convolutions beside it, and networks of both."""

import copy
from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import swconv.models  # noqa: F401  registers the networks with timm
from swconv.bench.work import Stage
from swconv.models.mixers import StripConv2d
from swconv.ops import ShiftwiseConv2d, assemble_ref, shift_add, shift_add_ref, strip_branches_ref, strip_mix

Three = tuple[Tensor, Tensor, Tensor]
Sums = Callable[[ShiftwiseConv2d, Tensor], Three]


# ---- the sums h, v, i of a layer, each (B, R, H, W), from x (B, R, H, W) and the layer's filters


def two_step(layer: ShiftwiseConv2d, x: Tensor) -> Three:
    """As published: every Rep branch convolves, with n outputs per channel; their maps are summed, then shifted and added."""
    return _shifted(layer, reduce(torch.add, (_maps(layer, x, weight) for weight in layer.filters)))


def two_step_summed(layer: ShiftwiseConv2d, x: Tensor) -> Three:
    """`two_step` with its Rep branches summed before the convolution, which the published code does for inference only."""
    return _shifted(layer, _maps(layer, x))


def two_step_gather(layer: ShiftwiseConv2d, x: Tensor) -> Three:
    """`two_step_summed`, but every output gathers what it adds: no atomic additions."""
    return layer.shift(_maps(layer, x))


def two_step_taps(layer: ShiftwiseConv2d, x: Tensor) -> Three:
    """The best two steps that torch's operators give: one depthwise convolution per tap, then shift and add."""
    return layer.shift(layer.responses(x))


def torch_strips(layer: ShiftwiseConv2d, x: Tensor) -> Three:
    """The strip form without our kernels."""
    anchor, kernels = layer.kernel_size // 2, assemble_ref(sum(layer.filters), layer.mixing)
    return strip_branches_ref(x, *(kernel.to(x.dtype) for kernel in kernels), anchor, anchor)


def reference(layer: ShiftwiseConv2d, x: Tensor) -> Three:
    """The definition, literally and in plain torch: call it in float64."""
    return shift_add_ref(_maps(layer, x), layer.pad_h, layer.pad_v, layer.pick, layer.halo)


def _shifted(layer: ShiftwiseConv2d, maps: Tensor) -> Three:
    op = torch.ops.swconv.shift_add_atomic if maps.is_cuda else shift_add
    return op(maps, layer.pad_h, layer.pad_v, layer.pick.int(), layer.halo)


def _maps(layer: ShiftwiseConv2d, x: Tensor, weight: Tensor | None = None) -> Tensor:
    weight = sum(layer.filters) if weight is None else weight
    return F.conv2d(x, weight, padding=layer.halo + layer.small_kernel // 2, groups=x.shape[1])


def sums(cuda: bool, precision: str = "float32") -> dict[str, Sums]:
    """All forms of the operator, ours first. The two-step forms are those of float32, as published."""
    forms = {"ours": ShiftwiseConv2d.branches, "two_step": two_step, "two_step_summed": two_step_summed,
             "two_step_gather": two_step_gather, "two_step_taps": two_step_taps, "torch_strips": torch_strips}
    if not cuda:                                                      # there the published form gathers already
        del forms["two_step_gather"]
    return {name: form for name, form in forms.items() if precision == "float32" or not name.startswith("two_step")}


# ---- layers and what they are compared with


def make_layer(stage: Stage, device: torch.device, edges: int = 4, rep_branches: int = 2) -> ShiftwiseConv2d:
    """A layer in evaluation whose norms do something, without ghost channels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stage.number)
        layer = ShiftwiseConv2d(stage.channels, stage.extent, stage.small, rep_branches, edges, ghost_ratio=0.0)
        randomize_norms(layer)
    return layer.eval().to(device)


def randomize_norms(module: nn.Module) -> None:
    """Give every BatchNorm statistics and weights, from torch's generator."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for tensor, low, high in ((norm.running_mean, -0.5, 0.5), (norm.running_var, 0.5, 1.5),
                                      (norm.weight, 0.5, 1.5), (norm.bias, -0.5, 0.5)):
                nn.init.uniform_(tensor, low, high)


def mixed(layer: ShiftwiseConv2d, parts: Three, x: Tensor) -> Tensor:
    """Norms and skip: what the layer makes of its sums."""
    return sum(norm(part) for norm, part in zip(layer.norms, parts, strict=True)) + x


def whole(form: Sums, layer: ShiftwiseConv2d, x: Tensor) -> Tensor:
    """Sums, norms and skip."""
    return mixed(layer, form(layer, x), x)


def folded(layer: ShiftwiseConv2d) -> ShiftwiseConv2d:
    """A copy with its Rep branches summed: for inference the two-step form needs no more than one."""
    layer = copy.deepcopy(layer)
    layer.filters = nn.ParameterList([nn.Parameter(sum(layer.filters).detach())])
    return layer


def deployed(layer: ShiftwiseConv2d, cuda: bool, precision: str = "float32") -> dict[str, Callable[[Tensor], Tensor]]:
    """The layer in evaluation, in all forms: sums, norms and skip, x -> y."""
    single, merged, anchor = folded(layer), copy.deepcopy(layer), layer.kernel_size // 2
    merged.reparameterize()
    if precision == "bfloat16":
        merged.bfloat16()
    kernels = merged.kernel_h, merged.kernel_v, merged.kernel_c

    def plain(x: Tensor) -> Tensor:
        return sum(strip_branches_ref(x, *kernels, anchor, anchor)) + merged.bias[:, None, None]

    by_strips = {"ours": lambda x: strip_mix(x, *kernels, merged.bias, anchor, anchor), "torch_strips": plain}
    return {name: by_strips.get(name, partial(whole, form, single)) for name, form in sums(cuda, precision).items()}


def peers(
    stage: Stage, device: torch.device, dtype: torch.dtype = torch.float32
) -> dict[str, tuple[dict[str, Callable[[Tensor], Tensor]], list[Tensor]]]:
    """Convolutions of the same size that other networks use: name -> ({way: function of x}, weights).

    Two ways on the CPU, because padding inside a convolution can leave oneDNN's fast path, and padding before it costs a copy.
    """
    generator = torch.Generator().manual_seed(stage.number)
    sides = {"depthwise13": [(13, 13)], "depthwise7": [(7, 7)], "slak_pair": [(5, stage.extent), (stage.extent, 5)]}
    known = {}
    for name, shapes in sides.items():
        weights = [torch.randn(stage.channels, 1, *shape, generator=generator).to(device, dtype).requires_grad_()
                   for shape in shapes]
        ways = {"padding inside": partial(inside, weights), "padding before": partial(before, weights)}
        if device.type == "cuda":
            del ways["padding before"]
        known[name] = ways, weights
    return known


def layouts(name: str, cuda: bool, precision: str) -> tuple[str, ...]:
    """Memory formats that a contender runs in: both, but on a GPU others than ours contiguous only.

    There torch has depthwise kernels of its own for contiguous maps; channels_last leaves them to cuDNN, which searches for
    seconds per shape and direction. ConvNeXt's 7x7 in half precision is what people run so.
    """
    both = not cuda or name.startswith("ours") or (name, precision) == ("depthwise7", "bfloat16")
    return ("contiguous", "channels_last") if both else ("contiguous",)


def inside(weights: Sequence[Tensor], x: Tensor) -> Tensor:
    """The sum of depthwise convolutions of x (B, C, H, W), same size, padded by the convolution itself."""
    return sum(F.conv2d(x, w, padding=(w.shape[2] // 2, w.shape[3] // 2), groups=len(w)) for w in weights)


def before(weights: Sequence[Tensor], x: Tensor) -> Tensor:
    """The same, padded before the convolution."""
    halves = [(w.shape[2] // 2, w.shape[3] // 2) for w in weights]
    return sum(F.conv2d(F.pad(x, (b, b, a, a)), w, groups=len(w)) for w, (a, b) in zip(weights, halves, strict=True))


# ---- networks


class TwoStepMixer(nn.Module):
    """`ShiftwiseConv2d` in evaluation, in the two-step form."""

    def __init__(self, layer: ShiftwiseConv2d, form: Sums) -> None:
        super().__init__()
        self.layer, self.form = folded(layer), form

    def forward(self, x: Tensor) -> Tensor:
        inner, ghost = self.layer.split(x)                            # (B, R, H, W), (B, C - R, H, W)
        return torch.cat([whole(self.form, self.layer, inner), ghost], dim=1)


class PaddedConv2d(nn.Module):
    """A depthwise convolution whose zeros are laid around the map beforehand."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = copy.deepcopy(conv)
        (below, right), self.conv.padding = conv.padding, (0, 0)
        self.margins = (right, right, below, below)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, self.margins))


class PlainStrips(nn.Module):
    """`StripConv2d` before its merge, as SLaK writes it: three of torch's convolutions, each with its BatchNorm."""

    def __init__(self, mixer: StripConv2d) -> None:
        super().__init__()
        self.convs, self.norms = copy.deepcopy(mixer.convs), copy.deepcopy(mixer.norms)

    def forward(self, x: Tensor) -> Tensor:
        return sum(self.norms[name](conv(x)) for name, conv in self.convs.items())


def square(mixer: StripConv2d) -> nn.Conv2d:
    """SLaK's strips and small kernel merged into one M x M convolution with bias, as the released code builds it."""
    merged = copy.deepcopy(mixer)
    merged.reparameterize()
    extent, channels = merged.kernel_size, merged.channels
    conv = nn.Conv2d(channels, channels, extent, padding=extent // 2, groups=channels).to(merged.bias)
    with torch.no_grad():
        conv.weight.zero_()
        for kernel in (merged.kernel_h, merged.kernel_v, merged.kernel_c):
            tall, wide = ((extent - side) // 2 for side in kernel.shape[2:])
            conv.weight[:, :, tall : extent - tall, wide : extent - wide] += kernel
        conv.bias.copy_(merged.bias)
    return conv


def make_network(device: torch.device, name: str = "sw_tiny", **arguments: Any) -> nn.Module:
    """A network of `swconv.models` or of timm in evaluation, every part of which does something."""
    scale = {"layer_scale_init": 1.0} if timm.models.model_entrypoint(name).__module__.startswith("swconv") else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model(name, **scale | arguments)
        randomize_norms(model)
    return model.eval().to(device)


def replaced(model: nn.Module, kind: type[nn.Module], make: Callable[[Any], nn.Module]) -> nn.Module:
    """A copy of the network in which every module of a kind is another one."""
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, kind):
                setattr(parent, name, make(child))
    return model


def two_step_network(model: nn.Module, form: Sums) -> nn.Module:
    """The network with its mixers in the two-step form."""
    return replaced(model, ShiftwiseConv2d, partial(TwoStepMixer, form=form))


def training_form(model: nn.Module, form: str) -> nn.Module:
    """The network with its SW layers in one of two forms for training, changed in place; both are the same function.

    Parameters
    ----------
    form : {"ours", "two_step"}
        Strips; or as published, maps of all filters of every Rep branch, summed, shifted and added, in the filters' dtype also
        under autocast.
    """
    def published(layer: ShiftwiseConv2d, x: Tensor) -> Three:
        with torch.autocast(x.device.type, enabled=False):
            return two_step(layer, x.to(layer.filters[0].dtype))

    if form == "two_step":
        for layer in model.modules():
            if isinstance(layer, ShiftwiseConv2d):
                layer.branches = partial(published, layer)
    return model


def padded_before(model: nn.Module) -> nn.Module:
    """The network with the zeros of its large depthwise convolutions laid around the map beforehand."""
    def large(conv: nn.Conv2d) -> nn.Module:
        return PaddedConv2d(conv) if conv.groups > 1 and max(conv.kernel_size) > 13 else conv

    return replaced(model, nn.Conv2d, large)


def whole_network(model: nn.Module, form: str) -> dict[str, nn.Module]:
    """A network in evaluation, in one of its forms, with the ways to run that form.

    Parameters
    ----------
    form : str
        "merged": all folded, on our kernels where they are SW's or SLaK's. "two_step": SW as published. "plain": SLaK before
        its merge, in torch's convolutions. "square": large kernels merged to M x M convolutions of torch. "as_is": unchanged.

    Returns
    -------
    dict of str to nn.Module
        "" where there is one way; else the padding of large convolutions inside or before them, which changes their speed.
    """
    match form:
        case "as_is":
            return {"": model}
        case "merged":
            return {"": timm.utils.reparameterize_model(model)}
        case "two_step":
            return {"": two_step_network(model, two_step)}
        case "plain":
            model = replaced(model, StripConv2d, PlainStrips)
        case "square":
            model = timm.utils.reparameterize_model(replaced(model, StripConv2d, square))
        case _:
            raise ValueError(f"a network's form is as_is, merged, two_step, plain or square, got {form!r}.")
    return {"padding inside": model, "padding before": padded_before(model)}
