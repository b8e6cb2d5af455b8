"""The report of a benchmark: Markdown made of its JSON and nothing else."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

NAMES = {
    "ours": "**ours**, strips",
    "two_step": "(a) two-step as published",
    "two_step_gather": "(a) without atomic additions",
    "two_step_taps": "(b) two-step, one depthwise convolution per tap",
    "torch_strips": "(c) strips in plain torch",
    "depthwise13": "(d) depthwise 13x13",
    "depthwise7": "(d) depthwise 7x7",
    "slak_pair": "(e) SLaK's Mx5 + 5xM",
    "ours_layer": "ours with norms and skip",
    "two_step_layer": "(a) with norms and skip",
}
MODES = {"forward": "forward", "training": "forward + backward"}


class Figures:
    """The numbers of a benchmark's JSON, by what they are of. Times are medians, in ms per image."""

    def __init__(self, record: Mapping[str, Any]) -> None:
        self.record, self.threads = record, record["plan"]["threads"]
        self.stages = {stage["number"]: stage for stage in record["plan"]["stages"]}
        self.tops = {top["threads"]: top for top in record["ceilings"]}

    def rows(self, **labels: Any) -> list[dict[str, Any]]:
        """Rows with these labels, with as many threads as the ratios are for unless they say otherwise."""
        labels = {"threads": self.threads[-1]} | labels
        return [row for row in self.record["times"] if all(row.get(name) == value for name, value in labels.items())]

    def row(self, **labels: Any) -> dict[str, Any]:
        (found,) = self.rows(**labels)
        return found

    def per_image(self, row: Mapping[str, Any], key: str = "median_ms") -> float:
        return row[key] / (row["batch"] if "batch" in row else self.stages[row["stage"]]["batch"])

    def summed(self, value: Callable[[Mapping[str, Any]], float] | None = None, **labels: Any) -> float:
        """A value per image, by default the time, over all blocks of all stages."""
        value = value or self.per_image
        return sum(stage["blocks"] * value(self.row(stage=number, **labels)) for number, stage in self.stages.items())

    def floor(self, row: Mapping[str, Any]) -> float:
        """Least ms per image: the larger of the multiplications and the bytes that have to be, at the machine's ceilings."""
        top = self.tops[row["threads"]]
        return 1e3 * max(2 * row["macs"] / top["flop_per_s"], row["bytes"] / top["bytes_per_s"])

    def above_floor(self, row: Mapping[str, Any]) -> float | None:
        return None if row["macs"] is None else self.per_image(row) / self.floor(row)

    # what the targets are about

    def gain(self, cell: str, rival: str) -> float:
        return self.summed(cell=cell, contender=rival) / self.summed(cell=cell, contender="ours")

    def least_gain(self, cell: str, rival: str, last: int) -> float:
        """Of the stages up to the last."""
        return min(self.row(cell=cell, contender=rival, stage=number)["median_ms"]
                   / self.row(cell=cell, contender="ours", stage=number)["median_ms"]
                   for number in self.stages if number <= last)

    def cost(self, mode: str, **count: int) -> float:
        one = {"edges": 1, "rep": 1}
        return self.summed(cell="counts", mode=mode, **one | count) / self.summed(cell="counts", mode=mode, **one)

    def speedup(self, cell: str) -> float:
        one, many = (self.summed(cell=cell, contender="ours", threads=n) for n in (self.threads[0], self.threads[-1]))
        return one / many

    def network_gain(self, batch: int, rival: str = "two_step") -> float:
        return (self.row(cell="network", batch=batch, contender=rival)["median_ms"]
                / self.row(cell="network", batch=batch, contender="ours")["median_ms"])

    def further_maps(self) -> float:
        """Most memory of ours in training beyond what any form must have: three sums and one gradient, in maps like x."""
        return max(m["peak"] / m["map"] for m in self.record["memory"] if m["contender"] == "ours") - 4

    def kept_maps(self) -> float:
        return max(m["saved_maps"] / m["map"] for m in self.record["memory"] if m["contender"] == "ours")


