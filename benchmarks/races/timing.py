"""Two pieces of work in turn within one process, and what their times say about each other.

A machine drifts: clocks, caches, neighbours. Two rounds run base, side, side, base, and give one ratio, in which
whatever drifts slowly cancels. A figure is the median of these ratios, with its quartiles and a bootstrap interval.
On two cores the median of such ratios moves by about 2 % from process to process, where a ratio of medians of
separate runs moves by 5 %.

Garbage is collected before each turn and never within one. What exists before the race is frozen out of the
collector, for going over all of transformers takes a quarter of a second.
"""

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

WARM_UP = 5
"""Turns of each side ahead of the race: the first ones fill caches, pick kernels and fault memory in."""

DRAWS = 2000
"""Resamples of a bootstrap interval."""


def _nothing() -> None:
    pass


@dataclass(kw_only=True)
class Side:
    """One runner of a race.

    `run` is what is timed, `calls` times in a row if one is too short for the clock; if it returns a number, these
    are the seconds it took by its own count, as a process that times itself does. `before` runs ahead of each turn,
    outside the clock. `exact` gives figures that are the same in every run. `check` runs after the race and raises if
    the work was not done.
    """

    run: Callable[[], Any]
    calls: int = 1
    before: Callable[[], Any] = _nothing
    exact: Callable[[], dict[str, float]] = dict
    check: Callable[[], Any] = _nothing

    def ready(self) -> None:
        self.before()
        gc.collect()

    def clock(self) -> float:
        """Seconds of one call."""
        start = time.perf_counter()
        for _ in range(self.calls):
            own = self.run()
        elapsed = time.perf_counter() - start
        return own if isinstance(own, float) else elapsed / self.calls


@dataclass
class Turns:
    """The base runs before the side in even rounds and after it in odd ones.

    The three methods are the setup, the target and the teardown of a pytest-benchmark round, so that it times the
    side and the base has its turn outside of its clock.
    """

    base: Side
    side: Side
    base_seconds: list[float] = field(default_factory=list)
    side_seconds: list[float] = field(default_factory=list)

    def setup(self) -> None:
        if len(self.side_seconds) % 2 == 0:
            self._base_turn()
        self.side.ready()

    def target(self) -> None:
        self.side_seconds.append(self.side.clock())

    def teardown(self) -> None:
        if len(self.side_seconds) % 2 == 0:
            self._base_turn()

    def _base_turn(self) -> None:
        self.base.ready()
        self.base_seconds.append(self.base.clock())


def warm_up(base: Side, side: Side, patience: float = 1.0) -> float:
    """A few turns of each, fewer if they take over `patience` seconds. Returns the seconds of the last turn of both."""
    begin = time.perf_counter()
    for _ in range(WARM_UP):
        start = time.perf_counter()
        for one in (base, side):
            one.ready()
            one.clock()
        now = time.perf_counter()
        if now - begin > patience:
            break  # nothing that takes this long hangs on a warm cache
    return now - start


def rounds_for(seconds: float, turn: float, least: int = 10, most: int = 60) -> int:
    """How many rounds of `turn` seconds fit into `seconds`: an even number from `least` to `most`."""
    return max(least, min(most, int(seconds / turn))) // 2 * 2


@contextmanager
def quiet_collector() -> Iterator[None]:
    """No garbage collection inside the `with` block but the one asked for, of what is made inside it."""
    was_on = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_on:
            gc.enable()


def pair_ratios(side: Sequence[float], base: Sequence[float]) -> list[float]:
    """Side ÷ base for each pair of rounds: (b1 + b2) / (a1 + a2).

    >>> pair_ratios([2.0, 4.0], [1.0, 2.0])
    [2.0]
    """
    if len(side) != len(base) or len(side) % 2 or not side:
        raise ValueError(f"a race has as many turns of each side, in pairs; got {len(side)} and {len(base)}")
    return [(side[i] + side[i + 1]) / (base[i] + base[i + 1]) for i in range(0, len(side), 2)]


def interval(values: Sequence[float], *, level: float = 0.95, draws: int = DRAWS, seed: int = 0) -> tuple[float, float]:
    """A bootstrap interval of the median (percentiles): between what the median is in most resamples of `values`."""
    chance = random.Random(seed)
    medians = sorted(statistics.median(chance.choices(values, k=len(values))) for _ in range(draws))
    cut = int(draws * (1 - level) / 2)
    return medians[cut], medians[-1 - cut]


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Median, quartiles, their distance relative to the median, and the interval of the median."""
    median = statistics.median(values)
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else (median,) * 3
    return {
        "median": median,
        "quartiles": [low, high],
        "spread": (high - low) / median,
        "interval": list(interval(values)),
        "count": len(values),
    }
