"""Bottleneck adapters against their formulas, on the structures that they are made for and on others."""

import copy
import doctest
import importlib
import math
import re
from contextlib import nullcontext

import pytest
import torch
import transformers as hf
from torch import nn

import peftkit
from peftkit.testing import parametrize_with_checks
from peftkit_bottleneck.houlsby import Houlsby
from peftkit_bottleneck.parallel import Parallel
from peftkit_bottleneck.pfeiffer import Pfeiffer

TEXT = {"vocab_size": 40}
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def bert():
    return hf.BertForSequenceClassification(hf.BertConfig(**TEXT, **SIZES))


def gpt2():
    return hf.GPT2LMHeadModel(hf.GPT2Config(**TEXT, n_embd=16, n_layer=2, n_head=2, n_positions=32))


def llama():
    return hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT, **SIZES, num_key_value_heads=1))


def t5():
    config = hf.T5Config(**TEXT, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, dropout_rate=0.0)
    config.decoder_start_token_id = 0
    return hf.T5ForConditionalGeneration(config)


def vit():
    return hf.ViTForImageClassification(hf.ViTConfig(**SIZES, image_size=8, patch_size=4))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(6)

    def forward(self, x):
        return self.norm(self.conv(x)).relu()


class CNN(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.block = Block()
        self.score = nn.Linear(6, 2)

    def forward(self, x):
        return self.score(self.block(self.conv(x).relu()).mean((2, 3)))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(4, 6, num_layers=2, bidirectional=True, batch_first=True)
        self.score = nn.Linear(12, 2)

    def forward(self, x):
        return self.score(self.lstm(x)[0].mean(1))


IDS = torch.arange(12).reshape(2, 6) % 7 + 2
LABELS = {"bert": torch.tensor([0, 1]), "vit": torch.tensor([0, 1]), "gpt2": IDS, "llama": IDS, "t5": IDS}
MODELS = {
    "bert": (bert, dict(input_ids=IDS)),
    "gpt2": (gpt2, dict(input_ids=IDS)),
    "llama": (llama, dict(input_ids=IDS)),
    "t5": (t5, dict(input_ids=IDS)),
    "vit": (vit, dict(pixel_values=torch.linspace(-1, 1, 2 * 3 * 64).reshape(2, 3, 8, 8))),
}
METHODS = {
    "houlsby": Houlsby(width=3, activation="tanh"),
    "pfeiffer": Pfeiffer(width=3, activation="tanh"),
    "parallel": Parallel(width=3, activation="tanh", learn_scale=True),
}
EVERY_METHOD = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
EVERY_MODEL = pytest.mark.parametrize("kind", MODELS)

PLACES = {
    "bert": {
        "houlsby": "bert.encoder.layer.0.attention.output.dense bert.encoder.layer.0.output.dense",
        "pfeiffer": "bert.encoder.layer.0.output.dense",
        "parallel": "bert.encoder.layer.0.output",
    },
    "gpt2": {
        "houlsby": "transformer.h.0.attn.c_proj transformer.h.0.mlp.c_proj",
        "pfeiffer": "transformer.h.0.mlp.c_proj",
        "parallel": "transformer.h.0.mlp",
    },
    "llama": {
        "houlsby": "model.layers.0.self_attn.o_proj model.layers.0.mlp.down_proj",
        "pfeiffer": "model.layers.0.mlp.down_proj",
        "parallel": "model.layers.0.mlp",
    },
    "t5": {
        "houlsby": "encoder.block.0.layer.0.SelfAttention.o encoder.block.0.layer.1.DenseReluDense.wo "
        "decoder.block.0.layer.0.SelfAttention.o decoder.block.0.layer.1.EncDecAttention.o "
        "decoder.block.0.layer.2.DenseReluDense.wo",
        "pfeiffer": "encoder.block.0.layer.1.DenseReluDense.wo decoder.block.0.layer.2.DenseReluDense.wo",
        "parallel": "encoder.block.0.layer.1.DenseReluDense decoder.block.0.layer.2.DenseReluDense",
    },
    "vit": {
        "houlsby": "vit.layers.0.attention.o_proj vit.layers.0.mlp.fc2",
        "pfeiffer": "vit.layers.0.mlp.fc2",
        "parallel": "vit.layers.0.mlp",
    },
}


@pytest.fixture(autouse=True)
def seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def made(kind):
    build, inputs = MODELS[kind]
    return build().eval(), inputs


def randomized(model):
    """Adapters with something in them."""
    with torch.no_grad():
        for parameter in trained(model):
            parameter.normal_(std=0.3)
    return model


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def logits(model, inputs):
    extra = {"decoder_input_ids": IDS} if isinstance(model, hf.T5ForConditionalGeneration) else {}
    return model(**inputs, **extra).logits


# ------------------------------------------------------------------------------------------- where they go


@EVERY_METHOD
@EVERY_MODEL
def test_default_places(kind, method):
    """By default each method stands at the modules that its paper names."""
    model, _ = made(kind)

    paths = [row.path for row in peftkit.plan(model, method).rows]

    first_block = [path for path in paths if ".1." not in path.replace("layer.1.", "layer.x.", 1) or kind == "t5"]
    expected = PLACES[kind][method.name].split()
    assert [path for path in first_block if path in expected] == expected
    assert len(paths) == 2 * len(expected)


@EVERY_METHOD
@EVERY_MODEL
def test_starts_as_the_identity(kind, method):
    """A new adapter changes no bit of the output."""
    model, inputs = made(kind)
    with torch.no_grad():
        before = logits(model, inputs)

        assert torch.equal(logits(peftkit.wrap(model, method), inputs), before)


def test_multihead_attention_is_adapted_as_a_whole():
    """torch's own attention never calls its output projection, so the attention itself is the place."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    assert [row.path for row in peftkit.plan(layer, Houlsby()).rows] == ["self_attn", "linear2"]


def test_a_model_without_a_feed_forward_module_has_no_place_for_parallel():
    """OPT calls two linear layers by itself: there is nothing to stand beside, which is an error."""
    model = hf.OPTModel(hf.OPTConfig(**TEXT, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, ffn_dim=16))

    with pytest.raises(peftkit.errors.SelectorError, match="mlp_blocks"):
        peftkit.wrap(model, Parallel())


# ---------------------------------------------------------------------------------------- what they compute


def network(adapter, x, activation=torch.relu):
    """The formula of the papers, from the adapter's tensors."""
    return activation(x @ adapter.down.T + adapter.down_bias) @ adapter.up.T + adapter.up_bias


@pytest.mark.parametrize("method", [METHODS["houlsby"], METHODS["pfeiffer"]], ids=lambda m: m.name)
@EVERY_MODEL
def test_series_formula(kind, method):
    """After each place stands y + up(tanh(down(y))): as a hook on the bare model that computes it by hand."""
    model, inputs = made(kind)
    bare = copy.deepcopy(model).double()
    model = randomized(peftkit.wrap(model.double(), method))
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    for row in peftkit.plan(bare, method).rows:
        adapter = model.get_submodule(f"{row.path}.adapters.default.module")

        def after(_, __, y, adapter=adapter):
            return y + network(adapter, y, torch.tanh)

        bare.get_submodule(row.path).register_forward_hook(after)

    torch.testing.assert_close(logits(model, inputs), logits(bare, inputs), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "t5", "vit"])
