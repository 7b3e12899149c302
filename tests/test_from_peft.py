"""docs/from-peft.md, row by row: both sides of each are run, and what they do is compared.

The tables here and on that page hold the same names: every field of `LoraConfig`, and every public name of `PeftModel`
and of the tuner inside it. A name that a new version of HF PEFT brings is a failure that says which.
"""

import copy
import dataclasses
import json
import re
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import peftkit
from peftkit import errors

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

PAGE = (Path(__file__).parents[1] / "docs" / "from-peft.md").read_text()
SIZES = {
    "vocab_size": 24, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
TOKENS = torch.arange(16).reshape(2, 8) % 10
TOLERANCE = 1e-5
"""The largest difference, relative to the largest value: float32 sums of some hundred terms in another order."""


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The tensors here are so small that torch's threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def their_warnings():
    """HF PEFT warns of much that is meant here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# ------------------------------------------------------------------------------------------------ models, both sides


def llama(**options):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, num_key_value_heads=2, **options))


def tied():
    return llama(tie_word_embeddings=True)


def bert():
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES, initializer_range=0.3))


def gpt2():
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "bos_token_id": 1, "eos_token_id": 2}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=24, **sizes))


def mixtral():
    sizes = {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES, **sizes))


def base_of(build):
    torch.manual_seed(0)
    return build().eval()


@torch.no_grad()
def run(model):
    return model(input_ids=TOKENS).logits


def close(actual, expected):
    error, size = (actual - expected).abs().max().item(), expected.abs().max().item()
    assert error <= TOLERANCE * size, f"differs by {error:.3g}, where values go up to {size:.3g}"


def differ(one, other):
    return (one - other).abs().max().item() > 100 * TOLERANCE * other.abs().max().item()


def there(base, *, stirred=True, **config):
    """HF PEFT's model on a copy of the base, with random values in what it trains."""
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**config))
    return (stir(model) if stirred else model).eval()


@torch.no_grad()
def stir(model, seed=1):
    torch.manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.add_(torch.randn(p.shape) / 3)
    return model


def here(base, rules, **options):
    return peftkit.wrap(copy.deepcopy(base), rules, **options).eval()


def values_of(theirs, ours, folder, adapter="default"):
    """Give our adapter the values of theirs: every tensor, and no other, each of its shape."""
    theirs.save_pretrained(folder, selected_adapters=[adapter])
    loaded = peftkit.load(peftkit_base(ours), folder if adapter == "default" else folder / adapter)
    peftkit.load_state_dict(ours, peftkit.state_dict(loaded), adapter)
    return ours


def peftkit_base(ours):
    plain = copy.deepcopy(ours)
    return peftkit.unwrap(plain)


def made(name, **fields):
    if name not in {info.name for info in peftkit.methods()}:
        pytest.skip(f"{name} is not installed")
    return peftkit.method(name)(**fields)


def lora(rank=8, alpha=8.0, **fields):
    """With HF PEFT's default scale."""
    return peftkit.LoRA(rank=rank, alpha=alpha, **fields)


