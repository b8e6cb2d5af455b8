"""Figures of runs: accuracy along an axis of settings, and loss and accuracy as training goes on."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from swconv.atomic import write_atomic
from swconv.reporting import statistics
from swconv.reporting.comparison import Comparison, Row
from swconv.reporting.figures import Line, draw_lines
from swconv.reporting.runs import Evidence

LOSS, TOP1 = "training loss", "top-1, %"


@dataclass(frozen=True)
class Panel:
    """One drawing: its lines, what its axes are, and whether x is logarithmic."""

    profile: str
    title: str
    labels: tuple[str, str]
    lines: Sequence[Line]
    limits: tuple[float, float | None]
    logarithmic: bool = False


def along(comparison: Comparison, rows: Sequence[Row], axis: str, logarithmic: bool) -> Panel:
    """Top-1 of rows that stand on an axis, one point each.

    Parameters
    ----------
    comparison : Comparison
    rows : sequence of Row
        Each with its place, ``at``.
    axis : str
        What the axis is.
    logarithmic : bool
    """
    points = sorted((row.at, values) for row in rows if (values := comparison.top1(row.run)))
    line = Line(
        label="top-1, mean ± sd over seeds",
        x=[at for at, _ in points],
        mean=[statistics.mean(values) for _, values in points],
        sd=[statistics.sd(values) for _, values in points],
    )
    title = f"Top-1 against the {axis}, profile {comparison.profile}"
    return Panel(comparison.profile, title, (axis, TOP1), [line] if points else [], (0, 100), logarithmic)


def over_epochs(comparison: Comparison, evidence: Evidence, rows: Sequence[Row]) -> tuple[Panel, Panel]:
    """Training loss and validation top-1 over epochs, mean and sd over seeds, from the logs of training."""
    panels = []
    for name, label, limits in (("train_loss", LOSS, (0, None)), ("top1", TOP1, (0, 100))):
        lines = []
        for row in rows:
            if row.run not in comparison.results:
                continue
            source = comparison.sources[row.run]
            logs = [log for run in comparison.of(row.run).ended if (log := evidence.epochs(source, run.seed))]
            found = [{line["epoch"]: line[name] for line in log if name in line} for log in logs]
            epochs = [epoch for epoch in found[0] if all(epoch in values for values in found)] if found else []
            drawn = [[values[epoch] for values in found] for epoch in epochs]
            if epochs:
                means, spreads = [statistics.mean(values) for values in drawn], [statistics.sd(values) for values in drawn]
                lines.append(Line(f"{row.label} (n = {len(logs)})", epochs, means, spreads))
        title = f"{label.partition(',')[0].capitalize()} over epochs, profile {comparison.profile}"
        panels.append(Panel(comparison.profile, title, ("epoch", label), lines, limits))
    return panels[0], panels[1]


def draw(panels: Sequence[tuple[Panel, Path]]) -> None:
    """Draw panels, each into its file."""
    for panel, path in panels:
        draw_lines(panel.lines, (), panel.title, panel.labels, path, panel.limits, panel.logarithmic)


def write_points(panels: Sequence[Panel], path: Path) -> None:
    """All that is drawn, one point a line: profile, line, x and its name, y and its name, sd over seeds."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["profile", "line", "x_is", "x", "y_is", "y_mean", "y_sd"])
    for panel in panels:
        for line in panel.lines:
            for x, y, sd in zip(line.x, line.mean, line.sd, strict=True):
                spread = "" if sd is None else round(sd, 4)
                writer.writerow([panel.profile, line.label, panel.labels[0], x, panel.labels[1], round(y, 4), spread])
    write_atomic(path, text.getvalue().encode())
