"""Tells methods of an optimizer's steps: pruning schedules and regularisers follow training by themselves.

Two hooks on torch's optimizers, put there when the first such method is installed, look whether the optimizer trains
any of that method's parameters. So nothing has to be called in a training loop, and nothing can be forgotten. An
optimizer that is no `torch.optim.Optimizer` is not seen.
"""

import functools
import weakref
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from peftkit.installed import Placement, record
from peftkit.method import Method


class Watch:
    """Lets the methods on one model know of steps, for as long as the model lives. Copied and pickled with it."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        _begin(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        _begin(self)

    def tell(self, form: str, trained: set[int]) -> None:
        """Call `before_step` or `after_step` of every method of which the optimizer trains a parameter, by its id."""
        known = record(self.root)
        for placements in known.adapters.values() if known else ():
            by_method: dict[str, list[Placement]] = {}
            for placement in placements:
                if follows_steps(placement.method):
                    by_method.setdefault(placement.method.key, []).append(placement)
            for mine in by_method.values():
                if any(id(p) in trained for placement in mine for _, p in placement.trained()):
                    shared = next((placement.adapter for placement in mine if placement.shared), None)
                    adapters: list[Any] = [placement.adapter for placement in mine if not placement.shared]
                    with torch.no_grad():
                        getattr(mine[0].method, form)(adapters, shared)


_watches: "weakref.WeakSet[Watch]" = weakref.WeakSet()
_hooks: list[Any] = []


def follows_steps(method: Method) -> bool:
    """Whether the method has something to do at a step."""
    own = type(method)
    return own.after_step is not Method.after_step or own.before_step is not Method.before_step


def _begin(watch: Watch) -> None:
    _watches.add(watch)
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(functools.partial(_tell, "before_step")))
        _hooks.append(register_optimizer_step_post_hook(functools.partial(_tell, "after_step")))


def _tell(form: str, optimizer: Optimizer, *_: Any) -> None:
    watches = list(_watches)
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]} if watches else set()
    for watch in watches:
        watch.tell(form, trained)
