"""Routed batches in grouped products: the same numbers as the loop over adapters, in one run of each linear layer."""

import copy
import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import peftkit
from peftkit import grouped, stacks
from peftkit.composition import RUNNING

NAMES = ["a", "b", None, "a"]


class One(nn.Module):
    """A model of one layer, which can be checkpointed or get its tokens flattened."""

    reentrant: bool | None = None
    flat = False

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        if self.flat:
            return self.layer(x.flatten(0, 1)).view(*x.shape[:2], -1)
        if self.reentrant is not None:
            return checkpoint(self.layer, x, use_reentrant=self.reentrant)
        return self.layer(x)


def wrapped(layer, *, ranks=(2, 3), alphas=(2.0, 3.0), dropouts=(0.0, 0.0), method=peftkit.LoRA, seed=0):
    """A model of one layer, with an adapter for each rank, called a, b, ..., that all change something."""
    torch.manual_seed(seed)
    model = One(layer)
    for i, (rank, alpha, dropout) in enumerate(zip(ranks, alphas, dropouts, strict=True)):
        model = peftkit.wrap(model, method(rank=rank, alpha=alpha, dropout=dropout), targets="layer", name="abc"[i])
    with torch.no_grad():
        for parameter in model.layer.adapters.parameters():
            parameter.normal_()
    return model.eval()


def linear(*, bias=True, dtype=torch.float64, fan_in=6, fan_out=5):
    torch.manual_seed(1)
    return nn.Linear(fan_in, fan_out, bias=bias, dtype=dtype)


def group_of(layer):
    """The grouped products that a routed layer runs by, if it does."""
    return layer.__dict__[RUNNING].grouped


def use_loop(layer):
    layer.__dict__[RUNNING].grouped = None


def adapters_of(model):
    return dict(model.layer.adapters.named_parameters())


