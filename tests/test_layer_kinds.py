"""Every layer kind, with every option of its layer, under every form that a method can take.

The reference knows nothing of peftkit's kinds: `as_matrix` and `as_weight` below say for each layer which matrix a weight
is, the method's formula is applied to it in float64, and a plain copy of the layer computes with the result
(`torch.func.functional_call`), autograd giving the gradients.
"""

import copy
import pickle
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import peftkit
from peftkit.errors import PeftkitError, SelectorError, StateError, UnsupportedLayerError

transformers = pytest.importorskip("transformers")
Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D

# What torch says of its own implementations, adapted or not.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
]

TOLERANCE = {
    # Relative to the largest value: chains of sums of some dozen terms, each rounded to 2**-53 or 2**-24 of itself.
    torch.float64: 1e-11,
    torch.float32: 1e-4,
}


# ---------------------------------------------------------------------------------------------- the methods


@dataclass(frozen=True)
class Twist(peftkit.Method):
    """Scale every row and rotate the outputs: a function of the weight that is no sum."""

    name: ClassVar[str] = "kinds-twist"
    vectors: ClassVar[bool] = True

    def adapter(self, site, shared=None):
        return TwistAdapter(site)


class TwistAdapter(peftkit.Adapter):
    def __init__(self, site):
        super().__init__(site)
        self.scale = site.parameter(torch.ones(site.fan_out, 1))
        self.angles = site.parameter(torch.zeros(site.fan_out, site.fan_out))

    def weight(self, w):
        skew = self.angles - self.angles.mT
        eye = torch.eye(len(skew), dtype=skew.dtype, device=skew.device)
        return torch.linalg.solve(eye + skew, eye - skew) @ (self.scale * w)


@dataclass(frozen=True)
class RowsAndBias(peftkit.Method):
    """Scale every row, and the bias that goes with the weight."""

    name: ClassVar[str] = "kinds-rows-and-bias"

    def adapter(self, site, shared=None):
        return RowsAndBiasAdapter(site)


class RowsAndBiasAdapter(peftkit.Adapter):
    def __init__(self, site):
        super().__init__(site)
        self.scale = site.parameter(torch.ones(site.fan_out, 1))

    def weight(self, w):
        return w * self.scale

    def bias(self, b):
        return b * self.scale.squeeze(1)


@dataclass(frozen=True)
class Untouched(peftkit.Method):
    """Return the very matrix that was given."""

    name: ClassVar[str] = "kinds-untouched"

    def adapter(self, site, shared=None):
        return UntouchedAdapter(site)


class UntouchedAdapter(peftkit.Adapter):
    def __init__(self, site):
        super().__init__(site)
        self.unused = site.parameter(torch.ones(1))

    def weight(self, w):
        return w


def formula(method, adapter, m):
    """`W'` as a matrix, from the tensors of one adapter."""
    if isinstance(method, peftkit.LoRA):
        return m + method.alpha / method.rank * torch.einsum("...or,...ri->...oi", adapter["up"], adapter["down"])
    if isinstance(method, Twist):
        skew = adapter["angles"] - adapter["angles"].T
        eye = torch.eye(len(skew), dtype=skew.dtype)
        return (eye + skew).inverse() @ (eye - skew) @ torch.diag(adapter["scale"][:, 0]) @ m
    if isinstance(method, RowsAndBias):
        return torch.diag(adapter["scale"][:, 0]) @ m
    return adapter["value"]


LORA, TWIST, FULL, COPY = peftkit.LoRA(rank=2, alpha=3.0), Twist(), peftkit.Full(), peftkit.Full(keep_base=True)
METHODS = {"lora": LORA, "twist": TWIST, "full": FULL, "copy": COPY, "frozen": peftkit.Frozen()}

