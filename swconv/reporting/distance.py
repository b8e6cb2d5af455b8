"""Accuracy against distance on the digit task: one slope per seed, a shape per line, and the long-range claim."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from swconv.reporting import statistics
from swconv.reporting.comparison import NO_VERDICT, Comparison, Control, Row
from swconv.reporting.figures import Line, draw_lines
from swconv.reporting.runs import Run
from swconv.reporting.statistics import Interval
from swconv.reporting.table import interval_text, markdown_table

CELL_PIXELS = 8  # the task counts distances in cells
CHANCE = 10.0  # %, ten balanced classes
LAYOUT_CEILING = 43.0  # %, the best rule that sees where the four digits lie but not the marker
FLAT_MARGIN = 2.5  # points per cell: "flat" asks for the whole interval within it; fixed before the table's runs
PER_CELL = f"per {CELL_PIXELS} px"


@dataclass(frozen=True)
class ByDistance:
    """Top-1 by distance of one row or control.

    Attributes
    ----------
    label : str
    runs : tuple of Run
    distances : tuple of int
        In cells.
    accuracies : tuple of tuples of float, [distance][seed]
        In %.
    """

    label: str
    runs: tuple[Run, ...]
    distances: tuple[int, ...]
    accuracies: tuple[tuple[float, ...], ...]

    @property
    def slopes(self) -> list[float]:
        """Per seed, in points per cell."""
        return [statistics.slope(self.distances, values) for values in zip(*self.accuracies, strict=True)]

    @property
    def slope(self) -> Interval:
        return statistics.mean_interval(self.slopes)

    @property
    def top1(self) -> float:
        return statistics.mean([run.values["top1"] for run in self.runs])

    @property
    def shape(self) -> str:
        """``flat``, ``falling``, ``rising``, ``undecided``, or `NO_VERDICT`."""
        slope = self.slope
        if not slope.decidable:
            return NO_VERDICT
        if slope.low >= -FLAT_MARGIN and slope.high <= FLAT_MARGIN:
            return "flat"
        return {1: "rising", -1: "falling", 0: "undecided"}[slope.sign]


def steps(comparison: Comparison) -> list[int]:
    """The distances, in cells, by which any finished run has results."""
    return _steps(comparison.finished)


def by_distance(comparison: Comparison, run: str, label: str) -> ByDistance | None:
    """The results by distance that stand behind a row; None where there are fewer than two distances."""
    results = comparison.of(run)
    distances = _steps(results.ended)
    if len(distances) < 2:
        return None
    accuracies = tuple(tuple(results.values(f"top1_distance_{distance}")) for distance in distances)
    return ByDistance(label, results.ended, tuple(distances), accuracies)


def compared_lines(comparison: Comparison, rows: Sequence[Row], controls: Sequence[Control]) -> dict[str, ByDistance]:
    """By run id: the rows that have a control, then the controls; only those that were run."""
    of = {control.of for control in controls}
    named = [(row.run, f"{row.label} {row.model}") for row in rows if row.run in of]
    named += [(control.run, control.model) for control in controls]
    found = {run: by_distance(comparison, run, label) for run, label in named}
    return {run: line for run, line in found.items() if line is not None}


def slope_differences(lines: Mapping[str, ByDistance], controls: Sequence[Control]) -> dict[str, Interval]:
    """By control, where it and its row were run: the row's slope minus the control's, in points per cell."""
    return {
        control.run: statistics.welch_interval(lines[control.of].slopes, lines[control.run].slopes)
        for control in controls
        if control.of in lines and control.run in lines
    }


def draw(lines: Mapping[str, ByDistance], profile: str, path: Path) -> None:
    """Draw the lines, the layout ceiling and chance."""
    draw_lines(
        [
            Line(
                label=f"{line.label} (n = {len(line.runs)})",
                x=[distance * CELL_PIXELS for distance in line.distances],
                mean=[statistics.mean(values) for values in line.accuracies],
                sd=[statistics.sd(values) for values in line.accuracies],
            )
            for line in lines.values()
        ],
        levels=[
            (f"best rule without the marker, {LAYOUT_CEILING:.0f} %", LAYOUT_CEILING),
            (f"chance, {CHANCE:.0f} %", CHANCE),
        ],
        title=f"Accuracy against distance, {profile} task (mean ± sd over seeds)",
        labels=("distance between marker and target, pixels", "top-1, %"),
        path=path,
    )


def caption(profile: str) -> str:
    """What the figure shows, and where its reference levels come from."""
    return (
        f"Top-1 on the {profile} task by the distance between the marker and the digit it points to; mean, and a band "
        f"of one sd over seeds. Dashed: {LAYOUT_CEILING:.0f} %, what the best rule reaches that sees where the four "
        "digits lie but not the marker (exact posterior over layouts, averaged over 4000 drawn layouts; "
        "`tests/reporting/test_distance.py` computes it anew). Dotted: chance."
    )


def report(
    lines: Mapping[str, ByDistance], differences: Mapping[str, Interval], rows: Sequence[Row], controls: Sequence[Control]
) -> str:
    """Slopes and shapes, and for every control whether "SW flat, control falling" holds.

    Parameters
    ----------
    lines : mapping of run id to ByDistance
        From `compared_lines`.
    differences : mapping of control's run id to Interval
        From `slope_differences`.
    rows : sequence of Row
    controls : sequence of Control
    """
    if not lines:
        return "Not run: there is no result by distance."
    table = markdown_table(
        ["line", f"slope, points {PER_CELL} (95 %)", "shape"],
        [[line.label, interval_text(line.slope, 1), line.shape] for line in lines.values()],
    )
    labels = {row.run: row.label for row in rows}
    claims = [
        _claim(labels[control.of], lines[control.of], lines[control.run], differences[control.run])
        for control in controls
        if control.run in differences
    ]
    method = (
        "One slope per seed, then Student's t interval over seeds. Flat: the interval lies wholly within "
        f"±{FLAT_MARGIN} points {PER_CELL}, a margin fixed before these runs; else falling or rising where the "
        "interval excludes 0, else undecided."
    )
    return "\n\n".join([table, *claims, method])


def _claim(label: str, sw: ByDistance, control: ByDistance, difference: Interval) -> str:
    shapes = (sw.shape, control.shape)
    if NO_VERDICT in shapes:
        verdict = NO_VERDICT
    elif shapes == ("flat", "falling"):
        verdict = "holds"
    else:
        verdict = "undecided" if "undecided" in shapes else "does not hold"
    sentences = [f"**{label} flat, control ({control.label}) falling: {verdict}.**"]
    if verdict != NO_VERDICT:
        sentences.append(f"{label} is {shapes[0]}, the control {shapes[1]}.")
    sentences.append(f"Their slopes differ by {interval_text(difference, 1)} points {PER_CELL}.")
    sentences += [
        f"{name} has {line.top1:.1f} % over all distances, below the {LAYOUT_CEILING:.0f} % that need no marker: it "
        "may not use the relation at all, and then its slope says nothing about range."
        for name, line in ((label, sw), ("The control", control))
        if line.top1 < LAYOUT_CEILING
    ]
    return " ".join(sentences)


def _steps(runs: Sequence[Run]) -> list[int]:
    found = {re.fullmatch(r"top1_distance_(\d+)", name) for run in runs for name in run.values}
    return sorted({int(match[1]) for match in found if match})
