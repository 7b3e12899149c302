"""Finds methods and layer kinds among what is installed, and loads each only when its name is asked for.

* Listing reads package metadata and imports nothing. A plugin that is not asked for is never imported.
* Built-ins go through the same hooks as everybody else's; a third party cannot take a built-in's name.
* One broken plugin breaks only itself: what failed is unregistered, and the error names package, version and cause.
"""

import functools
import importlib
import importlib.metadata
import pkgutil
import threading
import weakref
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import Any

import pluggy
from torch import nn

from peftkit import __version__, hookspecs, layers
from peftkit.errors import PluginError, UnknownMethodError, did_you_mean
from peftkit.layers.kind import LayerKind, Parameter
from peftkit.method import Method

_METHODS_GROUP = "peftkit.methods"
_LAYERS_GROUP = "peftkit.layers"


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


def methods() -> list[MethodInfo]:
    """Every installed method, sorted by name. Reads metadata only: imports no plugin.

    >>> import peftkit
    >>> "lora" in [info.name for info in peftkit.methods()]
    True
    """
    builtin = _builtin_names()
    found = {MethodInfo(name, "peftkit", __version__) for name in builtin}
    points = _entry_points(_METHODS_GROUP)
    found |= {MethodInfo(point.name, *_origin(point)) for point in points if point.name not in builtin}
    return sorted(found, key=lambda info: (info.name, info.package))


def method(name: str) -> type[Method]:
    """The class of the method called `name`; its package is imported now, if it was not before.

    Raises `UnknownMethodError` when nothing installed offers it, `PluginError` when what offers it cannot be loaded.

    >>> import peftkit
    >>> peftkit.method("lora") is peftkit.LoRA
    True
    >>> peftkit.method("loar")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    peftkit.errors.UnknownMethodError: no method called 'loar' is installed; did you mean 'lora'? Installed: ...
    """
    with _lock:
        if name not in _loaded:
            _loaded[name] = _load(name)
        return _loaded[name]


_lock = threading.RLock()
_loaded: dict[str, type[Method]] = {}
_kinds: "weakref.WeakKeyDictionary[type, tuple[LayerKind, type] | None]" = weakref.WeakKeyDictionary()


@functools.cache
def _manager() -> pluggy.PluginManager:
    manager = pluggy.PluginManager("peftkit")
    manager.add_hookspecs(hookspecs)
    return manager


def _builtin_names() -> list[str]:
    package = importlib.import_module("peftkit.methods")  # the attribute of that name is the function above

    return sorted(module.name for module in pkgutil.iter_modules(package.__path__))


def _entry_points(group: str) -> list[EntryPoint]:
    """Entry points of a group, each once: an editable install can list its own twice."""
    seen: dict[tuple[str, str, str], EntryPoint] = {}
    for point in importlib.metadata.entry_points(group=group):
        seen.setdefault((point.name, point.value, _origin(point)[0]), point)
    return list(seen.values())


def _origin(point: EntryPoint) -> tuple[str, str]:
    """Name and version of the distribution that an entry point belongs to."""
    return (point.dist.name, point.dist.version) if point.dist else ("unknown package", "?")


def _load(name: str) -> type[Method]:
    if name in _builtin_names():
        return _offered(importlib.import_module(f"peftkit.methods.{name}"), name, f"peftkit {__version__}")
    points = [point for point in _entry_points(_METHODS_GROUP) if point.name == name]
    if not points:
        known = sorted({info.name for info in methods()})
        raise UnknownMethodError(
            f"no method called {name!r} is installed{did_you_mean(name, known) or ';'} Installed: {', '.join(known)}"
        )
    if len(points) > 1:
        owners = " and ".join(" ".join(_origin(point)) for point in points)
        raise PluginError(f"method {name!r} is offered by {owners}; uninstall all but one of them")
    owner = " ".join(_origin(points[0]))
    try:
        plugin = points[0].load()
    except Exception as error:
        raise PluginError(
            f"cannot load method {name!r} from {owner}: {type(error).__name__}: {error}; "
            "mend or uninstall that package (no other method is touched by it)"
        ) from error
    return _offered(plugin, name, owner)


def _offered(plugin: Any, name: str, owner: str) -> type[Method]:
    """Register a plugin and pick the method `name` from what it offers; leave nothing behind if that fails."""
    manager = _manager()
    before = manager.is_registered(plugin)
    try:
        if not before:
            manager.register(plugin)
            manager.check_pending()
        offered = _answers(manager.hook.peftkit_methods, plugin)
        found = [m for m in offered if isinstance(m, type) and issubclass(m, Method) and m.name == name]
        if len(found) != 1:
            raise PluginError(  # noqa: TRY301 - it gets the package's name below, as every other fault does
                f"its hook peftkit_methods offers {[getattr(m, 'name', m) for m in offered]}, not {name!r} once"
            )
    except Exception as error:
        if not before and manager.is_registered(plugin):
            manager.unregister(plugin)
        raise PluginError(f"cannot load method {name!r} from {owner}: {type(error).__name__}: {error}") from error
    return found[0]


def _answers(hook: pluggy.HookCaller, plugin: Any) -> list[Any]:
    """What one plugin answers to a hook; the other plugins are not asked."""
    answers: list[Any] = [each.function() for each in hook.get_hookimpls() if each.plugin is plugin]
    return [offered for answer in answers for offered in answer]


def kind_of(layer_class: type[nn.Module]) -> tuple[LayerKind, type] | None:
    """The kind that serves a layer class, and the class in its ancestry that the kind was written for; None
    if there is none.
    """
    try:
        return _kinds[layer_class]
    except KeyError:
        with _lock:
            found = _kinds[layer_class] = _find_kind(layer_class)
        return found


parameter_kind = Parameter()
"""Serves any parameter that no other kind does."""


def _find_kind(layer_class: type) -> tuple[LayerKind, type] | None:
    for ancestor in layer_class.__mro__:
        kind = _kind_named(f"{ancestor.__module__}.{ancestor.__qualname__}")
        if kind is not None:
            return kind, ancestor
    return None


@functools.cache
def _kind_named(qualified_name: str) -> LayerKind | None:
    builtin = _builtin_kinds().get(qualified_name)
    if builtin is not None:
        return builtin
    points = [point for point in _layer_points() if point.name == qualified_name]
    if not points:
        return None
    owners = " and ".join(" ".join(_origin(point)) for point in points)
    if len(points) > 1:
        raise PluginError(f"layer kind {qualified_name!r} is offered by {owners}; uninstall all but one of them")
    try:
        kinds: list[type[LayerKind]] = [k for k in points[0].load().peftkit_layers() if k.serves == qualified_name]
    except Exception as error:
        raise PluginError(
            f"cannot load layer kind {qualified_name!r} from {owners}: {type(error).__name__}: {error}"
        ) from error
    if len(kinds) != 1:
        raise PluginError(f"{owners} offers no layer kind that serves {qualified_name!r}, though its metadata says so")
    return kinds[0]()


@functools.cache
def _layer_points() -> list[EntryPoint]:
    return _entry_points(_LAYERS_GROUP)


@functools.cache
def _builtin_kinds() -> dict[str, LayerKind]:
    manager = _manager()
    manager.register(layers)
    return {kind.serves: kind() for kind in _answers(manager.hook.peftkit_layers, layers)}
