"""What a layer's parameter is with its adapters: the definition of every method, and the generic path.

`W' = f2(f1(W))`, in order of activation, computed in the adapters' own dtype and cast once to the layer's (rule R6 in
docs/design.md). The base's own parameter is read past everything that adapts it, and never written.
"""

import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peftkit import recipe
from peftkit.adapter import Adapter, LowRank, Shared
from peftkit.errors import StateError, UnsupportedLayerError
from peftkit.kernels import no_autocast
from peftkit.layers.kind import LayerKind

LAYER = "_peftkit_layer"
RUNNING = "_peftkit_running"


@dataclass(frozen=True)
class Adapted:
    """What a swapped layer knows about itself. Replaced whole when it changes, so that an undo need only put
    it back.
    """

    base: type[nn.Module]
    """The class that the layer had."""
    fast: LayerKind | None
    """The layer's kind, if the layer's forward is the very one that the kind knows; only then is its fast
    path right.
    """
    family: str | None
    """The family of the layer's kind: what its inputs look like."""
    kinds: dict[str, LayerKind]
    """For each adaptable parameter of the swapped class, how it becomes a matrix."""
    bias_of: dict[str, str]
    """For each bias, the weight that it goes with."""
    lists: Mapping[str, str] = field(default_factory=dict)
    """Attributes in which the layer keeps its weights once more, each with the attribute that lists their names."""
    reads: tuple[nn.Module, ...] = ()
    """Layers whose weights this one's forward reads itself."""
    names: tuple[str, ...] = ()
    """Names of its forward's parameters, in order, where an `Activation` surrounds it."""
    found: dict[tuple[str, ...], "Running | None"] = field(default_factory=dict)
    """What runs in the layer for which active adapters, once it has been found out."""


class Running(NamedTuple):
    """Which adapters run in one layer now."""

    names: tuple[str, ...]
    """Adapters with a weight form, in order of activation."""
    around: tuple[str, ...]
    """Adapters that surround the forward, in order of activation."""
    fused: str | None
    """The one weight that is adapted, where all its forms are a sum that the kind's fast path can add to the output."""
    bias: str | None = None
    """The bias that goes with that weight."""
    bare: bool = False
    """Whether all that they do to it is to add a product: no start is subtracted from it, and there is no gain."""
    groups: tuple[nn.Module, ...] = ()
    """For each of `names`, the module that holds its adapters in this layer; `outer`, for each of `around`.

    While compiling they are read here: a name would be compiled in, and the graph would be that adapter's alone.
    """
    outer: tuple[nn.Module, ...] = ()


