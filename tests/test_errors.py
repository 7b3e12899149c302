"""Bad input gets an error that names the thing, the nearest right thing and the remedy, and leaves the model as it was."""

import copy
import re

import pytest
import torch
from torch import nn

import peftkit
from peftkit import errors


class Table(nn.Module):
    """A layer of its own kind, for which nobody has written a layer kind."""

    def __init__(self):
        super().__init__()
        self.values = nn.Parameter(torch.zeros(6, 6))


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(6, 6)
        self.k_proj = nn.Linear(6, 6)
        self.act = nn.ReLU()
        self.norm = nn.LayerNorm(6)
        self.block = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
        self.table = Table()
        self.score = nn.Linear(6, 2)

    def forward(self, x):
        return self.score(self.norm(self.block(self.act(self.q_proj(x) + self.k_proj(x)))))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Mlp()


def state_of(model):
    """Classes, keys, flags and values: what an error must not have touched."""
    return (
        [(path, type(m), sorted(m.__dict__)) for path, m in model.named_modules()],
        [(name, p.requires_grad, p.detach().clone().numpy().tobytes()) for name, p in model.named_parameters()],
    )


def refused(model, error, *words, call):
    """The call raises that error with these words in it, and the model is bit for bit what it was."""
    before = state_of(model)
    with pytest.raises(error) as caught:
        call()
    for word in words:
        assert word in str(caught.value)
    assert isinstance(caught.value, errors.PeftkitError)
    assert state_of(model) == before


WRAPS = {
    "an unknown method": (
        errors.UnknownMethodError,
        dict(method="loar"),
        ["'loar'", "did you mean ", "'lora'", "full"],
    ),
    "a wrong field": (errors.FieldError, dict(method="lora", r=8), ["no field 'r'", "rank"]),
    "a misspelt field": (errors.FieldError, dict(method="lora", alhpa=8), ["did you mean 'alpha'?"]),
    "a field's wrong value": (errors.FieldError, dict(method="lora", rank=0), ["rank", "at least 1", "got 0"]),
    "a field's wrong type": (errors.FieldError, dict(method="lora", rank="8"), ["rank", "whole number", "'8'"]),
    "a number that is a bool": (errors.FieldError, dict(method="lora", rank=True), ["rank"]),
    "a dropout that drops all": (errors.FieldError, dict(method="lora", dropout=1.0), ["dropout"]),
    "an adapter that does nothing": (errors.FieldError, dict(method="lora", alpha=0.0), ["alpha"]),
    "an infinite alpha": (errors.FieldError, dict(method="lora", alpha=float("inf")), ["alpha"]),
    "an unknown init": (errors.FieldError, dict(method="lora", init="pizza"), ["pissa"]),
    "an odd rank for orthogonal": (errors.FieldError, dict(method="lora", init="orthogonal", rank=3), ["even"]),
    "a rank beyond the weight": (
        errors.FieldError,
        dict(method="lora", init="pissa", rank=7),
        ["at most 6", "q_proj.weight"],
    ),
    "fields beside a method": (errors.FieldError, dict(method=peftkit.LoRA(), rank=8), ["rank", "LoRA(rank=…)"]),
    "a class for a method": (errors.FieldError, dict(method=peftkit.LoRA), ["LoRA"]),
    "a selector without a hit": (errors.SelectorError, dict(targets="q_porj"), ["'q_porj'", "q_proj"]),
    "one of several without a hit": (errors.SelectorError, dict(targets=["q_proj", "v_proj"]), ["'v_proj'", "q_proj"]),
    "a path without a hit": (errors.SelectorError, dict(targets="blocks.0"), ["'blocks.0'", "block.0"]),
    "a role without a hit": (errors.SelectorError, dict(targets="@conv"), ["'@conv'", "@linear"]),
    "an unknown role": (errors.SelectorError, dict(targets="@linaer"), ["@linear"]),
    "a class without a hit": (errors.SelectorError, dict(targets=nn.Conv2d), ["Conv2d"]),
    "an excluded name without a hit": (errors.SelectorError, dict(exclude="v_proj"), ["exclude", "v_proj"]),
    "everything excluded": (errors.SelectorError, dict(targets="q_proj", exclude="q_proj"), ["excluded"]),
    "no target at all": (errors.SelectorError, dict(targets=[]), ["empty"]),
    "a malformed glob": (errors.SelectorError, dict(targets="{q,k_proj"), ["{q,k_proj"]),
    "an activation function": (errors.UnsupportedLayerError, dict(targets="act"), ["act", "ReLU", "lora"]),
    "a norm": (errors.UnsupportedLayerError, dict(targets="norm"), ["LayerNorm", "lora"]),
    "a vector": (errors.UnsupportedLayerError, dict(targets="norm.weight"), ["vector", "lora"]),
    "a container": (errors.UnsupportedLayerError, dict(targets="block"), ["Sequential", "block.**"]),
    "a layer without a kind": (errors.UnsupportedLayerError, dict(targets="table"), ["Table", "table.values"]),
    "an empty mapping": (errors.SelectorError, dict(method={}), ["empty"]),
    "targets beside rules": (errors.SelectorError, dict(method={"q_proj": "lora"}, targets="k_proj"), ["targets"]),
    "fields beside rules": (errors.FieldError, dict(method={"q_proj": "lora"}, rank=2), ["rank"]),
    "a rule in the shadow": (errors.SelectorError, dict(method={"*_proj": "lora", "q_proj": "full"}), []),
    "a name with a dot": (errors.StateError, dict(name="a.b"), ["a.b"]),
    "a name of ModuleDict's": (errors.StateError, dict(name="keys"), ["keys", "another"]),
    "no name": (errors.StateError, dict(name=""), ["name"]),
}