def run_and_learn(model, x, names, *, dim=0, loop=False, weight=None):
    """Output, and the gradients of the input and of all adapters."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    with peftkit.routed(model, names, dim=dim):
        if loop:
            use_loop(model.layer)
        y = model(x)
        (y * (torch.arange(y.numel()).reshape(y.shape).sin() if weight is None else weight)).sum().backward()
    return y.detach(), x.grad, {name: p.grad for name, p in adapters_of(model).items()}


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "bmm", "baddbmm_", "addmm_"):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


# ----------------------------------------------------------------------------------------------- the same numbers


@settings(deadline=None, max_examples=60)
@given(
    names=st.lists(st.sampled_from(["a", "b", "c", None]), min_size=2, max_size=5).filter(lambda n: len(set(n)) > 1),
    ranks=st.tuples(*[st.integers(1, 4)] * 3),
    alphas=st.tuples(*[st.sampled_from([1.0, 2.0, 5.0])] * 3),
    middle=st.lists(st.integers(1, 3), min_size=1, max_size=2),
    repeat=st.integers(1, 3),
    dim=st.sampled_from([0, 0, 1]),
    transposed=st.booleans(),
    training=st.booleans(),
    bias=st.booleans(),
)
def test_a_sample_equals_itself_alone(names, ranks, alphas, middle, repeat, dim, transposed, training, bias):
    """For all shapes, ranks, scales, repeats and places of the batch: outputs, and gradients as the loop gives them."""
    layer = Conv1D(5, 6).double() if transposed else linear(bias=bias)
    model = wrapped(layer, ranks=ranks, alphas=alphas, dropouts=(0.0,) * 3).train(training)
    shape = [*middle, 6]
    shape.insert(dim, len(names) * repeat)
    x = torch.randn(shape, dtype=torch.float64)
    alone = []
    with torch.no_grad():
        for name, rows in zip(names, x.split(repeat, dim), strict=True):
            with peftkit.using(model, *([name] if name else [])):
                alone.append(model(rows.contiguous()))
        with peftkit.routed(model, names, dim=dim):
            assert group_of(model.layer) is not None
            torch.testing.assert_close(model(x), torch.cat(alone, dim), rtol=1e-12, atol=1e-12)
    y, x_grad, grads = run_and_learn(model, x, names, dim=dim)
    torch.testing.assert_close(y, torch.cat(alone, dim), rtol=1e-12, atol=1e-12)
    _, expected_x, expected = run_and_learn(model, x, names, dim=dim, loop=True)
    torch.testing.assert_close(x_grad, expected_x, rtol=1e-12, atol=1e-12)
    for name, gradient in expected.items():
        ours = grads[name]
        if gradient is None:
            assert ours is None
        else:
            torch.testing.assert_close(ours, gradient, rtol=1e-12, atol=1e-12)


def test_rows_that_were_flattened():
    """A model that flattens its tokens gives each sample its own rows still."""

    model = wrapped(linear())
    model.flat = True
    x = torch.randn(4, 3, 6, dtype=torch.float64)
    rows = []
    for i, name in enumerate(NAMES):
        with peftkit.using(model, *([name] if name else [])):
            rows.append(model(x[i : i + 1]))
    with peftkit.routed(model, NAMES), Products() as seen:
        torch.testing.assert_close(model(x), torch.cat(rows), rtol=1e-12, atol=1e-12)
    assert "baddbmm_" in seen.seen


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 9])
def test_a_sample_without_an_adapter_is_the_base_bit_for_bit(tokens, dtype, training):
    """None means the base's own output on the same batch, to the last bit; also where gradients flow."""
    model = wrapped(linear(dtype=dtype, fan_in=64, fan_out=48)).train(training)
    x = torch.randn(4, tokens, 64, dtype=dtype)
    with peftkit.disabled(model):
        base = model(x)
    with peftkit.routed(model, NAMES):
        assert torch.equal(model(x)[2], base[2])
        with torch.no_grad():
            assert torch.equal(model(x)[2], base[2])
            assert not torch.equal(model(x)[1], base[1])


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_half_precision(autocast, grad):
    """Float32 adapters on a bfloat16 base, and autocast: as the loop has it, within three roundings of bfloat16."""
    model = wrapped(linear(dtype=torch.float32 if autocast else torch.bfloat16, fan_in=32, fan_out=24))
    assert {p.dtype for p in adapters_of(model).values()} == {torch.float32}
    x = torch.randn(4, 3, 32, dtype=torch.float32 if autocast else torch.bfloat16)
    context = torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast)
    with torch.set_grad_enabled(grad), context, peftkit.routed(model, NAMES):
        ours = model(x)
        assert group_of(model.layer) is not None
        use_loop(model.layer)
        loop = model(x)
    assert ours.dtype == loop.dtype == torch.bfloat16
    scale = loop.float().abs().max()
    assert (ours.float() - loop.float()).abs().max() <= 3 * 2**-8 * scale
    if not grad:
        return
    grads = []
    for loop in (False, True):
        with context:
            grads.append(run_and_learn(model, x, NAMES, loop=loop, weight=1.0)[1:])
    (x_ours, ours), (x_loop, loops) = grads
    for a, b in [(x_ours, x_loop), *((ours[name], loops[name]) for name in loops)]:
        assert a.dtype == b.dtype
        assert (a.float() - b.float()).abs().max() <= 3 * 2**-8 * b.float().abs().max()


def test_the_products_do_not_grow_with_the_adapters():
    """Two grouped products and the base's one, whether two adapters run or three; the loop takes three for each."""
    model = wrapped(linear(), ranks=(2,) * 3, alphas=(2.0,) * 3, dropouts=(0.0,) * 3)
    x = torch.randn(6, 2, 6, dtype=torch.float64)
    counts = []
    for names in (["a", "b"] * 3, ["a", "b", "c"] * 2):
        with torch.no_grad(), peftkit.routed(model, names), Products() as ours:
            model(x)
        with torch.no_grad(), peftkit.routed(model, names), Products() as loop:
            use_loop(model.layer)
            model(x)
        counts.append((sorted(ours.seen), len(loop.seen)))
    assert counts == [(["addmm", "baddbmm_", "bmm"], 6), (["addmm", "baddbmm_", "bmm"], 9)]


