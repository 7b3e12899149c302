"""GGUF adapters, for llama.cpp and Ollama: `blk.0.attn_q.weight.lora_a` `[rank, in]` and `.lora_b` `[out, rank]`.

The names are llama.cpp's, which the package `gguf` knows for each architecture. The scale is alpha / rank with one
alpha for the whole file. Where llama.cpp keeps a weight with its rows in another order, the rows of `lora_b` are put in
that order too. Of an embedding, `lora_a` is transposed.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from peftkit.errors import BaseMismatchError, FileError, FormatError, did_you_mean
from peftkit.formats import ggufs
from peftkit.formats.lowrank import Format, Product, one_alpha, paired, refuse_alpha, refuse_part
from peftkit.installed import inner
from peftkit.resolve import modules_of
from peftkit.writing import replace

FORM = Format("GGUF adapters", ("Linear", "Conv1D", "Embedding"))
NEEDS_MODEL = "llama.cpp's names of layers depend on the model's configuration"
MAGIC = ggufs.MAGIC

_ARCHITECTURES = {
    "llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma": "gemma", "gemma2": "gemma2",
    "phi3": "phi3",
}  # fmt: skip
"""The `model_type` of a configuration → the architecture, where llama.cpp takes each weight as it is, but for the order
of its rows."""
_INTERLEAVED = {"llama"}
"""The architectures of which llama.cpp keeps the two halves of each head's rows, for the rotary embedding, in turns."""
_HEADS = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
_KIND = dict(entry.split("=") for entry in ("general.type=adapter", "adapter.type=lora"))
_ALPHA = "adapter.lora.alpha"


def write(path: Path, products: Sequence[Product], model: nn.Module, part: str | None) -> str:
    """Write the products; returns what a reader must know."""
    refuse_part(part)
    gguf = _package()
    names = _names(model)
    alpha, products = one_alpha(products)
    config: Any = inner(model).config
    writer_of: dict[str, Any] = {}
    for product in products:
        if product.path not in names:
            raise FileError(f"llama.cpp has no name for {product.path or 'the model'} in a {config.model_type} model")
        up, down = _rows(product, config, undo=False).float(), product.down.float()
        name = f"{names[product.path]}.weight"
        writer_of[f"{name}.lora_a"] = (down.mT if product.one_hot else down).contiguous().numpy()
        writer_of[f"{name}.lora_b"] = up.contiguous().numpy()
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "adapter.gguf"
        writer = gguf.GGUFWriter(made, _ARCHITECTURES[config.model_type])
        for key, value in _KIND.items():
            writer.add_string(key, value)
        writer.add_float32(_ALPHA, alpha)
        for name, value in writer_of.items():
            writer.add_tensor(name, value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        replace(path, [made.read_bytes()])
    return f"in Ollama's Modelfile: ADAPTER ./{path.name}; in llama.cpp: --lora {path}"


def _package() -> Any:
    try:
        import gguf
    except ModuleNotFoundError as error:
        raise FileError("GGUF adapters need one more package: pip install 'peftkit[gguf]'") from error
    return gguf


def _names(model: nn.Module) -> dict[str, str]:
    """llama.cpp's names of the model's layers."""
    gguf = _package()
    config = getattr(inner(model), "config", None)
    kind = getattr(config, "model_type", None)
    if kind not in _ARCHITECTURES:
        raise FileError(
            f"a GGUF adapter is for a model of llama.cpp's; of transformers' model_type, {', '.join(_ARCHITECTURES)} "
            f"are known here, and this model's is {kind!r}"
        )
    architecture = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == _ARCHITECTURES[kind])
    known = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)  # type: ignore[union-attr]
    found = {path: known.get_name(path) for path in modules_of(inner(model)) if path}
    return {path: name for path, name in found.items() if name is not None}


def _rows(product: Product, config: Any, *, undo: bool) -> Tensor:
    """`up` with its rows as llama.cpp has them: of each head, those of its two halves in turns; or back."""
    heads = getattr(config, _HEADS.get(product.path.rpartition(".")[2], ""), None)
    if heads is None or _ARCHITECTURES[config.model_type] not in _INTERLEAVED:
        return product.up
    out, rank = product.up.shape
    shape = (heads, out // heads // 2, 2, rank) if undo else (heads, 2, out // heads // 2, rank)
    return product.up.reshape(shape).swapaxes(1, 2).reshape(out, rank)


def read(path: Path, part: str | None, alpha: float | None, *, check_finite: bool = True) -> list[Product]:
    """The products, by llama.cpp's names."""
    refuse_part(part)
    refuse_alpha(alpha)
    fields, tensors = ggufs.read(path, check_finite=check_finite)
    for key, value in _KIND.items():
        if fields.get(key) != value:
            raise FormatError(f"{path} has {key}={fields.get(key)!r}, and {value!r} is read")
    strange = [key for key in fields if key.startswith("adapter.") and key not in (*_KIND, _ALPHA)]
    if strange:
        raise FormatError(f"{path} has {strange[0]}={fields[strange[0]]!r}, which has no counterpart here")
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        layer, _, side = name.rpartition(".weight.")
        if side not in ("lora_a", "lora_b"):
            raise FormatError(f"{path} holds {name!r}; of GGUF adapters lora_a and lora_b of weights are read")
        found.setdefault(layer, {})["down" if side == "lora_a" else "up"] = tensor
    paired(path, found)
    return [_product(layer, sides, float(fields.get(_ALPHA, 0.0))) for layer, sides in found.items()]


def _product(layer: str, sides: dict[str, Tensor], alpha: float) -> Product:
    one_hot = layer == "token_embd"
    up, down = sides["up"], sides["down"].mT if one_hot else sides["down"]
    return Product(layer, up, down, alpha or float(down.shape[0]), one_hot=one_hot)


def locate(model: nn.Module, path: Path, products: Sequence[Product]) -> list[Product]:
    """The products with the paths of this model, their rows in its order."""
    paths = {name: each for each, name in _names(model).items()}
    config = inner(model).config
    located = []
    for product in products:
        if product.path not in paths:
            raise BaseMismatchError(
                f"this model has no layer that llama.cpp calls {product.path!r}, which {path} adapts"
                f"{did_you_mean(product.path, paths)}"
            )
        here = product._replace(path=paths[product.path])
        heads = getattr(config, _HEADS.get(here.path.rpartition(".")[2], ""), None) or 1
        if here.up.shape[0] % (2 * heads):
            raise BaseMismatchError(f"{path} has {here.up.shape[0]} rows for {here.path}, which has {heads} heads here")
        located.append(here._replace(up=_rows(here, config, undo=True)))
    return located
