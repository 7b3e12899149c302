"""Runs a layer's forward with its adapters: by a fast path where that is certain to be right, by the weight otherwise.

* The fast path (rule R2 in docs/design.md) adds low-rank products to the output, and builds no adapted weight.
* The generic path opens a *frame* of the layer in this thread, in which its weights read as adapted ones (rule R1),
  and runs the layer's own forward. A frame remembers what it computed, and forgets it when it closes.

While compiling there are no frames, because opening one is a side effect that graph capture refuses: every read adapts.
"""

import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from peftkit import checkpoints
from peftkit.adapter import Activation, Adapter, Base, LowRank
from peftkit.composition import (
    RUNNING,
    Routing,
    Running,
    adapters_in,
    no_autocast,
    raw_parameter,
    running_in,
    state_of,
)
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
    around = tuple(n for n, here in sites.items() if any(isinstance(a, Activation) for a in here.values()))
    names = tuple(n for n, here in sites.items() if any(isinstance(a, Adapter) for a in here.values()))
    weights = {weight for n in names for weight in sites[n] if weight != "module"}
    fused = None
    if len(weights) == 1 and state.fast is not None and state.fast.fuses(layer):
        (weight,) = weights
        adapters = [sites[n][weight] for n in names]
        sums = all(adds_low_rank(adapter) for adapter in adapters)
        if state.kinds[weight] == state.fast and (sums or (len(adapters) == 1 and _is_low_rank(adapters[0]))):
            fused = weight
    return Running(names, around, fused)


def adds_low_rank(adapter: nn.Module) -> bool:
    """Whether all that the adapter does is to add its product to the weight, so that several of them are a sum."""
    return _is_low_rank(adapter) and type(adapter).gain is LowRank.gain  # type: ignore[attr-defined]


def _is_low_rank(adapter: nn.Module) -> bool:
    """Whether its factors, with its gain if it has one, are all that the adapter is."""
    if not isinstance(adapter, LowRank):
        return False
    return type(adapter).weight is LowRank.weight and type(adapter).bias is Adapter.bias


def run(
    layer: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, known: bool = True
) -> Any:
    """Run a layer's `forward` with its adapters, and with frames open for the layers whose weights it reads.

    `known` says that it is the forward of the layer's class; another one is never replaced by a fast path.
    """
    running = running_in(layer)
    if not torch.compiler.is_compiling():
        checkpoints.check(layer, running)
    if isinstance(running, Routing):

        def some(running: Running | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return _run(layer, running, forward, args, kwargs, known=known)

        return running.run(layer, some, args, kwargs)
    return _run(layer, running, forward, args, kwargs, known=known)


def _run(
    layer: nn.Module,
    running: Running | None,
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    known: bool,
) -> Any:
    reads = () if torch.compiler.is_compiling() else state_of(layer).reads
    if reads:
        forward = functools.partial(_reading, reads=reads, forward=forward)
    if running is None:
        return forward(layer, *args, **kwargs)
    if not running.around:
        return _run_weights(layer, running, forward, known, args, kwargs)

    def call(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return _run_weights(layer, running, forward, known, args, kwargs)

    for name in running.around:
        call = functools.partial(_surround, adapter=adapters_in(layer, name)["module"], call=call)
    return call(layer, *args, **kwargs)


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
    if not running.names:
        return forward(layer, *args, **kwargs)
    if running.fused and known and len(args) == 1 and not kwargs and _is_frozen(layer, running.fused):
        return _run_fused(layer, running, running.fused, args[0])
    if torch.compiler.is_compiling():
        return forward(layer, *args, **kwargs)
    with open_frames((layer,), (running,)):
        return forward(layer, *args, **kwargs)


def _is_frozen(layer: nn.Module, weight: str) -> bool:
    raw = layer._parameters.get(weight)
    return raw is not None and not raw.requires_grad


def _run_fused(layer: nn.Module, running: Running, weight: str, x: Any) -> Any:
    """The base's output plus each low-rank update's, in the output's dtype; no adapted weight is built.

    The base's own output comes from the kind and not from the layer's forward, whose reads could be adapted ones: while
    compiling they all are, and a reader may have opened a frame.
    """
    kind = state_of(layer).fast
    assert kind is not None  # noqa: S101 - `running.fused` says so
    bias = kind.weights(layer)[weight]
    w, b = raw_parameter(layer, weight), raw_parameter(layer, bias) if bias else None
    first, *others = [adapters_in(layer, name)[weight] for name in running.names]
    if _is_bare(first) and type(x) is Tensor and _is_plain_torch():
        up, down, scale = first("factors")
        y = kind.adapted(layer, x, w, b, up, down, scale, first.dropout if first.training else 0.0)
    else:
        y = kind.plain(layer, x, w, b)
        others = [first, *others]
    for adapter in others:
        up, down, scale = adapter("factors")
        dropout = adapter.dropout if adapter.training else 0.0
        delta = kind.low_rank(layer, x, up.to(y.dtype), down.to(y.dtype), scale, dropout)
        start = adapter.start()
        if start is not None:
            delta = delta - kind.low_rank(layer, x, start[0].to(y.dtype), start[1].to(y.dtype), scale, 0.0)
        gain = None if adds_low_rank(adapter) else _gain(layer, kind, weight, adapter)
        y = y + delta if gain is None else kind.gained(layer, x, y, b, delta, gain)
    return y


def _is_bare(adapter: LowRank) -> bool:
    """Whether its product is added as it is: no start is subtracted, whose products must cancel, and no gain."""
    return adds_low_rank(adapter) and adapter.start() is None


def _is_plain_torch() -> bool:
    """Whether no compiler and no functorch transform looks on: they take plain operations."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is None


def _gain(layer: nn.Module, kind: LayerKind, weight: str, adapter: LowRank) -> Tensor | None:
    """The factor of each row, in the adapter's own dtype, without autocast: as in the definition."""
    raw = raw_parameter(layer, weight).detach()
    with no_autocast(raw.device.type):
        own = next(adapter.parameters()).dtype
        gain: Tensor | None = adapter("gain", kind.matrix(layer, weight, raw).to(torch.promote_types(raw.dtype, own)))
    return gain