PLUGIN = types.ModuleType("peftkit_kinds_plugin")
PLUGIN.peftkit_methods = peftkit.hookimpl(lambda: [Twist, RowsAndBias, Untouched])


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """The methods of this file as those of an installed package, for files name methods and never classes."""
    info = tmp_path / "peftkit_kinds-1.0.dist-info"
    info.mkdir()
    info.joinpath("METADATA").write_text("Metadata-Version: 2.1\nName: peftkit-kinds\nVersion: 1.0\n")
    lines = "".join(f"{method.name} = {PLUGIN.__name__}\n" for method in PLUGIN.peftkit_methods())
    info.joinpath("entry_points.txt").write_text(f"[peftkit.methods]\n{lines}")
    monkeypatch.setitem(sys.modules, PLUGIN.__name__, PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ----------------------------------------------------------------------------------- the layers as matrices


def as_matrix(layer, w):
    """The parameter `w` of `layer` as `[..., out, in]`, by loops and transposes that peftkit's kinds do not use."""
    if w.dim() < 2:
        return w[:, None]
    if isinstance(layer, (Conv1D, nn.Embedding, nn.EmbeddingBag)):
        return w.T
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        # The stored weight is [in, out / groups, kernel]; row o of the matrix belongs to output channel o.
        return torch.cat(
            [torch.stack([block[:, o].reshape(-1) for o in range(w.shape[1])]) for block in w.chunk(layer.groups)]
        )
    if isinstance(layer, (nn.modules.conv._ConvNd, nn.Bilinear)):
        return torch.stack([row.reshape(-1) for row in w])
    if getattr(layer, "is_transposed", False):
        return torch.stack([expert.T for expert in w])
    return w


def as_weight(layer, m, like):
    """The matrix `m` as the layer stores it, in the shape of `like`: the transpose of a linear map is its inverse here."""
    if like.dim() < 2:
        return m[:, 0]
    if isinstance(layer, (Conv1D, nn.Embedding, nn.EmbeddingBag)):
        return m.T
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        per_group = [
            torch.stack([row.reshape(-1, *like.shape[2:]) for row in block], dim=1) for block in m.chunk(layer.groups)
        ]
        return torch.cat(per_group)
    if getattr(layer, "is_transposed", False):
        return torch.stack([expert.T for expert in m])
    return m.reshape(like.shape)


# ------------------------------------------------------------------------------------------------ the layers


class Holder(nn.Module):
    """A model of one layer that passes everything on."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, *args, **kwargs):
        return self.layer(*args, **kwargs)


class Case(NamedTuple):
    """A layer, what is adapted in it, and how it is called."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[torch.Tensor, ...]]
    call: Callable[..., Any] = lambda model, *xs: model(*xs)
    select: Any = "layer"


def normal(*shapes):
    return lambda: tuple(torch.randn(shape, dtype=torch.float64) for shape in shapes)


def indices(rows, *shapes):
    """Indices below `rows`, each at most once in a tensor as far as there are enough."""
    return lambda: tuple(torch.randperm(max(rows, torch.Size(s).numel()))[: torch.Size(s).numel()].reshape(s) % rows
                         for s in shapes)  # fmt: skip


CASES: dict[str, Case] = {
    "linear": Case(lambda: nn.Linear(6, 5), normal((3, 4, 6))),
    "linear, no bias, one sample": Case(lambda: nn.Linear(6, 5, bias=False), normal((6,))),
    "linear, one output": Case(lambda: nn.Linear(6, 1), normal((3, 6))),
    "Conv1D": Case(lambda: Conv1D(5, 6), normal((3, 4, 6))),
    "bilinear": Case(lambda: nn.Bilinear(4, 3, 5), normal((2, 3, 4), (2, 3, 3))),
    "bilinear, no bias": Case(lambda: nn.Bilinear(4, 3, 5, bias=False), normal((2, 4), (2, 3))),
}

_SPACE = {1: (9,), 2: (7, 6), 3: (5, 6, 5)}
_CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSE = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_CONV_OPTIONS = {
    "plain": {},
    "no bias": {"bias": False},
    "stride": {"stride": 2},
    "padding": {"padding": 1},
    "same": {"padding": "same"},
    "same, even kernel, dilation": {"padding": "same", "kernel_size": 2, "dilation": 3},
    "valid": {"padding": "valid"},
    "dilation": {"dilation": 2},
    "groups": {"groups": 2},
    "depthwise": {"groups": 4, "out_channels": 4},
    "depthwise, two filters a channel": {"groups": 4, "out_channels": 8},
    "pointwise": {"kernel_size": 1},
    "circular": {"padding": 1, "padding_mode": "circular"},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "replicate": {"padding": 1, "padding_mode": "replicate"},
    "circular, same": {"padding": "same", "padding_mode": "circular"},
    "all of them": {"stride": 2, "padding": 2, "dilation": 2, "groups": 2, "padding_mode": "replicate"},
}
_TRANSPOSE_OPTIONS = {
    "plain": {},
    "no bias": {"bias": False},
    "stride": {"stride": 2},
    "padding": {"padding": 1},
    "output padding": {"stride": 3, "output_padding": 2},
    "dilation": {"dilation": 2},
    "groups": {"groups": 2},
    "depthwise": {"groups": 4, "out_channels": 4},
    "all of them": {"stride": 2, "padding": 1, "output_padding": 1, "dilation": 2, "groups": 2},
}


def _conv(cls, options):
    return cls(**({"in_channels": 4, "out_channels": 6, "kernel_size": 3} | options))


_IN_THREE_DIMENSIONS = ("plain", "same", "groups", "depthwise", "circular", "output padding", "all of them")
for _dims in (1, 2, 3):
    if _dims == 3:
        _CONV_OPTIONS = {name: _CONV_OPTIONS[name] for name in _IN_THREE_DIMENSIONS if name in _CONV_OPTIONS}
        _TRANSPOSE_OPTIONS = {
            name: _TRANSPOSE_OPTIONS[name] for name in _IN_THREE_DIMENSIONS if name in _TRANSPOSE_OPTIONS
        }
    for _name, _options in _CONV_OPTIONS.items():
        CASES[f"conv{_dims}d, {_name}"] = Case(
            lambda cls=_CONV[_dims], options=_options: _conv(cls, options), normal((2, 4, *_SPACE[_dims]))
        )
    for _name, _options in _TRANSPOSE_OPTIONS.items():
        CASES[f"transposed conv{_dims}d, {_name}"] = Case(
            lambda cls=_TRANSPOSE[_dims], options=_options: _conv(cls, options),
            normal((2, 4, *(s - 2 for s in _SPACE[_dims]))),
        )
    CASES[f"transposed conv{_dims}d, output_size"] = Case(
        lambda cls=_TRANSPOSE[_dims]: _conv(cls, {"stride": 2, "groups": 2}),
        normal((2, 4, *(3 for _ in _SPACE[_dims]))),
        lambda model, x: model(x, output_size=[8 for _ in x.shape[2:]]),
    )
CASES |= {
    "conv2d, one sample": Case(lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1)), normal((4, 7, 6))),
    "conv2d, rectangular, reflect": Case(
        lambda: nn.Conv2d(4, 6, (3, 2), padding=(2, 1), padding_mode="reflect"), normal((2, 4, 7, 6))
    ),
    "transposed conv2d, output_size by position": Case(
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=2), normal((2, 4, 3, 3)), lambda model, x: model(x, (8, 7))
    ),
}

CASES |= {
    "embedding": Case(lambda: nn.Embedding(9, 5), indices(9, (2, 4))),
    "embedding, padding_idx": Case(lambda: nn.Embedding(9, 5, padding_idx=3), indices(9, (2, 5))),
    "embedding, max_norm": Case(lambda: nn.Embedding(9, 5, max_norm=0.7), indices(9, (2, 5))),
    "embedding, max_norm 1": Case(lambda: nn.Embedding(9, 5, max_norm=0.7, norm_type=1.0), indices(9, (2, 5))),
    "embedding, scale_grad_by_freq": Case(lambda: nn.Embedding(9, 5, scale_grad_by_freq=True), indices(9, (2, 8))),
    "embedding, sparse": Case(lambda: nn.Embedding(9, 5, sparse=True), indices(9, (2, 6))),
    "embedding, sparse, padding_idx": Case(lambda: nn.Embedding(9, 5, padding_idx=0, sparse=True), indices(9, (2, 6))),
}
for _mode in ("sum", "mean", "max"):
    CASES |= {
        f"bag, {_mode}": Case(lambda mode=_mode: nn.EmbeddingBag(9, 5, mode=mode), indices(9, (3, 3))),
        f"bag, {_mode}, offsets": Case(
            lambda mode=_mode: nn.EmbeddingBag(9, 5, mode=mode),
            indices(9, (7,)),
            lambda model, x: model(x, torch.tensor([0, 3, 3, 5])),
        ),
        f"bag, {_mode}, offsets by name, last": Case(
            lambda mode=_mode: nn.EmbeddingBag(9, 5, mode=mode, include_last_offset=True),
            indices(9, (7,)),
            lambda model, x: model(x, offsets=torch.tensor([0, 3, 5, 7])),
        ),
        f"bag, {_mode}, padding_idx": Case(
            lambda mode=_mode: nn.EmbeddingBag(9, 5, mode=mode, padding_idx=2), indices(9, (3, 3))
        ),
    }
