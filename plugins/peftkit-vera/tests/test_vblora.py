"""VB-LoRA: the kit, HF PEFT's numbers, and one bank of vectors for all sites."""

import doctest
import math
import sys

import pytest
import torch
from safetensors import safe_open
from torch import nn

import peftkit
from peftkit.testing import CASES, parametrize_with_checks
from peftkit.testing.parity import compare_with_hf
from peftkit_vera.vblora import VBLoRA

SMALL = VBLoRA(length=2, vectors_in_bank=10, rank=3)
PLAIN = [
    "Linear",
    "Conv1D",
    "Bilinear",
    "Conv1d",
    "Conv2d",
    "ConvTranspose1d",
    "Embedding",
    "EmbeddingBag",
    "MultiheadAttention",
    "LSTM",
    "GRUCell",
]
PLAIN += ["TransformerEncoderLayer", "Parameter", "shared module", "tied weights", "language model"]


@parametrize_with_checks(
    [VBLoRA(length=1, vectors_in_bank=8, rank=2)], cases=[case for case in CASES if case.name in PLAIN]
)
def test_kit(check):
    """It keeps what peftkit promises of every method; VeRA, made in the same way, is tried on every last layer kind."""
    check()


# -------------------------------------------------------------------------------------------------------- HF PEFT


def conv1d_of_transformers():
    return pytest.importorskip("transformers.pytorch_utils").Conv1D(4, 6)


HF = {
    "linear": (lambda: nn.Sequential(nn.Linear(6, 4)), (4, 6)),
    "linear, no bias": (lambda: nn.Sequential(nn.Linear(6, 4, bias=False)), (2, 4, 6)),
    "Conv1D": (lambda: nn.Sequential(conv1d_of_transformers()), (4, 6)),
    "sizes": (lambda: nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 2), nn.Linear(2, 4)), (4, 6)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("top", [1, 3, 10])
@pytest.mark.parametrize("model", HF)
def test_hf(model, top, dtype):
    """With HF PEFT's bank and logits it has HF PEFT's output, gradients and merged weight."""
    pytest.importorskip("peft")
    build, shape = HF[model]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    method = VBLoRA(rank=3, length=2, vectors_in_bank=10, top=top)
    compare_with_hf(method, build, x, targets="*", dtype=dtype)


# --------------------------------------------------------------------------------------------------- what is shared


