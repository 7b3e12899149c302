"""Generation by transformers from wrapped models, and what surrounds it: checkpointing, `save_pretrained`.

Models are tiny, made from configurations, and in float64 where tokens are compared, so that no rounding decides between
two of them.
"""

import copy
import logging

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.checkpoint import checkpoint

import peftkit

transformers = pytest.importorskip("transformers")

WORDS = {"vocab_size": 32, "bos_token_id": 0, "eos_token_id": None, "pad_token_id": 1, "initializer_range": 0.2}


@pytest.fixture(autouse=True, scope="module")
def quiet():
    """transformers' advice to the user is no test result."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.set_verbosity(level)


def gpt2(**options):
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
    config = transformers.GPT2Config(**WORDS, **sizes, embd_pdrop=0.0, **options)
    return transformers.GPT2LMHeadModel(config)


def llama(*, layers=2, **options):
    config = transformers.LlamaConfig(
        **WORDS, hidden_size=16, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, **options,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


MODELS = {"gpt2": gpt2, "llama": llama}
every_model = pytest.mark.parametrize("name", MODELS)


def base(name, dtype=torch.float64, **options):
    torch.manual_seed(0)
    return MODELS[name](**options).to(dtype).eval().requires_grad_(False)


def stir(model, adapter="default", seed=3):
    """Give an adapter random values large enough to change what the model says."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in peftkit.state_dict(model, adapter).values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) / 3)
    return model


def tuned(name, *, adapters=("default",), targets="@linear", **options):
    model = base(name, **options)
    for seed, adapter in enumerate(adapters):
        model = stir(peftkit.wrap(model, "lora", targets=targets, rank=2, name=adapter), adapter, seed)
    return model


