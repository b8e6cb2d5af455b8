"""Any of our backbones as a pyramid of four maps, and the learning rates with which its layers are fine-tuned.

`Pyramid("sw_tiny")`: (B, 3, H, W) -> (B, C1, H/4, W/4), ..., (B, C4, H/32, W/32), each behind a LayerNorm of its own.
"""

import logging
import warnings
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, Literal

import timm
import torch
from timm.layers import LayerNorm2d
from timm.layers.grn import GlobalResponseNorm
from timm.models import ConvNeXt
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # SyncBatchNorm too

import swconv.models  # noqa: F401  registers the models with timm
from swconv.weights import masks_in

_FAMILIES = ("swconv.models", "timm.models.convnext")                 # modules whose networks have what a pyramid needs
Rule = Literal["layer_wise", "stage_wise", "norms"]
_log = logging.getLogger(__name__)


class Pyramid(nn.Module):
    """The stages of a classifier as a pyramid for dense tasks, one LayerNorm per map.

    Parameters
    ----------
    name : str
        timm's name: a network of `swconv.models`, or a ConvNeXt.
    drop_path_rate : float
        Stochastic depth, from 0 in the first block to this in the last.
    layer_scale_init : float
        Initial layer scale; pretrained weights overwrite it. 0 leaves the scale out.
    sparse : bool
        Keep zeros zero: every weight of two or four dimensions (GRN's scale and shift are none here) stays zero where it
        was when weights were loaded. In evaluation too; what is saved is masked.
    **arguments
        Of the network, `depths`, `dims`, `kernel_sizes`, ...

    Attributes
    ----------
    channels : tuple of int
        Of the maps.
    masks : dict of str to bool Tensor
        By parameter of `net`; empty unless sparse weights were loaded.

    Raises
    ------
    ValueError
        When the network is unknown, of another family, or does not have four stages.
    """

    def __init__(self, name: str, *, drop_path_rate: float = 0.0, layer_scale_init: float = 1.0, sparse: bool = False,
                 **arguments: Any) -> None:
        super().__init__()
        scale = "layer_scale_init" if _module(name).startswith("swconv.") else "ls_init_value"
        net = timm.create_model(name, num_classes=0, drop_path_rate=drop_path_rate, **{scale: layer_scale_init}, **arguments)
        if len(net.stages) != 4:
            raise ValueError(f"a pyramid needs a network of four stages, got {name} with {len(net.stages)}. "
                             "Give depths and dims four entries each.")
        net.prune_intermediate_layers(4, prune_norm=True)
        if isinstance(net, ConvNeXt):
            net.head = nn.Identity()                                  # its norm
        self.net, self.sparse = net, sparse
        self.channels = tuple(stage["num_chs"] for stage in net.feature_info)
        for level, width in enumerate(self.channels):
            self.add_module(f"norm{level}", LayerNorm2d(width, eps=1e-6))
        self.masks: dict[str, Tensor] = {}
        if sparse:
            net.register_load_state_dict_post_hook(self._find_zeros)
            self.register_state_dict_pre_hook(_masked)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> four maps (B, C, H / stride, W / stride), strides 4, 8, 16, 32."""
        self.keep_zeros()
        maps = self.net.forward_intermediates(x, indices=4, intermediates_only=True)
        return [getattr(self, f"norm{level}")(x) for level, x in enumerate(maps)]

    def load_pretrained(self, state: Mapping[str, Tensor]) -> None:
        """Take a classifier's weights, as our training stage publishes them or `swconv.weights` converts them.

        Its head and last norm are left out. The maps' norms stay as they are.

        Raises
        ------
        ValueError
            When other entries are missing or left over, or have another shape.
        """
        body = {name: value for name, value in state.items() if not name.startswith(("head.", "norm."))}
        try:
            self.net.load_state_dict(body)
        except RuntimeError as error:
            reason = "; ".join(line.strip() for line in str(error).splitlines()[1:3])
            raise ValueError(f"a pyramid needs the weights of its own backbone, got others: {reason[:300]} Pretrain with the "
                             "same model and arguments, or name that run in init_from.") from error

    @torch.no_grad()
    def keep_zeros(self) -> None:
        """Set to zero what the masks say."""
        if self.masks:
            for name, weight in self.net.named_parameters():
                if name in self.masks:
                    self.masks[name] = self.masks[name].to(weight.device)
                    weight.mul_(self.masks[name])

    def _find_zeros(self, net: nn.Module, _: Any) -> None:
        self.masks = masks_in({name: weight.detach() for name, weight in net.named_parameters()})
        zeros = sum(int((~mask).sum()) for mask in self.masks.values())
        _log.info("%d zeros in %d weights are kept", zeros, len(self.masks))


def _module(name: str) -> str:
    """Where a network that can be a pyramid is defined."""
    modules = {each: timm.models.model_entrypoint(each).__module__ for each in timm.list_models()}
    taken = [each for each, module in modules.items() if module.startswith(_FAMILIES)]
    base = name.partition(".")[0]                                     # without timm's tag of pretrained weights
    if base in taken:
        return modules[base]
    if base in modules:
        ours = ", ".join(each for each in taken if modules[each].startswith("swconv."))
        raise ValueError(f"a pyramid needs one of our networks or a ConvNeXt of timm, got {name}. Take one of {ours}, or of "
                         "timm's convnext_* and convnextv2_*.")
    raise ValueError(f"unknown network {name}; the nearest known name is {get_close_matches(base, taken, 1, 0.0)[0]}.")


def _masked(pyramid: Pyramid, prefix: str, keep_vars: bool) -> None:
    """An optimizer's step moves zeros; what is saved right behind it would lose the masks."""
    pyramid.keep_zeros()


