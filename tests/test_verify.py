"""Each fault that `verify` names is planted here and found, clean models pass, and nothing is left behind."""

import dataclasses
from collections import UserDict
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import peftkit
from peftkit import drift, merging
from peftkit.errors import StateError


class Helper(nn.Module):
    """Reads its child's weight by name, where no scan of the code can see it."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.fc = nn.Linear(6, 6)

    def forward(self, x):
        return F.linear(self.first(x), getattr(self.fc, "wei" + "ght"))


class Reader(Helper):
    """Reads its child's weight by its name in the code, which is found."""

    def forward(self, x):
        return F.linear(self.first(x), self.fc.weight)


class Deaf(nn.Linear):
    """Has a weight, and does not use it."""

    def forward(self, x):
        return x


class Detached(nn.Module):
    """Cuts the graph behind its first layer."""

    def __init__(self, factor=None):
        super().__init__()
        self.first, self.second, self.factor = nn.Linear(6, 6), nn.Linear(6, 6), factor

    def forward(self, x):
        y = self.first(x)
        return self.second(x + (y.detach() if self.factor is None else self.factor * y))


class Checkpointed(nn.Sequential):
    """Reentrant checkpointing passes on no gradient where its input requires none."""

    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=True) if self.training else super().forward(x)


class Parts(nn.Module):
    """Gives its outputs in a nested structure."""

    @dataclasses.dataclass
    class Output:
        hidden: torch.Tensor
        rest: object

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x, *, y=None):
        rest = {"b": [self.b(x)], "c": (self.c(x), None), "n": torch.tensor(3), "cache": object()}
        return self.Output(self.a(x), rest), self.d(x if y is None else y)


@dataclasses.dataclass(frozen=True)
class Scale(peftkit.Method):
    """Scale rows, with a second parameter that is never used."""

    name: ClassVar[str] = "verify-scale"
    start: float = 1.0

    def adapter(self, site, shared=None):
        return ScaleAdapter(site, self)


class ScaleAdapter(peftkit.Adapter):
    def __init__(self, site, method):
        super().__init__(site)
        self.scale = site.parameter(torch.full((site.fan_out, 1), method.start))
        self.unused = site.parameter(torch.ones(1))

    def weight(self, w):
        return w * self.scale


@dataclasses.dataclass(frozen=True)
class Shift(peftkit.Method):
    name: ClassVar[str] = "verify-shift"
    scope: ClassVar = "modules"

    def adapter(self, site, shared=None):
        return ShiftAdapter(site)


class ShiftAdapter(peftkit.Activation):
    def __init__(self, site):
        super().__init__(site)
        self.shift = site.parameter(torch.zeros(1))

    def forward(self, base, *args, **kwargs):
        return base(*args, **kwargs) + self.shift


