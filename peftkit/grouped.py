"""The low-rank updates of one linear layer for a whole routed batch, added to the base's output by grouped products.

`y[s] = x[s] @ W.T + b + scale * x[s] @ down[s].T @ up[s].T` for each sample s: the base runs once, and two batched
products of the stacked factors add all updates, where a loop over the adapters would run the layer once for each. A
shorter factor is filled up with zeros, and a sample without an adapter has zeros for factors: neither changes a bit.

Serves layers in which every adapter of the batch is a plain sum (rule R2 in docs/design.md) and whose kind applies it
as `nn.Linear` does. Without gradients the stacks of a second call are kept until something that they were made
of changes (`peftkit.stacks`). They hold each adapter once, however many samples it serves.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peftkit import kernels
from peftkit.adapter import LowRank
from peftkit.composition import Running, adapters_in, raw_parameter, state_of
from peftkit.layers.kind import LayerKind
from peftkit.layers.linear import Conv1D, Linear
from peftkit.running import adds_low_rank
from peftkit.stacks import Kept, Made, Pair, Stacks, factors_of, stacked

MAKE_OUTPUTS = (Linear.plain, Conv1D.plain)
"""Whose output is a new tensor, which may be added to. Another kind's may not, and its gradient is its own affair."""


def grouped(
    layer: nn.Module, names: Sequence[str | None], running: Mapping[str | None, Running | None]
) -> "Grouped | None":
    """How to run the layer for samples with these adapters; None where that needs more than sums of products."""
    state = state_of(layer)
    runs = [running[name] for name in names]
    weights = {run.fused for run in runs if run is not None}
    if state.fast is None or state.reads or len(weights) != 1 or None in weights:
        return None
    if type(state.fast).low_rank is not Linear.low_rank or any(run and len(run.names) != 1 for run in runs):
        return None
    weight = str(*weights)
    adapters = [None if run is None else adapters_in(layer, run.names[0])[weight] for run in runs]
    if not all(adapter is None or _is_served(adapter) for adapter in adapters):
        return None
    return Grouped(layer, state.fast, weight, adapters)


def _is_served(adapter: LowRank) -> bool:
    return adds_low_rank(adapter) and adapter.start() is None and adapter.dropout <= kernels._MOST


