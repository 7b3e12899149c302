"""Puts adapters on a model, and takes them off, so that it happens whole or not at all.

Everything that can fail is done first, on the side: the plan, then every adapter. Only then is the model changed, and
if that is cut short, it is put back as it was.
"""

import dataclasses
import inspect
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from peftkit import plugins
from peftkit.adapter import Activation, Adapter, Shared, Site
from peftkit.blocks import refuse_elsewhere
from peftkit.composition import LAYER, Adapted, base_class, is_swapped, state_of
from peftkit.errors import StateError, UnsupportedLayerError
from peftkit.installed import (
    Adapters,
    Installed,
    Placement,
    atomically,
    in_bulk,
    inner,
    installed,
    is_wrapped,
    named_parameters,
    record,
    unmerged,
    write_record,
)
from peftkit.layers.kind import LayerKind
from peftkit.method import Method
from peftkit.observing import observe
from peftkit.plan import Rules, State, adapter_for, plan, shared_for, shared_states
from peftkit.readers import find_readers
from peftkit.resolve import kind_for, kind_in, modules_of
from peftkit.running import set_running
from peftkit.selectors import Selector
from peftkit.sharding import reshard
from peftkit.stepping import Watch, follows_steps
from peftkit.swap import swap, unswap


def wrap(
    model: nn.Module,
    method: str | Method | Rules = "lora",
    *,
    targets: Selector | Sequence[Selector] | None = None,
    exclude: Selector | Sequence[Selector] | None = None,
    name: str = "default",
    data: Iterable[Any] | None = None,
    **hyperparameters: Any,
) -> nn.Module:
    """Adapt a model in place, ready to train: the same object comes back.

    What no rule matches is frozen. The new adapter is trainable, and runs from now on, besides those that already do;
    the model's output does not change by it (for methods that start as the identity, bit for bit).

    Args:
        model: any `nn.Module`.
        method: a method's name, a `Method`, or an ordered mapping selector → method, of which the first match wins.
        targets: which layers, for a single method; its own default otherwise (for LoRA, every linear layer but the
            head).
        exclude: which layers to leave alone after all.
        name: the adapter's name. Wrap again under another name to add an adapter.
        data: some batches, for a method that takes its start from them, and an error for any other. A batch is what
            the model's forward takes (a tuple is positional arguments, a mapping is keyword arguments), or a function
            of the model that returns the loss.
        **hyperparameters: fields of the method, when it is given by name.

    Raises `SelectorError`, `UnsupportedLayerError`, `MethodError` or `StateError`, and then leaves the model as it was.

    >>> import torch, peftkit
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> model = peftkit.wrap(model, {"0": peftkit.LoRA(rank=4), "2": "full"})
    >>> [name for name, p in model.named_parameters() if p.requires_grad]
    ['0.adapters.default.weight.down', '0.adapters.default.weight.up', '2.weight', '2.bias']
    """
    check_name(model, name)
    refuse_elsewhere(inner(model), "wrap it again")
    reshard(inner(model))
    with in_bulk():
        planned = plan(model, method, targets=targets, exclude=exclude, **hyperparameters)
        steps = observe(inner(model), planned.steps, data)
        states = shared_states(steps)
        built = [(site, made, build(site, made, shared_for(states, made))) for site, made in steps]
    known = record(model)
    active = (*known.active, name) if known else (name,)
    return install(model, name, built, planned.roles, active, shared=list(states.values()))


def build(site: Site, method: Method, shared: Shared | None = None) -> Adapter | Activation | None:
    """One method's adapter for one site, in the layer's train or eval mode. On the meta device nothing is computed."""
    adapter: Any = adapter_for(site, method, shared)
    if site.unfrozen and site.kind is not None and site.kind.quantised:
        raise UnsupportedLayerError(
            f"{site.name} is quantised, so it cannot be trained in place; train a copy of its values, "
            f"Full(keep_base=True), or leave it out: exclude={site.path!r}"
        )
    if adapter is None:
        return None
    if site.tied and method.scope == "parameters":
        raise UnsupportedLayerError(
            f"{site.name} is one weight with {', '.join(site.tied)}; {method} would put another in its place here and "
            "not there. Train it in place, or choose other targets"
        )
    wanted = Activation if method.scope == "modules" else Adapter
    if not isinstance(adapter, wanted):
        raise UnsupportedLayerError(
            f"{method.name}.adapter() must return a peftkit.{wanted.__name__} or None, got {type(adapter).__name__}"
        )
    if shared is not None and any(module is shared.state for module in adapter.modules()):
        raise UnsupportedLayerError(
            f"{method.name}.adapter() must keep the handle that it is given, not its .state: that belongs to the model"
        )
    return adapter.train(site.layer.training)


