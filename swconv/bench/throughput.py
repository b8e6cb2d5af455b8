"""Images per second of whole networks, by the papers' protocol and a strict one: SW Table 7, SLaK Tables 11, 12, Figure 4."""

import copy
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from swconv import atomic
from swconv.bench import forms
from swconv.bench.circumstances import check_ready, circumstances, device_name
from swconv.bench.timing import Contender, Pace, Progress, compare, seconds_per_call
from swconv.ops import strip_mix
from swconv.training.memory import keep_freed_memory

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
ERRORS = {"float32": 1e-3, "tf32": 3e-2, "bfloat16": 1e-1}            # between forms and variants of one network, relative

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """A network in one form.

    Attributes
    ----------
    group : str
        What is compared with what: the entries of a group take turns.
    model, arguments : str, mapping
        timm's name, and what differs from its defaults.
    form : str
        See `forms.whole_network`.
    compiled : bool
        Whether torch.compile takes part on a CPU, where it needs a minute a network.
    """

    group: str
    model: str
    form: str = "merged"
    arguments: Mapping[str, Any] = field(default_factory=dict)
    compiled: bool = False

    @property
    def labels(self) -> dict[str, Any]:
        return {"group": self.group, "model": self.model, "form": self.form, "arguments": dict(self.arguments)}


def _shiftwise(group: str, model: str) -> list[Entry]:
    """SW as published and on our operator, with N = 3 (the paper's) and 5 (what its script times), one Rep branch."""
    return [Entry(group, model, form, {"small_kernel": small, "rep_branches": 1}, compiled=form == "merged" and small == 3)
            for small in (3, 5) for form in ("two_step", "merged")]


def _slak(group: str, model: str) -> list[Entry]:
    return [Entry(group, model, form, compiled=form == "merged") for form in ("plain", "square", "merged")]


ENTRIES = (
    *_shiftwise("tiny", "sw_tiny"),
    *_slak("tiny", "slak_tiny"),
    Entry("tiny", "unireplknet_tiny", compiled=True),
    Entry("tiny", "convnext_tiny", "as_is", compiled=True),
    Entry("tiny", "swin_tiny_patch4_window7_224", "as_is", compiled=True),
    *_shiftwise("small", "sw_small"),
    *_slak("small", "slak_small"),
    Entry("small", "unireplknet_small"),
    # the edges that the released script scans, with its N = 5
    *(Entry("edges", "sw_tiny", form, {"small_kernel": 5, "rep_branches": 1, "edges": edges})
      for edges in (1, 2, 3, 4) for form in ("two_step", "merged")),
    # SLaK Table 12, ConvNeXt-B: naive, decomposed, and 1.3 times as wide; masks cost as much as the weights that they hide
    Entry("base", "lk_convnext_base", "square"),
    *(Entry("base", "slak_base", form, {"width_factor": width}) for width in (1.0, 1.3) for form in ("plain", "merged")),
)


@dataclass(frozen=True)
class Plan:
    """What a run measures, and for how long.

    Attributes
    ----------
    entries : tuple of Entry
    precisions : tuple of str
        "float32", strictly; "tf32"; "bfloat16".
    batches : mapping of str to int
        Images per call of each group.
    image : int
        Side in pixels.
    warmups, one_by_one, at_once : int
        The papers' protocol: forwards before, forwards each timed by itself, forwards timed together.
    strict : Pace
        Of one group by the strict protocol.
    pool : int
        Bytes of images that the strict protocol takes in turn.
    compile_all : bool
        torch.compile for all entries, not only for those that ask for it.
    layer : tuple of int
        SLaK Figure 4 (right): batch, channels, and the sides of the maps.
    """

    entries: tuple[Entry, ...]
    precisions: tuple[str, ...]
    batches: Mapping[str, int]
    image: int
    warmups: int
    one_by_one: int
    at_once: int
    strict: Pace
    pool: int
    compile_all: bool
    layer: tuple[int, int, tuple[int, ...]]


