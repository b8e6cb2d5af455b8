"""The training loop: timm's parts, our order of things.

`train` turns a resolved row of params into weights, metrics and a log, in one process or in several. It publishes by rename
when all is done; until then the state lives in checkpoints/<key>/, with a copy of the log.
"""

import gc
import hashlib
import json
import logging
import math
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save as to_safetensors
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from swconv.atomic import write_atomic, write_json
from swconv.models.network import set_recompute
from swconv.models.sync_norm import sync_batch_norms
from swconv.sparsity import SparseTraining
from swconv.training import checkpoint, distributed, manifest
from swconv.training.data import MEMORY_FORMATS, TrainLoader, ValLoader, erasing_for, mixup_for, tell, to_input
from swconv.training.finished import first_line, load_weights, published_sha256
from swconv.training.memory import keep_freed_memory, return_freed_memory
from swconv.training.optim import parameter_groups, schedule
from swconv.training.record import values
from swconv.training.stop import StoppedError

VAL_BATCH = 250
BEFORE_EVALUATION = 30.0                                              # seconds of work that an evaluation may put at risk
AMP = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_log = logging.getLogger(__name__)


class DivergedError(RuntimeError):
    """The loss, or a weight, is no longer a number, or the loss is beyond all sense.

    Attributes
    ----------
    step : int
        The optimizer step at which it was given up.
    """

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


def train(config: Mapping[str, Any], data_dir: Path, out: Path, checkpoints: Path, record: dict[str, Any],
          log_every: int = 0, init: Path | None = None, asked: Callable[[], bool] = lambda: False,
          kind: "type[Training] | None" = None) -> None:
    """Train one run and publish metrics.json, run.json, log.jsonl and weights.safetensors with its sha256.

    A killed training goes on from its newest checkpoint and ends, on a CPU, bit for bit where an undisturbed one ends: in
    one process or two, for of three or more numbers gloo may take the sum in another order after a new start. It may go on
    in another number of processes: it then sees the same images in the same batches, but other random numbers.
    A training that diverges publishes the step at which it did, and weights without a tensor.

    Parameters
    ----------
    config : mapping
        Resolved row of params: model, recipe, dataset, machine.
    data_dir : Path
        Holds data.json, manifest.csv and the images.
    out : Path
        Folder of the results.
    checkpoints : Path
        Folder of this run's resumable state, open to all processes; log.jsonl there grows with every checkpoint.
    record : dict
        Circumstances (`swconv.training.record.circumstances`); holds run and seed.
    log_every : int
        Also log every so many steps; 0 for epochs only.
    init : Path, optional
        Weights to start from, of a finished run; images may have another size than there.
    asked : callable
        Whether to stop (`swconv.training.stop.requests`), looked at after every step.
    kind : type, optional
        What is trained; `Training` by default.

    Raises
    ------
    StoppedError
        When asked to stop, after the state was saved.
    """
    with ExitStack() as stack:
        if distributed.rank() == 0:
            stack.enter_context(checkpoint.exclusive(checkpoints))
        stack.enter_context(distributed.group(config["machine"]["device"]))
        training = (kind or Training)(config, data_dir, record["seed"], init)
        stack.callback(training.leave_group)
        Sitting(training, out, checkpoints, record, asked).run(log_every)


