"""IA3: one learned factor for each output of a layer, or for each input (Liu et al., arXiv:2205.05638)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.modules.conv import _ConvNd

import peftkit


@dataclass(frozen=True)
class IA3(peftkit.Method):
    """`diag(scale) @ W`, and the bias with it; or `W @ diag(scale)` where inputs are scaled. Every factor starts at 1.

    The paper scales the outputs of the keys' and values' projections, and the inputs of a feed-forward network's
    second layer. A convolution has a factor for each channel.

    Args:
        scale_inputs: scale what goes into the layer, not what comes out of it.

    >>> import torch, peftkit
    >>> from peftkit_scaling.ia3 import IA3
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
    >>> model = peftkit.wrap(model, {"0": IA3(), "2": IA3(scale_inputs=True)})
    >>> {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    {'0.adapters.default.weight.scale': (16, 1), '2.adapters.default.weight.scale': (1, 16)}
    """

    name: ClassVar[str] = "ia3"
    affine: ClassVar[bool] = True
    hf: ClassVar = peftkit.HuggingFace(
        peft_type="IA3",
        tensors={"scale": "ia3_l"},
        layouts={"conv": {"scale": "1 ab ones"}},
        kinds=("Linear", "Conv1D", "Conv2d", "Conv3d"),
        lists={"scale_inputs": "feedforward_modules"},
        ignored={"init_ia3_weights": (True,)},
    )

    scale_inputs: bool = False

    def __post_init__(self) -> None:
        """Refuse what is not a yes or a no."""
        self.require_bool("scale_inputs")

    def adapter(self, site: peftkit.Site, shared: peftkit.Shared | None = None) -> peftkit.Adapter:
        """The factors of one side of the weight."""
        return _Inputs(site) if self.scale_inputs else _Outputs(site)


class _Outputs(peftkit.Adapter):
    def __init__(self, site: peftkit.Site) -> None:
        super().__init__(site)
        self.scale = site.parameter(torch.ones(*site.batch, site.fan_out, 1))

    def weight(self, w: Tensor) -> Tensor:
        return w * self.scale

    def bias(self, b: Tensor) -> Tensor:
        """Scaled too: it is a part of the output."""
        return b * self.scale.squeeze(-1)


class _Inputs(peftkit.Adapter):
    """A convolution's row holds a kernel for each input channel of its own group; elsewhere there is one group, and a
    kernel is one number.
    """

    def __init__(self, site: peftkit.Site) -> None:
        super().__init__(site)
        conv = site.layer if isinstance(site.layer, _ConvNd) else None
        self.groups = conv.groups if conv else 1
        self.channels = conv.in_channels // conv.groups if conv else site.fan_in
        self.scale = site.parameter(torch.ones(*site.batch, 1, self.groups * self.channels))

    def weight(self, w: Tensor) -> Tensor:
        kernels = w.unflatten(-1, (self.channels, -1)).unflatten(-3, (self.groups, -1))
        scale = self.scale.unflatten(-1, (self.groups, 1, self.channels, 1)).squeeze(-5)
        return (kernels * scale).reshape(w.shape)  # [..., groups, out / groups, channels, kernel]


@peftkit.hookimpl
def peftkit_methods() -> list[type[peftkit.Method]]:
    """The one method of this module."""
    return [IA3]