def trainable(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


COPY = peftkit.Full(keep_base=True)
QV = {"target_modules": ["q_proj", "v_proj"]}

# ----------------------------------------------------------------------------------------------- fields of LoraConfig

SAME = {
    # field: the model, their configuration, our rules and options. Both train the same tensors, which compute the same.
    "r": (llama, QV | {"r": 3}, lambda: {"{q,v}_proj": lora(3)}),
    "lora_alpha": (llama, QV | {"lora_alpha": 5}, lambda: {"{q,v}_proj": lora(alpha=5.0)}),
    "use_rslora": (llama, QV | {"use_rslora": True}, lambda: {"{q,v}_proj": lora(rank_stabilized=True)}),
    "use_dora": (llama, QV | {"use_dora": True}, lambda: {"{q,v}_proj": made("dora", rank=8, alpha=8.0)}),
    "target_modules": (llama, QV, lambda: {("q_proj", "v_proj"): lora()}),
    "target_modules, all-linear": (llama, {"target_modules": "all-linear"}, lambda: {"@linear": lora()}),
    "target_modules, an expression": (
        llama,
        {"target_modules": r".*\.1\..*(q|v)_proj"},
        lambda: {re.compile(r".*\.1\..*(q|v)_proj"): lora()},
    ),
    "exclude_modules": (
        llama,
        QV | {"exclude_modules": ["model.layers.0.self_attn.q_proj"]},
        lambda: {"model.layers.0.self_attn.q_proj": "frozen", "{q,v}_proj": lora()},
    ),
    "layers_to_transform": (llama, QV | {"layers_to_transform": [1]}, lambda: {"**.layers.{1..1}.**.{q,v}_proj": lora()}),
    "layers_pattern": (
        llama,
        QV | {"layers_to_transform": [1], "layers_pattern": ["layers"]},
        lambda: {"**.layers.1.**.{q,v}_proj": lora()},
    ),
    "rank_pattern": (
        llama,
        {"target_modules": ["q_proj"], "rank_pattern": {"layers.0.self_attn.q_proj": 4}},
        lambda: {"**.0.self_attn.q_proj": lora(4), "q_proj": lora()},
    ),
    "alpha_pattern": (
        llama,
        {"target_modules": ["q_proj"], "alpha_pattern": {"layers.0.self_attn.q_proj": 3}},
        lambda: {"**.0.self_attn.q_proj": lora(alpha=3.0), "q_proj": lora()},
    ),
    "target_parameters": (
        mixtral,
        {"target_modules": [], "target_parameters": ["experts.down_proj"]},
        lambda: {"**.experts.down_proj": lora()},
    ),
    "modules_to_save": (
        bert,
        {"target_modules": ["query"], "modules_to_save": ["classifier"]},
        lambda: {"query": lora(), "classifier": COPY},
    ),
    "bias": (bert, {"target_modules": ["query"], "bias": "lora_only"}, lambda: {"**.query.bias": COPY, "query": lora()}),
    "bias, none": (bert, {"target_modules": ["query"], "bias": "none"}, lambda: {"query": lora()}),
    "bias, all": (
        bert,
        {"target_modules": ["query"], "bias": "all"},
        lambda: {"**.bias": COPY, "query": lora()},
    ),
    "trainable_token_indices": (
        llama,
        {"target_modules": ["q_proj"], "trainable_token_indices": [0, 5]},
        lambda: {"@embedding": made("trainable_tokens", tokens=[0, 5]), "q_proj": lora()},
    ),
    "fan_in_fan_out": (gpt2, {"target_modules": ["c_attn"], "fan_in_fan_out": True}, lambda: {"c_attn": lora()}),
    "task_type": (llama, QV | {"task_type": "CAUSAL_LM"}, lambda: {"{q,v}_proj": lora()}),
}  # fmt: skip


@pytest.mark.parametrize("row", SAME)
def test_field(row, tmp_path):
    """A field of LoraConfig and its form here adapt the same tensors, train as many parameters, and compute the same."""
    build, config, rules = SAME[row]
    base = base_of(build)
    theirs = there(base, **config)
    ours = values_of(theirs, here(base, rules()), tmp_path / "adapter")
    assert trainable(ours) == trainable(theirs)
    assert differ(run(theirs), run(base)), "the adapter changes nothing, so nothing is compared"
    close(run(ours), run(theirs))


def test_excluded_by_an_option():
    """`exclude=` leaves out what `exclude_modules` does, as the rule in the table above does."""
    rules, path = SAME["exclude_modules"][2](), "model.layers.0.self_attn.q_proj"
    by_rule = here(base_of(llama), rules)
    by_option = here(base_of(llama), {"{q,v}_proj": lora()}, exclude=path)
    assert peftkit.state_dict(by_rule).keys() == peftkit.state_dict(by_option).keys()


def dropout():
    """Both drop the share that was asked for, in training alone."""
    base = nn.Sequential(nn.Linear(64, 64, bias=False))
    nn.init.zeros_(base[0].weight)
    theirs = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(r=64, lora_alpha=64, lora_dropout=0.25, target_modules=["0"])
    )
    ours = peftkit.wrap(copy.deepcopy(base), lora(64, 64.0, dropout=0.25))
    layer = theirs.base_model.model[0]
    for factor in (layer.lora_A["default"].weight, layer.lora_B["default"].weight, *peftkit.state_dict(ours).values()):
        factor.data.copy_(torch.eye(64))
    x = torch.ones(200, 64)
    for model in (theirs, ours):
        torch.manual_seed(2)
        y = model.train()(x)
        share = (y == 0).float().mean().item()
        spread = (0.25 * 0.75 / x.numel()) ** 0.5
        assert abs(share - 0.25) < 5 * spread
        close(y[y != 0], torch.full_like(y[y != 0], 1 / 0.75))
        close(model.eval()(x), x)


