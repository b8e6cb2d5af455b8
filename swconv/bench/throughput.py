"""Images per second of whole networks, by the papers' protocol and a strict one: SW Table 7, SLaK Tables 11, 12, Figure 4."""

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from swconv.bench import forms
from swconv.bench.circumstances import check_ready, circumstances, write_growing
from swconv.bench.timing import DTYPES, Contender, Pace, Progress, Turn, compare, in_precision, seconds_per_call
from swconv.ops import strip_mix
from swconv.training.memory import keep_freed_memory

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
ERRORS = {"float32": 1e-3, "tf32": 3e-2, "bfloat16": 1e-1}            # between forms and variants of one network, relative

Pools = Mapping[str, Sequence[tuple[Tensor]]]                         # by memory format
STRICT, HALF, ALL = ("float32",), ("float32", "bfloat16"), ("float32", "bfloat16", "tf32")


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
    precisions : tuple of str
        In which it is measured, as far as the plan has them. The two-step form is float32 only, as published.
    compiled : bool
        Whether torch.compile takes part, which takes half a minute a network.
    """

    group: str
    model: str
    form: str = "merged"
    arguments: Mapping[str, Any] = field(default_factory=dict)
    precisions: tuple[str, ...] = STRICT
    compiled: bool = False

    @property
    def labels(self) -> dict[str, Any]:
        return {"group": self.group, "model": self.model, "form": self.form, "arguments": dict(self.arguments)}


def _shiftwise(group: str, model: str, precisions: tuple[str, ...], compiled: bool) -> list[Entry]:
    """SW as published and on our operator, with N = 3 (the paper's) and 5 (what its script times), one Rep branch."""
    three, five = ({"small_kernel": small, "rep_branches": 1} for small in (3, 5))
    return [Entry(group, model, "two_step", three), Entry(group, model, "merged", three, precisions, compiled),
            Entry(group, model, "two_step", five), Entry(group, model, "merged", five, STRICT if group == "small" else HALF)]


ENTRIES = (
    *_shiftwise("tiny", "sw_tiny", ALL, compiled=True),
    Entry("tiny", "slak_tiny", "plain", precisions=ALL),
    Entry("tiny", "slak_tiny", "square"),
    Entry("tiny", "slak_tiny", "merged", precisions=ALL, compiled=True),
    Entry("tiny", "unireplknet_tiny", precisions=ALL, compiled=True),
    Entry("tiny", "convnext_tiny", "as_is", precisions=ALL, compiled=True),
    Entry("tiny", "swin_tiny_patch4_window7_224", "as_is", precisions=ALL, compiled=True),
    *_shiftwise("small", "sw_small", HALF, compiled=False),
    *(Entry("small", "slak_small", form) for form in ("plain", "square", "merged")),
    Entry("small", "unireplknet_small", precisions=HALF),
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
    compiled : tuple of str
        Those with torch.compile.
    batches : mapping of str to int
        Images per call of each group; its order is theirs.
    image : int
        Side in pixels.
    warmups, one_by_one, at_once : int
        The papers' protocol: forwards before, forwards each timed by itself, forwards timed together.
    cap : mapping of str to float
        Seconds that this may last for a network of a group; what takes longer gets fewer forwards.
    strict : mapping of str to Pace
        Of each group by the strict protocol, and of the "layer".
    pool : int
        Bytes of images that the strict protocol takes in turn.
    layer : tuple of int
        SLaK Figure 4 (right): batch, channels, and the sides of the maps.
    """

    entries: tuple[Entry, ...]
    precisions: tuple[str, ...]
    compiled: tuple[str, ...]
    batches: Mapping[str, int]
    image: int
    warmups: int
    one_by_one: int
    at_once: int
    cap: Mapping[str, float]
    strict: Mapping[str, Pace]
    pool: int
    layer: tuple[int, int, tuple[int, ...]]


CPU = Plan(
    entries=ENTRIES, precisions=STRICT, compiled=STRICT, batches={"tiny": 4, "small": 2, "edges": 4, "base": 1}, image=224,
    warmups=1, one_by_one=2, at_once=2, cap={}, strict=dict.fromkeys(("tiny", "small", "edges", "base", "layer"),
                                                                     Pace(0, 5, 0, probes=1)),
    pool=2**26, layer=(1, 384, (16, 32, 64)),
)
CUDA = replace(
    CPU, precisions=ALL, compiled=HALF, batches={"tiny": 128, "small": 128, "edges": 128, "base": 32}, warmups=10,
    one_by_one=100, at_once=25, cap={"tiny": 1.0, "small": 0.6, "edges": 0.6, "base": 0.6},
    strict={"tiny": Pace(1, 5, 0, probes=1), "small": Pace(0, 3, 0, probes=1), "edges": Pace(0, 5, 0, probes=1),
            "base": Pace(0, 3, 0, probes=1), "layer": Pace(0, 3, 0, probes=1)},
    pool=2**28, layer=(64, 384, (16, 32, 64, 128)),
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
                   strict=dict.fromkeys(("tiny", "layer"), Pace(0, 2, 0, probes=1)), pool=2**16, compiled=(),
                   layer=(1, 4, (8, 16)))


def run(out: Path, device: str = "cpu", quick: bool = False) -> Path:
    """Measure, and write throughput-<cpu or name of the GPU>.json into a folder, with -quick behind a quick run's name.

    Raises
    ------
    RuntimeError
        When the device or the compiled operators are missing, or two forms of one network differ. What was measured before
        that stays written, and names what is `unfinished`.
    """
    where = torch.device(device)
    check_ready(where, "throughput")
    (path,) = write_growing(measure(plan_for(where, quick), where), out, "throughput", quick)
    return path


def measure(plan: Plan, device: torch.device) -> Iterator[dict[str, Any]]:
    """All that the reports tell, as far as it goes, after each part.

    That is circumstances, `times` by both protocols, of networks and of single layers, and the parts that are `unfinished`.
    """
    cuda, start, rows = device.type == "cuda", time.perf_counter(), []
    keep_freed_memory()
    first, *others = [group for group in plan.batches if any(entry.group == group for entry in plan.entries)]
    parts = [first, "layer", *others]
    bar = Progress(sum(1 + len({*entry.precisions} & {*plan.precisions}) for entry in plan.entries) + len(plan.layer[2]))
    told = circumstances("throughput", device, "swconv.bench.throughput", plan=asdict(plan), tf32={})
    for number, part in enumerate(parts, start=1):
        for precision, found in (_layers(plan, device, bar) if part == "layer" else _group(plan, part, device, bar)):
            told["tf32"][precision] = {"products": torch.backends.cuda.matmul.allow_tf32,
                                       "convolutions": torch.backends.cudnn.allow_tf32}
            rows += found
            yield told | {"seconds": round(time.perf_counter() - start, 1), "times": rows, "unfinished": parts[number:]}
        if cuda:
            torch.cuda.empty_cache()
    bar.close()


def _group(plan: Plan, group: str, device: torch.device, bar: Progress) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Rows of the entries of a group, by precision; yielded within it."""
    cuda, batch = device.type == "cuda", plan.batches[group]
    entries = [entry for entry in plan.entries if entry.group == group]
    with in_precision("float32"):
        networks = _networks(entries, plan, device, bar)
    for precision in plan.precisions:
        rows, contenders = [], []
        with in_precision(precision):
            images = _pools((batch, 3, plan.image, plan.image), plan.pool, 0, device, DTYPES[precision])
            for entry, ways in networks:
                if precision not in entry.precisions:
                    continue
                bar.step(f"{group}, {precision}: {entry.model}, {entry.form}")
                ways = {way: copy.deepcopy(network).to(DTYPES[precision]) for way, network in ways.items()}
                labels = {"precision": precision, "batch": batch} | entry.labels
                published = _as_the_papers(next(iter(ways.values())), images["contiguous"][0][0], plan, group, cuda)
                rows.append({"protocol": "papers"} | labels | published)
                variants = _variants(ways, images, entry.compiled and precision in plan.compiled)
                _check_equal(f"{entry.model}, {entry.form}", variants, ERRORS[precision])
                contenders.append(Contender({"protocol": "strict"} | labels, variants))
            if contenders:
                rows += compare(contenders, (torch.get_num_threads(),), plan.strict[group], cuda, graphs=True)
                yield precision, rows
        torch.compiler.reset()                                        # programs of this precision, among which every call looks


def _pools(shape: tuple[int, ...], room: int, seed: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Pools:
    """Batches of normal noise of so many bytes, more than the caches hold, but 64 at most, in both memory formats."""
    generator = torch.Generator(device).manual_seed(seed)
    count = max(2, min(64, math.ceil(room / (4 * math.prod(shape)))))
    batches = [torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(count)]
    return {name: [(batch.to(memory_format=layout),) for batch in batches] for name, layout in FORMATS.items()}


def _networks(
    entries: Sequence[Entry], plan: Plan, device: torch.device, bar: Progress
) -> list[tuple[Entry, dict[str, nn.Module]]]:
    """Every entry's ways to run, in float32; those of one model and arguments are held against each other."""
    made, models, first = [], {}, {}
    image = torch.randn(1, 3, plan.image, plan.image, generator=torch.Generator().manual_seed(1)).to(device)
    for entry in entries:
        bar.step(f"{entry.group}: making {entry.model}, {entry.form}")
        kind = entry.model, repr(entry.arguments)
        if kind not in models:
            models = {kind: forms.make_network(device, entry.model, **entry.arguments)}     # entries of a kind are neighbours
        ways = forms.whole_network(models[kind], entry.form)
        for way, network in ways.items():
            with torch.no_grad():
                got = network(image)
            _require(got, first.setdefault(kind, got), f"{entry.model}, {entry.form} {way}", ERRORS["float32"])
        made.append((entry, ways))
    return made


def _require(got: Tensor, wanted: Tensor, what: str, allowed: float) -> None:
    error = float((got.float() - wanted.float()).norm() / wanted.float().norm())
    if not error <= allowed:
        raise RuntimeError(f"bench throughput times forms of one network only where they agree, and {what} is off by "
                           f"{error:.1e} where {allowed:.0e} is allowed. Build csrc/ anew (python -m swconv build); if it "
                           "stays wrong, make test tells where.")


def _check_equal(what: str, variants: Mapping[str, Turn], allowed: float) -> None:
    """All variants give the same for the first images."""
    found = {name: (call.function(*call.pool[0]) if call.fixed else call.few()()) for name, call in variants.items()}
    first = next(iter(found.values()))
    for name, got in found.items():
        _require(got[: len(first)], first, f"{what} {name}", allowed)


def _as_the_papers(network: nn.Module, images: Tensor, plan: Plan, group: str, cuda: bool) -> dict[str, float]:
    """Contiguous, eager, one batch over and over (ms per batch), and how many forwards that were.

    The released script warms up with gradients, which takes memory and changes nothing.
    """
    with torch.no_grad():
        warm = [seconds_per_call(partial(network, images), 1, cuda)]
        while len(warm) < plan.warmups and sum(warm) < plan.cap.get(group, math.inf) / 4:
            warm.append(seconds_per_call(partial(network, images), 1, cuda))
        most = max(2, int(plan.cap.get(group, math.inf) / 4 / warm[-1])) if plan.cap else plan.one_by_one
        single = [seconds_per_call(partial(network, images), 1, cuda) for _ in range(min(plan.one_by_one, most))]
        count = min(plan.at_once, 2 * most)
        together = seconds_per_call(partial(network, images), count, cuda)
    return {"one_by_one_ms": 1e3 * sum(single) / len(single), "at_once_ms": 1e3 * together, "warmups": len(warm),
            "one_by_one": len(single), "at_once": count}


def _variants(ways: Mapping[str, nn.Module], pools: Pools, compiled: bool) -> dict[str, Turn]:
    """Every way in both memory formats, and compiled."""
    known = {}
    for way, network in ways.items():
        for name, layout in FORMATS.items():
            laid = copy.deepcopy(network).to(memory_format=layout)
            variant = f"{name}, {way}" if way else name
            known[variant] = Turn(partial(_inference, laid), pools[name])
            if compiled and name == "channels_last":
                known[f"{variant}, compiled"] = compiled_turn(laid, pools[name])
    return known


def compiled_turn(network: nn.Module, pool: Sequence[tuple[Tensor]]) -> Turn:
    """A network by torch.compile, for batches of the pool's size."""
    return Turn(partial(_inference, torch.compile(network, dynamic=False)), pool, fixed=True)


def _inference(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.inference_mode():
        return function(x)


def _layers(plan: Plan, device: torch.device, bar: Progress) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    with in_precision("float32"):
        for side in plan.layer[2]:
            bar.step(f"one layer of {side}x{side}")
            yield "float32", _layer(plan, side, device)


def _layer(plan: Plan, side: int, device: torch.device) -> list[dict[str, Any]]:
    """SLaK Figure 4 (right): one depthwise layer, dense, masked, and as a pair of strips."""
    batch, channels, _ = plan.layer
    generator, pools = torch.Generator().manual_seed(side), _pools((batch, channels, side, side), plan.pool, side, device)
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
        calls = {(f"{layout}, {way}" if way else layout): Turn(partial(_inference, function), pool)
                 for way, function in functions.items() for layout, pool in pools.items()}
        _check_equal(f"the layer as {name}", calls, ERRORS["float32"])
        contenders.append(Contender({"protocol": "strict", "precision": "float32", "group": "layer", "form": name,
                                     "side": side, "batch": batch}, calls))
    return compare(contenders, (torch.get_num_threads(),), plan.strict["layer"], device.type == "cuda", graphs=True)
