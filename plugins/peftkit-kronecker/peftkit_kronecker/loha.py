"""LoHa: the update is the elementwise product of two low-rank products (Hyeon-Woo et al., arXiv:2108.06098).

Its rank is up to `rank` squared, for the parameters of two products of that rank.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.modules.conv import _ConvNd

import peftkit


@dataclass(frozen=True)
class LoHa(peftkit.Method):
    """`W + alpha / rank * (up_1 @ down_1) * (up_2 @ down_2)`; it starts with `down_2` at zero.

    Args:
        rank: of each of the two products.
        alpha: the update is scaled by `alpha / rank`.
        tucker: on convolutions with kernels of more than one element, make each product of `up` `[rank, out]`, `down`
            `[rank, channels]` and a `core` `[rank, rank, kernel]`: fewer parameters (the paper's proposition 3).

    >>> import torch, peftkit
    >>> from peftkit_kronecker.loha import LoHa
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> model = peftkit.wrap(model, LoHa(rank=2))
    >>> [tuple(p.shape) for p in model.parameters() if p.requires_grad]
    [(8, 2), (2, 8), (8, 2), (2, 8)]
    """

    name: ClassVar[str] = "loha"
    hf: ClassVar = peftkit.HuggingFace(
        peft_type="LOHA",
        fields={"rank": "r", "alpha": "alpha", "tucker": "use_effective_conv2d"},
        tensors={
            "up_1": "hada_w1_a",
            "down_1": "hada_w1_b",
            "up_2": "hada_w2_a",
            "down_2": "hada_w2_b",
            "core_1": "hada_t1",
            "core_2": "hada_t2",
        },
        layouts={"conv": {"core_1": "a b kernel", "core_2": "a b kernel"}},
        kinds=("Linear", "Conv1d", "Conv2d"),
        patterns={"rank": "rank_pattern", "alpha": "alpha_pattern"},
        ignored={"init_weights": (True,)},
    )

    rank: int = 8
    alpha: float = 8.0
    tucker: bool = False

    def __post_init__(self) -> None:
        """Refuse values that would fail later, or do nothing."""
        self.require_whole("rank")
        self.require_not_zero("alpha")
        self.require_bool("tucker")

    def adapter(self, site: peftkit.Site, shared: peftkit.Shared | None = None) -> peftkit.Adapter:
        """The two products, of two or of three tensors each."""
        kernel = math.prod(site.layer.kernel_size) if isinstance(site.layer, _ConvNd) else 1
        return _TuckerLoHa(site, self, kernel) if self.tucker and kernel > 1 else _LoHa(site, self)


class _LoHa(peftkit.Adapter):
    def __init__(self, site: peftkit.Site, method: LoHa) -> None:
        super().__init__(site)
        self.scale = method.alpha / method.rank
        up, down = (*site.batch, site.fan_out, method.rank), (*site.batch, method.rank, site.fan_in)
        self.up_1 = site.parameter(_uniform(up, method.rank))
        self.down_1 = site.parameter(_uniform(down, site.fan_in))
        self.up_2 = site.parameter(_uniform(up, method.rank))
        self.down_2 = site.parameter(torch.zeros(down))

    def weight(self, w: Tensor) -> Tensor:
        return w + self.scale * (self.up_1 @ self.down_1) * (self.up_2 @ self.down_2)


class _TuckerLoHa(peftkit.Adapter):
    def __init__(self, site: peftkit.Site, method: LoHa, kernel: int) -> None:
        super().__init__(site)
        self.scale = method.alpha / method.rank
        channels = site.fan_in // kernel
        up, down, core = (method.rank, site.fan_out), (method.rank, channels), (method.rank, method.rank, kernel)
        self.core_1 = site.parameter(_uniform(core, method.rank * kernel))
        self.up_1 = site.parameter(_uniform(up, site.fan_out))
        self.down_1 = site.parameter(_uniform(down, channels))
        self.core_2 = site.parameter(_uniform(core, method.rank * kernel))
        self.up_2 = site.parameter(_uniform(up, site.fan_out))
        self.down_2 = site.parameter(torch.zeros(down))

    def weight(self, w: Tensor) -> Tensor:
        first = torch.einsum("ijk,io,jc->ock", self.core_1, self.up_1, self.down_1)
        second = torch.einsum("ijk,io,jc->ock", self.core_2, self.up_2, self.down_2)
        return w + self.scale * (first * second).flatten(1)


def _uniform(shape: tuple[int, ...], fan_in: int) -> Tensor:
    bound = 1 / math.sqrt(fan_in)
    return torch.empty(shape).uniform_(-bound, bound)


@peftkit.hookimpl
def peftkit_methods() -> list[type[peftkit.Method]]:
    """The one method of this module."""
    return [LoHa]
