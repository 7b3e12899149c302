"""What the adapter contract promises to a method's author, on every layer kind and against independent references.

The methods here are plugins like anybody's: three define nothing but `weight`, one adds `bias`, one is an `Activation`. The
reference is the definition, `W' = f(W)`, run through `torch.nn.functional` in float64 with autograd's own gradients.
"""

import copy
import functools
import itertools
import pickle
import sys
import threading
import types
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import peftkit
from peftkit.errors import StateError, UnsupportedLayerError

Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D

TOLERANCE = {
    # Relative to the largest value: sums of some hundred terms, each rounded to 2**-53, 2**-24 or 2**-8 of itself.
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.bfloat16: 2e-2,
}


def assert_close(actual, expected, dtype):
    assert actual.shape == expected.shape
    actual, expected = (t.detach().to_dense().double() for t in (actual, expected))
    error = (actual - expected).abs().max().item()
    size = expected.abs().max().item()
    assert error <= TOLERANCE[dtype] * size, f"differs by {error:.3g}, where values go up to {size:.3g}"


# --------------------------------------------------------------------------------------------- the methods


@dataclass(frozen=True)
class Rows(peftkit.Method):
    """Multiply every row by a learned factor."""

    name: ClassVar[str] = "contract-rows"

    def adapter(self, site, shared=None):
        return RowsAdapter(site)


class RowsAdapter(peftkit.Adapter):
    def __init__(self, site):
        super().__init__(site)
        self.scale = site.parameter(torch.ones(site.fan_out, 1))

    def weight(self, w):
        return w * self.scale


@dataclass(frozen=True)
class RowsAndBias(peftkit.Method):
    """Multiply every row, and the bias with it, by a learned factor."""

    name: ClassVar[str] = "contract-rows-and-bias"

    def adapter(self, site, shared=None):
        return RowsAndBiasAdapter(site)


class RowsAndBiasAdapter(RowsAdapter):
    def bias(self, b):
        return b * self.scale.squeeze(1)


@dataclass(frozen=True)
class Reflection(peftkit.Method):
    """Reflect the outputs in a learned hyperplane: orthogonal, and the identity for no value of its parameter."""

    name: ClassVar[str] = "contract-reflection"

    def adapter(self, site, shared=None):
        return ReflectionAdapter(site)


class ReflectionAdapter(peftkit.Adapter):
    def __init__(self, site):
        super().__init__(site)
        self.normal = site.parameter(torch.ones(site.fan_out, 1))

    def weight(self, w):
        return w - 2 * self.normal @ (self.normal.mT @ w) / self.normal.square().sum()


@dataclass(frozen=True)
class Delta(peftkit.Method):
    """Add a learned matrix."""

    name: ClassVar[str] = "contract-delta"

    def adapter(self, site, shared=None):
        return DeltaAdapter(site)


class DeltaAdapter(peftkit.Adapter):
    def __init__(self, site):
        super().__init__(site)
        self.delta = site.parameter(torch.zeros(site.shape))

    def weight(self, w):
        return w + self.delta


@dataclass(frozen=True)
class Bottleneck(peftkit.Method):
    """Add a small network of the module's output to that output."""

    name: ClassVar[str] = "contract-bottleneck"
    scope: ClassVar = "modules"

    features: int = 6
    width: int = 2

    def adapter(self, site, shared=None):
        return BottleneckAdapter(site, self)


class BottleneckAdapter(peftkit.Activation):
    def __init__(self, site, method):
        super().__init__(site)
        self.down = site.parameter(torch.randn(method.width, method.features) / 4)
        self.up = site.parameter(torch.zeros(method.features, method.width))

    def forward(self, base, *args, **kwargs):
        y = base(*args, **kwargs)
        return y + F.linear(torch.tanh(F.linear(y, self.down)), self.up)


LORA = peftkit.LoRA(rank=2, alpha=3.0)


def matrix_of(method, adapter, w):
    """`W'` by the method's formula, with the adapter's tensors named as given (leaves of the reference's own graph)."""
    if isinstance(method, peftkit.LoRA):
        return w + method.alpha / method.rank * adapter["up"] @ adapter["down"]
    if isinstance(method, (Rows, RowsAndBias)):
        return adapter["scale"].expand_as(w) * w
    if isinstance(method, Reflection):
        n = adapter["normal"][:, 0]
        return (torch.eye(len(n), dtype=w.dtype) - 2 * torch.outer(n, n) / (n @ n)) @ w
    return w + adapter["delta"]


def bias_of(method, adapter, b):
    return b * adapter["scale"][:, 0] if isinstance(method, RowsAndBias) and b is not None else b


METHODS = {"lora": LORA, "rows": Rows(), "reflection": Reflection(), "delta": Delta(), "rows and bias": RowsAndBias()}
ALL_METHODS = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


PLUGIN = types.ModuleType("peftkit_contract_plugin")
PLUGIN.peftkit_methods = peftkit.hookimpl(lambda: [Rows, RowsAndBias, Reflection, Delta, Bottleneck])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The tensors here are so small that torch's threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """The methods of this file as those of an installed package, for files name methods and never classes."""
    info = tmp_path / "peftkit_contract-1.0.dist-info"
    info.mkdir()
    info.joinpath("METADATA").write_text("Metadata-Version: 2.1\nName: peftkit-contract\nVersion: 1.0\n")
    lines = "".join(f"{method.name} = {PLUGIN.__name__}\n" for method in PLUGIN.peftkit_methods())
    info.joinpath("entry_points.txt").write_text(f"[peftkit.methods]\n{lines}")
    monkeypatch.setitem(sys.modules, PLUGIN.__name__, PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)


# ---------------------------------------------------------------------------------------------- the layers


def features():
    return torch.randn(3, 4, 6, dtype=torch.float64)


