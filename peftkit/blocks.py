"""Which thread is inside a block that says what a model runs (`using`, `disabled`, `routed`).

What runs is the model's and not a thread's: a checkpointed block is run again in the autograd engine's threads, which
must see the same. So two threads cannot ask one model for different adapters at a time, and the second is told so
instead of being given the first one's answers.
"""

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from peftkit.errors import StateError

_lock = threading.Lock()
_held: "weakref.WeakKeyDictionary[nn.Module, tuple[int, int]]" = weakref.WeakKeyDictionary()
"""For a model, the thread that is inside, and how deep."""


@contextmanager
def block(root: nn.Module) -> Iterator[None]:
    """Be inside; `StateError` where another thread is."""
    me = threading.get_ident()
    with _lock:
        refuse_elsewhere(root, "say what it runs")
        _, depth = _held.get(root, (me, 0))
        _held[root] = me, depth + 1
    try:
        yield
    finally:
        with _lock:
            owner, depth = _held[root]
            if depth > 1:
                _held[root] = owner, depth - 1
            else:
                del _held[root]


def is_held_elsewhere(root: nn.Module) -> bool:
    """Whether another thread is inside. A block that backward runs again belongs to the thread that waits for it."""
    owner = _held.get(root, (None, 0))[0]
    return owner not in (None, threading.get_ident()) and torch._C._current_graph_task_id() == -1


def refuse_elsewhere(root: nn.Module, action: str) -> None:
    """`StateError` where another thread is inside."""
    if is_held_elsewhere(root):
        raise StateError(
            f"cannot {action}: another thread is inside using, disabled or routed on this model, and which adapters "
            "run is the model's, not a thread's. Route one batch (peftkit.routed), let the threads take turns, or give "
            "each its own copy.deepcopy(model)"
        )
