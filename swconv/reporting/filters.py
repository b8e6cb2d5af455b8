"""Where sparse training left SW filters, stage by stage: what a row's accuracy rests on."""

from __future__ import annotations

from collections.abc import Mapping

from swconv.reporting import statistics
from swconv.reporting.comparison import Comparison
from swconv.reporting.table import markdown_table

_NAME = "filters_alive_stage_"


def alive(comparison: Comparison, run: str | None) -> dict[int, float | None]:
    """Share of a row's SW filters that are not zero, in %, mean over seeds, for every stage where any run has some."""
    counted = {name for finished in comparison.finished for name in finished.values if name.startswith(_NAME)}
    shares = {}
    for stage in sorted(int(name.removeprefix(_NAME)) for name in counted):
        values = comparison.results[run].values(f"{_NAME}{stage}") if run in comparison.results else []
        shares[stage] = statistics.mean(values) if values else None
    return shares


def section(comparison: Comparison, rows: Mapping[str, str | None]) -> list[str]:
    """Blocks of a page, for the rows (name -> run) that were trained and have filters; none where no row has."""
    shares = {name: alive(comparison, run) for name, run in rows.items()}
    measured = {name: found for name, found in shares.items() if any(share is not None for share in found.values())}
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
                [name, *("-" if share is None else f"{share:.1f}" for share in found.values())]
                for name, found in measured.items()
            ],
        ),
    ]
