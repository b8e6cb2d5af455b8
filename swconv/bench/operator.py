"""The benchmark of the SW operator: correctness in float64 first, then times and memory, as JSON and Markdown."""

import copy
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from swconv import atomic
from swconv.bench import forms, page, work
from swconv.bench.circumstances import check_ready, circumstances, device_name
from swconv.bench.timing import Contender, Pace, Progress, ceilings, compare, training_memory
from swconv.bench.work import Stage
from swconv.ops import ShiftwiseConv2d
from swconv.training.memory import keep_freed_memory

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
TOLERANCE = {"operator": 1e-5, "network": 1e-4}                       # relative errors in float32
COUNTS = ((1, 1), (2, 1), (4, 1), (1, 2), (1, 4))                     # edges E and Rep branches
SW_TINY = (Stage(1, 56, 60, 51, 3, 2), Stage(2, 28, 122, 49, 3, 4), Stage(3, 14, 246, 47, 18, 8), Stage(4, 7, 492, 13, 3, 16))
Pool = Sequence[tuple[Tensor, ...]]                                   # of x and the gradients of h, v and i
Pools = Mapping[str, Pool]                                            # by memory format
Steps = Mapping[str, Mapping[str, tuple[str, Callable[[Pool], Callable]]]]     # by contender and variant

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """What a benchmark measures, and for how long.

    Attributes
    ----------
    threads : tuple of int
        Numbers of threads, the last for the ratios.
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
    threads: tuple[int, ...]
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
    stages=SW_TINY, threads=(1, 2), pool=2**27, network={}, image=224, batches=(1, 8), product=2048, copied=2**28,
    forward=Pace(10, 9), training=Pace(25, 7, probes=2), counts=Pace(8, 15), whole=Pace(30, 7, probes=2),
)
CUDA = replace(
    CPU, stages=tuple(replace(stage, batch=128) for stage in SW_TINY), threads=(1,), pool=2**30, batches=(1, 8, 128),
    product=8192, copied=2**30, forward=Pace(5, 50), training=Pace(8, 50), counts=Pace(5, 50), whole=Pace(8, 50),
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
        When the device or the compiled operators are missing, or a result is wrong; nothing is written.
    """
    where = torch.device(device)
    check_ready(where, "operator")
    found = measure(plan_for(where, quick), where) | {"quick": quick}
    paths = tuple(out / f"operator-{device_name(found)}.{kind}" for kind in ("json", "md"))
    atomic.write_json(paths[0], found)
    atomic.write_atomic(paths[1], page.render(found).encode())
    log.info("wrote %s and %s", *paths)
    return paths


def measure(plan: Plan, device: torch.device) -> dict[str, Any]:
    """All that the report tells: circumstances, ceilings, `errors`, `times` (rows of `timing.compare`) and `memory`."""
    cuda, start = device.type == "cuda", time.perf_counter()
    keep_freed_memory()
    bar = Progress(1 + 4 * len(plan.stages) + 1 + len(plan.batches))
    errors, times, memory = [], [], []
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, deterministic=False, allow_tf32=False):
        told = circumstances("operator", device, "swconv.bench.operator", plan=asdict(plan), tolerance=TOLERANCE)
        bar.step("what the machine can do")
        tops = ceilings(plan.threads, plan.product, plan.copied, 4, device)
        for stage in plan.stages:
            layer = forms.make_layer(stage, device)
            pools = {name: _inputs(stage, layout, plan.pool, device) for name, layout in FORMATS.items()}
            bar.step(f"stage {stage.number}: all forms against float64")
            errors += _verified(stage, layer, pools)
            bar.step(f"stage {stage.number}: forward")
            times += compare(_forward(stage, layer, pools), plan.threads, plan.forward, cuda)
            bar.step(f"stage {stage.number}: forward + backward")
            steps, contenders = _training(stage, layer, pools)
            rows = compare(contenders, plan.threads, plan.training, cuda)
            times += rows
            memory += _memory(stage, rows, steps, pools)
            bar.step(f"stage {stage.number}: edges and Rep branches")
            more, contenders = _counts(stage, pools, device)
            errors += more
            times += compare(contenders, plan.threads[-1:], plan.counts, cuda)
        bar.step("network against float64")
        networks, more = _networks(plan, device)
        errors += more
        for batch in plan.batches:
            bar.step(f"network, batch {batch}")
            times += compare(_whole(plan, networks, batch, device), plan.threads[-1:], plan.whole, cuda)
        bar.close()
    return told | {"seconds": round(time.perf_counter() - start, 1), "ceilings": tops, "errors": errors, "times": times,
                   "memory": memory}


# ---- inputs and calls


