"""An adapter knows its base: every other model is told apart, and the first layer that differs is named."""

import copy

import pytest
import torch
import transformers
from torch import nn

import peftkit
from peftkit import errors


def llama(seed=0, **sizes):
    config = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 40,
        "tie_word_embeddings": False,
    }  # fmt: skip
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**config | sizes)).eval()


RULES = {
    "model.embed_tokens": peftkit.LoRA(rank=2),
    "**.{q,v}_proj": peftkit.LoRA(rank=2),
    "lm_head": peftkit.LoRA(rank=2),
}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("adapter") / "a.safetensors"
    model = peftkit.wrap(llama(), RULES, name="task")
    with torch.no_grad():
        for tensor in peftkit.state_dict(model).values():
            tensor.add_(0.01)
    peftkit.save(model, path)
    return path


def renamed():
    model = llama()
    attention = model.model.layers[1].self_attn
    attention.query_proj = attention.q_proj
    del attention.q_proj
    return model


def changed(layer):
    """The same but for one value in a hundred of one weight, spread over it."""
    model = llama()
    with torch.no_grad():
        model.get_parameter(layer).add_(0.5)
    return model


def swapped():
    model = llama()
    layers = model.model.layers
    layers[1], layers[2] = layers[2], layers[1]
    return model


def grown():
    model = llama()
    model.resize_token_embeddings(44, mean_resizing=False)
    return model


def transposed():
    """A square projection held as its transpose, by transformers' Conv1D: of the very shape, and another matrix."""
    model = llama()
    layer = transformers.pytorch_utils.Conv1D(16, 16)
    with torch.no_grad():
        layer.weight.copy_(model.model.layers[0].self_attn.v_proj.weight.mT)
    model.model.layers[0].self_attn.v_proj = layer
    return model


def quantised():
    return torch.ao.quantization.quantize_dynamic(llama(), {nn.Linear}, dtype=torch.qint8)


OTHERS = {
    "another width": (lambda: llama(hidden_size=32), "model.embed_tokens.weight"),
    "another vocabulary": (lambda: llama(vocab_size=41), "model.embed_tokens.weight"),
    "a vocabulary that has grown": (grown, "model.embed_tokens.weight"),
    "fewer layers": (lambda: llama(num_hidden_layers=2), "'model.layers.2.self_attn.q_proj'"),
    "a renamed layer": (renamed, "'model.layers.1.self_attn.q_proj'.*did you mean"),
    "other weights everywhere": (lambda: llama(seed=1), "model.embed_tokens.weight has the same shape but other values"),
    "other weights in one layer": (
        lambda: changed("model.layers.2.self_attn.v_proj.weight"), "model.layers.2.self_attn.v_proj.weight has the same shape but other",
    ),
    "layers in another order": (swapped, "model.layers.1.self_attn.q_proj.weight has the same shape but other values"),
    "tied embeddings": (lambda: llama(tie_word_embeddings=True), "lm_head.weight has the same shape but other values"),
    "fewer heads for keys and values": (lambda: llama(num_key_value_heads=1), "model.layers.0.self_attn.v_proj.weight"),
    "a projection transposed": (transposed, "model.layers.0.self_attn.v_proj.weight has the same shape but other values"),
    "the model without its head": (lambda: llama().model, "'model.embed_tokens'.*did you mean.*embed_tokens"),
    "the model inside another": (lambda: nn.ModuleDict({"inside": llama()}), "'model.embed_tokens'"),
    "quantised": (quantised, "model.layers.0.self_attn.q_proj"),
}  # fmt: skip


@pytest.mark.filterwarnings(
    "ignore:torch.ao.quantization is deprecated:DeprecationWarning", "ignore:torch.quantize_per_tensor"
)
@pytest.mark.parametrize("case", OTHERS)
def test_another_base_is_told_apart(path, case):
    """By its structure or its values; the error names the first layer that differs, and the model stays as it was."""
    make, words = OTHERS[case]
    model = make()
    before = copy.deepcopy(model)
    classes = [type(module) for module in model.modules()]
    with pytest.raises(errors.BaseMismatchError, match=words):
        peftkit.load(model, path)
    assert [type(module) for module in model.modules()] == classes
    for (name, p), (_, old) in zip(model.named_parameters(), before.named_parameters(), strict=True):
        assert torch.equal(p, old), name
        assert p.requires_grad == old.requires_grad


SAME = {
    "the same": llama,
    "in bfloat16": lambda: llama().bfloat16(),
    "in float16": lambda: llama().half(),
    "in float64": lambda: llama().double(),
    "in training mode": lambda: llama().train(),
    "frozen": lambda: llama().requires_grad_(False),
    "wrapped already, under another name": lambda: peftkit.wrap(llama(), "lora", name="other"),
    "wrapped and unwrapped": lambda: peftkit.unwrap(peftkit.wrap(llama(), "lora", init="pissa")),
    "merged and unmerged": lambda: peftkit.unmerge(
        peftkit.merge(peftkit.wrap(llama(), "lora", name="other", init="gaussian"))
    ),
    "with another layer beside": lambda: _with_more(llama()),
}


def _with_more(model):
    model.score = nn.Linear(16, 2)
    return model


@pytest.mark.parametrize("case", SAME)
def test_the_same_base_is_known(path, case):
    """In another precision, mode or state it is the base all the same."""
    model = peftkit.load(SAME[case](), path)
    assert "task" in [adapter.name for adapter in peftkit.summary(model).adapters]


STATES = {
    "merged": (
        lambda: peftkit.merge(peftkit.wrap(llama(), "lora", name="other", init="gaussian")),
        "'other' is merged",
    ),
    "wrapped already, under this name": (lambda: peftkit.wrap(llama(), "lora", name="task"), "called 'task' already"),
    "wrapped inside": (lambda: _wrapped_inside(), "the submodule 'model' is wrapped already"),
}


def _wrapped_inside():
    model = llama()
    peftkit.wrap(model.model, "lora")
    return model


@pytest.mark.parametrize("case", STATES)
def test_a_base_in_another_state(path, case):
    """A model that cannot take the adapter now says why, and what to do."""
    make, words = STATES[case]
    with pytest.raises(errors.StateError, match=words):
        peftkit.load(make(), path)


def test_a_base_merged_for_good_is_another_base(path):
    """After `merge(keep_base=False)` the values are others."""
    model = peftkit.wrap(llama(), "lora", targets="**.q_proj", init="gaussian", name="other")
    with torch.no_grad():
        for tensor in peftkit.state_dict(model).values():
            tensor.add_(0.5)
    with pytest.raises(errors.BaseMismatchError, match=r"model.layers.0.self_attn.q_proj.weight has the same shape"):
        peftkit.load(peftkit.merge(model, keep_base=False), path)