class Sizes(nn.Module):
    """Sites of many sizes, all of them even."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.conv = nn.Conv1d(8, 6, 3)
        self.lstm = nn.LSTM(6, 4, batch_first=True)
        self.linear = nn.Linear(4, 2)

    def forward(self, tokens):
        return self.linear(self.lstm(self.conv(self.embed(tokens).mT).mT)[0])


TOKENS = torch.arange(12).reshape(2, 6) % 9
SHAPES = {"embed": (8, 10), "conv": (6, 24), "lstm.ih": (16, 6), "lstm.hh": (16, 4), "linear": (2, 4)}


def wrapped(method=SMALL, *, name="default", model=None, seed=0):
    """The model of many sizes with an adapter whose every trained number is random."""
    torch.manual_seed(5)
    model = model or Sizes()
    torch.manual_seed(seed)
    peftkit.wrap(model, method, targets="*", name=name)
    with torch.no_grad():
        for path, p in model.named_parameters():
            if p.requires_grad and f"adapters.{name}." in path:
                p.normal_()
    return model


def banks(model, name="default"):
    """The module with the bank, once for each adapter of one name."""
    adapters = [
        module
        for path, module in model.named_modules()
        if isinstance(module, peftkit.Adapter) and f"adapters.{name}." in path
    ]
    return [adapter.vectors.state for adapter in adapters]


def test_the_bank_is_held_once():
    """All sites draw from the very same bank, and it trains from each of them."""
    model = wrapped()
    states = banks(model)
    assert len(states) == 5
    assert len({id(state) for state in states}) == 1
    model(TOKENS).square().sum().backward()
    whole = states[0].bank.grad.clone()
    assert whole.any()
    assert [id(p) for p in model.parameters() if p.requires_grad].count(id(states[0].bank)) == 1
    parts = torch.zeros_like(whole)
    for path in ("embed", "conv", "lstm", "linear"):  # the sum of what arrives through one layer at a time
        parts += through(model, path)
    torch.testing.assert_close(parts, whole)


def through(model, path):
    """The gradient of the bank through the layers below `path` alone; the others get a bank of the same numbers."""
    bank = banks(model)[0].bank
    own = bank.detach().clone().requires_grad_()
    adapters = [m for m in model.get_submodule(path).modules() if isinstance(m, peftkit.Adapter)]
    handles = [adapter.vectors for adapter in adapters]
    stand_in = nn.Module()
    stand_in.bank = own
    for adapter in adapters:
        adapter.vectors = peftkit.Shared(stand_in)
    (gradient,) = torch.autograd.grad(model(TOKENS).square().sum(), own)
    for adapter, handle in zip(adapters, handles, strict=True):
        adapter.vectors = handle
    return gradient


def test_the_bank_is_saved_once(tmp_path):
    """The file has one bank, and logits for each piece: its tensors are that many numbers, and no more."""
    model = wrapped()
    peftkit.save(model, tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 - no mapping
    assert sorted(map(len, shapes.values())) == [2] + [3] * 10
    pieces = sum(3 * (out // 2 + width // 2) for out, width in SHAPES.values())
    assert sum(map(math.prod, shapes.values())) == 10 * 2 + 10 * pieces
    assert peftkit.summary(model).trainable == 10 * 2 + 10 * pieces
    assert peftkit.summary(model).adapters[0].bytes == 4 * (10 * 2 + 10 * pieces)


def test_a_file_fits_another_model(tmp_path):
    """Loaded onto a copy of the base made elsewhere, it computes the same bits."""
    model = wrapped()
    peftkit.save(model, tmp_path / "a.safetensors")
    torch.manual_seed(5)
    other = Sizes()
    torch.manual_seed(1234)
    peftkit.load(other, tmp_path / "a.safetensors", methods=[VBLoRA])
    with torch.no_grad():
        assert torch.equal(other(TOKENS), model(TOKENS))


@pytest.mark.parametrize("other", [0, 1])
def test_seeds(other):
    """One seed gives one bank and its logits, another seed others."""
    states = []
    for seed in (0, other):
        torch.manual_seed(seed)
        states.append(peftkit.state_dict(peftkit.wrap(Sizes(), SMALL, targets="*")))
    assert {torch.equal(t, states[1][name]) for name, t in states[0].items()} == {other == 0}


def test_several_adapters():
    """Each adapter has a bank of its own; one alone computes what it did before the other came."""
    model = wrapped(name="a")
    with torch.no_grad():
        alone = model(TOKENS)
        wrapped(VBLoRA(rank=1, length=1, vectors_in_bank=4), name="b", model=model, seed=1)
        assert banks(model, "a")[0] is not banks(model, "b")[0]
        with peftkit.using(model, "a"):
            assert torch.equal(model(TOKENS), alone)
        with peftkit.using(model, "a", "b"):
            assert not torch.allclose(model(TOKENS), alone)


def test_merging_drifts_by_nothing():
    """However often it is merged and unmerged, no bit of the base changes."""
    torch.manual_seed(5)
    before = {name: p.detach().clone() for name, p in Sizes().named_parameters()}
    model = wrapped()
    for _ in range(20):
        peftkit.unmerge(peftkit.merge(model))
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], p) for name, p in before.items())


def test_gradients_of_the_factors():
    """Both factors are differentiable in the logits and in the bank, for one matrix and for a stack of them."""
    for shape in ((4, 6), (2, 4, 6)):
        torch.manual_seed(0)
        holder = nn.Module()
        holder.weight = nn.Parameter(torch.randn(shape, dtype=torch.float64))
        peftkit.wrap(nn.ModuleDict({"stack": holder}), SMALL, targets="stack.weight")
        adapter = holder.adapters["default"]["weight"]
        state = adapter.vectors.state
        inputs = [torch.randn_like(p, requires_grad=True) for p in (adapter.up, adapter.down, state.bank)]

        def product(up, down, bank, adapter=adapter):
            stand_in = nn.Module()
            stand_in.bank = bank
            adapter.vectors = peftkit.Shared(stand_in)
            up, down, scale = torch.func.functional_call(adapter, {"up": up, "down": down}, ("factors",))
            return scale * up @ down

        assert torch.autograd.gradcheck(product, inputs)


def test_pieces_are_mixtures_of_the_bank():
    """Each piece of a column of `up`, and of a row of `down`, is the softmax mixture of its largest logits' vectors."""
    model = wrapped()
    adapter = model.linear.adapters["default"]["weight"]  # [2, 4]: one piece a column of `up`, two a row of `down`
    bank = adapter.vectors.state.bank.detach()
    up, down, scale = (t.detach() if isinstance(t, torch.Tensor) else t for t in adapter.factors())
    assert scale == 1.0
    for r in range(3):
        torch.testing.assert_close(up[:, r], mixture(adapter.up[0, r], bank))
        for piece in range(2):
            torch.testing.assert_close(down[r, 2 * piece : 2 * piece + 2], mixture(adapter.down[r, piece], bank))


def mixture(logits, bank):
    first, second = sorted(range(10), key=lambda i: -logits[i].item())[:2]
    share = torch.sigmoid(logits[first] - logits[second]).detach()
    return share * bank[first] + (1 - share) * bank[second]


def test_it_does_not_start_as_the_identity():
    """As published, and as it declares, a new adapter changes the output: a little, with small vectors."""
    assert VBLoRA.identity is False
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 8)).requires_grad_(False)
    x = torch.randn(4, 8)
    before = base(x)
    after = peftkit.wrap(base, VBLoRA(rank=2, length=4, vectors_in_bank=8))(x)
    assert 0 < (after - before).abs().max() < 0.02**2 * 2 * 8 * x.abs().max()


def planned(*args, **kwargs):
    return peftkit.plan(*args, **kwargs).trainable


@pytest.mark.parametrize("call", [planned, peftkit.wrap])
def test_a_length_that_does_not_divide_is_refused(call):
    """The error names the layer and its sizes, and a length that divides all sizes; with that length it works."""
    model = nn.Sequential(nn.Linear(12, 24), nn.Linear(24, 18), nn.Linear(18, 12))
    with pytest.raises(peftkit.errors.UnsupportedLayerError, match=r"length=4 .*18 outputs .* 1\.weight; take 6"):
        call(model, VBLoRA(length=4), targets="*")
    assert not any("adapters" in name for name, _ in model.named_modules())
    call(model, VBLoRA(length=6), targets="*")


@pytest.mark.parametrize(
    "field, value",
    [
        ("rank", 0),
        ("vectors_in_bank", 0),
        ("length", 1.0),
        ("top", 0),
        ("top", 257),
        ("dropout", 1),
        ("bank_bound", 0),
        ("bank_bound", math.nan),
        ("logits_std", -1.0),
        ("logits_std", True),
    ],
)
def test_fields(field, value):
    """A wrong value is refused by name."""
    with pytest.raises(peftkit.errors.FieldError, match=f"vblora: {field} must be"):
        VBLoRA(**{field: value})


def test_docstrings():
    """The examples in the docstrings are true."""
    found = doctest.testmod(sys.modules[VBLoRA.__module__])
    assert found.attempted > 0
    assert found.failed == 0