CASES |= {
    "bag, sparse": Case(lambda: nn.EmbeddingBag(9, 5, mode="sum", sparse=True), indices(9, (3, 3))),
    "bag, max_norm": Case(lambda: nn.EmbeddingBag(9, 5, mode="sum", max_norm=0.7), indices(9, (3, 3))),
    "bag, scale_grad_by_freq": Case(lambda: nn.EmbeddingBag(9, 5, scale_grad_by_freq=True), indices(9, (3, 4))),
    "bag, per_sample_weights": Case(
        lambda: nn.EmbeddingBag(9, 5, mode="sum"),
        lambda: (*indices(9, (3, 3))(), *normal((3, 3))()),
        lambda model, x, w: model(x, per_sample_weights=w),
    ),
    "bag, per_sample_weights and offsets": Case(
        lambda: nn.EmbeddingBag(9, 5, mode="sum", padding_idx=1),
        lambda: (*indices(9, (7,))(), *normal((7,))()),
        lambda model, x, w: model(x, torch.tensor([0, 4]), w),
    ),
}


def self_attention(model, x, **options):
    return model(x, x, x, **options)


def padding(x):
    mask = torch.zeros(x.shape[:2], dtype=torch.bool)
    mask[0, 3:] = True
    return mask


def attention(**options):
    return lambda: nn.MultiheadAttention(8, 2, **({"batch_first": True} | options))


_BOTH = ["layer", "layer.out_proj"]
CASES |= {
    "attention": Case(attention(), normal((2, 5, 8)), self_attention),
    "attention and out_proj": Case(attention(), normal((2, 5, 8)), self_attention, _BOTH),
    "attention, out_proj alone": Case(attention(), normal((2, 5, 8)), self_attention, "layer.out_proj"),
    "attention, sequence first": Case(attention(batch_first=False), normal((5, 2, 8)), self_attention, _BOTH),
    "attention, one sample": Case(attention(), normal((5, 8)), self_attention, _BOTH),
    "attention, no weights": Case(
        attention(), normal((2, 5, 8)), lambda m, x: self_attention(m, x, need_weights=False), _BOTH
    ),
    "attention, weights of every head": Case(
        attention(), normal((2, 5, 8)), lambda m, x: self_attention(m, x, average_attn_weights=False), _BOTH
    ),
    "attention, no bias": Case(attention(bias=False), normal((2, 5, 8)), self_attention, _BOTH),
    "attention, add_bias_kv": Case(attention(add_bias_kv=True), normal((2, 5, 8)), self_attention, _BOTH),
    "attention, add_zero_attn": Case(attention(add_zero_attn=True), normal((2, 5, 8)), self_attention, _BOTH),
    "attention, padding": Case(
        attention(), normal((2, 5, 8)), lambda m, x: self_attention(m, x, key_padding_mask=padding(x)), _BOTH
    ),
    "attention, causal": Case(
        attention(),
        normal((2, 5, 8)),
        lambda m, x: self_attention(
            m, x, need_weights=False, is_causal=True, attn_mask=torch.ones(5, 5, dtype=torch.bool).triu(1)
        ),
        _BOTH,
    ),
    "attention, cross": Case(attention(), normal((2, 5, 8), (2, 3, 8)), lambda m, q, k: m(q, k, k), _BOTH),
    "attention, by path": Case(attention(), normal((2, 5, 8)), self_attention, "layer.in_proj_weight"),
    "attention, values alone, by path": Case(
        attention(vdim=6),
        normal((2, 5, 8), (2, 3, 8), (2, 3, 6)),
        select=["layer.v_proj_weight", "layer.out_proj.weight"],
    ),
    "attention, kdim and vdim": Case(attention(kdim=6, vdim=7), normal((2, 5, 8), (2, 3, 6), (2, 3, 7)), select=_BOTH),
    "attention, kdim, no bias": Case(
        attention(kdim=6, bias=False), normal((2, 5, 8), (2, 3, 6), (2, 3, 8)), select=_BOTH
    ),
}


def encoder_layer(**options):
    return nn.TransformerEncoderLayer(8, 2, 12, **({"dropout": 0.0, "batch_first": True} | options))


_ALL_LINEAR = [nn.Linear, nn.MultiheadAttention]
CASES |= {
    "encoder layer": Case(encoder_layer, normal((2, 5, 8)), select=_ALL_LINEAR),
    "encoder layer, norm first, gelu": Case(
        lambda: encoder_layer(norm_first=True, activation="gelu"), normal((2, 5, 8)), select=_ALL_LINEAR
    ),
    "encoder layer, no bias": Case(lambda: encoder_layer(bias=False), normal((2, 5, 8)), select=_ALL_LINEAR),
    "encoder layer, padding": Case(
        encoder_layer, normal((2, 5, 8)), lambda m, x: m(x, src_key_padding_mask=padding(x)), _ALL_LINEAR
    ),
    "encoder layer, attention alone": Case(encoder_layer, normal((2, 5, 8)), select=nn.MultiheadAttention),
    "encoder layer, one linear alone": Case(encoder_layer, normal((2, 5, 8)), select="layer.linear2"),
    "encoder": Case(
        lambda: nn.TransformerEncoder(encoder_layer(), 2, enable_nested_tensor=False),
        normal((2, 5, 8)),
        select=_ALL_LINEAR,
    ),
    "encoder, padding": Case(
        lambda: nn.TransformerEncoder(encoder_layer(), 2, enable_nested_tensor=False),
        normal((2, 5, 8)),
        lambda m, x: m(x, src_key_padding_mask=padding(x)),
        _ALL_LINEAR,
    ),
    "encoder, nested": Case(
        lambda: nn.TransformerEncoder(encoder_layer(), 2),
        normal((2, 5, 8)),
        lambda m, x: m(x, src_key_padding_mask=padding(x)),
        _ALL_LINEAR,
    ),
    "encoder, nested, first layer's linear alone": Case(
        lambda: nn.TransformerEncoder(encoder_layer(), 2),
        normal((2, 5, 8)),
        lambda m, x: m(x, src_key_padding_mask=padding(x)),
        "layer.layers.0.linear1",
    ),
    "encoder, nested, one sequence": Case(  # no mask: nothing is nested
        lambda: nn.TransformerEncoder(encoder_layer(), 2), normal((2, 5, 8)), select=_ALL_LINEAR
    ),
    "decoder layer": Case(
        lambda: nn.TransformerDecoderLayer(8, 2, 12, dropout=0.0, batch_first=True),
        normal((2, 5, 8), (2, 3, 8)),
        lambda m, x, memory: m(x, memory, tgt_mask=torch.ones(5, 5, dtype=torch.bool).triu(1), tgt_is_causal=True),
        _ALL_LINEAR,
    ),
}


