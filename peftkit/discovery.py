"""Reads what installed packages say that they offer. It imports none of them, and no torch.

A *claim* is one entry point: this package says that it has a method, or a layer kind, of this name. Here is all that
can be known of a claim before its package is imported: whose it is, whether its metadata is sound, whether the
environment allows it, and whether it was made for this version of peftkit.
"""

import functools
import importlib.metadata
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import Distribution

from peftkit import __version__

GROUPS = {"peftkit.methods": "methods", "peftkit.layers": "layers", "peftkit.workloads": "workloads"}
"""Entry-point groups, with the name that each goes by in listings."""

ALLOW = "PEFTKIT_PLUGINS"
"""Variable with the only distributions that may be used: unset means any, empty means none."""
DENY = "PEFTKIT_DISABLE_PLUGINS"
"""Variable with distributions that may not be used; it wins over `ALLOW`."""
STRICT = "PEFTKIT_STRICT_PLUGINS"
"""Variable that makes any plugin that is out of order an error, asked for or not."""
TRACE = "PEFTKIT_TRACE_PLUGINS"
"""Variable that has every load and every hook call written to stderr."""

_TARGET = re.compile(r"[\w.]+\s*(:\s*[\w.]+\s*)?(\[.*\]\s*)?")


@dataclass(frozen=True, slots=True)
class Claim:
    """One entry point, as the metadata of its distribution has it."""

    group: str
    """`"methods"`, `"layers"` or `"workloads"`."""
    name: str
    """Of the method or workload; or the qualified name of the layer's class."""
    package: str
    version: str
    target: str
    """The plugin: `"module"` or `"module:attribute"`."""
    location: str = ""
    """The folder on `sys.path` that has the metadata."""
    requires: tuple[str, ...] = ()
    """What the distribution requires: its `Requires-Dist` lines."""
    fault: str = ""
    """Why the metadata cannot be relied on, or nothing."""

    @property
    def owner(self) -> str:
        """`peftkit-dora 0.1.0`."""
        return f"{self.package} {self.version}"


def claims() -> list[Claim]:
    """Every claim of every installed distribution, sorted. It never raises: what cannot be read becomes a `fault`.

    A distribution that is found twice on `sys.path` counts where Python finds it first, and an entry point that is
    listed twice (editable installs do that) counts once.
    """
    found: dict[str, list[Claim]] = {}
    try:
        for distribution in importlib.metadata.distributions():
            own = _claims_of(distribution)
            if own:
                found.setdefault(normalized(own[0].package), own)
    except Exception as error:  # noqa: BLE001 - the import hooks of anybody are asked for their distributions here
        found[""] = [Claim("methods", "?", "?", "?", "", fault=f"packages cannot be listed: {told(error)}")]
    return sorted((c for own in found.values() for c in own), key=lambda c: (c.group, c.name, c.package, c.target))


def _claims_of(distribution: Distribution) -> list[Claim]:
    try:
        text = distribution.read_text("entry_points.txt") or ""
    except UnicodeDecodeError as error:
        text = error.object.decode(errors="replace")
    if "[peftkit." not in text:
        return []
    package, version, location, requires, fault = _identity(distribution)
    found = []
    for group, name, target in _entries(text):
        wrong = fault or (
            "" if _TARGET.fullmatch(target) else f"its entry point {name!r} leads to {target!r}, no module"
        )
        found.append(Claim(group, name, package, version, target, location, requires, wrong))
    return list(dict.fromkeys(found))


def _entries(text: str) -> Iterator[tuple[str, str, str]]:
    """Group, name and target of each line. Read here and not by the standard library, for which one malformed line in
    one package is an exception in place of all entry points of all packages.
    """
    group = None
    for line in map(str.strip, text.splitlines()):
        if line.startswith("["):
            group = GROUPS.get(line.strip("[] "))
        elif group and line and line[0] not in "#;":
            name, _, target = map(str.strip, line.partition("="))
            yield group, name, target


