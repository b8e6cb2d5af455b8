"""What a training step costs beside its arithmetic: the trainer's own share, mask updates, resuming, and memory."""

import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from swconv import atomic
from swconv.bench import forms, training_step
from swconv.bench.circumstances import check_ready, circumstances, device_name
from swconv.bench.data import make_photographs
from swconv.bench.timing import Progress
from swconv.models.network import set_recompute
from swconv.training import checkpoint, manifest
from swconv.training.loop import Training
from swconv.training.memory import keep_freed_memory, return_freed_memory

PARTS = {"decode": "images: read, decode, augment", "forward": "forward", "backward": "backward, graph freed",
         "optimizer": "optimizer", "rest": "**all else**"}
TARGETS = {"rest": 0.03, "masks": 0.01, "resume": 5.0, "memory": 0.5}  # share, share, s, ratio
UPDATES = 100                                                         # steps between mask updates, over which one is spread
Rows = Mapping[str, Mapping[str, Any]]

log = logging.getLogger(__name__)


def _as_glibc_does() -> None:
    pass


@dataclass(frozen=True)
class Form:
    """A way to train: the operator as published or ours, `recompute` of the machine, and what becomes of freed memory."""

    title: str
    published: bool
    recompute: bool
    freed: Callable[[], None]


FORMS = {
    "two_step": Form("two-step as published", True, False, _as_glibc_does),
    "two_step_returned": Form("the same, freed memory returned", True, False, return_freed_memory),
    "ours": Form("ours, `recompute: false`", False, False, keep_freed_memory),
    "recompute": Form("ours, `recompute: true`, freed memory returned", False, True, return_freed_memory),
}


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes
    ----------
    warm, steps : mapping of str to int
        Optimizer steps of each row that are left out at the beginning, and that are measured.
    digits, photographs : int
        Images that the rows train on.
    batch, image : int
        Of the row on photographs, and of the step whose memory is measured; px.
    network : mapping
        Arguments of `sw_tiny` in the latter.
    rounds : int
        Steps of each of `FORMS` whose time is measured.
    """

    warm: Mapping[str, int]
    steps: Mapping[str, int]
    digits: int
    photographs: int
    batch: int
    image: int
    network: Mapping[str, Any]
    rounds: int


FULL = Plan({"mini": 10, "paper": 2}, {"mini": 100, "paper": 8}, 8000, 96, 8, 224, {}, 2)
QUICK = Plan({"mini": 1, "paper": 1}, {"mini": 2, "paper": 1}, 256, 16, 4, 64,
             {"depths": [1, 1], "dims": [8, 16], "kernel_sizes": [13, 5]}, 1)


def run(out: Path, device: str, quick: bool, rows: Rows) -> tuple[Path, Path]:
    """Measure, and write training-cpu.json and .md into a folder, with -quick behind a quick run's name.

    On a GPU it is one step beside other networks' that counts: `training_step.run`.

    Parameters
    ----------
    rows : mapping
        SW-tiny at the scales `mini` and `paper`: resolved rows of params. On a GPU there need be none.

    Raises
    ------
    RuntimeError
        When the device or the compiled operators are missing.
    """
    if device != "cpu":
        return training_step.run(out, device, quick)
    check_ready(torch.device(device), "training")
    found = measure(QUICK if quick else FULL, rows) | {"quick": quick}
    paths = tuple(out / f"training-{device_name(found)}.{kind}" for kind in ("json", "md"))
    atomic.write_json(paths[0], found)
    atomic.write_atomic(paths[1], render(found).encode())
    log.info("wrote %s and %s", *paths)
    return paths


def measure(plan: Plan, rows: Rows) -> dict[str, Any]:
    """All that the report tells: circumstances, `steps` and `masks` by row, `resume` in seconds, `memory` in bytes by form."""
    start, threads = time.perf_counter(), torch.get_num_threads()
    told = circumstances("training", torch.device("cpu"), "swconv.bench.training", plan=asdict(plan))
    bar, told["steps"], told["masks"], told["resume"] = Progress(4 + len(FORMS)), {}, {}, {}
    try:
        with tempfile.TemporaryDirectory() as folder:
            bar.step("making images")
            configs = {"mini": _mini(rows["mini"], plan, Path(folder, "mini")),
                       "paper": _paper(rows["paper"], plan, Path(folder, "paper"), threads)}
            for name, config in configs.items():
                bar.step(f"training steps, {name}")
                training = Training(config, Path(folder, name), 0)
                training.start(None, {})
                told["steps"][name] = _steps(training, plan.warm[name], plan.steps[name])
                told["masks"][name] = _masks(training)
                told["resume"][name] = _resume(training, config, Path(folder, name))
                del training
    finally:
        torch.set_num_threads(threads)
    told["resume"]["import"] = float(_python("import time; began = time.perf_counter(); import swconv.training.loop; "
                                             "print(time.perf_counter() - began)"))
    arguments = f"{plan.batch}, {plan.image}, {dict(plan.network)!r}"
    told["memory"] = {}
    for name in FORMS:
        bar.step(f"peak memory, {name}")
        told["memory"][name] = int(_python(f"from swconv.bench.training import peak; print(peak({name!r}, {arguments}))"))
    bar.step("steps of all forms")
    told["form_ms"] = json.loads(_python(f"import json; from swconv.bench.training import pace; "
                                         f"print(json.dumps(pace({plan.rounds}, {arguments})))"))
    bar.close()
    return told | {"seconds": time.perf_counter() - start}


def peak(name: str, batch: int, image: int, network: Mapping[str, Any]) -> int:
    """Most bytes that this process held (resident) up to the end of one training step of `sw_tiny`: run it in a new process.

    Parameters
    ----------
    name : str
        One of `FORMS`.
    """
    FORMS[name].freed()
    step = _step(name, batch, image, network)
    step()
    with Path("/proc/self/status").open() as file:                    # getrusage's peak is inherited from the parent process
        return 1024 * next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))


def pace(rounds: int, batch: int, image: int, network: Mapping[str, Any]) -> dict[str, float]:
    """Median milliseconds of a training step of `sw_tiny` by form; a round takes one step of each."""
    steps, seconds = {name: _step(name, batch, image, network) for name in FORMS}, defaultdict(list)
    for number in range(rounds + 1):
        for name, step in steps.items():
            (FORMS[name].freed if FORMS[name].freed is not _as_glibc_does else keep_freed_memory)()
            began = time.perf_counter()
            step()
            if number:                                                # the first ones make the optimizers' moments
                seconds[name].append(time.perf_counter() - began)
    return {name: 1e3 * statistics.median(found) for name, found in seconds.items()}


def _step(name: str, batch: int, image: int, network: Mapping[str, Any]) -> Callable[[], None]:
    """A training step of `sw_tiny` on random images."""
    torch.manual_seed(0)
    model = forms.training_form(timm.create_model("sw_tiny", **network), "two_step" if FORMS[name].published else "ours")
    set_recompute(model.to(memory_format=torch.channels_last).train(), FORMS[name].recompute)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    images = torch.randn(batch, 3, image, image).to(memory_format=torch.channels_last)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(images), torch.zeros(batch, dtype=torch.int64)).backward()
        optimizer.step()

    return step


# ---- the rows


def _mini(row: Mapping[str, Any], plan: Plan, folder: Path) -> dict[str, Any]:
    config = dict(row) | {"dataset": row["dataset"] | {"train_images": plan.digits, "val_images": 20}}
    manifest.prepare(config["dataset"], folder)
    return config


def _paper(row: Mapping[str, Any], plan: Plan, folder: Path, threads: int) -> dict[str, Any]:
    make_photographs(folder / "images", plan.photographs, (500, 375))
    config = dict(row) | {
        "recipe": row["recipe"] | {"batch_size": plan.batch, "sparsity": row["recipe"]["sparsity"] | {"update_every": UPDATES}},
        "dataset": row["dataset"] | {"root": str(folder / "images"), "num_classes": 2, "image_size": plan.image, "workers": 0},
        "machine": row["machine"] | {"device": "cpu", "threads": threads, "processes": 1, "micro_batch": None},
        "model": row["model"] | {"args": row["model"]["args"] | plan.network}}
    manifest.prepare(config["dataset"], folder)
    return config


# ---- what is measured


def _steps(training: Training, warm: int, count: int) -> dict[str, Any]:
    """Milliseconds of every part of a step, means over `count` steps; and the share of what is none of `PARTS`' first four."""
    seconds: Counter[str] = Counter()
    with _timed(training, seconds):
        steps = _without_end(training)
        for _ in range(warm):
            next(steps)
        seconds.clear()
        began = time.perf_counter()
        for _ in range(count):
            next(steps)
        total = time.perf_counter() - began
    seconds["rest"] = total - sum(seconds.values())
    return {"step_ms": 1e3 * total / count, "batch": training.recipe["batch_size"], "steps": count,
            "parts_ms": {part: 1e3 * seconds[part] / count for part in PARTS}, "rest_share": seconds["rest"] / total}


