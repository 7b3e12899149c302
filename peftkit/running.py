"""Runs a layer's forward with its adapters: by a fast path where that is certain to be right, by the weight otherwise.

* The fast path (rule R2 in docs/design.md) adds low-rank products to the output, and builds no adapted weight.
* The generic path opens a *frame* of the layer in this thread, in which its weights read as adapted ones (rule R1),
  and runs the layer's own forward. A frame remembers what it computed, and forgets it when it closes.

While compiling there are no frames, because opening one is a side effect that graph capture refuses: every read adapts.
"""

import functools
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from peftkit import checkpoints, products
from peftkit.adapter import Activation, Adapter, Base, LowRank
from peftkit.composition import (
    RUNNING,
    Routing,
    Running,
    adapters_in,
    adapters_of,
    change,
    raw_parameter,
    running_in,
    state_of,
)
from peftkit.kernels import no_autocast
from peftkit.layers.kind import LayerKind
from peftkit.recipe import forget, recipes


class Frame(dict[tuple[str, bool], Any]):
    """What was computed in one open frame, by parameter and grad mode; and for which adapters."""

    def __init__(self, running: Running | None) -> None:
        super().__init__()
        self.running = running


class _Frames(threading.local):
    """The open frames of this thread, by the layer's id."""

    def __init__(self) -> None:
        self.open: dict[int, Frame] = {}


frames = _Frames()


@contextmanager
def open_frames(layers: Iterable[nn.Module], running: Iterable[Running | None]) -> Iterator[None]:
    """Let the layers' parameters read as `running` adapts them, in this thread. A nested frame starts empty."""
    opened = frames.open
    outer: list[tuple[int, Frame | None]] = []
    try:
        for layer, each in zip(layers, running, strict=True):
            outer.append((id(layer), opened.get(id(layer))))
            opened[id(layer)] = Frame(each)
        with recipes():
            yield
    finally:
        for key, before in outer:
            forget(opened.pop(key, {}).values())
            if before is not None:
                opened[key] = before


def set_running(layer: nn.Module, adapters: Iterable[str]) -> None:
    """Make these adapters, where the layer has them, the ones that run in it, in this order."""
    names, found = tuple(adapters), state_of(layer).found
    if names not in found:
        sites = {name: here for name in names if (here := adapters_in(layer, name))}
        found[names] = _running(layer, sites) if sites else None
    layer.__dict__[RUNNING] = found[names]


def _running(layer: nn.Module, sites: dict[str, dict[str, Any]]) -> Running:
    state = state_of(layer)
    around, names, weights = [], [], set()
    for name, here in sites.items():
        forms = {weight: _form(type(adapter)) for weight, adapter in here.items()}
        if any(form.surrounds for form in forms.values()):
            around.append(name)
        weighing = [weight for weight, form in forms.items() if form.weighs]  # shared state does neither
        if weighing:
            names.append(name)
            weights.update(weighing)
    fused, bias, bare = None, None, False
    if len(weights) == 1 and state.fast is not None and state.fast.fuses(layer):
        (weight,) = weights
        adapters = [sites[n][weight] for n in names]
        sums = all(adds_low_rank(adapter) for adapter in adapters)
        bare = sums and all(adapter.start() is None for adapter in adapters)
        if state.kinds[weight] == state.fast and (sums or (len(adapters) == 1 and _form(type(adapters[0])).low_rank)):
            fused, bias = weight, state.fast.weights(layer)[weight]
    held: Any = layer._modules["adapters"]
    groups, outer = (tuple(held._modules[n] for n in which) for which in (names, around))
    return Running(tuple(names), tuple(around), fused, bias, bare, groups, outer)


def adds_low_rank(adapter: nn.Module) -> bool:
    """Whether all that the adapter does is to add its product to the weight, so that several of them are a sum."""
    return _form(type(adapter)).sums


class _Form(NamedTuple):
    """What a class of adapters is."""

    surrounds: bool
    weighs: bool
    low_rank: bool
    """Its factors, with its gain if it has one, are all that it is."""
    sums: bool


