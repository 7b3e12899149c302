"""Reads and writes HF PEFT's adapter folders: `adapter_config.json` beside `adapter_model.safetensors`.

Nothing is unpickled. What is read is bounded before it is allocated, and finite. The weights are written first and the
configuration last, each whole or not at all: a folder without a configuration is no adapter yet.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from peftkit.errors import FileError, FormatError
from peftkit.finite import find_not_finite
from peftkit.writing import replace, write

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
MAX_CONFIG = 10_000_000
"""The longest configuration that is read, in bytes."""


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and the tensors. Raises `FileError` or `FormatError`."""
    if not (folder / WEIGHTS).exists() and (folder / PICKLE).exists():
        raise FormatError(
            f"{folder} holds {PICKLE}, a pickle, which can run code when it is read; open the adapter once with HF "
            f"PEFT and save it again: its save_pretrained writes {WEIGHTS}"
        )
    return _config(folder / CONFIG), _tensors(folder / WEIGHTS)


def _config(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_CONFIG:
            raise FormatError(f"{path} has {path.stat().st_size} bytes; {MAX_CONFIG} are read at most")
        config = json.loads(path.read_bytes())
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is no JSON: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise FormatError(f"{path} is no configuration of HF PEFT: it has no peft_type")
    return config


def _tensors(path: Path) -> dict[str, Tensor]:
    """The library checks the header against the file's size, before anything is allocated by it."""
    try:
        tensors = safetensors.torch.load(path.read_bytes())
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror or error}") from error
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise FormatError(f"{path} is no safetensors file, or it is damaged: {error}") from error
    refuse_unusable(str(path), tensors, FormatError)
    return {key: tensor.clone() for key, tensor in tensors.items()}  # out of the buffer: kernels round by alignment


def refuse_unusable(where: str, tensors: Mapping[str, Tensor], error: type[FileError]) -> None:
    """Values that are not finite, and tensors without values, such as a sharded one leaves behind."""
    key = find_not_finite(tensors)
    if key is not None:
        raise error(f"{where}: {key} holds values that are not finite")
    empty = next((key for key, tensor in tensors.items() if not tensor.numel() or tensor.is_meta), None)
    if empty is not None:
        raise error(f"{where}: {empty} has no values; where a model is sharded, gather it first")


def write_folder(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Put both files in a folder, which is made if its parent is there."""
    refuse_unusable(str(folder), tensors, FileError)
    text = json.dumps(config, indent=2, sort_keys=True, allow_nan=False) + "\n"
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise FileError(f"cannot make the folder {folder}: {error.strerror or error}") from error
    write(folder / WEIGHTS, {key: t.detach().to("cpu").contiguous() for key, t in tensors.items()}, "format", "pt")
    replace(folder / CONFIG, [text.encode()])