INITS = {True: "default", "gaussian": "gaussian", "orthogonal": "orthogonal", "pissa": "pissa", "olora": "olora"}


def initial():
    """Each start gives the base's output on both sides, and the same product where it is determined by the weight; the
    base itself is moved there, and never here.
    """
    base = base_of(llama)
    path = "model.layers.0.self_attn.q_proj"
    for theirs_name, ours_name in INITS.items():
        theirs = there(base, stirred=False, init_lora_weights=theirs_name, **QV)
        ours = here(base, {"{q,v}_proj": lora(init=ours_name)})
        close(run(theirs), run(base))
        close(run(ours), run(base))
        layer, adapter = (
            theirs.get_submodule(f"base_model.model.{path}"),
            ours.get_submodule(path).adapters["default"]["weight"],
        )
        moved = (layer.base_layer.weight - base.get_submodule(path).weight).abs().max() > 1e-6
        assert moved == (theirs_name in ("pissa", "olora"))
        assert torch.equal(ours.get_submodule(path).weight, base.get_submodule(path).weight)
        product = layer.get_delta_weight("default")
        if ours_name in ("pissa", "olora"):
            close(adapter.up @ adapter.down, product)
        if ours_name == "gaussian":
            ratio = adapter.down.std() / layer.lora_A["default"].weight.std()
            assert 0.6 < ratio < 1.6  # 128 numbers each: their deviations are known to some 6 %


def weight_tying():
    """A tied embedding that is trained is trained once, and both layers that hold it read the new values."""
    base = base_of(tied)
    theirs = there(
        base, stirred=False, target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True
    )
    ours = here(base, {"embed_tokens": "full", "q_proj": lora()})
    assert trainable(ours) == trainable(theirs)
    torch.manual_seed(1)
    table = torch.randn(24, 16)
    with torch.no_grad():
        theirs.base_model.model.model.embed_tokens.modules_to_save["default"].weight.copy_(table)
        ours.model.embed_tokens.weight.copy_(table)
    close(run(ours), run(theirs))
    assert differ(run(ours), run(base))


def inference_mode():
    """Nothing trains: by the configuration there, by how it is loaded here."""
    base = base_of(llama)
    theirs = there(base, inference_mode=True, **QV)
    assert trainable(theirs) == 0
    with temporary() as folder:
        theirs.save_pretrained(folder)
        assert trainable(peftkit.load(copy.deepcopy(base), folder)) == 0
        assert trainable(peftkit.load(copy.deepcopy(base), folder, trainable=True)) > 0


def method_name():
    """The type there is the method's name here."""
    assert peft.LoraConfig().peft_type.value == peftkit.method("lora").hf.peft_type
    ours = here(base_of(llama), {"q_proj": lora()})
    (only,) = peftkit.summary(ours).adapters
    assert only.methods[0].startswith("lora")


def base_name():
    """The base's name stands in a folder that is written, on both sides."""
    base = base_of(llama)
    base.name_or_path = base.config._name_or_path = "somebody/base"
    with temporary() as folder:
        there(base, **QV).save_pretrained(folder / "theirs")
        peftkit.save(here(base, {"{q,v}_proj": lora()}), folder / "ours", format="hf")
        names = {
            json.loads((folder / side / "adapter_config.json").read_text())["base_model_name_or_path"]
            for side in ("theirs", "ours")
        }
    assert names == {"somebody/base"}


