"""What every check needs: a method on a case's model, adapters with values of their own, runs, and comparisons.

A check is a function that returns when its promise holds, and raises otherwise. What it expected, and what it saw
instead, is in the message; which method and which case is the kit's to add.
"""

import copy
import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import peftkit
from peftkit.testing.cases import Case, mapped

NAME = "kit"
"""The adapter's name, wherever a check does not need several."""

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 1e-1}
"""How far two ways to compute the same may differ, relative to the largest value."""


class NotApplicableError(Exception):
    """The check says nothing about this method at this case; the message says why."""


def expect(condition: object, message: str) -> None:
    """Raise an `AssertionError` with the message unless the condition holds."""
    if not condition:
        raise AssertionError(message)


# ------------------------------------------------------------------------------------------ method and model


def targets_of(method: peftkit.Method, case: Case) -> Any:
    """The selector for this method in the case's model."""
    return case.modules if method.scope == "modules" and case.selects == "layer" else case.targets


def sites_of(method: peftkit.Method, case: Case) -> list[peftkit.Site]:
    """What the method would adapt in the case's model; `SelectorError` where its default targets match nothing."""
    return [site for site, _ in peftkit.plan(case.build(), method, targets=targets_of(method, case)).steps]


def wrapped(
    method: peftkit.Method,
    case: Case,
    *,
    model: nn.Module | None = None,
    dtype: torch.dtype = torch.float32,
    training: bool = False,
    seed: int = 0,
    name: str = NAME,
) -> nn.Module:
    """The case's model (or the `model` given) with a new adapter of the method, drawn with this seed."""
    if model is None:
        model = base(case, dtype=dtype, training=training)
    torch.manual_seed(seed)
    return peftkit.wrap(model, method, targets=targets_of(method, case), name=name, **_data(method, case, model))


def _data(method: peftkit.Method, case: Case, model: nn.Module) -> dict[str, Any]:
    """Data for a method that takes its start from data; nothing for any other, which would refuse it."""
    if type(method).observer is peftkit.Method.observer:
        return {}
    steps = peftkit.plan(model, method, targets=targets_of(method, case)).steps
    if all(method.observer(site) is None for site, _ in steps):
        return {}
    return {"data": [lambda model: loss_of(call(model, example(case, _dtype_of(model))))]}


def _dtype_of(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def base(case: Case, *, dtype: torch.dtype = torch.float32, training: bool = False) -> nn.Module:
    """The case's model without any adapter."""
    return case.build().to(dtype).train(training)


def adapters_of(model: nn.Module, name: str = NAME) -> dict[str, Any]:
    """The adapters that one name has on a model, by path: `"layer.adapters.kit.weight"`."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, (peftkit.Adapter, peftkit.Activation)) and f".adapters.{name}." in f".{path}"
    }


def with_adapters(model: nn.Module, form: type[Any] | tuple[type[Any], ...] | None = None) -> dict[str, Any]:
    """The model's adapters, of which all have this form; not applicable where there are none."""
    found = adapters_of(model)
    if not found and any(p.requires_grad for p in model.parameters()):
        raise NotApplicableError("it trains the weights in place: no adapter is installed")
    if not found:
        raise NotApplicableError("it installs nothing and trains nothing")
    if form is not None and not all(isinstance(adapter, form) for adapter in found.values()):
        raise NotApplicableError("it surrounds the forward, and has no weight form")
    return found


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """What trains, by path; not applicable where nothing does."""
    found = {path: p for path, p in model.named_parameters() if p.requires_grad}
    if not found:
        raise NotApplicableError("it trains nothing")
    return found


def stirred(model: nn.Module, seed: int = 1) -> nn.Module:
    """The model, its trainable parameters moved away from where they start, as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in (p for p in model.parameters() if p.requires_grad):
            p.add_((torch.randn(p.shape, generator=generator) * 0.1).to(p.device, p.dtype))
    return model


# ------------------------------------------------------------------------------------------------------ runs


def example(case: Case, dtype: torch.dtype = torch.float32) -> Any:
    """The case's input, its floating point tensors in this dtype."""
    return mapped(case.inputs(), lambda t: t.to(dtype) if t.is_floating_point() else t)


def call(model: Callable[..., Any], inputs: Any) -> list[Tensor]:
    """The model's output as a flat list of its floating point tensors."""
    return list(_leaves(model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)))


