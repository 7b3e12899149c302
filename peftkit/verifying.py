"""Runs a model on an example, and names what is silently wrong with its adapters; the model is left as it was.

Nothing inside the library is patched to see this: adapters are modules that are always called as modules, so that
forward hooks on them tell whether they took part.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from peftkit.adapter import Activation, Adapter, Base
from peftkit.composition import compose, raw_parameter, state_of, steps_for
from peftkit.drift import Fault, active_sites, compare
from peftkit.errors import StateError
from peftkit.installed import Installed, Placement, inner, unmerged
from peftkit.method import Method
from peftkit.rehearsal import call, leaves, seed, untouched
from peftkit.tables import count, table

_LINES = 20


@dataclasses.dataclass(frozen=True, slots=True)
class Report:
    """What `verify` has found; `print` it for a table."""

    faults: tuple[Fault, ...]
    notes: tuple[str, ...]
    """What is no fault yet, or could not be checked."""
    sites: int
    """How many sites of active adapters were looked at."""
    parameters: int
    """How many trainable parameters (tensors) were looked at."""
    error: float | None
    """Merged against unmerged: the largest relative difference of an output; None where nothing can be merged."""
    bound: float
    """The largest `error` that rounding explains."""

    @property
    def ok(self) -> bool:
        """Whether there is no fault."""
        return not self.faults

    def raise_if_bad(self) -> None:
        """Raise a `StateError` with the whole report, unless it is `ok`."""
        if not self.ok:
            raise StateError(f"verify found {count(len(self.faults), 'fault')}:\n{self}")

    def __str__(self) -> str:
        """What was looked at, and a table of faults with a line each."""
        found = "ok" if self.ok else count(len(self.faults), "fault")
        seen = f"{count(self.sites, 'adapted weight')}, {count(self.parameters, 'trainable parameter')}"
        lines = [f"{found}: {seen}"]
        if self.error is not None:
            lines.append(f"merged against unmerged: {self.error:.1e} (bound {self.bound:.1e})")
        lines += [f"note: {note}" for note in self.notes]
        if self.faults:
            rows = [[f.path or "(the model)", f.adapter or "-", f.kind, f.note] for f in self.faults[:_LINES]]
            lines += ["", table(["path", "adapter", "fault", "note"], rows)]
        if len(self.faults) > _LINES:
            lines.append(f"… and {len(self.faults) - _LINES:,} more, in .faults")
        return "\n".join(lines)


def verify(model: nn.Module, example: Any, *, rtol: float | None = None) -> Report:
    """Run the model on an example, and name every adapter that takes no part, does nothing, or cannot be trained or
    merged.

    Three runs: one forward and backward in training mode (the loss is a random sum of all outputs), and in eval mode
    one unmerged and one merged. Values, gradients, modes, buffers and random generators are afterwards as they were,
    also if the model raises.

    Args:
        model: a wrapped model, not merged.
        example: what the model's forward takes, large enough for training mode: a tuple is positional arguments, a
            mapping is keyword arguments, anything else is the one argument.
        rtol: how far merged may be from unmerged, relative to each output's norm. By default `3 * eps * sqrt(n)` in
            half precision and TF32 and `100 * eps * sqrt(n)` otherwise, for `n` adapted layers: there, a layer's
            result is rounded three times; here, sums of thousands of terms are.

    A layer that happens not to run on the example (an expert that no token chose) is reported as bypassed; read its
    note. Adapters that change nothing *at all* are not a fault but a note, because that is how most begin.

    Raises `StateError` when the model is not wrapped or is merged; whatever the model raises passes.

    >>> import torch, peftkit
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> model = peftkit.wrap(model, peftkit.LoRA(init="pissa", rank=2))
    >>> report = peftkit.verify(model, torch.randn(4, 8))
    >>> report.ok, report.sites, report.parameters
    (True, 1, 2)
    """
    known = unmerged(model, "verify it")
    root = inner(model)
    with untouched(root):
        with _watching(known) as watch:
            gradients = _gradients(root, example)
        faults, notes = _site_faults(known, watch)
        bypassed = {(fault.adapter, fault.path) for fault in faults if fault.kind == "bypassed"}
        faults += _gradient_faults(root, known, gradients, bypassed)
        drift, error, bound = compare(model, known, example, rtol)
    if isinstance(error, str):
        notes.append(f"not merged: {error}")
    return Report(
        faults=(*faults, *drift),
        notes=tuple(notes),
        sites=len(active_sites(known)),
        parameters=len(gradients),
        error=None if isinstance(error, str) else error,
        bound=bound,
    )


# ------------------------------------------------------------------------------------------- who takes part


class _Watch:
    """What was seen of adapters and layers during a forward."""

    def __init__(self) -> None:
        self.ran: set[int] = set()
        """Layers (by id) whose forward was called."""
        self.took_part: set[int] = set()
        """Adapters that were asked for their weight or factors, or ran around their layer."""
        self.moved: set[int] = set()
        """Activations whose output was not that of what they surround, or that gave it other inputs than their own."""
        self.inside: dict[int, list[Tensor]] = {}
        """What an activation's base gave it last."""

    def layer(self, layer: nn.Module, args: Any) -> None:  # noqa: ARG002 - a hook's signature
        self.ran.add(id(layer))

    def adapter(self, adapter: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(adapter, Activation):
            before, after = self.inside.get(id(adapter)), list(leaves(output))
            same = before is not None and len(before) == len(after) and all(map(torch.equal, before, after))
            self.moved |= set() if same else {id(adapter)}
        if isinstance(adapter, Activation) or args[0] != "bias":
            self.took_part.add(id(adapter))

    def surrounded(self, adapter: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        base, *rest = args

        def call(model: nn.Module, *inner: Any, **inner_kwargs: Any) -> Any:
            given, passed = (rest, kwargs), (inner, inner_kwargs)
            if not _same(_tensors(base.names, *given), _tensors(base.names, *passed)):
                self.moved.add(id(adapter))
            output = base.call(model, *inner, **inner_kwargs)
            self.inside[id(adapter)] = [t.detach() for t in leaves(output)]
            return output

        return (Base(base.model, base.names, call), *rest), kwargs


def _tensors(names: tuple[str, ...], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, list[Tensor]]:
    """The tensors among arguments, by the name of the argument; those without any are left out."""
    named = {**dict(zip(names, args, strict=False)), **kwargs}
    found = {name: [value] if isinstance(value, Tensor) else list(leaves(value)) for name, value in named.items()}
    return {name: tensors for name, tensors in found.items() if tensors}


def _same(before: Mapping[str, list[Tensor]], after: Mapping[str, list[Tensor]]) -> bool:
    if before.keys() != after.keys():
        return False
    pairs = [(x, y) for name in before for x, y in zip(before[name], after[name], strict=False)]
    return all(x is y or (x.shape == y.shape and torch.equal(x, y)) for x, y in pairs)


@contextmanager
def _watching(known: Installed) -> Iterator[_Watch]:
    watch = _Watch()
    with ExitStack() as stack:
        for layer in known.layers(known.active):
            stack.enter_context(layer.register_forward_pre_hook(watch.layer))
        for _, placement in active_sites(known):
            adapter = placement.adapter
            assert adapter is not None  # noqa: S101 - `_active` says so
            stack.enter_context(adapter.register_forward_hook(watch.adapter))
            if isinstance(adapter, Activation):
                stack.enter_context(adapter.register_forward_pre_hook(watch.surrounded, with_kwargs=True))
        yield watch


def _site_faults(known: Installed, watch: _Watch) -> tuple[list[Fault], list[str]]:
    """Adapters that were bypassed, and those that change nothing; and what of the latter is only a note."""
    faults = []
    idle: dict[tuple[str, Method], list[Placement]] = {}
    moving: set[tuple[str, Method]] = set()
    for name, placement in active_sites(known):
        if id(placement.adapter) not in watch.took_part:
            faults.append(Fault(placement.name, "bypassed", name, _why_bypassed(placement, watch)))
        elif not all(t.is_meta or t.isfinite().all() for _, t in placement.tensors()):
            faults.append(Fault(placement.name, "not finite", name, "an infinite or NaN value; load it again"))
        elif _moves(name, placement, watch):
            moving.add((name, placement.method))
        else:
            idle.setdefault((name, placement.method), []).append(placement)
    notes = []
    for (name, method), placements in idle.items():
        others = (name, method) in moving
        trains = any(
            q.requires_grad for p in known.placements(name) if p.shared and p.method == method for _, q in p.trained()
        )
        dead = [p for p in placements if others or not (trains or any(q.requires_grad for _, q in p.trained()))]
        why = "other sites of this adapter do" if others else "it does not train either, so it never will"
        faults += [Fault(p.name, "changes nothing", name, f"{why}; look at its values") for p in dead]
        if not dead:
            where = "its one site" if len(placements) == 1 else f"any of its {len(placements)} sites"
            notes.append(
                f"adapter {name!r} ({method}) changes nothing yet at {where}, as before the first step of training"
            )
    return faults, notes


def _why_bypassed(placement: Placement, watch: _Watch) -> str:
    if isinstance(placement.adapter, Activation):
        return "its module did not run on this example"
    if id(placement.layer) in watch.ran:
        return "the layer ran without reading this weight; adapt what it reads instead, or exclude it"
    return (
        "the layer did not run on this example; either nothing uses it, or its weight is read from outside in a way "
        "that shows no adapter (as getattr(layer, name) does); adapt what runs, or exclude it"
    )


def _moves(name: str, placement: Placement, watch: _Watch) -> bool:
    """Whether the adapted weight, or its bias, differs from the base in any bit; in float32 at least, not rounded."""
    layer, adapter = placement.layer, placement.adapter
    if not isinstance(adapter, Adapter):
        return id(adapter) in watch.moved
    for weight in state_of(layer).kinds:
        steps = [step for step in steps_for(layer, weight, (name,)) if step[0] is adapter]
        raw = raw_parameter(layer, weight) if steps else None
        if raw is None:
            continue
        if raw.is_meta:  # offloaded: its values are not at hand
            return True
        w = state_of(layer).kinds[weight].values(layer, weight, raw.detach())
        w = w.to(torch.promote_types(w.dtype, torch.float32))
        with torch.no_grad():
            if not torch.equal(compose(layer, weight, w, steps, dropping=False), w):
                return True
    return False


# ------------------------------------------------------------------------------------------------ gradients


def _gradients(root: nn.Module, example: Any) -> dict[int, bool | None]:
    """For each trainable parameter, by id, whether its gradient is not zero; None where there is none."""
    if not root.training:
        root.train()
    seed()
    with torch.inference_mode(mode=False), torch.enable_grad():
        signs = torch.Generator().manual_seed(0)
        outputs = [t for t in leaves(call(root, example)) if t.requires_grad]
        loss = sum((_signed_sum(t, signs) for t in outputs), torch.zeros(()))
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]
    found: dict[int, bool | None] = {}
    for p in root.parameters():
        if p.requires_grad:
            found[id(p)] = None if p.grad is None else _any(p.grad)
            p.grad = None
    return found


def _signed_sum(t: Tensor, generator: torch.Generator) -> Tensor:
    """Elements times fixed random signs: outputs do not cancel against each other, as those of a softmax would."""
    signs = torch.randint(2, t.shape, generator=generator) * 2 - 1
    return (t.float() * signs.to(t.device)).sum().cpu()


def _any(grad: Tensor) -> bool:
    return bool((grad.coalesce().values() if grad.is_sparse else grad).any())


def _gradient_faults(
    root: nn.Module, known: Installed, gradients: dict[int, bool | None], bypassed: set[tuple[str, str]]
) -> list[Fault]:
    paths = {id(p): path for path, p in root.named_parameters()}
    faults = []
    owned: set[int] = set()
    for name, placements in known.adapters.items():
        trained = [[p for _, p in placement.trained()] for placement in placements]
        owned |= {id(p) for group in trained for p in group}
        trains = any(id(p) in gradients for group in trained for p in group)
        for placement, group in zip(placements, trained, strict=True):
            here = [p for p in group if id(p) in gradients]
            if trains:
                note = "it does not train, though the rest of its adapter does; call peftkit.set_trainable"
                faults += [Fault(paths[id(p)], "untrained", name, note) for p in group if id(p) not in gradients]
            if (name, placement.name) not in bypassed:
                faults += _without_gradient(here, name, paths, gradients, active=name in known.active)
    for p in root.parameters():
        if id(p) in gradients and id(p) not in owned:
            faults += _without_gradient([p], "", paths, gradients, active=True)
    return faults


def _without_gradient(
    group: Sequence[nn.Parameter],
    name: str,
    paths: Mapping[int, str],
    gradients: Mapping[int, bool | None],
    *,
    active: bool,
) -> Iterator[Fault]:
    """Faults of one adapter at one site. That its output reacts to one of its parameters is enough for the others."""
    reacts = any(gradients[id(p)] for p in group)
    for p in group:
        if gradients[id(p)] is None:
            note = (
                "the output does not depend on it; look for detach(), no_grad(), or reentrant gradient checkpointing"
                if active
                else f"its adapter does not run; call peftkit.activate(model, {name!r}), or set_trainable without it"
            )
            yield Fault(paths[id(p)], "no gradient", name, note)
        elif not reacts:
            yield Fault(paths[id(p)], "zero gradient", name, "the output does not react to it on this example")
