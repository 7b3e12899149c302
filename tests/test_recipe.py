"""The generic path keeps no second copy of an adapted weight for backward, and its gradients stay autograd's own.

*Naive* is the same code with recipes switched off: every weight is then too small for one. Bytes are the allocator's own
count, from `torch.profiler`.
"""

import copy
import functools
import gc
import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import peftkit
from peftkit import recipe

NAIVE = 10**12


@dataclass(frozen=True)
class Directions(peftkit.Method):
    """Adapt every row's length and direction apart, as DoRA does: what it computes saves several times the weight."""

    name: ClassVar[str] = "recipe-directions"

    def adapter(self, site, shared=None):
        return DirectionsAdapter(site)


class DirectionsAdapter(peftkit.Adapter):
    calls: ClassVar[list[int]] = []
    """The adapter's number, once for each time that it makes a weight."""
    numbers: ClassVar = itertools.count()

    def __init__(self, site):
        super().__init__(site)
        self.number = next(self.numbers)
        self.up = site.parameter(torch.randn(*site.batch, site.fan_out, 2) / 4)
        self.down = site.parameter(torch.randn(*site.batch, 2, site.fan_in) / 4)
        self.length = site.parameter(torch.rand(*site.batch, site.fan_out, 1) + 0.5)

    def weight(self, w):
        self.calls.append(self.number)
        moved = w + self.up @ self.down
        return self.length * moved / moved.norm(dim=-1, keepdim=True)


@dataclass(frozen=True)
class Fickle(peftkit.Method):
    """Computes otherwise the second time, which the contract forbids."""

    name: ClassVar[str] = "recipe-fickle"

    def adapter(self, site, shared=None):
        return FickleAdapter(site)


class FickleAdapter(peftkit.Adapter):
    def __init__(self, site):
        super().__init__(site)
        self.scale = site.parameter(torch.ones(site.fan_out, 1))
        self.times = 0

    def weight(self, w):
        self.times += 1
        for _ in range(self.times):
            w = w * self.scale
        return w


DIRECTIONS, LORA = Directions(), peftkit.LoRA(rank=2, init="gaussian")


@pytest.fixture(autouse=True)
def fresh():
    torch.manual_seed(0)
    DirectionsAdapter.calls.clear()


@pytest.fixture
def smallest(monkeypatch):
    """Sets the size from which weights have recipes: 0 for all of them, `NAIVE` for none."""
    return lambda nbytes: monkeypatch.setattr(recipe, "SMALLEST", nbytes)


class Holder(nn.Module):
    """A model of one layer that passes everything on."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, *args, **kwargs):
        return self.layer(*args, **kwargs)


class Case(NamedTuple):
    """A layer whose weights are large beside its activations, an input's shape, and what is adapted."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    select: Any = "layer"
    call: Callable[..., Any] = lambda model, x: model(x)


def mixtral(hidden=64, inner=64):
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        hidden_size=hidden, intermediate_size=inner, num_local_experts=8, experts_implementation="eager"
    )
    block = transformers.models.mixtral.modeling_mixtral.MixtralSparseMoeBlock(config)
    for p in block.parameters():
        nn.init.normal_(p, std=0.2)
    return block


def encoder_layer(width=256, **options):
    return nn.TransformerEncoderLayer(width, 2, 2 * width, **({"dropout": 0.0, "batch_first": True} | options))


def attend(model, x):
    return model(x, x, x)[0]


