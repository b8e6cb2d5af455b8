"""A trained run's weights for a row that says the same with another layout: #0 -> #1 of the SW paper, an identity."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import nn

from swconv.atomic import write_atomic, write_json
from swconv.training.evaluation import published_sha256
from swconv.training.loop import build
from swconv.training.record import values
from swconv.weights import lay_out_state

IMAGES = 4                                                            # seeded, to compare logits on


def convert_run(source: Mapping[str, Any], target: Mapping[str, Any], weights: Path, out: Path, seed: int) -> None:
    """Cut the strips of a trained SLaK into squares; publish weights.safetensors with its sha256, and metrics.json.

    The metrics say how far the logits of both networks are apart, in float64 and float32, on seeded images.

    Parameters
    ----------
    source, target : mapping
        Resolved rows of params: the one that was trained, and the one that takes its weights.
    weights : Path
        Of the trained run, with its sha256 beside it.

    Raises
    ------
    ValueError
        When the rows differ by more than `laid_out`, or the weights are damaged.
    """
    changed = {key for key in source["model"]["args"] if source["model"]["args"][key] != target["model"]["args"][key]}
    if changed != {"laid_out"} or not target["model"]["args"]["laid_out"]:
        raise ValueError("weights go over to another row by laying them out (laid_out: true) and by nothing else; these rows "
                         f"differ in {', '.join(sorted(changed)) or 'nothing'}.")
    digest = published_sha256(weights)
    networks = [build(config).eval() for config in (source, target)]
    networks[0].load_state_dict(load_file(weights))
    networks[1].load_state_dict(lay_out_state(networks[0].state_dict()))
    data = to_safetensors(networks[1].state_dict(), {"source_sha256": digest})
    write_atomic(out / "weights.safetensors", data)
    write_atomic(out / "weights.safetensors.sha256", f"{hashlib.sha256(data).hexdigest()}\n".encode())
    write_json(out / "metrics.json", values(
        logit_difference_float64=(_difference([network.double() for network in networks], source["dataset"], seed), ""),
        logit_difference_float32=(_difference([network.float() for network in networks], source["dataset"], seed), ""),
    ))


@torch.no_grad()
def _difference(networks: list[nn.Module], dataset: Mapping[str, Any], seed: int) -> float:
    """Largest difference of two networks' logits on images drawn from a seed."""
    generator = torch.Generator().manual_seed(seed)
    size = dataset["image_size"]
    images = torch.randn(IMAGES, dataset["in_chans"], size, size, generator=generator)
    a, b = (network(images.to(next(network.parameters()))) for network in networks)
    return (a - b).abs().max().item()
