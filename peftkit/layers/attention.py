"""`nn.MultiheadAttention`: its input projections. Its output projection is a linear layer of its own, `out_proj`."""

from collections.abc import Mapping
from typing import Any

from peftkit.layers.kind import LayerKind


class MultiheadAttention(LayerKind):
    """Packed, `in_proj_weight` is the matrix `[3 * embed, embed]`; otherwise query, key and value have one each."""

    serves = "torch.nn.modules.activation.MultiheadAttention"
    family = "attention"

    def weights(self, layer: Any) -> Mapping[str, str | None]:
        """The packed projection with its bias, or the three separate ones (which share a packed bias)."""
        if layer._qkv_same_embed_dim:
            return {"in_proj_weight": "in_proj_bias"}
        return {"q_proj_weight": None, "k_proj_weight": None, "v_proj_weight": None}

    def shape(self, layer: Any, weight: str) -> tuple[int, ...]:
        """`[3 * embed, embed]` packed; `[embed, embed]`, `[embed, kdim]` or `[embed, vdim]` separate."""
        fan_in = {"k_proj_weight": layer.kdim, "v_proj_weight": layer.vdim}.get(weight, layer.embed_dim)
        return ((3 if weight == "in_proj_weight" else 1) * layer.embed_dim, fan_in)

    def features(self, layer: Any) -> int:
        """The attention's own output, `embed_dim` wide."""
        return int(layer.embed_dim)
