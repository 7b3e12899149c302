"""One adapter, one file: safetensors, with a JSON manifest in its metadata. docs/files.md specifies it.

* Written to a temporary sibling, synced, renamed, and the folder synced: a crash leaves the old file or the new one.
* Read strictly in both directions, against digests, without pickle, and without importing anything that a file names.
* Whatever is wrong with a file, the model is left as it was.
"""

import contextlib
import dataclasses
import json
import os
import secrets
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from peftkit import manifests, plugins
from peftkit.adapter import Activation, Adapter, Site
from peftkit.errors import (
    BaseMismatchError,
    FieldError,
    FileError,
    FormatError,
    MethodError,
    StateError,
    UnsupportedLayerError,
    did_you_mean,
)
from peftkit.install import build, check_name, holder_of, install
from peftkit.installed import Placement, collecting_later, inner, installed, record
from peftkit.method import Method
from peftkit.plan import State, shared_for, shared_states
from peftkit.resolve import find_model_roles, module_site, modules_of, site_of

MAX_HEADER = 100_000_000
"""The longest header that is read, in bytes: safetensors' own limit."""

# ------------------------------------------------------------------------------------------- state dicts


def state_dict(model: nn.Module, name: str | None = None) -> dict[str, Tensor]:
    """One adapter's tensors, and nothing of the base: `<layer>.<weight>.<parameter>`, detached, not copied.

    A weight that is trained in place stands under its own name, `<layer>.<weight>`.

    >>> import torch, peftkit
    >>> model = peftkit.wrap(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2)), "lora")
    >>> {key: tuple(value.shape) for key, value in peftkit.state_dict(model).items()}
    {'0.weight.down': (8, 8), '0.weight.up': (8, 8)}
    """
    return {key: tensor.detach() for placement in _placements(model, name) for key, tensor in placement.tensors()}


def load_state_dict(model: nn.Module, state: Mapping[str, Tensor], name: str | None = None) -> None:
    """Copy tensors into an adapter that is installed: every one of its own, no other, each of the right shape.

    Raises `FormatError` for a missing or unexpected key or another shape, and then changes nothing.

    >>> import torch, peftkit
    >>> model = peftkit.wrap(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2)), "lora")
    >>> state = {key: torch.ones_like(value) for key, value in peftkit.state_dict(model).items()}
    >>> peftkit.load_state_dict(model, state)
    >>> bool((model[0].adapters["default"]["weight"].up == 1).all())
    True
    """
    own = state_dict(model, name)
    _match_keys(own, state)
    for key, tensor in own.items():
        if tensor.shape != state[key].shape:
            raise FormatError(f"{key} must have shape {list(tensor.shape)}, got {list(state[key].shape)}")
    with torch.no_grad():
        for key, tensor in own.items():
            tensor.copy_(state[key])


def _placements(model: nn.Module, name: str | None) -> tuple[Placement, ...]:
    return installed(model).placements(_only_name(model) if name is None else name)


def _only_name(model: nn.Module) -> str:
    names = list(installed(model).adapters)
    if len(names) > 1:
        raise StateError(f"this model has several adapters ({', '.join(names)}); say which one by name=")
    return names[0]