def install(
    model: nn.Module,
    name: str,
    built: Sequence[tuple[Site, Method, Adapter | Activation | None]],
    roles: Any,
    active: tuple[str, ...],
    *,
    shared: Sequence[State] = (),
    trainable: bool = True,
    in_place: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Put built adapters on the model under `name`, atomically, and make `active` what runs.

    `shared` is the state that sites share, with its method. `in_place` holds new values for weights that are trained
    in place, by the weight's name.
    """
    values = in_place or {}
    known = record(model)
    root = inner(model)
    with in_bulk():
        placements = (
            *(_held(root, number, state) for number, state in enumerate(shared)),
            *(_placement(site, method, adapter, values) for site, method, adapter in built if adapter or site.unfrozen),
        )
        _refuse_shared_in_place(known, placements)
        readers = _readers(root, placements)
    layers = {id(p.layer): p.layer for p in placements}
    watch = known.watch if known else None
    if watch is None and any(follows_steps(p.method) for p in placements):
        watch = Watch(root)
    base = {} if known else dict(root.named_parameters())
    before = known or Installed({}, (), {path: p.requires_grad for path, p in base.items()}, dict(roles))

    def change() -> nn.Module:
        for p in base.values():
            p.requires_grad_(False)
        for placement in placements:
            _place(name, placement)
            for p in placement.learning():
                p.requires_grad_(trainable)
        for reader, reads in readers:
            own = state_of(reader).reads if is_swapped(reader) else ()
            _swap_for(reader, reads=_each_once(*own, *reads))
        for layer in layers.values():
            if is_swapped(layer):
                set_running(layer, active)
        new = dataclasses.replace(
            before,
            adapters={**before.adapters, name: placements},
            active=active,
            readers=_each_once(*before.readers, *(reader for reader, _ in readers)),
            watch=watch,
            trained_in_place=before.trained_in_place.union(name for p in placements if p.adapter is None),
        )
        write_record(root, new)
        _fill_in_place(placements, values)
        return model

    return atomically(root, [*layers.values(), *(reader for reader, _ in readers)], change, flags=base.values())


def unwrap(model: nn.Module, name: str | None = None) -> nn.Module:
    """Remove one adapter, or all; with the last one gone the model is bit for bit the one that was wrapped.

    Classes, keys, values, `requires_grad` and hooks are restored. Weights that were trained in place (`full` without
    `keep_base`) have no old value to go back to: then `StateError` says what to do instead.

    >>> import torch, peftkit
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
    >>> before = list(model.state_dict())
    >>> model = peftkit.unwrap(peftkit.wrap(model, "lora"))
    >>> list(model.state_dict()) == before, type(model[0]).__name__
    (True, 'Linear')
    """
    known = unmerged(model, "unwrap")
    names = list(known.adapters) if name is None else [name]
    if set(names) & set(known.active):
        refuse_elsewhere(inner(model), "unwrap")
    for each in names:
        for placement in known.placements(each):
            if placement.adapter is None and placement.version != placement.in_place()._version:
                raise StateError(
                    f"{placement.name} was trained in place by adapter {each!r} (or the model was copied since, which "
                    "hides whether it was), and its old values were not kept. To keep what was learned, call "
                    "peftkit.merge(model, keep_base=False); to be able to go back, use Full(keep_base=True)"
                )
    return remove(model, names)


def remove(model: nn.Module, names: Iterable[str]) -> nn.Module:
    """Take adapters off the model, atomically; with the last one gone, everything that wrapping added."""
    known = installed(model)
    root = inner(model)
    gone = set(names)
    left = {name: placements for name, placements in known.adapters.items() if name not in gone}
    layers = known.layers(gone)
    active = tuple(name for name in known.active if name in left)
    with in_bulk():
        # Who read no adapted weight so far will read none when there are fewer of them.
        readers = _readers(root, [p for placements in left.values() for p in placements]) if known.readers else []
    flags = () if left else root.parameters()

    def change() -> nn.Module:
        for placement in (p for name in gone for p in known.adapters[name] if p.adapter is None):
            placement.in_place().requires_grad_(False)
        for layer in layers:
            _remove_from(layer, gone, active)
        reading = {id(reader) for reader, _ in readers}
        for reader in known.readers:
            if id(reader) not in reading:
                _swap_for(reader, reads=())
        for reader, reads in readers:
            _swap_for(reader, reads=reads)
        if left:
            new = dataclasses.replace(
                known,
                adapters=left,
                active=active,
                merged=tuple(name for name in known.merged if name in left),
                readers=tuple(reader for reader, _ in readers),
                trained_in_place=known.trained_in_place - gone,
            )
            write_record(root, new)
            return model
        write_record(root, None)
        for path, p in root.named_parameters():
            p.requires_grad_(known.flags.get(path, p.requires_grad))
        return model

    return atomically(root, [*layers, *known.readers], change, flags=flags)


def check_name(model: nn.Module, name: str) -> None:
    """Refuse an adapter's name that is taken or that `nn.ModuleDict` cannot hold, and a model that cannot be
    wrapped now.
    """
    given: Any = name
    if not isinstance(given, str) or not name or "." in name or not name.isprintable() or len(name) > 128:
        raise StateError(f"an adapter's name is a short text without dots, got {name!r}")
    if hasattr(nn.ModuleDict, name) or name in ("training", "shared"):
        raise StateError(
            f"{name!r} cannot name an adapter, because a torch module has an attribute of that name; choose another"
        )
    known = record(model)
    if known is None:
        below = next((path for path, m in inner(model).named_modules() if is_wrapped(m)), None)
        if below is not None:
            raise StateError(f"the submodule {below!r} is wrapped already; wrap that one again, or unwrap it first")
        return
    if known.merged:
        raise StateError(
            f"cannot add an adapter while {', '.join(map(repr, known.merged))} is merged; call peftkit.unmerge first"
        )
    if name in known.adapters:
        raise StateError(
            f"the model has an adapter called {name!r} already; give another name=, or call "
            f"peftkit.unwrap(model, {name!r}) first"
        )


# --------------------------------------------------------------------------------------- one layer at a time


def _placement(
    site: Site, method: Method, adapter: Adapter | Activation | None, in_place: Mapping[str, Tensor]
) -> Placement:
    learns = (
        frozenset(n for n, p in named_parameters(adapter) if p.requires_grad) if adapter is not None else frozenset()
    )
    raw = site.layer._parameters.get(site.weight)
    version = None if raw is None or site.name in in_place else raw._version
    return Placement(site.path, site.weight, site.layer, method, adapter, learns, version)


def _held(root: nn.Module, number: int, state: State) -> Placement:
    """State that sites share: kept under a name that no parameter has."""
    path, holder = holder_of(root, state.first)
    if "adapters" in holder._modules and not isinstance(holder._modules["adapters"], Adapters):
        raise UnsupportedLayerError(f"{path or 'the model'} has a submodule called 'adapters' of its own; rename it")
    learns = frozenset(n for n, p in state.module.named_parameters() if p.requires_grad)
    module = state.module.train(root.training)
    return Placement(path, f"shared-{number}", holder, state.method, module, learns, shared=True)


def holder_of(root: nn.Module, first: Site) -> tuple[str, nn.Module]:
    """Where the state that sites share is kept: at the model itself, whose data parallel engines have it at hand
    whenever the model runs; but at the first site where the model is a container, which another member would change.
    """
    if isinstance(root, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        return first.path, first.layer
    return "", root


def _place(name: str, placement: Placement) -> None:
    """Register one adapter with its layer, and give the layer a class that runs it."""
    if placement.adapter is None:
        return
    layer = placement.layer
    container: Any = layer._modules.get("adapters")
    if container is None:
        container = layer._modules["adapters"] = Adapters()
        container.__dict__["training"] = layer.training
    group = container._modules.get(name)
    if group is None:
        group = container._modules[name] = nn.ModuleDict()
        group.__dict__["training"] = layer.training  # past a setter that looks for tensors
    group._modules[placement.weight] = placement.adapter
    if not placement.shared:
        _swap_for(layer, weight=placement.weight, changed=(name,))


def _fill_in_place(placements: Sequence[Placement], values: Mapping[str, Tensor]) -> None:
    for placement in placements:
        if placement.adapter is None and placement.name in values:
            parameter = placement.in_place()
            parameter.data = values[placement.name].to(device=parameter.device, dtype=parameter.dtype)


def _swap_for(
    layer: nn.Module,
    *,
    weight: str | None = None,
    reads: tuple[nn.Module, ...] | None = None,
    changed: Collection[str] = (),
) -> None:
    """Swap the layer's class so that it can also adapt `weight`, or read the weights of `reads`; or swap it back.

    What was found out about adapters that have not `changed` is kept.
    """
    own: Adapted | None = layer.__dict__.get(LAYER)
    known = own is not None and weight in own.kinds and weight not in own.bias_of
    if known and not any(name in active for active in own.found for name in changed):  # type: ignore[union-attr]
        return  # one more adapter of a weight that has some: nothing to tell the layer
    if own is None:
        found = kind_in(layer)
        own = Adapted(type(layer), _fast_kind(layer), found[0].family if found else None, {}, {})
    kinds, bias_of = dict(own.kinds), dict(own.bias_of)
    if weight not in (None, "module") and (weight not in kinds or weight in bias_of):
        kinds[weight] = kind_for(layer, weight)
        bias = kinds[weight].weights(layer)[weight]
        if bias is not None:
            bias_of[bias] = weight
            kinds.setdefault(bias, plugins.parameter_kind)
    lists = {**own.lists, **(kinds[weight].lists if weight in kinds else {})}
    reads = own.reads if reads is None else reads
    names = own.names
    if weight == "module" and not names:
        names = tuple(inspect.signature(own.base.forward).parameters)[1:]
    found_out = {active: now for active, now in own.found.items() if not any(name in active for name in changed)}
    new = dataclasses.replace(own, kinds=kinds, bias_of=bias_of, lists=lists, reads=reads, names=names, found=found_out)
    if not new.reads and "adapters" not in layer._modules:
        if is_swapped(layer):
            unswap(layer)
        return
    swap(layer, new)


def _each_once(*modules: nn.Module) -> tuple[nn.Module, ...]:
    return tuple({id(module): module for module in modules}.values())


def _fast_kind(layer: nn.Module) -> LayerKind | None:
    """The kind whose fast path is right for an unswapped layer: its forward must be the one that the kind knows."""
    found: Any = kind_in(layer)
    return found[0] if found and type(layer).forward is found[1].forward else None


def _remove_from(layer: nn.Module, names: set[str], active: tuple[str, ...]) -> None:
    container = layer._modules.get("adapters")
    if not isinstance(container, Adapters):
        return
    for name in names:
        container._modules.pop(name, None)
    if not container._modules:
        del layer._modules["adapters"]
    if is_swapped(layer):
        _swap_for(layer, changed=names)
    if is_swapped(layer):
        set_running(layer, active)


def _readers(root: nn.Module, placements: Sequence[Placement]) -> list[tuple[nn.Module, tuple[nn.Module, ...]]]:
    """Modules that read an adapted weight themselves, each with the layers whose weights it reads."""
    modules = modules_of(root)
    paths = {id(module): path for path, module in modules.items()}
    adapted: dict[str, set[str]] = {}
    for placement in placements:
        if placement.adapter is None or placement.shared:
            continue
        found = kind_in(placement.layer)
        bias = found[0].weights(placement.layer).get(placement.weight) if found else None
        names = adapted.setdefault(paths[id(placement.layer)], set())
        names.update((placement.weight, bias) if bias else (placement.weight,))
    readers = find_readers(modules, {path: frozenset(names) for path, names in adapted.items()}, base_class)
    return [(modules[path], tuple(modules[child] for child in children)) for path, children in readers.items()]


def _refuse_shared_in_place(known: Installed | None, placements: Sequence[Placement]) -> None:
    """A weight that one adapter trains in place is no base for another. Nothing is looked at where none does."""
    mine = {id(p.in_place()): p for p in placements if p.adapter is None}
    for placement in placements if mine else ():
        same = mine.get(id(placement.layer._parameters.get(placement.weight)))
        if placement.adapter is not None and not placement.shared and same is not None:
            raise UnsupportedLayerError(
                f"{placement.name} is one weight with {same.name}, which is trained in place, so no adapter can stand "
                "on it; give it one method"
            )
    if known is None:
        return
    for name in known.trained_in_place:
        taken = {id(p.in_place()) for p in known.adapters[name] if p.adapter is None}
        for placement in placements:
            raw = placement.layer._parameters.get(placement.weight)
            if id(raw) in taken:
                raise StateError(
                    f"{placement.name} is trained in place by adapter {name!r}, so no other adapter can stand on it; "
                    f"use Full(keep_base=True) for {name!r}"
                )
    for name in known.adapters if mine else ():
        for placement in known.adapters[name]:
            raw = placement.layer._parameters.get(placement.weight)
            if id(raw) in mine:
                raise StateError(
                    f"{placement.name} is adapted by {name!r}, so it cannot also be trained in place; use "
                    "Full(keep_base=True)"
                )
