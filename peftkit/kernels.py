"""The low-rank linear layer: `x @ W.T + b + scale * dropout(x) @ down.T @ up.T`, in fewer passes and less memory.

What it saves over the same in plain operations:

* It adds its product into the base's output, and into the gradient of the input: no second buffer of either size.
* It casts the two small factors to the layer's dtype. Under autocast the cast of an input is shared by the layers that
  get the same one (queries, keys and values). That of the frozen weight is kept for backward, as autocast itself does,
  or made again there, where memory is scarcer than time (`lean`).
* Dropout keeps no copy of the input and no mask, only one random number for 512 elements: the mask is made of these by
  a hash, and again in backward, at a fraction of the cost of `torch.nn.functional.dropout`.
* It computes and saves only what some gradient needs.

Where nothing of that is at stake (no dropout, one dtype) plain operations in place do as well, and can be
differentiated twice. While compiling and in functorch transforms the caller takes the plain form (`peftkit.running`).
"""

import math
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def is_autocast(device: str) -> bool:
    """Whether autocast is on for this type of device; some, the meta device for one, have none."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def no_autocast(device: str) -> Any:
    """A context in which autocast has no say."""
    return torch.autocast(device, enabled=False) if is_autocast(device) else nullcontext()


class _Lean(threading.local):
    on = False


_lean = _Lean()


@contextmanager
def lean() -> Iterator[None]:
    """Run forward so that under autocast no copy of a frozen weight in autocast's dtype waits for backward.

    Backward makes it again. In this thread, for layers whose adapters add low-rank products; without autocast there is
    no such copy, and nothing changes.

    >>> import peftkit, torch
    >>> model = peftkit.wrap(torch.nn.Sequential(torch.nn.Linear(4, 4)), method="lora", targets="0")
    >>> with peftkit.kernels.lean(), torch.autocast("cpu", torch.bfloat16):
    ...     model(torch.randn(2, 4)).sum().backward()
    """
    before, _lean.on = _lean.on, True
    try:
        yield
    finally:
        _lean.on = before


def linear(x: Tensor, w: Tensor, b: Tensor | None, up: Tensor, down: Tensor, scale: float, dropout: float) -> Tensor:
    """The output `[..., out]` for `x` `[..., in]`, `w` `[out, in]`, `up` `[out, rank]` and `down` `[rank, in]`.

    It is in autocast's dtype where that is on and in the weight's otherwise, as the layer's own output is. The weight
    must be frozen.
    """
    plain = x.dtype == w.dtype == up.dtype == down.dtype
    if plain and not dropout and not torch._C._is_any_autocast_enabled():
        return _plain(x, w, b, up, down, scale, None)
    device = x.device.type
    autocast = is_autocast(device) and torch.float64 not in (x.dtype, w.dtype)
    dtype = torch.get_autocast_dtype(device) if autocast else w.dtype
    if dropout > _MOST:  # rarer than a byte can say
        return F.linear(x, w, b) + F.linear(F.linear(F.dropout(x, dropout), down.to(dtype)), up.to(dtype)) * scale
    noise = draw(x, dropout) if dropout else None
    if not autocast and x.dtype != w.dtype:
        return F.linear(x, w, b)  # torch's own error
    if torch.is_grad_enabled() and (noise or not plain or x.dtype != dtype):
        y: Tensor = _LowRankLinear.apply(x, w, b, up, down, scale, noise, dtype)  # type: ignore[no-untyped-call]
        return y
    if not autocast:
        return _plain(x, w, b, up, down, scale, noise)
    with no_autocast(device):
        bias = None if b is None else b.to(dtype)
        return _plain(_cast(x, dtype), w.to(dtype), bias, up, down, scale, noise)


def _plain(
    x: Tensor, w: Tensor, b: Tensor | None, up: Tensor, down: Tensor, scale: float, noise: "Noise | None"
) -> Tensor:
    flat = x.dim() == 2
    rows = x if flat else x.reshape(-1, x.shape[-1])
    if up.dtype != x.dtype or down.dtype != x.dtype:
        up, down = up.to(x.dtype), down.to(x.dtype)
    kept = rows
    if noise:
        kept = rows * keep_mask(rows.shape, noise)
        scale *= noise.factor
    h = F.linear(kept, down)
    if not x.is_contiguous():  # for which torch takes another kernel, that rounds otherwise
        return F.linear(x, w, b) + (h @ up.mT).mul_(scale).view(*x.shape[:-1], up.shape[0])
    y = F.linear(rows, w, b).addmm_(h, up.mT, alpha=scale)
    return y if flat else y.view(*x.shape[:-1], up.shape[0])


class _LowRankLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, up: Tensor, down: Tensor, scale: float, noise: Any, dtype: Any
    ) -> Tensor:
        with no_autocast(x.device.type):
            cast = _cast(x, dtype)
            used = w.to(dtype)
            y = F.linear(cast, used, None if b is None else b.to(dtype)).contiguous()
            y = y.data  # or torch takes it for a view, which nobody could change in place
            rows = cast.reshape(-1, cast.shape[-1])
            if noise:
                scale *= noise.factor
                rows = rows * keep_mask(rows.shape, noise)
            h = F.linear(rows, down.to(dtype))
            y.view(-1, y.shape[-1]).addmm_(h, up.to(dtype).mT, alpha=scale)
        ctx.scale, ctx.dtype, ctx.x_dtype = scale, dtype, x.dtype
        ctx.threshold = noise.threshold if noise else None
        wants_x, _, _, wants_up, wants_down, *_ = ctx.needs_input_grad
        wants_low = wants_x or wants_down
        ctx.save_for_backward(
            cast if wants_down else None,
            (w if _lean.on else used) if wants_x else None,
            up if wants_low else None,
            down if wants_x else None,
            h if wants_up else None,
            noise.bits if noise and wants_low else None,
        )
        ctx.shapes = x.shape, up.dtype, down.dtype, None if b is None else b.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cast, w, up, down, h, bits = ctx.saved_tensors
        shape, up_dtype, down_dtype, b_dtype = ctx.shapes
        wants_x, _, wants_b, wants_up, wants_down, *_ = ctx.needs_input_grad
        dtype, scale = ctx.dtype, ctx.scale
        grad_x = grad_b = grad_up = grad_down = mask = None
        with no_autocast(grad.device.type):
            grad = grad.reshape(-1, grad.shape[-1])
            if wants_b:
                grad_b = grad.sum(0).to(b_dtype)
            if wants_up:
                grad_up = torch.mm(grad.mT, h).mul_(scale).to(up_dtype)
            if up is not None:
                low = torch.mm(grad, up.to(dtype)).mul_(scale)  # [n, rank]
            if bits is not None:
                mask = keep_mask(shape, Noise(ctx.threshold, bits)).view(-1, shape[-1])
                if wants_down and wants_x:
                    mask = mask.to(dtype)  # once for both products, which otherwise do it one by one
            buffer = None
            if wants_down:
                rows = cast.reshape(-1, shape[-1])
                buffer = rows * mask if mask is not None else None
                grad_down = torch.mm(low.mT, rows if buffer is None else buffer).to(down_dtype)
            if wants_x:
                # one buffer for the masked input and for the gradient of the input
                grad_x = torch.mm(low, down.to(dtype), **({} if buffer is None else {"out": buffer}))
                if mask is not None:
                    grad_x.mul_(mask)
                grad_x.addmm_(grad, w.to(dtype))
                grad_x = grad_x.view(shape).to(ctx.x_dtype)
        return grad_x, None, grad_b, grad_up, grad_down, None, None, None


# -------------------------------------------------------------------------------------------------- casts


class _Last(threading.local):
    """The last input that was cast in this thread, and its cast; neither is kept alive by it."""

    def __init__(self) -> None:
        self.key: Any = None
        self.source: Any = lambda: None
        self.result: Any = lambda: None


_last = _Last()


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    if x.dtype == dtype:
        return x
    key = x._version, dtype
    result: Tensor | None = _last.result()
    if result is None or _last.source() is not x or _last.key != key:
        result = x.detach().to(dtype)
        _last.key, _last.source, _last.result = key, weakref.ref(x), weakref.ref(result)
    return result


# ------------------------------------------------------------------------------------------------ dropout

# Odd multiples of 2**64 over the golden ratio, signed. Made by Python: torch's first kernel would start its threads
# while peftkit is imported.
_COLUMNS = torch.tensor([((i * -7046029254386353131 | 1) + 2**63) % 2**64 - 2**63 for i in range(1, 65)], device="cpu")
_MOST = 255 / 256
_MIX = -2960836687089230189  # an odd number of well mixed bits


class Noise(NamedTuple):
    """What was drawn for one dropout; the mask is a function of it."""

    threshold: int
    """Out of 256, so many are dropped."""
    bits: Tensor
    """`[n / 512, 1]` random 64-bit numbers."""

    @property
    def factor(self) -> float:
        """What the elements that are kept are multiplied by, for their expectation to stay."""
        return 256 / (256 - self.threshold)


def draw(x: Tensor, dropout: float) -> Noise:
    """Noise for an `x` and a probability, which is the mean of the thresholds over many draws.

    From torch's generator of the tensor's device, which `torch.manual_seed` and gradient checkpointing set back. The
    bounds are there for its full range: without them `random_` leaves the top bit zero.
    """
    bits = torch.empty((x.numel() + 511) // 512, 1, dtype=torch.int64, device=x.device).random_(-(2**63), None)
    # Of any other device the CPU would have to wait for the number.
    chance = bits[0] if bits.is_cpu and len(bits) else torch.empty((), dtype=torch.int64, device="cpu").random_()
    return Noise(int(256 * dropout + (int(chance) & 0xFFFFFF) / 0x1000000), bits)


def keep_mask(shape: Sequence[int], noise: Noise) -> Tensor:
    """0 for what is dropped and 1 for the rest, in `shape`, as bytes.

    Each random 64-bit number is expanded to 64 by a hash (multiply, fold, multiply), and each of these is eight bytes.
    The hash ends on a multiplication, because a last shift would leave traces in the top byte. The steps are few rather
    than the cheapest: within a model each finds cold caches, and costs more to call than to run.
    """
    z = noise.bits * (_COLUMNS if noise.bits.is_cpu else _COLUMNS.to(noise.bits.device))
    z ^= z >> 32
    z *= _MIX
    mask, n = z.view(torch.uint8), math.prod(shape)
    if mask.numel() != n:
        mask = mask.view(-1)[:n]
    return mask.ge_(noise.threshold).view(shape)
