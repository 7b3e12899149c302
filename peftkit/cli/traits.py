"""What a method says about itself, for `peftkit methods`: by its class, and by one adapter on the meta device."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from peftkit import plugins
from peftkit.adapter import Activation, LowRank
from peftkit.cli.output import others_print_to_stderr
from peftkit.errors import PeftkitError
from peftkit.method import Method
from peftkit.plan import Plan, plan, shared_for, shared_states
from peftkit.stepping import follows_steps

SIZE = 1024
"""Inputs and outputs of the reference layer, of which the trainable share is reported."""


@dataclass
class Traits:
    """One row of `peftkit methods`. Where `error` is not empty, the rest is what is known without the plugin."""

    name: str
    package: str
    version: str
    error: str = ""
    trainable_share: float | None = None
    """Trainable parameters on the reference layer, by all of its parameters; None where it can't be adapted."""
    form: str | None = None
    """`"low-rank"`, `"weight"`, `"activation"`, `"in place"` (the weights themselves train), or `"nothing"`."""
    merges: bool | None = None
    identity: bool | None = None
    matrices: bool | None = None
    vectors: bool | None = None
    scope: str | None = None
    shared_state: bool | None = None
    step_hook: bool | None = None
    data: bool | None = None
    """Whether it can start from data (`wrap(..., data=batches)`)."""
    optimizer_groups: bool | None = None
    hf: str | None = None
    """Its `peft_type` in HF PEFT's files."""
    declines: dict[str, str] = field(default_factory=dict)
    """Layer kinds that it does not adapt, with the reason."""

    def as_json(self) -> dict[str, Any]:
        """Every field under its own name."""
        return asdict(self)


def traits(info: plugins.MethodInfo) -> Traits:
    """What `info`'s method says about itself; imports its plugin. A plugin at fault gives a row with the error."""
    found = Traits(info.name, info.package, info.version)
    try:
        with others_print_to_stderr():
            method = plugins.method(info.name)
            _declared(found, method)
            _tried(found, method())
    except PeftkitError as error:
        found.error = str(error)
    except Exception as error:  # noqa: BLE001 - a plugin may raise anything, and the other rows must still come
        found.error = f"{type(error).__name__}: {error}"
    return found


def _declared(found: Traits, method: type[Method]) -> None:
    found.identity, found.matrices, found.vectors = method.identity, method.matrices, method.vectors
    found.scope, found.declines = method.scope, dict(method.declines)
    found.hf = method.hf.peft_type if method.hf else None
    found.shared_state = method.shared is not Method.shared
    found.data = method.observer is not Method.observer
    found.optimizer_groups = method.param_groups is not Method.param_groups


def _tried(found: Traits, method: Method) -> None:
    """Share and form, from the first reference model that the method can adapt."""
    found.step_hook = follows_steps(method)
    if method.scope == "modules":
        found.form = "activation"  # by the contract of that scope, even where no reference model suits the method
    for model, targets, is_reference_layer in _references(method):
        try:
            planned = plan(model, method, targets=targets)
            share = planned.trainable / planned.total
            found.form = _form(planned)
        except PeftkitError:
            continue
        found.trainable_share = share if is_reference_layer else None
        break
    found.merges = None if found.form in (None, "nothing") else found.form != "activation"


def _references(method: Method) -> Iterator[tuple[nn.Module, Any, bool]]:
    """Models to try, with what to adapt in them, and whether that is the reference layer."""
    with torch.device("meta"):
        yield nn.Sequential(nn.Linear(SIZE, SIZE)), nn.Linear, True
        yield nn.Sequential(nn.Linear(SIZE, SIZE)), method.default_targets, True
        yield nn.Sequential(nn.Linear(SIZE, SIZE), nn.LayerNorm(SIZE)), method.default_targets, False


def _form(planned: Plan) -> str:
    """Which of the contract's forms the first adapter has. Made as `plan` makes it, so that no data is asked for."""
    steps = [(site.on_meta(), method) for site, method in planned.steps]
    states = shared_states(steps)
    site, method = steps[0]
    with torch.device("meta"):
        adapter = method.adapter(site, shared_for(states, method))
    if adapter is None:
        return "in place" if site.unfrozen else "nothing"
    if isinstance(adapter, Activation):
        return "activation"
    return "low-rank" if isinstance(adapter, LowRank) else "weight"
