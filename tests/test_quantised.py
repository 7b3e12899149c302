"""Quantised bases: what peftkit promises of an adapter holds on packed weights too, whichever library packs them.

Each format runs where its library is installed; `quantised` builds a model in it. The reference is the same model with
plain linear layers that hold the dequantised weights.
"""

import contextlib
import copy
import hashlib
import importlib
import importlib.util
import json
import os
import pickle
import re
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

import peftkit
from peftkit import errors
from peftkit.plugins import plugins

REPOSITORY = Path(__file__).parents[1]
QUANTISED = ("first", "second")


class Net(nn.Module):
    """Two layers that are packed, and one that is not."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.first = nn.Linear(64, 128, dtype=dtype)
        self.second = nn.Linear(128, 64, bias=False, dtype=dtype)
        self.head = nn.Linear(64, 4, dtype=dtype)

    def forward(self, x):
        return self.head(x + self.second(self.first(x).tanh()))


def four_bit(**options):
    def pack(model):
        nn4 = pytest.importorskip("bitsandbytes").nn
        return _replaced(
            model,
            lambda layer: nn4.Linear4bit(layer.in_features, layer.out_features, layer.bias is not None, **options),
        )

    return pack


def eight_bit(model):
    nn8 = pytest.importorskip("bitsandbytes").nn
    return _replaced(
        model,
        lambda layer: nn8.Linear8bitLt(
            layer.in_features, layer.out_features, layer.bias is not None, has_fp16_weights=False, threshold=6.0
        ),
    )


def _replaced(model, make):
    for name in QUANTISED:
        layer = getattr(model, name)
        packed = make(layer)
        packed.load_state_dict(layer.state_dict())
        packed.bias = layer.bias  # in the model's dtype, to which the first forward would cast it
        packed.support_avx512bf16_for_cpu = False  # or inference rounds the scales, on CPUs that have it: another test
        setattr(model, name, packed)
    return model.to("cpu")


def torchao(config, **options):
    def pack(model):
        library = pytest.importorskip("torchao.quantization")
        library.quantize_(model, getattr(library, config)(**options), filter_fn=lambda _, path: path in QUANTISED)
        return model

    return pack


class Format:
    """How to pack a model, and how far its kernel may be from the product with the dequantised weight."""

    def __init__(self, pack, dtype, rounding, package):
        self.pack, self.dtype, self.rounding, self.package = pack, dtype, rounding, package

    def model(self):
        torch.manual_seed(0)
        return self.pack(Net(self.dtype)).eval().requires_grad_(False)

    def example(self, rows=6):
        return torch.randn(rows, 64, generator=torch.Generator().manual_seed(1)).to(self.dtype)


# Rounding: relative to the largest element. float32: sums in another order. bfloat16: the output's own eps, 2^-8, a few
# times. LLM.int8 rounds each input to 8 bits as well: 1 / 254 of the row's largest, over sums of 128.
FORMATS = {
    "nf4": Format(four_bit(quant_type="nf4"), torch.float32, 1e-5, "peftkit-bitsandbytes"),
    "nf4, bfloat16": Format(four_bit(quant_type="nf4"), torch.bfloat16, 2e-2, "peftkit-bitsandbytes"),
    "fp4, plain scales": Format(four_bit(quant_type="fp4", compress_statistics=False), torch.float32, 1e-5, "peftkit-bitsandbytes"),
    "LLM.int8": Format(eight_bit, torch.bfloat16, 5e-2, "peftkit-bitsandbytes"),
    "int8": Format(torchao("Int8WeightOnlyConfig"), torch.float32, 1e-5, "peftkit-torchao"),
    "int8, bfloat16": Format(torchao("Int8WeightOnlyConfig"), torch.bfloat16, 2e-2, "peftkit-torchao"),
    "int4": Format(torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4), torch.bfloat16, 2e-2, "peftkit-torchao"),
    "float8": Format(torchao("Float8WeightOnlyConfig"), torch.bfloat16, 2e-2, "peftkit-torchao"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _quiet():
    """What the libraries have to say of themselves when they are imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for library in ("bitsandbytes", "torchao.quantization"):
            with contextlib.suppress(ImportError):
                importlib.import_module(library)


