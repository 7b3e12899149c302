"""What an operation costs grows with the number of layers, and with nothing else: counted, not timed.

A count of executed lines or of calls is the same on every machine, busy or not. Lines show a loop in Python wherever
it runs, in torch too.
"""

import cProfile
import sys

import pytest
import torch
from torch import nn

import peftkit

LORA = peftkit.LoRA(rank=1)


def make_model(layers, device="cpu"):
    torch.manual_seed(0)
    with torch.device(device):
        return nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(layers)))


def lines(operation, *args):
    """How many lines of Python an operation executes."""
    count = 0

    def trace(frame, event, arg):
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        operation(*args)
    finally:
        sys.settrace(before)
    return count


def calls(operation, *args):
    """How many functions an operation calls, in Python and in C."""
    profile = cProfile.Profile()
    profile.runcall(operation, *args)
    return sum(entry.callcount for entry in profile.getstats())


def adapted(layers, file, *names):
    """A wrapped model, with its adapter in a file too, and with that file's adapter under further names."""
    model = peftkit.wrap(make_model(layers), LORA, targets="**")
    peftkit.save(model, file)
    for name in names:
        peftkit.load(model, file, name)
    return model


def merged(layers, file):
    return peftkit.merge(adapted(layers, file))


OPERATIONS = {
    "plan": (lambda n, _: make_model(n), lambda model, _: peftkit.plan(model).rows),
    "wrap": (lambda n, _: make_model(n), lambda model, _: peftkit.wrap(model)),
    "wrap with a rule each": (
        lambda n, _: make_model(n),
        lambda model, _: peftkit.wrap(model, {"0": "full", "*.weight": peftkit.Full(keep_base=True)}),
    ),
    "wrap another": (adapted, lambda model, _: peftkit.wrap(model, LORA, targets="**", name="b")),
    "save": (adapted, lambda model, file: peftkit.save(model, file)),
    "load": (lambda n, file: adapted(n, file) and make_model(n), lambda model, file: peftkit.load(model, file)),
    "load another": (adapted, lambda model, file: peftkit.load(model, file, "b")),
    "activate": (lambda n, file: adapted(n, file, "b"), lambda model, _: peftkit.activate(model, "b")),
    "set_trainable": (adapted, lambda model, _: peftkit.set_trainable(model, "default")),
    "param_groups": (adapted, lambda model, _: peftkit.param_groups(model, lr=1e-3)),
    "summary": (adapted, lambda model, _: peftkit.summary(model)),
    "state_dict": (adapted, lambda model, _: peftkit.load_state_dict(model, peftkit.state_dict(model))),
    "merge": (adapted, lambda model, _: peftkit.merge(model)),
    "merge for good": (adapted, lambda model, _: peftkit.merge(model, keep_base=False)),
    "unmerge": (merged, lambda model, _: peftkit.unmerge(model)),
    "unwrap one": (lambda n, file: adapted(n, file, "b"), lambda model, _: peftkit.unwrap(model, "b")),
    "unwrap": (adapted, lambda model, _: peftkit.unwrap(model)),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_twice_the_layers_are_twice_the_work(name, tmp_path):
    """Above a constant, an operation on 4n layers takes twice the lines of one on 2n; a walk a layer would take four."""
    make, operation = OPERATIONS[name]
    file = tmp_path / "adapter"
    operation(make(4, file), file)  # what is found out once and remembered takes no lines the second time
    few, twice, four_times = (lines(operation, make(n, file), file) for n in (24, 48, 96))

    assert twice - few > 24
    # A few lines more or less are the interpreter's own affair: a walk of n layers for each of them is thousands.
    assert four_times - twice <= 2.01 * (twice - few) + 24


ON_ONE_OF_MANY = {
    "load": lambda model, file: peftkit.load(model, file, "another"),
    "activate": lambda model, _: peftkit.activate(model, "1"),
    "merge": lambda model, _: peftkit.merge(model),
    "save": lambda model, file: peftkit.save(model, file, "1"),
    "unwrap": lambda model, _: peftkit.unwrap(model, "1"),
    "state_dict": lambda model, _: peftkit.state_dict(model, "1"),
}


@pytest.mark.parametrize("name", ON_ONE_OF_MANY)
def test_the_35th_adapter_is_as_cheap_as_the_2nd(name, tmp_path):
    """An operation on one adapter takes as many lines among 34 others as beside one, to within two in a hundred."""
    operation, file = ON_ONE_OF_MANY[name], tmp_path / "adapter"
    operation(adapted(4, file, "1"), file)
    beside_one = lines(operation, adapted(24, file, "1"), file)
    among_many = lines(operation, adapted(24, file, *map(str, range(34))), file)

    assert beside_one > 24
    assert among_many <= 1.02 * beside_one


def test_ten_thousand_layers_cost_as_much_each_as_a_hundred():
    """Wrapping a model of 10,000 layers on meta calls no more functions for each of them than wrapping one of 100."""
    peftkit.wrap(make_model(4, "meta"))
    small, large = (calls(peftkit.wrap, make_model(n, "meta")) / n for n in (100, 10_000))

    assert large <= 1.02 * small


@pytest.mark.slow
def test_ten_thousand_layers_come_back_bit_for_bit(tmp_path):
    """Saved, loaded, merged, unmerged and unwrapped, every adapter and every weight is what it was."""
    model = make_model(10_000)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    peftkit.wrap(model, LORA, targets="**")
    for tensor in peftkit.state_dict(model).values():
        tensor.uniform_(-1, 1)
    saved = {name: value.clone() for name, value in peftkit.state_dict(model).items()}
    assert len(saved) == 20_000
    peftkit.save(model, tmp_path / "adapter")
    peftkit.load(peftkit.unwrap(model), tmp_path / "adapter")

    loaded = peftkit.state_dict(model)
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[name], value) for name, value in saved.items())
    peftkit.merge(model)
    last = model[9_999]
    delta = last.adapters["default"]["weight"].scale * saved["9999.weight.up"] @ saved["9999.weight.down"]
    torch.testing.assert_close(last.weight.detach(), weights["9999.weight"] + delta)
    peftkit.unwrap(peftkit.unmerge(model))
    after = model.state_dict()
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[name], value) for name, value in weights.items())
