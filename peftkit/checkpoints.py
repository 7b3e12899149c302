"""Guards gradient checkpointing: a block that is run again in backward must run with the adapters of its forward.

Leaving `using` before `backward()` would make it run with others, and its gradients would be silently wrong. So the
adapters of a layer's forward are noted on the checkpoint that is being run, and compared when it is run again. torch
has no public name for that checkpoint: without reentry it is held by the saved-tensor hooks on top, with reentry it is
the context of an autograd function on the stack.
"""

import inspect
import sys
import weakref
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook
from torch.utils import checkpoint

from peftkit.composition import Routing
from peftkit.errors import StateError

_REENTRANT = (checkpoint.CheckpointFunction.forward.__code__, checkpoint.CheckpointFunction.backward.__code__)
_NOTES = "_peftkit_running"


def check(layer: nn.Module, running: Any) -> None:
    """Note on the checkpoint around it what runs in a layer, or compare it with what ran; `StateError` on another."""
    if torch.is_grad_enabled():
        if torch._C._autograd._top_saved_tensors_default_hooks(False) is None and _outside_backward():
            return
    elif not layer.training:
        return  # a reentrant checkpoint's forward has no gradients either, but is in training
    around = _current()
    if around is None:
        return
    needs = getattr(around, "needs_input_grad", None)  # reentrant ones alone have it
    if needs is not None and not torch.is_grad_enabled() and not any(needs):
        _note_cut_off(running)
    notes = getattr(around, _NOTES, None)
    if notes is None:
        notes = {}
        setattr(around, _NOTES, notes)
    if notes.setdefault(id(layer), running) != running:
        raise StateError(
            "gradient checkpointing runs this layer again with other adapters than in its forward; "
            "call backward() before the active adapters change (inside the `with` block of using, disabled or routed)"
        )


_cut_off: dict[int, weakref.ref[nn.Parameter]] = {}
_hooks: list[Any] = []


def _note_cut_off(running: Any) -> None:
    """With reentry a checkpoint none of whose inputs requires a gradient gives none to what is inside. That is no fault
    where none is wanted, which cannot be seen here; so the next optimizer step looks.
    """
    for each in running.running.values() if isinstance(running, Routing) else (running,):
        for group in () if each is None else (*each.groups, *each.outer):
            _cut_off.update((id(p), weakref.ref(p)) for p in group.parameters() if p.requires_grad)
    if _cut_off and not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_refuse_what_was_cut_off))


def _refuse_what_was_cut_off(optimizer: Optimizer, *_: Any) -> None:
    noted = [p for ref in _cut_off.values() if (p := ref()) is not None] if _cut_off else []
    _cut_off.clear()
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]} if noted else set()
    if any(id(p) in trained and p.grad is None for p in noted):
        raise StateError(
            "gradient checkpointing with use_reentrant=True gave adapters no gradient, because no input of the "
            "checkpointed block requires one; use_reentrant=False works as it is, and so does "
            "model.enable_input_require_grads() of transformers"
        )


def _outside_backward() -> bool:
    return bool(torch._C._current_graph_task_id() == -1)


def _current() -> Any:
    """The checkpoint whose function runs now, for the first time or again; None outside of one."""
    hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks(False)
    if hooks is not None and getattr(hooks[0], "__module__", None) == checkpoint.__name__:
        for cell in inspect.unwrap(hooks[0]).__closure__ or ():
            held = cell.cell_contents
            held = held() if isinstance(held, weakref.ref) else held
            if isinstance(held, checkpoint._CheckpointFrame):
                return held
        return None
    frame: Any = sys._getframe()
    while frame is not None:
        if frame.f_code in _REENTRANT:
            return frame.f_locals["ctx"]
        frame = frame.f_back
    return None
