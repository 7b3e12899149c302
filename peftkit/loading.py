"""Imports one plugin, asks its hook what it offers, and takes the class that its entry point promises.

* A plugin breaks only itself. Whatever it raises, it is unregistered, and the failure is remembered: asked for again,
  it is not imported again.
* Built-ins come through here too.
"""

import contextlib
import functools
import inspect
import reprlib
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import EntryPoint
from typing import Any

import pluggy

from peftkit import discovery, hookspecs
from peftkit.discovery import Claim
from peftkit.errors import PluginError
from peftkit.layers.kind import LayerKind
from peftkit.method import Method
from peftkit.workload import Workload

lock = threading.RLock()
"""Held while anything is loaded. Reentrant: a plugin may ask for another one while it is imported."""

_results: dict[object, Any] = {}
_failures: dict[object, BaseException] = {}


class _Manager(pluggy.PluginManager):
    def parse_hookimpl_opts(self, plugin: Any, name: str) -> Any:
        """Look at `peftkit_…` names alone: what else a plugin has (properties, say) is not touched."""
        return super().parse_hookimpl_opts(plugin, name) if name.startswith("peftkit_") else None


@functools.cache
def _manager() -> pluggy.PluginManager:
    manager = _Manager("peftkit")
    manager.add_hookspecs(hookspecs)
    return manager


def load(claim: Claim) -> Any:
    """What the claim promises: a `Method` class, or a `LayerKind` or `Workload` instance. Raises `PluginError`."""
    with lock:
        if claim not in _failures:
            try:
                return _remembered(claim, lambda: _taken(claim))
            except (Exception, SystemExit) as error:  # noqa: BLE001 - a plugin may raise anything; Ctrl-C is let through
                _trace(claim, f"failed: {discovery.told(error)}")
        raise PluginError(message(claim, reason(_failures[claim]))) from _failures[claim]


def offers(claim: Claim) -> list[Any]:
    """All that the claim's plugin offers in the claim's group, whatever name is claimed."""
    with lock, _registered(claim) as plugin:
        return _offered(claim, plugin)


def state(claim: Claim) -> tuple[str, str]:
    """`("loaded", "")`, `("broken", why)`, or `("available", "")` for what was not asked for so far."""
    if claim in _failures:
        return "broken", reason(_failures[claim])
    return ("loaded" if claim in _results else "available"), ""


def message(claim: Claim, why: str) -> str:
    """An error's text: what, whose, why, and what can be done."""
    return (
        f"cannot load {noun(claim.group)} {claim.name!r} from {claim.owner}: {why}; mend, upgrade or uninstall "
        f"{claim.package}, or set {discovery.DENY}={claim.package} (nothing else is touched by it)"
    )


def noun(group: str) -> str:
    """What one member of a group is called."""
    return {"methods": "method", "layers": "layer kind", "workloads": "workload"}[group]


def reason(error: BaseException) -> str:
    """What went wrong, in one line."""
    return str(error) if isinstance(error, PluginError) else discovery.told(error)


def _remembered(key: object, make: Callable[[], Any]) -> Any:
    """What `make` returned, or raised, when it was first called for this key."""
    if key in _failures:
        raise _failures[key]
    if key not in _results:
        try:
            _results[key] = make()
        except (Exception, SystemExit) as error:
            _failures[key] = error
            raise
    return _results[key]


def _taken(claim: Claim) -> Any:
    kind, why = discovery.misfit(claim)
    if kind:
        raise PluginError(why)
    with _registered(claim) as plugin:
        return _picked(claim, _offered(claim, plugin))


@contextlib.contextmanager
def _registered(claim: Claim) -> Iterator[Any]:
    """The plugin, imported and registered; nothing stays registered if what is done with it fails."""
    # Imported once, however many names the plugin has: a second try would fail for other reasons than the first.
    plugin = _remembered((claim.location, claim.target), lambda: _imported(claim))
    manager = _manager()
    before = manager.is_registered(plugin)
    try:
        if not before:
            manager.register(plugin, name=f"{claim.target} in {claim.location}" if claim.location else claim.target)
            manager.check_pending()
        yield plugin
    except BaseException:
        if not before and manager.is_registered(plugin):
            manager.unregister(plugin)
        raise


def _imported(claim: Claim) -> Any:
    _trace(claim, f"load {claim.target}")
    return EntryPoint(name=claim.name, value=claim.target, group=claim.group).load()


def _offered(claim: Claim, plugin: Any) -> list[Any]:
    """What this plugin answers to the hook of the claim's group; the other plugins are not asked."""
    name = f"peftkit_{claim.group}"
    hook: pluggy.HookCaller = getattr(_manager().hook, name)
    implementations = [each for each in hook.get_hookimpls() if each.plugin is plugin]
    if not implementations:
        raise PluginError(f"it has no function {name} that is marked with @peftkit.hookimpl")
    offered: list[Any] = []
    for each in implementations:
        _trace(claim, f"call {name}")
        answer: Any = each.function()
        if not isinstance(answer, Iterable):
            raise PluginError(f"its hook {name} returned {reprlib.repr(answer)}, not a list of classes")
        offered.extend(answer)
    for offer in offered:
        fault = _method_fault(offer) if claim.group == "methods" else _class_fault(offer, _MADE_OF[claim.group])
        if fault:
            raise PluginError(f"its hook {name} offers {reprlib.repr(offer)}, {fault}")
    return offered


def _method_fault(offer: Any) -> str:
    if isinstance(offer, Method):
        return "an object; it must offer the class itself"
    if not (isinstance(offer, type) and issubclass(offer, Method)):
        return "which is no subclass of peftkit.Method"
    own: Any = vars(offer).get(
        "__dataclass_params__"
    )  # not inherited: a class that is not decorated loses its own fields
    if own is None or not own.frozen:
        return "which is no frozen dataclass; decorate it with @dataclass(frozen=True)"
    return _abstract(offer)


_MADE_OF: dict[str, type[Any]] = {"layers": LayerKind, "workloads": Workload}
"""Groups whose classes are made into one instance each, when they are picked."""


def _class_fault(offer: Any, contract: type[Any]) -> str:
    if isinstance(offer, contract):
        return "an object; it must offer the class itself"
    if not (isinstance(offer, type) and issubclass(offer, contract)):
        return f"which is no subclass of peftkit.{contract.__name__}"
    return _abstract(offer)


def _abstract(offer: type) -> str:
    missing = ", ".join(sorted(getattr(offer, "__abstractmethods__", ())))
    return f"which does not define {missing}" if inspect.isabstract(offer) else ""


def _picked(claim: Claim, offered: list[Any]) -> Any:
    attribute = "serves" if claim.group == "layers" else "name"
    names = [getattr(offer, attribute, None) for offer in offered]
    if names.count(claim.name) != 1:
        raise PluginError(f"its hook peftkit_{claim.group} offers {names}, not {claim.name!r} once")
    found = offered[names.index(claim.name)]
    return found if claim.group == "methods" else found()


def _trace(claim: Claim, event: str) -> None:
    if discovery.is_set(discovery.TRACE):
        sys.stderr.write(f"peftkit: {claim.owner}: {event}\n")