def not_needed():
    """A folder of ours lacks these entries, and theirs loads from it and computes the same."""
    base = base_of(llama)
    ours = stir(here(base, {"{q,v}_proj": lora()}))
    with temporary() as folder:
        peftkit.save(ours, folder / "ours", format="hf")
        config = json.loads((folder / "ours" / "adapter_config.json").read_text())
        assert not {"auto_mapping", "peft_version"} & {key for key, value in config.items() if value}
        close(run(peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folder / "ours")).eval()), run(ours))


def temporary():
    import contextlib
    import tempfile

    @contextlib.contextmanager
    def folder():
        with tempfile.TemporaryDirectory() as name:
            yield Path(name)

    return folder()


SPECIAL = {
    "lora_dropout": dropout,
    "init_lora_weights": initial,
    "ensure_weight_tying": weight_tying,
    "inference_mode": inference_mode,
    "peft_type": method_name,
    "base_model_name_or_path": base_name,
    "auto_mapping": not_needed,
    "peft_version": not_needed,
}


@pytest.mark.parametrize("row", SPECIAL)
def test_field_of_another_sort(row):
    """A field that is no matter of which tensors are adapted does the same as its form here."""
    SPECIAL[row]()


ABSENT = {
    # field: a value that would change something
    "eva_config": {"rho": 3.0},
    "corda_config": {"corda_method": "ipm"},
    "loftq_config": {"loftq_bits": 4},
    "lora_ga_config": {"direction": "ArBr"},
    "lora_bias": True,
    "layer_replication": [[0, 2], [1, 2]],
    "alora_invocation_tokens": [1, 2],
    "arrow_config": {"top_k": 3},
    "kasa_config": {"beta": 1e-4},
    "monteclora_config": {"num_samples": 4},
    "velora_config": {"num_groups": 4},
    "use_qalora": True,
    "qalora_group_size": 8,
    "use_bdlora": {"nblocks": 2},
    "megatron_config": {"tensor_model_parallel_size": 2},
    "megatron_core": "some.core",
    "runtime_config": {"ephemeral_gpu_offload": True},
    "revision": "main",
}
HARMLESS = {"revision", "megatron_core", "qalora_group_size", "runtime_config", "eva_config"}
"""Those that change nothing in what a folder's tensors compute, and are passed over when one is read."""


@pytest.fixture(scope="module")
def their_folder(tmp_path_factory):
    """An adapter of theirs, its configuration, and what it computes."""
    folder = tmp_path_factory.mktemp("theirs")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = there(base_of(llama), **QV)
        theirs.save_pretrained(folder)
    return folder, json.loads((folder / "adapter_config.json").read_text()), run(theirs)


@pytest.mark.parametrize("row", ABSENT)
def test_field_that_is_not_here(row, their_folder):
    """A field without a counterpart is known there and refused here; in a folder, if what is computed depends on it."""
    assert row in {field.name for field in dataclasses.fields(peft.LoraConfig)}
    with pytest.raises(errors.FieldError, match=row):
        peftkit.wrap(base_of(llama), "lora", **{row: ABSENT[row]})
    folder, config, expected = their_folder
    (folder / "adapter_config.json").write_text(json.dumps(config | {row: ABSENT[row]}))
    if row in HARMLESS:
        close(run(peftkit.load(base_of(llama), folder)), expected)
        return
    with pytest.raises(errors.FormatError, match=row):
        peftkit.load(base_of(llama), folder)


# ---------------------------------------------------------------------------------------------- calls on a PeftModel


def pair(tmp_path, *, names=("default",), build=llama):
    """The same adapters on both sides, with the same values: (base, theirs, ours)."""
    base = base_of(build)
    theirs, ours = None, copy.deepcopy(base)
    for seed, name in enumerate(names):
        config = peft.LoraConfig(r=2 + seed, **QV)
        if theirs is None:
            theirs = peft.get_peft_model(copy.deepcopy(base), config, adapter_name=name)
        else:
            theirs.add_adapter(name, config)
        with torch.no_grad():
            torch.manual_seed(seed + 1)
            for path, p in theirs.named_parameters():
                if f".{name}." in path and "lora_" in path:
                    p.add_(torch.randn(p.shape) / 3)
        theirs.save_pretrained(tmp_path, selected_adapters=[name])
        ours = peftkit.load(ours, tmp_path if name == "default" else tmp_path / name, name, trainable=seed == 0)
    peftkit.activate(ours, names[0])
    return base, theirs.eval(), ours.eval()


