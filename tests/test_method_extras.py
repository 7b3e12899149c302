"""What a method may declare beyond an adapter a site: shared state, optimizer steps, a start from data, a row gain."""

import copy
import pickle
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

import peftkit
from peftkit.errors import FieldError, FormatError, MethodError, UnsupportedLayerError


@dataclass(frozen=True)
class Bank(peftkit.Method):
    """Adds to each weight a learned mixture of the columns of one bank; counts the optimizer's steps."""

    name: ClassVar[str] = "extras-bank"

    size: int = 3

    def shared(self, sites):
        return BankState(self, sites)

    def adapter(self, site, shared=None):
        return BankAdapter(site, self, shared)

    def after_step(self, adapters, shared):
        shared.steps += 1
        shared.seen.fill_(len(adapters))


class BankState(nn.Module):
    def __init__(self, method, sites):
        super().__init__()
        self.columns = sites[0].parameter(torch.randn(max(site.fan_out for site in sites), method.size))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))


class BankAdapter(peftkit.LowRank):
    def __init__(self, site, method, shared):
        super().__init__(site)
        self.bank = shared
        self.rows = site.fan_out
        self.down = site.parameter(torch.zeros(method.size, site.fan_in))

    def factors(self):
        return self.bank.state.columns[: self.rows], self.down, 1.0


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 2))

    def forward(self, x):
        return self.layers(x)


def base():
    torch.manual_seed(0)
    return Net()


def trained(model, x, steps=3):
    optimizer = torch.optim.SGD(peftkit.param_groups(model, lr=0.3))
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    return model


@pytest.fixture
def x():
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(1))


def test_shared_state_is_held_once_and_trains(x):
    """One bank for both sites: one parameter of the model, one row of the plan, one entry of the state."""
    plan = peftkit.plan(base(), Bank())
    assert [(row.weight, row.parameters) for row in plan.rows] == [("(shared)", 24), ("weight", 18), ("weight", 24)]
    assert "(shared)" in str(plan)

    model = peftkit.wrap(base(), Bank())
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert names.count("adapters.default.shared-0.columns") == 1
    assert len(names) == 3
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == plan.trainable
    assert sorted(peftkit.state_dict(model)) == [
        "layers.0.weight.down", "layers.2.weight.down", "shared-0.columns", "shared-0.seen", "shared-0.steps",
    ]  # fmt: skip
    before = model.adapters["default"]["shared-0"].columns.detach().clone()
    trained(model, x)
    assert not torch.equal(model.adapters["default"]["shared-0"].columns, before)
    assert peftkit.verify(model, x).ok


@pytest.mark.parametrize("big", [False, True], ids=["small", "by a recipe"])
def test_shared_state_survives_every_operation(x, tmp_path, big, monkeypatch):
    """Files, copies, pickles, casts, merges, a second adapter and unwrap treat it as a part of the adapter."""
    if big:
        monkeypatch.setattr("peftkit.recipe.SMALLEST", 0)
    net = base()
    keys, values = list(net.state_dict()), {k: v.clone() for k, v in net.state_dict().items()}
    model = trained(peftkit.wrap(net, Bank()), x)
    y = model(x)

    peftkit.save(model, tmp_path / "a")
    loaded = peftkit.load(base(), tmp_path / "a", methods=[Bank])
    assert torch.equal(loaded(x), y)
    assert loaded.adapters["default"]["shared-0"].steps == 3
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), y)
        trained(twin, x)
        assert not torch.equal(twin(x), y)
        assert twin.adapters["default"]["shared-0"].steps == 6
    assert torch.equal(model(x), y)

    peftkit.wrap(model, Bank(size=2), name="b")
    assert torch.equal(model(x), y)
    with peftkit.using(model, "b"):
        assert torch.equal(model(x), base()(x))
    peftkit.unwrap(model, "b")
    torch.testing.assert_close(peftkit.merge(model)(x), y)
    assert torch.equal(peftkit.unmerge(model)(x), y)
    torch.testing.assert_close(copy.deepcopy(model).double()(x.double()), y.double(), atol=1e-6, rtol=1e-5)
    peftkit.unwrap(model)
    assert list(model.state_dict()) == keys
    assert all(torch.equal(v, values[k]) for k, v in model.state_dict().items())
    assert "_peftkit_running" not in model.__dict__


