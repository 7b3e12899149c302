"""Prompts against the same model with tokens put before its input by hand, and against HF PEFT.

A prompt that starts as the embeddings of tokens is those tokens: so at its start everything that the model does with it,
logits, losses, caches, generation, must equal what the bare model does with these tokens before its input.
"""

import copy
import doctest
import importlib
import pickle

import peft
import pytest
import torch
import transformers as hf
from torch import nn

import peftkit
from peftkit.testing import parametrize_with_checks
from peftkit.testing.cases import Case, LanguageModel
from peftkit_prompt.p_tuning import PTuning
from peftkit_prompt.prefix_tuning import PrefixTuning
from peftkit_prompt.prompt_tuning import PromptTuning

TEXT = {"vocab_size": 40, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
TINY_T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_heads": 2, "dropout_rate": 0.0, "decoder_start_token_id": 0}

DECODERS = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT, **SIZES, num_key_value_heads=2)),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**TEXT, n_embd=16, n_layer=2, n_head=2, n_positions=64)),
    "falcon": lambda: hf.FalconForCausalLM(hf.FalconConfig(**TEXT, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)),
    "gemma3": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**TEXT, **SIZES, num_key_value_heads=2, head_dim=8, sliding_window=8)),
}  # fmt: skip
OTHERS = {
    "mamba": lambda: hf.MambaForCausalLM(hf.MambaConfig(**TEXT, hidden_size=16, num_hidden_layers=2, state_size=4)),
    "bert": lambda: hf.BertForSequenceClassification(hf.BertConfig(**{**TEXT, "pad_token_id": 0}, **SIZES, num_labels=3)),
    "t5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**TEXT, **TINY_T5, num_layers=2, num_decoder_layers=1)),
    "bart": lambda: hf.BartForConditionalGeneration(hf.BartConfig(**TEXT, d_model=16, encoder_layers=2, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, decoder_start_token_id=0, forced_eos_token_id=None)),
    "plain": lambda: LanguageModel(vocabulary=40),
}  # fmt: skip
MODELS = {**DECODERS, **OTHERS}
SEQ2SEQ = ("t5", "bart")

IDS = torch.tensor([[11, 12, 13, 14, 15], [21, 22, 23, 24, 25]])
PADDED = torch.tensor([[0, 0, 13, 14, 15], [21, 22, 23, 24, 25]])
MASK = (PADDED != 0).long()
PROMPT = (5, 6, 7)
BEFORE = torch.tensor([PROMPT, PROMPT])
ONES = torch.ones_like(BEFORE)
N = len(PROMPT)

METHODS = {
    "prompt_tuning": PromptTuning(tokens=N, init_ids=PROMPT),
    "p_tuning": PTuning(tokens=N, width=8),
    "p_tuning lstm": PTuning(tokens=N, width=8, encoder="lstm"),
    "prefix_tuning": PrefixTuning(tokens=N, init_ids=PROMPT),
    "prefix_tuning projected": PrefixTuning(tokens=N, projection=True, width=8),
}
PREFIX = METHODS["prefix_tuning"]
EXACT = {name: METHODS[name] for name in ("prompt_tuning", "prefix_tuning")}
EVERY_METHOD = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
EVERY_EXACT = pytest.mark.parametrize("method", EXACT.values(), ids=EXACT)
EVERY_DECODER = pytest.mark.parametrize("kind", DECODERS)


@pytest.fixture(autouse=True)
def seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def made(kind):
    torch.manual_seed(1)
    return MODELS[kind]().eval()


def pair(kind, method):
    """A wrapped model, and the same bare."""
    bare = made(kind)
    return peftkit.wrap(copy.deepcopy(bare), method), bare


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def stirred(model):
    with torch.no_grad():
        for p in trained(model):
            p.add_(torch.randn_like(p) * p.std() * 0.3)
    return model


def by_hand(ids):
    return torch.cat([BEFORE, ids], 1)


def logits(model, ids=IDS, **inputs):
    output = model(ids, **inputs) if isinstance(model, LanguageModel) else model(input_ids=ids, **inputs)
    return output if isinstance(output, torch.Tensor) else output.logits


def close(a, b):
    torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-5)


OPTIONS = {"max_new_tokens": 7, "do_sample": False}


