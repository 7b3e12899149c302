"""The conformance kit, tested by broken methods: each check catches a fault planted for it, and passes its sound twin.

`Planted` is one sound method; its field names a fault, which is an adapter (or a method) that differs in one thing.
"""

import dataclasses
import importlib
import random
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_leaves

import peftkit
from peftkit.errors import UnsupportedLayerError
from peftkit.testing import CASES, CHECKS, Case, Result, check_method, parametrize_with_checks
from peftkit.testing.subject import NotApplicableError

PAGE = Path(__file__).parents[1] / "docs" / "conformance.md"
CASE = {case.name: case for case in CASES}
CHECK = {check.__name__: check for check in CHECKS}


# ------------------------------------------------------------------------------------------- the sound methods


class Twin(peftkit.Adapter):
    """A low-rank update by its weight alone, and a gain on the bias: nothing is wrong with it."""

    def __init__(self, site):
        super().__init__(site)
        down, up = torch.randn(*site.batch, 2, site.fan_in) / 2, torch.zeros(*site.batch, site.fan_out, 2)
        self.down, self.up = site.parameter(down), site.parameter(up)

    def delta(self):
        return self.up @ self.down

    def weight(self, w):
        return w + self.delta()

    def bias(self, b):
        return b + self.up.sum(-1)


class Fast(peftkit.LowRank):
    """The same update as factors, with each kind's fast path."""

    def __init__(self, site):
        super().__init__(site)
        self.down = site.parameter(torch.randn(*site.batch, 2, site.fan_in) / 2)
        self.up = site.parameter(torch.zeros(*site.batch, site.fan_out, 2))

    def factors(self):
        return self.up, self.down, 2.0


@dataclass(frozen=True)
class Planted(peftkit.Method):
    """The twin, or the adapter that has the fault of this name."""

    name: ClassVar[str] = "planted"

    fault: str = ""

    def __post_init__(self):
        self.require(isinstance(self.fault, str), "fault", "a text")

    def adapter(self, site, shared=None):
        return ADAPTERS[self.fault](site)


CONVOLUTIONS = [f"Conv{kind}{n}d" for kind in ("", "Transpose") for n in (1, 2, 3)]
OTHERWISE = ("MultiheadAttention", "LSTM", "GRU", "RNN", "LSTMCell", *CONVOLUTIONS)


@dataclass(frozen=True)
class Around(peftkit.Method):
    """A bottleneck around a layer whose output is one tensor of features, last or second."""

    name: ClassVar[str] = "planted-around"
    scope: ClassVar = "modules"
    declines: ClassVar = MappingProxyType(dict.fromkeys(OTHERWISE, "its output is no single tensor with features last"))

    fault: str = ""

    def __post_init__(self):
        self.require(isinstance(self.fault, str), "fault", "a text")

    def adapter(self, site, shared=None):
        if type(site.layer).__name__ in self.declines:
            raise UnsupportedLayerError(f"{self.name} cannot adapt {site.path}; leave it out")
        return (NarrowAround if self.fault else AroundAdapter)(site)


class AroundAdapter(peftkit.Activation):
    def __init__(self, site):
        super().__init__(site)
        self.down = site.parameter(torch.randn(2, site.features) / site.features**0.5)
        self.up = site.parameter(torch.zeros(site.features, 2))

    def forward(self, base, *args, **kwargs):
        y = base(*args, **kwargs)
        return y + self.added(y).to(y.dtype)

    def added(self, y):
        return F.linear(torch.tanh(F.linear(y.to(self.down.dtype), self.down)), self.up)


class NarrowAround(AroundAdapter):
    """Takes the layer's output to have its own dtype, which autocast makes untrue."""

    def forward(self, base, *args, **kwargs):
        y = base(*args, **kwargs)
        return torch.lerp(y, y + self.added(y), torch.ones_like(y, dtype=self.up.dtype))


@dataclass(frozen=True)
class Banked(peftkit.Method):
    """Rows scaled by sums of vectors that all sites share."""

    name: ClassVar[str] = "planted-banked"

    fault: str = ""

    def __post_init__(self):
        self.require(isinstance(self.fault, str), "fault", "a text")

    def shared(self, sites):
        bank = nn.Module()
        bank.rows = sites[0].parameter(torch.randn(4, 32))
        bank.register_buffer("steps", torch.zeros(()))
        return bank

    def adapter(self, site, shared=None):
        return BankedAdapter(site, shared, self.fault)

    def after_step(self, adapters, shared):
        shared.steps += 1
        for adapter in adapters:
            adapter.pick.mul_(1 - 0.1 / (1 + shared.steps))


