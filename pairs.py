"""Runs in pairs: what differs between two arms that share seed, text, tokenizer and steps, and how sure that is.

Paired by seed, because both arms of a seed start from the same weights and see the same batches and masks; what is left
of the difference is the arm's own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.stats

CONFIDENCE = 0.95
TEST = "paired two-sided t-test over seeds"


@dataclass
class Comparison:
    """One metric in two arms. `std` is the sample standard deviation over seeds; None where there is one pair."""

    pairs: int
    baseline_mean: float
    baseline_std: float | None
    mean: float
    std: float | None
    difference: float  # mean of (arm - baseline) over the pairs
    low: float | None  # of the interval of CONFIDENCE for it
    high: float | None
    p: float | None


def compare(baseline: dict[int, float], arm: dict[int, float]) -> Comparison | None:
    """Compare the seeds that both arms have; None where there is no such seed, or a value is missing or not finite.

    The interval is Student's, for the mean of the paired differences: it takes the differences for Gaussian, and with
    two pairs (one degree of freedom, t = 12.7) says little.

    Args:
        baseline, arm: {seed: value of the metric}.
    """
    seeds = sorted(baseline.keys() & arm.keys())
    before = np.array([baseline[seed] for seed in seeds], dtype=float)
    after = np.array([arm[seed] for seed in seeds], dtype=float)
    if not seeds or not np.isfinite([before, after]).all():
        return None
    difference = float((after - before).mean())
    if len(seeds) == 1:
        return Comparison(1, float(before[0]), None, float(after[0]), None, difference, None, None, None)
    if np.ptp(after - before) == 0:  # scipy divides by the spread: no spread, no doubt
        low, high, p = difference, difference, 1.0 if difference == 0 else 0.0
    else:
        test = scipy.stats.ttest_rel(after, before)
        low, high = map(float, test.confidence_interval(CONFIDENCE))
        p = float(test.pvalue)
    spread = float(before.std(ddof=1)), float(after.std(ddof=1))
    return Comparison(
        len(seeds), float(before.mean()), spread[0], float(after.mean()), spread[1], difference, low, high, p
    )
