"""What an adapter file says about itself, and how that is checked. docs/files.md specifies it.

A manifest is plain JSON: the method with its fields for every site, the sites' resolved paths, a few facts about the
base, and a digest of every tensor. It is sealed with a digest of its own.
"""

import ctypes
import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftkit import plugins
from peftkit.composition import base_class, raw_parameter
from peftkit.errors import FormatError
from peftkit.installed import Placement

FORMAT = 1
"""Version of the file format; a reader refuses a later one."""

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
    packages = {info.name: info for info in plugins.methods()}
    sites = []
    for placement in placements:
        raw = originals.get((id(placement.layer), placement.weight))
        sites.append(
            {
                "path": placement.path,
                "weight": placement.weight,
                "method": numbers[placement.method.key],
                "in_place": placement.adapter is None,
                **base_facts(placement.layer, placement.weight, raw, in_place=placement.adapter is None),
            }
        )
    return {
        "format": FORMAT,
        "name": name,
        "methods": [
            {
                "name": method.name,
                "fields": method.fields(),
                "package": packages[method.name].package if method.name in packages else "",
                "version": packages[method.name].version if method.name in packages else "",
            }
            for method in methods.values()
        ],
        "sites": sites,
        "fingerprint": fingerprint(sites),
        "tensors": {key: tensor_digest(tensor) for key, tensor in tensors.items()},
    }


def base_facts(layer: nn.Module, weight: str, raw: Tensor | None = None, *, in_place: bool) -> dict[str, Any]:
    """What a file remembers of the base at one site: its type, its shape, and a few of its values."""
    if weight == "module":
        return {"layer": base_class(layer).__qualname__, "shape": [], "sample": None}
    raw = raw_parameter(layer, weight) if raw is None else raw
    return {
        "layer": base_class(layer).__qualname__,
        "shape": list(raw.shape),
        "sample": None if in_place or raw.is_meta else _sample(raw),
    }


def _sample(raw: Tensor) -> str:
    """A few values, evenly spread, as bfloat16 in hexadecimal: the same for a base in float32 and in bfloat16."""
    if raw.numel() == 0:
        return ""
    places = _places(raw.numel()).to(raw.device)
    if raw.is_contiguous():
        values = raw.detach().view(-1)[places]
    else:
        values = raw.detach()[torch.unravel_index(places, raw.shape)]
    sample = values.to(device="cpu", dtype=torch.bfloat16).contiguous()
    return ctypes.string_at(sample.data_ptr(), 2 * _SAMPLES).hex()


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
    if tensor.numel():
        digest.update((ctypes.c_char * (tensor.numel() * tensor.element_size())).from_address(tensor.data_ptr()))
    return digest.hexdigest()


def check(path: Path, manifest: Any, seal: Any) -> None:
    """Refuse a manifest that was altered, comes from a later version, or is not made as this version makes it."""
    try:
        sealed = isinstance(manifest, dict) and digest(canonical(manifest)) == seal
    except ValueError:  # a number or a text that JSON cannot hold
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
                and all(type(n) is int and n >= 0 for n in s["shape"])
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