class BankedAdapter(peftkit.Adapter):
    def __init__(self, site, shared, fault):
        super().__init__(site)
        self.shared = shared
        self.pick = site.parameter(torch.zeros(*site.batch, 1, 4))
        if fault:
            self.register_buffer("rows", shared.state.rows.detach())

    def weight(self, w):
        scale = self.pick @ self.shared.state.rows.to(self.pick.dtype)
        return w + w * scale[..., : w.shape[-2]].mT


@dataclass(frozen=True)
class Prefixed(peftkit.Method):
    """A learned vector before the embedded tokens of a whole language model."""

    name: ClassVar[str] = "planted-prefix"
    scope: ClassVar = "modules"
    identity: ClassVar = False
    default_targets: ClassVar = staticmethod(lambda path, module: path == "")

    def adapter(self, site, shared=None):
        return PrefixedAdapter(site)


class PrefixedAdapter(peftkit.Activation):
    def __init__(self, site):
        super().__init__(site)
        self.prompt = site.parameter(torch.randn(1, 1, site.layer.embed_tokens.embedding_dim))

    def forward(self, base, *args, **kwargs):
        x = kwargs.pop("inputs_embeds", None)
        if x is None:
            x = base.model.get_input_embeddings()(kwargs.pop("input_ids"))
        x = torch.cat([self.prompt.to(x.dtype).expand(len(x), -1, -1), x], 1)
        return base(inputs_embeds=x, **kwargs)[:, 1:]


@dataclass(frozen=True)
class Vectors(Planted):
    """The twin on vectors alone."""

    name: ClassVar[str] = "planted-vectors"
    matrices: ClassVar = False
    vectors: ClassVar = True


# ------------------------------------------------------------------------------------- adapters with a fault


class BareInput(Twin):
    """Rounds its parameters to the layer's own dtype, instead of keeping them in float32."""

    def __init__(self, site):
        super().__init__(site)
        self.up = nn.Parameter(self.up.detach().to(site.layer._parameters[site.weight].dtype))


class Started(Twin):
    def __init__(self, site):
        super().__init__(site)
        nn.init.constant_(self.up, 0.01)


class NewModule(Twin):
    """Hangs a module of its own on the layer."""

    def __init__(self, site):
        super().__init__(site)
        site.layer.extra = nn.Linear(1, 1, bias=False)


class Hooked(Twin):
    """Hangs a hook on the layer, which stays when the adapter is gone."""

    def __init__(self, site):
        super().__init__(site)
        site.layer.register_forward_hook(lambda layer, args, output: output * 1.01)


class OnCPU(Twin):
    def __init__(self, site):
        super().__init__(site)
        self.up = nn.Parameter(torch.zeros(site.fan_out, 2, device="cpu"))


class MoreThanPlanned(Twin):
    """Has a parameter more where there are values to look at."""

    def __init__(self, site):
        super().__init__(site)
        if site.device.type != "meta":
            self.more = site.parameter(torch.zeros(1))


class AlwaysTraining(Twin):
    def train(self, mode=True):  # noqa: FBT002 - torch's own signature
        return super().train(True)


class Unseeded(Twin):
    """Draws from a generator of its own."""

    def __init__(self, site):
        super().__init__(site)
        generator = torch.Generator(device=self.down.device) if not self.down.is_meta else None
        if generator:
            generator.seed()
        self.down = site.parameter(torch.randn(self.down.shape, generator=generator))


class SeedsPython(Twin):
    def __init__(self, site):
        super().__init__(site)
        random.seed(0)


class Noisy(Twin):
    def weight(self, w):
        return super().weight(w) + torch.rand_like(w)


class Writing(Twin):
    """Writes the matrix that it is given, which is the base itself."""

    def weight(self, w):
        with torch.no_grad():
            w.mul_(1.001)
        return super().weight(w)


class Doubting(Twin):
    """Its `__call__`, which the model uses, is not its `weight`, which defines it."""

    def forward(self, form, *args):
        return super().forward(form, *args) * 1.01


class Remembering(Twin):
    """Keeps the first matrix that it sees, and takes each later one to be the same."""

    def __init__(self, site):
        super().__init__(site)
        self.seen = {}

    def forward(self, form, *args):
        return super().forward(form, self.seen.setdefault(form, args[0]))