def get_peft_model(tmp_path):
    base = base_of(llama)
    theirs = there(base, stirred=False, **QV)
    ours = peftkit.wrap(copy.deepcopy(base), {"{q,v}_proj": lora()})
    close(run(theirs), run(base))
    assert torch.equal(run(ours), run(base))
    assert trainable(ours) == trainable(theirs)


def save_and_load(tmp_path):
    base, theirs, ours = pair(tmp_path)
    peftkit.save(ours, tmp_path / "ours", format="hf")
    theirs.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        close(run(peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / folder)).eval()), run(theirs))
        close(run(peftkit.load(copy.deepcopy(base), tmp_path / folder)), run(theirs))


def add_adapter(tmp_path):
    base = base_of(llama)
    theirs, ours = there(base, stirred=False, **QV), here(base, {"{q,v}_proj": lora()})
    theirs.add_adapter("b", peft.LoraConfig(r=3, target_modules=["k_proj"]))
    ours = peftkit.wrap(ours, {"k_proj": lora(3)}, name="b")
    assert list(theirs.peft_config) == [adapter.name for adapter in peftkit.summary(ours).adapters]
    assert theirs.active_adapters == ["default"]
    assert [adapter.name for adapter in peftkit.summary(ours).adapters if adapter.active] == ["default", "b"]


def load_adapter(tmp_path):
    _base, theirs, ours = pair(tmp_path)
    theirs.load_adapter(str(tmp_path), "again")
    ours = peftkit.load(ours, tmp_path, "again")
    theirs.set_adapter("again")
    peftkit.activate(ours, "again")
    close(run(ours), run(theirs))


def delete_adapter(tmp_path):
    _base, theirs, ours = pair(tmp_path, names=("default", "b"))
    theirs.delete_adapter("b")
    peftkit.unwrap(ours, "b")
    assert list(theirs.peft_config) == [adapter.name for adapter in peftkit.summary(ours).adapters] == ["default"]
    close(run(ours), run(theirs))


def set_adapter(tmp_path):
    _base, theirs, ours = pair(tmp_path, names=("default", "b"))
    theirs.set_adapter("b")
    peftkit.activate(ours, "b")
    peftkit.set_trainable(ours, "b")
    close(run(ours), run(theirs))
    assert learns(theirs) == learns(ours) == {"b"}


def learns(model):
    """Names of the adapters of which something has `requires_grad`."""
    names = {name for path, p in model.named_parameters() if p.requires_grad for name in path.split(".")}
    return names & {"default", "b"}


def set_requires_grad(tmp_path):
    _base, theirs, ours = pair(tmp_path, names=("default", "b"))
    theirs.set_requires_grad(["default", "b"])
    peftkit.set_trainable(ours, "default", "b")
    assert learns(theirs) == learns(ours) == {"default", "b"}
    theirs.set_requires_grad("default", requires_grad=False)
    peftkit.set_trainable(ours, "b")
    assert learns(theirs) == learns(ours) == {"b"}


def disable_adapter(tmp_path):
    base, theirs, ours = pair(tmp_path)
    with theirs.disable_adapter(), peftkit.disabled(ours):
        close(run(theirs), run(base))
        assert torch.equal(run(ours), run(base))
    close(run(ours), run(theirs))
    assert differ(run(ours), run(base))


def disable_adapter_layers(tmp_path):
    base, theirs, ours = pair(tmp_path)
    theirs.base_model.disable_adapter_layers()
    peftkit.activate(ours)
    close(run(theirs), run(ours))
    close(run(ours), run(base))
    theirs.base_model.enable_adapter_layers()
    peftkit.activate(ours, "default")
    close(run(theirs), run(ours))
    assert differ(run(ours), run(base))