def test_two_methods_of_one_adapter_share_apart(x, tmp_path):
    """A state belongs to one method with its fields, numbered in the order of the first sites."""
    model = trained(peftkit.wrap(base(), {"layers.2": Bank(size=2), "layers.0": Bank(size=3)}), x)
    assert {k: tuple(v.shape) for k, v in peftkit.state_dict(model).items() if "columns" in k} == {
        "shared-0.columns": (8, 3), "shared-1.columns": (4, 2),
    }  # fmt: skip
    peftkit.save(model, tmp_path / "a")
    assert torch.equal(peftkit.load(base(), tmp_path / "a", methods=[Bank])(x), model(x))


def test_a_missing_or_foreign_shared_tensor_is_refused(x):
    """The state that sites share is loaded as strictly as the rest."""
    model = peftkit.wrap(base(), Bank())
    state = peftkit.state_dict(model)
    state["shared-1.columns"] = state.pop("shared-0.columns")
    with pytest.raises(FormatError, match=r"shared-0\.columns"):
        peftkit.load_state_dict(model, state)


def test_an_adapter_cannot_own_what_is_shared():
    """Registering the state itself would save it once a site; it is an error that says what to keep."""

    @dataclass(frozen=True)
    class Owns(Bank):
        name: ClassVar[str] = "extras-owns"

        def adapter(self, site, shared=None):
            adapter = BankAdapter(site, self, shared)
            adapter.bank = shared.state
            return adapter

    with pytest.raises(UnsupportedLayerError, match="keep the handle"):
        peftkit.wrap(base(), Owns())

    @dataclass(frozen=True)
    class Nonsense(Bank):
        name: ClassVar[str] = "extras-nonsense"

        def shared(self, sites):
            return 3

    model = base()
    with pytest.raises(FieldError, match=r"extras-nonsense\.shared\(\) must return an nn\.Module or None, got int"):
        peftkit.wrap(model, Nonsense())
    assert [type(m) for m in model.modules()] == [type(m) for m in base().modules()]


def test_a_container_is_given_no_new_member(x, tmp_path):
    """A model that is an `nn.Sequential` keeps its length and its last layer: the first site holds what is shared."""
    torch.manual_seed(0)
    model = trained(peftkit.wrap(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 2), nn.Linear(2, 2)), Bank()), x / 9)
    assert (len(model), model[-1].in_features) == (3, 2)
    assert "0.shared-0.columns" in peftkit.state_dict(model)
    peftkit.save(model, tmp_path / "a")
    twin = peftkit.unwrap(copy.deepcopy(model))
    assert torch.equal(peftkit.load(twin, tmp_path / "a", methods=[Bank])(x), model(x))


def test_shared_state_on_the_meta_device():
    """A model without values is wrapped without computing any."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 2))
    peftkit.wrap(model, Bank())
    assert all(p.is_meta for p in model.parameters())


# -------------------------------------------------------------------------------------------------- steps


def test_a_step_is_seen_only_by_what_it_trains(x):
    """after_step follows each step of an optimizer that trains the adapter; not others', nor after unwrap."""
    model = peftkit.wrap(base(), Bank())
    state = model.adapters["default"]["shared-0"]
    stranger = nn.Linear(2, 2)
    other = torch.optim.SGD(stranger.parameters(), lr=0.1)
    stranger(torch.ones(2)).sum().backward()
    other.step()
    assert state.steps == 0

    trained(model, x, steps=2)
    assert (state.steps, state.seen) == (2, 2)
    peftkit.wrap(model, "lora", name="plain")
    peftkit.set_trainable(model, "plain")
    trained(model, x, steps=1)
    assert state.steps == 2
    peftkit.set_trainable(model, "default")
    optimizer = torch.optim.SGD(peftkit.param_groups(model, lr=0.1))
    peftkit.unwrap(model, "default")
    optimizer.step()
    assert state.steps == 2


