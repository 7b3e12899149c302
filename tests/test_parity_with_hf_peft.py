"""The same factors give the same numbers as in HF PEFT: outputs, gradients and merged weights.

HF PEFT is the oracle wherever it computes what it says it does. It builds its convolution without the layer's dilation,
padding mode and groups, so there the oracle is the definition, `W' = W + scale * up @ down`, through torch's own
functions in float64.
"""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import peftkit

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D

TOLERANCE = {
    # The largest difference, relative to the largest value. Sums have at most some hundred terms here, each rounded to
    # 2**-53, 2**-24 or 2**-8 of itself, and both sides may add them in another order.
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.bfloat16: 2e-2,
}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
EXACT_DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
SCALINGS = pytest.mark.parametrize("rank_stabilized", [False, True], ids=["lora", "rslora"])

RANK, ALPHA = 3, 5.0


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The tensors here are so small that torch's threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def assert_close(actual, expected, dtype, layers=1):
    """Compare, for layers that stand one after another with as many times the tolerance."""
    assert actual.shape == expected.shape
    actual, expected = actual.detach().double(), expected.detach().double()
    error = (actual - expected).abs().max().item()
    size = expected.abs().max().item()
    assert error <= TOLERANCE[dtype] * size * layers, f"differs by {error:.3g}, where values go up to {size:.3g}"


def tokens(*shape, rows=11):
    return torch.randint(rows, shape)


LAYERS = {
    # id: the layer, and an input for it
    "linear": (lambda: nn.Linear(6, 5), lambda: torch.randn(4, 6)),
    "linear, 3-d input": (lambda: nn.Linear(6, 5), lambda: torch.randn(2, 4, 6)),
    "linear, no bias": (lambda: nn.Linear(6, 5, bias=False), lambda: torch.randn(4, 6)),
    "Conv1D": (lambda: Conv1D(5, 6), lambda: torch.randn(2, 4, 6)),
    "conv2d": (lambda: nn.Conv2d(4, 5, 3), lambda: torch.randn(2, 4, 7, 6)),
    "conv2d, 1x1": (lambda: nn.Conv2d(4, 5, 1), lambda: torch.randn(2, 4, 3, 3)),
    "conv2d, no bias": (lambda: nn.Conv2d(4, 5, 3, bias=False), lambda: torch.randn(2, 4, 7, 6)),
    "conv2d, stride and padding": (
        lambda: nn.Conv2d(4, 5, (3, 2), stride=(2, 1), padding=(1, 2)),
        lambda: torch.randn(2, 4, 7, 6),
    ),
    "embedding": (lambda: nn.Embedding(11, 5), lambda: tokens(3, 4)),
    # HF trains `up` on padding tokens too, so its gradients are the oracle only where there are none.
    "embedding, padding row not in use": (lambda: nn.Embedding(12, 5, padding_idx=11), lambda: tokens(3, 4)),
}


def on_both(layer, *, rank_stabilized=False):
    """The layer with the same random factors under peftkit and under HF PEFT: (ours, theirs, names → tensors in each)."""
    base = nn.Sequential(layer)
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=["0"],
        use_rslora=rank_stabilized,
        fan_in_fan_out=isinstance(layer, Conv1D),
    )
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    ours = peftkit.wrap(base, {"0": peftkit.LoRA(rank=RANK, alpha=ALPHA, rank_stabilized=rank_stabilized)})
    copy_factors([(ours[0], theirs.base_model.model[0])])
    return ours, theirs


def their_factors(layer):
    """HF's own tensors A and B, and each as a matrix."""
    if layer.lora_embedding_A:
        a, b = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    else:
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return {"down": a, "up": b}


def copy_factors(pairs):
    """Give HF's factors random values, and peftkit's the same."""
    for our_layer, their_layer in pairs:
        adapter = our_layer.adapters["default"]["weight"]
        with torch.no_grad():
            for name, theirs in their_factors(their_layer).items():
                theirs.copy_(torch.randn(theirs.shape) / 2)
                getattr(adapter, name).copy_(theirs.flatten(1))


