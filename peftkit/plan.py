"""Says what would be adapted, and by what, before anything changes."""

import functools
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._device import DeviceContext

from peftkit import plugins
from peftkit.adapter import Shared, Site
from peftkit.composition import base_class
from peftkit.errors import FieldError, SelectorError
from peftkit.installed import inner
from peftkit.method import Method
from peftkit.resolve import Hits, Resolution, Rule
from peftkit.selectors import Selector
from peftkit.tables import count, table

Rules: TypeAlias = Mapping[Any, str | Method]
"""Selector, or tuple of selectors, → method or its name; in order, the first match wins."""


@dataclass(frozen=True, slots=True)
class Row:
    """One weight that would be adapted."""

    path: str
    """Dotted path of its layer."""
    layer: str
    """Type of its layer."""
    weight: str
    """The parameter's own name."""
    shape: tuple[int, ...]
    """As a matrix, `[..., out, in]`."""
    roles: tuple[str, ...]
    method: str
    parameters: int
    """How many trainable parameters the method has here."""


@dataclass(frozen=True, eq=False)
class Plan:
    """What `wrap` would do, as a table: print it. Nothing has been touched.

    >>> import torch, peftkit
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> plan = peftkit.plan(model, {"0": peftkit.LoRA(rank=2), "2": "full"})
    >>> plan.trainable, plan.total
    (50, 90)
    """

    steps: tuple[tuple[Site, Method], ...]
    """Sites in model order, each with its method."""
    hits: tuple[Hits, ...]
    """For each selector, in the order of the rules, how many weights it has matched."""
    roles: Mapping[str, frozenset[str]] = field(repr=False)
    """Every layer's roles, by path."""
    total: int
    """All parameters of the model itself."""

    @functools.cached_property
    def rows(self) -> tuple[Row, ...]:
        """One row a weight; before them, one for each state that sites share."""
        counts: dict[Any, tuple[int, bool]] = {}
        trained_in_place: set[int] = set()
        rows = []
        states = shared_states([(site.on_meta(), method) for site, method in self.steps])
        for state in states.values():
            trainable = sum(p.numel() for p in state.module.parameters() if p.requires_grad)
            rows.append(Row("", "", "(shared)", (), (), str(state.method), trainable))
        for site, method in self.steps:
            key = (method.key, type(site.kind), site.shape, site.dtype, site.weight if site.kind else site.path)
            if key not in counts:
                counts[key] = _dry_run(site, method, shared_for(states, method))
            trainable, in_place = counts[key]
            if in_place:
                original = id(site.layer._parameters.get(site.weight))
                trainable = 0 if original in trained_in_place else trainable
                trained_in_place.add(original)
            layer = base_class(site.layer).__name__
            row = Row(site.path, layer, site.weight, site.shape, tuple(sorted(site.roles)), str(method), trainable)
            rows.append(row)
        return tuple(rows)

    @property
    def trainable(self) -> int:
        """Trainable parameters, all rows together."""
        return sum(row.parameters for row in self.rows)

    def __str__(self) -> str:
        """A table in which layers that differ in nothing but a number in their path share a line."""
        lines: Counter[tuple[str, ...]] = Counter()
        for row in self.rows:
            path = re.sub(r"(?<![^.])\d+(?![^.])", "*", row.path)
            roles = " ".join(role for role in row.roles if role != "all")
            shape = "×".join(map(str, row.shape))
            lines[path or "(the model)", row.layer, row.weight, shape, roles, row.method, str(row.parameters)] += 1
        headers = ["path", "layer", "weight", "matrix", "role", "method", "each", "sites", "trainable"]
        cells = [[*line[:-1], f"{int(line[-1]):,}", f"{n:,}", f"{int(line[-1]) * n:,}"] for line, n in lines.items()]
        share = f" ({self.trainable / self.total:.2%} of it)" if self.total else ""
        totals = (
            f"trainable: {count(self.trainable, 'parameter')}; the model has {count(self.total, 'parameter')}{share}"
        )
        rules = [f"rule {hit.selector} → {hit.method}: {count(hit.weights, 'weight')}" for hit in self.hits]
        return "\n".join([table(headers, cells, right="each sites trainable"), "", totals, *rules])


def plan(
    model: nn.Module,
    method: str | Method | Rules = "lora",
    *,
    targets: Selector | Sequence[Selector] | None = None,
    exclude: Selector | Sequence[Selector] | None = None,
    **hyperparameters: Any,
) -> Plan:
    """Say what `wrap` would do with the same arguments, and touch nothing.

    >>> import torch, peftkit
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> print(peftkit.plan(model, "lora", rank=2))
    path  layer   weight  matrix  role    method        each  sites  trainable
    ────  ──────  ──────  ──────  ──────  ────────────  ────  ─────  ─────────
    *     Linear  weight  8×8     linear  lora(rank=2)    32      1         32
    <BLANKLINE>
    trainable: 32 parameters; the model has 90 parameters (35.56% of it)
    rule @linear → lora(rank=2): 1 weight
    """
    rules = _rules(method, targets, hyperparameters)
    resolution = Resolution(inner(model))
    steps, hits = resolution.resolve(rules, _as_selectors(exclude))
    return Plan(steps, hits, resolution.roles, resolution.count())


