"""Interleaved timing and peak memory: in every round each contender runs once, so a disturbance meets all of them."""

import gc
import itertools
import math
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

Call = Callable[[], Any]


@dataclass(frozen=True)
class Contender:
    """What is timed.

    Attributes
    ----------
    labels : mapping
        What tells its row from the others.
    variants : mapping of str to callable
        Ways to run it, for example memory formats; the fastest takes part.
    """

    labels: Mapping[str, Any]
    variants: Mapping[str, Call]


@dataclass(frozen=True)
class Pace:
    """How long a comparison lasts: until both `seconds` and `rounds` are over. Calls shorter than `sample` are repeated."""

    seconds: float
    rounds: int
    sample: float = 2e-3
    probes: int = 3


def compare(contenders: Sequence[Contender], threads: Sequence[int], pace: Pace, cuda: bool) -> list[dict[str, Any]]:
    """Time all contenders in turn, with each number of threads.

    Returns
    -------
    list of dict
        One row per contender and number of threads: its labels, the variant chosen and the `probe_ms` of all, and median
        and quartiles over the rounds, in ms per call.
    """
    before, order = torch.get_num_threads(), random.Random(0)
    gc.collect()
    gc.disable()
    try:
        torch.set_num_threads(max(threads))
        probes = [_probe(contender.variants, pace.probes, cuda) for contender in contenders]
        chosen = [min(probe, key=probe.get) for probe in probes]
        calls = [max(1, math.ceil(pace.sample / probe[name])) for probe, name in zip(probes, chosen, strict=True)]
        samples = {(n, c): [] for n in threads for c in range(len(contenders))}
        start = time.perf_counter()
        for done in itertools.count():
            if done >= pace.rounds and time.perf_counter() - start > pace.seconds:
                break
            for n in threads:
                if n != torch.get_num_threads():
                    torch.set_num_threads(n)
                    contenders[0].variants[chosen[0]]()               # the pool of threads is made anew
                for c in order.sample(range(len(contenders)), len(contenders)):
                    samples[n, c].append(seconds_per_call(contenders[c].variants[chosen[c]], calls[c], cuda))
    finally:
        gc.enable()
        torch.set_num_threads(before)
    return [
        {**contenders[c].labels, "variant": chosen[c], "probe_ms": {name: 1e3 * s for name, s in probes[c].items()},
         "threads": n, **_summary(found), "rounds": len(found), "calls_per_sample": calls[c]}
        for (n, c), found in samples.items()
    ]


def seconds_per_call(call: Call, calls: int, cuda: bool) -> float:
    """Seconds that one of several calls in a row takes: by the clock on the CPU, by events on the GPU."""
    if cuda:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(calls):
            call()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3 / calls
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def ceilings(threads: Sequence[int], side: int, copied: int, repeats: int, device: torch.device) -> list[dict[str, Any]]:
    """What the machine can do: the best of several large float32 products, and of several copies that no cache holds.

    Parameters
    ----------
    side : int
        Of the square matrices.
    copied : int
        Bytes; they are read and written.
    """
    matrix = torch.randn(side, side, generator=torch.Generator().manual_seed(0)).to(device)
    source = torch.zeros(copied // 4, device=device)
    target, before, found = torch.empty_like(source), torch.get_num_threads(), []
    try:
        for n in threads:
            torch.set_num_threads(n)
            best = [min(seconds_per_call(call, 1, device.type == "cuda") for _ in range(repeats + 1))
                    for call in (lambda: matrix @ matrix, lambda: target.copy_(source))]
            found.append({"threads": n, "flop_per_s": 2 * side**3 / best[0], "bytes_per_s": 2 * source.nbytes / best[1]})
    finally:
        torch.set_num_threads(before)
    return found


def training_memory(step: Call, x: Tensor) -> dict[str, int]:
    """Memory of one training step, in bytes, beyond what lives before it.

    Parameters
    ----------
    step : callable
        Forward and backward.
    x : Tensor of shape (B, C, H, W)
        Its input.

    Returns
    -------
    dict
        `peak`, of torch's allocations (on the CPU scratch room inside oneDNN is not seen); `saved`, what the forward pass
        keeps for the backward pass; and `saved_maps`, what of that are maps of the batch other than x.
    """
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.detach()
        return tensor

    step()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step()
    own = x.untyped_storage().data_ptr()
    sizes = {place: tensor.untyped_storage().nbytes() for place, tensor in kept.items()}
    maps = {place for place, tensor in kept.items() if place != own and tensor.dim() == 4 and len(tensor) == len(x)}
    saved, saved_maps = sum(sizes.values()), sum(sizes[place] for place in maps)
    kept.clear()
    return {"peak": _peak(step, x.is_cuda), "saved": saved, "saved_maps": saved_maps}


class Progress:
    """A bar on a terminal, lines elsewhere."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.start = total, 0, time.perf_counter()

    def step(self, title: str) -> None:
        """Say what begins now."""
        bar = "#" * (20 * self.done // self.total)
        minutes, seconds = divmod(int(time.perf_counter() - self.start), 60)
        line = f"[{bar:20}] {self.done}/{self.total} {minutes}:{seconds:02} {title}"
        sys.stderr.write(f"\r{line:79.79}" if sys.stderr.isatty() else f"{line}\n")
        sys.stderr.flush()
        self.done = min(self.done + 1, self.total)

    def close(self) -> None:
        """The last line."""
        self.done = self.total
        self.step("done")
        if sys.stderr.isatty():
            sys.stderr.write("\n")


def _probe(variants: Mapping[str, Call], probes: int, cuda: bool) -> dict[str, float]:
    """Seconds of every variant, warm."""
    for call in variants.values():
        call()
    found = {name: [] for name in variants}
    for _ in range(probes):
        for name, call in variants.items():
            found[name].append(seconds_per_call(call, 1, cuda))
    return {name: statistics.median(times) for name, times in found.items()}


def _summary(seconds: Sequence[float]) -> dict[str, float]:
    first, middle, third = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else [*seconds] * 3
    return {"median_ms": 1e3 * middle, "q1_ms": 1e3 * first, "q3_ms": 1e3 * third}


def _peak(step: Call, cuda: bool) -> int:
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")                    # or it complains of GPUs that are not there
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
        step()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in events), initial=0))
