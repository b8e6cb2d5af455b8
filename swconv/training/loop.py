"""The training loop: timm's parts, our order of things.

`train` turns a resolved row of params into weights, metrics and a log. It publishes by rename when all is done; until
then the state lives in checkpoints/<key>/.
"""

import hashlib
import json
import logging
import math
import random
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save as to_safetensors
from timm.layers.grn import GlobalResponseNorm
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from tqdm import tqdm

import swconv.models  # noqa: F401  registers the models with timm
from swconv.atomic import write_atomic, write_json
from swconv.sparsity import SparseTraining
from swconv.training import checkpoint, manifest
from swconv.training.data import MEMORY_FORMATS, TrainLoader, ValLoader, erasing_for, mixup_for, to_input
from swconv.training.record import values

VAL_BATCH = 250
_log = logging.getLogger(__name__)


class DivergedError(RuntimeError):
    """The loss is no longer a number."""


def train(config: Mapping[str, Any], data_dir: Path, out: Path, checkpoints: Path, record: dict[str, Any],
          log_every: int = 0) -> None:
    """Train one run and publish metrics.json, run.json, log.jsonl and weights.safetensors with its sha256.

    A killed training goes on from its last finished epoch and ends, on a CPU, bit for bit where an undisturbed one ends.

    Parameters
    ----------
    config : mapping
        Resolved row of params: model, recipe, dataset, machine.
    data_dir : Path
        Holds data.json, manifest.csv and the images.
    out : Path
        Folder of the results.
    checkpoints : Path
        Folder of this run's resumable state.
    record : dict
        Circumstances (`swconv.training.record.circumstances`); holds run and seed.
    log_every : int
        Also log every so many steps; 0 for epochs only.

    Raises
    ------
    DivergedError
        After a loss that is not finite; the last good checkpoint stays.
    """
    with checkpoint.exclusive(checkpoints):
        _train(config, data_dir, out, checkpoints, record, log_every)


