"""Whatever happens inside an operation, the model is either as it was or as it should be, never in between.

A tracing function raises at the k-th line that peftkit executes: for every k of a short operation, and of a long one for
some 400 spread over it and each of the last 150, among which the model is changed.
"""

import copy
import gc
import linecache
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn

import peftkit

HERE = str(Path(peftkit.__file__).parent)


class Planted(KeyboardInterrupt):
    """No Exception: nothing may swallow it."""


class Reader(nn.Module):
    """Reads its child's weight itself, so that wrapping swaps its class too."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)

    def forward(self, x):
        return self.norm(x @ self.proj.weight.mT)


def make_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), Reader(), nn.Linear(6, 6), nn.Linear(6, 2)).eval()
    model[2].weight.requires_grad_(False)
    return model


RULES = {
    "{0,2}": peftkit.LoRA(rank=2),
    "**.proj": peftkit.LoRA(rank=1),
    "3": peftkit.Full(keep_base=True),
    "**.norm": "full",
}


@dataclass(frozen=True)
class Common(peftkit.Method):
    """Has all that is optional: state that sites share, steps to follow, a start from data."""

    name: ClassVar[str] = "atomicity-common"

    def shared(self, sites):
        return nn.Linear(2, 2)

    def observer(self, site):
        return Inputs()

    def after_step(self, adapters, shared):
        pass

    def adapter(self, site, shared=None):
        adapter = peftkit.LoRA(rank=2).adapter(site)
        adapter.common = shared
        return adapter


class Inputs(peftkit.Observer):
    def inputs(self, x):
        self.x = x

    def gradient(self, g):
        self.g = g


def in_a_model():
    model = nn.Module()
    model.inside = make_model()
    model.forward = model.inside.forward
    return model


def from_data(model, _):
    return peftkit.wrap(model, Common(), targets="{0,2}", data=[lambda model: model(torch.ones(2, 6)).sum()])


def wrapped():
    torch.manual_seed(1)
    model = peftkit.wrap(make_model(), RULES, name="a")
    return peftkit.wrap(model, "lora", targets="0", init="gaussian", name="b")


def merged():
    return peftkit.merge(wrapped())


def two():
    model = make_model()
    for name in ("a", "b"):
        peftkit.wrap(model, "lora", targets="{0,2}", init="gaussian", rank=2, name=name)
    return model


def idle():
    model = two()
    peftkit.activate(model)
    return model


def hooks_of(module):
    """What torch calls at a forward, a backward, and when a state is taken or loaded."""
    return [module.__dict__[name] for name in sorted(module.__dict__) if name.endswith("_hooks")]


def state_of(model):
    """Everything that an operation could change: classes, attributes, registers, flags, identities and values."""
    modules = [
        (path, type(m), m.training, list(m._modules), list(m._parameters), sorted(m.__dict__), *map(list, hooks_of(m)))
        for path, m in model.named_modules()
    ]
    own = [
        (name, id(p), p.requires_grad, p.detach().clone()) for name, p in model.named_parameters(remove_duplicate=False)
    ]
    running = [repr(m.__dict__.get("_peftkit_running")) for m in model.modules()]
    record = model.__dict__.get("_peftkit_installed")
    known = record and (list(record.adapters), record.active, record.merged, [(w, id(p)) for _, w, p in record.stash])
    return modules, own, running, known


def assert_same(before, after):
    for a, b in zip((before[0], before[2], before[3]), (after[0], after[2], after[3]), strict=True):
        assert a == b
    assert [entry[:3] for entry in before[1]] == [entry[:3] for entry in after[1]]
    assert all(torch.equal(a[3], b[3]) for a, b in zip(before[1], after[1], strict=True))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("adapters") / "a.safetensors"
    peftkit.save(wrapped(), path, "a")
    return path


OPERATIONS = {
    "wrap from data, with shared state": (in_a_model, from_data),
    "unwrap what has shared state": (lambda: from_data(make_model(), None), lambda model, _: peftkit.unwrap(model)),
    "wrap": (make_model, lambda model, _: peftkit.wrap(model, RULES)),
    "wrap another": (wrapped, lambda model, _: peftkit.wrap(model, "lora", targets="{0,2}", name="c")),
    "unwrap": (wrapped, lambda model, _: peftkit.unwrap(model)),
    "unwrap one": (wrapped, lambda model, _: peftkit.unwrap(model, "b")),
    "merge": (wrapped, lambda model, _: peftkit.merge(model)),
    "merge for good": (wrapped, lambda model, _: peftkit.merge(model, keep_base=False)),
    "unmerge": (merged, lambda model, _: peftkit.unmerge(model)),
    "activate": (wrapped, lambda model, _: peftkit.activate(model, "b", "a")),
    "load": (make_model, lambda model, file: peftkit.load(model, file)),
    "load another": (idle, lambda model, file: peftkit.load(model, file, name="c")),
    "combine": (two, lambda model, _: peftkit.combine(model, {"a": 0.5, "b": 2.0}, name="c")),
}


def run_until(line, operation, model, file):
    """Run an operation, and raise at the given line of peftkit's code, counted as executed. Returns how many lines ran."""
    seen = 0

    def trace(frame, event, arg):
        nonlocal seen
        if not frame.f_code.co_filename.startswith(HERE):
            return None
        # Python itself calls no `__exit__` for what is raised on a `with` line, so none is raised there.
        if event == "line" and not linecache.getline(frame.f_code.co_filename, frame.f_lineno).lstrip().startswith(
            "with "
        ):
            seen += 1
            if seen == line:
                raise Planted
        return trace

    for module in model.modules():
        if "_peftkit_layer" in module.__dict__:
            module.__dict__["_peftkit_layer"].found.clear()  # what is remembered takes no lines the second time
    gc.enable()  # a fault in the very line that puts it back leaves it off
    sys.settrace(trace)
    try:
        operation(model, file)
    finally:
        sys.settrace(None)
    return seen


