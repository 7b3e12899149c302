"""LoRA+: the kit, HF PEFT's groups, and a factor that moves further than the other."""

import doctest
import math
import sys

import pytest
import torch
from torch import nn

import peftkit
from peftkit.testing import CASES, parametrize_with_checks
from peftkit_adalora.lora_plus import LoRAPlus

SOME = [case for case in CASES if case.name in ("Linear", "Embedding")]


@parametrize_with_checks([LoRAPlus(rank=2)], cases=SOME)
def test_kit(check):
    """It keeps what peftkit promises; LoRA's own adapters have been tried on the other layer kinds."""
    check()


class Net(nn.Module):
    """Linear layers, a convolution, and one layer that another method trains."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(4, 6, 3)
        self.first = nn.Linear(6, 5)
        self.second = nn.Linear(5, 3, bias=False)

    def forward(self, x):
        return self.second(torch.tanh(self.first(self.conv(x).mT)))


def rates(groups, model):
    """The learning rate of each trained parameter, by its name."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: group["lr"] for group in groups for p in group["params"]}


@pytest.mark.parametrize("ratio", [1.0, 16.0, 3])
def test_groups_as_hf(ratio):
    """Each factor of each layer has the learning rate that HF PEFT's optimizer gives it, and no weight decay besides."""
    peft = pytest.importorskip("peft")
    from peft.optimizers import create_loraplus_optimizer

    model = peftkit.wrap(Net(), LoRAPlus(rank=2, ratio=ratio), targets="*")
    ours = rates(peftkit.param_groups(model, lr=0.004), model)
    theirs = peft.get_peft_model(Net(), peft.LoraConfig(r=2, target_modules=["conv", "first", "second"]))
    optimizer = create_loraplus_optimizer(theirs, torch.optim.SGD, lr=0.004, loraplus_lr_ratio=ratio)
    wanted = rates(optimizer.param_groups, theirs)
    factor = {"down": "lora_A", "up": "lora_B"}
    renamed = {}
    for name, rate in ours.items():
        path, _, tensor = name.partition(".adapters.default.weight.")
        renamed[f"base_model.model.{path}.{factor[tensor]}.default.weight"] = rate
    assert renamed == wanted
    assert len(set(wanted.values())) == (1 if ratio == 1 else 2)


def test_one_factor_moves_further():
    """A step of SGD moves `up` by `ratio` times its gradient's share, and `down` by its own."""
    torch.manual_seed(0)
    model = peftkit.wrap(Net(), LoRAPlus(rank=2, ratio=8.0), targets="*")
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_()
    optimizer = torch.optim.SGD(peftkit.param_groups(model, lr=0.01))
    model(torch.randn(2, 4, 7)).square().mean().backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    optimizer.step()
    assert len(trained) == 6
    for name, p in trained.items():
        assert p.grad.any()
        rate = 0.08 if name.endswith(".up") else 0.01
        torch.testing.assert_close(p.detach(), before[name] - rate * p.grad, rtol=1e-6, atol=1e-8)


def test_on_an_embedding_it_is_the_factor_at_the_output():
    """Also where LoRA starts with `down` at zero, `up` is the one at the output that learns faster."""
    model = peftkit.wrap(nn.Sequential(nn.Embedding(6, 4)), LoRAPlus(rank=2), targets="*")
    assert rates(peftkit.param_groups(model, lr=1.0), model) == {
        "0.adapters.default.weight.down": 1.0,
        "0.adapters.default.weight.up": 16.0,
    }


def test_other_methods_keep_their_rate():
    """In a model with several methods, the ratio is for this one's factors alone."""
    rules = {"first": LoRAPlus(rank=2), "second": peftkit.LoRA(rank=2), "conv": "full"}
    model = peftkit.wrap(Net(), rules)
    found = rates(peftkit.param_groups(model, lr=0.5), model)
    assert {name for name, rate in found.items() if rate == 8.0} == {"first.adapters.default.weight.up"}
    assert {rate for name, rate in found.items() if not name.endswith("first.adapters.default.weight.up")} == {0.5}
    assert len(found) == 6


@pytest.mark.parametrize(
    "field, value",
    [("ratio", 0), ("ratio", -2.0), ("ratio", math.inf), ("ratio", "16"), ("rank", 0), ("init", "zeros"), ("alpha", 0)],
)
def test_fields(field, value):
    """A wrong value is refused by name."""
    with pytest.raises(peftkit.errors.FieldError, match=f"lora_plus: {field} must be"):
        LoRAPlus(**{field: value})


def test_docstrings():
    """The examples in the docstrings are true."""
    found = doctest.testmod(sys.modules[LoRAPlus.__module__])
    assert found.attempted > 0
    assert found.failed == 0
