"""LoKr: the update is the Kronecker product of two small matrices (Yeh et al., arXiv:2309.14859)."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.modules.conv import _ConvNd

import peftkit


@dataclass(frozen=True)
class LoKr(peftkit.Method):
    """`W + alpha / rank * kron(first, second)`; it starts with `first` at zero.

    Outputs and input channels are each split into two whole factors, as near to each other as can be: `first` has the
    smaller ones, `second` the larger ones, and a convolution's kernels. `second` is a product of `rank` where that is
    less than half of its larger side, and a whole matrix elsewhere.

    Args:
        rank: of `second`.
        alpha: the update is scaled by `alpha / rank`.
        factor: how large the smaller factor of each split may be, -1 for no limit. Where it divides a number of outputs
            or inputs it is that factor itself.
        decompose_both: make `first` a product of `rank` too, where that is less than half of its larger side.
        tucker: on convolutions with kernels of more than one element, make `second` of `up` `[rank, out]`, `down`
            `[rank, channels]` and a `core` `[rank, rank, kernel]`, where it is a product.

    >>> import torch, peftkit
    >>> from peftkit_kronecker.lokr import LoKr
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 48), torch.nn.ReLU(), torch.nn.Linear(48, 2))
    >>> model = peftkit.wrap(model, LoKr(rank=2))
    >>> {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad and name[0] == "0"}
    ... # doctest: +NORMALIZE_WHITESPACE
    {'0.adapters.default.weight.first': (6, 8), '0.adapters.default.weight.second_up': (8, 2),
     '0.adapters.default.weight.second_down': (2, 8)}
    """

    name: ClassVar[str] = "lokr"
    hf: ClassVar = peftkit.HuggingFace(
        peft_type="LOKR",
        fields={
            "rank": "r",
            "alpha": "alpha",
            "factor": "decompose_factor",
            "decompose_both": "decompose_both",
            "tucker": "use_effective_conv2d",
        },
        tensors={
            "first": "lokr_w1",
            "first_up": "lokr_w1_a",
            "first_down": "lokr_w1_b",
            "second": "lokr_w2",
            "second_up": "lokr_w2_a",
            "second_down": "lokr_w2_b",
            "second_core": "lokr_t2",
        },
        layouts={"conv": {"second": "a - kernel", "second_core": "a b kernel"}},
        kinds=("Linear", "Conv2d"),  # its Conv1d is right in some shapes only
        patterns={"rank": "rank_pattern", "alpha": "alpha_pattern"},
        ignored={"init_weights": (True, "lycoris")},
    )

    rank: int = 8
    alpha: float = 8.0
    factor: int = -1
    decompose_both: bool = False
    tucker: bool = False

    def __post_init__(self) -> None:
        """Refuse values that would fail later, or do nothing."""
        self.require_whole("rank")
        self.require_not_zero("alpha")
        self.require_whole("factor", least=-1)
        self.require(self.factor != 0, "factor", "a whole number of at least 1, or -1")
        self.require_bool("decompose_both", "tucker")

    def adapter(self, site: peftkit.Site, shared: peftkit.Shared | None = None) -> "LoKrAdapter":
        """The two matrices, each whole or as a product."""
        return LoKrAdapter(site, self)


class LoKrAdapter(peftkit.Adapter):
    """Has `first`, or `first_up` and `first_down`; and `second`, or `second_up` and `second_down`, with a `second_core`
    between them or without.
    """

    first: Tensor  # [a, b]
    first_up: Tensor  # [a, rank]
    first_down: Tensor  # [rank, b]
    second: Tensor  # [c, d * kernel]
    second_up: Tensor  # [c, rank], or [rank, c] with a core
    second_down: Tensor  # [rank, d * kernel], or [rank, d] with a core
    second_core: Tensor  # [rank, rank, kernel]

    def __init__(self, site: peftkit.Site, method: LoKr) -> None:
        super().__init__(site)
        self.scale = method.alpha / method.rank
        rank = method.rank
        kernel = math.prod(site.layer.kernel_size) if isinstance(site.layer, _ConvNd) else 1
        (a, c), (b, d) = split(site.fan_out, method.factor), split(site.fan_in // kernel, method.factor)
        self.splits_first = method.decompose_both and rank < max(a, b) / 2
        self.splits_second = rank < max(c, d) / 2
        self.has_core = self.splits_second and method.tucker and kernel > 1
        shapes: dict[str, tuple[int, ...]]
        shapes = {"first_up": (a, rank), "first_down": (rank, b)} if self.splits_first else {"first": (a, b)}
        zero = next(iter(shapes))
        if self.has_core:
            shapes |= {"second_up": (rank, c), "second_down": (rank, d), "second_core": (rank, rank, kernel)}
        elif self.splits_second:
            shapes |= {"second_up": (c, rank), "second_down": (rank, d * kernel)}
        else:
            shapes |= {"second": (c, d * kernel)}
        for name, shape in shapes.items():
            bound = 0 if name == zero else 1 / math.sqrt(math.prod(shape[1:]))
            value = torch.empty(*site.batch, *shape).uniform_(-bound, bound)
            self.register_parameter(name, site.parameter(value))

    def weight(self, w: Tensor) -> Tensor:
        first = self.first_up @ self.first_down if self.splits_first else self.first
        if self.has_core:
            second = torch.einsum("ijk,io,jc->ock", self.second_core, self.second_up, self.second_down).flatten(1)
        else:
            second = self.second_up @ self.second_down if self.splits_second else self.second
        # Output i * c + k and input j * d + l get first[i, j] * second[k, l]: outputs (i, k), inputs (j, l).
        blocks = first[..., :, None, :, None] * second[..., None, :, None, :]
        return w + self.scale * blocks.reshape(w.shape)


def split(size: int, factor: int = -1) -> tuple[int, int]:
    """Two whole numbers whose product is `size`, as near to each other as `factor` allows; the smaller first.

    Where `factor` divides `size`, it is the first of them, whether it is the smaller or not.

    >>> split(128), split(128, 4), split(127), split(100, 7), split(100, 50)
    ((8, 16), (4, 32), (1, 127), (5, 20), (50, 2))
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    root = math.isqrt(size)
    small = max(n for n in range(1, (min(factor, root) if factor > 0 else root) + 1) if size % n == 0)
    return small, size // small


@peftkit.hookimpl
def peftkit_methods() -> list[type[peftkit.Method]]:
    """The one method of this module."""
    return [LoKr]
