"""What one cell is about: a workload on a device, wrapped by one method; and the one training step that is measured."""

import contextlib
import importlib
import itertools
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import peftkit
from peftkit import plugins
from peftkit.errors import WorkloadError
from peftkit.lifecycle import param_groups
from peftkit.method import Method
from peftkit.plan import plan
from peftkit.selectors import describe
from peftkit.workload import Workload

LEARNING_RATE = 1e-3
"""Of the steps that are measured for time and memory, for which it does not matter."""


@dataclass(frozen=True)
class Subject:
    """One method on one workload, on one device."""

    workload: Workload
    method: Method
    device: torch.device

    def base(self) -> nn.Module:
        """A new base model, with the same values every time."""
        torch.manual_seed(0)
        return self.workload.model().to(self.device)

    def batches(self, seed: int = 0) -> Iterator[Any]:
        """Training batches on the device, without end."""
        return (moved(batch, self.device) for batch in self.workload.batches(seed))

    def batch(self) -> Any:
        """The batch with which time, memory and FLOPs are measured."""
        return next(self.batches())

    def rules(self) -> Mapping[Any, Method]:
        """What is adapted: the workload's own rules, or its head in full and the method on its targets."""
        own = self.workload.rules(self.method)
        if own is not None:
            return own
        targets = self.method.default_targets
        if self.workload.targets is not None and targets == Method.default_targets:
            targets = self.workload.targets
        head: dict[Any, Method] = {} if self.workload.head is None else {self.workload.head: peftkit.Full()}
        return {**head, _as_key(targets): self.method}

    def rules_as_json(self) -> dict[str, Any]:
        """The rules: each selector in words, with its method and its fields."""
        return {_in_words(key): {"method": m.name, **m.fields()} for key, m in self.rules().items()}

    def wrapped(self, seed: int = 0) -> nn.Module:
        """A new base with the method on it, in training mode; the adapters' start depends on the seed."""
        return self.wrap(self.base(), seed)

    def wrap(self, model: nn.Module, seed: int = 0) -> nn.Module:
        """Put the method on a base, in training mode."""
        data = self.data(model)
        torch.manual_seed(seed)
        return peftkit.wrap(model, self.rules(), data=data).train()

    def data(self, model: nn.Module) -> list[Any] | None:
        """Batches for a method that takes its start from them, and None for any other."""
        steps = plan(model, self.rules()).steps
        if all(method.observer(site) is None for site, method in steps):
            return None
        return list(itertools.islice(self.batches(), 3))

    def optimizer(self, model: nn.Module, lr: float = LEARNING_RATE) -> torch.optim.Optimizer | None:
        """AdamW for what trains; None where nothing does."""
        if not any(p.requires_grad for p in model.parameters()):
            return None
        return torch.optim.AdamW(param_groups(model, lr=lr))

    def step(self, model: nn.Module, optimizer: torch.optim.Optimizer | None, batch: Any) -> Tensor:
        """One training step, which is forward, backward, optimizer and clearing of gradients; returns the loss."""
        loss = self.workload.loss(model, batch)
        if optimizer is not None:
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
        return loss.detach()


def workload_named(text: str) -> Workload:
    """The installed workload of that name, or the user's own: `module:function`, which returns model and batches."""
    return _Yours(text) if ":" in text else plugins.workload(text)


class _Yours(Workload):
    """What a function of the user's returns: a model, batches, and perhaps a loss."""

    unit = "samples"

    def __init__(self, text: str) -> None:
        self.name = text  # type: ignore[misc] # an instance's own, for want of a class of its own
        self.summary = f"model and batches of {text}"  # type: ignore[misc]
        self._loss: Any = None
        self._batches: list[Any] = []

    @property
    def per_step(self) -> int:  # type: ignore[override]
        """The length of the first dimension of the batch's first tensor."""
        first = next(_tensors(next(self.batches(0))), None)
        return 1 if first is None or not first.ndim else first.shape[0]

    def model(self) -> nn.Module:
        """The model, with the values that it has under the engine's seed. Eight batches are kept at most."""
        return self._made()

    def batches(self, seed: int) -> Iterator[Any]:  # noqa: ARG002 - the function takes no seed
        """The batches, over and over."""
        if not self._batches:
            self._made()
        return itertools.cycle(self._batches)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """By the function's own loss, if it has returned one."""
        if self._loss is None:
            return super().loss(model, batch)
        loss: Tensor = self._loss(model, batch)
        return loss

    def _made(self) -> nn.Module:
        found = _imported(self.name)
        made = found()
        if not (isinstance(made, tuple) and len(made) in (2, 3) and isinstance(made[0], nn.Module)):
            raise WorkloadError(
                f"{self.name} must return (model, batches) or (model, batches, loss), with loss(model, batch); it "
                f"returned {type(made).__name__}"
            )
        self._batches = self._batches or list(itertools.islice(made[1], 8))
        if not self._batches:
            raise WorkloadError(f"{self.name} returned no batch")
        self._loss = made[2] if len(made) == 3 else None
        return made[0]


def _imported(text: str) -> Any:
    module, _, name = text.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)  # as `python -m` does; an installed command has only its own folder there
    try:
        return reduce(getattr, name.split("."), importlib.import_module(module))
    except (ImportError, AttributeError) as error:
        raise WorkloadError(f"cannot import {text}: {type(error).__name__}: {error}") from error


def moved(value: Any, device: torch.device) -> Any:
    """A batch with its tensors on the device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: moved(each, device) for key, each in value.items()}
    return type(value)(moved(each, device) for each in value) if type(value) in (tuple, list) else value


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Mapping, tuple, list)):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(each)


def _as_key(targets: Any) -> Any:
    """Several selectors as a tuple, which can be a mapping's key; a single one as it is."""
    if isinstance(targets, (list, tuple, set, frozenset)):
        return targets[0] if len(targets) == 1 else tuple(targets)  # type: ignore[index]
    return targets


def _in_words(key: Any) -> str:
    return ", ".join(map(describe, key)) if isinstance(key, tuple) else describe(key)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In evaluation mode, without gradients; back in training mode afterwards."""
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train()
