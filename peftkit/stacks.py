"""The factors of several low-rank adapters as two tensors, and the memory of what they were made of.

Stacks are copies, so they are worth keeping where adapters are only run. Kept ones show when they are stale: each
tensor that an adapter computes with is remembered by identity, version and address, and each of its plain attributes by
identity. What torch keeps no count of is not seen: a write into `tensor.data`, or by a fused kernel. An optimizer with
such kernels is heard by its hook (`peftkit.routing`).
"""

from collections.abc import Iterator, Sequence
from operator import attrgetter, is_
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftkit.adapter import LowRank, Shared

Pair = tuple[Tensor, Tensor] | None
"""`up` `[out, rank]` and `down` `[rank, in]`; None for no update."""


class Stacks(NamedTuple):
    """The factors of several adapters, each filled up to the largest rank."""

    down: Tensor
    """`[n, in, rank]`."""
    up: Tensor
    """`[n, rank, out]`."""


def factors_of(adapters: Sequence[LowRank | None]) -> tuple[list[Pair], float]:
    """The adapters' factors, and their scale; where scales differ, they are in the factors already."""
    given = [None if adapter is None else adapter("factors") for adapter in adapters]
    scales = [each[2] for each in given if each is not None]
    if all(isinstance(scale, float | int) and scale == scales[0] for scale in scales):
        return [each and each[:2] for each in given], scales[0]
    return [each and (each[0] * each[2], each[1]) for each in given], 1.0


def stacked(pairs: Sequence[Pair], dtype: torch.dtype) -> Stacks:
    """The pairs as one tensor each, in `dtype`, in the order given; one of them at least is not None."""
    like_up, like_down = next(pair for pair in pairs if pair is not None)
    rank = max(pair[0].shape[1] for pair in pairs if pair is not None)
    ups, downs = [], []
    for pair in pairs:
        up, down = pair or (like_up.new_zeros(len(like_up), rank), like_down.new_zeros(rank, like_down.shape[1]))
        missing = rank - len(down)
        ups.append(F.pad(up, (0, missing)) if missing else up)
        downs.append(F.pad(down, (0, 0, 0, missing)) if missing else down)
    return Stacks(torch.stack(downs).to(dtype).mT, torch.stack(ups).to(dtype).mT)


class Made:
    """Stacks, for one call."""

    def __init__(self, adapters: Sequence[LowRank], stacks: Stacks, scale: float) -> None:
        self.dtype, self.stacks, self.scale = stacks.up.dtype, stacks, scale
        self.drops = any(adapter.training and adapter.dropout for adapter in adapters)


class Kept(Made):
    """Stacks, with all that they were made of.

    Asked at every forward of every layer, so what there is to compare stands in lists, which are compared without a
    line of Python for each entry.
    """

    def __init__(self, adapters: Sequence[LowRank], stacks: Stacks, scale: float) -> None:
        super().__init__(adapters, stacks, scale)
        held = {(id(where), name): (where, name) for adapter in adapters for where, name in _held(adapter)}
        self.where = [where for where, _ in held.values()]
        self.names = [name for _, name in held.values()]
        self.values = [where.get(name) for where, name in held.values()]
        self.tensors = list({id(value): value for value in self.values if isinstance(value, Tensor)}.values())
        # Tensors of inference mode count no versions; hooks that gather parameters give other data at each call.
        hooked = any(m._forward_pre_hooks or m._forward_hooks for adapter in adapters for m in adapter.modules())
        self.shows_changes = not hooked and not any(tensor.is_inference() for tensor in self.tensors)
        if self.shows_changes:
            self.versions = [*map(_version, self.tensors)]
            self.addresses = [*map(Tensor.data_ptr, self.tensors)]
            # While the data lives in an alias too, no other data can get the same address.
            self.aliases = [tensor.detach() for tensor in self.tensors]

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """A copy of the model makes stacks of its own adapters."""
        return type(None), ()

    def is_fresh(self) -> bool:
        """Whether no tensor was changed in place, and no tensor or attribute replaced."""
        return (
            all(map(is_, map(dict.get, self.where, self.names), self.values))
            and [*map(_version, self.tensors)] == self.versions
            and [*map(Tensor.data_ptr, self.tensors)] == self.addresses
        )


_version = attrgetter("_version")
_OF_EVERY_MODULE = frozenset(vars(nn.Module())) - {"training"}


def _held(module: nn.Module) -> Iterator[tuple[dict[str, Any], str]]:
    """Where each tensor and plain attribute stands that an adapter computes with, those of shared state too."""
    if isinstance(module, LowRank):
        yield module.__dict__, "dropout"  # which may stand in the class until it is set
    for each in module.modules():
        for register in (each._parameters, each._buffers):
            yield from ((register, name) for name, value in register.items() if value is not None)
        own = each.__dict__
        for name, value in own.items():
            if name not in _OF_EVERY_MODULE:
                yield own, name
            if isinstance(value, Shared):
                yield from _held(value.state)