def generate(model, ids=IDS, **options):
    """The new tokens."""
    options = {**OPTIONS, "attention_mask": torch.ones_like(ids), **options}
    out = model.generate(input_ids=ids, **options)
    return out[:, -OPTIONS["max_new_tokens"] :]


# ------------------------------------------------------------------------- one forward, against tokens by hand


@pytest.mark.parametrize("kind", MODELS)
def test_prompt_tuning_is_tokens_before_the_input(kind):
    """A prompt of given tokens gives the logits of the bare model with those tokens before its input."""
    model, bare = pair(kind, METHODS["prompt_tuning"])
    extra = {"decoder_input_ids": IDS} if kind in SEQ2SEQ else {}

    expected = logits(bare, by_hand(IDS), **extra)
    close(logits(model, **extra), expected[:, N:] if expected.dim() == 3 and not extra else expected)


@EVERY_DECODER
def test_prefix_tuning_is_tokens_before_the_input(kind):
    """So does a prefix of given tokens, whose keys and values the model itself has computed."""
    model, bare = pair(kind, PREFIX)

    close(logits(model), logits(bare, by_hand(IDS))[:, N:])


@pytest.mark.parametrize("kind", SEQ2SEQ)
def test_prefix_tuning_in_an_encoder_decoder_is_for_the_decoder(kind):
    """There the prefix is what the decoder has read: with one layer, that does not depend on the encoder."""
    model, bare = pair(kind, PREFIX)

    close(
        logits(model, decoder_input_ids=IDS, attention_mask=MASK),
        logits(bare, decoder_input_ids=by_hand(IDS), attention_mask=MASK)[:, N:],
    )


@EVERY_EXACT
@EVERY_DECODER
def test_loss(kind, method):
    """Labels are for the tokens of the input alone: the prompt's positions do not count."""
    model, bare = pair(kind, method)
    labels = torch.cat([torch.full_like(BEFORE, -100), IDS], 1)

    ours = model(input_ids=IDS, attention_mask=MASK, labels=IDS)
    theirs = bare(input_ids=by_hand(IDS), attention_mask=torch.cat([ONES, MASK], 1), labels=labels)

    assert ours.logits.shape[:2] == IDS.shape
    if method.name == "prompt_tuning":
        close(ours.loss, theirs.loss)
    else:  # a prefix has no last position of its own that would predict the first token
        labels[:, N] = -100
        close(ours.loss, bare(input_ids=by_hand(IDS), attention_mask=torch.cat([ONES, MASK], 1), labels=labels).loss)


@EVERY_EXACT
@EVERY_DECODER
def test_left_padding_and_positions(kind, method):
    """A padded batch: the mask grows by the prompt, and positions given move behind it."""
    model, bare = pair(kind, method)
    positions = (MASK.cumsum(1) - 1).clamp(min=0)
    all_positions = torch.cat([torch.arange(N).expand(2, -1), positions + N], 1)

    ours = logits(model, PADDED, attention_mask=MASK, position_ids=positions)
    theirs = logits(bare, by_hand(PADDED), attention_mask=torch.cat([ONES, MASK], 1), position_ids=all_positions)

    close(ours[MASK.bool()], theirs[:, N:][MASK.bool()])


@pytest.mark.parametrize("embedded", [False, True])
def test_embeddings_and_positional_arguments(embedded):
    """Inputs may come embedded, or by position."""
    model, bare = pair("llama", METHODS["prompt_tuning"])
    expected = logits(bare, by_hand(IDS))[:, N:]

    given = (None, None, None, None, bare.get_input_embeddings()(IDS)) if embedded else (IDS,)
    close(model(*given).logits, expected)


@pytest.mark.parametrize("kept", [0, 2, 5, 7, torch.tensor([0, 3])], ids=str)
def test_logits_to_keep(kept):
    """The logits asked for are those of the input's tokens."""
    model, bare = pair("llama", METHODS["prompt_tuning"])
    everything = logits(bare, by_hand(IDS))[:, N:]

    expected = everything[:, kept] if isinstance(kept, torch.Tensor) else everything[:, -kept:]
    close(logits(model, logits_to_keep=kept), expected)


