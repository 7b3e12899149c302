"""Makes an adapter such as servers of many adapters take it: plain low-rank products, of one rank and one scale.

vLLM reads HF PEFT's folders, and of their configuration `r` and `lora_alpha` alone: a folder whose layers differ in
rank or scale would load there and compute something else. Here ranks are filled up with zeros and scales are folded
into the factors. What is no sum of low-rank products is refused.
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from peftkit.adapter import Activation, Adapter, LowRank
from peftkit.errors import FileError
from peftkit.install import build
from peftkit.installed import Placement
from peftkit.method import Method
from peftkit.resolve import site_of

MAX_RANK = 512
"""The largest rank that vLLM can be started for."""

_KINDS = ("Linear", "Embedding")


def even(placements: Sequence[Placement]) -> list[Placement]:
    """The same adapter with one rank and one scale for all layers; as it is, where it has that already.

    Raises `FileError` for what no sum of low-rank products is, and for layers that are not served.
    """
    factors = [_factors(placement) for placement in placements]
    rank = max(down.shape[-2] for _, down in factors)
    if rank > MAX_RANK:
        raise FileError(f"vLLM serves ranks up to {MAX_RANK}, and this adapter has {rank}")
    keys = {placement.method.key for placement in placements}
    if len(keys) == 1 and all(p.adapter.start() is None for p in placements if isinstance(p.adapter, LowRank)):
        return list(placements)
    return [
        _replaced(p, _wider(up, rank, -1), _wider(down, rank, -2))
        for p, (up, down) in zip(placements, factors, strict=True)
    ]


def _factors(placement: Placement) -> tuple[Tensor, Tensor]:
    """`up` and `down` with scale and start in them."""
    adapter = placement.adapter
    if not isinstance(adapter, LowRank) or type(adapter).gain is not LowRank.gain:
        raise FileError(f"vLLM serves sums of low-rank products, and {placement.method} at {placement.name} is none")
    site = site_of(placement.path, placement.layer, placement.weight)
    kind = type(site.kind).__name__
    if kind not in _KINDS:
        raise FileError(f"vLLM serves adapters of {' and '.join(_KINDS)}, and {placement.name} is of {kind}")
    up, down, scale = adapter.factors()
    start = adapter.start()
    if start is not None:
        up, down = torch.cat([up, -start[0]], -1), torch.cat([down, start[1]], -2)
    return (up * scale).detach(), down.detach()


def _wider(factor: Tensor, rank: int, dim: int) -> Tensor:
    """Filled up with zeros."""
    shape = list(factor.shape)
    shape[dim] = rank - shape[dim]
    return torch.cat([factor, factor.new_zeros(shape)], dim)


def _replaced(placement: Placement, up: Tensor, down: Tensor) -> Placement:
    made: tuple[Method, dict[str, Tensor]] | None = placement.method.from_factors(up, down)
    if made is None:
        raise FileError(
            f"{placement.method} at {placement.name} has no form in which one rank and scale serve all layers"
        )
    method, state = made
    site = site_of(placement.path, placement.layer, placement.weight).on_meta()
    adapter: Adapter | Activation | None = build(site, method)
    for name, value in state.items():
        adapter.register_parameter(name, nn.Parameter(value.contiguous(), requires_grad=False))  # type: ignore[union-attr]
    return dataclasses.replace(placement, method=method, adapter=adapter)
