"""The benchmark of the SW operator: correctness in float64 first, then times and memory, as JSON and Markdown."""

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from swconv.bench import forms, page, timing, work
from swconv.bench.circumstances import check_ready, circumstances, write_growing
from swconv.bench.timing import DTYPES, FEW, Contender, Pace, Progress, Turn, compare, in_precision, without_search
from swconv.bench.work import Stage
from swconv.ops import ShiftwiseConv2d
from swconv.training.memory import keep_freed_memory

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
TOLERANCE = {"operator": {"float32": 1e-5, "tf32": 2e-3, "bfloat16": 1e-2},     # relative errors
             "network": {"float32": 1e-4, "bfloat16": 5e-2}}
COUNTS = ((1, 1), (2, 1), (4, 1), (1, 2), (1, 4))                     # edges E and Rep branches
SW_TINY = (Stage(1, 56, 60, 51, 3, 2), Stage(2, 28, 122, 49, 3, 4), Stage(3, 14, 246, 47, 18, 8), Stage(4, 7, 492, 13, 3, 16))
Pool = Sequence[tuple[Tensor, ...]]                                   # of x and the gradients of h, v and i
Pools = Mapping[str, Pool]                                            # by memory format
Steps = Mapping[str, Mapping[str, tuple[str, Callable[..., Any]]]]     # by contender and variant: format, and what of a set
Found = Mapping[str, list[dict[str, Any]]]                             # rows for the lists of the record


@dataclass(frozen=True)
class Part:
    """What is measured in one precision.

    Attributes
    ----------
    kind : str
        In every stage: "operator", forward, training and memory; "ordinary", forward and training before the process is told
        to keep freed memory, so first; "counts", E and Rep; "launches", what the CPU takes for a call on a GPU. "network":
        SW-tiny with the largest batch; "small batches": with the others.
    names : tuple of str
        The contenders of an "operator"; none stands for all.
    """

    kind: str
    precision: str
    names: tuple[str, ...] = ()

    def has(self, name: str) -> bool:
        return not self.names or name in self.names


@dataclass(frozen=True)
class Plan:
    """What a benchmark measures, and for how long.

    Attributes
    ----------
    threads : tuple of int
        Numbers of threads, the last for the ratios.
    parts : tuple of Part
        In this order, and the record is written after every stage and batch of each.
    precisions, deciding : tuple of str
        "float32", strictly, "tf32", "bfloat16" (`timing.in_precision`); and those in which E, Rep and the network are measured.
    pool : int
        Bytes of inputs and gradients that the calls take in turn, more than the caches hold.
    network : mapping
        Arguments of `sw_tiny`; it sees batches of images of `image` px.
    product, copied : int
        Side of the matrices and bytes of the copy that measure the machine's ceilings.
    forward, training, counts, whole : Pace
        Of one stage's forward, one stage's training step, one stage's E and Rep, and one batch of the network.
    """

    stages: tuple[Stage, ...]
    parts: tuple[Part, ...]
    threads: tuple[int, ...]
    precisions: tuple[str, ...]
    deciding: tuple[str, ...]
    pool: int
    network: Mapping[str, Any]
    image: int
    batches: tuple[int, ...]
    product: int
    copied: int
    forward: Pace
    training: Pace
    counts: Pace
    whole: Pace


