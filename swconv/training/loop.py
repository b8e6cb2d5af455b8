"""The training loop: timm's parts, our order of things.

`train` turns a resolved row of params into weights, metrics and a log. It publishes by rename when all is done; until
then the state lives in checkpoints/<key>/, with a copy of the log.
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
from itertools import islice
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
from swconv.training.memory import keep_freed_memory
from swconv.training.record import values

VAL_BATCH = 250
_log = logging.getLogger(__name__)


class DivergedError(RuntimeError):
    """The loss, or a weight, is no longer a number."""


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
        Folder of this run's resumable state; log.jsonl there grows by the epoch.
    record : dict
        Circumstances (`swconv.training.record.circumstances`); holds run and seed.
    log_every : int
        Also log every so many steps; 0 for epochs only.

    Raises
    ------
    DivergedError
        After a loss or a weight that is not finite; the last good checkpoint stays.
    """
    with checkpoint.exclusive(checkpoints):
        began, title = time.monotonic(), f"{record['run']} seed {record['seed']}"
        training = Training(config, data_dir, record["seed"])
        start = training.restore(checkpoint.load(checkpoints), _environment(record))
        if start:
            _log.info("%s: resuming after epoch %d of %d", title, start, training.epochs)
        before = training.seconds
        for epoch in range(start + 1, training.epochs + 1):
            try:
                line = training.epoch(epoch, title, log_every)
            except DivergedError as error:
                raise DivergedError(f"{title}: {error}; the last good checkpoint, after epoch {epoch - 1}, is in "
                                    f"{checkpoints}. Lower lr or lengthen warmup_epochs in params/.") from None
            training.seconds = before + time.monotonic() - began
            checkpoint.save(checkpoints, epoch, training.state())
            write_atomic(checkpoints / "log.jsonl", training.log())
            pace = (time.monotonic() - began) / (epoch - start)
            _status(title, line, training.epochs, training.seconds, pace * (training.epochs - epoch))
        training.publish(out, record | {"resumed_from_epoch": start or None})


