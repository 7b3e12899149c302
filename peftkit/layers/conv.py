"""Convolutions: one row of the matrix is one output channel's kernel, flattened.

With groups, row `o` holds the kernel over the inputs of its own group, so the matrix stays `[out, in / groups *
kernel]` and a low-rank update `up @ down` shares `down` among the groups.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from peftkit import kernels, products
from peftkit.layers.kind import LayerKind

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_FORWARDS = tuple(layer._conv_forward for layer in (nn.Conv1d, nn.Conv2d, nn.Conv3d))
_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


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

    def per_output(self, layer: _ConvNd, v: Tensor) -> Tensor:
        """A channel each, before the spatial dimensions."""
        return v.reshape(-1, *(1 for _ in layer.kernel_size))

    def features(self, layer: _ConvNd) -> int:
        """Its output channels."""
        return layer.out_channels

    def rows(self, layer: Any, weight: str, x: Tensor) -> Tensor | None:
        """Every patch of the input, as the layer's stride, dilation and padding cut it; a group's own, one by one.

        A convolution with the unit vectors for kernels cuts them out.
        """
        fan_in = self.shape(layer, weight)[1]
        units = torch.eye(fan_in, dtype=x.dtype, device=x.device).reshape(-1, *self._kernel(layer))
        x = x if x.dim() == len(layer.kernel_size) + 2 else x.unsqueeze(0)
        patches: Tensor = layer._conv_forward(x, units.repeat(layer.groups, *(1 for _ in units.shape[1:])), None)
        return patches.reshape(len(x), layer.groups, fan_in, -1).mT.reshape(-1, fan_in)

    def fuses(self, layer: Any) -> bool:
        """Where the layer convolves as torch does, with whatever padding mode, stride, dilation and groups.

        A subclass that standardizes its weight, say, would do it to the product as well.
        """
        return type(layer)._conv_forward in _FORWARDS

    def plain(self, layer: Any, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        """The convolution, with the layer's padding mode."""
        return layer._conv_forward(x, w, b)  # type: ignore[no-any-return]

    def low_rank(self, layer: Any, x: Tensor, up: Tensor, down: Tensor, scale: float, dropout: float) -> Tensor:
        """A convolution like the layer's to `groups * rank` channels, then a pointwise one to the output's."""
        if dropout:
            x = F.dropout(x, dropout)
        return _pointwise(layer, self.plain(layer, x, self._kernels(layer, down), None) * scale, up)

    def adapted(
        self, layer: Any, x: Tensor, w: Tensor, b: Tensor | None, up: Tensor, down: Tensor, scale: float, dropout: float
    ) -> Tensor:
        """The product is added into the layer's output; dropout keeps no copy of the input."""
        device = x.device.type
        if kernels.is_autocast(device) and torch.float64 not in (x.dtype, w.dtype):
            dtype = torch.get_autocast_dtype(device)
            with torch.autocast(device, enabled=False):  # one cast of the input, for the base and for the product
                return self.adapted(
                    layer, x.to(dtype), w.to(dtype), None if b is None else b.to(dtype), up, down, scale, dropout
                )
        if x.dim() == len(layer.kernel_size) + 1:  # without a batch: torch would put out a view
            return self.adapted(layer, x.unsqueeze(0), w, b, up, down, scale, dropout).squeeze(0)
        convolve = functools.partial(self.plain, layer)
        if layer.padding_mode != "zeros" and not dropout:  # padded once for both; what is dropped is dropped before
            x = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
            convolve = functools.partial(_unpadded, layer)
        y = convolve(x, w, b)
        return self._sum(layer, convolve, x, y, up, down, scale, dropout)

    def added(self, layer: Any, x: Tensor, y: Tensor, up: Tensor, down: Tensor, scale: float, dropout: float) -> Tensor:
        """The product is added into `y`."""
        if x.dim() == len(layer.kernel_size) + 1:
            return super().added(layer, x, y, up, down, scale, dropout)
        return self._sum(layer, functools.partial(self.plain, layer), x, y, up, down, scale, dropout)

    def _sum(
        self, layer: Any, convolve: Any, x: Tensor, y: Tensor, up: Tensor, down: Tensor, scale: float, dropout: float
    ) -> Tensor:
        def low(x: Tensor, down: Tensor) -> Tensor:
            return convolve(x, self._kernels(layer, down), None)  # type: ignore[no-any-return]

        h = products.dropped(low, x, down.to(y.dtype), dropout)
        return products.add(y, h, up.to(y.dtype), scale, groups=layer.groups)

    def _kernels(self, layer: Any, down: Tensor) -> Tensor:
        """The kernels of a convolution to `rank` channels for each group, the same for all."""
        kernels = down.reshape(-1, *self._kernel(layer))
        return kernels.repeat(layer.groups, *(1 for _ in kernels.shape[1:])) if layer.groups > 1 else kernels


