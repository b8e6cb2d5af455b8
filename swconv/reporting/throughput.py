"""Throughput beside the papers': SW Table 7, SLaK Tables 11 and 12 and Figure 4 (right), from the benchmark's JSON.

Ratios within one run stand beside the paper's ratios. Images per second of one device say nothing of another's.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swconv.atomic import write_atomic
from swconv.reporting.accuracies import Accuracy, Place
from swconv.reporting.circumstances import KEY_CHARACTERS
from swconv.reporting.costs import accuracy_cell
from swconv.reporting.figures import Line, draw_lines
from swconv.reporting.table import markdown_table

SPEED = "throughput_img_per_s"
FORMS = {
    "two_step": "two-step, as published",
    "merged": "folded, our operator",
    "plain": "not folded, torch's convolutions",
    "square": "folded to M x M, torch's convolutions",
    "as_is": "timm",
}
PRECISIONS = {"float32": "float32", "tf32": "TF32", "bfloat16": "bfloat16"}
COLUMNS = ["paper_row", "precision", "here", "batch", "paper_ratio", "papers_protocol_img_per_s", "papers_protocol_ratio",
           "strict_img_per_s", "strict_q1_img_per_s", "strict_q3_img_per_s", "strict_ratio", "variant", "rounds",
           "papers_forwards"]


@dataclass(frozen=True)
class Wanted:
    """Rows of the benchmark: group, model, form, and arguments that they have among theirs."""

    group: str
    model: str
    form: str
    arguments: Mapping[str, Any]

    def __init__(self, group: str, model: str, form: str, **arguments: Any) -> None:
        for name, value in {"group": group, "model": model, "form": form, "arguments": arguments}.items():
            object.__setattr__(self, name, value)

    def found(self, times: Sequence[Mapping[str, Any]], protocol: str, precision: str) -> Mapping[str, Any] | None:
        for row in times:
            same = (row["protocol"], row["precision"], row["group"]) == (protocol, precision, self.group)
            if same and (row["model"], row["form"]) == (self.model, self.form) \
                    and self.arguments.items() <= row["arguments"].items():
                return row
        return None

    @property
    def text(self) -> str:
        more = "".join(f", {'N' if name == 'small_kernel' else name} = {value}" for name, value in self.arguments.items())
        return f"{self.model}{more}; {FORMS[self.form]}"


def _sw(group: str, model: str) -> tuple[Wanted, ...]:
    return tuple(Wanted(group, model, form, small_kernel=small) for form in ("two_step", "merged") for small in (5, 3))


@dataclass(frozen=True)
class Row:
    """A row of a paper's table: its line there (from 0) and column, and what of ours stands for it."""

    claim: int
    column: str
    text: str
    ours: tuple[Wanted, ...]


@dataclass(frozen=True)
class Table:
    """Attributes: title; file of the claims; `rows`; `base`: of the row that all are divided by; `notes`."""

    title: str
    claims: str
    base: int
    rows: tuple[Row, ...]
    notes: str


TABLES = {
    "table7": Table(
        "SW Table 7: throughput of whole networks", "sw_table7.csv", 2,
        (
            Row(0, SPEED, "SW-tiny", _sw("tiny", "sw_tiny")),
            Row(1, SPEED, "SLaK-T, R, *", (Wanted("tiny", "slak_tiny", "merged"),)),
            Row(2, SPEED, "UniRepLKNet-T", (Wanted("tiny", "unireplknet_tiny", "merged"),)),
            Row(3, SPEED, "SLaK-T", (Wanted("tiny", "slak_tiny", "plain"),)),
            Row(4, SPEED, "SLaK-T, R", (Wanted("tiny", "slak_tiny", "square"),)),
            Row(5, SPEED, "SW-small", _sw("small", "sw_small")),
            Row(6, SPEED, "SLaK-S, R, *", (Wanted("small", "slak_small", "merged"),)),
            Row(7, SPEED, "UniRepLKNet-S", (Wanted("small", "unireplknet_small", "merged"),)),
            Row(8, SPEED, "SLaK-S", (Wanted("small", "slak_small", "plain"),)),
            Row(9, SPEED, "SLaK-S, R", (Wanted("small", "slak_small", "square"),)),
        ),
        "Ratios are to UniRepLKNet-T, those of the small networks to UniRepLKNet-S. R: branches merged. *: the paper's row "
        "runs on a convolution library (MegEngine) that is not here; our strips stand for it. The paper says N = 3, and the "
        "only published script times N = 5, four edges and one Rep branch. SW has four edges here, and one Rep branch.",
    ),
    "slak/table11": Table(
        "SLaK Table 11: throughput beside ConvNeXt-T and Swin-T", "slak_table11.csv", 0,
        (
            Row(0, SPEED, "ConvNeXt-T", (Wanted("tiny", "convnext_tiny", "as_is"),)),
            Row(1, SPEED, "Swin-T", (Wanted("tiny", "swin_tiny_patch4_window7_224", "as_is"),)),
            Row(2, SPEED, "SLaK-T", tuple(Wanted("tiny", "slak_tiny", form) for form in ("plain", "merged"))),
        ),
        "Ratios are to ConvNeXt-T. The paper used torch 1.10, where TF32 is on for products too.",
    ),
    "slak/table12": Table(
        "SLaK Table 12: throughput of ConvNeXt-B with 51x51 kernels", "slak_table12.csv", 0,
        (
            Row(0, "naive_img_per_s", "naive", (Wanted("base", "lk_convnext_base", "square"),)),
            *(Row(0, f"{name}_img_per_s", text,
                  tuple(Wanted("base", "slak_base", form, width_factor=width) for form in ("plain", "merged")))
              for name, text, width in (("decomposed", "decomposed", 1.0), ("sparse_groups", "sparse groups", 1.0),
                                        ("sparse_groups_1.3x_width", "sparse groups, 1.3 times as wide", 1.3))),
        ),
        "Ratios are to the naive M x M kernels. Sparse groups are masks over the decomposed kernels: the same work is done.",
    ),
}


