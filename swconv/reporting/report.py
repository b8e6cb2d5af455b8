"""A page on runs: a table of a paper row by row on a small task and, where it was run, at full scale; or a figure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from swconv.atomic import write_atomic
from swconv.reporting import curves, distance, filters, statistics
from swconv.reporting.accuracies import Accuracy, Place
from swconv.reporting.circumstances import footnote, header_line
from swconv.reporting.comparison import NO_VERDICT, Comparison, Control, Row
from swconv.reporting.costs import accuracy_cell
from swconv.reporting.runs import Evidence, Run
from swconv.reporting.statistics import DRAWS, VERDICT_SEEDS, Interval
from swconv.reporting.table import (
    Cell,
    Measured,
    Sheet,
    interval_cells,
    interval_text,
    markdown_table,
    read_claims,
)

SIGNIFICANT = 1 - statistics.CONFIDENCE
_NUMBER = re.compile(r"-?\d+(\.\d+)?")


@dataclass(frozen=True)
class Column:
    """Accuracies that a paper prints below one heading, and the runs that stand for them.

    Attributes
    ----------
    text : str
        The heading, ``120 epochs``.
    reference : str
        Label of the row that the differences are taken to.
    rows : tuple of Row
        In the paper's order, then any of ours: these have no number of the paper, hence no direction and no part in the
        rank correlation.
    claim : str or None
        Column of the claims file; None where the paper has a picture only.
    axis : str or None
        What the rows' places are, where they are points of a figure.
    logarithmic : bool
        The axis.
    """

    text: str
    reference: str
    rows: tuple[Row, ...]
    claim: str | None = None
    axis: str | None = None
    logarithmic: bool = False

    @property
    def base(self) -> str | None:
        """Run id of the reference row."""
        return next(row.run for row in self.rows if row.label == self.reference)


@dataclass(frozen=True)
class Plan:
    """A page, as data.

    Attributes
    ----------
    name : str
        ``table2``, ``slak/table9``: where it goes, and what remakes it.
    title : str
    columns : tuple of Column
    controls : tuple of Control
    claims : Path or None
        The paper's table.
    named_by : tuple of str
        Columns of the claims file whose values, joined by commas, name a row.
    sections : tuple of str
        ``distance`` (accuracy against distance, with its figure), ``filters`` (where they live), ``curves`` (of training).
    notes : str
        Said above the table, where there is something to say.
    origins : mapping of run id to str
        How sure a row's settings are and what was taken where nothing is published; its footnote says so.
    """

    name: str
    title: str
    columns: tuple[Column, ...]
    controls: tuple[Control, ...] = ()
    claims: Path | None = None
    named_by: tuple[str, ...] = ("id",)
    sections: tuple[str, ...] = ()
    notes: str = ""
    origins: Mapping[str, str] = field(default_factory=dict)

    @property
    def rows(self) -> tuple[Row, ...]:
        return tuple(row for column in self.columns for row in column.rows)


def build_report(
    plan: Plan,
    proxy: Evidence,
    out: Path,
    *,
    command: str,
    imagenet: Evidence | None = None,
    published: Mapping[Place, Accuracy] | None = None,
    extra: Sequence[str] = (),
) -> None:
    """Write NAME.md, NAME.csv and NAME.provenance.json, and the figures that the plan asks for below figures/.

    The same runs give the same bytes. What was not run says so; nothing is filled in.

    Parameters
    ----------
    plan : Plan
    proxy : Evidence
        The runs on the digit task (profile mini or smoke).
    out : Path
        Folder: reports/, or artifacts/smoke/reports/.
    command : str
        What a user types to make this page; printed in it.
    imagenet : Evidence, optional
        The runs of the paper profile; they get columns where at least one finished.
    published : mapping, optional
        `swconv.reporting.accuracies.read_accuracies` of published weights; those of the page's cells get a section.
    extra : sequence of str
        Blocks of Markdown that need no run.

    Raises
    ------
    ValueError
        If a reference or its number is missing, two rows have one label, a control names an unknown row, or
        a metrics file holds something else than finite numbers.
    OSError
        If a file cannot be written; each is then the old one or the new one, never a part.
    """
    _check(plan)
    claims = [_claims(plan, column) for column in plan.columns]
    small = Comparison(proxy, plan.rows, plan.controls)
    full = Comparison(imagenet, plan.rows) if imagenet else None
    if full and not full.finished:
        full = None
    page = _Page(plan, tuple(zip(plan.columns, claims, strict=True)), small, full)
    shown = [column for column in (full, small) if column]
    lines = distance.compared_lines(small, plan.rows, plan.controls) if "distance" in plan.sections else {}
    slopes = distance.slope_differences(lines, plan.controls)
    figures = out / "figures" / plan.name
    blocks = [
        f"# {plan.title}",
        "\n".join(header_line(column.profile, column.finished) for column in shown)
        + f"\n- Made by `{command}` from the metrics of these runs; not to be edited.",
        *([plan.notes] if plan.notes else []),
        *page.tables(),
        *page.controls(),
        *page.ranks(),
        *_published_section(plan, published or {}),
    ]
    if "distance" in plan.sections:
        link = _link(plan, "_distance.svg")
        blocks += [
            "## Accuracy against distance",
            f"![Top-1 against the distance between marker and target, SW and controls]({link})",
            distance.caption(small.profile),
            distance.report(lines, slopes, plan.rows, plan.controls),
        ]
        distance.draw(lines, small.profile, figures.with_name(f"{figures.name}_distance.svg"))
    blocks += page.figure(figures, {"mini": proxy} | ({"paper": imagenet} if imagenet else {}))
    if "filters" in plan.sections:
        blocks += filters.section(small, {name: row.run for name, row in page.named()})
    blocks += [*extra, "## What this page can and cannot show", page.limits(), *page.footnotes(shown)]
    sheet = page.sheet(slopes)
    base = out / plan.name
    sheet.write_csv(base.with_name(f"{base.name}.csv"))
    sheet.write_provenance(base.with_name(f"{base.name}.provenance.json"), command)
    write_atomic(base.with_name(f"{base.name}.md"), ("\n\n".join(blocks) + "\n").encode())


def verdicts(plan: Plan, imagenet: Evidence, published: Mapping[Place, Accuracy]) -> Counter[str]:
    """How many of the accuracies that a paper prints in a page's columns are reproduced at its scale, by verdict.

    Parameters
    ----------
    plan : Plan
        With claims.
    imagenet : Evidence
        The runs of the paper profile. Runs on the small task reproduce no number.
    published : mapping
        As for `build_report`: where published weights were measured, they are what counts.

    Returns
    -------
    Counter
        Of weights ``equal`` (at the printed digits) and ``differs``; of runs ``reproduced`` (the paper's number lies in the
        95 % interval of our mean, three seeds or more), ``differs``, ``no verdict (n < 3)``, ``diverged``; else ``not run``.
    """
    full, found = Comparison(imagenet, plan.rows), Counter[str]()
    for column in plan.columns:
        runs = {row.label: row.run for row in column.rows}
        for label, (place, printed) in _printed(plan, column).items():
            if measured := published.get(place):
                found[accuracy_cell(printed, measured, cited=False).verdict] += 1
            else:
                found[full.reproduced(runs.get(label), _float(printed))] += 1
    return found


@dataclass(frozen=True)
class _Page:
    """What goes onto the page: columns with the paper's numbers by label, and the runs of both profiles."""

    plan: Plan
    columns: tuple[tuple[Column, Mapping[str, str]], ...]
    small: Comparison
    full: Comparison | None

    # --- the table ------------------------------------------------------------------------------

    def tables(self) -> list[str]:
        """The rows and what they say together, column by column."""
        several = len(self.columns) > 1
        blocks = []
        for column, claims in self.columns:
            blocks += [f"## {_capital(column.text)}"] if several else []
            blocks += [self._table(column, claims), self._tally(column, claims)]
        return blocks

    def _table(self, column: Column, claims: Mapping[str, str]) -> str:
        small, full, base = self.small, self.full, column.base
        by_id = self.plan.named_by == ("id",)
        header = ["id", "model"] if by_id else [", ".join(self.plan.named_by).replace("_", " ")]
        header += [f"paper, top-1 % (ImageNet, {column.text})"] if column.claim else []
        if full:
            header += ["ours, top-1 % (ImageNet)"] + ["ours - paper, points (95 %)"] * bool(column.claim)
        header += [f"ours, top-1 % ({small.profile} task)", f"difference to {column.reference}, points (95 %)"]
        header += ["direction" if column.claim else "side", "after Holm"]
        corrected = small.corrected([row.run for row in column.rows], base)
        lines = []
        for row in column.rows:
            line = [row.label, row.model] if by_id else [row.label]
            line += [claims.get(row.label, "-")] if column.claim else []
            if full:
                line.append(full.text(row.run, 2))
                line += [interval_text(full.gap(row.run, _float(claims.get(row.label))), 2)] if column.claim else []
            ran = row.run in small.results or (full and row.run in full.results)
            line.append(small.text(row.run, 1) + (f" [^{row.run}]" if ran or row.run in self.plan.origins else ""))
            if row.label == column.reference:
                line += ["reference", "-", "-"]
            else:
                line.append(interval_text(small.difference(row.run, base), 1))
                line += [self._verdict(column, claims, row), self._verdict(column, claims, row, corrected)]
            lines.append(line)
        return markdown_table(header, lines)

    def _verdict(self, column: Column, claims: Mapping[str, str], row: Row, corrected: Mapping[str, float] | None = None,
                 paired: bool = False) -> str:
        """Direction against the paper's, or the side where the paper has no numbers; `corrected` takes some back."""
        kept = corrected is None or corrected.get(row.run, 0.0) < SIGNIFICANT
        if column.claim:
            claimed = _float(claims[row.label]) - _float(claims[column.reference]) if row.label in claims else None
            return self.small.direction(row.run, column.base, claimed, kept, paired)
        side = self.small.side(row.run, column.base, paired)
        return side if isinstance(side, str) else {1: "above", -1: "below", 0: "undecided"}[side if kept else 0]

    def _tally(self, column: Column, claims: Mapping[str, str]) -> str:
        small, base = self.small, column.base
        rows = [row for row in column.rows if row.label != column.reference and (row.label in claims or not column.claim)]
        corrected = small.corrected([row.run for row in column.rows], base)

        def listed(**how) -> str:
            found: Counter[str] = Counter()
            for row in rows:
                verdict = self._verdict(column, claims, row, **how)
                if verdict == "-":
                    state = small.state(row.run).partition(",")[0]
                    verdict = f"without {column.reference} to compare with" if small.top1(row.run) else state
                found[verdict] += 1
            return ", ".join(f"{number} {name}" for name, number in sorted(found.items()))

        differences = [small.difference(row.run, base) for row in column.rows]
        taken = sum(difference is not None and difference.low is not None for difference in differences)
        what = f"Direction against {column.reference}, {len(rows)} rows of the paper" if column.claim else (
            f"Side of {column.reference}, {len(rows)} rows")
        text = (
            f"{what}: {listed()}. A difference is that of the "
            "means, with Welch's t interval over seeds; its direction is undecided where the interval includes 0. The "
            f"intervals are taken one by one: of {taken}, about {0.05 * taken:.1f} would exclude 0 by chance alone."
        )
        if corrected:
            text += (
                f" Holm's correction holds for all {len(corrected)} that can be decided at once: "
                f"{listed(corrected=corrected)}. Paired by seed instead of Welch's, one by one again: {listed(paired=True)}."
            )
        if self.full and column.claim:
            verdicts = Counter(self.full.reproduced(row.run, _float(claims.get(row.label))) for row in column.rows)
            del verdicts[""]
            said = ", ".join(f"{number} {name}" for name, number in sorted(verdicts.items()))
            text += f" On ImageNet, of the {verdicts.total()} numbers of the paper: {said} (reproduced: in our 95 % interval)."
        return text

    # --- controls, ranks, figures, limits -------------------------------------------------------

    def controls(self) -> list[str]:
        """Each control beside the row whose network it shares."""
        if not self.plan.controls:
            return []
        small = self.small
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
            for control in self.plan.controls
        ]
        return ["## Controls: the same network without a large kernel", markdown_table(header, lines)]

    def ranks(self) -> list[str]:
        """Whether the paper's order of rows is ours."""
        told = [
            (f"{_capital(column.text)}. " if len(self.columns) > 1 else "") + self._rank_text(column, claims)
            for column, claims in self.columns if column.claim
        ]
        return ["## Rank correlation with the paper", *told] if told else []

    def _rank_text(self, column: Column, claims: Mapping[str, str]) -> str:
        found, number = self._rank(column, claims), len(self._ranked(column, claims))
        if found is None:
            return "No correlation: Spearman's rho needs at least three rows with different results."
        interval, _ = found
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

    def _rank(self, column: Column, claims: Mapping[str, str]) -> tuple[Interval, tuple[Run, ...]] | None:
        present = self._ranked(column, claims)
        printed, ours = [_float(claims[row.label]) for row in present], [self.small.top1(row.run) for row in present]
        interval = statistics.rank_correlation(printed, ours)
        return (interval, tuple(run for row in present for run in self.small.of(row.run).ended)) if interval else None

    def _ranked(self, column: Column, claims: Mapping[str, str]) -> list[Row]:
        """The rows that have a number of the paper and one of ours, and of which no seed diverged."""
        return [row for row in column.rows
                if row.label in claims and self.small.top1(row.run) and not self.small.diverged(row.run)]

    def figure(self, path: Path, evidence: Mapping[str, Evidence]) -> list[str]:
        """Draw the two panels of a figure, left and right, and write their points; none where the page is a table."""
        scales = [self.full, self.small] if self.full else [self.small]     # what is drawn: the fullest scale
        if "curves" in self.plan.sections:
            proxy, imagenet = evidence["mini"], evidence.get("paper")
            sources = [imagenet, proxy] if self.full else [proxy]
            panels = [curves.over_epochs(scale, source, self.plan.rows) for scale, source in zip(scales, sources, strict=True)]
            said = "Training loss (left) and top-1 on the validation images (right) over epochs, from the logs of training"
        elif all(column.axis for column in self.plan.columns):
            panels = [tuple(curves.along(scale, column.rows, column.axis, column.logarithmic) for column in self.plan.columns)
                      for scale in scales]
            said = "Top-1 at the points of the tables above"
        else:
            return []
        sides = ("_left.svg", "_right.svg")
        curves.draw([(panel, path.with_name(path.name + side)) for panel, side in zip(panels[0], sides, strict=True)])
        curves.write_points([panel for pair in panels for panel in pair], path.with_name(f"{path.name}.csv"))
        links = " ".join(f"![{panel.title}]({_link(self.plan, side)})" for panel, side in zip(panels[0], sides, strict=True))
        points = f"[points]({_link(self.plan, '.csv')})"
        return ["## Figure", links, f"{said}; mean, and a band of one sd over seeds ({points})."]

    def limits(self) -> str:
        """What may and may not be read from the page."""
        small = self.small
        spans = [max(values) - min(values) for _, claims in self.columns if (values := list(map(_float, claims.values())))]
        within = f", and the paper's rows lie within {max(spans):.2f} points" if spans else ""
        points = [
            "It tests one thing: whether an operator joins places that lie far apart. The label is the class of the one "
            "digit on the marker's row or column. Rows and columns are what strips see best: the task suits SW and SLaK by "
            "design.",
            f"It does not test the ranking on ImageNet. Networks and images are small{within}: compare directions and ranks "
            "between the columns, never accuracies.",
            f"Up to {distance.LAYOUT_CEILING:.0f} % needs no relation between marker and digit, only the layout of the "
            f"four digits; chance is {distance.CHANCE:.0f} %.",
            "Rows that the seeds cannot tell apart are called undecided and were not tuned until they agree. Fewer than "
            f"{VERDICT_SEEDS} seeds give no verdict, and neither does a row of which a seed diverged.",
        ]
        if self.plan.controls:
            points.append(
                "The skip and its BN matter too: judge the kernel by the control that has both, not by the plain one."
                + self._skip_text()
            )
        if untrained := [name for name, row in self.named() if small.same_as.get(row.run)]:
            points.append(
                f"Not expressible at {small.profile} scale: {'; '.join(untrained)}. What sets such a row apart vanishes "
                "there, so only the row that its cell names was trained, and it does not enter the rank correlation twice."
            )
        return "\n".join(f"- {point}" for point in points)

    def _skip(self) -> Interval | None:
        """The first control minus the second, the plain one, where both were run in one network."""
        controls = self.plan.controls
        if len(controls) < 2 or controls[0].of != controls[1].of:
            return None
        return self.small.difference(controls[0].run, controls[1].run)

    def _skip_text(self) -> str:
        if (skip := self._skip()) is None:
            return ""
        first, second = self.plan.controls[:2]
        return f" Here they differ by {interval_text(skip, 1)} points ({first.model}, minus {second.model})."

    def footnotes(self, shown: Sequence[Comparison]) -> list[str]:
        """How sure the settings are and where the numbers come from, run by run."""
        origins = self.plan.origins
        notes = {
            row.run: [*([origins[row.run]] if row.run in origins else []),
                      *(footnote(column.results[row.run]) for column in shown if row.run in column.results)]
            for row in (*self.plan.rows, *self.plan.controls)
        }
        return [f"[^{run}]: {' '.join(parts)}" for run, parts in notes.items() if parts]

    # --- the spreadsheet ------------------------------------------------------------------------

    def sheet(self, slopes: Mapping[str, Interval]) -> Sheet:
        """One line per row and column of the table, then controls, then ranks."""
        small, full, controls = self.small, self.full, self.plan.controls
        lines: list[dict[str, Cell]] = []
        for column, claims in self.columns:
            corrected = small.corrected([row.run for row in column.rows], column.base)
            for row in column.rows:
                printed = claims.get(row.label)
                line: dict[str, Cell] = {"id": self._named(row.label, column), "run": row.run, "model": row.model,
                                         "claim": column.claim, "paper_top1_pct": printed}
                line["paper_verdict"] = (full.reproduced(row.run, _float(printed)) if full else "not run") if printed else ""
                if full:
                    line |= self._cells(full, row.run, column.base, column.reference, "imagenet")
                    gap = full.gap(row.run, _float(printed))
                    line |= interval_cells("imagenet_minus_paper_pct", gap, "%", full.of(row.run).ended)
                line |= self._cells(small, row.run, column.base, column.reference, small.profile)
                line[f"{small.profile}_p_holm"] = Measured(corrected[row.run], "", self._pair(small, row.run, column.base)) \
                    if row.run in corrected else None
                line["direction"] = self._verdict(column, claims, row)
                line["direction_holm"] = self._verdict(column, claims, row, corrected)
                line["direction_paired"] = self._verdict(column, claims, row, paired=True)
                lines.append(line)
        for control in controls:
            line = {"id": control.run, "run": control.run, "model": control.model}
            line |= self._cells(small, control.run, control.of, small.labels[control.of], small.profile)
            line["direction"] = _side_text(small, control)
            name = f"{small.profile}_row_minus_control_slope_pct_per_{distance.CELL_PIXELS}px"
            pair = self._pair(small, control.of, control.run)
            line |= interval_cells(name, slopes.get(control.run), f"% {distance.PER_CELL}", pair)
            if control is controls[0]:
                pair = tuple(run for either in controls[:2] for run in small.of(either.run).ended)
                line |= interval_cells(f"{small.profile}_minus_plain_control_pct", self._skip(), "%", pair)
            lines.append(line)
        for column, claims in self.columns:
            if ranks := self._rank(column, claims):
                line = {"id": self._named("all rows", column)}
                lines.append(line | interval_cells(f"{small.profile}_rank_correlation", ranks[0], "", ranks[1]))
        return Sheet(list(dict.fromkeys(name for line in lines for name in line)), lines)

    def named(self) -> list[tuple[str, Row]]:
        """All rows, each under a name that no other one has."""
        return [(self._named(row.label, column), row) for column, _ in self.columns for row in column.rows]

    def _named(self, label: str, column: Column) -> str:
        return f"{label}, {column.text}" if len(self.columns) > 1 else label

    def _cells(self, scale: Comparison, run: str | None, reference: str | None, to: str, prefix: str) -> dict[str, Cell]:
        """Everything that a spreadsheet gets of one row in one profile; the columns are the same for every row."""
        values = scale.top1(run)
        spread = statistics.sd(values) if values else None
        difference = scale.difference(run, reference)
        line = distance.by_distance(scale, run, run) if values else None
        by_step = dict(zip(line.distances, line.accuracies, strict=True)) if line else {}
        own, pair = scale.of(run).ended, self._pair(scale, run, reference)
        cells: dict[str, Cell] = {
            f"{prefix}_state": scale.state(run),
            f"{prefix}_top1_pct": Measured(statistics.mean(values), "%", own) if values else None,
            f"{prefix}_sd_pct": Measured(spread, "%", own) if spread is not None else None,
            f"{prefix}_n": Measured(len(values), "seeds", own) if values else None,
            f"{prefix}_difference_to": to if difference else None,
            **interval_cells(f"{prefix}_difference_pct", difference, "%", pair),
            f"{prefix}_p": Measured(difference.p, "", pair) if difference and difference.p is not None else None,
            **interval_cells(f"{prefix}_paired_difference_pct", scale.paired(run, reference), "%", pair),
        }
        if "distance" in self.plan.sections:
            for step in distance.steps(scale):
                name = f"{prefix}_top1_at_{step * distance.CELL_PIXELS}px_pct"
                cells[name] = Measured(statistics.mean(by_step[step]), "%", own) if step in by_step else None
            if distance.steps(scale):
                name = f"{prefix}_slope_pct_per_{distance.CELL_PIXELS}px"
                cells |= interval_cells(name, line.slope if line else None, f"% {distance.PER_CELL}", own)
        if "filters" in self.plan.sections:
            for stage, share in filters.alive(scale, run).items():
                cells[f"{prefix}_filters_alive_stage{stage}_pct"] = None if share is None else Measured(share, "%", own)
        return cells

    @staticmethod
    def _pair(scale: Comparison, run: str | None, reference: str | None) -> tuple[Run, ...]:
        """The runs behind a difference."""
        return scale.of(run).ended + scale.of(reference).ended