_forms: "weakref.WeakKeyDictionary[type, _Form]" = weakref.WeakKeyDictionary()


def _form(kind: Any) -> _Form:
    """Asked for each layer whenever adapters are switched: `isinstance` is slow for classes that may be abstract."""
    known = _forms.get(kind)
    if known is None:
        low_rank = issubclass(kind, LowRank) and kind.weight is LowRank.weight and kind.bias is Adapter.bias
        sums = low_rank and kind.gain is LowRank.gain
        known = _forms[kind] = _Form(issubclass(kind, Activation), issubclass(kind, Adapter), low_rank, sums)
    return known


def run(
    layer: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, known: bool = True
) -> Any:
    """Run a layer's `forward` with its adapters, and with frames open for the layers whose weights it reads.

    `known` says that it is the forward of the layer's class; another one is never replaced by a fast path.
    """
    running = layer.__dict__.get(RUNNING)
    compiling = torch.compiler.is_compiling()
    if not compiling:
        checkpoints.check(layer, running)
        reads = state_of(layer).reads
        if reads:
            forward = functools.partial(_reading, reads=reads, forward=forward)
    if type(running) is Running and not running.outer:
        return _run_weights(layer, running, forward, known, args, kwargs)
    if isinstance(running, Routing):

        def some(running: Running | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return _run(layer, running, forward, known, args, kwargs)

        return running.run(layer, some, args, kwargs)
    return _run(layer, running, forward, known, args, kwargs)


def _run(
    layer: nn.Module,
    running: Running | None,
    forward: Callable[..., Any],
    known: bool,  # noqa: FBT001 - passed on from `run`
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    if running is None:
        return forward(layer, *args, **kwargs)
    if torch.compiler.is_compiling():  # what a function encloses is compiled in whole: not the names, then
        running = Running((), (), running.fused, running.bias, running.bare, running.groups, running.outer)

    def call(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return _run_weights(layer, running, forward, known, args, kwargs)

    for adapter in _surrounding(layer, running):
        call = functools.partial(_surround, adapter=adapter, call=call)
    return call(layer, *args, **kwargs)


def _surrounding(layer: nn.Module, running: Running) -> list[Activation]:
    """The adapters around the layer's forward, in order; looked up as `adapters_of` does it."""
    if torch.compiler.is_compiling():
        return [group._modules["module"] for group in running.outer]  # type: ignore[misc]
    return [adapters_in(layer, name)["module"] for name in running.around]


def _reading(
    layer: nn.Module, *args: Any, reads: tuple[nn.Module, ...], forward: Callable[..., Any], **kwargs: Any
) -> Any:
    running = (now if isinstance(now := running_in(each), Running) else None for each in reads)
    with open_frames(reads, running):
        return forward(layer, *args, **kwargs)


def _surround(layer: nn.Module, *args: Any, adapter: Activation, call: Callable[..., Any], **kwargs: Any) -> Any:
    return adapter(Base(layer, state_of(layer).names, call), *args, **kwargs)


def _run_weights(
    layer: nn.Module,
    running: Running,
    forward: Callable[..., Any],
    known: bool,  # noqa: FBT001 - passed on from `run`
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    if not running.groups:
        return forward(layer, *args, **kwargs)
    if running.fused is not None and known and len(args) == 1 and not kwargs:
        w = layer._parameters.get(running.fused)
        if w is not None and not w.requires_grad:
            return _run_fused(layer, running, w, args[0])
    fast = state_of(layer).fast
    if fast is not None and fast.quantised and known and len(args) + len(kwargs) == 1:
        return _run_beside(layer, running, fast, *args, *kwargs.values())
    if torch.compiler.is_compiling():
        return forward(layer, *args, **kwargs)
    with open_frames((layer,), (running,)):
        return forward(layer, *args, **kwargs)


def _run_fused(layer: nn.Module, running: Running, w: Tensor, x: Any) -> Any:
    """The base's output plus each low-rank update's, in the output's dtype; no adapted weight is built.

    The base's own output comes from the kind and not from the layer's forward, whose reads could be adapted ones: while
    compiling they all are, and a reader may have opened a frame.
    """
    kind: Any = state_of(layer).fast
    weight: Any = running.fused
    b = None if running.bias is None else raw_parameter(layer, running.bias)
    is_plain = type(x) is Tensor and products.is_plain_torch()
    if is_plain and running.bare and len(running.names) == 1:  # as below, in fewer steps: one token feels each of them
        held: Any = layer._modules["adapters"]
        adapter = held._modules[running.names[0]]._modules[weight]
        up, down, scale = _ask(adapter, "factors")
        return kind.adapted(layer, x, w, b, up, down, scale, adapter.dropout if adapter.training else 0.0)
    adapters = [group[weight] for group in adapters_of(layer, running)]
    if is_plain and (running.bare or (len(adapters) == 1 and adapters[0].start() is None)):
        first, *others = adapters
        y = kind.adapted(layer, x, w, b, *_ask(first, "factors"), _dropout(first))
        for adapter in others:
            y = kind.added(layer, x, y, *_ask(adapter, "factors"), _dropout(adapter))
        return y if running.bare else _gained(layer, kind, weight, x, y, w, b, first)
    y = kind.plain(layer, x, w, b)
    for adapter in adapters:
        up, down, scale = adapter("factors")
        delta = kind.low_rank(layer, x, up.to(y.dtype), down.to(y.dtype), scale, _dropout(adapter))
        start = adapter.start()
        if start is not None:
            delta = delta - kind.low_rank(layer, x, start[0].to(y.dtype), start[1].to(y.dtype), scale, 0.0)
        y = y + delta
        if not running.bare:
            y = _gained(layer, kind, weight, x, y, w, b, adapter)
    return y


def _run_beside(layer: nn.Module, running: Running, kind: LayerKind, x: Tensor) -> Tensor:
    """The output of a quantised layer as it is, plus what the change of its values adds.

    The change has the size of the values, so it is not kept: backward computes it again.
    """
    ((weight, bias),) = kind.weights(layer).items()
    y = kind.plain(layer, x, layer._parameters[weight], None if bias is None else raw_parameter(layer, bias))  # type: ignore[arg-type]

    def beside(x: Tensor) -> Tensor:
        w = change(layer, weight, running)
        b = None if bias is None or raw_parameter(layer, bias) is None else change(layer, bias, running)
        if w is None:
            return x.new_zeros(()) if b is None else b.to(y.dtype)
        return kind.plain(layer, x.to(y.dtype), w.to(y.dtype), None if b is None else b.to(y.dtype))

    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        from torch.utils.checkpoint import checkpoint

        added: Tensor = checkpoint(beside, x, use_reentrant=False)
        return y + added
    return y + beside(x)


def _dropout(adapter: LowRank) -> float:
    return adapter.dropout if adapter.training else 0.0


def _ask(adapter: Adapter, form: str) -> Any:
    """`adapter(form)`; past `nn.Module.__call__` where nobody has a hook on it: that is a tenth of a small layer."""
    if (
        adapter._forward_pre_hooks
        or adapter._forward_hooks
        or adapter._backward_pre_hooks
        or adapter._backward_hooks
        or "forward" in adapter.__dict__
        or type(adapter).forward is not Adapter.forward
        or _has_any_global_hook()  # type: ignore[no-untyped-call]
    ):
        return adapter(form)
    return getattr(adapter, form)()


def _gained(
    layer: nn.Module, kind: LayerKind, weight: str, x: Any, y: Tensor, w: Tensor, b: Tensor | None, adapter: LowRank
) -> Tensor:
    """The output `y` with its rows multiplied; the factor is in the adapter's own dtype, as in the definition."""
    if adds_low_rank(adapter):
        return y
    raw = w.detach()
    with no_autocast(raw.device.type):
        own = next(adapter.parameters()).dtype
        values = kind.values(layer, weight, raw)
        gain = adapter("gain", kind.matrix(layer, weight, values).to(torch.promote_types(values.dtype, own)))
        return y if gain is None else kind.gained(layer, x, y, b, gain)
