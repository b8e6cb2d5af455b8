"""SW Table 1, its column of formulas: written correctly and evaluated for the four stages of SLaK-T at 224 px."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path

from swconv.reporting.table import markdown_table

STAGES = ((56, 51), (28, 49), (14, 47), (7, 13))  # side H = W of the map and extent M, in pixels
GHOST = 0.23


@dataclass(frozen=True)
class Formula:
    """Multiply-adds of the large kernel per channel of its input: as it should be written, and of (H, M)."""

    text: str
    value: Callable[[int, int], float]
    note: str = ""


def laid_out(side: int, extent: int, small: int) -> float:
    """Both strips in pieces: each map grows along its strip, H' x W, by 2 ((N - 1) - N // 2)."""
    return 2 * (side + 2 * halo(small)) * side * ceil(extent / small) * small**2


def shared(side: int, extent: int, small: int, grown: bool) -> float:
    """One set of filters for both strips, on the whole map or on one that grows on all sides, H'' x W''."""
    return (side + 2 * halo(small) * grown) ** 2 * ceil(extent / small) * small**2


def halo(small: int) -> int:
    return (small - 1) - small // 2


# In the paper's order. The paper's H'' = H + ((N - 1) - N // 2) leaves out the factor 2: padding grows a map on both sides.
FORMULAS: Sequence[tuple[str, Formula]] = (
    ("#0", Formula("H W M N x 2", lambda h, m: 2 * h * h * m * 5, "without the small kernel")),
    ("#1", Formula("H' W ceil(M/N) N N x 2, H' = H + 2 ((N-1) - N//2)", lambda h, m: laid_out(h, m, 5),
                   "the paper writes H' W'; only the long side has to grow")),
    ("#1", Formula("as above", lambda h, m: laid_out(h, m, 5))),
    ("#2", Formula("H'' W'' ceil(M/N) N N, H'' = H + 2 ((N-1) - N//2)", lambda h, m: shared(h, m, 5, True),
                   "the paper's H'' leaves out the factor 2")),
    ("#3", Formula("H W ceil(M/N) N N", lambda h, m: shared(h, m, 5, False))),
    ("#4", Formula("as above", lambda h, m: shared(h, m, 5, False), "Rep branches merged")),
    ("#5", Formula("#4, and 2 x 3 parameters of norms per channel", lambda h, m: shared(h, m, 5, False),
                   "the norms fold into the kernel: no multiply-adds")),
    ("#6", Formula("#5 x (1-G)", lambda h, m: shared(h, m, 5, False) * (1 - GHOST))),
    ("#7", Formula("H W ceil(M/N3) N3 N3 x (1-G)", lambda h, m: shared(h, m, 3, False) * (1 - GHOST))),
    ("#8", Formula("as above", lambda h, m: shared(h, m, 3, False) * (1 - GHOST), "Rep branches merged")),
)


def section(claims: Path) -> str:
    """What the paper prints as a formula, the formula as it should be, and its value per channel and stage, as Markdown.

    Raises
    ------
    ValueError
        When the rows of the paper are not those that have a formula here.
    """
    with claims.open(encoding="utf-8", newline="") as file:
        printed = list(csv.DictReader(file))
    if [row["id"] for row in printed] != [label for label, _ in FORMULAS]:
        raise ValueError(f"{claims} needs the rows {', '.join(label for label, _ in FORMULAS)}, got "
                         f"{', '.join(row['id'] for row in printed)}.")
    rows = [
        [f"{row['id']}, {row['method']}", row["param_formula"], formula.text,
         *(f"{formula.value(*stage):,.0f}" for stage in STAGES), formula.note]
        for row, (_, formula) in zip(printed, FORMULAS, strict=True)
    ]
    stages = [f"H = {side}, M = {extent}" for side, extent in STAGES]
    return "\n\n".join([
        "## Formulas",
        "The paper heads its formulas `#param`; they hold H and W and count multiply-adds of the large kernel per channel. "
        "Values are for N = 5 (N3 = 3) and G = 0.23 at 224 px, per channel of the layer.",
        markdown_table(["id, method", "paper's formula", "as it should be", *stages, "note"], rows)])
