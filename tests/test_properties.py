"""Exactness under any sequence of operations, on random models: the base never moves by a bit, and everything comes back.

A hypothesis state machine wraps, activates, trains, merges, saves, copies and unwraps in random order. After every
step the output is compared with a float64 reference that knows the methods' formulas and nothing of the library. The state
that the library should be in is tracked beside it, in a few dictionaries.
"""

import copy
import dataclasses
import math
import pickle
import sys
import tempfile
import types
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import nn

import peftkit
from peftkit.errors import FileError, FormatError, SelectorError, StateError, UnknownAdapterError, UnknownMethodError

Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D

TOLERANCE = {
    # The largest difference from the float64 reference, relative to the largest value: a few layers of a few terms,
    # each rounded to 2**-53, 2**-24 or 2**-8 of itself.
    torch.float64: 1e-11,
    torch.float32: 1e-4,
    torch.bfloat16: 6e-2,
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The tensors here are so small that torch's threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# -------------------------------------------------------------------------------------------- a plugin's method


@dataclasses.dataclass(frozen=True)
class Rows(peftkit.Method):
    """Multiply every row, and where asked the bias with it, by a learned factor: a method with a weight form alone."""

    name: ClassVar[str] = "properties-rows"

    biased: bool = False

    def adapter(self, site, shared=None):
        return BiasedRowsAdapter(site) if self.biased else RowsAdapter(site)


class RowsAdapter(peftkit.Adapter):
    def __init__(self, site):
        super().__init__(site)
        self.scale = site.parameter(torch.ones(site.fan_out, 1))

    def weight(self, w):
        return w * self.scale


class BiasedRowsAdapter(RowsAdapter):
    def bias(self, b):
        return b * self.scale.squeeze(1)


PLUGIN = types.ModuleType("peftkit_properties_plugin")
PLUGIN.peftkit_methods = peftkit.hookimpl(lambda: [Rows])


@pytest.fixture(autouse=True, scope="module")
def installed(tmp_path_factory):
    """The method of this file as that of an installed package, for files name methods and never classes."""
    folder = tmp_path_factory.mktemp("site-packages")
    info = folder / "peftkit_properties-1.0.dist-info"
    info.mkdir()
    info.joinpath("METADATA").write_text("Metadata-Version: 2.1\nName: peftkit-properties\nVersion: 1.0\n")
    info.joinpath("entry_points.txt").write_text(f"[peftkit.methods]\n{Rows.name} = {PLUGIN.__name__}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, PLUGIN.__name__, PLUGIN)
        patch.syspath_prepend(folder)
        yield


# ------------------------------------------------------------------------------------------------ random models


class Net(nn.Module):
    """Branches side by side, each a chain of layers with an input of its own; the output is all of theirs."""

    def __init__(self, branches):
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, *inputs):
        return [branch(x) for branch, x in zip(self.branches, inputs, strict=True)]


SIZES = st.integers(1, 5)


@st.composite
def vector_branches(draw):
    """Linear layers and transformers' Conv1D, perhaps behind an embedding, perhaps with one layer used twice."""
    width = draw(SIZES)
    layers: list[nn.Module] = []
    if draw(st.booleans()):
        rows = draw(st.integers(2, 6))
        options = draw(st.fixed_dictionaries({"sparse": st.booleans(), "scale_grad_by_freq": st.booleans()}))
        if options["sparse"]:
            options["scale_grad_by_freq"] = False  # torch has no such gradient
        padding_idx = draw(st.none() | st.integers(0, rows - 1))
        layers.append(nn.Embedding(rows, width, padding_idx=padding_idx, **options))
        x = torch.randint(rows, draw(st.sampled_from([(3,), (2, 3)])))
    else:
        x = torch.randn(*draw(st.sampled_from([(3,), (2, 3), (1,)])), width, dtype=torch.float64)
    for _ in range(draw(st.integers(0 if layers else 1, 2))):
        out = draw(SIZES)
        if draw(st.booleans()):
            layers.append(nn.Linear(width, out, bias=draw(st.booleans())))
        else:
            layers.append(Conv1D(out, width))
            nn.init.normal_(layers[-1].weight, std=0.5)
            nn.init.normal_(layers[-1].bias, std=0.5)
        layers.append(nn.Tanh())
        if width == out and draw(st.booleans()):
            layers += layers[-2:]
        width = out
    return nn.Sequential(*layers), x


@st.composite
def image_branches(draw):
    """Convolutions with any groups, stride, dilation, padding and padding mode."""
    channels = draw(st.sampled_from([1, 2, 4]))
    x = torch.randn(2, channels, 5, 6, dtype=torch.float64)
    layers: list[nn.Module] = []
    for _ in range(draw(st.integers(1, 2))):
        groups = draw(st.sampled_from([g for g in (1, 2, 4) if channels % g == 0]))
        out = groups * draw(st.integers(1, 2))
        mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
        layers.append(
            nn.Conv2d(
                channels,
                out,
                draw(st.sampled_from([1, 2, 3, (2, 1)])),
                stride=draw(st.integers(1, 2)),
                padding=draw(st.sampled_from([1, (1, 0)])),
                dilation=draw(st.integers(1, 2)),
                groups=groups,
                bias=draw(st.booleans()),
                padding_mode=mode,
            )
        )
        layers.append(nn.Tanh())
        channels = out
        if min(nn.Sequential(*layers)(x.float()).shape[-2:]) < 5:
            break  # too small for the largest kernel, dilated
    layout = draw(st.sampled_from([torch.contiguous_format, torch.channels_last]))
    return nn.Sequential(*layers).to(memory_format=layout), x


@st.composite
def nets(draw):
    """A model in one dtype, some of its parameters frozen by its owner, and inputs for it."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    dtype = draw(st.sampled_from(list(TOLERANCE)))
    branches = [draw(vector_branches() | image_branches()) for _ in range(draw(st.integers(1, 2)))]
    net = Net([branch for branch, _ in branches]).to(dtype)
    for p in net.parameters():
        p.requires_grad_(draw(st.booleans()))
    inputs = [x.to(dtype) if x.is_floating_point() else x for _, x in branches]
    return net, inputs


def layers_of(net):
    """The layers that can be adapted, by path; one that is used twice stands under its first path."""
    return {path: module for path, module in net.named_modules() if "weight" in module._parameters}


def matrix_shape(layer):
    w = layer._parameters["weight"]
    return tuple(w.T.shape) if isinstance(layer, (Conv1D, nn.Embedding)) else (w.shape[0], math.prod(w.shape[1:]))


@st.composite
def methods_for(draw, layer):
    """A method that fits a layer, whose start is the identity."""
    choice = draw(st.sampled_from(["lora", "lora", "rows", "full"]))
    if choice == "rows":
        return Rows(biased=draw(st.booleans()))
    if choice == "full":
        return peftkit.Full(keep_base=True)
    init = draw(st.sampled_from(["default", "gaussian", "orthogonal", "pissa", "olora"]))
    limit = min(matrix_shape(layer)) if init in ("pissa", "olora") else 3
    return peftkit.LoRA(
        rank=2 if init == "orthogonal" else draw(st.integers(1, limit)),
        alpha=draw(st.sampled_from([0.5, 1.0, 3.0, -2.0])),
        init=init,
        rank_stabilized=draw(st.booleans()),
        dropout=draw(st.sampled_from([0.0, 0.0, 0.5])),
    )


# ------------------------------------------------------------------------------------------------ the reference


def reference(net, inputs, start, methods, names):
    """The output in float64, from the values at the start and the formulas of the adapters in their order."""
    outputs = []
    for i, (branch, x) in enumerate(zip(net.branches, inputs, strict=True)):
        y = x.double() if x.is_floating_point() else x
        first = {}
        for j, layer in enumerate(branch):
            path = first.setdefault(id(layer), f"branches.{i}.{j}")
            y = (
                run(layer, y, *adapted(layer, path, start, methods, names))
                if "weight" in layer._parameters
                else y.tanh()
            )
        outputs.append(y)
    return outputs


def adapted(layer, path, start, methods, names):
    raw, bias = (start.get(f"{path}.{name}") for name in ("weight", "bias"))
    transposed = isinstance(layer, (Conv1D, nn.Embedding))
    m = raw.double().T if transposed else raw.double().flatten(1)
    b = None if bias is None else bias.double()
    for name in names:
        method = methods[name].get(path)
        if method is None:
            continue
        own = {
            weight: {n: t.detach().double() for n, t in adapter.state_dict().items()}
            for weight, adapter in layer.adapters[name].items()
        }
        if isinstance(method, peftkit.Full):
            m = own["weight"]["value"]
            b = own["bias"]["value"].flatten() if b is not None else None
        elif isinstance(method, Rows):
            scale = own["weight"]["scale"]
            m = scale * m
            b = b * scale[:, 0] if method.biased and b is not None else b
        else:
            factors = own["weight"]
            delta = factors["up"] @ factors["down"]
            if "start_up" in factors:
                delta -= factors["start_up"] @ factors["start_down"]
            m = m + method.alpha / (math.sqrt(method.rank) if method.rank_stabilized else method.rank) * delta
    return (m.T if transposed else m.reshape(raw.shape)), b


def run(layer, x, w, b):
    if isinstance(layer, nn.Embedding):
        return w[x]
    if isinstance(layer, (nn.Linear, Conv1D)):
        y = x @ (w if isinstance(layer, Conv1D) else w.T)
        return y if b is None else y + b
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, [p for p in reversed(layer.padding) for _ in "<>"], mode)
    return F.conv2d(x, w, b, layer.stride, 0, layer.dilation, layer.groups)


def same(ys, zs):
    return all(torch.equal(y, z) for y, z in zip(ys, zs, strict=True))


def content(tensor):
    return tensor.dtype, tuple(tensor.shape), bytes(tensor.detach().contiguous().flatten().view(torch.uint8).tolist())


def everything(net):
    """All that an operation could change, except which objects they are: classes, attributes, flags and values."""
    return (
        [(path, type(m), m.training, sorted(m.__dict__)) for path, m in net.named_modules()],
        [(name, p.requires_grad, content(p)) for name, p in net.named_parameters()],
        [(name, content(value)) for name, value in net.state_dict().items()],
        peftkit.summary(net) if any("adapters" in m._modules for m in net.modules()) else None,
    )


# ---------------------------------------------------------------------------------------------- the state machine


NAMES = ("a", "b", "c")
SOME_NAMES = st.lists(st.sampled_from(NAMES), unique=True, max_size=3)
SEEDS = st.integers(0, 2**16)


class Operations(RuleBasedStateMachine):
    """One model and what is known of it: what every adapter is, and which are active, trainable and merged."""

    # ------------------------------------------------------------------------------------ what should be so

    @initialize(net_and_inputs=nets(), data=st.data(), seed=SEEDS)
    def build(self, net_and_inputs, data, seed):
        self.net, self.inputs = net_and_inputs
        self.fresh = copy.deepcopy(self.net)
        self.dtype = next(self.net.parameters()).dtype
        self.before = {mode: everything(self.net.train(mode)) for mode in (False, True)}
        self.start = {name: value.clone() for name, value in self.net.state_dict().items()}
        self.objects = self.net.state_dict(keep_vars=True)
        self.frozen = copy.deepcopy(self.net).requires_grad_(requires_grad=False)
        with torch.no_grad():
            self.base_output = self.frozen(*self.inputs)
        self.methods: dict[str, dict[str, Any]] = {}
        self.active: tuple[str, ...] = ()
        self.trainable: set[str] = set()
        self.merged: tuple[str, ...] = ()
        self.unknown: set[str] = set()
        self.add(data, seed)

    def output(self):
        """The output, without gradients."""
        with torch.no_grad():
            return self.net(*self.inputs)

    def dropping(self, names):
        return self.net.training and any(
            getattr(method, "dropout", 0) for name in names for method in self.methods[name].values()
        )

    def check_output(self, names):
        """These adapters are running, by the reference."""
        if self.dropping(name for name in names if name not in self.merged):
            return
        expected = reference(self.net, self.inputs, self.start, self.methods, names)
        for y, z in zip(self.output(), expected, strict=True):
            assert y.dtype == self.dtype
            assert y.shape == z.shape
            error = (y.double() - z).abs().max()
            assert error <= TOLERANCE[self.dtype] * (1 + z.abs().max()), (error, z.abs().max())

    @invariant()
    def the_output_is_the_reference_s(self):
        """What runs is the composition of the active adapters, merged or not."""
        self.check_output(self.active)

    @invariant()
    def the_base_has_not_moved(self):
        """The raw parameters are the very objects of the start, bit for bit; where merged, they are put aside."""
        merged = {path for name in self.merged for path in self.methods[name]}
        for path, layer in layers_of(self.net).items():
            for name, raw in layer._parameters.items():
                if raw is None or path in merged:
                    continue
                assert raw is self.objects[f"{path}.{name}"]
                assert getattr(layer, name) is raw
                assert torch.equal(raw, self.start[f"{path}.{name}"])
                assert raw.grad is None

    @invariant()
    def the_summary_is_true(self):
        """Active, trainable and merged are what the calls so far have made them, and nothing else requires grad."""
        if not self.methods:
            return
        found = peftkit.summary(self.net).adapters
        assert [a.name for a in found] == list(self.methods)
        assert {a.name for a in found if a.active} == set(self.active)
        assert {a.name for a in found if a.trainable} == self.trainable
        assert {a.name for a in found if a.merged} == set(self.merged)
        for name, p in self.net.named_parameters():
            owner = name.partition(".adapters.")[2].partition(".")[0]
            assert p.requires_grad == (owner in self.trainable)

    @invariant()
    def nothing_is_left_when_all_is_unwrapped(self):
        """Without adapters the model is the one of the start: classes, keys, flags, objects and values."""
        if not self.methods:
            assert everything(self.net) == self.before[self.net.training]

    # ---------------------------------------------------------------------------------- adding and removing

    @precondition(lambda self: len(self.methods) < len(NAMES) and not self.merged)
    @rule(data=st.data(), seed=SEEDS)
    def wrap(self, data, seed):
        """Wrapping changes no output, bit for bit where no other adapter is on the same layer."""
        self.add(data, seed)

    def add(self, data, seed):
        torch.manual_seed(seed)
        name = data.draw(st.sampled_from([n for n in NAMES if n not in self.methods]))
        layers = layers_of(self.net)
        paths = data.draw(st.lists(st.sampled_from(sorted(layers)), unique=True, min_size=1))
        methods = {path: data.draw(methods_for(layers[path])) for path in paths}
        rules: dict[str, Any] = dict(methods)
        left = sorted(set(layers) - set(paths))
        if left and data.draw(st.booleans()):
            rules[data.draw(st.sampled_from(left))] = "frozen"
        alone = not any(path in self.methods[other] for path in paths for other in self.active)
        comparable = alone and not self.dropping(self.active)
        before = self.output() if comparable else None
        assert peftkit.wrap(self.net, rules, name=name) is self.net
        self.methods[name] = methods
        self.active += (name,)
        self.trainable.add(name)
        if comparable and not self.dropping(self.active):
            assert same(self.output(), before)

    @precondition(lambda self: self.methods and not self.merged)
    @rule(data=st.data())
    def unwrap_one(self, data):
        """One adapter goes, the others stay as they are."""
        name = data.draw(st.sampled_from(sorted(self.methods)))
        assert peftkit.unwrap(self.net, name) is self.net
        self.forget(name)

    @precondition(lambda self: self.methods and not self.merged)
    @rule()
    def unwrap_all(self):
        """All adapters go at once."""
        peftkit.unwrap(self.net)
        for name in list(self.methods):
            self.forget(name)

    def forget(self, name):
        del self.methods[name]
        self.active = tuple(n for n in self.active if n != name)
        self.trainable.discard(name)

    # ------------------------------------------------------------------------------------------- switching

    @precondition(lambda self: self.methods and not self.merged)
    @rule(names=SOME_NAMES)
    def activate(self, names):
        """Other adapters run, in another order."""
        names = [name for name in names if name in self.methods]
        peftkit.activate(self.net, *names)
        self.active = tuple(names)

    @precondition(lambda self: self.methods and not self.merged)
    @rule(names=SOME_NAMES, fails=st.booleans())
    def using(self, names, fails):
        """Other adapters run inside the block, and the same as before after it, whatever happens inside."""
        names = [name for name in names if name in self.methods]
        comparable = not self.dropping(self.active)
        before = self.output()
        with expecting(ZeroDivisionError if fails else None), peftkit.using(self.net, *names) as net:
            assert net is self.net
            self.check_output(names)
            if fails:
                raise ZeroDivisionError
        assert not comparable or same(self.output(), before)

    @precondition(lambda self: self.methods and not self.merged)
    @rule()
    def disabled(self):
        """Inside the block the output is the base's, bit for bit."""
        with peftkit.disabled(self.net):
            assert same(self.output(), self.base_output)

    @precondition(lambda self: self.methods)
    @rule(names=SOME_NAMES)
    def set_trainable(self, names):
        """Other adapters train; what runs is not touched."""
        names = [name for name in names if name in self.methods]
        peftkit.set_trainable(self.net, *names)
        self.trainable = set(names)

    @precondition(lambda self: self.methods)
    @rule(training=st.booleans())
    def train_or_eval(self, training):
        """The mode reaches every adapter."""
        self.net.train(training)
        assert all(module.training == training for module in self.net.modules())

    # -------------------------------------------------------------------------------------------- training

    @precondition(lambda self: self.methods)
    @rule(seed=SEEDS)
    def train_step(self, seed):
        """A step of SGD moves the adapters that are active and trainable, and nothing else."""
        torch.manual_seed(seed)
        parameters = dict(self.net.named_parameters())
        before = {name: p.detach().clone() for name, p in parameters.items()}
        running = [name for name in self.active if name not in self.merged]
        learning = set(running) & self.trainable
        loss = sum(y.float().square().sum() for y in self.net(*self.inputs))
        assert loss.requires_grad == any(
            name in learning and not self.covered(path, running[i + 1 :])
            for i, name in enumerate(running)
            for path in self.methods[name]
        )
        if not loss.requires_grad:
            return
        loss.backward()
        groups = peftkit.param_groups(self.net, lr=0.01)
        nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], 1.0)
        torch.optim.SGD(groups).step()
        for name, p in parameters.items():
            owner = name.partition(".adapters.")[2].partition(".")[0]
            if owner not in learning:
                assert p.grad is None
                assert torch.equal(p, before[name])
            p.grad = None

    def covered(self, path, later):
        """Whether one of these adapters replaces the weight by a copy of its own, whatever was there before."""
        return any(isinstance(self.methods[name].get(path), peftkit.Full) for name in later)

    # ----------------------------------------------------------------------------------------------- merging

    @precondition(lambda self: self.active and not self.merged)
    @rule(first=st.booleans())
    def merge(self, first):
        """All active adapters, or the first of them, become new weights; the function stays the same."""
        name = self.active[0] if first else None
        assert peftkit.merge(self.net, name) is self.net
        self.merged = (name,) if name else self.active

    @precondition(lambda self: self.merged)
    @rule()
    def unmerge(self):
        """The originals are back: the invariants compare every bit of them."""
        assert peftkit.unmerge(self.net) is self.net
        self.merged = ()
        if self.unknown:
            # The originals of a copy that was made while merged: met here for the first time.
            current = self.net.state_dict(keep_vars=True)
            self.objects = {name: current[name] for name in self.objects}
            self.unknown = set()

    # ------------------------------------------------------------------------------------ files and copies

    @precondition(lambda self: self.methods)
    @rule(data=st.data())
    def save_and_load(self, data):
        """A saved adapter, loaded onto a fresh base, computes what it computes here, bit for bit; merged or not."""
        name = data.draw(st.sampled_from(sorted(self.methods)))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "adapter.safetensors"
            peftkit.save(self.net, path, name)
            # torch chooses kernels, and so roundings, by what requires grad, also where no gradient is taken.
            other = peftkit.load(copy.deepcopy(self.fresh), path, trainable=name in self.trainable)
        other.train(self.net.training)
        saved, loaded = peftkit.state_dict(self.net, name), peftkit.state_dict(other, name)
        assert saved.keys() == loaded.keys()
        assert all(torch.equal(saved[key], loaded[key]) for key in saved)
        if not self.merged and not self.dropping([name]):
            with peftkit.using(self.net, name), torch.no_grad():
                assert same(self.output(), other(*self.inputs))
        peftkit.unwrap(other)
        assert same(other.parameters(), self.fresh.parameters())

    @precondition(lambda self: self.methods and len(self.methods) < len(NAMES) and not self.merged)
    @rule(data=st.data(), trainable=st.booleans())
    def load_another(self, data, trainable):
        """A saved adapter loaded beside the others under a new name is its twin; it runs only if nothing else does."""
        name = data.draw(st.sampled_from(sorted(self.methods)))
        new = data.draw(st.sampled_from([n for n in NAMES if n not in self.methods]))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "adapter.safetensors"
            peftkit.save(self.net, path, name)
            peftkit.load(self.net, path, new, trainable=trainable)
        self.methods[new] = dict(self.methods[name])
        if not self.active:
            self.active = (new,)
        if trainable:
            self.trainable.add(new)

    @precondition(lambda self: self.methods and not self.merged)
    @rule()
    def load_base_checkpoint(self):
        """The base's own state dict loads strictly, and touches no adapter."""
        before = {name: content(p) for name, p in self.net.named_parameters()}
        self.net.load_state_dict(self.start, strict=True)
        assert {name: content(p) for name, p in self.net.named_parameters()} == before

    @precondition(lambda self: self.methods)
    @rule(how=st.sampled_from(["deepcopy", "pickle"]))
    def copy(self, how):
        """A copy computes the same bits and shares nothing; the sequence goes on with it."""
        dropping = self.dropping(self.active)
        before = None if dropping else self.output()
        other = copy.deepcopy(self.net) if how == "deepcopy" else pickle.loads(pickle.dumps(self.net))
        assert [type(m) for m in other.modules()] == [type(m) for m in self.net.modules()]
        assert not {id(p) for p in other.parameters()} & {id(p) for p in self.net.parameters()}
        with torch.no_grad():
            for p in self.net.parameters():
                p.fill_(7.0)
        self.net = other
        self.objects = {name: p for name, p in other.state_dict(keep_vars=True).items() if name in self.start}
        self.unknown = {path for name in self.merged for path in self.methods[name]}
        assert dropping or same(self.output(), before)

    # ---------------------------------------------------------------------------- calls that have no meaning

    @precondition(lambda self: self.methods)
    @rule(data=st.data())
    def wrong_call(self, data):
        """A call that has no meaning now raises the error that says so, and changes nothing at all."""
        wrong = self.wrong_calls()
        call, error = wrong[data.draw(st.sampled_from(sorted(wrong)))]
        before, objects = everything(self.net), [id(p) for p in self.net.parameters()]
        with pytest.raises(error):
            call()
        assert everything(self.net) == before
        assert [id(p) for p in self.net.parameters()] == objects

    def wrong_calls(self):
        """What must not be called in this state, each with its error."""
        net, layer, name = self.net, next(iter(layers_of(self.net))), next(iter(self.methods))
        lora = {layer: "lora"}
        wrong = {
            "wrap under a taken name": (lambda: peftkit.wrap(net, lora, name=name), StateError),
            "wrap under an impossible name": (lambda: peftkit.wrap(net, lora, name="a.b"), StateError),
            "load what is no file": (lambda: peftkit.load(net, "/nonexistent"), FileError),
            "load a state that does not fit": (lambda: peftkit.load_state_dict(net, {}, name), FormatError),
            "save to nowhere": (lambda: peftkit.save(net, "/nonexistent/x", name), FileError),
            "save an unknown adapter": (lambda: peftkit.save(net, "/nonexistent/x", "z"), UnknownAdapterError),
            "train an unknown adapter": (lambda: peftkit.set_trainable(net, "z"), UnknownAdapterError),
        }
        if self.merged:
            return wrong | {
                "merge twice": (lambda: peftkit.merge(net), StateError),
                "merge by name twice": (lambda: peftkit.merge(net, name), StateError),
                "wrap while merged": (lambda: peftkit.wrap(net, lora, name="z"), StateError),
                "unwrap while merged": (lambda: peftkit.unwrap(net), StateError),
                "unwrap one while merged": (lambda: peftkit.unwrap(net, name), StateError),
                "activate while merged": (lambda: peftkit.activate(net, name), StateError),
                "using while merged": (lambda: peftkit.using(net, name).__enter__(), StateError),
                "disabled while merged": (lambda: peftkit.disabled(net).__enter__(), StateError),
            }
        wrong |= {
            "wrap what does not exist": (lambda: peftkit.wrap(net, {"nothing": "lora"}, name="z"), SelectorError),
            "wrap by an unknown method": (lambda: peftkit.wrap(net, {layer: "loar"}, name="z"), UnknownMethodError),
            "unwrap an unknown adapter": (lambda: peftkit.unwrap(net, "z"), UnknownAdapterError),
            "activate an unknown adapter": (lambda: peftkit.activate(net, name, "z"), UnknownAdapterError),
            "activate one twice": (lambda: peftkit.activate(net, name, name), StateError),
            "merge an unknown adapter": (lambda: peftkit.merge(net, "z"), UnknownAdapterError),
            "unmerge what is not merged": (lambda: peftkit.unmerge(net), StateError),
        }
        for idle in set(self.methods) - set(self.active):
            wrong["merge what does not run"] = (lambda idle=idle: peftkit.merge(net, idle), StateError)
            wrong["free the base, one left"] = (lambda: peftkit.merge(net, keep_base=False), StateError)
        for later in self.active[1:]:
            wrong["merge out of order"] = (lambda later=later: peftkit.merge(net, later), StateError)
        if not self.active:
            wrong["merge when nothing runs"] = (lambda: peftkit.merge(net), StateError)
        return wrong


