"""HRA: the weight's inputs are reflected at learned hyperplanes, one after another (Yuan et al., arXiv:2405.17484).

Reflections come in pairs that start equal and so undo each other. For that to hold bit for bit, and to need no matrix
of the inputs' size squared, a pair is computed from what differs in it: with unit vectors u and v and d = v - u,

    (I - 2 u u^T) (I - 2 v v^T) = I - 2 (d - 2 (u·d) u) v^T + 2 u d^T
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

import peftkit


@dataclass(frozen=True)
class HRA(peftkit.Method):
    """`W H_1 H_2 … H_rank`, with `H_i = I - 2 u_i u_i^T / |u_i|^2`: it keeps the rows' lengths and angles.

    An embedding is reflected on its other side: each row of the table, in the space of the embedding's dimensions.

    Args:
        rank: the number of reflections; even, for an odd number of them cannot start as the identity.

    >>> import torch, peftkit
    >>> from peftkit_orthogonal.hra import HRA
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> model = peftkit.wrap(model, HRA(rank=4))
    >>> {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    {'0.adapters.default.weight.normals': (8, 4)}
    """

    name: ClassVar[str] = "hra"
    hf: ClassVar = peftkit.HuggingFace(
        peft_type="HRA",
        fields={"rank": "r"},
        tensors={"normals": "hra_u"},
        constants={"apply_GS": False},
        kinds=("Linear",),  # its Conv2d takes all kernels, strides and paddings for square, and knows no groups
        bias="hra_only",
        ignored={"init_weights": (True,)},
    )

    rank: int = 8

    def __post_init__(self) -> None:
        """Refuse values that would fail later, or do nothing."""
        self.require_whole("rank", least=2)
        self.require(self.rank % 2 == 0, "rank", "an even whole number")

    def adapter(self, site: peftkit.Site, shared: peftkit.Shared | None = None) -> "HRAAdapter":
        """The normals of the hyperplanes."""
        return HRAAdapter(site, self)


class HRAAdapter(peftkit.Adapter):
    """`normals` `[..., in, rank]`: a column is the normal of one hyperplane, of any length but zero."""

    def __init__(self, site: peftkit.Site, method: HRA) -> None:
        super().__init__(site)
        self.one_hot = site.one_hot
        width = site.fan_out if site.one_hot else site.fan_in
        if width == 1:
            raise peftkit.errors.UnsupportedLayerError(
                f"hra: {site.name} has a single input, which a pair of reflections cannot change; exclude it"
            )
        pairs = method.rank // 2
        bound = 1 / math.sqrt(pairs)  # as published; only their directions count, and how fast a step turns them
        normals = torch.empty(*site.batch, width, pairs).uniform_(-bound, bound)
        self.normals = site.parameter(normals.repeat_interleave(2, -1))

    def weight(self, w: Tensor) -> Tensor:
        left, right = (factor.to(w.dtype) for factor in self.product())
        rows = w.mT if self.one_hot else w
        change = (rows @ left) @ right
        return w + (change.mT if self.one_hot else change)

    def product(self) -> tuple[Tensor, Tensor]:
        """All reflections as `I + left @ right`, `[..., in, rank]` and `[..., rank, in]`; zero for equal pairs."""
        normals = self.normals.float() if self.normals.dtype in (torch.float16, torch.bfloat16) else self.normals
        units = (normals / normals.norm(dim=-2, keepdim=True)).unflatten(-1, (-1, 2))
        lefts: list[Tensor] = []
        rights: list[Tensor] = []
        for i in range(units.shape[-2]):
            u, v = units[..., i, :1], units[..., i, 1:]  # [..., in, 1]
            d = v - u
            # (I + L R) (I + l r) = I + L R + (l + L (R l)) r
            left, right = torch.cat([2 * (2 * (u * d).sum(-2, keepdim=True) * u - d), 2 * u], -1), torch.cat([v, d], -1)
            if lefts:
                left = left + torch.cat(lefts, -1) @ (torch.cat(rights, -1).mT @ left)
            lefts.append(left)
            rights.append(right)
        return torch.cat(lefts, -1), torch.cat(rights, -1).mT


@peftkit.hookimpl
def peftkit_methods() -> list[type[peftkit.Method]]:
    """The one method of this module."""
    return [HRA]
