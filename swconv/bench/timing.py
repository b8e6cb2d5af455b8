"""Interleaved timing and peak memory: in every round each contender runs once, so a disturbance meets all of them.

On a GPU an operator can be timed as a CUDA graph, which launches its kernels without the CPU's work for a call.
"""

import gc
import itertools
import logging
import math
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

Call = Callable[[], Any]
DTYPES = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16}     # by precision
FEW = 8                                  # images of the trial that leaves slow variants out
SLOW = 2.0                               # times as long as the fastest variant
LAUNCH = 5e-4                            # s; a trial that ends sooner says nothing of the kernels

log = logging.getLogger(__name__)


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


class Turn:
    """A function of the sets of inputs of a pool, each call taking the next set, so that no cache holds them.

    Parameters
    ----------
    function : callable
        Of the tensors of a set; each has the images along its first dimension.
    fixed : bool
        It takes a whole batch only (torch.compile makes another program for another size).
    """

    def __init__(self, function: Callable[..., Any], pool: Sequence[tuple[Tensor, ...]], fixed: bool = False) -> None:
        self.function, self.pool, self.fixed, self._turn = function, pool, fixed, itertools.cycle(pool)

    def __call__(self) -> Any:
        return self.function(*next(self._turn))

    def few(self) -> Call:
        """The same for some images of the first set."""
        some = [tensor[:FEW].detach().requires_grad_(tensor.requires_grad) for tensor in self.pool[0]]
        return lambda: self.function(*some)


@dataclass(frozen=True)
class Pace:
    """How long a comparison lasts: until both `seconds` and `rounds` are over. Calls shorter than `sample` are repeated.

    Before every sample come so many `untimed` calls: the contender before it leaves caches full of what is still to be written
    to memory, and threads asleep, which a short call would pay for.
    """

    seconds: float
    rounds: int
    sample: float = 2e-3
    probes: int = 3
    untimed: int = 0


@dataclass(frozen=True)
class _Way:
    """A variant made ready: `run` makes `calls` calls of it."""

    run: Call
    calls: int = 1
    launched: str = "eager"


@contextmanager
def in_precision(name: str) -> Iterator[None]:
    """TF32 for products and convolutions or not; cuDNN chooses its kernels by trying."""
    tf32, before = name == "tf32", torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=True, deterministic=False, allow_tf32=tf32):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@contextmanager
def without_search() -> Iterator[None]:
    """cuDNN chooses its kernels by its rules: to search takes it seconds for every new shape, dtype, format and direction."""
    cudnn = torch.backends.cudnn
    with cudnn.flags(enabled=True, benchmark=False, deterministic=False, allow_tf32=cudnn.allow_tf32):
        yield


