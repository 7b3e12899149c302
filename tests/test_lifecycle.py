"""Active, trainable and merged are three independent facts; what wrapping adds follows its layer and leaves with unwrap."""

import copy
import gc
import pickle

import pytest
import torch
from torch import nn

import peftkit
from peftkit import errors


def make_model(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.Linear(6, 2)).to(dtype)


def add(model, name, seed, **kwargs):
    """Wrap under a name, and move the new adapter away from its start."""
    torch.manual_seed(seed)
    model = peftkit.wrap(model, kwargs.pop("method", "lora"), name=name, **kwargs)
    with torch.no_grad():
        for key, tensor in peftkit.state_dict(model, name).items():
            if "start" not in key:
                tensor.add_(torch.randn_like(tensor) * 0.3)
    return model


@pytest.fixture
def x():
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def model():
    return add(add(make_model(), "a", 1), "b", 2, rank=2)


def trainable(model):
    return {name.split(".adapters.")[1].split(".")[0] for name, p in model.named_parameters() if p.requires_grad}


def states(model):
    return {a.name: (a.active, a.trainable > 0, a.merged) for a in peftkit.summary(model).adapters}


def test_what_is_unwrapped_or_merged_inside_a_block_stays_so():
    """The end of the block brings back what is still there, and no adapter twice."""
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))

    def two():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
        for name in ("a", "b"):
            model = peftkit.wrap(model, peftkit.LoRA(rank=2, init="orthogonal"), targets="**", name=name)
            with torch.no_grad():
                for tensor in peftkit.state_dict(model, name).values():
                    tensor.add_(0.1)
        return model

    model = two()
    with peftkit.disabled(model):
        peftkit.unwrap(model, "a")
    assert [adapter.name for adapter in peftkit.summary(model).adapters if adapter.active] == ["b"]
    with peftkit.disabled(model):
        peftkit.unwrap(model)
    assert not any("adapters" in name for name, _ in model.named_modules())

    model = two()
    with torch.no_grad(), peftkit.using(model, "a"):
        expected = model(x)
        peftkit.merge(model)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)


def test_three_facts(model):
    """Each of the three changes without the other two."""
    assert states(model) == {"a": (True, True, False), "b": (True, True, False)}
    peftkit.set_trainable(model, "b")
    assert states(model) == {"a": (True, False, False), "b": (True, True, False)}
    peftkit.activate(model, "a")
    assert states(model) == {"a": (True, False, False), "b": (False, True, False)}
    peftkit.merge(model)
    assert states(model) == {"a": (True, False, True), "b": (False, True, False)}
    peftkit.set_trainable(model, "a")
    assert states(model) == {"a": (True, True, True), "b": (False, False, False)}
    peftkit.unmerge(model)
    assert states(model) == {"a": (True, True, False), "b": (False, False, False)}


def test_two_active_adapters_are_the_sum_of_their_updates(model, x):
    """With LoRA, running a and b together adds both updates to the weight."""
    with torch.no_grad():
        layer = model[0]
        y = layer(x)
        deltas = [0.0, 0.0]
        for i, name in enumerate("ab"):
            adapter = layer.adapters[name]["weight"]
            deltas[i] = adapter.scale * adapter.up @ adapter.down
        torch.testing.assert_close(y, nn.functional.linear(x, layer.weight + deltas[0] + deltas[1], layer.bias))


def test_what_runs_decides_the_output(model, x):
    """Every choice of active adapters gives its own output, and the empty one the base's, bit for bit."""
    base = make_model()(x)
    outputs = []
    for names in ((), ("a",), ("b",), ("a", "b")):
        peftkit.activate(model, *names)
        outputs.append(model(x))
    assert torch.equal(outputs[0], base)
    assert all(not torch.allclose(p, q) for i, p in enumerate(outputs) for q in outputs[:i])


def test_using_and_disabled_nest_and_restore(model, x):
    """Contexts restore what was active before them."""
    both = model(x)
    with peftkit.using(model, "b"):
        b = model(x)
        with peftkit.disabled(model):
            assert torch.equal(model(x), make_model()(x))
        assert torch.equal(model(x), b)
    assert torch.equal(model(x), both)


