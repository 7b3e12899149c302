"""What fits into a device: the largest batch or sequence of one method, and which methods fit at all."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from peftkit import plugins
from peftkit.dry_run import is_shape
from peftkit.errors import PeftkitError
from peftkit.estimating import Estimate, Step, nbytes_of
from peftkit.method import Method
from peftkit.plan import Rules
from peftkit.tables import size, table

_MOST = 2**24
"""Nobody trains on more samples or tokens at once; where even that fits, the inputs do not decide."""


@dataclass(frozen=True)
class Largest:
    """The largest batch or sequence that fits, with its estimate and that of the next one."""

    over: str
    size: int
    """0 where not even 1 fits."""
    budget: int
    estimate: Estimate | None
    """At that size; None where that is 0."""
    beyond: Estimate
    """At one more, which does not fit."""

    def to_json(self) -> dict[str, Any]:
        """Every field under its own name, as JSON values; sizes are in bytes."""
        own = {"over": self.over, "size": self.size, "budget": self.budget, "beyond": self.beyond.to_json()}
        return own | {"estimate": self.estimate.to_json() if self.estimate else None}

    def __str__(self) -> str:
        """The answer in one line, and the estimate."""
        if self.estimate is None:
            return f"not even {self.over} 1 fits in {size(self.budget)}:\n\n{self.beyond}"
        return f"largest {self.over} in {size(self.budget)}: {self.size:,}\n\n{self.estimate}"


def largest(
    build: nn.Module | Callable[[], nn.Module],
    method: str | Method | Rules | None,
    inputs: Any,
    budget: int | str = "24GB",
    over: str = "batch",
    **arguments: Any,
) -> Largest:
    """The largest batch or sequence with which a training step fits, by the most overhead, into a budget.

    Args:
        build: as in `estimate`.
        method: as in `estimate`.
        inputs: a function that takes `batch` or `sequence`, whichever is asked for, and gives the inputs; or inputs
            as in `estimate`, of which dimension 0 is the batch and dimension 1 the sequence (of every tensor in
            which that is as long as in the first).
        budget: bytes, or text such as `"24GB"`.
        over: `"batch"` or `"sequence"`.
        **arguments: the other arguments of `estimate`.

    Raises what `estimate` raises.

    >>> import torch
    >>> from peftkit.fitting import largest
    >>> found = largest(torch.nn.Linear(1000, 1000), "lora", ((1, 1000), torch.float32), "10MB", device="cpu")
    >>> found.estimate.peak <= 10_000_000 < found.beyond.peak
    True
    """
    if over not in ("batch", "sequence"):
        raise PeftkitError(f"over must be batch or sequence, got {over!r}")
    room = nbytes_of(budget)
    step = Step(build, method, **arguments)
    known: dict[int, Estimate] = {}

    def needs(n: int) -> int:
        known[n] = step.estimate(scaled(inputs, over, n))
        return known[n].peak + known[n].overhead[1]

    found = _most_within(needs, room)
    return Largest(over, found, room, known.get(found), known[found + 1])


def _most_within(needs: Callable[[int], int], room: int) -> int:
    """The largest n with `needs(n) <= room`, which grows with n; 0 for none. `needs(n + 1)` has been asked as well.

    A straight line through the ends of the interval guesses well, because most memory is proportional; every other
    step halves it, because not all is.
    """
    low, at_low, high, at_high = 0, 0, 1, needs(1)
    while at_high <= room:
        if high >= _MOST:
            raise PeftkitError(f"even {_MOST:,} fit, so the memory does not depend on this size; is it in the inputs?")
        before, low, at_low = (low, at_low), high, at_high
        guess = 2 if low == 1 else _on_the_line(before, (low, at_low), room) + 1
        high = min(max(guess, low + 1 if low <= 2 else 2 * low), 64 * low, _MOST)
        at_high = needs(high)
    halve = False
    while high - low > 1:
        middle = (low + high) // 2 if halve else _on_the_line((low, at_low), (high, at_high), room)
        middle = min(max(middle, low + 1), high - 1)
        needed = needs(middle)
        low, at_low, high, at_high = (
            (middle, needed, high, at_high) if needed <= room else (low, at_low, middle, needed)
        )
        halve = not halve
    return low


def _on_the_line(a: tuple[int, int], b: tuple[int, int], room: int) -> int:
    return a[0] + (room - a[1]) * (b[0] - a[0]) // max(1, b[1] - a[1])


def scaled(inputs: Any, over: str, n: int) -> Any:
    """The inputs with so many samples (`over="batch"`) or positions (`"sequence"`)."""
    if callable(inputs):
        return inputs(**{over: n})
    dim = 0 if over == "batch" else 1
    sizes = [tuple(t.shape if isinstance(t, Tensor) else t[0]) for t in _tensors(inputs)]
    length = next((size[dim] for size in sizes if len(size) > dim), None)
    if length is None:
        raise PeftkitError(f"no input has a dimension {dim}, the {over}; give a function of {over} that makes them")
    made: dict[int, Any] = {}  # what is one tensor in the inputs stays one

    def resized(value: Any) -> Any:
        if isinstance(value, Tensor) or is_shape(value):
            if id(value) not in made:
                size = list(value.shape if isinstance(value, Tensor) else value[0])
                if len(size) > dim and size[dim] == length:
                    size[dim] = n
                made[id(value)] = tuple(size), value.dtype if isinstance(value, Tensor) else value[1]
            return made[id(value)]
        if isinstance(value, Mapping):
            return {key: resized(each) for key, each in value.items()}
        return type(value)(map(resized, value)) if type(value) in (tuple, list) else value

    return resized(inputs)


def _tensors(value: Any) -> list[Any]:
    if isinstance(value, Tensor) or is_shape(value):
        return [value]
    parts = value.values() if isinstance(value, Mapping) else value if type(value) in (tuple, list) else ()
    return [each for part in parts for each in _tensors(part)]


# ------------------------------------------------------------------------------------------ which methods


@dataclass(frozen=True)
class Fit:
    """One method: its estimate, or why it has none."""

    method: str
    estimate: Estimate | None
    error: str = ""
    fits: bool = False


@dataclass(frozen=True)
class Fits:
    """Which methods fit into a budget. Print it for a table."""

    budget: int
    rows: tuple[Fit, ...]
    """Those that fit first, the smallest peak first; then those that don't; then those that cannot be run."""

    def to_json(self) -> dict[str, Any]:
        """The budget in bytes, and a row a method."""
        rows = [
            {"method": r.method, "fits": r.fits, "error": r.error, "estimate": r.estimate and r.estimate.to_json()}
            for r in self.rows
        ]
        return {"budget": self.budget, "rows": rows}

    def __str__(self) -> str:
        """A line a method."""
        cells = []
        for row in self.rows:
            e = row.estimate
            if e is None:
                cells.append([row.method, "error", "", "", "", "", row.error])
                continue
            state = e.at_peak["gradients"] + e.at_peak["optimizer"]
            numbers = [f"{e.trainable:,}", size(state), size(e.at_peak["activations"]), size(e.peak)]
            cells.append([row.method, "yes" if row.fits else "no", *numbers, ""])
        headers = ["method", "fits", "trainable", "gradients, optimizer", "activations", "peak", "why not"]
        text = table(headers, cells, "trainable activations peak")
        return f"{text}\n\nfits: the peak and the most overhead, in {size(self.budget)}"