def test_question_answering_positions():
    """Answers' positions count in the input: they are moved behind the prompt, and scores are cut."""
    config = hf.BertConfig(**TEXT, **SIZES)
    bare = hf.BertForQuestionAnswering(config).eval()
    model = peftkit.wrap(copy.deepcopy(bare), METHODS["prompt_tuning"])
    start, end = torch.tensor([0, 2]), torch.tensor([1, 4])

    ours = model(input_ids=IDS, start_positions=start, end_positions=end, token_type_ids=torch.zeros_like(IDS))
    theirs = bare(input_ids=by_hand(IDS), start_positions=start + N, end_positions=end + N)

    close(ours.loss, theirs.loss)
    close(ours.start_logits, theirs.start_logits[:, N:])


def test_decoders_that_classify_are_padded_on_the_left():
    """They score the last position of embedded tokens: right where padding is on the left, refused where it is not."""
    bare = hf.LlamaForSequenceClassification(hf.LlamaConfig(**TEXT, **SIZES, num_labels=3)).eval()
    model = peftkit.wrap(copy.deepcopy(bare), METHODS["prompt_tuning"])
    mask = torch.cat([ONES, MASK], 1)

    close(logits(model, PADDED, attention_mask=MASK), logits(bare, by_hand(PADDED), attention_mask=mask))
    for options in ({"attention_mask": MASK.flip(1)}, {}):
        with pytest.raises(peftkit.errors.UnsupportedLayerError, match="pad on the left"):
            model(input_ids=PADDED.flip(1), **options)


def test_tuples_are_cut_too():
    """With return_dict=False the same."""
    model, bare = pair("gpt2", METHODS["prompt_tuning"])

    close(model(input_ids=IDS, return_dict=False, use_cache=False)[0], logits(bare, by_hand(IDS))[:, N:])


def test_an_encoder_alone():
    """T5's encoder as a model: the prompt goes in once, and comes out of the output again."""
    bare = hf.T5EncoderModel(hf.T5Config(**TEXT, **TINY_T5, num_layers=1)).eval()
    model = peftkit.wrap(copy.deepcopy(bare), METHODS["prompt_tuning"])

    ours = model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).last_hidden_state
    close(ours, bare(input_ids=by_hand(IDS)).last_hidden_state[:, N:])


def test_several_prompts():
    """Prompts that are active at once stand in the order in which they were activated."""
    bare = made("llama")
    model = copy.deepcopy(bare)
    for name, ids in (("a", (5, 6)), ("b", (7, 8, 9))):
        model = peftkit.wrap(model, PromptTuning(tokens=len(ids), init_ids=ids), name=name)

    def tokens(*ids):
        return torch.cat([torch.tensor([ids, ids]), IDS], 1)

    close(logits(model), logits(bare, tokens(5, 6, 7, 8, 9))[:, 5:])
    peftkit.activate(model, "b", "a")
    close(logits(model), logits(bare, tokens(7, 8, 9, 5, 6))[:, 5:])
    assert torch.equal(generate(model), generate(bare, tokens(7, 8, 9, 5, 6)))
    assert torch.equal(generate(model), generate(model, use_cache=False))
    with peftkit.disabled(model):
        close(logits(model), logits(bare))


def test_prompt_and_prefix_and_lora_together():
    """A prompt, a prefix and LoRA at once: generation with a cache equals generation without."""
    model = made("llama")
    for method in (METHODS["prompt_tuning"], peftkit.LoRA(rank=2)):
        model = stirred(peftkit.wrap(model, method, name=method.name))
    model = peftkit.wrap(model, PREFIX, name="prefix")
    peftkit.activate(model, "prompt_tuning", "prefix", "lora")

    assert torch.equal(generate(model), generate(model, use_cache=False))
    peftkit.activate(model, "prefix", "prompt_tuning", "lora")
    assert torch.equal(generate(model), generate(model, use_cache=False))


# --------------------------------------------------------------------------------------------------- generation


@EVERY_METHOD
@EVERY_DECODER
def test_generation_with_a_cache_equals_the_loop_without(kind, method):
    """Greedy tokens with a cache are those that each step from the start gives."""
    model = stirred(peftkit.wrap(made(kind), method))

    for ids in (IDS, PADDED):
        mask = (ids != 0).long()
        assert torch.equal(
            generate(model, ids, attention_mask=mask), generate(model, ids, attention_mask=mask, use_cache=False)
        )


