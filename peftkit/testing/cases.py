"""The models on which the kit tries a method: one for each layer kind and each option of it that has led to faults.

Every size is a multiple of 4, and not all are powers of two: a method that needs blocks finds them, and one that needs
square matrices has to say so in `declines`. Activations are smooth, so that a finite difference meets no kink.
"""

import dataclasses
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Example = tuple[Any, ...] | Mapping[str, Any]
Selects = Literal["layer", "matrix", "vector", "model"]

ROWS = 3
"""Samples in an example."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A small model with one layer kind in it, an example of its input, and what a method is to adapt there.

    An author of a layer kind adds one of their own: `check_method(method, cases=[*CASES, Case(...)])`.

    >>> import torch
    >>> from peftkit.testing import Case
    >>> case = Case("Linear, wide", lambda: torch.nn.Linear(4, 64), lambda: (torch.randn(3, 4),))
    >>> case.build()
    Case model(
      (layer): Linear(in_features=4, out_features=64, bias=True)
    )
    """

    name: str
    make: Callable[[], nn.Module] = dataclasses.field(repr=False)
    """Makes the layer (or with `selects="model"` the model), with random values from torch's default generator."""
    example: Callable[[], Example] = dataclasses.field(repr=False)
    """Makes positional arguments as a tuple, or keyword arguments as a mapping."""
    targets: Any = "layer"
    """The selector; None for the method's own default."""
    selects: Selects = "layer"
    """What `targets` stands for: a layer that has a kind; one parameter that is a matrix, or one that is a vector; or
    whatever the method's default targets find in a whole model."""
    modules: str = "layer"
    """The path of what a method that adapts whole modules surrounds, with `selects="layer"`."""
    device: str = "cpu"

    def build(self) -> nn.Module:
        """A new model with the same values each time, in eval mode."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(20)
            made = self.make()
        return (made if self.selects == "model" else Holder(made)).to(self.device).eval()

    def inputs(self) -> Example:
        """A new example with the same values each time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(30)
            made = self.example()
        moved: Example = mapped(made, lambda t: t.to(self.device))
        return moved


def mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The same structure of tuples and mappings, with `function` of each tensor in it."""
    if isinstance(value, Mapping):
        return {key: mapped(each, function) for key, each in value.items()}
    if isinstance(value, tuple):
        return tuple(mapped(each, function) for each in value)
    return function(value)


class Holder(nn.Module):
    """The layer inside a model, so that it has a path: `layer`."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any) -> Any:
        """The layer's own output."""
        return self.layer(*args)

    def _get_name(self) -> str:
        return "Case model"


class Experts(nn.Module):
    """Fused expert weights `[experts, out, in]`; each row of the input goes through all of them, weighted."""

    def __init__(self, experts: int, fan_in: int, fan_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, fan_out, fan_in) / fan_in**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """`[rows, in]` to `[rows, out]`."""
        share = torch.softmax(x[:, : len(self.weight)], -1)
        return torch.einsum("re,eoi,ri->ro", share, self.weight, x)


