"""Finds methods and layer kinds among what is installed, and loads each only when its name is asked for.

* Listing reads package metadata and imports nothing. A plugin that is not asked for is never imported.
* Built-ins go through the same hooks as everybody else's; a third party cannot take a built-in's name.
* One broken plugin breaks only itself: the error names package, version, cause and remedy.

docs/plugins.md describes states and variables. Metadata is read in `discovery`, plugins are imported in `loading`.
"""

import contextlib
import functools
import importlib
import pkgutil
import threading
import weakref
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from peftkit import __version__, discovery, layers, loading
from peftkit.discovery import Claim
from peftkit.errors import PluginError, UnknownMethodError, WorkloadError, did_you_mean
from peftkit.layers.kind import LayerKind, Parameter
from peftkit.method import Method
from peftkit.workload import Workload

_OUT_OF_ORDER = ("broken", "incompatible", "ambiguous")


@dataclass(frozen=True, slots=True)
class MethodInfo:
    """A method that is installed, as its package's metadata has it.

    >>> import peftkit
    >>> [info.name for info in peftkit.methods() if info.package == "peftkit"]
    ['frozen', 'full', 'lora']
    """

    name: str
    package: str
    version: str

    def __str__(self) -> str:
        """`lora (peftkit 0.1.0)`."""
        return f"{self.name} ({self.package} {self.version})"


@dataclass(frozen=True, slots=True)
class WorkloadInfo:
    """A workload that is installed, as its package's metadata has it."""

    name: str
    package: str
    version: str

    def __str__(self) -> str:
        """`tiny-mlp (peftkit 0.1.0)`."""
        return f"{self.name} ({self.package} {self.version})"


@dataclass(frozen=True, slots=True)
class PluginInfo:
    """One entry point of an installed package, and what became of it."""

    group: str
    """`"methods"`, `"layers"` or `"workloads"`."""
    name: str
    """Of the method or workload; or the qualified name of the layer's class."""
    package: str
    version: str
    target: str
    """What would be imported: `"module"` or `"module:attribute"`."""
    state: str
    """`"available"`, `"loaded"`, `"disabled"`, `"incompatible"`, `"broken"` or `"ambiguous"`."""
    detail: str
    """The reason, where the state needs one."""


def methods() -> list[MethodInfo]:
    """Every installed method that is not disabled, sorted by name. Reads metadata only: imports no plugin.

    >>> import peftkit
    >>> "lora" in [info.name for info in peftkit.methods()]
    True
    """
    claims = _read_again()
    _refuse_disorder(claims)
    builtin = _builtin_methods()
    found = {MethodInfo(claim.name, claim.package, claim.version) for claim in builtin.values()}
    for claim in claims:
        if claim.group == "methods" and claim.name not in builtin and not discovery.disabled_by(claim.package):
            found.add(MethodInfo(claim.name, claim.package, claim.version))
    return sorted(found, key=lambda info: (info.name, info.package))


def info(name: str) -> MethodInfo | None:
    """Which package offers the method called `name`, for a method that is in use; None for a class of nobody's.

    Unlike `methods` it reads the metadata of what is installed at most once, and for a built-in method never.
    """
    claim = _builtin_methods().get(name)
    if claim is None:
        claim = next((claim for claim in _rivals("methods", name, _claims())), None)
    return MethodInfo(claim.name, claim.package, claim.version) if claim else None


def method(name: str) -> type[Method]:
    """The class of the method called `name`; its package is imported now, if it was not before.

    Raises `UnknownMethodError` when nothing installed offers it, `PluginError` when what offers it cannot be loaded,
    or is disabled.

    >>> import peftkit
    >>> peftkit.method("lora") is peftkit.LoRA
    True
    >>> peftkit.method("loar")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    peftkit.errors.UnknownMethodError: no method called 'loar' is installed; did you mean ...'lora'...? Installed: ...
    """
    claim = _builtin_methods().get(name)
    if claim is None or discovery.is_set(discovery.STRICT):
        claims = _read_again()
        _refuse_disorder(claims)
        claim = claim or _chosen("methods", name, claims)
        if claim is None:
            raise _unknown(name, claims)
    found: type[Method] = loading.load(claim)
    return found