def prompts(rows=3):
    ids = torch.randint(2, 32, (rows, 6), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0  # one row is shorter, and padded on the left
    ids[0, :2] = 1
    return {"input_ids": ids, "attention_mask": mask}


def generate(model, *, batch=None, **search):
    return model.generate(**(batch or prompts()), do_sample=False, max_new_tokens=8, min_new_tokens=8, **search)


SEARCHES = {
    "cache": {},
    "no cache": {"use_cache": False},
    "beams": {"num_beams": 3},
    "beam groups of sequences": {"num_beams": 3, "num_return_sequences": 2},
    "sampled": {"do_sample": True, "top_k": 5},
}
SLOW = {"no cache", "sampled"}
"""Variants of what others show."""


def searches(names):
    marks = [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in names]
    return pytest.mark.parametrize("search", marks)


every_search = searches(SEARCHES)


def searched(model, search, **options):
    torch.manual_seed(7)
    return model.generate(**(prompts() | {"do_sample": False, "max_new_tokens": 8} | SEARCHES[search] | options))


# -------------------------------------------------------------------------------------------------- generation


@every_search
@every_model
def test_same_tokens_as_merged(name, search):
    """A wrapped model generates the tokens of the model that has its adapter merged in, and not those of the base."""
    unmerged = searched(tuned(name), search)
    merged = peftkit.merge(tuned(name), keep_base=False)
    assert torch.equal(unmerged, searched(merged, search))
    assert not torch.equal(unmerged, searched(base(name), search))


@every_model
@pytest.mark.parametrize("adapted", ["model", "draft", "both"])
def test_assisted(name, adapted):
    """Assisted decoding gives the tokens of the model alone, whichever of the two has the adapter; the draft runs."""
    model = tuned(name) if adapted != "draft" else base(name)
    draft = tuned(name) if adapted != "model" else base(name)
    row = {key: value[1:2] for key, value in prompts().items()}
    runs = []
    draft.register_forward_hook(lambda *_: runs.append(1))
    expected = generate(model, batch=row)
    assert not runs
    assert torch.equal(generate(model, batch=row, assistant_model=draft), expected)
    assert runs
    if adapted != "draft":
        assert torch.equal(generate(peftkit.merge(model, keep_base=False), batch=row), expected)


@every_search
@every_model
def test_switched(name, search):
    """Under `using` each adapter's own tokens are generated, under `disabled` the base's, and afterwards as before."""
    model = tuned(name, adapters=("a", "b"))
    peftkit.activate(model, "a")
    alone = {adapter: searched(only(name, adapter), search) for adapter in ("a", "b")}
    for adapter, expected in alone.items():
        with peftkit.using(model, adapter):
            assert torch.equal(searched(model, search), expected)
    with peftkit.disabled(model):
        assert torch.equal(searched(model, search), searched(base(name), search))
    assert torch.equal(searched(model, search), alone["a"])
    assert not torch.equal(alone["a"], alone["b"])


def only(name, adapter):
    """The model with one of the two adapters merged in."""
    model = tuned(name, adapters=("a", "b"))
    peftkit.unwrap(model, "b" if adapter == "a" else "a")
    return peftkit.merge(model, keep_base=False)


@searches(["cache", "no cache", "beams", "beam groups of sequences"])
@every_model
def test_routed(name, search):
    """Under `routed` each prompt of a batch gets its own adapter's tokens: greedily, and with beams."""
    model = tuned(name, adapters=("a", "b"))
    names = ["a", None, "b"]
    with peftkit.routed(model, names):
        found = searched(model, search)
    per_row = SEARCHES[search].get("num_return_sequences", 1)
    for row, adapter in enumerate(names):
        alone = base(name) if adapter is None else only(name, adapter)
        expected = searched(alone, search)
        rows = slice(row * per_row, (row + 1) * per_row)
        assert torch.equal(found[rows], expected[rows])


# ---------------------------------------------------------------------------------------- gradient checkpointing


class Blocks(nn.Module):
    """Checkpointed blocks by torch's own function, on an input that may or may not require a gradient."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3))
        self.head = nn.Linear(8, 2)
        self.reentrant = None

    def forward(self, x):
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x)


def adapted_blocks(method):
    torch.manual_seed(0)
    return peftkit.wrap(Blocks(), {"blocks.**": method, "head": "full"})


def gradients(model, x):
    model.zero_grad()
    model(x).square().sum().backward()
    return {path: None if p.grad is None else p.grad.clone() for path, p in model.named_parameters() if p.requires_grad}


METHODS = {"fast path": peftkit.LoRA(rank=2, init="orthogonal"), "generic path": peftkit.Full(keep_base=True)}
every_method = pytest.mark.parametrize("method", METHODS)


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@every_method
def test_checkpointed_gradients(method, reentrant):
    """With an input that requires a gradient, both kinds of checkpointing give the gradients that there are without."""
    model, x = adapted_blocks(METHODS[method]), torch.randn(4, 8, requires_grad=True)
    expected = gradients(model, x)
    model.reentrant = reentrant
    found = gradients(model, x)
    assert all(torch.equal(found[path], gradient) for path, gradient in expected.items())
    assert all(gradient.any() for gradient in found.values())


@every_method
def test_checkpointed_input_without_gradient(method):
    """Without reentry, an input that requires no gradient changes nothing: the adapters get theirs."""
    model, x = adapted_blocks(METHODS[method]), torch.randn(4, 8)
    expected = gradients(model, x)
    model.reentrant = False
    found = gradients(model, x)
    assert all(torch.equal(found[path], gradient) for path, gradient in expected.items())
    assert all(gradient.any() for gradient in found.values())


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch's own word on it
@every_method
def test_reentrant_checkpoint_that_drops_gradients(method):
    """With reentry, adapters that get no gradient for that reason stop the optimizer's step with an error that says so."""
    model, x = adapted_blocks(METHODS[method]), torch.randn(4, 8)
    model.reentrant = True
    optimizer = torch.optim.AdamW(peftkit.param_groups(model, lr=0.1))
    found = gradients(model, x)
    assert {path for path, gradient in found.items() if gradient is not None} == {"head.weight", "head.bias"}
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(peftkit.errors.StateError, match="use_reentrant=False"):
        optimizer.step()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    model.zero_grad()
    model(x.requires_grad_()).square().sum().backward()
    optimizer.step()


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpoint_that_drops_gradients_of_a_routed_batch():
    """So too where each sample has an adapter of its own."""
    model, x = Blocks(), torch.randn(4, 8)
    for name in ("a", "b"):
        peftkit.wrap(model, peftkit.LoRA(rank=2), targets="**", name=name)
    peftkit.set_trainable(model, "a", "b")
    model.reentrant = True
    optimizer = torch.optim.AdamW(peftkit.param_groups(model, lr=0.1))
    with peftkit.routed(model, ["a", "b", "a", "b"]):
        found = gradients(model, x)
    assert all((gradient is not None) == path.startswith("head.") for path, gradient in found.items())
    with pytest.raises(peftkit.errors.StateError, match="use_reentrant=False"):
        optimizer.step()


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpoint_without_gradients_wanted():
    """A run in training mode under `no_grad` is no reason for that error: the step after a proper backward goes through."""
    model, x = adapted_blocks(METHODS["fast path"]), torch.randn(4, 8, requires_grad=True)
    model.reentrant = True
    optimizer = torch.optim.AdamW(peftkit.param_groups(model, lr=0.1))
    with torch.no_grad():
        model(x.detach())
    gradients(model, x)
    optimizer.step()


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_checkpointing_of_transformers(name, reentrant):
    """transformers' own switch works on a wrapped model as it is: nothing has to be prepared."""
    model = tuned(name).train()
    batch = prompts() | {"labels": prompts()["input_ids"]}
    model(**batch).loss.backward()
    trained = {path: p for path, p in model.named_parameters() if p.requires_grad}
    expected = {path: p.grad.clone() for path, p in trained.items()}
    model.zero_grad()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model(**batch).loss.backward()
    assert all(torch.equal(p.grad, expected[path]) for path, p in trained.items())
    assert all(gradient.any() for gradient in expected.values())


# ----------------------------------------------------------------------------- from_pretrained, save_pretrained


@torch.no_grad()
def logits(model):
    return model.eval()(**prompts()).logits


def reloaded(folder, cls):
    """A plain model from a folder, and what transformers says about the folder's keys."""
    model, info = cls.from_pretrained(folder, output_loading_info=True, dtype="auto")
    return model, {key: set(info[key]) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}


NO_COMPLAINT = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set()}
TIED = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])