def compare(
    contenders: Sequence[Contender], threads: Sequence[int], pace: Pace, cuda: bool, graphs: bool = False
) -> list[dict[str, Any]]:
    """Time all contenders in turn, with each number of threads.

    Parameters
    ----------
    graphs : bool
        On a GPU, time every `Turn` as a CUDA graph of its calls for all sets of its pool; what cannot be captured is called.

    Returns
    -------
    list of dict
        One row per contender and number of threads: its labels, the variant chosen, the `probe_ms` of all and those
        `left_out` because they were slow on a few images, how it was `launched` ("eager" or "graph"), and median and
        quartiles over the rounds, in ms per call.
    """
    before, order = torch.get_num_threads(), random.Random(0)
    gc.collect()
    gc.disable()
    try:
        torch.set_num_threads(max(threads))
        memory = torch.cuda.graph_pool_handle() if cuda and graphs else None
        ways = [_ready(contender.variants, cuda, memory) for contender in contenders]
        probes = [_probe(known, pace.probes, cuda) for known in ways]
        chosen = [min(probe, key=probe.get) for probe in probes]
        ways = [known[name] for known, name in zip(ways, chosen, strict=True)]
        runs = [max(1, math.ceil(pace.sample / (probe[name] * way.calls)))
                for probe, name, way in zip(probes, chosen, ways, strict=True)]
        samples = {(n, c): [] for n in threads for c in range(len(contenders))}
        start = time.perf_counter()
        for done in itertools.count():
            if done >= pace.rounds and time.perf_counter() - start > pace.seconds:
                break
            for n in threads:
                if n != torch.get_num_threads():
                    torch.set_num_threads(n)
                    ways[0].run()                                     # the pool of threads is made anew
                for c in order.sample(range(len(contenders)), len(contenders)):
                    for _ in range(pace.untimed):
                        ways[c].run()
                    samples[n, c].append(seconds_per_call(ways[c].run, runs[c], cuda) / ways[c].calls)
    finally:
        gc.enable()
        torch.set_num_threads(before)
    return [
        {**contenders[c].labels, "variant": chosen[c], "probe_ms": {name: 1e3 * s for name, s in probes[c].items()},
         "left_out": [name for name in contenders[c].variants if name not in probes[c]], "launched": ways[c].launched,
         "threads": n, **_summary(found), "rounds": len(found), "calls_per_sample": runs[c] * ways[c].calls}
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


def launch_seconds(call: Call, calls: int, repeats: int) -> float:
    """Seconds that the CPU takes for a call on a GPU that has little to do: the median of several rows of calls."""
    found = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        found.append((time.perf_counter() - start) / calls)
    return statistics.median(found)


def ceilings(
    threads: Sequence[int], side: int, copied: int, repeats: int, device: torch.device, precisions: Sequence[str] = ("float32",)
) -> list[dict[str, Any]]:
    """What the machine can do: the best of several large products, and of several copies that no cache holds.

    Parameters
    ----------
    side : int
        Of the square matrices.
    copied : int
        Bytes; they are read and written.
    precisions : sequence of str
        Of the products.
    """
    first = torch.randn(side, side, generator=torch.Generator().manual_seed(0)).to(device)
    source = torch.zeros(copied // 4, device=device)
    target, before, found, cuda = torch.empty_like(source), torch.get_num_threads(), [], device.type == "cuda"

    def best(call: Call) -> float:
        return min(seconds_per_call(call, 1, cuda) for _ in range(repeats + 1))

    try:
        for n in threads:
            torch.set_num_threads(n)
            bytes_per_s = 2 * source.nbytes / best(lambda: target.copy_(source))
            for name in precisions:
                with in_precision(name):
                    matrix = first.to(DTYPES[name])
                    found.append({"threads": n, "precision": name, "bytes_per_s": bytes_per_s,
                                  "flop_per_s": 2 * side**3 / best(lambda matrix=matrix: matrix @ matrix)})
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
    return {"peak": peak(step, x.is_cuda), "saved": saved, "saved_maps": saved_maps}


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


def _ready(variants: Mapping[str, Call], cuda: bool, memory: Any) -> dict[str, _Way]:
    """Variants that are not slow, warm, and captured where there is memory for graphs."""
    if cuda and len(variants) > 1:
        variants = _without_slow(variants)
    ways = {}
    for name, call in variants.items():
        call()
        # a call for every set of the pool, so that no cache holds them
        replay = captured([call] * len(call.pool), memory) if memory and isinstance(call, Turn) else None
        ways[name] = _Way(replay, len(call.pool), "graph") if replay else _Way(call)
    return ways


def _without_slow(variants: Mapping[str, Call]) -> dict[str, Call]:
    trials = {name: call.few() for name, call in variants.items() if isinstance(call, Turn) and not call.fixed}
    with without_search():
        for trial in trials.values():
            trial()
        seconds = {name: min(seconds_per_call(trial, 1, True) for _ in range(2)) for name, trial in trials.items()}
    limit = max(LAUNCH, SLOW * min(seconds.values(), default=0.0))
    return {name: call for name, call in variants.items() if seconds.get(name, 0.0) <= limit}


def captured(calls: Sequence[Call], memory: Any = None) -> Call | None:
    """The replay of one CUDA graph of all calls, whose results lie apart; None, with a line in the log, where that fails."""
    here, side, graph = torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(here)
    with torch.cuda.stream(side):
        calls[0]()                                                    # what is chosen and made once, on such a stream
    here.wait_stream(side)
    try:
        with torch.cuda.stream(here), torch.cuda.graph(graph, pool=memory):     # after a failure `here` is current again
            results = [call() for call in calls]
    except RuntimeError as error:
        log.info("not captured as a CUDA graph, so called: %s", str(error).partition("\n")[0])
        torch.cuda.synchronize()
        with torch.cuda.graph(torch.cuda.CUDAGraph()):                # or random numbers go on to wait for the failed one
            torch.zeros(1, device="cuda")
        return None
    del results
    graph.replay()
    return graph.replay


def _probe(ways: Mapping[str, _Way], probes: int, cuda: bool) -> dict[str, float]:
    """Seconds per call of every variant."""
    found = {name: [] for name in ways}
    for _ in range(probes):
        for name, way in ways.items():
            found[name].append(seconds_per_call(way.run, 1, cuda) / way.calls)
    return {name: statistics.median(times) for name, times in found.items()}


def _summary(seconds: Sequence[float]) -> dict[str, float]:
    first, middle, third = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else [*seconds] * 3
    return {"median_ms": 1e3 * middle, "q1_ms": 1e3 * first, "q3_ms": 1e3 * third}


def peak(step: Call, cuda: bool) -> int:
    """Most bytes of torch's allocations during a step beyond what lives before it."""
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
