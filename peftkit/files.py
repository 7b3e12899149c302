"""One adapter, one file: safetensors, with a JSON manifest in its metadata. docs/files.md specifies it.

* Written to a temporary sibling, synced, renamed, and the folder synced: a crash leaves the old file or the new one.
* Read strictly in both directions, against digests, without pickle, and without importing anything that a file names.
* Whatever is wrong with a file, the model is left as it was.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftkit import gathering, manifests
from peftkit.blocks import is_held_elsewhere
from peftkit.errors import FileError, FormatError, StateError, did_you_mean
from peftkit.install import check_name, install
from peftkit.installed import Placement, in_bulk, inner, installed, record
from peftkit.method import Method
from peftkit.reading import read
from peftkit.resolve import find_model_roles
from peftkit.restoring import find_places, rebuild
from peftkit.sharding import reshard
from peftkit.writing import write

FORMATS = ("peftkit", "hf", "vllm", "kohya", "loralib", "diffusers", "mlx", "gguf")
"""What `save` can write; `load` tells them by what is there."""

_OWN = b'{"__metadata__":{"peftkit":'
"""How the header of a file begins that was written here."""

# ------------------------------------------------------------------------------------------- state dicts


def state_dict(model: nn.Module, name: str | None = None) -> dict[str, Tensor]:
    """One adapter's tensors, and nothing of the base: `<layer>.<weight>.<parameter>`, detached, not copied.

    A weight that is trained in place stands under its own name, `<layer>.<weight>`. Where FSDP2 has sharded the model,
    these are its DTensors.

    >>> import torch, peftkit
    >>> model = peftkit.wrap(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2)), "lora")
    >>> {key: tuple(value.shape) for key, value in peftkit.state_dict(model).items()}
    {'0.weight.down': (8, 8), '0.weight.up': (8, 8)}
    """
    reshard(inner(model))
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
            gathering.copy_into(tensor, state[key])


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


@in_bulk()
def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    name: str | None = None,
    *,
    format: str = "peftkit",  # noqa: A002
    part: str | None = None,
) -> None:
    """Write one adapter to one file, from which `load` restores it onto a fresh copy of the base.

    The file holds the adapter's tensors, the method with its fields for every site, the sites' resolved paths, a
    fingerprint of the base, and a digest of everything. The same adapter gives the same bytes.

    With `format="hf"`, `path` is a folder that HF PEFT reads; with `format="vllm"` one that vLLM serves as well. The
    others are `"kohya"`, `"loralib"`, `"diffusers"` and `"gguf"` (a file) and `"mlx"` (a folder); `part` is what the
    names in a file of kohya's or diffusers' begin with, such as `"lora_unet"` or `"unet"`. What a format cannot hold is
    a `FileError` that names it: docs/formats.md.

    Of a model that FSDP2 has sharded, every rank must save: the first writes, and all return when the file is there.

    >>> import os, tempfile, torch, peftkit
    >>> model = peftkit.wrap(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2)), "lora")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     peftkit.save(model, f"{folder}/adapter.safetensors")
    ...     sorted(os.listdir(folder))
    ['adapter.safetensors']
    """
    if format not in FORMATS:
        raise FileError(f"no format called {format!r} is known; this version writes {', '.join(map(repr, FORMATS))}")
    name = _only_name(model) if name is None else name
    reshard(inner(model))
    placements = installed(model).placements(name)
    if not placements:
        raise FileError(f"adapter {name!r} holds nothing: every weight that it covers is frozen")
    gathering.refuse_absent(placements)
    if format in ("peftkit", "hf", "vllm"):
        _refuse_options(format, part=part)
    if format != "peftkit":
        gathering.refuse_sharded(placements, format)
        from peftkit.formats import interchange, to_folder  # most never ask, and importing peftkit is to be quick

        if format in interchange.FORMATS:
            interchange.write(model, name, Path(path), format, part=part)
        else:
            to_folder.write(model, name, Path(path), servable=format == "vllm")
        return
    tensors = {key: tensor for placement in placements for key, tensor in placement.tensors()}
    for key, tensor in tensors.items():
        if tensor.is_meta:
            raise FileError(f"{key} is on the meta device and has no values; give the model real weights first")
    mesh = gathering.mesh_over(placements)
    held = {key: gathering.whole(tensor).cpu().contiguous() for key, tensor in sorted(tensors.items())}
    manifest = gathering.describe(name, placements, held, _originals(model))
    # One metadata key: the library writes several in an order that differs from run to run.
    sealed = json.dumps(
        {"manifest": manifest, "sha256": manifests.digest(manifests.canonical(manifest))}, ensure_ascii=False
    )
    gathering.write_once(mesh, lambda: write(Path(path), held, "peftkit", sealed))


def _originals(model: nn.Module) -> dict[tuple[int, str], Tensor]:
    """Where adapters are merged, the base weights that they replaced."""
    return {(id(layer), weight): original for layer, weight, original in installed(model).stash}


# ------------------------------------------------------------------------------------------------- load


def load(
    model: nn.Module,
    path: str | os.PathLike[str],
    name: str | None = None,
    *,
    trainable: bool = False,
    check_base: bool = True,
    check_finite: bool = True,
    methods: Sequence[type[Method]] = (),
    part: str | None = None,
    alpha: float | None = None,
) -> nn.Module:
    """Install the adapter of a file on a model: its exact values, at the exact places, or not at all.

    It runs at once if no other adapter does; otherwise `activate` it. Weights that were saved as trained in place are
    written into the base.

    Args:
        model: a fresh copy of the base, or one that has other adapters already.
        path: the file or folder, in any of the formats that `save` writes.
        name: the adapter's name; by default the one that it was saved under (other formats have none: "default").
        trainable: whether it can be trained further.
        check_base: compare a few values of every adapted base weight with those that the file remembers.
        check_finite: refuse infinite values and NaN in a file of our own; in other formats they always are refused.
        methods: classes of your own that no installed package offers, to be found by their names.
        part: which model's names to read, of a file of kohya's or diffusers' that holds several: `"lora_te"`, say.
        alpha: that of a file of loralib's, which does not say it; the scale is alpha / rank.

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
    own = {m.name: m for m in methods}
    reshard(inner(model))
    with in_bulk():
        form = format_of(Path(path))
        if form in ("peftkit", "hf"):
            _refuse_options(form, part=part, alpha=alpha)
        if form != "peftkit":
            name = "default" if name is None else name
            check_name(model, name)
            from peftkit.formats import from_folder, interchange

            if form == "hf":
                places, tensors = from_folder.read(model, Path(path), own, check_base=check_base)
            else:
                places, tensors = interchange.read(model, Path(path), form, own, part=part, alpha=alpha)
        else:
            manifest, tensors = read(Path(path), check_finite=check_finite)
            name = manifest["name"] if name is None else name
            check_name(model, name)
            places = find_places(model, manifest, own, check_base=check_base)
        gathering.refuse_late(model, trainable=trainable, in_place=any(place.in_place for place in places))
        built, states = rebuild(inner(model), path, places, tensors)
    known = record(model)
    # What runs is not touched under a thread that is inside a block of its own.
    active = known.active if known and (known.active or is_held_elsewhere(inner(model))) else (name,)
    in_place = {site.name: tensors[site.name] for site, _, adapter in built if adapter is None}
    if in_place and name not in active:
        raise StateError(
            f"{next(iter(in_place))} was saved as trained in place, which cannot be loaded beside active adapters; "
            "call peftkit.activate(model) first, or save it with Full(keep_base=True)"
        )
    roles = known.roles if known else find_model_roles(model)
    return install(model, name, built, roles, active, shared=states, trainable=trainable, in_place=in_place)


def format_of(path: Path) -> str:
    """The format of what is there; our own where nothing tells otherwise."""
    if not path.is_dir():
        try:
            with open(path, "rb") as file:  # noqa: PTH123
                start = file.read(8 + len(_OWN))[8:]
        except OSError as error:
            raise FileError(f"cannot read {path}: {error.strerror or error}") from error
        if start == _OWN:
            return "peftkit"
    from peftkit.formats import interchange

    return interchange.recognise(path) or ("hf" if path.is_dir() else "peftkit")


def _refuse_options(form: str, **options: Any) -> None:
    """`part` and `alpha` are for formats that need them said."""
    for option, value in options.items():
        if value is not None:
            raise FileError(f"{option}= is for other formats, and has no meaning for {form!r}; got {value!r}")