def packed(model, x, *state):
    lengths = torch.tensor([5, 2, 4])
    return model(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False), *state)


for _cls in (nn.LSTM, nn.GRU, nn.RNN):
    _kind = _cls.__name__

    def _state(model, x, *h):
        return model(x, h if len(h) == 2 else h[0])

    _one = normal((5, 2, 3))
    _states = 2 if _cls is nn.LSTM else 1
    CASES |= {
        f"{_kind}": Case(lambda cls=_cls: cls(3, 4), _one),
        f"{_kind}, two layers": Case(lambda cls=_cls: cls(3, 4, 2), _one),
        f"{_kind}, bidirectional, two layers": Case(lambda cls=_cls: cls(3, 4, 2, bidirectional=True), _one),
        f"{_kind}, no bias": Case(lambda cls=_cls: cls(3, 4, bias=False), _one),
        f"{_kind}, batch first": Case(lambda cls=_cls: cls(3, 4, batch_first=True), _one),
        f"{_kind}, one sample": Case(lambda cls=_cls: cls(3, 4), normal((5, 3))),
        f"{_kind}, packed": Case(lambda cls=_cls: cls(3, 4, bidirectional=True), normal((3, 5, 3)), packed),
        f"{_kind}, state": Case(
            lambda cls=_cls: cls(3, 4, 2), normal((5, 2, 3), *((2, 2, 4) for _ in range(_states))), _state
        ),
        f"{_kind} cell": Case(lambda cls=_cls: getattr(nn, f"{cls.__name__}Cell")(3, 4), normal((2, 3))),
        f"{_kind} cell, no bias, state": Case(
            lambda cls=_cls: getattr(nn, f"{cls.__name__}Cell")(3, 4, bias=False),
            normal((2, 3), *((2, 4) for _ in range(_states))),
            _state,
        ),
    }
CASES |= {
    "LSTM, proj_size": Case(lambda: nn.LSTM(3, 4, proj_size=2), normal((5, 2, 3))),
    "LSTM, proj_size, bidirectional, two layers, no bias": Case(
        lambda: nn.LSTM(3, 4, 2, proj_size=2, bidirectional=True, bias=False), normal((5, 2, 3))
    ),
    "LSTM, proj_size, packed, state": Case(
        lambda: nn.LSTM(3, 4, proj_size=2, batch_first=True),
        normal((3, 5, 3), (1, 3, 2), (1, 3, 4)),
        lambda model, x, h, c: packed(model, x, (h, c)),
    ),
    "LSTM, one weight by path": Case(lambda: nn.LSTM(3, 4, 2), normal((5, 2, 3)), select="layer.weight_hh_l1"),
    "GRU cell, one weight by path": Case(lambda: nn.GRUCell(3, 4), normal((2, 3)), select="**.weight_ih"),
    "RNN, relu": Case(lambda: nn.RNN(3, 4, nonlinearity="relu"), normal((5, 2, 3))),
    "RNN cell, relu": Case(lambda: nn.RNNCell(3, 4, nonlinearity="relu"), normal((2, 3))),
}

_VECTORS = ["layer.weight", "layer.bias"]
NORMS = {
    "layer norm": Case(lambda: nn.LayerNorm(6), normal((2, 3, 6)), select=_VECTORS),
    "layer norm, no bias": Case(lambda: nn.LayerNorm(6, bias=False), normal((2, 6)), select="layer.weight"),
    "layer norm, two dimensions": Case(lambda: nn.LayerNorm((4, 6)), normal((3, 4, 6)), select=_VECTORS),
    "RMS norm": Case(lambda: nn.RMSNorm(6), normal((2, 3, 6)), select="layer.weight"),
    "batch norm 1d": Case(lambda: nn.BatchNorm1d(6), normal((5, 6)), select=_VECTORS),
    "batch norm 2d": Case(lambda: nn.BatchNorm2d(6), normal((3, 6, 4, 2)), select=_VECTORS),
    "group norm": Case(lambda: nn.GroupNorm(2, 6), normal((3, 6, 4)), select=_VECTORS),
    "instance norm": Case(lambda: nn.InstanceNorm1d(6, affine=True), normal((3, 6, 4)), select=_VECTORS),
    "a linear layer's bias": Case(lambda: nn.Linear(6, 5), normal((3, 6)), select="layer.bias"),
}


class Plain(nn.Module):
    """A matrix of its own, applied by hand, and used twice."""

    def __init__(self):
        super().__init__()
        self.theta = nn.Parameter(torch.randn(6, 6) / 3)

    def forward(self, x):
        return torch.tanh(x @ self.theta.T) @ self.theta


class Experts(nn.Module):
    """A stack of matrices, one a row of the input; stored as `[experts, in, out]` on request, as transformers marks it."""

    def __init__(self, *, is_transposed):
        super().__init__()
        if is_transposed:
            self.is_transposed = True
        self.stack = nn.Parameter(torch.randn(*((4, 6, 5) if is_transposed else (4, 5, 6))) / 3)

    def forward(self, x):
        stack = self.stack.mT if getattr(self, "is_transposed", False) else self.stack
        return torch.einsum("eoi,bei->beo", stack, x)


def moe_block(name, implementation="eager"):
    def build():
        options = {"hidden_size": 8, "num_experts_per_tok": 2, "experts_implementation": implementation}
        if name == "mixtral":
            config = transformers.MixtralConfig(intermediate_size=8, num_local_experts=4, **options)
            block = transformers.models.mixtral.modeling_mixtral.MixtralSparseMoeBlock(config)
        else:
            config = transformers.Qwen3MoeConfig(moe_intermediate_size=8, num_experts=4, **options)
            block = transformers.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeSparseMoeBlock(config)
        for p in block.parameters():
            nn.init.normal_(p, std=0.5)
        return block

    return build