def test_parallel_formula(kind):
    """Beside each MLP stands f(x) + scale * up(relu(down(x)))."""
    model, inputs = made(kind)
    bare = copy.deepcopy(model).double()
    model = randomized(peftkit.wrap(model.double(), Parallel(width=3, learn_scale=True)))
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    for row in peftkit.plan(bare, Parallel()).rows:
        adapter = model.get_submodule(f"{row.path}.adapters.default.module")

        def after(_, args, y, adapter=adapter):
            return y + adapter.scale * network(adapter, args[0])

        bare.get_submodule(row.path).register_forward_hook(after)

    torch.testing.assert_close(logits(model, inputs), logits(bare, inputs), atol=1e-12, rtol=1e-12)


def test_parallel_formula_in_bert():
    """In BERT the network of the MLP's input is added to the MLP's output before that is normalised."""
    model, inputs = made("bert")
    bare = copy.deepcopy(model).double()
    model = randomized(peftkit.wrap(model.double(), Parallel(width=3, scale=0.5)))
    for i, layer in enumerate(bare.bert.encoder.layer):
        adapter = model.get_submodule(f"bert.encoder.layer.{i}.output.adapters.default.module")

        def forward(hidden, x, layer=layer.output, adapter=adapter):
            return layer.LayerNorm(layer.dense(hidden) + 0.5 * network(adapter, x) + x)

        layer.output.forward = forward

    torch.testing.assert_close(logits(model, inputs), logits(bare, inputs), atol=1e-12, rtol=1e-12)


