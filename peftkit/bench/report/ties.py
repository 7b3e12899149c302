"""Who is better than whom, as far as the data can tell; places that are shared; and the frontier of two figures.

Two methods are *tied* in a figure when the 95 % interval of their ratio (of times) or difference (of quality) contains
1 or 0. Where there are too few times for an interval, they are tied unless all of one are above all of the other, and
chance would have parted that many so in at most one of twenty cases. Being tied is not transitive: A may be tied with
B, and B with C, while C is clearly worse than A. So there are no groups. The place of a method is one more than the
number of methods that are clearly better, and methods with the same number share it.

Each comparison stands at 95 % by itself: among 25 methods some of the 300 pairs will be told apart by chance.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any, Literal, NamedTuple

from peftkit.bench import statistics
from peftkit.bench.compare import FEWEST, share

Sign = Callable[[str, str], int]
"""Of two labels: 1 if the first is clearly better, -1 if it is clearly worse, 0 if they are tied."""

Standing = Literal["frontier", "tied", "beaten"]


class Ranking(NamedTuple):
    """Of one figure on one workload, for the methods that have it."""

    sign: Sign
    place: dict[str, int]
    tied: dict[str, list[str]]


def rank(labels: Sequence[str], sign: Sign) -> Ranking:
    """Places and ties, from the comparison of each two.

    >>> sizes = {"a": 3, "b": 5, "c": 3}
    >>> rank("abc", exact(sizes)).place
    {'a': 1, 'b': 3, 'c': 1}
    """
    known = {(a, b): sign(a, b) for a, b in combinations(labels, 2)}
    known |= {(b, a): -better for (a, b), better in known.items()}
    place = {a: 1 + sum(known[b, a] > 0 for b in labels if b != a) for a in labels}
    tied = {a: [b for b in labels if b != a and known[a, b] == 0] for a in labels}
    return Ranking(lambda a, b: known[a, b], place, tied)


def exact(values: Mapping[str, float]) -> Sign:
    """Figures without noise, of which less is better: tied only where they are equal."""
    return lambda a, b: (values[a] < values[b]) - (values[a] > values[b])


def times(samples: Mapping[str, Sequence[float]]) -> Sign:
    """Times, or ratios of them, of which less is better: by the bootstrap interval of the ratio of their medians."""
    drawn = {
        label: statistics.resampled_medians(
            values, seed=index
        )  # each its own draws: the methods were measured independently
        for index, (label, values) in enumerate(samples.items())
        if len(values) >= FEWEST
    }

    def sign(a: str, b: str) -> int:
        if a not in drawn or b not in drawn:
            return _apart(samples[a], samples[b])
        ratios = sorted(x / y for x, y in zip(drawn[a], drawn[b], strict=True))
        low, high = ratios[int(0.025 * len(ratios))], ratios[int(0.975 * len(ratios))]
        return (high < 1) - (low > 1)

    return sign


def _apart(a: Sequence[float], b: Sequence[float]) -> int:
    """The extreme of an exact permutation test: 1 if all of `a` are below all of `b`, and that is no chance.

    >>> _apart([1.0, 1.1, 1.2], [2.0] * 10), _apart([1.0, 1.1, 1.2], [2.0] * 3), _apart([1.0, 2.1, 1.2], [2.0] * 10)
    (1, 0, 0)
    """
    if not (a and b) or 2 / math.comb(len(a) + len(b), len(a)) > 0.05:
        return 0
    return (max(a) < min(b)) - (min(a) > max(b))


def quality(values: Mapping[str, Sequence[float]], metric: Mapping[str, Any]) -> Sign:
    """Quality over seeds: by Welch's interval of the difference, with the test set's own noise where it is known."""
    side = 1 if metric["higher_is_better"] else -1

    def sign(a: str, b: str) -> int:
        if min(len(values[a]), len(values[b])) < 2:
            return 0
        gain = statistics.difference_interval(values[a], values[b], **share(metric))
        return side * ((gain.low > 0) - (gain.high < 0))

    return sign


def standings(
    points: Mapping[str, tuple[float, float]], cost: Sign, good: Sign, *, higher_is_better: bool
) -> dict[str, Standing]:
    """Of points (cost, quality): on the frontier, tied with it, or beaten by a method that is no worse in either.

    The frontier goes by the middles alone. What lies below it counts as beaten only where the data says so: some method
    is clearly better in quality, and costs clearly less or exactly as much.
    """
    side = 1 if higher_is_better else -1

    def over(a: str, b: str) -> bool:
        (cost_a, good_a), (cost_b, good_b) = points[a], points[b]
        return cost_a <= cost_b and side * good_a >= side * good_b and points[a] != points[b]

    def clearly_over(a: str, b: str) -> bool:
        return a != b and good(a, b) > 0 and (cost(a, b) > 0 or points[a][0] == points[b][0])

    def standing(label: str) -> Standing:
        if not any(over(other, label) for other in points):
            return "frontier"
        return "beaten" if any(clearly_over(other, label) for other in points) else "tied"

    return {label: standing(label) for label in points}
