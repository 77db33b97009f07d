"""Paired differences between two arms in a metric, with intervals and tests.

Runs are paired by seed: both runs of a seed start from the same weights and see the same batches and masks, so a
difference comes from the arm. sets.py decides which runs may be paired.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import scipy.special
import scipy.stats

from tables import below_noise, spread

CONFIDENCE = 0.95
POWER = 0.8  # probability with which the smallest detectable effect is shown
TEST = "paired two-sided t-test over seeds"
SIGN_TEST = "exact two-sided sign test over seeds"


@dataclass
class Comparison:
    """One metric in two arms, by pairs. A figure that cannot be computed is None.

    A value that is not finite (NaN or infinite) counts as worse than every finite one. Where a value is not finite,
    `test` is the sign test, and the means, deviations and intervals that the value would enter are None.
    """

    pairs: int
    seeds: list[int]  # of the pairs
    confidence: float  # of every interval except low90 to high90; above CONFIDENCE after a correction
    baseline_mean: float | None
    baseline_std: float | None  # sample standard deviation over seeds
    mean: float | None
    std: float | None
    difference: float | None  # mean of (arm - baseline) over the pairs
    baseline_upper: float | None  # upper end of the interval of the baseline's own mean (one-sample t)
    upper: float | None  # the same of the arm
    baseline_not_finite: list[int]  # seeds whose value is NaN or infinite in the baseline
    not_finite: list[int]  # and in the arm
    lower: int  # pairs in which the arm is below the baseline
    higher: int
    ties: int  # equal, or not finite in both
    low: float | None = None  # of the interval for the difference
    high: float | None = None
    low90: float | None = None  # of the interval of the equivalence test (two one-sided tests)
    high90: float | None = None
    p: float | None = None
    test: str | None = None
    detectable: float | None = None  # smallest |mean difference| that so many pairs with this spread show at POWER
    texts_low: float | None = None  # of the bootstrap interval over texts; answer.py sets this and all below
    texts_high: float | None = None
    baseline_floor: float | None = None  # for gaps: noise of the baseline's mean
    floor: float | None = None  # the same of the arm's mean
    ratio: float | None = None  # of the geometric means, arm / baseline
    ratio_low: float | None = None  # of its interval, at `confidence`
    ratio_high: float | None = None

    @property
    def finite(self) -> bool:
        return not self.baseline_not_finite and not self.not_finite


def compare(baseline: dict[int, float | None], arm: dict[int, float | None], tests: int = 1) -> Comparison | None:
    """Compare the seeds that both arms have; None if there is no such seed.

    If all values are finite, the interval is Student's, for the mean of the paired differences. It assumes Gaussian
    differences, and with two pairs (one degree of freedom, t = 12.7) it says little. With one pair, or if all
    differences are equal, there is no interval and no test. If a value is not finite, the test is the exact two-sided
    sign test over the pairs without ties.

    Args:
        baseline, arm: {seed: value of the metric}; a seed whose value is None (not measured) is left out.
        tests: number of comparisons that share an error of 5 % (Bonferroni): the level of each is 5 % / tests.
    """
    seeds = sorted(
        seed for seed in baseline.keys() & arm.keys() if baseline[seed] is not None and arm[seed] is not None
    )
    if not seeds:
        return None
    before = np.array([baseline[seed] for seed in seeds], dtype=float)
    after = np.array([arm[seed] for seed in seeds], dtype=float)
    level = (1 - CONFIDENCE) / tests
    ranks = np.sign(np.where(np.isfinite(after), 0, 1) - np.where(np.isfinite(before), 0, 1))
    both = np.isfinite(before) & np.isfinite(after)
    ranks[both] = np.sign(after[both] - before[both])
    comparison = Comparison(
        pairs=len(seeds),
        seeds=seeds,
        confidence=1 - level,
        **{f"baseline_{name}": value for name, value in _own(seeds, before, level).items()},
        **_own(seeds, after, level),
        difference=float((after - before).mean()) if both.all() else None,
        lower=int((ranks < 0).sum()),
        higher=int((ranks > 0).sum()),
        ties=int((ranks == 0).sum()),
    )
    if len(seeds) > 1 and not both.all():
        comparison.test = SIGN_TEST
        decided = comparison.lower + comparison.higher
        comparison.p = float(scipy.stats.binomtest(comparison.lower, decided).pvalue) if decided else 1.0
    elif len(seeds) > 1 and _spread(after - before, max(np.abs(before).max(), np.abs(after).max())):
        _student(comparison, after - before, level)
    return comparison


def compare_ratio(
    baseline: dict[int, float | None], arm: dict[int, float | None], shift: float = 0.0, tests: int = 1
) -> Comparison | None:
    """Compare the natural logarithms of value + shift, for values that differ between seeds by factors.

    The seed with the largest values would dominate a difference of means, and logarithms are closer to a Gaussian. exp
    of `difference`, `low` and `high` is the ratio of geometric means (arm / baseline) and its interval. None if there
    is no common seed, or if a value + shift is 0 or less.

    Args:
        baseline, arm, tests: as in `compare`.
        shift: 3 for excess kurtosis, because full kurtosis is never below 1.
    """
    logs = []
    for values in (baseline, arm):
        shifted = {seed: None if value is None else value + shift for seed, value in values.items()}
        if any(value is not None and value <= 0 for value in shifted.values()):
            return None
        logs.append({seed: None if value is None else float(np.log(value)) for seed, value in shifted.items()})
    return compare(*logs, tests=tests)


def _own(seeds: list[int], values: np.ndarray, level: float) -> dict:
    """The fields of a Comparison that describe one arm alone; None for a figure that cannot be computed."""
    own = {"mean": None, "std": None, "upper": None, "not_finite": np.array(seeds)[~np.isfinite(values)].tolist()}
    if own["not_finite"]:
        return own
    own["mean"] = float(values.mean())
    if len(values) > 1:
        own["std"] = float(values.std(ddof=1))
    if _spread(values):
        half = scipy.stats.t.ppf(1 - level / 2, len(values) - 1) * own["std"] / math.sqrt(len(values))
        own["upper"] = own["mean"] + float(half)
    return own


def _spread(values: np.ndarray, size: float = 0.0) -> bool:
    """Whether values differ by more than the rounding error of float64 numbers of their size (or `size`, if larger)."""
    rounding = 8 * np.finfo(float).eps * max(np.abs(values).max(), size)
    return bool(np.ptp(values) > rounding)


def _student(comparison: Comparison, differences: np.ndarray, level: float) -> None:
    test = scipy.stats.ttest_1samp(differences, 0)  # which is the paired t-test
    comparison.test, comparison.p = TEST, float(test.pvalue)
    comparison.low, comparison.high = map(float, test.confidence_interval(1 - level))
    # Two one-sided tests at `level` each: the difference is inside a margin where this interval is.
    comparison.low90, comparison.high90 = map(float, test.confidence_interval(1 - 2 * level))
    comparison.detectable = detectable_effect(len(differences), float(differences.std(ddof=1)), level)


def detectable_effect(pairs: int, std: float, level: float = 1 - CONFIDENCE) -> float:
    """The smallest mean difference that a two-sided paired t-test shows with a probability of POWER.

    The power is that of the noncentral t distribution with noncentrality effect / (std / sqrt(pairs)) (Cohen 1988,
    "Statistical Power Analysis for the Behavioral Sciences", chapter 2); a difference shown with the wrong sign, which
    is rarer than one in 10^5, is left out.

    Args:
        pairs: their number, >= 2.
        std: sample standard deviation of the paired differences, in the metric's unit, as is the result.
        level: of the test.
    """
    critical = scipy.stats.t.ppf(1 - level / 2, pairs - 1)
    # The noncentrality at which a share of 1 - POWER lies below the critical value.
    noncentrality = scipy.special.nctdtrinc(pairs - 1, 1 - POWER, critical)
    return float(noncentrality * std / math.sqrt(pairs))


def percent(confidence: float) -> str:
    """95%, 97.5%, 98.3%."""
    return f"{100 * confidence:.3g}%"


def own_means(comparison: Comparison) -> list[str]:
    """[baseline, arm]: mean ± deviation over seeds, or that values are not finite, or the mean below its noise."""
    arms = (
        (comparison.baseline_mean, comparison.baseline_std, comparison.baseline_floor, comparison.baseline_not_finite),
        (comparison.mean, comparison.std, comparison.floor, comparison.not_finite),
    )
    return [
        f"not finite in {len(lost)} of {comparison.pairs}" if lost else below_noise(mean, floor) or spread(mean, std)
        for mean, std, floor, lost in arms
    ]


def no_interval(comparison: Comparison) -> str | None:
    """The reason why a comparison has no interval, in words; None if it has one."""
    if comparison.low is not None:
        return None
    if not comparison.finite:
        count = len({*comparison.not_finite, *comparison.baseline_not_finite})
        said = f"not finite in {count} of {comparison.pairs} pairs"
        return said if comparison.p is None else f"{said}; sign test, p = {comparison.p:.2g}"
    return "one pair: no interval" if comparison.pairs == 1 else f"no spread over {comparison.pairs} pairs"
