"""Houlsby: a bottleneck network after the attention and after the MLP of each block (arXiv:1902.00751)."""

from dataclasses import dataclass
from typing import Any, ClassVar

import peftkit
from peftkit_bottleneck.network import Bottleneck, Network
from peftkit_bottleneck.places import output_projections


@dataclass(frozen=True)
class Houlsby(Bottleneck):
    """`y + up(activation(down(y)))` on the output `y` of every projection back into the residual stream.

    The fields are those of `Bottleneck`.

    >>> import torch, peftkit
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
    >>> model = peftkit.wrap(model, Houlsby(width=3), targets="0")
    >>> {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad and "bias" not in name}
    {'0.adapters.default.module.down': (3, 8), '0.adapters.default.module.up': (8, 3)}
    """

    name: ClassVar[str] = "houlsby"
    default_targets: ClassVar[Any] = (output_projections,)

    def adapter(self, site: peftkit.Site, shared: peftkit.Shared | None = None) -> peftkit.Activation:
        """One network a module."""
        return _Houlsby(site, self)


class _Houlsby(Network):
    def forward(self, base: Any, *args: Any, **kwargs: Any) -> Any:
        return self.after(base(*args, **kwargs))


@peftkit.hookimpl
def peftkit_methods() -> list[type[peftkit.Method]]:
    """The one method of this module."""
    return [Houlsby]