METHODS = {
    "lora": lambda: peftkit.LoRA(rank=4),
    "lora, pissa": lambda: peftkit.LoRA(rank=4, init="pissa"),
    "dora": lambda: peftkit.method("dora")(rank=4),
    "weight alone": lambda: Scaled(),
    "full, a copy": lambda: peftkit.Full(keep_base=True),
}
"""The fast path, one that reads the weight at its start, one with a gain, and two that are no low-rank sum."""


class Scaled(peftkit.Method):
    """Defines nothing but `weight` and `bias`."""

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


@pytest.fixture(params=FORMATS)
def packed(request):
    """Each format whose library is installed."""
    return FORMATS[request.param]


def wrapped(model, method="lora", *, moved=0.1, **options):
    """The model with an adapter on its packed layers, which has learned something."""
    torch.manual_seed(2)
    model = peftkit.wrap(model, METHODS[method](), targets=[*QUANTISED], **options)
    learned = peftkit.state_dict(model, options.get("name", "default"))
    with torch.no_grad():
        for key, p in learned.items():
            if "start" not in key and p.is_floating_point():
                p.add_(torch.randn_like(p) * moved * p.abs().mean().clamp(min=0.1))
    peftkit.load_state_dict(model, learned, options.get("name", "default"))
    return model


def plain(model):
    """The reference: an unquantised twin of a packed model that is not wrapped."""
    twin = Net(torch.float32).requires_grad_(False).eval()
    plan = peftkit.plan(model, Scaled(), targets=[*QUANTISED])
    for site, _ in plan.steps:
        getattr(twin, site.path).weight.data = site.matrix().float()
        if getattr(model, site.path).bias is not None:
            getattr(twin, site.path).bias.data = getattr(model, site.path).bias.float()
    twin.head.load_state_dict(model.head.state_dict())
    return twin


def inside(tensor):
    """The plain tensors that a tensor is made of."""
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            yield from inside(getattr(tensor, name))
        return
    yield tensor.detach()
    state = getattr(tensor, "quant_state", None)
    yield from () if state is None else state.as_dict(packed=True).values()


def digest(model):
    """Every byte of the base: packed numbers, scales, biases."""
    found = hashlib.sha256()
    for name, p in sorted(model.named_parameters()):
        if ".adapters." not in name:
            for tensor in inside(p):
                found.update(name.encode() + bytes(tensor.contiguous().flatten().view(torch.uint8).numpy()))
    return found.hexdigest()


def near(actual, expected, rounding):
    """Equal to a part of the largest element."""
    actual, expected = actual.detach().float(), expected.detach().float()
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= rounding * expected.abs().max()


# ------------------------------------------------------------------------------------------------ it is the base


@pytest.mark.parametrize("method", METHODS)
def test_a_new_adapter_changes_no_bit(packed, method):
    """Wrapping leaves the output as it was, with and without gradients, for every form of adapter."""
    base = packed.model()
    model = peftkit.wrap(packed.model(), METHODS[method](), targets=[*QUANTISED])
    x = packed.example().requires_grad_(True)  # kernels are chosen by what requires grad
    assert torch.equal(model(x), base(x))
    with torch.no_grad():
        assert torch.equal(model(x), base(x))
        assert torch.equal(model(x[:1]), base(x[:1]))


def test_unwrap_gives_the_base_back(packed):
    """Classes, parameters and every packed byte are those of before."""
    model = packed.model()
    classes = {name: type(m) for name, m in model.named_modules()}
    held = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    before, y = digest(model), model(packed.example())
    peftkit.unwrap(wrapped(model))
    assert {name: type(m) for name, m in model.named_modules()} == classes
    assert {name: (id(p), p.requires_grad) for name, p in model.named_parameters()} == held
    assert digest(model) == before
    assert torch.equal(model(packed.example()), y)


