"""Reads an adapter file into its manifest and tensors, and refuses whatever is not exactly what was saved.

Nothing is unpickled, and nothing is imported. What is read is bounded by the file's size before it is allocated. The
container is safetensors, and its layout is checked as its own library would.
"""

import hashlib
import itertools
import json
import math
import os
import struct
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from peftkit import manifests
from peftkit.errors import FileError, FormatError
from peftkit.finite import find_not_finite

MAX_HEADER = 100_000_000
"""The longest header that is read, in bytes: safetensors' own limit."""
MAX_TENSORS = 200_000
"""How many tensors a file may hold: those without values take no bytes of it, and so are not bounded by its size."""
MAX_NAME = 1024
"""The longest key of a tensor, in characters."""


class Read(NamedTuple):
    """What a file holds."""

    manifest: dict[str, Any]
    tensors: dict[str, Tensor]


class _Entry(NamedTuple):
    """One tensor of the header: where its bytes begin and end among those of all tensors."""

    key: str
    dtype: torch.dtype
    shape: list[int]
    begin: int
    end: int


def read(path: Path, *, check_finite: bool = True) -> Read:
    """The manifest and tensors of a file, checked against each other and against every digest.

    Raises `FileError` where it cannot be read, `FormatError` where it is truncated, altered or no adapter file.
    """
    try:
        with open(path, "rb") as file:  # noqa: PTH123
            return parse(file, os.fstat(file.fileno()).st_size, path, check_finite=check_finite)
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror or error}") from error


def parse(file: BinaryIO, size: int, path: Path, *, check_finite: bool = True) -> Read:
    """The same from an open file of `size` bytes; `path` is for the messages."""
    if sys.byteorder != "little":
        raise FileError("adapter files are little-endian, and this machine is not; load on another one")
    head, data = _parts(file, size, path)
    try:
        header = json.loads(head.decode(), object_pairs_hook=_unique)
        sealed = json.loads(header.pop("__metadata__")["peftkit"], object_pairs_hook=_unique)
        manifest, seal = sealed["manifest"], sealed["sha256"]
        entries = _entries(header, len(data))
        tensors = {entry.key: torch.empty(entry.shape, dtype=entry.dtype) for entry in entries}
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise FormatError(f"{path} is no adapter file, or it is damaged: {type(error).__name__}: {error}") from error
    manifests.check(path, manifest, seal)
    if set(tensors) != set(manifest["tensors"]):
        raise FormatError(f"{path} is damaged: its tensors are not those of its manifest")
    view = memoryview(data)
    for key, dtype, shape, begin, end in entries:
        digest = hashlib.sha256(f"{dtype}{shape}".encode())
        digest.update(view[begin:end])
        if digest.hexdigest() != manifest["tensors"][key]:
            raise FormatError(f"{path} is damaged: {key} is not what was saved")
        if end > begin:  # in memory of its own, which the file's bytes are not: kernels round by alignment
            manifests.data_of(tensors[key]).raw = view[begin:end]
    if check_finite and find_not_finite(_runs(entries, data)):  # all tensors of one dtype are one sum
        raise FormatError(f"{path}: {find_not_finite(tensors)} holds values that are not finite")
    return Read(manifest, tensors)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; with a key twice, two readers could take two values for the one that counts."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return found


def _parts(file: BinaryIO, size: int, path: Path) -> tuple[bytes, bytearray]:
    """The header and the bytes of the tensors."""
    start = file.read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
    if not 2 <= length <= min(size - 8, MAX_HEADER):
        raise FormatError(f"{path} is no adapter file, or it is truncated: {size} bytes, whose header claims {length}")
    head, data = file.read(length), bytearray(size - 8 - length)
    if len(head) != length or file.readinto(data) != len(data) or file.read(1):  # type: ignore[attr-defined]
        raise FormatError(f"{path} has changed while it was read; read it again")
    return head, data


def _entries(header: Mapping[str, Any], size: int) -> list[_Entry]:
    """What the header says of each tensor, in the order of their bytes: these follow each other without a gap."""
    if len(header) > MAX_TENSORS or max(map(len, header), default=0) > MAX_NAME:
        raise ValueError(f"it has over {MAX_TENSORS:,} tensors, or one whose name has over {MAX_NAME:,} characters")
    entries = [
        _Entry(key, manifests.DTYPES[entry["dtype"]], entry["shape"], *entry["data_offsets"])
        for key, entry in header.items()
    ]
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    reached = 0
    for key, dtype, shape, begin, end in entries:
        if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
            raise ValueError(f"{key} has a shape or place that is none")
        if begin != reached or end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{key} does not fit its place")
        reached = end
    if reached != size:
        raise ValueError(f"its tensors take {reached} bytes, and it has {size}")
    return entries


def _runs(entries: Iterable[_Entry], data: bytearray) -> dict[str, Tensor]:
    """The values of neighbours that have one dtype, as one vector each."""
    runs = {}
    for dtype, neighbours in itertools.groupby(entries, key=lambda entry: entry.dtype):
        run = list(neighbours)
        begin, count = run[0].begin, (run[-1].end - run[0].begin) // dtype.itemsize
        if count:
            runs[run[0].key] = torch.frombuffer(data, dtype=dtype, count=count, offset=begin)
    return runs