CPU = Plan(
    stages=SW_TINY, parts=(
        Part("ordinary", "float32", ("ours", "two_step")),
        *(Part(kind, "float32") for kind in ("operator", "counts", "network", "small batches")),
    ),
    threads=(1, 2), precisions=("float32",), deciding=("float32",), pool=2**27, network={}, image=224,
    batches=(1, 8), product=2048, copied=2**28,
    forward=Pace(4, 9, 1e-2, untimed=1), training=Pace(8, 7, 1e-2, probes=2, untimed=1), counts=Pace(4, 15, 1e-2, untimed=1),
    whole=Pace(12, 5, probes=2),
)
CUDA = replace(                                                       # what decides first: a GPU is lent for minutes
    CPU, stages=tuple(replace(stage, batch=128) for stage in SW_TINY), threads=(1,), precisions=("float32", "tf32", "bfloat16"),
    parts=(
        Part("operator", "float32", ("ours", "two_step", "torch_strips", "slak_pair")),
        Part("operator", "bfloat16", ("ours", "slak_pair")),
        Part("network", "float32"), Part("network", "bfloat16"), Part("counts", "float32"), Part("counts", "bfloat16"),
        Part("launches", "float32"), Part("launches", "bfloat16"),
        Part("operator", "tf32", ("ours", "slak_pair")),
        Part("operator", "float32", ("ours_layer", "two_step_layer", "two_step_summed", "two_step_gather", "depthwise13",
                                     "depthwise7")),
        Part("operator", "bfloat16", ("ours_layer", "torch_strips", "depthwise13", "depthwise7")),
        Part("small batches", "float32"), Part("small batches", "bfloat16"),
        Part("operator", "tf32", ("ours_layer", "torch_strips", "depthwise13", "depthwise7")),
        Part("operator", "float32", ("two_step_taps",)), Part("launches", "tf32"),
    ),
    deciding=("float32", "bfloat16"), pool=2**29, batches=(1, 8, 128), product=8192, copied=2**30,
    **dict.fromkeys(("forward", "training", "counts", "whole"), Pace(0.3, 5, probes=1)),
)
TINY = (Stage(1, 9, 6, 11, 2, 2), Stage(2, 5, 8, 5, 1, 3))
BLINK = Pace(0.0, 2, 0.0, probes=1)


def plan_for(device: torch.device, quick: bool) -> Plan:
    """The whole suite; or, to see that it runs, the same on tiny maps, whose numbers say nothing."""
    plan = CPU if device.type == "cpu" else CUDA
    if not quick:
        return plan
    network = {"depths": (1, 1), "dims": (8, 16), "kernel_sizes": (11, 5)}
    return replace(plan, stages=TINY, pool=2**16, network=network, image=32, batches=(1, 2), product=128,
                   copied=2**20, forward=BLINK, training=BLINK, counts=BLINK, whole=BLINK)


def run(out: Path, device: str = "cpu", quick: bool = False) -> tuple[Path, Path]:
    """Measure, and write operator-<cpu or name of the GPU>.json and .md into a folder, with -quick behind a quick run's name.

    Raises
    ------
    RuntimeError
        When the device or the compiled operators are missing, or a result is wrong. What was measured before that stays
        written, and names what is `unfinished`.
    """
    where = torch.device(device)
    check_ready(where, "operator")
    return write_growing(measure(plan_for(where, quick), where), out, "operator", quick, page.render)


def measure(plan: Plan, device: torch.device) -> Iterator[dict[str, Any]]:
    """All that the report tells, as far as it goes, after each step of a part.

    That is circumstances, ceilings, `errors`, `times` (`timing.compare`'s rows), `memory`, `launches`, and the steps that are
    `unfinished`.
    """
    start = time.perf_counter()
    with in_precision("float32"):
        told = circumstances("operator", device, "swconv.bench.operator", plan=asdict(plan), tolerance=TOLERANCE)
    steps = _steps(plan, device)
    bar = Progress(1 + len(steps))
    bar.step("what the machine can do")
    told["ceilings"] = timing.ceilings(plan.threads, plan.product, plan.copied, 4, device, plan.precisions)
    rows = {name: [] for name in ("errors", "times", "memory", "launches")}
    for number, (title, precision, ordinary, work_) in enumerate(steps, start=1):
        bar.step(title)
        if not ordinary:
            keep_freed_memory()
        with in_precision(precision):
            for name, found in work_().items():
                rows[name] += found
        unfinished = [title for title, *_ in steps[number:]]
        yield told | rows | {"seconds": round(time.perf_counter() - start, 1), "unfinished": unfinished}
    bar.close()