def _side_text(small: Comparison, control: Control) -> str:
    side = small.side(control.run, control.of)
    if isinstance(side, str):
        return side
    label = small.labels[control.of]
    return {1: f"above {label}", -1: f"below {label}", 0: "undecided"}[side]


def _link(plan: Plan, end: str) -> str:
    """From the page to a file of its figure."""
    return f"{'../' * plan.name.count('/')}figures/{plan.name}{end}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _float(printed: str | None) -> float | None:
    return None if printed is None else float(printed)


def _claims(plan: Plan, column: Column) -> dict[str, str]:
    """What the paper prints in a column, in %, by label: of the rows that it has a number for."""
    if plan.claims is None or column.claim is None:
        return {}
    printed = _printed(plan, column)
    numbers = {row.label: printed[row.label][1] for row in column.rows if row.label in printed}
    if column.reference not in numbers:
        raise ValueError(
            f"{_capital(plan.name)} needs the paper's number of {column.reference}, but {plan.claims} has no such "
            f"{' and '.join(plan.named_by)}."
        )
    return numbers


def _printed(plan: Plan, column: Column) -> dict[str, tuple[Place, str]]:
    """Every number that a paper prints in a column, and its cell, by label."""
    if plan.claims is None or column.claim is None:
        return {}
    cells = enumerate(read_claims(plan.claims, column.claim, plan.named_by).items())
    return {label: ((plan.claims.stem, i, column.claim), printed) for i, (label, printed) in cells
            if _NUMBER.fullmatch(printed)}


