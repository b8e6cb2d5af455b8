"""Fine-tuning: the pretraining's loop on a pyramid with heads. Resume, signals, processes and publication are that loop's.

`fine_tune` turns a resolved row of params/downstream.yaml and a pretrained network's weights into weights, metrics and a log.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from swconv.downstream import sources
from swconv.downstream.batches import Batches, Collate, Loader
from swconv.downstream.benchmarks import benchmark, moved
from swconv.downstream.datasets import Images, Target
from swconv.downstream.pyramid import Pyramid, parameter_groups
from swconv.models.network import set_recompute
from swconv.models.sync_norm import sync_batch_norms
from swconv.training import distributed
from swconv.training.data import MEMORY_FORMATS
from swconv.training.finished import diverged_at, published_sha256
from swconv.training.loop import Training, _Tally, autocast, prepare_machine, seed_all, train
from swconv.training.record import values

INTERVAL, LINES = 1000, 20                                            # iterations between lines of the log; least lines


def fine_tune(config: Mapping[str, Any], data_dir: Path, out: Path, checkpoints: Path, record: dict[str, Any],
              log_every: int = 0, init: Path | None = None, asked: Callable[[], bool] = lambda: False) -> None:
    """Fine-tune one run and publish metrics.json, run.json, log.jsonl and weights.safetensors with its sha256.

    Killed, stopped, in several processes or diverging it does as `swconv.training.loop.train` does.

    Parameters
    ----------
    config : mapping
        Resolved row: task, network, grown, recipe, head, train, data, machine.
    data_dir : Path
        Of `sources.prepare`.
    init : Path, optional
        Weights of a pretrained classifier; None starts from random ones.
    out, checkpoints, record, log_every, asked
        As of `swconv.training.loop.train`.

    Raises
    ------
    ValueError
        When the weights do not fit, the data are another task's or changed, or a checkpoint does not fit.
    StoppedError
        When asked to stop, after the state was saved.
    """
    train(config, data_dir, out, checkpoints, record, log_every, init, asked, FineTuning)


class FineTuning(Training):
    """All that a fine-tune needs. An "epoch" of the loop is a pass over the images, or a part of the iterations.

    Parameters
    ----------
    config, data_dir, init
        As of `fine_tune`.
    seed : int
    """

    def __init__(self, config: Mapping[str, Any], data_dir: Path, seed: int, init: Path | None = None) -> None:
        self.recipe, self.machine = config["recipe"], config["machine"]
        self.device, self.seed, self.task = prepare_machine(self.machine), seed, config["task"]
        self.rank, self.world = distributed.rank(), distributed.world()
        seed_all(seed)
        root = sources.root_of(data_dir, self.task)
        if self.rank == 0:
            sources.verify(data_dir, self.task)
        used = benchmark(config, root)
        images, batch = used.images(training=True, seed=seed), self.recipe["batch_size"]
        part = min(self.machine["micro_batch"] or batch, batch) // self.world
        batches = Batches(len(images), batch, seed, part, used.groups(images), self.rank, self.world)
        self.epochs, self.steps = self.recipe["epochs"], batches.steps
        if iterations := self.recipe["iterations"]:
            self.steps = math.gcd(iterations, min(INTERVAL, max(1, iterations // LINES)))
            self.epochs = iterations // self.steps
        self.loader = Stream(images, batches, used.collate(training=True), self.steps, config["data"]["workers"],
                             self.device.type == "cuda")
        self.model = used.network(build_pyramid(config))
        if init:
            load_pretrained(self.model.pyramid, init, config["grown"])
        set_recompute(self.model, self.machine["recompute"])
        self.model.to(self.device, memory_format=MEMORY_FORMATS[self.machine["memory_format"]])
        if self.world > 1 and self.machine["sync_bn"]:
            sync_batch_norms(self.model)
        decay = self.recipe["layer_decay"]
        groups = parameter_groups(self.model, self.recipe["lr"], self.recipe["weight_decay"], decay["rule"], decay["rate"],
                                  decay["layers"])
        self.optimizer = torch.optim.AdamW(groups, lr=self.recipe["lr"], betas=tuple(self.recipe["betas"]),
                                           eps=self.recipe["eps"], fused=True)
        for group in self.optimizer.param_groups:
            group["full_lr"] = group["lr"]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.machine["amp"] == "float16")
        self.sparsity = self.ema = None
        self.forward = self._forward()
        self.done = self.position = 0
        self.tally, self.lines, self.environments, self.seconds = _Tally(), [], [], 0.0

    def step(self, step: int, batches: Iterable[tuple[Tensor, list[Target]]], wishes: Iterable[bool] = ()) -> list[float]:
        """One optimizer step, its gradient averaged over micro-batches and processes; as of `Training.step`."""
        factor, total = rate(self.recipe, step, self.steps, self.epochs * self.steps), torch.zeros((), device=self.device)
        for group in self.optimizer.param_groups:
            group["lr"] = factor * group["full_lr"]
        self.optimizer.zero_grad(set_to_none=True)
        for part, (images, targets) in enumerate(batches, start=1):
            x = images.to(self.device, memory_format=MEMORY_FORMATS[self.machine["memory_format"]], non_blocking=True)
            with nullcontext() if self.world == 1 or part == self.loader.parts else self.forward.no_sync():
                with autocast(self.machine):
                    losses = self.forward(x, [moved(target, self.device) for target in targets])
                    loss = sum(losses.values()) / self.loader.parts
                self.scaler.scale(loss).backward()
            total = total + loss.detach().double()
        loss, *wished = distributed.summed([total / self.world, *wishes], self.device)
        if self.is_good(loss):
            self._optimize()
        return [loss, *wished]

    def evaluates(self) -> bool:
        """Never: the papers report last weights, and evaluation is a stage."""
        return False

    def finish_epoch(self) -> dict[str, Any]:
        """The epoch's line of the log."""
        self.check_finite()
        tally = self.tally
        line = {"epoch": self.done + 1, **({"train_loss": tally.loss / tally.good} if tally.good else {}),
                "lr": max(group["lr"] for group in self.optimizer.param_groups),
                **({"bad_steps": tally.bad} if tally.bad else {}),
                "images_per_second": self.steps * self.recipe["batch_size"] / tally.seconds, "seconds": tally.seconds}
        self.lines.append(line)
        self.done, self.position, self.tally = self.done + 1, 0, _Tally(bad_in_a_row=tally.bad_in_a_row)
        return line

    def publish(self, out: Path, record: dict[str, Any]) -> None:
        """Write the results, the stamp of the weights last."""
        zeros = sum(int((~mask).sum()) for mask in self.model.pyramid.masks.values())
        metrics = values(
            train_loss=([line for line in self.lines if "epoch" in line][-1]["train_loss"], ""), epochs=(self.epochs, "epochs"),
            steps=(self.epochs * self.steps, "steps"), zeros_kept=(zeros, "weights"),
            parameters=(sum(p.numel() for p in self.model.parameters()), "weights"))
        self._publish(out, record | {"status": "finished"}, metrics, self.model.state_dict(), {})

    def _forward(self) -> Callable[[Tensor, list[Target]], dict[str, Tensor]]:
        """The network as it is called. Where the machine says so its backbone is compiled, for images of any size.

        Heads are not: what they compute depends on what they find.
        """
        if self.machine["compile"]:                                   # pytorch#185510: on a CPU the layout would be an error
            self.model.pyramid.compile(options={"layout_optimization": False} if self.device.type == "cpu" else None)
        if self.world == 1:
            return self.model
        # Detectors leave out heads in a batch without objects, and FCOS3D the pyramid's first map.
        return DistributedDataParallel(self.model, device_ids=[self.device.index] if self.device.type == "cuda" else None,
                                       broadcast_buffers=not self.machine["sync_bn"],
                                       find_unused_parameters=self.task != "ade20k")