class Training:
    """All that one run needs, built in the order data flow, the same in every process but for the images it sees.

    Attributes
    ----------
    epochs, steps : int
        To train, and optimizer steps in each.
    done, position : int
        Epochs that are finished, and steps taken in the next one.
    lines : list of dict
        The log so far.
    seconds : float
        Spent so far, interruptions left out.
    """

    def __init__(self, config: Mapping[str, Any], data_dir: Path, seed: int, init: Path | None = None) -> None:
        self.recipe, dataset, self.machine = config["recipe"], config["dataset"], config["machine"]
        self.device, self.seed = prepare_machine(self.machine), seed
        self.rank, self.world = distributed.rank(), distributed.world()
        seed_all(seed)
        if self.rank == 0:
            manifest.verify(data_dir)
        pinned = self.device.type == "cuda"
        self.loader = TrainLoader(dataset, self.recipe, data_dir, seed, share_of_batch(self.recipe, self.machine, self.world),
                                  pinned, self.rank, self.world)
        self.val = ValLoader(dataset, data_dir, VAL_BATCH, pinned, self.rank, self.world)
        self.normalise = normaliser(config, self.device)
        self.erasing = erasing_for(self.recipe, self.device)
        self.mixup = mixup_for(self.recipe, dataset["num_classes"])

        self.model = build(config)
        if init:
            published_sha256(init)
            load_weights(self.model, init)
        self.model.to(self.device, memory_format=MEMORY_FORMATS[self.machine["memory_format"]])
        if self.world > 1 and self.machine["sync_bn"]:
            sync_batch_norms(self.model)
        groups = parameter_groups(self.model, self.recipe["weight_decay"], self.recipe["layer_decay"])
        self.optimizer = torch.optim.AdamW(groups, lr=self.recipe["lr"], betas=tuple(self.recipe["betas"]),
                                           eps=self.recipe["eps"], fused=True)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.machine["amp"] == "float16")
        self.steps, self.epochs = len(self.loader), self.recipe["epochs"]
        self.schedule = schedule(self.optimizer, self.recipe, self.steps)
        self.sparsity = self.recipe["sparsity"] and SparseTraining(
            self.model, total_steps=self.epochs * self.steps, seed=seed, **self.recipe["sparsity"])
        self.ema = ModelEmaV3(self.model, decay=self.recipe["ema_decay"]) if self.recipe["ema_decay"] else None
        self.forward = self._forward()
        self.done = self.position = 0
        self.tally = _Tally()
        self.lines: list[dict[str, Any]] = []
        self.environments: list[dict[str, Any]] = []
        self.seconds = 0.0

    @property
    def judged(self) -> nn.Module:
        """The weights that are evaluated and published: the average where the recipe keeps one."""
        return self.ema.module if self.ema else self.model

    @property
    def taken(self) -> int:
        """Optimizer steps so far."""
        return self.done * self.steps + self.position

    def start(self, path: Path | None, environment: dict[str, Any]) -> None:
        """Go on from a checkpoint, or draw the first masks.

        Raises
        ------
        ValueError
            When the checkpoint does not fit.
        """
        if path:
            self._restore(path)
        elif self.sparsity:
            images, labels = next(self.loader.epoch(0))
            self.sparsity.initialise(self.normalise(images), labels.to(self.device))
        if path is None and self.world > 1:                           # equal so far: every process built the same network
            seed_all(self.seed, self.rank, 0)
        if environment not in self.environments:
            if self.environments and self.rank == 0:
                _log.warning("This run began elsewhere (%s) and goes on here (%s): it no longer ends bit for bit where an "
                             "undisturbed one ends. run.json lists both.", self.environments[-1], environment)
            self.environments.append(environment)

    def state(self) -> dict[str, Any]:
        """All that the next step depends on, but for the global generators; the same in every process."""
        parts = {name: part.state_dict() for name, part in self._parts().items()}
        return parts | {"done": self.done, "position": self.position, "tally": vars(self.tally), "lines": self.lines,
                        "seconds": self.seconds, "environments": self.environments,
                        "bad_files": sorted(self.loader.bad_files)}

    def epoch(self, title: str, log_every: int, wishes: Callable[[], list[bool]]) -> Iterator[list[bool]]:
        """Take the steps that are left of the epoch; after each, tell which wishes any process has.

        Raises
        ------
        DivergedError
            After `bad_steps` of the recipe in a row whose loss was no number or above `max_loss`: they were not taken, and
            the norms have not seen their images.
        """
        self.model.train()
        statistics = _Statistics(self.model)
        first, last = self.done * self.steps, (self.done + 1) * self.steps
        batches = self.loader.epoch(self.done + 1, self.position) if self.position < self.steps else iter(())
        clock = time.monotonic()
        for step in tqdm(range(self.taken, last), desc=f"{title} epoch {self.done + 1}/{self.epochs}", unit="images",
                         unit_scale=self.recipe["batch_size"], disable=self.rank > 0 or not sys.stderr.isatty(), leave=False):
            statistics.keep()
            loss, *wished = self.step(step, islice(batches, self.loader.parts), wishes())
            self.tally.count(loss, good := self.is_good(loss))
            if not good:
                statistics.restore()
            if not good and (self.tally.bad_in_a_row == self.recipe["bad_steps"] or step + 1 == self.epochs * self.steps):
                raise DivergedError(f"the loss became {loss:.4g} in epoch {self.done + 1}, step {step + 1}, as in "
                                    f"{self.tally.bad_in_a_row - 1} steps before", step + 1)
            if log_every and (step + 1) % log_every == 0:
                self.lines.append({"event": "step", "step": step + 1, "loss": loss if good else None})
            self.position = step + 1 - first
            self.tally.seconds += time.monotonic() - clock
            yield [bool(wish) for wish in wished]
            clock = time.monotonic()

    def evaluates(self) -> bool:
        """Whether this epoch ends with an evaluation."""
        return (self.done + 1) % self.recipe["evaluate_every"] == 0 or self.done + 1 == self.epochs

    def finish_epoch(self) -> dict[str, Any]:
        """Evaluate if it is due; return the epoch's line of the log.

        Raises
        ------
        DivergedError
            When a weight, or the validation loss, is no number.
        """
        self.check_finite()
        clock, epoch, tally = time.monotonic(), self.done + 1, self.tally
        line = {"epoch": epoch, "lr": max(group["lr"] for group in self.optimizer.param_groups)}
        if tally.good:
            line["train_loss"] = tally.loss / tally.good
        if self.evaluates():
            result = scores(self.judged, self.val, self.normalise)
            if not math.isfinite(loss := distributed.broadcast(result.get("loss"))):
                raise DivergedError(f"the validation loss became {loss:.4g} after step {self.taken}", self.taken)
            line |= {"val_loss": loss, "top1": result["top1"]} if self.rank == 0 else {}
        if self.sparsity:
            line["density"] = self.sparsity.density()
        if tally.bad:
            line["bad_steps"] = tally.bad
        for met in distributed.gathered(sorted(self.loader.bad_files)) or ():
            tell(self.loader.bad_files, met)
        if self.loader.bad_files:
            line["bad_files"] = len(self.loader.bad_files)
        line |= {"images_per_second": self.steps * self.recipe["batch_size"] / tally.seconds,
                 "seconds": tally.seconds + time.monotonic() - clock}
        self.lines.append(line)
        self.done, self.position, self.tally = epoch, 0, _Tally(bad_in_a_row=tally.bad_in_a_row)
        return line

    def step(self, step: int, batches: Iterable[tuple[Tensor, Tensor]], wishes: Iterable[bool] = ()) -> list[float]:
        """One optimizer step, its gradient summed over micro-batches and processes. It is not taken on a bad loss.

        Returns
        -------
        list of float
            The mean loss over all images, and for each wish how many processes have it. They travel, and are waited for, once.
        """
        self.schedule.step_update(step)
        smoothing, total = 0.0 if self.mixup else self.recipe["label_smoothing"], torch.zeros((), device=self.device)
        self.optimizer.zero_grad(set_to_none=True)
        for part, (images, labels) in enumerate(batches, start=1):    # uint8 (b, C, H, W), int64 (b,)
            x, target = self.normalise(images), labels.to(self.device, non_blocking=True)
            if self.erasing:
                x = self.erasing(x)
            if self.mixup:
                x, target = self.mixup(x, target)                     # target: (b, classes), smoothed
            share = len(x) * self.world / self.recipe["batch_size"]   # gradients are averaged over processes
            with nullcontext() if self.world == 1 or part == self.loader.parts else self.forward.no_sync():
                with autocast(self.machine):
                    loss = F.cross_entropy(self.forward(x), target, label_smoothing=smoothing) * share
                self.scaler.scale(loss).backward()
            total = total + loss.detach_().double()                   # in place: the graph goes now, not when the next is made
        loss, *wished = distributed.summed([total / self.world, *wishes], self.device)
        if self.is_good(loss) and self._optimize():
            if self.sparsity and (event := self.sparsity.step(self.optimizer)):
                self.lines.append(event)
            if self.ema:
                update = partial(self.ema.update, self.model, step=step)
                self.sparsity.average(self.ema.module, update) if self.sparsity else update()
        return [loss, *wished]

    def leave_group(self) -> None:
        """Let go of what averages gradients, before the process group ends.

        Were it the last to hold the group, it would end it while it holds Python's lock, for which the group's own thread may
        be waiting: a deadlock of torch 2.11.
        """
        self.forward = self.model
        gc.collect()

    def is_good(self, loss: float) -> bool:
        """Whether a step with this loss is taken."""
        return math.isfinite(loss) and loss <= self.recipe["max_loss"]

    def check_finite(self) -> None:
        """Raise DivergedError where a weight is no number: such a state is neither kept nor evaluated.

        Where norms are not synchronised, all processes take the statistics of process 0 first: what is published.
        """
        if not self.machine["sync_bn"]:
            distributed.share(dict.fromkeys([*self.model.buffers(), *self.judged.buffers()]))
        tensors = {*self.model.state_dict().values(), *self.judged.state_dict().values()}
        sums = [tensor.sum(dtype=torch.float64) for tensor in tensors if tensor.is_floating_point()]
        if not torch.stack(sums).isfinite().all():
            raise DivergedError(f"a weight is no number after step {self.taken}", self.taken)

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
            **({"bad_files": (len(self.loader.bad_files), "files")} if self.loader.bad_files else {}),
        )
        named = {"bad_files": sorted(self.loader.bad_files)} if self.loader.bad_files else {}
        self._publish(out, record | {"status": "finished"} | named, metrics, self.judged.state_dict(), {})

    def publish_diverged(self, out: Path, record: dict[str, Any], error: DivergedError) -> None:
        """Write that the run has no result, and why; weights.safetensors holds no tensor."""
        metrics = values(diverged=(error.step, "step"))
        self._publish(out, record | {"status": f"diverged: {error}"}, metrics, {}, {"diverged": str(error.step)})

    def _publish(self, out: Path, record: dict[str, Any], metrics: dict[str, Any], state: Mapping[str, Tensor],
                 note: dict[str, str]) -> None:
        body = to_safetensors({name: tensor.contiguous() for name, tensor in state.items()}, note or None)
        write_atomic(out / "weights.safetensors", body)
        write_atomic(out / "log.jsonl", self.log())
        write_json(out / "run.json", record | {"seconds": round(self.seconds, 1), "environments": self.environments})
        write_json(out / "metrics.json", metrics)
        write_atomic(out / "weights.safetensors.sha256", (hashlib.sha256(body).hexdigest() + "\n").encode())

    def _forward(self) -> Callable[[Tensor], Tensor]:
        """The network as it is called: compiled where the machine says so, and with gradients averaged over processes."""
        network = torch.compile(self.model, dynamic=False) if self.machine["compile"] else self.model
        if self.world == 1:
            return network
        # Synchronised norms have equal buffers everywhere; others take those of process 0 before the first part of a step.
        return DistributedDataParallel(network, device_ids=[self.device.index] if self.device.type == "cuda" else None,
                                       broadcast_buffers=not self.machine["sync_bn"])

    def _optimize(self) -> bool:
        """Take the step; False where float16 overflowed and the scaler skipped it."""
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return self.scaler.get_scale() >= scale

    def _restore(self, path: Path) -> None:
        state, name = checkpoint.load(path), "generators"
        try:
            for name, part in self._parts().items():
                part.load_state_dict(state[name])
            self.done, self.position, self.tally = state["done"], state["position"], _Tally(**state["tally"])
            self.lines, self.seconds, self.environments = state["lines"], state["seconds"], state["environments"]
            self.loader.bad_files.update(state["bad_files"])
            found = state["generators"]
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{path} needs to be a checkpoint of this run, but its {name} does not fit "
                             f"({first_line(error)}); restore it, or delete {path.parent} to train from the start.") from error
        if len(found) == self.world:
            checkpoint.restore_generators(found[self.rank])
            return
        seed_all(self.seed, self.rank, self.taken)
        if self.rank == 0:
            _log.warning("%s was written by %d processes, and %d go on: the order of the images stays, random numbers are "
                         "drawn anew.", path, len(found), self.world)

    def _parts(self) -> dict[str, Any]:
        parts = {"model": self.model, "optimizer": self.optimizer, "scaler": self.scaler.is_enabled() and self.scaler,
                 "sparsity": self.sparsity, "ema": self.ema and self.ema.module}
        return {name: part for name, part in parts.items() if part}


