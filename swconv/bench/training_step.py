"""A training step of SW-tiny beside its two-step form and its rivals on a GPU: time, by its parts, and peak memory."""

import logging
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import swconv.models  # noqa: F401  registers the networks with timm
from swconv import atomic
from swconv.bench.circumstances import check_ready, circumstances, device_name
from swconv.bench.forms import training_form
from swconv.bench.timing import Progress, in_precision, peak
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
TARGETS = (("step_ms", "ours", "two_step", 4.0), ("step_ms", "ours", "unireplknet", 1.2), ("step_ms", "ours", "convnext", 0.75),
           ("peak", "ours", "two_step", 0.5), ("peak", "recompute", "two_step", 0.5), ("peak", "ours", "unireplknet", 0.9))

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes
    ----------
    batch, image : int
        Images of a step, and their side in px.
    networks : mapping
        By the networks of `NETWORKS`: what differs from timm's defaults.
    precisions : mapping of str to tuple of str
        "bfloat16", by autocast, and "float32", strictly; and the memory formats of each.
    seconds, steps : float, int
        A network takes steps until so many seconds, warm, are over, but so many at least.
    """

    batch: int
    image: int
    networks: Mapping[str, Mapping[str, Any]]
    precisions: Mapping[str, tuple[str, ...]]
    seconds: float
    steps: int


PRECISIONS = {"bfloat16": ("contiguous", "channels_last"), "float32": ("contiguous",)}
FULL = Plan(128, 224, dict.fromkeys(NETWORKS, {}), PRECISIONS, 0.7, 5)
_LITTLE = {"depths": (1, 1), "dims": (8, 16), "kernel_sizes": (13, 5)}
QUICK = Plan(4, 64, {"ours": _LITTLE, "recompute": _LITTLE, "two_step": _LITTLE,
                     "unireplknet": _LITTLE | {"kernel_sizes": (3, 13)},
                     "convnext": {"depths": (1, 1, 1, 1), "dims": (4, 4, 8, 8)}}, PRECISIONS, 0.0, 2)


def run(out: Path, device: str, quick: bool) -> tuple[Path, Path]:
    """Measure, and write training-<name of the GPU>.json and .md into a folder, with -quick behind a quick run's name.

    Raises
    ------
    RuntimeError
        When the device or the compiled operators are missing.
    """
    where = torch.device(device)
    check_ready(where, "training")
    found = measure(QUICK if quick else FULL, where) | {"quick": quick}
    paths = tuple(out / f"training-{device_name(found)}.{kind}" for kind in ("json", "md"))
    atomic.write_json(paths[0], found)
    atomic.write_atomic(paths[1], render(found).encode())
    log.info("wrote %s and %s", *paths)
    return paths


def measure(plan: Plan, device: torch.device) -> dict[str, Any]:
    """All that the page tells: circumstances, and `steps`, one row per network, precision and memory format."""
    start, rows = time.perf_counter(), []
    keep_freed_memory()
    bar = Progress(len(plan.precisions) * len(plan.networks))
    told = circumstances("training", device, "swconv.bench.training_step", plan=asdict(plan))
    for precision, formats in plan.precisions.items():
        with in_precision(precision):
            for name, arguments in plan.networks.items():
                bar.step(f"training step, {name}, {precision}")
                for layout in formats:
                    rows.append({"network": name, "precision": precision, "format": layout}
                                | _row(plan, name, arguments, precision, layout, device))
                    if device.type == "cuda":
                        torch.cuda.empty_cache()                      # of this network
    bar.close()
    return told | {"seconds": round(time.perf_counter() - start, 1), "steps": rows}


def _row(
    plan: Plan, name: str, arguments: Mapping[str, Any], precision: str, layout: str, device: torch.device
) -> dict[str, Any]:
    """Median and quartiles of a step's milliseconds, medians of its parts, and bytes at its peak."""
    cuda, (_, model_name, form) = device.type == "cuda", NETWORKS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = training_form(timm.create_model(model_name, **arguments), form)
    set_recompute(model, form == "recompute")
    model = model.to(device, memory_format=FORMATS[layout]).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
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
    except torch.OutOfMemoryError:
        return {"out_of_memory": True}
    first, middle, third = statistics.quantiles([1e3 * sum(seconds) for seconds in found], n=4, method="inclusive")
    return {"step_ms": middle, "q1_ms": first, "q3_ms": third, "count": len(found), "images_per_s": 1e3 * plan.batch / middle,
            "parts_ms": {part: 1e3 * statistics.median(times)
                         for part, times in zip(PARTS, zip(*found, strict=True), strict=True)}, "peak": most}


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
    best = {(name, precision): _best(record, name, precision) for precision in plan["precisions"] for name in plan["networks"]}
    head = ["ms (quartiles)", *PARTS, "images/s", "/ ours", "peak, GiB", "/ ours", "format", "steps"]
    tables = [_table([TITLES[precision], *head],
                     [_line(name, best[name, precision], best["ours", precision]) for name in plan["networks"]])
              for precision in plan["precisions"]]
    targets = [_target(key, own, rival, bound, best[own, "bfloat16"], best[rival, "bfloat16"])
               for key, own, rival, bound in TARGETS]
    return f"""# A training step on {where}

{trial}Made by `python -m swconv bench training --device {record['device']}` at {record['started']} in {record['seconds']:.0f} \
s; commit {record['git_commit'] or 'unknown'}{changed}. Load before: {record['load_before']}. Versions: \
{', '.join(f'{name} {version}' for name, version in record['versions'].items() if version is not None)}.

{plan['batch']} images of {plan['image']}x{plan['image']} px that lie on the device, cross-entropy, AdamW; neither drop path
nor masks. Each network in the faster of contiguous and channels_last, in float32 contiguous; medians. Peak: of torch's
allocations in a step, weights, gradients and optimizer included. The two-step form convolves with every Rep branch and
sums the maps, as the released code trains, and stays in float32 under autocast, as its kernels are published.

{(chr(10) * 2).join(tables)}

## Targets, in bfloat16

{_table(['', 'needed', 'measured', ''], [target for target in targets if target])}
"""


