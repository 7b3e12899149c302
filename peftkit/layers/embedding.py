"""Embeddings: the stored weight is `[rows, dim]`; as a matrix `[dim, rows]` it is applied to one-hot vectors."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftkit import products
from peftkit.layers.kind import LayerKind


class Embedding(LayerKind):
    """`nn.Embedding`: out = embedding_dim, in = num_embeddings."""

    serves = "torch.nn.modules.sparse.Embedding"
    family = "embedding"
    one_hot = True

    def weights(self, layer: nn.Embedding) -> Mapping[str, str | None]:
        """The weight; an embedding has no bias."""
        return {"weight": None}

    def shape(self, layer: nn.Embedding, weight: str) -> tuple[int, ...]:
        """`[embedding_dim, num_embeddings]`."""
        return (layer.embedding_dim, layer.num_embeddings)

    def matrix(self, layer: nn.Embedding, weight: str, w: Tensor) -> Tensor:
        """Transpose."""
        return w.mT

    def restore(self, layer: nn.Embedding, weight: str, m: Tensor) -> Tensor:
        """Transpose back."""
        return m.mT

    def handed(self, layer: nn.Embedding, weight: str, w: Tensor) -> Tensor:
        """A sparse layer's gradient is made dense on its way back: transposes and casts know no sparse one."""
        if layer.max_norm is not None:
            w = w.clone()  # its forward shortens rows in place, and a method may have handed the base through
        if not (layer.sparse and w.requires_grad):
            return w
        return _DenseGradient.apply(w)  # type: ignore[no-untyped-call, no-any-return]

    def features(self, layer: nn.Embedding) -> int:
        """Its dimension."""
        return layer.embedding_dim

    def fuses(self, layer: nn.Embedding) -> bool:
        """Not with `max_norm` or `scale_grad_by_freq`: these act on whole rows of the adapted weight."""
        return layer.max_norm is None and not layer.scale_grad_by_freq

    def plain(self, layer: nn.Embedding, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        """The lookup of the rows of `w`."""
        return F.embedding(x, w, layer.padding_idx, sparse=layer.sparse)

    def low_rank(
        self, layer: nn.Embedding, x: Tensor, up: Tensor, down: Tensor, scale: float, dropout: float
    ) -> Tensor:
        """Look up columns of `down`, `[..., rank]`, then one product to `[..., dim]`."""
        delta = F.linear(self._low(layer, x, down, dropout) * scale, up)
        if layer.padding_idx is not None and torch.is_grad_enabled():
            # The padding row learns nothing, through `up` no more than through `down`.
            delta = torch.where((x == layer.padding_idx).unsqueeze(-1), delta.detach(), delta)
        return delta

    def adapted(
        self, layer: Any, x: Tensor, w: Tensor, b: Tensor | None, up: Tensor, down: Tensor, scale: float, dropout: float
    ) -> Tensor:
        """The product is added into the rows that were looked up."""
        return self.added(layer, x, self.plain(layer, x, w, b), up, down, scale, dropout)

    def added(self, layer: Any, x: Tensor, y: Tensor, up: Tensor, down: Tensor, scale: float, dropout: float) -> Tensor:
        """The product is added into `y`."""
        up, down = up.to(y.dtype), down.to(y.dtype)
        h = self._low(layer, x, down, dropout)
        if layer.padding_idx is not None and torch.is_grad_enabled():
            # The padding row learns nothing: what is added to it is added apart.
            is_padding = (x == layer.padding_idx).unsqueeze(-1)
            y = products.add(y, torch.where(is_padding, h, 0).detach(), up.detach(), scale, channel=-1)
            h = torch.where(is_padding, 0, h)
        return products.add(y, h, up, scale, channel=-1)

    def _low(self, layer: Any, x: Tensor, down: Tensor, dropout: float) -> Tensor:
        """Columns of `down`. Dropping an element of a one-hot input drops the token's whole update."""
        h = F.embedding(x, down.mT, layer.padding_idx)
        if dropout:
            h = h * F.dropout(torch.ones(x.shape, dtype=h.dtype, device=h.device), dropout).unsqueeze(-1)
        return h

    def gained(self, layer: nn.Embedding, x: Tensor, y: Tensor, b: Tensor | None, gain: Tensor) -> Tensor:
        """As for any layer; from the padding row, nothing is learned."""
        gained = super().gained(layer, x, y, b, gain)
        if layer.padding_idx is None or not torch.is_grad_enabled():
            return gained
        return torch.where((x == layer.padding_idx).unsqueeze(-1), gained.detach(), gained)


class EmbeddingBag(Embedding):
    """`nn.EmbeddingBag`: a lookup and its sum, mean or maximum."""

    serves = "torch.nn.modules.sparse.EmbeddingBag"

    def fuses(self, layer: Any) -> bool:
        """As for an embedding, and only where the bag is linear in its rows: not for a maximum."""
        return super().fuses(layer) and layer.mode != "max"

    def gained(self, layer: Any, x: Tensor, y: Tensor, b: Tensor | None, gain: Tensor) -> Tensor:
        """As for any layer: a bag leaves its padding out by itself."""
        return LayerKind.gained(self, layer, x, y, b, gain)

    def plain(self, layer: Any, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        """The bags of the rows of `w`."""
        return _bag(layer, x, w, sparse=layer.sparse)

    def low_rank(self, layer: Any, x: Tensor, up: Tensor, down: Tensor, scale: float, dropout: float) -> Tensor:
        """Bags of columns of `down`, `[bags, rank]`, then one product to `[bags, dim]`."""
        return F.linear(self._low(layer, x, down, dropout) * scale, up)

    def adapted(
        self, layer: Any, x: Tensor, w: Tensor, b: Tensor | None, up: Tensor, down: Tensor, scale: float, dropout: float
    ) -> Tensor:
        """The product is added into the bags."""
        return self.added(layer, x, self.plain(layer, x, w, b), up, down, scale, dropout)

    def added(self, layer: Any, x: Tensor, y: Tensor, up: Tensor, down: Tensor, scale: float, dropout: float) -> Tensor:
        """The product is added into `y`."""
        return products.add(y, self._low(layer, x, down.to(y.dtype), dropout), up.to(y.dtype), scale, channel=-1)

    def _low(self, layer: Any, x: Tensor, down: Tensor, dropout: float) -> Tensor:
        """Bags of columns of `down`. Dropout drops a token of a bag, and not the whole bag."""
        if not dropout:
            return _bag(layer, x, down.mT, sparse=False)
        keep = F.dropout(torch.ones(x.shape, dtype=down.dtype, device=down.device), dropout)
        if layer.padding_idx is not None:
            keep = keep * (x != layer.padding_idx)
        h = (F.embedding(x, down.mT, layer.padding_idx) * keep.unsqueeze(-1)).sum(-2)
        if layer.mode == "mean":
            counted = x.shape[-1] if layer.padding_idx is None else (x != layer.padding_idx).sum(-1, keepdim=True)
            h = h / (counted.clamp(min=1) if isinstance(counted, Tensor) else counted)
        return h


def _bag(layer: Any, x: Tensor, w: Tensor, *, sparse: bool) -> Tensor:
    options = {"include_last_offset": layer.include_last_offset, "padding_idx": layer.padding_idx}
    return F.embedding_bag(x, w, mode=layer.mode, sparse=sparse, **options)


class _DenseGradient(torch.autograd.Function):
    """The identity, whose backward makes a sparse gradient dense."""

    @staticmethod
    def forward(ctx: object, w: Tensor) -> Tensor:  # noqa: ARG004
        return w.view_as(w)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:  # noqa: ARG004
        return grad.to_dense() if grad.is_sparse else grad