class Float(Twin):
    def weight(self, w):
        return super().weight(w).float()


class BiasColumn(Twin):
    def bias(self, b):
        return (b + self.up.sum(-1)).unsqueeze(-1)


class Strided(Twin):
    """Takes the matrix to be contiguous."""

    def weight(self, w):
        return w.as_strided(w.shape, (w.shape[-1], 1)) + self.delta()


class Thawing(Twin):
    """Unfreezes the base while it runs."""

    def __init__(self, site):
        super().__init__(site)
        self.outside = [site.layer]

    def weight(self, w):
        for p in self.outside[0].parameters(recurse=False):
            p.requires_grad_(True)
        return super().weight(w)


class Dead(Twin):
    """Has a parameter on which nothing depends."""

    def __init__(self, site):
        super().__init__(site)
        self.unused = site.parameter(torch.ones(3))


class Detached(Twin):
    def delta(self):
        return self.up @ self.down.detach()


class HalfGradient(Twin):
    def delta(self):
        return (self.up + self.up.detach()) / 2 @ self.down


class UphillGradient(Twin):
    def delta(self):
        delta = self.up @ self.down
        return 2 * delta.detach() - delta

    def bias(self, b):
        return b


class HoldsBase(Twin):
    """Makes the base's weight a part of its own state."""

    def __init__(self, site):
        super().__init__(site)
        self.register_buffer("base", site.layer._parameters[site.weight].detach())


class Outside(Twin):
    """Keeps a number that it has drawn where no file has it."""

    def __init__(self, site):
        super().__init__(site)
        self.factor = random.random()

    def delta(self):
        return super().delta() * self.factor


class Volatile(Twin):
    """Keeps what it has drawn in a buffer that is not saved."""

    def __init__(self, site):
        super().__init__(site)
        self.register_buffer("factor", site.tensor(torch.rand(1)), persistent=False)

    def delta(self):
        return super().delta() * self.factor


class Unregistered(Twin):
    """Keeps a drawn tensor as a plain attribute."""

    def __init__(self, site):
        super().__init__(site)
        self.factor = site.tensor(torch.rand(1))

    def delta(self):
        return super().delta() * self.factor


class CopiedState(Twin):
    """Hands out copies of its tensors, so that what is loaded into them is lost."""

    def state_dict(self, *args, **kwargs):
        return {name: t.clone() for name, t in super().state_dict(*args, **kwargs).items()}


class Counting(Twin):
    """Counts its runs in a buffer."""

    def __init__(self, site):
        super().__init__(site)
        self.register_buffer("runs", torch.zeros(()))

    def weight(self, w):
        self.runs += 1
        return super().weight(w)


class Overlapping(Twin):
    """Two tensors of its state share memory."""

    def __init__(self, site):
        super().__init__(site)
        self.register_buffer("alias", self.down.detach())


class HidesNaN(Twin):
    def weight(self, w):
        return super().weight(w).nan_to_num()

    def bias(self, b):
        return super().bias(b).nan_to_num()


class CopiesItself(Twin):
    """Is one object with its copies."""

    def __deepcopy__(self, memo):
        return self


class Uncastable(Twin):
    """Does not follow `model.to(dtype)`."""

    def _apply(self, fn, recurse=True):  # noqa: FBT002 - torch's own signature
        return self


class Aliased(Twin):
    """Reads its parameter through a list, past whatever is put in its place."""

    def __init__(self, site):
        super().__init__(site)
        self.kept = [self.up]

    def delta(self):
        return self.kept[0] @ self.down


class Lambda(Twin):
    def __init__(self, site):
        super().__init__(site)
        self.function = lambda t: t


class Alternating(Twin):
    """Does something else each second time."""

    calls = 0

    def weight(self, w):
        self.calls += 1
        return super().weight(w) if self.calls % 2 else w - self.delta()


class Branching(Twin):
    """Asks for a value, on which the graph then depends."""

    def weight(self, w):
        return super().weight(w) if self.up.sum().item() < 1e9 else w


class Infinite(Twin):
    def __init__(self, site):
        super().__init__(site)
        nn.init.constant_(self.up, float("inf"))


class OnlyUp(Twin):
    """Trains one factor alone: it is affine in that."""

    def __init__(self, site):
        super().__init__(site)
        self.down.requires_grad_(False)