def mlp(*, depth=3, dtype=torch.float32):
    torch.manual_seed(0)
    layers = [layer for _ in range(depth) for layer in (nn.Linear(6, 6), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(6, 2)).to(dtype)


def seeded(make, *args, **kwargs):
    torch.manual_seed(0)
    return make(*args, **kwargs)


def trained(model, *names):
    """Every trainable tensor of these adapters moved, as training would."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name in names or ("default",):
            for key, tensor in peftkit.state_dict(model, name).items():
                if "start" not in key:
                    tensor.add_(torch.randn_like(tensor) * 0.3)
    return model


@pytest.fixture
def x():
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(2))


def faults(report):
    return [(f.path, f.kind) for f in report.faults]


# ------------------------------------------------------------------------------------------------ clean models

SIZES = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 32,
    "max_position_embeddings": 32, "pad_token_id": 1,
}  # fmt: skip
T5 = {
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 2,
    "vocab_size": 32,
    "decoder_start_token_id": 0,
}
CLEAN = {
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": 32}),
    "bert": ("BertForSequenceClassification", SIZES),
    "t5": ("T5ForConditionalGeneration", T5),
    "llama": ("LlamaForCausalLM", SIZES),
    "mamba": ("MambaForCausalLM", {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "vocab_size": 32}),
}


def transformer(name):
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    cls = getattr(transformers, CLEAN[name][0])
    config = cls.config_class(**{"bos_token_id": 0, "eos_token_id": None, **CLEAN[name][1]})
    ids = torch.randint(2, 32, (3, 7), generator=torch.Generator().manual_seed(0))
    example = {"input_ids": ids} | ({"decoder_input_ids": ids[:, :5]} if name == "t5" else {})
    return seeded(cls, config), example


@pytest.mark.parametrize("name", CLEAN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("started", [False, True], ids=["new", "trained"])
def test_transformers_are_ok(name, dtype, started):
    """A wrapped model of transformers has no fault: as new (which is noted), trained, in half precision."""
    model, example = transformer(name)
    model = peftkit.wrap(model.to(dtype), "lora", rank=2)
    if started:
        trained(model)
    report = peftkit.verify(model, example)
    assert report.ok, str(report)
    assert report.sites == peftkit.summary(model).adapters[0].layers
    assert report.parameters == 2 * report.sites
    assert (len(report.notes), report.error > 0) == ((0, True) if started else (1, False))


LAYERS = {
    "mlp": (mlp, None),
    "attention": (lambda: nn.TransformerEncoderLayer(6, 2, 8, batch_first=True), torch.zeros(2, 3, 6)),
    "lstm": (lambda: nn.Sequential(nn.LSTM(6, 5, bidirectional=True)), torch.zeros(4, 2, 6)),
    "reader": (lambda: nn.Sequential(Reader()), None),
    "parts": (Parts, None),
    "conv": (lambda: nn.Sequential(nn.Conv1d(6, 4, 3), nn.BatchNorm1d(4)), torch.zeros(2, 6, 9)),
}
METHODS = {
    "lora": peftkit.LoRA(rank=2, dropout=0.3),
    "pissa": peftkit.LoRA(rank=2, init="pissa"),
    "copy": peftkit.Full(keep_base=True),
    "full": "full",
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("method", METHODS)
def test_layers_are_ok(layer, method):
    """Every layer kind and built-in method passes, also where another module reads the weight."""
    make, like = LAYERS[layer]
    model = seeded(make)
    x = torch.randn(5, 6) if like is None else torch.randn_like(like)
    model = peftkit.wrap(model, METHODS[method], targets="**" if method in ("copy", "full") else "@all")
    if layer == "reader" and method in ("copy", "full"):
        model = peftkit.unwrap(model)  # its child's bias is read by nobody
        model = peftkit.wrap(model, METHODS[method], targets="**.weight")
    report = peftkit.verify(model, x)
    assert report.ok, str(report)


def test_tied_weights_are_ok(x):
    """Tied weights are merged apart for the comparison, and are one again afterwards."""
    model = mlp()
    model[2].weight = model[0].weight
    model = trained(peftkit.wrap(model, "lora", targets="0"))
    report = peftkit.verify(model, x)
    assert report.ok
    assert report.notes == ()
    assert model[2].weight is model[0].weight


@pytest.mark.parametrize("example", [(torch.ones(3, 6),), torch.ones(3, 6), {"x": torch.ones(3, 6)}, UserDict(x=torch.ones(3, 6), y=torch.ones(3, 6))], ids=["tuple", "tensor", "dict", "mapping"])  # fmt: skip
def test_examples_and_outputs(example):
    """An example is a tuple, a mapping or the one argument; every floating point tensor of a nested output counts."""
    assert peftkit.verify(peftkit.wrap(seeded(Parts), "lora", targets="{a,b,c,d}"), example).ok


# ----------------------------------------------------------------------------------- (c) who takes no part


def test_a_weight_read_by_name_at_run_time(x):
    """An adapter whose layer never runs, because somebody reads its weight unseen, is bypassed."""
    report = peftkit.verify(peftkit.wrap(seeded(Helper), "lora", targets="**"), x)
    assert faults(report) == [("fc.weight", "bypassed")]
    assert "did not run" in report.faults[0].note
    assert "getattr" in report.faults[0].note


def test_a_layer_that_ignores_its_weight(x):
    """An adapter whose layer runs without reading its weight is bypassed, and that is said differently."""
    model = nn.Sequential(nn.Linear(6, 6), Deaf(6, 6))
    report = peftkit.verify(peftkit.wrap(model, "lora", targets=["0", "1"]), x)
    assert faults(report) == [("1.weight", "bypassed")]
    assert "ran without reading" in report.faults[0].note


def test_a_bias_alone_is_not_enough(x):
    """That a layer reads its adapted bias does not hide that it leaves out the weight."""

    class BiasOnly(nn.Linear):
        def forward(self, x):
            return x + self.bias

    class ScaleBoth(ScaleAdapter):
        def bias(self, b):
            return b * self.scale.squeeze(1)

    class Both(Scale):
        def adapter(self, site, shared=None):
            return ScaleBoth(site, self)

    report = peftkit.verify(peftkit.wrap(nn.Sequential(BiasOnly(6, 6)), Both(), targets="0"), x)
    assert faults(report) == [("0.weight", "bypassed")]


def test_the_shared_embedding_of_t5():
    """T5's `shared` never runs: its encoder and decoder have embeddings of their own, tied to it."""
    model, example = transformer("t5")
    report = peftkit.verify(peftkit.wrap(model, "lora", targets=["shared", "**.q"]), example)
    assert faults(report) == [("shared.weight", "bypassed")]


def test_an_activation_that_does_not_run(x):
    """An adapter around a module that does not run is bypassed as well."""
    report = peftkit.verify(peftkit.wrap(seeded(Helper), Shift(), targets=["first", "fc"]), x)
    assert faults(report) == [("fc.module", "bypassed")]


# -------------------------------------------------------------------------------- (a) who changes nothing


def test_a_zeroed_adapter(x):
    """An adapter that changes nothing at one site, where it does at others, is a fault."""
    model = trained(peftkit.wrap(mlp(), "lora"))
    with torch.no_grad():
        model[2].adapters["default"]["weight"].up.zero_()
    report = peftkit.verify(model, x)
    assert faults(report) == [("2.weight", "changes nothing")]
    assert "other sites of this adapter do" in report.faults[0].note


def test_a_zeroed_adapter_that_cannot_learn(x):
    """With both factors zero no gradient ever comes back, which is said too."""
    model = trained(peftkit.wrap(mlp(), "lora"))
    with torch.no_grad():
        for p in model[2].adapters.parameters():
            p.zero_()
    assert faults(peftkit.verify(model, x)) == [
        ("2.weight", "changes nothing"),
        ("2.adapters.default.weight.down", "zero gradient"),
        ("2.adapters.default.weight.up", "zero gradient"),
    ]


def test_an_adapter_that_never_will(x):
    """One that changes nothing anywhere is noted while it trains, and a fault when it does not."""
    model = peftkit.wrap(mlp(depth=1), "lora")
    report = peftkit.verify(model, x)
    assert report.ok
    assert "changes nothing yet at its one site" in report.notes[0]
    peftkit.set_trainable(model)
    report = peftkit.verify(model, x)
    assert faults(report) == [("0.weight", "changes nothing")]
    assert "does not train either" in report.faults[0].note


def test_methods_are_compared_with_themselves(x):
    """That one method of an adapter starts away from the base says nothing about its other methods."""
    rules = {"0": peftkit.Full(keep_base=True), "{2,4}": peftkit.LoRA(rank=2)}
    model = peftkit.wrap(mlp(), rules)
    with torch.no_grad():
        for key, tensor in peftkit.state_dict(model).items():
            tensor.add_(1.0 if key.startswith("0.") else 0.0)
    report = peftkit.verify(model, x)
    assert report.ok, str(report)
    assert "lora(rank=2)" in report.notes[0]
    assert len(report.notes) == 1


def test_a_change_that_rounding_hides(x):
    """An update too small for a bfloat16 weight to show is a change all the same: unmerged, it reaches the output."""
    model = trained(peftkit.wrap(mlp(dtype=torch.bfloat16), "lora"))
    with torch.no_grad():
        for module in (model[0], model[2], model[4]):
            module.adapters["default"]["weight"].up.mul_(1e-6)
    report = peftkit.verify(model, x.bfloat16())
    assert report.ok
    assert report.notes == ()


def test_an_activation_that_changes_nothing(x):
    """What an activation gives is compared with what it surrounds."""
    model = peftkit.wrap(mlp(), Shift(), targets=["0", "2"])
    report = peftkit.verify(model, x)
    assert report.ok
    assert [note.partition(" ")[0] for note in report.notes] == ["adapter", "not"]
    with torch.no_grad():
        model[0].adapters["default"]["module"].shift.add_(1.0)
    assert faults(peftkit.verify(model, x)) == [("2.module", "changes nothing")]


def test_values_that_are_not_finite(x):
    """An adapter with a NaN is named, though it has a gradient and cannot be merged."""
    model = trained(peftkit.wrap(mlp(), "lora"))
    with torch.no_grad():
        model[2].adapters["default"]["weight"].up[0, 0] = torch.nan
    report = peftkit.verify(model, x)
    assert ("2.weight", "not finite") in faults(report)
    assert "not merged: the merged 2.weight is not finite" in report.notes[0]


# ------------------------------------------------------------------------------------ (b) who cannot learn


def test_a_parameter_frozen_by_hand(x):
    """A parameter that does not train, though the rest of its adapter does, is named by its path."""
    model = peftkit.wrap(mlp(), "lora")
    model[2].adapters["default"]["weight"].up.requires_grad_(False)
    found = faults(peftkit.verify(model, x))
    assert found[0] == ("2.adapters.default.weight.up", "untrained")


def test_outputs_that_cancel(x):
    """Outputs whose sum never changes, as a softmax's, have gradients all the same."""

    class Cancelling(nn.Linear):
        def forward(self, x):
            y = super().forward(x)
            return y, -y

    assert peftkit.verify(peftkit.wrap(seeded(Cancelling, 6, 6), "lora", targets="@linear"), x).ok


def test_an_adapter_for_inference(x):
    """An adapter that trains nowhere has no frozen parameters to complain of."""
    model = trained(peftkit.wrap(mlp(), "lora"))
    peftkit.set_trainable(model)
    report = peftkit.verify(model, x)
    assert report.ok
    assert report.parameters == 0


def test_a_cut_graph(x):
    """Parameters before a detach have no gradient; those behind it do."""
    report = peftkit.verify(peftkit.wrap(seeded(Detached), "lora", targets="*"), x)
    assert faults(report) == [(f"first.adapters.default.weight.{p}", "no gradient") for p in ("down", "up")]


def test_a_factor_of_zero(x):
    """Where the output does not react to any parameter of an adapter at a site, its gradients are zero."""
    report = peftkit.verify(peftkit.wrap(seeded(Detached, 0.0), "lora", targets="*"), x)
    assert faults(report) == [(f"first.adapters.default.weight.{p}", "zero gradient") for p in ("down", "up")]


def test_reentrant_checkpointing(x):
    """Reentrant checkpointing over a frozen base trains nothing, and only in training mode."""
    with pytest.warns(UserWarning, match="None of the inputs have requires_grad"):
        report = peftkit.verify(peftkit.wrap(seeded(Checkpointed, nn.Linear(6, 6), nn.Tanh()), "lora", targets="0"), x)
    assert [f.kind for f in report.faults] == ["no gradient", "no gradient"]
    assert "reentrant" in report.faults[0].note


def test_an_unused_parameter(x):
    """A parameter that its adapter never uses is named."""
    report = peftkit.verify(peftkit.wrap(mlp(depth=1), Scale(start=2.0), targets="0"), x)
    assert faults(report) == [("0.adapters.default.weight.unused", "no gradient")]


def test_an_adapter_that_trains_but_does_not_run(x):
    """It gets no gradient, and is told from one that is cut off."""
    model = peftkit.wrap(peftkit.wrap(mlp(depth=1), "lora", name="a"), "lora", name="b")
    peftkit.activate(model, "a")
    report = peftkit.verify(model, x)
    assert [(f.adapter, f.kind) for f in report.faults] == [("b", "no gradient")] * 2
    assert "peftkit.activate(model, 'b')" in report.faults[0].note


def test_parameters_of_the_base(x):
    """A base parameter that was unfrozen by hand, and one that is trained in place, are looked at too."""
    model = seeded(Detached)
    model = peftkit.wrap(model, {"first.weight": "full", "second": "lora"})
    model.first.bias.requires_grad_(True)
    model.second.bias.requires_grad_(True)
    report = peftkit.verify(model, x)
    found = [(f.path, f.kind, f.adapter) for f in report.faults]
    assert found == [("first.weight", "no gradient", "default"), ("first.bias", "no gradient", "")]
    assert report.parameters == 5


# -------------------------------------------------------------------------------- (d) merged and unmerged


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("layer", ["0", "2", "4"])
def test_a_merge_that_drifts(monkeypatch, layer, dtype, x):
    """A wrong merge of one layer is found, and that layer is named, not those after it."""
    model = trained(peftkit.wrap(mlp(dtype=dtype), "lora"))
    bad, right = model.get_submodule(layer), merging.compose

    def drifting(module, name, raw, steps, **options):
        value = right(module, name, raw, steps, **options)
        return value * (2.0 if options["dropping"] is False and module is bad and "at_least" in options else 1.0)

    assert peftkit.verify(model, x.to(dtype)).ok
    monkeypatch.setattr(merging, "compose", drifting)
    report = peftkit.verify(model, x.to(dtype))
    assert faults(report) == [(layer, "drifts")]
    assert report.error > report.bound
    assert "the first layer whose output does" in report.faults[0].note


def test_a_wrong_fast_path(monkeypatch, x):
    """It is as well found when the unmerged side is wrong: a fast path that is not the weight."""
    kind = peftkit.layers.Linear
    right = kind.adapted
    monkeypatch.setattr(
        kind,
        "adapted",
        lambda self, layer, x, w, b, up, down, scale, drop: right(self, layer, x, w, b, up, down, 1.01 * scale, drop),
    )
    assert faults(peftkit.verify(trained(peftkit.wrap(mlp(), "lora")), x)) == [("0", "drifts")]


def test_outside_the_adapted_layers(x):
    """A drift of no adapted layer's own, as of somebody else's cache of a weight, is reported all the same."""

    class Cached(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 6)

        def forward(self, x):
            return self.fc(x) + self._parameters_sum()

        def _parameters_sum(self):
            return self.fc._parameters["weight"].sum()

    report = peftkit.verify(trained(peftkit.wrap(seeded(Cached), "lora", targets="fc")), x)
    assert faults(report) == [("fc", "drifts")]
    assert "no layer alone" in report.faults[0].note


def test_rtol(x):
    """A bound of one's own takes the place of the default."""
    model = trained(peftkit.wrap(mlp(), "lora"))
    report = peftkit.verify(model, x, rtol=1e-12)
    assert [f.kind for f in report.faults] == ["drifts"]
    assert report.bound == 1e-12
    assert peftkit.verify(model, x, rtol=1e-3).ok


def test_bounds(x):
    """The default bound follows the coarsest dtype in use, and the root of the number of adapted layers."""
    bounds = {
        dtype: peftkit.verify(peftkit.wrap(mlp(depth=4, dtype=dtype), "lora"), x.to(dtype)).bound
        for dtype in (torch.bfloat16, torch.float32, torch.float64)
    }
    assert bounds == {
        torch.bfloat16: 3 * 2**-7 * 2,
        torch.float32: 100 * 2**-23 * 2,
        torch.float64: 100 * 2**-52 * 2,
    }
    with torch.autocast("cpu", torch.bfloat16):
        assert peftkit.verify(peftkit.wrap(mlp(depth=4), "lora"), x).bound == 3 * 2**-7 * 2


def test_nothing_to_merge(x):
    """Without an active adapter there is nothing to merge, which is noted."""
    model = peftkit.wrap(mlp(), "lora")
    peftkit.activate(model)
    peftkit.set_trainable(model)
    report = peftkit.verify(model, x)
    assert (report.ok, report.sites, report.error) == (True, 0, None)
    assert "not merged: no adapter runs now" in report.notes[0]


@pytest.mark.parametrize(
    "actual, expected, error",
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([3.0, 4.5], [3.0, 4.0], 0.1),
        ([float("nan"), 1.0], [1.0, 1.0], float("inf")),
        ([float("-inf"), 1.0], [float("-inf"), 1.0], 0.0),
        ([float("-inf"), 1.5], [float("-inf"), 1.0], 0.5),
        ([float("inf"), 1.0], [1.0, 1.0], float("inf")),
        ([1.0, 0.0], [0.0, 0.0], float("inf")),
    ],
)
def test_relative_difference(actual, expected, error):
    """Relative to the output's norm; masked values compare as equal, NaN is far from everything."""
    assert drift._difference([torch.tensor(actual)], [torch.tensor(expected)]) == pytest.approx(error)