CPU = Plan(
    entries=ENTRIES, precisions=("float32",), batches={"tiny": 4, "small": 2, "edges": 4, "base": 1}, image=224,
    warmups=1, one_by_one=2, at_once=2, strict=Pace(0, 5, 0, probes=1), pool=2**26, compile_all=False,
    layer=(1, 384, (16, 32, 64)),
)
CUDA = replace(
    CPU, precisions=("float32", "tf32", "bfloat16"), batches=dict.fromkeys(CPU.batches, 128), warmups=10, one_by_one=100,
    at_once=25, strict=Pace(2, 10, 0, probes=2), pool=2**28, compile_all=True, layer=(64, 384, (16, 32, 64, 128)),
)
_LITTLE = {"depths": (1, 1), "dims": (8, 16), "kernel_sizes": (11, 7)}
QUICK = (
    Entry("tiny", "sw_tiny", "two_step", _LITTLE | {"rep_branches": 1}), Entry("tiny", "sw_tiny", "merged", _LITTLE),
    *(Entry("tiny", "slak_tiny", form, _LITTLE) for form in ("plain", "square", "merged")),
    Entry("tiny", "unireplknet_tiny", "merged", {"depths": (1, 1), "dims": (8, 16), "kernel_sizes": (3, 13)}),
    Entry("tiny", "convnext_tiny", "as_is", {"depths": (1, 1, 1, 1), "dims": (4, 4, 8, 8)}),
)


def plan_for(device: torch.device, quick: bool) -> Plan:
    """The whole suite; or, to see that it runs, the same on tiny networks, whose numbers say nothing."""
    plan = CPU if device.type == "cpu" else CUDA
    if not quick:
        return plan
    return replace(plan, entries=QUICK, batches={"tiny": 2}, image=64, warmups=1, one_by_one=1, at_once=1,
                   strict=Pace(0, 2, 0, probes=1), pool=2**16, compile_all=False, layer=(1, 4, (8, 16)))


def run(out: Path, device: str = "cpu", quick: bool = False) -> Path:
    """Measure, and write throughput-<cpu or name of the GPU>.json into a folder, with -quick behind a quick run's name.

    Raises
    ------
    RuntimeError
        When the device or the compiled operators are missing, or two forms of one network differ; nothing is written.
    """
    where = torch.device(device)
    check_ready(where, "throughput")
    found = measure(plan_for(where, quick), where) | {"quick": quick}
    path = out / f"throughput-{device_name(found)}.json"
    atomic.write_json(path, found)
    log.info("wrote %s", path)
    return path


def measure(plan: Plan, device: torch.device) -> dict[str, Any]:
    """All that the reports tell: circumstances, and `times` by both protocols, of networks and of single layers."""
    cuda, start, rows = device.type == "cuda", time.perf_counter(), []
    keep_freed_memory()
    groups = list(dict.fromkeys(entry.group for entry in plan.entries))
    bar = Progress(len(plan.precisions) * (len(plan.entries) + len(groups)) + len(plan.layer[2]))
    told = circumstances("throughput", device, "swconv.bench.throughput", plan=asdict(plan), tf32={})
    for precision in plan.precisions:
        with _precision(precision):
            told["tf32"][precision] = {"products": torch.backends.cuda.matmul.allow_tf32,
                                       "convolutions": torch.backends.cudnn.allow_tf32}
            for group in groups:
                entries = [entry for entry in plan.entries if entry.group == group]
                networks = _networks(entries, plan, device, precision, bar)
                images, contenders = _images(plan, plan.batches[group], device, precision), []
                for entry, ways in networks:
                    labels = {"precision": precision, "batch": plan.batches[group]} | entry.labels
                    published = _as_the_papers(next(iter(ways.values())), images[0], plan, cuda)
                    rows.append({"protocol": "papers"} | labels | published)
                    variants = _variants(ways, images, plan.compile_all or entry.compiled)
                    _check_equal(f"{entry.model}, {entry.form}", variants, ERRORS[precision])
                    contenders.append(Contender({"protocol": "strict"} | labels, variants))
                bar.step(f"{group}, {precision}: in turn")
                rows += compare(contenders, (torch.get_num_threads(),), plan.strict, cuda)
    with _precision("float32"):
        for side in plan.layer[2]:
            bar.step(f"one layer of {side}x{side}")
            rows += _layer(plan, side, device, cuda)
    bar.close()
    return told | {"seconds": round(time.perf_counter() - start, 1), "times": rows}


@contextmanager
def _precision(name: str) -> Iterator[None]:
    """TF32 for products and convolutions or not; cuDNN chooses its kernels by trying."""
    tf32, before = name == "tf32", torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=True, deterministic=False, allow_tf32=tf32):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _images(plan: Plan, batch: int, device: torch.device, precision: str) -> list[Tensor]:
    """Batches of normal noise, more than the caches hold."""
    generator, shape = torch.Generator().manual_seed(0), (batch, 3, plan.image, plan.image)
    count = max(2, math.ceil(plan.pool / (4 * math.prod(shape))))
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    return [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(count)]


