"""Norm tuning: the vectors of normalisation layers are trained, and nothing else (Zhao et al., arXiv:2312.11420)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

import peftkit


@dataclass(frozen=True)
class LNTuning(peftkit.Method):
    """A trained copy in the place of each vector of a norm: its scale, and its shift if it has one.

    It has no hyperparameters. Any vector can be given by its path, or all those in a module by the module's.

    >>> import torch, peftkit
    >>> from peftkit_scaling.ln_tuning import LNTuning
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 2))
    >>> model = peftkit.wrap(model, LNTuning())
    >>> [name for name, p in model.named_parameters() if p.requires_grad]
    ['1.adapters.default.weight.value', '1.adapters.default.bias.value']
    """

    name: ClassVar[str] = "ln_tuning"
    scope: ClassVar = "parameters"
    matrices: ClassVar[bool] = False
    vectors: ClassVar[bool] = True
    affine: ClassVar[bool] = True
    default_targets: ClassVar[str] = "@norm"
    hf: ClassVar = peftkit.HuggingFace(
        peft_type="LN_TUNING", tensors={"value": "ln_tuning_layers.{weight}"}, layouts={"": {"value": "stored"}}
    )

    def adapter(self, site: peftkit.Site, shared: peftkit.Shared | None = None) -> peftkit.Adapter:
        """The copy of one vector."""
        return _Copy(site)


class _Copy(peftkit.Adapter):
    def __init__(self, site: peftkit.Site) -> None:
        super().__init__(site)
        self.value = site.parameter(site.matrix().clone())

    def weight(self, w: Tensor) -> Tensor:
        """The copy, whatever the base is."""
        return self.value


@peftkit.hookimpl
def peftkit_methods() -> list[type[peftkit.Method]]:
    """The one method of this module."""
    return [LNTuning]