def _without_end(training: Training) -> Iterator[Any]:
    """Steps of one epoch after the other, with neither evaluation nor checkpoint between them."""
    while True:
        yield from training.epoch("bench", 0, lambda: [False, False])
        training.position = 0


@contextmanager
def _timed(training: Training, seconds: Counter[str]) -> Iterator[None]:
    """Add up the time of loading, forward (with the loss), backward (with the end of its graph), and the optimizer."""
    def timed(part: str, call: Callable) -> Callable:
        def inner(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                seconds[part] += time.perf_counter() - began
        return inner

    def loading(epoch: Callable) -> Callable:
        def batches(*args: Any) -> Iterator[Any]:
            source, end = epoch(*args), object()
            fetch = timed("decode", lambda: next(source, end))
            while (batch := fetch()) is not end:
                yield batch
        return batches

    places = [(training.loader, "epoch", loading(training.loader.epoch)),
              (training, "forward", timed("forward", training.forward)),
              (F, "cross_entropy", timed("forward", F.cross_entropy)),
              (Tensor, "backward", timed("backward", Tensor.backward)),
              (Tensor, "detach_", timed("backward", Tensor.detach_)),  # which frees the graph
              (training.optimizer, "step", timed("optimizer", training.optimizer.step))]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in places]
    try:
        for owner, name, call in places:
            setattr(owner, name, call)
        yield
    finally:
        for owner, name, call in before:
            setattr(owner, name, call)


