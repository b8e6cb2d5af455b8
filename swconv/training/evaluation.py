"""Evaluation: what finished weights do on the validation images, in training form and merged."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from timm.utils import reparameterize_model
from torch import nn

from swconv.atomic import write_json
from swconv.ops import ShiftwiseConv2d
from swconv.training import manifest
from swconv.training.data import MEMORY_FORMATS, ValLoader
from swconv.training.finished import diverged_at, load_weights, published_sha256
from swconv.training.loop import VAL_BATCH, build, normaliser, prepare_machine, scores
from swconv.training.record import values


def evaluate(config: Mapping[str, Any], data_dir: Path, weights: Path, out: Path, record: dict[str, Any]) -> None:
    """Measure finished weights; publish metrics.json and run.json. Of a run that diverged they only say so, and at which step.

    Raises
    ------
    ValueError
        When the weights are not those that were published (sha256), or do not fit the model, or the images changed.
    """
    began = time.monotonic()
    device, digest = prepare_machine(config["machine"]), published_sha256(weights)
    if (step := diverged_at(weights)) is not None:
        _publish(out, record, digest, began, {"diverged": (step, "step")})
        return
    manifest.verify(data_dir, ("val",))
    model = build(config).to(device, memory_format=MEMORY_FORMATS[config["machine"]["memory_format"]])
    load_weights(model, weights)
    val = ValLoader(config["dataset"], data_dir, VAL_BATCH)
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
    _publish(out, record, digest, began, metrics)


def _publish(out: Path, record: dict[str, Any], digest: str, began: float, metrics: Mapping[str, tuple[float, str]]) -> None:
    write_json(out / "run.json", record | {"weights_sha256": digest, "seconds": round(time.monotonic() - began, 1),
                                           "resumed_from_epoch": None})
    write_json(out / "metrics.json", values(**metrics))


def alive_filters(model: nn.Module) -> dict[int, float]:
    """Share of the SW filters that are not zero, in %, by stage (1, 2, ...), over all blocks and Rep branches."""
    shares = {}
    for number, stage in enumerate(model.stages, start=1):
        layers = [layer for layer in stage.modules() if isinstance(layer, ShiftwiseConv2d)]
        alive = [weight.flatten(1).any(1).double() for layer in layers for weight in layer.filters]
        if alive:
            shares[number] = 100 * torch.cat(alive).mean().item()
    return shares