_BOTH = ["layer", "layer.out_proj"]
_LINEAR = [nn.Linear, nn.MultiheadAttention]
_EXPERTS = ["layer.experts.gate_up_proj", "layer.experts.down_proj"]
CASES = {
    "linear": Case(lambda: nn.Linear(256, 512), (2, 256)),
    "conv2d": Case(lambda: nn.Conv2d(64, 128, 3), (1, 64, 4, 4)),
    "transposed conv2d": Case(lambda: nn.ConvTranspose2d(64, 128, 3), (1, 64, 2, 2)),
    "attention": Case(lambda: nn.MultiheadAttention(256, 2, batch_first=True), (1, 2, 256), _BOTH, attend),
    "attention, no weights": Case(
        lambda: nn.MultiheadAttention(256, 2, batch_first=True),
        (1, 2, 256),
        _BOTH,
        lambda model, x: model(x, x, x, need_weights=False)[0],
    ),
    "encoder layer": Case(encoder_layer, (1, 2, 256), _LINEAR),
    "LSTM": Case(lambda: nn.LSTM(128, 128, 2), (2, 1, 128), call=lambda model, x: model(x)[0]),
    "GRU": Case(lambda: nn.GRU(128, 128, 2), (2, 1, 128), call=lambda model, x: model(x)[0]),
    "GRU cell": Case(lambda: nn.GRUCell(128, 128), (1, 128)),
    "mixtral": Case(mixtral, (1, 3, 64), _EXPERTS),
}  # fmt: skip
FUSED = ("linear", "conv2d", "transposed conv2d")  # LoRA builds no matrix at all there
METHODS = {"directions": DIRECTIONS, "lora": LORA}
ROWS = [(c, m) for c in CASES for m in METHODS if not (m == "lora" and c in FUSED)]
EVERY = pytest.mark.parametrize("case, method", [pytest.param(CASES[c], METHODS[m], id=f"{c} | {m}") for c, m in ROWS])
EACH = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
SOME = pytest.mark.parametrize(
    "case", [pytest.param(CASES[c], id=c) for c in ("linear", "conv2d", "attention", "LSTM", "mixtral")]
)


def adapt(case, method=DIRECTIONS):
    return peftkit.wrap(Holder(case.build()), method, targets=case.select)


def adapters_in(model):
    return [m for m in model.modules() if isinstance(m, (peftkit.Adapter, peftkit.LowRank))]


def weights_in(model):
    """How many bytes the adapted weights have."""
    layers = [m for m in model.modules() if "adapters" in m._modules]
    return sum(layer._parameters[w].nbytes for layer in layers for w in layer.adapters["default"])


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def gradients(model, case, x):
    """The output, and the gradients of what is trained and of the input."""
    x = x.detach().clone().requires_grad_()
    y = case.call(model, x)
    return [y, *torch.autograd.grad(y.square().sum(), [*trained(model), x])]


def assert_same(ours, theirs):
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


def kept(call):
    """How many bytes are allocated during a call and not freed by its end, what it returns among them."""
    gc.disable()  # a collection would count older garbage
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            result = call()
    finally:
        gc.enable()
    del result
    return sum(event.self_cpu_memory_usage for event in profile.events())


# ------------------------------------------------------------------------------------------------- memory


@EVERY
def test_keeps_no_copy(case, method, smallest):
    """Beyond what the frozen layer keeps for backward, nothing of the weights' size is kept; naively, all of it is."""
    x = torch.randn(case.shape, requires_grad=True)
    frozen = Holder(case.build()).requires_grad_(requires_grad=False)
    own = kept(lambda: case.call(frozen, x))
    model = adapt(case, method)
    size = weights_in(model)
    smallest(0)
    assert kept(lambda: case.call(model, x)) - own < 0.02 * size
    smallest(NAIVE)
    # LoRA's own computation saves nothing, so that a weight is kept only where it is used for the input's gradient.
    assert kept(lambda: case.call(model, x)) - own >= (1.0 if method is DIRECTIONS else 0.5) * size


def test_a_large_weight_has_a_recipe_and_a_small_one_is_kept():
    """Unless told otherwise, a weight has a recipe from a million bytes on."""
    for width, has in ((499, False), (501, True)):
        model = adapt(Case(lambda width=width: nn.Linear(500, width), (1, 500)))
        copies = kept(lambda model=model: model(torch.ones(1, 500))) / weights_in(model)
        assert (copies < 0.02) is has
        assert (copies > 0.98) is not has


@SOME
def test_keeps_nothing_after_backward(case, smallest):
    """After a backward that frees the graph, what was made again is gone too, even while the output is still held."""
    smallest(0)
    x = torch.randn(case.shape, requires_grad=True)
    model = adapt(case)
    size = weights_in(model)

    def step():
        y = case.call(model, x)
        return y, torch.autograd.grad(y.sum(), [*trained(model), x])

    outputs = sum(t.nbytes for t in [*trained(model), x])
    assert kept(step) - outputs < 0.02 * size


