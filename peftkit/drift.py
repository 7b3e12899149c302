"""Compares a model's merged output with its unmerged one, and finds the first layer in which they part."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from peftkit.adapter import Adapter
from peftkit.composition import raw_parameter
from peftkit.errors import StateError, UnsupportedLayerError
from peftkit.installed import Installed, Placement, inner
from peftkit.kernels import is_autocast
from peftkit.merging import merge, unmerge
from peftkit.rehearsal import call, leaves, seed
from peftkit.resolve import modules_of

Kind: TypeAlias = Literal[
    "bypassed", "not finite", "changes nothing", "untrained", "no gradient", "zero gradient", "drifts"
]
_LINES = 20


@dataclasses.dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong."""

    path: str
    """Of the weight, of the trainable parameter, or (for `drifts`) of the layer."""
    kind: Kind
    """* `bypassed`: an active adapter took no part: its layer did not run, or its weight was read past it.
    * `not finite`: a value of the adapter is infinite or NaN.
    * `changes nothing`: the adapted weight is bit for bit the base's, though the adapter has been trained elsewhere or
      does not train.
    * `untrained`: it does not train, though the rest of its adapter does.
    * `no gradient`: it trains, but the output does not depend on it.
    * `zero gradient`: the output does not react to it, nor to any other parameter of its adapter there.
    * `drifts`: merged, the model's output is another than unmerged.
    """
    adapter: str
    """The adapter's name; empty for a parameter that belongs to none."""
    note: str
    """What is known of it, and what to do."""


def active_sites(known: Installed) -> list[tuple[str, Placement]]:
    """The sites of adapters that run now, with their adapter's name; weights trained in place are no adapters."""
    return [(name, p) for name in known.active for p in known.sites(name) if p.adapter is not None]


Compared: TypeAlias = tuple[list[Fault], float | str, float]


def compare(model: nn.Module, known: Installed, example: Any, rtol: float | None) -> Compared:
    """The fault if there is one, the error (or why there is none), and its bound."""
    root = inner(model)
    layers = _watched_layers(root, known)
    plain = _run(root, example)
    own = _own_bound(known, plain) if rtol is None else rtol
    bound = own * math.sqrt(max(1, len(layers))) if rtol is None else rtol
    try:
        merge(model, untie=True)
    except (UnsupportedLayerError, StateError) as reason:
        return [], str(reason), bound
    try:
        merged = _run(root, example)
    finally:
        unmerge(model)
    error = _difference(merged, plain)
    if error <= bound:
        return [], error, bound
    path, note = _first_drift(model, layers, example, own)
    note = f"merged differs from unmerged by {error:.1e} (bound {bound:.1e}); {note}"
    return [Fault(path, "drifts", ", ".join(known.active), note)], error, bound


def _watched_layers(root: nn.Module, known: Installed) -> dict[str, nn.Module]:
    """The adapted layers and those that read their weights, by path."""
    wanted = {id(m) for m in (*(p.layer for _, p in active_sites(known)), *known.readers)}
    return {path: m for path, m in modules_of(root).items() if id(m) in wanted}


def _run(root: nn.Module, example: Any) -> list[Tensor]:
    """The outputs in eval mode, without gradients."""
    root.eval()
    seed()
    with torch.no_grad():
        return [t.detach() for t in leaves(call(root, example))]


def _own_bound(known: Installed, outputs: Iterable[Tensor]) -> float:
    """How far one merged layer may be from unmerged: what rounding explains, by the coarsest dtype in use.

    In half precision a product is summed in float32 and rounded at the end: three roundings unmerged (base, update,
    sum) against one merged. In float32 and float64 the sums themselves are rounded, term by term.
    """
    weights = [raw_parameter(p.layer, p.weight) for _, p in active_sites(known) if isinstance(p.adapter, Adapter)]
    tensors = [t for t in (*weights, *outputs) if isinstance(t, Tensor) and t.is_floating_point()]
    epsilons = [torch.finfo(t.dtype).eps for t in tensors]
    for device in {t.device.type for t in tensors}:
        if is_autocast(device):
            epsilons.append(torch.finfo(torch.get_autocast_dtype(device)).eps)
        if device == "cuda" and (torch.backends.cuda.matmul.allow_tf32 or any(w.dim() > 2 for w in weights)):
            epsilons.append(2**-10)  # TF32, which convolutions use unless told otherwise
    eps = max(epsilons, default=torch.finfo(torch.float32).eps)
    return (3 if eps > 1e-4 else 100) * eps


def _difference(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest relative difference of one output; NaN is infinitely far from everything."""
    if [t.shape for t in actual] != [t.shape for t in expected]:
        return math.inf
    return max((_relative(a, e) for a, e in zip(actual, expected, strict=True)), default=0.0)


def _relative(actual: Tensor, expected: Tensor) -> float:
    actual, expected = (t.to("cpu", torch.float64) for t in (actual, expected))
    distance = torch.where(actual == expected, 0.0, actual - expected).norm().item()
    if distance == 0:
        return 0.0
    size = expected[expected.isfinite()].norm().item()
    return distance / size if size and math.isfinite(distance) else math.inf


def _first_drift(model: nn.Module, layers: Mapping[str, nn.Module], example: Any, own: float) -> tuple[str, str]:
    """The first layer, in the order in which they run, whose own output is off; the worst where none is by much.

    Layers after it get other inputs, and so tell nothing of themselves.
    """
    root = inner(model)
    plain = _record(root, layers, example)
    merge(model, untie=True)
    try:
        merged = _record(root, layers, example)
    finally:
        unmerge(model)
    errors = [(path, _difference(m, p)) for (path, p), (_, m) in zip(plain, merged, strict=False)]
    for path, error in errors:
        if not error <= own:
            return path, f"this is the first layer whose output does, by {error:.1e}"
    path, error = max(errors, key=lambda pair: pair[1], default=("", 0.0))
    return path, f"no layer alone does; this one's output differs most, by {error:.1e}"


def _record(root: nn.Module, layers: Mapping[str, nn.Module], example: Any) -> list[tuple[str, list[Tensor]]]:
    """Each call of a layer, with its outputs."""
    calls: list[tuple[str, list[Tensor]]] = []

    def recorder(path: str) -> Callable[..., None]:
        return lambda _layer, _args, output: calls.append((path, [t.detach().cpu() for t in leaves(output)]))

    with ExitStack() as stack:
        for path, layer in layers.items():
            stack.enter_context(layer.register_forward_hook(recorder(path)))
        _run(root, example)
    return calls