# ------------------------------------------------------------------------------------------ leaving no trace


class Stateful(nn.Module):
    """Everything that a run can change: running statistics, a replaced buffer, random numbers, modes; fails on demand."""

    def __init__(self):
        super().__init__()
        self.fc, self.norm, self.out = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.runs, self.fail_at = 0, None

    def forward(self, x):
        self.runs += 1
        self.calls = self.calls + 1
        x.mul_(1.5)
        y = self.out(self.drop(self.norm(self.fc(x))))
        if self.runs == self.fail_at:
            raise ZeroDivisionError
        return y


def stateful(*, training=True):
    model = peftkit.wrap(seeded(Stateful), "lora", targets=["fc", "out"])
    trained(model)
    model.train()
    if training:
        model.norm.eval()
    model(torch.randn(4, 6)).sum().backward()
    return model if training else model.eval()


def snapshot(model):
    """Everything about the model: identities where they count, copies of the values."""
    parameters = [
        (n, id(p), p.requires_grad, id(p.grad), p.detach().clone(), None if p.grad is None else p.grad.clone())
        for n, p in model.named_parameters()
    ]
    buffers = [(n, id(b), b.clone()) for n, b in model.named_buffers()]
    modules = [
        (n, type(m), m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()
    ]
    running = [repr(m.__dict__.get("_peftkit_running")) for m in model.modules()]
    known = model.__dict__["_peftkit_installed"]
    return parameters, buffers, modules, running, (known.active, known.merged, known.stash), torch.get_rng_state()


def assert_same(before, after):
    for a, b in zip(before, after, strict=True):
        if isinstance(a, torch.Tensor):
            assert torch.equal(a, b)
        elif isinstance(a, (tuple, list)):
            assert_same(a, b)
        else:
            assert a == b


@pytest.mark.parametrize("fail_at", [None, 1, 2, 3])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_nothing_is_left_behind(fail_at, training):
    """Values, gradients, modes, buffers, hooks, merged state, random numbers and the example stay, if a run fails too."""
    model, x = stateful(training=training), torch.randn(4, 6)
    before, example = snapshot(model), x.clone()
    model.fail_at = None if fail_at is None else model.runs + fail_at
    if fail_at is None:
        assert peftkit.verify(model, x).ok
    else:
        with pytest.raises(ZeroDivisionError):
            peftkit.verify(model, x)
    assert_same(before, snapshot(model))
    assert torch.equal(x, example)


@pytest.mark.parametrize("fail_at", [4, 5])
def test_nothing_is_left_behind_by_a_search(monkeypatch, fail_at):
    """The runs that look for the drifting layer clean up as well."""
    model, x = stateful(), torch.randn(4, 6)
    before = snapshot(model)
    model.fail_at = model.runs + fail_at
    with pytest.raises(ZeroDivisionError):
        peftkit.verify(model, x, rtol=0.0)
    assert_same(before, snapshot(model))


def test_an_optimizer_inside_backward_does_not_step(x):
    """Hooks that would step an optimizer within backward do not fire, and fire again later."""
    model = peftkit.wrap(mlp(), "lora")
    fired = []
    for p in model.parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(fired.append)
    assert peftkit.verify(model, x).ok
    assert fired == []
    model(x).sum().backward()
    assert len(fired) == 6


def test_the_callers_graph(x):
    """An example that hangs on the caller's graph does not use that graph up, nor add to its gradients."""
    w = torch.ones(6, requires_grad=True)
    example = x * w
    assert peftkit.verify(peftkit.wrap(mlp(), "lora"), example).ok
    assert w.grad is None
    example.sum().backward()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_where_gradients_are_off(mode, x):
    """It finds gradients where they are switched off outside."""
    model = peftkit.wrap(mlp(), "lora")
    with mode():
        assert peftkit.verify(model, x).ok


# ------------------------------------------------------------------------------------------------- the report


def test_the_report(x):
    """It prints as a table that says what was looked at, and raises on demand."""
    model = peftkit.wrap(seeded(Helper), "lora", targets="**")
    report = peftkit.verify(model, x)
    lines = str(report).splitlines()
    assert lines[0] == "1 fault: 2 adapted weights, 4 trainable parameters"
    assert lines[1].startswith("merged against unmerged: 0.0e+00 (bound 1.7e-05)")
    assert any(line.startswith("fc.weight  default  bypassed") for line in lines)
    with pytest.raises(StateError, match=r"verify found 1 fault:\n1 fault"):
        report.raise_if_bad()
    assert peftkit.verify(peftkit.wrap(mlp(), "lora"), x).raise_if_bad() is None


def test_a_long_report(x):
    """A table of hundreds of faults is cut short; the list is not."""
    model = peftkit.wrap(mlp(depth=12), "lora", name="a")
    peftkit.activate(model)
    report = peftkit.verify(model, x)
    assert len(report.faults) == 24
    assert str(report).splitlines()[-1] == "… and 4 more, in .faults"


def test_refusals(x):
    """A model that is not wrapped, or is merged, is refused."""
    with pytest.raises(StateError, match="not wrapped"):
        peftkit.verify(mlp(), x)
    with pytest.raises(StateError, match="cannot verify it while 'default' is merged"):
        peftkit.verify(peftkit.merge(peftkit.wrap(mlp(), "lora")), x)