_EXPERTS = ["layer.experts.gate_up_proj", "layer.experts.down_proj"]
RAW = {
    "a matrix": Case(Plain, normal((3, 6)), select="layer.theta"),
    "a stack": Case(lambda: Experts(is_transposed=False), normal((3, 4, 6)), select="layer.stack"),
    "a transposed stack": Case(lambda: Experts(is_transposed=True), normal((3, 4, 6)), select="layer.stack"),
    "mixtral": Case(moe_block("mixtral"), normal((2, 3, 8)), select=_EXPERTS),
    "mixtral, and the router": Case(moe_block("mixtral"), normal((2, 3, 8)), select=[*_EXPERTS, "layer.gate.weight"]),
    "qwen3 moe": Case(moe_block("qwen3_moe"), normal((2, 3, 8)), select=_EXPERTS),
    "qwen3 moe, down_proj alone": Case(moe_block("qwen3_moe"), normal((2, 3, 8)), select="**.experts.down_proj"),
    "mixtral, batched_mm": Case(moe_block("mixtral", "batched_mm"), normal((2, 3, 8)), select=_EXPERTS),
    "mixtral, grouped_mm": Case(moe_block("mixtral", "grouped_mm"), normal((2, 3, 8)), select=_EXPERTS),
}
CASES |= NORMS | RAW

ONE_OF_EACH_KIND = [
    "linear", "Conv1D", "bilinear", "conv1d, groups", "conv2d, all of them", "conv3d, plain", "transposed conv1d, groups",
    "transposed conv2d, all of them", "transposed conv3d, output_size", "embedding, padding_idx", "embedding, max_norm",
    "embedding, sparse", "bag, mean", "bag, max, offsets", "bag, per_sample_weights", "attention and out_proj",
    "attention, kdim and vdim", "attention, add_bias_kv", "encoder layer, norm first, gelu", "encoder, nested",
    "decoder layer", "LSTM, proj_size, bidirectional, two layers, no bias", "LSTM, packed", "GRU, state",
    "RNN, bidirectional, two layers", "LSTM cell", "GRU cell", "RNN cell", *NORMS, *RAW,
]  # fmt: skip


def has(case, method):
    """Whether a method can adapt what the case selects: of these, two adapt matrices, and a norm has vectors."""
    return not (isinstance(method, (peftkit.LoRA, RowsAndBias)) and case in NORMS)


def rows_of(cases, methods):
    """Every case with every method; those that compute no weight see one case of each kind, options being nothing to them."""
    plain = (peftkit.Frozen(), FULL)
    return [
        (c, m)
        for c in cases
        for m in methods
        if has(c, methods[m]) and (methods[m] not in plain or c in ONE_OF_EACH_KIND)
    ]


def table(cases, methods=METHODS):
    rows = [pytest.param(c, methods[m], id=f"{c} | {m}") for c, m in rows_of(cases, methods)]
    return pytest.mark.parametrize("case, method", rows)


def table_with_dtypes(methods=METHODS):
    """Every case in float64, and one of each kind in float32; torch has the grouped product in float32 alone."""
    double = [c for c in CASES if "grouped_mm" not in c]
    rows = [(c, m, torch.float64) for c, m in rows_of(double, methods)]
    rows += [(c, m, torch.float32) for c, m in rows_of(ONE_OF_EACH_KIND, methods)]
    params = [pytest.param(c, methods[m], d, id=f"{c} | {m} | {str(d).removeprefix('torch.')}") for c, m, d in rows]
    return pytest.mark.parametrize("case, method, dtype", params)


def adapt(case, method, dtype=torch.float64, *, move=True):
    """The adapted model of a case, the plain one, and the case's call of a model on fresh inputs."""
    case = CASES[case]
    plain = Holder(case.build()).to(dtype)
    wanted = case.select if hasattr(method, "vectors") and type(method).scope == "weights" else "layer"
    model = peftkit.wrap(copy.deepcopy(plain), method, targets=wanted)
    if move:
        perturb(model)
    inputs = [x.to(dtype) if x.is_floating_point() else x for x in case.inputs()]
    return model, plain.requires_grad_(requires_grad=False), inputs, case.call


def perturb(model):
    """Move what is trainable off its start."""
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn(p.shape, dtype=torch.float64))


def outputs(call, model, inputs):
    """Every floating point tensor that a call gives."""
    found = []
    for y in tree_leaves(call(model, *inputs), is_leaf=lambda y: isinstance(y, PackedSequence)):
        y = y.data if isinstance(y, PackedSequence) else y  # noqa: PLW2901
        if isinstance(y, torch.Tensor) and y.is_floating_point():
            found.append(y)
    return found


def differentiable(inputs, dtype):
    return [x.to(dtype).clone().requires_grad_() if x.is_floating_point() else x for x in inputs]


class Reference:
    """A plain model in float64 whose weights are computed by the method's formula from leaves of their own."""

    def __init__(self, plain, model, method):
        self.method = method
        self.plain = copy.deepcopy(plain).double()
        self.leaves = {
            name: p.detach().double().clone().requires_grad_()
            for name, p in model.named_parameters()
            if p.requires_grad
        }
        for layer in self.plain.modules():
            if hasattr(layer, "sparse"):
                layer.sparse = False  # or the reference could not transpose its gradient
            if type(layer).__name__.endswith("Experts") and hasattr(layer, "config"):
                layer.config._experts_implementation = "eager"  # the others want float32

    def weights(self):
        """Each parameter that is not the base's, by its path; a graph of its own every time."""
        sites: dict[str, dict[str, torch.Tensor]] = {}
        given = {}
        for name, leaf in self.leaves.items():
            path, adapted, rest = name.partition(".adapters.default.")
            if adapted:
                weight, _, own = rest.partition(".")
                sites.setdefault(f"{path}.{weight}", {})[own] = leaf
            else:
                given[name] = leaf + 0  # a copy, because max_norm shortens the rows of the weight that it is given
        for name, tensors in sites.items():
            path, _, weight = name.rpartition(".")
            layer = self.plain.get_submodule(path)
            raw = layer._parameters[weight].detach()
            given[name] = as_weight(layer, formula(self.method, tensors, as_matrix(layer, raw)), raw) + 0
            bias = weight.replace("weight", "bias")
            if isinstance(self.method, RowsAndBias) and bias != weight and layer._parameters.get(bias) is not None:
                given[f"{path}.{bias}"] = layer._parameters[bias].detach() * tensors["scale"][:, 0]
        return given

    def __call__(self, *args, **kwargs):
        return torch.func.functional_call(self.plain, self.weights(), args, kwargs)

    def train(self, mode):
        self.plain.train(mode)


def assert_close(actual, expected, dtype, what="output"):
    assert actual.shape == expected.shape
    actual, expected = (t.detach().to_dense().double() for t in (actual, expected))
    error, size = (actual - expected).abs().max().item(), expected.abs().max().item()
    assert error <= TOLERANCE[dtype] * max(size, 1e-3), f"{what} differs by {error:.3g}, values go up to {size:.3g}"


def plain_parameters(model):
    return [(name, p) for name, p in model.named_parameters() if ".adapters." not in name]


