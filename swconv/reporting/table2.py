"""Table 2 of the ShiftwiseConv paper: the roadmap row by row, its controls, and accuracy against distance."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from swconv.atomic import write_atomic
from swconv.reporting import distance, statistics
from swconv.reporting.circumstances import footnote, header_line
from swconv.reporting.comparison import NO_VERDICT, Comparison, Control, Row
from swconv.reporting.runs import Evidence, Run
from swconv.reporting.statistics import DRAWS, VERDICT_SEEDS, Interval
from swconv.reporting.table import Cell, Measured, Sheet, interval_cells, interval_text, markdown_table, read_claims

REFERENCE = "#3"  # the row that the differences are taken to: the first with SW alone
CLAIM = "in1k_top1_acc_pct_120ep"
ALIVE = "filters_alive_stage_"
FIGURE = Path("figures") / "table2_distance.svg"


def build_table2(
    rows: Sequence[Row],
    controls: Sequence[Control],
    proxy: Evidence,
    out: Path,
    *,
    command: str,
    imagenet: Evidence | None = None,
    paper: Path = Path("reports/paper/sw_table2.csv"),
) -> None:
    """Write table2.md, table2.csv, table2.provenance.json and figures/table2_distance.svg.

    The same runs give the same bytes. What was not run says so; nothing is filled in.

    Parameters
    ----------
    rows : sequence of Row
        The paper's in its order, one of them #3, then any of ours; these have no number of the paper, hence no
        direction and no part in the rank correlation.
    controls : sequence of Control
    proxy : Evidence
        The runs on the digit task (profile mini or smoke).
    out : Path
        Folder: reports/, or artifacts/smoke/reports/.
    command : str
        What a user types to make this table; printed in it.
    imagenet : Evidence, optional
        The runs of the paper profile; they get columns where at least one finished.
    paper : Path
        The paper's numbers.

    Raises
    ------
    ValueError
        If #3 or its number is missing, two rows have one label, a control or a ``same_as`` names an unknown or
        untrained row, or a metrics file holds something else than finite numbers.
    OSError
        If a file cannot be written; each of the four is then the old one or the new one, never a part.
    """
    _check(rows, controls, [evidence for evidence in (proxy, imagenet) if evidence])
    claims = _claims(rows, paper)
    small = Comparison(proxy, rows, controls)
    full = Comparison(imagenet, rows) if imagenet else None
    if full and not full.finished:
        full = None
    lines = distance.compared_lines(small, rows, controls)
    slopes = distance.slope_differences(lines, controls)
    skip = _skip_difference(controls, small)
    sheet = _sheet(rows, controls, claims, small, full, slopes, skip)
    columns = [column for column in (full, small) if column]
    blocks = [
        "# Table 2 of ShiftwiseConv: the roadmap, row by row",
        "\n".join(header_line(column.profile, column.finished) for column in columns)
        + f"\n- Made by `{command}` from the metrics of these runs; not to be edited.",
        _main_table(rows, claims, small, full),
        _tally(rows, claims, small),
        "## Controls: the same network without a large kernel",
        _control_table(controls, small),
        "## Rank correlation with the paper",
        _ranks_text(rows, claims, small),
        "## Accuracy against distance",
        f"![Top-1 against the distance between marker and target, SW and controls]({FIGURE.as_posix()})",
        distance.caption(small.profile),
        distance.report(lines, slopes, rows, controls),
        *_alive_section(rows, small),
        "## What this table can and cannot show",
        _limits(rows, controls, claims, small, skip),
        *_footnotes([*rows, *controls], columns),
    ]
    distance.draw(lines, small.profile, out / FIGURE)
    sheet.write_csv(out / "table2.csv")
    sheet.write_provenance(out / "table2.provenance.json", command)
    write_atomic(out / "table2.md", ("\n\n".join(blocks) + "\n").encode())


def _sheet(
    rows: Sequence[Row],
    controls: Sequence[Control],
    claims: Mapping[str, float],
    small: Comparison,
    full: Comparison | None,
    slopes: Mapping[str, Interval],
    skip: Interval | None,
) -> Sheet:
    reference = _reference(rows)
    lines: list[dict[str, Cell]] = []
    for row in rows:
        line: dict[str, Cell] = {"id": row.label, "run": row.run, "model": row.model}
        line["paper_top1_pct"] = f"{claims[row.label]:.2f}" if row.label in claims else None
        if full:
            line |= _cells(full, row.run, reference.run, "imagenet")
            gap = _gap(full, row, claims)
            line |= interval_cells("imagenet_minus_paper_pct", gap, "%", full.of(row.run).finished)
        line |= _cells(small, row.run, reference.run, small.profile)
        line["direction"] = small.direction(row.run, reference.run, _claimed(row, claims))
        lines.append(line)
    for control in controls:
        line = {"id": control.run, "run": control.run, "model": control.model}
        line |= _cells(small, control.run, control.of, small.profile)
        line["direction"] = _side_text(small, control)
        name = f"{small.profile}_row_minus_control_slope_pct_per_{distance.CELL_PIXELS}px"
        pair = small.of(control.of).finished + small.of(control.run).finished
        line |= interval_cells(name, slopes.get(control.run), f"% {distance.PER_CELL}", pair)
        if control is controls[0]:
            pair = tuple(run for either in controls[:2] for run in small.of(either.run).finished)
            line |= interval_cells(f"{small.profile}_minus_plain_control_pct", skip, "%", pair)
        lines.append(line)
    if ranks := _ranks(rows, claims, small):
        lines.append({"id": "all rows"} | interval_cells(f"{small.profile}_rank_correlation", ranks[0], "", ranks[1]))
    return Sheet(list(dict.fromkeys(name for line in lines for name in line)), lines)


def _cells(column: Comparison, run: str, reference: str, prefix: str) -> dict[str, Cell]:
    """Everything that a spreadsheet gets of one row in one profile; the columns are the same for every row."""
    values = column.top1(run)
    spread = statistics.sd(values) if values else None
    difference = column.difference(run, reference)
    line = distance.by_distance(column, run, run) if values else None
    by_step = dict(zip(line.distances, line.accuracies, strict=True)) if line else {}
    own, theirs = (column.of(key).finished for key in (run, reference))
    cells: dict[str, Cell] = {
        f"{prefix}_state": column.state(run),
        f"{prefix}_top1_pct": Measured(statistics.mean(values), "%", own) if values else None,
        f"{prefix}_sd_pct": Measured(spread, "%", own) if spread is not None else None,
        f"{prefix}_n": Measured(len(values), "seeds", own) if values else None,
        f"{prefix}_difference_to": column.labels[reference] if difference else None,
        **interval_cells(f"{prefix}_difference_pct", difference, "%", own + theirs),
    }
    for step in distance.steps(column):
        name = f"{prefix}_top1_at_{step * distance.CELL_PIXELS}px_pct"
        cells[name] = Measured(statistics.mean(by_step[step]), "%", own) if step in by_step else None
    if distance.steps(column):
        name = f"{prefix}_slope_pct_per_{distance.CELL_PIXELS}px"
        cells |= interval_cells(name, line.slope if line else None, f"% {distance.PER_CELL}", own)
    for stage, share in _alive(column, run).items():
        cells[f"{prefix}_filters_alive_stage{stage}_pct"] = None if share is None else Measured(share, "%", own)
    return cells


def _alive(column: Comparison, run: str) -> dict[int, float | None]:
    """Share of a row's SW filters that are not zero, in %, mean over seeds, for every stage where any run has some."""
    counted = {name for finished in column.finished for name in finished.values if name.startswith(ALIVE)}
    shares = {}
    for stage in sorted(int(name.removeprefix(ALIVE)) for name in counted):
        values = column.results[run].values(f"{ALIVE}{stage}") if run in column.results else []
        shares[stage] = statistics.mean(values) if values else None
    return shares