def workloads() -> list[WorkloadInfo]:
    """Every installed workload that is not disabled, sorted by name. Imports no plugin.

    >>> from peftkit import plugins
    >>> "tiny-mlp" in [info.name for info in plugins.workloads()]
    True
    """
    claims = _read_again()
    _refuse_disorder(claims)
    builtin = _builtin_workloads()
    others = [c for c in claims if c.group == "workloads" and c.name not in builtin]
    allowed = [claim for claim in others if not discovery.disabled_by(claim.package)]
    found = {WorkloadInfo(claim.name, claim.package, claim.version) for claim in (*builtin.values(), *allowed)}
    return sorted(found, key=lambda info: (info.name, info.package))


def workload(name: str) -> Workload:
    """The workload called `name`; its package is imported now, if it was not before. Nothing is built or downloaded.

    Raises `WorkloadError` when nothing installed offers it, `PluginError` when what offers it cannot be loaded.

    >>> from peftkit import plugins
    >>> plugins.workload("tiny-mlp").unit
    'samples'
    """
    claim = _builtin_workloads().get(name) or _chosen("workloads", name, _read_again())
    if claim is None:
        known = [info.name for info in workloads()]
        hint = did_you_mean(name, known) or ";"
        raise WorkloadError(f"no workload called {name!r} is installed{hint} Installed: {', '.join(known)}")
    found: Workload = loading.load(claim)
    return found


def plugins() -> list[PluginInfo]:
    """Every entry point that an installed package has for peftkit, with its state. Imports nothing, and never raises.

    >>> from peftkit.plugins import plugins
    >>> [plugin.name for plugin in plugins() if plugin.package == "peftkit"]  # built-ins need no entry point
    []
    """
    claims = _read_again()
    return [PluginInfo(c.group, c.name, c.package, c.version, c.target, *_state(c, claims)) for c in claims]


def kind_of(layer_class: type[nn.Module]) -> tuple[LayerKind, type] | None:
    """The kind that serves a layer class, and the class in its ancestry that the kind was written for; None
    if there is none.

    Raises `PluginError` when a plugin offers the kind, and cannot be loaded.
    """
    met = _operation.kinds
    if met is not None and layer_class in met:
        return met[layer_class]
    settings = discovery.settings()
    known = _kinds.get(layer_class)
    if known is None or known[0] != settings:
        with loading.lock:
            known = _kinds[layer_class] = (settings, _find_kind(layer_class))
    if met is not None:
        met[layer_class] = known[1]
    return known[1]


def begin_operation() -> None:
    """Until `end_operation`, look each layer class up once in this thread: reading the environment for every one of
    thousands of layers takes longer than all else that is done with them.
    """
    _operation.kinds = {}


def end_operation() -> None:
    """Look at the environment again from now on, whichever operation began."""
    _operation.kinds = None


parameter_kind = Parameter()
"""Serves any parameter that no other kind does."""


class _Operation(threading.local):
    """What the operation that runs in this thread has found so far; None where none runs."""

    kinds: "dict[type, tuple[LayerKind, type] | None] | None" = None


_operation = _Operation()

# Each with the settings under which it was found: what is disabled later is not used any more.
_kinds: "weakref.WeakKeyDictionary[type, tuple[object, tuple[LayerKind, type] | None]]" = weakref.WeakKeyDictionary()


def _find_kind(layer_class: type) -> tuple[LayerKind, type] | None:
    claims = _claims()
    _refuse_disorder(claims)
    for ancestor in layer_class.__mro__:
        name = f"{ancestor.__module__}.{ancestor.__qualname__}"
        if name in _builtin_kinds():
            return _builtin_kinds()[name], ancestor
        claim = _chosen("layers", name, claims)
        if claim is not None:
            return loading.load(claim), ancestor
    return None


@functools.cache
def _claims() -> tuple[Claim, ...]:
    """What is installed. Kept, because a model has many layer classes to look up; each listing reads it again."""
    return tuple(discovery.claims())


def _read_again() -> tuple[Claim, ...]:
    _claims.cache_clear()
    _kinds.clear()
    if _operation.kinds is not None:
        _operation.kinds.clear()
    return _claims()


