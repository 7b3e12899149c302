"""Finds the places of a file's adapter in a model, and makes the adapter with the file's values. Changes nothing."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peftkit import gathering, manifests, plugins
from peftkit.adapter import Activation, Adapter, Site
from peftkit.errors import (
    BaseMismatchError,
    FieldError,
    FormatError,
    MethodError,
    PeftkitError,
    UnsupportedLayerError,
    did_you_mean,
)
from peftkit.install import build, holder_of
from peftkit.installed import inner
from peftkit.method import Method
from peftkit.plan import State, shared_for, shared_states, shares
from peftkit.resolve import module_site, modules_of


class Place(NamedTuple):
    """One site of a manifest in a model, its method, and whether its weight is trained in place."""

    site: Site
    method: Method
    in_place: bool


def find_places(
    model: nn.Module, manifest: dict[str, Any], own: Mapping[str, type[Method]], *, check_base: bool
) -> list[Place]:
    """The sites of a manifest in this model. `own` are methods that no package offers, by name.

    Raises `BaseMismatchError` where the model is another than the file was made for.
    """
    methods = [_method(entry, own) for entry in manifest["methods"]]
    modules = modules_of(inner(model))
    places = []
    remembered: list[Tensor | None] = []
    for entry in manifest["sites"]:
        site, raw = _find(entry, modules)
        places.append(Place(site, methods[entry["method"]], entry["in_place"]))
        remembered.append(None if entry["in_place"] else raw)
    if check_base:
        _check_values(manifest["sites"], remembered)
    return places


def _find(entry: dict[str, Any], modules: Mapping[str, nn.Module]) -> tuple[Site, Tensor | None]:
    """One site, and the base weight there; None for a whole module."""
    path, weight = entry["path"], entry["weight"]
    layer = modules.get(path)
    if layer is None:
        raise BaseMismatchError(f"this model has no layer {path!r}, which the file adapts{did_you_mean(path, modules)}")
    name = _name(entry)
    try:
        site = module_site(path, layer) if weight == "module" else gathering.site_at(path, layer, weight)
        here = manifests.base_facts(layer, weight)
    except (AttributeError, UnsupportedLayerError) as error:
        raise BaseMismatchError(f"the file adapts {name}, which this model does not have so: {error}") from error
    if here.shape != entry["shape"] or (weight == "module" and here.layer != entry["layer"]):
        raise BaseMismatchError(
            f"the file was made for another base: {name} is {here.layer} {here.shape} here, "
            f"{entry['layer']} {entry['shape']} in the file"
        )
    return site, here.raw


def _name(entry: dict[str, Any]) -> str:
    return f"{entry['path']}.{entry['weight']}".removeprefix(".")


def _check_values(entries: list[dict[str, Any]], weights: list[Tensor | None]) -> None:
    for entry, here in zip(entries, gathering.samples(weights), strict=True):
        if here != entry["sample"] and not manifests.same_sample(entry["sample"], here):
            raise BaseMismatchError(
                f"the file was made for another base: {_name(entry)} has the same shape but other values; "
                "if that is intended, load with check_base=False"
            )


def _method(entry: dict[str, Any], own: Mapping[str, type[Method]]) -> Method:
    """The method of a manifest's entry, among those installed: nothing is imported from what a file says."""
    try:
        found = own.get(entry["name"]) or plugins.method(entry["name"])
        return found.from_fields(found.upgraded(entry["fields"], str(entry.get("version") or "")))
    except FieldError as error:
        raise FormatError(f"the file's method cannot be made by what is installed: {error}") from error
    except MethodError as error:
        package = entry.get("package")
        hint = f"; the file was written with {package} {entry.get('version')}, install it"
        if not package:
            hint = "; no package offered it, so it is a class of somebody's own: load(..., methods=[ThatClass])"
        raise type(error)(f"{error}{hint}") from error
    except Exception as error:  # a method that trusts its fields meets a file that lies
        raise FormatError(f"the file's method {entry['name']!r} cannot have its fields: {error!r}") from error


