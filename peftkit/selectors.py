"""One language to point at layers and weights: globs, roles, classes, regexes and callables.

Every rule of `wrap`, `plan` and the command line is a selector, and all of them are tested on the same
candidates: the model's modules and the parameters that these hold themselves.

Globs are matched in linear time (`peftkit.globs`).
"""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import nn

from peftkit.errors import SelectorError, did_you_mean
from peftkit.globs import Glob

Selector: TypeAlias = str | type[Any] | re.Pattern[str] | Callable[[str, nn.Module], bool]
"""A glob or `"@role"`, a class, a compiled regex, or a callable `(path, module) -> bool`."""

ROLES = ("linear", "attention", "mlp", "head", "embedding", "norm", "conv", "all")
"""The roles that `"@role"` can name; `peftkit.roles` finds them."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """What a selector is tested on: a module, or one parameter that a module holds itself.

    `path` is the dotted path of the module or of the parameter, `module` the module itself or the parameter's
    owner, `parameter` the parameter's own name, None for a module.
    """

    path: str
    module: nn.Module
    parameter: str | None = None


def candidates(modules: Mapping[str, nn.Module]) -> list[Candidate]:
    """Every module by path, each followed by the parameters that it holds itself.

    A parameter tied across two modules appears under both, because each of them is a place to adapt.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    >>> [c.path for c in candidates(dict(model.named_modules()))]
    ['', '0', '0.weight', '0.bias', '1']
    """
    found = []
    for path, module in modules.items():
        found.append(Candidate(path, module))
        prefix = f"{path}." if path else ""
        found += [Candidate(prefix + name, module, name) for name, _ in module.named_parameters(recurse=False)]
    return found


def compile_selector(selector: Selector) -> Callable[[Candidate, Collection[str]], bool]:
    """A function that tells whether `selector` picks a candidate, given that and its roles (without the `@`).

    Raises `SelectorError` when the selector is malformed. Globs, regexes and roles pick modules and parameters,
    classes and callables only modules.

    >>> picks = compile_selector("layers.{8..15}.**.{q,v}_proj")
    >>> picks(Candidate("layers.9.self_attn.q_proj", nn.Identity()), ())
    True
    >>> compile_selector("@attention")(Candidate("encoder.query", nn.Identity()), {"attention", "linear"})
    True
    """
    if isinstance(selector, str):
        return _compile_role(selector) if selector.startswith("@") else _compile_glob(selector)
    if isinstance(selector, type):
        return lambda candidate, _: candidate.parameter is None and isinstance(candidate.module, selector)
    if isinstance(selector, re.Pattern):
        if not isinstance(selector.pattern, str):
            raise SelectorError(f"{selector!r} matches bytes, but a path is text: compile a str")
        return lambda candidate, _: selector.fullmatch(candidate.path) is not None
    if isinstance(selector, nn.Module):
        given = type(selector).__name__
        raise SelectorError(f"an instance of {given} is no selector: give its path, or the class {given} itself")
    if not callable(selector):
        raise SelectorError(
            f"{selector!r} is no selector: give a glob such as '{{q,v}}_proj', a role such as '@linear', a class, "
            "a compiled regex, or a callable (path, module) -> bool"
        )
    return _compile_callable(selector)


def describe(selector: Selector) -> str:
    """A short text for tables and errors.

    >>> describe("*.fc1"), describe(nn.Conv2d), describe(re.compile("fc[12]"))
    ('*.fc1', 'Conv2d', 're:fc[12]')
    """
    if isinstance(selector, str):
        return selector
    if isinstance(selector, re.Pattern):
        return f"re:{selector.pattern}"
    return str(getattr(selector, "__qualname__", None) or repr(selector))


def _compile_role(selector: str) -> Callable[[Candidate, Collection[str]], bool]:
    role = selector.removeprefix("@")
    if role not in ROLES:
        known = ", ".join(f"@{x}" for x in ROLES)
        raise SelectorError(f"no role {selector!r}{did_you_mean(selector, known.split(', '))} (the roles are {known})")
    return lambda _, roles: role in roles


def _compile_callable(function: Callable[[str, nn.Module], bool]) -> Callable[[Candidate, Collection[str]], bool]:
    def picks(candidate: Candidate, _: Collection[str]) -> bool:
        if candidate.parameter is not None:
            return False
        result: object = function(candidate.path, candidate.module)
        if not isinstance(result, bool):
            raise SelectorError(
                f"the selector {describe(function)} returned {result!r} for {candidate.path!r}; it must return a bool"
            )
        return result

    return picks


def _compile_glob(pattern: str) -> Callable[[Candidate, Collection[str]], bool]:
    glob = Glob(pattern)
    if glob.whole_path:
        return lambda candidate, _: glob.matches(candidate.path)
    return lambda candidate, _: glob.matches(candidate.path.rpartition(".")[2])
