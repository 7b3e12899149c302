"""Pfeiffer: a bottleneck network after the MLP of each block alone (arXiv:2005.00247)."""

from dataclasses import dataclass
from typing import Any, ClassVar

import peftkit
from peftkit_bottleneck.network import Bottleneck, Network
from peftkit_bottleneck.places import mlp_outputs


@dataclass(frozen=True)
class Pfeiffer(Bottleneck):
    """`y + up(activation(down(y)))` on the output `y` of the MLP: half as many networks as Houlsby has.

    The fields are those of `Bottleneck`.

    >>> import torch, peftkit
    >>> model = torch.nn.ModuleDict({"down_proj": torch.nn.Linear(8, 4)})
    >>> [row.path for row in peftkit.plan(model, Pfeiffer()).rows]
    ['down_proj']
    """

    name: ClassVar[str] = "pfeiffer"
    default_targets: ClassVar[Any] = (mlp_outputs,)

    def adapter(self, site: peftkit.Site, shared: peftkit.Shared | None = None) -> peftkit.Activation:
        """One network a module."""
        return _Pfeiffer(site, self)


class _Pfeiffer(Network):
    def forward(self, base: Any, *args: Any, **kwargs: Any) -> Any:
        return self.after(base(*args, **kwargs))


@peftkit.hookimpl
def peftkit_methods() -> list[type[peftkit.Method]]:
    """The one method of this module."""
    return [Pfeiffer]