class Grouped:
    """One layer under one assignment of adapters to samples."""

    def __init__(self, layer: nn.Module, kind: LayerKind, weight: str, adapters: Sequence[LowRank | None]) -> None:
        self.kind, self.weight, self.bias = kind, weight, kind.weights(layer)[weight]
        run = math.gcd(*(len(list(same)) for _, same in itertools.groupby(adapters, id)))
        blocks = adapters[::run]  # neighbours with one adapter are one block of the products
        self.blocks = len(blocks)
        self.adapters = list({id(adapter): adapter for adapter in blocks}.values())
        self.real = [adapter for adapter in self.adapters if adapter is not None]
        place = {id(adapter): i for i, adapter in enumerate(self.adapters)}
        self.places = [place[id(adapter)] for adapter in blocks]
        self.in_order = self.places == list(range(self.blocks))
        self.known = type(kind).plain in MAKE_OUTPUTS
        self.index: Tensor | None = None
        self.kept: Kept | None = None
        self.called = False

    def run(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dim_of: Callable[[Tensor], int | None]
    ) -> Tensor | None:
        """The layer's output, where this call is one for the fast path (as in `peftkit.running`); None otherwise.

        `dim_of` gives an input's dimension that is the samples', or (0) the samples' and others flattened.
        """
        own = layer.__dict__
        if len(args) != 1 or kwargs or type(x := args[0]) is not Tensor or "forward" in own:
            return None
        if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None:
            return None
        w = own["_parameters"].get(self.weight)
        if w is None or w.requires_grad or (dim := dim_of(x)) is None:
            return None
        b = None if self.bias is None else raw_parameter(layer, self.bias)
        if dim == 0 and self.known and x.is_contiguous():
            return self._learned(layer, x, w, b) if torch.is_grad_enabled() else self._inferred(layer, x, w, b)
        return self._apart(layer, x, w, b, dim)

    def _inferred(self, layer: nn.Module, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        """Without gradients. Short, because with a token a sample every line is felt."""
        width = x.shape[-1]
        y = self.kind.plain(layer, x.view(-1, width), w, b)  # flattened: torch takes its kernel by the dimensions
        made = self._made(y.dtype)
        stacks = made.stacks if self.in_order else self.of_blocks(made.stacks)
        drawn = self._draw(x) if made.drops else None
        add(y.view(self.blocks, -1, y.shape[1]), x.view(self.blocks, -1, width), stacks, made.scale, drawn)
        return y.view(*x.shape[:-1], y.shape[1])

    def _learned(self, layer: nn.Module, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        """With gradients: what comes next may be a step of an optimizer, and not all of them count as a change."""
        self.forget()
        pairs, scale = factors_of(self.adapters)
        tensors = [tensor for pair in pairs if pair is not None for tensor in pair]
        drawn = self._draw(x)
        y: Tensor = _GroupedLinear.apply(x, w, b, self, layer, scale, drawn, *tensors)  # type: ignore[no-untyped-call]
        return y

    def _apart(self, layer: nn.Module, x: Tensor, w: Tensor, b: Tensor | None, dim: int) -> Tensor:
        """The same with the updates in a tensor of their own, in operations that autograd knows."""
        y = self.kind.plain(layer, x, w, b)
        first = x.movedim(dim, 0)
        shape = [self.blocks, first.shape[:-1].numel() // self.blocks]
        if torch.is_grad_enabled():
            self.forget()
            pairs, scale = factors_of(self.adapters)
            stacks = stacked(pairs, y.dtype)
        else:
            made = self._made(y.dtype)
            stacks, scale = made.stacks, made.scale
        with kernels.no_autocast(x.device.type):
            delta = y.new_zeros(*shape, y.shape[-1])
            add(delta, first.reshape(*shape, x.shape[-1]), self.of_blocks(stacks), scale, self._draw(x))
            return y + delta.view(*first.shape[:-1], y.shape[-1]).movedim(0, dim)

    def _made(self, dtype: torch.dtype) -> Made:
        """The stacks: those of the last call, if they are kept and still what the adapters give.

        They are kept from the second call on. A block that is entered for one batch has no use for what that costs.
        """
        kept = self.kept
        if kept is not None and kept.dtype == dtype and kept.is_fresh():
            return kept
        self.kept = kept = None  # the old ones' memory first
        pairs, scale = factors_of(self.adapters)
        stacks = stacked(pairs, dtype)
        if not self.called:
            self.called = True
            return Made(self.real, stacks, scale)
        kept = Kept(self.real, Stacks(stacks.down, stacks.up.contiguous()), scale)
        self.kept = kept if kept.shows_changes else None
        return kept

    def forget(self) -> None:
        """Drop the stacks: the adapters have changed."""
        self.kept = None

    def of_blocks(self, stacks: Stacks) -> Stacks:
        """From one entry for each adapter to one for each block."""
        if self.in_order:
            return stacks
        index = self.indices(stacks.up.device)
        return Stacks(stacks.down.mT.index_select(0, index).mT, stacks.up.index_select(0, index))

    def indices(self, device: torch.device) -> Tensor:
        """For each block, which of the adapters it has."""
        if self.index is None or self.index.device != device:
            self.index = torch.tensor(self.places, device=device)
        return self.index

    def _draw(self, x: Tensor) -> "Drawn | None":
        rates = [adapter.dropout if adapter.training else 0.0 for adapter in self.real]
        if not any(rates):
            return None
        if len(set(rates)) == 1:
            noise = kernels.draw(x, rates[0])
            return Drawn([noise], noise.factor)
        of = {id(adapter): rate for adapter, rate in zip(self.real, rates, strict=True)}
        parts = x.reshape(self.blocks, -1)
        each = [
            kernels.draw(part, of.get(id(self.adapters[place]), 0.0))
            for part, place in zip(parts, self.places, strict=True)
        ]
        factors = torch.tensor([noise.factor for noise in each], device=x.device)
        return Drawn(each, factors.view(-1, 1, 1))


class Drawn(NamedTuple):
    """What dropout drew for one call: the masks are made of it when they are needed."""

    noise: list[kernels.Noise]
    """One for all blocks, or one for each."""
    factor: Any
    """What is kept is multiplied by it: a number, or `[blocks, 1, 1]`."""

    def mask(self, x: Tensor) -> Tensor:
        """0 and 1 in the shape of `x` `[blocks, n, in]`."""
        if len(self.noise) == 1:
            return kernels.keep_mask(x.shape, self.noise[0])
        return torch.stack([kernels.keep_mask(x.shape[1:], noise) for noise in self.noise])

    def on_low(self, low: Tensor) -> Tensor:
        """`low` `[blocks, n, rank]` times the factors, where they differ."""
        return (low * self.factor).to(low.dtype) if len(self.noise) > 1 else low

    def on_scale(self, scale: float) -> float:
        """`scale` times the factor, where there is one for all."""
        return scale * self.factor if len(self.noise) == 1 else scale


def add(y: Tensor, x: Tensor, stacks: Stacks, scale: float, drawn: Drawn | None) -> Tensor:
    """Add the updates for `x` `[blocks, n, in]` to `y` `[blocks, n, out]`, in place; return `x @ down` with dropout."""
    if x.dtype != y.dtype:
        x = x.to(y.dtype)
    h = torch.bmm(x if drawn is None else x * drawn.mask(x), stacks.down)
    if drawn is not None:
        h, scale = drawn.on_low(h), drawn.on_scale(scale)
    y.baddbmm_(h, stacks.up, alpha=scale)
    return h


class _GroupedLinear(torch.autograd.Function):
    """Base and updates at once. As in `peftkit.kernels`, the input's gradient is added up in one buffer, and a
    mask is made again in backward.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, group: Grouped, layer: nn.Module, scale: float, drawn: Any,
        *factors: Tensor,
    ) -> Tensor:  # fmt: skip
        device = x.device.type
        autocast = kernels.is_autocast(device) and torch.float64 not in (x.dtype, w.dtype)
        dtype = torch.get_autocast_dtype(device) if autocast else w.dtype
        with kernels.no_autocast(device):
            cast = kernels._cast(x, dtype) if autocast else x
            rows = cast.view(-1, x.shape[-1])
            y = group.kind.plain(layer, rows, w.to(dtype), None if b is None else b.to(dtype))
            stacks = group.of_blocks(stacked(_pairs(group, factors), dtype))
            blocks = y.view(group.blocks, -1, y.shape[1])
            h = add(blocks, rows.view(*blocks.shape[:2], -1), stacks, scale, drawn)
        ctx.save_for_backward(cast, w, b, h, *stacks, *factors)
        ctx.call, ctx.shape, ctx.dtypes = (group, layer, scale, drawn), x.shape, (x.dtype, dtype)
        y = y.view(*x.shape[:-1], y.shape[1])
        return y.data  # or torch takes it for a view, which nobody could change in place

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cast, w, b, h, down, up, *factors = ctx.saved_tensors
        group, layer, scale, drawn = ctx.call
        if torch.is_grad_enabled():
            return _again(ctx, grad)
        wants_x, _, wants_b, *_ = ctx.needs_input_grad
        wanted = ctx.needs_input_grad[7:]
        x_dtype, dtype = ctx.dtypes
        grad_x = grad_b = None
        grads: list[Tensor | None] = [None] * len(factors)
        with kernels.no_autocast(grad.device.type):
            rows = grad.reshape(-1, grad.shape[-1])
            grad = rows.view(group.blocks, -1, rows.shape[1])
            alpha = scale if drawn is None else drawn.on_scale(scale)
            low = torch.bmm(grad, up.mT).mul_(alpha)  # [blocks, n, rank]
            x = cast.view(*grad.shape[:2], -1)
            mask = None
            if drawn is not None:
                low, mask = drawn.on_low(low), drawn.mask(x)
            if any(wanted):
                of_up = torch.bmm(grad.mT, h).mul_(alpha)
                of_down = torch.bmm(low.mT, x if mask is None else x * mask)
                grads = _of_adapters(group, of_up, of_down, factors, wanted)
            if wants_b:
                grad_b = rows.sum(0).to(b.dtype)
            if wants_x:
                buffer = torch.bmm(low, down.mT)
                if mask is not None:
                    buffer.mul_(mask)
                buffer.view(-1, x.shape[2]).addmm_(rows, group.kind.matrix(layer, group.weight, w).to(dtype))
                grad_x = buffer.view(ctx.shape).to(x_dtype)
        return grad_x, None, grad_b, None, None, None, None, *grads


def _pairs(group: Grouped, factors: Sequence[Tensor]) -> list[Pair]:
    """The flat factors by adapter."""
    each = iter(factors)
    return [None if adapter is None else (next(each), next(each)) for adapter in group.adapters]


def _of_adapters(
    group: Grouped, up: Tensor, down: Tensor, factors: Sequence[Tensor], wanted: Sequence[bool]
) -> list[Tensor | None]:
    """The factors' gradients, from those of the blocks, `up` `[blocks, out, rank]` and `down` `[blocks, rank, in]`."""
    if not group.in_order:
        index, n = group.indices(up.device), len(group.adapters)
        up, down = (t.new_zeros(n, *t.shape[1:]).index_add_(0, index, t) for t in (up, down))
    grads: list[Tensor] = []
    for adapter, of_up, of_down in zip(group.adapters, up, down, strict=True):
        if adapter is not None:
            rank = factors[len(grads)].shape[1]
            grads += [of_up[:, :rank], of_down[:rank]]
    return [g.to(f.dtype) if wants else None for g, f, wants in zip(grads, factors, wanted, strict=True)]


def _again(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The same gradients in operations that can be differentiated once more."""
    x, w, b, _, _, _, *factors = ctx.saved_tensors
    group, layer, scale, drawn = ctx.call
    if drawn is not None or ctx.dtypes[0] != ctx.dtypes[1]:
        raise RuntimeError("a routed layer with dropout, or under autocast, cannot be differentiated twice")
    inputs = [x, w, b, None, None, None, None, *factors]
    sought = [t for t, wants in zip(inputs, ctx.needs_input_grad, strict=True) if wants]
    y = group.kind.plain(layer, x, w, b)
    blocks = x.view(group.blocks, -1, x.shape[-1])
    stacks = group.of_blocks(stacked(_pairs(group, factors), y.dtype))
    delta = torch.bmm(torch.bmm(blocks, stacks.down), stacks.up) * scale
    found = iter(torch.autograd.grad(y + delta.view(y.shape), sought, grad, create_graph=True))
    return tuple(next(found) if wants else None for wants in ctx.needs_input_grad)
