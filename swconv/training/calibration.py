"""BatchNorm recalibration: the statistics of a finished network, computed anew over the training images."""

import hashlib
import logging
import time
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from safetensors.torch import save as to_safetensors
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn
from tqdm import tqdm

from swconv.atomic import write_atomic, write_json
from swconv.training import manifest
from swconv.training.data import MEMORY_FORMATS, TrainLoader, ValLoader, erasing_for
from swconv.training.finished import diverged_at, load_weights, published_sha256
from swconv.training.loop import VAL_BATCH, autocast, build, normaliser, prepare_machine, scores, seed_all, share_of_batch
from swconv.training.record import values

_log = logging.getLogger(__name__)


def calibrate(config: Mapping[str, Any], data_dir: Path, weights: Path, out: Path, record: dict[str, Any]) -> None:
    """Recompute the statistics of every BatchNorm; publish weights, their sha256, metrics.json and run.json.

    The metrics hold the accuracy on the validation images before and after. Of a run that diverged they only say so.

    Parameters
    ----------
    config : mapping
        Resolved row of params; its recipe says how many passes.
    data_dir : Path
        Holds data.json, manifest.csv and the images.
    weights : Path
        Of the finished run, with its sha256 beside it: those that are evaluated, its average where it keeps one.
    out : Path
        Folder of the results.
    record : dict
        Circumstances (`swconv.training.record.circumstances`).

    Raises
    ------
    ValueError
        When the network has no BatchNorm, or the weights are damaged or do not fit it.

    Notes
    -----
    SLaK's text: after the training, with the averaged weights, the statistics are reset and one pass over the training images
    in training mode, without gradients, averages them cumulatively; no released code does it. Which augmentation the pass sees
    is not said: here it is the recipe's, without Mixup and CutMix.
    """
    began, recipe, machine = time.monotonic(), config["recipe"], config["machine"]
    device, digest = prepare_machine(machine), published_sha256(weights)
    if (step := diverged_at(weights)) is not None:
        _publish(out, record, digest, began, {}, {"diverged": (step, "step")}, {"diverged": str(step)})
        return
    seed_all(record["seed"])
    model = build(config)
    if not any(isinstance(module, _BatchNorm) for module in model.modules()):
        raise ValueError(f"run {record['run']} has no BatchNorm to calibrate; evaluate it as it is.")
    load_weights(model, weights)
    model.to(device, memory_format=MEMORY_FORMATS[machine["memory_format"]])
    manifest.verify(data_dir)
    loader = TrainLoader(config["dataset"], recipe, data_dir, record["seed"], share_of_batch(recipe, machine, 1))
    val, normalise = ValLoader(config["dataset"], data_dir, VAL_BATCH), normaliser(config, device)
    passes = recipe["calibration_passes"]
    erasing = erasing_for(recipe, device) or (lambda x: x)
    before = scores(model, val, normalise)
    epochs = (loader.epoch(recipe["epochs"] + number) for number in range(1, passes + 1))     # none that training has seen
    images = tqdm(chain.from_iterable(epochs), "calibrate", passes * len(loader) * loader.parts, unit="batch", disable=None)
    with autocast(machine):
        update_bn((erasing(normalise(batch)) for batch, _ in images), model)
    after = scores(model, val, normalise)
    _log.info("%s seed %d: top-1 %.2f %% before, %.2f %% after", record["run"], record["seed"], before["top1"], after["top1"])
    _publish(out, record, digest, began, model.state_dict(), {
        "top1_before": (before["top1"], "%"), "top1_after": (after["top1"], "%"), "loss_before": (before["loss"], ""),
        "loss_after": (after["loss"], ""), "images": (before["images"], "images"),
        "passes": (passes, "passes over the training images"),
        "logit_difference": ((before["logits"] - after["logits"]).abs().max().item(), "")}, {})


def _publish(out: Path, record: dict[str, Any], source: str, began: float, state: Mapping[str, Tensor],
             metrics: Mapping[str, tuple[float, str]], note: dict[str, str]) -> None:
    body = to_safetensors({name: tensor.contiguous() for name, tensor in state.items()}, note or None)
    write_atomic(out / "weights.safetensors", body)
    write_json(out / "run.json", record | {"source_sha256": source, "seconds": round(time.monotonic() - began, 1)})
    write_json(out / "metrics.json", values(**metrics))
    write_atomic(out / "weights.safetensors.sha256", (hashlib.sha256(body).hexdigest() + "\n").encode())
