"""Parameters and FLOPs of the papers' tables beside ours: no run is needed, and the numbers have to be equal.

Accuracies stand beside them where published weights were evaluated or runs of profile paper are there.
"""

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
from swconv.reporting.accuracies import Accuracy, Place
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
    count : int, float or None
        Ours, in parameters, multiply-adds, or % of accuracy; None where the row is a model that the paper cites.
    verdict : str
        "equal" at the digits that the paper prints, "explained", "differs", "cited", or "not run".
    why : str
        The explanation; of an accuracy, what was measured.
    """

    printed: str
    count: float | None
    verdict: str
    why: str = ""


def build_cost_table(
    table: Mapping[str, Any], counts: Mapping[str, Mapping[str, int]], paper: Path, out: Path, command: str,
    accuracies: Mapping[Place, Accuracy], tiny: Sequence[tuple[str, str, Mapping[str, str]]] = (),
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
    accuracies : mapping
        `swconv.reporting.accuracies.read_accuracies`, and `read_scores` of this table.
    tiny : sequence of (str, str, mapping)
        `tiny_scores` of this table: they get a section of their own.

    Raises
    ------
    ValueError
        When a row of the table stands for none, or several, of the paper's.
    """
    header, claims = _claims(paper / table["claims"])
    cells = compare(table, counts, claims, paper / table["claims"], accuracies)
    about = ("Accuracies, in %, are those of published weights (`params/weights.yaml`) or of runs of profile `paper`, where "
             "there\nare some.")
    if table["scores"]:
        about = ("Accuracies, in %, are those of fine-tunes of profile `paper` (`params/downstream.yaml`), where there are "
                 "some.")
        if table["columns"]:
            about += ("\nWhole networks are counted, heads included; their FLOPs are what MMCV's counter prints\n"
                      "(`swconv/analysis/dense_tasks.py`).")
    counted = "What was counted: `params/costs.yaml`. " if table["columns"] else ""
    text = "\n".join([f"# {table['title']}", "", *_lines(header, claims, cells, table["columns"]), "", about, "",
                      *_tiny_section(tiny), f"{counted}Remake: `{command}`.", ""])
    write_atomic(out, text.encode())
    _write_sheet(header, claims, cells, out.with_suffix(".csv"))


def build_counts(table: Mapping[str, Any], counts: Mapping[str, Mapping[str, int]], paper: Path, out: Path) -> None:
    """Write what is counted of a table whose page is made from runs too: `counts_section` shows it there."""
    header, claims = _claims(paper / table["claims"])
    header = [column for column in header if "acc_pct" not in column]
    cells = [{column: row[column] for column in table["columns"]}
             for row in compare(table, counts, claims, paper / table["claims"], {})]
    _write_sheet(header, claims, cells, out)


def counts_section(columns: Mapping[str, str], sheet: Path) -> str:
    """The part of a page that `build_counts` wrote the numbers of, as Markdown; `columns` are those of its `CostTable`."""
    names, lines = _claims(sheet)
    header = [name.removesuffix("_paper") for name in names if not name.endswith(("_ours", "_verdict", "_why"))]
    cells = [{column: Cell(line[f"{column}_paper"], int(line[f"{column}_ours"]) if line[f"{column}_ours"] else None,
                           line[f"{column}_verdict"], line[f"{column}_why"]) for column in columns} for line in lines]
    return "\n".join(["## Parameters and FLOPs, counted", "", *_lines(header, lines, cells, columns), "",
                      "What was counted: `params/costs.yaml`."])


def _lines(header: Sequence[str], claims: Sequence[Mapping[str, str]], cells: Sequence[Mapping[str, Cell]],
           columns: Mapping[str, str]) -> list[str]:
    """How many cells have which verdict, all cells, and what has to be known of them."""
    notes = {why: f"[^{number}]" for number, why in enumerate(dict.fromkeys(
        cell.why for row in cells for cell in row.values() if cell.why), start=1)}
    shown = []
    for claim, row in zip(claims, cells, strict=True):
        told = []
        for column in header:
            if column not in row:
                told.append(claim[column])
                continue
            cell = row[column]
            verdict = f"{cell.verdict} {notes[cell.why]}" if cell.why else cell.verdict
            told += [cell.printed or "-", _shown(cell, columns.get(column)), verdict]
        shown.append(told)
    names: list[str] = []
    for column in header:
        names += [column] if column not in cells[0] else [f"{column}, paper", "ours", "verdict"]
    score = tally(cells)
    counted = [
        "Params in millions; FLOPs in units of 10^9, multiply-adds of the convolutions and linear layers, as both papers",
        "count them. Equal: at the digits that are printed. Rows that are not ours are cited."]
    return [
        ", ".join(f"{score[verdict]} {verdict}" for verdict in VERDICTS if score[verdict]) + " (cells).", "",
        markdown_table(names, shown), "", *(f"{mark}: {why}." for why, mark in notes.items()), *[""] * bool(notes),
        *(counted if columns else ["Rows that are not ours are cited."])]