def _steps(plan: Plan, device: torch.device) -> list[tuple[str, str, bool, Callable[[], Found]]]:
    """Title, precision, whether the process is an ordinary one, and work of every step, in the plan's order."""
    made = cache(partial(_networks, plan, device=device))             # by precision
    steps = []
    for part in plan.parts:
        if part.kind in ("network", "small batches"):
            batches = plan.batches[-1:] if part.kind == "network" else plan.batches[:-1]
            steps += [(f"network, batch {batch}, {part.precision}", part.precision, False,
                       partial(_network, plan, part.precision, batch, made, device)) for batch in batches]
        else:
            forms_ = ", ".join(part.names) or "all forms"
            work_, what = {"operator": (_operator, forms_), "ordinary": (_ordinary, f"{forms_}, in an ordinary process"),
                           "counts": (_counts, "E and Rep"), "launches": (_launches, "launches")}[part.kind]
            steps += [(f"stage {stage.number}, {part.precision}: {what}", part.precision, part.kind == "ordinary",
                       partial(work_, plan, part, stage, device)) for stage in plan.stages]
    return steps


def _operator(plan: Plan, part: Part, stage: Stage, device: torch.device) -> Found:
    """Some contenders, or all, in one stage: held against float64, then timed."""
    cuda, name = device.type == "cuda", part.precision
    layer, pools = forms.make_layer(stage, device), _pools(plan, part, stage, device)
    errors = _verified(stage, name, layer, pools, part.has) + _verified_peers(stage, name, pools, part.has)
    times = compare(_forward(stage, name, layer, pools, part.has), plan.threads, plan.forward, cuda, graphs=True)
    steps, contenders = _training(stage, name, layer, pools, part.has)
    rows = compare(contenders, plan.threads, plan.training, cuda, graphs=True)
    return {"errors": errors, "times": times + rows, "memory": _memory(stage, name, rows, steps, pools)}


def _ordinary(plan: Plan, part: Part, stage: Stage, device: torch.device) -> Found:
    """Forward and training as `_operator` times them, without the errors and the memory, which it tells."""
    cuda, name = device.type == "cuda", part.precision
    layer, pools = forms.make_layer(stage, device), _pools(plan, part, stage, device)
    _verified(stage, name, layer, pools, part.has)
    times = compare(_forward(stage, name, layer, pools, part.has), plan.threads, plan.forward, cuda, graphs=True)
    times += compare(_training(stage, name, layer, pools, part.has)[1], plan.threads, plan.forward, cuda, graphs=True)
    return {"times": [row | {"cell": f"ordinary {row['cell']}"} for row in times]}


# ---- inputs and calls


def _pools(plan: Plan, part: Part, stage: Stage, device: torch.device) -> Pools:
    return {layout: _inputs(stage, layout, plan.pool, device, DTYPES[part.precision]) for layout in FORMATS}


def _inputs(stage: Stage, layout: str, room: int, device: torch.device, dtype: torch.dtype) -> Pool:
    """Copies of x, which requires gradients, and of the gradients of h, v and i, to be used in turn; as many in any dtype."""
    generator = torch.Generator(device).manual_seed(stage.number)
    shape = (stage.batch, stage.channels, stage.side, stage.side)
    first = [torch.randn(shape, generator=generator, device=device) for _ in range(4)]
    count = max(2, math.ceil(room / (4 * first[0].nbytes)))
    first = [tensor.to(dtype, memory_format=FORMATS[layout]) for tensor in first]
    sets = [[tensor.clone() for tensor in first] for _ in range(count)]
    return [(x.requires_grad_(), *gradients) for x, *gradients in sets]


def _forward_of(function: Callable[[Tensor], Tensor], x: Tensor, *gradients: Tensor) -> Tensor:
    with torch.no_grad():
        return function(x)


def _training_of(
    function: Callable[[Tensor], Any], weights: Sequence[Tensor], x: Tensor, *gradients: Tensor
) -> tuple[Tensor, ...]:
    """Forward, then the gradients of x and the weights."""
    out = function(x)
    outputs = out if isinstance(out, tuple) else (out,)
    return torch.autograd.grad(outputs, [x, *weights], gradients[: len(outputs)])


# ---- correctness