def test_only_the_trainable_adapter_gets_gradients(model, x):
    """Gradients reach exactly the adapters that train, active ones of course."""
    peftkit.set_trainable(model, "b")
    model(x).sum().backward()
    assert {n.split(".adapters.")[1][0] for n, p in model.named_parameters() if p.grad is not None} == {"b"}
    assert trainable(model) == {"b"}
    assert [len(g["params"]) for g in peftkit.param_groups(model, lr=0.1)] == [4]
    peftkit.set_trainable(model)
    with pytest.raises(errors.StateError, match="nothing is trainable"):
        peftkit.param_groups(model, lr=0.1)


def test_frozen_parts_of_an_adapter_stay_frozen(x):
    """PiSSA's start factors are saved with the adapter and never trained."""
    model = peftkit.wrap(make_model(), "lora", init="pissa", rank=2)
    peftkit.set_trainable(model)
    peftkit.set_trainable(model, "default")
    assert {n.rsplit(".", 1)[1] for n, p in model.named_parameters() if p.requires_grad} == {"up", "down"}
    assert {k.rsplit(".", 1)[1] for k in peftkit.state_dict(model)} == {"up", "down", "start_up", "start_down"}


@pytest.mark.parametrize("init", ["default", "gaussian", "orthogonal", "pissa", "olora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_every_init_starts_as_the_base_bit_for_bit(init, dtype, x):
    """Also those whose factors are not zero: their start is subtracted, and the base is not touched."""
    base = make_model(dtype).requires_grad_(False)
    with torch.no_grad():
        y = base(x.to(dtype))
        before = [p.clone() for p in base.parameters()]
        model = peftkit.wrap(base, "lora", init=init, rank=4)
        assert torch.equal(model(x.to(dtype)), y)
    assert all(
        torch.equal(p, q)
        for p, q in zip(before, (p for n, p in model.named_parameters() if "adapters" not in n), strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_thousand_merges_drift_by_nothing(dtype):
    """unmerge puts the very parameter back."""
    model = add(make_model(dtype), "a", 1)
    weight, value = model[0].weight, model[0].weight.detach().clone()
    for _ in range(1000):
        peftkit.unmerge(peftkit.merge(model))
    assert model[0].weight is weight
    assert torch.equal(weight, value)


def test_originals_follow_the_model_while_merged(x):
    """Cast while merged, the model unmerges into what the cast base would have been."""
    model = add(make_model(), "a", 1)
    expected = make_model().double().state_dict()
    peftkit.unmerge(peftkit.merge(model).double())
    assert torch.equal(model[0].weight, expected["0.weight"])
    assert model[0].weight.dtype == torch.float64


def test_merge_one_of_two(model, x):
    """The first active adapter can be merged alone; the second runs on top, and the output stays."""
    y = model(x)
    peftkit.merge(model, "a")
    torch.testing.assert_close(model(x), y)
    assert states(model) == {"a": (True, True, True), "b": (True, True, False)}
    peftkit.unmerge(model)
    assert torch.equal(model(x), y)
    peftkit.merge(model, "a", keep_base=False)
    torch.testing.assert_close(model(x), y)
    assert list(states(model)) == ["b"]


def test_merging_for_good_leaves_a_plain_model(x):
    """No class, key or attribute of ours is left, and the flags are those from before the wrap."""
    base = make_model()
    base[2].weight.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in base.named_parameters()}
    model = add(base, "a", 1)
    y = model(x)
    model = peftkit.merge(model, keep_base=False)
    torch.testing.assert_close(model(x), y)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert all(type(m) in (nn.Sequential, nn.Linear, nn.ReLU) for m in model.modules())
    assert not [key for m in model.modules() for key in m.__dict__ if "peftkit" in key]


def test_a_head_for_each_task(x):
    """Full(keep_base=True) is a switchable copy, bias and all; the base keeps its own."""
    base = make_model()
    y = base(x)
    model = add(
        add(base, "a", 1, method={"3": peftkit.Full(keep_base=True)}),
        "b",
        2,
        method={"3": peftkit.Full(keep_base=True)},
    )
    outputs = {}
    for name in "ab":
        with peftkit.using(model, name):
            outputs[name] = model(x)
    assert not torch.allclose(outputs["a"], outputs["b"])
    with peftkit.disabled(model):
        assert torch.equal(model(x), y)
    assert torch.equal(peftkit.unwrap(model)(x), y)


def test_a_module_under_two_paths_is_adapted_once(x):
    """One layer object, one adapter, at both places."""
    layer = nn.Linear(6, 6)
    model = peftkit.wrap(nn.Sequential(layer, nn.ReLU(), layer, nn.Linear(6, 2)), "lora", targets=["0"])
    assert peftkit.summary(model).adapters[0].layers == 1
    assert model[0] is model[2]
    model(x).sum().backward()
    assert model[2].adapters["default"]["weight"].up.grad is not None


def test_adapters_follow_their_layer():
    """Train or eval mode, dtype (float32 on a half precision layer) and device are the layer's."""
    model = make_model(torch.bfloat16).eval()
    model[2].train()
    peftkit.wrap(model, "lora")
    first, second = model[0].adapters, model[2].adapters
    assert not any(m.training for m in first.modules())
    assert all(m.training for m in second.modules())
    assert {p.dtype for p in first.parameters()} == {torch.float32}
    with torch.device("meta"):
        meta = make_model()
    assert all(p.is_meta for p in peftkit.wrap(meta, "lora").parameters())


def test_wrapping_a_single_layer(x):
    """The model itself can be the layer."""
    layer = nn.Linear(6, 2)
    y = layer(x)
    model = peftkit.wrap(layer, "lora")
    assert model is layer
    assert torch.equal(model(x), y)
    assert list(peftkit.state_dict(model)) == ["weight.down", "weight.up"]
    assert type(peftkit.unwrap(model)) is nn.Linear


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_has_a_life_of_its_own(model, x, copied):
    """A copy computes the same, is switched and unwrapped alone, and keeps what is merged."""
    peftkit.merge(model)
    y = model(x)
    other = copied(model)
    assert torch.equal(other(x), y)
    peftkit.unwrap(peftkit.unmerge(other))
    assert torch.equal(other(x), make_model()(x))
    assert torch.equal(model(x), y)
    peftkit.unmerge(model)


def test_rules_mix_methods():
    """What no rule matches is frozen; the first match wins; the plan counts what the wrap trains."""
    rules = {"0": peftkit.LoRA(rank=2), "**.bias": "frozen", "3": "full", "2": peftkit.Full(keep_base=True)}
    plan = peftkit.plan(make_model(), rules)
    model = peftkit.wrap(make_model(), rules)
    assert plan.trainable == peftkit.summary(model).trainable == 2 * (6 + 6) + 6 * 6 + 6 * 2
    assert sorted(n for n, p in model.named_parameters() if p.requires_grad) == [
        "0.adapters.default.weight.down", "0.adapters.default.weight.up", "2.adapters.default.weight.value", "3.weight",
    ]  # fmt: skip


def test_compiled_and_parallel_wrappers_are_looked_through(x):
    """`torch.compile(model)` can be wrapped, switched and saved like the model inside it."""
    compiled = torch.compile(make_model(), backend="eager")
    model = peftkit.wrap(compiled, "lora")
    assert model is compiled
    assert list(peftkit.state_dict(model)) == ["0.weight.down", "0.weight.up", "2.weight.down", "2.weight.up"]


def test_a_forward_on_the_instance_still_runs_adapted(x):
    """A library that put its own forward on a layer (as accelerate and fused kernels do) keeps it, with the adapters."""
    model = make_model()
    original = model[0].forward
    model[0].forward = lambda x: original(x) + 1
    y = model(x)
    model = peftkit.wrap(model, "lora")
    assert torch.equal(model(x), y)
    with torch.no_grad():
        model[0].adapters["default"]["weight"].up.fill_(0.5)
    changed = model(x)
    assert not torch.allclose(changed, y)
    torch.testing.assert_close(peftkit.merge(model)(x), changed)
    peftkit.unwrap(peftkit.unmerge(model))
    assert torch.equal(model(x), y)


def test_the_signature_of_forward_is_kept():
    """Trainers and generation look at a forward's parameters."""
    import inspect

    model = peftkit.wrap(make_model(), "lora")
    assert list(inspect.signature(model[0].forward).parameters) == ["input"]
    assert type(model[0]).__name__ == "Linear"
    assert type(model[0]).__module__ == "torch.nn.modules.linear"
    assert isinstance(model[0], nn.Linear)


@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_collection_is_as_it_was(enabled):
    """Bulk calls put it off and put it back, also when they fail; who has switched it off keeps it off."""
    before = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        model = peftkit.wrap(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)), "lora")
        assert gc.isenabled() is enabled
        with pytest.raises(errors.StateError):
            peftkit.wrap(model, "lora")
        assert gc.isenabled() is enabled
    finally:
        (gc.enable if before else gc.disable)()


def test_a_name_may_come_back_on_other_layers(x):
    """What a layer has found out about a name is forgotten with the adapter, also where that was not."""
    model = add(add(make_model(), "a", 1, targets="0"), "b", 2, targets="2")
    peftkit.activate(model, "a", "b")
    y = model(x)
    peftkit.unwrap(model, "b")
    add(model, "b", 3, targets="0")
    with torch.no_grad():
        assert not torch.allclose(model(x), y)
        alone = add(add(make_model(), "a", 1, targets="0"), "b", 3, targets="0")
        assert torch.equal(model(x), alone(x))


class TwoReads(nn.Module):
    """Reads the weights of two children itself."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)

    def forward(self, x):
        return x @ self.a.weight.mT @ self.b.weight.mT


@pytest.mark.parametrize("first", ["a", "b"])
def test_adapters_on_two_weights_of_one_reader_come_and_go_one_by_one(x, first):
    """A reader reads each weight with what is on it at the time, in whatever order adapters are put on and taken off."""
    torch.manual_seed(0)
    model = nn.Sequential(TwoReads(), nn.Linear(6, 6))
    weights = {name: getattr(model[0], name).weight.detach().clone() for name in "ab"}
    second = "b" if first == "a" else "a"
    adapted = {}
    for seed, name in enumerate((first, second)):
        add(model, name, seed, targets=f"0.{name}")
        adapter = getattr(model[0], name).adapters[name]["weight"]
        adapted[name] = (weights[name] + adapter.scale * adapter.up @ adapter.down).detach()

    def reads(**now):
        a, b = ({**weights, **now}[name] for name in "ab")
        with torch.no_grad():
            torch.testing.assert_close(model[0](x), x @ a.mT @ b.mT)

    add(model, "elsewhere", 2, targets="1")
    reads(**adapted)
    peftkit.unwrap(model, first)
    reads(**{second: adapted[second]})
    peftkit.unwrap(model, second)
    reads()
    peftkit.unwrap(model)
    assert type(model[0]) is TwoReads
    assert "_peftkit_layer" not in model[0].__dict__


def test_a_weight_that_was_trained_in_place_is_free_again_afterwards():
    """Only an adapter that is there keeps others off a weight; a copy of the model knows that too."""
    model = peftkit.wrap(make_model(), "full", targets="0", name="inside")
    with pytest.raises(errors.StateError, match=r"0\.weight is trained in place by adapter 'inside'"):
        peftkit.wrap(copy.deepcopy(model), "lora", targets="0", name="b")
    peftkit.wrap(model, "lora", targets="2", name="beside")
    peftkit.unwrap(model, "inside")
    peftkit.wrap(model, "lora", targets="0", name="b")
    with pytest.raises(errors.StateError, match=r"0\.weight is adapted by 'b'"):
        peftkit.wrap(model, "full", targets="0", name="c")


class Plain(nn.Module):
    """An adapter's registers: parameters, one that is missing, buffers that are saved and one that is not."""

    def __init__(self):
        super().__init__()
        self.p, self.none = nn.Parameter(torch.ones(2)), None
        self.register_parameter("missing", None)
        self.register_buffer("kept", torch.zeros(2))
        self.register_buffer("absent", None)
        self.register_buffer("hidden", torch.zeros(2), persistent=False)


class Nested(Plain):
    """With a module below."""

    def __init__(self):
        super().__init__()
        self.below = nn.Linear(2, 2)


class Renaming(Plain):
    """With a word of its own in what is saved."""

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "more"] = torch.ones(1)


def hooked():
    adapter = Plain()
    adapter.register_state_dict_post_hook(lambda module, state, prefix, metadata: state.update(hooked=torch.ones(1)))
    return adapter


@pytest.mark.parametrize("make", [Plain, Nested, Renaming, hooked])
def test_what_is_saved_of_an_adapter_is_its_state_dict(make):
    """The short way through the registers gives what the module's own `state_dict` gives, or is not taken."""
    adapter = make()
    placement = peftkit.installed.Placement("0", "weight", nn.Identity(), peftkit.LoRA(), adapter, frozenset({"p"}))
    expected = {f"0.weight.{name}": tensor for name, tensor in adapter.state_dict().items()}
    found = dict(placement.tensors())

    assert list(found) == list(expected)
    assert all(torch.equal(found[name], tensor) and not found[name].requires_grad for name, tensor in expected.items())
    assert [name for name, _ in placement.trained()] == ["0.weight.p"]
    assert placement.learning() == [adapter.p]