class Stream:
    """Batches pass after pass over the images, from any step on.

    Attributes
    ----------
    parts : int
        Micro-batches of a step in this process.
    bad_files : set of str
        Stays empty: a fine-tune stops at an unreadable image.
    """

    def __init__(self, images: Images, batches: Batches, collate: Collate, steps: int, workers: int, pin_memory: bool) -> None:
        self.batches, self.steps, self.parts = batches, steps, batches.parts
        self.bad_files: set[str] = set()
        self.loader = Loader(images, batches, collate, workers, pin_memory)

    def epoch(self, number: int, first: int = 0) -> Iterator[tuple[Tensor, list[Target]]]:
        """Micro-batches from step `first` of the loop's epoch (1, 2, ...) on, without an end."""
        step = (number - 1) * self.steps + first
        while True:
            self.batches.epoch, self.batches.first = divmod(step, self.batches.steps)
            step += self.batches.steps - self.batches.first
            yield from self.loader


def build_pyramid(config: Mapping[str, Any]) -> Pyramid:
    """The pyramid of a resolved row, freshly initialised."""
    recipe, network = config["recipe"], config["network"]
    return Pyramid(network["name"], drop_path_rate=recipe["drop_path_rate"], layer_scale_init=recipe["layer_scale_init"],
                   sparse=recipe["sparse"], **network["args"])


def load_pretrained(pyramid: Pyramid, weights: Path, grown: int = 0) -> None:
    """Give a pyramid the weights of a finished pretraining.

    Parameters
    ----------
    weights : Path
        Beside which its sha256 lies.
    grown : int
        So many of the last stages are no part of the pretraining: they stay as they are. A stem for grey images is spread over
        three channels, so that it sees a grey image as before.

    Raises
    ------
    FileNotFoundError, ValueError
        When there are none, they are damaged, their run diverged, or they are another network's.
    """
    published_sha256(weights)
    if (step := diverged_at(weights)) is not None:
        raise ValueError(f"{weights} needs to hold weights, but its run diverged at step {step} and has none. Change the "
                         "recipe of that run in params/ and train it again.")
    state, own = load_file(weights), pyramid.net.state_dict()
    new = tuple(f"stages.{stage}." for stage in range(4 - grown, 4))
    state |= {name: tensor for name, tensor in own.items() if new and name.startswith(new) and name not in state}
    for name, tensor in state.items():
        if name.startswith("stem.") and tensor.dim() == 4 and tensor.shape[1] == 1 and own[name].shape[1] == 3:
            state[name] = tensor.repeat(1, 3, 1, 1) / 3
    try:
        pyramid.load_pretrained(state)
    except ValueError as error:
        raise ValueError(f"{weights}: {error}") from error


def rate(recipe: Mapping[str, Any], step: int, steps_per_epoch: int, total: int) -> float:
    """Share of the full learning rate at a step: MMCV's poly or step schedule, under its linear warm-up.

    Parameters
    ----------
    recipe : mapping
        `decay`, `power` or `milestones` (epochs) and `gamma`, `warmup_iterations`, `warmup_ratio`.
    step : int
        From 0.
    steps_per_epoch, total : int
    """
    if recipe["decay"] == "poly":
        factor = (1 - step / total) ** recipe["power"]
    else:
        factor = recipe["gamma"] ** sum(step // steps_per_epoch >= milestone for milestone in recipe["milestones"])
    if step < recipe["warmup_iterations"]:
        factor *= 1 - (1 - step / recipe["warmup_iterations"]) * (1 - recipe["warmup_ratio"])
    return factor