def pixels():
    return torch.randn(2, 4, 6, 5, dtype=torch.float64)


def tokens():
    # Every token once in a sample, some in both; 0 is the padding row where a layer has one.
    return torch.tensor([[1, 4, 0, 7], [0, 7, 2, 5]])


def conv(**options):
    return nn.Conv2d(4, 6, (3, 2), **options)


LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), features),
    "linear, no bias": (lambda: nn.Linear(6, 5, bias=False), features),
    "Conv1D": (lambda: Conv1D(5, 6), features),
    "conv2d": (conv, pixels),
    "conv2d, stride, no bias": (lambda: conv(stride=(2, 1), bias=False), pixels),
    "conv2d, groups and dilation": (lambda: conv(groups=2, dilation=2, padding=2), pixels),
    "conv2d, same": (lambda: nn.Conv2d(4, 6, 3, padding="same", dilation=2), pixels),
    "conv2d, reflect": (lambda: conv(padding=(2, 1), padding_mode="reflect"), pixels),
    "conv2d, replicate": (lambda: conv(padding=(2, 1), padding_mode="replicate"), pixels),
    "conv2d, circular": (lambda: conv(padding=(2, 1), padding_mode="circular"), pixels),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, groups=2), lambda: torch.randn(2, 4, 7, dtype=torch.float64)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 2, groups=2), lambda: torch.randn(2, 4, 3, 4, 3, dtype=torch.float64)),
    "embedding": (lambda: nn.Embedding(9, 5), tokens),
    "embedding, padding_idx": (lambda: nn.Embedding(9, 5, padding_idx=0), tokens),
    "embedding, max_norm": (lambda: nn.Embedding(9, 5, max_norm=1.0), tokens),
    "embedding, sparse": (lambda: nn.Embedding(9, 5, sparse=True), tokens),
    "embedding, scale_grad_by_freq": (lambda: nn.Embedding(9, 5, scale_grad_by_freq=True), tokens),
    "embedding, padding_idx and max_norm": (lambda: nn.Embedding(9, 5, padding_idx=0, max_norm=1.0), tokens),
}
ALL_LAYERS = pytest.mark.parametrize("layer", LAYERS)
KINDS = ("linear", "Conv1D", "conv2d, groups and dilation", "embedding")


def as_matrix(layer, w):
    """The weight as a matrix `[out, in]`, and how to turn it back."""
    if isinstance(layer, (Conv1D, nn.Embedding)):
        return w.T, lambda m: m.T
    if isinstance(layer, nn.modules.conv._ConvNd):
        return w.reshape(w.shape[0], -1), lambda m: m.reshape(w.shape)
    return w, lambda m: m


def run(layer, x, w, b):
    """The layer's own computation with another weight and bias, through torch's functions alone."""
    if isinstance(layer, nn.Linear):
        return F.linear(x, w, b)
    if isinstance(layer, Conv1D):
        return x @ w + b
    if isinstance(layer, nn.Embedding):
        options = (layer.padding_idx, layer.max_norm, layer.norm_type, layer.scale_grad_by_freq)
        # A copy, because max_norm shortens the rows of what it is given. Gradients go past it, as torch's do.
        return F.embedding(x, w + 0, *options)
    convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(layer.kernel_size)]
    padding = layer.padding
    if layer.padding_mode != "zeros":
        x = F.pad(x, [p for p in reversed(padding) for _ in "<>"], layer.padding_mode)
        padding = 0
    return convolve(x, w, b, layer.stride, padding, layer.dilation, layer.groups)


class Reference:
    """A float64 layer with methods applied one after another by their formulas; its own copies of all tensors."""

    def __init__(self, layer, raw, raw_bias, chain):
        self.layer = layer
        self.chain = [
            (method, {n: p.detach().double().requires_grad_() for n, p in adapter.named_parameters()})
            for method, adapter in chain
        ]
        m, restore = as_matrix(layer, raw.detach().double())
        b = None if raw_bias is None else raw_bias.detach().double()
        for method, tensors in self.chain:
            m = matrix_of(method, tensors, m)
            b = bias_of(method, tensors, b)
        self.weight, self.bias = restore(m), b

    def __call__(self, x):
        return run(self.layer, x, self.weight, self.bias)

    def gradients(self):
        return [p.grad for _, tensors in self.chain for p in tensors.values()]


def adapt(layer, *methods, dtype=torch.float64):
    """A model of one adapted layer, each method an adapter with random values: (model, adapters, weight, bias before)."""
    model = nn.Sequential(layer.to(dtype))
    weight, bias = (None if p is None else p.detach().clone() for p in (layer.weight, getattr(layer, "bias", None)))
    for i, method in enumerate(methods):
        model = peftkit.wrap(model, {"0": method}, name=f"f{i}")
    adapters = [layer.adapters[f"f{i}"]["weight"] for i in range(len(methods))]
    randomise(adapters)
    return model, adapters, weight, bias


def randomise(adapters):
    with torch.no_grad():
        for adapter in adapters:
            for p in adapter.parameters():
                p.copy_(torch.randn(p.shape, dtype=torch.float64) + 0.2)


def differentiable(x, dtype):
    return x.to(dtype).requires_grad_() if x.is_floating_point() else x


# --------------------------------------------------------------------------- one method, one layer, everything


@ALL_LAYERS
@ALL_METHODS
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_definition(layer, method, dtype):
    """A method has the output and the gradients that autograd gives its formula, on every kind and option of layer."""
    build, make_input = LAYERS[layer]
    model, adapters, weight, bias = adapt(build(), method, dtype=dtype)
    reference = Reference(model[0], weight, bias, [(method, adapters[0])])
    x = differentiable(make_input(), dtype)
    their_x = differentiable(x.detach(), torch.float64)
    y, their_y = model(x), reference(their_x)
    assert y.dtype == dtype
    assert_close(y, their_y, dtype)

    direction = torch.randn(y.shape, dtype=torch.float64)
    y.backward(direction.to(dtype))
    their_y.backward(direction)
    for p, theirs in zip(adapters[0].parameters(), reference.gradients(), strict=True):
        assert_close(p.grad, theirs, dtype)
    if x.is_floating_point():
        assert_close(x.grad, their_x.grad, dtype)
    assert model[0].weight.grad is None
    assert torch.equal(model[0].weight, weight)


