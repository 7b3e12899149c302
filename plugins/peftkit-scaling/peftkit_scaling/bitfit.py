"""BitFit: a learned change of each bias, and of nothing else (Ben Zaken et al., arXiv:2106.10199)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

import peftkit


@dataclass(frozen=True)
class BitFit(peftkit.Method):
    """`b + change`, with a change that starts at zero.

    It has no hyperparameters. Its default targets are the vectors that have "bias" in their name; others can be given
    by their paths. The bias itself stays as it was, so that the change can be switched off, saved and merged.

    >>> import torch, peftkit
    >>> from peftkit_scaling.bitfit import BitFit
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 2))
    >>> model = peftkit.wrap(model, BitFit())
    >>> [name for name, p in model.named_parameters() if p.requires_grad]
    ['0.adapters.default.bias.change', '1.adapters.default.bias.change', '2.adapters.default.bias.change']
    """

    name: ClassVar[str] = "bitfit"
    matrices: ClassVar[bool] = False
    vectors: ClassVar[bool] = True
    affine: ClassVar[bool] = True
    default_targets: ClassVar[str] = "*bias*"

    def adapter(self, site: peftkit.Site, shared: peftkit.Shared | None = None) -> peftkit.Adapter:
        """The change of one vector."""
        return _Change(site)


class _Change(peftkit.Adapter):
    def __init__(self, site: peftkit.Site) -> None:
        super().__init__(site)
        self.change = site.parameter(torch.zeros(site.shape))

    def weight(self, w: Tensor) -> Tensor:
        return w + self.change


@peftkit.hookimpl
def peftkit_methods() -> list[type[peftkit.Method]]:
    """The one method of this module."""
    return [BitFit]