@contextmanager
def expecting(error):
    if error is None:
        yield
        return
    with pytest.raises(error):
        yield


TestOperations = Operations.TestCase
TestOperations.settings = settings(
    max_examples=300,
    stateful_step_count=15,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


@pytest.mark.slow
class TestManyOperations(Operations.TestCase):
    """The same, with more and longer sequences, other ones in every run."""

    settings = settings(TestOperations.settings, max_examples=5000, stateful_step_count=40, derandomize=False)


# ------------------------------------------------------------------------------------------------- single properties


@pytest.mark.parametrize(
    "call",
    [
        peftkit.unwrap,
        peftkit.merge,
        peftkit.unmerge,
        peftkit.activate,
        peftkit.set_trainable,
        peftkit.summary,
        peftkit.state_dict,
        lambda net: peftkit.param_groups(net, lr=1.0),
        lambda net: peftkit.save(net, "/nonexistent/x"),
        lambda net: peftkit.disabled(net).__enter__(),
    ],
)
@pytest.mark.parametrize("unwrapped", [False, True])
def test_calls_without_adapters(call, unwrapped):
    """On a model that is not wrapped, or no more, whatever needs an adapter is refused and changes nothing."""
    net = nn.Sequential(nn.Linear(3, 2))
    if unwrapped:
        peftkit.unwrap(peftkit.wrap(net, {"0": "lora"}))
    before = everything(net)
    with pytest.raises(StateError, match="not wrapped"):
        call(net)
    assert everything(net) == before


@settings(
    max_examples=300, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
@given(data=st.data(), net_and_inputs=nets(), grad=st.booleans(), training=st.booleans())
def test_wrapping_changes_no_output(data, net_and_inputs, grad, training):
    """With any method, init, layer option, dtype and mode the output at the start is the base's, bit for bit."""
    net, inputs = net_and_inputs
    net.train(training).requires_grad_(requires_grad=False)
    with torch.no_grad():
        before = net(*inputs)
    methods = {path: data.draw(methods_for(layer)) for path, layer in layers_of(net).items()}
    # What an init subtracts is not dropped with what it is subtracted from, so in training these are equal in the mean.
    methods = {
        path: dataclasses.replace(m, dropout=0.0) if isinstance(m, peftkit.LoRA) else m for path, m in methods.items()
    }
    peftkit.wrap(net, methods)
    with torch.set_grad_enabled(grad):
        assert same(net(*inputs), before)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize(
    "layer",
    [lambda: nn.Linear(7, 5), lambda: Conv1D(5, 7), lambda: nn.Conv2d(4, 6, 3, groups=2), lambda: nn.Embedding(7, 5)],
    ids=["linear", "Conv1D", "conv2d", "embedding"],
)
def test_a_thousand_merges_drift_by_nothing(layer, dtype):
    """After 1,000 cycles of merge and unmerge the base is the same to the bit, and so is what a merge makes."""
    torch.manual_seed(0)
    net = nn.Sequential(layer()).to(dtype)
    start = {name: p.detach().clone() for name, p in net.named_parameters()}
    net = peftkit.wrap(net, {"0": peftkit.LoRA(rank=2, init="pissa")}, name="a")
    net = peftkit.wrap(net, {"0": Rows(biased=True)}, name="b")
    with torch.no_grad():
        for p in net[0].adapters.parameters():
            p.add_(torch.randn(p.shape), alpha=0.3)
    merged = peftkit.merge(net)[0].weight.clone()
    assert not torch.equal(merged, start["0.weight"])
    for _ in range(1000):
        assert torch.equal(net[0].weight, merged)
        peftkit.unmerge(net)
        peftkit.merge(net)
    peftkit.unwrap(peftkit.unmerge(net))
    assert net.state_dict().keys() == start.keys()
    for name, p in net.named_parameters():
        assert torch.equal(p, start[name])
