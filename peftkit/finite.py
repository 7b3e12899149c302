"""Looks for values that are not finite, in thousands of tensors at once."""

from collections.abc import Mapping

import torch
from torch import Tensor


def find_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The key of a tensor that holds an infinite value or a NaN; None where there is none.

    A sum takes a thirtieth of the time of a look at every value, and tells: it is not finite if one of its terms is
    not. The converse fails only by overflow, so what has such a sum is looked at.

    >>> import torch
    >>> find_not_finite({"a": torch.ones(2), "b": torch.tensor([0.0, float("nan")])})
    'b'
    """
    groups: dict[tuple[torch.device, torch.dtype], list[str]] = {}
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.is_meta:
            groups.setdefault((tensor.device, tensor.dtype), []).append(key)
    for keys in groups.values():
        sums = torch.stack([_summable(tensors[key]).sum() for key in keys])
        if sums.isfinite().all():  # one question to the device
            continue
        for key in keys:
            if not _summable(tensors[key]).isfinite().all():
                return key
    return None


def _summable(tensor: Tensor) -> Tensor:
    """In float32 where torch has no arithmetic: floats of 8 bits."""
    return tensor.float() if tensor.element_size() == 1 else tensor
