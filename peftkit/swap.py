"""Makes a layer run adapted by swapping its class for a subclass; everything else about the layer stays as it was.

The subclass has the same `__name__`, `__qualname__`, `__module__` and forward signature, so that `isinstance`, hooks,
generation, export and compilers see the layer they know. Two things differ:

* its `forward` runs the adapters, by a fast path where that is certain to be right (rule R2 in docs/design.md);
* `layer.weight` reads as the adapted weight while a *frame* of that layer is open in this thread, and as the
  untouched parameter otherwise (rule R1). The layer's own forward opens a frame, and so does an ancestor whose code
  reads the weight directly (`peftkit.readers`). A frame remembers what it computed, and forgets it when it closes.

While compiling there are no frames, because opening one is a side effect that graph capture refuses: every read adapts.
"""

import functools
import inspect
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
import types
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peftkit.adapter import Activation, Adapter, Base, LowRank
from peftkit.errors import StateError
from peftkit.layers.kind import LayerKind

_RUNNING = "_peftkit_running"
_LAYER = "_peftkit_layer"
_SEEN = "_peftkit_seen"


@dataclass(frozen=True)
class Adapted:
    """What a swapped layer knows about itself. Replaced whole when it changes, so that an undo need only put it back."""

    base: type[nn.Module]
    """The class that the layer had."""
    kind: LayerKind | None
    """The layer's own kind; None where only single parameters, or the layer as a whole, are adapted."""
    fusable: bool
    """Whether the layer's forward is the very one that the kind knows."""
    kinds: dict[str, LayerKind]
    """For each adaptable parameter of the swapped class, how it becomes a matrix."""
    bias_of: dict[str, str]
    """For each bias, the weight that it goes with."""
    reads: tuple[nn.Module, ...] = ()
    """Layers whose weights this one's forward reads itself."""


class Running(NamedTuple):
    """Which adapters run in one layer now."""

    names: tuple[str, ...]
    """Adapters with a weight form, in order of activation."""
    around: tuple[str, ...]
    """Adapters that surround the forward, in order of activation."""
    fused: str | None
    """The one weight that is adapted, where all its forms are a sum that the kind's fast path can add to the output."""


class _Frames(threading.local):
    """The open frames of this thread: layer's id → what was computed in it, by parameter and grad mode."""

    def __init__(self) -> None:
        self.open: dict[int, dict[tuple[str, bool], Tensor]] = {}


_frames = _Frames()


# ----------------------------------------------------------------------------------------------- the class


def adapted_class(base: type[nn.Module], names: Iterable[str]) -> type[nn.Module]:
    """The subclass of `base` that runs adapters and whose parameters `names` can read as adapted ones; made once."""
    key = tuple(sorted(names))
    cache = _classes.setdefault(base, weakref.WeakValueDictionary())
    swapped = cache.get(key)
    if swapped is None:
        swapped = cache[key] = _make_class(base, key)
    return swapped


_classes: "weakref.WeakKeyDictionary[type, weakref.WeakValueDictionary[tuple[str, ...], type]]" = (
    weakref.WeakKeyDictionary()
)


def is_swapped(layer: nn.Module) -> bool:
    """Whether the layer's class is one of ours."""
    return _LAYER in layer.__dict__


def base_class(layer: nn.Module) -> type[nn.Module]:
    """The class that the layer has, or had before it was swapped."""
    state = layer.__dict__.get(_LAYER)
    return type(layer) if state is None else state.base


def swap(layer: nn.Module, state: Adapted) -> None:
    """Give the layer the class that `state` asks for, or give it back its own when nothing is left to adapt or to read."""
    own = layer.__dict__.get(_LAYER)
    layer.__class__ = adapted_class(state.base, state.kinds)
    layer.__dict__[_LAYER] = state
    layer.__dict__.setdefault(_RUNNING, None)
    if own is None:
        _take_over_instance_forward(layer)


def unswap(layer: nn.Module) -> None:
    """Give the layer its own class back, and forget everything that `swap` added."""
    _give_back_instance_forward(layer)
    layer.__class__ = base_class(layer)
    for name in (_LAYER, _RUNNING, _SEEN):
        layer.__dict__.pop(name, None)