def weights_of(model):
    return {name: p.detach().clone() for name, p in plain_parameters(model)}


MODES = {"train": (True, True), "eval": (False, True), "eval, no_grad": (False, False)}


# ------------------------------------------------------------------------------------------------- the tests


@table(CASES)
def test_start(case, method):
    """At the start the output is the base's, bit for bit, in train and in eval mode."""
    model, plain, inputs, call = adapt(case, method, torch.float32, move=False)
    # In place nothing is frozen; and torch picks kernels by what requires grad, without grad mode too.
    plain.requires_grad_(requires_grad=method == FULL)
    for training in (True, False):
        with torch.no_grad():
            base = outputs(call, copy.deepcopy(plain).train(training), inputs)
            for a, b in zip(outputs(call, copy.deepcopy(model).train(training), inputs), base, strict=True):
                assert torch.equal(a, b)


@table_with_dtypes(METHODS | {"rows and bias": RowsAndBias()})
def test_definition(case, method, dtype):
    """Output and gradients are those of a plain layer that is given the weight which the definition makes."""
    model, plain, inputs, call = adapt(case, method, dtype)
    reference = Reference(plain, model, method)
    before = weights_of(model)
    for mode, (training, grad) in MODES.items():
        model.train(training)
        reference.train(training)
        ours, theirs = differentiable(inputs, dtype), differentiable(inputs, torch.float64)
        with torch.set_grad_enabled(grad):
            y, expected = outputs(call, model, ours), outputs(call, reference, theirs)
        for a, b in zip(y, expected, strict=True):
            assert a.dtype == dtype
            assert_close(a, b, dtype, f"output in {mode}")
        if any(b.requires_grad for b in expected):
            assert all(a.requires_grad == b.requires_grad for a, b in zip(y, expected, strict=True))
            directions = [torch.randn_like(b) for b in expected]
            torch.autograd.backward(y, [d.to(dtype) for d in directions])
            torch.autograd.backward(expected, directions)
            for a, b in zip(ours, theirs, strict=True):
                if a.is_floating_point():
                    assert_close(a.grad, b.grad, dtype, f"gradient of the input in {mode}")
    named = dict(model.named_parameters())
    assert reference.leaves.keys() == {name for name, p in named.items() if p.requires_grad}
    for name, leaf in reference.leaves.items():
        # A weight that an option leaves unused (the biases of keys, say) may have no gradient in either, or zeros.
        if leaf.grad is not None and named[name].grad is not None:
            assert_close(named[name].grad, leaf.grad, dtype, f"gradient of {name}")
        else:
            assert all(g is None or not g.any() for g in (leaf.grad, named[name].grad))
    for name, value in before.items():
        if not named[name].requires_grad:
            assert named[name].grad is None
            assert torch.equal(named[name], value) or ("max_norm" in case and isinstance(method, peftkit.Frozen))


# Where torch's gradient is not the derivative: it goes past the norm's own gradient, and weights repeated tokens.
NO_DERIVATIVE = ("max_norm", "scale_grad_by_freq", "grouped_mm", "router")
# The routers of these compute in float32, which is too coarse for differences.
MOE = [case for case in RAW if "moe" in case or "mixtral" in case]


@table([c for c in CASES if not any(word in c for word in NO_DERIVATIVE)], {"lora": LORA, "twist": TWIST})
def test_gradcheck(case, method):
    """The gradients of the adapter's parameters and of the input are the derivatives, numerically, in float64."""
    model, _, inputs, call = adapt(case, method)
    padded = model.layer.padding_idx if isinstance(model.layer, (nn.Embedding, nn.EmbeddingBag)) else None
    # The padding row gets no gradient, by torch's own rule, so it has no place in a numerical check.
    inputs = [torch.where(x == padded, (x + 1) % 9, x) if padded is not None and not x.is_floating_point() else x
              for x in inputs]  # fmt: skip
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    values = [p.detach().clone().requires_grad_() for p in model.parameters() if p.requires_grad]
    xs = inputs if case in MOE else differentiable(inputs, torch.float64)
    free = [x for x in xs if x.requires_grad]

    def output(*given):
        values, moved = given[: len(names)], iter(given[len(names) :])
        adapted = dict(zip(names, values, strict=True))

        def run(*args, **kwargs):
            return torch.func.functional_call(model, adapted, args, kwargs)

        return tuple(outputs(call, run, [next(moved) if x.requires_grad else x for x in xs]))

    assert torch.autograd.gradcheck(output, (*values, *free), fast_mode=True)


@table_with_dtypes()
def test_merge(case, method, dtype):
    """A merged model holds the weight that the definition makes and computes the same; unmerging is exact."""
    # torch shortens the rows of a weight in the layer's own forward, so of a weight that is trained or frozen itself
    moves = "max_norm" in case and method not in (LORA, TWIST)
    model, plain, inputs, call = adapt(case, method, dtype)
    model.eval()
    reference = Reference(plain, model, method)
    parameters, before = dict(plain_parameters(model)), weights_of(model)
    for grad in (False,) if "nested" in case else (True, False):  # in grad mode torch nests what trains nothing alone
        with torch.set_grad_enabled(grad):
            y = outputs(call, model, inputs)
            peftkit.merge(model)
            merged = dict(model.named_parameters())
            if not moves:
                for name, w in reference.weights().items():
                    assert_close(merged[name], w, dtype, name)
            for a, b in zip(outputs(call, model, inputs), y, strict=True):
                assert_close(a, b, dtype)
            peftkit.unmerge(model)
            for name, p in plain_parameters(model):
                assert p is parameters[name]
                assert torch.equal(p, before[name]) or moves
            for a, b in zip(outputs(call, model, inputs), y, strict=True):
                assert torch.equal(a, b) or moves


@table(ONE_OF_EACH_KIND, {name: METHODS[name] for name in ("lora", "twist", "copy")})
def test_merge_for_good(case, method):
    """Merged without the base, the layer is a plain one of its own class that computes what the adapted one did."""
    model, plain, inputs, call = adapt(case, method, torch.float32)
    y = outputs(call, model.eval(), inputs)
    peftkit.merge(model, keep_base=False)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert [*model.state_dict()] == [*plain.state_dict()]
    for a, b in zip(outputs(call, model, inputs), y, strict=True):
        assert_close(a, b, torch.float32)


