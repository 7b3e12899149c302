"""Runs a model on an example and leaves no trace: modes, gradients, buffers and random states are put back."""

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def call(root: nn.Module, example: Any) -> Any:
    example = copied(example)
    if isinstance(example, dict):
        return root(**example)
    return root(*example) if type(example) is tuple else root(example)


def copied(value: Any) -> Any:
    """The example, with tensors of its own: nothing is written into the caller's, nor differentiated beyond them."""
    if isinstance(value, Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    if isinstance(value, Mapping):
        return {key: copied(each) for key, each in value.items()}
    return type(value)(map(copied, value)) if type(value) in (tuple, list) else value


def leaves(value: Any) -> Iterator[Tensor]:
    """The floating point tensors of a nested output: tuples, lists, mappings (as in transformers) and dataclasses."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from leaves(each)
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from leaves(each)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from leaves(getattr(value, field.name))


@contextmanager
def untouched(root: nn.Module) -> Iterator[None]:
    """Whatever happens inside, put back modes, gradients, buffers and random generators."""
    modules = list(root.modules())
    modes = [(m, m.training) for m in modules]
    buffers = [(m, dict(m._buffers)) for m in modules if m._buffers]
    values = [(b, b.detach().clone()) for _, own in buffers for b in own.values() if b is not None and not b.is_meta]
    gradients = [(p, p.grad) for p in root.parameters()]
    # These hooks may hold an optimizer that steps within backward.
    hooks = [(own, dict(own)) for p, _ in gradients if (own := getattr(p, "_post_accumulate_grad_hooks", None))]
    cuda = list(range(torch.cuda.device_count())) if _cuda_runs() else []
    with torch.random.fork_rng(devices=cuda):
        try:
            for p, _ in gradients:
                p.grad = None
            for own, _ in hooks:
                own.clear()
            yield
        finally:
            for own, entries in hooks:
                own.update(entries)
            for p, grad in gradients:
                p.grad = grad
            for module, registered in buffers:
                module._buffers.clear()
                module._buffers.update(registered)
            with torch.no_grad():
                for buffer, value in values:
                    if not torch.equal(buffer, value):
                        buffer.copy_(value)
            for module, training in modes:
                module.training = training


def _cuda_runs() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def seed() -> None:
    """Let every run draw the same numbers. `torch.manual_seed` would also queue a seed for a device not yet in use."""
    torch.default_generator.manual_seed(0)
    if _cuda_runs():
        torch.cuda.manual_seed_all(0)