def _inputs(stage: Stage, layout: torch.memory_format, room: int, device: torch.device) -> Pool:
    """Copies of x, which requires gradients, and of the gradients of h, v and i, to be used in turn."""
    generator = torch.Generator().manual_seed(stage.number)
    shape = (stage.batch, stage.channels, stage.side, stage.side)
    first = [torch.randn(shape, generator=generator).to(device) for _ in range(4)]
    count = max(2, math.ceil(room / (4 * first[0].nbytes)))
    sets = [tuple(tensor.clone(memory_format=layout) for tensor in first) for _ in range(count)]
    return [(x.requires_grad_(), *gradients) for x, *gradients in sets]


def _forward_call(function: Callable[[Tensor], Tensor], pool: Pool) -> Callable[[], Tensor]:
    turn = itertools.cycle(pool)

    def call() -> Tensor:
        with torch.no_grad():
            return function(next(turn)[0])

    return call


def _training_call(
    function: Callable[[Tensor], Any], weights: Sequence[Tensor], pool: Pool
) -> Callable[[], tuple[Tensor, ...]]:
    """Forward, then the gradients of x and the weights."""
    turn = itertools.cycle(pool)

    def call() -> tuple[Tensor, ...]:
        x, *gradients = next(turn)
        out = function(x)
        outputs = out if isinstance(out, tuple) else (out,)
        return torch.autograd.grad(outputs, [x, *weights], gradients[: len(outputs)])

    return call


# ---- correctness


def _verified(
    stage: Stage, layer: ShiftwiseConv2d, pools: Pools, only: Sequence[str] = (), **labels: int
) -> list[dict[str, Any]]:
    """Relative errors of what every form (or only some) gives, in every memory format; an error too large stops all."""
    cuda, found = layer.pick.is_cuda, []
    wanted, functions = _wanted(layer, *next(iter(pools.values()))[0]), forms.deployed(layer, cuda)
    for name in only or functions:
        for variant, (inputs, *_) in pools.items():
            x, *gradients = inputs
            sums = forms.sums(cuda)[name](layer, x)
            got = {"output": (_forward_call(functions[name], [inputs])(),), "sums": sums,
                   "gradients": torch.autograd.grad(sums, [x, *layer.filters], gradients)}
            for what in wanted:
                error = max(_error(a, b) for a, b in zip(got[what], wanted[what], strict=True))
                _require(error, TOLERANCE["operator"], f"{what} of the form {name!r} in stage {stage.number} ({variant})")
                told = {"stage": stage.number, "contender": name, "variant": variant, "of": what, "error": error}
                found.append(told | labels)
    return found


def _wanted(layer: ShiftwiseConv2d, x: Tensor, *gradients: Tensor) -> dict[str, tuple[Tensor, ...]]:
    """The same in float64 by the definition, some images at a time."""
    layer = copy.deepcopy(layer).double()
    pieces = []
    for some, *upstream in zip(*(tensor.detach().double().split(8) for tensor in (x, *gradients)), strict=True):
        parts = forms.reference(layer, some.requires_grad_())
        into, *weights = torch.autograd.grad(parts, [some, *layer.filters], upstream)
        with torch.no_grad():
            pieces.append((forms.mixed(layer, parts, some), [part.detach() for part in parts], into, weights))
    outputs, parts, into, weights = zip(*pieces, strict=True)
    return {"output": (torch.cat(outputs),), "sums": tuple(map(torch.cat, zip(*parts, strict=True))),
            "gradients": (torch.cat(into), *map(sum, zip(*weights, strict=True)))}


def _error(got: Tensor, wanted: Tensor) -> float:
    return float((got.detach().double() - wanted).norm() / wanted.norm())


def _require(error: float, allowed: float, what: str) -> None:
    if not error <= allowed:
        raise RuntimeError(
            f"bench operator times only what is right, and the {what} is off by {error:.1e} relative to float64 where "
            f"{allowed:.0e} is allowed. Build csrc/ anew (python -m swconv build); if it stays wrong, make test tells where."
        )


# ---- the comparisons


def _forward(stage: Stage, layer: ShiftwiseConv2d, pools: Pools) -> list[Contender]:
    cuda, plus = layer.pick.is_cuda, frozenset().union(*work.shiftwise(stage))
    known = {name: ({"": function}, work.forward(stage, plus)) for name, function in forms.deployed(layer, cuda).items()}
    for name, (ways, _) in forms.peers(stage, layer.pick.device).items():
        known[name] = ways, work.forward(stage, work.peers(stage)[name])
    return [
        Contender({"cell": "forward", "stage": stage.number, "contender": name} | least,
                  {_variant(layout, way): _forward_call(function, pool)
                   for way, function in ways.items() for layout, pool in pools.items()})
        for name, (ways, least) in known.items()
    ]