def _unpadded(layer: Any, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """The convolution of an input that has its padding already."""
    return _CONVOLUTIONS[len(layer.kernel_size)](x, w, b, layer.stride, 0, layer.dilation, layer.groups)


def _pointwise(layer: Any, h: Tensor, up: Tensor) -> Tensor:
    """From `groups * rank` channels to the output's."""
    dims = len(layer.kernel_size)
    return _CONVOLUTIONS[dims](h, up.reshape(*up.shape, *(1 for _ in range(dims))), groups=layer.groups)


class Conv1d(_Conv):
    """`nn.Conv1d`, with every stride, padding, dilation, groups and padding mode."""

    serves = "torch.nn.modules.conv.Conv1d"


class Conv2d(_Conv):
    """`nn.Conv2d`, with every stride, padding, dilation, groups and padding mode."""

    serves = "torch.nn.modules.conv.Conv2d"


class Conv3d(_Conv):
    """`nn.Conv3d`, with every stride, padding, dilation, groups and padding mode."""

    serves = "torch.nn.modules.conv.Conv3d"


class _ConvTranspose(_Conv):
    """What the transposed convolutions of every dimension share: the weight is `[in, out / groups, kernel]`."""

    def matrix(self, layer: _ConvNd, weight: str, w: Tensor) -> Tensor:
        """Output channels, with the groups side by side, become rows; a group's input channels and kernels, columns."""
        w = w.reshape(layer.groups, -1, *w.shape[1:]).transpose(1, 2)  # [groups, out / groups, in / groups, kernel]
        return w.flatten(0, 1).flatten(1)

    def restore(self, layer: _ConvNd, weight: str, m: Tensor) -> Tensor:
        """Undo `matrix`."""
        w = m.reshape(layer.groups, -1, *self._kernel(layer)).transpose(1, 2)
        return w.flatten(0, 1)

    def rows(self, layer: Any, weight: str, x: Tensor) -> None:
        """Its matrix has rows for output channels, and its input is spread over them: no vector is its row's input."""

    def fuses(self, layer: Any) -> bool:
        """Always."""
        return True

    def plain(self, layer: Any, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        """The transposed convolution."""
        return _transposed(layer, x, w, b)

    def _kernels(self, layer: Any, down: Tensor) -> Tensor:
        """As for any convolution, stored as `[in / groups, rank, kernel]` for each group."""
        kernels = down.reshape(-1, *self._kernel(layer)).transpose(0, 1)
        return kernels.repeat(layer.groups, *(1 for _ in kernels.shape[1:])) if layer.groups > 1 else kernels


def _transposed(layer: Any, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    options = (layer.stride, layer.padding, layer.output_padding, layer.groups, layer.dilation)
    return _TRANSPOSED[len(layer.kernel_size)](x, w, b, *options)


class ConvTranspose1d(_ConvTranspose):
    """`nn.ConvTranspose1d`, with every stride, padding, output padding, dilation and groups."""

    serves = "torch.nn.modules.conv.ConvTranspose1d"


class ConvTranspose2d(_ConvTranspose):
    """`nn.ConvTranspose2d`, with every stride, padding, output padding, dilation and groups."""

    serves = "torch.nn.modules.conv.ConvTranspose2d"


class ConvTranspose3d(_ConvTranspose):
    """`nn.ConvTranspose3d`, with every stride, padding, output padding, dilation and groups."""

    serves = "torch.nn.modules.conv.ConvTranspose3d"