def test_a_loaded_or_copied_model_follows_steps_too(x, tmp_path):
    """Whatever way a model came about, nothing has to be called."""
    peftkit.save(peftkit.wrap(base(), Bank()), tmp_path / "a")
    model = peftkit.load(base(), tmp_path / "a", trainable=True, methods=[Bank])
    trained(model, x, steps=1)
    assert model.adapters["default"]["shared-0"].steps == 1


def test_a_skipped_step_is_no_step(x):
    """A gradient scaler that finds an infinite gradient makes no step, and so none is counted."""
    model = peftkit.wrap(base(), Bank())
    optimizer = torch.optim.SGD(peftkit.param_groups(model, lr=0.1))
    scaler = torch.amp.GradScaler("cpu")
    for scale in (float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale(model(x).sum() * scale).backward()
        scaler.step(optimizer)
        scaler.update()
    assert model.adapters["default"]["shared-0"].steps == 1


def test_a_regulariser_counts_once_a_step(x):
    """What before_step adds to the gradients is there for the step, once, over however many batches."""

    @dataclass(frozen=True)
    class Pulled(Bank):
        name: ClassVar[str] = "extras-pulled"

        def before_step(self, adapters, shared):
            assert not torch.is_grad_enabled()
            shared.columns.grad += 100.0

    def gradient(method, batches):
        torch.manual_seed(3)
        model = peftkit.wrap(base(), method)
        optimizer = torch.optim.SGD(peftkit.param_groups(model, lr=0.0))
        for _ in range(batches):
            model(x).sum().backward()
        optimizer.step()
        return model.adapters["default"]["shared-0"].columns.grad

    for batches in (1, 3):
        torch.testing.assert_close(gradient(Pulled(), batches), gradient(Bank(), batches) + 100.0)


# --------------------------------------------------------------------------------------------------- data


class Moments(peftkit.Observer):
    def __init__(self):
        self.total, self.n = 0.0, 0

    def inputs(self, x):
        self.total, self.n = self.total + x.double().mT @ x.double(), self.n + len(x)


@dataclass(frozen=True)
class FromInputs(peftkit.Method):
    """A low-rank start along the main directions of the inputs (the idea of EVA, arXiv:2410.07170)."""

    name: ClassVar[str] = "extras-inputs"

    rank: int = 2

    def observer(self, site):
        return Moments()

    def adapter(self, site, shared=None):
        down = torch.zeros(self.rank, site.fan_in)
        if site.observed is not None:
            _, vectors = torch.linalg.eigh(site.observed.total)
            down = vectors[:, -self.rank :].mT.float()
        return Factors(site, torch.zeros(site.fan_out, self.rank), down)


class Factors(peftkit.LowRank):
    def __init__(self, site, up, down):
        super().__init__(site)
        self.up, self.down = site.parameter(up), site.parameter(down)

    def factors(self):
        return self.up, self.down, 1.0


class Gradient(peftkit.Observer):
    def __init__(self):
        self.sum, self.n = 0.0, 0

    def gradient(self, g):
        self.sum, self.n = self.sum + g, self.n + 1


@dataclass(frozen=True)
class FromGradients(FromInputs):
    """A low-rank start along the gradient's main directions (the idea of LoRA-GA, arXiv:2407.05000)."""

    name: ClassVar[str] = "extras-gradients"

    def observer(self, site):
        return Gradient()

    def adapter(self, site, shared=None):
        down = torch.zeros(self.rank, site.fan_in)
        if site.observed is not None:
            down = torch.linalg.svd(site.observed.sum).Vh[: self.rank].contiguous()
        return Factors(site, torch.zeros(site.fan_out, self.rank), down)


def test_a_start_from_inputs(x):
    """The observer sees exactly what each matrix is applied to, over all batches; the model is left as it was."""
    net = base().train()
    state = {k: v.clone() for k, v in net.state_dict().items()}
    generator = torch.get_rng_state()
    model = peftkit.wrap(net, FromInputs(), targets="layers.2", data=[x[:2], (x[2:],)])

    hidden = torch.tanh(nn.functional.linear(x, state["layers.0.weight"], state["layers.0.bias"])).double()
    _, vectors = torch.linalg.eigh(hidden.mT @ hidden)
    found = model.layers[2].adapters["default"]["weight"].down.double()
    torch.testing.assert_close(found.mT @ found, vectors[:, -2:] @ vectors[:, -2:].mT, atol=1e-6, rtol=0)
    assert model.training
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in state.items())
    assert not any(m._forward_pre_hooks for m in model.modules())