@table(ONE_OF_EACH_KIND)
@pytest.mark.usefixtures("installed")
def test_save_and_load(case, method, tmp_path):
    """Loaded into a fresh base, an adapter gives the same output bit for bit; what holds nothing is not saved."""
    model, plain, inputs, call = adapt(case, method, torch.float32)
    path = tmp_path / "adapter.safetensors"
    if isinstance(method, peftkit.Frozen):
        with pytest.raises(PeftkitError, match="default"):
            peftkit.save(model, path)
        return
    peftkit.save(model, path)
    fresh = peftkit.load(copy.deepcopy(plain), path, trainable=True)
    for training, grad in MODES.values():
        with torch.set_grad_enabled(grad):
            mine, theirs = model.train(training), fresh.train(training)
            for a, b in zip(outputs(call, theirs, inputs), outputs(call, mine, inputs), strict=True):
                assert torch.equal(a, b)
    assert {n for n, p in fresh.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }


def attributes(model):
    """What `unwrap` has to put back: classes, own attributes, registers and hooks of every module."""
    return [
        (path, type(m), sorted(m.__dict__), list(m._parameters), list(m._buffers), list(m._modules))
        for path, m in model.named_modules()
    ]


@table(ONE_OF_EACH_KIND)
@pytest.mark.parametrize("used", [False, True], ids=["unused", "used"])
def test_unwrap(case, method, used):
    """Unwrapped, the model is what it was: classes, attributes, keys, parameters, values, flags; output bit for bit."""
    entry = CASES[case]
    model = Holder(entry.build())
    first = next(model.layer.parameters())
    first.requires_grad_(requires_grad=False)
    before, values = attributes(model), weights_of(model)
    parameters, flags = dict(model.named_parameters()), {n: p.requires_grad for n, p in model.named_parameters()}
    inputs = differentiable(entry.inputs(), torch.float32)
    moves = "max_norm" in case  # torch shortens the rows of a base in its own forward
    y = None if moves else [t.detach() for t in outputs(entry.call, copy.deepcopy(model).eval(), inputs)]
    wanted = entry.select if type(method).scope == "weights" else "layer"
    peftkit.wrap(model, method, targets=wanted)
    if used:
        if method != FULL:
            perturb(model)
        total = sum(t.sum() for t in outputs(entry.call, model.eval(), inputs))
        if total.requires_grad:
            total.backward()
        model.train()
    if used and moves and method == FULL:
        with pytest.raises(StateError, match="keep_base"):
            peftkit.unwrap(model)
        return
    peftkit.unwrap(model)
    assert attributes(model) == before
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    if not (moves and isinstance(method, peftkit.Frozen)):
        assert all(torch.equal(p, values[name]) for name, p in model.named_parameters())
    if y is not None:
        assert all(torch.equal(a, b) for a, b in zip(outputs(entry.call, model.eval(), inputs), y, strict=True))


@table(ONE_OF_EACH_KIND)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies(case, method, copied):
    """A copy of an adapted layer, taken after use, computes the same, has a life of its own, and unwraps."""
    model, plain, inputs, call = adapt(case, method, torch.float32)
    y = outputs(call, model.eval(), inputs)
    other = copied(model)
    assert [type(m).__qualname__ for m in other.modules()] == [type(m).__qualname__ for m in model.modules()]
    for a, b in zip(outputs(call, other, inputs), y, strict=True):
        assert torch.equal(a, b)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    for a, b in zip(outputs(call, model, inputs), y, strict=True):
        assert torch.equal(a, b)
    if method != FULL:  # whose old values are gone
        peftkit.unwrap(other)
        assert [type(m) for m in other.modules()] == [type(m) for m in plain.modules()]


# ------------------------------------------------------------------------------------------ which path is taken


class Created(TorchDispatchMode):
    """Notes how many elements each tensor has that an operation makes, views of older ones left out."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.layout is torch.strided]
        given = {t.untyped_storage()._cdata for t in tensors}
        made = func(*args, **(kwargs or {}))
        self.sizes += [
            t.numel()
            for t in tree_leaves(made)
            if isinstance(t, torch.Tensor) and t.layout is torch.strided and t.untyped_storage()._cdata not in given
        ]
        return made


BIG = {
    "linear": Case(lambda: nn.Linear(48, 32), normal((2, 3, 48))),
    "Conv1D": Case(lambda: Conv1D(32, 48), normal((2, 3, 48))),
    "conv1d": Case(lambda: nn.Conv1d(16, 24, 5, padding=2, padding_mode="circular"), normal((2, 16, 8))),
    "conv2d": Case(lambda: nn.Conv2d(16, 24, 3, padding="same"), normal((1, 16, 5, 5))),
    "conv2d, groups": Case(lambda: nn.Conv2d(16, 24, 3, stride=2, groups=2), normal((1, 16, 5, 5))),
    "conv3d": Case(lambda: nn.Conv3d(8, 24, 3), normal((1, 8, 4, 4, 4))),
    "transposed conv1d": Case(lambda: nn.ConvTranspose1d(16, 24, 5, stride=2), normal((2, 16, 5))),
    "transposed conv2d": Case(lambda: nn.ConvTranspose2d(16, 24, 3, groups=2), normal((1, 16, 3, 3))),
    "transposed conv3d": Case(lambda: nn.ConvTranspose3d(8, 24, 3), normal((1, 8, 2, 2, 2))),
    "embedding": Case(lambda: nn.Embedding(64, 32, padding_idx=0), indices(64, (2, 5))),
    "embedding, sparse": Case(lambda: nn.Embedding(64, 32, sparse=True), indices(64, (2, 5))),
    "bag": Case(lambda: nn.EmbeddingBag(64, 32, mode="mean"), indices(64, (2, 5))),
    "bag, sparse": Case(lambda: nn.EmbeddingBag(64, 32, mode="sum", sparse=True), indices(64, (2, 5))),
}


@pytest.mark.parametrize("case", BIG)
@pytest.mark.parametrize("dropout", [0.0, 0.5], ids=["no dropout", "dropout"])
def test_fast_path_builds_no_matrix(case, dropout):
    """Of a low-rank update no tensor of the weight's size is made, in forward or backward; of another one, it is."""
    entry = BIG[case]

    def largest(method):
        model = peftkit.wrap(Holder(entry.build()), method, targets="layer")
        weight = model.layer.weight.numel()
        inputs = differentiable(entry.inputs(), torch.float32)
        with Created() as created:
            sum(y.sum() for y in outputs(entry.call, model, inputs)).backward()
        return max(created.sizes) / weight

    assert largest(peftkit.LoRA(rank=2, dropout=dropout)) < 1
    assert largest(TWIST) >= 1


