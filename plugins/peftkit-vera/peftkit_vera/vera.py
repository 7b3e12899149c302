"""VeRA: two frozen random matrices for all sites, two trained vectors for each (Kopiczko et al., arXiv:2310.11454)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import peftkit


@dataclass(frozen=True)
class VeRA(peftkit.Method):
    """`W + (b * B) @ (d * A)`, with vectors `b` `[out]` and `d` `[rank]` of the site's own.

    `A` `[rank, in]` and `B` `[out, rank]` are cut from two matrices as large as the largest site; they are drawn once
    and stand once in the file.

    Args:
        rank: width of the product. It costs one number a site, so it is large.
        start: the value that `d` starts with; `b` starts with zero.
        dropout: probability with which an element of the input is dropped, in training.

    >>> import torch, peftkit
    >>> from peftkit_vera.vera import VeRA
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> peftkit.plan(model, VeRA(rank=4), targets="**").trainable
    18
    """

    name: ClassVar[str] = "vera"
    hf: ClassVar = peftkit.HuggingFace(
        peft_type="VERA",
        fields={"rank": "r", "start": "d_initial", "dropout": "vera_dropout"},
        tensors={"b": "vera_lambda_b", "d": "vera_lambda_d"},
        shared={"A": "vera_A", "B": "vera_B"},
        kinds=("Linear", "Conv1D"),
        bias="vera_only",
        ignored={"projection_prng_key": None, "save_projection": (True,), "init_weights": (True,)},
    )

    rank: int = 256
    start: float = 0.1
    dropout: float = 0.0

    def __post_init__(self) -> None:
        """Refuse values that would fail later, or learn nothing."""
        self.require_whole("rank")
        self.require_not_zero("start")
        self.require_number("dropout", least=0, below=1)

    def shared(self, sites: Sequence[peftkit.Site]) -> nn.Module:
        """The two random matrices, for the largest site."""
        return Projections(sites, self.rank)

    def adapter(self, site: peftkit.Site, shared: Any = None) -> "VeRAAdapter":
        """Two vectors, and a handle on the matrices."""
        return VeRAAdapter(site, self, shared)


class Projections(nn.Module):
    """`A` `[rank, widest in]` and `B` `[widest out, rank]`: uniform, with the variance of a He initialisation."""

    def __init__(self, sites: Sequence[peftkit.Site], rank: int) -> None:
        super().__init__()
        fan_in, fan_out = max(site.fan_in for site in sites), max(site.fan_out for site in sites)
        self.register_buffer("A", sites[0].tensor(_uniform(rank, fan_in)))
        self.register_buffer("B", sites[0].tensor(_uniform(fan_out, rank)))


def _uniform(rows: int, columns: int) -> Tensor:
    bound = math.sqrt(6 / columns)
    return torch.empty(rows, columns).uniform_(-bound, bound)


class VeRAAdapter(peftkit.LowRank):
    """The vectors of one site; stacked weights have their own for each."""

    def __init__(self, site: peftkit.Site, method: VeRA, shared: peftkit.Shared) -> None:
        super().__init__(site)
        self.projections = shared
        self.dropout = method.dropout
        self.rows, self.columns = site.fan_out, site.fan_in
        self.b = site.parameter(torch.zeros(*site.batch, site.fan_out))
        self.d = site.parameter(torch.full((*site.batch, method.rank), float(method.start)))

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """The parts of the matrices that fit this site. `B` takes both vectors: `A` then is a constant.

        So nothing that trains is applied to the layer's input, which need not be kept for backward.
        """
        state = self.projections.state
        A, B = state.A[:, : self.columns].to(self.d), state.B[: self.rows].to(self.b)  # a site may be on another device
        return self.b.unsqueeze(-1) * self.d.unsqueeze(-2) * B, A.expand(*self.d.shape[:-1], -1, -1), 1.0


@peftkit.hookimpl
def peftkit_methods() -> list[type[peftkit.Method]]:
    """The one method of this module."""
    return [VeRA]
