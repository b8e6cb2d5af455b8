"""One way to write a report's numbers: a CSV for a spreadsheet, and a provenance entry for every measured cell."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from swconv.atomic import write_atomic
from swconv.reporting.runs import Run
from swconv.reporting.statistics import Interval

DECIMALS = 4  # of measured cells: beyond the noise of any run, short of the noise of summation order


@dataclass(frozen=True)
class Measured:
    """A number that came out of runs.

    Attributes
    ----------
    value : float
    unit : str
    runs : tuple of Run
        All the runs it was computed from.
    """

    value: float
    unit: str
    runs: tuple[Run, ...]

    @property
    def rounded(self) -> float | int:
        return self.value if isinstance(self.value, int) else round(self.value, DECIMALS) + 0.0  # no -0.0


Cell = Measured | str | None


@dataclass(frozen=True)
class Sheet:
    """A table of cells, as a spreadsheet sees it: measured numbers, words and claims (str), and nothing (None).

    Attributes
    ----------
    columns : sequence of str
        The first one names the row; units are in the names.
    rows : sequence of mapping of str to Cell
        A column that a row does not have is empty.
    """

    columns: Sequence[str]
    rows: Sequence[Mapping[str, Cell]]

    def write_csv(self, path: Path) -> None:
        """Write the cells, one line per row."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.columns)
        for row in self.rows:
            writer.writerow([_plain(row.get(column)) for column in self.columns])
        write_atomic(path, text.getvalue().encode())

    def write_provenance(self, path: Path, command: str) -> None:
        """Write where every measured cell comes from.

        The file holds ``{"command", "runs": {path: circumstances}, "cells": [{"cell": {"row", "column"}, "value",
        "unit", "n", "seeds", "runs": [path, ...]}]}``: a run is described once and cited by its path.

        Parameters
        ----------
        path : Path
        command : str
            What makes the whole table.
        """
        cells, runs = [], {}
        for row in self.rows:
            for column in self.columns:
                cell = row.get(column)
                if isinstance(cell, Measured):
                    seeds = sorted({run.seed for run in cell.runs})
                    cells.append(
                        {
                            "cell": {"row": row[self.columns[0]], "column": column},
                            "value": cell.rounded,
                            "unit": cell.unit,
                            "n": len(seeds),
                            "seeds": seeds,
                            "runs": [run.path for run in cell.runs],
                        }
                    )
                    runs.update({run.path: run.circumstances for run in cell.runs})
        lines = [f"  {json.dumps(name)}: {json.dumps(runs[name])}" for name in sorted(runs)]
        entries = [f"  {json.dumps(cell)}" for cell in cells]
        text = (
            f'{{\n "command": {json.dumps(command)},\n "runs": {{\n'
            + ",\n".join(lines)
            + '\n },\n "cells": [\n'
            + ",\n".join(entries)
            + "\n ]\n}\n"
        )
        write_atomic(path, text.encode())


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A GitHub table; the cells are text already, and a ``|`` in them is kept as a character."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def read_claims(path: Path, column: str, named_by: Sequence[str] = ("id",)) -> dict[str, str]:
    """One column of a table that a paper prints, as printed, by the name of the row.

    Parameters
    ----------
    path : Path
        A file of reports/paper.
    column : str
    named_by : sequence of str
        Columns whose values, joined by commas, name a row.

    Raises
    ------
    ValueError
        If the file has no such column, or names a row twice.
    """
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
        names = reader.fieldnames or []
    if lacking := [name for name in (*named_by, column) if name not in names]:
        raise ValueError(f"{path} needs the columns {' and '.join((*named_by, column))}, got {', '.join(names)}: no "
                         f"{' and no '.join(lacking)}.")
    claims = {", ".join(row[name] for name in named_by): row[column] for row in rows}
    if len(claims) != len(rows):
        raise ValueError(f"{path} needs one line per {' and '.join(named_by)}, got {len(rows)} lines for {len(claims)} names.")
    return claims


def interval_cells(name: str, interval: Interval | None, unit: str, runs: tuple[Run, ...]) -> dict[str, Cell]:
    """The columns ``name``, ``name_low`` and ``name_high``; None where there is no number."""
    values = (interval.estimate, interval.low, interval.high) if interval else (None, None, None)
    return {
        f"{name}{end}": None if value is None else Measured(value, unit, runs)
        for end, value in zip(("", "_low", "_high"), values, strict=True)
    }


def interval_text(interval: Interval | None, digits: int) -> str:
    """``+1.2 [-0.4, +2.8]``; a dash for None."""
    if interval is None:
        return "-"
    estimate = _signed(interval.estimate, digits)
    if interval.low is None or interval.high is None:
        return f"{estimate} (no interval)"
    return f"{estimate} [{_signed(interval.low, digits)}, {_signed(interval.high, digits)}]"


def count(number: int, what: str) -> str:
    """``1 seed``, ``3 seeds``; what stands before "of" takes the s."""
    noun, space, rest = what.partition(" of ")
    return f"{number} {noun}{'' if number == 1 else 's'}{space}{rest}"


def _signed(value: float, digits: int) -> str:
    return f"{round(value, digits) + 0.0:+.{digits}f}"  # no -0.0


def _plain(cell: Cell) -> str | float | int:
    if isinstance(cell, Measured):
        return cell.rounded
    return "" if cell is None else cell