# Where torch's own gradient is the derivative: it is not with max_norm; and padding rows are left out of it and repeated
# tokens weighted, so the tokens here are all different and none is the padding.
@pytest.mark.parametrize("layer", [layer for layer in LAYERS if "max_norm" not in layer])
@ALL_METHODS
def test_gradcheck(layer, method):
    """The gradients on an adapter's parameters and on the input are the derivatives, numerically."""
    build, make_input = LAYERS[layer]
    model, adapters, _, _ = adapt(build(), method)
    x = make_input()[:1]
    x = x.requires_grad_() if x.is_floating_point() else torch.tensor([[1, 4, 7, 2]])
    names = [name for name, _ in adapters[0].named_parameters()]
    values = [p.detach().clone().requires_grad_() for p in adapters[0].parameters()]

    def output(x, *values):
        given = {f"0.adapters.f0.weight.{name}": value for name, value in zip(names, values, strict=True)}
        return torch.func.functional_call(model, given, (x,))

    assert torch.autograd.gradcheck(output, (x, *values))


@ALL_LAYERS
@ALL_METHODS
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_merge_and_unmerge(layer, method, dtype):
    """Merging makes the weight that the formula gives, the plain layer then computes it, and unmerging is exact."""
    build, make_input = LAYERS[layer]
    model, adapters, weight, bias = adapt(build(), method, dtype=dtype)
    reference = Reference(model[0], weight, bias, [(method, adapters[0])])
    raw = model[0].weight
    x = make_input()
    x = x.to(dtype) if x.is_floating_point() else x
    y = model(x)
    assert peftkit.merge(model) is model
    assert_close(model[0].weight, reference.weight, dtype)
    if bias is not None:
        assert_close(model[0].bias, reference.bias, dtype)
    assert_close(model(x), y, dtype)

    peftkit.unmerge(model)
    assert model[0].weight is raw
    assert torch.equal(raw, weight)
    assert bias is None or torch.equal(model[0].bias, bias)
    assert torch.equal(model(x), y)


@ALL_LAYERS
@ALL_METHODS
@pytest.mark.usefixtures("installed")
def test_save_and_load(layer, method, tmp_path):
    """A saved adapter on a fresh copy of the base gives the same output, bit for bit."""
    build, make_input = LAYERS[layer]
    base = build().double()
    fresh = nn.Sequential(copy.deepcopy(base))
    model, adapters, _, _ = adapt(base, method)
    peftkit.save(model, tmp_path / "adapter.safetensors")
    fresh = peftkit.load(fresh, tmp_path / "adapter.safetensors")
    x = make_input()
    assert torch.equal(fresh(x), model(x))
    loaded = fresh[0].adapters["f0"]["weight"]
    assert type(loaded) is type(adapters[0])
    for (name, p), (other, q) in zip(loaded.named_parameters(), adapters[0].named_parameters(), strict=True):
        assert name == other
        assert torch.equal(p, q)


@ALL_LAYERS
@ALL_METHODS
def test_unwrap(layer, method):
    """After use and unwrap the layer is what it was: class, attributes, the parameters themselves, values, output."""
    build, make_input = LAYERS[layer]
    base = build().double()
    untouched = copy.deepcopy(base).requires_grad_(requires_grad=False)
    parameters, attributes = dict(base.named_parameters()), set(base.__dict__)
    model, _, _, _ = adapt(base, method)
    x = make_input()
    model(x).sum().backward()
    assert peftkit.unwrap(model) is model
    assert type(base) is type(untouched)
    assert set(base.__dict__) == attributes
    assert not base._modules
    assert all(p is parameters[name] for name, p in base.named_parameters())
    assert all(p.requires_grad and p.grad is None for p in base.parameters())
    for p, before in zip(base.parameters(), untouched.parameters(), strict=True):
        assert torch.equal(p, before)
    with torch.no_grad():
        assert torch.equal(base.requires_grad_(requires_grad=False)(x), untouched(x))


@pytest.mark.parametrize("layer", ["linear", "linear, no bias", "Conv1D", "conv2d, reflect", "embedding"])
@pytest.mark.parametrize("method", [Rows(), Reflection(), Delta(), RowsAndBias()], ids=lambda method: method.name)
def test_half_precision(layer, method):
    """On a bfloat16 layer a method computes in float32, and its result is rounded once."""
    build, make_input = LAYERS[layer]
    model, adapters, weight, bias = adapt(build(), method, dtype=torch.bfloat16)
    assert all(p.dtype == torch.float32 for p in adapters[0].parameters())
    m, restore = as_matrix(model[0], weight.float())
    rounded = restore(adapters[0].weight(m)).bfloat16()
    rounded_bias = adapters[0].bias(bias.float()).bfloat16() if bias is not None else None
    x = make_input()
    x = x.bfloat16() if x.is_floating_point() else x
    plain = copy.deepcopy(build()).bfloat16().requires_grad_(requires_grad=False)
    plain.weight.copy_(rounded)
    if bias is not None:
        plain.bias.copy_(rounded_bias)
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))


# ---------------------------------------------------------------------------------------------- composition


THREE = {"lora": LORA, "rows": RowsAndBias(), "reflection": Reflection()}


