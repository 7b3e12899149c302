"""Low-rank products of layers other than linear ones, added into the base's output; and factors of its rows.

A kind computes `h`, what `down` makes of the input, with `rank` channels. `add` puts `scale * up @ h` on top of an
output in place: there is no second buffer of its size. `dropped` keeps no mask and no masked input for backward, only
few random numbers. `gained` keeps one tensor of the output's size, the output itself where that says enough.

While compiling and in functorch transforms, callers take plain operations.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from peftkit import kernels


def is_plain_torch() -> bool:
    """Whether no compiler and no functorch transform looks on: they take plain operations."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is None


# --------------------------------------------------------------------------------------------------- sums


def add(y: Tensor, h: Tensor, up: Tensor, scale: float, *, channel: int = 1, groups: int = 1) -> Tensor:
    """`y + scale * up @ h` over dimension `channel` (1, or -1), made in `y`, which must be ours and saved nowhere.

    `y` has `out` channels, `h` `groups * rank`, and `up` is `[out, rank]`; group g of the output is made of group g of
    `h`. All have one dtype. It can be differentiated twice.
    """
    if not (y.is_contiguous() or (channel == 1 and y.movedim(1, -1).is_contiguous())):
        y = y.contiguous()  # or its matrices would be copies, and not what is returned
    if torch.is_grad_enabled() and (h.requires_grad or up.requires_grad):
        if y._is_view():  # what is changed in a view is copied on the way back
            y = y.clone()
        total: Tensor = _Add.apply(y, h, up, scale, channel, groups)  # type: ignore[no-untyped-call]
        return total
    return _add(y, h, up, scale, channel, groups)


def _add(y: Tensor, h: Tensor, up: Tensor, scale: float, channel: int, groups: int) -> Tensor:
    target, is_last = _matrices(y, channel, groups)
    target.baddbmm_(_factors(up, groups, len(target)), _matrices(h, channel, groups, is_last=is_last)[0], alpha=scale)
    return y


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, h: Tensor, up: Tensor, scale: float, channel: int, groups: int) -> Tensor:
        _, wants_h, wants_up, *_ = ctx.needs_input_grad
        ctx.mark_dirty(y)
        ctx.save_for_backward(h if wants_up else None, up if wants_h else None)
        ctx.options, ctx.shape = (scale, channel, groups), h.shape
        return _add(y, h, up, scale, channel, groups)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        h, up = ctx.saved_tensors
        scale, channel, groups = ctx.options
        grad_h = grad_up = None
        g, is_last = _matrices(grad, channel, groups)
        if up is not None:
            low = torch.bmm(_factors(up, groups, len(g)).mT, g) * scale
            shape = ctx.shape
            if is_last:  # [groups, rank, n] to [n, groups * rank]
                low = low.permute(2, 0, 1).flatten(1)
                grad_h = low.view(shape) if channel == -1 else low.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
            else:
                grad_h = low.view(shape)
        if h is not None:
            outer = torch.bmm(g, _matrices(h, channel, groups, is_last=is_last)[0].mT)
            grad_up = outer.view(-1, groups, *outer.shape[1:]).sum(0).flatten(0, 1) * scale
        return grad, grad_h, grad_up, None, None, None


