"""What a handful of seeds can say: means, intervals, differences (paired or not), many rows at once, slopes and ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
VERDICT_SEEDS = 3  # fewer seeds give numbers but no verdict
DRAWS = 10_000  # of a bootstrap


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval.

    Attributes
    ----------
    estimate : float
    low, high : float or None
        None where the sample is too small to give an interval.
    seeds : int
        The smallest number of seeds behind any sample that entered.
    p : float or None
        Two-sided, of the test that this interval inverts: below 0.05 where it excludes 0. None without an interval, and
        for a bootstrap.
    """

    estimate: float
    low: float | None
    high: float | None
    seeds: int
    p: float | None = None

    @property
    def sign(self) -> int:
        """+1 or -1 where the interval lies wholly on one side of 0, else 0."""
        if self.low is None or self.high is None or self.low <= 0 <= self.high:
            return 0
        return 1 if self.low > 0 else -1

    @property
    def decidable(self) -> bool:
        """Whether there are enough seeds for a verdict."""
        return self.seeds >= VERDICT_SEEDS


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean.

    Raises
    ------
    ValueError
        If the sample is empty or holds a value that is not finite.
    """
    return float(_sample(values).mean())


def sd(values: Sequence[float]) -> float | None:
    """Sample standard deviation (n - 1 in the denominator); None for fewer than two values."""
    sample = _sample(values)
    return float(sample.std(ddof=1)) if sample.size > 1 else None


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean with Student's t interval over seeds.

    Parameters
    ----------
    values : sequence of float, length n
        One value per seed; n = 1 gives no interval.
    """
    from scipy import stats

    sample = _sample(values)
    centre = float(sample.mean())
    if sample.size < 2:
        return Interval(centre, None, None, sample.size)
    error = float(stats.sem(sample))
    if error == 0:
        return _exact(centre, sample.size)
    low, high = stats.t.interval(CONFIDENCE, sample.size - 1, loc=centre, scale=error)
    p = 2 * stats.t.sf(abs(centre / error), sample.size - 1)
    return Interval(centre, float(low), float(high), sample.size, float(p))


def welch_interval(ours: Sequence[float], reference: Sequence[float]) -> Interval:
    """Difference of two means, ``ours - reference``, with Welch's t interval (unequal variances).

    Parameters
    ----------
    ours, reference : sequence of float
        One value per seed; with fewer than two on either side there is no interval.
    """
    from scipy import stats

    a, b = _sample(ours), _sample(reference)
    difference = float(a.mean() - b.mean())
    seeds = min(a.size, b.size)
    if seeds < 2:
        return Interval(difference, None, None, seeds)
    if np.ptp(a) == 0 and np.ptp(b) == 0:
        return _exact(difference, seeds)
    test = stats.ttest_ind(a, b, equal_var=False)
    interval = test.confidence_interval(CONFIDENCE)
    return Interval(difference, float(interval.low), float(interval.high), seeds, float(test.pvalue))


def paired_interval(ours: Mapping[int, float], reference: Mapping[int, float]) -> Interval | None:
    """Mean over seeds of ``ours - reference``, seed by seed, with Student's t interval of these differences.

    Narrower than Welch's where a seed moves both rows the same way (they share data order and masks' draws), wider where
    it does not: it has n - 1 degrees of freedom.

    Parameters
    ----------
    ours, reference : mapping of seed to float

    Returns
    -------
    Interval or None
        None where the two do not stand on the same seeds: leaving some out would change the means.
    """
    if not ours or ours.keys() != reference.keys():
        return None
    return mean_interval([ours[seed] - reference[seed] for seed in sorted(ours)])


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """p-values of a family of tests, corrected by Holm's step-down: below 0.05, all of them at once err in 1 of 20 families.

    S. Holm, "A simple sequentially rejective multiple test procedure", Scand. J. Statist. 6 (1979). It needs no
    independence, and the rows of a table have none: all are compared with one reference.

    Parameters
    ----------
    p_values : mapping of name to float
    """
    corrected, floor = {}, 0.0
    for done, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        floor = max(floor, min(1.0, (len(p_values) - done) * p))
        corrected[name] = floor
    return corrected


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Least-squares slope of y over x, in units of y per unit of x."""
    from scipy import stats

    return float(stats.linregress(_sample(x), _sample(y)).slope)


def rank_correlation(
    claims: Sequence[float], samples: Sequence[Sequence[float]], draws: int = DRAWS, seed: int = 0
) -> Interval | None:
    """Spearman's rho between claimed values and the means of our samples, with a bootstrap interval.

    Every draw resamples the seeds within each row with replacement; the interval is the 2.5th to 97.5th percentile of
    rho. It covers the noise of seeds only: rows and claims are taken as given.

    Parameters
    ----------
    claims : sequence of float, length rows
    samples : sequence of sequences of float, length rows
        Our values per row, one per seed.
    draws : int
    seed : int
        Of the private generator.

    Returns
    -------
    Interval or None
        None where rho is undefined: fewer than three rows, or all claims or all means equal. No interval where a row
        has a single seed.
    """
    from scipy import stats

    if len(claims) != len(samples):
        raise ValueError(f"rank_correlation needs one sample per claim ({len(claims)}), got {len(samples)}.")
    rows = [_sample(values) for values in samples]
    means = np.array([row.mean() for row in rows])
    if len(rows) < 3 or np.ptp(_sample(claims)) == 0 or np.ptp(means) == 0:
        return None
    rho = float(stats.spearmanr(claims, means).statistic)
    seeds = min(row.size for row in rows)
    if seeds < 2:
        return Interval(rho, None, None, seeds)
    generator = np.random.RandomState(seed)
    drawn = np.stack([row[generator.randint(row.size, size=(draws, row.size))].mean(axis=1) for row in rows], axis=1)
    ranks = stats.rankdata(drawn, axis=1)  # (draws, rows)
    claimed = stats.rankdata(claims)
    ranks -= ranks.mean(axis=1, keepdims=True)
    claimed -= claimed.mean()
    lengths = np.sqrt((ranks**2).sum(axis=1) * (claimed**2).sum())
    ranked = lengths > 0  # a draw in which all rows tie has no rho
    low, high = np.percentile(ranks[ranked] @ claimed / lengths[ranked], [2.5, 97.5])
    return Interval(rho, float(low), float(high), seeds)


def _exact(value: float, seeds: int) -> Interval:
    """Of seeds that all say the same."""
    return Interval(value, value, value, seeds, 0.0 if value else 1.0)


def _sample(values: Sequence[float]) -> np.ndarray:
    sample = np.asarray(values, dtype=np.float64)
    if sample.size == 0 or not np.isfinite(sample).all():
        raise ValueError(
            f"Statistics need at least one value and only finite ones, got {sample.tolist()}. "
            "Leave out the runs that have no result."
        )
    return sample