def test_a_gradient_of_a_gradient():
    """Gradients can be differentiated once more, as the loop's can; with dropout drawn it is an error."""
    model = wrapped(linear())
    x = torch.randn(4, 3, 6, dtype=torch.float64, requires_grad=True)
    inputs = [x, *adapters_of(model).values()]
    found = []
    for loop in (False, True):
        with peftkit.routed(model, NAMES):
            if loop:
                use_loop(model.layer)
            first = torch.autograd.grad(model(x).sin().sum(), inputs, create_graph=True)
        found.append(torch.autograd.grad(sum(g.pow(2).sum() for g in first), inputs))
    for ours, loop in zip(*found, strict=True):
        torch.testing.assert_close(ours, loop, rtol=1e-10, atol=1e-10)
    model = wrapped(linear(), dropouts=(0.5, 0.5)).train()
    with peftkit.routed(model, NAMES), pytest.raises(RuntimeError, match="differentiated twice"):
        torch.autograd.grad(model(x).sum(), x, create_graph=True)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_checkpointing(reentrant, dropout):
    """A checkpointed layer has the same output and gradients, with the same elements dropped."""
    model = wrapped(linear(), dropouts=(dropout, dropout / 2)).train()
    x = torch.randn(4, 3, 6, dtype=torch.float64, requires_grad=True)
    found = []
    for model.reentrant in (None, reentrant):
        torch.manual_seed(5)
        with peftkit.routed(model, NAMES):
            y = model(x)
            y.sin().sum().backward()
        found.append([y.detach(), x.grad, *(p.grad for p in adapters_of(model).values())])
        x.grad = None
        model.zero_grad()
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(again, plain, rtol=1e-12, atol=1e-12)


# --------------------------------------------------------------------------------------------------------- dropout


def identity_adapters(dropouts):
    """A model whose output is what the adapters let through of the input: zero base, identities for factors."""
    model = wrapped(nn.Linear(32, 32, bias=False), ranks=(32, 32), alphas=(32.0, 32.0), dropouts=dropouts)
    with torch.no_grad():
        model.layer.weight.zero_()
        for parameter in adapters_of(model).values():
            parameter.copy_(torch.eye(32))
    return model.train()


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("rates", [(0.2, 0.2), (0.5, 0.1), (0.3, 0.0)])
def test_dropout_has_each_samples_own_rate(rates, grad):
    """Each sample's input is dropped at its adapter's rate, the expectation stays, and gradients have the same mask."""
    model = identity_adapters(rates)
    x = torch.ones(4, 500, 32, requires_grad=True)
    torch.manual_seed(0)
    with torch.set_grad_enabled(grad), peftkit.routed(model, NAMES):
        y = model(x)
        if grad:
            y.sum().backward()
            assert torch.equal(x.grad, y.detach())  # kept elements only, times the same factor
            seen = y.detach().sum(1)
            for name, rows in (("a", seen[0] + seen[3]), ("b", seen[1])):
                factors = model.layer.adapters[name]["weight"]
                torch.testing.assert_close(factors.up.grad, rows.expand(32, 32))
                torch.testing.assert_close(factors.down.grad, rows.expand(32, 32))
        again = model(x)
    y = y.detach()
    assert not y[2].any()
    for i, rate in [(0, rates[0]), (1, rates[1]), (3, rates[0])]:
        sigma = (rate * (1 - rate) / y[i].numel()) ** 0.5
        assert abs((y[i] == 0).float().mean().item() - rate) <= 5 * sigma + 1 / 256
        assert abs(y[i].mean().item() - 1) <= 5 * sigma / (1 - rate) + 1e-6
    if rates[0]:
        assert not torch.equal(again, y)
        assert not torch.equal(y[0], y[3])
    with torch.no_grad(), peftkit.routed(model.eval(), NAMES):
        assert torch.equal(model(x)[:2], torch.ones(2, 500, 32))


# ---------------------------------------------------------------------------------------------------- kept stacks


class Asked(peftkit.LoRA):
    """LoRA that counts how often it is asked for its factors."""

    name = "asked"
    count = 0

    def adapter(self, site, shared=None):
        return _Asked(site, self)


class _Asked(peftkit.LowRank):
    def __init__(self, site, method):
        super().__init__(site)
        self.scale = method.scale
        self.vector = nn.Module()
        self.vector.register_buffer("gains", site.tensor(torch.ones(method.rank, 1)))
        self.down = site.parameter(torch.randn(method.rank, site.fan_in))
        self.up = site.parameter(torch.randn(site.fan_out, method.rank))

    def factors(self):
        Asked.count += 1
        return self.up, self.vector.gains * self.down, self.scale


def _step(**options):
    def change(model, adapter):
        optimizer = torch.optim.AdamW([adapter.up, adapter.down], lr=0.1, **options)
        adapter.up.grad, adapter.down.grad = torch.ones_like(adapter.up), torch.ones_like(adapter.down)
        optimizer.step()

    return change


def _in_place(model, adapter):
    with torch.no_grad():
        adapter.down.add_(1)


def _inference(model, adapter):
    with torch.inference_mode():
        adapter.down.add_(1)


