"""Resolves rules against a model: which selector stands for which weights, and what is wrong where it stands for none.

Every rule is resolved against the model as it was before the first wrap. A selector that hits nothing which its
method can adapt is an error, and so is a rule that earlier rules leave nothing to.
"""

import functools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from peftkit import discovery, plugins
from peftkit.adapter import Site, adapter_dtype
from peftkit.composition import base_class, raw_parameter
from peftkit.errors import SelectorError, UnsupportedLayerError, nearest
from peftkit.installed import Adapters, inner, record
from peftkit.layers.kind import LayerKind
from peftkit.method import Method
from peftkit.roles import find_roles
from peftkit.selectors import Candidate, Selector, candidates, compile_selector, describe
from peftkit.sharding import is_sharded


@dataclass(frozen=True, slots=True)
class Rule:
    """A method, and what it is meant for."""

    selectors: tuple[Selector, ...]
    method: Method


@dataclass(frozen=True, slots=True)
class Hits:
    """How much one selector of a rule has matched."""

    selector: str
    method: str
    weights: int


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """Every module by its first path, without what wrapping has added."""
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()
    waiting = [("", model)]
    while waiting:
        path, module = waiting.pop()
        if id(module) in seen or isinstance(module, Adapters):
            continue
        seen.add(id(module))
        found[path] = module
        if module._modules:
            prefix = f"{path}." if path else ""
            children = [(prefix + name, child) for name, child in module._modules.items() if child is not None]
            waiting += reversed(children)  # the first is taken next
    return found


