"""The hooks through which a package says what it offers. Hooks say what exists; classes say how it works.

A hook is for ever, so there are as few as can be. None is ever called from a `forward`. A hook may be given further
arguments in a later version; an implementation takes as many of them as it wants.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from peftkit.layers.kind import LayerKind
    from peftkit.method import Method
    from peftkit.workload import Workload

hookspec = pluggy.HookspecMarker("peftkit")

hookimpl = pluggy.HookimplMarker("peftkit")
"""Marks a function of a plugin as the implementation of one of the hooks below."""


@hookspec
def peftkit_methods() -> Iterable[type["Method"]]:  # type: ignore[empty-body]
    """The methods that this plugin offers: classes, each a frozen dataclass.

    Called once for each name that is asked for. The name of the entry point in the group `peftkit.methods` must be the
    `name` of exactly one of them. Since 0.1.

    >>> import peftkit
    >>> @peftkit.hookimpl
    ... def peftkit_methods():
    ...     return [MyMethod]
    """


@hookspec
def peftkit_layers() -> Iterable[type["LayerKind"]]:  # type: ignore[empty-body]
    """The layer kinds that this plugin offers: classes, of each of which one instance is made.

    Called once for each layer class that is met. The name of the entry point in the group `peftkit.layers` must be what
    exactly one of them `serves`. Since 0.1.

    >>> import peftkit
    >>> @peftkit.hookimpl
    ... def peftkit_layers():
    ...     return [MyLinear4bit]
    """


@hookspec
def peftkit_workloads() -> Iterable[type["Workload"]]:  # type: ignore[empty-body]
    """The workloads that this plugin offers to `peftkit bench`: classes, of each of which one instance is made.

    Called once for each name that is asked for. The name of the entry point in the group `peftkit.workloads` must be
    the `name` of exactly one of them. Since 0.1.

    >>> import peftkit
    >>> @peftkit.hookimpl
    ... def peftkit_workloads():
    ...     return [MyWorkload]
    """