def _published_section(plan: Plan, published: Mapping[Place, Accuracy]) -> list[str]:
    """What published weights measure on ImageNet, of the cells that they fill; none where nothing was measured."""
    lines, notes = [], {}
    for column in plan.columns:
        cells = _printed(plan, column)
        for row in column.rows:
            place, printed = cells.get(row.label, (None, ""))
            if measured := published.get(place):
                mark = notes.setdefault(measured.told, f"[^weights{len(notes) + 1}]")
                verdict = accuracy_cell(printed, measured, cited=False).verdict
                lines.append([row.label, column.text, printed, f"{measured.top1:.2f} {mark}", verdict])
    if not lines:
        return []
    header = ["row", "column", "paper, top-1 %", "measured, top-1 % (ImageNet)", "at the printed digits"]
    return ["## Published weights", markdown_table(header, lines), *(f"{mark}: {told}." for told, mark in notes.items())]


def _check(plan: Plan) -> None:
    name, runs = _capital(plan.name), {row.run for row in plan.rows}
    for column in plan.columns:
        labels = Counter(row.label for row in column.rows)
        if column.reference not in labels:
            raise ValueError(
                f"{name} needs row {column.reference}, which the differences are taken to; got {', '.join(labels)}."
            )
        if twice := [label for label, number in labels.items() if number > 1]:
            raise ValueError(f"{name} needs one label per row, got {', '.join(twice)} more than once. Rename all but one.")
    for control in plan.controls:
        if control.of not in runs:
            raise ValueError(f"Control {control.run} needs a row of this table to compare with, got {control.of}.")