def _identity(distribution: Distribution) -> tuple[str, str, str, tuple[str, ...], str]:
    """Package, version, location, requirements, and what is wrong with the metadata that should say them."""
    folder = getattr(
        distribution, "_path", None
    )  # where the metadata has no name, its folder does: `name-1.0.dist-info`
    stem = re.sub(r"\.(dist|egg)-info$", "", folder.name if folder is not None else "")
    package, _, version = stem.partition("-")
    package, version = package.replace("_", "-") or "?", version or "?"
    location = str(folder.parent) if folder is not None else ""
    try:
        fields = distribution.metadata
        named, numbered = ((fields.get_all(key) or [""])[0] for key in ("Name", "Version"))
        requires = tuple(distribution.requires or ())
    except Exception as error:  # noqa: BLE001 - missing or undecodable metadata; what is raised differs between Pythons
        return package, version, location, (), f"its metadata cannot be read: {told(error)}"
    missing = " and no ".join(key for key, value in (("Name", named), ("Version", numbered)) if not value)
    fault = f"its metadata has no {missing}" if missing else ""
    return named or package, numbered or version, location, requires, fault


def disabled_by(package: str) -> str:
    """Why the environment, as it is now, forbids a distribution: `"PEFTKIT_DISABLE_PLUGINS names it"`; or nothing."""
    name = normalized(package)
    if name in _names(os.environ.get(DENY, "")):
        return f"{DENY} names it"
    allowed = os.environ.get(ALLOW)
    if allowed is not None and name not in _names(allowed):
        return f"{ALLOW} does not name it"
    return ""


def settings() -> tuple[str | None, ...]:
    """The variables that decide what may be used, as they are now."""
    return tuple(os.environ.get(variable) for variable in (ALLOW, DENY, STRICT))


def is_set(variable: str) -> bool:
    """Whether a switch is on: set, and neither empty nor `0`."""
    return os.environ.get(variable, "") not in {"", "0"}


@functools.lru_cache(maxsize=1024)
def misfit(claim: Claim) -> tuple[str, str]:
    """`("incompatible", why)` or `("broken", why)` for a claim that may not be imported, `("", "")` for one that may.

    pip checks requirements when it installs and never again, so an upgrade of peftkit can leave a plugin behind.
    Only what the distribution requires of peftkit itself is looked at: all else is its own affair.
    """
    if claim.fault:
        return "broken", claim.fault
    for text in claim.requires:
        name = re.match(r"\s*([\w.-]+)", text)
        if name is None or normalized(name[1]) != "peftkit":
            continue
        try:
            from packaging.requirements import Requirement

            requirement = Requirement(text)
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
                continue
            fits = requirement.specifier.contains(__version__, prereleases=True)
        except Exception as error:  # noqa: BLE001 - whatever stands in a metadata file, a listing survives it
            return "broken", f"its requirement {text!r} cannot be read: {told(error)}"
        if not fits:
            return "incompatible", f"it needs peftkit{requirement.specifier}, this is peftkit {__version__}"
    return "", ""


def where_to_find(method: str) -> str:
    """What to install for a method that nothing installed offers, if peftkit's own extras know it; or nothing.

    peftkit has an extra for each method that is published beside it, so the answer needs no list in the code.
    """
    package = _package_of_extra(normalized(method))
    if package is None:
        return ""
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return f"{method!r} is offered by {package}, which is not installed: pip install {package}"
    return f"{package} {version} is installed without it: pip install --upgrade {package}"


def package_for(library: str) -> str | None:
    """The package with the layer kinds for a library, if peftkit's extras have one of the library's name."""
    return _package_of_extra(normalized(library))


def _package_of_extra(extra: str) -> str | None:
    try:
        from packaging.requirements import Requirement

        requirements = [Requirement(line) for line in importlib.metadata.requires("peftkit") or ()]
    except Exception:  # noqa: BLE001 - a source tree has no metadata; without it there is no hint, and nothing else is lost
        return None
    found = set()
    for requirement in requirements:
        marker = requirement.marker
        if marker is not None and marker.evaluate({"extra": extra}) and not marker.evaluate({"extra": ""}):
            found.add(requirement.name)
    named = [name for name in found if normalized(name).startswith("peftkit-")]
    return named[0] if len(named) == 1 else None  # an extra that brings several packages is no method


def normalized(name: str) -> str:
    """A distribution's name as PEP 503 compares it.

    >>> normalized("Peftkit_DoRA")
    'peftkit-dora'
    """
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def _names(listed: str) -> set[str]:
    return {normalized(name) for name in listed.split(",")} - {""}


def told(error: BaseException) -> str:
    """An exception as one line, also where its own text cannot be made.

    >>> told(KeyError("a"))
    "KeyError: 'a'"
    """
    try:
        text = " ".join(str(error).split())
    except Exception:  # noqa: BLE001 - the exception may be a plugin's own class
        text = ""
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
