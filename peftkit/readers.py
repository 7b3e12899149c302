"""Finds who reads a layer's weight without calling the layer, by scanning the bytecode of its ancestors.

`nn.MultiheadAttention` reads `out_proj.weight`, Mamba reads `dt_proj.weight`: an adapter that lives only in its
own layer's forward would be dead there, and nobody would be told. What a scan cannot see (`getattr(m, name)`, a
helper in another module) is left to `verify`.
"""

import dis
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from types import CodeType, FunctionType

from torch import nn

_METADATA = frozenset(
    {"device", "dtype", "shape", "size", "dim", "ndim", "numel", "is_meta", "is_cuda", "requires_grad", "element_size"}
)
"""A read of one of these asks about the weight, not for it."""


def find_readers(
    modules: Mapping[str, nn.Module], layers: Mapping[str, frozenset[str]], base_class: Callable[[nn.Module], type]
) -> dict[str, list[str]]:
    """Paths of the modules whose forward reads a weight of one of `layers` itself, each with the paths of these layers.

    `modules` maps every path of the model to its module; `layers` maps each adapted path to its adapted parameters'
    names.
    """
    readers: dict[str, list[str]] = {}
    for path, weights in layers.items():
        child = path.rpartition(".")[2]
        for ancestor in _ancestors(path):
            reads = child_reads(base_class(modules[ancestor])) if ancestor in modules else frozenset()
            if any((child, weight) in reads for weight in weights):
                readers.setdefault(ancestor, []).append(path)
    return readers


def _ancestors(path: str) -> Iterator[str]:
    while path:
        path = path.rpartition(".")[0]
        yield path


@functools.lru_cache(maxsize=4096)
def child_reads(module_class: type) -> frozenset[tuple[str, str]]:
    """Pairs `(child, parameter)` that the class's forward, or a method it uses, reads as `<…>.child.parameter`."""
    seen: set[str] = set()
    queue, pairs = ["forward"], set()
    while queue:
        name = queue.pop()
        if name in seen:
            continue
        seen.add(name)
        for code in _codes_of(module_class, name):
            pairs |= set(_attribute_pairs(code))
            queue += [other for other in code.co_names if other not in seen]
    return frozenset(pairs)


def _codes_of(module_class: type, name: str) -> Iterator[CodeType]:
    """The code of every definition of a method in the class's ancestry (`super()` reaches them), nested
    functions too.
    """
    for ancestor in module_class.__mro__:
        if ancestor in (nn.Module, object):
            continue
        function = ancestor.__dict__.get(name)
        function = inspect.unwrap(getattr(function, "__func__", function)) if function is not None else None
        if isinstance(function, FunctionType):
            yield from _nested(function.__code__)


def _nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested(constant)


def _attribute_pairs(code: CodeType) -> Iterator[tuple[str, str]]:
    """Consecutive attribute loads `a.b`, unless what is asked is only the weight's metadata, or what type it has."""
    asked_for_type = False
    names: list[str | None] = []
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("CACHE", "EXTENDED_ARG", "NOP"):
            continue
        attribute = instruction.opname in ("LOAD_ATTR", "LOAD_METHOD")
        if len(names) >= 2 and not asked_for_type and not (attribute and instruction.argval in _METADATA):
            yield from _pair(names)
        if attribute:
            names.append(instruction.argval)
            continue
        names = []
        if instruction.opname.startswith("LOAD_GLOBAL"):
            asked_for_type = instruction.argval == "isinstance"
        elif not instruction.opname.startswith("LOAD_FAST"):
            asked_for_type = False
    if len(names) >= 2 and not asked_for_type:
        yield from _pair(names)


def _pair(names: list[str | None]) -> Iterator[tuple[str, str]]:
    child, parameter = names[-2:]
    if child is not None and parameter is not None:
        yield child, parameter
