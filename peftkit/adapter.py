"""What a method's author writes against: the site to adapt, and the three forms that an adapter can take.

Adapter      a function of the weight matrix        merges, unmerges, works on every layer kind
└ LowRank    gain * (W + scale * up @ down)          and has each layer kind's fast path
Activation   a function around the layer's forward   no weight form, so it does not merge
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from peftkit.layers.kind import LayerKind

_HALF = (torch.float16, torch.bfloat16)


@dataclasses.dataclass(eq=False)
class Site:
    """One weight of one layer, offered to a method for adaptation.

    `shape` is the weight's shape as a matrix, `[..., out, in]`, however the layer stores it. For a method that
    adapts whole modules (`Method.scope == "modules"`), `weight` is `"module"`, `kind` is None and `shape` is `()`.
    """

    path: str
    """Dotted path of the layer in the model; `""` for the model itself."""
    weight: str
    """The parameter's own name, such as `"weight"`."""
    layer: nn.Module
    kind: LayerKind | None
    shape: tuple[int, ...]
    dtype: torch.dtype
    """Of the adapter's parameters: the layer's, but float32 where the layer is half precision."""
    device: torch.device
    roles: frozenset[str] = frozenset()
    tied: tuple[str, ...] = ()
    """Other names of the same parameter elsewhere in the model."""
    unfrozen: bool = False
    """Set by `unfreeze`."""
    features: int | None = None
    """Of a module site: how many features the module puts out, where its last layer with a kind says so."""
    observed: "Observer | None" = None
    """What the method's observer has seen here; None without one, and on the meta device."""

    @property
    def name(self) -> str:
        """Path of the weight itself: `"encoder.0.fc.weight"`."""
        return f"{self.path}.{self.weight}" if self.path else self.weight

    @property
    def fan_out(self) -> int:
        """Rows of the matrix: how many outputs the weight has."""
        return self.shape[-2]

    @property
    def fan_in(self) -> int:
        """Columns of the matrix: how many inputs the weight has."""
        return self.shape[-1]

    @property
    def batch(self) -> tuple[int, ...]:
        """Leading dimensions: `()` for one matrix, `(experts,)` for a stack of them."""
        return self.shape[:-2]

    @property
    def one_hot(self) -> bool:
        """Whether the layer's input is an index, so that the matrix is applied to a one-hot vector."""
        return self.kind is not None and self.kind.one_hot

    def parameter(self, value: Tensor, *, requires_grad: bool = True) -> nn.Parameter:
        """`value` as a parameter with this site's dtype and device.

        Draw random values before calling it, on the default device: then one seed gives one adapter on every device.
        """
        return nn.Parameter(self.tensor(value), requires_grad=requires_grad)

    def tensor(self, value: Tensor) -> Tensor:
        """`value` with this site's dtype and device, for a frozen part of an adapter (`register_buffer`)."""
        if self.device.type == "meta" and type(value) is Tensor:
            with torch._C.DisableTorchFunction():  # or a rehearsal's device mode would be asked about each call
                return value.detach().to(device=self.device, dtype=self.dtype).contiguous()
        return value.detach().to(device=self.device, dtype=self.dtype).contiguous()

    def matrix(self) -> Tensor:
        """The base weight as a matrix `[..., out, in]`, detached, in this site's dtype.

        A copy where the dtypes differ or the base is quantised, a view of it otherwise: never write to it.
        """
        if self.kind is None:
            raise TypeError(f"{self.path or 'the model'} is adapted as a whole module; it has no matrix")
        raw = self.kind.values(self.layer, self.weight, getattr(self.layer, self.weight).detach())
        if self.device.type == "meta":
            raw = torch.empty_like(raw, device="meta")
        return self.kind.matrix(self.layer, self.weight, raw).to(device=self.device, dtype=self.dtype)

    def unfreeze(self) -> None:
        """Train the layer's own weight, in place."""
        self.unfrozen = True

    def on_meta(self) -> "Site":
        """The same site on the meta device, for a dry run."""
        site = Site.__new__(type(self))
        site.__dict__.update(self.__dict__, device=torch.device("meta"), unfrozen=False, observed=None)
        return site


class Shared:
    """A handle on the state that a method's sites share (`Method.shared`): `shared.state` is the module itself.

    It is no `nn.Module`, so that an adapter may keep it in an attribute and yet neither owns nor saves the state:
    that is held once, at the model, and saved once.
    """

    __slots__ = ("state",)

    def __init__(self, state: nn.Module) -> None:
        self.state: Any = state