@pytest.mark.parametrize("case", WRAPS)
def test_wrap_refuses(model, case):
    """Each kind of bad argument to `wrap` is refused, by name and with the remedy."""
    error, arguments, words = WRAPS[case]
    if case == "a rule in the shadow":
        arguments = dict(method={"**": "frozen", "q_proj": "full"})
        words = ["'q_proj'", "earlier rules", "first"]
    refused(model, error, *words, call=lambda: peftkit.wrap(model, **arguments))


def wrapped(model):
    model = peftkit.wrap(model, "lora", targets="*_proj", name="a")
    return peftkit.wrap(model, "lora", targets="q_proj", name="b")


STATES = {
    "a second wrap under one name": (errors.StateError, lambda m: peftkit.wrap(m, name="a"), ["'a'", "unwrap"]),
    "an unknown adapter": (errors.UnknownAdapterError, lambda m: peftkit.activate(m, "aa"), ["'aa'", "'a'"]),
    "an adapter named twice": (errors.StateError, lambda m: peftkit.activate(m, "a", "a"), ["twice"]),
    "training an unknown adapter": (errors.UnknownAdapterError, lambda m: peftkit.set_trainable(m, "c"), ["'c'"]),
    "unwrapping an unknown adapter": (errors.UnknownAdapterError, lambda m: peftkit.unwrap(m, "c"), ["'c'"]),
    "unmerging what is not merged": (errors.StateError, lambda m: peftkit.unmerge(m), ["nothing is merged"]),
    "merging out of order": (errors.StateError, lambda m: peftkit.merge(m, "b"), ["'a'", "before 'b'"]),
    "saving one of several unnamed": (errors.StateError, lambda m: peftkit.save(m, "x"), ["a, b", "name="]),
    "an unknown format": (errors.FileError, lambda m: peftkit.save(m, "x", "a", format="zip"), ["zip"]),
    "wrapping around a wrapped model": (
        errors.StateError,
        lambda m: peftkit.wrap(nn.Sequential(m)),
        ["'0'", "wrapped"],
    ),
    "asking an outer module": (errors.StateError, lambda m: peftkit.summary(nn.Sequential(m)), ["'0'"]),
}

WHILE_MERGED = {
    "merging twice": (lambda m: peftkit.merge(m), ["unmerge"]),
    "activating": (lambda m: peftkit.activate(m, "a"), ["unmerge"]),
    "disabling": (lambda m: peftkit.disabled(m).__enter__(), ["unmerge"]),
    "wrapping": (lambda m: peftkit.wrap(m, name="c"), ["unmerge"]),
    "unwrapping": (lambda m: peftkit.unwrap(m), ["unmerge"]),
    "loading a checkpoint": (lambda m: m.load_state_dict(m.state_dict()), ["unmerge"]),
}


