"""Rows of a paper's table against our runs of one profile: means, differences, directions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from swconv.reporting import statistics
from swconv.reporting.runs import Evidence, Results, Run
from swconv.reporting.statistics import VERDICT_SEEDS, Interval
from swconv.reporting.table import count

NO_VERDICT = f"no verdict (n < {VERDICT_SEEDS})"
DIVERGED = "diverged"


@dataclass(frozen=True)
class Row:
    """A row of the table: the paper's, or one of ours beside them.

    Parameters
    ----------
    run : str or None
        Run id, ``sw03``; None where the paper has a number that no run of ours stands for.
    label : str
        The paper's name of the row, ``#3``, by which its number is found; a row of ours has one that the paper does not have.
    model : str
        The paper's wording, or ours.
    trained_as : mapping of profile to run id or None
        The run that resolves to the same configuration in that profile, and is trained in this one's place.
    at : float or None
        Where the row stands on the axis of a figure.
    """

    run: str | None
    label: str
    model: str
    trained_as: Mapping[str, str | None] = field(default_factory=dict)
    at: float | None = None


@dataclass(frozen=True)
class Control:
    """The network of a row with another mixer in SW's place; the paper prints no number for it.

    Parameters
    ----------
    run : str
    model : str
    of : str
        Run id of the row whose network it shares, and to which it is compared.
    """

    run: str
    model: str
    of: str


class Comparison:
    """All runs of one profile, and what follows from their top-1 (in %) per row.

    Parameters
    ----------
    evidence : Evidence
    rows : sequence of Row
        Of all columns of a table.
    controls : sequence of Control

    Attributes
    ----------
    profile : str
    labels : dict of run id to label
    sources : dict of run id to run id
        Whose runs stand behind a row.
    same_as : dict of run id to run id or None
        The first row of the table that stands on the same runs.
    results : dict of run id to Results
        Of rows that are not the same as one before them, and of controls.
    """

    def __init__(self, evidence: Evidence, rows: Sequence[Row], controls: Sequence[Control] = ()):
        rows = [row for row in rows if row.run]
        self.profile = evidence.profile
        self.labels = {row.run: row.label for row in rows}
        self.sources = {row.run: row.trained_as.get(self.profile) or row.run for row in rows}
        first = {source: run for run, source in reversed(self.sources.items())}
        self.same_as = {run: first[source] if first[source] != run else None for run, source in self.sources.items()}
        shown = [run for run, other in self.same_as.items() if other is None]
        self.results: dict[str, Results] = {run: evidence.read(self.sources[run]) for run in shown}
        self.results |= {control.run: evidence.read(control.run) for control in controls}

    @property
    def finished(self) -> tuple[Run, ...]:
        return tuple(run for results in self.results.values() for run in results.finished)

    def of(self, run: str | None) -> Results:
        """The runs that stand behind a row: its own, or those of the row it equals; none behind a row without a run."""
        run = self.same_as.get(run) or run
        return self.results[run] if run else Results("", (), (), "")

    def top1(self, run: str | None) -> list[float]:
        """One value per seed that ended with one; none where the row was not trained itself."""
        return list(_top1(self.results[run]).values()) if run in self.results else []

    def diverged(self, run: str | None) -> tuple[Run, ...]:
        """The seeds of a row whose training was stopped because its loss was none."""
        return tuple(each for each in self.results[run].finished if each.diverged) if run in self.results else ()

    def state(self, run: str | None) -> str:
        """``measured``, or the words that stand in place of a number."""
        if self.same_as.get(run):
            return f"not expressible at {self.profile} scale, same as {self.labels[self.same_as[run]]}"
        return "measured" if self.top1(run) else DIVERGED if self.diverged(run) else "not run"

    def text(self, run: str | None, digits: int) -> str:
        """Mean ± sd and n, or why there is none."""
        values, lost = self.top1(run), self.diverged(run)
        if not values:
            steps = ", ".join(f"{each.values[DIVERGED]:.0f}" for each in lost)
            return self.state(run) + (f" at step {steps}" if lost else "")
        spread = statistics.sd(values)
        text = f"{statistics.mean(values):.{digits}f}" + (f" ± {spread:.{digits}f}" if spread is not None else "")
        missing = self.results[run].missing
        absent = f"; {count(len(lost), 'seed')} diverged" if lost else ""
        absent += f"; {count(len(missing), 'seed')} not run" if missing else ""
        return f"{text} (n = {len(values)}{absent})"

    def difference(self, run: str | None, reference: str | None) -> Interval | None:
        """Of a row's mean to that of another, Welch's; None where either has no number or both stand on the same runs."""
        pair = self._pair(run, reference)
        return statistics.welch_interval(*(list(values.values()) for values in pair)) if pair else None

    def paired(self, run: str | None, reference: str | None) -> Interval | None:
        """The same, seed by seed; None also where the seeds are not the same."""
        pair = self._pair(run, reference)
        return statistics.paired_interval(*pair) if pair else None

    def corrected(self, runs: Iterable[str | None], reference: str | None) -> dict[str, float]:
        """p-values of the differences that can be decided, corrected by Holm for being taken together; by run id."""
        taken = {run: self.difference(run, reference) for run in runs if not isinstance(self.side(run, reference), str)}
        return statistics.holm({run: interval.p for run, interval in taken.items()})

    def side(self, run: str | None, reference: str | None, paired: bool = False) -> int | str:
        """+1 above the reference, -1 below it, 0 undecided, or the words for why there is no verdict."""
        if self.diverged(run) or any(each.diverged for each in self.of(reference).finished):
            return DIVERGED
        interval = self.difference(run, reference)
        if interval is None:
            return "-"
        if paired and (interval := self.paired(run, reference)) is None:
            return "other seeds"
        return interval.sign if interval.decidable else NO_VERDICT

    def direction(self, run: str | None, reference: str | None, claimed: float | None, kept: bool = True,
                  paired: bool = False) -> str:
        """Whether our difference to the reference has the sign of the paper's.

        Parameters
        ----------
        run, reference : str
        claimed : float or None
            The paper's difference, in any unit.
        kept : bool
            False where a correction for many rows takes the difference back.
        paired : bool
            Seed by seed instead of Welch's.
        """
        if claimed is None:
            return "-"
        side = self.side(run, reference, paired)
        if isinstance(side, str):
            return side
        if claimed == 0:
            return "the paper has no difference"
        if side == 0 or not kept:
            return "undecided"
        return "agrees" if side * claimed > 0 else "disagrees"

    def reproduced(self, run: str | None, printed: float | None) -> str:
        """Whether the paper's number lies in the 95 % interval of our mean, for runs at the paper's scale."""
        if printed is None:
            return ""
        if self.state(run) != "measured":
            return self.state(run).partition(",")[0]
        if self.diverged(run):
            return DIVERGED
        gap = self.gap(run, printed)
        return NO_VERDICT if not gap.decidable else "reproduced" if gap.sign == 0 else "differs"

    def gap(self, run: str | None, printed: float | None) -> Interval | None:
        """Our mean less the paper's number, in points; None where either is missing."""
        values = self.top1(run) if printed is not None else []
        return statistics.mean_interval([value - printed for value in values]) if values else None

    def _pair(self, run: str | None, reference: str | None) -> tuple[dict[int, float], dict[int, float]] | None:
        if not self.top1(run) or not reference or self.results[run] is self.of(reference):
            return None
        pair = _top1(self.results[run]), _top1(self.of(reference))
        return pair if all(pair) else None


def _top1(results: Results) -> dict[int, float]:
    """By seed; a seed that diverged has none."""
    if lacking := [run.path for run in results.ended if "top1" not in run.values]:
        raise ValueError(
            f"A row needs top1 of every finished seed, and it is not in {', '.join(lacking)}. Evaluate these runs anew."
        )
    return {run.seed: run.values["top1"] for run in results.ended}