def _leaves(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _leaves(each)
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from _leaves(each)


def run(model: Callable[..., Any], case: Case, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """The model's output on the case's example, without a graph."""
    with torch.no_grad():
        return [t.clone() for t in call(model, example(case, dtype))]


def loss_of(outputs: Sequence[Tensor]) -> Tensor:
    """The outputs, each element times a fixed random factor, as one number: every output counts, none cancels."""
    generator = torch.Generator().manual_seed(40)
    factors = [torch.randn(t.shape, generator=generator).to(t.device, t.dtype) for t in outputs]
    return torch.stack([(t * factor).sum() for t, factor in zip(outputs, factors, strict=True)]).sum()


def train(model: nn.Module, case: Case, steps: Sequence[int], *, adam: bool = False) -> list[dict[str, Tensor | None]]:
    """Train some steps (each seeded by its number) and return each step's gradients by path."""
    parameters = trainable(model)
    make: Any = torch.optim.AdamW if adam else torch.optim.SGD
    optimizer = make(list(parameters.values()), lr=0.01)
    gradients: list[dict[str, Tensor | None]] = []
    for step in steps:
        torch.manual_seed(step)
        optimizer.zero_grad()
        loss_of(call(model, example(case))).backward()  # type: ignore[no-untyped-call]
        gradients.append({path: None if p.grad is None else p.grad.clone() for path, p in parameters.items()})
        optimizer.step()
    return gradients


def saved_bytes(model: nn.Module, name: str = NAME) -> bytes:
    """The adapter's file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.safetensors"
        peftkit.save(model, path, name)
        return path.read_bytes()


def loaded(method: peftkit.Method, model: nn.Module, data: bytes, *, trainable: bool = False) -> nn.Module:
    """`model`, a bare base, with the adapter of a file's bytes on it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.safetensors"
        path.write_bytes(data)
        torch.manual_seed(99)  # whatever loading draws must not matter
        return peftkit.load(model, path, trainable=trainable, methods=[type(method)])


# ------------------------------------------------------------------------------------------------ comparisons


def same(actual: Sequence[Tensor], wanted: Sequence[Tensor], what: str) -> None:
    """Expect equal tensors, bit for bit."""
    _alike(actual, wanted, what)
    for a, b in zip(actual, wanted, strict=True):
        if not torch.equal(a, b):
            difference = (a.double() - b.double()).abs().max().item()
            raise AssertionError(f"{what}: expected the same bits, they differ by up to {difference:.3g}")


def close(actual: Sequence[Tensor], wanted: Sequence[Tensor], what: str, tolerance: float) -> None:
    """Expect tensors that differ by rounding only: by at most `tolerance` of the largest value."""
    _alike(actual, wanted, what)
    for a, b in zip(actual, wanted, strict=True):
        finite(a, what)
        size = max(b.double().abs().max().item(), 1e-6) if b.numel() else 1.0
        error = (a.double() - b.double()).abs().max().item() / size if b.numel() else 0.0
        expect(
            error <= tolerance, f"{what}: they differ by {error:.3g} of the largest value; {tolerance:.0e} is allowed"
        )


def _alike(actual: Sequence[Tensor], wanted: Sequence[Tensor], what: str) -> None:
    expect(len(actual) == len(wanted), f"{what}: expected {len(wanted)} tensors, got {len(actual)}")
    for a, b in zip(actual, wanted, strict=True):
        expect(a.shape == b.shape, f"{what}: expected shape {list(b.shape)}, got {list(a.shape)}")


def finite(tensor: Tensor | None, what: str) -> None:
    """Expect a tensor without infinite or NaN values."""
    expect(tensor is not None, f"{what}: there is none")
    expect(tensor is None or bool(tensor.isfinite().all()), f"{what}: it holds values that are not finite")


def differ(actual: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    """Whether any two tensors differ in any bit."""
    return any(not torch.equal(a, b) for a, b in zip(actual, other, strict=True))


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A model as it is now: its modules and their classes and attributes, its tensors and their values and flags."""

    modules: dict[str, nn.Module]
    classes: dict[str, type]
    attributes: dict[str, frozenset[str]]
    hooks: dict[str, int]
    tensors: dict[str, Tensor]
    values: dict[str, Tensor]
    flags: dict[str, bool]

    @classmethod
    def of(cls, model: nn.Module) -> "Snapshot":
        """Take one."""
        modules = dict(model.named_modules(remove_duplicate=False))
        parameters = model.named_parameters(remove_duplicate=False)
        tensors: dict[str, Tensor] = {**dict(parameters), **dict(model.named_buffers(remove_duplicate=False))}
        return cls(
            modules=modules,
            classes={path: type(module) for path, module in modules.items()},
            attributes={path: frozenset(module.__dict__) for path, module in modules.items()},
            hooks={path: _hooks(module) for path, module in modules.items()},
            tensors=tensors,
            values={path: t.detach().clone() for path, t in tensors.items()},
            flags={path: t.requires_grad for path, t in tensors.items()},
        )

    def expect_values(self, tensors: Mapping[str, Tensor] | None = None) -> None:
        """Expect the tensors (by default all that were there) to be bit for bit what they were."""
        for path in self.tensors if tensors is None else tensors:
            now, before = self.tensors[path].detach(), self.values[path]
            equal = now.dtype == before.dtype and torch.equal(now, before)
            expect(equal, f"expected {path} to stay as it was, bit for bit, and it has changed")


def _hooks(module: nn.Module) -> int:
    return sum(len(hooks) for name, hooks in vars(module).items() if name.endswith("_hooks") and hooks)


def duplicate(model: nn.Module) -> nn.Module:
    """A deep copy."""
    return copy.deepcopy(model)
