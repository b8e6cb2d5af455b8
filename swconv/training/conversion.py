"""A trained run's weights for a row that says the same with another layout: #0 -> #1 of the SW paper, an identity."""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_safetensors
from torch import nn

from swconv.atomic import write_atomic, write_json
from swconv.training.data import MEMORY_FORMATS, ValLoader
from swconv.training.finished import load_weights, published_sha256
from swconv.training.loop import VAL_BATCH, build, normaliser, prepare_machine, scores
from swconv.training.record import values
from swconv.weights import lay_out_state

IMAGES = 4                                                            # seeded, to compare logits on


def convert_run(source: Mapping[str, Any], target: Mapping[str, Any], data_dir: Path, weights: Path, out: Path,
                seed: int) -> None:
    """Cut the strips of a trained SLaK into squares; publish weights.safetensors with its sha256, and metrics.json.

    The metrics say how far the logits of both networks are apart, in float64 and float32 on seeded images and in float32 on
    the validation images, and the accuracy there before and after.

    Parameters
    ----------
    source, target : mapping
        Resolved rows of params: the one that was trained, and the one that takes its weights.
    data_dir : Path
        Holds data.json and the images.
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
    digest, dataset, machine = published_sha256(weights), source["dataset"], source["machine"]
    networks = [build(config).eval() for config in (source, target)]
    load_weights(networks[0], weights)
    networks[1].load_state_dict(lay_out_state(networks[0].state_dict()))
    data = to_safetensors(networks[1].state_dict(), {"source_sha256": digest})
    apart = differences("logit_difference", networks[0], lambda _: networks[1], dataset, seed)
    device, val = prepare_machine(machine), ValLoader(dataset, data_dir, VAL_BATCH)
    before, after = (scores(network.to(device, memory_format=MEMORY_FORMATS[machine["memory_format"]]), val,
                            normaliser(source, device)) for network in networks)
    write_atomic(out / "weights.safetensors", data)
    write_atomic(out / "weights.safetensors.sha256", f"{hashlib.sha256(data).hexdigest()}\n".encode())
    write_json(out / "metrics.json", values(
        **apart, top1_before=(before["top1"], "%"), top1_after=(after["top1"], "%"), images=(before["images"], "images"),
        val_logit_difference=((before["logits"] - after["logits"]).abs().max().item(), ""),
    ))


@torch.no_grad()
def differences(
    name: str, network: nn.Module, other_form: Callable[[nn.Module], nn.Module], dataset: Mapping[str, Any], seed: int
) -> dict[str, tuple[float, str]]:
    """Metrics `<name>_float64` and `_float32`: how far the logits of two forms are apart on images drawn from a seed.

    `other_form` is made of the network in each precision; the network, in evaluation mode, is left in float32.
    """
    size, found = dataset["image_size"], {}
    images = torch.randn(IMAGES, dataset["in_chans"], size, size, generator=torch.Generator().manual_seed(seed))
    for kind in (torch.float64, torch.float32):
        a, b = (form(images.to(kind)) for form in (network.to(kind), other_form(network).to(kind)))
        found[f"{name}_{str(kind).removeprefix('torch.')}"] = ((a - b).abs().max().item(), "")
    return found
