"""`routed`: every sample of a batch with its own adapter equals that sample alone, or is refused by name."""

import pytest
import torch
import transformers
from torch import nn
from transformers.utils import logging

import peftkit
from peftkit import errors

SAMPLES, LENGTH, VOCABULARY = 4, 7, 64
NAMES = ["a", "b", None, "a"]
SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": VOCABULARY}


@pytest.fixture(autouse=True)
def _quiet():
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(level)


class Scaled(peftkit.Method):
    """A method that defines only `weight`."""

    name = "scaled"

    def adapter(self, site, shared=None):
        return _Scaled(site)


class _Scaled(peftkit.Adapter):
    def __init__(self, site):
        super().__init__(site)
        self.scale = site.parameter(torch.ones(site.fan_out, 1))

    def weight(self, w):
        return w * self.scale

    def bias(self, b):
        return b * self.scale.squeeze(1)


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, intermediate_size=64))


def gpt2():
    config = transformers.GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=VOCABULARY, n_positions=32)
    config.bos_token_id = config.eos_token_id = 0
    return transformers.GPT2LMHeadModel(config)


def bert():
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL, intermediate_size=64))


def t5():
    config = transformers.T5Config(
        num_layers=2, d_model=32, d_kv=8, d_ff=64, num_heads=4, vocab_size=VOCABULARY, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


def vit():
    small = {k: v for k, v in SMALL.items() if k != "vocab_size"}
    config = transformers.ViTConfig(**small, intermediate_size=64, image_size=16, patch_size=8)
    return transformers.ViTForImageClassification(config)


def moe():
    config = transformers.Qwen3MoeConfig(
        **SMALL, num_key_value_heads=2, head_dim=8, intermediate_size=64, moe_intermediate_size=16, num_experts=8,
        num_experts_per_tok=2, experts_implementation="eager",
    )  # fmt: skip
    return transformers.Qwen3MoeForCausalLM(config)


def opt():
    return transformers.OPTForCausalLM(
        transformers.OPTConfig(**SMALL, ffn_dim=64, max_position_embeddings=32, word_embed_proj_dim=32)
    )


def deberta():
    config = transformers.DebertaV2Config(
        **SMALL, intermediate_size=64, relative_attention=True, pos_att_type=["p2c", "c2p"], max_position_embeddings=32
    )
    return transformers.DebertaV2ForSequenceClassification(config)


def mamba():
    return transformers.MambaForCausalLM(
        transformers.MambaConfig(num_hidden_layers=2, hidden_size=32, vocab_size=VOCABULARY, state_size=4)
    )


def inputs(name, length):
    torch.manual_seed(3)
    if name == "vit":
        return {"pixel_values": torch.randn(SAMPLES, 3, 16, 16, dtype=torch.float64)}
    kwargs = {"input_ids": torch.randint(0, VOCABULARY, (SAMPLES, length))}
    if name == "t5":
        kwargs["decoder_input_ids"] = torch.randint(0, VOCABULARY, (SAMPLES, 5))
    if name not in ("bert", "deberta"):
        kwargs["use_cache"] = False
    return kwargs


MODELS = {f.__name__: f for f in (llama, gpt2, bert, t5, vit, moe, opt, deberta, mamba)}
EXPERTS = "**.experts.{gate_up_proj,down_proj}"
SERVED = [
    ("llama", "@linear", "lora"), ("llama", "**", "lora"), ("llama", "@linear", Scaled()), ("gpt2", "**", "lora"),
    ("gpt2", "**", Scaled()), ("bert", "**", "lora"), ("bert", "@linear", Scaled()), ("t5", "@linear", "lora"),
    ("vit", "**", "lora"), ("moe", ["@linear", EXPERTS], "lora"), ("opt", "**", "lora"),
]  # fmt: skip


def adapted(make, method, targets, names=("a", "b")):
    torch.manual_seed(0)
    model = make().double().eval()
    for seed, name in enumerate(names):
        torch.manual_seed(seed + 1)
        fields = {"rank": 2} if method == "lora" else {}
        model = peftkit.wrap(model, method, targets=targets, name=name, **fields)
        with torch.no_grad():
            for tensor in peftkit.state_dict(model, name).values():
                tensor.add_(torch.randn_like(tensor) * 0.1)
    return model


def alone(model, kwargs, names=NAMES):
    """Each sample by itself, with its adapter."""
    rows = []
    for i, name in enumerate(names):
        with peftkit.using(model, *([name] if name else [])):
            rows.append(
                model(**{k: v[i : i + 1] if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}).logits
            )
    return torch.cat(rows)


@pytest.mark.parametrize("length", [LENGTH, SAMPLES], ids=["T!=N", "T==N"])
@pytest.mark.parametrize("name, targets, method", SERVED)
def test_every_sample_equals_itself_alone(name, targets, method, length):
    """In one batch with others, a sample's output is what it is alone; also where the sequence is as long as the batch."""
    model, kwargs = adapted(MODELS[name], method, targets), inputs(name, length)
    with torch.no_grad():
        expected = alone(model, kwargs)
        for split in (False, True):
            with peftkit.routed(model, NAMES, split=split):
                torch.testing.assert_close(model(**kwargs).logits, expected, rtol=0, atol=1e-12)
        assert not torch.allclose(expected, model(**kwargs).logits)


@pytest.mark.parametrize("name, targets, method", SERVED[:8])
def test_gradients_in_training(name, targets, method):
    """Training a mixed batch gives every adapter the gradients of its own samples."""
    model, kwargs = adapted(MODELS[name], method, targets), inputs(name, LENGTH)
    alone(model, kwargs).pow(2).sum().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert len({n.split(".adapters.")[1].split(".")[0] for n in expected}) == 2
    model.zero_grad()
    with peftkit.routed(model, NAMES):
        model(**kwargs).logits.pow(2).sum().backward()
    for n, p in model.named_parameters():
        if n in expected:
            torch.testing.assert_close(p.grad, expected[n], rtol=1e-9, atol=1e-12)


REFUSED = [
    ("t5", "**", r"relative_attention_bias \(Embedding\)"),
    ("deberta", "@linear", r"pos_key_proj \(Linear\).*\[1, "),
    ("mamba", "@linear", "x_proj is read by the MambaMixer"),
]


@pytest.mark.parametrize("name, targets, words", REFUSED)
def test_what_cannot_be_known_is_refused_by_name(name, targets, words):
    """A layer whose rows cannot be told is named, with the remedy; and `split=True` serves that model."""
    model, kwargs = adapted(MODELS[name], "lora", targets), inputs(name, LENGTH)
    with torch.no_grad():
        with (
            pytest.raises(errors.UnsupportedLayerError, match=rf"(?s){words}.*split=True"),
            peftkit.routed(model, NAMES),
        ):
            model(**kwargs)
        expected = alone(model, kwargs)
        with peftkit.routed(model, NAMES, split=True):
            torch.testing.assert_close(model(**kwargs).logits, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("make", [llama, gpt2, t5])
def test_generation(make, beams):
    """Generated tokens are those of each sample alone, with a cache and with beams, whose rows are repeated."""
    model = adapted(make, "lora", "@linear")
    ids = torch.randint(1, VOCABULARY, (SAMPLES, 5), generator=torch.Generator().manual_seed(1))
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "num_beams": beams, "do_sample": False, "pad_token_id": 0}
    options["attention_mask"] = torch.ones(1, 5, dtype=torch.long)
    expected = []
    for i, name in enumerate(NAMES):
        with peftkit.using(model, *([name] if name else [])):
            expected.append(model.generate(ids[i : i + 1], **options))
    options["attention_mask"] = torch.ones_like(ids)
    with peftkit.routed(model, NAMES):
        assert torch.equal(model.generate(ids, **options), torch.cat(expected))
    assert len({tuple(row.tolist()) for row in torch.cat(expected)}) > 1


@pytest.mark.parametrize("make", [nn.LSTM, nn.GRU], ids=["LSTM", "GRU"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_recurrent_layers(make, batch_first):
    """A recurrent layer's batch is where the layer says; a sequence-first model says `dim=1`."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = make(6, 6, batch_first=batch_first)
            self.out = nn.Linear(6, 3)

        def forward(self, x):
            y, _ = self.rnn(x)
            return self.out(y)

    model = adapted(Model, "lora", ["rnn", "out"])
    dim = 0 if batch_first else 1
    x = torch.randn(*((SAMPLES, LENGTH) if batch_first else (LENGTH, SAMPLES)), 6, dtype=torch.float64)
    rows = []
    for i, name in enumerate(NAMES):
        with peftkit.using(model, *([name] if name else [])):
            rows.append(model(x.narrow(dim, i, 1)))
    with peftkit.routed(model, NAMES, dim=dim):
        torch.testing.assert_close(model(x), torch.cat(rows, dim), rtol=0, atol=1e-12)
    if not batch_first:
        with (
            pytest.raises(errors.UnsupportedLayerError, match=r"batch_first=False.*dim=1"),
            peftkit.routed(model, NAMES),
        ):
            pass


def test_convolutions_and_batch_norm():
    """Convolutions are split by their first dimension; an adapted batch norm couples samples in training, and is refused."""
    model = adapted(
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 5)), "lora", ["0", "3"]
    )
    x = torch.randn(SAMPLES, 3, 6, 6, dtype=torch.float64)
    rows = []
    for i, name in enumerate(NAMES):
        with peftkit.using(model, *([name] if name else [])):
            rows.append(model(x[i : i + 1]))
    with peftkit.routed(model, NAMES):
        torch.testing.assert_close(model(x), torch.cat(rows), rtol=0, atol=1e-12)

    norm = adapted(
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), peftkit.Full(keep_base=True), "1"
    ).train()
    with pytest.raises(errors.UnsupportedLayerError, match="BatchNorm2d"), peftkit.routed(norm, NAMES):
        norm(x)


def test_gradient_checkpointing_inside_the_block():
    """With backward inside the block, checkpointed gradients are the plain ones; outside, it is an error."""
    model, kwargs = adapted(llama, "lora", "@linear"), inputs("llama", LENGTH)
    model.train()
    with peftkit.routed(model, NAMES):
        model(**kwargs).logits.pow(2).sum().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for layer in model.model.layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = lambda f, *args: torch.utils.checkpoint.checkpoint(
            f, *args, use_reentrant=False
        )
    with peftkit.routed(model, NAMES):
        model(**kwargs).logits.pow(2).sum().backward()
    assert all(torch.allclose(p.grad, expected[n]) for n, p in model.named_parameters() if n in expected)
    with peftkit.routed(model, NAMES):
        loss = model(**kwargs).logits.pow(2).sum()
    with pytest.raises(errors.StateError, match="backward"):
        loss.backward()


def test_the_context_leaves_nothing_behind():
    """What was active before is so again, also after an error; hooks and forwards are the model's own."""
    model, kwargs = adapted(bert, "lora", "@linear"), inputs("bert", LENGTH)
    peftkit.activate(model, "b")
    with torch.no_grad():
        before = model(**kwargs).logits
        attributes = sorted(model.__dict__)
        for split in (False, True):
            handle = model.classifier.register_forward_hook(lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError), peftkit.routed(model, NAMES, split=split):
                model(**kwargs)
            handle.remove()
        assert torch.equal(model(**kwargs).logits, before)
    assert sorted(model.__dict__) == attributes
    assert not model._forward_pre_hooks
    assert not model._forward_hooks


def test_wrong_calls():
    """Unknown names, a batch that does not fit, no names, merged adapters, in-place weights, surrounding adapters."""
    model, kwargs = adapted(bert, "lora", "@linear"), inputs("bert", LENGTH)
    with pytest.raises(errors.UnknownAdapterError, match="'c'"), peftkit.routed(model, ["a", "c"]):
        pass
    with pytest.raises(errors.StateError, match="no multiple of the 3"), peftkit.routed(model, ["a", "b", None]):
        model(**kwargs)
    with pytest.raises(errors.StateError, match="got none"), peftkit.routed(model, []):
        pass
    peftkit.merge(model)
    with pytest.raises(errors.StateError, match="unmerge"), peftkit.routed(model, NAMES):
        pass
    peftkit.unmerge(model)
    peftkit.wrap(model, "full", targets="classifier", name="head")
    with pytest.raises(errors.StateError, match="keep_base=True"), peftkit.routed(model, NAMES):
        pass


def test_one_adapter_for_all_is_the_plain_forward():
    """With one name for every sample nothing is grouped, and nothing can be refused."""
    model, kwargs = adapted(deberta, "lora", "@linear"), inputs("deberta", LENGTH)
    with torch.no_grad(), peftkit.using(model, "a"):
        expected = model(**kwargs).logits
    with torch.no_grad(), peftkit.routed(model, ["a"] * SAMPLES):
        assert torch.equal(model(**kwargs).logits, expected)
