"""Paired comparisons: by hand, and honest about few pairs and about what is no number."""

import math

import numpy as np
import pytest
import scipy.stats

from pairs import SIGN_TEST, TEST, compare, compare_ratio, detectable_effect, no_interval, percent


def test_three_pairs_by_hand():
    comparison = compare({42: 1.0, 43: 2.0, 44: 4.0, 45: 9.0}, {44: 3.0, 43: 1.5, 42: 0.0, 99: 5.0})
    differences = np.array([-1.0, -0.5, -1.0])
    assert (comparison.pairs, comparison.seeds, comparison.test) == (3, [42, 43, 44], TEST)
    assert comparison.difference == pytest.approx(differences.mean())
    assert comparison.baseline_mean == pytest.approx(7 / 3) and comparison.mean == pytest.approx(1.5)
    assert comparison.std == pytest.approx(1.5) and comparison.baseline_std == pytest.approx(np.std([1, 2, 4], ddof=1))
    for share, low, high in ((0.975, comparison.low, comparison.high), (0.95, comparison.low90, comparison.high90)):
        half = scipy.stats.t.ppf(share, 2) * differences.std(ddof=1) / math.sqrt(3)
        assert (low, high) == pytest.approx((differences.mean() - half, differences.mean() + half))
    t = differences.mean() / (differences.std(ddof=1) / math.sqrt(3))
    assert comparison.p == pytest.approx(2 * scipy.stats.t.sf(abs(t), 2))
    assert (comparison.lower, comparison.higher, comparison.ties) == (3, 0, 0)
    # The upper ends of the arms' own intervals: a one-sample t-test of each.
    own = scipy.stats.ttest_1samp([1, 2, 4], 0).confidence_interval(0.95)
    assert comparison.baseline_upper == pytest.approx(own.high)
    assert comparison.upper == pytest.approx(scipy.stats.ttest_1samp([0, 1.5, 3], 0).confidence_interval(0.95).high)


def test_pairing_gives_power():
    """Seeds differ much; arms differ little, always in the same direction."""
    comparison = compare({1: 10.0, 2: 20.0, 3: 30.0}, {1: 9.0, 2: 18.9, 3: 29.1})
    assert comparison.std > 9 and comparison.high < 0


def test_one_pair_has_no_interval():
    comparison = compare({42: 1.0, 43: 7.0}, {42: 3.0})
    assert (comparison.pairs, comparison.difference) == (1, 2.0)
    assert comparison.low is comparison.high is comparison.p is comparison.std is comparison.baseline_std is None
    assert comparison.upper is comparison.baseline_upper is comparison.detectable is comparison.test is None
    assert no_interval(comparison) == "one pair: no interval"


def test_without_a_pair_the_result_is_none_and_an_unmeasured_seed_is_no_pair():
    assert compare({42: 1.0}, {43: 1.0}) is None
    assert compare({42: None}, {42: 1.0}) is None
    assert compare({42: None, 43: 1.0}, {42: 1.0, 43: 2.0}).seeds == [43]


def test_values_that_are_not_finite_are_ranked_and_never_dropped():
    comparison = compare(
        {1: math.nan, 2: math.inf, 3: 1.0, 4: math.nan, 5: 2.0, 6: 2.0}, {1: 1, 2: 9, 3: 2, 4: math.inf, 5: 1, 6: 2}
    )
    assert (comparison.lower, comparison.higher, comparison.ties) == (3, 1, 2)
    assert comparison.baseline_not_finite == [1, 2, 4] and comparison.not_finite == [4]
    assert comparison.test == SIGN_TEST and comparison.p == pytest.approx(2 * (1 + 4) / 16)  # 3 of 4, by hand
    assert (
        comparison.difference
        is comparison.low
        is comparison.low90
        is comparison.mean
        is comparison.baseline_upper
        is None
    )
    assert no_interval(comparison) == "not finite in 3 of 6 pairs; sign test, p = 0.62"
    single = compare({1: math.nan}, {1: 1.0})
    assert (single.pairs, single.lower, single.p, single.test) == (1, 1, None, None)
    both = compare({1: math.nan, 2: math.nan}, {1: math.nan, 2: math.nan})
    assert (both.ties, both.p, both.baseline_upper) == (2, 1.0, None)