class Routing(ABC):
    """Stands where a layer's running adapters stand, while these differ from sample to sample (`peftkit.routing`)."""

    running: Mapping[str | None, Running | None]
    """For each adapter that samples may have, what runs in the layer for them."""

    @abstractmethod
    def run(self, layer: nn.Module, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The layer's output; `call(running, args, kwargs)` runs some rows with some adapters."""


def is_swapped(layer: nn.Module) -> bool:
    """Whether the layer's class is one of ours."""
    return LAYER in layer.__dict__


def base_class(layer: nn.Module) -> type[nn.Module]:
    """The class that the layer has, or had before it was swapped."""
    state = layer.__dict__.get(LAYER)
    return type(layer) if state is None else state.base


def state_of(layer: nn.Module) -> Adapted:
    """What a swapped layer knows about itself."""
    state: Adapted = layer.__dict__[LAYER]
    return state


def running_in(layer: nn.Module) -> Running | Routing | None:
    """Which adapters run in a layer now; None when none does."""
    running: Running | Routing | None = layer.__dict__.get(RUNNING)
    return running


def raw_parameter(layer: nn.Module, name: str) -> Any:
    """The base's own value: a parameter, a tensor in its place, or what the base class computes."""
    parameters = layer.__dict__.get("_parameters", {})
    if name in parameters:
        return parameters[name]
    if name in layer.__dict__:
        return layer.__dict__[name]
    computed = inspect.getattr_static(base_class(layer), name, None)
    if isinstance(computed, property) and computed.fget is not None:
        return computed.fget(layer)
    raise AttributeError(f"{base_class(layer).__name__!r} object has no attribute {name!r}")


def adapted_parameter(layer: nn.Module, name: str, running: Running | Routing | None) -> Any:
    """The parameter as the running adapters make it: the definition of every method, and the generic path."""
    raw = raw_parameter(layer, name)
    if isinstance(running, Routing):
        raise StateError("a model that is compiled cannot give each sample a weight of its own; call it uncompiled")
    if raw is None or running is None or not running.groups:
        return raw
    steps = list(_steps(layer, name, adapters_of(layer, running)))
    if not steps or (raw.is_meta and not _is_meta(steps[0][0])):
        return raw
    kind = state_of(layer).kinds[name]
    if kind.fixed:
        raise UnsupportedLayerError(
            f"the {name} of a {base_class(layer).__name__} is read as a plain one: {kind.fixed}"
        )
    make = functools.partial(compose, layer, name, raw, steps, dropping=True)
    if not recipe.wanted(raw.numel() * raw.element_size()) or any(_drops(adapter) for adapter, _ in steps):
        return make()  # what dropout draws could not be made again
    if hasattr(raw, "ds_id"):
        return make()  # under ZeRO-3 an adapter's tensors are at hand in its own forward alone
    # What is there now, under its present data: the model may be another by the time that backward asks.
    held = [{n: _alias(t) for n, t in _tensors(adapter)} for adapter, _ in steps]
    base = _alias(raw)
    remake = functools.partial(compose, layer, name, base, steps, dropping=False, kind=kind, held=held)
    return recipe.made(make, remake, [base, *(t for tensors in held for t in tensors.values())])


def _tensors(adapter: nn.Module, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """All that an adapter computes with: its own tensors, and those of the state that it shares with others."""
    yield from adapter.named_parameters(prefix)
    yield from adapter.named_buffers(prefix)
    for name, handle in _handles(adapter):
        yield from _tensors(handle.state, name)


def _handles(adapter: nn.Module) -> list[tuple[str, Shared]]:
    return [(name, value) for name, value in adapter.__dict__.items() if isinstance(value, Shared)]


def _alias(tensor: Tensor) -> Tensor:
    """The same data with the same version counter, apart from the graph."""
    return tensor.detach().requires_grad_(tensor.requires_grad)


def adapters_in(layer: nn.Module, name: str) -> dict[str, Any]:
    """The adapters that one name has in a layer, by weight; empty when it has none there."""
    container: Any = layer._modules.get("adapters")
    group = None if container is None else container._modules.get(name)
    return {} if group is None else group._modules


def adapters_of(layer: nn.Module, running: Running) -> list[dict[str, Any]]:
    """What each adapter with a weight form that runs has in the layer, by weight.

    Looked up by name, because a replica of the layer (`DataParallel`) has replicas of its adapters; but not while
    compiling.
    """
    if torch.compiler.is_compiling():
        return [group._modules for group in running.groups]
    held: Any = layer._modules["adapters"]
    return [held._modules[name]._modules for name in running.names]


def steps_for(layer: nn.Module, name: str, adapters: Iterable[str]) -> Iterator[tuple[Adapter, str]]:
    """What is applied to parameter `name`, in order: each adapter, and whether by its `weight` or by its `bias`."""
    return _steps(layer, name, [adapters_in(layer, adapter) for adapter in adapters])


def _steps(layer: nn.Module, name: str, groups: Iterable[Mapping[str, Any]]) -> Iterator[tuple[Adapter, str]]:
    owner = state_of(layer).bias_of.get(name)
    for group in groups:
        if name in group:
            yield group[name], "weight"
        if owner is not None and owner in group and type(group[owner]).bias is not Adapter.bias:
            yield group[owner], "bias"


def change(layer: nn.Module, name: str, running: Running) -> Tensor | None:
    """What the running adapters add to the values of a parameter, in float32 or better; None where they add nothing."""
    steps = list(_steps(layer, name, adapters_of(layer, running)))
    if not steps:
        return None
    base = state_of(layer).kinds[name].values(layer, name, raw_parameter(layer, name))
    base = base.detach().to(torch.promote_types(base.dtype, torch.float32))
    return compose(layer, name, base, steps, dropping=True) - base


def compose(
    layer: nn.Module,
    name: str,
    raw: Tensor,
    steps: Iterable[tuple[Adapter, str]],
    *,
    dropping: bool,
    at_least: torch.dtype | None = None,
    kind: LayerKind | None = None,
    held: Sequence[Mapping[str, Tensor]] | None = None,
) -> Tensor:
    """`f2(f1(raw))` in the adapters' dtype (rule R6), cast once to the base's; autocast has no say inside."""
    kind = state_of(layer).kinds[name] if kind is None else kind
    raw = kind.values(layer, name, raw)
    steps = list(steps)
    dtype = functools.reduce(torch.promote_types, [_dtype(a) or raw.dtype for a, _ in steps], raw.dtype)
    if at_least is not None:
        dtype = torch.promote_types(dtype, at_least)
    value = raw.to(dtype)
    with no_autocast(raw.device.type):
        for i, (adapter, form) in enumerate(steps):
            tensors = None if held is None else held[i]
            if form == "bias":
                value = _call(adapter, tensors, dtype, "bias", value)
                continue
            m = kind.matrix(layer, name, value)
            keep = _keep(adapter, m) if dropping else ()
            value = kind.restore(layer, name, _call(adapter, tensors, dtype, "weight", m, *keep))
    value = value.to(raw.dtype)
    if value.stride() != raw.stride():
        value = torch.empty_like(raw, requires_grad=False).copy_(value)  # kernels round by the layout
    # A parameter handed through keeps its flag under no_grad, and torch chooses kernels by it: the base has none.
    return kind.handed(layer, name, value if torch.is_grad_enabled() else value.detach())


def _call(adapter: Adapter, held: Mapping[str, Tensor] | None, dtype: torch.dtype, form: str, *args: Tensor) -> Tensor:
    """One step, in `dtype` (a merge is in float32 whatever the tensors are), with the adapter's own or those `held`."""
    if held is None and _dtype(adapter) in (None, dtype):
        return adapter(form, *args)  # type: ignore[no-any-return]
    own = dict(_tensors(adapter)) if held is None else held
    cast = {name: t.to(dtype) if t.is_floating_point() else t for name, t in own.items()}
    return _with_tensors(adapter, cast)(form, *args)  # type: ignore[no-any-return]


def _with_tensors(module: nn.Module, tensors: Mapping[str, Tensor], prefix: str = "") -> nn.Module:
    """A copy of a module that holds other tensors; `functional_call` would change the module under other threads."""
    copy = module.__class__.__new__(module.__class__)
    copy.__dict__.update(module.__dict__)
    for register in ("_parameters", "_buffers"):
        own = module.__dict__[register]
        copy.__dict__[register] = {name: tensors.get(prefix + name, t) for name, t in own.items()}
    children = module._modules.items()
    copy.__dict__["_modules"] = {n: c and _with_tensors(c, tensors, f"{prefix}{n}.") for n, c in children}
    for name, handle in _handles(module):
        copy.__dict__[name] = Shared(_with_tensors(handle.state, tensors, f"{name}."))
    return copy


def _keep(adapter: Adapter, m: Tensor) -> tuple[Tensor, ...]:
    """The columns that dropout keeps, scaled, where an adapter in training has dropout; nothing otherwise."""
    if not (isinstance(adapter, LowRank) and _drops(adapter)):
        return ()
    return (nn.functional.dropout(m.new_ones(m.shape[-1]), adapter.dropout),)


def _drops(adapter: Adapter) -> bool:
    return adapter.training and isinstance(adapter, LowRank) and adapter.dropout > 0


def _dtype(adapter: nn.Module) -> torch.dtype | None:
    for own in (adapter._parameters.values(), adapter.parameters()):  # most hold theirs themselves: no walk
        for p in own:
            if p is not None and p.is_floating_point():
                return p.dtype
    return None


def _is_meta(adapter: nn.Module) -> bool:
    return any(p.is_meta for p in adapter.parameters())