def _masks(training: Training, rounds: int = 5) -> dict[str, float]:
    """Milliseconds to mask the weights, and to update the masks besides: medians."""
    sparsity, found = training.sparsity, {"mask_ms": [], "update_ms": []}
    every = training.recipe["sparsity"]["update_every"]
    for number in range(2 * rounds):
        sparsity.steps = every - 1 if number % 2 else every               # the next step updates, or does not
        if every == 1 and not number % 2:
            continue
        began = time.perf_counter()
        event = sparsity.step(training.optimizer)
        found["update_ms" if event else "mask_ms"].append(1e3 * (time.perf_counter() - began))
    masking, both = (statistics.median(found[name] or [0.0]) for name in ("mask_ms", "update_ms"))
    return {"mask_ms": masking, "update_ms": both - masking}


def _resume(training: Training, config: Mapping[str, Any], folder: Path) -> float:
    """Seconds from a new process's imports to its first step: objects, data, and the newest checkpoint."""
    state = training.state() | {"generators": [checkpoint.generators()]}
    checkpoint.save(folder / "checkpoints", 1, 0, state)
    began = time.perf_counter()
    again = Training(config, folder, 0)
    again.start(checkpoint.newest(folder / "checkpoints"), {})
    return time.perf_counter() - began


def _python(code: str) -> str:
    """What a new Python prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"bench training could not measure in a process of its own: {done.stderr.strip().splitlines()[-1]}")
    return done.stdout


# ---- the page


def render(record: Mapping[str, Any]) -> str:
    """The page of `measure`'s record."""
    hardware, plan, memory, resume = record["hardware"], record["plan"], record["memory"], record["resume"]
    trial = "**A trial on tiny networks, to see that it runs; its numbers say nothing.**\n\n" if record["quick"] else ""
    changed = ", with changes that are not committed" if record["git_dirty"] else ""
    titles = {"mini": "SW-tiny on the mini task", "paper": f"SW-tiny, {plan['image']} px"}
    steps, masks, starts = [], [], []
    for name, title in titles.items():
        row, mask = record["steps"][name], record["masks"][name]
        share = mask["update_ms"] / UPDATES / row["step_ms"]
        steps.append([title, row["batch"], f"{row['step_ms']:.1f}", *(f"{row['parts_ms'][part]:.2f}" for part in PARTS),
                      f"{100 * row['rest_share']:.1f} %", _met(row["rest_share"] <= TARGETS["rest"])])
        masks.append([title, f"{mask['mask_ms']:.2f}", f"{mask['update_ms']:.2f}", f"{100 * share:.2f} %",
                      _met(share <= TARGETS["masks"])])
        starts.append([title, f"{resume['import']:.1f}", f"{resume[name]:.1f}",
                       _met(resume["import"] + resume[name] <= TARGETS["resume"])])
    pace, peaks = record["form_ms"], []
    for name, form in FORMS.items():
        share = memory[name] / memory["two_step"]
        peaks.append([form.title, f"{memory[name] / 2**30:.2f}", f"{share:.2f}", f"{pace[name]:.0f}",
                      f"{pace[name] / pace['two_step']:.2f}", _met(share <= TARGETS["memory"]) if form.recompute else ""])
    return f"""# Training on {hardware['cores']} cores of {hardware['cpu']}

{trial}Made by `python -m swconv bench training` at {record['started']} in {record['seconds']:.0f} s; commit \
{record['git_commit'] or 'unknown'}{changed}. Load before: {record['load_before']}. Versions: \
{', '.join(f'{name} {version}' for name, version in record['versions'].items() if version is not None)}.

## A step

Milliseconds, means over the steps measured. All else is the trainer's own: normalising, erasing, Mixup, schedule, masks, \
checks, progress; aim: at most {100 * TARGETS['rest']:.0f} % of a step. Images are loaded in the training process.

{_table(['', 'batch', 'step', *PARTS.values(), 'share', 'aim'], steps)}

## Masks

Milliseconds to set dead weights to zero (after every step) and to update the masks, spread over {UPDATES} steps; aim: at most \
{100 * TARGETS['masks']:.0f} % of a step.

{_table(['', 'mask', 'update', 'of a step', 'aim'], masks)}

## Resuming

Seconds from the start of a process to its first step; aim: at most {TARGETS['resume']:.0f}.

{_table(['', 'imports', 'network, data, checkpoint', 'aim'], starts)}

## Memory

GiB that a process holds at most, over one training step of SW-tiny with {plan['batch']} images of {plan['image']} px, Python \
and torch themselves included; and milliseconds of such a step, medians of steps that take turns in one process. Two-step is \
the operator of the released code in our block, which keeps what the released one keeps. `recompute` (`machine:` of a profile) \
keeps less for the backward pass, and hands freed maps back to the system; the weights come out the same, bit for bit. Aim: \
at most {TARGETS['memory']} of the memory of the two-step form.

{_table(['', 'peak', 'of the first', 'step', 'of the first', 'aim'], peaks)}
"""


def _met(met: bool) -> str:
    return "met" if met else "missed"


def _table(head: list[str], rows: list[list[Any]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
