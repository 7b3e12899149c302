"""loralib's format: `<path>.lora_A` `[rank, in]` and `<path>.lora_B` `[out, rank]`, as in a model's state.

The scale is alpha / rank, and alpha is in the program that made the model, not in its state. Files written here say it
in their metadata; for any other file it must be given. What loralib itself saves is a pickle, so its state is to be put
in a safetensors file.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from peftkit.errors import FileError, FormatError
from peftkit.formats import tensorfiles
from peftkit.formats.lowrank import Format, Product, one_alpha, paired, refuse_part, text_of
from peftkit.writing import write as write_tensors

FORM = Format("loralib's files", ("Linear", "Conv1D", "Embedding", "Conv2d"))
NEEDS_MODEL = "linear layers, convolutions and embeddings look alike in it"
_ALPHA = "lora_alpha"
_ROLES = {"lora_A": "down", "lora_B": "up"}


def recognise(keys: Sequence[str], metadata: Mapping[str, str]) -> bool:  # noqa: ARG001 - all formats have one signature
    """Whether there are such factors, each a parameter of a layer by itself."""
    return any(key.rpartition(".")[2] in _ROLES for key in keys)


def write(path: Path, products: Sequence[Product], model: nn.Module, part: str | None) -> str:  # noqa: ARG001 - all formats have one signature
    """Write the products with one alpha; returns what a reader must know."""
    refuse_part(part)
    alpha, products = one_alpha(products)
    tensors: dict[str, Tensor] = {}
    for product in products:
        up, down = product.up, product.down
        if product.kernel is not None:
            up, down = _as_convolution(product)
        prefix = f"{product.path}." if product.path else ""
        tensors[f"{prefix}lora_A"], tensors[f"{prefix}lora_B"] = down.contiguous(), up.contiguous()
    write_tensors(path, tensors, _ALPHA, text_of(alpha))
    ranks = sorted({product.rank for product in products})
    return f"make the layers with lora_alpha={text_of(alpha)} and r={' or '.join(map(str, ranks))}"


def _as_convolution(product: Product) -> tuple[Tensor, Tensor]:
    """`lora_B` `[out · k, rank · k]` and `lora_A` `[rank · k, in · k]`, whose product is the kernel, in its order.

    Each row of ours, `[in · k · k]`, is k rows there; one block of our factors stands in each.
    """
    size = _square(product)
    identity = torch.eye(size, dtype=product.up.dtype)
    return torch.kron(product.up, identity), product.down.reshape(product.rank * size, -1)


def _square(product: Product) -> int:
    kernel = product.kernel or ()
    if len(set(kernel)) > 1:
        raise FileError(f"{product.path}: loralib's convolutions have square kernels, and this one is {kernel}")
    return kernel[0]


def read(path: Path, part: str | None, alpha: float | None, *, check_finite: bool = True) -> list[Product]:
    """The products. `alpha` must be given unless the file says it."""
    refuse_part(part)
    metadata, tensors = tensorfiles.read(path, check_finite=check_finite)
    alpha = _alpha(path, metadata, alpha)
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        layer, _, role = key.rpartition(".")
        if role not in _ROLES:
            raise FormatError(
                f"{path} holds {key!r}; of loralib's files lora_A and lora_B are read. A bias that was trained has no "
                "place here: set it in the model itself, and take it out of the file"
            )
        found.setdefault(layer, {})[_ROLES[role]] = tensor
    paired(path, found)
    return [Product(layer, sides["up"], sides["down"], alpha) for layer, sides in found.items()]


def _alpha(path: Path, metadata: Mapping[str, str], given: float | None) -> float:
    said = metadata.get(_ALPHA)
    if said is None:
        if given is None:
            raise FormatError(
                f"{path} is loralib's, whose scale is alpha / rank, and alpha is not in the file: say what the layers "
                "were made with, by alpha="
            )
        return given
    try:
        alpha = float(said)
    except ValueError as error:
        raise FormatError(f"{path}: its {_ALPHA} is {said!r} and no number") from error
    if given is not None and given != alpha:
        raise FormatError(f"{path} says that its alpha is {said}, and alpha={given:g} was given")
    return alpha


def locate(model: nn.Module, path: Path, products: Sequence[Product]) -> list[Product]:
    """The products as matrices of this model's layers: merged layers and convolutions have another shape."""
    modules = dict(model.named_modules())
    return [_matrices(path, product, modules.get(product.path)) for product in products]


def _matrices(path: Path, product: Product, layer: nn.Module | None) -> Product:
    if isinstance(layer, nn.Conv2d):
        return _of_convolution(path, product, layer)
    parts, rest = divmod(product.down.shape[0], max(product.up.shape[1], 1))
    if rest or parts < 2:
        return product
    # A merged layer: each part of the rows has its own factors.
    out = getattr(layer, "out_features", None) or getattr(layer, "nf", None)
    if out != product.up.shape[0]:
        raise FormatError(
            f"{path} has {parts} parts of {product.path}, and not of all of its {out} rows: which parts are adapted "
            "(enable_lora) is not in the file"
        )
    up: Tensor = torch.block_diag(*product.up.chunk(parts))  # type: ignore[no-untyped-call]
    return product._replace(up=up, alpha=product.alpha * parts)


def _of_convolution(path: Path, product: Product, layer: nn.Conv2d) -> Product:
    """Undo `_as_convolution`; factors that loralib has trained have no blocks, and make k · k times their rank."""
    size = layer.kernel_size[0]
    wide, fan_in = product.up.shape[1], product.down.shape[1]
    fits = product.down.shape[0] == wide and not wide % size and not product.up.shape[0] % size
    if not fits or math.prod(layer.kernel_size) * layer.in_channels != fan_in * size:
        raise FormatError(f"{path}: the factors for {product.path} do not fit its kernel {layer.kernel_size}")
    rank, out = wide // size, product.up.shape[0] // size
    blocks = product.up.reshape(out, size, rank, size).permute(1, 3, 0, 2)  # [row, column, out, rank]
    first = blocks[0, 0]
    if torch.equal(torch.kron(first.contiguous(), torch.eye(size, dtype=first.dtype)), product.up):
        return product._replace(up=first.contiguous(), down=product.down.reshape(rank, -1), kernel=layer.kernel_size)
    up = product.up.reshape(out, size * wide)  # [out, row · rank]
    down: Tensor = torch.block_diag(*[product.down] * size)  # type: ignore[no-untyped-call]  # [row · rank, row · in]
    return Product(product.path, up, down, product.alpha / rank * len(down), layer.kernel_size)