def test_the_plan_shows_the_matrix(packed):
    """A packed weight counts as the matrix that it stands for, and a half precision one gets a float32 adapter."""
    model = packed.model()
    rows = peftkit.plan(model, "lora", rank=4, targets=[*QUANTISED]).rows
    assert [row.shape for row in rows] == [(128, 64), (64, 128)]
    peftkit.wrap(model, "lora", targets=[*QUANTISED])
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


# ---------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("method", ["lora", "weight alone"])  # the table below has the others
def test_training(packed, method):
    """The loss falls, and no byte of the base moves."""
    model = peftkit.wrap(packed.model(), METHODS[method](), targets=[*QUANTISED]).train()
    before = digest(model)
    x, target = packed.example(32), torch.linspace(-1, 1, 4)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    losses = []
    for _ in range(12):
        loss = (model(x).float() - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.92 * losses[0]
    assert digest(model) == before


@pytest.mark.parametrize("method", METHODS)
def test_gradients(packed, method):
    """Output and gradients are those of plain layers with the dequantised weights, to the rounding of the kernel."""
    base = packed.model()
    reference = wrapped(plain(base), method)
    model = wrapped(base, method)
    peftkit.load_state_dict(reference, {k: v.float() for k, v in peftkit.state_dict(model).items()})
    results = []
    for each, x in ((model, packed.example()), (reference, packed.example().float())):
        x.requires_grad_(True)
        y = each(x)
        y.float().square().sum().backward()
        results.append([y, x.grad, *(p.grad for p in each.parameters() if p.requires_grad)])
    for actual, expected in zip(*results, strict=True):
        near(actual, expected, packed.rounding)


def test_nothing_of_the_size_of_a_weight_waits_for_backward(packed):
    """Neither the dequantised weight nor the adapted one is kept, whatever the method."""
    for method in METHODS:
        model = wrapped(packed.model(), method)
        own = {t.untyped_storage().data_ptr() for p in model.parameters() for t in inside(p)}
        kept = []

        def pack(t, own=own, kept=kept):
            if not is_traceable_wrapper_subclass(t) and t.untyped_storage().data_ptr() not in own:
                kept.append(t.untyped_storage().nbytes())
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model(packed.example().requires_grad_(True))
        assert max(kept, default=0) < 64 * 128, method  # less than a byte for each element


# ------------------------------------------------------------------------------------------------------ switching


def test_switching(packed):
    """`using`, `disabled` and `activate` choose what runs; without adapters it is the base."""
    base = packed.model()
    model = wrapped(wrapped(packed.model(), name="a"), "weight alone", name="b")
    x = packed.example()
    with torch.no_grad():
        with peftkit.disabled(model):
            assert torch.equal(model(x), base(x))
        with peftkit.using(model, "a"):
            assert torch.equal(model(x), wrapped(packed.model())(x))
        with peftkit.using(model, "b"):
            assert torch.equal(model(x), wrapped(packed.model(), "weight alone")(x))
        both = model(x)
    reference = wrapped(wrapped(plain(base), name="a"), "weight alone", name="b")
    near(both, reference(x.float()), packed.rounding)


@pytest.mark.parametrize("method", ["lora", "weight alone"])  # the table below has the others
def test_routed(packed, method):
    """In a batch with others, each sample is what it is alone, in training too."""
    model = wrapped(wrapped(packed.model(), "lora", name="a"), method, name="b", moved=0.3)
    x = packed.example(4)
    alone = []
    for i, name in enumerate(["a", None, "b", "a"]):
        with peftkit.using(model, *([name] if name else [])):
            alone.append(model(x[i : i + 1]).detach())
    with peftkit.routed(model, ["a", None, "b", "a"]):
        mixed = model(x)
        mixed.float().square().sum().backward()
    near(mixed, torch.cat(alone), packed.rounding)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


# ---------------------------------------------------------------------------------------------- copies and files


def test_deepcopy(packed):
    """A copy computes the same, and trains apart."""
    model = wrapped(packed.model())
    twin = copy.deepcopy(model)
    x = packed.example()
    y = model(x)
    assert torch.equal(twin(x), y)
    with torch.no_grad():
        for p in twin.parameters():
            if p.requires_grad:
                p.zero_()
    assert torch.equal(model(x), y)
    assert not torch.equal(twin(x), y)
    peftkit.unwrap(twin)


def test_pickle(packed):
    """What can be pickled bare can be pickled wrapped, and computes the same."""
    try:
        pickle.loads(pickle.dumps(packed.model()))
    except Exception as reason:  # noqa: BLE001 - whatever the library raises
        pytest.skip(f"the bare model cannot be pickled: {reason}")
    model = wrapped(packed.model())
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(twin(packed.example()), model(packed.example()))


def manifest(path):
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["peftkit"])["manifest"]