def rebuild(
    root: nn.Module, path: str | os.PathLike[str], places: list[Place], tensors: Mapping[str, Tensor]
) -> tuple[list[tuple[Site, Method, Adapter | Activation | None]], list[State]]:
    """The adapters of a file, and what they share: made on the meta device, so that no initialisation is computed,
    then given their tensors.

    Raises `FormatError` where a tensor is missing, is too many, or has another shape.
    """
    built: list[tuple[Site, Method, Adapter | Activation | None]] = []
    used: set[str] = set()
    with made_from(path, "what its sites share"):
        states = shared_states([(place.site.on_meta(), place.method) for place in places if shares(place.method)])
    for number, (key, state) in enumerate(states.items()):
        first = next(place.site for place in places if place.method.key == key)
        name = f"{holder_of(root, first)[0]}.shared-{number}".removeprefix(".")
        used.update(_fill(path, name, state.module, first.device, tensors))
    for site, method, in_place in places:
        rehearsal = site.on_meta()
        with made_from(path, f"{method} at {site.name}"):
            adapter = build(rehearsal, method, shared_for(states, method))
        if rehearsal.unfrozen != in_place or (adapter is None) != in_place:
            raise FormatError(
                f"{path}: {site.name} is {'' if in_place else 'not '}trained in place, which {method} contradicts"
            )
        if adapter is None:
            site.unfreeze()
            _fit(path, site.name, site.layer._parameters[site.weight], tensors)  # type: ignore[arg-type]
            used.add(site.name)
        else:
            used.update(_fill(path, site.name, adapter, site.device, tensors))
        built.append((site, method, adapter))
    unexpected = sorted(set(tensors) - used)
    if unexpected:
        raise FormatError(f"{path} holds {unexpected[0]!r}, which no site of it has a place for")
    return built, list(states.values())


@contextmanager
def made_from(path: str | os.PathLike[str], what: object) -> Iterator[None]:
    """Where adapters are made from what a file says: sizes that no tensor can have are the file's fault."""
    try:
        yield
    except PeftkitError:
        raise
    except Exception as error:
        raise FormatError(f"{path}: {what} cannot be made: {str(error).partition(chr(10))[0]}") from error


def _fill(
    path: str | os.PathLike[str], name: str, module: nn.Module, device: torch.device, tensors: Mapping[str, Tensor]
) -> list[str]:
    """Give a module its tensors of the file, which stand there under `name`; returns their keys."""
    keys = []
    owners = module.named_modules(prefix=name, remove_duplicate=False) if module._modules else [(name, module)]
    for prefix, owner in owners:
        for attribute, own in owner._parameters.items():
            if own is not None:
                keys.append(f"{prefix}.{attribute}")
                value = _value(path, keys[-1], own, device, tensors)
                owner._parameters[attribute] = nn.Parameter(value, requires_grad=own.requires_grad)
        for attribute, buffer in owner._buffers.items():
            if buffer is None:
                continue
            if attribute not in owner._non_persistent_buffers_set:
                keys.append(f"{prefix}.{attribute}")
                owner._buffers[attribute] = _value(path, keys[-1], buffer, device, tensors)
            elif buffer.is_meta and device.type != "meta":
                raise FormatError(
                    f"{prefix}: the adapter's {attribute!r} is not part of what it saves; "
                    "register it as a persistent buffer"
                )
    return keys


def _value(
    path: str | os.PathLike[str], key: str, own: Tensor, device: torch.device, tensors: Mapping[str, Tensor]
) -> Tensor:
    """A tensor of the file, on its device, with the strides that it had when it was made: kernels round by them."""
    tensor = _fit(path, key, own, tensors)
    if device.type != "cpu":
        tensor = tensor.to(device)
    if own.stride() == tensor.stride():
        return tensor
    return torch.empty_strided(own.shape, own.stride(), dtype=tensor.dtype, device=device).copy_(tensor)


def _fit(path: str | os.PathLike[str], key: str, own: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    tensor = tensors.get(key)
    if tensor is None:
        raise FormatError(f"{path} lacks {key!r}")
    if tensor.shape != own.shape or tensor.dtype.is_floating_point != own.dtype.is_floating_point:
        raise FormatError(
            f"{path}: {key} is {tensor.dtype} {list(tensor.shape)}, where {own.dtype} {list(own.shape)} is due"
        )
    return tensor