@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"prefill_chunk_size": 2}], ids=str
)
@EVERY_EXACT
@EVERY_DECODER
def test_ways_to_generate(kind, method, options):
    """Beams, prompt lookup and a chunked prefill give what the bare model gives after the tokens by hand."""
    model, bare = pair(kind, method)
    ids = IDS[:1]
    before = torch.cat([BEFORE[:1], ids], 1)
    plain = {k: v for k, v in options.items() if k == "num_beams"}

    assert torch.equal(generate(model, ids, **options), generate(bare, before, **plain))


@pytest.mark.parametrize("kind", ["mamba", *SEQ2SEQ])
def test_other_models_generate(kind):
    """A state space model, whose cache has no length, and encoder-decoders, whose encoder is called directly."""
    model, bare = pair(kind, METHODS["prompt_tuning"])

    assert torch.equal(generate(model), generate(bare, by_hand(IDS)))
    close(
        model.generate(IDS, attention_mask=MASK, output_logits=True, return_dict_in_generate=True, **OPTIONS).logits,
        bare.generate(
            by_hand(IDS), attention_mask=torch.cat([ONES, MASK], 1), output_logits=True, return_dict_in_generate=True, **OPTIONS
        ).logits,
    )  # fmt: skip
    if kind in SEQ2SEQ:
        assert torch.equal(generate(model, num_beams=2), generate(bare, by_hand(IDS), num_beams=2))


def test_assisted_generation():
    """A prompted model can be assisted by a bare one."""
    model, bare = pair("llama", METHODS["prompt_tuning"])
    ids = IDS[:1]

    assert torch.equal(generate(model, ids, assistant_model=copy.deepcopy(bare)), generate(model, ids))


@pytest.mark.parametrize("whole", [True, False], ids=["all tokens", "new tokens"])
@EVERY_EXACT
@EVERY_DECODER
def test_a_second_turn(kind, method, whole):
    """`generate` goes on from the cache of its first turn, whether it gets the whole text or what is new."""
    model, bare = pair(kind, method)

    def two_turns(model, ids):
        first = model.generate(ids, attention_mask=torch.ones_like(ids), return_dict_in_generate=True, **OPTIONS)
        text = torch.cat([first.sequences, IDS], 1)
        cache = copy.deepcopy(first.past_key_values)
        given = text if whole else text[:, -IDS.shape[1] - 1 :]
        mask = torch.ones_like(text)
        return model.generate(given, attention_mask=mask, past_key_values=cache, **OPTIONS)[
            :, -OPTIONS["max_new_tokens"] :
        ]

    assert torch.equal(two_turns(model, IDS), two_turns(bare, by_hand(IDS)))


@pytest.mark.parametrize("named", [True, False], ids=["named outputs", "tuples"])
@EVERY_EXACT
def test_a_cache_by_hand(method, named):
    """Going on token by token with the cache that the model returns equals one forward."""
    model, _ = pair("llama", method)
    cache, steps = None, []
    for token in IDS.T[:, :, None]:
        output = model(input_ids=token, past_key_values=cache, use_cache=True, return_dict=named)
        scores, cache = output.values() if named else output
        steps.append(scores)

    close(torch.cat(steps, 1), logits(model))
    assert cache.get_seq_length() == IDS.shape[1]
    cache.reset()
    close(model(input_ids=IDS, past_key_values=cache).logits, logits(model))


# --------------------------------------------------------------------------------------------------- what is refused


@EVERY_EXACT
def test_static_caches_and_masks_of_four_dimensions_are_refused(method):
    """A static cache is sized without the prompt, and a mask in four dimensions cannot be lengthened."""
    model, _ = pair("llama", method)

    with pytest.raises(peftkit.errors.UnsupportedLayerError, match="static"):
        generate(model, cache_implementation="static")
    with pytest.raises(peftkit.errors.UnsupportedLayerError, match=r"got attention_mask \[2, 1, 5, 5\]"):
        model(input_ids=IDS, attention_mask=torch.ones(2, 1, 5, 5))
    with pytest.raises(peftkit.errors.UnsupportedLayerError, match="static"):
        model(input_ids=IDS, past_key_values=hf.StaticCache(config=model.config, max_cache_len=20))


@EVERY_EXACT
def test_a_cache_that_was_filled_without_the_prompt_is_refused(method):
    """Such a text does not begin with the prompt."""
    model, bare = pair("llama", method)
    cache = bare(input_ids=IDS, use_cache=True).past_key_values

    with pytest.raises(peftkit.errors.StateError, match="was not active"):
        model(input_ids=IDS, past_key_values=cache)


