"""Reads a GGUF file: its fields and its tensors. Each size is checked against the file before anything is allocated.

Layout (little-endian): magic, version, numbers of tensors and of fields; the fields; for each tensor its name,
dimensions (the last one first), type and place; then, aligned, the data.
"""

import math
import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftkit.errors import FileError, FormatError
from peftkit.formats.folders import refuse_unusable

MAGIC = b"GGUF"
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_DTYPES = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16, 28: torch.float64}
"""Types of tensors that are no blocks of few bits."""
_MAX_DIMENSIONS = 4


class _Cursor:
    """A place in the bytes of a file, which never goes beyond their end."""

    def __init__(self, data: memoryview) -> None:
        self.data, self.at = data, 0

    def take(self, size: int) -> memoryview:
        if size > len(self.data) - self.at:
            raise ValueError(f"it ends at {len(self.data)} bytes, within {size} that are due")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, form: str) -> Any:
        return struct.unpack("<" + form, self.take(struct.calcsize("<" + form)))[0]

    def string(self) -> str:
        return bytes(self.take(self.number("Q"))).decode()

    def value(self, kind: int) -> Any:
        """One field's value; None for an array, which is passed over."""
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            inside, count = self.number("I"), self.number("Q")
            if inside in _SCALARS:
                self.take(count * struct.calcsize("<" + _SCALARS[inside]))
                return None
            if inside != _STRING:
                raise ValueError(f"an array of type {inside}")
            for _ in range(count):  # ends where the bytes end
                self.take(self.number("Q"))
            return None
        if kind not in _SCALARS:
            raise ValueError(f"a field of type {kind}")
        return self.number(_SCALARS[kind])


def read(path: Path, *, check_finite: bool = True) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Fields and tensors. Raises `FileError` or `FormatError`."""
    try:
        data = bytearray(path.read_bytes())
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        fields, tensors = _parse(data)
    except (ValueError, struct.error, KeyError, OverflowError, RuntimeError) as error:
        raise FormatError(f"{path} is no GGUF file that is read here, or it is damaged: {error}") from error
    if check_finite:
        refuse_unusable(str(path), tensors, FormatError)
    return fields, tensors


def _parse(data: bytearray) -> tuple[dict[str, Any], dict[str, Tensor]]:
    cursor = _Cursor(memoryview(data))
    if bytes(cursor.take(4)) != MAGIC:
        raise ValueError("it does not begin with GGUF")
    version = cursor.number("I")
    if version not in (2, 3):
        raise ValueError(f"its version is {version}, and 2 and 3 are read")
    tensors, count = cursor.number("Q"), cursor.number("Q")
    fields: dict[str, Any] = {}
    for _ in range(count):
        key = cursor.string()
        fields[key] = cursor.value(cursor.number("I"))
    places: dict[str, tuple[list[int], int, int]] = {}
    for _ in range(tensors):
        name, dimensions = cursor.string(), cursor.number("I")
        if name in places or not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise ValueError(f"{name!r} stands there twice, or has {dimensions} dimensions")
        shape = [cursor.number("Q") for _ in range(dimensions)][::-1]
        places[name] = shape, cursor.number("I"), cursor.number("Q")
    alignment = fields.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"its alignment is {alignment!r}")
    start = cursor.at + -cursor.at % alignment
    return fields, {name: _tensor(name, data, start, *place) for name, place in places.items()}


def _tensor(name: str, data: bytearray, start: int, shape: list[int], kind: int, offset: int) -> Tensor:
    dtype = _DTYPES.get(kind)
    if dtype is None:
        raise ValueError(f"{name} is of type {kind}, and adapters in floating point are read: write it with f32 or f16")
    count, begin = math.prod(shape), start + offset
    if begin + count * dtype.itemsize > len(data) or not count:
        raise ValueError(f"{name} {shape} does not fit in the file")
    return torch.frombuffer(data, dtype=dtype, count=count, offset=begin).reshape(shape).clone()
