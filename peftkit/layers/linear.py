"""Linear layers: `nn.Linear`, and transformers' `Conv1D`, which is one with its weight transposed."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftkit import kernels, products
from peftkit.layers.kind import LayerKind


class Linear(LayerKind):
    """`nn.Linear`: the weight `[out_features, in_features]` is its own matrix."""

    serves = "torch.nn.modules.linear.Linear"
    family = "linear"

    def weights(self, layer: nn.Linear) -> Mapping[str, str | None]:
        """The weight, with the bias if there is one."""
        return {"weight": "bias"}

    def shape(self, layer: nn.Linear, weight: str) -> tuple[int, ...]:
        """`[out_features, in_features]`."""
        return (layer.out_features, layer.in_features)

    def features(self, layer: Any) -> int:
        """The rows of its matrix."""
        return self.shape(layer, "weight")[0]

    def rows(self, layer: Any, weight: str, x: Tensor) -> Tensor:
        """The input with its leading dimensions flattened."""
        return x.reshape(-1, x.shape[-1])

    def fuses(self, layer: nn.Linear) -> bool:
        """Always."""
        return True

    def plain(self, layer: nn.Linear, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        """`x @ w.T + b`."""
        return F.linear(x, w, b)

    def low_rank(self, layer: nn.Linear, x: Tensor, up: Tensor, down: Tensor, scale: float, dropout: float) -> Tensor:
        """`x [..., in] -> [..., out]` by way of `[..., rank]`."""
        if dropout:
            x = F.dropout(x, dropout)
        # Flattened, because torch chooses its kernel for three dimensions by what requires grad, and rounds
        # accordingly.
        h = F.linear(x.reshape(-1, x.shape[-1]), down) * scale
        return F.linear(h, up).reshape(*x.shape[:-1], up.shape[0])

    def adapted(
        self, layer: Any, x: Tensor, w: Tensor, b: Tensor | None, up: Tensor, down: Tensor, scale: float, dropout: float
    ) -> Tensor:
        """The product is added into the layer's output, and dropout keeps no copy of the input."""
        return kernels.linear(x, self.matrix(layer, "weight", w), b, up, down, scale, dropout)

    def added(self, layer: Any, x: Tensor, y: Tensor, up: Tensor, down: Tensor, scale: float, dropout: float) -> Tensor:
        """The product is added into `y`."""
        h = products.dropped(F.linear, x.reshape(-1, x.shape[-1]), down.to(y.dtype), dropout)
        return products.add(y, h, up.to(y.dtype), scale, channel=-1)


class Bilinear(LayerKind):
    """`nn.Bilinear`: row `o` of the matrix is the form `[in1, in2]` of output `o`, flattened."""

    serves = "torch.nn.modules.linear.Bilinear"
    family = "linear"

    def weights(self, layer: nn.Bilinear) -> Mapping[str, str | None]:
        """The weight, with the bias if there is one."""
        return {"weight": "bias"}

    def shape(self, layer: nn.Bilinear, weight: str) -> tuple[int, ...]:
        """`[out_features, in1_features * in2_features]`."""
        return (layer.out_features, layer.in1_features * layer.in2_features)

    def matrix(self, layer: nn.Bilinear, weight: str, w: Tensor) -> Tensor:
        """Flatten each form into a row."""
        return w.flatten(1)

    def restore(self, layer: nn.Bilinear, weight: str, m: Tensor) -> Tensor:
        """Unflatten each row into a form."""
        return m.reshape(-1, layer.in1_features, layer.in2_features)

    def features(self, layer: nn.Bilinear) -> int:
        """The rows of its matrix."""
        return layer.out_features


class Conv1D(Linear):
    """transformers' `Conv1D` (GPT-2): a linear layer whose weight is stored as `[in, out]`."""

    serves = "transformers.pytorch_utils.Conv1D"

    def shape(self, layer: Any, weight: str) -> tuple[int, ...]:
        """`[nf, nx]`, in that class's own names."""
        return (int(layer.nf), int(layer.nx))

    def matrix(self, layer: Any, weight: str, w: Tensor) -> Tensor:
        """Transpose."""
        return w.mT

    def restore(self, layer: Any, weight: str, m: Tensor) -> Tensor:
        """Transpose back."""
        return m.mT

    def plain(self, layer: Any, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        """`x @ w + b`, by one `addmm` on the flattened input, as that class does it."""
        return torch.addmm(b, x.reshape(-1, x.shape[-1]), w).reshape(*x.shape[:-1], w.shape[1])  # type: ignore[arg-type]
