"""`peftkit convert` and `peftkit inspect`: adapters between formats and in figures, without the base's weights."""

import json
import math
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import peftkit

pytest.importorskip("typer")
from typer.testing import CliRunner

from peftkit.cli.app import app


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The tensors here are so small that torch's threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


def done(*args):
    result = run(*args)
    assert result.exit_code == 0, result.output
    return result.stdout


def answer(*args):
    return json.loads(done(*args, "--json"))


MODEL = """
    from torch import nn

    def build():
        block = lambda: nn.ModuleDict({"q_proj": nn.Linear(8, 6), "v_proj": nn.Linear(8, 8)})
        return nn.ModuleDict({"embed": nn.Embedding(10, 8), "layers": nn.ModuleList(block() for _ in range(3))})
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A module with a model in the current folder."""
    import sys

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "a_model.py").write_text(textwrap.dedent(MODEL))
    yield tmp_path
    sys.modules.pop("a_model", None)


def build():
    names: dict = {}
    exec(textwrap.dedent(MODEL), names)
    torch.manual_seed(0)
    return names["build"]()


RULES = {"layers.{0..1}.q_proj": peftkit.LoRA(rank=2, alpha=5.0), "v_proj": peftkit.LoRA(rank=3, alpha=3.0)}


def adapted(rules=None, model=None):
    model = peftkit.wrap(build() if model is None else model, rules or RULES)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape) / 2)
    return model


def updates(model):
    """What each weight gains, by its path."""
    before = {name: p.detach().clone() for name, p in build().named_parameters()}
    after = dict(peftkit.merge(model, keep_base=False).named_parameters())
    return {name: after[name].detach() - before[name] for name in before if not torch.equal(after[name], before[name])}


def same(one, other):
    a, b = updates(one), updates(other)
    return a.keys() == b.keys() and all(torch.allclose(a[key], b[key], atol=1e-5) for key in a)


# ------------------------------------------------------------------------------------------------ convert

FORMATS = ("peftkit", "hf", "diffusers", "kohya", "loralib", "mlx", "gguf")
SELF_SUFFICIENT = ("peftkit", "hf", "diffusers")
"""Whose layers are told by the file alone."""


SOURCES, TARGETS = FORMATS[:-1], (*FORMATS[1:-1], "vllm", "peftkit")
NEXT = set(zip(FORMATS[:-1], TARGETS, strict=False))
"""Each format once as what is read and once as what is written; the other pairs are slow only because they are many."""


@pytest.mark.parametrize(
    "source, target",
    [
        pytest.param(source, target, marks=() if (source, target) in NEXT else pytest.mark.slow)
        for source in SOURCES
        for target in TARGETS
    ],
)
def test_every_format_is_converted_to_every_other(source, target):
    """The same updates at the same weights; with the model where names alone do not tell the layers, else without."""
    peftkit.save(adapted(), "in", format=source)
    model = [] if source in SELF_SUFFICIENT else ["--model", "a_model:build"]
    assert f"5 layers, from {source} to {target}" in done("convert", "in", "out", "--format", target, *model)
    assert same(peftkit.load(build(), "out", check_base=False), adapted())


@pytest.mark.parametrize("source", ["kohya", "loralib", "mlx"])
def test_a_format_whose_names_do_not_tell_the_layers_asks_for_the_model(source):
    """The reason is said, and nothing is written."""
    peftkit.save(adapted(), "in", format=source)
    result = run("convert", "in", "out", "--format", "peftkit")
    assert result.exit_code == 2
    assert "--model" in result.stderr
    assert source in result.stderr


def test_methods_that_are_no_products_go_between_our_files_and_hf_pefts():
    """Another method that HF PEFT has is converted too, without the model where its shapes suffice."""
    dora = pytest.importorskip("peftkit_dora.dora").DoRA
    model = adapted({"v_proj": dora(rank=2)})
    peftkit.save(model, "in")
    done("convert", "in", "folder", "--format", "hf")
    done("convert", "folder", "out")
    state = peftkit.state_dict(peftkit.load(build(), "out"))
    assert all(torch.equal(value, state[key]) for key, value in peftkit.state_dict(model).items())
    result = run("convert", "in", "other", "--format", "kohya")
    assert result.exit_code == 2
    assert "dora" in result.stderr


