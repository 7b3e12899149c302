"""Finds methods by what they declare of HF PEFT's files; turns fields into entries of its configuration, and back."""

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from peftkit import plugins
from peftkit.adapter import Site
from peftkit.errors import FieldError, FileError, FormatError, MethodError, UnknownMethodError
from peftkit.formats.matching import anchored, ends, named, pattern
from peftkit.layers.kind import Parameter
from peftkit.method import HuggingFace, Method

MODULES, TOKENS = "modules_to_save", "trainable_token_indices"
"""The entries by which a method stands beside another."""

_UNDERSTOOD = {
    # what the reader looks at, and what says where the adapter came from
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    # where the adapter goes: the tensors' names say it as well
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out", "target_parameters",
    "bias", MODULES, TOKENS,
}  # fmt: skip


def declaring(method: type[Method]) -> tuple[type[Method], HuggingFace] | None:
    """The class that a method is written as: itself, or the one that it has its declaration from."""
    for each in method.__mro__:
        if isinstance(each.__dict__.get("hf"), HuggingFace):
            return each, each.__dict__["hf"]
    return None


def find(config: Mapping[str, Any], own: Mapping[str, type[Method]]) -> type[Method]:
    """The method that a configuration is of: the one that tells most of its entries from others of the type.

    Only a class that declares `hf` itself is found. So the variants of a method that share its declaration are read as
    the method.
    """
    kind = config.get("peft_type")
    broken: list[str] = []
    found = [m for m in _declaring(own, broken) if m.hf and m.hf.peft_type == kind and _has_constants(config, m.hf)]
    found.sort(key=lambda m: -len(m.hf.constants))  # type: ignore[union-attr]
    if not found:
        hint = f"; these could not be asked: {'; '.join(broken)}" if broken else ""
        raise UnknownMethodError(f"no method that is installed reads HF PEFT's folders of peft_type {kind!r}{hint}")
    rivals = [m for m in found if len(m.hf.constants) == len(found[0].hf.constants)]  # type: ignore[union-attr]
    if len(rivals) > 1:
        raise MethodError(
            f"several methods read peft_type {kind!r}: {', '.join(f'{m.name} ({m.__module__})' for m in rivals)}; "
            "keep one of them installed"
        )
    return found[0]


def find_part(entry: str, own: Mapping[str, type[Method]]) -> type[Method]:
    """The method that stands beside others under this entry."""
    broken: list[str] = []
    found = next((m for m in _declaring(own, broken) if m.hf and m.hf.part == entry), None)
    if found is None:
        raise UnknownMethodError(f"no method that is installed reads the entry {entry!r} of HF PEFT's folders")
    return found


def _declaring(own: Mapping[str, type[Method]], broken: list[str]) -> Iterator[type[Method]]:
    """The installed methods that declare `hf` themselves. All are imported: what they declare is in their code."""
    classes = list(own.values())
    for info in plugins.methods():
        if info.name not in own:
            try:
                classes.append(plugins.method(info.name))
            except MethodError as error:
                broken.append(str(error))
    yield from {id(m): m for m in classes if isinstance(m.__dict__.get("hf"), HuggingFace)}.values()


def _has_constants(config: Mapping[str, Any], hf: HuggingFace) -> bool:
    return all(config.get(key) == value or not (config.get(key) or value) for key, value in hf.constants.items())


def refuse_unknown(config: Mapping[str, Any], hf: HuggingFace) -> None:
    """An entry that nobody here understands, and that is set to something, may mean that another thing is computed."""
    known = _UNDERSTOOD | {*hf.fields.values(), *hf.constants, *hf.patterns.values(), *hf.lists.values()}
    for key, value in config.items():
        if key in known or not value:
            continue
        allowed = hf.ignored.get(key, ())
        if allowed is not None and not any(value == each and type(value) is type(each) for each in allowed):
            raise FormatError(
                f"the configuration has {key}={value!r}, which is not understood for peft_type {hf.peft_type!r}: the "
                "adapter may compute something that cannot be had here"
            )


# ------------------------------------------------------------------------------------------------ entries → fields