class _Statistics:
    """What the norms of a network remember of the images they saw, to be put back after a step that is not taken."""

    def __init__(self, model: nn.Module) -> None:
        norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        tensors = [tensor for norm in norms for tensor in norm.buffers(recurse=False)]
        kinds = {tensor.dtype: None for tensor in tensors}            # one launch for all tensors of a kind
        self.now = [[tensor for tensor in tensors if tensor.dtype == kind] for kind in kinds]
        self.kept = [[tensor.clone() for tensor in each] for each in self.now]

    def keep(self) -> None:
        for kept, now in zip(self.kept, self.now, strict=True):
            torch._foreach_copy_(kept, now)

    def restore(self) -> None:
        for kept, now in zip(self.kept, self.now, strict=True):
            torch._foreach_copy_(now, kept)


@dataclass
class _Tally:
    """What an epoch has come to: sum of losses and number of good steps, bad steps, and seconds."""

    loss: float = 0.0
    good: int = 0
    bad: int = 0
    bad_in_a_row: int = 0
    seconds: float = 0.0

    def count(self, loss: float, good: bool) -> None:
        if good:
            self.loss, self.good, self.bad_in_a_row = self.loss + loss, self.good + 1, 0
        else:
            self.bad, self.bad_in_a_row = self.bad + 1, self.bad_in_a_row + 1