def test_encoder_outputs_without_the_prompt_are_refused():
    """Nor does what the encoder has made without it."""
    model, bare = pair("t5", METHODS["prompt_tuning"])
    encoded = bare.get_encoder()(input_ids=IDS)

    with pytest.raises(peftkit.errors.StateError, match="without its prompt"):
        model(encoder_outputs=encoded, attention_mask=torch.ones_like(IDS), decoder_input_ids=IDS)


@pytest.mark.parametrize("method", [METHODS["prompt_tuning"], METHODS["p_tuning"], PREFIX], ids=lambda m: m.name)
def test_a_model_that_takes_no_tokens_is_refused(method):
    """A prompt needs a language model; the error says what is missing."""
    model = nn.Sequential(nn.Linear(2, 2))

    with pytest.raises(peftkit.errors.UnsupportedLayerError, match=r"Sequential.*targets="):
        peftkit.wrap(model, method)


@pytest.mark.parametrize("kind", ["bert", "mamba", "plain"])
def test_prefix_tuning_needs_a_cache_of_keys_and_values(kind):
    """A model that keeps none is refused when it is wrapped."""
    with pytest.raises((peftkit.errors.UnsupportedLayerError), match="prompt_tuning works without"):
        peftkit.wrap(made(kind), PREFIX)


def test_prefix_tuning_refuses_gradient_checkpointing():
    """Checkpointed blocks drop the cache: an error, and no silent loss of the prefix."""
    for kind in ("llama", "gpt2"):
        model = peftkit.wrap(made(kind), PREFIX).train()
        model.activation_checkpointing_enable()

        with pytest.raises(peftkit.errors.StateError, match="activation_checkpointing_disable"):
            model(input_ids=IDS, labels=IDS)


@pytest.mark.parametrize("method", [METHODS["prompt_tuning"], METHODS["p_tuning lstm"]], ids=lambda m: m.name)
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "bert"])
def test_prompts_under_gradient_checkpointing(kind, reentrant, method):
    """Prompts train the same with checkpointed blocks, of both kinds."""
    model = peftkit.wrap(made(kind), method).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0

    def gradients():
        model.zero_grad()
        model(input_ids=IDS, labels=torch.tensor([0, 2]) if kind == "bert" else IDS).loss.backward()
        return [p.grad.clone() for p in trained(model)]

    plain = gradients()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    torch.testing.assert_close(gradients(), plain, atol=1e-6, rtol=1e-4)


WRONG = [
    (PromptTuning, {"tokens": [0, -1, 1.5, "x", None, True], "init": ["x", None], "init_ids": [[], [-1], "ab", 3, [1.5]]}),
    (PTuning, {"tokens": [0, "x"], "encoder": ["x"], "width": [0, "x"], "layers": [0], "dropout": [1.0, "x", 0.5]}),
    (PrefixTuning, {"tokens": [0, "x"], "init": ["x"], "projection": [1, None], "width": [0, None]}),
]  # fmt: skip


@pytest.mark.parametrize(
    "method, field, value", [(m, f, v) for m, fields in WRONG for f, values in fields.items() for v in values]
)
def test_wrong_fields(method, field, value):
    """A wrong value is refused with the field's name."""
    with pytest.raises(peftkit.errors.FieldError, match=field):
        method(**{field: value})


def test_init_ids_outside_of_the_vocabulary():
    """Ids that the model does not have are refused."""
    with pytest.raises(peftkit.errors.FieldError, match="40 tokens"):
        peftkit.wrap(made("llama"), PromptTuning(init_ids=[40]))


# ----------------------------------------------------------------------------------------------- what goes with them


def test_starts():
    """From the vocabulary, a prompt is rows of it, each token by itself; a normal one is as large as they are."""
    for init in ("vocabulary", "normal"):
        model = peftkit.wrap(made("gpt2"), PromptTuning(tokens=50, init=init))
        (prompt,) = trained(model)
        vocabulary = model.get_input_embeddings().weight
        inside = (prompt[:, None] == vocabulary).all(-1).any(1)
        assert inside.all() == (init == "vocabulary")
        assert abs(prompt.std() / vocabulary.std() - 1) < 0.2