CONVOLUTIONS = {
    "1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 9)),
    "2d, dilated": (lambda: nn.Conv2d(4, 6, (3, 2), padding="same", dilation=2), (2, 4, 7, 6)),
    "2d, groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=2, padding_mode="circular"), (2, 4, 6, 6)),
    "3d": (lambda: nn.Conv3d(2, 3, 2), (1, 2, 4, 4, 3)),
    "unbatched": (lambda: nn.Conv2d(4, 6, 3), (4, 7, 6)),
}


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_the_rows_of_a_convolution_are_what_its_matrix_is_applied_to(case):
    """Rows times the matrix is the layer's output, value for value."""
    build, shape = CONVOLUTIONS[case]
    layer = build().double()
    x = torch.randn(shape, dtype=torch.float64)
    kind, _ = peftkit.plugins.kind_of(type(layer))
    rows = kind.rows(layer, "weight", x)
    m = kind.matrix(layer, "weight", layer.weight.detach())
    y = layer(x)
    y = y if len(shape) == m.dim() + len(layer.kernel_size) else y.unsqueeze(0)
    own = m.reshape(layer.groups, -1, m.shape[1])  # [groups, out / groups, in]
    by_group = rows.reshape(len(y), layer.groups, -1, m.shape[1]) @ own.mT
    expected = by_group.mT.flatten(1, 2).reshape(y.shape) + layer.bias.reshape(-1, *(1 for _ in layer.kernel_size))
    torch.testing.assert_close(expected, y)


def test_a_start_from_gradients(x):
    """The observer gets the gradient of each batch's loss as a matrix, on a convolution and on GPT-2's layer too."""
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    net = nn.Sequential(nn.Conv1d(2, 3, 2), nn.Flatten(), conv1d(4, 6), nn.Linear(4, 1))
    inputs = torch.randn(3, 2, 3)
    twin = copy.deepcopy(net)
    twin(inputs).square().sum().backward()

    seen = {}

    @dataclass(frozen=True)
    class Look(FromGradients):
        name: ClassVar[str] = "extras-look"

        def adapter(self, site, shared=None):
            seen[site.path] = site.observed
            return super().adapter(site, shared)

    peftkit.wrap(net, Look(rank=1), targets=["0", "2"], data=[lambda model: model(inputs).square().sum()] * 2)
    torch.testing.assert_close(seen["0"].sum, 2 * twin[0].weight.grad.flatten(1))
    torch.testing.assert_close(seen["2"].sum, 2 * twin[2].weight.grad.mT)
    assert seen["0"].n == 2
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize(
    "method, data, words",
    [
        ("lora", [1], "lora starts from no data; leave out data="),
        (FromInputs(), None, r"extras-inputs takes its start from data; give wrap\(…, data=batches\)"),
        (FromInputs(), [], "holds no batch"),
        (FromGradients(), [torch.ones(2, 6)], "a batch must give a loss"),
    ],
)
def test_data_that_is_missing_or_of_no_use_is_an_error(method, data, words):
    """Nothing is ignored; the model is left as it was."""
    model = base()
    with pytest.raises(MethodError, match=words):
        peftkit.wrap(model, method, data=data)
    assert [type(m) for m in model.modules()] == [type(m) for m in base().modules()]
    assert all(p.requires_grad for p in model.parameters())


