"""What runs would cost before anything starts: steps, memory, disk, GPU-hours. No torch, and no look at a GPU.

Steps and parameters are exact; memory, disk and hours are estimates, whose method and rates stand in params/plan.yaml.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path
from typing import Any

from swconv.params import ARGS, EnlargedArgs, Params, ParamsError, ShiftwiseArgs, SlakArgs, UniRepArgs

Args = Mapping[str, Any]

_GROWN = ("sw_tiny", "sw_small", "unireplknet_tiny", "unireplknet_small")  # with UniRepLKNet's skeleton
_DILATED = {7: (5, 3, 3), 9: (5, 5, 3, 3), 11: (5, 5, 3, 3, 3), 13: (5, 7, 3, 3, 3)}  # kernels beside UniRepLKNet's large one
KEPT_CHECKPOINTS = 2


@dataclass(frozen=True)
class Entry:
    """What one run or fine-tune takes; None where it is not known.

    Attributes
    ----------
    run : str
    needs : str or None
        The run, or the published weights, that it starts from, or is evaluated with.
    trained : bool
        Whether it trains at all; if not, all that follows is 0.
    same_as : str or None
        The run with the same configuration at this scale that is trained in its stead: counted there.
    epochs, steps_per_epoch, steps, images : int or None
        Optimizer steps, and images that go through the network.
    parameters : int or None
        That training moves.
    at_once : int
        Images that one process has in the network at a time.
    memory : int or None
        Bytes while it trains, of one process: weights, gradients, optimizer, masks, average, and what the backward pass needs.
    disk : int or None
        Bytes of two checkpoints and the published weights.
    hours : float or None
        A100-hours; on a CPU the hours of earlier seeds.
    basis : str or None
        Where hours come from: "measured", "scaled", "guessed" (see params/plan.yaml) or "earlier seeds".
    """

    run: str
    needs: str | None
    trained: bool
    same_as: str | None
    epochs: int | None = 0
    steps_per_epoch: int | None = 0
    steps: int | None = 0
    images: int | None = 0
    parameters: int | None = 0
    at_once: int = 0
    memory: int | None = 0
    disk: int | None = 0
    hours: float | None = 0.0
    basis: str | None = None


@dataclass(frozen=True)
class Plan:
    """Entries in the order in which they can be done, for one seed."""

    target: str
    profile: str
    entries: tuple[Entry, ...]
    uncertainty: float
    speed: Mapping[str, float]
    gpu: bool

    @property
    def counted(self) -> list[Entry]:
        """What is trained: equal runs once."""
        return [entry for entry in self.entries if entry.trained and entry.same_as is None]

    def total(self, key: str) -> float:
        """The sum over `counted`, of those that are known."""
        return sum(getattr(entry, key) or 0 for entry in self.counted)

    def plain(self) -> dict[str, Any]:
        """As plain data, for --json."""
        totals = {key: self.total(key) for key in ("steps", "images", "disk", "hours")}
        unknown = [entry.run for entry in self.counted if entry.hours is None]
        return {"target": self.target, "profile": self.profile, "seeds": 1, "uncertainty": self.uncertainty,
                "speed": dict(self.speed), "runs": [asdict(entry) for entry in self.entries],
                "totals": {"trained": len(self.counted), **totals, "hours_unknown": unknown}}


def plan(known: Params, target: str, profile: str, artifacts: Path = Path("artifacts")) -> Plan:
    """Reckon what a run, a report or "all" takes, runs whose weights are needed included.

    Parameters
    ----------
    known : Params
    target : str
        Id or alias of a run, id of a report, or "all".
    profile : str
    artifacts : Path
        Where manifests and earlier runs lie, if any.

    Raises
    ------
    ParamsError
        For an unknown target, or a dataset whose number of images is nowhere.
    """
    same = {run: known.same_as(run, profile) for run in known.runs}
    runs = list(_ordered(known, same, _runs(known, target)))
    entries = [_entry(known, run, profile, same[run], artifacts) for run in runs]
    return Plan(target, profile, tuple(entries), known.planning.uncertainty, known.planning.speed,
                known.profile(profile).uses_gpu)


def parameters(name: str, args: Args, in_chans: int, num_classes: int) -> int | None:
    """Parameters of a network as it trains; None where `params.ARGS` gives the name arguments that are not known here.

    Parameters
    ----------
    name : str
        timm's.
    args : mapping
        Of a resolved row of params.
    """
    if (mixer := _mixer(name, args)) is None:
        return None
    grown, widths = name in _GROWN, widths_of(args)
    first, last = widths[0], widths[-1]
    half = first // 2
    stem = in_chans * half * 9 + 3 * half + half * first * 9 + 3 * first if grown else in_chans * first * 16 + 3 * first
    downsampling = sum(before * width * 9 + 3 * width if grown else before * width * 4 + width + 2 * before
                       for before, width in zip(widths, widths[1:], strict=False))
    scaled = args["layer_scale_init"] > 0
    blocks = 0
    for width, sizes in zip(widths, _sizes(args), strict=True):
        tail = 2 * width + 8 * width * width + 4 * width + (10 * width if grown else width) + scaled * width
        if args.get("use_se"):
            tail += 2 * width * (width // 4) + width // 4 + width
        blocks += sum(tail + mixer(width, size, 1)[0] for size in sizes)
    return stem + downsampling + blocks + 2 * last + last * num_classes + num_classes


def kept(name: str, args: Args, in_chans: int, image_size: int, recompute: bool = False) -> float | None:
    """Floats that the network keeps of one image for the backward pass, estimated; None as for `parameters`.

    Every tensor that torch saves is counted once: what enters a convolution, a norm, a linear layer, GELU, or a product. In a
    block of width C these are 12 C per pixel (17 C with UniRepLKNet's tail, one more with squeeze-and-excitation), the input of
    the mixer included, and the maps of the mixer. Left out are its assembled kernels, the same for all images, and what
    half padding takes away at the borders.

    With `recompute` (machine) a block keeps 6 C, or 2 C before the last two stages, and one block at a time has the rest anew.
    """
    if (mixer := _mixer(name, args)) is None:
        return None
    grown, widths, side = name in _GROWN, widths_of(args), ceil(image_size / 4)
    tail = (17 if grown else 12) + bool(args.get("use_se"))
    total, anew = in_chans * image_size**2 + side * side * widths[0] * (7 if grown else 1), 0.0
    for stage, (width, sizes) in enumerate(zip(widths, _sizes(args), strict=True)):
        if stage:
            before, side = side, ceil(side / 2)
            total += before**2 * widths[stage - 1] * (1 if grown else 2) + side**2 * width * grown
        blocks = [side * side * (width * tail + mixer(width, size, side)[1]) for size in sizes]
        least = side * side * width * (6 if stage >= len(widths) - 2 else 2)
        total += least * len(blocks) if recompute else sum(blocks)
        anew = max(anew, *(block - least for block in blocks))
    return total + anew * recompute


def table(plan: Plan) -> str:
    """For the terminal."""
    head = ["run", "epochs", "steps/epoch", "steps", "weights", "at once", "memory", "disk",
            "A100-hours" if plan.gpu else "hours", "starts from"]
    rows = [[entry.run, *_cells(entry)] for entry in plan.entries]
    widths = [max(len(row[column]) for row in [head, *rows] if column == 0 or len(row) > 2) for column in range(len(head))]
    lines = [[row[0].ljust(widths[0]), *(row[1:] if len(row) == 2 else map(str.rjust, row[1:], widths[1:]))]
             for row in [head, *rows]]
    hours, unknown = plan.total("hours"), sum(entry.hours is None for entry in plan.counted)
    said = f"{len(plan.counted)} to train, one seed each: {_size(plan.total('disk'))} of disk"
    if hours and plan.gpu:
        devices = ", ".join(f"{hours / speed:,.0f} {device}-hours" for device, speed in plan.speed.items())
        said += f"; {devices} (estimates, +-{plan.uncertainty:.0%}, rates in params/plan.yaml)"
    elif hours:
        said += f"; {hours:.2f} hours, as earlier seeds took"
    if unknown:
        why = "they have no rate in params/plan.yaml" if plan.gpu else "none was trained here yet"
        said += f"; hours of {unknown} not known, {why}"
    memory = "Memory is an estimate, of one process, with as many images at once as stand before it (machine.micro_batch)."
    body = ["  ".join(line).rstrip() for line in lines]
    return "\n".join([f"{plan.target}, profile {plan.profile}", "", *body, "", f"{said}.", memory])


def _runs(known: Params, target: str) -> list[str]:
    if target == "all":
        return list(known.runs)
    if target in known.reports:
        return known.report_rows(target)
    try:
        return [known.canonical(target)]
    except ParamsError as error:
        reports = ", ".join(known.reports)
        raise ParamsError(f"{error} A run, a report ({reports}) or all is needed.") from None


def _ordered(known: Params, same: Mapping[str, str | None], runs: Iterable[str]) -> dict[str, None]:
    """The runs, each behind those whose weights it needs, and behind the one that is trained in its stead."""
    done: dict[str, None] = {}
    for run in runs:
        line = [run]
        while source := same[line[-1]] or known.source(line[-1]):
            line.append(source)
        done |= dict.fromkeys(reversed(line))
    return done


def _entry(known: Params, run: str, profile: str, same_as: str | None, artifacts: Path) -> Entry:
    needs, trained = known.source(run), known.run(run).same_weights is None
    if not trained:
        return Entry(run, needs, trained, same_as)
    row = known.resolve(run, profile)
    recipe, dataset, machine = row["recipe"], row["dataset"], row["machine"]
    per_epoch = _training_images(known, dataset, profile, artifacts) // recipe["batch_size"]
    steps = per_epoch * recipe["epochs"]
    images = steps * recipe["batch_size"]
    name, args = row["model"]["name"], row["model"]["args"]
    count = parameters(name, args, dataset["in_chans"], dataset["num_classes"])
    floats = kept(name, args, dataset["in_chans"], dataset["image_size"], machine["recompute"])
    at_once = ceil(min(machine["micro_batch"] or recipe["batch_size"], recipe["batch_size"]) / machine["processes"])
    memory = disk = None
    if count is not None and floats is not None:
        sparsity = recipe["sparsity"]
        masks = bool(sparsity) and (sparsity["granularity"] == "element" or sparsity["others"] != "none")
        state = 4 * (3 + bool(recipe["ema_decay"])) + masks            # bytes per weight: itself, two moments, average, mask
        memory = (state + 4) * count + round(at_once * floats * (2 if machine["amp"] else 4))
        disk = (KEPT_CHECKPOINTS * state + 4) * count
    hours, basis = _hours(known, run, profile, images, row, artifacts)
    return Entry(run, needs, trained, same_as, recipe["epochs"], per_epoch, steps, images, count, at_once, memory, disk, hours,
                 basis)


def _training_images(known: Params, dataset: Mapping[str, Any], profile: str, artifacts: Path) -> int:
    """As listed by the data stage; else as params/ says."""
    listed = artifacts / profile / "data/data.json"
    if listed.exists():
        return json.loads(listed.read_text())["n_train"]
    if images := dataset.get("train_images"):
        return images
    if known_images := known.planning.images.get(dataset["name"]):
        return known_images.train
    raise ParamsError(f"plan needs the number of training images of {dataset['name']}, which params/plan.yaml does not have. "
                      f"Have them listed: snakemake --cores all {listed}.")


def _hours(known: Params, run: str, profile: str, images: int, row: Mapping[str, Any], artifacts: Path
           ) -> tuple[float | None, str | None]:
    if row["machine"]["device"] == "cuda":
        if (rate := known.rate(run)) is None:
            return None, None
        return images / (rate.rate / known.planning.passes) / 3600, rate.basis
    return earlier(artifacts / profile / "train" / run, row)


def earlier(folder: Path, row: Mapping[str, Any]) -> tuple[float | None, str | None]:
    """Mean hours of the seeds of a run that are there and had this resolved row, and their basis."""
    records = [json.loads(path.read_text()) for path in folder.glob("seed*/run.json")]
    seconds = [record["seconds"] for record in records if record["config"] == row]
    return (sum(seconds) / len(seconds) / 3600, "earlier seeds") if seconds else (None, None)


def widths_of(args: Args) -> list[int]:
    """Channels of the stages."""
    return [int(dim * args["width_factor"]) for dim in args["dims"]]


def _sizes(args: Args) -> list[list[int]]:
    """The kernel size of every block, per stage; a list is repeated over its stage."""
    cycles = [[sizes] if isinstance(sizes, int) else sizes for sizes in args["kernel_sizes"]]
    return [[cycle[block % len(cycle)] for block in range(depth)] for depth, cycle in zip(args["depths"], cycles, strict=True)]


def _mixer(name: str, args: Args) -> Callable[[int, int, int], tuple[int, float]] | None:
    """(channels, kernel size, side of the map) -> parameters, and floats kept per pixel, of a token mixer."""
    schema, small = ARGS[name], args.get("small_kernel")

    def convs(channels: int, taps: Iterable[int], bn: bool) -> tuple[int, float]:
        """Depthwise convolutions with so many taps each, and their norms."""
        taps = list(taps)
        return channels * (sum(taps) + 2 * bn * len(taps)), channels * bn * len(taps)

    def strips(channels: int, size: int, side: int) -> tuple[int, float]:
        breadth = small or 5
        length = ceil(size / breadth) * breadth if args.get("laid_out") else size
        return convs(channels, [breadth * length] * 2 + [breadth**2], args["bn"])

    def square(channels: int, size: int, side: int) -> tuple[int, float]:
        reach = size * (3 if args.get("arrangement") == "dilated" else 1)
        return convs(channels, [size**2, *([small**2] if small and small < reach else [])], args["bn"])

    def chain(channels: int, size: int, side: int) -> tuple[int, float]:
        links = [9] * size if args["arrangement"] == "stacked" else [size * (small or 5)] * 2
        count, maps = convs(channels, [*links, *([small**2] if small else [])], args["bn"])
        return count, maps + channels * (len(links) - 1)               # each link but the first keeps its input

    def shiftwise(channels: int, size: int, side: int) -> tuple[int, float]:
        if size <= small:
            return convs(channels, [size**2], args["depthwise_norm_skip"])
        rest = int(channels * (1 - args["ghost_ratio"])) // 2 * 2 if name in _GROWN else channels - int(
            channels * args["ghost_ratio"])
        filters = rest * ceil(size / small)
        count = args["rep_branches"] * filters * small**2
        copied = rest - channels if args["ghost_ratio"] else 0         # of those channels, in place of the input of all
        if args["norm"] == "filter":
            halo = small // 2 if args["padding"] == "full" else 0
            return (count + args["rep_branches"] * filters * 2,
                    copied + args["rep_branches"] * filters * ((side + 2 * halo) / side) ** 2)
        return count + 6 * rest, copied + 3 * rest

    def dilated(channels: int, size: int, side: int) -> tuple[int, float]:
        return convs(channels, [other**2 for other in (size, *_DILATED.get(size, ()))], size in _DILATED)

    if schema is ShiftwiseArgs:
        return shiftwise
    if schema is SlakArgs:
        return strips if args["decomposed"] else square
    if schema is EnlargedArgs:
        return {"parallel": strips, "sequential": chain, "stacked": chain}.get(args["arrangement"], square)
    return dilated if schema is UniRepArgs else None


def _cells(entry: Entry) -> list[str]:
    if not entry.trained:
        return [f"not trained: the weights of {entry.needs}"]
    if entry.same_as:
        return [f"equal to {entry.same_as} at this scale: counted there"]
    hours = "?" if entry.hours is None else f"{entry.hours:.0f}" if entry.hours >= 10 else f"{entry.hours:.3f}"
    counts = ["?" if count is None else str(count) for count in (entry.epochs, entry.steps_per_epoch, entry.steps)]
    return [*counts, _size(entry.parameters, ""), str(entry.at_once), _size(entry.memory), _size(entry.disk), hours,
            entry.needs or ""]


def _size(value: float | None, unit: str = "B") -> str:
    """1930000000 as 1.93 GB."""
    for power, letter in ((9, "G"), (6, "M"), (3, "k")):
        if value is not None and value >= 10**power:
            return f"{value / 10**power:.3g} {letter}{unit}"
    return "?" if value is None else f"{value:g} {unit}"