def _alive_section(rows: Sequence[Row], small: Comparison) -> list[str]:
    """Where sparse training left filters, for the rows that were trained: what their accuracy rests on."""
    alive = {row.label: _alive(small, row.run) for row in rows}
    measured = {label: shares for label, shares in alive.items() if any(share is not None for share in shares.values())}
    if not measured:
        return []
    stages = next(iter(measured.values()))
    return [
        "## Where the filters live",
        "SW filters that are not zero after training, in %, mean over seeds. SNIP ranks all stages together, so in a "
        "network this small it can leave a stage with hardly any; a mask that starts empty never grows. Rows that "
        "differ here differ in more than their name says.",
        markdown_table(
            ["id", *(f"stage {stage}" for stage in stages)],
            [
                [label, *("-" if share is None else f"{share:.1f}" for share in shares.values())]
                for label, shares in measured.items()
            ],
        ),
    ]


def _main_table(rows: Sequence[Row], claims: Mapping[str, float], small: Comparison, full: Comparison | None) -> str:
    reference = _reference(rows)
    header = ["id", "model", "paper, top-1 % (ImageNet, 120 epochs)"]
    if full:
        header += ["ours, top-1 % (ImageNet)", "ours - paper, points (95 %)"]
    header += [f"ours, top-1 % ({small.profile} task)", f"difference to {REFERENCE}, points (95 %)", "direction"]
    lines = []
    for row in rows:
        line = [row.label, row.model, f"{claims[row.label]:.2f}" if row.label in claims else "-"]
        if full:
            line += [full.text(row.run, 2), interval_text(_gap(full, row, claims), 2)]
        mark = f" [^{row.run}]" if row.run in small.results or (full and row.run in full.results) else ""
        line.append(small.text(row.run, 1) + mark)
        if row is reference:
            line += ["reference", "-"]
        else:
            line.append(interval_text(small.difference(row.run, reference.run), 1))
            line.append(small.direction(row.run, reference.run, _claimed(row, claims)))
        lines.append(line)
    return markdown_table(header, lines)