@pytest.mark.parametrize("layer", KINDS)
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=lambda order: "".join(map(str, order)))
def test_composition(layer, order):
    """Active adapters compose in order of activation: `W' = f3(f2(f1(W)))`, forward, backward and merged."""
    build, make_input = LAYERS[layer]
    methods = list(THREE.values())
    model, adapters, weight, bias = adapt(build(), *methods)
    peftkit.activate(model, *(f"f{i}" for i in order))
    reference = Reference(model[0], weight, bias, [(methods[i], adapters[i]) for i in order])
    x = make_input()
    y, their_y = model(x), reference(x)
    assert_close(y, their_y, torch.float64)
    direction = torch.randn(y.shape, dtype=torch.float64)
    y.backward(direction)
    their_y.backward(direction)
    gradients = [p.grad for i in order for p in adapters[i].parameters()]
    for ours, theirs in zip(gradients, reference.gradients(), strict=True):
        assert_close(ours, theirs, torch.float64)
    peftkit.merge(model)
    assert_close(model[0].weight, reference.weight, torch.float64)
    assert_close(model(x), their_y, torch.float64)


@pytest.mark.parametrize("layer", KINDS)
def test_order_matters(layer):
    """The same two adapters in the other order are another function, so that the test above can tell."""
    build, make_input = LAYERS[layer]
    model, _, _, _ = adapt(build(), RowsAndBias(), Reflection())
    x = make_input()
    with peftkit.using(model, "f0", "f1"):
        y = model(x)
    with peftkit.using(model, "f1", "f0"):
        assert not torch.allclose(model(x), y)


@pytest.mark.parametrize("layer", KINDS)
def test_sum_of_low_rank_updates(layer):
    """Several LoRAs on one layer add up, each with its own rank and scale."""
    build, make_input = LAYERS[layer]
    methods = [LORA, peftkit.LoRA(rank=1, alpha=0.5), peftkit.LoRA(rank=4, rank_stabilized=True, alpha=2.0)]
    model, adapters, weight, _ = adapt(build(), *methods)
    m, restore = as_matrix(model[0], weight)
    for method, adapter in zip(methods, adapters, strict=True):
        m = m + method.scale * adapter.up.detach() @ adapter.down.detach()
    x = make_input()
    bias = getattr(model[0], "bias", None)
    assert_close(model(x), run(model[0], x, restore(m), bias), torch.float64)


@pytest.mark.parametrize("layer", KINDS)
def test_merge_one_of_two(layer):
    """With the first adapter merged the second runs on the merged weight: the function is the same."""
    build, make_input = LAYERS[layer]
    model, _, _, _ = adapt(build(), Reflection(), LORA)
    x = make_input()
    y = model(x)
    peftkit.merge(model, "f0")
    assert_close(model(x), y, torch.float64)
    peftkit.unmerge(model)
    assert torch.equal(model(x), y)


# ------------------------------------------------------------------------------------------- the fast path


class OwnLinear(nn.Linear):
    def forward(self, input):  # noqa: A002
        return F.linear(input, self.weight, self.bias)


class OwnConv1D(Conv1D):
    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, self.nx), self.weight).view(*x.shape[:-1], self.nf)


class OwnConv2d(nn.Conv2d):
    def forward(self, input):  # noqa: A002
        return self._conv_forward(input, self.weight, self.bias)


class OwnEmbedding(nn.Embedding):
    def forward(self, input):  # noqa: A002
        return F.embedding(input, self.weight, self.padding_idx)


OWN = {nn.Linear: OwnLinear, Conv1D: OwnConv1D, nn.Conv2d: OwnConv2d, nn.Embedding: OwnEmbedding}
FUSED = [
    layer for layer in LAYERS if "max_norm" not in layer and "freq" not in layer and layer not in ("conv1d", "conv3d")
]
INITS = pytest.mark.parametrize("init", ["default", "pissa"])


@pytest.fixture
def built(monkeypatch):
    """How often an adapted weight was built from low-rank factors."""
    calls = []
    weight = peftkit.LowRank.weight

    @functools.wraps(weight)
    def counted(self, w, keep=None):
        calls.append(w.shape)
        return weight(self, w, keep)

    monkeypatch.setattr(peftkit.LowRank, "weight", counted)
    return calls


def both_paths(layer, method, dtype):
    """The layer with one adapter, and the same under a subclass with a forward of its own, which gets no fast path."""
    generic = copy.deepcopy(layer)
    generic.__class__ = OWN[type(layer)]
    fast, adapters, _, _ = adapt(layer, method, dtype=dtype)
    slow, _, _, _ = adapt(generic, method, dtype=dtype)
    peftkit.load_state_dict(slow, peftkit.state_dict(fast))
    return fast, slow, adapters[0], slow[0].adapters["f0"]["weight"]


@pytest.mark.parametrize("layer", FUSED)
@pytest.mark.parametrize(
    "dtype, autocast",
    [(torch.float64, False), (torch.float32, False), (torch.bfloat16, False), (torch.float32, True)],
    ids=["float64", "float32", "bfloat16", "float32 under autocast"],
)
@INITS
def test_fast_path(layer, dtype, autocast, init, built):
    """LoRA's fast path builds no weight, and equals `LowRank.weight` to rounding: output and gradients."""
    build, make_input = LAYERS[layer]
    fast, slow, adapter, generic = both_paths(build(), peftkit.LoRA(rank=2, alpha=3.0, init=init), dtype)
    assert isinstance(adapter.up, nn.Parameter)
    x = differentiable(make_input(), dtype)
    their_x = differentiable(x.detach(), dtype)
    rounding = torch.bfloat16 if autocast else dtype
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = fast(x)
        assert not built
        their_y = slow(their_x)
        assert built
    assert y.dtype == their_y.dtype
    assert_close(y, their_y, rounding)
    direction = torch.randn(y.shape, dtype=torch.float64).to(y.dtype)
    y.backward(direction)
    their_y.backward(direction)
    assert_close(adapter.up.grad, generic.up.grad, rounding)
    assert_close(adapter.down.grad, generic.down.grad, rounding)
    assert adapter.up.grad.dtype == adapter.up.dtype
    if x.is_floating_point():
        assert_close(x.grad, their_x.grad, rounding)


