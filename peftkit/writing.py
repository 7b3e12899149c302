"""Writes tensors and one text to a safetensors file: the bytes that its own library would write, whole or not at all.

By that library it takes several times as long where the tensors are thousands and small.
"""

import contextlib
import importlib
import json
import os
import re
import secrets
import struct
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from peftkit.errors import FileError
from peftkit.manifests import DTYPES, data_of

fcntl: Any = importlib.import_module("fcntl") if os.name == "posix" else None
"""Locks. Windows has others, and there an open file cannot be removed anyway."""

_RANK = {dtype: rank for rank, dtype in enumerate(DTYPES.values())}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write(path: Path, tensors: Mapping[str, Tensor], key: str, text: str) -> None:
    """Put contiguous CPU tensors, and `text` under `key` in the metadata, in a file at `path`.

    Tensors that share memory are each written out. Raises `FileError` where the file cannot be written, or cannot hold
    a tensor of some dtype; then the file that was there before is there still.
    """
    if sys.byteorder != "little":
        raise FileError("adapter files are little-endian, and this machine is not; save on another one")
    header: dict[str, Any] = {"__metadata__": {key: text}}
    order = sorted(tensors, key=lambda key: (_rank(key, tensors[key]), key))
    end = 0
    for each in order:
        tensor, begin = tensors[each], end
        end += tensor.numel() * tensor.element_size()
        header[each] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    head = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    head += b" " * (-len(head) % 8)  # so that the data are aligned
    replace(path, [struct.pack("<Q", len(head)), head, *(data_of(tensors[each]) for each in order)])


def _rank(key: str, tensor: Tensor) -> int:
    """Where a dtype stands in the file: the widest first, so that each is aligned."""
    if tensor.dtype not in _RANK:
        raise FileError(f"{key} is {tensor.dtype}, which a safetensors file cannot hold")
    return _RANK[tensor.dtype]


def replace(path: Path, parts: Iterable[Any]) -> None:
    """Replace `path` by a file with this content, or leave it: never a mixture, also when the machine stops.

    `parts` are bytes, or anything with a buffer. Raises `FileError`.
    """
    if not path.name:
        raise FileError(f"cannot write {path}: it names no file")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        _remove_leftovers(path)
        with open(temporary, "xb") as file:  # noqa: PTH123 - mode "x": the umask sets the file's mode
            _lock(file.fileno())
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)  # noqa: PTH105 - while it is locked, for nobody to take it for a leftover
        _sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise FileError(f"cannot write {path}: {error.strerror or error}") from error
        raise


def _remove_leftovers(path: Path) -> None:
    """Remove temporary files of this name that no process holds any more: saves that were killed left them."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{16}}\.tmp")
    for name in filter(pattern.fullmatch, os.listdir(path.parent)):  # noqa: PTH208
        with contextlib.suppress(OSError), open(path.with_name(name), "rb") as file:  # noqa: PTH123
            if _lock(file.fileno()):
                path.with_name(name).unlink()


def _lock(descriptor: int) -> bool:
    """Hold a file until it is closed; whether nobody else did. False, too, where there are no such locks."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable, where the system lets a folder be opened (Windows does not)."""
    with contextlib.suppress(PermissionError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
