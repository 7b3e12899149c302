"""The 4-bit and 8-bit linear layers of bitsandbytes as layer kinds: a low-rank product is added to their own output.

Their forward takes packed numbers and nothing else, so no adapted weight can stand in for these. What a method makes of
the weight is made of the dequantised one, and the difference is applied beside the layer. bitsandbytes is imported by
whoever made such a layer; here it is looked at only then.
"""

import copy
import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peftkit
from peftkit.layers import LayerKind, Linear


class _Packed(Linear):
    """What the two have in common."""

    quantised: ClassVar[bool] = True
    fixed: ClassVar[str] = (
        "this layer of bitsandbytes holds packed numbers alone, and to quantise an adapted weight again would round "
        "the adapter away. Save the adapter; dequantise the base (model.dequantize() of transformers) or load it "
        "unquantised; load the adapter there with check_base=False; then merge"
    )
    adapted = LayerKind.adapted  # the sum is taken in a new tensor: the output is bitsandbytes' own
    added = LayerKind.added

    def weights(self, layer: Any) -> Mapping[str, str | None]:
        """The weight, with the bias; nothing of a subclass with another forward, which may do more than to apply it."""
        return {"weight": "bias"} if inspect.unwrap(type(layer).forward) is self._forward() else {}

    def fits(self, layer: Any, weight: str, raw: Tensor) -> bool:
        """Packed numbers of the layer's size, or plain ones that are yet to be packed."""
        return self._is_packed(layer) or super().fits(layer, weight, raw)

    def plain(self, layer: Any, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        """The layer's own forward for its packed weight; `x @ w.T + b` for a plain one."""
        if w.dtype.is_floating_point and w.shape == self.shape(layer, "weight"):
            return F.linear(x, w, b)
        if torch.is_grad_enabled() and self._lacks_backward(layer):
            y: Tensor = _Differentiable.apply(x, b, self, layer)
            return y
        return self.run(layer, x)

    def run(self, layer: Any, x: Tensor) -> Tensor:
        """The layer's own forward, past whatever its weight reads as."""
        bare: Any = object.__new__(self._layer_class())
        object.__setattr__(bare, "__dict__", layer.__dict__)
        y: Tensor = self._forward()(bare, x)
        return y

    def values(self, layer: Any, weight: str, raw: Tensor) -> Tensor:
        """The dequantised matrix `[out, in]`."""
        if not self._is_packed(layer) or (raw.dtype.is_floating_point and raw.shape == self.shape(layer, weight)):
            return raw
        if raw.is_meta:
            return raw.new_empty(self.shape(layer, weight), dtype=self.dtype(layer, weight, raw))
        return self._dequantised(layer)

    def _lacks_backward(self, layer: Any) -> bool:
        return False

    def _forward(self) -> Any:
        return inspect.unwrap(self._layer_class().forward)

    def _layer_class(self) -> Any:
        raise NotImplementedError

    def _is_packed(self, layer: Any) -> bool:
        raise NotImplementedError

    def _dequantised(self, layer: Any) -> Tensor:
        raise NotImplementedError


class Linear4bit(_Packed):
    """`bitsandbytes.nn.Linear4bit`, NF4 and FP4: blocks of the weight share a scale, and two values share a byte."""

    serves = "bitsandbytes.nn.modules.Linear4bit"

    def dtype(self, layer: Any, weight: str, raw: Tensor) -> torch.dtype:
        """That of the weight before it was quantised."""
        state = _state(layer)
        return raw.dtype if state is None else getattr(state, "original_dtype", state.dtype)

    def _layer_class(self) -> Any:
        from bitsandbytes.nn import Linear4bit

        return Linear4bit

    def _is_packed(self, layer: Any) -> bool:
        return _state(layer) is not None

    def _lacks_backward(self, layer: Any) -> bool:
        """A layer that has run inference on a CPU with AVX512-BF16 is in an order for inference alone, for good."""
        return getattr(_state(layer), "packing_format_for_cpu", False) is True

    def _dequantised(self, layer: Any) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        data, state = layer._parameters["weight"].data, _state(layer)
        if self._lacks_backward(layer):
            data, state = _unpacked(data, state)
        values: Tensor = dequantize_4bit(data, state)
        return values.reshape(self.shape(layer, "weight"))


class Linear8bitLt(_Packed):
    """`bitsandbytes.nn.Linear8bitLt` (LLM.int8): each row of the weight has a scale, and each row of the input."""

    serves = "bitsandbytes.nn.modules.Linear8bitLt"

    def dtype(self, layer: Any, weight: str, raw: Tensor) -> torch.dtype:
        """float32, because the layer does not keep what it was; that of a weight that is not packed."""
        return torch.float32 if self._is_packed(layer) else raw.dtype

    def _layer_class(self) -> Any:
        from bitsandbytes.nn import Linear8bitLt

        return Linear8bitLt

    def _is_packed(self, layer: Any) -> bool:
        return not layer._parameters["weight"].dtype.is_floating_point

    def _dequantised(self, layer: Any) -> Tensor:
        own = layer._parameters["weight"]
        scales = layer.state.SCB if own.SCB is None else own.SCB  # the first forward moves them
        return own.data.float() * (scales.float() / 127).unsqueeze(1)


def _state(layer: nn.Module) -> Any:
    """How the 4-bit numbers are to be read; None where they are not quantised yet."""
    own = getattr(layer._parameters["weight"], "quant_state", None)
    return own if own is not None else layer.__dict__.get("quant_state")


def _unpacked(data: Tensor, state: Any) -> tuple[Tensor, Any]:
    """Packed numbers and their scales in the usual order, from that for inference on CPUs; copies."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    usual = copy.copy(state)
    usual.original_nested = False  # the scales stay as they are: to pack them again would round them again
    data, usual = _convert_weight_packed_for_cpu_inverse(data, usual)
    usual.absmax = state.absmax.T.reshape(-1).float()
    return data, usual


class _Differentiable(torch.autograd.Function):
    """A layer whose own forward has no backward, differentiated as the product with the dequantised weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, b: Tensor | None, kind: _Packed, layer: Any) -> Tensor:
        ctx.of, ctx.shape, ctx.dtype, ctx.b_dtype = (kind, layer), x.shape, x.dtype, None if b is None else b.dtype
        return kind.run(layer, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        wants_x, wants_b, *_ = ctx.needs_input_grad
        kind, layer = ctx.of
        rows = grad.reshape(-1, grad.shape[-1])
        x = b = None
        if wants_x:
            w = kind.values(layer, "weight", layer._parameters["weight"])
            x = (rows @ w.to(rows.dtype)).view(ctx.shape).to(ctx.dtype)
        if wants_b:
            b = rows.sum(0).to(ctx.b_dtype)
        return x, b, None, None


@peftkit.hookimpl
def peftkit_layers() -> list[type[LayerKind]]:
    """The two kinds of this module."""
    return [Linear4bit, Linear8bitLt]
