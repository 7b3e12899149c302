"""VeRA: the kit, HF PEFT's numbers, and two matrices for all sites that exist once."""

import copy
import doctest
import math
import sys

import pytest
import torch
from safetensors import safe_open
from torch import nn

import peftkit
from peftkit.testing import parametrize_with_checks
from peftkit.testing.parity import compare_with_hf
from peftkit_vera.vera import VeRA


@parametrize_with_checks([VeRA(rank=4)])
def test_kit(check):
    """It keeps what peftkit promises of every method, on every layer kind."""
    check()


# -------------------------------------------------------------------------------------------------------- HF PEFT


def conv1d_of_transformers():
    return pytest.importorskip("transformers.pytorch_utils").Conv1D(5, 6)


HF = {
    "linear": (lambda: nn.Sequential(nn.Linear(6, 5)), (4, 6)),
    "linear, no bias": (lambda: nn.Sequential(nn.Linear(6, 5, bias=False)), (2, 4, 6)),
    "Conv1D": (lambda: nn.Sequential(conv1d_of_transformers()), (4, 6)),
    "sizes": (lambda: nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 2), nn.Linear(2, 4)), (4, 6)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("rank", [1, 7])
@pytest.mark.parametrize("model", HF)
def test_hf(model, rank, dtype):
    """With HF PEFT's matrices and vectors it has HF PEFT's output, gradients and merged weight, sizes of all sorts."""
    pytest.importorskip("peft")
    build, shape = HF[model]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    compare_with_hf(VeRA(rank=rank, start=0.5), build, x, targets="*", dtype=dtype)


def test_matrices_are_drawn_as_hf_draws_them():
    """A and B are uniform within the bounds of a He initialisation, and the vectors start as published."""
    model = Sizes()
    torch.manual_seed(0)
    peftkit.wrap(model, VeRA(rank=300, start=0.2), targets="*")
    state = peftkit.state_dict(model)
    for name, columns in (("A", 24), ("B", 300)):
        (tensor,) = (t for key, t in state.items() if key.startswith("shared-") and key.endswith(f".{name}"))
        bound = math.sqrt(6 / columns)
        assert 0.99 * bound < tensor.abs().max() <= bound
        assert abs(tensor.std() - bound / math.sqrt(3)) < 0.02 * bound
    assert all((t == 0).all() for key, t in state.items() if key.endswith(".b"))
    assert all((t == 0.2).all() for key, t in state.items() if key.endswith(".d"))


def test_it_keeps_no_input():
    """For backward a linear layer keeps `up`, what `A` makes of the input, and the small vectors: nothing as wide as it."""
    torch.manual_seed(0)
    model = peftkit.wrap(nn.Sequential(nn.Linear(16, 24)), VeRA(rank=4), targets="*")
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(torch.randn(32, 16, requires_grad=True))
    assert sum(t.untyped_storage().nbytes() for t in kept.values()) == 4 * (24 * 4 + 32 * 4)


# --------------------------------------------------------------------------------------------------- what is shared


