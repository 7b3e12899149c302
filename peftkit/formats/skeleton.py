"""Makes a model to read a file with, where the real one is not at hand: layers of the right shapes, without memory.

A file of our own says each layer's class and shape, and those of HF PEFT and diffusers show them by names and shapes.
In the other formats a name can mean several layers, so they need the model itself. Nothing that a
file names is imported.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftkit.errors import FileError, FormatError
from peftkit.formats import interchange
from peftkit.formats.folders import read_folder
from peftkit.formats.lowrank import Product
from peftkit.formats.places import ROOT
from peftkit.installed import inner, installed
from peftkit.reading import read

_CONVOLUTIONS: tuple[Callable[..., nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_HF = {"lora_A.weight": "down", "lora_B.weight": "up", "lora_embedding_A": "down", "lora_embedding_B": "up"}
_HF_MORE = ("lora_magnitude_vector", "lora_magnitude_vector.weight")
"""Tensors that stand beside those factors, and say nothing new of the shapes."""


class Unknown(nn.Module):
    """A layer of which only the shapes of its weights are known."""


def hollow(model: nn.Module) -> nn.Module:
    """The model itself, its parameters on the meta device replaced by zeros without memory; what is tied stays so."""
    made: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}  # what is replaced is kept, so that its id stays its own
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None and p.is_meta:
                module._parameters[name] = made.setdefault(id(p), (p, _zeros(p.shape, p.dtype)))[1]
    return model


def _zeros(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.zeros((), dtype=dtype).expand(tuple(shape)), requires_grad=False)


def forget(model: nn.Module) -> None:
    """Put the adapted weights of a skeleton on the meta device: what is saved then says nothing of their values."""
    for placements in installed(model).adapters.values():
        for placement in placements:
            raw = placement.layer._parameters.get(placement.weight)
            if raw is not None and placement.adapter is not None:
                placement.layer._parameters[placement.weight] = nn.Parameter(raw.to("meta"), requires_grad=False)


def layers_of(model: nn.Module, *classes: type[nn.Module]) -> list[str]:
    """The paths of the layers of a skeleton that are of these classes."""
    return [path for path, module in inner(model).named_modules() if isinstance(module, classes)]


def skeleton_of(path: Path, form: str, part: str | None = None) -> nn.Module:
    """A model that the file or folder at `path`, of the format `form`, can be loaded on.

    Raises `FileError` where its shapes do not tell which layers it is for.
    """
    if form == "peftkit":
        return _of_manifest(path)
    if form == "hf":
        return _of_folder(path)
    why = interchange.needs_model(form)
    if why:
        raise FileError(f"{path} is {form}'s, and {why}; say for which model it is")
    layers = {product.path: _of_product(product) for product in interchange.products(path, form, part=part)}
    return _assembled(path, layers)


def _assembled(path: Path, layers: dict[str, nn.Module]) -> nn.Module:
    """The layers at their paths, in modules of their own where a path leads through nothing known."""
    if "" in layers:
        return layers[""]
    root = nn.Module()
    for where in sorted(layers, key=lambda each: each.count(".")):
        *above, name = where.split(".")
        module = root
        try:
            for segment in above:
                if segment not in module._modules:
                    module.add_module(segment, nn.Module())
                module = module._modules[segment]  # type: ignore[assignment]
            module.add_module(name, layers[where])
        except KeyError as error:
            raise FileError(f"{path} adapts {where!r}, a path for which its model is needed: {error}") from error
    return root


def _linear(out: int, fan_in: int) -> nn.Module:
    return nn.Linear(fan_in, out, bias=False, device="meta")


def _embedding(dim: int, rows: int) -> nn.Module:
    return nn.Embedding(rows, dim, device="meta")


def _transposed(out: int, fan_in: int) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        return Conv1D(out, fan_in)  # type: ignore[no-untyped-call]


def _convolution(out: int, channels: int, kernel: Sequence[int]) -> nn.Module:
    if not 1 <= len(kernel) <= len(_CONVOLUTIONS):
        raise FormatError(f"a convolution has one to three dimensions, and a file has one with {len(kernel)}")
    make = _CONVOLUTIONS[len(kernel) - 1]
    return make(channels, out, tuple(kernel), bias=False, device="meta")


def _of_shape(layer: str, shape: list[int]) -> nn.Module | None:
    """A layer of one of the classes whose weight's shape is all that matters."""
    if layer == "Linear" and len(shape) == 2:
        return _linear(*shape)
    if layer == "Embedding" and len(shape) == 2:
        return _embedding(*shape[::-1])
    if layer == "Conv1D" and len(shape) == 2:
        return _transposed(*shape[::-1])
    if layer in ("Conv1d", "Conv2d", "Conv3d") and len(shape) == 2 + int(layer[4]):
        return _convolution(shape[0], shape[1], shape[2:])
    return None