@SOME
def test_steps_leak_nothing(case, smallest):
    """Step after step, no more bytes are held than before."""
    smallest(0)
    x = torch.randn(case.shape, requires_grad=True)
    model = adapt(case)

    def steps():
        for _ in range(3):
            torch.autograd.grad(case.call(model, x).sum(), [*trained(model), x])

    steps()
    assert kept(steps) < 0.02 * weights_in(model)


@SOME
def test_keeps_nothing_after_a_partial_backward(case, smallest):
    """Nor is it kept when only the input's gradient was asked for, whose backward never reaches the adapter."""
    smallest(0)
    x = torch.randn(case.shape, requires_grad=True)
    frozen = Holder(case.build()).requires_grad_(requires_grad=False)
    own = kept(lambda: case.call(frozen, x))
    model = adapt(case)
    size = weights_in(model)

    def step():
        y = case.call(model, x)
        return y, torch.autograd.grad(y.sum(), x)

    assert kept(step) - own < 0.02 * size


@SOME
def test_a_frozen_adapter_keeps_nothing(case, smallest):
    """An adapter that does not train now, between layers that do, costs no copy of the weight either."""
    smallest(0)
    x = torch.randn(case.shape, requires_grad=True)
    frozen = Holder(case.build()).requires_grad_(requires_grad=False)
    own = kept(lambda: case.call(frozen, x))
    model = adapt(case)
    peftkit.set_trainable(model)
    assert kept(lambda: case.call(model, x)) - own < 0.02 * weights_in(model)


@SOME
def test_autocast_keeps_no_copy(case, smallest):
    """Under autocast no copy in half precision is kept beyond those that the frozen layer keeps."""
    x = torch.randn(case.shape, requires_grad=True)
    frozen = Holder(case.build()).requires_grad_(requires_grad=False)
    model = adapt(case)

    def call(model):
        with torch.autocast("cpu", torch.bfloat16):
            return case.call(model, x)

    own = kept(lambda: call(frozen))
    smallest(0)
    assert kept(lambda: call(model)) - own < 0.02 * weights_in(model)


@pytest.mark.filterwarnings("ignore")  # the peer's, of which there are many
@pytest.mark.parametrize("case", ["mixtral", "attention"])
def test_peer_keeps_the_weights(case, smallest):
    """HF PEFT's LoRA keeps a copy of the same weights; peftkit's keeps none."""
    peft = pytest.importorskip("peft")
    case, x = CASES[case], torch.randn(CASES[case].shape, requires_grad=True)
    layer = Holder(case.build()).requires_grad_(requires_grad=False)
    own = kept(lambda: case.call(layer, x))
    options = (
        {"target_modules": ["layer"]}
        if case is CASES["attention"]
        else {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    )
    theirs = peft.get_peft_model(copy.deepcopy(layer), peft.LoraConfig(r=2, **options))
    ours = peftkit.wrap(layer, LORA, targets=case.select)
    size = weights_in(ours)
    smallest(0)
    case.call(ours, x)
    case.call(theirs, x)
    assert kept(lambda: case.call(ours, x)) - own < 0.02 * size
    assert kept(lambda: case.call(theirs, x)) - own >= 1.0 * size


# ---------------------------------------------------------------------------------------------- gradients


@EVERY
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_gradients_are_the_naive_ones(case, method, training, smallest):
    """With and without recipes, output and gradients are the same bit for bit; each weight is made once more."""
    model, x = adapt(case, method).train(training), torch.randn(case.shape)
    found, made = {}, {}
    for nbytes in (0, NAIVE):
        smallest(nbytes)
        DirectionsAdapter.calls.clear()
        found[nbytes] = gradients(model, case, x)
        if method is DIRECTIONS:
            made[nbytes] = [DirectionsAdapter.calls.count(a.number) for a in adapters_in(model)]
    assert_same(found[0], found[NAIVE])
    if method is DIRECTIONS:
        assert made[0] == [times + 1 for times in made[NAIVE]]
        # In eval mode an encoder layer reads all the weights itself, only to see that some train.
        assert {*made[NAIVE]} == ({1} if training or case is not CASES["encoder layer"] else {2})


@EACH
def test_no_grad_makes_each_weight_once(case, smallest):
    """Without grad mode there is no backward to keep anything for, and no hook."""
    smallest(0)
    model = adapt(case)
    with torch.no_grad():
        case.call(model, torch.randn(case.shape))
    assert all(DirectionsAdapter.calls.count(a.number) == 1 for a in adapters_in(model))


def both(smallest, compute):
    """What `compute` gives with recipes, and naively, from the same seed."""
    found = []
    for nbytes in (0, NAIVE):
        smallest(nbytes)
        torch.manual_seed(1)
        found.append(compute())
    return found


SMALL = {
    "linear": Case(lambda: nn.Linear(6, 5), (3, 6)),
    "conv2d": Case(lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (2, 4, 5, 5)),
    "attention": Case(
        lambda: nn.MultiheadAttention(8, 2, batch_first=True, dropout=0.0), (2, 3, 8), _BOTH, attend
    ),
    "encoder layer": Case(lambda: encoder_layer(8), (2, 3, 8), _LINEAR),
    "LSTM": Case(lambda: nn.LSTM(3, 4, 2), (5, 2, 3), call=lambda model, x: model(x)[0]),
    "mixtral": Case(lambda: mixtral(8, 8), (2, 3, 8), _EXPERTS),
}  # fmt: skip
SMALL_CASES = pytest.mark.parametrize("case", SMALL.values(), ids=SMALL)


@SMALL_CASES
def test_double_backward(case, smallest):
    """Gradients of gradients are the naive ones."""
    model = adapt(case)

    def compute():
        x = torch.randn(case.shape, requires_grad=True)
        with torch.nn.attention.sdpa_kernel(
            torch.nn.attention.SDPBackend.MATH
        ):  # the others are not twice differentiable
            y = case.call(model, x)
        first = torch.autograd.grad(y.square().sum(), [*trained(model), x], create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), [*trained(model), x])
        return [*first, *second]

    assert_same(*both(smallest, compute))


