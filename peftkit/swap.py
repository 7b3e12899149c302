"""Makes a layer run adapted by swapping its class for a subclass; everything else about the layer stays as it was.

The subclass has the same `__name__`, `__qualname__`, `__module__` and forward signature, so that `isinstance`, hooks,
generation, export and compilers see the layer they know. Two things differ: its `forward` runs the adapters
(`peftkit.running`), and `layer.weight` reads as the adapted weight while a frame of that layer is open in this
thread, and as the untouched parameter otherwise (rule R1 in docs/design.md).
"""

import functools
import inspect
import types
import weakref
from collections.abc import Callable, Iterable
from types import MethodType
from typing import Any

import torch
from torch import nn

from peftkit.composition import (
    LAYER,
    RUNNING,
    Adapted,
    adapted_parameter,
    base_class,
    raw_parameter,
    running_in,
    state_of,
)
from peftkit.errors import StateError
from peftkit.running import frames, run


def adapted_class(base: type[nn.Module], names: Iterable[str], lists: Iterable[tuple[str, str]]) -> type[nn.Module]:
    """The subclass of `base` that runs adapters and whose parameters `names` can read as adapted ones; made once."""
    key = (tuple(sorted(names)), tuple(sorted(lists)))
    cache = _classes.setdefault(base, weakref.WeakValueDictionary())
    swapped = cache.get(key)
    if swapped is None:
        swapped = cache[key] = _make_class(base, *key)
    return swapped


_classes: "weakref.WeakKeyDictionary[type, weakref.WeakValueDictionary[Any, type]]" = weakref.WeakKeyDictionary()


def swap(layer: nn.Module, state: Adapted) -> None:
    """Give the layer the class that `state` asks for, or give it back its own when nothing is left to adapt
    or to read.
    """
    own: Adapted | None = layer.__dict__.get(LAYER)
    layer.__dict__.setdefault(RUNNING, None)
    layer.__dict__[LAYER] = state  # ahead of the class, whose forward another thread may call at once
    if own is None or own.kinds.keys() != state.kinds.keys() or own.lists != state.lists:
        layer.__class__ = adapted_class(state.base, state.kinds, state.lists.items())
    if own is None:
        _take_over_instance_forward(layer)


def unswap(layer: nn.Module) -> None:
    """Give the layer its own class back, and forget everything that `swap` added."""
    _give_back_instance_forward(layer)
    layer.__class__ = base_class(layer)
    for name in (LAYER, RUNNING):
        layer.__dict__.pop(name, None)


def _make_class(base: type[nn.Module], names: tuple[str, ...], lists: tuple[tuple[str, str], ...]) -> type[nn.Module]:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if type(self) is not swapped:
            _refuse_overridden(self, names)
        return run(self, base.forward, args, kwargs)

    functools.update_wrapper(forward, base.forward)
    namespace = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "forward": forward,
        "__reduce_ex__": _reduce,
        **{name: _property(name) for name in names},
        **{name: _list_property(name, own) for name, own in lists},
    }
    swapped: type[nn.Module] = types.new_class(base.__name__, (base,), exec_body=lambda body: body.update(namespace))
    return swapped


def _reduce(self: nn.Module, protocol: int) -> tuple[Any, ...]:  # noqa: ARG001 - pickle's own signature
    """Copy and pickle by the base class, which can be imported. The state is asked for, because recurrent
    layers clean theirs.
    """
    state = state_of(self)
    return _rebuild, (state.base, tuple(state.kinds), tuple(state.lists.items())), self.__getstate__()  # type: ignore[no-untyped-call]


def _rebuild(base: type[nn.Module], names: tuple[str, ...], lists: tuple[tuple[str, str], ...]) -> nn.Module:
    cls = adapted_class(base, names, lists)
    return cls.__new__(cls)


def _refuse_overridden(layer: nn.Module, names: tuple[str, ...]) -> None:
    for name in names:
        if not isinstance(inspect.getattr_static(type(layer), name, None), _AdaptedParameter):
            raise StateError(
                f"{base_class(layer).__name__}.{name} was given a parametrization after wrapping, which hides "
                "its adapters; "
                "call peftkit.unwrap first, register the parametrization, then wrap"
            )


class _AdaptedParameter(property):
    """The property that stands for one parameter of a swapped class."""


def _property(name: str) -> _AdaptedParameter:
    def read(self: nn.Module) -> Any:
        if torch.compiler.is_compiling():
            return adapted_parameter(self, name, running_in(self))
        frame = frames.open.get(id(self))
        if frame is None:
            return raw_parameter(self, name)
        key = (name, torch.is_grad_enabled())
        if key not in frame:
            frame[key] = adapted_parameter(self, name, frame.running)
        return frame[key]

    # DataParallel replicas and FSDP1 put a plain tensor in a parameter's place, and take it away again.
    def write(self: nn.Module, value: Any) -> None:
        self.__dict__[name] = value

    def delete(self: nn.Module) -> None:
        if name not in self.__dict__:
            raise AttributeError(name)
        del self.__dict__[name]

    return _AdaptedParameter(read, write, delete)


def _list_property(name: str, names: str) -> property:
    """The property that stands for a list in which a layer keeps its weights once more (recurrent layers do).

    In a frame it is made of what the weights read as there, and what the layer writes to it is not kept.
    """

    def read(self: nn.Module) -> Any:
        if torch.compiler.is_compiling() or id(self) in frames.open:
            return [getattr(self, each, None) for each in getattr(self, names)]
        if name not in self.__dict__:
            raise AttributeError(name)
        return self.__dict__[name]

    def write(self: nn.Module, value: Any) -> None:
        if id(self) not in frames.open:
            self.__dict__[name] = value

    return property(read, write)


class _InstanceForward:
    """Stands in for a `forward` that somebody put on the layer itself (fused kernels do), and runs the adapters too."""

    def __init__(self, layer: nn.Module, original: Callable[..., Any]) -> None:
        self.layer = layer
        self.original = original
        functools.update_wrapper(self, original, updated=())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return run(self.layer, self._call, args, kwargs, known=False)

    def _call(self, _: nn.Module, *args: Any, **kwargs: Any) -> Any:
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
