"""MLX's format (mlx-lm): a folder with `adapters.safetensors` and `adapter_config.json`.

`<path>.lora_a` is `[in, rank]` and `<path>.lora_b` `[rank, out]`, both transposed from ours. `scale` in the
configuration is what the product is multiplied by, and there is one for all layers, as there is one rank.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from peftkit.errors import FileError, FormatError
from peftkit.formats import tensorfiles
from peftkit.formats.folders import CONFIG
from peftkit.formats.lowrank import Format, Product, one_alpha, one_rank, paired, refuse_alpha, refuse_part
from peftkit.writing import replace
from peftkit.writing import write as write_tensors

FORM = Format("MLX's folders", ("Linear", "Embedding"))
NEEDS_MODEL = "linear layers and embeddings look alike in it"
WEIGHTS = "adapters.safetensors"

_TEMPLATE = json.loads('{"fine_tune_type": "lora", "num_layers": -1}')
"""What says that it is of low-rank products, in any block."""
_ROLES = {"lora_a": "down", "lora_b": "up"}
_PARAMETERS = {"rank", "scale", "dropout", "keys"}


def write(path: Path, products: Sequence[Product], model: nn.Module, part: str | None) -> str:  # noqa: ARG001 - all formats have one signature
    """Write the folder, the configuration last; returns what a reader must know."""
    refuse_part(part)
    alpha, products = one_alpha(one_rank(products))
    rank = products[0].rank
    tensors: dict[str, Tensor] = {}
    for product in products:
        if not product.path:
            raise FileError("MLX's folders name layers within a model, and this model is a single layer")
        tensors[f"{product.path}.lora_a"] = product.down.mT.contiguous()
        tensors[f"{product.path}.lora_b"] = product.up.mT.contiguous()
    keys = sorted(product.path for product in products)  # in full: mlx-lm looks for them in each block and in the model
    config = {**_TEMPLATE, "lora_parameters": {"rank": rank, "scale": alpha / rank, "dropout": 0.0, "keys": keys}}
    try:
        path.mkdir(exist_ok=True)
    except OSError as error:
        raise FileError(f"cannot make the folder {path}: {error.strerror or error}") from error
    write_tensors(path / WEIGHTS, tensors, "format", "mlx")
    replace(path / CONFIG, [(json.dumps(config, indent=4, sort_keys=True, allow_nan=False) + "\n").encode()])
    return f"mlx_lm.generate --adapter-path {path}"


def read(path: Path, part: str | None, alpha: float | None, *, check_finite: bool = True) -> list[Product]:
    """The products, by their paths in the model."""
    refuse_part(part)
    refuse_alpha(alpha)
    scale = _scale(path / CONFIG, tensorfiles.read_json(path / CONFIG))
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensorfiles.read(path / WEIGHTS, check_finite=check_finite).tensors.items():
        layer, _, role = key.rpartition(".")
        if role not in _ROLES:
            raise FormatError(f"{path} holds {key!r}; of MLX's folders lora_a and lora_b are read")
        if tensor.dim() != 2:
            raise FormatError(f"{path}: {key} is {list(tensor.shape)}, and matrices are read: no stacks of experts")
        found.setdefault(layer, {})[_ROLES[role]] = tensor.mT
    paired(path, found)
    return [
        Product(layer, sides["up"], sides["down"], scale * sides["down"].shape[0]) for layer, sides in found.items()
    ]


def _scale(path: Path, config: Mapping[str, Any]) -> float:
    kind, parameters = config.get("fine_tune_type"), config.get("lora_parameters")
    if kind not in (None, _TEMPLATE["fine_tune_type"]):
        raise FormatError(f"{path} has fine_tune_type={kind!r}; {_TEMPLATE['fine_tune_type']!r} is read")
    if not isinstance(parameters, dict):
        raise FormatError(f"{path} is no configuration of MLX's: it has no lora_parameters")
    more = set(parameters) - _PARAMETERS
    if more:
        raise FormatError(
            f"{path} has {min(more)}={parameters[min(more)]!r} among lora_parameters, which is not understood (in "
            "early versions of mlx-lm alpha was one more factor of the scale)"
        )
    scale = parameters.get("scale")
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
        raise FormatError(f"{path} has scale={scale!r} among lora_parameters, where a number is due")
    return float(scale)


def locate(model: nn.Module, path: Path, products: Sequence[Product]) -> list[Product]:  # noqa: ARG001 - all formats have one signature
    """As they are: their paths are the model's."""
    return list(products)
