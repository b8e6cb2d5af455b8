"""A training step of SW-tiny beside its two-step form and its rivals on a GPU: time, by its parts, and peak memory."""

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import swconv.models  # noqa: F401  registers the networks with timm
from swconv.bench.circumstances import check_ready, circumstances, stopped, write_growing
from swconv.bench.forms import training_form
from swconv.bench.timing import Progress, captured, in_precision, peak, seconds_per_call, without_search
from swconv.models.network import set_recompute
from swconv.training.memory import keep_freed_memory

PARTS = ("forward", "backward", "optimizer")
NETWORKS = {                                                          # title; timm's name and form
    "ours": ("**SW-tiny**, strips", "sw_tiny", "ours"),
    "recompute": ("**SW-tiny**, strips, `recompute: true`", "sw_tiny", "recompute"),
    "two_step": ("SW-tiny, two-step as published", "sw_tiny", "two_step"),
    "unireplknet": ("UniRepLKNet-T, in training form", "unireplknet_tiny", "ours"),
    "convnext": ("ConvNeXt-T of timm", "convnext_tiny", "ours"),
}
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
TITLES = {"bfloat16": "bfloat16 autocast", "float32": "float32"}
# In bfloat16: what, of which of ours, beside which other; times as theirs / ours, at least, memory as ours / theirs, at most.
TARGETS = (("graph_ms", "ours", "two_step", 4.0), ("graph_ms", "ours", "unireplknet", 1.2),
           ("graph_ms", "ours", "convnext", 0.75), ("peak", "ours", "two_step", 0.5), ("peak", "recompute", "two_step", 0.5),
           ("peak", "ours", "unireplknet", 0.9))


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes
    ----------
    batch, image : int
        Images of a step, and their side in px.
    networks : mapping
        By the networks of `NETWORKS`: what differs from timm's defaults.
    rows : tuple of (str, str, str)
        Network, precision ("bfloat16", by autocast, or "float32", strictly) and memory format, in the order of measurement.
    seconds, steps : float, int
        A network takes steps until so many seconds, warm, are over, but so many at least.
    """

    batch: int
    image: int
    networks: Mapping[str, Mapping[str, Any]]
    rows: tuple[tuple[str, str, str], ...]
    seconds: float
    steps: int


ROWS = (*((name, "bfloat16", "contiguous") for name in NETWORKS),
        *((name, "bfloat16", "channels_last") for name in ("ours", "convnext", "unireplknet")),
        *((name, "float32", "contiguous") for name in NETWORKS))
FULL = Plan(128, 224, dict.fromkeys(NETWORKS, {}), ROWS, 0.5, 3)
_LITTLE = {"depths": (1, 1), "dims": (8, 16), "kernel_sizes": (13, 5)}
QUICK = Plan(4, 64, {"ours": _LITTLE, "recompute": _LITTLE, "two_step": _LITTLE,
                     "unireplknet": _LITTLE | {"kernel_sizes": (3, 13)},
                     "convnext": {"depths": (1, 1, 1, 1), "dims": (4, 4, 8, 8)}}, ROWS, 0.0, 2)


def run(out: Path, device: str, quick: bool) -> tuple[Path, Path]:
    """Measure, and write training-<name of the GPU>.json and .md into a folder, with -quick behind a quick run's name.

    Raises
    ------
    RuntimeError
        When the device or the compiled operators are missing. What was measured before another fault stays written, and names
        what is `unfinished`.
    """
    where = torch.device(device)
    check_ready(where, "training")
    return write_growing(measure(QUICK if quick else FULL, where), out, "training", quick, render)


def measure(plan: Plan, device: torch.device) -> Iterator[dict[str, Any]]:
    """All that the page tells, as far as it goes, after each row of the plan.

    That is circumstances, `steps`, one row per network, precision and memory format, and the rows that are `unfinished`.
    """
    start, steps, made = time.perf_counter(), [], {}
    keep_freed_memory()
    bar = Progress(len(plan.rows))
    with in_precision("float32"), without_search():
        told = circumstances("training", device, "swconv.bench.training_step", plan=asdict(plan))
    for number, (name, precision, layout) in enumerate(plan.rows, start=1):
        bar.step(f"training step, {name}, {precision}, {layout}")
        with in_precision(precision), without_search():
            model = _made(made, plan, name)
            steps.append({"network": name, "precision": precision, "format": layout}
                         | _row(plan, name, model, precision, layout, device))
        if device.type == "cuda":
            torch.cuda.empty_cache()                                  # of this network
        unfinished = [", ".join(row) for row in plan.rows[number:]]
        yield told | {"seconds": round(time.perf_counter() - start, 1), "steps": steps, "unfinished": unfinished}
    bar.close()


def _made(made: dict[str, nn.Module], plan: Plan, name: str) -> nn.Module:
    """A copy of the network as timm makes it, which takes a CPU seconds: once per model and arguments."""
    _, model_name, _ = NETWORKS[name]
    key = f"{model_name} {plan.networks[name]}"
    if key not in made:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            made[key] = timm.create_model(model_name, **plan.networks[name])
    return copy.deepcopy(made[key])


def _row(
    plan: Plan, name: str, model: nn.Module, precision: str, layout: str, device: torch.device
) -> dict[str, Any]:
    """Median and quartiles of a step's milliseconds, medians of its parts and of a CUDA graph of it, and bytes at its peak."""
    cuda, (_, _, form) = device.type == "cuda", NETWORKS[name]
    set_recompute(model, form == "recompute")
    model = training_form(model, form).to(device, memory_format=FORMATS[layout]).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True, capturable=cuda)
    images = torch.randn(plan.batch, 3, plan.image, plan.image, device=device).to(memory_format=FORMATS[layout])
    labels = torch.zeros(plan.batch, dtype=torch.int64, device=device)
    autocast = torch.autocast(device.type, torch.bfloat16) if precision == "bfloat16" else nullcontext()
    parts = _parts(model, optimizer, images, labels, autocast)
    try:
        for _ in range(2):                                            # the optimizer's state, and what is chosen once
            _seconds(parts, cuda)
        found, began = [], time.perf_counter()
        while len(found) < plan.steps or time.perf_counter() - began < plan.seconds:
            found.append(_seconds(parts, cuda))
        held = torch.cuda.memory_allocated() if cuda else 0
        most = held + peak(lambda: _seconds(parts, cuda), cuda)
        graph = _graph_ms(plan, parts) if cuda else None
    except torch.OutOfMemoryError:
        return {"out_of_memory": True}
    first, middle, third = statistics.quantiles([1e3 * sum(seconds) for seconds in found], n=4, method="inclusive")
    return {"step_ms": middle, "q1_ms": first, "q3_ms": third, "count": len(found), "images_per_s": 1e3 * plan.batch / middle,
            "parts_ms": {part: 1e3 * statistics.median(times)
                         for part, times in zip(PARTS, zip(*found, strict=True), strict=True)}, "peak": most, "graph_ms": graph}