@functools.cache
def _builtin_methods() -> dict[str, Claim]:
    package = importlib.import_module("peftkit.methods")  # the attribute of that name is the function above
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
    return {name: Claim("methods", name, "peftkit", __version__, f"peftkit.methods.{name}") for name in names}


@functools.cache
def _builtin_workloads() -> dict[str, Claim]:
    package = importlib.import_module("peftkit.workloads")
    return {
        name: Claim("workloads", name, "peftkit", __version__, f"peftkit.workloads.{module}")
        for name, module in package.MODULES.items()
    }


@functools.cache
def _builtin_kinds() -> dict[str, LayerKind]:
    offered = loading.offers(Claim("layers", "", "peftkit", __version__, layers.__name__))
    return {kind.serves: kind() for kind in offered}


def _chosen(group: str, name: str, claims: Iterable[Claim]) -> Claim | None:
    """The one claim on a name that the environment allows; None where there is none."""
    allowed = _rivals(group, name, claims)
    if len(allowed) > 1:
        owners = " and ".join(f"{claim.owner} ({claim.target})" for claim in allowed)
        remedies = " or ".join(dict.fromkeys(f"{discovery.DENY}={claim.package}" for claim in allowed))
        raise PluginError(
            f"{loading.noun(group)} {name!r} is offered by {owners}; uninstall all but one of them, or set {remedies}"
        )
    return allowed[0] if allowed else None


def _rivals(group: str, name: str, claims: Iterable[Claim]) -> list[Claim]:
    named = [claim for claim in claims if (claim.group, claim.name) == (group, name)]
    return [claim for claim in named if not discovery.disabled_by(claim.package)]


def _unknown(name: str, claims: Iterable[Claim]) -> UnknownMethodError | PluginError:
    """What to say of a name that nothing offers, or nothing that the environment allows."""
    for claim in claims:
        if (claim.group, claim.name) == ("methods", name):
            reason = discovery.disabled_by(claim.package)
            return PluginError(f"method {name!r} is offered by {claim.owner}, which is disabled: {reason}")
    known = sorted({info.name for info in methods()})
    hint = discovery.where_to_find(name)
    hint = f"; {hint}." if hint else did_you_mean(name, known) or ";"
    return UnknownMethodError(f"no method called {name!r} is installed{hint} Installed: {', '.join(known)}")


def _state(claim: Claim, claims: Iterable[Claim]) -> tuple[str, str]:
    """State and detail, as `PluginInfo` has them; the first that applies."""
    disabled = discovery.disabled_by(claim.package)
    if disabled:
        return "disabled", disabled
    if claim.name in _builtins_of(claim.group):
        return "ambiguous", "the name is a built-in's, and the built-in is used"
    misfit = discovery.misfit(claim)
    if misfit[0]:
        return misfit
    others = [other for other in _rivals(claim.group, claim.name, claims) if other != claim]
    if others:
        return "ambiguous", "also offered by " + " and ".join(f"{other.owner} ({other.target})" for other in others)
    return loading.state(claim)


def _builtins_of(group: str) -> Iterable[str]:
    if group == "layers":
        return _builtin_kinds()
    return _builtin_methods() if group == "methods" else _builtin_workloads()


def _refuse_disorder(claims: tuple[Claim, ...]) -> None:
    """In strict mode, load all that is not disabled, and refuse to go on if any of it is out of order."""
    if not discovery.is_set(discovery.STRICT):
        return
    with loading.lock:
        key = (discovery.settings(), claims)
        if key in _in_order:
            return
        _in_order.add(key)  # before the loading, because a plugin may ask for another one while it is imported
        faults = [fault for fault in (_fault(claim, claims) for claim in claims) if fault]
        if faults:
            _in_order.discard(key)
            raise PluginError(f"{discovery.STRICT} is set, and not every plugin is in order: " + "; ".join(faults))


_in_order: set[tuple[object, ...]] = set()


def _fault(claim: Claim, claims: Iterable[Claim]) -> str:
    if _state(claim, claims)[0] == "available":
        with contextlib.suppress(PluginError):
            loading.load(claim)
    state, detail = _state(claim, claims)
    return f"{claim.name!r} of {claim.owner} is {state}: {detail}" if state in _OUT_OF_ORDER else ""
