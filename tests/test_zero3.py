"""DeepSpeed's ZeRO-3, by a stand-in: it needs a machine that this suite must not ask for.

The stand-in does to parameters what ZeRO-3 does: empty outside of their own module's forward, gathered by that module's hooks
for the forward and once more when backward gets there, and empty again. As there, a module's outputs pass through a function
of autograd, which is how backward's gathering is triggered, and through which a parameter that is handed out stays readable; and
a parameter that another module's forward reads, through the module that has it, is gathered for that one as well. What the
stand-in does not do: spread anything over ranks, or overlap.
"""

import contextlib

import pytest
import torch
import torch.distributed as dist
from every_method import NAMES, first_case
from torch import nn

import peftkit
from peftkit import distributed, errors, recipe
from peftkit.testing import subject

ROWS = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


class Zero3:
    """Partitions a model's parameters, all of them on this one process."""

    def __init__(self, model):
        self.full, self.running, self.read = {}, [], {}
        self.add(model)

    def add(self, model):
        """Partition what is new."""
        for p in model.parameters():
            if p not in self.full:
                p.ds_id, p.ds_shape, p.ds_numel = len(self.full), p.shape, p.numel()
                self.full[p] = p.data
        for module in model.modules():
            if not isinstance(module._parameters, _Parameters):
                module.__dict__["_parameters"] = _Parameters(self, module._parameters)
                module.register_forward_pre_hook(self._enter)
                module.register_forward_hook(self._leave)
        self.empty()

    def empty(self, parameters=None):
        for p in self.full if parameters is None else parameters:
            p.data = torch.empty(0, dtype=p.dtype)

    @contextlib.contextmanager
    def gathered(self):
        """As deepspeed.zero.GatheredParameters: whole inside, and what was written is kept."""
        for p, data in self.full.items():
            p.data = data
        yield
        self.full = {p: p.data for p in self.full}
        self.empty()

    def _of(self, module):
        return [*(p for p in module._parameters.values() if p is not None), *self.read.get(module, ())]

    def _gather(self, module):
        for p in self._of(module):
            p.data = self.full[p]

    def _enter(self, module, _):
        self.running.append(module)
        self._gather(module)

    def _leave(self, module, _, output):
        self.running.pop()

        class Reached(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x.detach()

            @staticmethod
            def backward(ctx, grad):
                self._gather(module)
                return grad

        def mark(value):
            if isinstance(value, dict):  # in place, for it may be a class of the model's own
                for key, each in value.items():
                    value[key] = mark(each)
                return value
            if isinstance(value, (tuple, list)):
                return type(value)(map(mark, value))
            return Reached.apply(value) if torch.is_tensor(value) else value

        output = mark(output)
        needed = {p for outer in self.running for p in self._of(outer)}
        self.empty(p for p in self._of(module) if p not in needed)
        return output


class _Parameters(dict):
    """A module's parameters, of which one that is read by another module's forward is gathered for that module."""

    def __init__(self, zero, parameters):
        super().__init__(parameters)
        self.zero = zero

    def __getitem__(self, name):
        p, zero = super().__getitem__(name), self.zero
        if p is not None and zero.running and p.shape != p.ds_shape:
            zero.read.setdefault(zero.running[-1], set()).add(p)
            p.data = zero.full[p]
        return p


def gradients(model, call, zero=None):
    model.zero_grad()
    loss = call(model)
    loss.backward()
    if zero is not None:
        zero.empty()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found, expected):
    torch.testing.assert_close(found[0], expected[0])
    assert found[1].keys() == expected[1].keys()
    assert found[1]
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, msg=name)


def make(names, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3))
    for name in names:
        model = peftkit.wrap(model, peftkit.LoRA(rank=2, **options), name=name, targets=nn.Linear)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and ".adapters." in name:
                p.normal_()
    return model


def loss_of(model):
    return model(ROWS).square().mean()


def test_the_stand_in_is_strict():
    """A weight that is read from outside of its module is empty: without this the tests below would say nothing."""
    model = nn.Sequential(nn.Linear(8, 8))
    Zero3(model)
    assert model[0].weight.shape == (0,)
    assert model(ROWS).shape == (4, 8)
    assert model[0].weight.shape == (0,)
    with pytest.raises(RuntimeError):
        ROWS @ model[0].weight


@pytest.mark.parametrize("options", [{}, {"init": "pissa"}, {"dropout": 0.5}], ids=str)
@pytest.mark.parametrize("names", [("a",), ("a", "b")], ids=len)
def test_lora_trains_as_without(options, names):
    """One adapter and two, on the fast path: the same loss and gradients."""
    expected, model = make(names, **options), make(names, **options)
    zero = Zero3(model)
    torch.manual_seed(1)
    wanted = gradients(expected, loss_of)
    torch.manual_seed(1)
    assert_same(gradients(model, loss_of, zero), wanted)


@pytest.mark.parametrize("name", NAMES)
def test_every_method_trains_as_without(name):
    """Each installed method, on the first of the kit's models that it does not decline."""
    method, case = first_case(name)
    expected, model = (subject.wrapped(method, case, training=True) for _ in range(2))
    zero = Zero3(model)

    def call(model):
        torch.manual_seed(1)
        return subject.loss_of(subject.call(model, subject.example(case)))

    assert_same(gradients(model, call, zero), gradients(expected, call))


def test_weights_that_are_made_again(monkeypatch):
    """The generic path makes adapted weights again in backward: from what is there then, not from what is empty."""
    monkeypatch.setattr(recipe, "SMALLEST", 0)
    expected, model = (peftkit.wrap(make(()), peftkit.Full(keep_base=True), name="a") for _ in range(2))
    zero = Zero3(model)
    assert_same(gradients(model, loss_of, zero), gradients(expected, loss_of))


def test_wrapping_what_is_partitioned_already():
    """As under deepspeed.zero.Init: sizes are taken from the layers' features."""
    expected, model = make(("a",)), make(())
    zero = Zero3(model)
    peftkit.wrap(model, peftkit.LoRA(rank=2), name="a", targets=nn.Linear)
    peftkit.load_state_dict(model, peftkit.state_dict(expected))
    zero.add(model)
    assert_same(gradients(model, loss_of, zero), gradients(expected, loss_of))


def test_save_needs_the_values(tmp_path):
    """Empty parameters are no adapter: refused with what to do; gathered, they are saved."""
    model = make(("a",))
    expected = {key: t.clone() for key, t in peftkit.state_dict(model).items()}
    zero = Zero3(model)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(errors.FileError, match="GatheredParameters"):
            peftkit.save(model, tmp_path / "a")
        with zero.gathered():
            peftkit.save(model, tmp_path / "a")
    finally:
        dist.destroy_process_group()
    loaded = peftkit.load(make(()), tmp_path / "a")
    for key, t in peftkit.state_dict(loaded).items():
        assert torch.equal(t, expected[key])


def test_wrapping_after_the_engine_is_named():
    """What is added later is partitioned by nobody and reduced by nobody."""
    model = make(("a",))
    zero = Zero3(model)
    assert distributed.check(model) == ()
    with zero.gathered():
        peftkit.wrap(model, "lora", name="late", targets=nn.Linear)
    assert [(hazard.kind, hazard.adapter) for hazard in distributed.check(model)] == [("not reduced", "late")]