ACTIVATIONS = {
    "relu": lambda x: x.clamp(min=0),
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "tanh": lambda x: 1 - 2 / (torch.exp(2 * x) + 1),
    "sigmoid": lambda x: 1 / (1 + torch.exp(-x)),
    "leaky_relu": lambda x: torch.where(x > 0, x, 0.01 * x),
    "identity": lambda x: x,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name):
    """Each activation by its formula; the gradients too."""
    layer = nn.Linear(5, 4).double()
    bare = copy.deepcopy(layer)
    model = randomized(peftkit.wrap(nn.Sequential(layer), Houlsby(width=3, activation=name), targets="0"))
    adapter = model[0].adapters["default"]["module"]
    x = torch.randn(6, 5, dtype=torch.float64)
    y = bare(x).detach()

    ours = torch.autograd.grad(model(x).square().sum(), trained(model))
    by_hand = (y + network(adapter, y, ACTIVATIONS[name])).square().sum()
    torch.testing.assert_close(ours, torch.autograd.grad(by_hand, trained(model)), atol=1e-12, rtol=1e-12)


def test_reduction_sets_the_width():
    """The bottleneck is features / reduction wide, at least 1; a width overrides it."""
    layer = nn.Sequential(nn.Linear(4, 32))

    def width(method):
        return peftkit.wrap(copy.deepcopy(layer), method, targets="0")[0].adapters["default"]["module"].down.shape[0]

    assert [width(Houlsby()), width(Houlsby(reduction=100)), width(Parallel(width=7))] == [2, 1, 7]


def test_dropout_acts_in_training_only():
    """Dropout changes the output in training and not in evaluation."""
    model = peftkit.wrap(nn.Sequential(nn.Linear(4, 32)), Houlsby(width=16, dropout=0.5), targets="0")
    x = torch.randn(3, 4)
    randomized(model)

    assert not torch.equal(model.train()(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


def test_fixed_scale_is_no_parameter():
    """The scale of the parallel adapter is fixed unless it is to be learned."""
    block = nn.Sequential(nn.Linear(4, 4))
    names = {
        learn: [name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad]
        for learn in (False, True)
        for model in [peftkit.wrap(copy.deepcopy(block), Parallel(learn_scale=learn), targets="0")]
    }

    assert set(names[True]) - set(names[False]) == {"scale"}


# --------------------------------------------------------------------------------------- what goes with them


@EVERY_METHOD
@EVERY_MODEL
def test_training_lowers_the_loss(kind, method):
    """A few steps lower the loss, every adapter parameter gets a gradient, and the base keeps its bits."""
    model, inputs = made(kind)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    model = peftkit.wrap(model, method)
    optimizer = torch.optim.Adam(trained(model), lr=0.1)
    losses = []
    for _ in range(8):
        loss = model(**inputs, labels=LABELS[kind]).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    assert losses[-1] < losses[0] - 1e-3
    assert all(p.grad is not None and p.grad.any() for p in trained(model))
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


@pytest.mark.parametrize("reentrant", [False, True])
@EVERY_METHOD
@EVERY_MODEL
def test_gradient_checkpointing(kind, method, reentrant):
    """With checkpointed blocks, both kinds, the gradients are the same."""
    model, inputs = made(kind)
    model = randomized(peftkit.wrap(model, method)).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0

    def gradients():
        model.zero_grad()
        model(**inputs, labels=LABELS[kind]).loss.backward()
        return [p.grad.clone() for p in trained(model)]

    plain = gradients()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        embeddings = model.get_input_embeddings()
        embeddings.register_forward_hook(lambda _, __, y: y.requires_grad_())
    torch.testing.assert_close(gradients(), plain, atol=1e-6, rtol=1e-5)


@EVERY_METHOD
@pytest.mark.usefixtures("installed")
def test_save_and_load(method, tmp_path):
    """A file brings the adapter onto a fresh base, bit for bit; unwrapping gives the base back."""
    model, inputs = made("llama")
    fresh = copy.deepcopy(model)
    before = logits(model, inputs)
    model = randomized(peftkit.wrap(model, method))
    adapted = logits(model, inputs)
    peftkit.save(model, tmp_path / "adapter.safetensors")

    peftkit.load(fresh, tmp_path / "adapter.safetensors")

    assert not torch.equal(adapted, before)
    assert torch.equal(logits(fresh, inputs), adapted)
    assert torch.equal(logits(peftkit.unwrap(fresh), inputs), before)


@EVERY_METHOD
@EVERY_MODEL
def test_routed_by_splitting(kind, method):
    """Each sample gets its own adapter when the batch is split by adapter."""
    model, inputs = made(kind)
    for name in ("a", "b"):
        model = randomized(peftkit.wrap(model, method, name=name))
    inputs = dict(inputs, **({"decoder_input_ids": IDS} if kind == "t5" else {}))
    alone = []
    for i, name in enumerate(("b", "a")):
        with peftkit.using(model, name):
            alone.append(model(**{k: v[i : i + 1] for k, v in inputs.items()}, **no_cache(kind)).logits)
    with peftkit.routed(model, ["b", "a"], split=True):
        together = model(**inputs, **no_cache(kind)).logits

    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-4)


def no_cache(kind):
    return {"use_cache": False} if kind in ("gpt2", "llama", "t5") else {}


@EVERY_METHOD
@pytest.mark.parametrize("kind", ["gpt2", "llama", "t5"])
def test_generate_with_a_cache(kind, method):
    """Greedy generation with a cache gives the tokens of the loop without one."""
    model, _ = made(kind)
    model = randomized(peftkit.wrap(model, method))
    options = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=-1)

    assert torch.equal(model.generate(IDS, use_cache=True, **options), model.generate(IDS, use_cache=False, **options))


