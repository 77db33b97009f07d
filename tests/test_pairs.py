"""Paired comparisons: by hand, and honest about few pairs."""

import math

import numpy as np
import pytest
import scipy.stats

from pairs import compare


def test_three_pairs_by_hand():
    found = compare({42: 1.0, 43: 2.0, 44: 4.0, 45: 9.0}, {44: 3.0, 43: 1.5, 42: 0.0, 99: 5.0})
    differences = np.array([-1.0, -0.5, -1.0])
    assert found.pairs == 3 and found.difference == pytest.approx(differences.mean())
    assert found.baseline_mean == pytest.approx(7 / 3) and found.mean == pytest.approx(1.5)
    assert found.std == pytest.approx(1.5) and found.baseline_std == pytest.approx(np.std([1, 2, 4], ddof=1))
    half = scipy.stats.t.ppf(0.975, 2) * differences.std(ddof=1) / math.sqrt(3)
    assert (found.low, found.high) == pytest.approx((differences.mean() - half, differences.mean() + half))
    t = differences.mean() / (differences.std(ddof=1) / math.sqrt(3))
    assert found.p == pytest.approx(2 * scipy.stats.t.sf(abs(t), 2))


def test_the_pairing_is_what_gives_power():
    """Seeds that differ much and arms that differ little, always the same way."""
    found = compare({1: 10.0, 2: 20.0, 3: 30.0}, {1: 9.0, 2: 18.9, 3: 29.1})
    assert found.std > 9 and found.high < 0


def test_one_pair_has_no_interval():
    found = compare({42: 1.0, 43: 7.0}, {42: 3.0})
    assert (found.pairs, found.difference) == (1, 2.0)
    assert found.low is found.high is found.p is found.std is found.baseline_std is None


def test_no_pair_and_no_number_are_none():
    assert compare({42: 1.0}, {43: 1.0}) is None
    assert compare({42: 1.0, 43: math.nan}, {42: 1.0, 43: 1.0}) is None
    assert compare({42: math.inf}, {42: 1.0}) is None


def test_equal_differences_leave_no_doubt():
    found = compare({1: 1.0, 2: 2.0}, {1: 1.0, 2: 2.0})
    assert (found.low, found.high, found.p) == (0.0, 0.0, 1.0)
    found = compare({1: 1.0, 2: 2.0}, {1: 2.0, 2: 3.0})
    assert (found.low, found.high, found.p) == (1.0, 1.0, 0.0)