def test_a_layer_whose_inputs_are_not_known_is_named():
    """An embedding's matrix is applied to indices, of which no such start can be taken."""
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2))
    with pytest.raises(UnsupportedLayerError, match=r"0\.weight.*Embedding.*exclude it"):
        peftkit.wrap(model, FromInputs(), targets="0", data=[torch.tensor([1, 2])])


# --------------------------------------------------------------------------------------------------- gain


@dataclass(frozen=True)
class Gained(peftkit.Method):
    """Rows times a learned factor that also depends on the weight, after a low-rank update."""

    name: ClassVar[str] = "extras-gained"

    def adapter(self, site, shared=None):
        return GainedAdapter(site)


class GainedAdapter(peftkit.LowRank):
    def __init__(self, site):
        super().__init__(site)
        self.up = site.parameter(torch.zeros(*site.batch, site.fan_out, 2))
        self.down = site.parameter(torch.randn(*site.batch, 2, site.fan_in))
        self.excess = site.parameter(torch.zeros(*site.batch, site.fan_out, 1))

    def factors(self):
        return self.up, self.down, 0.5

    def gain(self, w):
        return 1 + self.excess * w.norm(dim=-1, keepdim=True)


LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), lambda: torch.randn(2, 3, 6)),
    "linear, no bias": (lambda: nn.Linear(6, 5, bias=False), lambda: torch.randn(3, 6)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, groups=2), lambda: torch.randn(2, 4, 5, 5)),
    "transposed": (lambda: nn.ConvTranspose1d(4, 6, 3), lambda: torch.randn(2, 4, 5)),
    "embedding": (lambda: nn.Embedding(7, 5), lambda: torch.randint(7, (3, 4))),
    "recurrent": (lambda: nn.GRU(4, 3), lambda: torch.randn(2, 3, 4)),
}


@pytest.mark.parametrize("case", LAYERS)
def test_a_gain_on_the_fast_path_is_that_of_the_definition(case, monkeypatch):
    """Output and gradients of the fast path equal those of the weight form in float64; a gain of 1 changes no bit."""
    build, inputs = LAYERS[case]
    torch.manual_seed(0)
    net = nn.Sequential(build()).double()
    example = inputs()
    example = example if example.dtype == torch.long else example.double()

    def output(model):
        y = model(example)
        return y[0] if isinstance(y, tuple) else y

    with torch.no_grad():
        start = output(net)
    model = peftkit.wrap(net, Gained(), targets="0")
    assert torch.equal(output(model), start)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn_like(p) / 3)

    def run():
        model.zero_grad()
        y = output(model)
        y.square().sum().backward()
        return [y.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]

    fast = run()
    calls = []
    monkeypatch.setattr("peftkit.running._run_fused", lambda *args: calls.append(args))
    model[0].__dict__["_peftkit_running"] = model[0].__dict__["_peftkit_running"]._replace(fused=None)
    for one, other in zip(fast, run(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-11, rtol=1e-11)
    assert not calls


def test_two_gains_compose_by_the_definition():
    """Only a single adapter with a gain is fast; with another one the weights are composed, in order."""
    model = nn.Sequential(nn.Linear(6, 5)).double()
    peftkit.wrap(model, Gained(), targets="0")
    assert model[0].__dict__["_peftkit_running"].fused == "weight"
    peftkit.wrap(model, "lora", targets="0", name="b")
    assert model[0].__dict__["_peftkit_running"].fused is None
