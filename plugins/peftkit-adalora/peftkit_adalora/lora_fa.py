"""LoRA-FA: one factor is frozen as drawn, so that a layer's input need not be kept (Zhang et al., arXiv:2308.03303)."""

from dataclasses import dataclass
from typing import ClassVar

import peftkit
from peftkit.methods.lora import LoRAAdapter


@dataclass(frozen=True)
class LoRAFA(peftkit.LoRA):
    """LoRA with `down` frozen; on an embedding, whose roles are exchanged, with `up` frozen. The fields are LoRA's.

    Backward needs `x @ down.T`, `rank` numbers a token, and not `x` itself.

    >>> import torch, peftkit
    >>> from peftkit_adalora.lora_fa import LoRAFA
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> model = peftkit.wrap(model, LoRAFA(rank=2))
    >>> [name for name, p in model.named_parameters() if p.requires_grad]
    ['0.adapters.default.weight.up']
    """

    name: ClassVar[str] = "lora_fa"

    def adapter(self, site: peftkit.Site, shared: peftkit.Shared | None = None) -> LoRAAdapter:
        """LoRA's adapter, of which the factor that does not start at zero stays as it is."""
        adapter = LoRAAdapter(site, self)
        starts_at_zero_down = site.one_hot and self.init == "default"
        (adapter.up if starts_at_zero_down else adapter.down).requires_grad_(False)
        return adapter


@peftkit.hookimpl
def peftkit_methods() -> list[type[peftkit.Method]]:
    """The one method of this module."""
    return [LoRAFA]