def _train(config: Mapping[str, Any], data_dir: Path, out: Path, checkpoints: Path, record: dict[str, Any],
           log_every: int) -> None:
    recipe, dataset, machine = config["recipe"], config["dataset"], config["machine"]
    seed, device = record["seed"], prepare_machine(machine)
    _seed(seed)
    model = build(config).to(device, memory_format=MEMORY_FORMATS[machine["memory_format"]])
    manifest.verify(data_dir)
    pinned = device.type == "cuda"
    loader = TrainLoader(dataset, recipe, data_dir, seed, pin_memory=pinned)
    val = ValLoader(dataset, data_dir, VAL_BATCH, pin_memory=pinned)
    steps = len(loader)
    optimizer = torch.optim.AdamW(parameter_groups(model, recipe["weight_decay"]), lr=recipe["lr"],
                                  betas=tuple(recipe["betas"]), eps=recipe["eps"])
    schedule = _schedule(optimizer, recipe, steps)
    ema = ModelEmaV3(model, decay=recipe["ema_decay"]) if recipe["ema_decay"] else None
    sparsity = recipe["sparsity"] and SparseTraining(model, total_steps=recipe["epochs"] * steps, seed=seed,
                                                     **recipe["sparsity"])
    parts = {"model": model, "optimizer": optimizer, "ema": ema and ema.module, "sparsity": sparsity}
    parts = {name: part for name, part in parts.items() if part}
    mixing = mixup_for(recipe, dataset["num_classes"]), erasing_for(recipe, device)
    prepare = normaliser(config, device)

    state = checkpoint.load(checkpoints)
    if state:
        for name, part in parts.items():
            part.load_state_dict(state[name])
        _log.info("%s seed %d: resuming after epoch %d of %d", record["run"], seed, state["epoch"], recipe["epochs"])
    elif sparsity:
        images, labels = next(loader.epoch(0))
        first = slice(machine["micro_batch"])
        sparsity.initialise(prepare(images[first]), labels[first].to(device))
    lines, start = (state["lines"], state["epoch"]) if state else ([], 0)
    spent = state["seconds"] if state else 0.0

    title, began = f"{record['run']} seed {record['seed']}", time.monotonic()
    for epoch in range(start + 1, recipe["epochs"] + 1):
        clock = time.monotonic()
        model.train()
        total, bar = 0.0, _bar(loader.epoch(epoch), steps, f"{title} epoch {epoch}/{recipe['epochs']}", recipe["batch_size"])
        for step, (images, labels) in enumerate(bar):
            schedule.step_update((epoch - 1) * steps + step)
            x, target = prepare(images), labels.to(device)
            loss = _step(model, optimizer, x, target, mixing, recipe, machine)
            if not math.isfinite(loss):
                raise DivergedError(
                    f"the loss became {loss} in epoch {epoch}, step {step + 1}; the last good checkpoint, after epoch "
                    f"{epoch - 1}, is in {checkpoints}. Lower lr or lengthen warmup_epochs in params/."
                )
            if sparsity and (event := sparsity.step(optimizer)):
                lines.append(event)
            if ema:
                ema.update(model, step=(epoch - 1) * steps + step)
            if log_every and (step + 1) % log_every == 0:
                lines.append({"event": "step", "step": (epoch - 1) * steps + step + 1, "loss": loss})
            total += loss
        line = {"epoch": epoch, "train_loss": total / steps, "lr": optimizer.param_groups[0]["lr"]}
        training = time.monotonic() - clock
        if epoch % recipe["evaluate_every"] == 0 or epoch == recipe["epochs"]:
            result = scores(ema.module if ema else model, val, prepare, device)
            line |= {"val_loss": result["loss"], "top1": result["top1"]}
        if sparsity:
            line["density"] = sparsity.density()
        line |= {"images_per_second": steps * recipe["batch_size"] / training, "seconds": time.monotonic() - clock}
        lines.append(line)
        here = time.monotonic() - began
        checkpoint.save(checkpoints, epoch, {name: part.state_dict() for name, part in parts.items()}
                        | {"lines": lines, "seconds": spent + here})
        _status(title, line, recipe["epochs"], spent + here, here / (epoch - start))

    trained = ema.module if ema else model
    epochs = [line for line in lines if "epoch" in line]
    measured = [line["top1"] for line in epochs if "top1" in line]
    metrics = values(
        top1=(measured[-1], "%"), top1_best=(max(measured), "%"), train_loss=(epochs[-1]["train_loss"], ""),
        val_loss=(epochs[-1]["val_loss"], ""), epochs=(recipe["epochs"], "epochs"), steps=(recipe["epochs"] * steps, "steps"),
        parameters=(sum(p.numel() for p in model.parameters()), "weights"),
        **({"density": (sparsity.density(), "")} if sparsity else {}),
    )
    body = to_safetensors({name: tensor.contiguous() for name, tensor in trained.state_dict().items()})
    write_atomic(out / "weights.safetensors", body)
    write_atomic(out / "log.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
    write_json(out / "run.json", record | {"seconds": round(spent + time.monotonic() - began, 1),
                                           "resumed_from_epoch": start or None})
    write_json(out / "metrics.json", metrics)
    write_atomic(out / "weights.safetensors.sha256", (hashlib.sha256(body).hexdigest() + "\n").encode())


def build(config: Mapping[str, Any]) -> nn.Module:
    """The network of a resolved row, freshly initialised from the global generator."""
    model, dataset = config["model"], config["dataset"]
    return timm.create_model(model["name"], num_classes=dataset["num_classes"], in_chans=dataset["in_chans"],
                             drop_path_rate=config["recipe"]["drop_path_rate"], **model["args"])


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on all but norms, scales and biases; GRN's scale and shift decay too, as published (they are 4-D there)."""
    grn = {id(p) for module in model.modules() if isinstance(module, GlobalResponseNorm) for p in module.parameters()}
    decayed = [p for p in model.parameters() if p.ndim > 1 or id(p) in grn]
    free = [p for p in model.parameters() if p.ndim <= 1 and id(p) not in grn]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]