def merge_adapter(tmp_path):
    base, theirs, ours = pair(tmp_path)
    expected = run(theirs)
    path = "model.layers.0.self_attn.q_proj"
    theirs.merge_adapter()
    peftkit.merge(ours)
    close(ours.get_submodule(path).weight, theirs.get_submodule(f"base_model.model.{path}.base_layer").weight)
    close(run(ours), expected)
    theirs.unmerge_adapter()
    peftkit.unmerge(ours)
    assert torch.equal(ours.get_submodule(path).weight, base.get_submodule(path).weight)
    close(run(ours), run(theirs))


def merge_and_unload(tmp_path):
    _base, theirs, ours = pair(tmp_path)
    merged, own = theirs.merge_and_unload(), peftkit.merge(ours, keep_base=False)
    assert list(merged.state_dict()) == list(own.state_dict())
    for key, value in merged.state_dict().items():
        close(own.state_dict()[key], value)


def unload(tmp_path):
    base, theirs, ours = pair(tmp_path)
    bare, own = theirs.unload(), peftkit.unwrap(ours)
    assert list(bare.state_dict()) == list(own.state_dict())
    assert torch.equal(run(own), run(base))
    close(run(bare), run(base))


def get_base_model(tmp_path):
    base, theirs, ours = pair(tmp_path)
    assert type(theirs.get_base_model()) is type(base)
    assert isinstance(ours, type(base))


def add_weighted_adapter(tmp_path):
    base, theirs, ours = pair(tmp_path, names=("default", "b"))
    theirs.add_weighted_adapter(["default", "b"], [0.5, 0.25], "mix", combination_type="cat")
    peftkit.combine(ours, {"default": 0.5, "b": 0.25}, name="mix", how="cat")
    theirs.set_adapter("mix")
    peftkit.activate(ours, "mix")
    close(run(ours), run(theirs))
    assert differ(run(ours), run(base))


def forward(tmp_path):
    base, theirs, ours = pair(tmp_path, names=("default", "b"))
    with torch.no_grad():
        expected = theirs(input_ids=TOKENS, adapter_names=["b", "__base__"]).logits
    with peftkit.routed(ours, ["b", None]):
        close(run(ours), expected)
    close(expected[1], run(base)[1])
    assert differ(expected[0], run(base)[0])


def generate(tmp_path):
    _base, theirs, ours = pair(tmp_path)
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(TOKENS)}
    assert torch.equal(ours.generate(TOKENS, **options), theirs.generate(input_ids=TOKENS, **options))


def counts(tmp_path, capsys):
    _base, theirs, ours = pair(tmp_path)
    summary = peftkit.summary(ours)
    assert theirs.get_nb_trainable_parameters() == (summary.trainable, summary.total)
    theirs.print_trainable_parameters()
    said = capsys.readouterr().out
    assert f"trainable params: {summary.trainable:,d}" in said
    assert f"trainable: {summary.trainable:,} of" in str(summary)


def status(tmp_path):
    _base, theirs, ours = pair(tmp_path, names=("default", "b"))
    theirs.set_adapter("b")
    peftkit.activate(ours, "b")
    peftkit.set_trainable(ours, "b")
    found, mine = theirs.get_model_status(), {adapter.name: adapter for adapter in peftkit.summary(ours).adapters}
    assert found.available_adapters == sorted(mine)
    assert found.active_adapters == theirs.active_adapters == [name for name, a in mine.items() if a.active]
    assert found.requires_grad == {name: a.trainable > 0 for name, a in mine.items()}
    assert found.merged_adapters == [name for name, a in mine.items() if a.merged] == []
    layers = theirs.get_layer_status()
    assert {name: sum(name in layer.available_adapters for layer in layers) for name in mine} == {
        name: a.layers for name, a in mine.items()
    }
    assert theirs.has_active_enabled_adapter == any(a.active for a in mine.values())
    for name, config in theirs.peft_config.items():
        assert f"rank={config.r}" in mine[name].methods[0]
    assert theirs.active_peft_config.r == theirs.peft_config["b"].r


