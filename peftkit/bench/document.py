"""The document that `peftkit bench` writes and every report is made from: read, checked and written in one place.

`schema.json`, beside this file, says what is in it. What the schema cannot say is checked here: no label twice in a
workload, no cell of an unknown workload, no number that is not finite. A document is replaced whole or not at all, so
that an interrupted run leaves a readable one.
"""

import functools
import importlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from peftkit.errors import FormatError, PeftkitError
from peftkit.writing import replace

SCHEMA = "peftkit.bench/1"
"""The version that is written and read. Optional keys may be added to it; anything else makes a new one."""

Document = Mapping[str, Any]


def validate(document: Any) -> None:
    """Refuse what is no complete document of this version; the error names the place, the fault and the remedy.

    >>> validate({"schema": "peftkit.bench/2"})  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    peftkit.errors.FormatError: this document is 'peftkit.bench/2', and this version of peftkit reads ...
    """
    found = document.get("schema") if isinstance(document, dict) else None
    if found != SCHEMA:
        raise FormatError(
            f"this document is {found!r}, and this version of peftkit reads {SCHEMA!r}: "
            "run `peftkit bench run` again, or read it with the version of peftkit that wrote it"
        )
    error = next(_by_place(_validator().iter_errors(document)), None)
    if error is not None:
        raise FormatError(f"{_place(error.absolute_path)}: {_fault(error)}; {_HINT}")
    for place, fault in _beyond_the_schema(document):
        raise FormatError(f"{place}: {fault}; {_HINT}")


def read(path: str | os.PathLike[str]) -> Document:
    """The document in a file, or `FormatError` with what is wrong with it; nothing in it is run or imported."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is no JSON document: {error}; {_HINT}") from error
    except OSError as error:
        raise FormatError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        validate(content)
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from error
    return content  # type: ignore[no-any-return] # validated to be an object


def write(path: str | os.PathLike[str], document: Document) -> None:
    """Replace the file by this document, which is checked first. What cuts it short leaves the old file."""
    validate(document)
    replace(Path(path), [_lines(document).encode(), b"\n"])


def memory_parts() -> list[str]:
    """What the memory of a training step consists of, in the order in which a stacked bar shows it.

    >>> memory_parts()[1:3]
    ['trainable', 'buffers']
    """
    return [name for name in _schema()["$defs"]["memory"]["properties"] if name != "peak"]


def one_line(text: str) -> str:
    r"""Text of a document without line breaks, and without signs that control a terminal.

    >>> one_line("a\nb\x1b[31m")
    'a b [31m'
    """
    return " ".join("".join(sign if sign.isprintable() else " " for sign in text).split())


def needed(package: str) -> Any:
    """A package of the extra `bench`, imported when it is first needed; an error that names the remedy without it."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        name = package.partition(".")[0]
        if error.name != name:  # it is there, and lacks something itself
            raise
        raise PeftkitError(f"this needs one more package, {name}: pip install 'peftkit[bench]'") from error


# --------------------------------------------------------------------------------------------- checking

_HINT = "peftkit/bench/schema.json says what belongs there"


@functools.cache
def _schema() -> Any:
    return json.loads(resources.files("peftkit.bench").joinpath("schema.json").read_text(encoding="utf-8"))


@functools.cache
def _validator() -> Any:
    return needed("jsonschema").Draft202012Validator(_schema())


def _by_place(errors: Any) -> Iterator[Any]:
    """The first fault in reading order; what is wrong only because of another key (a status, say) comes last."""

    def order(error: Any) -> tuple[bool, list[str]]:
        return bool({"then", "else"} & set(error.absolute_schema_path)), [
            str(part).zfill(6) for part in error.absolute_path
        ]

    return iter(sorted(errors, key=order))


def _place(path: Any) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".") or "the document"


def _fault(error: Any) -> str:
    """The validator's own words, without the piece of the document that they may quote at length."""
    if error.validator == "type":
        types = error.validator_value
        return f"{_short(error.instance)} is not of type {types if isinstance(types, str) else ' or '.join(types)}"
    if error.validator in ("required", "additionalProperties"):
        return str(error.message)
    return f"{_short(error.instance)} breaks {error.validator!r}: {_short(error.validator_value)}"


def _short(value: Any, limit: int = 80) -> str:
    text = json.dumps(value, default=repr)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def _beyond_the_schema(document: Document) -> Iterator[tuple[str, str]]:
    known, seen = set(), set()
    for index, workload in enumerate(document["workloads"]):
        if workload["name"] in known:
            yield f"workloads[{index}].name", f"{workload['name']!r} is there twice"
        known.add(workload["name"])
    for index, cell in enumerate(document["cells"]):
        name = (cell["workload"], cell["label"])
        if cell["workload"] not in known:
            yield f"cells[{index}].workload", f"{cell['workload']!r} is none of the workloads"
        if name in seen:
            yield f"cells[{index}].label", f"{cell['label']!r} is there twice in {cell['workload']!r}"
        seen.add(name)
    yield from ((_place(place), "a number that is not finite") for place in _not_finite(document, ()))


def _not_finite(value: Any, place: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    if isinstance(value, float) and not math.isfinite(value):
        yield place
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _not_finite(inner, (*place, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _not_finite(inner, (*place, index))


# ---------------------------------------------------------------------------------------------- writing


def _lines(value: Any, depth: int = 0) -> str:
    """A line a key and an object, so that two documents can be compared line by line; samples stay on one line."""
    inside, outside = "\n" + " " * (depth + 1), "\n" + " " * depth
    if isinstance(value, dict) and value:
        pairs = (f"{json.dumps(key, ensure_ascii=False)}: {_lines(inner, depth + 1)}" for key, inner in value.items())
        return "{" + inside + f",{inside}".join(pairs) + outside + "}"
    if isinstance(value, list) and any(isinstance(inner, dict) for inner in value):
        return "[" + inside + f",{inside}".join(_lines(inner, depth + 1) for inner in value) + outside + "]"
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