class Sizes(nn.Module):
    """Sites of many sizes: the widest input is the convolution's 24, the most outputs are the recurrent layer's 20."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(8, 6, 3)
        self.lstm = nn.LSTM(6, 5, batch_first=True)
        self.embed = nn.Embedding(9, 8)
        self.linear = nn.Linear(5, 3)

    def forward(self, tokens):
        return self.linear(self.lstm(self.conv(self.embed(tokens).mT).mT)[0])


TOKENS = torch.arange(12).reshape(2, 6) % 9


def wrapped(method=None, *, name="default", model=None, seed=0):
    """The model of many sizes with an adapter whose every trained number is random."""
    torch.manual_seed(5)
    model = model or Sizes()
    torch.manual_seed(seed)
    peftkit.wrap(model, method or VeRA(rank=4), targets="*", name=name)
    with torch.no_grad():
        for path, p in model.named_parameters():
            if p.requires_grad and f"adapters.{name}." in path:
                p.normal_()
    return model


def projections(model, name="default"):
    """The modules that the adapters of one name compute with."""
    adapters = [
        module
        for path, module in model.named_modules()
        if isinstance(module, peftkit.Adapter) and f"adapters.{name}." in path
    ]
    return [adapter.projections.state for adapter in adapters]


def test_matrices_are_held_once():
    """All sites compute with the very same two matrices, as large as the widest of them needs."""
    states = projections(wrapped())
    assert len(states) == 5
    assert len({id(state) for state in states}) == 1
    assert states[0].A.shape == (4, 24)
    assert states[0].B.shape == (20, 4)


def test_matrices_are_saved_once(tmp_path):
    """The file has two matrices, and two vectors a site: its tensors are that many numbers, and no more."""
    model = wrapped(VeRA(rank=64))
    peftkit.save(model, tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 - no mapping
    outputs = [6, 20, 20, 8, 3]
    assert sorted(map(len, shapes.values())) == [1] * 10 + [2, 2]
    numbers = 64 * 24 + 20 * 64 + 64 * 5 + sum(outputs)
    assert sum(map(math.prod, shapes.values())) == numbers
    assert peftkit.summary(model).adapters[0].bytes == 4 * numbers
    assert peftkit.summary(model).trainable == 64 * 5 + sum(outputs)


def test_a_file_fits_another_model(tmp_path):
    """Loaded onto a copy of the base made elsewhere, it computes the same bits: nothing is drawn again."""
    model = wrapped()
    peftkit.save(model, tmp_path / "a.safetensors")
    torch.manual_seed(5)
    other = Sizes()
    torch.manual_seed(1234)
    peftkit.load(other, tmp_path / "a.safetensors", methods=[VeRA])
    with torch.no_grad():
        assert torch.equal(other(TOKENS), model(TOKENS))


@pytest.mark.parametrize("other", [0, 1])
def test_seeds(other):
    """One seed gives one pair of matrices, another seed another."""
    (a, *_), (b, *_) = projections(wrapped(seed=0)), projections(wrapped(seed=other))
    assert torch.equal(a.A, b.A) == torch.equal(a.B, b.B) == (other == 0)


def test_several_adapters():
    """Each adapter has matrices of its own; one alone computes what it did before the other came."""
    model = wrapped(name="a")
    with torch.no_grad():
        alone, bare = model(TOKENS), Sizes.forward(wrapped_base(), TOKENS)
        wrapped(VeRA(rank=9), name="b", model=model, seed=1)
        assert projections(model, "a")[0] is not projections(model, "b")[0]
        with peftkit.using(model, "a"):
            assert torch.equal(model(TOKENS), alone)
        with peftkit.using(model, "a", "b"):
            assert not torch.allclose(model(TOKENS), alone)
        peftkit.unwrap(model, "b")
        peftkit.activate(model, "a")
        assert torch.equal(model(TOKENS), alone)
        peftkit.unwrap(model)
        assert torch.equal(model(TOKENS), bare)


def wrapped_base():
    """The model that `wrapped` starts from."""
    torch.manual_seed(5)
    return Sizes().requires_grad_(False)


def test_merging_drifts_by_nothing():
    """However often it is merged and unmerged, no bit of the base changes."""
    model = wrapped()
    before = {name: p.detach().clone() for name, p in wrapped_base().named_parameters()}
    for _ in range(20):
        peftkit.unmerge(peftkit.merge(model))
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], p) for name, p in before.items())


def test_matrices_stay_as_drawn():
    """Only the vectors train: an optimizer with weight decay leaves both matrices as they are."""
    model = wrapped()
    state = projections(model)[0]
    before = copy.deepcopy(state.state_dict())
    optimizer = torch.optim.AdamW(peftkit.param_groups(model, lr=0.1), weight_decay=0.5)
    model(TOKENS).square().sum().backward()
    optimizer.step()
    assert all(torch.equal(t, before[name]) for name, t in state.state_dict().items())


def test_gradients_of_the_factors():
    """Both factors are differentiable in both vectors, for one matrix and for a stack of them."""
    for shape in ((5, 6), (2, 5, 6)):
        holder = nn.Module()
        holder.weight = nn.Parameter(torch.randn(shape, dtype=torch.float64))
        model = nn.ModuleDict({"stack": holder})
        peftkit.wrap(model, VeRA(rank=3), targets="stack.weight")
        adapter = holder.adapters["default"]["weight"]
        inputs = [torch.randn_like(p, requires_grad=True) for p in (adapter.b, adapter.d)]

        def product(b, d, adapter=adapter):
            up, down, scale = torch.func.functional_call(adapter, {"b": b, "d": d}, ("factors",))
            return scale * up @ down

        assert torch.autograd.gradcheck(product, inputs)


def test_factors_are_those_of_the_paper():
    """The update is diag(b) B diag(d) A, with the parts of A and B that fit."""
    model = wrapped()
    adapter = model.linear.adapters["default"]["weight"]
    state = adapter.projections.state
    with torch.no_grad():
        wanted = torch.diag(adapter.b) @ state.B[:3] @ torch.diag(adapter.d) @ state.A[:, :5]
        torch.testing.assert_close(adapter.weight(torch.zeros(3, 5)), wanted)


def test_half_precision_follows_the_site():
    """On a bfloat16 base vectors and matrices are float32; on float64 they are float64."""
    for dtype, wanted in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        model = peftkit.wrap(Sizes().to(dtype), VeRA(rank=4), targets="*")
        assert {t.dtype for t in peftkit.state_dict(model).values()} == {wanted}
        assert model(TOKENS).dtype == dtype


@pytest.mark.parametrize(
    "field, value",
    [
        ("rank", 0),
        ("rank", 2.0),
        ("rank", True),
        ("start", 0),
        ("start", math.inf),
        ("start", "1"),
        ("dropout", 1.0),
        ("dropout", -0.1),
    ],
)
def test_fields(field, value):
    """A wrong value is refused by name."""
    with pytest.raises(peftkit.errors.FieldError, match=f"vera: {field} must be"):
        VeRA(**{field: value})


def test_docstrings():
    """The examples in the docstrings are true."""
    found = doctest.testmod(sys.modules[VeRA.__module__])
    assert found.attempted > 0
    assert found.failed == 0
