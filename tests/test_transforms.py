"""torch.func over adapters, and models that are built on the meta device."""

import dataclasses
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, hessian, jvp, vmap

import peftkit
from peftkit import distributed, errors


class Net(nn.Module):
    def __init__(self, width=6):
        super().__init__()
        self.embed = nn.Embedding(9, width)
        self.conv = nn.Conv1d(width, width, 3, padding=1)
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, 3)

    def forward(self, tokens):
        return self.out(self.norm(self.conv(self.embed(tokens).mT).tanh().mT))


TOKENS = torch.randint(9, (4, 5), generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(3, (4, 5), generator=torch.Generator().manual_seed(1))


@dataclasses.dataclass(frozen=True)
class Stretch(peftkit.Method):
    """Multiply each row: a method of whole weights, and of biases."""

    name: ClassVar[str] = "stretch"

    def adapter(self, site, shared=None):
        return StretchAdapter(site)


class StretchAdapter(peftkit.Adapter):
    def __init__(self, site):
        super().__init__(site)
        self.factor = site.parameter(torch.ones(*site.batch, site.fan_out, 1))

    def weight(self, w):
        return w * self.factor

    def bias(self, b):
        return b * self.factor.squeeze(-1)


LAYERS = ("embed", "conv", "out")
METHODS = {
    "lora": {LAYERS: peftkit.LoRA(rank=2)},
    "lora with a start": {LAYERS: peftkit.LoRA(rank=2, init="olora")},
    "whole weights": {LAYERS: Stretch()},
    "copies": {"**": peftkit.Full(keep_base=True)},
    "in place": {"norm": "full", "out": peftkit.LoRA(rank=2)},
}
# torch's own, for decompositions of its forward-mode derivatives.
FORWARD_MODE = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
EVERY_METHOD = pytest.mark.parametrize("rules", METHODS.values(), ids=METHODS)


def stir(model):
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype) / 4)
    return model


def net(rules, names=("a",), **options):
    torch.manual_seed(0)
    model = Net(**options).double()
    for name in names:
        model = peftkit.wrap(model, rules, name=name)
    return stir(model)


def loss_of(model, values, tokens, labels):
    logits = functional_call(model, values, (tokens,))
    return nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten())


def learned(model):
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    assert found
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12, msg=name)


@EVERY_METHOD
def test_functional_call_and_grad(rules):
    """Other values for the adapters give the output and gradients of a model that has them, and the model is untouched."""
    model, other = net(rules), stir(net(rules))
    before = model(TOKENS)
    values = learned(other)
    assert torch.equal(functional_call(model, values, (TOKENS,)), other(TOKENS))
    gradients = grad(lambda values: loss_of(model, values, TOKENS, LABELS))(values)
    loss_of(other, {}, TOKENS, LABELS).backward()
    assert_close(gradients, {name: p.grad for name, p in other.named_parameters() if p.requires_grad})
    assert torch.equal(model(TOKENS), before)


@EVERY_METHOD
@pytest.mark.parametrize("names", [("a",), ("a", "b")], ids=len)
def test_gradients_of_each_sample(rules, names):
    """vmap over grad gives the gradient of every sample: that of a loop, with one adapter and with two that run together."""
    if len(names) > 1 and ("norm" in rules or "**" in rules):
        pytest.skip("what is trained in place is one adapter's, and a copy hides what runs before it")
    model = net(rules, names)
    each = grad(lambda values, tokens, labels: loss_of(model, values, tokens[None], labels[None]))
    values = learned(model)
    found = vmap(each, in_dims=(None, 0, 0))(values, TOKENS, LABELS)
    for i in range(len(TOKENS)):
        model.zero_grad()
        loss_of(model, {}, TOKENS[i : i + 1], LABELS[i : i + 1]).backward()
        expected = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert_close({name: g[i] for name, g in found.items()}, expected)


@FORWARD_MODE
@EVERY_METHOD
def test_jvp_is_the_slope(rules):
    """Forward-mode derivatives along a direction are what reverse mode gives along it."""
    model = net(rules)
    values = learned(model)
    generator = torch.Generator().manual_seed(3)
    along = {name: torch.randn(t.shape, generator=generator, dtype=t.dtype) for name, t in values.items()}
    _, slope = jvp(lambda values: loss_of(model, values, TOKENS, LABELS), (values,), (along,))
    gradients = grad(lambda values: loss_of(model, values, TOKENS, LABELS))(values)
    torch.testing.assert_close(
        slope, sum((gradients[name] * along[name]).sum() for name in values), rtol=1e-9, atol=1e-12
    )


def test_an_ensemble_of_adapters_in_one_call():
    """vmap over the adapters' values runs as many adapters as there are, each as by itself."""
    models = [net(METHODS["lora"]), stir(net(METHODS["lora"])), stir(stir(net(METHODS["lora"])))]
    stacked = {name: torch.stack([learned(model)[name] for model in models]) for name in learned(models[0])}
    found = vmap(lambda values: functional_call(models[0], values, (TOKENS,)))(stacked)
    for outputs, model in zip(found, models, strict=True):
        torch.testing.assert_close(outputs, model(TOKENS), rtol=1e-9, atol=1e-12)