@dataclass(frozen=True)
class Target:
    """A number to reach: at least `must`, or at most where `most` is set; `aim` is what to hope for."""

    text: str
    value: Callable[[Figures], float]
    must: float
    aim: float | None = None
    most: bool = False

    def verdict(self, value: float) -> str:
        def met(bound: float) -> bool:
            return value <= bound if self.most else value >= bound

        if not met(self.must):
            return "**not reached**"
        return "reached, and the aim" if self.aim is not None and met(self.aim) else "reached"


ALWAYS = (
    Target("forward + backward: time with E = 4 / E = 1", lambda f: f.cost("training", edges=4), 1.02, most=True),
    Target("forward + backward: time with Rep = 4 / Rep = 1", lambda f: f.cost("training", rep=4), 1.02, most=True),
    Target("forward: time with E = 4 / E = 1", lambda f: f.cost("forward", edges=4), 1.02, most=True),
    Target("forward: time with Rep = 4 / Rep = 1", lambda f: f.cost("forward", rep=4), 1.02, most=True),
    Target("training: maps kept for the backward pass besides x", Figures.kept_maps, 0, most=True),
    Target("training: memory beyond x, three sums and one gradient, in maps like x", Figures.further_maps, 1, most=True),
)
TARGETS = {
    "cpu": (
        Target("forward: (a) two-step as published / ours", lambda f: f.gain("forward", "two_step"), 20, 35),
        Target("forward: (b) best composable two-step / ours", lambda f: f.gain("forward", "two_step_taps"), 9),
        Target("forward: ours / (d) depthwise 13x13", lambda f: 1 / f.gain("forward", "depthwise13"), 1.2, 0.8, most=True),
        Target("forward: (e) SLaK's pair / ours, least of stages 1-3",
               lambda f: f.least_gain("forward", "slak_pair", 3), 2.5),
        Target("forward + backward: (a) / ours", lambda f: f.gain("training", "two_step"), 15, 40),
        *ALWAYS,
        Target("forward: time with one thread / two", lambda f: f.speedup("forward"), 1.7),
        Target("forward + backward: time with one thread / two", lambda f: f.speedup("training"), 1.7),
        Target("SW-tiny, batch {first}: two-step / merged", lambda f: f.network_gain(f.record["plan"]["batches"][0]), 1.7),
        Target("SW-tiny, batch {last}: two-step / merged", lambda f: f.network_gain(f.record["plan"]["batches"][-1]), 1.7),
    ),
    "cuda": (
        Target("forward: (a) two-step as published / ours", lambda f: f.gain("forward", "two_step"), 20, 50),
        Target("forward: (e) SLaK's pair / ours", lambda f: f.gain("forward", "slak_pair"), 5, 15),
        Target("forward + backward: (a) / ours", lambda f: f.gain("training", "two_step"), 25, 60),
        *ALWAYS,
        Target("SW-tiny, batch {last}: two-step / merged", lambda f: f.network_gain(f.record["plan"]["batches"][-1]), 3, 4.5),
    ),
}


def render(record: Mapping[str, Any]) -> str:
    """The page of `operator.measure`'s record."""
    figures = Figures(record)
    parts = [_head(record), _targets(figures), _sum(figures), *(_stage(figures, number) for number in figures.stages),
             _memory(figures), _counts(figures), _network(figures), _method(record)]
    return "\n\n".join(parts) + "\n"


