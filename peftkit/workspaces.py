"""What an operation takes and gives back within itself on the CPU, which no one outside of it sees.

It matters where the peak falls into such an operation. Most need a few bytes for a Python number; convolutions and
recurrent layers, which oneDNN runs in layouts of its own, need as much as their output again. How much depends on the
processor, so that is measured: each distinct call is run once more, on uninitialised tensors, under torch's profiler.
"""

import functools
import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from peftkit.bookkeeping import ACTIVATIONS, TEMPORARY, Book
from peftkit.whereabouts import AGAIN as RUN_AGAIN
from peftkit.whereabouts import Whereabouts

_aten = torch.ops.aten

AGAIN = -2
"""For a node's number: the graph of what is made again, which nobody goes back through."""
_MARK = "peftkit workspace "

MEASURED = frozenset(
    {
        "aten::convolution",
        "aten::convolution_backward",
        "aten::mkldnn_rnn_layer",
        "aten::mkldnn_rnn_layer_backward",
        "aten::native_batch_norm",
        "aten::native_batch_norm_backward",
        "aten::native_layer_norm_backward",
        "aten::embedding_dense_backward",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
    }
)
"""Operations that need more than a few bytes, by name."""

_LARGEST = 2**28
"""Bytes of the tensors of a call that is measured at most: beyond, it would take the memory that is to be estimated."""

_IN_HALF = frozenset(f"aten::{name}" for name in ("mm", "addmm", "addmm_", "bmm", "baddbmm", "native_layer_norm"))
"""Those that do so in half precision only."""

_WITH_NUMBER = frozenset(
    f"aten::{name}{in_place}"
    for name in ("add", "sub", "mul", "div", "eq", "ne", "lt", "le", "gt", "ge", "remainder", "fmod", "floor_divide")
    for in_place in ("", "_")
)
_SAVES_NUMBER = frozenset({_aten.mul.Tensor, _aten.div.Tensor})


@functools.cache
def name_of(func: Any) -> str:
    """`"aten::mm"`."""
    return str(func._schema.name)


def number_bytes(func: Any, args: Any) -> int:
    """Bytes for the Python number that an operation combines a tensor with: as a tensor, and cast to the other's dtype.

    A mean divides by a number, too.
    """
    name = name_of(func)
    if name == "aten::mean":
        return 8 + int(args[0].itemsize)
    if len(args) < 2 or name not in _WITH_NUMBER or type(args[1]) not in (int, float):
        return 0
    wrapped = torch.int64 if type(args[1]) is int else torch.float64
    common = torch.result_type(args[0], args[1])
    return 8 + (0 if common is wrapped else common.itemsize)


def saves_number(func: Any, args: Any) -> bool:
    """Whether autograd keeps the number for backward, 8 bytes."""
    return func in _SAVES_NUMBER and type(args[1]) in (int, float) and bool(args[0].requires_grad)


def call_of(func: Any, args: Any, kwargs: Any) -> Any:
    """A call of an operation without its tensors' values, equal for calls that need the same; None for others."""
    name = name_of(func)
    if name not in MEASURED and not (name in _IN_HALF and any(a.itemsize == 2 for a in args if isinstance(a, Tensor))):
        return None
    if sum(a.numel() * a.itemsize for a in args if isinstance(a, Tensor)) > _LARGEST:
        return None
    return func, frozen(args), frozen(tuple(sorted(kwargs.items()))), torch.is_grad_enabled()


def frozen(value: Any) -> Any:
    """An argument with tensors' shapes in place of the tensors, and numbers told by type: 1 and 1.0 are equal."""
    if isinstance(value, Tensor):
        return _Shape(value.size(), value.stride(), value.dtype, value.device.type)
    if isinstance(value, (int, float)):
        return _Number((type(value), value))
    return tuple(map(frozen, value)) if isinstance(value, (list, tuple)) else value