@FORWARD_MODE
def test_second_derivatives():
    """A Hessian over an adapter is the derivative of its gradient: checked by a central difference."""
    model = net({"out": peftkit.LoRA(rank=1)})
    values = learned(model)
    name = "out.adapters.a.weight.up"

    def loss(up):
        return loss_of(model, {**values, name: up}, TOKENS, LABELS)

    found = hessian(loss)(values[name])
    step = torch.zeros_like(values[name])
    step[1, 0] = 1e-5
    column = (grad(loss)(values[name] + step) - grad(loss)(values[name] - step)) / 2e-5
    torch.testing.assert_close(found[:, :, 1, 0], column, rtol=1e-6, atol=1e-8)


def test_large_weights():
    """Where the generic path would make weights again for backward, transforms find them whole."""
    model = net({"conv": Stretch(), "out": peftkit.LoRA(rank=2)}, width=256)
    assert model.conv.weight.numel() * model.conv.weight.element_size() > 1_000_000
    each = grad(lambda values, tokens, labels: loss_of(model, values, tokens[None], labels[None]))
    found = vmap(each, in_dims=(None, 0, 0))(learned(model), TOKENS[:2], LABELS[:2])
    loss_of(model, {}, TOKENS[:2], LABELS[:2]).backward()
    mean = {name: g.mean(0) for name, g in found.items()}
    assert_close(mean, {name: p.grad for name, p in model.named_parameters() if p.requires_grad})


# -------------------------------------------------------------------------------------------- meta device


def on_meta(rules=None):
    with torch.device("meta"):
        model = Net().double()
        return model if rules is None else peftkit.wrap(model, rules, name="a")


@pytest.fixture(params=METHODS.values(), ids=list(METHODS))
def ordinary(request):
    """The rules, a model that was wrapped by them in the ordinary way, and its base's state."""
    torch.manual_seed(0)
    state = {key: t.clone() for key, t in Net().double().state_dict().items()}
    return request.param, net(request.param), state


def test_wrapped_on_meta_then_given_values(ordinary):
    """Build, wrap, `to_empty`, load the base strictly, then the adapter's values: the ordinary model, bit for bit."""
    rules, expected, state = ordinary
    model = on_meta(rules)
    assert all(p.is_meta for p in model.parameters())
    assert {hazard.kind for hazard in distributed.check(model)} == {"no values"}
    model.to_empty(device="cpu")
    model.load_state_dict(state)
    peftkit.load_state_dict(model, peftkit.state_dict(expected))
    assert torch.equal(model(TOKENS), expected(TOKENS))
    assert distributed.check(model) == ()
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in expected.parameters()]


def test_built_on_meta_then_loaded(ordinary, tmp_path):
    """Build, `to_empty`, load the base, load the file: the ordinary model, bit for bit."""
    _, expected, state = ordinary
    peftkit.save(expected, tmp_path / "a")
    model = on_meta().to_empty(device="cpu")
    model.load_state_dict(state)
    peftkit.load(model, tmp_path / "a", methods=[Stretch])
    assert torch.equal(model(TOKENS), expected(TOKENS))


@pytest.mark.parametrize("assign", [False, True])
def test_a_fresh_start_after_to_empty(ordinary, assign):
    """`reset_parameters` draws what `wrap` draws: from the same seed the same, starts that are taken from the base too."""
    rules, _, state = ordinary
    torch.manual_seed(5)
    expected = Net().double()
    expected.load_state_dict(state)
    torch.manual_seed(6)
    peftkit.wrap(expected, rules, name="a")
    model = on_meta(rules)
    if not assign:
        model.to_empty(device="cpu")
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(torch.nan)
    model.load_state_dict(state, assign=assign)
    torch.manual_seed(6)
    distributed.reset_parameters(model)
    found, wanted = peftkit.state_dict(model), peftkit.state_dict(expected)
    assert found.keys() == wanted.keys()
    for key, t in wanted.items():
        assert torch.equal(found[key], t), key
    assert torch.equal(model(TOKENS), expected(TOKENS))


def test_what_nobody_has_reset_is_not_a_number(ordinary):
    """Memory without values is NaN in adapters, and so is the output: nobody trains from garbage unawares."""
    rules, _, state = ordinary
    model = on_meta(rules)
    model.to_empty(device="cpu")
    model.load_state_dict(state)
    adapters = [p for name, p in model.named_parameters() if ".adapters." in name]
    assert adapters
    assert all(p.isnan().all() for p in adapters)
    assert model(TOKENS).isnan().any()


def test_without_values_nothing_is_computed(tmp_path):
    """On the meta device there is nothing to reset, nothing to save, and no output."""
    model = on_meta({("embed", "out"): peftkit.LoRA(rank=2)})
    with pytest.raises(errors.StateError, match="to_empty"):
        distributed.reset_parameters(model)
    with pytest.raises(errors.FileError, match="meta"):
        peftkit.save(model, tmp_path / "a")
    assert model(TOKENS.to("meta")).is_meta
