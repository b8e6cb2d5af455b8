"""Evaluation: what finished weights do on the validation images, in training form and merged."""

import hashlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from timm.utils import reparameterize_model
from torch import nn

from swconv.atomic import write_json
from swconv.ops import ShiftwiseConv2d
from swconv.training.data import MEMORY_FORMATS, ValLoader
from swconv.training.loop import VAL_BATCH, build, normaliser, prepare_machine, scores
from swconv.training.record import values


def evaluate(config: Mapping[str, Any], data_dir: Path, weights: Path, out: Path, record: dict[str, Any]) -> None:
    """Measure finished weights; publish metrics.json and run.json.

    Raises
    ------
    ValueError
        When the weights are not those that were published (sha256), or do not fit the model.
    """
    began = time.monotonic()
    device = prepare_machine(config["machine"])
    dataset = config["dataset"]
    digest = published_sha256(weights)
    model = build(config).to(device, memory_format=MEMORY_FORMATS[config["machine"]["memory_format"]])
    model.load_state_dict(load_file(weights))
    val = ValLoader(dataset, data_dir, VAL_BATCH)
    normalise = normaliser(config, device)
    alive = alive_filters(model)
    plain = scores(model, val, normalise)
    merged = scores(reparameterize_model(model.eval()), val, normalise)
    metrics = {name: (plain[name], unit) for name, unit in (("top1", "%"), ("top5", "%"), ("loss", ""), ("images", "images"))}
    metrics["top1_merged"] = (merged["top1"], "%")
    metrics["merged_logit_difference"] = ((plain["logits"] - merged["logits"]).abs().max().item(), "")
    metrics |= {f"filters_alive_stage_{stage}": (share, "%") for stage, share in alive.items()}
    for distance, top1 in plain["top1_by_distance"].items():
        metrics[f"top1_distance_{distance}"] = (top1, "%")
    write_json(out / "run.json", record | {"weights_sha256": digest, "seconds": round(time.monotonic() - began, 1),
                                           "resumed_from_epoch": None})
    write_json(out / "metrics.json", values(**metrics))


def published_sha256(weights: Path) -> str:
    """The sha256 of finished weights, which has to be the one beside them."""
    stamp = weights.with_name(weights.name + ".sha256")
    if not (weights.exists() and stamp.exists()):
        raise FileNotFoundError(f"Evaluation needs {weights} and {stamp.name} beside it; train the run first.")
    digest, published = hashlib.sha256(weights.read_bytes()).hexdigest(), stamp.read_text().strip()
    if digest != published:
        raise ValueError(f"{weights} is damaged: its sha256 is {digest[:12]}..., published was {published[:12]}.... "
                         f"Restore it with `dvc checkout --force {weights.parent.parent}` or train it again.")
    return digest


def alive_filters(model: nn.Module) -> dict[int, float]:
    """Share of the SW filters that are not zero, in %, by stage (1, 2, ...), over all blocks and Rep branches."""
    shares = {}
    for number, stage in enumerate(model.stages, start=1):
        layers = [layer for layer in stage.modules() if isinstance(layer, ShiftwiseConv2d)]
        alive = [weight.flatten(1).any(1).double() for layer in layers for weight in layer.filters]
        if alive:
            shares[number] = 100 * torch.cat(alive).mean().item()
    return shares