def _graph_ms(plan: Plan, parts: tuple[Callable[[], None], ...]) -> float | None:
    """The median of a CUDA graph of one step, which does not wait for the CPU; None where it cannot be captured."""
    torch.cuda.empty_cache()
    replay = captured([lambda: [part() for part in parts]])
    if replay is None:
        return None
    found, began = [], time.perf_counter()
    while len(found) < plan.steps or time.perf_counter() - began < plan.seconds:
        found.append(seconds_per_call(replay, 1, True))
    return 1e3 * statistics.median(found)


def _parts(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor, autocast: Any
) -> tuple[Callable[[], None], ...]:
    """What a step does, one after the other: forward with the loss; backward; optimizer."""
    losses: list[Tensor] = []

    def forward() -> None:
        with autocast:
            losses.append(F.cross_entropy(model(images), labels))

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return forward, lambda: losses.pop().backward(), step


def _seconds(parts: tuple[Callable[[], None], ...], cuda: bool) -> list[float]:
    """Of every part of one step: by events on the GPU, which the CPU waits for at the end only; by the clock on the CPU."""
    marks = [_mark(cuda)]
    for part in parts:
        part()
        marks.append(_mark(cuda))
    if cuda:
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in zip(marks, marks[1:], strict=False)]
    return [b - a for a, b in zip(marks, marks[1:], strict=False)]


def _mark(cuda: bool) -> Any:
    if not cuda:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


# ---- the page