def test_repeated_init_ids():
    """Fewer ids than tokens are repeated, more are cut."""
    model = peftkit.wrap(made("gpt2"), PromptTuning(tokens=5, init_ids=[3, 4]))
    (prompt,) = trained(model)

    assert torch.equal(prompt, model.get_input_embeddings().weight[[3, 4, 3, 4, 3]])
    assert PromptTuning(init_ids=[3, 4]) == PromptTuning.from_fields(PromptTuning(init_ids=[3, 4]).fields())


@EVERY_METHOD
@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "bert", "mamba", "plain"])
def test_training_lowers_the_loss(kind, method):
    """A few steps lower the loss, everything that is to train gets a gradient, and the base keeps its bits."""
    if method.name == "prefix_tuning" and kind in ("bert", "mamba", "plain"):
        with pytest.raises(peftkit.errors.UnsupportedLayerError):
            peftkit.wrap(made(kind), method)
        return
    model = made(kind)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    model = peftkit.wrap(model, method).train()
    optimizer = torch.optim.Adam(trained(model), lr=0.03)
    labels = torch.tensor([0, 2]) if kind == "bert" else IDS
    losses = []
    for _ in range(12):
        torch.manual_seed(3)  # the same dropout
        output = model(IDS, labels=labels)
        loss = output[0] if isinstance(output, tuple) else output.loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    assert losses[-1] < losses[0] - 1e-3
    assert all(p.grad is not None and p.grad.any() for p in trained(model))
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


@pytest.mark.usefixtures("installed")
@EVERY_METHOD
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_save_and_load(kind, method, tmp_path):
    """A file brings the prompt onto a fresh base, bit for bit; unwrapping gives the base back."""
    model, fresh = pair(kind, method)
    extra = {"decoder_input_ids": IDS} if kind == "t5" else {}
    before = logits(fresh, **extra)
    adapted = logits(stirred(model), **extra)
    peftkit.save(model, tmp_path / "prompt.safetensors")

    peftkit.load(fresh, tmp_path / "prompt.safetensors")

    assert not torch.equal(adapted, before)
    assert torch.equal(logits(fresh, **extra), adapted)
    keys = list(made(kind).state_dict())
    assert torch.equal(logits(peftkit.unwrap(fresh), **extra), before)
    assert list(fresh.state_dict()) == keys


@EVERY_METHOD
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_routed_by_splitting(kind, method):
    """Each sample gets its own prompt when the batch is split by adapter; layer by layer is refused."""
    model = made(kind)
    for name in ("a", "b"):
        model = stirred(peftkit.wrap(model, method, name=name))
    extra = {"decoder_input_ids": IDS} if kind == "t5" else {}
    alone = []
    for i, name in enumerate(("b", "a")):
        with peftkit.using(model, name):
            row = {k: v[i : i + 1] for k, v in extra.items()}
            alone.append(logits(model, IDS[i : i + 1], use_cache=False, **row))
    with peftkit.routed(model, ["b", "a"], split=True):
        close(logits(model, use_cache=False, **extra), torch.cat(alone))
    with pytest.raises(peftkit.errors.UnsupportedLayerError, match="split=True"), peftkit.routed(model, ["b", "a"]):
        pass


def test_a_second_prefix_starts_from_the_bare_model():
    """What a prefix starts from does not depend on which adapters the model already has."""
    once, _ = pair("llama", PREFIX)
    model = peftkit.wrap(stirred(peftkit.wrap(made("llama"), peftkit.LoRA(rank=2))), METHODS["prompt_tuning"], name="p")
    model = peftkit.wrap(model, PREFIX, name="prefix")

    (first,), (second,) = (peftkit.state_dict(m, n).values() for m, n in ((once, "default"), (model, "prefix")))
    assert torch.equal(first, second)


@EVERY_METHOD
def test_copies(method):
    """A wrapped model can be copied and pickled; the copy has a prompt of its own."""
    model = stirred(peftkit.wrap(made("llama"), method))
    expected = logits(model)

    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(copied), expected)
        stirred(copied)
        assert not torch.equal(logits(copied), expected)
    assert torch.equal(logits(model), expected)


@EVERY_METHOD
def test_on_the_meta_device(method):
    """A model without values can be wrapped, and has the shapes of one with values."""
    real, there = peftkit.wrap(made("llama"), method), made("llama").to("meta")
    there = peftkit.wrap(there, method)

    assert {n: p.shape for n, p in there.named_parameters()} == {n: p.shape for n, p in real.named_parameters()}
    assert {p.device.type for p in there.parameters()} == {"meta"}


