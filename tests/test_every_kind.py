"""Any sequence of operations on layers of every kind: the output is the definition's, and the base never moves.

The reference is a plain float64 copy of the model, run by `torch.func.functional_call` with weights that this file computes
itself: its own matrix view of every layer type, its own formulas, `W' = f2(f1(W))` in the order of activation.
"""

import copy
import pickle
import tempfile
from dataclasses import dataclass
from typing import ClassVar

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import nn

import peftkit
from peftkit import errors

Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
NAMES = ("a", "b", "c")
ROWS = 3


@dataclass(frozen=True)
class Scaled(peftkit.Method):
    """Rows times learned factors: a method that defines only `weight`."""

    name: ClassVar[str] = "every-kind-scaled"
    vectors: ClassVar[bool] = True

    def adapter(self, site, shared=None):
        return _Scaled(site)


class _Scaled(peftkit.Adapter):
    def __init__(self, site):
        super().__init__(site)
        self.scale = site.parameter(torch.ones(site.fan_out, 1))

    def weight(self, w):
        return w * self.scale


class Stack(nn.Module):
    """A stack of matrices in one parameter, as fused experts are, transposed or not."""

    def __init__(self, is_transposed):
        super().__init__()
        self.is_transposed = is_transposed
        self.stack = nn.Parameter(torch.randn(2, *((4, 3) if is_transposed else (3, 4))))

    def forward(self, x):
        w = self.stack if self.is_transposed else self.stack.mT
        return x @ w[0] + x @ w[1]


def _conv(d, *, transposed=False):
    kind = getattr(nn, f"Conv{'Transpose' if transposed else ''}{d}d")
    return lambda: kind(4, 6, 2, stride=2, padding=1, dilation=1, groups=2)


def _x(*shape):
    return lambda: (torch.randn(ROWS, *shape, dtype=torch.float64),)


def _ids():
    return (torch.randint(0, 5, (ROWS, 2)),)


KINDS = {
    "Linear": (lambda: nn.Linear(4, 3), _x(2, 4)),
    "Conv1D": (lambda: Conv1D(3, 4), _x(2, 4)),
    "Bilinear": (lambda: nn.Bilinear(3, 2, 4), lambda: _x(3)() + _x(2)()),
    **{f"Conv{d}d": (_conv(d), _x(4, *[3] * d)) for d in (1, 2, 3)},
    **{f"ConvTranspose{d}d": (_conv(d, transposed=True), _x(4, *[3] * d)) for d in (1, 2, 3)},
    "Embedding": (lambda: nn.Embedding(5, 3), _ids),
    "EmbeddingBag": (lambda: nn.EmbeddingBag(5, 3, mode="mean"), _ids),
    "MultiheadAttention": (lambda: nn.MultiheadAttention(4, 2, batch_first=True), lambda: _x(2, 4)() * 3),
    "separate attention": (lambda: nn.MultiheadAttention(4, 2, kdim=3, vdim=2, batch_first=True), lambda: _x(2, 4)() + _x(2, 3)() + _x(2, 2)()),
    **{name: (lambda name=name: getattr(nn, name)(3, 2, bidirectional=True, batch_first=True), _x(2, 3)) for name in ("LSTM", "GRU", "RNN")},
    "projected LSTM": (lambda: nn.LSTM(3, 4, proj_size=2, batch_first=True), _x(2, 3)),
    **{f"{name}Cell": (lambda name=name: getattr(nn, f"{name}Cell")(3, 2), _x(3)) for name in ("LSTM", "GRU", "RNN")},
    "LayerNorm": (lambda: nn.LayerNorm(4), _x(2, 4)),
    "stack": (lambda: Stack(is_transposed=False), _x(4)),
    "transposed stack": (lambda: Stack(is_transposed=True), _x(4)),
}  # fmt: skip


class Net(nn.Module):
    """Layers side by side, each with inputs of its own."""

    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, inputs):
        outputs = [layer(*args) for layer, args in zip(self.layers, inputs, strict=True)]
        return torch.cat([(y[0] if isinstance(y, tuple) else y).flatten() for y in outputs])


# -------------------------------------------------------------- matrices, as this file sees them, one entry at a time