def test_convolutions_ask_for_the_model_where_their_groups_are_not_in_the_file(here):
    """Between formats that run a convolution of their own they are shapes; from ours they are not."""
    cnn = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    peftkit.save(adapted({"0": peftkit.LoRA(rank=2)}, cnn), "in")
    result = run("convert", "in", "out", "--format", "kohya")
    assert result.exit_code == 2
    assert "groups" in result.stderr
    peftkit.save(cnn, "theirs", format="diffusers")
    done("convert", "theirs", "out", "--format", "kohya", "--part", "lora_unet")
    assert load_file("out")["lora_unet_0.lora_down.weight"].shape == (2, 3, 3, 3)


def test_an_embedding_asks_for_the_model_where_its_head_may_be_tied():
    """Its adapter would act on the head too."""
    peftkit.save(adapted({"embed": peftkit.LoRA(rank=2)}), "in")
    result = run("convert", "in", "out", "--format", "mlx")
    assert result.exit_code == 2
    assert "embed" in result.stderr
    done("convert", "in", "out", "--format", "mlx", "--model", "a_model:build")


def test_a_converted_file_says_nothing_of_the_base_that_was_not_there():
    """It loads on the base, whose values it could not know, with all checks on."""
    peftkit.save(adapted(), "in", format="diffusers")
    done("convert", "in", "out")
    assert same(peftkit.load(build(), "out"), adapted())


def test_target_modules_are_whole_paths_where_the_model_is_not_known():
    """The last of three layers has no adapter: its name's last segment is that of others."""
    peftkit.save(adapted(), "in")
    done("convert", "in", "out", "--format", "hf")
    targets = json.loads(Path("out/adapter_config.json").read_text())["target_modules"]
    assert sorted(targets) == [
        "layers.0.q_proj",
        "layers.0.v_proj",
        "layers.1.q_proj",
        "layers.1.v_proj",
        "layers.2.v_proj",
    ]


def test_gguf_is_written_for_a_configuration(here):
    """Names and the order of rows come from the configuration; what is printed has the line for a Modelfile."""
    pytest.importorskip("gguf")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained("llama")
    model = adapted({"{q,k}_proj": peftkit.LoRA(rank=2)}, transformers.LlamaForCausalLM(config))
    peftkit.save(model, "in")
    refused = run("convert", "in", "out.gguf", "--format", "gguf")
    assert refused.exit_code == 2
    assert "--model" in refused.stderr
    assert "ADAPTER ./out.gguf" in done("convert", "in", "out.gguf", "--format", "gguf", "--model", "hf:llama")
    done("convert", "out.gguf", "back", "--model", "hf:llama")
    back = peftkit.load(transformers.LlamaForCausalLM(config), "back")
    assert all(torch.equal(value, peftkit.state_dict(back)[key]) for key, value in peftkit.state_dict(model).items())


def test_options_of_the_other_program_are_handed_on():
    """loralib's alpha, the part to read and the part to write; JSON says what was done."""
    state = load_file(_saved("loralib"))
    save_file(state, "theirs")
    assert "alpha=" in run("convert", "theirs", "out", "--model", "a_model:build").stderr
    told = answer(
        "convert", "theirs", "out", "--format", "kohya", "--part", "lora_te", "--alpha", "3", "--model", "a_model:build"
    )
    assert (told["source_format"], told["format"], told["sites"]) == ("loralib", "kohya", 5)
    assert all(key.startswith("lora_te_") for key in load_file("out"))


def _saved(form, rules=None):
    peftkit.save(
        adapted(rules or {"{q,v}_proj": peftkit.LoRA(rank=2, alpha=3.0)} if form != "loralib" else RULES),
        form,
        format=form,
    )
    return form


