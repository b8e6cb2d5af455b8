"""The report of a benchmark: Markdown made of its JSON and nothing else."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from swconv.bench.circumstances import stopped

NAMES = {
    "ours": "**ours**, strips",
    "two_step": "(a) two-step as published",
    "two_step_summed": "(a) with its Rep branches summed first",
    "two_step_gather": "(a) with its Rep branches summed first, without atomic additions",
    "two_step_taps": "(b) two-step, one depthwise convolution per tap",
    "torch_strips": "(c) strips in plain torch",
    "depthwise13": "(d) depthwise 13x13",
    "depthwise7": "(d) depthwise 7x7",
    "slak_pair": "(e) SLaK's Mx5 + 5xM",
    "ours_layer": "ours with norms and skip",
    "two_step_layer": "(a) with norms and skip",
}
MODES = {"forward": "forward", "training": "forward + backward"}
PRECISIONS = {"float32": "float32", "tf32": "TF32", "bfloat16": "bfloat16"}


class Missing(LookupError):
    """A number that the record does not hold, or not of every stage."""


class Figures:
    """The numbers of a benchmark's JSON, by what they are of. Times are medians, in ms per image."""

    def __init__(self, record: Mapping[str, Any]) -> None:
        self.record, self.threads = record, record["plan"]["threads"]
        self.stages = {stage["number"]: stage for stage in record["plan"]["stages"]}
        self.tops = {(top["threads"], top["precision"]): top for top in record["ceilings"]}
        self.precisions, self.deciding = record["plan"]["precisions"], record["plan"]["deciding"]

    def rows(self, **labels: Any) -> list[dict[str, Any]]:
        """Rows with these labels; with as many threads as the ratios are for, and in float32, unless they say otherwise."""
        labels = {"threads": self.threads[-1], "precision": "float32"} | labels
        return [row for row in self.record["times"] if all(row.get(name) == value for name, value in labels.items())]

    def row(self, **labels: Any) -> dict[str, Any]:
        found = self.rows(**labels)
        if not found:
            raise Missing(labels)
        (one,) = found
        return one

    def per_image(self, row: Mapping[str, Any], key: str = "median_ms") -> float:
        return row[key] / (row["batch"] if "batch" in row else self.stages[row["stage"]]["batch"])

    def summed(self, value: Callable[[Mapping[str, Any]], float] | None = None, **labels: Any) -> float:
        """A value per image, by default the time, over all blocks of all stages."""
        value = value or self.per_image
        return sum(stage["blocks"] * value(self.row(stage=number, **labels)) for number, stage in self.stages.items())

    def floor(self, row: Mapping[str, Any]) -> float:
        """Least ms per image: the larger of the multiplications and the bytes that have to be, at the machine's ceilings."""
        top = self.tops[row["threads"], row["precision"]]
        return 1e3 * max(2 * row["macs"] / top["flop_per_s"], row["bytes"] / top["bytes_per_s"])

    def above_floor(self, row: Mapping[str, Any]) -> float | None:
        return None if row["macs"] is None else self.per_image(row) / self.floor(row)

    # what the targets are about. The two-step forms are float32 only, other rivals run in the precision of ours.

    def _time(self, name: str, precision: str, **labels: Any) -> float:
        return self.summed(contender=name, precision="float32" if name.startswith("two_step") else precision, **labels)

    def gain(self, cell: str, rival: str, precision: str = "float32") -> float:
        return self._time(rival, precision, cell=cell) / self._time("ours", precision, cell=cell)

    def least_gain(self, cell: str, rival: str, last: int) -> float:
        """Of the stages up to the last."""
        return min(self.row(cell=cell, contender=rival, stage=number)["median_ms"]
                   / self.row(cell=cell, contender="ours", stage=number)["median_ms"]
                   for number in self.stages if number <= last)

    def share_of_floor(self, number: int, precision: str) -> float:
        return 1 / self.above_floor(self.row(cell="forward", contender="ours", stage=number, precision=precision))

    def cost(self, mode: str, precision: str = "float32", **count: int) -> float:
        one, labels = {"edges": 1, "rep": 1}, {"cell": "counts", "mode": mode, "precision": precision}
        return self.summed(**labels, **one | count) / self.summed(**labels, **one)

    def speedup(self, cell: str) -> float:
        one, many = (self.summed(cell=cell, contender="ours", threads=n) for n in (self.threads[0], self.threads[-1]))
        return one / many

    def network_gain(self, batch: int, rival: str = "two_step", precision: str = "float32", launched: str = "eager") -> float:
        labels = {"cell": "network", "batch": batch, "launched": launched}
        theirs = "float32" if rival.startswith("two_step") else precision
        return (self.row(contender=rival, precision=theirs, **labels)["median_ms"]
                / self.row(contender="ours", precision=precision, **labels)["median_ms"])

    def further_maps(self) -> float:
        """Most memory of ours in training beyond what any form must have: three sums and one gradient, in maps like x."""
        return self._most("peak") - 4

    def kept_maps(self) -> float:
        return self._most("saved_maps")

    def _most(self, what: str) -> float:
        """Memory of ours, in maps like x: the largest of all stages and precisions, the deciding ones among them."""
        found = [m for m in self.record["memory"] if m["contender"] == "ours"]
        if not {(m["stage"], m["precision"]) for m in found} >= {(n, name) for n in self.stages for name in self.deciding}:
            raise Missing(what)
        return max(m[what] / m["map"] for m in found)

    def launch(self, name: str, precision: str) -> float:
        """Microseconds of the CPU for an eager call, mean over the stages."""
        found = [row["median_us"] for row in self.record["launches"]
                 if (row["contender"], row["precision"]) == (name, precision)]
        if len(found) < len(self.stages):
            raise Missing(name)
        return sum(found) / len(found)


