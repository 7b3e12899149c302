"""kohya's format, which LyCORIS and the programs for image models share: one file, whose names have no dots.

`<part>_<path with _ for each dot>.lora_down.weight` `[rank, in, *kernel]`, `.lora_up.weight` `[out, rank, 1, …]`, and
`.alpha`, where the scale is alpha / rank; without one, or with 0, it is 1. The names are looked up in a model, because
a `_` in them may stand for a dot or for itself.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from peftkit.errors import BaseMismatchError, FileError, FormatError, did_you_mean
from peftkit.formats import tensorfiles
from peftkit.formats.lowrank import Format, Product, number, paired, refuse_alpha
from peftkit.installed import inner
from peftkit.resolve import modules_of
from peftkit.writing import write as write_tensors

FORM = Format("kohya's files", ("Linear", "Conv1d", "Conv2d", "Conv3d"))
NEEDS_MODEL = "a _ in its names may stand for a dot or for itself"
PARTS = ("lycoris", "lora_unet", "lora_te", "lora_te1", "lora_te2", "lora_te3", "lora_transformer")
"""What stands before the names, by the model that they are of."""

_ROLES = {"lora_down.weight": "down", "lora_up.weight": "up", "lora_mid.weight": "mid", "alpha": "alpha"}


def recognise(keys: Sequence[str], metadata: Mapping[str, str]) -> bool:
    """Whether the keys are such names: without a dot but for the last words."""
    parts = tuple(f"{part}_" for part in PARTS)
    return "ss_network_module" in metadata or any(
        key.partition(".")[2] == "lora_down.weight" or key.startswith(parts) for key in keys
    )


def write(path: Path, products: Sequence[Product], model: nn.Module, part: str | None) -> str:
    """Write the products, under the names of `part`; returns what a reader must know."""
    part = "lycoris" if part is None else part
    flat = _flattened(model)
    tensors: dict[str, Tensor] = {}
    for product in products:
        if not product.path:
            raise FileError("kohya's files name layers within a model, and this model is a single layer")
        stem = product.path.replace(".", "_")
        if len(flat[stem]) > 1:
            raise FileError(
                f"kohya's files have _ for each dot, so {' and '.join(flat[stem])} would both be {stem!r}; save with "
                "format='peftkit'"
            )
        ones = (1,) * len(product.kernel or ())
        down = product.down if product.kernel is None else product.down.reshape(product.rank, -1, *product.kernel)
        tensors[f"{part}_{stem}.lora_down.weight"] = down.contiguous()
        tensors[f"{part}_{stem}.lora_up.weight"] = product.up.reshape(*product.up.shape, *ones).contiguous()
        tensors[f"{part}_{stem}.alpha"] = torch.tensor(product.alpha, dtype=torch.float32)
    write_tensors(path, tensors, "format", "pt")
    return f"its names begin with {part}_"


def _flattened(model: nn.Module) -> dict[str, list[str]]:
    flat: dict[str, list[str]] = {}
    for path in modules_of(inner(model)):
        flat.setdefault(path.replace(".", "_"), []).append(path)
    return flat


def read(path: Path, part: str | None, alpha: float | None, *, check_finite: bool = True) -> list[Product]:
    """The products of one part; their paths are still the file's names, without the part."""
    refuse_alpha(alpha)
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensorfiles.read(path, check_finite=check_finite).tensors.items():
        name, _, role = key.partition(".")
        if role not in _ROLES:
            raise FormatError(
                f"{path} holds {key!r}; of kohya's formats those of low-rank products are read, with the tensors "
                f"{', '.join(_ROLES)}"
            )
        found.setdefault(name, {})[_ROLES[role]] = tensor
    chosen = _of_part(path, found, part)
    paired(path, chosen)
    return [_product(path, name, sides) for name, sides in chosen.items()]


def _of_part(path: Path, found: Mapping[str, dict[str, Tensor]], part: str | None) -> dict[str, dict[str, Tensor]]:
    if part is None:
        present = {_part(path, name) for name in found}
        if len(present) > 1:
            raise FormatError(f"{path} is for several models: {', '.join(sorted(present))}; say which by part=")
        part = present.pop() if present else ""
    chosen = {name.removeprefix(part + "_"): sides for name, sides in found.items() if name.startswith(part + "_")}
    if not chosen:
        raise FormatError(f"{path} has no name that begins with {part}_")
    return chosen


def _part(path: Path, name: str) -> str:
    for part in PARTS:
        if name.startswith(part + "_"):
            return part
    raise FormatError(f"{path} holds {name!r}, which begins with none of {', '.join(PARTS)}; say with what, by part=")


def _product(path: Path, name: str, sides: Mapping[str, Tensor]) -> Product:
    up, down, mid = sides["up"], sides["down"], sides.get("mid")
    if mid is not None:  # Tucker's form: the kernel stands between two projections of channels
        if mid.dim() != down.dim() or mid.shape[:2] != (up.shape[1], down.shape[0]):
            raise FormatError(f"{path}: the factors for {name!r} do not fit each other")
        down = torch.einsum("rs...,si->ri...", mid, down.flatten(1))
    alpha = number(path, f"{name}.alpha", sides["alpha"]) if "alpha" in sides else 0.0
    kernel = tuple(down.shape[2:]) or None
    return Product(name, up.flatten(1), down.flatten(1), alpha or float(down.shape[0]), kernel)


def locate(model: nn.Module, path: Path, products: Sequence[Product]) -> list[Product]:
    """The products with the paths that their names stand for in this model."""
    flat = _flattened(model)
    for product in products:
        if product.path not in flat:
            raise BaseMismatchError(
                f"this model has no layer whose path, with _ for each dot, is {product.path!r}, which {path} adapts"
                f"{did_you_mean(product.path, flat)}"
            )
        if len(flat[product.path]) > 1:
            raise BaseMismatchError(f"{path} adapts {product.path!r}, which is {' and '.join(flat[product.path])} here")
    return [product._replace(path=flat[product.path][0]) for product in products]