@pytest.mark.parametrize("method", [LORA, TWIST], ids=["lora", "twist"])
@pytest.mark.parametrize(
    "case, kernel",
    [
        ("attention and out_proj", "_native_multi_head_attention"),
        ("attention, no weights", "_native_multi_head_attention"),
        ("encoder layer", "_transformer_encoder_layer_fwd"),
        ("encoder, nested", "_transformer_encoder_layer_fwd"),
    ],
)
def test_fused_kernels_of_torch_are_taken(case, kernel, method, monkeypatch):
    """torch's own fused inference kernels still run, with adapted weights, where an unadapted layer would take them."""
    calls = []
    fused = getattr(torch, kernel)
    monkeypatch.setattr(torch, kernel, lambda *args, **kwargs: calls.append(args) or fused(*args, **kwargs))
    model, plain, inputs, call = adapt(case, method)
    with torch.no_grad():
        outputs(call, plain.eval(), inputs)
        taken = len(calls)
        outputs(call, model.eval(), inputs)
    assert taken > 0
    assert len(calls) == 2 * taken
    given = [t for t in tree_leaves(calls[taken]) if isinstance(t, torch.Tensor) and not t.is_nested and t.dim() == 2]
    assert given
    assert not {t.data_ptr() for t in given} & {p.data_ptr() for _, p in plain_parameters(model)}


# -------------------------------------------------------------------------------------------- what stays still


@pytest.mark.parametrize("method", [Untouched(), LORA, TWIST, COPY], ids=["untouched", "lora", "twist", "copy"])
@pytest.mark.parametrize("build", [nn.Embedding, nn.EmbeddingBag])
def test_max_norm_never_moves_an_adapted_base(build, method):
    """A layer that shortens its rows in place does it to the adapted weight, and never to the base."""
    model = Holder(build(9, 5, max_norm=0.5))
    before = model.layer.weight.detach().clone()
    peftkit.wrap(model, method, targets="layer")
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            model(torch.arange(9).reshape(3, 3))
    assert torch.equal(model.layer.weight, before)


def test_recurrent_layers_keep_no_adapted_weights():
    """After a forward a recurrent layer's own list holds the parameters again, and no graph."""
    model, _, inputs, call = adapt("LSTM, bidirectional, two layers", TWIST)
    outputs(call, model, inputs)
    layer = model.layer
    assert all(w is layer._parameters[n] for w, n in zip(layer._flat_weights, layer._flat_weights_names, strict=True))


@pytest.mark.parametrize("case", ["LSTM", "GRU, two layers", "RNN"])
@pytest.mark.parametrize("method", [LORA, TWIST], ids=["lora", "twist"])
def test_recurrent_layers_move(case, method):
    """`_apply` renews a recurrent layer's own list of weights: adapted, it can still be cast, and unwraps after that."""
    model, plain, inputs, call = adapt(case, method, torch.float32)
    y = outputs(call, model, inputs)
    model.double()
    for a, b in zip(outputs(call, model, [x.double() for x in inputs]), y, strict=True):
        assert a.dtype == torch.float64
        assert_close(a, b, torch.float32)
    peftkit.unwrap(model)
    for a, b in zip(outputs(call, model, [x.double() for x in inputs]), outputs(call, plain, inputs), strict=True):
        assert_close(a, b, torch.float32)


# ----------------------------------------------------------------------------------------- what is refused


class Odd(nn.Module):
    """Parameters that are no matrices of real numbers."""

    def __init__(self):
        super().__init__()
        self.vector = nn.Parameter(torch.ones(4))
        self.scalar = nn.Parameter(torch.tensor(1.0))
        self.complex = nn.Parameter(torch.ones(4, 4, dtype=torch.complex64))
        self.whole = nn.Parameter(torch.ones(4, 4, dtype=torch.int64), requires_grad=False)

    def forward(self, x):
        return x


class Quantised(nn.Linear):
    """A linear layer whose weight is packed, as 4-bit layers have it."""

    def __init__(self):
        super().__init__(8, 4)
        self.weight = nn.Parameter(torch.zeros(16, 1, dtype=torch.uint8), requires_grad=False)


def own_adapters():
    layer = nn.Linear(4, 4)
    layer.adapters = nn.Identity()
    return layer


REFUSED = {
    # what: layer, selector, method, error, what its text says
    "a norm": (lambda: nn.LayerNorm(4), "layer", LORA, UnsupportedLayerError, "layer.*LayerNorm.*lora"),
    "a vector": (Odd, "layer.vector", LORA, UnsupportedLayerError, "layer.vector.*vector.*lora adapts matrices"),
    "a scalar": (Odd, "layer.scalar", LORA, UnsupportedLayerError, "layer.scalar.*lora adapts matrices"),
    "complex numbers": (Odd, "layer.complex", LORA, UnsupportedLayerError, "layer.complex is torch.complex64"),
    "whole numbers": (Odd, "layer.whole", LORA, UnsupportedLayerError, "layer.whole is torch.int64"),
    "packed 4-bit numbers": (Quantised, "layer", LORA, UnsupportedLayerError, "layer.*Quantised"),
    "packed numbers by path": (Quantised, "layer.weight", LORA, UnsupportedLayerError, "torch.uint8"),
    "raw parameters without a path": (Odd, "layer", LORA, UnsupportedLayerError, "select its parameters by path"),
    "no weight at all": (nn.ReLU, "layer", LORA, UnsupportedLayerError, "no weight that lora can adapt"),
    "a container": (lambda: nn.Sequential(nn.Linear(4, 4)), "layer", LORA, UnsupportedLayerError, "layer.\\*\\*"),
    "a lazy layer": (lambda: nn.LazyLinear(4), "layer", LORA, UnsupportedLayerError, "run the model once"),
    "a lazy layer, full": (lambda: nn.LazyLinear(4), "layer", FULL, UnsupportedLayerError, "run the model once"),
    "a name that is taken": (own_adapters, "layer", LORA, UnsupportedLayerError, "rename it"),
    "a parameter that is not there": (
        lambda: nn.MultiheadAttention(4, 2), "layer.q_proj_weight", LORA, SelectorError, "matches nothing",
    ),
    "a bias that is not there": (
        lambda: nn.Linear(4, 4, bias=False), "layer.bias", TWIST, SelectorError, "matches nothing",
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.parametrize("what", REFUSED)
def test_refused(what):
    """What cannot be adapted is refused by name, with the remedy, and the model is left alone."""
    build, selector, method, error, text = REFUSED[what]
    model = Holder(build())
    before = attributes(model)
    with pytest.raises(error, match=text):
        peftkit.wrap(model, method, targets=selector)
    assert attributes(model) == before