@pytest.mark.parametrize(
    "name, every",
    [(name, False) for name in OPERATIONS] + [pytest.param(n, True, marks=pytest.mark.slow) for n in OPERATIONS],
)
def test_an_exception_at_any_line_leaves_the_model_untouched(name, every, file):
    """Wherever an operation fails, all through it and at each line of its end, the model is bit for bit what it was."""
    make, operation = OPERATIONS[name]
    alive = make()
    operation(alive, file)  # what is found out once and remembered takes no lines the second time
    lines = run_until(-1, operation, make(), file)
    assert lines > 50
    model = make()
    before = state_of(model)
    step = 1 if every else max(1, lines // 400)
    for line in {*range(1, lines + 1, step), *range(max(1, lines - 150), lines + 1)}:
        try:
            reached = run_until(line, operation, model, file)
        except Planted:
            assert_same(before, state_of(model))
        else:  # it came to its end: what a fault before has made it remember took no lines this time
            assert lines - 60 < reached < line
            model = make()
            before = state_of(model)
    operation(make(), file)  # and it still works


def test_the_line_tracer_would_notice_a_half_done_operation(monkeypatch, file):
    """The planted fault: without the undo, this very check fails."""
    monkeypatch.setattr(peftkit.installed._Snapshot, "restore", lambda self: None)
    make, operation = OPERATIONS["wrap"]
    lines = run_until(-1, operation, make(), file)
    differing = 0
    for line in range(lines - 200, lines, 5):
        model = make()
        before = state_of(model)
        with pytest.raises(Planted):
            run_until(line, operation, model, file)
        try:
            assert_same(before, state_of(model))
        except (AssertionError, ValueError):
            differing += 1
    assert differing > 5


def test_a_failing_method_leaves_the_model_untouched():
    """A plugin that raises at its second site has changed nothing."""

    class Failing(peftkit.Method):
        name = "failing"
        made = 0

        def adapter(self, site, shared=None):
            if site.path == "2":
                raise RuntimeError("no")
            return peftkit.LoRA().adapter(site)

    model = make_model()
    before = state_of(model)
    with pytest.raises(RuntimeError, match="no"):
        peftkit.wrap(model, Failing())
    assert_same(before, state_of(model))


def test_using_restores_after_an_exception():
    """A `with` block that raises leaves the adapters active that were."""
    model = peftkit.wrap(peftkit.wrap(make_model(), "lora", name="a"), "lora", name="b")
    before = state_of(model)
    with pytest.raises(Planted), peftkit.using(model, "b"):
        raise Planted
    with pytest.raises(Planted), peftkit.disabled(model):
        raise Planted
    assert_same(before, state_of(model))


def test_the_copy_of_a_model_is_independent():
    """What happens to a deep copy does not reach the original."""
    model = wrapped()
    before = state_of(model)
    peftkit.unwrap(peftkit.unmerge(peftkit.merge(copy.deepcopy(model))), "b")
    assert_same(before, state_of(model))