@dataclass(frozen=True)
class Target:
    """A number to reach: at least `must`, or at most where `most` is set; `aim` is what to hope for. Of one stage or of all."""

    text: str
    value: Callable[[Figures], float]
    must: float
    aim: float | None = None
    most: bool = False
    stage: int | None = None

    def verdict(self, value: float) -> str:
        def met(bound: float) -> bool:
            return value <= bound if self.most else value >= bound

        if not met(self.must):
            return "**not reached**"
        return "reached, and the aim" if self.aim is not None and met(self.aim) else "reached"


def _counts_targets(precision: str, title: str = "") -> tuple[Target, ...]:
    return tuple(
        Target(f"{MODES[mode]}{title}: time with {name} = 4 / {name} = 1",
               lambda f, mode=mode, label=label: f.cost(mode, precision, **{label: 4}), 1.02, most=True)
        for mode in ("training", "forward") for name, label in (("E", "edges"), ("Rep", "rep")))


MEMORY_TARGETS = (
    Target("training: maps kept for the backward pass besides x", Figures.kept_maps, 0, most=True),
    Target("training: memory beyond x, three sums and one gradient, in maps like x", Figures.further_maps, 1, most=True),
)
TARGETS = {
    "cpu": (
        Target("forward: (a) two-step as published / ours", lambda f: f.gain("forward", "two_step"), 20, 35),
        Target("the same in an ordinary process", lambda f: f.gain("ordinary forward", "two_step"), 20, 35),
        Target("forward: (b) best composable two-step / ours", lambda f: f.gain("forward", "two_step_taps"), 9),
        Target("forward: ours / (d) depthwise 13x13", lambda f: 1 / f.gain("forward", "depthwise13"), 1.2, 0.8, most=True),
        Target("forward: (e) SLaK's pair / ours, least of stages 1-3",
               lambda f: f.least_gain("forward", "slak_pair", 3), 2.5),
        Target("forward + backward: (a) / ours", lambda f: f.gain("training", "two_step"), 15, 40),
        Target("the same in an ordinary process", lambda f: f.gain("ordinary training", "two_step"), 15, 40),
        *_counts_targets("float32"), *MEMORY_TARGETS,
        Target("forward: time with one thread / two", lambda f: f.speedup("forward"), 1.7),
        Target("forward + backward: time with one thread / two", lambda f: f.speedup("training"), 1.7),
        Target("SW-tiny, batch {first}: two-step / merged", lambda f: f.network_gain(f.record["plan"]["batches"][0]), 1.7),
        Target("SW-tiny, batch {last}: two-step / merged", lambda f: f.network_gain(f.record["plan"]["batches"][-1]), 1.7),
    ),
    "cuda": (
        Target("forward, float32: (a) two-step as published / ours", lambda f: f.gain("forward", "two_step"), 20, 50),
        Target("forward: (a) in float32 / ours in bfloat16", lambda f: f.gain("forward", "two_step", "bfloat16"), 60, 200),
        *(Target(f"forward, bfloat16, stage {number}: floor / ours",
                 lambda f, number=number: f.share_of_floor(number, "bfloat16"), must, aim, stage=number)
          for number, must, aim in ((1, 0.45, 0.8), (2, 0.55, 0.85), (3, 0.55, 0.85), (4, 0.5, 0.75))),
        Target("forward, float32: (e) SLaK's pair / ours", lambda f: f.gain("forward", "slak_pair"), 5, 15),
        Target("forward, bfloat16: (e) / ours", lambda f: f.gain("forward", "slak_pair", "bfloat16"), 10, 40),
        Target("forward + backward, float32: (a) / ours", lambda f: f.gain("training", "two_step"), 25, 60),
        Target("forward + backward: (a) in float32 / ours in bfloat16",
               lambda f: f.gain("training", "two_step", "bfloat16"), 25, 120),
        *_counts_targets("float32", ", float32"), *_counts_targets("bfloat16", ", bfloat16"), *MEMORY_TARGETS,
        Target("SW-tiny as a CUDA graph, batch {last}, float32: two-step / merged",
               lambda f: f.network_gain(f.record["plan"]["batches"][-1], launched="graph"), 3, 4.5),
        Target("SW-tiny as a CUDA graph, batch {last}: two-step in float32 / merged in bfloat16",
               lambda f: f.network_gain(f.record["plan"]["batches"][-1], precision="bfloat16", launched="graph"), 6, 12),
        *(Target(f"CPU's time for an eager call of ours, {precision}, us",
                 lambda f, precision=precision: f.launch("ours", precision), 12, 6, most=True)
          for precision in ("float32", "bfloat16")),
    ),
}