def _verified(
    stage: Stage, precision: str, layer: ShiftwiseConv2d, pools: Pools, has: Callable[[str], bool], **labels: int
) -> list[dict[str, Any]]:
    """Relative errors of what every form that takes part gives, in its memory formats; an error too large stops all.

    The whole batch goes through the form, and a few of its images, the first and the last, through the definition; gradients
    of the results are zero for the rest.
    """
    cuda, found, some = layer.pick.is_cuda, [], _some(stage.batch)
    functions, sums = forms.deployed(layer, cuda, precision), forms.sums(cuda, precision)
    (x, *gradients), *_ = next(iter(pools.values()))
    known = [name for name in functions if has(name)]
    wanted = _wanted(layer, *(tensor.detach()[some].double() for tensor in (x, *gradients))) if known else {}
    for name in known:
        for variant in forms.layouts(name, cuda, precision):
            (x, *gradients), *_ = pools[variant]
            with without_search():
                parts = sums[name](layer, x)
                into, *weights = torch.autograd.grad(parts, [x, *layer.filters], [_only(some, g) for g in gradients])
            got = {"output": (_forward_of(functions[name], x)[some],), "sums": [part[some] for part in parts],
                   "gradients": (into[some], *weights)}
            told = {"stage": stage.number, "precision": precision, "contender": name, "variant": variant} | labels
            found += _errors(got, wanted, told)
    return found


@without_search()
def _verified_peers(stage: Stage, precision: str, pools: Pools, has: Callable[[str], bool]) -> list[dict[str, Any]]:
    """The same of the convolutions of other networks."""
    found, some = [], _some(stage.batch, 2)                            # torch's convolutions, slow in float64
    (x, gradient, *_), *_ = next(iter(pools.values()))
    for name, (ways, weights) in forms.peers(stage, x.device, x.dtype).items():
        if not has(name):
            continue
        exact = [weight.detach().double().requires_grad_() for weight in weights]
        few = x.detach()[some].double().requires_grad_()
        out = forms.inside(exact, few)
        wanted = {"output": (out,), "gradients": torch.autograd.grad(out, [few, *exact], gradient[some].double())}
        for way, function in ways.items():
            for layout in forms.layouts(name, x.is_cuda, precision):
                (x, gradient, *_), *_ = pools[layout]
                into, *others = _training_of(function, weights, x, _only(some, gradient))
                got = {"output": (_forward_of(function, x)[some],), "gradients": (into[some], *others)}
                told = {"stage": stage.number, "precision": precision, "contender": name, "variant": _variant(layout, way)}
                found += _errors(got, wanted, told)
    return found