def _head(record: Mapping[str, Any]) -> str:
    hardware, versions, flags = record["hardware"], record["versions"], record["flags"]
    where = hardware["gpu"] if record["device"] == "cuda" else f"{hardware['cores']} cores of {hardware['cpu']}"
    trial = "**A trial on tiny maps, to see that the benchmark runs; its numbers say nothing.**\n\n" if record["quick"] else ""
    state = {True: ", with changes that are not committed", False: "", None: ""}[record["git_dirty"]]
    tops = "; ".join(
        (f"{_threads(top['threads'])}: " if len(record["ceilings"]) > 1 else "")
        + f"{top['flop_per_s'] / 1e9:.0f} GFLOP/s (float32 product of side {record['plan']['product']}), "
        f"{top['bytes_per_s'] / 1e9:.1f} GB/s (copy, read and written)" for top in record["ceilings"])
    return (
        f"# The SW operator on {where}\n\n{trial}"
        f"Made by `python -m swconv bench operator --device {record['device']}`, in float32, at {record['started']}, in "
        f"{record['seconds']:.0f} s; commit {record['git_commit'] or 'unknown'}{state}. Engine of ours: {record['engine']}. "
        f"Load before: {record['load_before']}.\n\n"
        f"Versions: {_listed(versions)}. Flags: {_listed(flags)}.\n\n"
        f"Ceilings of this machine, measured in the same run: {tops}."
    )


def _targets(figures: Figures) -> str:
    rows, (first, *_, last) = [], figures.record["plan"]["batches"]
    for target in TARGETS[figures.record["device"]]:
        value, sign = target.value(figures), "<=" if target.most else ">="
        aim = "" if target.aim is None else f"{sign} {target.aim:g}"
        rows.append([target.text.format(first=first, last=last), f"{sign} {target.must:g}", aim, _number(value, 3),
                     target.verdict(value)])
    return "## Targets\n\n" + _table(["summed over the network unless said otherwise", "needed", "aim", "measured", ""], rows)


def _sum(figures: Figures) -> str:
    blocks = sum(stage["blocks"] for stage in figures.stages.values())
    parts, few = [f"## Summed over the {blocks} blocks of the network, per image"], figures.threads[:-1]
    for cell, title in MODES.items():
        ours, rows = figures.summed(cell=cell, contender="ours"), []
        for name in _contenders(figures, cell):
            time = figures.summed(cell=cell, contender=name)
            known = all(row["macs"] is not None for row in figures.rows(cell=cell, contender=name))
            floor = _number(time / figures.summed(figures.floor, cell=cell, contender=name)) if known else ""
            slower = [figures.summed(cell=cell, contender=name, threads=n) for n in few]
            rows.append([NAMES[name], _number(time), _number(time / ours), floor,
                         *(text for ms in slower for text in (_number(ms), _number(ms / time)))])
        more = [text for n in few for text in (f"ms, {_threads(n)}", "speed-up")]
        parts.append(_table([title, "ms", "/ ours", "/ floor", *more], rows))
    return "\n\n".join(parts)


def _stage(figures: Figures, number: int) -> str:
    stage = figures.stages[number]
    parts = [f"## Stage {number}: {stage['channels']} channels of {stage['side']}x{stage['side']}, M = {stage['extent']}, "
             f"N = {stage['small']}, {stage['blocks']} blocks, batch {stage['batch']}"]
    for cell, title in MODES.items():
        ours = figures.row(cell=cell, stage=number, contender="ours")
        rows = []
        for name in _contenders(figures, cell):
            row = figures.row(cell=cell, stage=number, contender=name)
            floor = figures.above_floor(row)
            rows.append([NAMES[name], _spread(figures, row), _number(row["median_ms"] / ours["median_ms"]),
                         "" if floor is None else _number(floor), row["variant"], row["rounds"]])
        parts.append(_table([title, "ms per image (quartiles)", "/ ours", "/ floor", "format", "rounds"], rows))
    return "\n\n".join(parts)


def _memory(figures: Figures) -> str:
    names = list(dict.fromkeys(row["contender"] for row in figures.record["memory"]))
    found = {(row["contender"], row["stage"]): row for row in figures.record["memory"]}
    rows = [[NAMES[name], *(f"{_number(row['peak'] / row['map'])}; {_number(row['saved'] / row['map'])}"
                            for row in (found[name, number] for number in figures.stages))] for name in names]
    return ("## Memory of a training step, in maps of the size of x\n\n"
            "First the peak beyond what lives before the step, outputs and gradients included; then what the forward pass "
            "keeps for the backward pass, x and kernels included. Scratch room inside oneDNN is not seen.\n\n"
            + _table(["", *(f"stage {number}" for number in figures.stages)], rows))