def test_a_format_that_is_not_known_and_a_file_that_is_not_there_are_refused():
    """In one line, with exit code 2."""
    peftkit.save(adapted(), "in")
    for arguments in (["in", "out", "--format", "other"], ["nothing", "out"], ["in", "no/folder/out"]):
        result = run("convert", *arguments)
        assert result.exit_code == 2
        assert result.stderr.startswith("Error: ")
        assert result.stderr.count("\n") == 1


# ------------------------------------------------------------------------------------------------ inspect


def with_values(up, down, alpha=2.0):
    """A layer with a product of these factors."""
    model = peftkit.wrap(
        nn.Sequential(nn.Linear(down.shape[1], up.shape[0])), {"0": peftkit.LoRA(rank=len(down), alpha=alpha)}
    )
    adapter = model[0].adapters["default"]["weight"]
    adapter.up.data, adapter.down.data = up, down
    return model


@pytest.mark.parametrize("form", ["peftkit", "hf", "kohya", "diffusers", "loralib", "mlx"])
def test_norm_and_effective_rank_are_those_of_the_product(form):
    """Against the singular values of the whole product, in each format."""
    torch.manual_seed(0)
    up, down = torch.randn(9, 3), torch.randn(3, 7)
    peftkit.save(with_values(up, down, alpha=5.0), "file", format=form)
    (row,) = answer("inspect", "file")["layers"]
    product = 5 / 3 * up.double() @ down.double()
    values = torch.linalg.svdvals(product)[:3]
    shares = values / values.sum()
    assert row["norm"] == pytest.approx(product.norm().item(), rel=1e-6)
    assert row["effective_rank"] == pytest.approx(math.exp(-(shares * shares.log()).sum()), rel=1e-5)
    assert (row["rank"], row["shape"], row["dead"], row["not_finite"]) == (3, [9, 7], False, [])


def test_effective_rank_counts_directions_and_not_columns():
    """Of rank 4 as it is written: one direction counts 1, four equal ones 4."""
    for up, expected in ((torch.ones(6, 4), 1.0), (torch.eye(6, 4), 4.0)):
        down = torch.ones(4, 5) if expected == 1 else torch.eye(4, 5)
        peftkit.save(with_values(up, down), "file")
        (row,) = answer("inspect", "file")["layers"]
        assert row["effective_rank"] == pytest.approx(expected)


def test_the_product_is_never_built():
    """A layer of 2·10⁵ × 2·10⁵ has factors of some megabytes, and a product of 160 gigabytes."""
    size = 200_000
    state = {"lycoris_big.lora_down.weight": torch.ones(1, size), "lycoris_big.lora_up.weight": torch.ones(size, 1)}
    save_file(state, "file")
    (row,) = answer("inspect", "file")["layers"]
    assert row["norm"] == pytest.approx(size)


def test_layers_without_effect_are_named():
    """A product of zero: an `up` that was never trained, or a `down` orthogonal to it in rank."""
    model = peftkit.wrap(build(), "lora", targets=["q_proj"], rank=2)
    adapter = model["layers"][1]["q_proj"].adapters["default"]["weight"]
    nn.init.normal_(adapter.up)
    peftkit.save(model, "file")
    told = answer("inspect", "file")
    assert told["dead"] == ["layers.0.q_proj.weight", "layers.2.q_proj.weight"]
    assert "no effect" in done("inspect", "file")


@pytest.mark.parametrize("form", ["peftkit", "hf", "kohya", "mlx"])
def test_values_that_are_not_finite_are_named(form):
    """Files that `load` refuses are shown, with what is wrong and where."""
    peftkit.save(adapted(), "file", format=form)
    if form == "peftkit":
        model = adapted()
        model["layers"][0]["v_proj"].adapters["default"]["weight"].up.data[0, 0] = math.inf
        peftkit.save(model, "file")
    else:
        path = {"hf": "file/adapter_model.safetensors", "mlx": "file/adapters.safetensors"}.get(form, "file")
        state = load_file(path)
        state[next(key for key in state if "0" in key and "v_proj" in key and "alpha" not in key)][0, 0] = math.nan
        save_file(state, path)
    told = answer("inspect", "file")
    assert len(told["not_finite"]) == 1
    assert "v_proj" in told["not_finite"][0]
    assert "not finite" in done("inspect", "file")