def _tiny_section(tiny: Sequence[tuple[str, str, Mapping[str, str]]]) -> list[str]:
    """What was measured on the tiny sets, apart from the paper's table."""
    if not tiny:
        return []
    measures = list(dict.fromkeys(measure for *_, told in tiny for measure in told))
    lines = [[run, profile, *(told.get(measure, "-") for measure in measures)] for run, profile, told in tiny]
    header = ["run", "profile", *(f"{measure}, %, tiny set" for measure in measures)]
    return ["## On tiny sets: not to be compared with the paper", "",
            "Small networks on a few images in the benchmark's format (`python -m swconv tinydata`). `overfit` is evaluated on",
            "the images it was trained on: it shows that targets, losses, decoding and evaluation belong together.", "",
            markdown_table(header, lines), ""]


def _write_sheet(header: Sequence[str], claims: Sequence[Mapping[str, str]], cells: Sequence[Mapping[str, Cell]],
                 out: Path) -> None:
    """The same cells for a spreadsheet."""
    kept, plain = [column for column in header if column not in cells[0]], []
    ends = ("paper", "ours", "verdict", "why")
    wide = kept + [f"{column}_{end}" for column in header if column in cells[0] for end in ends]
    for claim, row in zip(claims, cells, strict=True):
        words = []
        for column in header:
            if cell := row.get(column):
                words += [cell.printed, "" if cell.count is None else cell.count, cell.verdict, cell.why]
        plain.append([claim[column] for column in kept] + words)
    sheet = io.StringIO()
    csv.writer(sheet, lineterminator="\n").writerows([wide, *plain])
    write_atomic(out, sheet.getvalue().encode())


def compare(
    table: Mapping[str, Any], counts: Mapping[str, Mapping[str, int]], claims: Sequence[Mapping[str, str]], file: Path,
    accuracies: Mapping[Place, Accuracy],
) -> list[dict[str, Cell]]:
    """The cells of every row of the paper, by column: what is counted, and accuracies, which are measured or not run."""
    ours: dict[int, Mapping[str, Any]] = {}
    for row in table["rows"]:
        found = [i for i, claim in enumerate(claims) if all(claim.get(key) == value for key, value in row["of"].items())]
        if len(found) != 1:
            raise ValueError(f"params/costs.yaml: {row['of']} needs to name one row of {file}, and names {len(found)}.")
        ours[found[0]] = row
    run = [i for i, row in ours.items() if row["run"] or not table["scores"]]
    measured = [column for column in claims[0] if "acc_pct" in column or column in table["scores"]]
    return [
        {column: _cell(claim[column], column, what, ours.get(i), counts) for column, what in table["columns"].items()}
        | {column: accuracy_cell(claim[column], accuracies.get((file.stem, i, column)), i not in run) for column in measured}
        for i, claim in enumerate(claims)
    ]


def accuracy_cell(printed: str, measured: Accuracy | None, cited: bool) -> Cell:
    """A cell of an accuracy that a paper prints, in %: as measured, or "not run", or "cited"."""
    if measured is None:
        return Cell(printed, None, "cited" if cited else "not run")
    equal = _is_number(printed) and str(_rounded(Decimal(repr(measured.top1)), printed)) == printed
    return Cell(printed, measured.top1, "equal" if equal else "differs" if _is_number(printed) else "", measured.told)