def test_padding_row_learns_nothing():
    """Tokens at padding_idx give no gradient to either factor, on the fast path as in the definition."""
    model, adapters, _, _ = adapt(nn.Embedding(9, 5, padding_idx=3), LORA)
    model(torch.full((2, 4), 3)).sum().backward()
    assert not adapters[0].up.grad.any()
    assert not adapters[0].down.grad.any()
    model(torch.tensor([3, 1])).sum().backward()
    assert adapters[0].up.grad.any()
    assert adapters[0].down.grad.any(0).nonzero().flatten().tolist() == [1]


def test_trained_base_takes_the_generic_path(built):
    """A base weight that requires grad gets its gradient through the adapter's own formula."""
    model, _, _, _ = adapt(nn.Linear(6, 5), LORA)
    model[0].weight.requires_grad_()
    model(features()).sum().backward()
    assert built
    assert model[0].weight.grad is not None


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model))}


@pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES)
def test_a_copy_keeps_the_fast_path(make_copy, built):
    """A copied model runs old and new adapters as the original does, without building a weight."""
    model, _, _, _ = adapt(nn.Linear(6, 5), LORA)
    model = make_copy(model)
    model = peftkit.wrap(model, {"0": LORA}, name="g")
    model(features())
    assert not built


@pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES)
def test_a_copy_keeps_what_belongs_together(make_copy):
    """On a copied model a bias still goes with its weight, for a method that is added to the copy."""
    model, _ = around(nn.Linear(6, 6), "a")
    model = make_copy(model)
    model = peftkit.wrap(model, {"0": RowsAndBias()}, name="b")
    peftkit.activate(model, "b")
    nn.init.constant_(model[0].adapters["b"]["weight"].scale, 2.0)
    assert torch.equal(model(torch.zeros(1, 6, dtype=torch.float64))[0], 2 * model[0].bias)


# ----------------------------------------------------------------------------------------------- dropout


def test_dropout_is_off_in_eval():
    """In eval mode an adapter with dropout computes what one without it does, bit for bit."""
    model, _, _, _ = adapt(nn.Linear(6, 5), peftkit.LoRA(rank=2, alpha=3.0, dropout=0.5))
    plain, _, _, _ = adapt(copy.deepcopy(peftkit.unwrap(copy.deepcopy(model))[0]), LORA)
    peftkit.load_state_dict(plain, peftkit.state_dict(model))
    x = features()
    assert not torch.equal(model.train()(x), plain(x))
    assert torch.equal(model.eval()(x), plain(x))


@pytest.mark.parametrize("layer", KINDS)
@pytest.mark.parametrize("path", ["fast", "generic"])
def test_dropout_is_reproducible(layer, path):
    """In training the same seed gives the same output, another seed another."""
    build, make_input = LAYERS[layer]
    fast, slow, _, _ = both_paths(build(), peftkit.LoRA(rank=2, alpha=3.0, dropout=0.5), torch.float64)
    model = (fast if path == "fast" else slow).train()
    x = make_input()

    def output(seed):
        torch.manual_seed(seed)
        return model(x)

    assert torch.equal(output(1), output(1))
    assert not torch.equal(output(1), output(2))


@pytest.mark.parametrize("layer", KINDS)
@pytest.mark.parametrize("path", ["fast", "generic"])
def test_dropout_keeps_the_expectation(layer, path):
    """The mean of many outputs in training is the output in eval mode, within five standard errors."""
    build, make_input = LAYERS[layer]
    fast, slow, _, _ = both_paths(build(), peftkit.LoRA(rank=2, alpha=3.0, dropout=0.3), torch.float64)
    model = fast if path == "fast" else slow
    x = make_input()
    with torch.no_grad():
        expected = model.eval()(x)
        model.train()
        samples = torch.stack([model(x) for _ in range(1000)])
    error = samples.std(0) / 1000**0.5
    assert error.max() > 0
    assert ((samples.mean(0) - expected).abs() <= 5 * error + 1e-12).all()


def test_dropout_on_the_fast_path_drops_elements():
    """On the fast path each element of each input row is dropped on its own, and on its way into `down` alone."""
    model, adapters, weight, bias = adapt(nn.Linear(2, 5), peftkit.LoRA(rank=2, alpha=2.0, dropout=0.5))
    x = torch.ones(64, 2, dtype=torch.float64)
    update = model.train()(x) - F.linear(x, weight, bias)
    masks = torch.tensor([[0, 0], [0, 2], [2, 0], [2, 2]], dtype=torch.float64)
    possible = F.linear(masks, adapters[0].up @ adapters[0].down)
    which = (update[:, None] - possible).abs().amax(-1)
    assert which.min(1).values.max() < 1e-9
    assert set(which.argmin(1).tolist()) == {0, 1, 2, 3}


def test_dropout_on_the_generic_path_drops_columns():
    """On the generic path columns of `down` are dropped: the same inputs for the whole batch."""
    _, model, _, adapter = both_paths(nn.Linear(3, 5), peftkit.LoRA(rank=2, alpha=2.0, dropout=0.5), torch.float64)
    x = torch.randn(7, 3, dtype=torch.float64)
    base = F.linear(x, model[0].weight, model[0].bias)
    masks = [2 * torch.tensor(mask, dtype=torch.float64) for mask in itertools.product([0, 1], repeat=3)]
    possible = [F.linear(x, adapter.up @ (adapter.down * mask)) for mask in masks]
    seen = set()
    for _ in range(60):
        update = model.train()(x) - base
        distances = [(update - p).abs().max().item() for p in possible]
        assert min(distances) < 1e-9
        seen.add(distances.index(min(distances)))
    assert len(seen) == 8


