"""Parameters and FLOPs of the papers' tables beside ours: no run is needed, and the numbers have to be equal."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Any

from swconv.atomic import write_atomic
from swconv.reporting.figures import Line, draw_lines
from swconv.reporting.table import markdown_table

SCALE = {"params": 10**6, "macs": 10**9}
VERDICTS = ("equal", "explained", "differs", "cited", "not run")


@dataclass(frozen=True)
class Cell:
    """One printed number and what we make of it.

    Attributes
    ----------
    printed : str
        As in the paper, or empty.
    count : int or None
        Ours, in parameters or multiply-adds; None where the row is a model that the paper cites.
    verdict : str
        "equal" at the digits that the paper prints, "explained", "differs", "cited", or "not run".
    why : str
        The explanation.
    """

    printed: str
    count: int | None
    verdict: str
    why: str = ""


def build_cost_table(
    table: Mapping[str, Any], counts: Mapping[str, Mapping[str, int]], paper: Path, out: Path, command: str
) -> None:
    """Write one table as Markdown and CSV.

    Parameters
    ----------
    table : mapping
        `CostTable` of params/costs.yaml as plain data.
    counts : mapping of str to {"params": int, "macs": int}
        By what was counted (`Counted.key`).
    paper : Path
        Folder of the claims.
    out : Path
        The Markdown file; the CSV stands beside it.
    command : str
        What remakes it.

    Raises
    ------
    ValueError
        When a row of the table stands for none, or several, of the paper's.
    """
    header, claims = _claims(paper / table["claims"])
    cells = compare(table, counts, claims, paper / table["claims"])
    shown, plain = [], []
    notes = {why: f"[^{number}]" for number, why in enumerate(dict.fromkeys(
        cell.why for row in cells for cell in row.values() if cell.why), start=1)}
    for claim, row in zip(claims, cells, strict=True):
        told, words = [], []
        for column in header:
            if column not in row:
                told.append(claim[column])
                continue
            cell = row[column]
            words += [cell.printed, "" if cell.count is None else cell.count, cell.verdict, cell.why]
            verdict = f"{cell.verdict} {notes[cell.why]}" if cell.why else cell.verdict
            told += [cell.printed or "-", _shown(cell, table["columns"].get(column)), verdict]
        shown.append(told)
        plain.append([claim[column] for column in header if column not in row] + words)
    names, wide = [], [column for column in header if column not in cells[0]]
    for column in header:
        names += [column] if column not in cells[0] else [f"{column}, paper", "ours", "verdict"]
        wide += [] if column not in cells[0] else [f"{column}_paper", f"{column}_ours", f"{column}_verdict", f"{column}_why"]
    score = tally(cells)
    text = "\n".join([
        f"# {table['title']}", "",
        ", ".join(f"{score[verdict]} {verdict}" for verdict in VERDICTS if score[verdict]) + " (cells).", "",
        markdown_table(names, shown), "", *(f"{mark}: {why}." for why, mark in notes.items()), "",
        "Params in millions; FLOPs in units of 10^9, multiply-adds of the convolutions and linear layers, as both papers",
        "count them. Equal: at the digits that are printed. Rows that are not ours are cited. Accuracy needs ImageNet.", "",
        f"What was counted: `params/costs.yaml`. Remake: `{command}`.", ""])
    write_atomic(out, text.encode())
    sheet = io.StringIO()
    csv.writer(sheet, lineterminator="\n").writerows([wide, *plain])
    write_atomic(out.with_suffix(".csv"), sheet.getvalue().encode())


def compare(
    table: Mapping[str, Any], counts: Mapping[str, Mapping[str, int]], claims: Sequence[Mapping[str, str]], file: Path
) -> list[dict[str, Cell]]:
    """The cells of every row of the paper, by column: what is counted, and accuracies, which are not."""
    ours: dict[int, Mapping[str, Any]] = {}
    for row in table["rows"]:
        found = [i for i, claim in enumerate(claims) if all(claim.get(key) == value for key, value in row["of"].items())]
        if len(found) != 1:
            raise ValueError(f"params/costs.yaml: {row['of']} needs to name one row of {file}, and names {len(found)}.")
        ours[found[0]] = row
    accuracies = [column for column in claims[0] if "acc_pct" in column]
    return [
        {column: _cell(claim[column], column, what, ours.get(i), counts) for column, what in table["columns"].items()}
        | {column: Cell(claim[column], None, "not run" if i in ours else "cited") for column in accuracies}
        for i, claim in enumerate(claims)
    ]


def build_index(
    tables: Mapping[str, Mapping[str, Any]],
    counts: Mapping[str, Mapping[str, int]],
    others: Mapping[str, tuple[str, str, Counter[str]]],
    paper: Path,
    out: Path,
) -> None:
    """Write the scoreboard: the cells of every table that the papers print, by verdict.

    `others`: claims -> page, title and tally of tables that were made elsewhere.
    """
    made = {table["claims"]: (name, table) for name, table in tables.items()}
    lines, total = [], Counter[str]()
    for file in sorted(paper.glob("*_table*.csv"), key=lambda file: (file.stem.split("_")[0], len(file.stem), file.stem)):
        header, claims = _claims(file)
        if file.name in made:
            name, table = made[file.name]
            score, title = tally(compare(table, counts, claims, file)), f"[{table['title']}]({name}.md)"
        elif file.name in others:
            name, title, score = others[file.name]
            title = f"[{title}]({name}.md)"
        else:
            numbers = [claim[column] for claim in claims for column in header if _is_number(claim[column])]
            score, title = Counter({"not run": len(numbers)}), _title(file)
        total += score
        lines.append([title, str(score.total()), *(str(score[verdict] or "-") for verdict in VERDICTS)])
    lines.append(["all", str(total.total()), *(str(total[verdict] or "-") for verdict in VERDICTS)])
    text = "\n".join([
        "# Scoreboard", "",
        "Printed numbers of both papers. Equal and explained: counted here without training, at the digits that are printed.",
        "Cited: of models that the papers take from others. Not run: needs training or weights at the papers' scale.",
        "[Table 2 of SW](table2.md) was run on the mini task, which compares directions and reproduces no numbers.", "",
        markdown_table(["table", "cells", *VERDICTS], lines), "",
        "SLaK Figure 4, left, counted: [FLOPs](figures/slak/fig4_macs.svg), [parameters](figures/slak/fig4_params.svg).", ""])
    write_atomic(out, text.encode())


def build_figure4(points: Sequence[Any], out: Path) -> None:
    """Draw SLaK Figure 4, left, as two SVGs and write their numbers as CSV.

    Parameters
    ----------
    points : sequence of `swconv.analysis.kernels.Point`
    out : Path
        Folder of the figures.
    """
    forms = list(dict.fromkeys(point.form for point in points))
    for name, label in (("macs", "FLOPs (multiply-adds), 10^9"), ("params", "parameters, 10^6")):
        lines = []
        for form in forms:
            ours = [point for point in points if point.form == form]
            lines.append(Line(form, [point.extent for point in ours], [getattr(point, name) / SCALE[name] for point in ours],
                              [None] * len(ours)))
        draw_lines(lines, (), "ConvNeXt-T with one kernel size in all stages, 224 px", ("kernel size M, px", label),
                   out / f"fig4_{name}.svg", limits=(0, None))
    header = "form,kernel_size_px,params,macs\n"
    text = "".join(f"{point.form},{point.extent},{point.params},{point.macs}\n" for point in points)
    write_atomic(out / "fig4.csv", (header + text).encode())


def tally(cells: Sequence[Mapping[str, Cell]]) -> Counter[str]:
    """Number of printed cells by verdict."""
    return Counter(cell.verdict for row in cells for cell in row.values() if cell.printed)


def rounded(count: int, what: str, printed: str) -> str:
    """A count in the unit and with the digits of a printed number, halves up."""
    exponent = Decimal(1).scaleb(Decimal(printed).as_tuple().exponent)
    return str((Decimal(count) / SCALE[what]).quantize(exponent, ROUND_HALF_UP))


def _cell(printed: str, column: str, what: str, row: Mapping[str, Any] | None, counts: Mapping[str, Mapping[str, int]]) -> Cell:
    if row is None:
        return Cell(printed, None, "cited")
    dense = column.endswith("_dense")
    count = counts[row["dense_key" if dense else "key"]][what]
    if not printed or rounded(count, what, printed) == printed:
        return Cell(printed, count, "equal" if printed else "")
    reason = row["explained"].get(column)
    if reason is None:
        return Cell(printed, count, "differs")
    if reason["counts"] is not None and rounded(counts[reason["counts"]["key"]][what], what, printed) != printed:
        return Cell(printed, count, "differs", f"not even {reason['why']}")
    return Cell(printed, count, "explained", reason["why"])


def _shown(cell: Cell, what: str | None) -> str:
    if cell.count is None or what is None:
        return "-"
    return f"{cell.count / SCALE[what]:.3f}"


def _claims(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    return list(reader.fieldnames or []), rows


def _is_number(text: str) -> bool:
    try:
        Decimal(text)
    except ArithmeticError:
        return False
    return True


def _title(file: Path) -> str:
    paper, table = file.stem.split("_", 1)
    return f"{ {'sw': 'SW', 'slak': 'SLaK'}[paper]} {table.replace('table', 'Table ')}"