# ------------------------------------------------------------------------------------------------- rules


def _rules(
    method: str | Method | Rules, targets: Selector | Sequence[Selector] | None, hyperparameters: Mapping[str, Any]
) -> list[Rule]:
    if not isinstance(method, Mapping):
        made = make_method(method, hyperparameters)
        return [Rule(_as_selectors(made.default_targets if targets is None else targets), made)]
    if targets is not None:
        raise SelectorError("a mapping of rules names its own targets; leave out targets=")
    if hyperparameters:
        raise FieldError(
            f"a mapping of rules takes no hyperparameters of its own, got {', '.join(hyperparameters)}; "
            'give them to the method: {"q_proj": peftkit.LoRA(rank=16)}'
        )
    if not method:
        raise SelectorError("the mapping of rules is empty; give at least one selector with its method")
    return [Rule(_as_selectors(selector), make_method(value, {})) for selector, value in method.items()]


def make_method(method: str | Method, hyperparameters: Mapping[str, Any]) -> Method:
    """A method from its name and hyperparameters, or the method itself."""
    if isinstance(method, str):
        return plugins.method(method)(**hyperparameters)
    if not isinstance(method, Method):
        raise FieldError(f"a method is a name or a peftkit.Method such as peftkit.LoRA(), got {method!r}")
    if hyperparameters:
        raise FieldError(
            f"{method} has its hyperparameters already, got {', '.join(hyperparameters)} besides; "
            f"set them where it is made: {type(method).__name__}({next(iter(hyperparameters))}=…)"
        )
    return method


def _as_selectors(value: Any) -> tuple[Selector, ...]:
    if value is None:
        return ()
    selectors = tuple(value) if isinstance(value, (list, tuple, set, frozenset)) else (value,)
    if not selectors:
        raise SelectorError("the list of selectors is empty; give at least one")
    return selectors


class State(NamedTuple):
    """What one method's sites share."""

    method: Method
    module: nn.Module
    first: Site
    """The first of the sites."""


def shared_states(steps: Sequence[tuple[Site, Method]]) -> dict[str, State]:
    """The state that sites share, by the key of the method that has it, in the order of the methods' first sites."""
    sites: dict[str, tuple[Method, list[Site]]] = {}
    for site, method in steps:
        if shares(method):
            sites.setdefault(method.key, (method, []))[1].append(site)
    states = {}
    for key, (method, mine) in sites.items():
        state = _made(mine[0], method, method.shared, mine)
        if state is None:
            continue
        if not isinstance(state, nn.Module):
            raise FieldError(f"{method.name}.shared() must return an nn.Module or None, got {type(state).__name__}")
        states[key] = State(method, state, mine[0])
    return states


def shares(method: Method) -> bool:
    """Whether the method may have state that its sites share."""
    return type(method).shared is not Method.shared


def shared_for(states: Mapping[str, State], method: Method) -> Shared | None:
    """The handle on the state that a method shares, or None."""
    if not shares(method) or method.key not in states:
        return None
    return Shared(states[method.key].module)


def adapter_for(site: Site, method: Method, shared: Shared | None) -> Any:
    """What the method gives for one site. On the meta device nothing is computed."""
    return _made(site, method, method.adapter, site, shared)


def _made(site: Site, method: Method, make: Callable[..., Any], *args: Any) -> Any:
    """What a method makes for a site: on meta where the site is. The method is named in what it raises."""
    try:
        if site.device.type != "meta":
            return make(*args)
        with _OnMeta(site.device):
            return make(*args)
    except Exception as error:
        error.add_note(f"raised by the method {method} ({type(method).__module__}) at {site.name or 'the model'}")
        raise


class _OnMeta(DeviceContext):
    """`with torch.device("meta")`, but nothing is filled with values that have nowhere to go: to fill a tensor with
    none takes torch longer on that device than all else that a small adapter is made of.
    """

    _FILLS = frozenset({Tensor.uniform_, Tensor.normal_})
    _FILLED = frozenset({torch.zeros, torch.ones})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self._FILLS and args[0].is_meta:
            return args[0]
        if func in self._FILLED and not (kwargs and kwargs.get("device")):
            func = torch.empty
        return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]


def _dry_run(site: Site, method: Method, shared: Shared | None) -> tuple[int, bool]:
    """How many parameters the method would train at a site, and whether in place."""
    rehearsal = site.on_meta()
    adapter = adapter_for(rehearsal, method, shared)
    if rehearsal.unfrozen:
        return site.layer._parameters[site.weight].numel(), True  # type: ignore[union-attr]
    return sum(p.numel() for p in adapter.parameters() if p.requires_grad) if adapter is not None else 0, False