class Sitting:
    """One sitting of a training: from its newest checkpoint to its end, or to a stop, or to a kill."""

    def __init__(self, training: Training, out: Path, checkpoints: Path, record: dict[str, Any],
                 asked: Callable[[], bool]) -> None:
        self.training, self.out, self.checkpoints, self.record, self.asked = training, out, checkpoints, record, asked
        self.title, self.leads = f"{record['run']} seed {record['seed']}", distributed.rank() == 0
        self.interval = 60 * training.machine["checkpoint_minutes"]   # seconds
        self.began = self.saved = time.monotonic()
        self.before = 0.0

    def run(self, log_every: int) -> None:
        """Train to the end and publish."""
        training, resumed = self.training, {"resumed_from_epoch": None, "resumed_from_step": None}
        path = distributed.broadcast(checkpoint.newest(self.checkpoints) if self.leads else None)
        training.start(path, _environment(self.record))
        first, self.before = training.taken, training.seconds
        if path:
            resumed = {"resumed_from_epoch": training.done, "resumed_from_step": first}
            self._tell("%s: resuming after epoch %d of %d, step %d of the next", self.title, training.done, training.epochs,
                       training.position)
        try:
            while training.done < training.epochs:
                for stop, due in training.epoch(self.title, log_every, self._wishes):
                    if stop or due:
                        self._save()
                    if stop:
                        raise StoppedError(f"{self.title}: stopped as asked after step {training.taken}; its state is saved "
                                           f"in {self.checkpoints}. The same command goes on from there.")
                line = training.finish_epoch()
                self._save()
                if self.leads:
                    pace = (time.monotonic() - self.began) / max(1, training.taken - first)
                    _status(self.title, line, training.epochs, training.seconds,
                            pace * (training.epochs * training.steps - training.taken))
        except DivergedError as error:
            self._spend()
            if self.leads:
                _log.error("%s DIVERGED: %s. Its cells in the tables will say so; the last good checkpoint, if there is one, "
                           "is in %s. Lower lr or lengthen warmup_epochs in params/.", self.title, error, self.checkpoints)
                training.publish_diverged(self.out, self.record | resumed, error)
            return
        if self.leads:
            training.publish(self.out, self.record | resumed)

    def _wishes(self) -> list[bool]:
        """This process's: to stop, and to save because it is time: sooner before an evaluation, which heeds no request."""
        training, interval = self.training, self.interval
        if training.position + 1 == training.steps and training.evaluates():
            interval = min(interval, BEFORE_EVALUATION)
        return [self.asked(), self.leads and time.monotonic() - self.saved > interval]

    def _save(self) -> None:
        """Write a checkpoint and the log; all processes wait for it."""
        self._spend()
        self.training.check_finite()
        generators = distributed.gathered(checkpoint.generators())
        if self.leads:
            state = self.training.state() | {"generators": generators}
            checkpoint.save(self.checkpoints, self.training.done, self.training.position, state)
            write_atomic(self.checkpoints / "log.jsonl", self.training.log())
        distributed.barrier()
        self.saved = time.monotonic()

    def _spend(self) -> None:
        self.training.seconds = self.before + time.monotonic() - self.began

    def _tell(self, *words: Any) -> None:
        if self.leads:
            _log.info(*words)


