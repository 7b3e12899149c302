"""A combination of adapters is the sum it says it is: checked against its float64 definition and HF PEFT's arithmetic."""

import copy
import dataclasses
import math
from typing import ClassVar

import pytest
import torch
from torch import nn

import peftkit
from peftkit import combining
from peftkit.composition import compose, raw_parameter, steps_for
from peftkit.errors import FieldError, MethodError, StateError, UnknownAdapterError, UnsupportedLayerError
from peftkit.resolve import kind_for

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}


@dataclasses.dataclass(frozen=True)
class Rows(peftkit.Method):
    """Multiply every row, and the bias with it."""

    name: ClassVar[str] = "combine-rows"
    start: float = 1.0

    def adapter(self, site, shared=None):
        return RowsAdapter(site, self)


@dataclasses.dataclass(frozen=True)
class AffineRows(Rows):
    name: ClassVar[str] = "combine-affine-rows"
    affine: ClassVar[bool] = True


@dataclasses.dataclass(frozen=True)
class Mask(peftkit.Method):
    """Add a learned matrix where a frozen mask lets it."""

    name: ClassVar[str] = "combine-mask"
    affine: ClassVar[bool] = True

    def adapter(self, site, shared=None):
        return MaskAdapter(site)


class MaskAdapter(peftkit.Adapter):
    def __init__(self, site):
        super().__init__(site)
        self.delta = site.parameter(torch.zeros(site.shape))
        self.register_buffer("mask", site.tensor(torch.ones(site.shape)))

    def weight(self, w):
        return w + self.mask * self.delta


class RowsAdapter(peftkit.Adapter):
    def __init__(self, site, method):
        super().__init__(site)
        torch.rand(())  # draws, as initialisations do
        self.scale = site.parameter(torch.full((site.fan_out, 1), method.start))

    def weight(self, w):
        return w * self.scale

    def bias(self, b):
        return b * self.scale.squeeze(1)


@dataclasses.dataclass(frozen=True)
class Bottleneck(peftkit.Method):
    name: ClassVar[str] = "combine-bottleneck"
    scope: ClassVar = "modules"

    def adapter(self, site, shared=None):
        return Identity(site)


class Identity(peftkit.Activation):
    def __init__(self, site):
        super().__init__(site)
        self.shift = site.parameter(torch.zeros(1))

    def forward(self, base, *args, **kwargs):
        return base(*args, **kwargs) + self.shift


class Experts(nn.Module):
    """Fused weights of three experts."""

    def __init__(self):
        super().__init__()
        self.stack = nn.Parameter(torch.randn(3, 5, 6) / 2)

    def forward(self, x):
        return torch.einsum("eoi,bi->beo", self.stack, x)


LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), "weight", lambda: torch.randn(4, 6)),
    "embedding": (lambda: nn.Embedding(7, 5), "weight", lambda: torch.randint(7, (4, 3))),
    "conv": (lambda: nn.Conv2d(4, 6, 3, groups=2), "weight", lambda: torch.randn(2, 4, 5, 5)),
    "experts": (Experts, "stack", lambda: torch.randn(4, 6)),
}
every_layer = pytest.mark.parametrize("layer", LAYERS)


def add(model, name, method="lora", *, seed, **options):
    """Wrap under a name, and move everything that learns away from its start."""
    torch.manual_seed(seed)
    model = peftkit.wrap(model, method, name=name, **options)
    with torch.no_grad():
        for key, tensor in peftkit.state_dict(model, name).items():
            if "start" not in key and "mask" not in key:
                tensor.add_(torch.randn_like(tensor) * 0.5)
    return model