def render(record: Mapping[str, Any]) -> str:
    """The page of `operator.measure`'s record."""
    figures = Figures(record)
    parts = [_head(record), _targets(figures), _sum(figures), *(_stage(figures, number) for number in figures.stages),
             _memory(figures), _counts(figures), _network(figures), _launches(figures), _method(record)]
    return "\n\n".join(filter(None, parts)) + "\n"


def _head(record: Mapping[str, Any]) -> str:
    hardware, versions, flags = record["hardware"], record["versions"], record["flags"]
    where = hardware["gpu"] if record["device"] == "cuda" else f"{hardware['cores']} cores of {hardware['cpu']}"
    trial = "**A trial on tiny maps, to see that the benchmark runs; its numbers say nothing.**\n\n" if record["quick"] else ""
    state = {True: ", with changes that are not committed", False: "", None: ""}[record["git_dirty"]]
    several, side = len({top["threads"] for top in record["ceilings"]}) > 1, record["plan"]["product"]
    tops = "; ".join(
        (f"{_threads(top['threads'])}: " if several else "")
        + f"{top['flop_per_s'] / 1e9:.0f} GFLOP/s ({PRECISIONS[top['precision']]} product of side {side}), "
        f"{top['bytes_per_s'] / 1e9:.1f} GB/s (copy, read and written)" for top in record["ceilings"])
    precisions = ", ".join(PRECISIONS[name] for name in record["plan"]["precisions"])
    return (
        f"# The SW operator on {where}\n\n{trial}{stopped(record)}"
        f"Made by `python -m swconv bench operator --device {record['device']}`, in {precisions}, at {record['started']}, in "
        f"{record['seconds']:.0f} s; commit {record['git_commit'] or 'unknown'}{state}. Engine of ours in float32: "
        f"{record['engine']}. Load before: {record['load_before']}.\n\n"
        f"Versions: {_listed(versions)}. Flags: {_listed(flags)}.\n\n"
        f"Ceilings of this machine, measured in the same run: {tops}."
    )


