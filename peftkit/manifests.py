"""What an adapter file says about itself, and how that is checked. docs/files.md specifies it.

A manifest is plain JSON: the method with its fields for every site, the sites' resolved paths, a few facts about the
base, and a digest of every tensor. It is sealed with a digest of its own.
"""

import ctypes
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peftkit import plugins
from peftkit.composition import base_class, is_swapped, raw_parameter, state_of
from peftkit.errors import FormatError
from peftkit.installed import Placement
from peftkit.resolve import kind_for

FORMAT = 1
"""Version of the file format; a reader refuses a later one."""

DTYPES = {
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F32": torch.float32,
    "U32": torch.uint32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The dtypes that a file can hold, by their names there, in the order in which safetensors puts them."""

_SAMPLES = 8
"""How many values of each base weight a file remembers, to tell one base from another of the same shapes."""


def describe(
    name: str,
    placements: tuple[Placement, ...],
    tensors: Mapping[str, Tensor],
    originals: Mapping[tuple[int, str], Tensor],
) -> dict[str, Any]:
    placements = tuple(placement for placement in placements if not placement.shared)
    methods = {placement.method.key: placement.method for placement in placements}
    numbers = {key: number for number, key in enumerate(methods)}
    facts, remembered = [], []
    for placement in placements:
        raw = originals.get((id(placement.layer), placement.weight))
        facts.append(base_facts(placement.layer, placement.weight, raw))
        remembered.append(None if placement.adapter is None else facts[-1].raw)
    sites = [
        {
            "path": placement.path,
            "weight": placement.weight,
            "method": numbers[placement.method.key],
            "in_place": placement.adapter is None,
            "layer": fact.layer,
            "shape": fact.shape,
            "sample": sample,
        }
        for placement, fact, sample in zip(placements, facts, samples(remembered), strict=True)
    ]
    return {
        "format": FORMAT,
        "name": name,
        "methods": [
            {
                "name": method.name,
                "fields": method.fields(),
                "package": info.package if info else "",
                "version": info.version if info else "",
            }
            for method, info in ((method, plugins.info(method.name)) for method in methods.values())
        ],
        "sites": sites,
        "fingerprint": fingerprint(sites),
        "tensors": {key: tensor_digest(tensor) for key, tensor in tensors.items()},
    }


class BaseFacts(NamedTuple):
    """What a file remembers of the base at one site; `raw` is the weight itself, None for a whole module."""

    layer: str
    shape: list[int]
    raw: Tensor | None


def base_facts(layer: nn.Module, weight: str, raw: Tensor | None = None) -> BaseFacts:
    """The layer's type and the weight's shape; `raw` is given where the layer holds another weight than the base's."""
    if weight == "module":
        return BaseFacts(base_class(layer).__qualname__, [], None)
    raw = raw_parameter(layer, weight) if raw is None else raw
    name = base_class(layer).__qualname__
    kind = (
        state_of(layer).kinds[weight]
        if is_swapped(layer) and weight in state_of(layer).kinds
        else kind_for(layer, weight)
    )
    if not kind.quantised:
        return BaseFacts(name, list(raw.shape), raw)
    values = kind.values(layer, weight, raw.detach())
    kept = values if values.is_meta or not values.numel() else _pick(values)  # the rest is freed
    return BaseFacts(f"{name}[{type(raw).__name__}]", list(values.shape), kept)


def samples(weights: Sequence[Tensor | None]) -> list[str | None]:
    """A few values of each weight, evenly spread, as bfloat16 in hexadecimal: the same for a base in float32 and in
    bfloat16. None for no weight, and for one on the meta device.
    """
    found: list[str | None] = [None] * len(weights)
    picked: dict[tuple[torch.device, torch.dtype], list[tuple[int, Tensor]]] = {}
    for i, raw in enumerate(weights):
        if raw is None or raw.is_meta:
            continue
        if raw.numel() == 0:
            found[i] = ""
            continue
        picked.setdefault((raw.device, raw.dtype), []).append((i, _pick(raw.detach())))
    size = 2 * _SAMPLES
    for chosen in picked.values():  # all of a kind at once: converted one by one they take ten times as long
        values = torch.stack([value for _, value in chosen]).to(device="cpu", dtype=torch.bfloat16).contiguous()
        data = ctypes.string_at(values.data_ptr(), size * len(chosen))
        for n, (i, _) in enumerate(chosen):
            found[i] = data[n * size : (n + 1) * size].hex()
    return found


def _pick(raw: Tensor) -> Tensor:
    places = _places(raw.numel())
    if raw.device.type != "cpu":
        places = places.to(raw.device)
    if raw.element_size() > 1:
        return torch.take(raw, places)
    return raw.reshape(-1)[places]  # nothing is taken of 8-bit floats


@functools.lru_cache(maxsize=1024)
def _places(n: int) -> Tensor:
    return torch.linspace(0, n - 1, _SAMPLES, dtype=torch.float64, device="cpu").long()


def fingerprint(sites: list[dict[str, Any]]) -> str:
    """Identifies the structure that the adapter stands on: the digest of every site's path, layer type and shape."""
    return digest(canonical(sorted([s["path"], s["weight"], s["layer"], s["shape"]] for s in sites)))


def canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def tensor_digest(tensor: Tensor) -> str:
    """The digest of a contiguous CPU tensor's dtype, shape and bytes."""
    digest = hashlib.sha256(f"{tensor.dtype}{list(tensor.shape)}".encode())
    digest.update(data_of(tensor))
    return digest.hexdigest()


def data_of(tensor: Tensor) -> Any:
    """The bytes of a contiguous CPU tensor, not copied; valid as long as the tensor lives."""
    if not tensor.numel():
        return b""
    return (ctypes.c_char * (tensor.numel() * tensor.element_size())).from_address(tensor.data_ptr())


def check(path: Path, manifest: Any, seal: Any) -> None:
    """Refuse a manifest that was altered, comes from a later version, or is not made as this version makes it."""
    try:
        sealed = isinstance(manifest, dict) and digest(canonical(manifest)) == seal
    except (ValueError, RecursionError):  # a number, a text or a depth that JSON cannot hold
        sealed = False
    if not sealed:
        raise FormatError(f"{path} is damaged: its manifest is not what was saved")
    version = manifest.get("format")
    if version != FORMAT:
        raise FormatError(
            f"{path} has format {version!r}, this version of peftkit reads format {FORMAT}; install a later one"
        )
    try:
        methods, sites = manifest["methods"], manifest["sites"]
        sound = (
            isinstance(manifest["name"], str)
            and all(isinstance(m["name"], str) and isinstance(m["fields"], dict) for m in methods)
            and all(
                isinstance(s["path"], str)
                and isinstance(s["weight"], str)
                and isinstance(s["in_place"], bool)
                and type(s["method"]) is int
                and 0 <= s["method"] < len(methods)
                and isinstance(s["layer"], str)
                and {*map(type, s["shape"])} <= {int}
                and min(s["shape"], default=0) >= 0
                and (s["sample"] is None or isinstance(bytes.fromhex(s["sample"]), bytes))
                for s in sites
            )
            and all(isinstance(d, str) for d in manifest["tensors"].values())
            and len({(s["path"], s["weight"]) for s in sites}) == len(sites) > 0
            and manifest["fingerprint"] == fingerprint(sites)
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FormatError(f"{path}: its manifest lacks something, or has it of a wrong type: {error!r}") from error
    if not sound:
        raise FormatError(f"{path}: its manifest contradicts itself")


def same_sample(saved: str | None, here: str | None) -> bool:
    """Whether two samples of a base weight agree, up to the rounding of half precision."""
    if saved is None or here is None or saved == here:
        return True
    if len(saved) != len(here):
        return False
    a, b = (torch.frombuffer(bytearray.fromhex(text), dtype=torch.bfloat16).float() for text in (saved, here))
    return bool(torch.allclose(a, b, rtol=2**-6, atol=1e-7))