def _counts(figures: Figures) -> str:
    pairs = list(dict.fromkeys((row["edges"], row["rep"]) for row in figures.rows(cell="counts")))
    rows = []
    for edges, rep in pairs:
        labels = {"edges": edges, "rep": rep}
        rows.append([edges, rep, *(text for mode in MODES for text in (
            _number(figures.summed(cell="counts", mode=mode, **labels)), _number(figures.cost(mode, **labels), 3)))])
    return ("## Edges and Rep branches of ours, summed over the network, per image\n\n"
            + _table(["E", "Rep", *(text for title in MODES.values() for text in (f"{title}, ms", "/ one and one"))], rows))


def _network(figures: Figures) -> str:
    rows = []
    for batch in figures.record["plan"]["batches"]:
        for row in figures.rows(cell="network", batch=batch):
            gain = figures.network_gain(batch, row["contender"])
            rows.append([batch, NAMES[row["contender"]], _spread(figures, row), _number(gain), row["variant"], row["rounds"]])
    side = figures.record["plan"]["image"]
    return (f"## The whole network SW-tiny, images of {side}x{side}, evaluation\n\n"
            + _table(["batch", "mixers", "ms per image (quartiles)", "/ ours", "format", "rounds"], rows))


def _method(record: Mapping[str, Any]) -> str:
    worst = max((row for row in record["errors"] if row["of"] != "network"), key=lambda row: row["error"])
    network = max(row["error"] for row in record["errors"] if row["of"] == "network")
    plan = record["plan"]
    ratios = f" Ratios are for {_threads(plan['threads'][-1])}." if len(plan["threads"]) > 1 else ""
    return f"""## What was measured

Before any timing every form of the operator was held against its definition in float64. The largest relative error of outputs,
sums and gradients was {worst['error']:.1e} (stage {worst['stage']}, {NAMES[worst['contender']].replace('*', '')}), of the
networks' outputs {network:.1e}; {record['tolerance']['operator']:.0e} and {record['tolerance']['network']:.0e} would have
stopped the run. The convolutions of (d) and (e) are torch's own.

In every round each contender ran once, in an order drawn anew, short calls several times; times are medians over the rounds.
Memory that was freed stays with the process, as in training (swconv/training/memory.py).
Inputs and gradients were taken in turn from {plan['pool'] / 2**20:g} MiB per memory format. Each contender ran in the memory
format, contiguous or channels_last, that was faster in a first probe; (d) and (e) also with the padding, inside the convolution
or before it, that was.{ratios}

Forward is what inference does: from x to the sum of three norms and the skip. Ours and (c) have norms and skip in their
kernels; (a) and (b) have their Rep branches summed, convolve with every filter, shift, add, and apply the norms.

Forward + backward is from x and the filters (two Rep branches, four edges) to the three sums, and from their gradients back to
both. The norms, which all forms share, are left out; the two lines with norms and skip have them, with statistics of the
batch: what one layer costs in training.

The floor of a form is the larger of its multiplications that hit the map, at the speed of the product above, and of the bytes
that it has to read and write once, at that of the copy. All forms of the operator share one floor, that of the plus-shaped
kernel, in training that of its three parts."""


def _contenders(figures: Figures, cell: str) -> list[str]:
    return [name for name in NAMES if figures.rows(cell=cell, contender=name)]


def _spread(figures: Figures, row: Mapping[str, Any]) -> str:
    middle, low, high = (_number(figures.per_image(row, key)) for key in ("median_ms", "q1_ms", "q3_ms"))
    return f"{middle} ({low}-{high})"


def _threads(count: int) -> str:
    return f"{count} thread{'s' * (count > 1)}"


def _number(value: float, digits: int = 2) -> str:
    """Three figures or more, without an exponent."""
    if value == 0:
        return "0"
    decimals = {True: digits, abs(value) >= 10: 1, abs(value) >= 100: 0, abs(value) < 1: 3}[True]
    return f"{value:.{decimals}f}"


def _listed(known: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in known.items() if value is not None)


def _table(head: Sequence[Any], rows: Iterable[Sequence[Any]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