def _matrices(t: Tensor, channel: int, groups: int, *, is_last: bool | None = None) -> tuple[Tensor, bool]:
    """`t` as `[batches * groups, channels of a group, positions]`, and whether its channels lie together in memory.

    Then all samples are one batch. Of a tensor that `add` may be given it is a view.
    """
    rows = t if channel == -1 else t.movedim(1, -1)
    if is_last is None:
        is_last = channel == -1 or rows.is_contiguous()
    if is_last:
        return rows.reshape(-1, groups, rows.shape[-1] // groups).permute(1, 2, 0), True
    return t.reshape(len(t) * groups, t.shape[1] // groups, -1), False


def _factors(up: Tensor, groups: int, batches: int) -> Tensor:
    """`up` `[out, rank]` for each of `batches` matrices, which are the groups, over and over."""
    factors = up.reshape(groups, -1, up.shape[1])
    if groups == 1:
        return factors.expand(batches, -1, -1)
    return factors.repeat(batches // groups, 1, 1)


# ------------------------------------------------------------------------------------------------ dropout


def dropped(low: Callable[[Tensor, Tensor], Tensor], x: Tensor, down: Tensor, dropout: float) -> Tensor:
    """`low(x, down)` with elements of `x` dropped; what is kept is raised for the expectation to stay."""
    if not dropout:
        return low(x, down)
    if dropout > kernels._MOST or not is_plain_torch():
        return low(F.dropout(x, dropout), down)
    noise = kernels.draw(x, dropout)
    h: Tensor = _Dropped.apply(low, x, down, noise)  # type: ignore[no-untyped-call]
    return h * noise.factor


class _Dropped(torch.autograd.Function):
    """`low(x * mask, down)`, which is computed again in backward: it is thin, and the mask is the larger part."""

    @staticmethod
    def forward(
        ctx: Any, low: Callable[[Tensor, Tensor], Tensor], x: Tensor, down: Tensor, noise: kernels.Noise
    ) -> Tensor:
        ctx.low, ctx.threshold = low, noise.threshold
        ctx.save_for_backward(x, down, noise.bits)
        return low(x * kernels.keep_mask(x.shape, noise), down)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, down, bits = ctx.saved_tensors
        _, *wants, _ = ctx.needs_input_grad
        mask = kernels.keep_mask(x.shape, kernels.Noise(ctx.threshold, bits))
        with torch.enable_grad():
            inputs = [(x * mask).requires_grad_(wants[0]), down.detach().requires_grad_(wants[1])]
            h = ctx.low(*inputs)
        found = iter(torch.autograd.grad(h, [t for t in inputs if t.requires_grad], grad))
        grad_x, grad_down = (next(found) if wanted else None for wanted in wants)
        return None, None if grad_x is None else grad_x.mul_(mask), grad_down, None


# ------------------------------------------------------------------------------------------------ factors


def gained(y: Tensor, b: Tensor | None, gain: Tensor) -> Tensor:
    """`gain * (y - b) + b`; `b` and `gain` have a shape that broadcasts against `y`, and `gain` a dtype of its own.

    A gain of 1 changes no bit of `y`. In half precision it is the gain's excess over 1 that is rounded, so that a small
    one is not lost.
    """
    if not is_plain_torch():
        return y + (gain - 1).to(y.dtype) * (y if b is None else y - b)
    if not torch.is_grad_enabled():
        return y * _divisible(gain) if _divides(y, b, gain) else _raised(y, y if b is None else y - b, gain)
    result: Tensor = _Gained.apply(y, b, gain)  # type: ignore[no-untyped-call]
    return result


def _divides(y: Tensor, b: Tensor | None, gain: Tensor) -> bool:
    """Whether the output divided by the gain is the input, up to rounding: not where digits are lost to a bias."""
    return b is None and y.dtype == gain.dtype in (torch.float32, torch.float64)


def _divisible(gain: Tensor) -> Tensor:
    """The gain with something far below rounding for 0, by which nothing could be divided again."""
    least = torch.finfo(gain.dtype).tiny ** 0.5
    return torch.where(gain.abs() < least, least, gain)


def _raised(y: Tensor, product: Tensor, gain: Tensor) -> Tensor:
    return torch.addcmul(y, product, (gain - 1).to(y.dtype))


class _Gained(torch.autograd.Function):
    """Keeps the output, which divided by the gain is the input; or the input, where that would lose digits."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, b: Tensor | None, gain: Tensor) -> Tensor:
        ctx.divides = _divides(y, b, gain)
        ctx.like_b = None if b is None else (b.shape, b.dtype)
        if ctx.divides:
            gain = _divisible(gain)
            kept = out = y * gain
        else:
            kept = y if b is None else y - b
            out = _raised(y, kept, gain)
        ctx.save_for_backward(kept if ctx.needs_input_grad[2] else None, gain)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept, gain = ctx.saved_tensors
        wants_y, wants_b, wants_gain = ctx.needs_input_grad
        grad_y = grad_b = grad_gain = None
        if wants_gain:
            grad_gain = _sum(grad * kept, gain)
            if ctx.divides:
                grad_gain /= gain
        if wants_b:
            shape, dtype = ctx.like_b
            grad_b = (_sum(grad, gain) * (1 - gain)).to(dtype).view(shape)
        if wants_y:
            grad_y = grad * gain if ctx.divides else _raised(grad, grad, gain)
        return grad_y, grad_b, grad_gain


def _sum(t: Tensor, like: Tensor) -> Tensor:
    """The sum down to another tensor's shape, in its dtype."""
    missing = t.dim() - like.dim()
    over = [i for i in range(t.dim()) if i < missing or like.shape[i - missing] != t.shape[i]]
    return (t.sum(over, dtype=like.dtype) if over else t.to(like.dtype)).view(like.shape)