def render(record: Mapping[str, Any]) -> str:
    """The page of `measure`'s record."""
    hardware, plan = record["hardware"], record["plan"]
    trial = "**A trial on tiny networks, to see that it runs; its numbers say nothing.**\n\n" if record["quick"] else ""
    changed = ", with changes that are not committed" if record["git_dirty"] else ""
    where = hardware["gpu"] if record["device"] == "cuda" else f"{hardware['cores']} cores of {hardware['cpu']}"
    best = {(name, precision): _best(record, name, precision) for precision in TITLES for name in plan["networks"]}
    measured = {(row["network"], row["precision"]) for row in record["steps"]}
    head = ["ms (quartiles)", *PARTS, "images/s", "/ ours", "graph, ms", "/ ours", "peak, GiB", "/ ours", "format", "steps"]
    tables = [_table([TITLES[precision], *head],
                     [_line(name, best[name, precision], best["ours", precision]) for name in plan["networks"]
                      if (name, precision) in measured])
              for precision in TITLES if any(key[1] == precision for key in measured)]
    targets = [_target(key, own, rival, bound, best[own, "bfloat16"], best[rival, "bfloat16"])
               for key, own, rival, bound in TARGETS]
    return f"""# A training step on {where}

{trial}{stopped(record)}\
Made by `python -m swconv bench training --device {record['device']}` at {record['started']} in {record['seconds']:.0f} \
s; commit {record['git_commit'] or 'unknown'}{changed}. Load before: {record['load_before']}. Versions: \
{', '.join(f'{name} {version}' for name, version in record['versions'].items() if version is not None)}.

{plan['batch']} images of {plan['image']}x{plan['image']} px that lie on the device, cross-entropy, AdamW; neither drop path
nor masks. Each network in the faster of the memory formats that it ran in: contiguous, and in bfloat16 channels_last for
SW-tiny, UniRepLKNet-T and ConvNeXt-T; medians. cuDNN chose its kernels by its rules (`cudnn.benchmark` off, as `swconv train`
has it; timm's training script turns its search on). Graph: a whole step as one CUDA graph, which does not wait for the CPU's
launches as an eager step does; a step that cannot be captured has none. Peak: of torch's allocations in an eager step,
weights, gradients and optimizer included. The two-step form convolves with every Rep branch and
sums the maps, as the released code trains, and stays in float32 under autocast, as its kernels are published.

{(chr(10) * 2).join(tables)}

## Targets, in bfloat16

{_table(['', 'needed', 'measured', ''], [target for target in targets if target])}
"""


def _best(record: Mapping[str, Any], name: str, precision: str) -> Mapping[str, Any] | None:
    """The row of the faster memory format, as a graph where there is one; None where none had room."""
    rows = [row for row in record["steps"] if (row["network"], row["precision"]) == (name, precision) and "step_ms" in row]
    return min(rows, key=lambda row: row["graph_ms"] or row["step_ms"], default=None)


def _line(name: str, row: Mapping[str, Any] | None, ours: Mapping[str, Any] | None) -> list[str]:
    title = NETWORKS[name][0]
    if row is None:
        return [title, "out of memory", *[""] * 11]
    step, graph, peak_ = (f"{row[key] / ours[key]:.2f}" if ours and row[key] and ours[key] else ""
                          for key in ("step_ms", "graph_ms", "peak"))
    return [title, f"{row['step_ms']:.1f} ({row['q1_ms']:.1f}-{row['q3_ms']:.1f})",
            *(f"{row['parts_ms'][part]:.1f}" for part in PARTS), f"{row['images_per_s']:.0f}", step,
            f"{row['graph_ms']:.1f}" if row["graph_ms"] else "", graph, f"{row['peak'] / 2**30:.2f}", peak_, row["format"],
            str(row["count"])]


def _target(
    key: str, own: str, rival: str, bound: float, ours: Mapping[str, Any] | None, theirs: Mapping[str, Any] | None
) -> list[str] | None:
    if not (ours and theirs and ours[key] and theirs[key]):
        return None
    title, named, time_ = NETWORKS[rival][0], NETWORKS[own][0], key == "graph_ms"
    value = theirs[key] / ours[key] if time_ else ours[key] / theirs[key]
    met = value >= bound if time_ else value <= bound
    return [f"time of {title} / {named}, as CUDA graphs" if time_ else f"peak memory of {named} / {title}",
            f"{'>=' if time_ else '<='} {bound:g}", f"{value:.2f}", "reached" if met else "**not reached**"]


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