def _load(model, adapter):
    peftkit.load_state_dict(model, {n: t + 1 for n, t in peftkit.state_dict(model, "a").items()}, "a")


def _other_data(model, adapter):
    adapter.up.data = adapter.up.data + 1


def _other_parameter(model, adapter):
    adapter.up = nn.Parameter(adapter.up.detach() + 1)


def _buffer(model, adapter):
    adapter.vector.gains *= 2


def _scale(model, adapter):
    adapter.scale *= 2


def _train_then_write(model, adapter):
    """What fused kernels that no hook tells of look like: nothing but a training forward comes before."""
    model(torch.randn(4, 2, 6, dtype=torch.float64, requires_grad=True))
    adapter.up.data.add_(1)


CHANGES = [
    _step(), _step(foreach=True), _step(fused=True), _in_place, _inference, _load, _other_data, _other_parameter,
    _buffer, _scale, _train_then_write,
]  # fmt: skip
IDS = [
    "step", "foreach step", "fused step", "in place", "inference mode", "load", "other data", "other parameter",
    "buffer", "attribute", "training",
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=IDS)
def test_stacks_are_kept_until_something_changes(change):
    """Without gradients the factors are asked for twice; whatever changes an adapter, the next call sees it."""
    model = wrapped(linear(), method=Asked)
    x = torch.randn(4, 2, 6, dtype=torch.float64)
    with peftkit.routed(model, NAMES):
        with torch.no_grad():
            before = model(x)
            Asked.count = 0
            for asked in (2, 2, 2):  # a block of one call keeps nothing, and the second call asks once more
                torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)
                assert Asked.count == asked
        change(model, model.layer.adapters["a"]["weight"])
        with torch.no_grad():
            after = model(x)
            use_loop(model.layer)
            expected = model(x)
    torch.testing.assert_close(after, expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(after[0], before[0])
    torch.testing.assert_close(after[1:3], before[1:3], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("change", [_in_place, _other_data, _scale], ids=["in place", "other data", "attribute"])
def test_the_check_would_see_stale_stacks(change, monkeypatch):
    """With a memory that always calls itself fresh, the test above fails."""
    monkeypatch.setattr(stacks.Kept, "is_fresh", lambda self: True)
    with pytest.raises(AssertionError):
        test_stacks_are_kept_until_something_changes(change)


def test_stacks_of_shared_state():
    """State that adapters share is watched as their own is."""
    model = One(linear())
    for name in "ab":
        model = peftkit.wrap(model, Sharing(), targets="layer", name=name)
    x = torch.randn(4, 2, 6, dtype=torch.float64)
    with torch.no_grad(), peftkit.routed(model, NAMES):
        before, _ = model(x), model(x)
        model.layer.adapters["a"]["weight"].bank.state.rows.mul_(2)
        after = model(x)
        assert group_of(model.layer) is not None
        use_loop(model.layer)
        torch.testing.assert_close(after, model(x), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(after[0], before[0])


class Sharing(peftkit.Method):
    """Low-rank updates whose `down` is shared by all sites."""

    name = "sharing"

    def shared(self, sites):
        module = nn.Module()
        module.register_buffer("rows", sites[0].tensor(torch.randn(2, 6)))
        return module

    def adapter(self, site, shared=None):
        return _Sharing(site, shared)


class _Sharing(peftkit.LowRank):
    def __init__(self, site, shared):
        super().__init__(site)
        self.bank = shared
        self.up = site.parameter(torch.randn(site.fan_out, 2))

    def factors(self):
        return self.up, self.bank.state.rows, 1.0


def test_stacks_hold_each_adapter_once_and_end_with_the_block():
    """However many samples, a stack has one entry for each adapter; it is gone after the block, and not copied."""
    model = wrapped(linear())
    x = torch.randn(12, 2, 6, dtype=torch.float64)
    with torch.no_grad(), peftkit.routed(model, ["a", "b", "a"] * 4):
        model(x)
        assert group_of(model.layer).kept is None  # of one call
        model(x)
        kept = group_of(model.layer).kept
        assert kept.stacks.up.shape == (2, 3, 5)
        assert group_of(copy.deepcopy(model).layer).kept is None
        stack = weakref.ref(kept.stacks.up)
        del kept
    gc.collect()
    assert stack() is None
    with torch.no_grad(), peftkit.routed(model, ["a"] * 4 + ["b"] * 8):
        model(x)
        assert group_of(model.layer).blocks == 3  # neighbours with one adapter go together


def test_hooks_on_an_adapter_run_at_every_call():
    """Where a hook gathers parameters, nothing is kept."""
    model = wrapped(linear(), method=Asked)
    model.layer.adapters["a"]["weight"].register_forward_pre_hook(lambda *_: None)
    with torch.no_grad(), peftkit.routed(model, NAMES):
        for _ in range(2):
            model(torch.randn(4, 2, 6, dtype=torch.float64))
        Asked.count = 0
        model(torch.randn(4, 2, 6, dtype=torch.float64))
    assert Asked.count == 2


def test_inference_mode():
    """Stacks made in inference mode serve under no_grad as well, and never a graph."""
    model = wrapped(linear())
    x = torch.randn(4, 2, 6, dtype=torch.float64)
    with peftkit.routed(model, NAMES):
        with torch.inference_mode():
            for _ in range(2):
                first = model(x).clone()
        with torch.no_grad():
            assert torch.equal(model(x), first)
        y = model(x)
        y.sum().backward()
        torch.testing.assert_close(y.detach(), first.detach(), rtol=1e-12, atol=1e-12)


# -------------------------------------------------------------------------------------------- what takes the loop


class Gained(peftkit.LoRA):
    """LoRA with a gain."""

    name = "gained"

    def adapter(self, site, shared=None):
        return _Gained(site, self)


class _Gained(_Asked):
    def gain(self, w):
        return w.norm(dim=1, keepdim=True)


def pissa(**fields):
    return peftkit.LoRA(init="pissa", **fields)


@pytest.mark.parametrize("method", [Gained, pissa], ids=["gain", "start"])
def test_more_than_a_sum_takes_the_loop(method):
    """A gain, or a start that is subtracted: one group of rows at a time, and right."""
    model = wrapped(linear(), method=method)
    x = torch.randn(4, 2, 6, dtype=torch.float64)
    rows = []
    for i, name in enumerate(NAMES):
        with peftkit.using(model, *([name] if name else [])):
            rows.append(model(x[i : i + 1]))
    with peftkit.routed(model, NAMES):
        assert group_of(model.layer) is None
        torch.testing.assert_close(model(x), torch.cat(rows), rtol=1e-12, atol=1e-12)


def _base_trains(model):
    model.layer.weight.requires_grad_()


def _own_forward(model):
    forward = model.layer.forward
    model.layer.forward = lambda x: forward(x) + 1


def _called_by_name(model):
    model.forward = lambda x: model.layer(input=x)


@pytest.mark.parametrize("change", [_base_trains, _own_forward, _called_by_name])
def test_a_call_that_does_not_fit_takes_the_loop(change, monkeypatch):
    """A base that trains, a forward of the layer's own, an argument by name: no grouped product, and the loop's output."""
    model = wrapped(linear())
    x = torch.randn(4, 2, 6, dtype=torch.float64)
    monkeypatch.setattr(grouped, "add", lambda *_: pytest.fail("a grouped product"))
    with peftkit.routed(model, NAMES):
        assert group_of(model.layer) is not None
        change(model)
        ours = model(x)
        use_loop(model.layer)
        assert torch.equal(model(x), ours)


def test_functorch_takes_the_loop():
    """Under a functorch transform the layer runs by plain operations, and has the loop's derivative."""
    model = wrapped(linear())
    x = torch.randn(4, 2, 6, dtype=torch.float64)
    with peftkit.routed(model, NAMES):
        ours = torch.func.grad(lambda x: model(x).sin().sum())(x)
        expected = torch.autograd.grad(model(x := x.requires_grad_()).sin().sum(), x)[0]
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_another_kinds_output_is_not_written_to(monkeypatch):
    """Where the base's output may not be ours to change, the updates are added apart, with the same gradients."""
    model = wrapped(linear())
    x = torch.randn(4, 3, 6, dtype=torch.float64)
    expected = run_and_learn(model, x, NAMES)

    def plain(self, layer, x, w, b):
        return F.linear(x, w, b).expand(*x.shape[:-1], 5)

    monkeypatch.setattr(grouped.Linear, "plain", plain)
    monkeypatch.setattr(grouped, "MAKE_OUTPUTS", ())
    ours = run_and_learn(model, x, NAMES)
    for a, b in [(ours[0], expected[0]), (ours[1], expected[1]), *((ours[2][n], expected[2][n]) for n in expected[2])]:
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