class FlatOnly(Twin):
    """Forgets that a matrix can be a stack of them."""

    def __init__(self, site):
        super().__init__(site)
        self.scale = site.parameter(torch.zeros(site.fan_out))

    def weight(self, w):
        return w + torch.outer(self.scale, w.sum(0)) if w.dim() == 2 else w[0]


ADAPTERS = {cls.__name__: cls for cls in Twin.__subclasses__()} | {"": Twin, "fast": Fast}


# -------------------------------------------------------------------------------------- methods with a fault


def declaring(fault="", **attributes):
    """The method with this fault, declaring this."""
    return type("Declaring", (Planted,), {"__module__": __name__, **attributes})(fault)


@dataclass(frozen=True)
class Declining(Planted):
    declines: ClassVar = MappingProxyType({"Linear": "as an example"})

    def adapter(self, site, shared=None):
        raise UnsupportedLayerError(f"{self.name} cannot adapt {site.name}")


class Undecorated(peftkit.Method):
    name: ClassVar[str] = "planted"
    rank: int = 4

    def adapter(self, site, shared=None):
        return Twin(site)


class Thawed(Planted):
    def __setattr__(self, name, value):
        object.__setattr__(self, name, value)


@dataclass(frozen=True)
class Demanding(peftkit.Method):
    name: ClassVar[str] = "planted"
    rank: int

    def adapter(self, site, shared=None):
        return Twin(site)


@dataclass(frozen=True)
class Tuples(Planted):
    blocks: tuple = (1, 2)


@dataclass(frozen=True)
class Trusting(Planted):
    rank: int = 4


@dataclass(frozen=True)
class Vague(Planted):
    rank: int = 4

    def __post_init__(self):
        super().__post_init__()
        if not (isinstance(self.rank, int) and self.rank > 0):
            raise peftkit.errors.FieldError("a value is wrong")


@dataclass(frozen=True)
class Late(Planted):
    """Raises, but an error of its own making."""

    rank: int = 4

    def __post_init__(self):
        super().__post_init__()
        torch.zeros(self.rank)


class Unequal(Planted):
    __hash__ = object.__hash__

    def __eq__(self, other):
        return self is other


class Drawing(Planted):
    def __post_init__(self):
        torch.rand(1)


class ManyNames(Planted):
    def __str__(self):
        return f"planted {random.random()}"


class WrongFactors(Planted):
    def from_factors(self, up, down):
        return self, {"up": up[..., :2] * 2, "down": down[..., :2, :]}


class Losing(Planted):
    def param_groups(self, parameters, lr, adapters):
        return [{"params": list(parameters)[:-1], "lr": lr}]


class Doubling(Planted):
    def param_groups(self, parameters, lr, adapters):
        return [{"params": list(parameters), "lr": lr}, {"params": list(parameters)[:1], "lr": 2 * lr}]


class Replacing(Planted):
    def after_step(self, adapters, shared):
        for adapter in adapters:
            adapter.up = nn.Parameter(adapter.up.detach().clone())


class Exploding(Planted):
    def after_step(self, adapters, shared):
        for adapter in adapters:
            adapter.up.fill_(float("inf"))


class Forgetful(Planted):
    """Counts steps where no file has them."""

    def after_step(self, adapters, shared):
        for adapter in adapters:
            adapter.steps = getattr(adapter, "steps", 0) + 1
            adapter.up.mul_(1 - 0.1 * adapter.steps)


class Shaking(Planted):
    """Moves a tensor that it holds frozen."""

    def adapter(self, site, shared=None):
        adapter = Twin(site)
        adapter.down.requires_grad_(False)
        return adapter

    def after_step(self, adapters, shared):
        for adapter in adapters:
            adapter.down += 1


HF = peftkit.HuggingFace("LORA", {"fault": "f"}, {"down": "lora_A.weight", "up": "lora_B.weight"})