@pytest.mark.parametrize("method", ["lora", "dora", "full, a copy"])
def test_files(packed, method, tmp_path):
    """An adapter comes back bit for bit on a base that was packed anew, and the same adapter gives the same bytes."""
    model = wrapped(packed.model(), method)
    for name in "ab":
        peftkit.save(model, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    fresh = peftkit.load(packed.model(), tmp_path / "a")
    assert torch.equal(fresh(packed.example()), model(packed.example()))
    peftkit.save(fresh, tmp_path / "c")
    assert manifest(tmp_path / "c") == manifest(tmp_path / "a")


def test_a_file_knows_the_base_that_it_stands_on(packed, tmp_path):
    """The fingerprint is another one than on the unquantised base, and so are the values; the shapes are the same."""
    peftkit.save(wrapped(packed.model()), tmp_path / "packed")
    torch.manual_seed(0)
    unquantised = Net(packed.dtype).eval()
    peftkit.save(wrapped(copy.deepcopy(unquantised)), tmp_path / "plain")
    here, there = manifest(tmp_path / "packed"), manifest(tmp_path / "plain")
    assert here["fingerprint"] != there["fingerprint"]
    assert [s["shape"] for s in here["sites"]] == [s["shape"] for s in there["sites"]]
    assert [s["sample"] for s in here["sites"]] != [s["sample"] for s in there["sites"]]
    moved = peftkit.load(unquantised, tmp_path / "packed", check_base=False)
    near(moved(packed.example()), wrapped(packed.model())(packed.example()), 0.5)


def test_the_adapter_of_a_four_bit_base_is_refused_on_the_unquantised_one(tmp_path):
    """Rounding to 4 bits shows in the few values that a file remembers; check_base=False says that it is meant."""
    pytest.importorskip("bitsandbytes")
    peftkit.save(wrapped(FORMATS["nf4"].model()), tmp_path / "packed")
    torch.manual_seed(0)
    with pytest.raises(errors.BaseMismatchError, match="check_base=False"):
        peftkit.load(Net(), tmp_path / "packed")
    with pytest.raises(errors.BaseMismatchError, match="check_base=False"):
        peftkit.load(FORMATS["fp4, plain scales"].model(), tmp_path / "packed")


# ------------------------------------------------------------------------------------------------------- merging


@pytest.mark.parametrize("method", ["lora", "weight alone"])  # the table below has the others
def test_merge(packed, method):
    """It goes to a dequantised weight and is undone to the bit; or it is refused by name, with the way out."""
    model = wrapped(packed.model(), method)
    before, y = digest(model), model(packed.example())
    if packed.package == "peftkit-bitsandbytes":
        with pytest.raises(
            errors.UnsupportedLayerError, match=r"cannot merge into first\.weight.*dequantise.*check_base=False"
        ):
            peftkit.merge(model)
        assert digest(model) == before
        assert torch.equal(model(packed.example()), y)
        return
    twin = copy.deepcopy(model)
    peftkit.merge(model)
    assert type(model.first._parameters["weight"]) is nn.Parameter
    assert model.first._parameters["weight"].dtype == packed.dtype
    near(model(packed.example()), y, packed.rounding)
    peftkit.unmerge(model)
    assert digest(model) == before
    assert torch.equal(model(packed.example()), y)
    peftkit.merge(twin, keep_base=False)
    assert type(twin.first) is nn.Linear
    assert not any("adapters" in key for key in twin.state_dict())
    near(twin(packed.example()), y, packed.rounding)


def test_a_merged_weight_is_the_dequantised_one_with_the_adapter():
    """In float32 there is nothing else to round: it is `values + scale * up @ down`, to the last bits."""
    pytest.importorskip("torchao")
    packed = FORMATS["int8"]
    values = plain(packed.model()).first.weight
    model = wrapped(packed.model())
    adapter = model.first.adapters["default"]["weight"]
    up, down, scale = adapter.factors()
    peftkit.merge(model)
    torch.testing.assert_close(model.first.weight, values + scale * up @ down, rtol=1e-6, atol=1e-6)


def test_many_merges_drift_by_nothing():
    """However often it is merged and unmerged, the packed bytes are what they were."""
    pytest.importorskip("torchao")
    model = wrapped(FORMATS["int8"].model())
    before = digest(model)
    for _ in range(50):
        peftkit.unmerge(peftkit.merge(model))
    assert digest(model) == before


def test_a_failed_change_leaves_a_packed_model_as_it_was(packed, monkeypatch):
    """The undo of an operation that is cut short does not touch packed bytes."""
    model = wrapped(packed.model())
    before, y = digest(model), model(packed.example())

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("peftkit.install._place", fail)
    with pytest.raises(KeyboardInterrupt):
        peftkit.wrap(model, "lora", targets="first", name="b")
    assert digest(model) == before
    assert torch.equal(model(packed.example()), y)


# ------------------------------------------------------------------------------------------------------- refused


def test_a_packed_weight_is_not_trained_in_place(packed):
    """`full` by a weight's own path is an error that names the ways out, and the model is left alone."""
    model = packed.model()
    with pytest.raises(errors.UnsupportedLayerError, match=r"first\.weight is quantised.*keep_base=True"):
        peftkit.wrap(model, "full", targets="first.weight")
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("targets", [None, "first", "first.weight"])
def test_without_the_package_the_error_names_it(packed, targets, monkeypatch):
    """A packed layer that no kind is there for is an error before anything runs; it says what to install."""
    monkeypatch.setenv("PEFTKIT_DISABLE_PLUGINS", packed.package)
    model = packed.model()
    with pytest.raises(errors.UnsupportedLayerError, match=rf"first\.weight.*pip install {packed.package}.*exclude"):
        peftkit.wrap(model, "lora", targets=targets)
    peftkit.wrap(model, "lora", targets="**", exclude=[*QUANTISED])


class Unknown(nn.Linear):
    """A packed layer of nobody's."""

    def __init__(self):
        super().__init__(8, 4)
        self.weight = nn.Parameter(torch.zeros(16, 1, dtype=torch.uint8), requires_grad=False)


def test_an_unknown_packed_layer_is_not_passed_over():
    """Among layers that can be adapted, one that cannot be read is an error, unless it is left out."""
    model = nn.Sequential(nn.Linear(8, 8), Unknown(), nn.Linear(4, 4))
    with pytest.raises(errors.UnsupportedLayerError, match=r"1\.weight.*Unknown.*torch.uint8.*layer kind"):
        peftkit.wrap(model, "lora", targets="**")
    peftkit.wrap(model, "lora", targets="**", exclude="1")


def test_the_plugins_are_listed_without_their_libraries():
    """They are found by metadata: whether bitsandbytes or torchao is there makes no difference until a layer of theirs is met."""
    listed = {
        info.name: info.package for info in plugins() if info.group == "layers" and info.package.startswith("peftkit-")
    }
    assert listed == {
        "bitsandbytes.nn.modules.Linear4bit": "peftkit-bitsandbytes",
        "bitsandbytes.nn.modules.Linear8bitLt": "peftkit-bitsandbytes",
        "torchao.utils.TorchAOBaseTensor": "peftkit-torchao",
    }
    code = (
        "import sys; sys.modules.update(bitsandbytes=None, torchao=None); import torch, peftkit\n"
        "import peftkit_bitsandbytes.layers, peftkit_torchao.layers\n"
        "peftkit.wrap(torch.nn.Sequential(torch.nn.Linear(4, 4)), 'lora', targets='0')\n"
    )
    environment = os.environ | {"PEFTKIT_STRICT_PLUGINS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------------------------------------- the table

PAGE = REPOSITORY / "docs" / "quantised.md"
BEGIN, END = "<!-- table: made by tests/test_quantised.py -->", "<!-- end of table -->"


def operations(packed, method):
    """What works of start, train, merge, save and routed; what is refused is refused by an error of ours."""
    base, x = packed.model(), packed.example(3)
    y, model, found = base(x), wrapped(packed.model(), method), []
    if torch.equal(peftkit.wrap(packed.model(), METHODS[method](), targets=[*QUANTISED])(x), y):
        found.append("start")
    after = model(x)
    after.float().square().sum().backward()
    if all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad):
        found.append("train")
    with contextlib.suppress(errors.UnsupportedLayerError):
        before = digest(model)
        merged = peftkit.merge(model)(x)
        undone = torch.equal(peftkit.unmerge(model)(x), after) and digest(model) == before
        if undone and (merged - after).abs().max() <= packed.rounding * after.abs().max():
            found.append("merge")
    with tempfile.TemporaryDirectory() as folder:
        peftkit.save(model, f"{folder}/a")
        if torch.equal(peftkit.load(packed.model(), f"{folder}/a", methods=[Scaled])(x), after):
            found.append("save")
    with peftkit.routed(model, ["default", None, "default"]):
        mixed = model(x)
    expected = torch.stack([after[0], y[1], after[2]])
    if (mixed - expected).abs().max() <= packed.rounding * expected.abs().max():
        found.append("routed")
    return found


def row(name):
    """One line of the table."""
    cells = []
    for method in METHODS:
        works = operations(FORMATS[name], method)
        missing = [each for each in ("start", "train", "merge", "save", "routed") if each not in works]
        cells.append("all but " + ", ".join(missing) if missing else "all")
    return f"| {name} | {FORMATS[name].package} | " + " | ".join(cells) + " |"


def test_the_table_is_what_running_it_gives():
    """docs/quantised.md shows what works today; `python tests/test_quantised.py` writes it anew."""
    text = PAGE.read_text()
    lines = text[text.index(BEGIN) + len(BEGIN) : text.index(END)].strip().splitlines()
    assert lines[0] == HEADER
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines[2:]] == list(FORMATS)
    for name, line in zip(FORMATS, lines[2:], strict=True):
        if importlib.util.find_spec(FORMATS[name].package.removeprefix("peftkit-")):
            assert line == row(name)


HEADER = "| base | package | " + " | ".join(METHODS) + " |"


# ------------------------------------------------------------------------------------------------------ the recipe


@pytest.mark.slow
def test_qlora_on_smollm2(tmp_path):
    """docs/examples/qlora.py runs on the real model, packs it, and learns."""
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("transformers")
    script = REPOSITORY / "docs" / "examples" / "qlora.py"
    done = subprocess.run(
        [sys.executable, str(script), "--smollm2"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "packed base unchanged, to the bit: True" in done.stdout
    assert "identical logits after loading: True" in done.stdout
    before, after = map(float, re.search(r"base: ([\d.]+) MB, packed ([\d.]+) MB", done.stdout).groups())
    assert after < 0.4 * before


if __name__ == "__main__":
    torch.set_num_threads(1)
    lines = [HEADER, "| --- " * (len(METHODS) + 2) + "|", *map(row, FORMATS)]
    text = re.sub(
        f"(?s){re.escape(BEGIN)}.*{re.escape(END)}", "\n\n".join([BEGIN, "\n".join(lines), END]), PAGE.read_text()
    )
    PAGE.write_text(text)
    sys.stdout.write(text)
