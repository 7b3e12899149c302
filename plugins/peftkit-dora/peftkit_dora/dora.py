"""DoRA: the length of each row of the weight is learned apart from its direction (Liu et al., arXiv:2402.09353)."""

import weakref
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

import peftkit
from peftkit.methods.lora import LoRAAdapter


@dataclass(frozen=True)
class DoRA(peftkit.LoRA):
    """`magnitude * V / |V|` by rows, with `V = W + alpha / rank * up @ down`; `magnitude` `[out, 1]` starts at `|W|`.

    The fields are LoRA's. As in the paper's section 4.3, no gradient flows through `|V|`.

    >>> import torch, peftkit
    >>> from peftkit_dora.dora import DoRA
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> model = peftkit.wrap(model, DoRA(rank=2))
    >>> [name for name, p in model.named_parameters() if p.requires_grad][-1]
    '0.adapters.default.weight.magnitude'
    """

    name: ClassVar[str] = "dora"
    hf: ClassVar = replace(
        peftkit.LoRA.hf,
        tensors={**peftkit.LoRA.hf.tensors, "magnitude": "lora_magnitude_vector"},
        one_hot={**peftkit.LoRA.hf.one_hot, "magnitude": "lora_magnitude_vector"},
        layouts={
            **peftkit.LoRA.hf.layouts,
            "": {"magnitude": "ab"},
            "conv": {**peftkit.LoRA.hf.layouts["conv"], "magnitude": "1 ab ones"},
        },
        kinds=("Linear", "Conv1D", "Conv1d", "Conv2d", "Conv3d", "Embedding"),
        constants={"use_dora": True},
    )

    def adapter(self, site: peftkit.Site, shared: peftkit.Shared | None = None) -> "DoRAAdapter":
        """LoRA's factors, and a magnitude for each row."""
        return DoRAAdapter(site, self)

    def from_factors(self, up: Tensor, down: Tensor) -> None:
        """No product alone is an adapter of this method: its magnitudes are relative to the weight."""


class DoRAAdapter(LoRAAdapter):
    """LoRA with a gain: as a factor of each row, it leaves the layer its fast path."""

    def __init__(self, site: peftkit.Site, method: DoRA) -> None:
        super().__init__(site, method)
        w = site.matrix()
        norm = self._norm(w)
        if not norm.is_meta and not norm.all():
            raise peftkit.errors.UnsupportedLayerError(
                f"dora: {int((norm == 0).sum())} rows of {site.name} are zero, so they have no direction; "
                "exclude this layer, or give it lora"
            )
        self.magnitude = site.parameter(norm)

    def gain(self, w: Tensor) -> Tensor:
        """`magnitude / |V|`."""
        return self.magnitude / self._norm(w)

    @torch.no_grad()
    def _norm(self, w: Tensor) -> Tensor:
        """The length of each row of `V`, `[..., out, 1]`, without building `V`.

        `|w + s U D|² = |w|² + 2 s <w Dᵀ, U> + s² <U (D Dᵀ), U>` by rows; `U D` is the product less its start.
        """
        up, down, s = self.factors()
        start = self.start()
        terms: list[tuple[float, Tensor, Tensor]] = [(s, up, down)] + ([] if start is None else [(-s, *start)])
        square = self._square(w)
        change = sum(2 * a * _rows(w @ d.mT, u) for a, u, d in terms)
        change = change + sum(a * b * _rows(u @ (d @ e.mT), v) for a, u, d in terms for b, v, e in terms)
        least = torch.finfo(w.dtype).eps ** 2 * square  # rounding can leave less than nothing of a row that cancels
        return torch.maximum(square + change, least).sqrt()

    def _square(self, w: Tensor) -> Tensor:
        """`|w|²` by rows; remembered for a weight that is still the same tensor, which nothing has written to since."""
        if not _has_identity(w):
            return _square(w)
        key = w._version, w.data_ptr(), w.shape, w.stride(), w.dtype
        known = _squares.get(self)
        if known is not None and known[0] == key and known[1] == StorageWeakRef(w.untyped_storage()):
            return known[2]
        square = _square(w)
        _squares[self] = key, StorageWeakRef(w.untyped_storage()), square
        return square


_squares: "weakref.WeakKeyDictionary[DoRAAdapter, tuple[Any, StorageWeakRef, Tensor]]" = weakref.WeakKeyDictionary()
"""Not in the adapters, to be neither copied nor pickled with them. A reference to a storage keeps no memory alive, and
no other storage equals it afterwards.
"""


def _has_identity(w: Tensor) -> bool:
    """Whether a tensor has memory of its own and counts what is written to it."""
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    return type(w) is Tensor and not (w.is_meta or w.is_inference())


def _square(w: Tensor) -> Tensor:
    return torch.linalg.vector_norm(w, dim=-1, keepdim=True).square()


def _rows(a: Tensor, b: Tensor) -> Tensor:
    """The product of each row of `a` with the same row of `b`, `[..., out, 1]`."""
    return (a * b).sum(-1, keepdim=True)


@peftkit.hookimpl
def peftkit_methods() -> list[type[peftkit.Method]]:
    """The one method of this module."""
    return [DoRA]