def test_equal_differences_have_no_interval():
    for after in ({1: 1.0, 2: 2.0}, {1: 2.0, 2: 3.0}, {1: 1.1, 2: 2.1}):  # 1.1 - 1 and 2.1 - 2 differ by rounding
        comparison = compare({1: 1.0, 2: 2.0}, after)
        assert comparison.low is comparison.high is comparison.low90 is comparison.p is comparison.detectable is None
        assert no_interval(comparison) == "no spread over 2 pairs"


def test_bonferroni_widens_every_interval():
    before, after = {1: 1.0, 2: 2.0, 3: 4.0}, {1: 0.0, 2: 1.5, 3: 3.0}
    uncorrected, corrected = compare(before, after), compare(before, after, tests=2)
    differences = [-1, -0.5, -1]
    expected = scipy.stats.ttest_1samp(differences, 0)
    assert (corrected.low, corrected.high) == pytest.approx(tuple(expected.confidence_interval(0.975)))
    assert (corrected.low90, corrected.high90) == pytest.approx(tuple(expected.confidence_interval(0.95)))
    assert (
        corrected.upper > uncorrected.upper
        and corrected.detectable > uncorrected.detectable
        and corrected.p == uncorrected.p
    )
    assert percent(corrected.confidence) == "97.5%" and percent(uncorrected.confidence) == "95%"


@pytest.mark.parametrize("pairs", [2, 3, 5, 12])
def test_the_detectable_effect_is_shown_in_80_per_cent_of_experiments(pairs):
    """By simulation: the test is applied to random differences with that mean."""
    effect = detectable_effect(pairs, 0.3)
    draws = np.random.default_rng(0).normal(effect, 0.3, (40_000, pairs))
    shown = scipy.stats.ttest_1samp(draws, 0, axis=1).pvalue < 0.05
    assert shown.mean() == pytest.approx(0.8, abs=0.01)  # five standard errors


def test_the_detectable_effect_is_that_of_the_noncentral_t():
    """For a number of pairs with which scipy's own function works."""
    effect = detectable_effect(20, 1.0)
    critical = scipy.stats.t.ppf(0.975, 19)
    assert scipy.stats.nct.sf(critical, 19, effect * math.sqrt(20)) == pytest.approx(0.8, abs=1e-5)


def test_ratios_are_compared_as_logarithms():
    """A factor of a third in every pair: the largest seed dominates the difference of means, but not the ratio."""
    before, after = {1: 10.0, 2: 40.0, 3: 300.0}, {1: 3.3, 2: 13.5, 3: 99.0}
    comparison = compare_ratio(before, after)
    logs = np.log([3.3 / 10, 13.5 / 40, 99 / 300])
    interval = scipy.stats.ttest_1samp(logs, 0).confidence_interval(0.95)
    assert comparison.difference == pytest.approx(logs.mean()) and (comparison.low, comparison.high) == pytest.approx(
        tuple(interval)
    )
    assert comparison.high < 0 < compare(before, after).high
    assert comparison.mean == pytest.approx(np.log([3.3, 13.5, 99]).mean())
    shifted = compare_ratio({1: -1.0, 2: 0.0, 4: None}, {1: 1.0, 2: 0.5, 4: 1.0}, shift=3.0, tests=2)
    assert shifted.difference == pytest.approx(np.mean(np.log([4 / 2, 3.5 / 3]))) and shifted.confidence == 0.975
    assert compare_ratio({1: 0.0}, {1: 1.0}) is None and compare_ratio({1: 1.0}, {2: 1.0}) is None
    lost = compare_ratio({1: math.inf, 2: 2.0}, {1: 1.0, 2: math.nan})
    assert (lost.lower, lost.higher, lost.test) == (1, 1, SIGN_TEST)