def build(config: Mapping[str, Any]) -> nn.Module:
    """The network of a resolved row, freshly initialised from the global generator."""
    model, dataset = config["model"], config["dataset"]
    network = timm.create_model(model["name"], num_classes=dataset["num_classes"], in_chans=dataset["in_chans"],
                                drop_path_rate=config["recipe"]["drop_path_rate"], **model["args"])
    set_recompute(network, config["machine"]["recompute"])
    return network


def share_of_batch(recipe: Mapping[str, Any], machine: Mapping[str, Any], processes: int) -> int:
    """Images that one of the processes takes through the network at a time.

    Raises
    ------
    ValueError
        When they cannot be shared out evenly.
    """
    part = min(machine["micro_batch"] or recipe["batch_size"], recipe["batch_size"])
    pairs = 2 if recipe["mixup"] or recipe["cutmix"] else 1
    if recipe["batch_size"] % part or part % (processes * pairs):
        raise ValueError(f"a batch of {recipe['batch_size']} images must fall into parts of {part} (machine.micro_batch), and "
                         f"each part into equal shares of {processes} processes{', in pairs for mixup' * (pairs - 1)}; change "
                         "one of the three.")
    return part // processes


def prepare_machine(machine: Mapping[str, Any]) -> torch.device:
    """Set what bitwise equality depends on; the trainer sets it itself, whatever the environment says.

    Raises
    ------
    RuntimeError
        When there is no GPU for this process.
    """
    torch.set_num_threads(machine["threads"])
    return_freed_memory() if machine["recompute"] else keep_freed_memory()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = machine["tf32"]
    if machine["device"] == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise RuntimeError("the profile trains on a GPU (machine.device: cuda), but torch sees none. Use a machine with one, "
                           "or set machine.device: cpu in the profile.")
    number, there = distributed.local_rank(), torch.cuda.device_count()
    if number >= there:
        raise RuntimeError(f"every process needs a GPU of its own, got {there} for process {number} and those before it. Set "
                           f"machine.processes: {there} in the profile, or use a machine with more.")
    if not distributed.started():
        number, = distributed.own_gpus(1)
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def autocast(machine: Mapping[str, Any]) -> torch.autocast:
    """Mixed precision as the machine row says; none with amp: null."""
    return torch.autocast(machine["device"], AMP.get(machine["amp"], torch.bfloat16), enabled=machine["amp"] is not None)