class Workspaces:
    """Enters in a book what operations take within themselves."""

    def __init__(self, book: Book) -> None:
        self.book = book
        self.unmeasured: list[tuple[int, int, Any]] = []
        """Number of the workspace, the event that ends it, and the call."""
        self.saved: dict[int, list[int]] = {}
        """Numbers that a node of the graph holds as tensors."""

    def open(self, func: Any, args: Any, kwargs: Any, where: Whereabouts) -> tuple[int, Any] | None:
        """Enter the workspace of an operation before its results; what this returns is to be given to `close`."""
        call = call_of(func, args, kwargs)
        nbytes = 0 if call else number_bytes(func, args)
        if not call and not nbytes:
            return None
        if nbytes and torch.is_grad_enabled() and saves_number(func, args):
            node = AGAIN if where.phase == RUN_AGAIN else where.next_node() - 1
            self.saved.setdefault(node, []).append(self.book.enter(8, ACTIVATIONS))
        return self.book.enter(nbytes, TEMPORARY), call

    def close(self, number: int, call: Any) -> None:
        """The operation has ended."""
        if call:
            self.unmeasured.append((number, len(self.book.events), call))
            self.book.events.append((number, 0))
        self.book.resize(number, 0)

    def release(self, node: int) -> None:
        """The node has run in backward and holds nothing more."""
        for number in self.saved.pop(node, ()):
            self.book.resize(number, 0)

    def measure(self) -> None:
        """Fill in what could not be told while the run lasted: what is beyond an operation's results."""
        known = measure(call for *_, call in self.unmeasured)
        events = self.book.events
        opened = {number: i for i, (number, _) in reversed(list(enumerate(events)))} if known else {}
        for number, closed, call in self.unmeasured:
            if call in known:
                first = opened[number]
                results = sum(delta for _, delta in events[first + 1 : closed] if delta > 0)
                nbytes = max(0, known[call] - results)
                events[first], events[closed] = (number, nbytes), (number, -nbytes)
        self.unmeasured = []


class _Number(tuple[Any, ...]):
    """A type and a value."""

    __slots__ = ()


class _Shape(tuple[Any, ...]):
    """Size, strides, dtype and device of a tensor."""

    __slots__ = ()

    def __new__(cls, *parts: Any) -> Self:
        return super().__new__(cls, (tuple(parts[0]), tuple(parts[1]), *parts[2:]))

    def tensor(self) -> Tensor:
        size, strides, dtype, _ = self
        made = torch.empty_strided(size, strides, dtype=dtype, device="cpu")
        return made if dtype.is_floating_point else made.zero_()  # an index must lie within


_known: dict[Any, int] = {}
_MOST = 4096  # calls that are remembered


def measure(calls: Iterable[Any]) -> dict[Any, int]:
    """For each of these calls, the most bytes that it holds at any one time, its results included.

    Those of which nothing can be told are left out: the call fails on its own, or somebody else is profiling.
    """
    distinct = list(dict.fromkeys(calls))
    new = [call for call in distinct if call not in _known]
    if new and not torch._C._autograd._profiler_enabled():
        if len(_known) + len(new) > _MOST:
            _known.clear()
        _known.update(_measured(new))
    return {call: _known[call] for call in distinct if call in _known}


def _measured(calls: Sequence[Any]) -> dict[Any, int]:
    failed = set()
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        for i, (func, args, kwargs, grad) in enumerate(calls):
            live, named = _thawed(args), {name: _thawed(value) for name, value in kwargs}
            with torch.set_grad_enabled(grad), torch.autograd.profiler.record_function(f"{_MARK}{i}"):
                try:
                    func(*live, **named)
                except RuntimeError:
                    failed.add(i)
    events: Any = profile.kineto_results.events()
    memory = sorted(((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"), key=lambda entry: entry[0])
    found = {}
    for event in events:
        if event.name().startswith(_MARK):
            i = int(event.name().removeprefix(_MARK))
            first = bisect_left(memory, event.start_ns(), key=lambda entry: entry[0])
            last = bisect_right(memory, event.start_ns() + event.duration_ns(), key=lambda entry: entry[0])
            if i not in failed:
                found[calls[i]] = max(itertools.accumulate((nbytes for _, nbytes in memory[first:last]), initial=0))
    return found


def _thawed(value: Any) -> Any:
    if isinstance(value, _Shape):
        return value.tensor()
    if isinstance(value, _Number):
        return value[1]
    return [_thawed(each) for each in value] if isinstance(value, tuple) else value