def assert_same_gradients(pairs, dtype):
    for our_layer, their_layer in pairs:
        adapter = our_layer.adapters["default"]["weight"]
        for name, theirs in their_factors(their_layer).items():
            assert_close(getattr(adapter, name).grad, theirs.grad.flatten(1), dtype, len(pairs))


def inputs_for(x, dtype):
    """The input twice, as a leaf that takes gradients where it can."""
    if not x.is_floating_point():
        return x, x
    return x.to(dtype).requires_grad_(), x.to(dtype).requires_grad_()


@pytest.mark.parametrize("layer", LAYERS)
@SCALINGS
@DTYPES
def test_layer(layer, rank_stabilized, dtype):
    """A layer with HF's factors gives HF's output and HF's gradients, on both factors and on the input."""
    torch.manual_seed(0)
    build, make_input = LAYERS[layer]
    ours, theirs = on_both(build().to(dtype), rank_stabilized=rank_stabilized)
    x, their_x = inputs_for(make_input(), dtype)
    y, their_y = ours(x), theirs(their_x)
    assert y.dtype == their_y.dtype == dtype
    assert_close(y, their_y, dtype)

    direction = torch.randn(y.shape).to(dtype)
    y.backward(direction)
    their_y.backward(direction)
    assert_same_gradients([(ours[0], theirs.base_model.model[0])], dtype)
    if x.is_floating_point():
        assert_close(x.grad, their_x.grad, dtype)


@pytest.mark.parametrize("layer", LAYERS)
@SCALINGS
@DTYPES
def test_merged_weight(layer, rank_stabilized, dtype):
    """Merging HF's factors gives HF's merged weight."""
    torch.manual_seed(0)
    ours, theirs = on_both(LAYERS[layer][0]().to(dtype), rank_stabilized=rank_stabilized)
    before = ours[0].weight.detach().clone()
    merged = peftkit.merge(ours, keep_base=False)[0].weight
    assert not torch.equal(merged, before)
    assert merged.dtype == dtype
    assert_close(merged, theirs.merge_and_unload()[0].weight, dtype)


# ------------------------------------------------- convolutions that HF PEFT does not build as their layer is


CONVOLUTIONS = {
    "dilation": (nn.Conv2d, {"dilation": (2, 1)}),
    "groups": (nn.Conv2d, {"groups": 2}),
    "depthwise": (nn.Conv2d, {"groups": 4, "out_channels": 8}),
    "padding mode zeros": (nn.Conv2d, {"padding": (1, 2)}),
    "padding mode reflect": (nn.Conv2d, {"padding": (1, 2), "padding_mode": "reflect"}),
    "padding mode replicate": (nn.Conv2d, {"padding": (1, 2), "padding_mode": "replicate"}),
    "padding mode circular": (nn.Conv2d, {"padding": (1, 2), "padding_mode": "circular"}),
    "padding same": (nn.Conv2d, {"padding": "same", "dilation": 2}),
    "padding valid": (nn.Conv2d, {"padding": "valid"}),
    "everything": (
        nn.Conv2d,
        {"stride": 2, "padding": 2, "dilation": 2, "groups": 2, "padding_mode": "reflect", "bias": False},
    ),
    "1-d, everything": (
        nn.Conv1d,
        {"stride": 2, "padding": 2, "dilation": 2, "groups": 2, "padding_mode": "circular"},
    ),
    "3-d, groups and padding": (nn.Conv3d, {"stride": 2, "padding": 1, "groups": 2, "padding_mode": "replicate"}),
}
FUNCTIONS = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}


