"""LoRA-FA: the kit, one factor that never moves, and a backward that keeps no input."""

import copy
import doctest
import math
import sys

import pytest
import torch
from torch import nn

import peftkit
from peftkit.testing import CASES, parametrize_with_checks
from peftkit_adalora.lora_fa import LoRAFA

SOME = [case for case in CASES if case.name in ("Linear", "Embedding", "LSTM")]


@parametrize_with_checks([LoRAFA(rank=2)], cases=SOME)
def test_kit(check):
    """It keeps what peftkit promises; LoRA's own adapters have been tried on the other layer kinds."""
    check()


def kept_for_backward(method, tokens=64):
    """The bytes of activations that two adapted linear layers keep, and whether any input of theirs is among them."""
    torch.manual_seed(0)
    model = peftkit.wrap(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)), method, targets="*")
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    inputs, kept = set(), {}
    handles = [
        layer.register_forward_pre_hook(lambda _, args: inputs.add(args[0].untyped_storage().data_ptr()))
        for layer in model
    ]
    x = torch.randn(tokens, 32, requires_grad=True)

    def keep(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = model(x)
    for handle in handles:
        handle.remove()
    y.sum().backward()
    assert len(inputs) == 2
    return sum(kept.values()), bool(inputs & set(kept))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_backward_keeps_no_input(dropout):
    """It keeps `x @ down.T` of each layer, `rank` numbers a token, and not the layers' inputs, which LoRA keeps."""
    number, whole = kept_for_backward(LoRAFA(rank=2, dropout=dropout))
    assert not whole
    if not dropout:  # whose mask is as large as the input, and is kept as the input would be
        assert number == 2 * 64 * 2 * 4
        number, whole = kept_for_backward(peftkit.LoRA(rank=2))
        assert whole
        assert number == 2 * 64 * (32 + 2) * 4


class Net(nn.Module):
    """Layers with a fast path, and one without it."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.conv = nn.Conv1d(8, 6, 3)
        self.lstm = nn.LSTM(6, 5, batch_first=True)
        self.linear = nn.Linear(5, 4)

    def forward(self, tokens):
        return self.linear(self.lstm(self.conv(self.embed(tokens).mT).mT)[0])


@pytest.mark.parametrize("init", ["default", "gaussian", "orthogonal", "pissa", "olora"])
def test_one_factor_never_moves(init):
    """Trained with weight decay, switched off and on again, the frozen factor keeps every bit; the other one learns."""
    torch.manual_seed(0)
    model = peftkit.wrap(Net(), LoRAFA(rank=2, init=init), targets="*")
    frozen = {"embed.adapters.default.weight.up" if init == "default" else "embed.adapters.default.weight.down"}
    frozen |= {n for n, _ in model.named_parameters() if n.endswith(".down") and not n.startswith("embed.")}
    parameters = {name: p for name, p in model.named_parameters() if ".adapters." in name}
    assert len(frozen) == 5
    before = {name: p.detach().clone() for name, p in parameters.items()}
    peftkit.set_trainable(model)
    peftkit.set_trainable(model, "default")
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(parameters) - frozen
    optimizer = torch.optim.AdamW(peftkit.param_groups(model, lr=0.1), weight_decay=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        (model(torch.randint(9, (3, 6))) - 1).square().mean().backward()
        optimizer.step()
    assert {name for name, p in parameters.items() if torch.equal(p, before[name])} == frozen


def test_it_is_lora_otherwise():
    """With LoRA's numbers it computes LoRA's output, and LoRA's gradient of the factor that it trains."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 5)).double()
    fa, lora = (peftkit.wrap(copy.deepcopy(base), each(rank=2), targets="*") for each in (LoRAFA, peftkit.LoRA))
    state = {name: torch.randn_like(t) for name, t in peftkit.state_dict(lora).items()}
    x = torch.randn(4, 6).double()
    for model in (fa, lora):
        peftkit.load_state_dict(model, state)
        model(x).square().sum().backward()
    assert torch.equal(fa(x), lora(x))
    (ours, theirs) = (model[0].adapters["default"]["weight"] for model in (fa, lora))
    assert torch.equal(ours.up.grad, theirs.up.grad)
    assert ours.down.grad is None
    assert theirs.down.grad is not None


def test_half_the_parameters_train():
    """What trains is one factor; the file has both."""
    model = peftkit.wrap(nn.Sequential(nn.Linear(6, 5)), LoRAFA(rank=2), targets="*")
    row = peftkit.summary(model).adapters[0]
    assert (row.trainable, row.parameters) == (10, 22)
    assert sorted(peftkit.state_dict(model)) == ["0.weight.down", "0.weight.up"]


@pytest.mark.parametrize(
    "field, value", [("rank", 0), ("alpha", math.nan), ("dropout", 1.0), ("init", None), ("rank_stabilized", 1)]
)
def test_fields(field, value):
    """A wrong value is refused by name."""
    with pytest.raises(peftkit.errors.FieldError, match=f"lora_fa: {field} must be"):
        LoRAFA(**{field: value})


def test_docstrings():
    """The examples in the docstrings are true."""
    found = doctest.testmod(sys.modules[LoRAFA.__module__])
    assert found.attempted > 0
    assert found.failed == 0
