"""What stands beside the method in an HF PEFT folder: modules that are saved whole, biases, and trained rows."""

from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet

import torch
from torch import nn

from peftkit.composition import raw_parameter
from peftkit.errors import FileError
from peftkit.formats.declared import MODULES
from peftkit.formats.matching import ends
from peftkit.installed import Placement
from peftkit.method import HuggingFace

Modules = Mapping[str, nn.Module]
_OTHERWISE = "save with format='peftkit'"


def at_or_below(path: str, other: str) -> bool:
    """Whether a module is another one or within it."""
    return path == other or path.startswith(other + ".") or other == ""


def split_whole(modules: Modules, trained: Sequence[Placement]) -> tuple[set[str], list[Placement]]:
    """The modules of which every parameter is trained, and the biases that are trained for themselves.

    Raises `FileError` for other parameters that are, and where HF PEFT's names would mean more than these modules.
    """
    given = {(p.path, p.weight) for p in trained}
    covered = {path for path in {p.path for p in trained} - {""} if _parameters(modules, path) <= given}
    whole = {path for path in covered if not any(at_or_below(path, other) for other in covered - {path})}
    biases = [p for p in trained if not any(at_or_below(p.path, path) for path in whole)]
    for p in biases:
        if p.weight != "bias":
            raise FileError(
                f"HF PEFT saves modules whole, and of {p.path or 'the model'} some parameters are trained "
                f"({p.weight} is) and others not; train all of them, or {_OTHERWISE}"
            )
    for path in modules:
        if path not in whole and ends(path, whole):
            raise FileError(f"HF PEFT's {MODULES} would mean {path} too, which is not trained here; {_OTHERWISE}")
    for p in trained:
        if p.adapter is None and len(_holders(modules, p)) > 1:
            raise FileError(
                f"{p.name} is one weight with {', '.join(_holders(modules, p) - {p.name})}, and HF PEFT would give "
                f"this layer a copy of its own; {_OTHERWISE}"
            )
    return whole, biases


def _parameters(modules: Modules, path: str) -> set[tuple[str, str]]:
    within = {below: module for below, module in modules.items() if at_or_below(below, path)}
    return {
        (below, name) for below, module in within.items() for name, p in module._parameters.items() if p is not None
    }


def bias_entry(
    modules: Modules, hf: HuggingFace, main: Sequence[Placement], biases: Sequence[Placement], whole: AbstractSet[str]
) -> str:
    """The value of `bias` that trains exactly these."""
    given = {p.path for p in biases}
    there = {path for path, module in modules.items() if module._parameters.get("bias") is not None}
    if hf.bias is not None and given == {p.path for p in main} & there:
        return hf.bias
    if hf.bias is not None and given == {path for path in there if not any(at_or_below(path, w) for w in whole)}:
        return "all"
    raise FileError(
        f"HF PEFT trains no bias, those of the layers adapted, or all of them; here {min(given)}.bias is trained and "
        f"others are not; {_OTHERWISE}"
    )


def _holders(modules: Modules, placement: Placement) -> set[str]:
    """The names of the weight: several, where it is tied."""
    raw = raw_parameter(placement.layer, placement.weight)
    return {f"{path}.{n}" for path, module in modules.items() for n, p in module._parameters.items() if p is raw}


def first_holders(modules: Modules, placements: Sequence[Placement]) -> Iterator[Placement]:
    """One placement for each weight; the others that hold it must have learned the same."""
    by_weight: dict[int, list[Placement]] = {}
    for p in placements:
        by_weight.setdefault(id(raw_parameter(p.layer, p.weight)), []).append(p)
    for first, *others in by_weight.values():
        missing = _holders(modules, first) - {first.name, *(p.name for p in others)}
        if missing:
            raise FileError(
                f"{first.name} is one weight with {', '.join(sorted(missing))}, where HF PEFT trains the same rows; "
                f"adapt them too, or {_OTHERWISE}"
            )
        for p in others:
            if p.method.key != first.method.key or not _same(p, first):
                raise FileError(
                    f"{first.name} and {p.name} are one weight, for which HF PEFT has one set of rows, and they have "
                    f"learned different ones; {_OTHERWISE}"
                )
        yield first


def _same(one: Placement, other: Placement) -> bool:
    a, b = (p.adapter.state_dict() if p.adapter is not None else {} for p in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