def _tally(rows: Sequence[Row], claims: Mapping[str, float], small: Comparison) -> str:
    reference = _reference(rows)
    directions: Counter[str] = Counter()
    for row in rows:
        if row is not reference and row.label in claims:
            direction = small.direction(row.run, reference.run, _claimed(row, claims))
            if direction == "-":
                measured = small.top1(row.run)
                direction = (
                    f"without {REFERENCE} to compare with" if measured else small.state(row.run).partition(",")[0]
                )
            directions[direction] += 1
    listed = ", ".join(f"{number} {name}" for name, number in sorted(directions.items()))
    differences = [small.difference(row.run, reference.run) for row in rows]
    taken = sum(difference is not None and difference.low is not None for difference in differences)
    return (
        f"Direction against {REFERENCE}, {directions.total()} rows of the paper: {listed}. A difference is that of the "
        "means, with Welch's t interval over seeds; its direction is undecided where the interval includes 0. The "
        f"intervals are taken one by one: of {taken}, about {0.05 * taken:.1f} would exclude 0 by chance alone."
    )


def _control_table(controls: Sequence[Control], small: Comparison) -> str:
    header = ["control", "in the network of", f"ours, top-1 % ({small.profile} task)"]
    header += ["difference to that row, points (95 %)", "verdict"]
    lines = [
        [
            control.model,
            small.labels[control.of],
            f"{small.text(control.run, 1)} [^{control.run}]",
            interval_text(small.difference(control.run, control.of), 1),
            _side_text(small, control),
        ]
        for control in controls
    ]
    return markdown_table(header, lines)


def _ranks(
    rows: Sequence[Row], claims: Mapping[str, float], small: Comparison
) -> tuple[Interval, tuple[Run, ...]] | None:
    present = _ranked(rows, claims, small)
    interval = statistics.rank_correlation(
        [claims[row.label] for row in present], [small.top1(row.run) for row in present]
    )
    return (interval, tuple(run for row in present for run in small.of(row.run).finished)) if interval else None


def _ranked(rows: Sequence[Row], claims: Mapping[str, float], small: Comparison) -> list[Row]:
    """The rows that have a number of the paper and one of ours."""
    return [row for row in rows if row.label in claims and small.top1(row.run)]


def _ranks_text(rows: Sequence[Row], claims: Mapping[str, float], small: Comparison) -> str:
    ranks, number = _ranks(rows, claims, small), len(_ranked(rows, claims, small))
    if ranks is None:
        return "No correlation: Spearman's rho needs at least three rows with different results."
    interval, _ = ranks
    if not interval.decidable:
        verdict = NO_VERDICT
    elif interval.sign == 0:
        verdict = "undecided, the interval includes 0"
    else:
        verdict = "the orders agree" if interval.sign > 0 else "the orders run against each other"
        verdict += ", beyond the noise of our seeds"
    return (
        f"Spearman's rho between the paper's column and ours over the {number} rows that have both: "
        f"{interval_text(interval, 2)}: {verdict}. The interval (95 %) is a percentile bootstrap of the seeds within "
        f"each row ({DRAWS} draws from a fixed generator). With few seeds it is rather too narrow, and it knows "
        "nothing of the noise in the paper's numbers, one per row."
    )