class Observer:
    """What a method wants to see of the data before its adapter for one site is made; override what you need.

    `wrap(model, method, data=batches)` runs the bare model on the batches and feeds it; then `site.observed` is it.
    """

    def inputs(self, x: Tensor) -> None:
        """Rows `[n, in]` that the matrix was applied to in one forward, in the layer's dtype, detached."""

    def gradient(self, g: Tensor) -> None:
        """The gradient `[..., out, in]` of the loss of one batch by the matrix."""


def adapter_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of new adapter parameters on a weight of `dtype`: a half precision optimizer step loses small updates.

    >>> adapter_dtype(torch.bfloat16), adapter_dtype(torch.float64)
    (torch.float32, torch.float64)
    """
    return torch.float32 if dtype in _HALF or not dtype.is_floating_point else dtype


class Adapter(nn.Module, ABC):
    """The trainable parameters of one method at one site, and what they make of the weight.

    `weight` *defines* the method. It gets the matrix in the adapter's own dtype; whatever it returns is cast once to
    the layer's. It must be deterministic, and must not change `w` in place. With `weight` alone, a method runs
    on every layer kind, merges, unmerges and saves.
    """

    def __init__(self, site: Site) -> None:  # noqa: ARG002 - every adapter is made from a site; most need nothing more of it
        super().__init__()

    @abstractmethod
    def weight(self, w: Tensor) -> Tensor:
        """The adapted matrix, from the matrix `w` `[..., out, in]`; the same shape."""

    def bias(self, b: Tensor) -> Tensor:
        """The adapted bias, from the bias `b` `[out]` that goes with the weight. Not called where there is none."""
        return b

    def forward(self, form: str, *args: Any) -> Any:
        """Run one of the methods above through `__call__`, so that hooks which gather parameters (FSDP,
        ZeRO-3) fire.
        """
        return getattr(self, form)(*args)


class LowRank(Adapter):
    """`W + scale * up @ down`, each row times its `gain` if there is one: has a fast path on every layer kind that
    offers one.

    `dropout` acts on the input of `down`, in training only. Where only the weight form can run, it drops
    columns of `down` instead: the same input features for the whole batch.
    """

    dropout: float = 0.0

    @abstractmethod
    def factors(self) -> tuple[Tensor, Tensor, float]:
        """`(up [..., out, rank], down [..., rank, in], scale)`."""

    def gain(self, w: Tensor) -> Tensor | None:  # noqa: ARG002 - most have none
        """A factor `[..., out, 1]` for each row of the adapted matrix, given the matrix `w`; None for none.

        A method with a norm (DoRA) has one: it then keeps the fast path, where the factor multiplies the output.
        """
        return None

    def start(self) -> tuple[Tensor, Tensor] | None:
        """Frozen factors `(up, down)` to subtract, for a method whose product is not zero at the start.

        The base is then left alone, and the output at the start is bit for bit the base's: the same two products
        are computed from the same numbers, and cancel.
        """
        return None

    def weight(self, w: Tensor, keep: Tensor | None = None) -> Tensor:
        """`gain * (w + scale * (up @ (down * keep) - start))`; `keep` `[in]` is given by dropout in training only."""
        up, down, scale = self.factors()
        delta = up @ (down if keep is None else down * keep)
        start = self.start()
        if start is not None:
            delta = delta - start[0] @ start[1]
        adapted = w + scale * delta
        gain = self.gain(w)
        return adapted if gain is None else adapted * gain


class Activation(nn.Module, ABC):
    """Surrounds a layer's forward: for bottleneck adapters, prompts, routers. It has no weight form, so it
    does not merge.
    """

    def __init__(self, site: Site) -> None:  # noqa: ARG002 - as for Adapter
        super().__init__()

    @abstractmethod
    def forward(self, base: "Base", *args: Any, **kwargs: Any) -> Any:
        """The layer's new output. `base(*args, **kwargs)` runs the layer itself, and whatever was activated before."""


class Base:
    """What an `Activation` gets to call: the layer as it is without it.

    A small object of its own rather than a bound method, because the latter breaks `torch.compile(fullgraph=True)`.
    """

    __slots__ = ("call", "model", "names")

    def __init__(self, model: nn.Module, names: tuple[str, ...], call: Callable[..., Any]) -> None:
        self.model = model
        """The layer (for a method that adapts the whole model, the model)."""
        self.names = names
        """Names of its forward's parameters, in order, to turn positional arguments into named ones."""
        self.call = call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run it."""
        return self.call(self.model, *args, **kwargs)