@pytest.mark.parametrize("case", STATES)
def test_calls_in_a_wrong_order_are_refused(model, case):
    """Each call that has no meaning in the model's state says why, and changes nothing."""
    error, call, words = STATES[case]
    model = wrapped(model)
    refused(model, error, *words, call=lambda: call(model))


@pytest.mark.parametrize("case", WHILE_MERGED)
def test_calls_that_make_no_sense_while_merged_are_refused(model, case):
    """While adapters are merged, what would change the active ones says so."""
    call, words = WHILE_MERGED[case]
    model = peftkit.merge(wrapped(model))
    refused(model, errors.StateError, "merged", *words, call=lambda: call(model))


def test_a_path_that_names_no_file(model):
    """Saving to a folder's root is an error of the tree, too."""
    model = peftkit.wrap(model)
    refused(model, errors.FileError, "names no file", call=lambda: peftkit.save(model, "/"))


def test_a_model_that_is_not_wrapped(model):
    """Operations on a bare model say what to call first."""
    for call in (peftkit.summary, peftkit.unwrap, peftkit.merge, peftkit.unmerge, peftkit.state_dict):
        refused(model, errors.StateError, "not wrapped", "peftkit.wrap", call=lambda call=call: call(model))


def test_merging_an_inactive_adapter(model):
    """Only what runs can be merged."""
    model = wrapped(model)
    peftkit.activate(model, "b")
    refused(model, errors.StateError, "'a'", "activate", call=lambda: peftkit.merge(model, "a"))
    refused(model, errors.StateError, "'a'", "stay behind", call=lambda: peftkit.merge(model, keep_base=False))
    peftkit.activate(model)
    refused(model, errors.StateError, "no adapter runs", call=lambda: peftkit.merge(model))


def test_a_merge_that_is_not_finite(model):
    """A merged weight with an infinity in it is named, and not installed."""
    model = peftkit.wrap(model, "lora", targets="q_proj")
    with torch.no_grad():
        model.q_proj.adapters["default"]["weight"].up.fill_(float("inf"))
    refused(model, errors.UnsupportedLayerError, "q_proj.weight", "finite", call=lambda: peftkit.merge(model))


def test_weights_trained_in_place_have_no_way_back(model):
    """An in-place weight that changed can be neither unwrapped nor switched off; untrained, it can be unwrapped."""
    model = peftkit.wrap(model, {"score": "full"}, name="a")
    model = peftkit.unwrap(model)
    model = peftkit.wrap(model, {"score": "full"}, name="a")
    refused(model, errors.StateError, "score", "keep_base=True", call=lambda: peftkit.disabled(model).__enter__())
    with torch.no_grad():
        model.score.weight.add_(1)
    refused(model, errors.StateError, "score.weight", "keep_base", call=lambda: peftkit.unwrap(model))
    refused(
        model,
        errors.StateError,
        "score.weight",
        "'a'",
        call=lambda: peftkit.wrap(model, "lora", targets="score", name="b"),
    )
    kept = model.score.weight.detach().clone()
    model = peftkit.merge(model, keep_base=False)
    assert torch.equal(model.score.weight, kept)


def test_a_weight_that_others_stand_on_is_not_trained_in_place(model):
    """Training a base weight in place would move it under another adapter."""
    model = wrapped(model)
    refused(
        model,
        errors.StateError,
        "q_proj.weight",
        "keep_base=True",
        call=lambda: peftkit.wrap(model, "full", targets="q_proj", name="c"),
    )


def test_layers_that_cannot_be_adapted():
    """A lazy layer, a layer with adapters of its own, an integer weight: each is refused by name."""
    lazy = nn.Sequential(nn.LazyLinear(3), nn.ReLU())
    with pytest.raises(errors.UnsupportedLayerError, match=r"0\.weight.*lazy.*run the model once"):
        peftkit.wrap(lazy, "lora", targets="0")

    owner = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    owner[0].adapters = nn.ModuleList()
    with pytest.raises(errors.UnsupportedLayerError, match="'adapters' of its own"):
        peftkit.wrap(owner, "lora", targets="0")

    packed = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU())
    packed[0].weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(
        errors.UnsupportedLayerError, match=r"Linear.*no weight that lora can adapt|select its parameters"
    ):
        peftkit.wrap(packed, "lora", targets="0")


