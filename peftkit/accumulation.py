"""Tells where autograd's engine adds up gradients in place, which it does not do while it is watched.

Where several gradients of one tensor meet, the engine adds them up in the first one's memory, if nobody else holds
that. But not while a dispatch mode is active: then it takes another tensor. A ledger is such a mode; for its figures
to be those of a run without it, it has to know when that happens.
"""

import functools
import sys
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import is_non_overlapping_and_dense_or_false
from torch.utils._python_dispatch import TorchDispatchMode

_ADD = torch.ops.aten.add.Tensor
_ENGINE = torch.autograd.graph._engine_run_backward.__code__


def in_place_of(func: Any, args: Any, frame: Any) -> bool:
    """Whether this operation of a backward is the engine's addition, and would be in place of its first argument.

    `frame` is that of the mode's own `__torch_dispatch__`: called by no Python code but the engine's entry, if by any
    (for CUDA the engine has threads of its own). To be called with no reference to the argument but `args`.
    """
    if func is not _ADD or torch.is_grad_enabled():
        return False
    caller = frame.f_back
    if caller is not None and caller.f_code is not _ENGINE:
        return False
    return _holders(args) == alone() and is_non_overlapping_and_dense_or_false(args[0])


@functools.cache
def alone() -> tuple[int, ...]:
    """How many holders the engine's buffer has, seen from within an operation, when nobody else holds it.

    This is found by an example, because it depends on torch and Python. To be asked for before a mode is active.
    """
    found: list[tuple[int, ...]] = []

    class Probe(TorchDispatchMode):  # type: ignore[no-untyped-call]
        @classmethod
        def _should_skip_dynamo(cls) -> bool:
            return False

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is _ADD:
                found.append(_holders(args))
            return func(*args, **(kwargs or {}))

    with torch.enable_grad(), torch.device("cpu"):
        x = torch.ones(1, requires_grad=True) * 2
        y = x.sin() + x.cos()
    with Probe():  # type: ignore[no-untyped-call]
        torch.autograd.backward(y)
    return found[-1]


def _holders(args: Any) -> tuple[int, ...]:
    """How many hold the first argument from Python, hold it at all, and hold its storage."""
    tensor = args[0]
    if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided:
        return ()
    storage = tensor.untyped_storage()
    return sys.getrefcount(tensor), tensor._use_count(), torch._C._storage_Use_Count(storage._cdata)  # type: ignore[attr-defined]
