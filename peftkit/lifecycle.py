"""Which adapters run, and which train: two facts that do not depend on each other."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from peftkit.blocks import block, refuse_elsewhere
from peftkit.composition import RUNNING, is_swapped, running_in
from peftkit.errors import StateError
from peftkit.installed import Installed, inner, installed, record, unmerged, write_record
from peftkit.method import Method
from peftkit.running import set_running
from peftkit.sharding import reshard


def activate(model: nn.Module, *names: str) -> None:
    """Make these adapters run, in this order, and no others; with no names, none. What trains is not touched.

    Adapters compose in order: with functions f1, f2 of the weight, `activate(model, "f1", "f2")` runs `f2(f1(W))`.

    Raises `UnknownAdapterError` for a name that the model does not have; `StateError` while adapters are merged,
    for a name given twice, and when an adapter would be switched off whose weights were trained in place.

    >>> import torch, peftkit
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
    >>> for name in ("a", "b"):
    ...     model = peftkit.wrap(model, "lora", name=name)
    >>> peftkit.activate(model, "b")
    >>> [adapter.name for adapter in peftkit.summary(model).adapters if adapter.active]
    ['b']
    """
    known = unmerged(model, "activate other adapters")
    refuse_elsewhere(inner(model), "activate other adapters")
    for i, name in enumerate(names):
        known.placements(name)
        if name in names[:i]:
            raise StateError(f"adapter {name!r} is named twice; each runs once")
    for name in known.active:
        in_place = known.in_place(name)
        if name not in names and in_place is not None:
            raise StateError(
                f"adapter {name!r} trains {in_place.name} in place, so it cannot be switched off; "
                "use Full(keep_base=True) for a copy that can"
            )
    _switch(model, known, names)


def _switch(model: nn.Module, known: Installed, names: tuple[str, ...]) -> None:
    layers = known.layers({*known.active, *names})
    before = [(layer, running_in(layer)) for layer in layers]
    try:
        for layer in layers:
            if is_swapped(layer):
                set_running(layer, names)
        write_record(model, dataclasses.replace(known, active=tuple(names)))
    except BaseException:
        for layer, running in before:
            if is_swapped(layer):
                layer.__dict__[RUNNING] = running
        write_record(model, known)
        raise


@contextmanager
def using(model: nn.Module, *names: str) -> Iterator[nn.Module]:
    """`activate` for the length of a `with` block; what was active before is so again afterwards, whatever happens.

    It acts on the model, and so on every thread that uses it; while one thread is inside, `using` in another is a
    `StateError`. With gradient checkpointing, call `backward()` inside the block.

    >>> import torch, peftkit
    >>> model = peftkit.wrap(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2)), "lora")
    >>> with peftkit.using(model):
    ...     peftkit.summary(model).adapters[0].active
    False
    """
    with block(inner(model)):
        before = installed(model).active
        activate(model, *names)
        try:
            yield model
        finally:
            known = record(model)
            if known is not None and not known.merged:  # merging inside holds beyond the block: it locks activation
                _switch(model, known, tuple(name for name in before if name in known.adapters))


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Run the bare base model for the length of a `with` block: `using` with no names.

    >>> import torch, peftkit
    >>> base = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
    >>> x = torch.randn(3, 8)
    >>> y = base(x)
    >>> model = peftkit.wrap(base, "lora", init="gaussian")
    >>> with peftkit.disabled(model):
    ...     torch.equal(model(x), y)
    True
    """
    with using(model):
        yield model


def set_trainable(model: nn.Module, *names: str) -> None:
    """Train these adapters, and no others; with no names, none. What runs is not touched.

    Only what its method trains gets `requires_grad`: frozen parts of an adapter stay frozen, and so does the base.

    >>> import torch, peftkit
    >>> model = peftkit.wrap(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2)), "lora")
    >>> peftkit.set_trainable(model)
    >>> any(p.requires_grad for p in model.parameters())
    False
    """
    known = installed(model)
    reshard(inner(model))
    chosen = {name: known.placements(name) for name in names}
    for name, placements in known.adapters.items():
        for placement in placements:
            for _, parameter in placement.trained():
                parameter.requires_grad_(name in chosen)


def param_groups(model: nn.Module, *, lr: float) -> list[dict[str, Any]]:
    """Optimizer groups over everything that trains now, in which each method can have a say of its own (LoRA+).

    >>> import torch, peftkit
    >>> model = peftkit.wrap(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2)), "lora")
    >>> optimizer = torch.optim.AdamW(peftkit.param_groups(model, lr=1e-3))
    >>> [len(group["params"]) for group in optimizer.param_groups]
    [2]
    """
    by_method: dict[str, tuple[Method, dict[int, nn.Parameter], list[Any]]] = {}
    for placements in installed(model).adapters.values():
        for placement in placements:
            trained = {id(p): p for _, p in placement.trained() if p.requires_grad}
            if trained:
                _, parameters, adapters = by_method.setdefault(placement.method.key, (placement.method, {}, []))
                parameters.update(trained)
                adapters += [] if placement.adapter is None or placement.shared else [placement.adapter]
    if not by_method:
        raise StateError("nothing is trainable; call peftkit.set_trainable(model, name) first")
    return [
        group
        for method, parameters, adapters in by_method.values()
        for group in method.param_groups(list(parameters.values()), lr, adapters)
    ]