def _best(record: Mapping[str, Any], name: str, precision: str) -> Mapping[str, Any] | None:
    """The row of the faster memory format; None where none had room."""
    rows = [row for row in record["steps"] if (row["network"], row["precision"]) == (name, precision) and "step_ms" in row]
    return min(rows, key=lambda row: row["step_ms"], default=None)


def _line(name: str, row: Mapping[str, Any] | None, ours: Mapping[str, Any] | None) -> list[str]:
    title = NETWORKS[name][0]
    if row is None:
        return [title, "out of memory", *[""] * 9]
    over = [f"{row[key] / ours[key]:.2f}" if ours else "" for key in ("step_ms", "peak")]
    return [title, f"{row['step_ms']:.1f} ({row['q1_ms']:.1f}-{row['q3_ms']:.1f})",
            *(f"{row['parts_ms'][part]:.1f}" for part in PARTS), f"{row['images_per_s']:.0f}", over[0],
            f"{row['peak'] / 2**30:.2f}", over[1], row["format"], str(row["count"])]


def _target(
    key: str, own: str, rival: str, bound: float, ours: Mapping[str, Any] | None, theirs: Mapping[str, Any] | None
) -> list[str] | None:
    if ours is None or theirs is None:
        return None
    title, named, time_ = NETWORKS[rival][0], NETWORKS[own][0], key == "step_ms"
    value = theirs[key] / ours[key] if time_ else ours[key] / theirs[key]
    met = value >= bound if time_ else value <= bound
    return [f"time of {title} / {named}" if time_ else f"peak memory of {named} / {title}",
            f"{'>=' if time_ else '<='} {bound:g}", f"{value:.2f}", "reached" if met else "**not reached**"]


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
