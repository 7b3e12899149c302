"""The network that all bottleneck adapters share: down, a nonlinearity, up.

`up` is zero at the start, so a new adapter changes no output by a bit; `down` starts as a linear layer does.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peftkit
from peftkit_bottleneck.places import own_modules

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "leaky_relu": F.leaky_relu,
    "identity": lambda x: x,
}


@dataclass(frozen=True)
class Bottleneck(peftkit.Method):
    """The fields that all bottleneck adapters have.

    Args:
        reduction: the network is `features / reduction` wide.
        width: its width itself, instead of that.
        activation: relu, gelu, silu, tanh, sigmoid, leaky_relu or identity.
        dropout: probability with which an element of the bottleneck is dropped, in training.
        features: how many features the module puts out, for one of which that cannot be told.
        dim: the dimension of the output that holds them; by default the last, or the channels of a convolution.
    """

    scope: ClassVar[Any] = "modules"

    reduction: float = 16.0
    width: int | None = None
    activation: str = "relu"
    dropout: float = 0.0
    features: int | None = None
    dim: int | None = None

    def __post_init__(self) -> None:
        """Refuse values that would fail later, or do nothing."""
        self.require_number("reduction", above=0)
        self.require_whole("width", "features", optional=True)
        self.require_whole("dim", least=None, optional=True)
        self.require(self.activation in ACTIVATIONS, "activation", f"one of {', '.join(ACTIVATIONS)}")
        self.require_number("dropout", least=0, below=1)

    def width_for(self, features: int) -> int:
        """The width of the bottleneck on so many features: at least 1."""
        return self.width or max(1, int(features / self.reduction))


class Network(peftkit.Activation):
    """`up(activation(down(x)))`, computed in x's dtype. `forward` is the subclass's.

    `x` has as many features as the module puts out, unless `inputs` says otherwise.
    """

    def __init__(self, site: peftkit.Site, method: Bottleneck, inputs: int | None = None) -> None:
        super().__init__(site)
        features = method.features or site.features
        if features is None:
            raise peftkit.errors.UnsupportedLayerError(
                f"cannot tell how many features {site.path or 'the model'} ({type(site.layer).__name__}) puts out; "
                f"say it: {method.name}(features=…)"
            )
        self.where = f"{method.name} at {site.path or 'the model'}"
        self.inputs = inputs or features
        self.dim = feature_dim(site.layer) if method.dim is None else method.dim
        self.activation = method.activation
        self.dropout = method.dropout
        width = method.width_for(features)
        down = torch.empty(width, self.inputs).uniform_(-1, 1) / math.sqrt(self.inputs)
        self.down = site.parameter(down)
        self.down_bias = site.parameter(torch.zeros(width))
        self.up = site.parameter(torch.zeros(features, width))
        self.up_bias = site.parameter(torch.zeros(features))

    def delta(self, x: Tensor) -> Tensor:
        """What the network makes of `x`, whose dimension `dim` holds the features; in x's dtype."""
        if not -x.dim() <= self.dim < x.dim() or x.shape[self.dim] != self.inputs:
            raise peftkit.errors.UnsupportedLayerError(
                f"{self.where} expects {self.inputs} features in dimension {self.dim}, got shape {list(x.shape)}; "
                "say features= and dim= as they are"
            )
        last = x.movedim(self.dim, -1)
        hidden = F.linear(last, self.down.to(x.dtype), self.down_bias.to(x.dtype))
        hidden = F.dropout(ACTIVATIONS[self.activation](hidden), self.dropout, self.training)
        return F.linear(hidden, self.up.to(x.dtype), self.up_bias.to(x.dtype)).movedim(-1, self.dim).to(x.dtype)

    def after(self, output: Any) -> Any:
        """The output of a layer plus the network of it; of a tuple (an LSTM's, an attention's), the first element."""
        return on_first(output, lambda y: y + self.delta(y))


def on_first(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The output with its first tensor changed: itself, or the first element of a tuple (a packed sequence's data)."""
    if isinstance(output, Tensor):
        return change(output)
    if isinstance(output, (tuple, list)) and output:
        make = getattr(type(output), "_make", type(output))
        return make((on_first(output[0], change), *output[1:]))
    raise peftkit.errors.UnsupportedLayerError(
        f"a bottleneck adapter needs a tensor, or a tuple that begins with one; the layer returned "
        f"{type(output).__name__}"
    )


def feature_dim(module: nn.Module) -> int:
    """The dimension of a module's output that holds its features: what its last layer with a matrix says."""
    matrices = [m for m in own_modules(module) if any(p.dim() > 1 for p in m.parameters(recurse=False))]
    last = matrices[-1] if matrices else module
    return -1 - len(last.kernel_size) if isinstance(last, nn.modules.conv._ConvNd) else -1
