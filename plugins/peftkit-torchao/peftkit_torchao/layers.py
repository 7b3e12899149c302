"""Linear layers whose weight torchao has quantised: a tensor of its own class inside of an ordinary `nn.Linear`.

The layer's output is the quantised kernel's, to the bit. Many of these kernels have no backward, so the input's
gradient is taken with the dequantised weight, which is made when it is needed and kept by nobody.
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

import peftkit
from peftkit.layers import LayerKind, Linear


class QuantisedLinear(Linear):
    """`nn.Linear` with a weight `[out, in]` of one of torchao's classes."""

    serves = "torchao.utils.TorchAOBaseTensor"
    quantised: ClassVar[bool] = True
    adapted = LayerKind.adapted  # the sum is taken in a new tensor: the output is torchao's own
    added = LayerKind.added

    def fits(self, layer: Any, weight: str, raw: Tensor) -> bool:
        """A matrix of the layer's size."""
        return raw.is_floating_point() and tuple(raw.shape) == self.shape(layer, weight)

    def values(self, layer: Any, weight: str, raw: Tensor) -> Tensor:
        """The dequantised matrix, in the dtype that the tensor shows."""
        return dequantised(raw) if is_traceable_wrapper_subclass(raw) else raw

    def plain(self, layer: Any, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        """`nn.Linear`'s own call; with gradients, one that keeps nothing."""
        if is_traceable_wrapper_subclass(w) and torch.is_grad_enabled():
            y: Tensor = _QuantisedLinear.apply(x, w, b)
            return y
        return F.linear(x, w, b)


class _QuantisedLinear(torch.autograd.Function):
    """The quantised product, differentiated as the product with the dequantised weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        ctx.w, ctx.shape, ctx.dtype, ctx.b_dtype = w, x.shape, x.dtype, None if b is None else b.dtype
        return F.linear(x, w, b)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        wants_x, _, wants_b = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        x = b = None
        if wants_x:
            x = (rows @ dequantised(ctx.w).to(rows.dtype)).view(ctx.shape).to(ctx.dtype)
        if wants_b:
            b = rows.sum(0).to(ctx.b_dtype)
        return x, None, b


@torch.no_grad()
def dequantised(w: Any) -> Tensor:
    """The matrix `[out, in]` that a quantised one stands for.

    A class that cannot say it (4-bit numbers in an order that only their kernel knows) is asked by its product with
    each unit vector, which is exact: all other terms of the sum are zero.
    """
    own = getattr(type(w), "dequantize", None)
    if own is not None and own is not Tensor.dequantize:
        values: Tensor = w.dequantize()
        return values.to(w.dtype)
    unit = torch.eye(w.shape[1], dtype=w.dtype, device=w.device)
    return F.linear(unit, w).T.contiguous()


@peftkit.hookimpl
def peftkit_layers() -> list[type[LayerKind]]:
    """The one kind of this module."""
    return [QuantisedLinear]