def convolution(layer, x, w):
    """The convolution as its documentation has it: pad, then convolve without padding."""
    dims = len(layer.kernel_size)
    if layer.padding == "valid":
        sides = [(0, 0)] * dims
    elif layer.padding == "same":
        totals = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        sides = [(total // 2, total - total // 2) for total in totals]
    else:
        sides = [(p, p) for p in layer.padding]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, [amount for side in reversed(sides) for amount in side], mode)
    bias = None if layer.bias is None else layer.bias.detach().to(x.dtype)
    return FUNCTIONS[type(layer)](x, w, bias, layer.stride, 0, layer.dilation, layer.groups)


@pytest.mark.parametrize("options", CONVOLUTIONS)
@SCALINGS
@DTYPES
def test_convolution_by_definition(options, rank_stabilized, dtype):
    """With any options a convolution gives the output, gradients and merged weight of `W + scale * up @ down`."""
    torch.manual_seed(0)
    cls, given = CONVOLUTIONS[options]
    base = cls(**{"in_channels": 4, "out_channels": 6, "kernel_size": 3} | given).to(dtype)
    reference = copy.deepcopy(base)
    ours = peftkit.wrap(
        nn.Sequential(base), {"0": peftkit.LoRA(rank=RANK, alpha=ALPHA, rank_stabilized=rank_stabilized)}
    )
    adapter = ours[0].adapters["default"]["weight"]
    with torch.no_grad():
        adapter.up.normal_()
        adapter.down.normal_()
    x = torch.randn(2, 4, *[7, 6, 5][: len(reference.kernel_size)]).to(dtype).requires_grad_()

    up, down, their_x = (t.detach().double().requires_grad_() for t in (adapter.up, adapter.down, x))
    scale = ALPHA / math.sqrt(RANK) if rank_stabilized else ALPHA / RANK
    w = reference.weight.detach().double() + scale * (up @ down).view(reference.weight.shape)
    y, their_y = ours(x), convolution(reference, their_x, w)
    assert_close(y, their_y, dtype)

    direction = torch.randn(y.shape).to(dtype)
    y.backward(direction)
    their_y.backward(direction.double())
    for mine, theirs in ((adapter.up, up), (adapter.down, down), (x, their_x)):
        assert_close(mine.grad, theirs.grad, dtype)
    assert_close(peftkit.merge(ours, keep_base=False)[0].weight, w, dtype)


# ------------------------------------------------------------------------------------------- whole models


TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
MODELS = {
    # class: its config, and the last names of what is adapted
    "GPT2LMHeadModel": (
        {"vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16} | TOKENS,
        ["c_attn", "c_proj", "c_fc", "wte"],
    ),
    "BertForSequenceClassification": (
        {
            "vocab_size": 32,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 16,
            "pad_token_id": 0,
        },
        ["query", "key", "value", "dense", "word_embeddings", "classifier"],
    ),
}


# HF PEFT 0.21 asks transformers 5.23 by an old name whether it checkpoints.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", MODELS)
@EXACT_DTYPES
def test_model(name, dtype):
    """A whole transformer adapted by both libraries with the same factors has the same logits and the same gradients."""
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    settings, targets = MODELS[name]
    base = cls(cls.config_class(**settings)).to(dtype).eval()
    theirs = peft.get_peft_model(
        copy.deepcopy(base),
        peft.LoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules=targets, fan_in_fan_out=name.startswith("GPT2"), bias="none"
        ),
    ).eval()
    ours = peftkit.wrap(base, "lora", targets=targets, rank=RANK, alpha=ALPHA)
    their_layers = {
        path.removeprefix("base_model.model."): layer
        for path, layer in theirs.named_modules()
        if isinstance(layer, peft.tuners.lora.LoraLayer)
    }
    our_layers = {path: layer for path, layer in ours.named_modules() if "adapters" in layer._modules}
    assert set(our_layers) == set(their_layers)
    pairs = [(our_layers[path], their_layers[path]) for path in our_layers]
    copy_factors(pairs)

    # Token 0 pads: peftkit's update of it learns nothing, HF's `up` does.
    ids = torch.randint(1, 32, (2, 7))
    y, their_y = ours(input_ids=ids).logits, theirs(input_ids=ids).logits
    with peftkit.disabled(ours):
        assert not torch.allclose(y, ours(input_ids=ids).logits)
    assert_close(y, their_y, dtype, len(pairs))
    direction = torch.randn(y.shape, dtype=dtype)
    y.backward(direction)
    their_y.backward(direction)
    assert_same_gradients(pairs, dtype)


# ---------------------------------------------------------------------------- factors taken from the weight


FROM_WEIGHT = {
    "pissa, wide linear": ("pissa", lambda: nn.Linear(6, 5)),
    "pissa, tall linear": ("pissa", lambda: nn.Linear(6, 8)),
    "pissa, Conv1D": ("pissa", lambda: Conv1D(5, 6)),
    # HF takes OLoRA's factors from a Conv1D without transposing it, so there it is no oracle.
    "olora, wide linear": ("olora", lambda: nn.Linear(6, 5)),
    "olora, tall linear": ("olora", lambda: nn.Linear(6, 8)),
}


@pytest.mark.parametrize("start", FROM_WEIGHT)
@SCALINGS
def test_factors_from_the_weight(start, rank_stabilized):
    """PiSSA and OLoRA start at HF's product, and leave the base alone where HF overwrites it."""
    torch.manual_seed(0)
    ours, theirs, base = from_weight(*FROM_WEIGHT[start], rank_stabilized=rank_stabilized)
    our_layer, their_layer = ours[0], theirs.base_model.model[0]
    adapter = our_layer.adapters["default"]["weight"]
    factors = their_factors(their_layer)
    theirs_product = their_layer.scaling["default"] * factors["up"] @ factors["down"]
    assert theirs_product.abs().max() > 1e-2
    assert_close(adapter.scale * adapter.up @ adapter.down, theirs_product, torch.float32)
    assert torch.equal(our_layer.weight, base)
    assert not torch.equal(their_layer.base_layer.weight, base)


@pytest.mark.parametrize("start", FROM_WEIGHT)
@SCALINGS
def test_training_from_the_weight(start, rank_stabilized):
    """After PiSSA's and OLoRA's factors have moved, output, gradients and merged weight are HF's."""
    torch.manual_seed(0)
    ours, theirs, _ = from_weight(*FROM_WEIGHT[start], rank_stabilized=rank_stabilized)
    pair = (ours[0], theirs.base_model.model[0])
    adapter = ours[0].adapters["default"]["weight"]
    with torch.no_grad():
        # The two libraries may choose other signs of the singular vectors: start from one choice, for both.
        for name, factor in their_factors(pair[1]).items():
            getattr(adapter, f"start_{name}").copy_(factor)
            factor.add_(torch.randn(factor.shape), alpha=0.3)
            getattr(adapter, name).copy_(factor)
    x, their_x = inputs_for(torch.randn(4, 6), torch.float32)
    y, their_y = ours(x), theirs(their_x)
    assert_close(y, their_y, torch.float32)
    direction = torch.randn(y.shape)
    y.backward(direction)
    their_y.backward(direction)
    assert_same_gradients([pair], torch.float32)
    assert_close(x.grad, their_x.grad, torch.float32)
    merged = peftkit.merge(ours, keep_base=False)[0].weight
    assert_close(merged, theirs.merge_and_unload()[0].weight, torch.float32)


def from_weight(init, build, *, rank_stabilized):
    """One layer under both libraries, each with factors that it has taken from the weight; and the weight as it was."""
    layer = build()
    base = nn.Sequential(layer)
    theirs = peft.get_peft_model(
        copy.deepcopy(base),
        peft.LoraConfig(
            r=RANK,
            lora_alpha=ALPHA,
            target_modules=["0"],
            use_rslora=rank_stabilized,
            init_lora_weights=init,
            fan_in_fan_out=isinstance(layer, Conv1D),
        ),
    )
    before = layer.weight.detach().clone()
    ours = peftkit.wrap(base, {"0": peftkit.LoRA(rank=RANK, alpha=ALPHA, init=init, rank_stabilized=rank_stabilized)})
    return ours, theirs, before
