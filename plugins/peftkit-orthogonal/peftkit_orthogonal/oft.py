"""OFT: the weight's inputs are rotated, block by block (Qiu et al., arXiv:2306.07280).

A rotation is made of a skew-symmetric generator Q, of which the part above the diagonal is trained. Exactly, it is the
Cayley transform R = (I - Q) (I + Q)^-1. By Neumann's series it is I + 2 Q + 2 Q^2 + … + Q^n, which needs no solver and
is orthogonal only nearly (Qiu et al., arXiv:2506.19847). As in HF PEFT, it turns the other way for the same Q.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

import peftkit


@dataclass(frozen=True)
class OFT(peftkit.Method):
    """`W R^T`, with R block-diagonal and orthogonal: it keeps the rows' lengths and the angles between them.

    An embedding is turned on its other side: each row of the table, in the space of the embedding's dimensions.

    Args:
        block_size: how many inputs are rotated with each other. At each site it is the divisor of the number of inputs
            that is nearest to this, the smaller of two, and at least 2.
        share_blocks: one rotation for all blocks.
        neumann: make the rotation by Neumann's series, without a solver.
        neumann_terms: how many terms of the series, the identity among them. An even number is nearer to orthogonal
            than the odd one after it: four terms are off by the order of Q^6, five by that of Q^4.
        constrained: keep the rotation small: after each step of the optimizer, the generator's norm at a site is cut
            to `eps / sqrt(blocks)` for each of its blocks.
        eps: see `constrained`.

    >>> import torch, peftkit
    >>> from peftkit_orthogonal.oft import OFT
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> model = peftkit.wrap(model, OFT(block_size=4))
    >>> {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    {'0.adapters.default.weight.generator': (2, 6)}
    """

    name: ClassVar[str] = "oft"
    hf: ClassVar = peftkit.HuggingFace(
        peft_type="OFT",
        fields={
            "block_size": "oft_block_size",
            "share_blocks": "block_share",
            "neumann": "use_cayley_neumann",
            "neumann_terms": "num_cayley_neumann_terms",
            "constrained": "coft",
            "eps": "eps",
        },
        tensors={"generator": "oft_R.weight"},
        one_hot={"generator": "oft_embedding_R.weight"},
        kinds=("Linear", "Embedding"),  # its Conv2d rotates overlapping patches, which is no rotation of the weight
        bias="oft_only",
        ignored={"init_weights": (True,)},
    )

    block_size: int = 32
    share_blocks: bool = False
    neumann: bool = False
    neumann_terms: int = 5
    constrained: bool = False
    eps: float = 6e-5

    def __post_init__(self) -> None:
        """Refuse values that would fail later, or do nothing."""
        self.require_whole("block_size", least=2)
        self.require_whole("neumann_terms", least=4)
        self.require_bool("share_blocks", "neumann", "constrained")
        self.require_number("eps", above=0)

    def adapter(self, site: peftkit.Site, shared: peftkit.Shared | None = None) -> "OFTAdapter":
        """The generators of one site's blocks."""
        return OFTAdapter(site, self)

    def after_step(self, adapters: Sequence[Any], shared: Any) -> None:
        """Where it is constrained, cut each generator back to the largest norm allowed."""
        for adapter in adapters if self.constrained else ():
            norm = math.sqrt(2) * adapter.generator.norm(dim=-1, keepdim=True)  # of the whole skew matrix
            limit = self.eps / math.sqrt(adapter.generator.shape[-2])
            adapter.generator.mul_(torch.where(norm > limit, limit / norm, 1))


class OFTAdapter(peftkit.Adapter):
    """`generator` `[..., blocks, size * (size - 1) / 2]`: what stands above the diagonal of each Q, row by row."""

    def __init__(self, site: peftkit.Site, method: OFT) -> None:
        super().__init__(site)
        self.one_hot = site.one_hot
        self.terms = method.neumann_terms if method.neumann else 0
        width = site.fan_out if site.one_hot else site.fan_in
        if width == 1:
            raise peftkit.errors.UnsupportedLayerError(
                f"oft: {site.name} has a single input, which nothing can be rotated with; exclude it"
            )
        self.size = _block_size(width, method.block_size)
        self.blocks = width // self.size
        trained = 1 if method.share_blocks else self.blocks
        self.generator = site.parameter(torch.zeros(*site.batch, trained, self.size * (self.size - 1) // 2))

    def weight(self, w: Tensor) -> Tensor:
        turn = self.turn().to(w.dtype)
        rows, turn = (w.mT, turn) if self.one_hot else (w, turn.mT)
        parts = rows.unflatten(-1, (self.blocks, self.size)).transpose(-3, -2)  # [..., blocks, rows, size]
        change = (parts @ turn).transpose(-3, -2).flatten(-2)
        return w + (change.mT if self.one_hot else change)

    def turn(self) -> Tensor:
        """`R - I` `[..., blocks, size, size]`, or of the one block that all share; exactly zero where Q is."""
        vector = self.generator.float() if self.generator.dtype in (torch.float16, torch.bfloat16) else self.generator
        rows, columns = torch.triu_indices(self.size, self.size, 1, device=vector.device)
        upper = vector.new_zeros(*vector.shape[:-1], self.size, self.size)
        upper[..., rows, columns] = vector
        skew = upper - upper.mT
        if not self.terms:
            identity = torch.eye(self.size, dtype=skew.dtype, device=skew.device)
            return -2 * torch.linalg.solve(identity + skew, skew, left=False)
        power, total = skew, 2 * skew
        for _ in range(2, self.terms - 1):
            power = power @ skew
            total = total + 2 * power
        return total + power @ skew


def _block_size(width: int, wanted: int) -> int:
    """The divisor of the width nearest to the size wanted, 1 left out: a block of one cannot turn."""
    divisors = [size for size in range(2, width + 1) if width % size == 0]
    return min(divisors, key=lambda size: (abs(size - wanted), size))


@peftkit.hookimpl
def peftkit_methods() -> list[type[peftkit.Method]]:
    """The one method of this module."""
    return [OFT]