def _networks(
    entries: Sequence[Entry], plan: Plan, device: torch.device, precision: str, bar: Progress
) -> list[tuple[Entry, dict[str, nn.Module]]]:
    """Every entry's ways to run; those of one model and arguments are held against each other."""
    made, first = [], {}
    for entry in entries:
        bar.step(f"{entry.group}: {entry.model}, {entry.form}")
        ways = forms.whole_network(forms.make_network(device, entry.model, **entry.arguments), entry.form)
        if precision == "float32":
            image = torch.randn(1, 3, plan.image, plan.image, generator=torch.Generator().manual_seed(1)).to(device)
            for way, network in ways.items():
                with torch.no_grad():
                    got = network(image)
                wanted = first.setdefault((entry.model, repr(entry.arguments)), got)
                _require(got, wanted, f"{entry.model}, {entry.form} {way}", ERRORS[precision])
        dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        made.append((entry, {way: network.to(dtype) for way, network in ways.items()}))
    return made


def _require(got: Tensor, wanted: Tensor, what: str, allowed: float) -> None:
    error = float((got.float() - wanted.float()).norm() / wanted.float().norm())
    if not error <= allowed:
        raise RuntimeError(f"bench throughput times forms of one network only where they agree, and {what} is off by "
                           f"{error:.1e} where {allowed:.0e} is allowed. Build csrc/ anew (python -m swconv build); if it "
                           "stays wrong, make test tells where.")


def _check_equal(what: str, variants: Mapping[str, Callable[[], Tensor]], allowed: float) -> None:
    """All variants give the same for the first batch, which they take here."""
    found = {name: call() for name, call in variants.items()}
    for name, got in found.items():
        _require(got, next(iter(found.values())), f"{what} {name}", allowed)


def _as_the_papers(network: nn.Module, images: Tensor, plan: Plan, cuda: bool) -> dict[str, float]:
    """Contiguous, eager, one batch over and over; the warm-up with gradients, as in the released script (ms per batch)."""
    for _ in range(plan.warmups):
        network(images)
    with torch.no_grad():
        single = [seconds_per_call(partial(network, images), 1, cuda) for _ in range(plan.one_by_one)]
        together = seconds_per_call(partial(network, images), plan.at_once, cuda)
    return {"one_by_one_ms": 1e3 * sum(single) / len(single), "at_once_ms": 1e3 * together}


def _variants(ways: Mapping[str, nn.Module], images: Sequence[Tensor], compiled: bool) -> dict[str, Callable[[], Tensor]]:
    """Every way in both memory formats, and compiled."""
    known = {}
    for way, network in ways.items():
        for name, layout in FORMATS.items():
            laid = copy.deepcopy(network).to(memory_format=layout)
            pool = [image.to(memory_format=layout) for image in images]
            variant = f"{name}, {way}" if way else name
            known[variant] = _call(laid, pool)
            if compiled and name == "channels_last":
                known[f"{variant}, compiled"] = _call(torch.compile(laid, dynamic=False), pool)
    return known


def _layer(plan: Plan, side: int, device: torch.device, cuda: bool) -> list[dict[str, Any]]:
    """SLaK Figure 4 (right): one depthwise layer, dense, masked, and as a pair of strips."""
    batch, channels, _ = plan.layer
    generator, shape = torch.Generator().manual_seed(side), (batch, channels, side, side)
    count = max(2, min(64, math.ceil(plan.pool / (4 * math.prod(shape)))))
    pool = [torch.randn(shape, generator=generator).to(device) for _ in range(count)]
    dense, across, along = (torch.randn(channels, 1, *shape, generator=generator).to(device)
                            for shape in ((51, 51), (5, 51), (51, 5)))
    masked = dense * (torch.rand(dense.shape, generator=generator) >= 0.4).to(device)
    nothing = torch.zeros(channels, 1, 5, 5, device=device)

    def ways(*weights: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
        return {"padding inside": partial(forms.inside, weights), "padding before": partial(forms.before, weights)}

    known = {"dense": ways(dense), "sparse": ways(masked), "strips": ways(across, along),
             "ours": {"": lambda x: strip_mix(x, across, along, nothing, None, 25, 25)}}
    contenders = []
    for name, functions in known.items():
        calls = {(f"{layout}, {way}" if way else layout): _call(function, [x.to(memory_format=FORMATS[layout]) for x in pool])
                 for way, function in functions.items() for layout in FORMATS}
        _check_equal(f"the layer as {name}", calls, ERRORS["float32"])
        contenders.append(Contender({"protocol": "strict", "precision": "float32", "group": "layer", "form": name,
                                     "side": side, "batch": batch}, calls))
    return compare(contenders, (torch.get_num_threads(),), plan.strict, cuda)


def _call(function: Callable[[Tensor], Tensor], pool: Sequence[Tensor]) -> Callable[[], Tensor]:
    turn = itertools.cycle(pool)

    def call() -> Tensor:
        with torch.inference_mode():
            return function(next(turn))

    return call