def prepare_machine(machine: Mapping[str, Any]) -> torch.device:
    """Set what bitwise equality depends on; the trainer sets it itself, whatever the environment says."""
    if machine["device"] == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("the profile trains on a GPU (machine.device: cuda), but torch sees none. Use a machine with one, "
                           "or set machine.device: cpu in the profile.")
    torch.set_num_threads(machine["threads"])
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return torch.device(machine["device"])


def normaliser(config: Mapping[str, Any], device: torch.device) -> Callable[[Tensor], Tensor]:
    """uint8 images (B, C, H, W) -> network input on the device."""
    dataset = config["dataset"]
    return partial(to_input, mean=dataset["mean"], std=dataset["std"], device=device,
                   memory_format=config["machine"]["memory_format"])


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _schedule(optimizer: torch.optim.Optimizer, recipe: Mapping[str, Any], steps: int) -> CosineLRScheduler:
    """Per step: linear from 0 over the warm-up, then a cosine to min_lr."""
    warmup = round(recipe["warmup_epochs"] * steps)
    return CosineLRScheduler(optimizer, t_initial=recipe["epochs"] * steps - warmup, lr_min=recipe["min_lr"], warmup_t=warmup,
                             warmup_lr_init=0.0, warmup_prefix=True, t_in_epochs=False)


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, target: Tensor, mixing: tuple,
          recipe: Mapping[str, Any], machine: Mapping[str, Any]) -> float:
    """One optimizer step, its gradient summed over micro-batches; returns the mean loss. None on a loss that is no number."""
    mixup, erasing = mixing
    if erasing:
        x = erasing(x)
    if mixup:
        x, target = mixup(x, target)                                  # target: (B, classes), smoothed
    smoothing = 0.0 if mixup else recipe["label_smoothing"]
    optimizer.zero_grad(set_to_none=True)
    size, total = machine["micro_batch"] or len(x), 0.0
    for part, part_target in zip(x.split(size), target.split(size), strict=True):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=machine["amp"] == "bfloat16"):
            logits = model(part)                                      # (b, classes)
            loss = F.cross_entropy(logits, part_target, label_smoothing=smoothing) * (len(part) / len(x))
        loss.backward()
        total += loss.item()
    if math.isfinite(total):
        optimizer.step()
    return total


@torch.inference_mode()
def scores(model: nn.Module, val: ValLoader, prepare: Any, device: torch.device) -> dict[str, Any]:
    """Top-1 and top-5 in %, mean cross-entropy, logits, and top-1 by distance where the files tell one."""
    model.eval()
    batches = [(model(prepare(images)).float().cpu(), labels) for images, labels in val]
    logits, labels = (torch.cat(part) for part in zip(*batches, strict=True))
    hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
    right = hits[:, 0].double()
    distances = {} if val.distances is None else {
        int(d): 100 * right[val.distances == d].mean().item() for d in val.distances.unique()
    }
    return {"top1": 100 * right.mean().item(), "top5": 100 * hits.any(1).double().mean().item(),
            "loss": F.cross_entropy(logits, labels).item(), "images": len(labels), "logits": logits,
            "top1_by_distance": distances}


def _bar(batches: Iterable, steps: int, title: str, batch_size: int) -> tqdm:
    return tqdm(batches, total=steps, desc=title, unit="images", unit_scale=batch_size, disable=not sys.stderr.isatty(),
                leave=False)


def _status(name: str, line: Mapping[str, Any], epochs: int, spent: float, per_epoch: float) -> None:
    """One line per epoch, with the remaining time at the pace so far."""
    top1 = f"{line['top1']:5.1f} %" if "top1" in line else "    -  "
    _log.info("%s  epoch %3d/%d  loss %.3f  top-1 %s  %5.0f images/s  %4.0f s spent  %4.0f s to go", name, line["epoch"],
              epochs, line["train_loss"], top1, line["images_per_second"], spent, per_epoch * (epochs - line["epoch"]))
