"""Backbones under the names of MMDetection and MMSegmentation: what their configurations of SLaK, SW and ConvNeXt load."""

import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from timm.models import ConvNeXt
from torch import Tensor

from swconv.atomic import write_atomic
from swconv.downstream.finetuning import build_pyramid
from swconv.downstream.pyramid import Pyramid
from swconv.training.finished import first_line, published_sha256
from swconv.weights import official_names, to_official

PREFIX = "backbone."
# timm's ConvNeXt -> the official one, applied in order.
_CONVNEXT = (
    (r"^stem\.(\d)\.", r"downsample_layers.0.\1."),
    (r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1."),
    (r"^stages\.(\d)\.blocks\.", r"stages.\1."),
    (r"\.conv_dw\.", ".dwconv."),
    (r"\.mlp\.fc([12])\.", r".pwconv\1."),
)


def backbone_names(pyramid: Pyramid) -> dict[str, str]:
    """Our name -> theirs, for every entry of a pyramid's state dict: backbone.downsample_layers..., .stages..., .norm0...."""
    names = _convnext_names(pyramid.net) if isinstance(pyramid.net, ConvNeXt) else official_names(pyramid.net)
    ours = {f"net.{name}": PREFIX + theirs for name, theirs in names.items()}
    return ours | {name: PREFIX + name for name in pyramid.state_dict() if not name.startswith("net.")}


def to_openmmlab(pyramid: Pyramid) -> dict[str, Tensor]:
    """The pyramid's weights under their names and in their shapes."""
    names, state = backbone_names(pyramid), pyramid.state_dict()
    if isinstance(pyramid.net, ConvNeXt):
        return {names[name]: tensor for name, tensor in state.items()}
    inner = {PREFIX + name: tensor for name, tensor in to_official(pyramid.net).items()}
    return inner | {names[name]: tensor for name, tensor in state.items() if not name.startswith("net.")}


def export(config: Mapping[str, Any], weights: Path, out: Path) -> None:
    """Write the backbone of a finished fine-tune as .pth (under state_dict, as MMEngine reads it) or as .safetensors.

    Parameters
    ----------
    config : mapping
        Its resolved row of params/downstream.yaml.

    Raises
    ------
    FileNotFoundError, ValueError
        For another suffix of `out`; weights that are not there, damaged, or another network's.
    """
    published_sha256(weights)
    pyramid = build_pyramid(config)
    body = {name.removeprefix("pyramid."): tensor for name, tensor in load_file(weights).items() if name.startswith("pyramid.")}
    try:
        pyramid.load_state_dict(body)
    except RuntimeError as error:
        raise ValueError(f"{weights} needs to hold a fine-tune of this row's network, got '{first_line(error)}'. Take the row "
                         "of params/downstream.yaml that it was trained with.") from error
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in to_openmmlab(pyramid).items()}
    if out.suffix == ".safetensors":
        write_atomic(out, to_safetensors(state))
    elif out.suffix == ".pth":
        buffer = io.BytesIO()
        torch.save({"meta": {}, "state_dict": state}, buffer)
        write_atomic(out, buffer.getvalue())
    else:
        raise ValueError(f"export writes .pth or .safetensors, got {out}; name the file so.")


def _convnext_names(net: ConvNeXt) -> dict[str, str]:
    names = {}
    for ours in net.state_dict():
        name = ours
        for pattern, to in _CONVNEXT:
            name = re.sub(pattern, to, name)
        names[ours] = name
    return names