@EVERY_METHOD
def test_planning_and_wrapping_leave_the_model_alone(method):
    """Nothing is switched to evaluation, and a plan draws no random numbers."""
    model = made("gpt2").train()
    state = torch.get_rng_state()
    planned = peftkit.plan(model, method)
    assert torch.equal(torch.get_rng_state(), state)

    model = peftkit.wrap(model, method)

    assert all(module.training for module in model.modules())
    assert sum(row.parameters for row in planned.rows) == sum(p.numel() for p in trained(model))


@EVERY_METHOD
def test_half_precision(method):
    """On a bf16 base the prompt is float32, and the output keeps the base's dtype; autocast works."""
    model = peftkit.wrap(made("llama").to(torch.bfloat16), method)

    assert {p.dtype for p in trained(model)} == {torch.float32}
    assert logits(model).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert logits(model.float()).isfinite().all()


@pytest.mark.parametrize("kind", ["plain", "llama"])
@pytest.mark.parametrize("method", [METHODS["prompt_tuning"], METHODS["p_tuning"]], ids=lambda m: m.name)
def test_compiles_as_one_graph(kind, method):
    """torch.compile takes the model with its prompt in one graph."""
    torch.compiler.reset()
    model = stirred(peftkit.wrap(made(kind), method))
    options = {"use_cache": False} if kind == "llama" else {}

    close(logits(torch.compile(model, fullgraph=True, backend="eager"), **options), logits(model, **options))


# ------------------------------------------------------------------------------------------------------- HF PEFT

HF_PEFT = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
TASKS = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM", "bert": "SEQ_CLS"}


def with_hf_peft(kind, config_class, **fields):
    """HF PEFT's model, and what it saves."""
    model = made(kind)
    fields = {"num_transformer_submodules": 1, **fields}
    config = config_class(task_type=TASKS[kind], num_virtual_tokens=N, **fields)
    theirs = peft.get_peft_model(model, config).eval()
    return theirs, theirs.get_prompt_embedding_to_save("default")


def ours_with(kind, method, **tensors):
    """Our model with these tensors in its shared state."""
    model = peftkit.wrap(made(kind), method)
    state = {k: tensors[k.rpartition(".")[2]].reshape(v.shape) for k, v in peftkit.state_dict(model).items()}
    peftkit.load_state_dict(model, state)
    return model


@HF_PEFT
@pytest.mark.parametrize("method", [PromptTuning(tokens=N), PrefixTuning(tokens=N)], ids=lambda m: m.name)
def test_names_in_hf_peft(method):
    """What the method says of HF PEFT's configuration and files is what these have."""
    fields = {theirs: getattr(method, ours) for ours, theirs in method.hf.fields.items()}
    theirs = peft.get_peft_model(
        made("llama"),
        peft.get_peft_config(
            {"peft_type": method.hf.peft_type, "task_type": "CAUSAL_LM", **fields, **method.hf.constants}
        ),
    )
    saved = peft.get_peft_model_state_dict(theirs)
    ours = peftkit.state_dict(peftkit.wrap(made("llama"), method))

    assert set(saved) == set(method.hf.shared.values())
    assert {k.rpartition(".")[2]: v.shape for k, v in ours.items()} == {
        name: saved[there].shape for name, there in method.hf.shared.items()
    }


@HF_PEFT
@pytest.mark.parametrize("kind", TASKS)
def test_prompt_tuning_equals_hf_peft(kind):
    """With the same prompt, the same loss; logits too, where HF PEFT's still have the prompt's positions in front."""
    theirs, prompt = with_hf_peft(kind, peft.PromptTuningConfig)
    ours = ours_with(kind, PromptTuning(tokens=N), prompt=prompt)
    labels = torch.tensor([0, 2]) if kind == "bert" else IDS
    inputs = {"input_ids": PADDED, "attention_mask": MASK, "labels": labels}

    a, b = ours(**inputs), theirs(**inputs)

    close(a.loss, b.loss)
    close(a.logits, b.logits[:, N:] if TASKS[kind] == "CAUSAL_LM" else b.logits)