def which_fit(
    build: nn.Module | Callable[[], nn.Module],
    methods: Sequence[str | Method] | None = None,
    inputs: Any = None,
    *,
    budget: int | str = "24GB",
    **arguments: Any,
) -> Fits:
    """Which methods fit into a budget: by default every one that is installed, with its default fields.

    A method that this model cannot take, or that needs a field, is a row with the reason.

    >>> import torch
    >>> from peftkit.fitting import which_fit
    >>> build = lambda: torch.nn.Sequential(torch.nn.Linear(100, 100), torch.nn.Linear(100, 10))
    >>> found = which_fit(build, ["lora", "full", "loar"], ((4, 100), torch.float32), budget="1MB", device="cpu")
    >>> [(row.method, row.fits, row.error.partition(";")[0]) for row in found.rows]
    [('lora', True, ''), ('full', True, ''), ('loar', False, "no method called 'loar' is installed")]
    """
    room = nbytes_of(budget)
    chosen = [info.name for info in plugins.methods()] if methods is None else list(methods)
    rows = [_tried(build, method, inputs, room, arguments) for method in chosen]
    order = sorted(rows, key=lambda r: (r.estimate is None, not r.fits, r.estimate.peak if r.estimate else 0))
    return Fits(room, tuple(order))


def _tried(build: Any, method: str | Method, inputs: Any, room: int, arguments: Mapping[str, Any]) -> Fit:
    try:
        step = Step(build, plugins.method(method)() if isinstance(method, str) else method, **arguments)
        found = step.estimate(inputs() if callable(inputs) else inputs)
    except Exception as error:  # noqa: BLE001 - a plugin may raise anything, and the other rows must still come
        text = str(error) if isinstance(error, PeftkitError) else f"{type(error).__name__}: {error}"
        return Fit(str(method), None, text.strip().partition("\n")[0])
    return Fit(str(method), found, fits=found.peak + found.overhead[1] <= room)