def test_convolution_and_block_of_one():
    """In a convolution, and in a block that ends in one, the features are the channels."""
    model = randomized(peftkit.wrap(CNN().eval(), Houlsby(width=2), targets=re.compile("conv|block"))).double()
    bare = peftkit.unwrap(copy.deepcopy(model))
    conv, block = (model.get_submodule(f"{n}.adapters.default.module") for n in ("conv", "block"))
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    y = bare.conv(x).permute(0, 2, 3, 1)
    y = bare.block((y + network(conv, y)).permute(0, 3, 1, 2).relu()).permute(0, 2, 3, 1)
    y = bare.score((y + network(block, y)).mean((1, 2)))

    torch.testing.assert_close(model(x), y, atol=1e-12, rtol=1e-12)


def test_recurrent_layer():
    """Of an LSTM the sequence of outputs is adapted, its states are not; a packed sequence alike."""
    model = randomized(peftkit.wrap(Recurrent().eval(), Houlsby(width=2), targets="lstm")).double()
    adapter = model.lstm.adapters["default"]["module"]
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    with peftkit.disabled(model):
        y, states = model.lstm(x)
    packed = nn.utils.rnn.pack_padded_sequence(x, [5, 3], batch_first=True)

    adapted, adapted_states = model.lstm(x)
    unpacked, lengths = nn.utils.rnn.pad_packed_sequence(model.lstm(packed)[0], batch_first=True)

    torch.testing.assert_close(adapted, y + network(adapter, y), atol=1e-12, rtol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(states, adapted_states, strict=True))
    assert lengths.tolist() == [5, 3]
    torch.testing.assert_close(unpacked[0], adapted[0], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@EVERY_METHOD
def test_half_precision(method, dtype):
    """On a half precision base the adapter is float32 and the output keeps the base's dtype; autocast works."""
    model, inputs = made("llama")
    model = randomized(peftkit.wrap(model.to(dtype), method))

    assert {p.dtype for p in trained(model)} == {torch.float32}
    assert logits(model, inputs).dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert logits(model.float(), inputs).isfinite().all()


def test_compiles_as_one_graph():
    """torch.compile takes the adapted model in one graph."""
    model = randomized(peftkit.wrap(nn.Sequential(nn.Linear(4, 6), nn.ReLU()), Houlsby(width=2), targets="0"))
    x = torch.randn(3, 4)

    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), model(x))