FAULTS = [
    # check, case, a method with the fault, its sound twin, words of the message
    ("check_name", "", declaring(name="Two Words"), Planted(), "is no name"),
    ("check_name", "", declaring(name="frozen"), Planted(), "another method"),
    ("check_dataclass", "", Undecorated(), Planted(), "decorated"),
    ("check_dataclass", "", Thawed(), Planted(), "can be set"),
    ("check_dataclass", "", Demanding(4), Planted(), "default for the field 'rank'"),
    ("check_fields", "", Tuples(), Planted(), "from its own fields"),
    ("check_fields", "", Trusting(rank=float("nan")), Trusting(), "JSON"),
    ("check_bad_values", "", Trusting(), Planted(), "rank=None was taken"),
    ("check_bad_values", "", Vague(), Planted(), "the field's name"),
    ("check_bad_values", "", Late(), Planted(), "expected a FieldError"),
    ("check_value", "", Unequal(), Planted(), "equal method"),
    ("check_value", "", declaring(__reduce__=lambda self: (Planted, ("other",))), Planted(), "equal method"),
    ("check_declines", "", declaring(declines={"Lineer": "x"}), declaring(declines={"Linear": "x"}), "no layer kind"),
    ("check_declines", "", declaring(declines={"Linear": ""}), declaring(declines={"Linear": "x"}), "a reason"),
    ("check_huggingface", "", declaring(hf=dataclasses.replace(HF, fields={"rnak": "r"})), declaring(hf=HF), "rnak"),
    ("check_huggingface_tensors", "Linear", declaring(hf=dataclasses.replace(HF, tensors={"up": "b"})), declaring(hf=HF), "'down'"),
    ("check_making_changes_no_global", "", Drawing(), Planted(), "no random number"),
    ("check_adapting_changes_no_global", "Linear", Planted("SeedsPython"), Planted(), "Python's random state"),
    ("check_declined", "Linear", declaring(declines={"Linear": "x"}), Declining(), "expected an UnsupportedLayerError"),
    ("check_only_targets_change", "Linear", Planted("NewModule"), Planted(), "layer.extra"),
    ("check_start", "Linear", Planted("Started"), Planted(), "same bits"),
    ("check_start", "Linear", declaring(identity=False, fault="Infinite"), declaring(identity=False, fault="Started"), "not finite"),
    ("check_dtypes", "Linear", Planted("BareInput"), Planted(), "torch.float32 on a torch.bfloat16 base"),
    ("check_meta", "Linear", Planted("OnCPU"), Planted(), "on the meta device"),
    ("check_meta", "Linear", Planted("MoreThanPlanned"), Planted(), "trainable parameters"),
    ("check_count", "Linear", Planted("MoreThanPlanned"), Planted(), "plan counts"),
    ("check_modes", "Linear", Planted("AlwaysTraining"), Planted(), "training to be False"),
    ("check_seed", "Linear", Planted("Unseeded"), Planted(), "the same seed"),
    ("check_forward_draws_nothing", "Linear", Planted("Noisy"), Planted(), "no random number"),
    ("check_forward_draws_nothing", "Linear", Planted("Counting"), Planted(), "runs after a run"),
    ("check_definition", "Linear", Planted("Doubting"), Planted("fast"), "the definition's"),
    ("check_affine", "Linear", declaring(affine=True), declaring(affine=True, fault="OnlyUp"), "mean of two"),
    ("check_weight_is_pure", "Linear", Planted("Noisy"), Planted("fast"), "second call of weight"),
    ("check_weight_is_pure", "Linear", Planted("Writing"), Planted(), "matrix that weight was given"),
    ("check_weight_in_every_dtype", "Linear", Planted("Float"), Planted(), "expected torch.float64"),
    ("check_weight_in_every_dtype", "Linear", Planted("BiasColumn"), Planted(), "bias at layer.weight"),
    ("check_weight_in_every_dtype", "Parameter", Planted("FlatOnly"), Planted(), "shape"),
    ("check_weight_of_any_layout", "Linear", Planted("Strided"), Planted(), "strided matrix"),
    ("check_composition", "Linear", Planted("Remembering"), Planted(), "then"),
    ("check_from_factors", "Linear", WrongFactors(), peftkit.LoRA(rank=2), "from_factors makes"),
    ("check_only_adapters_train", "Linear", Planted("Thawing"), Planted(), "of the base to be frozen"),
    ("check_gradients_arrive", "Linear", Planted("Dead"), Planted(), "unused got no gradient"),
    ("check_gradients_arrive", "Linear", Planted("Detached"), Planted(), "down got no gradient"),
    ("check_base_stays", "Linear", Planted("Writing"), Planted(), "layer.weight to stay"),
    ("check_base_stays", "Linear", Shaking(), Planted(), "weight.down to stay"),
    ("check_learning", "Linear", Planted("UphillGradient"), Planted(), "expected the loss to fall"),
    ("check_finite_differences", "Linear", Planted("HalfGradient"), Planted(), "a finite difference measures"),
    ("check_param_groups", "Linear", Losing(), Planted(), "0 times"),
    ("check_param_groups", "Linear", Doubling(), Planted(), "2 times"),
    ("check_steps_keep_parameters", "Linear", Replacing(), Planted(), "same object"),
    ("check_steps_keep_parameters", "Linear", Exploding(), Planted(), "not finite"),
    ("check_state_is_the_adapters", "Linear", Planted("HoldsBase"), Planted(), "no tensor of the base"),
    ("check_save_and_load", "Linear", Planted("Outside"), Planted(), "loaded adapter"),
    ("check_save_and_load", "Linear", Planted("Volatile"), Planted(), "persistent buffer"),
    ("check_save_and_load", "Linear", Planted("Unregistered"), Planted(), ""),
    ("check_strict_state", "Linear", Planted("CopiedState"), Planted(), "after load_state_dict"),
    ("check_saved_bytes", "Linear", Planted("Counting"), Planted(), "bytes differ"),
    ("check_no_shared_storage", "Linear", Planted("Overlapping"), Planted(), "share memory"),
    ("check_shared_state", "Linear", Banked("rows"), Banked(), "at the model alone"),
    ("check_resume", "Linear", Forgetful(), Banked(), "through a file"),
    ("check_merge", "Linear", Planted("Noisy"), Planted("fast"), "merged output"),
    ("check_merge_leaves_a_plain_model", "Linear", Planted("NewModule"), Planted(), "expected the modules"),
    ("check_unmerge", "Linear", Planted("Writing"), Planted(), "layer.weight to stay"),
    ("check_unwrap", "Linear", Planted("Hooked"), Planted(), "its own hooks"),
    ("check_unwrap", "Linear", Planted("NewModule"), Planted(), "layer.extra"),
    ("check_disabled", "Linear", Planted("Hooked"), Planted(), "while disabled"),
    ("check_merge_refuses_nan", "Linear", Planted("HidesNaN"), Planted(), "NaN"),
    ("check_deepcopy", "Linear", Planted("CopiesItself"), Planted(), "after its copy was changed"),
    ("check_casts", "Linear", Planted("Uncastable"), Planted(), "to be torch.float64"),
    ("check_functional_call", "Linear", Planted("Aliased"), Planted(), "functional_call"),
    ("check_verify", "Linear", Planted("Dead"), Planted(), "no gradient"),
    ("check_pickle", "Linear", Planted("Lambda"), Planted(), "pickle"),
    ("check_autocast", "Linear", Around("narrow"), Around(), "dtype"),
    ("check_checkpointing", "Linear", Planted("Alternating"), Planted(), "use_reentrant"),
    ("check_compile", "Linear", Planted("Branching"), Planted(), ""),
    ("check_routed", "Linear", Planted("Alternating"), Planted(), "in a mixed batch"),
    ("check_summary", "Linear", ManyNames(), Planted(), "printed summary"),
    ("check_device", "Linear on cpu:0", Planted("Unseeded"), Planted(), "against cpu"),
]  # fmt: skip


