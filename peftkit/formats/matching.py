"""HF PEFT's rules for which layer an entry of its configuration means, and the names by which it means exactly ours.

No regular expression from a file is ever run. The few forms that people write are read as globs, and any other is an
error.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping

from torch import nn

from peftkit.errors import FileError, FormatError
from peftkit.globs import Glob

_PIECES = re.compile(r"\\\.|\.\*|\\d\+|\[0-9\]\+|\(\?:|[(|)]|[\w.-]")
_AS_GLOB = {"\\.": ".", ".*": "**", "(?:": "{", "(": "{", "|": ",", ")": "}"}
_AS_GLOB |= dict.fromkeys(("\\d+", "[0-9]+"), "{0..99999}")


def named(path: str, names: Collection[str]) -> bool:
    """Whether a list of names means the module or parameter at this path: by the whole path, or by its last segments.

    >>> named("layers.0.q_proj", ["q_proj"]), named("layers.0.q_proj", ["proj"])
    (True, False)
    """
    return path in names or any(path.endswith("." + name) for name in names)


def ends(path: str, names: Collection[str]) -> bool:
    """The same for modules that are saved whole, where a name may begin within a segment."""
    return any(path.endswith(name) for name in names)


def names_of(wanted: Collection[str], paths: Iterable[str]) -> list[str] | str:
    """What to write for `target_modules`, so that of all these paths it means the wanted ones and no other.

    The last segments where these will do, else the whole paths, else an expression, which must match a path as a whole.

    >>> names_of({"a.q", "b.q"}, ["a", "b", "a.q", "b.q"]), names_of({"a.q"}, ["a", "b", "a.q", "b.q"])
    (['q'], ['a.q'])
    """
    paths = list(paths)
    for names in (sorted({path.rpartition(".")[2] for path in wanted}), sorted(wanted)):
        if {path for path in paths if named(path, names)} == set(wanted):
            return names
    return "|".join(re.escape(path) for path in sorted(wanted))


def anchored(path: str) -> str:
    """The key of `rank_pattern` and the like that means this path and no other."""
    return "^" + re.escape(path)


def pattern(key: str, entry: str) -> Callable[[str], bool]:
    r"""What a key of `rank_pattern` and the like matches.

    It may have names, `.*`, `\d+` and alternatives; `FormatError` for more. A dot is a dot.

    >>> matches = pattern(r"^model.layers.(0|1)\..*q_proj", "rank_pattern")
    >>> matches("model.layers.1.self_attn.q_proj"), matches("model.layers.2.self_attn.q_proj")
    (True, False)
    """
    text = key.removeprefix("^").removesuffix("$")
    pieces = _PIECES.findall(text)
    if "".join(pieces) != text or len(text) > 1000:
        raise FormatError(
            f"{entry} has the key {key!r}, a regular expression that is not read here; write the layers' names instead"
        )
    try:
        glob = Glob(("" if key.startswith("^") else "**.") + "".join(_AS_GLOB.get(piece, piece) for piece in pieces))
    except ValueError as error:
        raise FormatError(f"{entry} has the key {key!r}, which is not read here: {error}") from error
    needs_dot = text.startswith(".*\\.")
    return lambda path: glob.matches(path) and ("." in path or not needs_dot)


class Wrapped:
    """Where tensors stand in a model in which HF PEFT has wrapped single parameters.

    It puts one wrapper around the module for each, the first parameter innermost; `base_layer` leads further in.
    """

    def __init__(self, parameters: Mapping[str, Collection[str]], modules: Mapping[str, nn.Module]) -> None:
        self.order = {path: [n for n in modules[path]._parameters if n in names] for path, names in parameters.items()}

    def path(self, path: str) -> str:
        """Where the module at `path` is, inside all wrappers."""
        if not self.order:
            return path
        parts: list[str] = []
        walked = ""
        for segment in path.split("."):
            walked = f"{walked}.{segment}".removeprefix(".")
            parts += [segment, *["base_layer"] * len(self.order.get(walked, ()))]
        return ".".join(parts)

    def parameter(self, path: str, name: str) -> str:
        """Where the wrapper of one parameter is."""
        names = self.order[path]
        outermost = self.path(path).removesuffix(".base_layer" * len(names))
        return outermost + ".base_layer" * (len(names) - 1 - names.index(name))


def targeted(names: Collection[str], modules: Mapping[str, nn.Module]) -> dict[str, list[str]]:
    """The parameters that `target_parameters` means, by module."""
    found: dict[str, list[str]] = {}
    for path, module in modules.items():
        for name in module._parameters if names else ():
            if named(f"{path}.{name}", names):
                found.setdefault(path, []).append(name)
    if "" in found:
        raise FileError(f"HF PEFT adapts no parameter of the model itself, as {found[''][0]!r} is")
    return found