class Resolution:
    """One model's candidates, and the rules resolved against them."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = modules_of(model)
        known = record(model)
        self.roles: Mapping[str, frozenset[str]] = known.roles if known else find_model_roles(model)
        self.candidates = candidates(self.modules)
        self.paths = {id(module): path for path, module in self.modules.items()}
        self._left_out: set[tuple[int, str]] = set()

    def resolve(
        self, rules: Sequence[Rule], exclude: tuple[Selector, ...]
    ) -> tuple[tuple[tuple[Site, Method], ...], tuple[Hits, ...]]:
        """Resolve the rules; the first that can adapt a weight has it. Returns sites in model order, and each
        selector's hits.
        """
        excluded = self._left_out = self._excluded(exclude)
        taken: dict[tuple[int, str], tuple[Site, Method]] = {}
        hits: list[Hits] = []
        for rule in rules:
            before = len(taken)
            for selector in rule.selectors:
                sites = self._sites(selector, rule.method)
                left = {key: site for key, site in sites.items() if key not in excluded}
                if not left:
                    raise SelectorError(f"everything that {describe(selector)!r} → {rule.method} matches is excluded")
                for key, site in left.items():
                    taken.setdefault(key, (site, rule.method))
                hits.append(Hits(describe(selector), str(rule.method), len(left)))
            if len(taken) == before:
                raise SelectorError(
                    f"everything that {', '.join(repr(describe(s)) for s in rule.selectors)} → {rule.method} "
                    "matches is taken by earlier rules; the first match wins, so put it first"
                )
        order = {key: i for i, key in enumerate(self._keys())}
        steps = tuple(taken[key] for key in sorted(taken, key=lambda key: order[key]))
        return steps, tuple(hits)

    def count(self) -> int:
        """How many parameters the model itself has; a shared one counts once, one without a shape not at all."""
        parameters = {id(p): p for m in self.modules.values() for _, p in _parameters(m) if p is not None}
        return sum(0 if is_lazy(p) else p.numel() for p in parameters.values())

    def _keys(self) -> Iterator[tuple[int, str]]:
        for module in self.modules.values():
            yield id(module), "module"
            for name, _ in _parameters(module):
                yield id(module), name
            found = kind_in(module)
            if found:
                # A parametrized weight is no parameter of its layer any more.
                yield from ((id(module), w) for w in found[0].weights(module) if w not in module._parameters)

    def _matching(self, selector: Selector) -> list[Candidate]:
        matches = compile_selector(selector)
        nothing: frozenset[str] = frozenset()
        return [c for c in self.candidates if matches(c, self.roles.get(c.path, nothing))]

    def _excluded(self, selectors: tuple[Selector, ...]) -> set[tuple[int, str]]:
        """What must be left alone: the parameters selected, and all at or below the modules selected."""
        keys: set[tuple[int, str]] = set()
        for selector in selectors:
            matching = self._matching(selector)
            if not matching:
                raise SelectorError(f"exclude: {self._no_hit(selector)}")
            for candidate in matching:
                if candidate.parameter is not None:
                    keys.add((id(candidate.module), candidate.parameter))
                    continue
                for module in candidate.module.modules():
                    found = kind_in(module)
                    names = {n for n, _ in _parameters(module)} | set(found[0].weights(module) if found else ())
                    keys |= {(id(module), name) for name in (*names, "module")}
        return keys

    def _sites(self, selector: Selector, method: Method) -> dict[tuple[int, str], Site]:
        matching = self._matching(selector)
        if not matching:
            raise SelectorError(self._no_hit(selector))
        expand = {"weights": self._weights, "parameters": self._all_parameters, "modules": self._module}[method.scope]
        sites = {(id(site.layer), site.weight): site for c in matching for site in expand(c, method)}
        if not sites:
            raise UnsupportedLayerError(self._no_site(selector, method, matching))
        return sites

    def _weights(self, candidate: Candidate, method: Method) -> Iterator[Site]:
        """The matrices of a layer that has a kind; or one parameter, chosen by its own path."""
        layer = candidate.module
        found = kind_in(layer)
        if candidate.parameter is None:
            if found is not None and method.matrices:
                for weight in found[0].weights(layer):
                    if _fits(found[0], layer, weight):
                        yield self._site(layer, weight)
                    elif is_foreign(layer, weight) and (id(layer), weight) not in self._left_out:
                        raise UnsupportedLayerError(_foreign(self.paths[id(layer)], layer, weight))
            return
        if (id(layer), candidate.parameter) in self._left_out:
            return
        raw = raw_parameter(layer, candidate.parameter)
        is_weight = found is not None and candidate.parameter in found[0].weights(layer)
        if method.matrices if is_weight or raw.dim() >= 2 else method.vectors:
            yield self._site(layer, candidate.parameter)

    def _all_parameters(self, candidate: Candidate, method: Method) -> Iterator[Site]:
        """One parameter; or every parameter at or below a module that the method can adapt. A shared one stands at
        its first holder, once.
        """
        for module in [candidate.module] if candidate.parameter else candidate.module.modules():
            if id(module) not in self.paths:
                continue
            for name, p in _parameters(module):
                if p is None or candidate.parameter not in (None, name):
                    continue
                if not kind_for(module, name).dtype(module, name, p).is_floating_point:
                    continue
                if method.matrices if is_lazy(p) or p.dim() >= 2 else method.vectors:
                    yield self._site(*self._holders[id(p)][0])

    def _module(self, candidate: Candidate, method: Method) -> Iterator[Site]:  # noqa: ARG002
        """The module as a whole."""
        if candidate.parameter is None:
            site = module_site(self.paths[id(candidate.module)], candidate.module)
            site.roles = self.roles.get(site.path, frozenset())
            yield site

    @functools.cached_property
    def _holders(self) -> dict[int, list[tuple[nn.Module, str]]]:
        """Every parameter's holders, in model order: more than one where it is tied."""
        holders: dict[int, list[tuple[nn.Module, str]]] = {}
        for module in self.modules.values():
            for name, p in _parameters(module):
                if p is not None:
                    holders.setdefault(id(p), []).append((module, name))
        return holders

    def _site(self, layer: nn.Module, weight: str) -> Site:
        path = self.paths[id(layer)]
        site = site_of(path, layer, weight)
        site.roles = self.roles.get(site.name) or self.roles.get(path, frozenset())
        holders = self._holders.get(id(layer._parameters.get(weight)), [])
        names = [f"{self.paths[id(module)]}.{name}".removeprefix(".") for module, name in holders]
        site.tied = tuple(name for name in names if name != site.name)
        return site

    # ------------------------------------------------------------------------------ errors that help

    def _no_hit(self, selector: Selector) -> str:
        text = describe(selector)
        if text.startswith("@"):
            present = Counter(role for roles in self.roles.values() for role in roles if role != "all")
            listed = ", ".join(f"@{role} ({n})" for role, n in present.most_common())
            return f"selector {text!r} matches no layer of this model; its roles are {listed or 'none'}"
        paths = [c.path for c in self.candidates if c.path]
        if not isinstance(selector, str):
            return f"selector {text!r} matches nothing in this model; its layers are {_some(paths)}"
        last = {path.rpartition(".")[2] for path in paths}
        near = nearest(text, last if "." not in text else paths) or nearest(text.rpartition(".")[2], last)
        hint = f"nearest names: {', '.join(near)}" if near else f"its layers are {_some(sorted(last))}"
        return f"selector {text!r} matches nothing in this model; {hint}"

    def _no_site(self, selector: Selector, method: Method, matching: list[Candidate]) -> str:
        first = matching[0]
        what = f"{first.path or 'the model'} ({base_class(first.module).__name__})"
        text = f"selector {describe(selector)!r} matches {what}" + (
            f" and {len(matching) - 1} more" if matching[1:] else ""
        )
        if first.parameter is not None:
            is_vector = raw_parameter(first.module, first.parameter).dim() < 2
            what, adapts = ("vector", "matrices") if is_vector else ("matrix", "vectors")
            return f"{text}, a {what}, which {method.name} cannot adapt; {method.name} adapts {adapts}"
        if first.module._modules:
            below = f"{first.path}.**" if first.path else "**"
            return f"{text}, a container and no layer that {method.name} can adapt; for what is below, write {below!r}"
        own = [f"{first.path}.{n}" for n, p in _parameters(first.module) if p is not None and p.dim() >= 2]
        if own:
            return f"{text}, for which no layer kind is installed; select its parameters by path: {', '.join(own)}"
        return f"{text}, which has no weight that {method.name} can adapt"


