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


@pytest.mark.parametrize("shift", [0.0, 1.7, 40.0])
def test_p_is_scipys_and_below_5_percent_where_the_interval_excludes_0(shift):
    a, b = [89.1 + shift, 87.4 + shift, 90.5 + shift], [87.8, 89.7, 88.2, 91.0]
    welch, mean = statistics.welch_interval(a, b), statistics.mean_interval([value - 88 for value in a])
    assert welch.p == pytest.approx(stats.ttest_ind(a, b, equal_var=False).pvalue)
    assert mean.p == pytest.approx(stats.ttest_1samp(a, 88).pvalue)
    for interval in (welch, mean):
        assert (interval.p < 0.05) == (interval.sign != 0)


def test_p_of_seeds_that_all_say_the_same_is_0_or_1():
    assert statistics.welch_interval([3.0, 3.0], [1.0, 1.0]).p == 0.0
    assert statistics.mean_interval([0.0, 0.0, 0.0]).p == 1.0


def test_paired_interval_is_scipys_and_takes_seeds_by_number_not_by_place():
    ours, reference = {0: 89.1, 1: 84.4, 2: 91.5}, {2: 90.1, 0: 88.2, 1: 82.9}
    test = stats.ttest_rel([89.1, 84.4, 91.5], [88.2, 82.9, 90.1])
    interval, bounds = statistics.paired_interval(ours, reference), test.confidence_interval(0.95)
    assert (interval.low, interval.high, interval.p) == pytest.approx((bounds.low, bounds.high, test.pvalue))
    assert interval.sign == 1
    assert statistics.welch_interval(list(ours.values()), list(reference.values())).sign == 0


def test_rows_on_other_seeds_are_not_paired():
    assert statistics.paired_interval({0: 1.0, 1: 2.0}, {0: 1.0, 2: 2.0}) is None
    assert statistics.paired_interval({0: 1.0, 1: 2.0}, {0: 1.0}) is None
    assert statistics.paired_interval({}, {}) is None


@pytest.mark.parametrize("values", [[0.011, 0.02, 0.9, 0.004], [0.01, 0.01, 0.01], [0.5], [0.3, 0.6, 0.049, 0.0001, 0.012]])
def test_holm_rejects_what_the_step_down_procedure_rejects(values):
    """As Holm states it: from the smallest p on, compared with 0.05 over how many are left, up to the first that fails."""
    rejected = set()
    for done, index in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        if values[index] >= 0.05 / (len(values) - done):
            break
        rejected.add(str(index))
    corrected = statistics.holm({str(index): p for index, p in enumerate(values)})
    assert {name for name, p in corrected.items() if p < 0.05} == rejected
    assert all(corrected[str(index)] >= p for index, p in enumerate(values))


def test_holms_p_values_lie_between_bonferronis_and_those_of_false_discovery():
    values = [0.011, 0.02, 0.9, 0.004, 0.03]
    corrected = list(statistics.holm({str(index): p for index, p in enumerate(values)}).values())
    fdr, bonferroni = stats.false_discovery_control(sorted(values)), [min(1.0, 5 * p) for p in sorted(values)]
    assert all(low <= p <= high for low, p, high in zip(fdr, corrected, bonferroni, strict=True))
    assert corrected == sorted(corrected)


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
