"""Figures as SVG: the same numbers give the same bytes, whatever the user's matplotlib settings."""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from swconv.atomic import write_atomic

STYLES = (("#0072B2", "o"), ("#D55E00", "s"), ("#CC79A7", "^"), ("#009E73", "D"), ("#E69F00", "v"), ("#56B4E9", "P"))
MOST_TICKS = 12  # of x; more places than that get round ones
LEVEL_STYLES = ((0, (5, 3)), (0, (1, 2)))  # of reference lines


@dataclass(frozen=True)
class Line:
    """One line with its band; ``sd`` is None where one seed gives no band. All of one length."""

    label: str
    x: Sequence[float]
    mean: Sequence[float]
    sd: Sequence[float | None]


def draw_lines(
    lines: Sequence[Line],
    levels: Sequence[tuple[str, float]],
    title: str,
    labels: tuple[str, str],
    path: Path,
    limits: tuple[float, float | None] = (0, 100),
    logarithmic: bool = False,
) -> None:
    """Draw lines with a band of one sd over dashed reference levels, and save them.

    Parameters
    ----------
    lines : sequence of Line
        None gives an empty figure that says "not run"; from the seventh on, styles repeat.
    levels : sequence of (label, y)
    title : str
    labels : (str, str)
        Of the x and the y axis.
    path : Path
        Its suffix names the format: svg, or png to look at.
    limits : (float, float or None)
        Of the y axis; None leaves room for the highest line.
    logarithmic : bool
        Of the x axis.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"svg.hashsalt": path.stem, "font.size": 11})
        figure = Figure(figsize=(8, 5.2), dpi=100, layout="constrained")  # inches: 800 x 520 px
        axes = figure.add_subplot()
        for line, (colour, marker) in zip(lines, itertools.cycle(STYLES), strict=False):
            marker = marker if len(line.x) <= MOST_TICKS else None
            axes.plot(line.x, line.mean, color=colour, marker=marker, markersize=7, linewidth=2, label=line.label)
            spread = [value or 0.0 for value in line.sd]
            low = [value - half for value, half in zip(line.mean, spread, strict=True)]
            high = [value + half for value, half in zip(line.mean, spread, strict=True)]
            axes.fill_between(line.x, low, high, color=colour, alpha=0.18, linewidth=0)
        for (label, level), dashes in zip(levels, itertools.cycle(LEVEL_STYLES), strict=False):
            axes.axhline(level, color="#555555", linestyle=dashes, linewidth=1.4, label=label)
        if logarithmic and lines:
            axes.set_xscale("log")
        places = sorted({x for line in lines for x in line.x})
        if 0 < len(places) <= MOST_TICKS:
            axes.set_xticks(places, [f"{place:g}" for place in places])
            axes.minorticks_off()
        elif places:
            axes.locator_params(axis="x", integer=True)
        else:
            axes.set_xticks([])
            axes.text(0.5, 0.6, "not run", transform=axes.transAxes, ha="center")
        axes.set_ylim(*limits)
        axes.set_xlabel(labels[0])
        axes.set_ylabel(labels[1])
        axes.grid(axis="y", color="#dddddd", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        figure.suptitle(title, fontsize=12)
        if lines or levels:
            figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=10)
        drawn = io.BytesIO()
        kind = path.suffix[1:]
        figure.savefig(drawn, format=kind, metadata={"Date": None} if kind == "svg" else None)
    write_atomic(path, drawn.getvalue())