def states(tmp_path):
    _base, theirs, ours = pair(tmp_path)
    state, own = peft.get_peft_model_state_dict(theirs), peftkit.state_dict(ours)
    assert sorted(tuple(t.shape) for t in state.values()) == sorted(tuple(t.shape) for t in own.values())
    halved = {key: value / 2 for key, value in state.items()}
    peft.set_peft_model_state_dict(theirs, halved)
    peftkit.load_state_dict(ours, {key: value / 2 for key, value in own.items()})
    close(run(ours), run(theirs))


def gradient_checkpointing(tmp_path):
    _base, theirs, ours = pair(tmp_path)
    theirs.prepare_model_for_gradient_checkpointing(theirs.base_model.model)
    gradients = []
    for model in (theirs, ours):
        inner = theirs.base_model.model if model is theirs else ours
        inner.train()
        inner.activation_checkpointing_enable({"use_reentrant": True})
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        gradients.append(sorted(p.grad.norm().item() for p in model.parameters() if p.requires_grad))
    assert gradients[0] == pytest.approx(gradients[1], rel=1e-4)
    assert min(gradients[1]) > 0


def inject_adapter(tmp_path):
    base = base_of(llama)
    injected, ours = copy.deepcopy(base), copy.deepcopy(base)
    assert peft.inject_adapter_in_model(peft.LoraConfig(**QV), injected) is injected
    assert peftkit.wrap(ours, {"{q,v}_proj": lora()}) is ours
    close(run(injected), run(ours))
    assert sum("lora_" in path for path, _ in injected.named_parameters()) == len(peftkit.state_dict(ours))


def prompts(tmp_path):
    base = base_of(llama)
    made("prompt_tuning")
    theirs = peft.get_peft_model(
        copy.deepcopy(base), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    )
    stir(theirs).eval()
    theirs.save_pretrained(tmp_path)
    ours = peftkit.load(copy.deepcopy(base), tmp_path)
    (held,) = [t for t in peftkit.state_dict(ours).values() if t.dim() >= 2]
    assert torch.equal(theirs.get_prompt_embedding_to_save("default"), held.reshape(3, -1))
    assert torch.equal(theirs.get_prompt(batch_size=1)[0], held.reshape(3, -1))
    close(run(ours)[:, -8:], run(theirs)[:, -8:])


def attributes(tmp_path):
    base, theirs, ours = pair(tmp_path)
    assert theirs.base_model_torch_dtype == ours.dtype
    assert theirs.base_model.get_model_config(base)["hidden_size"] == ours.config.hidden_size
    saved = there(base_of(bert), target_modules=["query"], modules_to_save=["classifier"])
    own = here(base_of(bert), {"query": lora(), "classifier": COPY})
    assert saved.modules_to_save == {"classifier"}
    assert {key.split(".")[0] for key in peftkit.state_dict(own) if ".query." not in key} == {"classifier"}


def mutated(tmp_path):
    """There a start that moves the base is converted at saving; here a file fits the base as it is."""
    base = base_of(llama)
    theirs = there(base, stirred=False, init_lora_weights="pissa", **QV)
    theirs.save_pretrained(tmp_path / "first")
    stir(theirs)
    theirs.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "first"))
    close(run(peftkit.load(copy.deepcopy(base), tmp_path / "converted")), run(theirs))
    ours = stir(here(base, {"{q,v}_proj": lora(init="pissa")}))
    peftkit.save(ours, tmp_path / "ours.safetensors")
    assert torch.equal(run(peftkit.load(copy.deepcopy(base), tmp_path / "ours.safetensors")), run(ours))