def normaliser(config: Mapping[str, Any], device: torch.device) -> Callable[[Tensor], Tensor]:
    """uint8 images (B, C, H, W) -> network input on the device."""
    dataset = config["dataset"]
    return partial(to_input, mean=dataset["mean"], std=dataset["std"], device=device,
                   memory_format=config["machine"]["memory_format"])


def seed_all(seed: int, *place: int) -> None:
    """Seed the three global generators; a place (rank, step) makes another seed of it."""
    if place:
        seed = int(np.random.SeedSequence([seed, *place]).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@torch.inference_mode()
def scores(model: nn.Module, val: ValLoader, normalise: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """Top-1 and top-5 in %, mean cross-entropy, logits, and top-1 by distance where the files tell one.

    Several processes share the images; process 0 has the result, the others get an empty one.
    """
    model.eval()
    batches = [(model(normalise(images)).float().cpu(), labels) for images, labels in val]
    shares = distributed.gathered(([torch.cat(part) for part in zip(*batches, strict=True)], val.distances))
    if shares is None:
        return {}
    logits, labels = (_interleaved(parts) for parts in zip(*(share for share, _ in shares), strict=True))
    distances = None if val.distances is None else _interleaved([part for _, part in shares])
    hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
    right = hits[:, 0].double()
    by_distance = {} if distances is None else {int(d): 100 * right[distances == d].mean().item() for d in distances.unique()}
    return {"top1": 100 * right.mean().item(), "top5": 100 * hits.any(1).double().mean().item(),
            "loss": F.cross_entropy(logits, labels).item(), "images": len(labels), "logits": logits,
            "top1_by_distance": by_distance}


def _interleaved(parts: Sequence[Tensor]) -> Tensor:
    """What the processes have of images r, r + world, r + 2 world, ..., in the order of the images."""
    whole = parts[0].new_empty(sum(len(part) for part in parts), *parts[0].shape[1:])
    for rank, part in enumerate(parts):
        whole[rank :: len(parts)] = part
    return whole


def _environment(record: Mapping[str, Any]) -> dict[str, Any]:
    """What equal bits depend on beyond the run's key."""
    return {"cpu": record["hardware"]["cpu"], "gpu": record["hardware"]["gpu"], "torch": record["versions"]["torch"],
            "library_sha256": record["library_sha256"], "processes": distributed.world()}


def _status(title: str, line: Mapping[str, Any], epochs: int, spent: float, remaining: float) -> None:
    """One line per epoch."""
    top1 = f"  top-1 {line['top1']:5.1f} %" if "top1" in line else ""
    loss = line.get("train_loss", math.nan)
    _log.info("%s  epoch %3d/%d  loss %.3f%s  %5.0f images/s  %4.0f s spent  %4.0f s to go", title, line["epoch"], epochs, loss,
              top1, line["images_per_second"], spent, remaining)