class SharedTwice(nn.Module):
    """One linear layer under two paths."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        """Through the layer, and through it again."""
        return self.second(torch.tanh(self.first(x)))  # type: ignore[no-any-return]


class Tied(nn.Module):
    """An embedding and an output head with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.head = nn.Linear(8, 16, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Scores of the next token from the present one."""
        return self.head(torch.tanh(self.embed(tokens)))  # type: ignore[no-any-return]


# ------------------------------------------------------------------------------------- a small language model


class Attention(nn.Module):
    """Causal self-attention with the projections' usual names."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width, bias=False)  # a bias of the keys would cancel in the softmax
        self.v_proj = nn.Linear(width, width)
        self.o_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """`x` is `[batch, tokens, width]`; `mask` is `[batch, 1, tokens, tokens]`, True where one may look."""
        q, k, v = (
            p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~mask, torch.finfo(q.dtype).min)
        return self.o_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class MLP(nn.Module):
    """A gated feed-forward network with the projections' usual names."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner)
        self.up_proj = nn.Linear(width, inner)
        self.down_proj = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., width]` to the same."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


class Block(nn.Module):
    """A transformer block, normalised before each part."""

    def __init__(self, width: int, inner: int, heads: int) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(width)
        self.self_attn = Attention(width, heads)
        self.post_attention_layernorm = nn.LayerNorm(width)
        self.mlp = MLP(width, inner)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """`[batch, tokens, width]` to the same."""
        x = x + self.self_attn(self.input_layernorm(x), mask)
        return x + self.mlp(self.post_attention_layernorm(x))  # type: ignore[no-any-return]


class LanguageModel(nn.Module):
    """A causal language model in plain torch, with the call conventions of transformers and no cache."""

    def __init__(self, vocabulary: int = 24, width: int = 16, inner: int = 24, heads: int = 2, blocks: int = 2) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocabulary, width)
        self.embed_positions = nn.Embedding(64, width)
        self.layers = nn.ModuleList(Block(width, inner, heads) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)

    def get_input_embeddings(self) -> nn.Embedding:
        """The layer that looks up tokens."""
        return self.embed_tokens

    def get_output_embeddings(self) -> nn.Linear:
        """The layer that scores them."""
        return self.lm_head

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Any:
        """The scores `[batch, tokens, vocabulary]`; with `labels`, the loss of the next token before them."""
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        tokens = x.shape[1]
        positions = torch.arange(tokens, device=x.device)[None] if position_ids is None else position_ids
        x = x + self.embed_positions(positions)
        mask = torch.ones(tokens, tokens, dtype=torch.bool, device=x.device).tril()[None, None]
        if attention_mask is not None:
            mask = mask & attention_mask.bool()[:, None, None, :]
        for block in self.layers:
            x = block(x, mask)
        logits = self.lm_head(self.norm(x))
        if labels is None:
            return logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return loss, logits


# ------------------------------------------------------------------------------------------------- the cases


def _x(*shape: int) -> Callable[[], Example]:
    return lambda: (torch.randn(ROWS, *shape),)


def _ids(rows: int = 16, tokens: int = 4) -> Callable[[], Example]:
    return lambda: (torch.randint(1, rows, (ROWS, tokens)),)


def _same_thrice(*shape: int) -> Callable[[], Example]:
    return lambda: (torch.randn(ROWS, *shape),) * 3


def _with_state(features: int = 4) -> Callable[[], Example]:
    return lambda: (torch.randn(ROWS, features), torch.randn(ROWS, 4))


def _transposed_linear() -> tuple[Case, ...]:
    """Transformers' Conv1D, where that package is installed; it is imported when the case is built, not before."""
    if importlib.util.find_spec("transformers") is None:
        return ()

    def make() -> nn.Module:
        from transformers.pytorch_utils import Conv1D

        return Conv1D(12, 8)  # type: ignore[no-untyped-call]

    return (Case("Conv1D", make, _x(4, 8)),)


def _attention() -> nn.Module:
    """Its biases start at zero, where a factor would have no effect and no gradient."""
    layer = nn.MultiheadAttention(8, 2, batch_first=True)
    with torch.no_grad():
        for bias in (layer.in_proj_bias, layer.out_proj.bias):
            bias.uniform_(-0.5, 0.5)
    return layer


CASES: tuple[Case, ...] = (
    Case("Linear", lambda: nn.Linear(8, 12), _x(8)),
    Case("Linear 3-d no bias", lambda: nn.Linear(12, 8, bias=False), _x(4, 12)),
    *_transposed_linear(),
    Case("Bilinear", lambda: nn.Bilinear(8, 4, 12), lambda: (torch.randn(ROWS, 8), torch.randn(ROWS, 4))),
    Case("Conv1d", lambda: nn.Conv1d(8, 12, 3, dilation=2, padding=2, groups=2), _x(8, 7)),
    Case("Conv2d", lambda: nn.Conv2d(4, 8, 3), _x(4, 5, 5)),
    Case("Conv2d strided groups", lambda: nn.Conv2d(8, 12, (3, 2), stride=(2, 1), groups=4, bias=False), _x(8, 5, 5)),
    Case(
        "Conv2d reflect",
        lambda: nn.Conv2d(4, 8, 3, padding=2, dilation=2, padding_mode="reflect"),
        _x(4, 5, 5),
    ),
    Case("Conv2d circular", lambda: nn.Conv2d(4, 8, 3, padding=1, padding_mode="circular"), _x(4, 5, 5)),
    Case("Conv2d pointwise", lambda: nn.Conv2d(8, 12, 1), _x(8, 3, 3)),
    Case("Conv3d", lambda: nn.Conv3d(4, 8, 2, groups=2), _x(4, 3, 3, 3)),
    Case("ConvTranspose1d", lambda: nn.ConvTranspose1d(8, 12, 3, stride=2, groups=2, dilation=2), _x(8, 5)),
    Case("ConvTranspose2d", lambda: nn.ConvTranspose2d(4, 8, 3, stride=2, output_padding=1), _x(4, 4, 4)),
    Case("ConvTranspose3d", lambda: nn.ConvTranspose3d(4, 8, 2, bias=False), _x(4, 3, 3, 3)),
    Case("Embedding", lambda: nn.Embedding(16, 8), _ids()),
    Case("Embedding padding_idx", lambda: nn.Embedding(16, 8, padding_idx=3), lambda: (torch.arange(9).reshape(3, 3),)),
    Case("EmbeddingBag", lambda: nn.EmbeddingBag(16, 8), _ids()),
    Case("MultiheadAttention", _attention, _same_thrice(4, 8), "layer.**"),
    Case(
        "MultiheadAttention separate",
        lambda: nn.MultiheadAttention(8, 2, kdim=4, vdim=12, batch_first=True),
        lambda: (torch.randn(ROWS, 4, 8), torch.randn(ROWS, 5, 4), torch.randn(ROWS, 5, 12)),
    ),
    Case(
        "TransformerEncoderLayer",
        lambda: nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, activation=F.gelu, batch_first=True),
        _x(4, 8),
        "layer.{self_attn,self_attn.out_proj,linear1,linear2}",
    ),
    Case("LSTM", lambda: nn.LSTM(8, 4, num_layers=2, bidirectional=True, batch_first=True), _x(4, 8)),
    Case("LSTM projected", lambda: nn.LSTM(8, 8, proj_size=4, batch_first=True), _x(4, 8)),
    Case("GRU", lambda: nn.GRU(8, 4, bias=False, batch_first=True), _x(4, 8)),
    Case("RNN", lambda: nn.RNN(8, 4, batch_first=True), _x(4, 8)),
    Case("LSTMCell", lambda: nn.LSTMCell(8, 4), lambda: (torch.randn(ROWS, 8), _with_state()())),
    Case("GRUCell", lambda: nn.GRUCell(8, 4), _with_state(8)),
    Case("RNNCell", lambda: nn.RNNCell(8, 4), _with_state(8)),
    Case("Parameter", lambda: Experts(2, 8, 12), _x(8), "layer.weight", "matrix"),
    Case("LayerNorm", lambda: nn.LayerNorm(8), _x(4, 8), "layer.weight", "vector"),
    Case("BatchNorm1d", lambda: nn.BatchNorm1d(8), _x(8), "layer.weight", "vector"),
    Case("bias", lambda: nn.Linear(8, 12), _x(8), "layer.bias", "vector"),
    Case("shared module", SharedTwice, _x(8), "layer.first", modules="layer.first"),
    Case("tied weights", Tied, _ids(), "layer.head", modules="layer.head"),
    Case("language model", LanguageModel, lambda: {"input_ids": torch.randint(24, (ROWS, 6))}, None, "model"),
)
"""One case for each layer kind and notable option, the whole model last."""
