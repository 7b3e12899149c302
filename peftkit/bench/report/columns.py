"""What a report shows of each method: the columns, where their values come from, and how a number is written.

A column knows nothing of a terminal or a page. What a document does not have is no zero but nothing.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal, NamedTuple

from peftkit.tables import size

Cell = Mapping[str, Any]
Workload = Mapping[str, Any]

NOTHING = "–"


class Value(NamedTuple):
    """A figure of one method: the number to sort by, the text to read; the interval and a remark, if there are any."""

    number: float
    text: str
    interval: str = ""
    remark: str = ""


@dataclass(frozen=True)
class Column:
    """`better` is the direction that is good, or nothing where neither is; `main` columns are in the first table."""

    key: str
    title: str
    unit: str
    better: Literal["lower", "higher", ""]
    about: str
    value: Callable[[Cell], Value | None]
    main: bool = True


def columns(workload: Workload, cells: list[Cell]) -> list[Column]:
    """The columns of which at least one cell has a value, in reading order."""
    return [column for column in _all(workload, cells) if any(column.value(cell) for cell in cells)]


def _all(workload: Workload, cells: list[Cell]) -> list[Column]:
    metric = workload["metric"] or {"name": "quality", "unit": "", "higher_is_better": True}
    forgetting = next((c["quality"]["forgetting"]["name"] for c in cells if (c["quality"] or {}).get("forgetting")), "")
    return [
        Column(
            "quality",
            metric["name"],
            metric["unit"],
            "higher" if metric["higher_is_better"] else "lower",
            "mean over seeds, with its 95 % interval",
            _quality,
        ),
        Column("parameters", "trained", "parameters", "lower", "parameters that are trained", _parameters),
        Column("memory", "peak memory", "", "lower", "of one training step, measured", _memory),
        Column(
            "step", "step ÷ full", "", "lower", "time of a training step by that of full fine-tuning", _ratio("step")
        ),
        Column("rate", "throughput", f"{workload['unit']}/s", "higher", "in training", _rate),
        Column(
            "inference", "inference ÷ base", "", "lower", "time of a forward, adapter not merged", _ratio("inference")
        ),
        Column("file", "file", "", "lower", "size of the saved adapter", _bytes("adapter_file_bytes")),
        Column(
            "forgetting", forgetting, "", "", "after training, on what the base knew before", _forgetting, main=False
        ),
        Column("estimate", "estimated peak", "", "", "what the estimate says without running", _estimate, main=False),
        Column("seconds", "step", "", "lower", "median time of a training step", _step, main=False),
        Column("forward", "forward", "FLOPs", "lower", "of one training step", _flops("forward_flops"), main=False),
        Column("backward", "backward", "FLOPs", "lower", "of one training step", _flops("backward_flops"), main=False),
        *(
            Column(key, key, "", "lower", about, _median(key), main=False)
            for key, about in (
                ("wrap", "install the adapters"),
                ("save", "write the file"),
                ("load", "read the file and install"),
                ("merge", "fold the adapters into the weights"),
                ("unmerge", "put the weights back"),
            )
        ),
        Column(
            "merged", "merged ÷ base", "", "lower", "time of a forward, adapter merged", _ratio("merged"), main=False
        ),
        Column("error", "merge error", "", "lower", "largest difference of an output once merged", _error, main=False),
        Column("allocated", "GPU allocated", "", "lower", "peak", _bytes("gpu_peak_allocated"), main=False),
        Column("reserved", "GPU reserved", "", "lower", "peak", _bytes("gpu_peak_reserved"), main=False),
    ]


# ---------------------------------------------------------------------------------------------- values


def part(cell: Cell, *path: str) -> Any:
    """What a cell has at a path, or None where anything on the way is missing."""
    found: Any = cell
    for key in path:
        found = None if found is None else found.get(key)
    return found


def _quality(cell: Cell) -> Value | None:
    found = cell["quality"]
    if not found:
        return None
    seeds = len(found["values"])
    text, low, high = together(found["mean"], found["low"], found["high"])
    return Value(found["mean"], text, f"{low} to {high}", "one seed" if seeds == 1 else "")


def _forgetting(cell: Cell) -> Value | None:
    found = part(cell, "quality", "forgetting")
    if not found:
        return None
    text, low, high = together(found["mean"], found["low"], found["high"])
    return Value(found["mean"], text, f"{low} to {high}", f"before: {number(found['before'])}")


def _parameters(cell: Cell) -> Value | None:
    trained, total = part(cell, "exact", "trainable_parameters"), part(cell, "exact", "total_parameters")
    if trained is None:
        return None
    return Value(trained, f"{trained:,}", remark=f"{percent(trained / total)} of all" if total else "")


def _memory(cell: Cell) -> Value | None:
    peak = part(cell, "exact", "memory", "peak")
    return None if peak is None else Value(peak, size(peak))


def _estimate(cell: Cell) -> Value | None:
    peak, measured = part(cell, "exact", "estimated_memory", "peak"), part(cell, "exact", "memory", "peak")
    if peak is None:
        return None
    return Value(peak, size(peak), remark=f"{100 * (peak / measured - 1):+.2f} %" if measured else "")


def _ratio(name: str) -> Callable[[Cell], Value | None]:
    def value(cell: Cell) -> Value | None:
        found = part(cell, "derived", f"{name}_ratio")
        if not found:
            return None
        text, low, high = together(found["median"], found["low"], found["high"])
        scatter = part(cell, "derived", "spread") or 0
        remark = f"unsteady: the times scatter by {100 * scatter:.0f} %" if name == "step" and scatter > 0.1 else ""
        return Value(found["median"], text, f"{low} to {high}", remark)

    return value


def _rate(cell: Cell) -> Value | None:
    found = part(cell, "derived", "units_per_second")
    return None if found is None else Value(found, number(found))


def _step(cell: Cell) -> Value | None:
    found = part(cell, "derived", "step_seconds")
    if not found:
        return None
    return Value(found["median"], seconds(found["median"]), f"{seconds(found['low'])} to {seconds(found['high'])}")


def _bytes(key: str) -> Callable[[Cell], Value | None]:
    def value(cell: Cell) -> Value | None:
        found = part(cell, "exact", key)
        return None if found is None else Value(found, size(found))

    return value


def _flops(key: str) -> Callable[[Cell], Value | None]:
    def value(cell: Cell) -> Value | None:
        found = part(cell, "exact", key)
        return None if found is None else Value(found, large(found))

    return value


def _median(key: str) -> Callable[[Cell], Value | None]:
    def value(cell: Cell) -> Value | None:
        found = part(cell, "times", key)
        return Value(median(found), seconds(median(found))) if found else None

    return value


def _error(cell: Cell) -> Value | None:
    found = part(cell, "exact", "merge_error")
    return None if found is None else Value(found, f"{found:.1e}" if found else "0")


# --------------------------------------------------------------------------------------- how it is written


def together(middle: float, low: float, high: float) -> tuple[str, str, str]:
    """A figure and its interval, with as many decimals as half the width of the interval is worth, and at least one.

    >>> together(93.4375, 92.6123, 94.1021)
    ('93.4', '92.6', '94.1')
    >>> together(0.6, 0.5986, 0.6034)
    ('0.600', '0.599', '0.603')
    """
    half = (high - low) / 2
    decimals = min(max(-math.floor(math.log10(half)), 1), 5) if half > 0 else 3
    return f"{middle:,.{decimals}f}", f"{low:,.{decimals}f}", f"{high:,.{decimals}f}"


def number(value: float) -> str:
    """Three digits that count: `1,230`, `12.3`, `0.00123`."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    decimals = max(2 - math.floor(math.log10(abs(value))), 0)
    return f"{value:,.{decimals}f}" if decimals < 8 else f"{value:.2e}"


def percent(share: float) -> str:
    """`0.33 %`, `100 %`; never 0 % of something."""
    return f"{100 * share:.3g} %" if share == 0 or share >= 1e-5 else "< 0.001 %"


def seconds(value: float) -> str:
    """`1.23 s`, `45.6 ms`, `789 µs`."""
    for unit, factor in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= factor:
            return f"{number(value / factor)} {unit}"
    return f"{number(value * 1e9)} ns"


def large(value: float) -> str:
    """`1.55 G` is 1,550,000,000."""
    for unit, factor in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= factor:
            return f"{number(value / factor)} {unit}"
    return f"{value:g}"