def build(records: Sequence[Path], accuracies: Mapping[Place, Accuracy], paper: Path, out: Path, command: str) -> None:
    """Write all tables (Markdown and CSV) and the figure from the benchmark's files, one section per device.

    Parameters
    ----------
    records : sequence of Path
        throughput-<device>.json.
    accuracies : mapping
        Of published weights and of runs, by cell (`accuracies.read_accuracies`).
    paper : Path
        Folder of the claims.
    out : Path
        reports/.
    command : str
        Remakes a page, with its path in place of {}.

    Raises
    ------
    ValueError
        When there is no record.
    """
    if not records:
        raise ValueError("the throughput tables need a record of the benchmark, got none. Run: python -m swconv bench "
                         "throughput --out reports/bench.")
    known = {path: json.loads(path.read_text()) for path in records}
    for name, table in TABLES.items():
        sections, sheet = [], [["device", *COLUMNS]]
        for path, record in known.items():
            rows = list(_rows(table, record, _read(paper / table.claims)))
            sections += [_section(record, path, rows)] if rows else []
            sheet += [[_device(record), *(row[column] for column in COLUMNS)] for row in rows]
        page = out / f"{name}.md"
        more = [_edges(known.values()), _accuracies(table.claims, accuracies, paper)] if name == "table7" else []
        parts = [f"# {table.title}", table.notes, *sections, *more, _method(command.format(page))]
        text = "\n\n".join(part for part in parts if part)
        write_atomic(page, (text + "\n").encode())
        _write_csv(page.with_suffix(".csv"), sheet)
    _build_figure4(known.values(), paper / "slak_fig4right.csv", out, command)