def test_a_parametrization_after_wrapping_is_refused_at_the_next_forward(model):
    """It would hide the adapters: the forward says so instead of running without them."""
    model = peftkit.wrap(model, "lora", targets="q_proj")
    nn.utils.parametrizations.weight_norm(model.q_proj)
    with pytest.raises(errors.StateError, match="parametrization after wrapping"):
        model.q_proj(torch.zeros(1, 6))


def test_a_tied_weight_is_not_merged_silently():
    """A merge into one holder of a tied weight is refused; with untie=True the holders part, and unmerge joins them again."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(5, 4)
            self.head = nn.Linear(4, 5, bias=False)
            self.head.weight = self.embed.weight

    model = peftkit.wrap(Tied(), "lora", targets="embed", init="gaussian")
    refused(
        model,
        errors.UnsupportedLayerError,
        "embed.weight",
        "head.weight",
        "untie=True",
        call=lambda: peftkit.merge(model),
    )
    shared = model.embed.weight
    peftkit.merge(model, untie=True)
    assert model.head.weight is shared
    assert model.embed.weight is not shared
    peftkit.unmerge(model)
    assert model.embed.weight is model.head.weight is shared


def test_one_tied_weight_takes_one_method():
    """An adapter at one holder and training in place at the other would move the adapter's base; copies would part them."""

    def tied():
        model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False))
        model[1].weight = model[0].weight
        return model

    model = tied()
    for rules in ({"0": "lora", "1.weight": "full"}, {"0": "lora", "1": "full"}, {"1": "full", "0": "lora"}):
        refused(model, errors.SelectorError, "earlier rules", call=lambda rules=rules: peftkit.wrap(model, rules))
    rules = {"1": "lora", "0": "full"}
    refused(model, errors.UnsupportedLayerError, "one weight", call=lambda: peftkit.wrap(model, rules))
    for targets in ("**", "0", "1"):
        refused(
            model, errors.UnsupportedLayerError, "one weight with 1.weight", "in place",
            call=lambda targets=targets: peftkit.wrap(model, "full", targets=targets, keep_base=True),
        )  # fmt: skip
    model = peftkit.wrap(model, "full", targets="1")
    assert peftkit.summary(model).trainable == 20


def test_a_field_may_be_a_list(tmp_path):
    """A method whose field is a list, which has no hash, is planned, grouped and saved like any other."""
    from dataclasses import dataclass, field

    @dataclass(frozen=True)
    class Listed(peftkit.Method):
        name = "listed"
        sizes: list[int] = field(default_factory=lambda: [1, 2])

        def adapter(self, site, shared=None):
            return peftkit.LoRA(rank=self.sizes[0]).adapter(site)

    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    assert peftkit.plan(model, Listed()).trainable == 12
    model = peftkit.wrap(model, Listed())
    assert len(peftkit.param_groups(model, lr=0.1)) == 1
    peftkit.save(model, tmp_path / "listed")
    fresh = copy.deepcopy(peftkit.unwrap(model))
    with pytest.raises(errors.UnknownMethodError, match=r"'listed'.*methods=\[ThatClass\]"):
        peftkit.load(fresh, tmp_path / "listed")
    assert peftkit.load(fresh, tmp_path / "listed", methods=[Listed]) is fresh


def test_the_tree_of_errors_is_as_drawn():
    """Every class in the drawing exists with that parent, and every class is in the drawing."""
    drawn = {}
    stack = []
    for line in errors.__doc__.splitlines():
        found = re.match(r"\s{4}([│├└─\s]*)(\w+Error)", line)
        if found:
            depth = len(found[1]) // 4
            stack = [*stack[:depth], found[2]]
            drawn[found[2]] = stack[-2] if depth else "PeftkitError"
    real = {n: c for n, c in vars(errors).items() if isinstance(c, type) and issubclass(c, errors.PeftkitError)}
    assert set(drawn) == set(real)
    assert all(
        real[name] is errors.PeftkitError or real[name].__bases__[0].__name__ == parent
        for name, parent in drawn.items()
    )