def test_a_scale_that_is_not_in_the_file_is_not_made_up():
    """loralib's: norm and scale are unknown until alpha is given; the effective rank does not depend on it."""
    save_file({"fc.lora_A": torch.eye(2, 4), "fc.lora_B": torch.eye(3, 2)}, "file")
    (row,) = answer("inspect", "file")["layers"]
    assert (row["scale"], row["norm"], row["effective_rank"]) == (None, None, 2.0)
    (row,) = answer("inspect", "file", "--alpha", "6")["layers"]
    assert (row["scale"], row["norm"]) == (3.0, pytest.approx(3 * math.sqrt(2)))


def test_factors_that_do_not_fit_each_other_are_refused_or_shown_as_merged():
    """Only loralib has layers of several parts, whose factors stand in one matrix."""
    save_file({"fc.lora_A": torch.ones(6, 4), "fc.lora_B": torch.ones(12, 2)}, "merged")
    (row,) = answer("inspect", "merged", "--alpha", "6")["layers"]
    assert (row["method"], row["rank"], row["norm"]) == ("merged", 2, None)
    save_file(
        {"lycoris_fc.lora_down.weight": torch.ones(6, 4), "lycoris_fc.lora_up.weight": torch.ones(12, 2)}, "kohya"
    )
    result = run("inspect", "kohya")
    assert result.exit_code == 2
    assert "do not fit each other" in result.stderr


def test_other_methods_are_shown_with_what_can_be_told():
    """A weight that is trained whole has no factors; what stands on a whole module is shown tensor by tensor."""
    model = adapted({"q_proj": peftkit.LoRA(rank=2), "v_proj": peftkit.Full(keep_base=True)})
    peftkit.save(model, "file")
    rows = {row["path"]: row for row in answer("inspect", "file")["layers"]}
    assert rows["layers.0.v_proj.weight"]["method"] == "full(keep_base=True)"
    assert rows["layers.0.v_proj.weight"]["rank"] is None
    assert rows["layers.0.q_proj.weight"]["rank"] == 2


def test_recurrent_layers_are_shown_though_only_shapes_are_known():
    """Any layer's matrices have factors in the file; such a file is not converted without its model."""
    model = nn.Sequential(nn.LSTM(4, 3))
    peftkit.wrap(model, {"0": peftkit.LoRA(rank=2, init="gaussian")})
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p)
    peftkit.save(model, "file")
    rows = answer("inspect", "file")["layers"]
    assert [row["path"] for row in rows] == ["0.weight_ih_l0", "0.weight_hh_l0"]
    assert [row["shape"] for row in rows] == [[12, 4], [12, 3]]
    assert all(row["norm"] > 0 for row in rows)
    result = run("convert", "file", "out", "--format", "hf")
    assert result.exit_code == 2
    assert "--model" in result.stderr


def test_a_table_has_a_line_for_each_weight_and_a_sum():
    """Path, method, matrix, rank, scale, norm, effective rank."""
    peftkit.save(adapted(), "file")
    lines = done("inspect", "file").splitlines()
    assert lines[0].split() == ["path", "method", "matrix", "rank", "scale", "norm", "effective", "rank"]
    assert lines[-1] == "peftkit: 5 weights, 0 without effect, 0 with values that are not finite"
    assert lines[1].split()[:5] == ["layers.0.q_proj.weight", "lora(rank=2,", "alpha=5.0)", "6×8", "2"]


def test_what_is_no_adapter_is_refused():
    """In one line, and never unpickled."""
    torch.save({"a": torch.ones(2)}, "pickle.pt")
    Path("folder").mkdir()
    Path("text").write_text("hello, this is no adapter")
    for path in ("pickle.pt", "folder", "text", "nothing"):
        result = run("inspect", path)
        assert result.exit_code == 2
        assert result.stderr.startswith("Error: ")