def run(check, method, case):
    """The check by itself, its random numbers its own; returns what it raises."""
    python = random.getstate()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        try:
            CHECK[check](*([method, case] if case else [method]))
        except Exception as error:  # noqa: BLE001 - whatever it is, it is what the check says
            return error
        finally:
            random.setstate(python)
    return None


def case_named(name):
    return dataclasses.replace(CASE["Linear"], device="cpu:0") if name == "Linear on cpu:0" else CASE.get(name)


@pytest.mark.parametrize(
    "check, case, faulty, sound, words",
    FAULTS,
    ids=lambda value: str(value) if isinstance(value, str) else type(value).__name__,
)
def test_a_check_catches_its_fault(check, case, faulty, sound, words):
    """The check fails for the method with the fault, says what is wrong, and passes for its sound twin."""
    error = run(check, faulty, case_named(case))
    assert error is not None
    assert not isinstance(error, NotApplicableError)
    assert words in str(error)
    assert run(check, sound, case_named(case)) is None


def test_every_check_has_a_planted_fault():
    """No check is without a fault that it catches."""
    assert {row[0] for row in FAULTS} | {"check_import"} == set(CHECK)


MODULE = """
from dataclasses import dataclass
from typing import ClassVar
import peftkit, random, torch, warnings
{fault}
@dataclass(frozen=True)
class Imported(peftkit.Method):
    name: ClassVar[str] = "imported"
    def adapter(self, site, shared=None): ...
"""


