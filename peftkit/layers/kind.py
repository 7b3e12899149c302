"""What a layer kind is: how one layer type stores its weights, seen as matrices, and how to run it fast.

A kind is written once and serves every method; a method is written once, against matrices, and works on
every kind. A kind holds no state: one instance serves every layer of its type, and it is copied and pickled
with the models whose layers it describes.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peftkit import products


class LayerKind(ABC):
    """How one layer type stores its weights as matrices `[..., out, in]`, and how to run low-rank updates fast.

    `serves` is the qualified name of the layer's class, so that a kind can be written for a class of a package
    that is never imported here. A subclass of that class is served too; if it has a `forward` of its own, only
    the generic path is used (the weight is replaced, the forward left alone).

    >>> import torch, peftkit
    >>> from peftkit.layers import Linear
    >>> layer = torch.nn.Linear(3, 5)
    >>> Linear().shape(layer, "weight")
    (5, 3)
    """

    serves: ClassVar[str]
    """Qualified name of the class, such as `"torch.nn.modules.linear.Linear"`."""

    family: ClassVar[str | None] = None
    """What role a layer plays by its type: `"linear"`, `"conv"`, `"embedding"`, `"norm"` or None."""

    one_hot: ClassVar[bool] = False
    """True where the input is an index, so that the matrix is applied to a one-hot vector."""

    lists: ClassVar[Mapping[str, str]] = {}
    """Attributes in which the layer holds its weights once more, as a list; each with the attribute of their names."""

    quantised: ClassVar[bool] = False
    """Whether the layer stores something else than its weight's values, which `values` reads. Nothing then takes the
    weight's place: `plain` runs the layer as it is, and what adapters change is added to its output.
    """

    fixed: ClassVar[str] = ""
    """Of a quantised kind whose layers can hold no plain weight: why, and what to do where one is needed."""

    @abstractmethod
    def weights(self, layer: Any) -> Mapping[str, str | None]:
        """Names of the weights that can be adapted, each with the name of the bias that it goes with, or None."""

    @abstractmethod
    def shape(self, layer: Any, weight: str) -> tuple[int, ...]:
        """The shape `[..., out, in]` of `weight` as a matrix, from the layer's features and not from the tensor."""

    def stored_size(self, layer: Any, weight: str) -> int | None:
        """How many elements `weight` must hold; another number (a packed 4-bit weight, say) means another kind."""
        return math.prod(self.shape(layer, weight))

    @property
    def label(self) -> str:
        """What files and declarations call the kind: a quantised one goes by the name of the one that it extends."""
        return next(each.__name__ for each in type(self).__mro__ if not getattr(each, "quantised", False))

    def fits(self, layer: Any, weight: str, raw: Tensor) -> bool:
        """Whether `raw`, which the layer holds, is what the kind takes it for."""
        elements = getattr(raw, "ds_numel", None) or raw.numel()  # it is empty under ZeRO-3
        return raw.is_floating_point() and elements == self.stored_size(layer, weight)

    def dtype(self, layer: Any, weight: str, raw: Tensor) -> torch.dtype:
        """The dtype of `values`, without computing them."""
        return raw.dtype

    def values(self, layer: Any, weight: str, raw: Tensor) -> Tensor:
        """The numbers that `raw` stands for, as an unquantised layer would store them; plain ones as they are."""
        return raw

    def matrix(self, layer: Any, weight: str, w: Tensor) -> Tensor:
        """View `w`, as the layer stores it, as a matrix `[..., out, in]`."""
        return w

    def restore(self, layer: Any, weight: str, m: Tensor) -> Tensor:
        """Undo `matrix`: view `m` as the layer stores it."""
        return m

    def fuses(self, layer: Any) -> bool:
        """Whether `plain` and `low_rank` can serve this layer with the options that it has."""
        return False

    def plain(self, layer: Any, x: Any, w: Tensor, b: Tensor | None) -> Tensor:  # pragma: no cover
        """The layer's own output for input `x`, weight `w` and bias `b`: the same operations as its `forward`."""
        raise NotImplementedError

    def low_rank(
        self, layer: Any, x: Any, up: Tensor, down: Tensor, scale: float, dropout: float
    ) -> Tensor:  # pragma: no cover
        """What `scale * up @ down` adds to the layer's output for input `x`, without building that matrix.

        `up` is `[out, rank]`, `down` is `[rank, in]`, both in the output's dtype. `dropout` is the probability with
        which an element of the input is dropped, 0 outside training.
        """
        raise NotImplementedError

    def adapted(
        self, layer: Any, x: Any, w: Tensor, b: Tensor | None, up: Tensor, down: Tensor, scale: float, dropout: float
    ) -> Tensor:
        """`plain` plus `low_rank`, for a kind that can do both at once for less; the factors are in their own dtype.

        Called for a frozen `w`, and neither while compiling nor in functorch transforms. What it returns is a tensor of
        its own.
        """
        y = self.plain(layer, x, w, b)
        return y + self.low_rank(layer, x, up.to(y.dtype), down.to(y.dtype), scale, dropout)

    def added(self, layer: Any, x: Any, y: Tensor, up: Tensor, down: Tensor, scale: float, dropout: float) -> Tensor:
        """`y`, which came from `adapted`, plus the product of one more adapter; it may be written to."""
        return y + self.low_rank(layer, x, up.to(y.dtype), down.to(y.dtype), scale, dropout)

    def gained(self, layer: Any, x: Any, y: Tensor, b: Tensor | None, gain: Tensor) -> Tensor:
        """The output `gain * (y - b) + b`, for the output `y`, ours, and the factor `gain` `[out, 1]` of each row."""
        bias = None if b is None else self.per_output(layer, b)
        return products.gained(y, bias, self.per_output(layer, gain.squeeze(-1)))

    def per_output(self, layer: Any, v: Tensor) -> Tensor:
        """View `v` `[out]`, one value for each row of the matrix, so that it broadcasts against the layer's output."""
        return v

    def features(self, layer: Any) -> int | None:
        """How many features the layer puts out; None where it is no layer with an output of its own."""
        return None

    def rows(self, layer: Any, weight: str, x: Any) -> Tensor | None:
        """The vectors `[n, in]` that the matrix of `weight` is applied to when the layer gets the input `x`.

        For methods that start from data. None where the kind cannot say.
        """
        return None

    def handed(self, layer: Any, weight: str, w: Tensor) -> Tensor:
        """The adapted weight as the layer's forward gets it, when all else is done with it."""
        return w

    def __eq__(self, other: object) -> bool:
        """Kinds have no state, so one type is one kind, also after a copy."""
        return type(self) is type(other)

    def __hash__(self) -> int:
        return hash(type(self))

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class Parameter(LayerKind):
    """Any named parameter of any module: the last two dimensions are the matrix, leading ones are a batch.

    Serves what no other kind does, one parameter at a time and by its own path: fused expert weights, biases,
    norms. A vector of n elements is the matrix `[n, 1]`, so that a method that scales rows scales its elements.
    """

    serves = "torch.nn.modules.module.Module"

    def weights(self, layer: nn.Module) -> Mapping[str, str | None]:
        """Every parameter that the module itself holds."""
        return {name: None for name, p in layer._parameters.items() if p is not None}

    def shape(self, layer: nn.Module, weight: str) -> tuple[int, ...]:
        """The parameter's own shape, with vectors and scalars as columns."""
        raw: Any = layer._parameters[weight]
        if raw.dim() < 2:
            return (raw.numel(), 1)
        return tuple((raw.mT if _is_transposed(layer, raw) else raw).shape)

    def matrix(self, layer: nn.Module, weight: str, w: Tensor) -> Tensor:
        """View vectors and scalars as columns; transpose a stack that its module says is stored as `[in, out]`."""
        if w.dim() < 2:
            return w.reshape(-1, 1)
        return w.mT if _is_transposed(layer, w) else w

    def restore(self, layer: nn.Module, weight: str, m: Tensor) -> Tensor:
        """Undo `matrix`."""
        raw: Any = layer._parameters[weight]
        return m.mT if _is_transposed(layer, raw) else m.reshape(raw.shape)

    def features(self, layer: nn.Module) -> int | None:
        """The length of its vectors, for a module that holds nothing else, as a norm does."""
        own = [p for p in layer._parameters.values() if p is not None]
        lengths = {p.numel() for p in own if p.dim() == 1}
        return lengths.pop() if len(lengths) == 1 and all(p.dim() == 1 for p in own) else None


def _is_transposed(layer: nn.Module, w: Tensor) -> bool:
    """Whether fused expert weights are stored as `[experts, in, out]`: transformers marks these modules."""
    return w.dim() > 2 and getattr(layer, "is_transposed", False) is True