@HF_PEFT
@pytest.mark.parametrize("encoder", ["mlp", "lstm"])
@pytest.mark.parametrize("kind", TASKS)
def test_p_tuning_equals_hf_peft(kind, encoder):
    """With the same network, the same loss and logits."""
    theirs, _ = with_hf_peft(kind, peft.PromptEncoderConfig, encoder_hidden_size=8, encoder_reparameterization_type=encoder.upper())  # fmt: skip
    network = theirs.prompt_encoder["default"]
    tensors = {"embeddings": network.embedding.weight}
    tensors |= {f"linears.{i}.{k}": v for i, layer in enumerate(m for m in network.mlp_head if isinstance(m, nn.Linear)) for k, v in layer.named_parameters()}  # fmt: skip
    if encoder == "lstm":
        tensors |= {f"lstm.{k}": v for k, v in network.lstm_head.named_parameters()}
    ours = peftkit.wrap(made(kind), PTuning(tokens=N, width=8, encoder=encoder))
    state = {k: next(v for name, v in tensors.items() if k.endswith(f".{name}")) for k in peftkit.state_dict(ours)}
    peftkit.load_state_dict(ours, state)
    labels = torch.tensor([0, 2]) if kind == "bert" else IDS
    inputs = {"input_ids": PADDED, "attention_mask": MASK, "labels": labels}

    a, b = ours(**inputs), theirs(**inputs)

    close(a.loss, b.loss)
    close(a.logits, b.logits[:, N:] if TASKS[kind] == "CAUSAL_LM" else b.logits)


@HF_PEFT
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_prefix_tuning_equals_hf_peft(kind):
    """With the same prefix, the same loss and logits: their flat tensor is ours."""
    theirs, prefix = with_hf_peft(kind, peft.PrefixTuningConfig)
    ours = ours_with(kind, PrefixTuning(tokens=N), prefix=prefix)
    inputs = {"input_ids": PADDED, "attention_mask": MASK, "labels": IDS}

    a, b = ours(**inputs), theirs(**inputs)

    close(a.loss, b.loss)
    close(a.logits, b.logits)


@HF_PEFT
@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")  # they make their own
@pytest.mark.parametrize("config, method, tensor", [(peft.PromptTuningConfig, PromptTuning(tokens=N), "prompt"), (peft.PrefixTuningConfig, PrefixTuning(tokens=N), "prefix")])  # fmt: skip
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_generation_equals_hf_peft(kind, config, method, tensor):
    """With the same prompt or prefix, the same tokens are generated."""
    theirs, value = with_hf_peft(kind, config)
    ours = ours_with(kind, method, **{tensor: value * 3})
    with torch.no_grad():
        theirs.prompt_encoder["default"].embedding.weight.mul_(3)

    assert torch.equal(generate(ours), generate(theirs))


# ------------------------------------------------------------------------------------------- what is written of them


@pytest.mark.parametrize("module", ["prompt_tuning", "p_tuning", "prefix_tuning"])
def test_doctests(module):
    """The examples in the docstrings run and print what they say."""
    result = doctest.testmod(importlib.import_module(f"peftkit_prompt.{module}"))

    assert result.attempted > 0
    assert result.failed == 0


# --------------------------------------------------------------------------------------------------- conformance


def with_a_cache():
    model = MODELS["llama"]()
    model.config.use_cache = False
    return model


CACHED = Case("language model with a cache", with_a_cache, lambda: (IDS,), targets=None, selects="model")


NO_LSTM = {"check_compile": "dynamo does not trace torch's LSTM"}
NOT_THEIRS = {"check_huggingface_tensors": "HF PEFT saves what the projection has made, and not the projection"}


@parametrize_with_checks([METHODS["prompt_tuning"], METHODS["p_tuning"]])
def test_prompts_conform(check):
    """The kit's checks, on its own language model."""
    check()


@parametrize_with_checks([METHODS["p_tuning lstm"]], expected_failures=NO_LSTM)
def test_lstm_prompts_conform(check):
    """The same with an LSTM."""
    check()


@parametrize_with_checks([PREFIX], cases=[CACHED])
def test_prefixes_conform(check):
    """The kit's checks, on a model with a cache."""
    check()


@parametrize_with_checks([METHODS["prefix_tuning projected"]], cases=[CACHED], expected_failures=NOT_THEIRS)
def test_projected_prefixes_conform(check):
    """The same with a projection."""
    check()