def _rows(table: Table, record: Mapping[str, Any], claims: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
    times, rows = record["times"], []
    for precision in record["plan"]["precisions"]:
        for row in table.rows:
            base = table.rows[_base(table, row)]
            claimed = float(claims[row.claim][row.column]) / float(claims[base.claim][base.column])
            for wanted in row.ours:
                found = {protocol: wanted.found(times, protocol, precision) for protocol in ("papers", "strict")}
                if None in found.values():
                    continue
                over = {protocol: base.ours[0].found(times, protocol, precision) for protocol in found}
                plain, strict = found["papers"], found["strict"]
                rows.append({
                    "paper_row": row.text, "precision": PRECISIONS[precision], "here": wanted.text, "batch": strict["batch"],
                    "paper_ratio": round(claimed, 3),
                    "papers_protocol_img_per_s": _speed(plain, "at_once_ms"),
                    "papers_protocol_ratio": _ratio(plain, over["papers"], "at_once_ms"),
                    "strict_img_per_s": _speed(strict, "median_ms"), "strict_q1_img_per_s": _speed(strict, "q3_ms"),
                    "strict_q3_img_per_s": _speed(strict, "q1_ms"),
                    "strict_ratio": _ratio(strict, over["strict"], "median_ms"), "variant": _ran_as(record, strict),
                    "rounds": strict["rounds"], "papers_forwards": plain.get("at_once", record["plan"]["at_once"]),
                })
    return rows


def _base(table: Table, row: Row) -> int:
    """The small networks of SW Table 7 are divided by the small UniRepLKNet."""
    return next((i for i, other in enumerate(table.rows)
                 if other.text == "UniRepLKNet-S" and row.ours[0].group == "small"), table.base)


def _speed(row: Mapping[str, Any], key: str) -> float:
    return round(1e3 * row["batch"] / row[key], 2)


def _ran_as(record: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    return row["variant"] + (", no CUDA graph" if record["device"] == "cuda" and row["launched"] == "eager" else "")


def _ratio(row: Mapping[str, Any], base: Mapping[str, Any], key: str) -> float:
    return round(base[key] / base["batch"] * row["batch"] / row[key], 3)


def _section(record: Mapping[str, Any], path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    shown = [[row["paper_row"], row["here"], row["precision"], f"{row['paper_ratio']:.2f}",
              f"{row['papers_protocol_ratio']:.2f}", f"**{row['strict_ratio']:.2f}**",
              f"{row['papers_protocol_img_per_s']:.1f}",
              f"{row['strict_img_per_s']:.1f} ({row['strict_q1_img_per_s']:.1f}-{row['strict_q3_img_per_s']:.1f})",
              row["variant"], f"{row['rounds']}; {row['papers_forwards']}"] for row in rows]
    names = ["paper's row", "here", "precision", "paper, ratio", "ours, papers' protocol, ratio", "ours, strict, ratio",
             "papers' protocol, img/s", "strict, img/s (quartiles)", "ran as", "n; papers' n"]
    return "\n\n".join([f"## {_device(record)}", _told(record, path), markdown_table(names, shown)])


def _edges(records: Sequence[Mapping[str, Any]]) -> str:
    parts = []
    for record in records:
        rows = [row for row in record["times"] if row["group"] == "edges" and row["protocol"] == "strict"]
        for precision in dict.fromkeys(row["precision"] for row in rows):
            some = {(row["arguments"]["edges"], row["form"]): row for row in rows if row["precision"] == precision}
            edges = sorted({edge for edge, _ in some})
            shown = [[FORMS[form], *(f"{some[edges[0], form]['median_ms'] / some[edge, form]['median_ms']:.3f}"
                                     for edge in edges)] for form in ("two_step", "merged")]
            parts.append(f"{_device(record)}, {PRECISIONS[precision]}:\n\n"
                         + markdown_table(["SW-tiny, N = 5", *(f"E = {edge}" for edge in edges)], shown))
    if not parts:
        return ""
    return "\n\n".join(["## Edges: images per second with E edges / with one (strict)", *parts,
                        "The released script's figures on an A100: 1.00, 0.98, 0.96, 0.94 (404, 396, 388, 378 img/s)."])


def _accuracies(file: str, accuracies: Mapping[Place, Accuracy], paper: Path) -> str:
    """The table's other column."""
    claims, column = _read(paper / file), "in1k_top1_acc_pct"
    rows, notes = [], []
    for number, claim in enumerate(claims):
        cell = accuracy_cell(claim[column], accuracies.get((Path(file).stem, number, column)), cited=False)
        notes += [cell.why] if cell.why and cell.why not in notes else []
        mark = f" [^{notes.index(cell.why) + 1}]" if cell.why else ""
        name = ", ".join(filter(None, (claim["method"], claim["rep_merged"], claim["efficient_large_kernel_op_star"])))
        rows.append([name.replace("star", "*"), cell.printed, "-" if cell.count is None else f"{cell.count:.2f}",
                     f"{cell.verdict}{mark}"])
    return "\n\n".join(["## Top-1 on ImageNet, %", markdown_table(["", "paper", "ours", "verdict"], rows),
                        *(f"[^{number}]: {why}." for number, why in enumerate(notes, start=1))])


def _build_figure4(records: Sequence[Mapping[str, Any]], claims: Path, out: Path, command: str) -> None:
    """Figure 4, right: how many times as fast as the dense layer the pair of strips is, by the map's side."""
    printed = _read(claims)
    sides = [int(row["resolution_R"].split("x")[0]) for row in printed]
    paper = [float(row["dense_51x51_ms"]) / float(row["sparse_51x5_plus_5x51_ms"]) for row in printed]
    lines, sheet = [Line("paper (A100), strips", sides, paper, [None] * len(sides))], []
    sheet += [["paper (A100)", "strips", side, "", "", round(gain, 3)] for side, gain in zip(sides, paper, strict=True)]
    shown = []
    for record in records:
        rows = {(row["form"], row["side"]): row for row in record["times"] if row["group"] == "layer"}
        here = sorted({side for _, side in rows})
        if not here:                                                  # the benchmark was stopped before
            continue
        for form, text in (("sparse", "51x51, 40 % masked"), ("strips", "51x5 + 5x51, torch"), ("ours", "51x5 + 5x51, ours")):
            gains = [rows["dense", side]["median_ms"] / rows[form, side]["median_ms"] for side in here]
            if form != "sparse":
                lines.append(Line(f"{_device(record)}, {text}", here, gains, [None] * len(here)))
            for side, gain in zip(here, gains, strict=True):
                row = rows[form, side]
                claimed = [f"{value:.2f}" for known, value in zip(sides, paper, strict=True) if known == side]
                claimed = ["1.00"] * len(claimed) if form == "sparse" else claimed
                shown.append([_device(record), text, f"{side}x{side}", *(claimed or ["-"]), f"{gain:.2f}",
                              f"{row['median_ms']:.2f} ({row['q1_ms']:.2f}-{row['q3_ms']:.2f})", _ran_as(record, row),
                              str(row["batch"]), str(row["rounds"])])
                sheet.append([_device(record), form, side, row["batch"], round(row["median_ms"], 4), round(gain, 3)])
    draw_lines(lines, (("as fast as dense", 1.0),), "One depthwise layer of 384 channels: dense 51x51 / strips",
               ("side R of the map, px", "times as fast as dense 51x51"), out / "figures/slak/fig4_right.svg", limits=(0, None))
    _write_csv(out / "slak/fig4_right.csv", [["device", "form", "side_px", "batch", "median_ms", "times_as_fast_as_dense"],
                                             *sheet])
    page = out / "slak/fig4_right.md"
    text = "\n\n".join([
        "# SLaK Figure 4, right: one depthwise layer", "![Gain over the dense kernel](../figures/slak/fig4_right.svg)",
        markdown_table(["device", "kernel", "map", "paper: dense / this", "ours: dense / this", "ms (quartiles)", "ran as",
                        "batch", "n"], shown),
        "Input (batch, 384, R, R), float32; the paper: batch 64, an A100.", _method(command.format(page))])
    write_atomic(page, (text + "\n").encode())


def _device(record: Mapping[str, Any]) -> str:
    hardware = record["hardware"]
    return hardware["gpu"] if record["device"] == "cuda" else f"{hardware['cores']} cores of {hardware['cpu']}"


def _told(record: Mapping[str, Any], path: Path) -> str:
    flags, versions, plan = record["flags"], record["versions"], record["plan"]
    state = ", with changes that are not committed" if record["git_dirty"] else ""
    trial = "**A trial on tiny networks; its numbers say nothing.** " if record["quick"] else ""
    missing = f"**Stopped before: {', '.join(record['unfinished'])}.** " if record.get("unfinished") else ""

    def listed(known: Mapping[str, Any]) -> str:
        return ", ".join(f"{name} {value}" for name, value in known.items() if value is not None)

    tf32 = "; ".join(f"in {PRECISIONS[precision]}: {listed(found)}" for precision, found in record["tf32"].items())
    return (f"{trial}{missing}From `{path}`, measured at {record['started']} in {record['seconds']:.0f} s; commit "
            f"`{(record['git_commit'] or 'unknown')[:KEY_CHARACTERS]}`{state}; engine of ours: {record['engine']}; load "
            f"before: {record['load_before']}. Versions: {listed(versions)}. Flags: {listed(flags)}; TF32 {tf32}. Images of "
            f"{plan['image']}x{plan['image']}; papers' protocol: {plan['warmups']} forwards to warm up, then {plan['at_once']} "
            "timed together (the paper: 10 and 25, batch 128), or fewer of a slow network, as the last column tells.")


def _method(command: str) -> str:
    return f"""## How

Papers' protocol: contiguous, eager, one batch of noise over and over, networks one after the other. Strict: in every round each
network runs once, in an order drawn anew, on batches taken in turn; each in the fastest of contiguous, channels_last and, where
it was tried, compiled, and for torch's large kernels with the padding inside or before the convolution; medians over n rounds.
On a GPU formats that took twice as long as another on a few images were left out, and every network was timed as a CUDA graph,
which does not wait for the CPU; those that could not be captured are marked. The two-step form is float32, as published.
Forms of one network were held against each other before they were timed. Weights are random: speed does not depend on them.

Measure anew: `python -m swconv bench throughput --out reports/bench` (on a GPU with `--device cuda`). Remake: `{command}`."""


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _write_csv(path: Path, rows: Sequence[Sequence[Any]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_atomic(path, text.getvalue().encode())
