"""HF PEFT's adapter folders, both ways: HF PEFT itself is the oracle, on tiny models with random weights."""

import copy
import json
import re
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import peftkit
from peftkit import errors
from peftkit.installed import installed

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
from peft import (  # noqa: E402 - only once it is known to be there
    AdaLoraConfig,
    HRAConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    TrainableTokensConfig,
    VBLoRAConfig,
    VeraConfig,
)

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
"""The largest difference, relative to the largest value: sums of some hundred terms in another order."""


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The tensors here are so small that torch's threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ------------------------------------------------------------------------------------------------ models

TOKENS = torch.arange(16).reshape(2, 8) % 10
SIZES = {
    "vocab_size": 24, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


class CNN(nn.Module):
    """Convolutions of two sorts, and what stands around them."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 12)
        self.fc = nn.Linear(12, 12)
        self.norm = nn.LayerNorm(12)
        self.conv = nn.Conv2d(4, 6, 3, padding=1, stride=(1, 2))
        self.conv1 = nn.Conv1d(6, 4, 3, padding=1)
        self.batch = nn.BatchNorm1d(4)
        self.score = nn.Linear(4, 2)

    def forward(self, x):
        x = self.norm(self.fc(self.embed(x)))  # [batch, 8, 12]
        x = self.conv(x.unflatten(1, (4, 2))).flatten(2)
        return self.score(self.batch(self.conv1(x)).mT)


def gpt2():
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "bos_token_id": 1, "eos_token_id": 2}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=24, **sizes))


def bert():
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES))


def t5():
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}
    config = transformers.T5Config(vocab_size=24, **sizes, decoder_start_token_id=0)
    return transformers.T5ForConditionalGeneration(config)


def llama(*, tied=False):
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=tied)
    )


def tied():
    return llama(tied=True)


def mixtral():
    sizes = {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES, **sizes))


def base_of(build, dtype=torch.float32):
    torch.manual_seed(0)
    return build().to(dtype).eval()


@torch.no_grad()
def run(model):
    inner = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    if isinstance(inner, CNN):
        return model(TOKENS)
    more = {"decoder_input_ids": TOKENS} if inner.config.is_encoder_decoder else {}
    logits = model(input_ids=TOKENS, **more).logits
    return logits[:, -8:] if logits.dim() == 3 else logits  # HF PEFT's prompts have logits of their own


def close(actual, expected):
    assert actual.dtype == expected.dtype
    error, size = (actual - expected).abs().max().item(), expected.abs().max().item()
    assert error <= TOLERANCE[actual.dtype] * size, f"differs by {error:.3g}, where values go up to {size:.3g}"


def their_model(base, config):
    """HF PEFT's adapter on a copy of the base, with random values in what it trains."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(copy.deepcopy(base), config)
    dtype = next(base.parameters()).dtype
    return randomised(model.to(dtype)).eval()


@torch.no_grad()
def randomised(model):
    torch.manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            p.add_((torch.randn(p.shape) / 3).to(p))
    return model


def save_theirs(model, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return folder


def load_theirs(base, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).eval()


def load_ours(base, folder, **options):
    return peftkit.load(copy.deepcopy(base), folder, **options).eval()


def content(folder):
    return json.loads((Path(folder) / CONFIG).read_text()), load_file(Path(folder) / WEIGHTS)


def same_tensors(one, other):
    return one.keys() == other.keys() and all(
        one[k].dtype == other[k].dtype and torch.equal(one[k], other[k]) for k in one
    )


# ------------------------------------------------------------------------------- HF PEFT → peftkit → HF PEFT

LORA = {
    "gpt2": (gpt2, lambda: LoraConfig(target_modules=["c_attn", "c_fc", "wte"], fan_in_fan_out=True)),
    "gpt2, patterns": (
        gpt2,
        lambda: LoraConfig(
            target_modules=["c_attn", "c_fc"],
            fan_in_fan_out=True,
            rank_pattern={"h.0.attn.c_attn": 2, r"^transformer\.h\.1\.mlp\.c_fc$": 3},
            alpha_pattern={r".*\.c_fc": 3, r"h.\d+.attn.(c_attn|c_proj)": 5},
        ),
    ),
    "gpt2, dora, all biases": (
        gpt2,
        lambda: LoraConfig(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, use_dora=True, bias="all"),
    ),
    "gpt2, tokens of a tied head": (
        gpt2,
        lambda: LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, trainable_token_indices=[1, 3]),
    ),
    "gpt2, norm and tied head saved": (
        gpt2,
        lambda: LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, modules_to_save=["ln_f", "lm_head"]),
    ),
    "bert, a task's own head": (
        bert,
        lambda: LoraConfig(target_modules=["query", "value", "word_embeddings"], task_type="SEQ_CLS"),
    ),
    "bert, modules and biases": (
        bert,
        lambda: LoraConfig(
            target_modules=["query", "value"], modules_to_save=["classifier", "pooler"], bias="lora_only"
        ),
    ),
    "t5": (t5, lambda: LoraConfig(target_modules=["q", "v", "wo", "shared"])),
    "llama, all linear": (llama, lambda: LoraConfig(target_modules="all-linear", rank_pattern={"q_proj": 3})),
    "llama, one layer": (llama, lambda: LoraConfig(target_modules=["q_proj"], layers_to_transform=[1])),
    "llama, an expression": (llama, lambda: LoraConfig(target_modules=r".*layers\.1\..*(q|v)_proj", use_rslora=True)),
    "llama, dora": (llama, lambda: LoraConfig(target_modules=["q_proj", "down_proj"], use_dora=True, use_rslora=True)),
    "llama, tokens": (
        llama,
        lambda: LoraConfig(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [0, 5]}),
    ),
    "llama, tokens of a tied head": (
        tied,
        lambda: LoraConfig(target_modules=["q_proj"], trainable_token_indices=[0, 5]),
    ),
    "mixtral, experts": (
        mixtral,
        lambda: LoraConfig(
            target_modules=["q_proj"],
            target_parameters=["gate_up_proj", "down_proj", "gate.weight"],
            rank_pattern={"experts.gate_up_proj": 4},
        ),
    ),
    "mixtral, one stack": (
        mixtral,
        lambda: LoraConfig(target_modules=[], target_parameters=["layers.1.mlp.experts.down_proj"], use_rslora=True),
    ),
    "cnn": (
        CNN,
        lambda: LoraConfig(
            target_modules=["fc", "conv", "conv1", "embed"], r=4, rank_pattern={"conv": 2}, alpha_pattern={"^fc": 5}
        ),
    ),
    "cnn, dora, head": (
        CNN,
        lambda: LoraConfig(
            target_modules=["fc", "conv", "embed", "conv1"], use_dora=True, modules_to_save=["score", "batch"]
        ),
    ),
}
OTHERS = {
    "adalora": (CNN, lambda: AdaLoraConfig(target_modules=["fc", "conv"], total_step=10)),
    "hra": (CNN, lambda: HRAConfig(target_modules=["fc"], bias="hra_only")),
    "ia3, cnn": (CNN, lambda: IA3Config(target_modules=["fc", "conv"], feedforward_modules=["conv"])),
    "ia3, gpt2": (
        gpt2,
        lambda: IA3Config(
            target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"], fan_in_fan_out=True
        ),
    ),
    "ia3, t5": (t5, lambda: IA3Config(target_modules=["k", "v", "wo"], feedforward_modules=["wo"])),
    "ln_tuning, bert": (bert, lambda: LNTuningConfig(target_modules=["LayerNorm"])),
    "ln_tuning, cnn": (CNN, lambda: LNTuningConfig(target_modules=["norm"], modules_to_save=["score"])),
    "loha": (CNN, lambda: LoHaConfig(target_modules=["fc", "conv", "conv1"], alpha_pattern={"conv": 3})),
    "loha, cores": (CNN, lambda: LoHaConfig(target_modules=["fc", "conv"], use_effective_conv2d=True)),
    "lokr": (CNN, lambda: LoKrConfig(r=2, target_modules=["fc", "conv"], rank_pattern={"fc": 1})),
    "lokr, cores": (
        CNN,
        lambda: LoKrConfig(r=1, target_modules=["fc", "conv"], use_effective_conv2d=True, decompose_both=True),
    ),
    "oft": (CNN, lambda: OFTConfig(target_modules=["fc", "embed"], oft_block_size=4)),
    "oft, exact": (llama, lambda: OFTConfig(target_modules=["q_proj"], oft_block_size=8, use_cayley_neumann=False)),
    "prefix_tuning": (llama, lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
    "prompt_tuning": (gpt2, lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
    "trainable_tokens": (llama, lambda: TrainableTokensConfig(target_modules=["embed_tokens"], token_indices=[2, 3])),
    "trainable_tokens, tied head": (
        tied,
        lambda: TrainableTokensConfig(target_modules=["embed_tokens"], token_indices=[2, 3]),
    ),
    "vblora": (CNN, lambda: VBLoRAConfig(target_modules=["fc", "score"], num_vectors=6, vector_length=2)),
    "vera, gpt2": (gpt2, lambda: VeraConfig(target_modules=["c_attn", "c_fc"], r=4, fan_in_fan_out=True)),
    "vera, cnn": (CNN, lambda: VeraConfig(target_modules=["fc", "score"], r=5, bias="vera_only")),
}


def both_ways(build, config, folder, dtype):
    base = base_of(build, dtype)
    theirs = their_model(base, config)
    save_theirs(theirs, folder / "first")
    plain, expected = run(base), run(theirs)
    assert not torch.allclose(plain, expected, rtol=1e-3), "the adapter changes nothing, so nothing is compared"

    ours = load_ours(base, folder / "first")
    close(run(ours), expected)

    peftkit.save(ours, folder / "second", format="hf")
    close(run(load_theirs(base, folder / "second")), expected)
    close(run(load_ours(base, folder / "second")), expected)
    return content(folder / "first"), content(folder / "second")


SLOW = {
    "gpt2, dora, all biases", "ia3, t5", "ln_tuning, cnn", "llama, dora", "llama, one layer", "llama, tokens", "loha, cores",
    "lokr, cores", "mixtral, one stack", "oft, exact", "vera, cnn",
}  # fmt: skip
"""Variants of what others show."""


def cases(names):
    return [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in names]


@pytest.mark.parametrize("case", cases(LORA | OTHERS))
def test_both_ways(case, tmp_path):
    """HF PEFT's folder loads here, ours loads there, the outputs are equal, and the tensors come back bit for bit."""
    build, config = (LORA | OTHERS)[case]
    (_, first), (config, second) = both_ways(build, config(), tmp_path, torch.float32)
    # Copies of an embedding's base weight, which HF PEFT adds for a vocabulary that has grown, need not come back.
    bases = {key for key in first if key.endswith("base_layer.weight")}
    assert same_tensors({key: value for key, value in first.items() if key not in bases}, second)
    assert peft.PeftConfig.from_pretrained(tmp_path / "second").peft_type == config["peft_type"]


@pytest.mark.parametrize(
    "case", cases(["gpt2, patterns", "bert, modules and biases", "llama, dora", "cnn, dora, head"])
)
def test_both_ways_in_float64(case, tmp_path):
    """In double precision, which torch's grouped product of experts lacks, the outputs agree to its rounding."""
    build, config = LORA[case]
    both_ways(build, config(), tmp_path, torch.float64)


# ----------------------------------------------------------------------------------- peftkit → HF PEFT → peftkit


def ours_on(base, rules, name="default"):
    return randomised(peftkit.wrap(copy.deepcopy(base), rules, name=name)).eval()


def made(name, **fields):
    return peftkit.method(name)(**fields)


HEAD = peftkit.Full(keep_base=True)
WRAPPED = {
    "adalora": (llama, lambda: {"*_proj": made("adalora", rank=4, target_rank=2)}),
    "dora": (bert, lambda: {"{query,value}": made("dora", rank=4), "classifier": HEAD}),
    "full": (gpt2, lambda: {"c_attn": peftkit.LoRA(), "transformer.ln_f": "full"}),
    "hra": (t5, lambda: {"{q,v}": made("hra", rank=4)}),
    "ia3": (
        mixtral,
        lambda: {"{k,v}_proj": made("ia3"), "o_proj": made("ia3", scale_inputs=True)},
    ),
    "ln_tuning": (llama, lambda: {"@norm": made("ln_tuning")}),
    "loha": (CNN, lambda: {"fc": made("loha", rank=2), "conv": made("loha", rank=3, alpha=1.5)}),
    "lokr": (CNN, lambda: {("fc", "conv"): made("lokr", rank=2, factor=2)}),
    "lora": (
        gpt2,
        lambda: {
            "transformer.h.0.attn.c_attn": peftkit.LoRA(rank=5, alpha=2.5),
            "c_attn": peftkit.LoRA(rank=3, alpha=2.0),
            "transformer.wte": peftkit.LoRA(rank=3, alpha=7.0),
        },
    ),
    "oft": (bert, lambda: {"{query,value}": made("oft", block_size=4)}),
    "prefix_tuning": (llama, lambda: made("prefix_tuning", tokens=3)),
    "prompt_tuning": (llama, lambda: made("prompt_tuning", tokens=3)),
    "trainable_tokens": (
        tied,
        lambda: {
            "q_proj": peftkit.LoRA(rank=2, rank_stabilized=True),
            ("@embedding", "lm_head"): made("trainable_tokens", tokens=[1, 5]),
        },
    ),
    "vblora": (llama, lambda: {"{q,k}_proj": made("vblora", length=4, vectors_in_bank=8)}),
    "vera": (gpt2, lambda: {"{c_attn,c_fc}": made("vera", rank=4)}),
}


def declaring():
    """The installed methods that declare names in HF PEFT themselves."""
    classes = [peftkit.method(info.name) for info in peftkit.methods()]
    return sorted(cls.name for cls in classes if "hf" in vars(cls) and cls.hf is not None)


def test_every_method_that_declares_its_names_is_tried():
    """A method with names in HF PEFT is in the table below."""
    assert sorted(WRAPPED) == declaring()


def in_step(model):
    """Give layers that hold one weight one set of rows, as training that is tied would have it."""
    state = peftkit.state_dict(model)
    values = [value for key, value in state.items() if key.endswith(".values")]
    for value in values[1:]:
        value.copy_(values[0])


@pytest.mark.parametrize("case", WRAPPED)
def test_there_and_back(case, tmp_path):
    """What was wrapped here computes the same there, and comes back with the same methods, sites and tensors."""
    build, rules = WRAPPED[case]
    base = base_of(build)
    ours = ours_on(base, rules())
    in_step(ours)
    assert not torch.allclose(run(base), run(ours), rtol=1e-3)

    peftkit.save(ours, tmp_path / "folder", format="hf")
    close(run(load_theirs(base, tmp_path / "folder")), run(ours))

    back = load_ours(base, tmp_path / "folder", name="default")
    if case == "full":  # read as a copy that can be switched: the folder does not say that it was trained in place
        close(run(back), run(ours))
        return
    assert same_tensors(peftkit.state_dict(ours), peftkit.state_dict(back))
    assert sorted(sites(ours)) == sorted(sites(back))


def sites(model):
    """Layer, and what its method computes with: not how it was initialised."""
    for p in installed(model).sites("default"):
        fields = {ours: getattr(p.method, ours) for ours in (*p.method.hf.fields, *p.method.hf.lists)}
        yield p.name, p.method.name, repr(sorted(fields.items()))


@pytest.mark.parametrize("name", ["lora_plus", "lora_fa"])
def test_a_variant_is_written_as_the_method_whose_names_it_has(name, tmp_path):
    """A method that has its declaration from another is read back as that one."""
    base = base_of(llama)
    ours = ours_on(base, {"q_proj": made(name, rank=2)})
    peftkit.save(ours, tmp_path / "folder", format="hf")
    close(run(load_theirs(base, tmp_path / "folder")), run(ours))
    back = load_ours(base, tmp_path / "folder")
    assert {method for _, method, _ in sites(back)} == {"lora"}
    assert same_tensors(peftkit.state_dict(ours), peftkit.state_dict(back))


def test_an_adapter_among_others(tmp_path):
    """The adapter that is named is written and no other, also while it is merged, and loads under another name."""
    base = base_of(llama)
    model = ours_on(base, {"q_proj": peftkit.LoRA(rank=2)}, name="a")
    peftkit.wrap(model, {"v_proj": peftkit.LoRA(rank=3)}, name="b")
    peftkit.activate(model, "a")
    expected = run(model)
    peftkit.merge(model, "a")
    peftkit.save(model, tmp_path / "folder", "a", format="hf")
    again = load_ours(base, tmp_path / "folder", name="c", trainable=True)
    close(run(again), expected)
    assert [adapter.name for adapter in peftkit.summary(again).adapters] == ["c"]
    assert all(p.requires_grad == ("adapters" in name) for name, p in again.named_parameters())


@pytest.mark.parametrize("build, targets", [(gpt2, "c_attn"), (llama, "q_proj"), (CNN, "conv")])
def test_hf_peft_has_nothing_to_say_about_it(build, targets, tmp_path):
    """HF PEFT reads a folder without a warning: of an entry unknown, a layer stored otherwise, a tensor missing."""
    base = base_of(build)
    peftkit.save(ours_on(base, {targets: LORA2}), tmp_path / "folder", format="hf")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")  # of transformers, to HF PEFT
        peft.PeftModel.from_pretrained(base, str(tmp_path / "folder"))


class Alike(nn.Module):
    """Layers whose paths end in each other's."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.block = nn.ModuleDict({"fc": nn.Linear(4, 4), "xfc": nn.Linear(4, 4)})
        self.inner = nn.ModuleDict({"block": nn.ModuleDict({"fc": nn.Linear(4, 4)})})

    def forward(self, x):
        for layer in (self.fc, *self.block.values(), self.inner["block"]["fc"]):
            x = layer(x).tanh()
        return x


@pytest.mark.parametrize(
    "paths", [["fc"], ["block.fc"], ["inner.block.fc"], ["block.xfc"], ["fc", "inner.block.fc"]], ids="+".join
)
@pytest.mark.parametrize("method", [peftkit.LoRA(rank=2), "ia3"], ids=str)
def test_only_the_layers_meant(paths, method, tmp_path):
    """What is written for `target_modules` means these layers there and no other, however alike the paths are."""
    base, x = base_of(Alike), torch.randn(3, 4)
    ours = ours_on(base, {tuple(f"{path}" if "." in path else re.compile(path) for path in paths): method})
    peftkit.save(ours, tmp_path / "folder", format="hf")
    theirs = load_theirs(base, tmp_path / "folder")
    adapted = {
        name
        for name, m in theirs.base_model.model.named_modules()
        if isinstance(m, peft.tuners.tuners_utils.BaseTunerLayer)
    }
    assert adapted == set(paths)
    with torch.no_grad():
        close(ours(x), theirs(x))


def test_inputs_scaled_in_some_layers_that_are_alike(tmp_path):
    """A list of names that would mean more layers is written as an expression."""
    base, x = base_of(Alike), torch.randn(3, 4)
    ours = ours_on(base, {"block.fc": made("ia3", scale_inputs=True), "inner.block.fc": made("ia3")})
    peftkit.save(ours, tmp_path / "folder", format="hf")
    with torch.no_grad():
        close(ours(x), load_theirs(base, tmp_path / "folder")(x))
    assert same_tensors(peftkit.state_dict(ours), peftkit.state_dict(load_ours(base, tmp_path / "folder")))


def test_what_only_training_needs_is_named(tmp_path):
    """A folder is written without a schedule's counter, and the warning says so; a fresh adapter needs none."""
    base = base_of(CNN)
    ours = ours_on(base, {"fc": made("adalora", rank=4, target_rank=2)})
    peftkit.save(ours, tmp_path / "fresh", format="hf")
    steps = next(value for key, value in peftkit.state_dict(ours).items() if key.endswith(".steps"))
    steps += 3
    with pytest.warns(UserWarning, match="what only further training needs: steps"):
        peftkit.save(ours, tmp_path / "trained", format="hf")
    assert same_tensors(content(tmp_path / "fresh")[1], content(tmp_path / "trained")[1])


# ------------------------------------------------------------------------------------------ what cannot be written


class Odd(nn.Module):
    """Layers that HF PEFT cannot adapt, or not so."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.groups = nn.Conv2d(4, 4, 3, groups=2)
        self.dilated = nn.Conv2d(4, 4, 3, dilation=2)
        self.reflect = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")
        self.back = nn.ConvTranspose2d(4, 4, 3)
        self.lstm = nn.LSTM(8, 8)
        self.attention = nn.MultiheadAttention(8, 2)
        self.stack = nn.Parameter(torch.randn(2, 4, 4))
        self.experts = nn.Module()
        self.experts.stack = nn.Parameter(torch.randn(2, 2, 4, 4))
        self.experts.three = nn.Parameter(torch.randn(2, 4, 4))
        self.score = nn.Linear(8, 2)
        self.my_score = nn.Linear(8, 2)


LORA2 = peftkit.LoRA(rank=2)
UNWRITABLE = {
    "a method that HF PEFT has not": (Odd, lambda: {"fc.bias": made("bitfit")}, "bitfit at fc.bias has no counterpart"),
    "two methods": (Odd, lambda: {"fc": LORA2, "score": made("vera", rank=2)}, "lora at fc.weight, vera at score.weight; save them as two adapters"),
    "no method that stands alone": (Odd, lambda: {"fc": "full"}, "full stands there beside another only"),
    "a field that differs": (Odd, lambda: {"fc": LORA2, "score": peftkit.LoRA(rank=2, dropout=0.1)}, "has one lora_dropout for all layers, and here dropout is 0.1 at score"),
    "a start that is subtracted": (Odd, lambda: {"fc": peftkit.LoRA(rank=2, init="pissa")}, r"no place for fc.weight.start_down.* peftkit.combine\(model, {'default': 1.0}"),
    "grouped convolution": (Odd, lambda: {"groups": LORA2}, "groups.weight: HF PEFT's own convolution has no groups"),
    "dilated convolution": (Odd, lambda: {"dilated": LORA2}, "dilated.weight: HF PEFT's own convolution"),
    "padding mode": (Odd, lambda: {"reflect": LORA2}, "reflect.weight: HF PEFT's own convolution"),
    "transposed convolution": (Odd, lambda: {"back": LORA2}, "back.weight: HF PEFT has LORA for .* and not for ConvTranspose2d"),
    "recurrent layer": (Odd, lambda: {"lstm": LORA2}, "lstm.weight_ih_l0: .* and not for LSTM"),
    "attention's input projection": (Odd, lambda: {"attention": LORA2}, "attention.in_proj_weight: .* and not for MultiheadAttention"),
    "attention's output projection": (Odd, lambda: {"out_proj": LORA2}, "attention.out_proj.weight: there HF PEFT's adapter would not run"),
    "a parameter of the model": (Odd, lambda: {"stack": LORA2}, "stack: HF PEFT adapts no parameter of the model itself"),
    "four dimensions": (Odd, lambda: {"experts.stack": LORA2}, "experts.stack: HF PEFT adapts stacks of matrices of three dimensions"),
    "dropout on a parameter": (Odd, lambda: {"experts.three": peftkit.LoRA(rank=2, dropout=0.1)}, "experts.three: HF PEFT has no dropout on single parameters"),
    "a method's own layers": (Odd, lambda: {"groups": made("vera", rank=2)}, "HF PEFT has VERA for Linear, Conv1D and not for Conv2d"),
    "a part of a module": (Odd, lambda: {"fc": LORA2, "score.weight": HEAD}, "of score some parameters are trained .weight is. and others not"),
    "some biases": (Odd, lambda: {"fc": LORA2, "groups.bias": HEAD}, "groups.bias is trained and others are not"),
    "a name that means more": (Odd, lambda: {"fc": LORA2, re.compile("score"): HEAD}, "modules_to_save would mean my_score too"),
    "a single layer": (lambda: nn.Linear(4, 4), lambda: {re.compile(""): LORA2}, "this model is a single layer"),
    "a tied weight trained in place": (tied, lambda: {"q_proj": LORA2, "lm_head": "full"}, "one weight with .*, and HF PEFT would give this layer a copy"),
    "rows of one of two": (tied, lambda: {"q_proj": LORA2, "@embedding": made("trainable_tokens")}, "model.embed_tokens.weight is one weight with lm_head.weight, where HF PEFT trains the same rows"),
    "different rows of one weight": (tied, lambda: {("@embedding", "lm_head"): made("trainable_tokens")}, "have learned different ones"),
    "a prompt for another task": (t5, lambda: made("prompt_tuning", tokens=2), "must be one of CAUSAL_LM; of T5ForConditionalGeneration it is SEQ_2_SEQ_LM"),
    "a prompt for no task": (lambda: transformers.LlamaModel(transformers.LlamaConfig(**SIZES)), lambda: made("prompt_tuning", tokens=2), "of LlamaModel it is not known"),
    "a projected prefix": (llama, lambda: made("prefix_tuning", tokens=2, projection=True), "no place for .*shared-0.embeddings"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNWRITABLE)
def test_what_cannot_be_written_is_named(case, tmp_path):
    """What HF PEFT's folder cannot hold is an error that names it, and no folder is made."""
    build, rules, message = UNWRITABLE[case]
    model = ours_on(base_of(build), rules())
    with pytest.raises(errors.FileError, match=message):
        peftkit.save(model, tmp_path / "folder", format="hf")
    assert not list(tmp_path.iterdir())


def test_plain_factors_of_a_start_can_be_written(tmp_path):
    """The remedy that the error names works: the combined adapter computes the same, here and there."""
    base = base_of(llama)
    model = ours_on(base, {"q_proj": peftkit.LoRA(rank=2, init="pissa")})
    expected = run(model)
    peftkit.combine(model, {"default": 1.0}, name="plain", how="cat")
    peftkit.save(model, tmp_path / "folder", "plain", format="hf")
    close(run(load_theirs(base, tmp_path / "folder")), expected)


def test_values_that_are_not_finite_are_not_written(tmp_path):
    """A tensor with a NaN is named, and no file is there."""
    model = ours_on(base_of(llama), {"q_proj": LORA2})
    with torch.no_grad():
        peftkit.state_dict(model)["model.layers.1.self_attn.q_proj.weight.up"][0, 0] = torch.nan
    with pytest.raises(
        errors.FileError, match=r"layers\.1\.self_attn\.q_proj\.lora_B\.weight holds values that are not finite"
    ):
        peftkit.save(model, tmp_path / "folder", format="hf")
    assert not (tmp_path / "folder").exists()


def test_a_folder_whose_parent_is_missing(tmp_path):
    """Only the folder itself is made."""
    model = ours_on(base_of(llama), {"q_proj": LORA2})
    with pytest.raises(errors.FileError, match="cannot make the folder"):
        peftkit.save(model, tmp_path / "no" / "folder", format="hf")


def test_the_configuration_is_written_last(tmp_path, monkeypatch):
    """A folder that was cut short has weights and no configuration, and is no adapter."""
    base = base_of(llama)
    model = ours_on(base, {"q_proj": LORA2})

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("peftkit.formats.folders.replace", fail)
    with pytest.raises(KeyboardInterrupt):
        peftkit.save(model, tmp_path / "folder", format="hf")
    assert [file.name for file in (tmp_path / "folder").iterdir()] == [WEIGHTS]
    with pytest.raises(errors.FileError, match=r"cannot read .*adapter_config\.json"):
        load_ours(base, tmp_path / "folder")


def test_another_format(tmp_path):
    """The formats are named where another is asked for."""
    with pytest.raises(
        errors.FileError, match="no format called 'onnx' is known; this version writes 'peftkit', 'hf', 'vllm'"
    ):
        peftkit.save(ours_on(base_of(llama), {"q_proj": LORA2}), tmp_path / "x", format="onnx")


# --------------------------------------------------------------------------------------------- what cannot be read


def theirs_in(folder, build=llama, **options):
    """A folder of HF PEFT's, with LoRA on two projections of each layer."""
    base = base_of(build)
    return base, save_theirs(their_model(base, LoraConfig(target_modules=["q_proj", "v_proj"], r=2, **options)), folder)


def change(folder, config=None, tensors=None):
    """Change entries of the configuration, and tensors; None as a tensor removes it."""
    old_config, old_tensors = content(folder)
    (folder / CONFIG).write_text(json.dumps(old_config | (config or {})))
    changed = {key: value for key, value in (old_tensors | (tensors or {})).items() if value is not None}
    save_file(changed, folder / WEIGHTS, {"format": "pt"})


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
UNREADABLE = {
    "another type": ({"peft_type": "BOFT"}, {}, errors.UnknownMethodError, "reads HF PEFT's folders of peft_type 'BOFT'"),
    "no type": ({"peft_type": None}, {}, errors.FormatError, "it has no peft_type"),
    "a start that changes the base": ({"init_lora_weights": "pissa"}, {}, errors.FormatError, "init_lora_weights='pissa', which is not understood"),
    "another computation": ({"alora_invocation_tokens": [1]}, {}, errors.FormatError, r"alora_invocation_tokens=\[1\], which is not understood"),
    "layers used twice": ({"layer_replication": [[0, 1]]}, {}, errors.FormatError, "layer_replication"),
    "an entry of a later version": ({"use_something": True}, {}, errors.FormatError, "use_something=True, which is not understood"),
    "another bias": ({"bias": "vera_only"}, {}, errors.FormatError, "bias='vera_only', which is not understood"),
    "an expression": ({"alpha_pattern": {"(q_proj)+": 3}}, {}, errors.FormatError, r"alpha_pattern has the key '\(q_proj\)\+', a regular expression that is not read"),
    "an expression that would not end": ({"alpha_pattern": {"(a|b|ab)*c": 3}}, {}, errors.FormatError, "a regular expression that is not read"),
    "unbalanced": ({"alpha_pattern": {"(q_proj": 3}}, {}, errors.FormatError, "which is not read here"),
    "no pattern": ({"rank_pattern": [1]}, {}, errors.FormatError, "rank_pattern must be an object"),
    "no list": ({"modules_to_save": "score"}, {}, errors.FormatError, "modules_to_save must be a list"),
    "no rank": ({"r": "many"}, {}, errors.FormatError, "a value that cannot be: lora: rank must be a whole number"),
    "no scale": ({"lora_alpha": 0}, {}, errors.FormatError, "lora: alpha must be"),
    "another rank": ({"r": 3}, {}, errors.FormatError, r"lora_A.weight is torch.float32 \[2, 16\], where floats \[3, 16\] are due"),
    "a module that is not there": ({"modules_to_save": ["lm_head"]}, {}, errors.FormatError, "lacks the weight of lm_head.weight, which its configuration says is trained"),
    "tokens that are not there": ({"trainable_token_indices": [1]}, {}, errors.FormatError, "lacks the tensors that trainable_token_indices speaks of"),
    "a tensor missing": ({}, {A: None}, errors.FormatError, f"lacks {A!r}"),
    "a tensor too many": ({}, {"base_model.model.lora_C.weight": torch.ones(2)}, errors.FormatError, "1 tensors that fit nowhere, the first is 'base_model.model.lora_C.weight'"),
    "a tensor without the prefix": ({}, {"lora_C.weight": torch.ones(2)}, errors.FormatError, "fit nowhere"),
    "a layer that is not there": ({}, {A.replace("layers.0", "layers.7"): torch.ones(2, 16)}, errors.BaseMismatchError, "no layer 'model.layers.7.self_attn.q_proj', which the folder adapts; did you mean"),
    "a container": ({}, {A.replace(".q_proj", ""): torch.ones(2, 16)}, errors.BaseMismatchError, "self_attn, a LlamaAttention, which has not one weight"),
    "another shape": ({}, {A: torch.ones(2, 15)}, errors.FormatError, r"\[2, 15\], where floats \[2, 16\] are due"),
    "integers": ({}, {A: torch.ones(2, 16, dtype=torch.int32)}, errors.FormatError, "is torch.int32"),
    "a value that is not finite": ({}, {A: torch.full((2, 16), torch.inf)}, errors.FormatError, "holds values that are not finite"),
    "no values": ({}, {A: torch.ones(0, 16)}, errors.FormatError, "has no values"),
    "a weight of the base": ({}, {"base_model.model.lm_head.weight": torch.ones(24, 16)}, errors.BaseMismatchError, "lm_head.weight, a weight of the base that has .* other values"),
    "a larger vocabulary": ({}, {"base_model.model.lm_head.weight": torch.ones(25, 16)}, errors.BaseMismatchError, r"\[25, 16\] and other values than here \(\[24, 16\]\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNREADABLE)
def test_what_cannot_be_read_is_named(case, tmp_path):
    """A folder that is damaged, or means what cannot be had here, is an error that names it; the model stays as it was."""
    config, tensors, error, message = UNREADABLE[case]
    base, folder = theirs_in(tmp_path)
    change(folder, config, tensors)
    before, classes = copy.deepcopy(base.state_dict()), [type(m) for m in base.modules()]
    with pytest.raises(error, match=message):
        peftkit.load(base, folder)
    assert same_tensors(before, base.state_dict())
    assert classes == [type(m) for m in base.modules()]


def test_a_pickle_is_not_read(tmp_path):
    """A folder whose weights are pickled is refused with the way out, and the file is never opened."""
    base, folder = theirs_in(tmp_path)
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(
        errors.FormatError, match=r"adapter_model\.bin, a pickle.*open the adapter once with HF PEFT and save it again"
    ):
        peftkit.load(base, folder)


@pytest.mark.parametrize(
    "file, data, message",
    [
        (CONFIG, b"{", "is no JSON"),
        (CONFIG, b"[" * 100_000, "is no JSON"),
        (CONFIG, b"[]", "is no configuration of HF PEFT"),
        (CONFIG, b" " * 10_000_001, "has 10000001 bytes"),
        (WEIGHTS, b"", "is no safetensors file, or it is damaged"),
        (WEIGHTS, b"\xff" * 64, "is no safetensors file, or it is damaged"),
    ],
)
def test_a_damaged_file(file, data, message, tmp_path):
    """A file that is not what it should be is named."""
    base, folder = theirs_in(tmp_path)
    (folder / file).write_bytes(data)
    with pytest.raises(errors.FormatError, match=message):
        peftkit.load(base, folder)


def test_every_truncation_is_refused(tmp_path):
    """Weights that end early are no adapter, wherever they end."""
    base, folder = theirs_in(tmp_path)
    data = (folder / WEIGHTS).read_bytes()
    for end in [*range(0, len(data), 97), len(data) - 1]:
        (folder / WEIGHTS).write_bytes(data[:end])
        with pytest.raises(errors.FormatError):
            peftkit.load(base, folder)


def test_base_weights_that_a_folder_brings(tmp_path):
    """HF PEFT adds embeddings whose vocabulary may have grown: equal ones are accepted, others on request alone."""
    base, folder = theirs_in(tmp_path)
    head = base.lm_head.weight.detach().clone()
    change(folder, tensors={"base_model.model.lm_head.weight": head.bfloat16()})
    expected = run(load_ours(base, folder))
    change(folder, tensors={"base_model.model.lm_head.weight": head + 1})
    with pytest.raises(errors.BaseMismatchError, match="load with check_base=False"):
        load_ours(base, folder)
    assert torch.equal(run(load_ours(base, folder, check_base=False)), expected)


def test_half_precision_is_widened(tmp_path):
    """Factors that were stored in bfloat16 compute in float32, as HF PEFT has it."""
    base, folder = theirs_in(tmp_path)
    change(folder, tensors={key: value.bfloat16() for key, value in content(folder)[1].items()})
    ours = load_ours(base, folder)
    assert {value.dtype for value in peftkit.state_dict(ours).values()} == {torch.float32}
    close(run(ours), run(load_theirs(base, folder)))


def test_entries_of_older_versions(tmp_path):
    """A configuration with nothing but its rank, scale and targets is read."""
    base, folder = theirs_in(tmp_path, lora_alpha=3)
    expected = run(load_ours(base, folder))
    (folder / CONFIG).write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["q_proj"]})
    )
    assert torch.equal(run(load_ours(base, folder)), expected)


# ---------------------------------------------------------------------------------------------------------- vLLM


def servable(folder):
    """What vLLM's loader asks of a folder."""
    config, tensors = content(folder)
    assert config["peft_type"] == "LORA"
    assert {"r", "lora_alpha", "target_modules"} <= set(config)
    assert not {"modules_to_save", "use_dora", "rank_pattern", "alpha_pattern", "target_parameters"} & {
        k for k, v in config.items() if v
    }
    assert config.get("bias", "none") == "none"
    assert config["r"] <= 512
    for key, value in tensors.items():
        assert re.fullmatch(r"base_model\.model\..+\.(lora_[AB]\.weight|lora_embedding_[AB])", key)
        assert config["r"] == value.shape[0 if "_A" in key else 1]
        assert key.removesuffix(".weight").rpartition(".")[0].rpartition(".")[2] in config["target_modules"]
    return config


SERVED = {
    "as it is": lambda: {"{q,v}_proj": peftkit.LoRA(rank=4, alpha=3.0)},
    "ranks": lambda: {"q_proj": peftkit.LoRA(rank=2, alpha=3.0), "v_proj": peftkit.LoRA(rank=5, alpha=7.0)},
    "rank-stabilised": lambda: {"q_proj": peftkit.LoRA(rank=2, rank_stabilized=True), "v_proj": peftkit.LoRA(rank=5, rank_stabilized=True)},
    "a start": lambda: {"q_proj": peftkit.LoRA(rank=2, init="pissa"), "v_proj": peftkit.LoRA(rank=2, init="olora")},
    "embedding": lambda: {"@embedding": peftkit.LoRA(rank=2), "{gate,up}_proj": peftkit.LoRA(rank=3)},
    "a variant": lambda: {"q_proj": made("lora_plus", rank=2), "v_proj": made("lora_plus", rank=4)},
}  # fmt: skip


@pytest.mark.parametrize("case", SERVED)
def test_what_vllm_serves(case, tmp_path):
    """With one rank and one scale for all layers, the adapter computes the same: here, in HF PEFT, and by `r` alone."""
    base = base_of(llama)
    ours = ours_on(base, SERVED[case]())
    peftkit.save(ours, tmp_path / "folder", format="vllm")
    config = servable(tmp_path / "folder")
    close(run(load_theirs(base, tmp_path / "folder")), run(ours))
    close(run(load_ours(base, tmp_path / "folder")), run(ours))
    if case == "as it is":
        assert same_tensors(peftkit.state_dict(ours), peftkit.state_dict(load_ours(base, tmp_path / "folder")))
        assert (config["r"], config["lora_alpha"]) == (4, 3)


UNSERVABLE = {
    "a head": (llama, lambda: {"q_proj": LORA2, "lm_head": HEAD}, "full.* at lm_head.weight is none"),
    "dora": (llama, lambda: {"q_proj": made("dora", rank=2)}, "sums of low-rank products, and dora"),
    "rank": (llama, lambda: {"q_proj": peftkit.LoRA(rank=513)}, "ranks up to 512, and this adapter has 513"),
    "experts": (mixtral, lambda: {"**.experts.down_proj": LORA2}, "adapters of Linear and Embedding, and model.layers.0.mlp.experts.down_proj is of Parameter"),
    "convolution": (CNN, lambda: {"conv": LORA2}, "conv.weight is of Conv2d"),
    "another method": (llama, lambda: {"{q,k}_proj": made("vera", rank=2)}, "is none"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNSERVABLE)
def test_what_vllm_does_not_serve_is_named(case, tmp_path):
    """What vLLM would refuse, or serve as something else, is an error here, and no folder is made."""
    build, rules, message = UNSERVABLE[case]
    model = ours_on(base_of(build), rules())
    with pytest.raises(errors.FileError, match=message):
        peftkit.save(model, tmp_path / "folder", format="vllm")
    assert not list(tmp_path.iterdir())
