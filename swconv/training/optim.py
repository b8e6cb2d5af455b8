"""What the optimizer is given: which weights decay, how fast each layer learns, and the learning rate of every step."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers.grn import GlobalResponseNorm
from timm.scheduler import CosineLRScheduler
from torch import nn

BLOCKS = 3                                                            # of the long stage that learn at one rate


def parameter_groups(model: nn.Module, weight_decay: float, layer_decay: float | None = None) -> list[dict[str, Any]]:
    """Weight decay on all but norms, scales and biases; GRN's scale and shift decay too, as published (they are 4-D there).

    Parameters
    ----------
    model : nn.Module
        With layer_decay, one whose parts are named stem, stages and head (`swconv.models`).
    weight_decay : float
    layer_decay : float, optional
        Factor between the learning rates of neighbouring layers (`layer_id`), the head's being whole; 1 and None are off.

    Returns
    -------
    list of dict
        Groups for torch's optimizers; `lr_scale`, which timm's schedulers apply, where layers differ.
    """
    grn = {id(p) for module in model.modules() if isinstance(module, GlobalResponseNorm) for p in module.parameters()}
    decayed = [(name, p) for name, p in model.named_parameters() if p.ndim > 1 or id(p) in grn]
    free = [(name, p) for name, p in model.named_parameters() if p.ndim <= 1 and id(p) not in grn]
    kinds = ((decayed, weight_decay), (free, 0.0))
    if layer_decay in (None, 1):
        return [{"params": [p for _, p in kind], "weight_decay": decay} for kind, decay in kinds]
    depths = [len(stage.blocks) for stage in model.stages]
    groups: dict[tuple[float, int], dict[str, Any]] = {}
    for kind, decay in kinds:
        for name, p in kind:
            layer = layer_id(name, depths)
            scale = layer_decay ** (layer_id("head", depths) - layer)
            groups.setdefault((decay, layer), {"params": [], "weight_decay": decay, "lr_scale": scale})["params"].append(p)
    return list(groups.values())


def layer_id(name: str, depths: Sequence[int]) -> int:
    """Place of a parameter in ConvNeXt's layer-wise decay (`layer_wise`; its object detection uses it too).

    Parameters
    ----------
    name : str
        Of a parameter: `stem...`, `stages.S.downsample...`, `stages.S.blocks.B...`; all others are the head's.
    depths : sequence of int
        Blocks per stage.

    Returns
    -------
    int
        0 for the stem; then one for each early stage with the downsampling before it, one for every three blocks of the stage
        before the last, its downsampling with the first three; one for the last stage; and one for the head. With depths
        3-3-27-3: 0; 1, 2; 3 to 11; 12; 13.
    """
    if name.startswith("stem"):
        return 0
    long = len(depths) - 2                                            # index of the stage that is divided
    last = long + 1 + -(-depths[long] // BLOCKS)
    found = re.match(r"stages\.(\d+)\.(?:downsample|blocks\.(\d+))", name)
    if not found:
        return last + 1
    stage, block = int(found[1]), int(found[2] or 0)
    return last if stage > long else stage + 1 + (block // BLOCKS if stage == long else 0)


def schedule(optimizer: torch.optim.Optimizer, recipe: Mapping[str, Any], steps: int) -> CosineLRScheduler:
    """Per step: linear from 0 over the warm-up, then a cosine to min_lr; `steps` to an epoch."""
    warmup = round(recipe["warmup_epochs"] * steps)
    return CosineLRScheduler(optimizer, t_initial=recipe["epochs"] * steps - warmup, lr_min=recipe["min_lr"], warmup_t=warmup,
                             warmup_lr_init=0.0, warmup_prefix=True, t_in_epochs=False)
