"""LoRA+: the factor at the output learns faster than the one at the input (Hayou et al., arXiv:2402.12354)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

import peftkit


@dataclass(frozen=True)
class LoRAPlus(peftkit.LoRA):
    """LoRA whose `up` has `ratio` times the learning rate; give the optimizer `peftkit.param_groups(model, lr=...)`.

    Args:
        ratio: learning rate of `up` over that of `down`. The other fields are LoRA's.

    >>> import torch, peftkit
    >>> from peftkit_adalora.lora_plus import LoRAPlus
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> model = peftkit.wrap(model, LoRAPlus(ratio=16.0))
    >>> [group["lr"] for group in peftkit.param_groups(model, lr=0.001)]
    [0.001, 0.016]
    """

    name: ClassVar[str] = "lora_plus"

    ratio: float = 16.0

    def __post_init__(self) -> None:
        """LoRA's own checks, and a ratio that trains."""
        super().__post_init__()
        self.require_number("ratio", above=0)

    def param_groups(
        self,
        parameters: Sequence[nn.Parameter],
        lr: float,
        adapters: Sequence[Any],
    ) -> list[dict[str, Any]]:
        """One group for each factor."""
        ups = {id(adapter.up) for adapter in adapters}
        return [
            {"params": [p for p in parameters if id(p) not in ups], "lr": lr},
            {"params": [p for p in parameters if id(p) in ups], "lr": lr * self.ratio},
        ]


@peftkit.hookimpl
def peftkit_methods() -> list[type[peftkit.Method]]:
    """The one method of this module."""
    return [LoRAPlus]
