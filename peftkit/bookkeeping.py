"""The books of a ledger: which storages there were, when they came, grew and went, and what they were for.

Everything is written down in the order in which it happened, and added up only when it is asked for. So a category may
become known long after its bytes were counted, and the peak is told by the categories of hindsight.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum


class Category(IntEnum):
    """What memory is for, in the order in which tables show it."""

    frozen = 0
    """The model's parameters that had no `requires_grad` when the ledger was opened."""
    trainable = 1
    """Those that had."""
    buffers = 2
    """The model's buffers."""
    gradients = 3
    """What was some parameter's `.grad` after a backward, or when an optimizer began to step."""
    optimizer = 4
    """Tensors in the state of an optimizer that is known or has stepped."""
    activations = 5
    """What a forward made (or made again, in checkpointing) and was still there when backward went on; and tensors that
    were there before and belong to none of these: the batch."""
    temporary = 6
    """Everything else."""


FROZEN, TRAINABLE, BUFFERS, GRADIENTS, OPTIMIZER, ACTIVATIONS, TEMPORARY = Category
CATEGORIES = tuple(category.name for category in Category)


@dataclass(frozen=True, slots=True)
class Moment:
    """A stretch of the run, and the memory at its highest point."""

    label: str
    """`"forward of layers.3.mlp"`, `"backward of …"`, `"forward again of …"` (checkpointing) or `"optimizer step"`."""
    bytes: dict[str, int]
    """By category."""

    @property
    def total(self) -> int:
        """All categories together."""
        return sum(self.bytes.values())


@dataclass(frozen=True, slots=True)
class Place:
    """Where a run is: its phase, whose forward or backward that is (a module's path), and the operation."""

    phase: str
    path: str
    operation: str

    def text(self, *, operation: bool) -> str:
        """`"backward of layers.3"`, or with the operation, `"backward of layers.3 (mm)"`."""
        text = f"{self.phase} of {self.path}" if self.path else self.phase
        return f"{text} ({self.operation.removeprefix('aten::')})" if operation else text


class Book:
    """Storages go by number, in the order in which they were entered."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        """Bytes as of now; 0 for what is gone."""
        self.kinds: list[int] = []
        """Index into `CATEGORIES`."""
        self.before: list[tuple[int, int]] = []
        """What was there before the first event: number and bytes."""
        self.events: list[tuple[int, int]] = []
        """Number, and bytes more or less."""
        self.places: list[tuple[int, Place]] = []
        """Each with the first event that happened there."""

    def enter(self, nbytes: int, kind: int, *, was_there: bool = False) -> int:
        """A new storage, or one that was there before the first event; returns its number."""
        number = len(self.sizes)
        self.sizes.append(nbytes)
        self.kinds.append(kind)
        (self.before if was_there else self.events).append((number, nbytes))
        return number

    def resize(self, number: int, nbytes: int) -> None:
        """A storage has so many bytes from now on; 0 if it is gone."""
        if nbytes != self.sizes[number]:
            self.events.append((number, nbytes - self.sizes[number]))
            self.sizes[number] = nbytes

    def at(self, place: Place) -> None:
        """What follows happens there."""
        if not self.places or self.places[-1][1] != place:
            self.places.append((len(self.events), place))

    def now(self) -> dict[str, int]:
        """Bytes by category, as of now."""
        totals = [0] * len(CATEGORIES)
        for kind, nbytes in zip(self.kinds, self.sizes, strict=True):
            totals[kind] += nbytes
        return dict(zip(CATEGORIES, totals, strict=True))

    def moments(self, *, by_operation: bool) -> Iterator[Moment]:
        """The whole run in order: a moment for each stretch with one label."""
        now = [0] * len(CATEGORIES)
        for number, nbytes in self.before:
            now[self.kinds[number]] += nbytes
        total = best = sum(now)
        label, highest = "start", list(now)
        ahead = iter(self.places)
        start, place = next(ahead, (len(self.events), None))
        for i, (number, delta) in enumerate(self.events):
            while place is not None and start <= i:
                text = place.text(operation=by_operation)
                start, place = next(ahead, (len(self.events), None))
                if text != label:
                    yield Moment(label, dict(zip(CATEGORIES, highest, strict=True)))
                    label, best, highest = text, total, list(now)
            now[self.kinds[number]] += delta
            total += delta
            if total > best:
                best, highest = total, list(now)
        yield Moment(label, dict(zip(CATEGORIES, highest, strict=True)))