def site_of(path: str, layer: nn.Module, weight: str) -> Site:
    """The site of one parameter of a layer; `UnsupportedLayerError` where it cannot be adapted."""
    raw = raw_parameter(layer, weight)
    name = f"{path}.{weight}" if path else weight
    if is_lazy(raw):
        raise UnsupportedLayerError(f"{name} has no shape yet (a lazy layer); run the model once before wrapping it")
    if is_sharded(raw):
        raise UnsupportedLayerError(f"{name} is sharded already; wrap the model first, then call fully_shard")
    kind = kind_for(layer, weight)
    if not kind.quantised and is_foreign(layer, weight):
        raise UnsupportedLayerError(_foreign(path, layer, weight))
    dtype = kind.dtype(layer, weight, raw) if isinstance(raw, Tensor) else None
    if dtype is None or not dtype.is_floating_point:
        raise UnsupportedLayerError(f"{name} is {dtype or type(raw)}, not a floating point tensor")
    if "adapters" in layer._modules and not isinstance(layer._modules["adapters"], Adapters):
        raise UnsupportedLayerError(f"{path or 'the model'} has a submodule called 'adapters' of its own; rename it")
    device = raw.device
    if raw.is_meta and "_hf_hook" in layer.__dict__:
        # accelerate keeps an offloaded weight on meta and brings it to this device in a hook.
        device = torch.device(getattr(layer.__dict__["_hf_hook"], "execution_device", None) or device)
    return Site(path, weight, layer, kind, kind.shape(layer, weight), adapter_dtype(dtype), device)


def module_site(path: str, module: nn.Module) -> Site:
    """The site of a module as a whole: dtype and device are those of its first floating point parameter."""
    like = next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0))
    return Site(path, "module", module, None, (), adapter_dtype(like.dtype), like.device, features=_features(module))