def layer_id(name: str, rule: Rule, num_layers: int) -> int:
    """Which of num_layers + 2 groups a parameter of a `Pyramid` is in; 0 learns slowest, num_layers + 1 with the full rate.

    Parameters
    ----------
    name : str
        As `Pyramid.named_parameters` has it.
    rule : str
        "layer_wise": blocks of the third stage in threes. "stage_wise": a stage is a group, all downsampling is group 0.
        "norms": all in the last group.
    """
    words = name.split(".")
    if rule == "norms" or words[0] != "net" or words[1] not in ("stem", "stages"):
        return num_layers + 1
    stage = 0 if words[1] == "stem" else int(words[2])
    if words[1] == "stem" or words[3] == "downsample":
        return 0 if rule == "stage_wise" else (0, 2, 3, num_layers)[stage]
    return stage + 1 if rule == "stage_wise" else (1, 2, 3 + int(words[4]) // 3, num_layers)[stage]


def parameter_groups(model: nn.Module, lr: float, weight_decay: float, rule: Rule = "layer_wise", decay_rate: float = 1.0,
                     num_layers: int = 12) -> list[dict[str, Any]]:
    """Groups for an optimizer: lr * decay_rate ** (num_layers + 1 - id), and weight decay where the papers' code has it.

    Parameters
    ----------
    model : nn.Module
        Holds a `Pyramid`, or is one; everything outside it learns with the full rate.
    rule : str
        As in `layer_id`. Weight decay is 0 for biases and other vectors, but not for single numbers (the scales of FCOS3D's
        head) and not for GRN, whose scale and shift have four dimensions in the published code; with "norms" (SLaK's 80k
        schedule) it is 0 for norms alone.
    num_layers : int
        n of the published recipes: 6 for T, 12 for S and B, 9 or 12 for SW.

    Returns
    -------
    list of dict
        params, names, lr, lr_scale, layer_id, weight_decay.

    Raises
    ------
    ValueError
        For another rule, or a model without a pyramid.

    Warns
    -----
    UserWarning
        When the third stage has more blocks than num_layers has room for: they would learn faster than the last stage, or
        than the heads. The published rule does so, and so do we.
    """
    if rule not in ("layer_wise", "stage_wise", "norms"):
        raise ValueError(f"the rule of layer decay must be layer_wise, stage_wise or norms, got {rule!r}.")
    places = {id(weight): name for pyramid in model.modules() if isinstance(pyramid, Pyramid)
              for name, weight in pyramid.named_parameters()}
    if not places:
        raise ValueError(f"layer decay needs a model with a Pyramid in it, got {type(model).__name__}.")
    grn, norms = _of(model, GlobalResponseNorm), _of(model, nn.LayerNorm, _BatchNorm, nn.GroupNorm)
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, weight in model.named_parameters():
        if not weight.requires_grad:
            continue
        free = id(weight) in norms if rule == "norms" else (
            (weight.ndim == 1 or name.endswith(".bias")) and id(weight) not in grn)
        number = layer_id(places.get(id(weight), "head"), rule, num_layers)
        scale = decay_rate ** (num_layers + 1 - number)
        group = groups.setdefault((number, free), {
            "params": [], "names": [], "lr": lr * scale, "lr_scale": scale, "layer_id": number,
            "weight_decay": 0.0 if free else weight_decay})
        group["params"].append(weight)
        group["names"].append(name)
    last = max(layer_id(name, rule, num_layers) for name in places.values() if name.startswith("net.stages.2.blocks."))
    if decay_rate != 1 and rule == "layer_wise" and last > num_layers:
        warnings.warn(f"num_layers={num_layers} is too small for these depths: blocks of the third stage get id {last}, and "
                      f"the last stage {num_layers}. As published they learn faster than it. Raise num_layers to {last} or "
                      "more to avoid it.", stacklevel=2)
    return list(groups.values())


def _of(model: nn.Module, *kinds: type) -> set[int]:
    return {id(weight) for module in model.modules() if isinstance(module, kinds) for weight in module.parameters()}