def maker(method: type[Method], config: Mapping[str, Any]) -> Callable[[str], Method]:
    """What makes the method for each path, from a configuration's common entries and those for some layers."""
    hf: Any = method.hf
    fields: dict[str, Any] = dict(hf.reads)
    for ours, entry in hf.fields.items():
        if entry in config:
            fields[ours] = config[entry]
        elif ours not in hf.reads:
            raise FormatError(f"the configuration lacks {entry!r}")
    special: dict[str, list[tuple[Callable[[str], bool], Any]]] = {}
    for ours, entry in hf.patterns.items():
        values = config.get(entry) or {}
        if not isinstance(values, dict):
            raise FormatError(f"{entry} must be an object, got {values!r}")
        special[ours] = [(pattern(key, entry), value) for key, value in values.items()]
    for ours, entry in hf.lists.items():
        special[ours] = [(_listed(config.get(entry) or [], entry), True)]
        fields[ours] = False

    def make(path: str) -> Method:
        own = {ours: value for ours, pairs in special.items() for value in _first(pairs, path)}
        return make_method(method, {**fields, **own})

    return make


def _first(pairs: list[tuple[Callable[[str], bool], Any]], path: str) -> list[Any]:
    """The value of the first that matches, or none."""
    return next(([value] for matches, value in pairs if matches(path)), [])


def make_method(method: type[Method], fields: Mapping[str, Any]) -> Method:
    """The method; whole numbers stand for fractions, and lists for tuples, where the field is of that type."""
    defaults = {f.name: f.default for f in dataclasses.fields(method)}
    typed = {
        name: float(value) if isinstance(defaults.get(name), float) and type(value) is int else value
        for name, value in fields.items()
    }
    try:
        return method(**typed)
    except (FieldError, TypeError, OverflowError) as error:
        raise FormatError(f"the configuration has a value that cannot be: {error}") from error


def _listed(names: Any, entry: str) -> Callable[[str], bool]:
    if isinstance(names, str):
        return pattern("^" + names, entry)  # there it must match the whole path
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise FormatError(f"{entry} must be a list of names, got {names!r}")
    return lambda path: ends(path, names)


# ------------------------------------------------------------------------------------------------ fields → entries


def entries(hf: HuggingFace, methods: Mapping[str, Method], targets: list[str] | str) -> dict[str, Any]:
    """The configuration's entries for the methods at these paths. `targets` is what stands for all of them.

    Raises `FileError` for a field that differs between layers where theirs cannot.
    """
    made: dict[str, Any] = {}
    for ours, entry in hf.fields.items():
        values = {path: _plain(getattr(method, ours)) for path, method in methods.items()}
        common = Counter(map(repr, values.values())).most_common(1)[0][0]
        made[entry] = next(value for value in values.values() if repr(value) == common)
        others = {path: value for path, value in values.items() if repr(value) != common}
        if others and ours not in hf.patterns:
            path, value = next(iter(others.items()))
            raise FileError(
                f"HF PEFT's folder has one {entry} for all layers, and here {ours} is {value!r} at {path}, "
                f"{made[entry]!r} elsewhere; save them as two adapters"
            )
        if others:
            made[hf.patterns[ours]] = {anchored(path): value for path, value in others.items()}
    for ours, entry in hf.lists.items():
        chosen = sorted(path for path, method in methods.items() if getattr(method, ours))
        names = [] if isinstance(targets, str) else [each for each in targets if any(named(p, [each]) for p in chosen)]
        exact = sorted(path for path in methods if ends(path, names)) == chosen
        made[entry] = names if exact else "|".join(re.escape(path) for path in chosen)
    return made | dict(hf.constants)


def _plain(value: Any) -> Any:
    """A whole number as an integer, as HF PEFT has them."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def refuse_site(hf: HuggingFace, site: Site) -> str | None:
    """Why HF PEFT cannot adapt this weight by this method; None where it can."""
    kind, layer = getattr(site.kind, "label", ""), site.layer
    conv = layer if hf.own_convolution and isinstance(layer, _ConvNd) else None
    reasons = {
        f"HF PEFT has {hf.peft_type} for {', '.join(hf.kinds)} and not for {kind}": hf.kinds and kind not in hf.kinds,
        "HF PEFT adapts stacks of matrices of three dimensions, and this has more": len(site.shape) > 3,
        "HF PEFT adapts no parameter of the model itself": isinstance(site.kind, Parameter) and not site.path,
        "HF PEFT's own convolution has no groups, dilation or padding mode": conv is not None
        and (conv.groups != 1 or set(conv.dilation) != {1} or conv.padding_mode != "zeros"),
        # torch's attention reads the weight of its output projection and never calls it.
        "there HF PEFT's adapter would not run": isinstance(layer, NonDynamicallyQuantizableLinear),
    }
    return next((reason for reason, holds in reasons.items() if holds), None) if site.kind else None