@pytest.mark.parametrize(
    "fault, words",
    [("print('hello')", "hello"), ("warnings.warn('old')", "old"), ("torch.manual_seed(0)", "global"), ("", None)],
)
def test_check_import_catches_what_a_module_does_when_it_is_imported(tmp_path, monkeypatch, fault, words):
    """A plugin that prints, warns or seeds when it is imported fails; one that does nothing of it passes."""
    name = "peftkit_planted_module"
    tmp_path.joinpath(f"{name}.py").write_text(MODULE.format(fault=""))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, name, raising=False)
    method = importlib.import_module(name).Imported()
    tmp_path.joinpath(f"{name}.py").write_text(MODULE.format(fault=fault))
    error = run("check_import", method, None)
    assert error is None if words is None else words in str(error)


# ------------------------------------------------------------------------------------------ whole runs of the kit


SOME = [CASE[name] for name in ("Linear", "Embedding", "LSTM", "Parameter", "tied weights", "language model")]
LAYERS = [
    CASE[name] for name in ("Linear", "Conv2d", "GRUCell", "TransformerEncoderLayer", "shared module", "language model")
]
SOUND = [
    (Planted(), SOME),
    (Planted("fast"), SOME),
    (Banked(), SOME),
    (Around(), LAYERS),
    (Prefixed(), CASES),
    (Vectors(), CASES),
]


@pytest.mark.parametrize("method, cases", SOUND, ids=[f"{type(m).__name__}{m}" for m, _ in SOUND])
def test_a_sound_method_of_each_form_passes_everything(method, cases):
    """Weights, factors, shared state, surroundings, whole models and vectors: nothing fails where nothing is wrong."""
    results = check_method(method, cases=cases)
    assert [str(result) for result in results if result.status not in ("passed", "skipped")] == []
    assert sum(result.status == "passed" for result in results) > 25


def test_a_method_gets_the_cases_that_it_declares():
    """Whole-model methods get the language model alone, vector methods the vectors, declined kinds the refusal alone."""

    def cases(method):
        return {result.case for result in check_method(method, device="cuda:99") if result.case}

    assert cases(Prefixed()) == {"language model"}
    assert cases(Vectors()) == {case.name for case in CASES if case.selects == "vector"}
    around = [result.check for result in check_method(Around(), device="cuda:99") if result.case == "LSTM"]
    assert around == ["check_declined"]
    assert cases(Planted()) == {case.name for case in CASES if case.selects != "vector"}


def test_a_method_that_declines_everything_fails():
    """Where nothing can be tried, that is a failure and not a silence."""
    nothing = type("Nothing", (Planted,), {"matrices": False, "__module__": __name__})()
    results = {result.check: result for result in check_method(nothing, cases=SOME)}
    assert results["check_some_case"].status == "failed"
    assert "no case is left" in results["check_some_case"].detail
    assert not any(result.case for result in results.values())


def test_checks_of_one_case_avoid_what_torch_cannot_compile():
    """Where only recurrent layers are left, the checks that need a plain layer are skipped, and say so."""
    results = check_method(Planted(), cases=[CASE["GRU"]])
    assert not [str(result) for result in results if result.status == "failed"]
    skipped = {result.check: result.detail for result in results if result.status == "skipped"}
    assert "recurrent" in skipped["check_compile"]


def test_a_missing_device_is_a_visible_skip():
    """Where there is no such device every result is skipped, and says so."""
    results = check_method(Planted(), device="cuda:99", cases=SOME)
    assert {result.status for result in results} == {"skipped"}
    assert "no device 'cuda:99'" in results[0].detail


def test_expected_failures():
    """What fails as expected is no failure, what holds after all is an unexpected pass; both carry the reason."""
    expected = {"check_unwrap[Linear]": "a hook", "check_disabled": "a hook", "check_seed": "a guess"}
    results = {r.check: r for r in check_method(Planted("Hooked"), cases=[CASE["Linear"]], expected_failures=expected)}
    assert results["check_unwrap"] == Result("check_unwrap", "Linear", "expected failure", "a hook")
    assert results["check_disabled"].status == "expected failure"
    assert results["check_seed"].status == "unexpected pass"
    assert "a guess" in str(results["check_seed"])