@pytest.mark.parametrize(
    "case", [SMALL[c] for c in ("linear", "conv2d", "attention")], ids=["linear", "conv2d", "attention"]
)
@pytest.mark.parametrize("nbytes", [0, NAIVE], ids=["recipe", "naive"])
def test_double_backward_is_the_derivative(case, nbytes, smallest):
    """`gradgradcheck` agrees, in float64, with other tensors given for the adapter's by `functional_call`."""
    smallest(nbytes)
    model = adapt(case).double()
    x = torch.randn(case.shape, dtype=torch.float64, requires_grad=True)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    values = [p.detach().clone().requires_grad_() for p in trained(model)]

    def output(x, *values):
        given = dict(zip(names, values, strict=True))

        def run(*args):
            return torch.func.functional_call(model, given, args)

        return case.call(run, x)

    assert torch.autograd.gradgradcheck(output, (x, *values), fast_mode=True)


@SMALL_CASES
def test_retained_graph(case, smallest):
    """A graph that is retained gives the same gradients a second and a third time."""
    model = adapt(case)

    def compute():
        x = torch.randn(case.shape, requires_grad=True)
        y = case.call(model, x).square().sum()
        wanted = [*trained(model), x]
        return [g for retain in (True, True, False) for g in torch.autograd.grad(y, wanted, retain_graph=retain)]

    ours, theirs = both(smallest, compute)
    assert_same(ours, theirs)
    third = len(ours) // 3
    assert_same(ours[:third], ours[2 * third :])


@SMALL_CASES
def test_two_forwards_before_a_backward(case, smallest):
    """Two forwards, on other inputs, have graphs of their own."""
    model = adapt(case)

    def compute():
        a, b = (case.call(model, torch.randn(case.shape)) for _ in range(2))
        return [
            *torch.autograd.grad(b.square().sum(), trained(model)),
            *torch.autograd.grad(a.square().sum(), trained(model)),
        ]

    assert_same(*both(smallest, compute))


@SMALL_CASES
def test_partial_backward(case, smallest):
    """The gradient of the input alone, and then those of the adapters one by one, are the naive ones."""
    model = adapt(case)

    def compute():
        x = torch.randn(case.shape, requires_grad=True)
        y = case.call(model, x).square().sum()
        parts = [x, *trained(model), x]
        return [torch.autograd.grad(y, part, retain_graph=True)[0] for part in parts]

    assert_same(*both(smallest, compute))


