"""Reads a safetensors file that is not our own: its metadata and its tensors, finite, and nothing unpickled.

The library checks the header against the file's size before anything is allocated by it.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
from torch import Tensor

from peftkit.errors import FileError, FormatError
from peftkit.formats.folders import MAX_CONFIG, refuse_unusable

_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
"""How a file of `torch.save`'s begins."""


class TensorFile(NamedTuple):
    """What a safetensors file holds."""

    metadata: dict[str, str]
    tensors: dict[str, Tensor]


def begins(path: Path, size: int = 8) -> bytes:
    """The first bytes of a file."""
    try:
        with open(path, "rb") as file:  # noqa: PTH123
            return file.read(size)
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror or error}") from error


def refuse_pickle(path: Path) -> None:
    """Say what to do with a file that would have to be unpickled."""
    if begins(path).startswith(_PICKLES):
        raise FormatError(
            f"{path} is a pickle, which can run code when it is read, and is not opened here; if you trust it, write "
            "it anew once: safetensors.torch.save_file(torch.load(path, weights_only=True), 'adapter.safetensors')"
        )


def peek(path: Path) -> tuple[dict[str, str], list[str]] | None:
    """Metadata and keys of a safetensors file; None for any other file. Reads its header alone."""
    try:
        with _open(path) as file:
            return dict(file.metadata() or {}), list(file.keys())
    except (OSError, safetensors.SafetensorError, ValueError):
        return None


def read(path: Path, *, check_finite: bool = True) -> TensorFile:
    """All of it. Raises `FileError` or `FormatError`."""
    try:
        with _open(path) as file:
            # out of the file's own memory: kernels round by alignment
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118 - it is no mapping
            found = TensorFile(dict(file.metadata() or {}), tensors)
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror or error}") from error
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise FormatError(f"{path} is no safetensors file, or it is damaged: {error}") from error
    if check_finite:
        refuse_unusable(str(path), found.tensors, FormatError)
    return found


def _open(path: Path) -> Any:
    return safetensors.safe_open(path, framework="pt", device="cpu")


def read_json(path: Path) -> dict[str, Any]:
    """An object from a file of bounded size."""
    try:
        size = path.stat().st_size
        if size > MAX_CONFIG:
            raise FormatError(f"{path} has {size} bytes; {MAX_CONFIG} are read at most")
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"{path} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise FormatError(f"{path} is no JSON object")
    return content