def _targets(figures: Figures) -> str:
    rows, (first, *_, last) = [], figures.record["plan"]["batches"]
    for target in TARGETS[figures.record["device"]]:
        if target.stage is not None and target.stage not in figures.stages:
            continue                                                  # of a trial
        sign = "<=" if target.most else ">="
        aim = "" if target.aim is None else f"{sign} {target.aim:g}"
        try:
            value = target.value(figures)
            told = _number(value, 3), target.verdict(value)
        except Missing:
            told = "", "not measured"
        rows.append([target.text.format(first=first, last=last), f"{sign} {target.must:g}", aim, *told])
    return "## Targets\n\n" + _table(["summed over the network unless said otherwise", "needed", "aim", "measured", ""], rows)


def _sum(figures: Figures) -> str:
    blocks = sum(stage["blocks"] for stage in figures.stages.values())
    parts, few = [f"## Summed over the {blocks} blocks of the network, per image"], figures.threads[:-1]

    def line(name: str, labels: Mapping[str, str], text: str) -> list[str]:
        time, ours = (figures.summed(contender=some, **labels) for some in (name, "ours"))
        known = all(row["macs"] is not None for row in figures.rows(contender=name, **labels))
        floor = _number(time / figures.summed(figures.floor, contender=name, **labels)) if known else ""
        slower = [figures.summed(contender=name, threads=n, **labels) for n in few]
        return [text, _number(time), _number(time / ours), floor,
                *(text for ms in slower for text in (_number(ms), _number(ms / time)))]

    ordinary = {f"ordinary {cell}": f"{title}, in an ordinary process" for cell, title in MODES.items()}
    for cell, title in (MODES | ordinary).items():
        more = [text for n in few for text in (f"ms, {_threads(n)}", "speed-up")]
        parts.append(_table([title, "ms", "/ ours", "/ floor", *more], _known(line, _contenders(figures, cell))))
    return _section(*parts)


def _stage(figures: Figures, number: int) -> str:
    stage = figures.stages[number]
    parts = [f"## Stage {number}: {stage['channels']} channels of {stage['side']}x{stage['side']}, M = {stage['extent']}, "
             f"N = {stage['small']}, {stage['blocks']} blocks, batch {stage['batch']}"]

    def line(name: str, labels: Mapping[str, str], text: str) -> list[Any]:
        row, ours = (figures.row(stage=number, contender=some, **labels) for some in (name, "ours"))
        floor = figures.above_floor(row)
        return [text, _spread(figures, row), _number(row["median_ms"] / ours["median_ms"]),
                "" if floor is None else _number(floor), _ran_as(figures, row), row["rounds"]]

    for cell, title in MODES.items():
        parts.append(_table([title, "ms per image (quartiles)", "/ ours", "/ floor", "format", "rounds"],
                            _known(line, _contenders(figures, cell))))
    return _section(*parts)


def _ran_as(figures: Figures, row: Mapping[str, Any]) -> str:
    called = figures.record["device"] == "cuda" and row["launched"] == "eager"
    return row["variant"] + (", no CUDA graph" if called else "")


def _memory(figures: Figures) -> str:
    found = {(row["contender"], row["precision"], row["stage"]): row for row in figures.record["memory"]}
    rows = [[_named(figures, name, precision), *(f"{_number(row['peak'] / row['map'])}; {_number(row['saved'] / row['map'])}"
                                                 if row else "" for row in (found.get((name, precision, number))
                                                                            for number in figures.stages))]
            for name, precision in dict.fromkeys(key[:2] for key in found)]
    return _section("## Memory of a training step, in maps of the size of x\n\n"
                    "First the peak beyond what lives before the step, outputs and gradients included; then what the forward "
                    "pass keeps for the backward pass, x and kernels included. Scratch room inside oneDNN is not seen.",
                    _table(["", *(f"stage {number}" for number in figures.stages)], rows))


