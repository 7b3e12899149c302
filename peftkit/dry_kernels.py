"""What torch would run on the device that is meant, where on the meta device it would run something else.

Which attention kernel is taken, how a GRU is unrolled on the CPU, and what checkpointing notes of random generators all
decide about memory. For the length of a block the functions that decide are replaced by others that decide as on the
device; tensors that are not on the meta device go to the originals.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor

ATTENTION = ("auto", "flash", "efficient", "math")
"""Kernels of `torch.nn.functional.scaled_dot_product_attention`; `auto` is the one that the device would take."""


@contextmanager
def replaced(*replacements: tuple[Any, str, Any]) -> Iterator[None]:
    """Other attributes for the length of a block: object, name, value."""
    with ExitStack() as stack:
        for owner, name, value in replacements:
            there = name in vars(owner)
            before = getattr(owner, name)
            setattr(owner, name, value)
            stack.callback(*((setattr, owner, name, before) if there else (delattr, owner, name)))
        yield


@contextmanager
def kernels_of(device: str, attention: str, taken: dict[str, int]) -> Iterator[None]:
    """Let operations on meta tensors run as on this device; how often each attention kernel is taken is counted."""
    default = torch.utils.checkpoint.DefaultDeviceType.get_device_type
    changes: list[tuple[Any, str, Any]] = [
        (F, "scaled_dot_product_attention", _attention(device, attention, taken)),
        (torch.utils.checkpoint, "_infer_device_type", lambda *_: default()),
    ]
    if device == "cpu":
        vf = torch._VF
        changes += [(vf, name, _recurrent(getattr(vf, name), cell)) for name, cell in _CELLS.items()]
    with replaced(*changes):
        yield


# ---------------------------------------------------------------------------------------------- attention


def _attention(device: str, wanted: str, taken: dict[str, int]) -> Callable[..., Tensor]:
    original = F.scaled_dot_product_attention
    aten = torch.ops.aten

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,  # noqa: FBT001, FBT002 - torch's own signature
        scale: float | None = None,
        enable_gqa: bool = False,  # noqa: FBT001, FBT002
    ) -> Tensor:
        if not query.is_meta:
            return original(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        if torch.is_autocast_enabled("meta"):  # by `dry_autocast`
            dtype = torch.get_autocast_dtype("meta")
            mask = attn_mask.to(dtype) if attn_mask is not None and attn_mask.is_floating_point() else attn_mask
            q, k, v = query.to(dtype), key.to(dtype), value.to(dtype)
            with torch.autocast("meta", enabled=False):
                return attend(q, k, v, mask, dropout_p, is_causal, scale, enable_gqa)
        may = _possible(device, query, key, value, attn_mask, dropout_p, enable_gqa=enable_gqa)
        kernel = wanted if wanted in may else may[0]
        taken[kernel] = taken.get(kernel, 0) + 1
        mask = attn_mask
        if mask is not None and mask.dtype is torch.bool:  # every kernel adds a mask, and torch makes it one to add
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask.logical_not(), -torch.inf)
        heads = query, key, value
        out: Any
        if kernel == "flash" and device == "cpu":
            flash = aten._scaled_dot_product_flash_attention_for_cpu
            out = flash(*heads, dropout_p, is_causal, attn_mask=mask, scale=scale)
        elif kernel == "flash":
            out = aten._scaled_dot_product_flash_attention(*heads, dropout_p, is_causal, False, scale=scale)
        elif kernel == "efficient":
            grad = torch.is_grad_enabled() and any(t.requires_grad for t in heads)
            out = aten._scaled_dot_product_efficient_attention(*heads, mask, grad, dropout_p, is_causal, scale=scale)
        else:
            plain = aten._scaled_dot_product_attention_math
            out = plain(*heads, mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa)
        result: Tensor = out[0]
        return result

    return attend


def _possible(
    device: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, *, enable_gqa: bool
) -> list[str]:
    """The kernels that can serve this call, by torch's own conditions, the preferred one first."""
    plain = q.dim() == 4 and all(t.stride(-1) == 1 for t in (q, k, v)) and q.shape[-1] == k.shape[-1] == v.shape[-1]
    if device == "cpu":
        flash = plain and dropout == 0 and not (mask is not None and mask.requires_grad)
        return ["flash", "math"] if flash else ["math"]
    half = q.dtype in (torch.float16, torch.bfloat16)
    kernels = ["flash"] if plain and half and mask is None and q.shape[-1] <= 256 else []
    grouped = enable_gqa and q.shape[1] != k.shape[1]
    return [*kernels, *(["efficient"] if plain and not grouped and q.dtype is not torch.float64 else []), "math"]


# ---------------------------------------------------------------------------------------- recurrent layers


def _gru(gates: Tensor, hidden: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    mine, theirs = gates.unsafe_chunk(3, 1), F.linear(hidden, w, b).unsafe_chunk(3, 1)
    reset = theirs[0].add_(mine[0]).sigmoid_()
    update = theirs[1].add_(mine[1]).sigmoid_()
    new = mine[2].add(theirs[2].mul_(reset)).tanh_()
    return (hidden - new).mul_(update).add_(new)


def _tanh(gates: Tensor, hidden: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    return F.linear(hidden, w, b).add_(gates).tanh()


def _relu(gates: Tensor, hidden: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    return F.linear(hidden, w, b).add_(gates).relu()


_CELLS = {"gru": _gru, "rnn_tanh": _tanh, "rnn_relu": _relu}


def _recurrent(original: Callable[..., Any], cell: Callable[..., Tensor]) -> Callable[..., Any]:
    """Torch's own order on the CPU: the inputs' part of the gates for all steps at once, then step by step."""

    def run(*args: Any) -> Any:
        x, hidden, weights, has_bias, layers, dropout, training, bidirectional, batch_first = (*args, None)[:9]
        if len(args) != 9 or not x.is_meta or not isinstance(weights, (list, tuple)) or not isinstance(hidden, Tensor):
            return original(*args)  # packed sequences
        x = x.transpose(0, 1) if batch_first else x
        starts, finals = hidden.unbind(0), []
        directions = 2 if bidirectional else 1
        per = 4 if has_bias else 2
        for layer in range(layers):
            outputs = []
            for number in range(layer * directions, (layer + 1) * directions):
                output, final = _unrolled(cell, x, starts[number], weights[number * per :][:per], number % directions)
                outputs.append(output)
                finals.append(final)
            x = outputs[0] if directions == 1 else torch.cat(outputs, -1)
            if dropout and training and layer < layers - 1:
                x = F.dropout(x, dropout)
        return x.transpose(0, 1) if batch_first else x, torch.stack(finals, 0)

    return run


def _unrolled(
    cell: Callable[..., Tensor], x: Tensor, hidden: Tensor, weights: Sequence[Tensor], backwards: int
) -> tuple[Tensor, Tensor]:
    w_in: Any
    w_hidden: Any
    w_in, w_hidden, b_in, b_hidden = (*weights, None, None)[:4]
    gates = F.linear(x, w_in, b_in)
    steps = gates.unbind(0)
    outputs = []
    for step in reversed(steps) if backwards else steps:
        hidden = cell(step, hidden, w_hidden, b_hidden)
        outputs.append(hidden)
    return torch.stack(outputs[::-1] if backwards else outputs, 0), hidden