@SMALL_CASES
def test_a_layer_used_twice(case, smallest):
    """A layer that is used twice in one graph gets the sum of its gradients."""
    model = adapt(case)

    def compute():
        x = torch.randn(case.shape, requires_grad=True)
        y = case.call(model, x)
        again = case.call(model, y if y.shape == x.shape else torch.tanh(x))
        return torch.autograd.grad((again.sum() + y.sum()).square(), [*trained(model), x])

    assert_same(*both(smallest, compute))


@SMALL_CASES
def test_threads(case, smallest):
    """Four threads that run one model forward and backward at a time do not meet in frames or recipes, nor move it."""
    smallest(0)
    model = adapt(case)
    before = dict(model.named_parameters())
    inputs = [torch.randn(case.shape) for _ in range(4)]
    expected = [gradients(model, case, x) for x in inputs]
    wrong: list[Any] = []
    barrier = threading.Barrier(4)

    def work(x, want):
        torch.set_num_threads(1)
        barrier.wait()
        for _ in range(20):
            try:
                # Not bit for bit: backward may run with another number of OpenMP threads.
                for a, b in zip(gradients(model, case, x), want, strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
            except BaseException as error:  # noqa: BLE001 - reported below, whatever it is
                wrong.append(error)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(inputs, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert all(p is before[name] for name, p in model.named_parameters())


# ------------------------------------------------------------------------------- beside other people's hooks


@SMALL_CASES
@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_gradient_checkpointing(case, use_reentrant, smallest):
    """A checkpointed block has the naive gradients, and non-reentrantly no recipe makes a weight a third time."""
    model = adapt(case)

    def compute():
        DirectionsAdapter.calls.clear()
        x = torch.randn(case.shape, requires_grad=True)
        y = checkpoint(lambda x: case.call(model, x), x, use_reentrant=use_reentrant)
        for p in trained(model):
            p.grad = None
        y.square().sum().backward()
        made = {DirectionsAdapter.calls.count(a.number) for a in adapters_in(model)}
        assert made == {2} or use_reentrant
        return [x.grad, *(p.grad for p in trained(model))]

    assert_same(*both(smallest, compute))


@SMALL_CASES
def test_save_on_cpu(case, smallest):
    """Under torch's offloading of saved tensors the recipe steps aside: each weight is made once, gradients are right."""
    model = adapt(case)

    def compute():
        DirectionsAdapter.calls.clear()
        with torch.autograd.graph.save_on_cpu():
            found = gradients(model, case, torch.randn(case.shape))
        assert all(DirectionsAdapter.calls.count(a.number) == 1 for a in adapters_in(model))
        return found

    assert_same(*both(smallest, compute))


def test_disabled_hooks(smallest):
    """Where saved-tensor hooks are forbidden, the recipe steps aside instead of raising."""
    model, case = adapt(SMALL["linear"]), SMALL["linear"]

    def compute():
        with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
            return gradients(model, case, torch.randn(case.shape))

    assert_same(*both(smallest, compute))


@SMALL_CASES
def test_autocast(case, smallest):
    """Backward of a forward under autocast, outside of it as is usual, gives the naive gradients."""
    model = adapt(case)

    def compute():
        x = torch.randn(case.shape, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            y = case.call(model, x)
        return torch.autograd.grad(y.float().square().sum(), [*trained(model), x])

    assert_same(*both(smallest, compute))


@SMALL_CASES
def test_functorch_grad(case, smallest):
    """`torch.func.grad` of an adapted layer is autograd's gradient."""
    smallest(0)
    model, x = adapt(case), torch.randn(case.shape)
    given = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(given, x):
        return case.call(lambda *xs: torch.func.functional_call(model, given, xs), x).square().sum()

    found = torch.func.grad(loss)(given, x)
    expected = torch.autograd.grad(case.call(model, x).square().sum(), trained(model))
    for a, b in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("case", [SMALL["linear"], SMALL["conv2d"]], ids=["linear", "conv2d"])
def test_functorch_vmap(case, smallest):
    """Gradients for every sample, by `vmap` of `grad`, are those of one sample after another."""
    smallest(0)
    model, x = adapt(case), torch.randn(case.shape)
    given = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(given, sample):
        return torch.func.functional_call(model, given, (sample[None],)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(given, x)
    for i, sample in enumerate(x):
        expected = torch.autograd.grad(model(sample[None]).square().sum(), trained(model))
        for a, b in zip(found.values(), expected, strict=True):
            torch.testing.assert_close(a[i], b)


@SMALL_CASES
def test_functional_call(case, smallest):
    """Tensors that `functional_call` puts in the adapter's place are what backward makes the weight of again."""
    model = adapt(case)

    def compute():
        x = torch.randn(case.shape, requires_grad=True)
        given = {n: torch.rand_like(p).requires_grad_() for n, p in model.named_parameters() if p.requires_grad}
        y = case.call(lambda *xs: torch.func.functional_call(model, given, xs), x)
        return torch.autograd.grad(y.square().sum(), [*given.values(), x])

    assert_same(*both(smallest, compute))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # forward derivatives use it inside
@pytest.mark.parametrize("case", [SMALL["linear"], SMALL["conv2d"]], ids=["linear", "conv2d"])
def test_functorch_jvp(case, smallest):
    """A forward derivative agrees with the backward one."""
    smallest(0)
    model = adapt(case)
    x, direction = torch.randn(case.shape), torch.randn(case.shape)
    y, tangent = torch.func.jvp(model, (x,), (direction,))
    x.requires_grad_()
    v = torch.randn_like(y)
    (gradient,) = torch.autograd.grad(model(x), x, v)
    torch.testing.assert_close((gradient * direction).sum(), (tangent * v).sum())


# ------------------------------------------------------------------------------------------- what is refused


@SMALL_CASES
@pytest.mark.parametrize("what", ["adapter", "base"])
def test_change_in_place_before_backward(case, what, smallest):
    """A weight or an adapter's parameter that changes between forward and backward is an error, not a wrong gradient."""
    smallest(0)
    model = adapt(case)
    x = torch.randn(case.shape, requires_grad=True)
    y = case.call(model, x).square().sum()
    adapter = adapters_in(model)[0]
    layer = next(m for m in model.modules() if "adapters" in m._modules)
    weight = next(iter(layer.adapters["default"]))
    with torch.no_grad():
        (adapter.down if what == "adapter" else layer._parameters[weight]).add_(1.0)
    with pytest.raises(RuntimeError, match=r"changed in place between forward and backward.*optimizer\.step"):
        torch.autograd.grad(y, [*trained(model), x])


CHANGES = {
    "activate": lambda model: peftkit.activate(model),
    "merge": lambda model: peftkit.merge(model),
    "merge for good": lambda model: peftkit.merge(model, keep_base=False),
    "unwrap": lambda model: peftkit.unwrap(model),
    "eval": lambda model: model.eval(),
    "another adapter": lambda model: peftkit.wrap(model, DIRECTIONS, targets=nn.Module, name="b"),
    "other data for the adapter": lambda model: setattr(
        adapters_in(model)[0].down, "data", torch.randn_like(adapters_in(model)[0].down)
    ),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("case", [SMALL["linear"], SMALL["LSTM"]], ids=["linear", "LSTM"])
def test_change_of_the_model_before_backward(case, change, smallest):
    """What a model is turned into after its forward changes nothing about that forward's gradients."""

    def compute(change):
        torch.manual_seed(2)
        model, x = adapt(case), torch.randn(case.shape, requires_grad=True)
        wanted = [*trained(model), x]
        y = case.call(model, x).square().sum()
        change(model)
        return torch.autograd.grad(y, wanted)

    smallest(0)
    ours = compute(CHANGES[change])
    smallest(NAIVE)
    assert_same(ours, compute(lambda model: None))


def test_change_in_place_after_backward(smallest):
    """An optimizer's step after backward is no such change, nor is the next forward confused by it."""
    case = SMALL["linear"]

    def compute():
        torch.manual_seed(2)
        model, x = adapt(case), torch.randn(case.shape)
        optimizer = torch.optim.SGD(trained(model), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            case.call(model, x).square().sum().backward()
            optimizer.step()
        return [p.detach().clone() for p in trained(model)]

    assert_same(*both(smallest, compute))


def test_a_weight_that_is_not_deterministic(smallest):
    """A `weight` that computes otherwise when it runs again is an error that says so."""
    smallest(0)
    case = SMALL["linear"]
    model = adapt(case, Fickle())
    y = case.call(model, torch.randn(case.shape, requires_grad=True))
    with pytest.raises(RuntimeError, match="must be deterministic"):
        y.sum().backward()


# ------------------------------------------------------------------------------------- storages that come again


class Reader(nn.Module):
    """Reads one child's weight itself, and so has a frame open, in which it calls another child and then computes on."""

    def __init__(self, width=24):
        super().__init__()
        self.read = nn.Linear(width, width, bias=False)
        self.called = nn.Linear(width, width, bias=False)

    def forward(self, x):
        h = F.linear(x, self.read.weight)
        with torch.no_grad():
            self.called(h)  # its adapted weight is freed at once, and its storage may be anybody's from here on
        for _ in range(4):
            h = self.called(h)
            other = torch.tanh(x.mT @ h)  # as large as a weight, and saved
            h = torch.tanh(h @ other)
        return h


def test_a_storage_used_again_in_a_reader(smallest):
    """What stands where an adapted weight was freed is not taken for that weight, inside a reader's frame."""
    case = Case(Reader, (24, 24), nn.Linear)
    model, x = adapt(case), torch.randn(case.shape)
    assert_same(*both(smallest, lambda: gradients(model, case, x)))


@pytest.mark.parametrize("forgotten", [True, False], ids=["forgotten", "planted fault"])
def test_a_storage_used_again_is_no_weight(forgotten, smallest):
    """A weight is told by its storage until it is forgotten; one that is not would be taken for what comes after it."""
    smallest(0)
    raw, scale, x = torch.randn(8, 8), torch.full((8, 1), 2.0, requires_grad=True), torch.ones(8, 8, requires_grad=True)
    others = []
    with recipe.recipes():
        w = recipe.made(lambda: raw * scale, lambda: raw * scale, [raw, scale])
        address = w.untyped_storage()._cdata
        if forgotten:
            recipe.forget([w])
        del w
        while not others or others[-1].untyped_storage()._cdata != address:
            others.append(torch.randn(8, 8))
            assert len(others) < 100_000, "the allocator does not give the storage out again"
        y = x * others[-1]
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gradient, others[-1]) is forgotten


class Detached(nn.Module):
    """Reads a child's weight without gradients, and computes with it in grad mode."""

    def __init__(self):
        super().__init__()
        self.read = nn.Linear(6, 6, bias=False)

    def forward(self, x):
        with torch.no_grad():
            w = self.read.weight + 0
            same = self.read.weight
        return F.linear(x, w) * F.linear(x, same)


def test_a_weight_read_without_gradients(smallest):
    """A weight that a reader takes under `no_grad` is a constant in grad mode: the input's gradient is the naive one."""
    case = Case(Detached, (3, 6), nn.Linear)
    model = adapt(case)

    def compute():
        x = torch.randn(case.shape, requires_grad=True)
        return torch.autograd.grad(model(x).square().sum(), x)

    assert_same(*both(smallest, compute))


@pytest.mark.parametrize("options", [{}, {"norm_first": True, "activation": "gelu"}], ids=["post-norm", "pre-norm"])
def test_a_large_encoder_layer(options, smallest):
    """A layer with weights of more than a million bytes has the naive gradients bit for bit, at the default size."""
    case = Case(lambda: encoder_layer(512, **options), (2, 7, 512), _LINEAR)
    model, x = adapt(case), torch.randn(case.shape)
    assert sum(layer.weight.nbytes > recipe.SMALLEST for layer in (model.layer.linear1, model.layer.linear2)) == 2
    ours = gradients(model, case, x)
    assert 2 in {DirectionsAdapter.calls.count(a.number) for a in adapters_in(model)}
    smallest(NAIVE)
    assert_same(ours, gradients(model, case, x))


@pytest.mark.parametrize("training", [True, False])
def test_a_checkpointed_block_inside_its_parents_frame(training):
    """An encoder opens frames for its layers' weights; a checkpointed layer's large weights survive its rerun all the same."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(512, 8, 512, batch_first=True, dropout=0.0)
    model = peftkit.wrap(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), "lora").train(training)
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        nn.init.normal_(p, std=0.05)
    x = torch.randn(2, 4, 512)
    plain = torch.autograd.grad(model(x).square().sum(), trained)
    for block in model.layers:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    checkpointed = torch.autograd.grad(model(x).square().sum(), trained)
    assert all(torch.equal(a, b) for a, b in zip(plain, checkpointed, strict=True))
