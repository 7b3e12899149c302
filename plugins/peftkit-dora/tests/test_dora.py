"""DoRA: the kit, HF PEFT's numbers, and lengths of rows that come without the rows."""

import copy
import doctest
import gc
import math
import pickle
import sys
import weakref

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import peftkit
from peftkit.testing import CASES, parametrize_with_checks
from peftkit.testing.parity import PARTS, compare_with_hf
from peftkit_dora import dora
from peftkit_dora.dora import DoRA

SOME = [case for case in CASES if case.name in ("Linear", "Conv2d", "Embedding", "LSTM")]
DETACHED = {"check_finite_differences": "as in the paper's section 4.3, the norm is a constant to the gradient"}
INITS = ("default", "gaussian", "orthogonal", "pissa", "olora")


@parametrize_with_checks([DoRA(rank=2)], expected_failures=DETACHED)
def test_kit(check):
    """It keeps what peftkit promises of every method, on every layer kind, but that the gradient is the slope."""
    check()


@parametrize_with_checks([DoRA(rank=2, dropout=0.1, init="pissa")], cases=SOME, expected_failures=DETACHED)
def test_kit_variant(check):
    """So it does with dropout and a start that is subtracted."""
    check()


# ------------------------------------------------------------------------------------------------ the definition


class Stack(nn.Module):
    """Matrices `[experts, out, in]`, in whose middle a batch is."""

    def __init__(self, *shape):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape, dtype=torch.float64))

    def forward(self, x):
        return torch.einsum("...oi,ri->...ro", self.weight, x)


def adapter_on(layer, method):
    """The method's adapter on a layer's weight, and the model."""
    model = peftkit.wrap(nn.Sequential(layer), {"0.weight": method})
    return model, model[0].adapters["default"]["weight"]


def directions(adapter, w):
    """`V` by definition, and how large the terms are of which it is the sum."""
    up, down, scale = adapter.factors()
    start = adapter.start() or (torch.zeros_like(up), torch.zeros_like(down))
    v = w + scale * (up @ down - start[0] @ start[1])
    size = w.abs() + abs(scale) * (up.abs() @ down.abs() + start[0].abs() @ start[1].abs())
    return v, size.square().sum(-1, keepdim=True)


@settings(max_examples=60, deadline=None)
@given(
    batch=st.lists(st.integers(1, 3), max_size=2),
    out=st.integers(2, 9),
    width=st.integers(2, 9),
    rank=st.sampled_from([1, 2, 4, 12]),
    init=st.sampled_from(INITS),
    alpha=st.sampled_from([-3.0, 0.5, 16.0]),
    moved=st.sampled_from([0.0, 1e-3, 1.0, 1e3]),
    seed=st.integers(0, 99),
)
def test_norm(batch, out, width, rank, init, alpha, moved, seed):
    """The length of each row is that of the row itself, to rounding of the terms that it is the sum of."""
    if init in ("pissa", "olora"):
        rank = min(rank, out, width)
    rank = 2 if init == "orthogonal" and rank == 1 else rank
    torch.manual_seed(seed)
    _, adapter = adapter_on(Stack(*batch, out, width), DoRA(rank=rank, init=init, alpha=alpha))
    w = torch.randn(*batch, out, width, dtype=torch.float64)
    with torch.no_grad():
        for p in (adapter.up, adapter.down):
            p.add_(torch.randn_like(p) * moved)
        adapter.magnitude.normal_()
        v, size = directions(adapter, w)
        gain, adapted = adapter.gain(w), adapter.weight(w)
    wanted = v.norm(dim=-1, keepdim=True)
    square = (adapter.magnitude / gain).square()
    assert ((square - wanted.square()).abs() <= 1e-14 * size).all()
    torch.testing.assert_close(adapted, v * gain, rtol=1e-12, atol=0)
    if moved <= 1 and abs(alpha) < 1 and init == "default":
        torch.testing.assert_close(adapted.norm(dim=-1, keepdim=True), adapter.magnitude.abs(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_cancellation(dtype):
    """Where the product takes away nearly all of the weight, the gain is finite, and not above 1 / eps."""
    torch.manual_seed(0)
    layer = nn.Linear(6, 4).to(dtype)
    model, adapter = adapter_on(layer, DoRA(rank=4, alpha=4.0))
    u, s, vh = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
    for off in (0.0, 1e-12, 1e-7, 1e-4):
        with torch.no_grad():
            adapter.up.copy_(-u * s * (1 - off))
            adapter.down.copy_(vh)
            gain = adapter.gain(layer.weight)
            y = model(torch.randn(3, 6, dtype=dtype))
        assert gain.isfinite().all()
        assert (gain.abs() <= 1.01 / torch.finfo(dtype).eps).all()
        assert y.isfinite().all()


def layers():
    return {
        "linear": (nn.Linear(6, 5), torch.randn(4, 6)),
        "linear, no bias": (nn.Linear(6, 5, bias=False), torch.randn(2, 4, 6)),
        "conv1d, groups": (nn.Conv1d(4, 6, 3, groups=2), torch.randn(2, 4, 7)),
        "conv2d": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), torch.randn(2, 4, 5, 5)),
        "conv3d, no bias": (nn.Conv3d(2, 4, 2, stride=2, bias=False), torch.randn(2, 2, 4, 4, 4)),
        "transposed conv2d": (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), torch.randn(2, 4, 3, 3)),
        "embedding": (nn.Embedding(7, 6), torch.randint(7, (3, 4))),
        "embedding bag": (nn.EmbeddingBag(7, 6), torch.randint(7, (3, 4))),
    }