def test_dropout_on_an_embedding_drops_tokens():
    """A token's one-hot input is kept or dropped whole: its update is doubled or gone."""
    model, adapters, weight, _ = adapt(nn.Embedding(9, 5), peftkit.LoRA(rank=2, alpha=2.0, dropout=0.5))
    x = torch.randint(9, (64,))
    update = (model.train()(x) - F.embedding(x, weight)).detach()
    full = 2 * (adapters[0].up @ adapters[0].down).T[x].detach()
    kept = update.abs().sum(1) > 0
    assert 0 < kept.sum() < 64
    assert_close(update[kept], full[kept], torch.float64)


@pytest.mark.parametrize("layer", KINDS)
def test_merge_ignores_dropout(layer):
    """A merge in training mode makes the very weight that one in eval mode does."""
    build, _ = LAYERS[layer]
    model, _, _, _ = adapt(build(), peftkit.LoRA(rank=2, alpha=3.0, dropout=0.5))
    merged = peftkit.merge(model.eval())[0].weight.clone()
    peftkit.unmerge(model)
    assert torch.equal(peftkit.merge(model.train())[0].weight, merged)


# ---------------------------------------------------------------------------- adapters that have no weight form


def bottleneck(adapter, y):
    return y + torch.tanh(y @ adapter.down.T) @ adapter.up.T


class Block(nn.Module):
    """A layer that is of no known kind, and takes arguments by name."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x, *, times=1.0):
        return torch.relu(self.inner(x)) * times


ACTIVATED = {"linear": lambda: nn.Linear(6, 6), "block": Block, "norm": lambda: nn.LayerNorm(6)}


def around(layer, *names):
    model = nn.Sequential(layer.double())
    for name in names:
        model = peftkit.wrap(model, {"0": Bottleneck()}, name=name)
    adapters = [layer.adapters[name]["module"] for name in names]
    randomise(adapters)
    return model, adapters


@pytest.mark.parametrize("layer", ACTIVATED)
def test_activation(layer):
    """An activation adapter surrounds its module: its output and its gradients are those of the formula."""
    base = ACTIVATED[layer]()
    plain = copy.deepcopy(base).double().requires_grad_(requires_grad=False)
    model, (adapter,) = around(base, "a")
    x = features()
    tensors = {n: p.detach().clone().requires_grad_() for n, p in adapter.named_parameters()}
    expected = bottleneck(types.SimpleNamespace(**tensors), plain(x))
    y = model(x)
    assert_close(y, expected, torch.float64)
    y.square().sum().backward()
    expected.square().sum().backward()
    for name, p in adapter.named_parameters():
        assert_close(p.grad, tensors[name].grad, torch.float64)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        "0.adapters.a.module.down",
        "0.adapters.a.module.up",
    }


def test_activation_passes_arguments_on():
    """Positional and named arguments reach the module that is surrounded."""
    model, (adapter,) = around(Block(), "a")
    x = features()
    with peftkit.disabled(model):
        y = model[0](x, times=3.0)
    assert_close(model[0](x, times=3.0), bottleneck(adapter, y), torch.float64)


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")], ids="".join)
def test_activations_nest(order):
    """The adapter that was activated later surrounds the earlier one."""
    base = nn.Linear(6, 6)
    model, adapters = around(base, "a", "b")
    by_name = dict(zip("ab", adapters, strict=True))
    peftkit.activate(model, *order)
    x = features()
    y = F.linear(x, base.weight, base.bias)
    for name in order:
        y = bottleneck(by_name[name], y)
    assert_close(model(x), y, torch.float64)


def test_activation_around_an_adapted_weight():
    """An activation adapter and a weight adapter on one layer both act, the weight's inside, in either order."""
    model, (adapter,) = around(nn.Linear(6, 6), "a")
    model = peftkit.wrap(model, {"0": Reflection()}, name="w")
    w = model[0].adapters["w"]["weight"].weight(model[0].weight)
    x = features()
    expected = bottleneck(adapter, F.linear(x, w, model[0].bias))
    assert_close(model(x), expected, torch.float64)
    peftkit.activate(model, "w", "a")
    assert_close(model(x), expected, torch.float64)


@pytest.mark.parametrize("layer", ACTIVATED)
@pytest.mark.usefixtures("installed")
def test_activation_saves_and_loads(layer, tmp_path):
    """A saved activation adapter on a fresh base gives the same output, bit for bit."""
    base = ACTIVATED[layer]().double()
    fresh = nn.Sequential(copy.deepcopy(base))
    model, _ = around(base, "a")
    peftkit.save(model, tmp_path / "a.safetensors")
    x = features()
    y = model(x)
    peftkit.load(fresh, tmp_path / "a.safetensors")
    assert torch.equal(fresh(x), y)


@pytest.mark.parametrize("layer", ACTIVATED)
def test_activation_unwraps(layer):
    """Without its activation adapter the module is what it was."""
    base = ACTIVATED[layer]()
    cls, attributes, children, keys = type(base), set(base.__dict__), set(base._modules), list(base.state_dict())
    model, _ = around(base, "a")
    peftkit.unwrap(model)
    assert type(base) is cls
    assert (set(base.__dict__), set(base._modules), list(base.state_dict())) == (attributes, children, keys)
    assert all(p.requires_grad for p in base.parameters())


@pytest.mark.parametrize("name", [None, "a"])
@pytest.mark.parametrize("keep_base", [True, False])
def test_activation_does_not_merge(name, keep_base):
    """A merge that includes an activation adapter is refused by the method's and the adapter's name, and changes nothing."""
    model, _ = around(nn.Linear(6, 6), "a")
    x = features()
    y, raw = model(x), model[0].weight
    with pytest.raises(UnsupportedLayerError, match=r"contract-bottleneck at 0 .*'a'"):
        peftkit.merge(model, name, keep_base=keep_base)
    assert model[0].weight is raw
    assert not peftkit.summary(model).adapters[0].merged
    assert torch.equal(model(x), y)