def _make_class(base: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if type(self) is not swapped:
            _refuse_overridden(self, names)
        return _run(self, base.forward, args, kwargs)

    functools.update_wrapper(forward, base.forward)
    namespace = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "forward": forward,
        "__reduce_ex__": _reduce,
        **{name: _property(name) for name in names},
    }
    swapped: type[nn.Module] = types.new_class(base.__name__, (base,), exec_body=lambda body: body.update(namespace))
    return swapped


def _reduce(self: nn.Module, protocol: int) -> tuple[Any, ...]:  # noqa: ARG001 - pickle's own signature
    """Copy and pickle by the base class, which can be imported. The state is asked for, because recurrent layers clean theirs."""
    state = self.__dict__[_LAYER]
    return _rebuild, (state.base, tuple(state.kinds)), self.__getstate__()  # type: ignore[no-untyped-call]


def _rebuild(base: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    cls = adapted_class(base, names)
    return cls.__new__(cls)


def _refuse_overridden(layer: nn.Module, names: tuple[str, ...]) -> None:
    for name in names:
        if not isinstance(inspect.getattr_static(type(layer), name, None), _AdaptedParameter):
            raise StateError(
                f"{base_class(layer).__name__}.{name} was given a parametrization after wrapping, which hides its adapters; "
                "call peftkit.unwrap first, register the parametrization, then wrap"
            )


# ------------------------------------------------------------------------------- a parameter that reads as adapted


class _AdaptedParameter(property):
    """The property that stands for one parameter of a swapped class."""


def _property(name: str) -> _AdaptedParameter:
    def read(self: nn.Module) -> Any:
        if torch.compiler.is_compiling():
            return adapted_parameter(self, name)
        memo = _frames.open.get(id(self))
        if memo is None:
            return raw_parameter(self, name)
        key = (name, torch.is_grad_enabled())
        if key not in memo:
            memo[key] = adapted_parameter(self, name)
        return memo[key]

    # DataParallel replicas and FSDP1 put a plain tensor in a parameter's place, and take it away again.
    def write(self: nn.Module, value: Any) -> None:
        self.__dict__[name] = value

    def delete(self: nn.Module) -> None:
        if name not in self.__dict__:
            raise AttributeError(name)
        del self.__dict__[name]

    return _AdaptedParameter(read, write, delete)


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


def adapted_parameter(layer: nn.Module, name: str) -> Any:
    """The parameter as the running adapters make it: the definition of every method, and the generic path."""
    raw = raw_parameter(layer, name)
    running = layer.__dict__[_RUNNING]
    if raw is None or running is None or not running.names:
        return raw
    steps = list(steps_for(layer, name, running.names))
    if not steps or (raw.is_meta and not _is_meta(steps[0][0])):
        return raw
    return compose(layer, name, raw, steps, dropping=True)


def adapters_in(layer: nn.Module, name: str) -> dict[str, Any]:
    """The adapters that one name has in a layer, by weight; empty when it has none there."""
    container: Any = layer._modules.get("adapters")
    group = None if container is None else container._modules.get(name)
    return {} if group is None else group._modules


def steps_for(layer: nn.Module, name: str, adapters: Iterable[str]) -> Iterator[tuple[Adapter, str]]:
    """What is applied to parameter `name`, in order: each adapter, and whether by its `weight` or by its `bias`."""
    state = layer.__dict__[_LAYER]
    owner = state.bias_of.get(name)
    for adapter_name in adapters:
        group = adapters_in(layer, adapter_name)
        if name in group:
            yield group[name], "weight"
        if owner is not None and owner in group and type(group[owner]).bias is not Adapter.bias:
            yield group[owner], "bias"


def compose(
    layer: nn.Module,
    name: str,
    raw: Tensor,
    steps: Iterable[tuple[Adapter, str]],
    *,
    dropping: bool,
    at_least: torch.dtype | None = None,
) -> Tensor:
    """`f2(f1(raw))` in the adapters' dtype (rule R6), cast once to the base's; autocast has no say inside."""
    kind = layer.__dict__[_LAYER].kinds[name]
    steps = list(steps)
    dtype = functools.reduce(torch.promote_types, [_dtype(a) or raw.dtype for a, _ in steps], raw.dtype)
    if at_least is not None:
        dtype = torch.promote_types(dtype, at_least)
    value = raw.to(dtype)
    with _no_autocast(raw.device.type):
        for adapter, form in steps:
            if form == "bias":
                value = adapter("bias", value)
                continue
            m = kind.matrix(layer, name, value)
            keep = _keep(adapter, m) if dropping else ()
            value = kind.restore(layer, name, adapter("weight", m, *keep))
    return value.to(raw.dtype)


def _keep(adapter: Adapter, m: Tensor) -> tuple[Tensor, ...]:
    """The columns that dropout keeps, scaled, where an adapter in training has dropout; nothing otherwise."""
    if not (adapter.training and isinstance(adapter, LowRank) and adapter.dropout):
        return ()
    return (nn.functional.dropout(m.new_ones(m.shape[-1]), adapter.dropout),)


def _dtype(adapter: nn.Module) -> torch.dtype | None:
    for p in adapter.parameters():
        if p.is_floating_point():
            return p.dtype
    return None


def _is_meta(adapter: nn.Module) -> bool:
    return any(p.is_meta for p in adapter.parameters())


def _no_autocast(device: str) -> Any:
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


# ------------------------------------------------------------------------------------------------- running


def set_running(layer: nn.Module, adapters: Iterable[str]) -> None:
    """Make these adapters, where the layer has them, the ones that run in it, in this order."""
    sites = {name: here for name in adapters if (here := adapters_in(layer, name))}
    layer.__dict__[_RUNNING] = _running(layer, sites) if sites else None


def _running(layer: nn.Module, sites: dict[str, dict[str, Any]]) -> Running:
    state = layer.__dict__[_LAYER]
    around = tuple(n for n, here in sites.items() if any(isinstance(a, Activation) for a in here.values()))
    names = tuple(n for n, here in sites.items() if any(isinstance(a, Adapter) for a in here.values()))
    weights = {weight for n in names for weight in sites[n] if weight != "module"}
    fused = None
    if len(weights) == 1 and state.fusable and state.kind.fuses(layer):
        (weight,) = weights
        if state.kinds[weight] is state.kind and all(_sums(sites[n][weight]) for n in names):
            fused = weight
    return Running(names, around, fused)


def _sums(adapter: nn.Module) -> bool:
    """Whether the adapter only adds its product to the weight, so that several of them are a sum."""
    if not isinstance(adapter, LowRank):
        return False
    return type(adapter).weight is LowRank.weight and type(adapter).bias is Adapter.bias


def _run(layer: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a layer's own `forward` with its adapters, and with frames open for the layers whose weights it reads."""
    reads = layer.__dict__[_LAYER].reads
    if reads and not torch.compiler.is_compiling():
        with _open_frames(reads):
            return _run_adapters(layer, forward, args, kwargs)
    return _run_adapters(layer, forward, args, kwargs)


def _run_adapters(layer: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    running = layer.__dict__[_RUNNING]
    if not torch.compiler.is_compiling() and torch.is_grad_enabled():
        _refuse_changed_recompute(layer, running)
    if running is None:
        return forward(layer, *args, **kwargs)
    call = functools.partial(_run_weights, running=running, forward=forward)
    for name in running.around:
        call = functools.partial(_surround, adapter=adapters_in(layer, name)["module"], call=call)
    return call(layer, *args, **kwargs)


def _surround(layer: nn.Module, *args: Any, adapter: Activation, call: Callable[..., Any], **kwargs: Any) -> Any:
    return adapter(Base(layer, _parameter_names(base_class(layer).forward), call), *args, **kwargs)


@functools.lru_cache(maxsize=1024)
def _parameter_names(forward: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)[1:]


def _run_weights(layer: nn.Module, *args: Any, running: Running, forward: Callable[..., Any], **kwargs: Any) -> Any:
    if not running.names:
        return forward(layer, *args, **kwargs)
    if running.fused and len(args) == 1 and not kwargs and _is_frozen(layer, running.fused):
        return _run_fused(layer, running, running.fused, args[0])
    if torch.compiler.is_compiling():
        return forward(layer, *args, **kwargs)
    with _open_frames((layer,)):
        return forward(layer, *args, **kwargs)


def _is_frozen(layer: nn.Module, weight: str) -> bool:
    raw = layer._parameters.get(weight)
    return raw is not None and not raw.requires_grad


def _run_fused(layer: nn.Module, running: Running, weight: str, x: Any) -> Any:
    """The base's output plus each low-rank update's, in the output's dtype; no adapted weight is built.

    The base's own output comes from the kind and not from the layer's forward, whose reads could be adapted ones: while
    compiling they all are, and a reader may have opened a frame.
    """
    kind = layer.__dict__[_LAYER].kind
    bias = kind.weights(layer)[weight]
    y = kind.plain(layer, x, raw_parameter(layer, weight), raw_parameter(layer, bias) if bias else None)
    for name in running.names:
        adapter: LowRank = adapters_in(layer, name)[weight]
        up, down, scale = adapter("factors")
        dropout = adapter.dropout if adapter.training else 0.0
        delta = kind.low_rank(layer, x, up.to(y.dtype), down.to(y.dtype), scale, dropout)
        start = adapter.start()
        if start is not None:
            delta = delta - kind.low_rank(layer, x, start[0].to(y.dtype), start[1].to(y.dtype), scale, 0.0)
        y = y + delta
    return y


@contextmanager
def _open_frames(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Let the layers' parameters read as adapted ones in this thread. A nested frame starts empty."""
    frames = _frames.open
    outer = [(id(layer), frames.get(id(layer))) for layer in layers]
    for key, _ in outer:
        frames[key] = {}
    try:
        yield
    finally:
        for key, memo in outer:
            if memo is None:
                frames.pop(key, None)
            else:
                frames[key] = memo


def _refuse_changed_recompute(layer: nn.Module, running: Running | None) -> None:
    """A checkpointed block is run again inside backward; with other adapters its gradients would be silently wrong."""
    if torch._C._current_graph_task_id() == -1:
        layer.__dict__[_SEEN] = running
    elif layer.__dict__.get(_SEEN, running) != running:
        raise StateError(
            "gradient checkpointing runs this layer again with other adapters than in its forward; "
            "call backward() before the active adapters change (inside the `with` block of using, disabled or routed)"
        )


# ---------------------------------------------------------------------- a forward that stands on the instance


class _InstanceForward:
    """Stands in for a `forward` that somebody put on the layer itself (fused kernels do), and runs the adapters too."""

    def __init__(self, layer: nn.Module, original: Callable[..., Any]) -> None:
        self.layer = layer
        self.original = original
        functools.update_wrapper(self, original, updated=())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _run(self.layer, self._call, args, kwargs)

    def _call(self, _: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with nullcontext() if torch.compiler.is_compiling() else _open_frames((self.layer,)):
            return self.original(*args, **kwargs)


def _take_over_instance_forward(layer: nn.Module) -> None:
    own = layer.__dict__
    old = own.get("_old_forward")
    if isinstance(old, MethodType) and old.__func__ is base_class(layer).forward:
        # accelerate's hooks call the forward that they found: let them find ours.
        own["_old_forward"] = MethodType(type(layer).forward, layer)
    elif "forward" in own:
        own["forward"] = _InstanceForward(layer, own["forward"])


def _give_back_instance_forward(layer: nn.Module) -> None:
    own = layer.__dict__
    old = own.get("_old_forward")
    if isinstance(old, MethodType) and old.__func__ is type(layer).forward:
        own["_old_forward"] = MethodType(base_class(layer).forward, layer)
    forward = own.get("forward")
    if isinstance(forward, _InstanceForward):
        own["forward"] = forward.original
