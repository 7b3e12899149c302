"""Formulas for operations that torch's FLOP counter does not know, and so counts as nothing.

On the CPU these are the fused attention (so that the same model would seem cheaper than on a GPU, the more so the
longer the sequence) and the fused recurrent layers. As in torch's own formulas, a product of `[m, k]` and `[k, n]` is
2mkn, and a causal attention counts as a full one.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

_aten = torch.ops.aten


def _attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(q, k, v))  # type: ignore[no-untyped-call]


def _attention_backward(grad: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(grad, q, k, v))  # type: ignore[no-untyped-call]


def _recurrent(x: Any, inputs: Any, hidden: Any, *_: Any, **__: Any) -> int:
    """One direction of one layer: at each position of `x` `[time, batch, in]` a product with each of two matrices."""
    return int(2 * x[0] * x[1] * (inputs[0] * inputs[1] + hidden[0] * hidden[1]))


def _recurrent_backward(*args: Any, **kwargs: Any) -> int:
    """The kernel computes the gradients of input and weights, wanted or not: as many products again, twice."""
    return 2 * _recurrent(*args, **kwargs)


FORMULAS: dict[Any, Callable[..., int]] = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    _aten.mkldnn_rnn_layer: _recurrent,
    _aten.mkldnn_rnn_layer_backward: _recurrent_backward,
}
"""By operation; the arguments are those of the operation, with shapes for tensors."""
