"""Which of the other libraries' formats a file is in, and who writes and reads it.

Each module of a format has `recognise` (by the names in the file), `write`, `read` (products by the file's names) and
`locate` (by the model's).
"""

import importlib
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from peftkit.formats import tensorfiles
from peftkit.formats.folders import CONFIG
from peftkit.formats.lowrank import Product, into_model, of_model
from peftkit.method import Method
from peftkit.restoring import Place

FORMATS = ("kohya", "loralib", "diffusers", "mlx", "gguf")
"""The formats of low-rank products alone."""

_BY_NAMES = ("kohya", "diffusers", "loralib")
"""Those that are a safetensors file and are told by the names in it."""


def _module(form: str) -> Any:
    return importlib.import_module(f"peftkit.formats.{form}")


def recognise(path: Path) -> str | None:
    """The format that the file or folder at `path` is in; None where it is in none of these. Reads a header alone.

    Raises `FormatError` for a pickle.
    """
    if path.is_dir():
        return "mlx" if (path / CONFIG).exists() and (path / _module("mlx").WEIGHTS).exists() else None
    if tensorfiles.begins(path).startswith(_module("gguf").MAGIC):
        return "gguf"
    tensorfiles.refuse_pickle(path)
    seen = tensorfiles.peek(path)
    if seen is None:
        return None
    metadata, keys = seen
    return next((form for form in _BY_NAMES if _module(form).recognise(keys, metadata)), None)


def write(model: nn.Module, name: str, path: Path, form: str, *, part: str | None = None) -> str:
    """Write the adapter `name`; returns what whoever reads it must know. Raises `FileError` for what cannot be held."""
    module = _module(form)
    products = of_model(model, name, module.FORM)
    return module.write(path, products, model, part)  # type: ignore[no-any-return]


def products(
    path: Path, form: str, *, part: str | None = None, alpha: float | None = None, check_finite: bool = True
) -> list[Product]:
    """What a file holds, by the names that it has there."""
    return _module(form).read(path, part, alpha, check_finite=check_finite)  # type: ignore[no-any-return]


def read(
    model: nn.Module,
    path: Path,
    form: str,
    own: Mapping[str, type[Method]],
    *,
    part: str | None = None,
    alpha: float | None = None,
) -> tuple[list[Place], dict[str, Tensor]]:
    """Where a file's adapter goes in this model, and its tensors by our names. Changes nothing."""
    module: ModuleType = _module(form)
    found = module.locate(model, path, products(path, form, part=part, alpha=alpha))
    return into_model(model, path, found, module.FORM, own)


def needs_model(form: str) -> str:
    """Why a file of this format cannot be understood without its model; empty where it can."""
    return _module(form).NEEDS_MODEL  # type: ignore[no-any-return]
