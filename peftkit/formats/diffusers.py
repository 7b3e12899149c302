"""diffusers' format: `<part>.<path>.lora_A.weight` and `.lora_B.weight`, usually `pytorch_lora_weights.safetensors`.

Where the scale is has changed: in early versions there was none (alpha is the rank), then came `<path>.alpha`, then a
configuration in the metadata, which versions before it ignore. What is written here has a scale of 1 and one rank, so
that all of them compute the same. What is read may have any of these, and the older names of the factors.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from peftkit.composition import base_class
from peftkit.errors import FileError, FormatError
from peftkit.formats import tensorfiles
from peftkit.formats.declared import find, refuse_unknown
from peftkit.formats.lowrank import PLAIN, Format, Product, number, one_rank, paired, plain, refuse_alpha
from peftkit.formats.matching import pattern
from peftkit.installed import inner
from peftkit.writing import write as write_tensors

FORM = Format("diffusers' files", ("Linear", "Conv1d", "Conv2d", "Conv3d"))
NEEDS_MODEL = ""  # its names are paths, and its shapes tell linear layers from convolutions

_METADATA = "lora_adapter_metadata"
_ROLES = {
    "lora_A.weight": "down", "lora_B.weight": "up", "lora.down.weight": "down", "lora.up.weight": "up",
    "lora_linear_layer.down.weight": "down", "lora_linear_layer.up.weight": "up", "alpha": "alpha",
}  # fmt: skip
_PROCESSOR = re.compile(r"(?:\.processor)?\.(to_(?:q|k|v|out))_lora\.(down|up)\.weight\Z")
"""The oldest names: of an attention's processor, and not of its layers."""


def recognise(keys: Sequence[str], metadata: Mapping[str, str]) -> bool:
    """Whether there are factors under one of the names that it has had."""
    return _METADATA in metadata or any(_split(key)[1] in ("up", "down") for key in keys)


def write(path: Path, products: Sequence[Product], model: nn.Module, part: str | None) -> str:
    """Write the products, under the names of `part`; returns what a reader must know."""
    if part is None:  # the pipelines' own names for what they train
        part = "unet" if base_class(inner(model)).__name__.startswith("UNet") else "transformer"
    tensors: dict[str, Tensor] = {}
    for product in one_rank(plain(products)):
        if not product.path:
            raise FileError("diffusers' files name layers within a model, and this model is a single layer")
        ones = (1,) * len(product.kernel or ())
        down = product.down if product.kernel is None else product.down.reshape(product.rank, -1, *product.kernel)
        tensors[f"{part}.{product.path}.lora_A.weight"] = down.contiguous()
        tensors[f"{part}.{product.path}.lora_B.weight"] = product.up.reshape(*product.up.shape, *ones).contiguous()
    write_tensors(path, tensors, "format", "pt")
    return f"its names begin with {part}. (prefix={part!r} in diffusers' load_lora_adapter)"


def read(path: Path, part: str | None, alpha: float | None, *, check_finite: bool = True) -> list[Product]:
    """The products of one part, by their paths in the model."""
    refuse_alpha(alpha)
    metadata, tensors = tensorfiles.read(path, check_finite=check_finite)
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        layer, role = _split(key)
        if role is None:
            raise FormatError(
                f"{path} holds {key!r}; of diffusers' files low-rank products are read, with the tensors "
                f"{', '.join(_ROLES)}"
            )
        found.setdefault(layer, {})[role] = tensor
    part, chosen = _of_part(path, found, part)
    paired(path, chosen)
    alpha_of = _alphas(path, metadata, part)
    return [_product(path, layer, sides, alpha_of) for layer, sides in chosen.items()]


def _split(key: str) -> tuple[str, str | None]:
    """The layer, and which of its tensors this is."""
    for words, role in _ROLES.items():
        if key.endswith("." + words):
            return key.removesuffix("." + words), role
    old = _PROCESSOR.search(key)
    if old is None:
        return key, None
    return key[: old.start()] + f".{old.group(1)}" + (".0" if old.group(1) == "to_out" else ""), old.group(2)


def _of_part(
    path: Path, found: Mapping[str, dict[str, Tensor]], part: str | None
) -> tuple[str, dict[str, dict[str, Tensor]]]:
    present = sorted({layer.partition(".")[0] for layer in found})
    if part is None and len(present) > 1:
        raise FormatError(f"{path} is for several models: {', '.join(present)}; say which by part=")
    if part is None:
        part = present[0]
    chosen = {layer.removeprefix(part + "."): sides for layer, sides in found.items() if layer.startswith(part + ".")}
    if not chosen:
        raise FormatError(f"{path} has no name that begins with {part}.; there are {', '.join(present)}")
    return part, chosen


def _product(path: Path, layer: str, sides: Mapping[str, Tensor], alpha_of: Callable[[str, int], float]) -> Product:
    up, down = sides["up"], sides["down"]
    rank = down.shape[0]
    alpha = number(path, f"{layer}.alpha", sides["alpha"]) if "alpha" in sides else alpha_of(layer, rank)
    return Product(layer, up.flatten(1), down.flatten(1), alpha, tuple(down.shape[2:]) or None)


def _alphas(path: Path, metadata: Mapping[str, str], part: str) -> Callable[[str, int], float]:
    """The alpha of each layer, given its rank: that of the configuration, where there is one, else the rank."""
    config = _config(path, metadata, part)
    if not config:
        return lambda _layer, rank: float(rank)
    refuse_unknown(config, find(PLAIN, {}).hf)  # type: ignore[arg-type]
    patterns = _entry(path, config, "alpha_pattern", dict) or {}
    special = [(pattern(key, "alpha_pattern"), value) for key, value in patterns.items()]
    common = _entry(path, config, "lora_alpha", (int, float))
    stabilized = bool(config.get("use_rslora"))

    def alpha(layer: str, rank: int) -> float:
        own = next((value for matches, value in special if matches(layer)), common)
        if not isinstance(own, (int, float)):
            raise FormatError(f"{path}: its metadata have no lora_alpha that is a number")
        return own * math.sqrt(rank) if stabilized else float(own)

    return alpha


def _config(path: Path, metadata: Mapping[str, str], part: str) -> dict[str, Any]:
    try:
        config = json.loads(metadata.get(_METADATA, "{}"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: its metadata's {_METADATA} is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise FormatError(f"{path}: its metadata's {_METADATA} is no object")
    return {key.removeprefix(part + "."): value for key, value in config.items() if key.startswith(part + ".")}


def _entry(path: Path, config: Mapping[str, Any], name: str, kind: Any) -> Any:
    value = config.get(name)
    if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
        raise FormatError(f"{path}: its metadata have {name}={value!r}")
    return value


def locate(model: nn.Module, path: Path, products: Sequence[Product]) -> list[Product]:  # noqa: ARG001 - all formats have one signature
    """As they are: their paths are the model's."""
    return list(products)
