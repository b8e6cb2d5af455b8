import itertools

import numpy as np
import pytest
from scipy import stats

from swconv.reporting import statistics


def test_sd_divides_by_n_minus_1_and_needs_two_values():
    assert statistics.sd([88.0, 90.0]) == pytest.approx(2**0.5)
    assert statistics.sd([88.0]) is None


def test_mean_interval_is_students_t():
    values = [1.0, 2.0, 6.0]
    interval = statistics.mean_interval(values)
    half = 4.302653 * statistics.sd(values) / 3**0.5  # 97.5 % quantile of t with 2 degrees of freedom
    assert (interval.low, interval.high) == pytest.approx((3 - half, 3 + half), rel=1e-6)


def test_welch_interval_agrees_with_the_textbook_formula():
    a, b = np.array([89.1, 87.4, 90.5]), np.array([67.8, 69.7, 68.2, 71.0])
    va, vb = a.var(ddof=1) / 3, b.var(ddof=1) / 4
    freedom = (va + vb) ** 2 / (va**2 / 2 + vb**2 / 3)
    half = stats.t.ppf(0.975, freedom) * (va + vb) ** 0.5
    interval = statistics.welch_interval(a, b)
    assert interval.estimate == pytest.approx(a.mean() - b.mean())
    assert (interval.low, interval.high) == pytest.approx((interval.estimate - half, interval.estimate + half))


def test_welch_interval_of_equal_seeds_is_a_point_and_of_one_seed_is_none():
    same = statistics.welch_interval([3.0, 3.0, 3.0], [1.0, 1.0, 1.0])
    assert (same.low, same.high, same.sign) == (2.0, 2.0, 1)
    single = statistics.welch_interval([3.0], [1.0, 2.0])
    assert (single.low, single.high, single.sign, single.seeds) == (None, None, 0, 1)


def test_slope_of_points_on_a_line_is_exact():
    assert statistics.slope([2, 3, 4, 5], [90.0, 85.0, 80.0, 75.0]) == pytest.approx(-5.0)


def test_rank_correlation_bootstraps_all_resamples_of_the_seeds():
    claims, samples = [1.0, 2.0, 3.0, 4.0], [[1.0, 4.0], [2.0, 3.0], [2.6, 5.5], [3.1, 6.0]]
    every = [
        stats.spearmanr(claims, [np.mean(row) for row in drawn]).statistic
        for drawn in itertools.product(*(list(itertools.product(row, repeat=2)) for row in samples))
    ]
    interval = statistics.rank_correlation(claims, samples)
    assert interval.estimate == pytest.approx(stats.spearmanr(claims, [2.5, 2.5, 4.05, 4.55]).statistic)
    assert (interval.low, interval.high) == pytest.approx(tuple(np.percentile(every, [2.5, 97.5])))


def test_rank_correlation_draws_from_its_own_generator():
    claims, samples = [1.0, 2.0, 3.0, 4.0], [[1.0, 4.0, 2.0], [2.0, 3.0, 9.0], [2.5, 5.5, 1.0], [7.0, 0.0, 3.0]]
    first = statistics.rank_correlation(claims, samples)
    np.random.seed(7)
    state = np.random.get_state()[1].copy()
    assert statistics.rank_correlation(claims, samples) == first
    assert (np.random.get_state()[1] == state).all()


@pytest.mark.parametrize("samples", [[[1.0], [2.0]], [[5.0], [5.0], [5.0]]])
def test_rank_correlation_of_two_rows_or_of_ties_alone_is_undefined(samples):
    assert statistics.rank_correlation(list(range(len(samples))), samples) is None


def test_rank_correlation_with_single_seeds_has_no_interval():
    interval = statistics.rank_correlation([1.0, 2.0, 3.0], [[3.0], [2.0], [1.0]])
    assert (interval.estimate, interval.low, interval.seeds) == (pytest.approx(-1.0), None, 1)


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [float("inf")]])
def test_a_sample_that_is_empty_or_not_finite_is_refused(values):
    with pytest.raises(ValueError, match="at least one value and only finite ones"):
        statistics.mean(values)