@pytest.mark.parametrize("init", ["default", "pissa"])
@pytest.mark.parametrize("name", layers())
def test_fast_path(name, init):
    """The fast path is taken, and is the weight form: output and gradients, bias and all."""
    torch.manual_seed(0)
    layer, x = layers()[name]
    layer, x = layer.double(), x.double() if x.is_floating_point() else x
    base = copy.deepcopy(layer).requires_grad_(False)
    model, adapter = adapter_on(layer, DoRA(rank=2, init=init))
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    assert layer.__dict__["_peftkit_running"].fused == "weight"
    kind = peftkit.plan(nn.Sequential(base), DoRA(rank=2), targets="0").steps[0][0].kind

    def by_definition():
        w = kind.matrix(base, "weight", base.weight)
        return torch.func.functional_call(base, {"weight": kind.restore(base, "weight", adapter.weight(w))}, (x,))

    y, wanted = model(x), by_definition()
    torch.testing.assert_close(y, wanted, rtol=1e-11, atol=1e-11)
    ours, theirs = (torch.autograd.grad(each.square().sum(), list(adapter.parameters())) for each in (y, wanted))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_no_gradient_through_the_norm():
    """Gradients are those of the formula with the norm held constant, and not those of the whole formula."""
    torch.manual_seed(0)
    base = nn.Linear(6, 5).double()
    model, adapter = adapter_on(copy.deepcopy(base), DoRA(rank=2, alpha=3.0))
    x = torch.randn(4, 6).double()
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn_like(p))
    given = [adapter.up, adapter.down, adapter.magnitude]

    def formula(up, down, magnitude, *, constant):
        v = base.weight.detach() + 1.5 * up @ down
        norm = v.norm(dim=-1, keepdim=True)
        return F.linear(x, magnitude * v / (norm.detach() if constant else norm), base.bias)

    ours = torch.autograd.grad(model(x).square().sum(), given)
    wanted, whole = (
        torch.autograd.grad(formula(*given, constant=constant).square().sum(), given) for constant in (True, False)
    )
    for a, b in zip(ours, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    assert not torch.allclose(ours[0], whole[0], rtol=1e-2)
    torch.testing.assert_close(ours[2], whole[2], rtol=1e-11, atol=1e-11)


# ------------------------------------------------------------------------------------------------------ the start


class Mixed(nn.Module):
    """Layers with a fast path, and with `lstm` one without it."""

    def __init__(self, *, lstm):
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.conv = nn.Conv1d(8, 6, 3)
        self.lstm = nn.LSTM(6, 6, batch_first=True) if lstm else None
        self.linear = nn.Linear(6, 4)

    def forward(self, tokens):
        x = self.conv(self.embed(tokens).mT).mT
        return self.linear(x.tanh() if self.lstm is None else self.lstm(x)[0])


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_identity(dtype, init, autocast):
    """A new adapter changes no bit, in any dtype, with any init, with and without autocast, in training too."""
    torch.manual_seed(0)
    tokens = torch.randint(9, (3, 6))
    for lstm in (False, True):
        base = Mixed(lstm=lstm).to(dtype).requires_grad_(False)
        model = peftkit.wrap(copy.deepcopy(base), DoRA(rank=2, init=init), targets="*")
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            assert lstm or torch.equal(model(tokens), base(tokens))  # torch's LSTM has other bits where weights train
            with torch.no_grad():
                assert torch.equal(model(tokens), base(tokens))
                assert torch.equal(peftkit.merge(model)(tokens), base(tokens))


def test_magnitudes_start_as_the_lengths_of_the_rows():
    """So an adapter says at a glance how far training has stretched each row."""
    layer = nn.Conv2d(4, 6, 3)
    _, adapter = adapter_on(layer, DoRA(rank=2, init="olora"))
    torch.testing.assert_close(adapter.magnitude.flatten(), layer.weight.detach().flatten(1).norm(dim=1))


def test_zero_rows_are_refused():
    """Rows of zeros have no direction: the error says how many, where, and what to do; the model is left alone."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 5))
    nn.init.zeros_(model[1].weight[1:3])
    with pytest.raises(peftkit.errors.UnsupportedLayerError, match=r"2 rows of 1\.weight are zero.*give it lora"):
        peftkit.wrap(model, DoRA(rank=2), targets="*")
    assert not any("adapters" in name for name, _ in model.named_modules())
    peftkit.wrap(model, {"0": DoRA(rank=2), "1": "lora"})


def test_a_short_row_is_no_zero_row():
    """A row of very small numbers has a direction all the same."""
    layer = nn.Linear(4, 3)
    with torch.no_grad():
        layer.weight[0] = 1e-15
    base = copy.deepcopy(layer)
    model, _ = adapter_on(layer, DoRA(rank=2))
    x = torch.randn(2, 4)
    assert torch.equal(model(x), base(x))


def test_half_precision_base():
    """On a bfloat16 base the adapter is float32, and what it makes is the float32 result rounded."""
    torch.manual_seed(0)
    layer = nn.Linear(16, 8).bfloat16()
    exact = copy.deepcopy(layer).float()
    model, adapter = adapter_on(layer, DoRA(rank=2))
    other, twin = adapter_on(exact, DoRA(rank=2))
    with torch.no_grad():
        for p in adapter.parameters():
            assert p.dtype == torch.float32
            p.add_(torch.randn_like(p) * 0.1)
    twin.load_state_dict(adapter.state_dict())
    x = torch.randn(5, 16).bfloat16()
    y, wanted = model(x), other(x.float())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), wanted, rtol=0, atol=2e-2 * wanted.abs().max().item())
    y.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in adapter.parameters())


@pytest.mark.parametrize("change", ["nothing", "in place", "other data", "another dtype", "another tensor"])
def test_the_length_of_the_base_is_remembered_for_that_base_only(monkeypatch, change):
    """What it is made of is looked at once; whatever becomes of the weight, the output is that of the definition."""
    torch.manual_seed(0)
    layer = nn.Linear(6, 5)
    model, adapter = adapter_on(layer, DoRA(rank=2))
    nn.init.normal_(adapter.up)
    model(torch.randn(3, 6))
    looked = []
    square = dora._square
    monkeypatch.setattr(dora, "_square", lambda w: looked.append(1) or square(w))
    with torch.no_grad():
        if change == "in place":
            layer.weight.mul_(3)
        elif change == "other data":
            layer.weight.data = layer.weight * 2
        elif change == "another dtype":
            model.double()
        elif change == "another tensor":
            layer._parameters["weight"] = nn.Parameter(layer.weight * 2, requires_grad=False)
        x = torch.randn(3, 6, dtype=layer.weight.dtype)
        y = model(x)
        torch.testing.assert_close(y, F.linear(x, adapter.weight(layer.weight.clone()), layer.bias))
        assert torch.equal(model(x), y)
    # once more for the clone, which is nobody's weight, and so once more for the weight after it
    assert len(looked) == (2 if change == "nothing" else 3)


def test_what_is_remembered_keeps_nothing_alive():
    """It goes with the adapter, holds no weight, and is neither copied nor pickled."""
    layer = nn.Linear(6, 5)
    model, adapter = adapter_on(layer, DoRA(rank=2))
    weight = weakref.ref(layer._parameters["weight"])
    assert adapter in dora._squares
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert twin[0].adapters["default"]["weight"] not in dora._squares
    before = len(dora._squares)
    layer._parameters["weight"] = None
    assert weight() is None
    del model, layer, adapter
    gc.collect()
    assert len(dora._squares) < before


def test_it_keeps_one_tensor_of_the_size_of_the_output():
    """Beside what LoRA keeps for backward, that is the output, the lengths' quotient and nothing else."""
    kept = {}
    x = torch.randn(32, 16, requires_grad=True)
    for method in (peftkit.LoRA(rank=2), DoRA(rank=2)):
        model, _ = adapter_on(nn.Linear(16, 24, bias=False), method)
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        storages = {}

        def pack(t, own=own, storages=storages):
            if t.untyped_storage().data_ptr() not in own:
                storages[t.untyped_storage().data_ptr()] = t
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = model(x)
        kept[method.name] = sum(t.untyped_storage().nbytes() for t in storages.values())
        if method.name == "dora":
            assert y.data_ptr() in {t.data_ptr() for t in storages.values()}
    assert kept["lora"] == 4 * (32 * 16 + 32 * 2)
    assert kept["dora"] == kept["lora"] + 4 * 32 * 24 + 2 * 4 * 24  # the norm, and the gain made of it


def test_merging_drifts_by_nothing():
    """However often it is merged and unmerged, the base is bit for bit what it was."""
    torch.manual_seed(0)
    layer = nn.Linear(6, 5)
    before = layer.weight.detach().clone()
    model, adapter = adapter_on(layer, DoRA(rank=2))
    nn.init.normal_(adapter.up)
    for _ in range(20):
        peftkit.unmerge(peftkit.merge(model))
    assert torch.equal(layer._parameters["weight"], before)


# -------------------------------------------------------------------------------------------------------- HF PEFT


def conv1d_of_transformers():
    return pytest.importorskip("transformers.pytorch_utils").Conv1D(5, 6)


HF = {
    "linear": (lambda: nn.Linear(6, 5), lambda: torch.randn(4, 6)),
    "linear, no bias": (lambda: nn.Linear(6, 5, bias=False), lambda: torch.randn(2, 4, 6)),
    "Conv1D": (conv1d_of_transformers, lambda: torch.randn(4, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), lambda: torch.randn(2, 4, 7)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), lambda: torch.randn(2, 4, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 2, bias=False), lambda: torch.randn(2, 2, 3, 3, 3)),
    "embedding": (lambda: nn.Embedding(7, 6), lambda: torch.randint(7, (3, 4))),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("method", [DoRA(rank=2), DoRA(rank=3, alpha=5.0, rank_stabilized=True)], ids=str)
@pytest.mark.parametrize("layer", HF)
def test_hf(layer, method, dtype):
    """With HF PEFT's tensors it has HF PEFT's output, gradients and merged weight."""
    pytest.importorskip("peft")
    make, example = HF[layer]
    torch.manual_seed(1)
    compare_with_hf(method, lambda: nn.Sequential(make()), example(), targets="0", dtype=dtype, parts=PARTS)


@pytest.mark.parametrize(
    "field, value",
    [
        ("rank", 0),
        ("rank", 2.0),
        ("alpha", 0),
        ("alpha", math.nan),
        ("dropout", 1.0),
        ("dropout", -0.1),
        ("init", "zeros"),
        ("rank_stabilized", 1),
    ],
)
def test_fields(field, value):
    """A wrong value is refused by name."""
    with pytest.raises(peftkit.errors.FieldError, match=f"dora: {field} must be"):
        DoRA(**{field: value})


def test_docstrings():
    """The examples in the docstrings are true."""
    found = doctest.testmod(sys.modules[DoRA.__module__])
    assert found.attempted > 0
    assert found.failed == 0