def _limits(
    rows: Sequence[Row],
    controls: Sequence[Control],
    claims: Mapping[str, float],
    small: Comparison,
    skip: Interval | None,
) -> str:
    values = claims.values()
    points = [
        "It tests one thing: whether an operator joins places that lie far apart. The label is the class of the one "
        "digit on the marker's row or column. Rows and columns are what strips see best: the task suits SW by design.",
        "It does not test the ranking on ImageNet. Networks and images are small, and the paper's rows lie within "
        f"{max(values) - min(values):.2f} points: compare directions and ranks between the columns, never accuracies.",
        f"Up to {distance.LAYOUT_CEILING:.0f} % needs no relation between marker and digit, only the layout of the "
        f"four digits; chance is {distance.CHANCE:.0f} %.",
        "Rows that the seeds cannot tell apart are called undecided and were not tuned until they agree. Fewer than "
        f"{VERDICT_SEEDS} seeds give no verdict.",
        "The skip and its BN matter too: judge the kernel by the control that has both, not by the plain one."
        + _skip_text(controls, skip),
    ]
    if untrained := [row.label for row in rows if row.run not in small.results]:
        points.append(
            f"Not expressible at {small.profile} scale: {', '.join(untrained)}. What sets such a row apart vanishes "
            "there, so only the row that its cell names was trained, and it does not enter the rank correlation twice."
        )
    return "\n".join(f"- {point}" for point in points)


def _skip_difference(controls: Sequence[Control], small: Comparison) -> Interval | None:
    """The first control minus the second, the plain one, where both were run in one network."""
    if len(controls) < 2 or controls[0].of != controls[1].of:
        return None
    return small.difference(controls[0].run, controls[1].run)


def _skip_text(controls: Sequence[Control], skip: Interval | None) -> str:
    if skip is None:
        return ""
    return f" Here they differ by {interval_text(skip, 1)} points ({controls[0].model}, minus {controls[1].model})."


def _footnotes(rows: Sequence[Row | Control], columns: Sequence[Comparison]) -> list[str]:
    notes = {
        row.run: [footnote(column.results[row.run]) for column in columns if row.run in column.results] for row in rows
    }
    return [f"[^{run}]: {' '.join(parts)}" for run, parts in notes.items() if parts]


def _side_text(small: Comparison, control: Control) -> str:
    side = small.side(control.run, control.of)
    if isinstance(side, str):
        return side
    label = small.labels[control.of]
    return {1: f"above {label}", -1: f"below {label}", 0: "undecided"}[side]


def _claimed(row: Row, claims: Mapping[str, float]) -> float | None:
    """The paper's difference to the reference row, in points; None for a row of ours."""
    return claims[row.label] - claims[REFERENCE] if row.label in claims else None


def _gap(full: Comparison, row: Row, claims: Mapping[str, float]) -> Interval | None:
    values = full.top1(row.run) if row.label in claims else []
    return statistics.mean_interval([value - claims[row.label] for value in values]) if values else None


def _reference(rows: Sequence[Row]) -> Row:
    return next(row for row in rows if row.label == REFERENCE)


def _claims(rows: Sequence[Row], paper: Path) -> dict[str, float]:
    """What the paper prints, in %, by label: of the rows that it has."""
    printed = read_claims(paper, CLAIM)
    if REFERENCE not in printed:
        raise ValueError(f"Table 2 needs the paper's number of {REFERENCE}, but {paper} has no such id.")
    return {row.label: float(printed[row.label]) for row in rows if row.label in printed}


def _check(rows: Sequence[Row], controls: Sequence[Control], evidence: Sequence[Evidence]) -> None:
    runs = {row.run: row for row in rows}
    labels = Counter(row.label for row in rows)
    if REFERENCE not in labels:
        raise ValueError(f"Table 2 needs row {REFERENCE}, which the differences are taken to; got {', '.join(runs)}.")
    if twice := [label for label, number in labels.items() if number > 1]:
        raise ValueError(f"Table 2 needs one label per row, got {', '.join(twice)} more than once. Rename all but one.")
    for row in rows:
        for profile in (item.profile for item in evidence):
            target = row.same_as.get(profile)
            if target and (target not in runs or runs[target].same_as.get(profile)):
                raise ValueError(
                    f"Row {row.run} is the same as {target} in profile {profile}, but {target} is not trained for this "
                    "table. Name the row that is."
                )
    for control in controls:
        if control.of not in runs:
            raise ValueError(f"Control {control.run} needs a row of this table to compare with, got {control.of}.")