def to_matrix(layer, w):
    if w.dim() == 1:
        return w[:, None]
    if isinstance(layer, (Conv1D, nn.Embedding, nn.EmbeddingBag)):
        return w.T
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        per = layer.out_channels // layer.groups
        inputs = layer.in_channels // layer.groups
        return torch.stack(
            [w[o // per * inputs : (o // per + 1) * inputs, o % per].flatten() for o in range(layer.out_channels)]
        )
    if isinstance(layer, (nn.modules.conv._ConvNd, nn.Bilinear)):
        return w.flatten(1)
    if isinstance(layer, Stack):
        return w.mT if layer.is_transposed else w
    return w


def from_matrix(layer, m, like):
    if like.dim() == 1:
        return m[:, 0]
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        w = torch.empty_like(like, dtype=m.dtype)
        per, inputs = layer.out_channels // layer.groups, layer.in_channels // layer.groups
        for o in range(layer.out_channels):
            w[o // per * inputs : (o // per + 1) * inputs, o % per] = m[o].reshape(inputs, *layer.kernel_size)
        return w
    if isinstance(layer, (Conv1D, nn.Embedding, nn.EmbeddingBag)):
        return m.T
    if isinstance(layer, Stack):
        return m.mT if layer.is_transposed else m
    return m.reshape(like.shape)


def weights_of(layer):
    """The weights that a matrix method adapts, of a layer as a whole."""
    names = [n for n, p in layer.named_parameters(recurse=False) if p.dim() >= 2]
    return names or [n for n, p in layer.named_parameters(recurse=False) if n == "weight"]


def applied(method, own, m):
    if isinstance(method, Scaled):
        return m * own["scale"]
    if isinstance(method, peftkit.Full):
        return own["value"].reshape(m.shape)
    delta = own["up"] @ own["down"]
    if "start_up" in own:
        delta = delta - own["start_up"] @ own["start_down"]
    return m + method.alpha / method.rank * delta


class EveryKind(RuleBasedStateMachine):
    """One model of random kinds, and what every adapter on it is."""

    @initialize(kinds=st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=2), data=st.data())
    def build(self, kinds, data):
        torch.manual_seed(data.draw(st.integers(0, 999)))
        self.net = Net([KINDS[kind][0]() for kind in kinds]).double().eval().requires_grad_(False)
        for p in self.net.parameters():
            p.copy_(torch.randn_like(p) * 0.5)
        self.inputs = [KINDS[kind][1]() for kind in kinds]
        self.plain = copy.deepcopy(self.net)
        self.before = self.shape_of(self.net)
        self.methods, self.active, self.merged = {}, (), ()
        self.wrap(data)

    @staticmethod
    def shape_of(net):
        return [(path, type(m), list(m._modules), sorted(m.__dict__)) for path, m in net.named_modules()]

    def output(self):
        with torch.no_grad():
            return self.net(self.inputs)

    def expected(self, names):
        """By the definition, on the plain copy."""
        tensors = {}
        for path, layer in self.plain.named_modules():
            for weight, p in layer.named_parameters(recurse=False):
                m = to_matrix(layer, p.detach())
                for name in names:
                    method = self.methods[name].get(f"{path}.{weight}")
                    if method is not None:
                        adapter = self.net.get_submodule(path).adapters[name][weight]
                        m = applied(method, {k: t.detach() for k, t in adapter.state_dict().items()}, m)
                tensors[f"{path}.{weight}"] = from_matrix(layer, m, p)
        with torch.no_grad():
            return torch.func.functional_call(self.plain, tensors, (self.inputs,))

    @invariant()
    def the_output_is_the_definition(self):
        torch.testing.assert_close(self.output(), self.expected(self.active), rtol=1e-9, atol=1e-9)

    @invariant()
    def the_base_has_not_moved(self):
        if not self.merged:
            own = {n: p for n, p in self.net.named_parameters() if ".adapters." not in n}
            assert all(torch.equal(own[n], p) for n, p in self.plain.named_parameters())
        if not self.methods:
            assert self.shape_of(self.net) == self.before

    @precondition(lambda self: len(self.methods) < len(NAMES) and not self.merged)
    @rule(data=st.data())
    def wrap(self, data):
        """A new adapter, of one method a layer, changes no output."""
        name = next(n for n in NAMES if n not in self.methods)
        rules, methods = {}, {}
        for i, layer in enumerate(self.plain.layers):
            choice = data.draw(st.sampled_from(["lora", "scaled", "full", "frozen"]))
            vector = isinstance(layer, nn.LayerNorm)
            method = {
                "lora": peftkit.LoRA(rank=2, alpha=3.0, init=data.draw(st.sampled_from(["default", "gaussian", "orthogonal"]))),
                "scaled": Scaled(), "full": peftkit.Full(keep_base=True), "frozen": peftkit.Frozen(),
            }["scaled" if vector and choice == "lora" else choice]  # fmt: skip
            paths = [f"layers.{i}.{w}" for w in weights_of(layer)]
            if choice == "frozen":
                rules[f"layers.{i}"] = method
            elif choice == "full":
                rules[f"layers.{i}"] = method
                paths = [f"layers.{i}.{n}" for n, _ in layer.named_parameters()]
            else:
                rules[tuple(paths)] = method
            methods |= {path: method for path in paths if choice != "frozen"}
        before = self.output()
        peftkit.wrap(self.net, rules, name=name)
        # A copy of the base's weight replaces what an adapter before it has made of it; all else starts as the identity.
        if not self.active:
            assert torch.equal(self.output(), before)
        elif not any(isinstance(method, peftkit.Full) for method in methods.values()):
            torch.testing.assert_close(self.output(), before, rtol=1e-12, atol=1e-12)
        self.methods[name], self.active = methods, (*self.active, name)

    @precondition(lambda self: self.methods and not self.merged)
    @rule(data=st.data())
    def unwrap_one(self, data):
        """One adapter is deleted."""
        name = data.draw(st.sampled_from(sorted(self.methods)))
        peftkit.unwrap(self.net, name)
        del self.methods[name]
        self.active = tuple(n for n in self.active if n != name)

    @precondition(lambda self: self.methods and not self.merged)
    @rule(names=st.permutations(NAMES), count=st.integers(0, 3))
    def activate(self, names, count):
        """Other adapters run, in another order; disabled, the base does, bit for bit."""
        self.active = tuple(n for n in names if n in self.methods)[:count]
        peftkit.activate(self.net, *self.active)
        with peftkit.disabled(self.net):
            assert torch.equal(self.output(), self.plain(self.inputs))

    @precondition(lambda self: self.active and not self.merged)
    @rule(seed=st.integers(0, 999))
    def train_step(self, seed):
        """A step of SGD on what runs; gradients are those of the definition's parameters."""
        torch.manual_seed(seed)
        loss = (self.net(self.inputs) * torch.randn(())).square().mean()
        if loss.requires_grad:
            loss.backward()
            nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
            torch.optim.SGD(peftkit.param_groups(self.net, lr=0.3)).step()
            self.net.zero_grad()

    @precondition(lambda self: self.active and not self.merged)
    @rule()
    def merge(self):
        """All that runs becomes new weights; a second merge is refused."""
        if any(self.methods[name] for name in self.active):
            peftkit.merge(self.net)
            self.merged = self.active
            with pytest.raises(errors.StateError):
                peftkit.merge(self.net)

    @precondition(lambda self: self.merged)
    @rule()
    def unmerge(self):
        """And goes back."""
        peftkit.unmerge(self.net)
        self.merged = ()

    @precondition(lambda self: any(self.methods.values()))
    @rule(data=st.data())
    def save_and_load(self, data):
        """A file restores an adapter onto a fresh base, tensor for tensor and output for output."""
        name = data.draw(st.sampled_from(sorted(n for n, m in self.methods.items() if m)))
        with tempfile.TemporaryDirectory() as folder:
            peftkit.save(self.net, f"{folder}/x", name)
            other = peftkit.load(copy.deepcopy(self.plain), f"{folder}/x", methods=[Scaled])
        saved, loaded = peftkit.state_dict(self.net, name), peftkit.state_dict(other, name)
        assert saved.keys() == loaded.keys()
        assert all(torch.equal(saved[k], loaded[k]) for k in saved)
        with torch.no_grad():
            torch.testing.assert_close(other(self.inputs), self.expected((name,)), rtol=1e-9, atol=1e-9)

    @precondition(lambda self: self.methods)
    @rule(how=st.sampled_from(["deepcopy", "pickle"]))
    def copy(self, how):
        """The sequence goes on with a copy."""
        self.net = copy.deepcopy(self.net) if how == "deepcopy" else pickle.loads(pickle.dumps(self.net))

    @precondition(lambda self: self.methods)
    @rule()
    def cast(self):
        """Cast to float32 and back: base, originals and adapters are rounded alike, merged or not."""
        if not self.merged:  # a merged weight is rounded after it was merged, which no definition describes
            self.net.float().double()
            self.plain.float().double()

    @precondition(lambda self: not self.merged)
    @rule(names=st.lists(st.sampled_from([*NAMES, None]), min_size=ROWS, max_size=ROWS))
    def routed(self, names):
        """Each sample with its own adapter equals the sample alone, or the layer is refused by name."""
        names = [n if n in self.methods else None for n in names]
        single = Net([self.net.layers[0]])
        if "_peftkit_installed" not in self.net.__dict__ or len(self.net.layers) > 1:
            return
        rows = []
        for i, name in enumerate(names):
            with peftkit.using(self.net, *([name] if name else [])), torch.no_grad():
                rows.append(single([tuple(x[i : i + 1] for x in self.inputs[0])]))
        try:
            with peftkit.routed(self.net, names), torch.no_grad():
                y = self.net(self.inputs)
        except errors.UnsupportedLayerError:
            return  # by name: what is refused, and how, is tests/test_routed.py's
        torch.testing.assert_close(y, torch.cat(rows), rtol=1e-9, atol=1e-9)


TestEveryKind = EveryKind.TestCase
TestEveryKind.settings = settings(
    max_examples=2000, stateful_step_count=7, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)  # fmt: skip