def _features(module: nn.Module) -> int | None:
    """How many features the last layer within a module puts out, of those that have a kind; a norm counts as one."""
    for layer in reversed(list(modules_of(module).values())):
        found = kind_in(layer)
        features = (found[0] if found else plugins.parameter_kind).features(layer)
        if features is not None:
            return features
    return None


def find_model_roles(model: nn.Module) -> dict[str, frozenset[str]]:
    """Every layer's roles, by path, in a model that has not been wrapped yet."""
    return find_roles(inner(model), _family)


def kind_for(layer: nn.Module, weight: str) -> Any:
    """The kind that sees this parameter as a matrix: the layer's own, or the one for any parameter."""
    found = kind_in(layer)
    own = found is not None and weight in found[0].weights(layer) and _fits(found[0], layer, weight)
    return found[0] if found is not None and own else plugins.parameter_kind


def _fits(kind: Any, layer: nn.Module, weight: str) -> bool:
    """Whether the tensor is what the kind takes it for; a packed 4-bit weight of a subclass is not."""
    raw = raw_parameter(layer, weight)
    if is_lazy(raw) or is_sharded(raw):
        return True  # site_of explains
    return isinstance(raw, Tensor) and (kind.quantised or not _has_own_class(raw)) and kind.fits(layer, weight, raw)


def kind_in(layer: nn.Module) -> tuple[LayerKind, type] | None:
    """The kind that serves a layer, and the class of layers that it was written for; None if there is none.

    Where a weight is a tensor of a class of its own, a kind for that class comes first, if it extends the layer's.
    """
    own = plugins.kind_of(base_class(layer))
    for p in layer._parameters.values() if own else ():
        found = plugins.kind_of(type(p)) if _has_own_class(p) else None  # type: ignore[arg-type]
        if own and found and isinstance(found[0], type(own[0])):
            return found[0], own[1]
    return own


def is_foreign(layer: nn.Module, weight: str) -> bool:
    """Whether a weight is stored in a way that another library than torch knows; quantised, as a rule."""
    raw = raw_parameter(layer, weight)
    if _has_own_class(raw):
        return not is_sharded(raw)
    found = plugins.kind_of(base_class(layer))
    if found is None or weight not in found[0].weights(layer) or not isinstance(raw, Tensor) or is_lazy(raw):
        return False
    return not raw.is_floating_point() and _library(layer, raw) != "torch"


def _foreign(path: str, layer: nn.Module, weight: str) -> str:
    raw = raw_parameter(layer, weight)
    name = f"{path}.{weight}" if path else weight
    owner, library = base_class(layer).__name__, _library(layer, raw)
    how = f"a {type(raw).__name__}" if _has_own_class(raw) else f"of {raw.dtype}"
    known = plugins.kind_of(type(raw)) if _has_own_class(raw) else None
    package = discovery.package_for(library)
    remedy = f"pip install {package}" if package else "install or write one"
    if known:
        remedy = f"{type(known[0]).__name__} is for other layers"
    return (
        f"{name} ({owner}) is {how}, stored as {library} alone can read it, and no layer kind for that is installed: "
        f"{remedy}; or leave it out: exclude={path!r}"
    )


def _library(layer: nn.Module, raw: Any) -> str:
    """The package whose layer or tensor this is."""
    owner = type(raw) if _has_own_class(raw) else base_class(layer)
    return owner.__module__.partition(".")[0]


def _has_own_class(raw: Any) -> bool:
    """Whether it is a tensor of a class that says itself what its operations do."""
    return type(raw) not in (nn.Parameter, Tensor, type(None)) and is_traceable_wrapper_subclass(raw)


def is_lazy(raw: Any) -> bool:
    """Whether a parameter has no shape yet."""
    return isinstance(raw, UninitializedTensorMixin)


def _parameters(module: nn.Module) -> list[tuple[str, nn.Parameter | None]]:
    return list(module._parameters.items())


def _family(module: nn.Module) -> str | None:
    found = kind_in(module)
    return found[0].family if found else None


def _some(names: Sequence[str], n: int = 8) -> str:
    return ", ".join(names[:n]) + (f" and {len(names) - n} more" if len(names) > n else "")
