"""Convolutions: one row of the matrix is one output channel's kernel, flattened.

With groups, row `o` holds the kernel over the inputs of its own group, so the matrix stays `[out, in / groups *
kernel]` and a low-rank update `up @ down` shares `down` among the groups.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.conv import _ConvNd

from peftkit.layers.kind import LayerKind

_POINTWISE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class _Conv(LayerKind):
    """What the convolutions of every dimension share."""

    family = "conv"

    def weights(self, layer: _ConvNd) -> Mapping[str, str | None]:
        """The weight, with the bias if there is one."""
        return {"weight": "bias"}

    def _kernel(self, layer: _ConvNd) -> tuple[int, ...]:
        return (layer.in_channels // layer.groups, *layer.kernel_size)

    def shape(self, layer: _ConvNd, weight: str) -> tuple[int, ...]:
        """`[out_channels, in_channels / groups * kernel elements]`."""
        return (layer.out_channels, math.prod(self._kernel(layer)))

    def matrix(self, layer: _ConvNd, weight: str, w: Tensor) -> Tensor:
        """Flatten each kernel into a row."""
        return w.flatten(1)

    def restore(self, layer: _ConvNd, weight: str, m: Tensor) -> Tensor:
        """Unflatten each row into a kernel."""
        return m.reshape(-1, *self._kernel(layer))

    def fuses(self, layer: _ConvNd) -> bool:
        """Always: padding modes, strides, dilation and groups are the layer's own."""
        return True

    def plain(self, layer: Any, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        """The convolution, with the layer's padding mode."""
        return layer._conv_forward(x, w, b)  # type: ignore[no-any-return]

    def low_rank(self, layer: Any, x: Tensor, up: Tensor, down: Tensor, scale: float, dropout: float) -> Tensor:
        """A convolution like the layer's to `groups * rank` channels, then a pointwise one to the output's."""
        if dropout:
            x = F.dropout(x, dropout)
        rank, groups = down.shape[0], layer.groups
        kernels = down.reshape(-1, *self._kernel(layer))
        if groups > 1:
            kernels = kernels.repeat(groups, *(1 for _ in kernels.shape[1:]))
        h = layer._conv_forward(x, kernels, None) * scale
        dims = len(layer.kernel_size)
        return _POINTWISE[dims](h, up.reshape(-1, rank, *(1 for _ in range(dims))), groups=groups)


class Conv1d(_Conv):
    """`nn.Conv1d`, with every stride, padding, dilation, groups and padding mode."""

    serves = "torch.nn.modules.conv.Conv1d"


class Conv2d(_Conv):
    """`nn.Conv2d`, with every stride, padding, dilation, groups and padding mode."""

    serves = "torch.nn.modules.conv.Conv2d"


class Conv3d(_Conv):
    """`nn.Conv3d`, with every stride, padding, dilation, groups and padding mode."""

    serves = "torch.nn.modules.conv.Conv3d"