def _counts(figures: Figures) -> str:
    def line(precision: str, edges: int, rep: int) -> list[Any]:
        labels = {"edges": edges, "rep": rep, "precision": precision}
        return [PRECISIONS[precision], edges, rep, *(text for mode in MODES for text in (
            _number(figures.summed(cell="counts", mode=mode, **labels)), _number(figures.cost(mode, **labels), 3)))]

    known = dict.fromkeys((precision, row["edges"], row["rep"]) for precision in figures.deciding
                          for row in figures.rows(cell="counts", precision=precision))
    head = ["", "E", "Rep", *(text for title in MODES.values() for text in (f"{title}, ms", "/ one and one"))]
    return _section("## Edges and Rep branches of ours, summed over the network, per image", _table(head, _known(line, known)))


def _network(figures: Figures) -> str:
    rows = []
    for batch in figures.record["plan"]["batches"]:
        for launched, way in (("eager", ""), ("graph", ", as a CUDA graph")):
            for precision in figures.deciding:
                for row in figures.rows(cell="network", batch=batch, precision=precision, launched=launched):
                    gain = figures.network_gain(batch, row["contender"], precision, launched)
                    rows.append([f"{batch}{way}", _named(figures, row["contender"], precision), _spread(figures, row),
                                 _number(gain), row["variant"], row["rounds"]])
    side = figures.record["plan"]["image"]
    return _section(f"## The whole network SW-tiny, images of {side}x{side}, evaluation",
                    _table(["batch", "mixers", "ms per image (quartiles)", "/ ours", "format", "rounds"], rows))


def _launches(figures: Figures) -> str:
    """On a GPU only: elsewhere a call and its work are one."""
    found = figures.record["launches"]
    rows = [[_named(figures, name, precision), *(_number(row["median_us"]) for row in found
                                                 if (row["contender"], row["precision"]) == (name, precision))]
            for name, precision in dict.fromkeys((row["contender"], row["precision"]) for row in found)]
    head = ["forward, one image, eager", *(f"stage {number}" for number in figures.stages)]
    return _section("## Microseconds of the CPU for a call, which a CUDA graph spares", _table(head, rows))