CALLS = {
    # name on their side: what runs both
    "get_peft_model": get_peft_model,
    "from_pretrained": save_and_load,
    "save_pretrained": save_and_load,
    "add_adapter": add_adapter,
    "load_adapter": load_adapter,
    "delete_adapter": delete_adapter,
    "set_adapter": set_adapter,
    "set_requires_grad": set_requires_grad,
    "disable_adapter": disable_adapter,
    "disable_adapter_layers": disable_adapter_layers,
    "enable_adapter_layers": disable_adapter_layers,
    "merge_adapter": merge_adapter,
    "unmerge_adapter": merge_adapter,
    "merge_and_unload": merge_and_unload,
    "unload": unload,
    "get_base_model": get_base_model,
    "add_weighted_adapter": add_weighted_adapter,
    "forward": forward,
    "generate": generate,
    "print_trainable_parameters": counts,
    "get_nb_trainable_parameters": counts,
    "get_layer_status": status,
    "get_model_status": status,
    "active_adapters": status,
    "has_active_enabled_adapter": status,
    "peft_config": status,
    "active_peft_config": status,
    "get_peft_model_state_dict": states,
    "set_peft_model_state_dict": states,
    "prepare_model_for_gradient_checkpointing": gradient_checkpointing,
    "inject_adapter": inject_adapter,
    "inject_adapter_in_model": inject_adapter,
    "get_prompt": prompts,
    "get_prompt_embedding_to_save": prompts,
    "modules_to_save": attributes,
    "base_model_torch_dtype": attributes,
    "get_model_config": attributes,
    "subtract_mutated_init": mutated,
}
ABSENT_CALLS = {"create_or_update_model_card", "push_to_hub", "supports_lora_conversion"}
INTERNAL = {"uses_shared_state", "target_module_mapping", "prefix", "tuner_layer_cls"}
"""Of the classes of its own methods, and no call."""
FUNCTIONS = {"get_peft_model", "inject_adapter_in_model", "get_peft_model_state_dict", "set_peft_model_state_dict"}
"""No names of a PeftModel, but what everybody calls to get one."""


@pytest.mark.parametrize("both", dict.fromkeys(CALLS.values()), ids=lambda both: both.__name__)
def test_call(both, tmp_path, request):
    """A call on a PeftModel and its form here do the same."""
    more = {"capsys": request.getfixturevalue("capsys")} if both is counts else {}
    both(tmp_path, **more)


@pytest.mark.parametrize("row", sorted(ABSENT_CALLS))
def test_call_that_is_not_here(row):
    """A call without a counterpart exists there, and nothing here has its name."""
    assert hasattr(peft.PeftModel, row)
    assert not hasattr(peftkit, row)


# -------------------------------------------------------------------------------------------------- the page itself


def rows(heading):
    """Of one table of the page: each name in its first column, and what stands in the second."""
    table = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    found = {}
    for line in table.splitlines():
        if line.startswith("| `"):
            first, _, second = line.strip("| ").partition(" | ")
            for name in re.findall(r"`(?:PeftModel\.)?([a-z_]+)(?:\([^`]*\))?`", first):
                assert name not in found, f"{name} stands in two rows"
                found[name] = second
    return found


def bare(names):
    return {name.partition(",")[0] for name in names}


def test_every_field_has_a_row():
    """The page's table, the tables above and `dataclasses.fields(LoraConfig)` name the same fields."""
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert rows("Every field of LoraConfig").keys() == fields
    assert bare(SAME) | SPECIAL.keys() | ABSENT.keys() == fields
    assert not (bare(SAME) | SPECIAL.keys()) & ABSENT.keys()


def test_every_call_has_a_row():
    """The page's table, the tables above and the public names of PeftModel and of its tuner are the same."""
    classes = [peft.PeftModel, peft.tuners.tuners_utils.BaseTuner, peft.LoraModel]
    names = {name for cls in classes for name in dir(cls) if not name.startswith("_")} - set(dir(nn.Module)) | {
        "forward"
    }
    assert rows("Calls").keys() == (names - INTERNAL) | FUNCTIONS
    assert CALLS.keys() | ABSENT_CALLS == (names - INTERNAL) | FUNCTIONS


def test_what_is_not_here_is_said():
    """A row whose second column begins with "not here" is one of those tested as absent, and the other way round."""
    for heading, absent in (("Every field of LoraConfig", ABSENT.keys()), ("Calls", ABSENT_CALLS)):
        assert {name for name, said in rows(heading).items() if said.startswith("not here")} == set(absent)