# ----------------------------------------------------------------- weights that an ancestor of the layer reads itself


class Reader(nn.Module):
    """Reads one child's weight without calling it, as Mamba does, and calls another."""

    def __init__(self):
        super().__init__()
        self.read = nn.Linear(8, 8)
        self.called = nn.Linear(8, 8)

    def forward(self, x):
        return F.linear(torch.tanh(self.called(x)), self.read.weight, self.read.bias)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


def encoder_layer(**options):
    return nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True, **options)


READERS = {
    # id: the model, and which layers are adapted
    "a child's weight": (Reader, ["read"]),
    "a child's weight, and one that is called": (Reader, ["read", "called"]),
    "attention's out_proj": (Attention, ["attention.out_proj"]),
    "encoder layer": (encoder_layer, ["self_attn.out_proj", "linear1", "linear2"]),
    "encoder layer, norm first": (lambda: encoder_layer(norm_first=True), ["self_attn.out_proj", "linear1", "linear2"]),
    "encoder": (
        lambda: nn.TransformerEncoder(encoder_layer(), 2, enable_nested_tensor=False),
        ["layers.0.self_attn.out_proj", "layers.1.linear1", "layers.1.self_attn.out_proj"],
    ),
}
ALL_READERS = pytest.mark.parametrize("name", READERS)
READ_METHODS = pytest.mark.parametrize("method", [LORA, Rows()], ids=["lora", "rows"])


def read_model(name, method):
    """The adapted model, its adapters by path, and the same model with the weights replaced by hand."""
    build, paths = READERS[name]
    model = build().double()
    by_hand = copy.deepcopy(model)
    model = peftkit.wrap(model, dict.fromkeys(paths, method), name="a")
    adapters = {path: model.get_submodule(path).adapters["a"]["weight"] for path in paths}
    randomise(adapters.values())
    with torch.no_grad():
        for path, adapter in adapters.items():
            w = by_hand.get_submodule(path).weight
            w.copy_(matrix_of(method, dict(adapter.named_parameters()), w))
    return model, adapters, by_hand


def sequences():
    return torch.randn(2, 5, 8, dtype=torch.float64)


@ALL_READERS
@READ_METHODS
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_read_weights(name, method, training, grad):
    """A weight that an ancestor reads is adapted there: the output is that of weights merged by hand, in every mode."""
    model, adapters, by_hand = read_model(name, method)
    model.train(training)
    by_hand.train(training).requires_grad_(requires_grad=False)
    x = sequences()
    with torch.set_grad_enabled(grad):
        y = model(x)
        assert_close(y, by_hand(x), torch.float64)
        with peftkit.disabled(model):
            assert not torch.allclose(model(x), y)
    if grad:
        y.square().sum().backward()
        for adapter in adapters.values():
            assert all(p.grad.any() for p in adapter.parameters())


def test_encoder_fast_path_is_taken(monkeypatch):
    """torch's fused encoder layer really runs in the test above, and gets adapted weights."""
    calls = []
    fused = torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *args: calls.append(args) or fused(*args))
    model, _, by_hand = read_model("encoder layer", LORA)
    x = sequences()
    with torch.no_grad():
        y = model.eval()(x)
        assert len(calls) == 1
        assert_close(y, by_hand.eval()(x), torch.float64)


@ALL_READERS
@READ_METHODS
def test_read_weights_get_the_definition_s_gradients(name, method):
    """Gradients through a weight that an ancestor reads are autograd's own through the formula."""
    model, adapters, by_hand = read_model(name, method)
    x = sequences()
    direction = torch.randn_like(x)
    model(x).backward(direction)
    given, leaves = {}, {}
    base = peftkit.unwrap(copy.deepcopy(model))
    for path, adapter in adapters.items():
        leaves[path] = {n: p.detach().clone().requires_grad_() for n, p in adapter.named_parameters()}
        given[f"{path}.weight"] = matrix_of(method, leaves[path], base.get_submodule(path).weight.detach())
    torch.func.functional_call(by_hand, given, (x,)).backward(direction)
    for path, adapter in adapters.items():
        for n, p in adapter.named_parameters():
            assert_close(p.grad, leaves[path][n].grad, torch.float64)