def test_torch_encoder_layer_keeps_its_adapter_in_evaluation():
    """torch's encoder layer reads its layers' weights in a fast path of its own; adapters still act there."""
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1).eval()
    model = randomized(peftkit.wrap(encoder, Houlsby(width=2)))
    x = torch.randn(2, 3, 8)

    with_grad = model(x)
    with torch.no_grad():
        torch.testing.assert_close(model(x), with_grad, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------------------------------- what is refused

WRONG = {
    "reduction": [0, -1, "x", float("nan"), None, True],
    "width": [0, 1.5, "x"],
    "activation": ["rleu", None, 3],
    "dropout": [1.0, -0.1, "x"],
    "features": [0, "x"],
    "dim": [1.5, "x"],
    "scale": [0, float("inf"), "x"],
    "learn_scale": [1, "yes"],
}


@pytest.mark.parametrize("field, value", [(f, v) for f, values in WRONG.items() for v in values])
def test_wrong_fields(field, value):
    """A wrong value is refused with the field's name."""
    with pytest.raises(peftkit.errors.FieldError, match=field):
        Parallel(**{field: value})


class Untold(nn.Module):
    """Nothing in it says how many features it puts out."""

    def forward(self, x):
        return x * 2


def test_unknown_features():
    """Where the number of features cannot be told, the error says how to say it; then it works."""
    model = nn.ModuleDict({"mlp": Untold(), "linear": nn.Linear(2, 2)})
    with pytest.raises(peftkit.errors.UnsupportedLayerError, match=r"mlp \(Untold\).*pfeiffer\(features="):
        peftkit.wrap(model, Pfeiffer(), targets="mlp")

    x = torch.randn(2, 4)
    assert torch.equal(peftkit.wrap(model, Pfeiffer(features=4), targets="mlp")["mlp"](x), x * 2)


@pytest.mark.parametrize(
    "method, layer, x, words",
    [
        (Houlsby(features=3), nn.Linear(4, 6), torch.randn(2, 4), "expects 3 features in dimension -1"),
        (Houlsby(dim=5), nn.Linear(4, 6), torch.randn(2, 4), "in dimension 5"),
        (Parallel(features=3), Untold(), torch.randn(2, 4), "expects 3 features"),
        (Parallel(features=4), nn.AdaptiveAvgPool1d(4), torch.randn(2, 3, 4, 4)[0], None),
        (Parallel(features=4), nn.Flatten(0, 1), torch.randn(2, 3, 4), "keeps the positions of its input"),
    ],
    ids=["features", "dim", "another width", "the same shape", "other positions"],
)
def test_shapes_that_do_not_fit(method, layer, x, words):
    """A module of another shape is an error that says what was expected."""
    model = peftkit.wrap(nn.Sequential(layer), method, targets="0")

    with pytest.raises(peftkit.errors.UnsupportedLayerError, match=words) if words else nullcontext():
        model(x)


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(4, 4, 3), nn.Embedding(4, 4), nn.Bilinear(4, 4, 4)], ids=lambda m: type(m).__name__
)
def test_parallel_declines(layer):
    """Beside a layer whose input has other positions, or no features, there is no parallel adapter."""
    with pytest.raises(peftkit.errors.UnsupportedLayerError, match=f"0 .{type(layer).__name__}.: it"):
        peftkit.wrap(nn.Sequential(layer), Parallel(), targets="0")


def test_not_mergeable():
    """There is no weight form, so there is no merge."""
    model = peftkit.wrap(nn.Sequential(nn.Linear(4, 4)), Houlsby(), targets="0")

    with pytest.raises(peftkit.errors.UnsupportedLayerError):
        peftkit.merge(model)


@pytest.mark.parametrize("module", ["houlsby", "pfeiffer", "parallel"])
def test_doctests(module):
    """The examples in the docstrings run and print what they say."""
    result = doctest.testmod(importlib.import_module(f"peftkit_bottleneck.{module}"))

    assert result.attempted > 0
    assert result.failed == 0


@parametrize_with_checks([each(width=2, activation="gelu") for each in (Houlsby, Pfeiffer, Parallel)])
def test_conforms(check):
    """The kit's checks."""
    check()
