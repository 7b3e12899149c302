"""Intervals for what is measured: medians by the bootstrap, means over seeds by Student's t, shares by Wilson.

Every reader of a report takes its intervals from here, so that all of them agree. Each is a 95 % interval, and each is
deterministic: the bootstrap draws from a generator with a fixed seed.
"""

import math
import random
from collections.abc import Sequence
from statistics import fmean, median, quantiles, stdev, variance
from typing import NamedTuple

RESAMPLES = 2_000
Z = 1.959963984540054
"""Where the normal distribution has 2.5 % above it."""


class Interval(NamedTuple):
    """A middle and the two ends of its 95 % interval."""

    middle: float
    low: float
    high: float


def bootstrap_median(values: Sequence[float]) -> Interval:
    """The median with its percentile bootstrap interval; of one value, that value three times.

    >>> bootstrap_median([1.0, 1.1, 0.9, 1.0, 1.05])
    Interval(middle=1.0, low=0.9, high=1.1)
    """
    return _percentile(median(values), resampled_medians(values, seed=0))


def pair_ratios(rows: Sequence[Sequence[float]]) -> list[float]:
    """One ratio for each row `[a, b, b, a]` of times: what b took by what a took, so that a steady drift cancels.

    >>> pair_ratios([[1.0, 2.0, 3.0, 1.5]])
    [2.0]
    """
    return [(b1 + b2) / (a1 + a2) for a1, b1, b2, a2 in rows]


def ratio_of_pairs(rows: Sequence[Sequence[float]]) -> Interval:
    """How long b takes ÷ how long a does, from rows `[a, b, b, a]`: the median of their ratios, with its interval."""
    return bootstrap_median(pair_ratios(rows))


def ratio_of_medians(values: Sequence[float], others: Sequence[float]) -> Interval:
    """The median of `values` ÷ that of `others`, two independent samples, with its bootstrap interval.

    Whether two methods can be told apart in time: they are tied where 1 lies within.

    >>> ratio_of_medians([2.0, 2.0, 2.0], [1.0, 1.0, 1.0])
    Interval(middle=2.0, low=2.0, high=2.0)
    """
    ratios = [a / b for a, b in zip(resampled_medians(values, seed=0), resampled_medians(others, seed=1), strict=True)]
    return _percentile(median(values) / median(others), ratios)


def seeds_interval(values: Sequence[float], share_of: int | None = None, scale: float = 1.0) -> Interval:
    """The mean over seeds, with Student's interval; wider by the test set's own where the values are shares of items.

    `share_of` is the number of items tested; the values are then shares of `scale` (100 for percent). All seeds are
    tested on the same items, so the items' noise does not shrink with the seeds: the two are added in quadrature. Of
    one seed nothing is known but the items' noise, and where there is none either, the interval is the value itself.

    >>> seeds_interval([80.0, 82.0, 84.0])._asdict()["middle"]
    82.0
    """
    mean = fmean(values)
    over_seeds = student(len(values) - 1) * stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    below = above = over_seeds
    if share_of:
        low, high = wilson(mean / scale, share_of)
        below, above = math.hypot(over_seeds, mean - low * scale), math.hypot(over_seeds, high * scale - mean)
        return Interval(mean, max(mean - below, 0.0), min(mean + above, scale))
    return Interval(mean, mean - below, mean + above)


def difference_interval(
    values: Sequence[float], others: Sequence[float], share_of: int | None = None, scale: float = 1.0
) -> Interval:
    """Mean of `values` less mean of `others`, over seeds: Welch's interval, wider by the test set's noise.

    The items' noise is taken as independent, which is cautious: two models that are tested on the same items err
    together. Two methods are tied where 0 lies within.

    >>> difference_interval([3.0, 3.0], [1.0, 1.0])
    Interval(middle=2.0, low=2.0, high=2.0)
    """
    difference = fmean(values) - fmean(others)
    parts = [variance(each) / len(each) if len(each) > 1 else 0.0 for each in (values, others)]
    freedom = max(1, min(len(values), len(others)) - 1)
    if len(values) > 1 and len(others) > 1 and sum(parts) > 0:
        shares = sum(part**2 / (len(each) - 1) for part, each in zip(parts, (values, others), strict=True))
        freedom = max(1, math.floor(sum(parts) ** 2 / shares))
    half = student(freedom) * math.sqrt(sum(parts))
    if share_of:
        for each in (values, others):
            middle = fmean(each) / scale
            low, high = wilson(middle, share_of)
            half = math.hypot(half, scale * (high - low) / 2)
    return Interval(difference, difference - half, difference + half)


def wilson(share: float, items: int) -> tuple[float, float]:
    """The 95 % interval of a share of `items`, after Wilson (1927), which stays between 0 and 1.

    >>> [round(end, 3) for end in wilson(0.8, 100)]
    [0.711, 0.867]
    """
    shrink = 1 + Z * Z / items
    middle = (share + Z * Z / (2 * items)) / shrink
    half = Z / shrink * math.sqrt(share * (1 - share) / items + Z * Z / (4 * items * items))
    return max(0.0, middle - half), min(1.0, middle + half)


def spread(values: Sequence[float]) -> float:
    """Interquartile range by median: above 0.1 the machine was too busy for the times to mean much.

    >>> spread([1.0, 1.0, 1.0, 1.0])
    0.0
    """
    if len(values) < 2:
        return 0.0
    low, _, high = quantiles(values, n=4)
    return (high - low) / median(values)


def student(freedom: int) -> float:
    """Where Student's distribution has 2.5 % above it, found by bisection on the exact form for whole degrees.

    >>> [round(student(freedom), 3) for freedom in (1, 2, 10, 1000)]
    [12.706, 4.303, 2.228, 1.962]
    """
    low, high = 0.0, 1e3
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < 0.95 else (low, middle)
    return (low + high) / 2


def _within(t: float, freedom: int) -> float:
    """The probability of |T| < t (Abramowitz & Stegun 1964, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    cosine, sine = math.cos(angle), math.sin(angle)
    odd = freedom % 2
    term = total = cosine if odd and freedom > 1 else float(not odd)
    for k in range(2 + odd, freedom - 1, 2):
        term *= cosine * cosine * (k - 1) / k
        total += term
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def resampled_medians(values: Sequence[float], seed: int) -> list[float]:
    """The medians of as many resamples as the bootstrap takes."""
    generator = random.Random(seed)  # noqa: S311 - no cryptography: a resample that is the same in every run
    return [median(generator.choices(values, k=len(values))) for _ in range(RESAMPLES)]


def _percentile(middle: float, resampled: Sequence[float]) -> Interval:
    ordered = sorted(resampled)
    return Interval(middle, ordered[int(0.025 * len(ordered))], ordered[int(0.975 * len(ordered))])