def make_layer(layer, dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(LAYERS[layer][0]()).to(dtype)


def tuned(layer, dtype=torch.float64, **fields):
    """A layer with LoRA adapters of different ranks and scales."""
    model = make_layer(layer, dtype)
    target = f"0.{LAYERS[layer][1]}"
    model = add(model, "a", peftkit.LoRA(rank=2, alpha=3.0, **fields), targets=target, seed=1)
    return add(model, "b", peftkit.LoRA(rank=3, rank_stabilized=True), targets=target, seed=2)


def delta(model, name, weight="weight", path="0"):
    """What an adapter adds to a weight, as a matrix in float64: `f(W) - W`."""
    layer = model.get_submodule(path)
    raw = raw_parameter(layer, weight).detach().double()
    wide = copy.deepcopy(model).double().get_submodule(path)
    steps = list(steps_for(wide, weight, (name,)))
    return (compose(wide, weight, raw, steps, dropping=False) - raw).detach()


def matrix(layer, d):
    module, weight = make_layer(layer)[0], LAYERS[layer][1]
    return kind_for(module, weight).matrix(module, weight, d)


def assert_close(actual, expected, dtype=torch.float64):
    assert actual.shape == expected.shape
    error = (actual.double() - expected.double()).abs().max().item()
    assert error <= TOLERANCE[dtype] * max(1.0, expected.abs().max().item()), error


def best(m, rank):
    """The nearest matrix of a rank, by the definition."""
    u, s, vh = torch.linalg.svd(m, full_matrices=False)
    s[..., rank:] = 0
    return u @ torch.diag_embed(s) @ vh


def output(model, x, *names):
    with torch.no_grad(), peftkit.using(model, *names):
        return model(x)


# ------------------------------------------------------------------------------------------- low-rank adapters


@every_layer
@pytest.mark.parametrize("how", ["linear", "cat"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_linear(layer, how, dtype):
    """The sum of the updates is exact, for different ranks and scales, with no product of one's `up` with another's `down`."""
    model, weight = tuned(layer, dtype), LAYERS[layer][1]
    peftkit.combine(model, {"a": 0.7, "b": -1.5}, name="mix", how=how)
    expected = 0.7 * delta(model, "a", weight) - 1.5 * delta(model, "b", weight)
    assert_close(delta(model, "mix", weight), expected, dtype)
    assert expected.abs().max() > 0.1


@every_layer
@pytest.mark.parametrize("rank", [None, 1, 2, 5])
def test_svd(layer, rank):
    """`svd` is the best approximation of the exact sum; by default of the largest rank among the old adapters."""
    model, weight = tuned(layer), LAYERS[layer][1]
    peftkit.combine(model, {"a": 0.7, "b": -1.5}, name="mix", how="svd", rank=rank)
    total = 0.7 * delta(model, "a", weight) - 1.5 * delta(model, "b", weight)
    assert_close(matrix(layer, delta(model, "mix", weight)), best(matrix(layer, total), 3 if rank is None else rank))


def test_a_rank_larger_than_the_matrix():
    """A site gets no larger rank than it can have, and the sum is then exact."""
    model = peftkit.combine(tuned("linear"), {"a": 1.0, "b": 1.0}, name="mix", how="svd", rank=100)
    assert model[0].adapters["mix"]["weight"].up.shape == (5, 5)
    assert_close(delta(model, "mix"), delta(model, "a") + delta(model, "b"))


@pytest.mark.parametrize("init", ["orthogonal", "pissa", "olora"])
def test_a_start_is_subtracted(init):
    """What an adapter subtracts as its start is no part of what it has learned."""
    model = tuned("linear", init=init)
    peftkit.combine(model, {"a": 0.7, "b": 0.5}, name="mix")
    assert_close(delta(model, "mix"), 0.7 * delta(model, "a") + 0.5 * delta(model, "b"))


@pytest.mark.parametrize("stabilized", [False, True])
def test_the_new_method(stabilized):
    """The new adapter's scale is 1 by its fields, which a file carries; its other fields are the first adapter's."""
    model = add(
        make_layer("linear"), "a", peftkit.LoRA(rank=2, rank_stabilized=stabilized, dropout=0.25), seed=1, targets="0"
    )
    model = add(model, "b", peftkit.LoRA(rank=3), seed=2, targets="0")
    peftkit.combine(model, {"a": 0.5, "b": 0.5}, name="mix")
    (placement,) = peftkit.installed.installed(model).adapters["mix"]
    assert (placement.method.rank, placement.method.scale, placement.method.dropout) == (5, 1.0, 0.25)
    assert placement.method.rank_stabilized == stabilized
    assert placement.adapter.scale == 1.0


@every_layer
def test_output(layer):
    """A layer's output with the combination is the one with the combined weight, through its fast path too."""
    model, (_, weight, make_x) = tuned(layer), LAYERS[layer]
    x = make_x()
    x = x.double() if x.is_floating_point() else x
    peftkit.combine(model, {"a": 0.7, "b": 0.5}, name="mix")
    expected = make_layer(layer)
    with torch.no_grad():
        getattr(expected[0], weight).add_(0.7 * delta(model, "a", weight) + 0.5 * delta(model, "b", weight))
        assert_close(output(model, x, "mix"), expected(x))


def test_the_combination_saves_merges_and_trains(tmp_path):
    """It is an adapter like any other: it saves, loads onto the base, merges, unwraps, and trains when told to."""
    model, x = tuned("linear"), torch.randn(3, 6).double()
    peftkit.combine(model, {"a": 0.7, "b": 0.5}, name="mix")
    expected = output(model, x, "mix")
    peftkit.save(model, tmp_path / "mix.safetensors", "mix")
    loaded = peftkit.load(make_layer("linear"), tmp_path / "mix.safetensors")
    assert torch.equal(output(loaded, x, "mix"), expected)
    peftkit.set_trainable(model, "mix")
    assert len(peftkit.param_groups(model, lr=0.1)[0]["params"]) == 2
    peftkit.activate(model, "mix")
    peftkit.merge(model, "mix")
    assert_close(model(x), expected)
    peftkit.unwrap(peftkit.unmerge(model), "mix")
    assert list(peftkit.installed.installed(model).adapters) == ["a", "b"]


def test_states():
    """The new adapter neither runs nor trains, and the old ones do as before."""
    model, x = tuned("linear"), torch.randn(3, 6).double()
    before, flags = model(x), [(n, p.requires_grad) for n, p in model.named_parameters()]
    assert peftkit.combine(model, {"a": 0.7, "b": 0.5}, name="mix") is model
    assert torch.equal(model(x), before)
    mix = peftkit.summary(model).adapters[2]
    assert (mix.name, mix.active, mix.trainable, mix.merged) == ("mix", False, 0, False)
    assert [(n, p.requires_grad) for n, p in model.named_parameters() if ".mix." not in n] == flags


def test_the_old_adapters_are_not_shared():
    """Training the new adapter does not move the old ones, not even with a single one of factor 1."""
    model = tuned("linear")
    peftkit.combine(model, {"a": 1.0}, name="copy")
    assert_close(delta(model, "copy"), delta(model, "a"))
    with torch.no_grad():
        before = delta(model, "a")
        for p in model[0].adapters["copy"]["weight"].parameters():
            p.add_(1.0)
    assert torch.equal(delta(model, "a"), before)


def test_sites_are_united():
    """A site that an adapter does not cover counts as unchanged by it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)).double()
    model = add(model, "a", rank=2, targets=["0", "1"], seed=1)
    model = add(model, "b", rank=3, targets=["1", "2"], seed=2)
    peftkit.combine(model, {"a": 0.7, "b": 0.5}, name="mix")
    assert_close(delta(model, "mix", path="0"), 0.7 * delta(model, "a", path="0"))
    assert_close(delta(model, "mix", path="1"), 0.7 * delta(model, "a", path="1") + 0.5 * delta(model, "b", path="1"))
    assert_close(delta(model, "mix", path="2"), 0.5 * delta(model, "b", path="2"))


def test_half_precision():
    """On a bfloat16 layer the new adapter's parameters are float32, as every new adapter's are."""
    model = peftkit.combine(tuned("linear", torch.bfloat16), {"a": 0.7, "b": 0.5}, name="mix")
    assert {p.dtype for p in model[0].adapters["mix"].parameters()} == {torch.float32}


# ------------------------------------------------------------------------------ sparse variants, against HF PEFT


def oracle(how, tensors, weights, density, majority_sign="total"):
    hf = pytest.importorskip("peft.utils.merge_utils")
    weights = torch.tensor(weights, dtype=tensors[0].dtype)
    if how == "linear":
        return hf.task_arithmetic(tensors, weights)
    if how == "ties":
        return hf.ties(tensors, weights, density, majority_sign)
    if how == "magnitude_prune":
        return hf.magnitude_prune(tensors, weights, density)
    torch.manual_seed(0)
    return hf.dare_linear(tensors, weights, density)


def mixed(how, tensors, weights, density, majority_sign="total"):
    generator = torch.Generator().manual_seed(0)
    return combining._Way(how, None, density, majority_sign, generator).mix(tensors, weights)


@pytest.mark.parametrize("how", ["linear", "ties", "dare", "magnitude_prune"])
@pytest.mark.parametrize("majority_sign", ["total", "frequency"])
@pytest.mark.parametrize("density", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(16,), (7, 9), (2, 5, 6)], ids=str)
def test_arithmetic_of_task_tensors(how, majority_sign, density, shape):
    """Task tensors are combined as HF PEFT does it, element for element, for the same random numbers."""
    generator = torch.Generator().manual_seed(3)
    tensors = [torch.randn(shape, generator=generator) for _ in range(3)]
    weights = [0.7, -0.3, 1.5]
    expected = oracle(how, tensors, weights, density, majority_sign)
    assert_close(mixed(how, tensors, weights, density, majority_sign), expected, torch.float32)


@pytest.mark.filterwarnings("ignore:The density 1")
@pytest.mark.parametrize("how", ["ties", "dare", "magnitude_prune"])
def test_density_of_one(how):
    """With everything kept, `dare` and `magnitude_prune` are the plain sum, and `ties` only resolves signs."""
    tensors = [torch.randn(5, 6, dtype=torch.float64) for _ in range(3)]
    expected = oracle(how if how == "ties" else "linear", tensors, [0.7, 0.3, 1.5], 1.0)
    assert_close(mixed(how, tensors, [0.7, 0.3, 1.5], 1.0), expected)


def test_ties_by_hand():
    """The example of the paper's figure: trimmed, elected, and averaged over those that agree alone."""
    tensors = [
        torch.tensor([3.0, -1.0, 0.1, 2.0]),
        torch.tensor([1.0, -2.0, 0.2, -3.0]),
        torch.tensor([-5.0, -3.0, 4.0, 0.1]),
    ]
    # Trimmed to the two largest: [3, 0, 0, 2], [0, -2, 0, -3], [-5, 0, 4, 0]; signs by total: -, -, +, -.
    assert mixed("ties", tensors, [1.0, 1.0, 1.0], 0.5).tolist() == [-5.0, -2.0, 4.0, -3.0]
    assert mixed("ties", tensors, [1.0, 1.0, 1.0], 0.5, "frequency").tolist() == [3.0, -2.0, 4.0, 2.0]


@every_layer
@pytest.mark.parametrize("how", ["ties", "dare", "magnitude_prune"])
@pytest.mark.parametrize("rank", [None, 4])
def test_sparse_on_low_rank(layer, how, rank):
    """They act on whole updates, not on factors; the result is the best approximation of the rank asked for."""
    model, weight = tuned(layer), LAYERS[layer][1]
    tensors = [matrix(layer, delta(model, name, weight)) for name in ("a", "b")]
    peftkit.combine(model, {"a": 0.7, "b": 0.5}, name="mix", how=how, rank=rank, density=0.4)
    expected = best(mixed(how, tensors, [0.7, 0.5], 0.4), rank or 3)
    assert_close(matrix(layer, delta(model, "mix", weight)), expected)


def test_one_seed_gives_one_adapter():
    """`dare` depends on its seed alone, and draws nothing from the global generator."""

    def made(seed):
        model = tuned("linear")
        state = torch.get_rng_state()
        peftkit.combine(model, {"a": 0.7, "b": 0.5}, name="mix", how="dare", density=0.5, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        return delta(model, "mix")

    assert torch.equal(made(1), made(1))
    assert not torch.equal(made(1), made(2))


# ----------------------------------------------------------------------------------------------- affine methods


def copies(method=None):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5)).double()
    method = method or peftkit.Full(keep_base=True)
    return add(add(model, "a", method, seed=1, targets="0"), "b", method, seed=2, targets="0")


@pytest.mark.parametrize("how", ["linear", "ties", "dare", "magnitude_prune"])
def test_copies(how):
    """Copies are combined as what they differ from the base by, weight and bias alike."""
    model = copies()
    peftkit.combine(model, {"a": 0.7, "b": 0.5}, name="mix", how=how, density=0.5)
    generator = torch.Generator().manual_seed(0)
    way = combining._Way(how, None, 0.5, "total", generator)
    for weight in ("weight", "bias"):
        tensors = [delta(model, name, weight) for name in ("a", "b")]
        tensors = [t.unsqueeze(1) if t.dim() == 1 else t for t in tensors]
        expected = way.mix(tensors, [0.7, 0.5])
        assert_close(delta(model, "mix", weight).reshape(expected.shape), expected)


def test_a_copy_alone_is_the_same_bit_for_bit():
    """A factor of 1 gives an adapter's own values back."""
    torch.manual_seed(0)
    model = add(nn.Sequential(nn.Linear(64, 64)), "a", peftkit.Full(keep_base=True), seed=1, targets="0")
    peftkit.combine(model, {"a": 1.0}, name="copy")
    assert torch.equal(model[0].adapters["copy"]["weight"].value, model[0].adapters["a"]["weight"].value)


def test_an_affine_method():
    """A method that declares itself affine is combined by its parameters, with what it does to the bias."""
    model, x = copies(AffineRows()), torch.randn(3, 6).double()
    state = torch.get_rng_state()
    peftkit.combine(model, {"a": 0.7, "b": 0.5}, name="mix")
    assert torch.equal(torch.get_rng_state(), state), "random numbers were drawn"
    zero = output(model, x)
    expected = zero + 0.7 * (output(model, x, "a") - zero) + 0.5 * (output(model, x, "b") - zero)
    assert_close(output(model, x, "mix"), expected)


def test_methods_may_differ_between_sites():
    """LoRA in the body and a head for each task: every site is combined by its own method; a rank concerns the first."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 2)).double()
    rules = {"0": peftkit.LoRA(rank=2), "1": peftkit.Full(keep_base=True)}
    model = add(add(model, "a", rules, seed=1), "b", rules, seed=2)
    peftkit.combine(model, {"a": 0.7, "b": 0.5}, name="mix", how="svd", rank=1)
    assert_close(delta(model, "mix", path="1"), 0.7 * delta(model, "a", path="1") + 0.5 * delta(model, "b", path="1"))
    assert_close(delta(model, "mix"), best(0.7 * delta(model, "a") + 0.5 * delta(model, "b"), 1))


# ---------------------------------------------------------------------------------------------------- refusals


def rules_differ():
    model = add(make_layer("linear"), "a", peftkit.LoRA(rank=2), seed=1, targets="0")
    return add(model, "b", AffineRows(), seed=2, targets="0")


def in_place():
    torch.manual_seed(0)
    model = peftkit.wrap(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 2)), "full", targets="0", name="a")
    return peftkit.wrap(model, "lora", targets="1", name="b")


def activation():
    return peftkit.wrap(tuned("linear"), Bottleneck(), targets="0", name="c")


def infinite():
    model = tuned("linear")
    model[0].adapters["b"]["weight"].up.data[0, 0] = math.inf
    return model


def on_meta():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(6, 5))
    return peftkit.wrap(peftkit.wrap(model, "lora", targets="0", name="a"), "lora", targets="0", name="b")


BOTH = {"a": 0.5, "b": 0.5}
REFUSED = {
    "unknown way": (lambda: tuned("linear"), BOTH, {"how": "ties_svd"}, FieldError, "how must be one of linear.*did you mean 'ties'"),
    "rank of an exact sum": (lambda: tuned("linear"), BOTH, {"rank": 4}, FieldError, "rank must be None.*how='svd'"),
    "rank": (lambda: tuned("linear"), BOTH, {"how": "svd", "rank": 0}, FieldError, "rank must be a whole number"),
    "density": (lambda: tuned("linear"), BOTH, {"how": "ties", "density": 0.0}, FieldError, "density must be above 0"),
    "sign": (lambda: tuned("linear"), BOTH, {"how": "ties", "majority_sign": "all"}, FieldError, "'total' or 'frequency'"),
    "seed": (lambda: tuned("linear"), BOTH, {"how": "dare", "seed": 0.5}, FieldError, "seed must be a whole number"),
    "no weights": (lambda: tuned("linear"), {}, {}, FieldError, "each with its factor"),
    "a list": (lambda: tuned("linear"), ["a", "b"], {}, FieldError, "each with its factor"),
    "factor": (lambda: tuned("linear"), {"a": math.nan}, {}, FieldError, "factor of 'a' must be a finite number"),
    "unknown adapter": (lambda: tuned("linear"), {"aa": 1.0}, {}, UnknownAdapterError, "no adapter called 'aa'; did you mean 'a'"),
    "taken name": (lambda: tuned("linear"), BOTH, {"name": "b"}, StateError, "has an adapter called 'b' already"),
    "bad name": (lambda: tuned("linear"), BOTH, {"name": "a.b"}, StateError, "without dots"),
    "merged": (lambda: peftkit.merge(tuned("linear")), BOTH, {}, StateError, "cannot combine adapters while .* merged"),
    "plain model": (lambda: nn.Linear(2, 2), BOTH, {}, StateError, "is not wrapped"),
    "different methods": (rules_differ, BOTH, {}, UnsupportedLayerError, r"different methods at 0.weight: 'a' is lora.*'b' is combine-aff"),
    "in place": (in_place, BOTH, {}, StateError, r"'a' trained 0.weight in place.*keep_base=True"),
    "activation": (activation, {"a": 1, "c": 1}, {}, UnsupportedLayerError, "'c' at 0.module: combine-bottleneck.*no weight form"),
    "no sum": (lambda: copies(Rows()), BOTH, {}, UnsupportedLayerError, "'a' at 0.weight: combine-rows there, and its adapters have no sum"),
    "cat of copies": (copies, BOTH, {"how": "cat"}, UnsupportedLayerError, "'a' at 0.weight: full.*how='cat' is for low-rank"),
    "rank of copies": (copies, BOTH, {"how": "ties", "rank": 2}, UnsupportedLayerError, "rank=2 is for low-rank"),
    "start": (lambda: copies(AffineRows(start=2.0)), BOTH, {}, UnsupportedLayerError, "a new adapter of it changes the weight"),
    "not finite": (infinite, BOTH, {}, UnsupportedLayerError, "'b' holds values at 0.weight that are not finite"),
    "too large": (lambda: tuned("linear", torch.float32), {"a": 1e300}, {}, UnsupportedLayerError, "combination at 0.weight is not finite"),
    "meta": (on_meta, BOTH, {}, StateError, "'a' is on the meta device at 0.weight"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    """What has no combination is refused by name, and the model is left as it was."""
    make, weights, options, error, message = REFUSED[case]
    model = make()
    keys, classes = list(model.state_dict()), [type(m) for m in model.modules()]
    known = peftkit.installed.record(model)
    with pytest.raises(error, match=message):
        peftkit.combine(model, weights, **{"name": "mix", **options})
    assert list(model.state_dict()) == keys
    assert [type(m) for m in model.modules()] == classes
    assert peftkit.installed.record(model) is known


def test_other_fields_of_an_affine_method():
    """Parameters of adapters whose fields differ do not mean the same."""
    model = add(make_layer("linear"), "a", AffineRows(), seed=1, targets="0")
    model = add(model, "b", AffineRows(start=2.0), seed=2, targets="0")
    with pytest.raises(UnsupportedLayerError, match=r"'b' at 0\.weight.*'a' has other fields there"):
        peftkit.combine(model, BOTH, name="mix")


def test_frozen_parts_of_an_affine_method():
    """Parameters of adapters whose frozen parts differ do not mean the same."""
    model = copies(Mask())
    with torch.no_grad():
        model[0].adapters["b"]["weight"].mask.zero_()
    with pytest.raises(UnsupportedLayerError, match=r"'b' at 0\.weight.*its frozen 'mask' differs"):
        peftkit.combine(model, BOTH, name="mix")
    with torch.no_grad():
        model[0].adapters["b"]["weight"].mask.fill_(1.0)
    peftkit.combine(model, BOTH, name="mix")
    assert_close(delta(model, "mix"), 0.5 * delta(model, "a") + 0.5 * delta(model, "b"))


def test_a_low_rank_method_that_cannot_be_rebuilt(monkeypatch):
    """A method that does not say how it is made from factors is named."""
    monkeypatch.setattr(peftkit.LoRA, "from_factors", lambda self, up, down: None)
    with pytest.raises(UnsupportedLayerError, match=r"LoRA\.from_factors does not say how"):
        peftkit.combine(tuned("linear"), BOTH, name="mix")


def test_a_state_that_does_not_fit(monkeypatch):
    """A method whose state from factors does not fit its own adapter is named, before anything is installed."""
    monkeypatch.setattr(peftkit.LoRA, "from_factors", lambda self, up, down: (self, {"up": up, "down": down}))
    model = tuned("linear")
    with pytest.raises(MethodError, match=r"lora.*the state for 0\.weight does not fit"):
        peftkit.combine(model, BOTH, name="mix")
    assert list(peftkit.installed.installed(model).adapters) == ["a", "b"]


def test_the_second_site_fails(monkeypatch):
    """Nothing is installed when any site cannot be combined."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model = add(model, "a", peftkit.LoRA(rank=2), seed=1, targets=["0", "1"])
    model = add(model, "b", {"0": peftkit.LoRA(rank=2), "1": Rows()}, seed=2)
    before = list(model.state_dict())
    with pytest.raises(UnsupportedLayerError, match=r"different methods at 1\.weight"):
        peftkit.combine(model, BOTH, name="mix")
    assert list(model.state_dict()) == before
