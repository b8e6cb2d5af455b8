"""Rows of a paper's table against our runs of one profile: means, differences, directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from swconv.reporting import statistics
from swconv.reporting.runs import Evidence, Results, Run
from swconv.reporting.statistics import VERDICT_SEEDS, Interval
from swconv.reporting.table import count

NO_VERDICT = f"no verdict (n < {VERDICT_SEEDS})"


@dataclass(frozen=True)
class Row:
    """A row of the table: the paper's, or one of ours beside them.

    Parameters
    ----------
    run : str
        Run id, ``sw03``.
    label : str
        The paper's id, ``#3``, by which its number is found; a row of ours has a label that the paper does not have.
    model : str
        The paper's wording, or ours.
    same_as : mapping of profile to run id or None
        The row that resolves to the same configuration in that profile, and is trained in its place.
    """

    run: str
    label: str
    model: str
    same_as: Mapping[str, str | None] = field(default_factory=dict)


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
    controls : sequence of Control
    """

    def __init__(self, evidence: Evidence, rows: Sequence[Row], controls: Sequence[Control] = ()):
        self.profile = evidence.profile
        self.labels = {row.run: row.label for row in rows}
        self.same_as = {row.run: row.same_as.get(self.profile) for row in rows}
        trained = [row.run for row in rows if not self.same_as[row.run]] + [control.run for control in controls]
        self.results: dict[str, Results] = {run: evidence.read(run) for run in trained}

    @property
    def finished(self) -> tuple[Run, ...]:
        return tuple(run for results in self.results.values() for run in results.finished)

    def of(self, run: str) -> Results:
        """The runs that stand behind a row: its own, or those of the row it equals."""
        return self.results[self.same_as.get(run) or run]

    def top1(self, run: str) -> list[float]:
        """One value per finished seed; none where the row was not trained itself."""
        return _top1(self.results[run]) if run in self.results else []

    def state(self, run: str) -> str:
        """``measured``, or the words that stand in place of a number."""
        if run not in self.results:
            return f"not expressible at {self.profile} scale, same as {self.labels[self.same_as[run]]}"
        return "measured" if self.top1(run) else "not run"

    def text(self, run: str, digits: int) -> str:
        """Mean ± sd and n, or why there is none."""
        values = self.top1(run)
        if not values:
            return self.state(run)
        spread = statistics.sd(values)
        text = f"{statistics.mean(values):.{digits}f}" + (f" ± {spread:.{digits}f}" if spread is not None else "")
        missing = self.results[run].missing
        absent = f"; {count(len(missing), 'seed')} not run" if missing else ""
        return f"{text} (n = {len(values)}{absent})"

    def difference(self, run: str, reference: str) -> Interval | None:
        """Of a row's mean to that of another; None where either has no number or both stand on the same runs."""
        ours, theirs = self.top1(run), _top1(self.of(reference))
        if not ours or not theirs or self.results[run] is self.of(reference):
            return None
        return statistics.welch_interval(ours, theirs)

    def side(self, run: str, reference: str) -> int | str:
        """+1 above the reference, -1 below it, 0 undecided, or the words for why there is no verdict."""
        interval = self.difference(run, reference)
        if interval is None:
            return "-"
        return interval.sign if interval.decidable else NO_VERDICT

    def direction(self, run: str, reference: str, claimed: float | None) -> str:
        """Whether our difference to the reference has the sign of the paper's (``claimed``, in any unit)."""
        if claimed is None:
            return "-"
        side = self.side(run, reference)
        if isinstance(side, str):
            return side
        if side * claimed == 0:
            return "undecided"
        return "agrees" if side * claimed > 0 else "disagrees"


def _top1(results: Results) -> list[float]:
    values = results.values("top1")
    if len(values) < len(results.finished):
        paths = ", ".join(run.path for run in results.finished if "top1" not in run.values)
        raise ValueError(
            f"A row needs top1 of every finished seed, and it is not in {paths}. Evaluate these runs anew."
        )
    return values