@pytest.mark.parametrize(
    "front", [lambda **kw: check_method(Planted(), **kw), lambda **kw: parametrize_with_checks([Planted()], **kw)]
)
def test_an_expected_failure_that_is_no_check_is_an_error(front):
    """A misspelt check would otherwise expect nothing."""
    with pytest.raises(ValueError, match="check_murge"):
        front(expected_failures={"check_murge": "?"}, cases=[CASE["Linear"]])


def test_parametrize_makes_a_test_of_each_check():
    """One test a check with a readable name; expected failures are strict xfails; equal names are told apart."""
    mark = parametrize_with_checks(
        [Planted(), Around()],
        cases=[CASE["Linear"]],
        expected_failures={"planted-check_seed[Linear]": "?", "check_merge": "!"},
    )
    parameters = {p.id: p for p in mark.args[1]}
    for name in ("planted-check_name", "planted-check_merge[Linear]", "planted-around-check_routed[Linear]"):
        assert name in parameters
    assert parameters["planted-check_seed[Linear]"].marks[0].kwargs == {"reason": "?", "strict": True}
    assert parameters["planted-around-check_seed[Linear]"].marks == []
    assert parameters["planted-around-check_merge[Linear]"].marks
    parameters["planted-check_modes[Linear]"].values[0]()
    with pytest.raises(pytest.skip.Exception, match="affine"):
        parameters["planted-check_affine[Linear]"].values[0]()
    ids = [p.id for p in parametrize_with_checks([Planted(), Planted("fast")], cases=[CASE["Linear"]]).args[1]]
    assert len(set(ids)) == len(ids)
    assert "planted(fault='fast')-check_merge[Linear]" in ids


def test_the_kit_leaves_no_trace():
    """Random states are the caller's own afterwards."""
    torch.manual_seed(3)
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    check_method(Planted(), cases=[CASE["Linear"]])
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert random.getstate() == python_state


def test_a_case_gives_the_same_model_and_input_each_time():
    """Two builds of a case are two models with the same values; so are two examples."""
    for case in CASES:
        first, second = case.build(), case.build()
        assert first is not second
        for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
            assert torch.equal(a, b)
        for a, b in zip(tree_leaves(case.inputs()), tree_leaves(case.inputs()), strict=True):
            assert torch.equal(a, b)


def test_there_is_a_case_for_each_layer_kind():
    """A layer kind that is added gets a case."""
    kinds = {
        type(site.kind).__name__
        for case in CASES
        if case.selects in ("layer", "matrix")
        for site, _ in peftkit.plan(case.build(), targets=case.targets).steps
    }
    assert {kind.__name__ for kind in peftkit.layers.peftkit_layers()} | {"Parameter"} <= kinds


def test_a_case_of_ones_own():
    """The author of a layer kind tries methods on a layer of theirs."""
    results = check_method(Planted(), cases=[Case("wide", lambda: nn.Linear(4, 64), lambda: (torch.randn(3, 4),))])
    assert {result.case for result in results} == {"", "wide"}
    assert not [str(result) for result in results if result.status == "failed"]


def test_the_language_model():
    """It takes token ids or embeddings, ignores what is masked, and gives a loss for labels."""
    model, tokens = CASE["language model"].build(), torch.tensor([[3, 4, 5, 6]])
    logits = model(tokens)
    torch.testing.assert_close(model(inputs_embeds=model.get_input_embeddings()(tokens)), logits)
    mask = torch.tensor([[0, 1, 1, 1]])
    other = torch.tensor([[9, 4, 5, 6]])
    torch.testing.assert_close(model(tokens, mask)[:, 1:], model(other, mask)[:, 1:])
    loss, _ = model(tokens, labels=tokens)
    torch.testing.assert_close(loss, F.cross_entropy(logits[0, :-1], tokens[0, 1:]))


def test_importing_the_kit_is_light():
    """Neither pytest nor transformers is imported before it is needed."""
    code = "import sys, peftkit.testing; print([name for name in ('pytest', 'transformers', 'peft') if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_the_page_has_a_line_for_each_check():
    """docs/conformance.md names every check once, in the kit's order, with what it holds and what it catches."""
    rows = re.findall(r"^\| `(check_\w+)` \| (.+) \| (.+) \|$", PAGE.read_text(), flags=re.MULTILINE)
    assert [name for name, _, _ in rows] == list(CHECK)
    for name, holds, _ in rows:
        assert holds, name