def _method(record: Mapping[str, Any]) -> str:
    plan, cuda, allowed = record["plan"], record["device"] == "cuda", record["tolerance"]
    several = len(plan["precisions"]) > 1
    told = []
    for precision in plan["precisions"]:
        rows = [row for row in record["errors"] if row["precision"] == precision]
        if not rows:
            continue                                                  # of a run that was stopped
        worst = max((row for row in rows if row["of"] != "network"), key=lambda row: row["error"])
        networks = [row["error"] for row in rows if row["of"] == "network"]
        network = [f", of the networks' outputs {max(networks):.1e} ({allowed['network'][precision]:.0e})"] if networks else []
        told.append(f"{worst['error']:.1e} (stage {worst['stage']}, {NAMES[worst['contender']].replace('*', '')}; "
                    f"{allowed['operator'][precision]:.0e} would have stopped the run)" + "".join(network)
                    + (f" in {PRECISIONS[precision]}" if several else ""))
    ratios = f" Ratios are for {_threads(plan['threads'][-1])}." if len(plan["threads"]) > 1 else ""
    formats = ("the memory format that was faster in a first probe, of those that it took part in" if cuda else
               "the memory format, contiguous or channels_last, that was faster in a first probe; (d) and (e) also with the "
               "padding, inside the\nconvolution or before it, that was")
    ordinary = "" if cuda else (", which spares the large maps of the two-step form\nmost; an ordinary process is one that was "
                                "not told so")
    untimed = ("A call whose time was not taken went before: else short calls would pay for what the contender before left to "
               "be\nwritten to memory, and for waking the threads.\n") if plan["forward"].get("untimed") else ""
    graphs = ("\n\nThe operator was timed as CUDA graphs, each with a call for every set of inputs: launches by the CPU, which "
              "would hide the kernels, are told apart. Ours ran in both memory formats, as did (d) 7x7 in bfloat16, all else "
              "contiguous only, for which torch has depthwise kernels of its own; of both formats one that took more than "
              "twice as long as the other on a few images was left out. cuDNN searched for its kernels for what was timed, and "
              "chose them by its rules for what was held against float64 and for those few images. What decides was compared "
              "first, ours among it, and the rest of a precision later: its ratios to ours are of two comparisons.\n\n"
              "(a) and (b) are float32 in every comparison, as published; ratios in a row of "
              "another precision are to ours in that precision.") if cuda else ""
    return f"""## What was measured

Before any timing every form was held against its definition in float64, on a few images at both ends of the batch. The largest
relative error of outputs, sums and gradients was {'; '.join(told)}. The convolutions of (d) and (e) are torch's own.

In every round each contender ran once, in an order drawn anew, short calls several times; times are medians over the rounds.
{untimed}Memory that was freed stays with the process, as in training (swconv/training/memory.py){ordinary}.
Inputs and gradients were taken in turn from {plan['pool'] / 2**20:g} MiB (of float32) per memory format. Each contender ran in
{formats}.{ratios}{graphs}

Forward is what inference does: from x to the sum of three norms and the skip. Ours and (c) have norms and skip in their
kernels; (a) and (b) have their Rep branches summed, convolve with every filter, shift, add, and apply the norms.

Forward + backward is from x and the filters (two Rep branches, four edges) to the three sums, and from their gradients back to
both. As published every Rep branch of (a) convolves, and the branches' maps are summed: so do (a) and its line with norms and
skip; the other two-step forms sum the branches' filters first. The norms, which all forms share, are left out; the two lines
with norms and skip have them, with statistics of the batch: what one layer costs in training.

The floor of a form is the larger of its multiplications that hit the map, at the speed of the product above, and of the bytes
that it has to read and write once, at that of the copy. All forms of the operator share one floor, that of the plus-shaped
kernel, in training that of its three parts."""


def _contenders(figures: Figures, cell: str) -> list[tuple[str, dict[str, str], str]]:
    """Of a cell: name, labels and title of everything that was timed, by precision."""
    return [(name, {"cell": cell, "precision": precision}, _named(figures, name, precision))
            for precision in figures.precisions for name in NAMES
            if figures.rows(cell=cell, contender=name, precision=precision)]


def _named(figures: Figures, name: str, precision: str) -> str:
    return NAMES[name] + (f", {PRECISIONS[precision]}" if len(figures.precisions) > 1 else "")


def _spread(figures: Figures, row: Mapping[str, Any]) -> str:
    middle, low, high = (_number(figures.per_image(row, key)) for key in ("median_ms", "q1_ms", "q3_ms"))
    return f"{middle} ({low}-{high})"


def _threads(count: int) -> str:
    return f"{count} thread{'s' * (count > 1)}"


def _number(value: float, digits: int = 2) -> str:
    """Three figures or more, without an exponent."""
    if value == 0:
        return "0"
    small = 2 - math.floor(math.log10(abs(value)))
    decimals = {True: digits, abs(value) >= 10: 1, abs(value) >= 100: 0, abs(value) < 1: 3, abs(value) < 0.1: small}[True]
    return f"{value:.{decimals}f}"


def _listed(known: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in known.items() if value is not None)


def _known(line: Callable[..., list[Any]], entries: Iterable[Sequence[Any]]) -> list[list[Any]]:
    """The lines of entries of which the record holds all numbers."""
    found = []
    for entry in entries:
        with suppress(Missing):
            found.append(line(*entry))
    return found


def _section(title: str, *tables: str) -> str:
    """Nothing where no table has a row."""
    return "\n\n".join([title, *filter(None, tables)]) if any(tables) else ""


def _table(head: Sequence[Any], rows: Iterable[Sequence[Any]]) -> str:
    rows = list(rows)
    if not rows:
        return ""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