def from_folder(name, tmp_path, *, tied):
    """A base that was read from a folder by from_pretrained, as a user has it."""
    base(name, tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    model = MODELS_CLASSES[name].from_pretrained(tmp_path / "base", dtype="auto")
    return model.eval().requires_grad_(False)


MODELS_CLASSES = {"gpt2": transformers.GPT2LMHeadModel, "llama": transformers.LlamaForCausalLM}


@TIED
@every_model
def test_save_base(name, tied, tmp_path):
    """from_pretrained, wrap, train, unwrap, save_pretrained: the folder holds the base, byte for byte."""
    model = from_folder(name, tmp_path, tied=tied)
    stir(peftkit.wrap(model, "lora", rank=2))
    peftkit.unwrap(model).save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "base" / "model.safetensors"
    ).read_bytes()


@TIED
@every_model
def test_save_merged(name, tied, tmp_path):
    """from_pretrained, wrap, merge for good, save_pretrained: plain transformers reads it with the adapted logits."""
    model = stir(peftkit.wrap(from_folder(name, tmp_path, tied=tied), "lora", rank=2))
    expected = logits(model)
    peftkit.merge(model, keep_base=False).save_pretrained(tmp_path / "merged")
    loaded, said = reloaded(tmp_path / "merged", type(model))
    assert said == NO_COMPLAINT
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-10)
    assert not torch.allclose(expected, logits(base(name, tie_word_embeddings=tied)), atol=1e-3)


@every_model
def test_save_merged_and_untied(name, tmp_path):
    """A tied embedding that was adapted alone is saved as a weight of its own, and loaded as one."""
    embedding = {"gpt2": "transformer.wte", "llama": "model.embed_tokens"}[name]
    model = from_folder(name, tmp_path, tied=True)
    stir(peftkit.wrap(model, "lora", targets=embedding, rank=2))
    expected = logits(model)
    peftkit.merge(model, keep_base=False, untie=True).save_pretrained(tmp_path / "merged")
    loaded, said = reloaded(tmp_path / "merged", type(model))
    assert said == NO_COMPLAINT
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-10)


@TIED
@every_model
def test_save_unmerged(name, tied, tmp_path):
    """save_pretrained of a wrapped model writes base and adapters: plain transformers gets the base from it and names
    every adapter tensor as unexpected; a model that is wrapped alike gets all of it back.
    """
    model = stir(peftkit.wrap(from_folder(name, tmp_path, tied=tied), "lora", rank=2))
    model.save_pretrained(tmp_path / "whole")
    loaded, said = reloaded(tmp_path / "whole", type(model))
    adapters = {key for key in model.state_dict() if ".adapters." in key}
    assert adapters
    assert said == NO_COMPLAINT | {"unexpected_keys": adapters}
    torch.testing.assert_close(logits(loaded), logits(base(name, tie_word_embeddings=tied)), rtol=0, atol=1e-10)
    again = peftkit.wrap(loaded, "lora", rank=2)
    state = load_file(tmp_path / "whole" / "model.safetensors")
    left = again.load_state_dict(state, strict=False)
    assert not left.unexpected_keys
    assert set(left.missing_keys) == ({"lm_head.weight"} if tied else set())
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-10)


@every_model
def test_save_while_merged(name, tmp_path):
    """save_pretrained while merged, the originals kept, writes the merged weights: plain transformers computes the same
    with them, and names every adapter tensor as unexpected. A wrapped model does not take them.
    """
    model = stir(peftkit.wrap(from_folder(name, tmp_path, tied=False), "lora", rank=2))
    peftkit.merge(model)
    model.save_pretrained(tmp_path / "merged")
    loaded, said = reloaded(tmp_path / "merged", type(model))
    state = model.state_dict()
    ours = {key for key in state if ".adapters." in key} | {"peftkit_merged.default"}
    assert said == NO_COMPLAINT | {"unexpected_keys": ours}
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-10)
    again = peftkit.wrap(base(name, tie_word_embeddings=False), "lora", rank=2)
    before = logits(again)
    with pytest.raises(peftkit.errors.StateError, match="written while 'default' was merged"):
        again.load_state_dict(state, strict=False)
    assert torch.equal(logits(again), before)


def test_what_is_left_out_is_reported(tmp_path):
    """At its ordinary verbosity transformers warns of the adapters that it finds in a folder and cannot use."""
    stir(peftkit.wrap(base("llama"), "lora", rank=2)).save_pretrained(tmp_path)
    said = []

    class Listen(logging.Handler):
        def emit(self, record):
            said.append((record.levelname, record.getMessage()))

    listener, logger = Listen(), logging.getLogger("transformers")
    logger.addHandler(listener)
    transformers.logging.set_verbosity_warning()
    try:
        transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    finally:
        transformers.logging.set_verbosity_error()
        logger.removeHandler(listener)
    assert any(level == "WARNING" and "UNEXPECTED" in text and ".adapters." in text for level, text in said)
