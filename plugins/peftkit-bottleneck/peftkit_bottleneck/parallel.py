"""Parallel: a bottleneck network beside each MLP, on the MLP's input, added to its output (arXiv:2110.04366)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import peftkit
from peftkit_bottleneck.network import Bottleneck, Network, on_first
from peftkit_bottleneck.places import mlp_blocks

_POSITIONS = "its output has other positions than its input, so nothing of the input can be added there"
_INDICES = "its input is an index, and has no features"
_DECLINES = {
    **{f"Conv{transposed}{n}d": _POSITIONS for transposed in ("", "Transpose") for n in (1, 2, 3)},
    **dict.fromkeys(("Embedding", "EmbeddingBag"), _INDICES),
    "Bilinear": "it has two inputs",
}


@dataclass(frozen=True)
class Parallel(Bottleneck):
    """`f(x) + scale * up(activation(down(x)))` around a module `f`: a block that keeps the shape of its input, or a
    linear or recurrent layer.

    Args:
        reduction: as in `Bottleneck`, but 2 by default: a wide bottleneck, as published.
        scale: what the network's output is multiplied by.
        learn_scale: train that factor too, one for each module.

    The other fields are those of `Bottleneck`.

    >>> from peftkit.testing.cases import LanguageModel
    >>> [row.path for row in peftkit.plan(LanguageModel(), Parallel(scale=2.0)).rows]
    ['layers.0.mlp', 'layers.1.mlp']
    """

    name: ClassVar[str] = "parallel"
    default_targets: ClassVar[Any] = (mlp_blocks,)
    declines: ClassVar[Mapping[str, str]] = _DECLINES

    reduction: float = 2.0
    scale: float = 4.0
    learn_scale: bool = False

    def __post_init__(self) -> None:
        """As for all bottleneck adapters, and the scale."""
        super().__post_init__()
        self.require_not_zero("scale")
        self.require_bool("learn_scale")

    def adapter(self, site: peftkit.Site, shared: peftkit.Shared | None = None) -> peftkit.Activation:
        """One network a module."""
        for ancestor in type(site.layer).__mro__:
            if ancestor.__name__ in self.declines:
                raise peftkit.errors.UnsupportedLayerError(
                    f"parallel cannot stand beside {site.path} ({ancestor.__name__}): "
                    f"{self.declines[ancestor.__name__]}"
                )
        return _Parallel(site, self)


class _Parallel(Network):
    def __init__(self, site: peftkit.Site, method: Parallel) -> None:
        super().__init__(site, method, inputs=_inputs(site.layer))
        self.scale = site.parameter(torch.tensor(method.scale)) if method.learn_scale else method.scale

    def forward(self, base: Any, *args: Any, **kwargs: Any) -> Any:
        named = dict(zip(base.names, args, strict=False)) | kwargs
        residual = named.get("input_tensor")
        if isinstance(residual, Tensor):
            # BERT's output module gets the MLP's input to add it before it normalises; what is added to that input
            # there is added to the MLP's output.
            return base(**named | {"input_tensor": residual + self.scaled(residual)})
        x = next((value for value in named.values() if isinstance(value, Tensor)), None)
        if x is None:
            raise peftkit.errors.UnsupportedLayerError(f"{self.where} needs a module whose input is a tensor")
        return on_first(base(*args, **kwargs), lambda y: self.add(y, x))

    def scaled(self, x: Tensor) -> Tensor:
        """The network's output times the scale, in x's dtype."""
        scale = self.scale.to(x.dtype) if isinstance(self.scale, Tensor) else self.scale
        return self.delta(x) * scale

    def add(self, y: Tensor, x: Tensor) -> Tensor:
        """The module's output `y` and what the network makes of its input `x`."""
        beside = self.scaled(x)
        if beside.shape != y.shape:
            raise peftkit.errors.UnsupportedLayerError(
                f"{self.where} stands beside a module that keeps the positions of its input; this one makes "
                f"{list(y.shape)} of {list(x.shape)}"
            )
        return y + beside.to(y.dtype)


def _inputs(layer: nn.Module) -> int | None:
    """How many features a linear or recurrent layer takes; None for a block, which takes as many as it puts out."""
    sizes = (getattr(layer, name, None) for name in ("in_features", "input_size", "nx"))  # nx: transformers' Conv1D
    return next((size for size in sizes if isinstance(size, int)), None)


@peftkit.hookimpl
def peftkit_methods() -> list[type[peftkit.Method]]:
    """The one method of this module."""
    return [Parallel]