class Training:
    """All that one run needs, built in the order data flow.

    Attributes
    ----------
    epochs : int
        To train.
    lines : list of dict
        The log so far.
    seconds : float
        Spent so far, interruptions left out.
    """

    def __init__(self, config: Mapping[str, Any], data_dir: Path, seed: int) -> None:
        self.recipe, dataset, self.machine = config["recipe"], config["dataset"], config["machine"]
        self.device, self.seed = prepare_machine(self.machine), seed
        _seed(seed)
        manifest.verify(data_dir)
        pinned = self.device.type == "cuda"
        self.loader = TrainLoader(dataset, self.recipe, data_dir, seed, self.machine["micro_batch"], pinned)
        self.val = ValLoader(dataset, data_dir, VAL_BATCH, pin_memory=pinned)
        self.normalise = normaliser(config, self.device)
        self.erasing = erasing_for(self.recipe, self.device)
        self.mixup = mixup_for(self.recipe, dataset["num_classes"])

        self.model = build(config).to(self.device, memory_format=MEMORY_FORMATS[self.machine["memory_format"]])
        self.optimizer = torch.optim.AdamW(parameter_groups(self.model, self.recipe["weight_decay"]), lr=self.recipe["lr"],
                                           betas=tuple(self.recipe["betas"]), eps=self.recipe["eps"], fused=True)
        self.steps, self.epochs = len(self.loader), self.recipe["epochs"]
        self.schedule = _schedule(self.optimizer, self.recipe, self.steps)
        self.sparsity = self.recipe["sparsity"] and SparseTraining(
            self.model, total_steps=self.epochs * self.steps, seed=seed, **self.recipe["sparsity"])
        self.ema = ModelEmaV3(self.model, decay=self.recipe["ema_decay"]) if self.recipe["ema_decay"] else None
        self.lines: list[dict[str, Any]] = []
        self.environments: list[dict[str, Any]] = []
        self.seconds = 0.0

    @property
    def judged(self) -> nn.Module:
        """The weights that are evaluated and published: the average where the recipe keeps one."""
        return self.ema.module if self.ema else self.model

    def restore(self, state: dict[str, Any] | None, environment: dict[str, Any]) -> int:
        """Go on from a checkpoint's state, or draw the first masks; return the epochs done."""
        if state:
            for name, part in self._parts().items():
                part.load_state_dict(state[name])
            self.lines, self.seconds, self.environments = state["lines"], state["seconds"], state["environments"]
        elif self.sparsity:
            images, labels = next(self.loader.epoch(0))
            self.sparsity.initialise(self.normalise(images), labels.to(self.device))
        if environment not in self.environments:
            if self.environments:
                _log.warning("This run began elsewhere (%s) and goes on here (%s): it no longer ends bit for bit where an "
                             "undisturbed one ends. run.json lists both.", self.environments[-1], environment)
            self.environments.append(environment)
        return state["epoch"] if state else 0

    def state(self) -> dict[str, Any]:
        """All that the next epoch depends on, but for the global generators."""
        parts = {name: part.state_dict() for name, part in self._parts().items()}
        return parts | {"lines": self.lines, "seconds": self.seconds, "environments": self.environments}

    def epoch(self, epoch: int, title: str, log_every: int) -> dict[str, Any]:
        """Train one epoch, evaluate if it is due, and return its line of the log."""
        clock, total = time.monotonic(), 0.0
        self.model.train()
        batches, first = self.loader.epoch(epoch), (epoch - 1) * self.steps
        for step in tqdm(range(first, first + self.steps), desc=f"{title} epoch {epoch}/{self.epochs}", unit="images",
                         unit_scale=self.recipe["batch_size"], disable=not sys.stderr.isatty(), leave=False):
            loss = self.step(step, islice(batches, self.loader.parts))
            if not math.isfinite(loss):
                raise DivergedError(f"the loss became {loss} in epoch {epoch}, step {step + 1}")
            if log_every and (step + 1) % log_every == 0:
                self.lines.append({"event": "step", "step": step + 1, "loss": loss})
            total += loss
        trained = time.monotonic() - clock
        if not all(tensor.isfinite().all() for tensor in self.judged.state_dict().values()):
            raise DivergedError(f"a weight is no number after epoch {epoch}")
        line = {"epoch": epoch, "train_loss": total / self.steps, "lr": self.optimizer.param_groups[0]["lr"]}
        if epoch % self.recipe["evaluate_every"] == 0 or epoch == self.epochs:
            result = scores(self.judged, self.val, self.normalise)
            line |= {"val_loss": result["loss"], "top1": result["top1"]}
        if self.sparsity:
            line["density"] = self.sparsity.density()
        line |= {"images_per_second": self.steps * self.recipe["batch_size"] / trained, "seconds": time.monotonic() - clock}
        self.lines.append(line)
        return line

    def step(self, step: int, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
        """One optimizer step, its gradient summed over micro-batches; returns the mean loss. No step on a bad loss."""
        self.schedule.step_update(step)
        smoothing, total = 0.0 if self.mixup else self.recipe["label_smoothing"], 0.0
        self.optimizer.zero_grad(set_to_none=True)
        for images, labels in batches:                                # uint8 (b, C, H, W), int64 (b,)
            x, target = self.normalise(images), labels.to(self.device)
            if self.erasing:
                x = self.erasing(x)
            if self.mixup:
                x, target = self.mixup(x, target)                     # target: (b, classes), smoothed
            with torch.autocast(x.device.type, torch.bfloat16, enabled=self.machine["amp"] == "bfloat16"):
                logits = self.model(x)                                # (b, classes)
                share = len(x) / self.recipe["batch_size"]
                loss = F.cross_entropy(logits, target, label_smoothing=smoothing) * share
            loss.backward()
            total += loss.item()
        if math.isfinite(total):
            self.optimizer.step()
            if self.sparsity and (event := self.sparsity.step(self.optimizer)):
                self.lines.append(event)
            if self.ema:
                update = partial(self.ema.update, self.model, step=step)
                self.sparsity.average(self.ema.module, update) if self.sparsity else update()
        return total

    def log(self) -> bytes:
        """log.jsonl."""
        return "".join(json.dumps(line) + "\n" for line in self.lines).encode()

    def publish(self, out: Path, record: dict[str, Any]) -> None:
        """Write the results, the stamp of the weights last."""
        epochs = [line for line in self.lines if "epoch" in line]
        measured = [line["top1"] for line in epochs if "top1" in line]
        metrics = values(
            top1=(measured[-1], "%"), top1_best=(max(measured), "%"), train_loss=(epochs[-1]["train_loss"], ""),
            val_loss=(epochs[-1]["val_loss"], ""), epochs=(self.epochs, "epochs"), steps=(self.epochs * self.steps, "steps"),
            parameters=(sum(p.numel() for p in self.model.parameters()), "weights"),
            **({"density": (self.sparsity.density(), "")} if self.sparsity else {}),
        )
        body = to_safetensors({name: tensor.contiguous() for name, tensor in self.judged.state_dict().items()})
        write_atomic(out / "weights.safetensors", body)
        write_atomic(out / "log.jsonl", self.log())
        write_json(out / "run.json", record | {"seconds": round(self.seconds, 1), "environments": self.environments})
        write_json(out / "metrics.json", metrics)
        write_atomic(out / "weights.safetensors.sha256", (hashlib.sha256(body).hexdigest() + "\n").encode())

    def _parts(self) -> dict[str, Any]:
        parts = {"model": self.model, "optimizer": self.optimizer, "sparsity": self.sparsity,
                 "ema": self.ema and self.ema.module}
        return {name: part for name, part in parts.items() if part}


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
    keep_freed_memory()
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


@torch.inference_mode()
def scores(model: nn.Module, val: ValLoader, normalise: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """Top-1 and top-5 in %, mean cross-entropy, logits, and top-1 by distance where the files tell one."""
    model.eval()
    batches = [(model(normalise(images)).float().cpu(), labels) for images, labels in val]
    logits, labels = (torch.cat(part) for part in zip(*batches, strict=True))
    hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
    right = hits[:, 0].double()
    distances = {} if val.distances is None else {
        int(d): 100 * right[val.distances == d].mean().item() for d in val.distances.unique()
    }
    return {"top1": 100 * right.mean().item(), "top5": 100 * hits.any(1).double().mean().item(),
            "loss": F.cross_entropy(logits, labels).item(), "images": len(labels), "logits": logits,
            "top1_by_distance": distances}


def _environment(record: Mapping[str, Any]) -> dict[str, Any]:
    """What equal bits depend on beyond the run's key."""
    return {"cpu": record["hardware"]["cpu"], "gpu": record["hardware"]["gpu"], "torch": record["versions"]["torch"],
            "library_sha256": record["library_sha256"]}


def _status(title: str, line: Mapping[str, Any], epochs: int, spent: float, remaining: float) -> None:
    """One line per epoch."""
    top1 = f"{line['top1']:5.1f} %" if "top1" in line else "    -  "
    _log.info("%s  epoch %3d/%d  loss %.3f  top-1 %s  %5.0f images/s  %4.0f s spent  %4.0f s to go", title, line["epoch"],
              epochs, line["train_loss"], top1, line["images_per_second"], spent, remaining)