def _of_manifest(path: Path) -> nn.Module:
    layers: dict[str, nn.Module] = {}
    sites = read(path, check_finite=False).manifest["sites"]
    for site in sorted(sites, key=lambda site: site["weight"] != "weight"):  # by it a layer is known
        where, weight, shape = site["path"], site["weight"], site["shape"]
        if weight == "module":
            raise FileError(f"{path} adapts {where or 'the model'} as a whole, for which the model itself is needed")
        made = _of_shape(site["layer"], shape) if weight == "weight" else None
        if where not in layers:
            layers[where] = made or Unknown()
        if weight not in layers[where]._parameters:
            layers[where].register_parameter(weight, _zeros(shape))
        elif made is None:  # another weight of a layer that is known
            layers[where]._parameters[weight] = _zeros(shape)
    return hollow(_assembled(path, layers))


def _of_folder(path: Path) -> nn.Module:
    config, tensors = read_folder(path)
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        for word in (*_HF, *_HF_MORE):
            if key.startswith(ROOT) and key.endswith("." + word):
                found.setdefault(key.removeprefix(ROOT).removesuffix("." + word), {})[word] = tensor
                break
        else:
            raise FileError(
                f"{path} holds {key!r}, from which the layer that it is for cannot be told; say for which model it is"
            )
    if config.get("target_parameters"):
        raise FileError(f"{path} adapts single parameters ({config['target_parameters']}); say for which model it is")
    transposed = bool(config.get("fan_in_fan_out"))
    layers = {where: _of_factors(path, where, sides, transposed) for where, sides in found.items()}
    return hollow(_assembled(path, layers))


def _of_factors(path: Path, where: str, sides: dict[str, Tensor], transposed: bool) -> nn.Module:  # noqa: FBT001
    made = {_HF[word]: tensor.shape for word, tensor in sides.items() if word in _HF}
    if set(made) != {"up", "down"} or min(map(len, made.values())) < 2:
        raise FormatError(f"{path} has no two factors for {where!r}")
    out, fan_in = made["up"][0], made["down"][1]
    if "lora_embedding_A" in sides:
        return _embedding(out, fan_in)
    if len(made["down"]) > 2:
        return _convolution(out, fan_in, made["down"][2:])
    return _transposed(out, fan_in) if transposed else _linear(out, fan_in)


def _of_product(product: Product) -> nn.Module:
    out, fan_in = product.up.shape[0], product.down.shape[1]
    if product.kernel is not None:
        channels: Any = fan_in // torch.Size(product.kernel).numel()
        return hollow(_convolution(out, channels, product.kernel))
    return hollow((_embedding if product.one_hot else _linear)(out, fan_in))


def add_namesakes(model: nn.Module) -> None:
    """Put a module of each layer's last name elsewhere in a skeleton.

    The real model may have such. So names that stand for its layers in a file are written as whole paths.
    """
    last = {path.rpartition(".")[2] for path, module in model.named_modules() if path and not module._modules}
    elsewhere = nn.Module()
    for name in sorted(last):
        elsewhere.add_module(name, nn.Module())
    model.add_module("_elsewhere", elsewhere)