def _some(batch: int, few: int = FEW) -> list[int]:
    """Half of a few images at the beginning of the batch, half at its end; in a small batch all."""
    return [i for i in range(batch) if min(i, batch - 1 - i) < few // 2]


def _only(some: Sequence[int], gradient: Tensor) -> Tensor:
    """The gradient with zeros for all images but some."""
    kept = torch.zeros_like(gradient)
    kept[some] = gradient[some]
    return kept


@without_search()
def _wanted(layer: ShiftwiseConv2d, x: Tensor, *gradients: Tensor) -> dict[str, Sequence[Tensor]]:
    """By the definition, in float64."""
    layer = copy.deepcopy(layer).double()
    parts = forms.reference(layer, x.requires_grad_())
    into, *weights = torch.autograd.grad(parts, [x, *layer.filters], gradients, retain_graph=True)
    return {"output": (forms.mixed(layer, parts, x),), "sums": parts, "gradients": (into, *weights)}


def _errors(
    got: Mapping[str, Sequence[Tensor]], wanted: Mapping[str, Sequence[Tensor]], told: Mapping[str, Any]
) -> list[dict[str, Any]]:
    allowed, found = TOLERANCE["operator"][told["precision"]], []
    for what in wanted:
        error = max(_error(a, b) for a, b in zip(got[what], wanted[what], strict=True))
        _require(error, allowed, f"{what} of the form {told['contender']!r} in stage {told['stage']} ({told['variant']}, "
                                 f"{told['precision']})")
        found.append({**told, "of": what, "error": error})
    return found


def _error(got: Tensor, wanted: Tensor) -> float:
    return float((got.detach().double() - wanted.detach()).norm() / wanted.detach().norm())


def _require(error: float, allowed: float, what: str) -> None:
    if not error <= allowed:
        raise RuntimeError(
            f"bench operator times only what is right, and the {what} is off by {error:.1e} relative to float64 where "
            f"{allowed:.0e} is allowed. Build csrc/ anew (python -m swconv build); if it stays wrong, make test tells where."
        )


# ---- the comparisons


def _forward(
    stage: Stage, precision: str, layer: ShiftwiseConv2d, pools: Pools, has: Callable[[str], bool]
) -> list[Contender]:
    cuda, plus, size = layer.pick.is_cuda, frozenset().union(*work.shiftwise(stage)), DTYPES[precision].itemsize
    known = {name: ({"": function}, work.forward(stage, plus, size))
             for name, function in forms.deployed(layer, cuda, precision).items()}
    for name, (ways, _) in forms.peers(stage, layer.pick.device, DTYPES[precision]).items():
        known[name] = ways, work.forward(stage, work.peers(stage)[name], size)
    return [
        Contender({"cell": "forward", "stage": stage.number, "precision": precision, "contender": name} | least,
                  {_variant(layout, way): Turn(partial(_forward_of, function), pools[layout])
                   for way, function in ways.items() for layout in forms.layouts(name, cuda, precision)})
        for name, (ways, least) in known.items() if has(name) and name != "two_step_summed"      # which is `two_step` there
    ]


def _training(
    stage: Stage, precision: str, layer: ShiftwiseConv2d, pools: Pools, has: Callable[[str], bool]
) -> tuple[Steps, list[Contender]]:
    """Training steps by contender and variant, each a function of a set of inputs; and the contenders."""
    known: dict[str, tuple[dict[str, Callable], Sequence[Tensor], dict[str, int | None]]] = {}
    size, learner = DTYPES[precision].itemsize, copy.deepcopy(layer).train()
    for name, form in forms.sums(layer.pick.is_cuda, precision).items():
        known[name] = {"": partial(form, layer)}, list(layer.filters), work.training(stage, *work.shiftwise(stage), size=size)
        if name in ("ours", "two_step"):                              # with norms and skip, too
            ways, nothing = {"": partial(forms.whole, form, learner)}, {"macs": None, "bytes": None}
            known[f"{name}_layer"] = ways, list(learner.parameters()), nothing
    for name, (ways, weights) in forms.peers(stage, layer.pick.device, DTYPES[precision]).items():
        known[name] = ways, weights, work.training(stage, work.peers(stage)[name], size=size)
    steps = {name: {_variant(layout, way): (layout, partial(_training_of, function, weights))
                    for way, function in ways.items() for layout in forms.layouts(name, layer.pick.is_cuda, precision)}
             for name, (ways, weights, _) in known.items() if has(name)}
    contenders = [
        Contender({"cell": "training", "stage": stage.number, "precision": precision, "contender": name} | known[name][2],
                  {variant: Turn(step, pools[layout]) for variant, (layout, step) in variants.items()})
        for name, variants in steps.items()
    ]
    return steps, contenders


def _memory(
    stage: Stage, precision: str, rows: Iterable[Mapping[str, Any]], steps: Steps, pools: Pools
) -> list[dict[str, Any]]:
    """Of one training step of every contender in the variant that was timed, in bytes; `map` is the size of x."""
    found = []
    for name, variant in {row["contender"]: row["variant"] for row in rows}.items():
        layout, step = steps[name][variant]
        inputs = pools[layout][0]
        told = {"stage": stage.number, "precision": precision, "contender": name, "variant": variant, "map": inputs[0].nbytes}
        found.append(told | timing.training_memory(partial(step, *inputs), inputs[0]))
    return found


def _counts(plan: Plan, part: Part, stage: Stage, device: torch.device) -> Found:
    """Ours with several E and Rep, in evaluation and in training, verified on one image; all in one memory format."""
    cuda, precision, pools = device.type == "cuda", part.precision, _pools(plan, part, stage, device)
    errors, contenders = [], []
    one = {layout: [(x[:1].detach().requires_grad_(), *(g[:1] for g in gradients))]
           for layout, ((x, *gradients), *_) in pools.items()}
    for edges, rep in COUNTS:
        layer, labels = forms.make_layer(stage, device, edges, rep), {"edges": edges, "rep": rep}
        errors += _verified(replace(stage, batch=1), precision, layer, one, lambda name: name == "ours", **labels)
        function = forms.deployed(layer, cuda, precision)["ours"]
        calls = {"forward": partial(_forward_of, function),
                 "training": partial(_training_of, layer.branches, list(layer.filters))}
        contenders += [
            Contender({"cell": "counts", "stage": stage.number, "precision": precision, "mode": mode} | labels,
                      {"contiguous": Turn(call, pools["contiguous"])})
            for mode, call in calls.items()
        ]
    return {"errors": errors, "times": compare(contenders, plan.threads[-1:], plan.counts, cuda, graphs=True)}


def _launches(plan: Plan, part: Part, stage: Stage, device: torch.device) -> Found:
    """What the CPU takes for one eager call of ours, and of one convolution of torch, for an image; no graph spares that."""
    layer, precision, found = forms.make_layer(stage, device), part.precision, []
    x = torch.randn(1, stage.channels, stage.side, stage.side, device=device, dtype=DTYPES[precision])
    ways, _ = forms.peers(stage, x.device, x.dtype)["depthwise7"]
    calls = {"ours": forms.deployed(layer, True, precision)["ours"], "depthwise7": ways["padding inside"]}
    for name, function in calls.items():
        call = partial(_forward_of, function, x)
        found.append({"stage": stage.number, "precision": precision, "contender": name,
                      "median_us": 1e6 * timing.launch_seconds(call, 100, 11)})
    return {"launches": found}


# ---- whole networks


def _network(
    plan: Plan, precision: str, batch: int, made: Callable[[str], tuple[dict[str, nn.Module], list[dict[str, Any]]]],
    device: torch.device,
) -> Found:
    """One batch, on a GPU also as a CUDA graph, which does not wait for the CPU; the networks' errors are told once."""
    cuda, (networks, errors) = device.type == "cuda", made(precision)
    contenders = _whole(plan, precision, networks, batch, device)
    times = compare(contenders, plan.threads[-1:], plan.whole, cuda)
    if cuda:
        rows = compare(contenders, plan.threads[-1:], plan.whole, cuda, graphs=True)
        times += rows if all(row["launched"] == "graph" for row in rows) else []
    return {"errors": errors if batch == plan.batches[-1] else [], "times": times}


@without_search()
def _networks(plan: Plan, precision: str, device: torch.device) -> tuple[dict[str, nn.Module], list[dict[str, Any]]]:
    """SW-tiny merged and, in float32, with its mixers in the two-step forms, each held against float64."""
    model, cuda, allowed = forms.make_network(device, **plan.network), device.type == "cuda", TOLERANCE["network"][precision]
    networks = {"ours": timm.utils.reparameterize_model(model)}
    networks |= {name: forms.two_step_network(model, form)
                 for name, form in forms.sums(cuda, precision).items()
                 if "two_step" in name and name != "two_step_summed"}
    image, errors = _images(plan, 1, device), []
    with torch.no_grad():
        wanted = forms.two_step_network(model, forms.reference).double()(image.double())
        for name, network in networks.items():
            error = _error(network.to(DTYPES[precision])(image.to(DTYPES[precision])), wanted)
            _require(error, allowed, f"output of SW-tiny in the form {name!r} in {precision}")
            errors.append({"contender": name, "precision": precision, "of": "network", "error": error})
    return networks, errors


def _whole(
    plan: Plan, precision: str, networks: Mapping[str, nn.Module], batch: int, device: torch.device
) -> list[Contender]:
    images = _images(plan, batch, device).to(DTYPES[precision])
    return [
        Contender({"cell": "network", "batch": batch, "precision": precision, "contender": name},
                  {variant: Turn(partial(_forward_of, copy.deepcopy(network).to(memory_format=layout)),
                                 [(images.to(memory_format=layout),)])
                   for variant, layout in FORMATS.items() if variant in forms.layouts(name, device.type == "cuda", precision)})
        for name, network in networks.items()
    ]


def _images(plan: Plan, batch: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, 3, plan.image, plan.image, generator=generator).to(device)


def _variant(layout: str, way: str) -> str:
    return f"{layout}, {way}" if way else layout
