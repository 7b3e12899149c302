"""What follows from the raw samples: medians, ratios and rates, each with its interval."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from peftkit.bench.statistics import Interval, bootstrap_median, ratio_of_pairs, spread


def derived(times: Mapping[str, Any], per_step: int) -> dict[str, Any]:
    """The `derived` part of a cell from its `times`; `per_step` is the number of tokens or samples of a batch."""
    steps = step_seconds(times)
    found: dict[str, Any] = {"step_seconds": None, "units_per_second": None, "spread": None}
    if steps:
        found["step_seconds"] = _as_json(bootstrap_median(steps))
        found["units_per_second"] = per_step / median(steps)
        found["spread"] = spread(steps)
    for name, rows in (("step", "step_pairs"), ("inference", "inference_pairs"), ("merged", "merged_pairs")):
        found[f"{name}_ratio"] = _as_json(ratio_of_pairs(times[rows])) if times.get(rows) else None
    return found


def step_seconds(times: Mapping[str, Any]) -> list[float]:
    """The method's own training steps, in seconds: those of the pairs, or where there are none the sums of the parts.

    >>> step_seconds({"step_pairs": [[1.0, 0.5, 0.6, 1.0]]}), step_seconds({"forward": [0.25], "backward": [0.5]})
    ([0.5, 0.6], [0.75])
    """
    if times.get("step_pairs"):
        return [seconds for row in times["step_pairs"] for seconds in row[1:3]]
    parts: list[Sequence[float]] = [times[name] for name in ("forward", "backward", "optimizer") if times.get(name)]
    return [sum(each) for each in zip(*parts, strict=True)]


def _as_json(found: Interval) -> dict[str, float]:
    return {"median": found.middle, "low": found.low, "high": found.high}