def _match_keys(own: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    missing = [key for key in own if key not in given]
    if missing:
        raise FormatError(
            f"{len(missing)} tensors are missing, the first is {missing[0]!r}{did_you_mean(missing[0], given)}"
        )
    unexpected = [key for key in given if key not in own]
    if unexpected:
        raise FormatError(
            f"{len(unexpected)} tensors fit nowhere, the first is {unexpected[0]!r}{did_you_mean(unexpected[0], own)}"
        )


# ------------------------------------------------------------------------------------------------- save


@collecting_later()
def save(model: nn.Module, path: str | os.PathLike[str], name: str | None = None, *, format: str = "peftkit") -> None:  # noqa: A002
    """Write one adapter to one file, from which `load` restores it onto a fresh copy of the base.

    The file holds the adapter's tensors, the method with its fields for every site, the sites' resolved paths, a
    fingerprint of the base, and a digest of everything. The same adapter gives the same bytes.

    >>> import os, tempfile, torch, peftkit
    >>> model = peftkit.wrap(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2)), "lora")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     peftkit.save(model, f"{folder}/adapter.safetensors")
    ...     sorted(os.listdir(folder))
    ['adapter.safetensors']
    """
    if format != "peftkit":
        raise FileError(f"no format called {format!r} is known; this version writes 'peftkit'")
    name = _only_name(model) if name is None else name
    placements = installed(model).placements(name)
    if not placements:
        raise FileError(f"adapter {name!r} holds nothing: every weight that it covers is frozen")
    tensors = {key: tensor.detach() for placement in placements for key, tensor in placement.tensors()}
    for key, tensor in tensors.items():
        if tensor.is_meta:
            raise FileError(f"{key} is on the meta device and has no values; give the model real weights first")
    held = {key: tensor.to("cpu").contiguous() for key, tensor in sorted(tensors.items())}
    manifest = manifests.describe(name, placements, held, _originals(model))
    # One metadata key: the library writes several in an order that differs from run to run.
    sealed = json.dumps(
        {"manifest": manifest, "sha256": manifests.digest(manifests.canonical(manifest))}, ensure_ascii=False
    )
    _write(Path(path), safetensors.torch.save(_unshared(held), {"peftkit": sealed}))


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of which no two share memory, as safetensors demands."""
    seen: set[int] = set()
    result = {}
    for key, tensor in tensors.items():
        pointer = tensor.untyped_storage().data_ptr()
        result[key] = tensor.clone() if pointer in seen else tensor
        seen.add(pointer)
    return result


def _originals(model: nn.Module) -> dict[tuple[int, str], Tensor]:
    """Where adapters are merged, the base weights that they replaced."""
    return {(id(layer), weight): original for layer, weight, original in installed(model).stash}


def _write(path: Path, data: bytes) -> None:
    """Replace `path` by a file with this content, or leave it: never a mixture, also when the machine stops."""
    if not path.name:
        raise FileError(f"cannot write {path}: it names no file")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:  # noqa: PTH123 - mode "x": the umask sets the file's mode
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)  # noqa: PTH105
        _sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise FileError(f"cannot write {path}: {error.strerror or error}") from error
        raise


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable, where the system lets a folder be opened (Windows does not)."""
    with contextlib.suppress(PermissionError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# ------------------------------------------------------------------------------------------------- load


@dataclasses.dataclass(frozen=True, slots=True)
class _Read:
    manifest: dict[str, Any]
    tensors: dict[str, Tensor]


def load(
    model: nn.Module,
    path: str | os.PathLike[str],
    name: str | None = None,
    *,
    trainable: bool = False,
    check_base: bool = True,
    methods: Sequence[type[Method]] = (),
) -> nn.Module:
    """Install the adapter of a file on a model: its exact values, at the exact places, or not at all.

    It runs at once if no other adapter does; otherwise `activate` it. Weights that were saved as trained in place are
    written into the base.

    Args:
        model: a fresh copy of the base, or one that has other adapters already.
        path: the file.
        name: the adapter's name; by default the one that it was saved under.
        trainable: whether it can be trained further.
        check_base: compare a few values of every adapted base weight with those that the file remembers.
        methods: classes of your own that no installed package offers, to be found by their names.

    Raises `FormatError` for a file that is truncated or altered, `BaseMismatchError` for another base, `MethodError`
    for a method that is not installed.

    >>> import copy, tempfile, torch, peftkit
    >>> base = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
    >>> model = peftkit.wrap(copy.deepcopy(base), "lora", name="sentiment")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     peftkit.save(model, f"{folder}/sentiment.safetensors")
    ...     base = peftkit.load(base, f"{folder}/sentiment.safetensors")
    >>> [adapter.name for adapter in peftkit.summary(base).adapters]
    ['sentiment']
    """
    read = _read(Path(path))
    manifest = read.manifest
    name = manifest["name"] if name is None else name
    check_name(model, name)
    with collecting_later():
        sites = _resolve(model, manifest, {m.name: m for m in methods}, check_base=check_base)
        built, states = _rebuild(inner(model), path, sites, read.tensors)
    known = record(model)
    active = known.active if known and known.active else (name,)
    in_place = {site.name: read.tensors[site.name] for site, _, adapter in built if adapter is None}
    if in_place and name not in active:
        raise StateError(
            f"{next(iter(in_place))} was saved as trained in place, which cannot be loaded beside active adapters; "
            "call peftkit.activate(model) first, or save it with Full(keep_base=True)"
        )
    roles = known.roles if known else find_model_roles(model)
    return install(model, name, built, roles, active, shared=states, trainable=trainable, in_place=in_place)


def _read(path: Path) -> _Read:
    """The manifest and tensors of a file, checked against each other and against every digest."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:  # noqa: PTH123
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
            if not 2 <= length <= min(size - 8, MAX_HEADER):
                raise FormatError(
                    f"{path} is no adapter file, or it is truncated: {size} bytes, whose header claims {length}"
                )
            data = start + file.read()
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        header = json.loads(data[8 : 8 + length])
        sealed = json.loads(header["__metadata__"]["peftkit"])
        manifest, seal = sealed["manifest"], sealed["sha256"]
        tensors = safetensors.torch.load(data)
    except (ValueError, KeyError, TypeError, RecursionError, safetensors.SafetensorError) as error:
        raise FormatError(f"{path} is no adapter file, or it is damaged: {type(error).__name__}: {error}") from error
    manifests.check(path, manifest, seal)
    if set(tensors) != set(manifest["tensors"]):
        raise FormatError(f"{path} is damaged: its tensors are not those of its manifest")
    for key, tensor in tensors.items():
        if manifests.tensor_digest(tensor) != manifest["tensors"][key]:
            raise FormatError(f"{path} is damaged: {key} is not what was saved")
    _refuse_not_finite(path, tensors)
    # Out of the file's buffer: kernels round by alignment, and one adapter need not hold on to the whole file.
    return _Read(manifest, {key: tensor.clone() for key, tensor in tensors.items()})


def _refuse_not_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """One sum a tensor tells nearly always; only where a sum is not finite, look at the values themselves."""
    floating = [(key, tensor) for key, tensor in tensors.items() if tensor.is_floating_point()]
    sums = [tensor.sum(dtype=torch.float64) for _, tensor in floating]
    if sums and not torch.stack(sums).isfinite().all():
        for key, tensor in floating:
            if not tensor.isfinite().all():
                raise FormatError(f"{path}: {key} holds values that are not finite")


def _resolve(
    model: nn.Module, manifest: dict[str, Any], own: Mapping[str, type[Method]], *, check_base: bool
) -> list[tuple[Site, Method, bool]]:
    """The sites of a manifest in this model, each with its method and whether it is trained in place."""
    methods = [_method(entry, own) for entry in manifest["methods"]]
    modules = modules_of(inner(model))
    found = []
    for entry in manifest["sites"]:
        path, weight = entry["path"], entry["weight"]
        layer = modules.get(path)
        if layer is None:
            raise BaseMismatchError(
                f"this model has no layer {path!r}, which the file adapts{did_you_mean(path, modules)}"
            )
        name = f"{path}.{weight}" if path else weight
        try:
            here = manifests.base_facts(layer, weight, in_place=entry["in_place"])
            site = module_site(path, layer) if weight == "module" else site_of(path, layer, weight)
        except (AttributeError, UnsupportedLayerError) as error:
            raise BaseMismatchError(f"the file adapts {name}, which this model does not have so: {error}") from error
        if here["shape"] != entry["shape"] or (weight == "module" and here["layer"] != entry["layer"]):
            raise BaseMismatchError(
                f"the file was made for another base: {name} is {here['layer']} {here['shape']} here, "
                f"{entry['layer']} {entry['shape']} in the file"
            )
        if check_base and not manifests.same_sample(entry["sample"], here["sample"]):
            raise BaseMismatchError(
                f"the file was made for another base: {name} has the same shape but other values; "
                "if that is intended, load with check_base=False"
            )
        found.append((site, methods[entry["method"]], entry["in_place"]))
    return found


def _method(entry: dict[str, Any], own: Mapping[str, type[Method]]) -> Method:
    """The method of a manifest's entry, among those installed: nothing is imported from what a file says."""
    try:
        found = own.get(entry["name"]) or plugins.method(entry["name"])
        return found.from_fields(entry["fields"])
    except FieldError as error:
        raise FormatError(f"the file's method cannot be made by what is installed: {error}") from error
    except MethodError as error:
        package = entry.get("package")
        hint = f"; the file was written with {package} {entry.get('version')}, install it"
        if not package:
            hint = "; no package offered it, so it is a class of somebody's own: load(..., methods=[ThatClass])"
        raise type(error)(f"{error}{hint}") from error


def _rebuild(
    root: nn.Module, path: str | os.PathLike[str], sites: list[tuple[Site, Method, bool]], tensors: Mapping[str, Tensor]
) -> tuple[list[tuple[Site, Method, Adapter | Activation | None]], list[State]]:
    """The adapters of a file, and what they share: made on the meta device, so that no initialisation is computed,
    then given their tensors.
    """
    built: list[tuple[Site, Method, Adapter | Activation | None]] = []
    expected: set[str] = set()
    states = shared_states([(site.on_meta(), method) for site, method, _ in sites])
    for number, (key, state) in enumerate(states.items()):
        first = next(site for site, its_method, _ in sites if its_method.key == key)
        name = f"{holder_of(root, first)[0]}.shared-{number}".removeprefix(".")
        expected |= _fill(path, name, state.module, first.device, tensors)
    for site, method, in_place in sites:
        rehearsal = site.on_meta()
        adapter = build(rehearsal, method, shared_for(states, method))
        if rehearsal.unfrozen != in_place or (adapter is None) != in_place:
            raise FormatError(
                f"{path}: {site.name} is {'' if in_place else 'not '}trained in place, which {method} contradicts"
            )
        if adapter is None:
            site.unfreeze()
            _fit(path, site.name, site.layer._parameters[site.weight], tensors)  # type: ignore[arg-type]
            expected.add(site.name)
        else:
            expected |= _fill(path, site.name, adapter, site.device, tensors)
        built.append((site, method, adapter))
    unexpected = sorted(set(tensors) - expected)
    if unexpected:
        raise FormatError(f"{path} holds {unexpected[0]!r}, which no site of it has a place for")
    return built, list(states.values())


def _fill(
    path: str | os.PathLike[str], name: str, module: nn.Module, device: torch.device, tensors: Mapping[str, Tensor]
) -> set[str]:
    """Give a module its tensors of the file, which stand there under `name`; returns their keys."""
    keys = set()
    for key, own in module.state_dict(keep_vars=True).items():
        tensor = _laid_out_as(own, _fit(path, f"{name}.{key}", own, tensors).to(device))
        keys.add(f"{name}.{key}")
        _assign(module, key, own, tensor)
    if device.type != "meta":
        _refuse_left_on_meta(module, name)
    return keys


def _fit(path: str | os.PathLike[str], key: str, own: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    tensor = tensors.get(key)
    if tensor is None:
        raise FormatError(f"{path} lacks {key!r}")
    if tensor.shape != own.shape or tensor.dtype.is_floating_point != own.dtype.is_floating_point:
        raise FormatError(
            f"{path}: {key} is {tensor.dtype} {list(tensor.shape)}, where {own.dtype} {list(own.shape)} is due"
        )
    return tensor


def _laid_out_as(own: Tensor, tensor: Tensor) -> Tensor:
    """The tensor with the strides that it had when it was made: kernels round by them."""
    if own.stride() == tensor.stride():
        return tensor
    return torch.empty_strided(own.shape, own.stride(), dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def _assign(adapter: nn.Module, key: str, own: Tensor, tensor: Tensor) -> None:
    owner, _, attribute = key.rpartition(".")
    module = adapter.get_submodule(owner)
    if isinstance(own, nn.Parameter):
        module._parameters[attribute] = nn.Parameter(tensor, requires_grad=own.requires_grad)
    else:
        module._buffers[attribute] = tensor


def _refuse_left_on_meta(module: nn.Module, where: str) -> None:
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.is_meta:
            raise FormatError(
                f"{where}: the adapter's {name!r} is not part of what it saves; register it as a persistent buffer"
            )