def build_index(
    tables: Mapping[str, Mapping[str, Any]],
    counts: Mapping[str, Mapping[str, int]],
    others: Mapping[str, tuple[str, str, Counter[str]]],
    pages: Mapping[str, tuple[str, str]],
    scores: Mapping[str, Counter[str]],
    accuracies: Mapping[Place, Accuracy],
    paper: Path,
    out: Path,
) -> None:
    """Write the scoreboard: the cells of every table that the papers print, by verdict.

    `others`: claims -> page, title and tally of tables that were made elsewhere; `pages`: claims -> page and title of tables
    whose own numbers are no reproduction: runs on the mini task, throughput on another device. `scores`: claims -> verdicts on
    the accuracies of pages on runs, at the papers' scale (`swconv.reporting.report.verdicts`).
    """
    made = {table["claims"]: (name, table) for name, table in tables.items()}
    found, total = [], Counter[str]()
    for file in sorted(paper.glob("*_table*.csv"), key=lambda file: (file.stem.split("_")[0], len(file.stem), file.stem)):
        header, claims = _claims(file)
        if file.name in made:
            name, table = made[file.name]
            cells, title = compare(table, counts, claims, file, accuracies), f"[{table['title']}]({name}.md)"
            if file.name in scores:                                       # instead of its own look at the accuracies
                cells = [{column: row[column] for column in table["columns"]} for row in cells]
            score = tally(cells) + scores.get(file.name, Counter())
        elif file.name in others:
            name, title, score = others[file.name]
            title = f"[{title}]({name}.md)"
        else:
            numbers = [claim[column] for claim in claims for column in header if _is_number(claim[column])]
            name, title = pages.get(file.name, (None, _title(file)))
            score = scores.get(file.name, Counter({"not run": len(numbers)}))
            title = f"[{title}]({name}.md)" if name else title
        total += score
        found.append((title, score))
    header = [*VERDICTS, *sorted(total.keys() - set(VERDICTS))]
    lines = [[title, str(score.total()), *(str(score[verdict] or "-") for verdict in header)]
             for title, score in [*found, ("all", total)]]
    text = "\n".join([
        "# Scoreboard", "",
        "Printed numbers of both papers. Equal and explained: counted here without training, at the digits that are printed.",
        "Cited: of models that the papers take from others. Not run: needs training or weights at the papers' scale.",
        "Pages on runs (SW Tables 1, 2 and 9, SLaK Tables 1, 2, 8, 9, 13 and 14) compare directions on the mini task, pages on",
        "throughput (SW Table 7, SLaK Tables 11 and 12) ratios on other devices: neither reproduces the papers' numbers.",
        "Of runs on ImageNet, reproduced: the paper's number lies in the 95 % interval of our mean, three seeds or more.", "",
        markdown_table(["table", "cells", *header], lines), "",
        "SLaK Figure 4, left, counted: [FLOPs](figures/slak/fig4_macs.svg), [parameters](figures/slak/fig4_params.svg); right,",
        "[timed](slak/fig4_right.md). [Figure 5](slak/figure5.md) and [Figure 6](slak/figure6.md) on the mini task.", ""])
    write_atomic(out, text.encode())


def build_figure4(points: Sequence[Mapping[str, Any]], out: Path) -> None:
    """Draw SLaK Figure 4, left, as two SVGs and write their numbers as CSV.

    Parameters
    ----------
    points : sequence of mapping
        `swconv.analysis.kernels.Point` as plain data.
    out : Path
        Folder of the figures.
    """
    forms = list(dict.fromkeys(point["form"] for point in points))
    for name, label in (("macs", "FLOPs (multiply-adds), 10^9"), ("params", "parameters, 10^6")):
        lines = []
        for form in forms:
            ours = [point for point in points if point["form"] == form]
            lines.append(Line(form, [point["extent"] for point in ours], [point[name] / SCALE[name] for point in ours],
                              [None] * len(ours)))
        draw_lines(lines, (), "ConvNeXt-T with one kernel size in all stages, 224 px", ("kernel size M, px", label),
                   out / f"fig4_{name}.svg", limits=(0, None))
    header = "form,kernel_size_px,params,macs\n"
    text = "".join("{form},{extent},{params},{macs}\n".format(**point) for point in points)
    write_atomic(out / "fig4.csv", (header + text).encode())


def tally(cells: Sequence[Mapping[str, Cell]]) -> Counter[str]:
    """Number of printed cells by verdict."""
    return Counter(cell.verdict for row in cells for cell in row.values() if _is_number(cell.printed))


def rounded(count: int, what: str, printed: str) -> str:
    """A count in the unit and with the digits of a printed number, halves up."""
    return str(_rounded(Decimal(count) / SCALE[what], printed))


def _rounded(value: Decimal, printed: str) -> Decimal:
    return value.quantize(Decimal(1).scaleb(Decimal(printed).as_tuple().exponent), ROUND_HALF_UP)


def _cell(printed: str, column: str, what: str, row: Mapping[str, Any] | None, counts: Mapping[str, Mapping[str, int]]) -> Cell:
    if row is None:
        return Cell(printed, None, "cited")
    dense = column.endswith("_dense")
    count = counts[row["dense_key" if dense else "key"]][what]
    if not _is_number(printed) or rounded(count, what, printed) == printed:
        return Cell(printed, count, "equal" if _is_number(printed) else "")
    reason = row["explained"].get(column)
    if reason is None:
        return Cell(printed, count, "differs")
    why, known = reason["why"], reason["counts"]
    if known is None:
        return Cell(printed, count, "explained", why)
    other = counts[known["key"]][what]
    if reason.get("rest"):
        aim, why = Decimal(printed) * SCALE[what], f"{why}: {other / SCALE[what]:.1f}; {reason['rest']}"
        right = abs(other - aim) < abs(count - aim)
    else:
        right = rounded(other, what, printed) == printed
    return Cell(printed, count, "explained", why) if right else Cell(printed, count, "differs", f"not even {why}")


def _shown(cell: Cell, what: str | None) -> str:
    if cell.count is None:
        return "-"
    return f"{cell.count:.2f}" if what is None else f"{cell.count / SCALE[what]:.3f}"


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