@ALL_READERS
@READ_METHODS
@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_checkpointing(name, method, use_reentrant):
    """Inside gradient checkpointing the gradients are bit for bit those without it."""
    model, adapters, _ = read_model(name, method)
    x = sequences().requires_grad_()
    model(x).square().sum().backward()
    expected = [p.grad.clone() for a in adapters.values() for p in a.parameters()] + [x.grad.clone()]
    for p in (*(p for a in adapters.values() for p in a.parameters()), x):
        p.grad = None
    checkpoint(model, x, use_reentrant=use_reentrant).square().sum().backward()
    actual = [p.grad for a in adapters.values() for p in a.parameters()] + [x.grad]
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("layer", ["linear", "conv2d"])
def test_checkpointing_a_layer(layer, dropout, use_reentrant):
    """A checkpointed layer has the gradients of the plain one, the same elements dropped in its second run."""
    build, make_input = LAYERS[layer]
    model, (adapter,), _, _ = adapt(build(), peftkit.LoRA(rank=2, alpha=3.0, dropout=dropout))
    model.train()
    x = make_input().requires_grad_()
    torch.manual_seed(1)
    model(x).square().sum().backward()
    expected = adapter.up.grad, adapter.down.grad, x.grad
    adapter.up.grad = adapter.down.grad = x.grad = None
    torch.manual_seed(1)
    checkpoint(model, x, use_reentrant=use_reentrant).square().sum().backward()
    assert all(map(torch.equal, (adapter.up.grad, adapter.down.grad, x.grad), expected))


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("method", [LORA, Rows()], ids=["lora", "rows"])
@pytest.mark.parametrize("inside", ["using", "disabled"])
def test_backward_after_the_block_is_refused(inside, method, use_reentrant):
    """Leaving `using` or `disabled` before a checkpointed backward is an error, never a gradient of other weights."""
    model, adapters, _, _ = adapt(nn.Linear(6, 6), method, LORA)
    x = features().requires_grad_()
    block = peftkit.using(model, "f0") if inside == "using" else peftkit.disabled(model)
    with block:
        y = checkpoint(model, x, use_reentrant=use_reentrant)
    with pytest.raises(StateError, match="checkpointing"):
        y.sum().backward()
    assert all(p.grad is None for adapter in adapters for p in adapter.parameters())

    with peftkit.using(model, "f0"):
        checkpoint(model, x, use_reentrant=use_reentrant).sum().backward()
    assert all(p.grad is not None for p in adapters[0].parameters())


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_backward_inside_another_block_is_refused(use_reentrant):
    """One backward through checkpointed forwards of two adapters cannot recompute both: an error, not wrong gradients."""
    model, _, _, _ = adapt(nn.Linear(6, 6), LORA, LORA)
    x = features().requires_grad_()
    with peftkit.using(model, "f0"):
        y = checkpoint(model, x, use_reentrant=use_reentrant)
    with peftkit.using(model, "f1"):
        z = checkpoint(model, x, use_reentrant=use_reentrant)
        with pytest.raises(StateError, match="checkpointing"):
            (y + z).sum().backward()


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_forward_between_a_checkpoint_and_its_backward(use_reentrant):
    """Running other adapters in between, and coming back in time, changes no gradient."""
    model, adapters, _, _ = adapt(nn.Linear(6, 6), LORA, Rows())
    peftkit.activate(model, "f0")
    x = features().requires_grad_()
    model(x).square().sum().backward()
    expected = adapters[0].up.grad.clone()
    adapters[0].up.grad = None
    y = checkpoint(model, x, use_reentrant=use_reentrant)
    with peftkit.using(model, "f1"), torch.no_grad():
        model(x)
    y.square().sum().backward()
    assert torch.equal(adapters[0].up.grad, expected)


# -------------------------------------------------------------------------- how a weight reads, and from where


@ALL_LAYERS
def test_a_weight_reads_as_the_base_outside_a_forward(layer):
    """Outside a forward `layer.weight` is the very parameter of the base, before and after the layer has run."""
    build, make_input = LAYERS[layer]
    base = build().double()
    raw = base.weight
    model, _, _, _ = adapt(base, RowsAndBias())
    assert model[0].weight is raw
    model(make_input())
    assert model[0].weight is raw
    assert dict(model.named_parameters())["0.weight"] is raw


def test_a_weight_reads_as_the_base_after_a_failed_forward():
    """An exception inside a forward leaves no adapted weight behind."""
    model, _, _, _ = adapt(nn.Linear(6, 5), Rows())
    raw = model[0]._parameters["weight"]
    with pytest.raises(RuntimeError):
        model(torch.randn(3, 7, dtype=torch.float64))
    assert model[0].weight is raw


@ALL_READERS
def test_state_dict_inside_a_hook(name):
    """A state dict that a hook takes in the middle of a forward holds the base's weights."""
    model, _, _ = read_model(name, Rows())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    taken = []
    hooks = [
        register(lambda *_: taken.append({key: value.clone() for key, value in model.state_dict().items()}))
        for module in model.modules()
        for register in (module.register_forward_hook, module.register_forward_pre_hook)
        if not isinstance(module, peftkit.Adapter)
    ]
    model.train()(sequences())
    for hook in hooks:
        hook.remove()
    assert taken
    for state in taken:
        assert state.keys() == before.keys()
        assert all(torch.equal(state[key], before[key]) for key in before)


@pytest.mark.parametrize("layer", KINDS)
@pytest.mark.parametrize("path", ["fast", "generic"])
def test_threads(layer, path):
    """Four threads that run one adapted layer get the right answers, and see the base untouched all the while."""
    build, make_input = LAYERS[layer]
    fast, slow, _, _ = both_paths(build(), LORA, torch.float64)
    model = fast if path == "fast" else slow
    raw = model[0]._parameters["weight"]
    before = raw.detach().clone()
    xs = [make_input() for _ in range(4)]
    expected = [model(x).detach() for x in xs]
    start, wrong = threading.Barrier(4), []

    def work(x, y):
        start.wait()
        for i in range(100):
            with torch.set_grad_enabled(i % 2 == 0):
                if not torch.equal(model(x).detach(), y):
                    wrong.append("output")
            if model[0].weight is not raw:
                wrong.append("weight")
            if not torch.equal(model.state_dict()["0.weight"], before):
                wrong.append("state dict")

    threads = [threading.Thread(target=work, args=pair) for pair in zip(xs, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert torch.equal(raw, before)


def test_threads_under_a_reader():
    """A thread that reads the weight while another is inside the reader's forward sees the base."""
    model, _, _ = read_model("a child's weight, and one that is called", Rows())
    raw, inside, read = model.read._parameters["weight"], threading.Event(), threading.Event()
    seen = []

    def wait(*_):
        inside.set()
        read.wait(10)
        seen.append(("inside", model.read.weight is raw))

    def look():
        inside.wait(10)
        seen.append(("outside", model.read.weight is raw))
        read.set()

    model.called.register_forward_hook(wait)
    thread = threading.Thread(target=look)
    thread.start()
    model(sequences())
    thread.join()
    assert seen == [("outside", True), ("inside", False)]