def _training(stage: Stage, layer: ShiftwiseConv2d, pools: Pools) -> tuple[Steps, list[Contender]]:
    """Training steps by contender and variant, each a function of the inputs; and the contenders."""
    known: dict[str, tuple[dict[str, Callable], Sequence[Tensor], dict[str, int | None]]] = {}
    least, learner = work.training(stage, *work.shiftwise(stage)), copy.deepcopy(layer).train()
    for name, form in forms.sums(layer.pick.is_cuda).items():
        known[name] = {"": partial(form, layer)}, list(layer.filters), least
        if name in ("ours", "two_step"):                              # with norms and skip, too
            ways, nothing = {"": partial(forms.whole, form, learner)}, {"macs": None, "bytes": None}
            known[f"{name}_layer"] = ways, list(learner.parameters()), nothing
    for name, (ways, weights) in forms.peers(stage, layer.pick.device).items():
        known[name] = ways, weights, work.training(stage, work.peers(stage)[name])
    steps = {name: {_variant(layout, way): (layout, partial(_training_call, function, weights))
                    for way, function in ways.items() for layout in pools}
             for name, (ways, weights, _) in known.items()}
    contenders = [
        Contender({"cell": "training", "stage": stage.number, "contender": name} | known[name][2],
                  {variant: step(pools[layout]) for variant, (layout, step) in variants.items()})
        for name, variants in steps.items()
    ]
    return steps, contenders


def _memory(stage: Stage, rows: Iterable[Mapping[str, Any]], steps: Steps, pools: Pools) -> list[dict[str, Any]]:
    """Of one training step of every contender in the variant that was timed, in bytes; `map` is the size of x."""
    found = []
    for name, variant in {row["contender"]: row["variant"] for row in rows}.items():
        layout, step = steps[name][variant]
        inputs = pools[layout][0]
        found.append({"stage": stage.number, "contender": name, "variant": variant, "map": inputs[0].nbytes}
                     | training_memory(step([inputs]), inputs[0]))
    return found


def _counts(stage: Stage, pools: Pools, device: torch.device) -> tuple[list[dict[str, Any]], list[Contender]]:
    """Ours with several E and Rep, in evaluation and in training, verified on one image."""
    errors, contenders = [], []
    for edges, rep in COUNTS:
        layer, labels = forms.make_layer(stage, device, edges, rep), {"edges": edges, "rep": rep}
        one = {layout: [(pool[0][0][:1].detach().requires_grad_(), *(g[:1] for g in pool[0][1:]))]
               for layout, pool in pools.items()}
        errors += _verified(stage, layer, one, only=("ours",), **labels)
        function = forms.deployed(layer, device.type == "cuda")["ours"]
        calls = {"forward": partial(_forward_call, function),
                 "training": partial(_training_call, layer.branches, list(layer.filters))}
        contenders += [
            Contender({"cell": "counts", "stage": stage.number, "mode": mode} | labels,
                      {layout: call(pool) for layout, pool in pools.items()})
            for mode, call in calls.items()
        ]
    return errors, contenders


# ---- whole networks


def _networks(plan: Plan, device: torch.device) -> tuple[dict[str, nn.Module], list[dict[str, Any]]]:
    """SW-tiny merged, and with its mixers in the two-step forms, each held against float64."""
    model, cuda = forms.make_network(device, **plan.network), device.type == "cuda"
    networks = {"ours": timm.utils.reparameterize_model(model)}
    networks |= {name: forms.two_step_network(model, form) for name, form in forms.sums(cuda).items() if "two_step" in name}
    image, errors = _images(plan, 1, device), []
    with torch.no_grad():
        wanted = forms.two_step_network(model, forms.reference).double()(image.double())
        for name, network in networks.items():
            error = _error(network(image), wanted)
            _require(error, TOLERANCE["network"], f"output of SW-tiny in the form {name!r}")
            errors.append({"contender": name, "of": "network", "error": error})
    return networks, errors


def _whole(plan: Plan, networks: Mapping[str, nn.Module], batch: int, device: torch.device) -> list[Contender]:
    images = _images(plan, batch, device)
    return [
        Contender({"cell": "network", "batch": batch, "contender": name},
                  {variant: _forward_call(copy.deepcopy(network).to(memory_format=layout), [(images.to(memory_format=layout),)])
                   for variant, layout in FORMATS.items()})
        for name, network in networks.items()
    ]


def _images(plan: Plan, batch: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, 3, plan.image, plan.image, generator=generator).to(device)


def _variant(layout: str, way: str) -> str:
    return f"{layout}, {way}" if way else layout
