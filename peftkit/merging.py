"""Folds adapters into the weights, and unfolds them exactly: the originals are put aside, not computed back."""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from peftkit.adapter import Activation, Adapter
from peftkit.blocks import refuse_elsewhere
from peftkit.composition import compose, is_swapped, state_of, steps_for
from peftkit.errors import StateError, UnsupportedLayerError
from peftkit.finite import find_not_finite
from peftkit.install import remove
from peftkit.installed import Installed, atomically, in_bulk, inner, installed, unmerged, write_record
from peftkit.resolve import modules_of
from peftkit.running import set_running
from peftkit.sharding import is_sharded, reshard


def merge(model: nn.Module, name: str | None = None, *, keep_base: bool = True, untie: bool = False) -> nn.Module:
    """Fold adapters into new weights, computed in float32 (float64 for float64 weights), so that the base runs alone.

    Args:
        model: a wrapped model.
        name: the adapter to fold; by default all active ones, in their order.
        keep_base: keep the originals, so that `unmerge` restores them exactly. With False they are freed and the merged
            adapters are removed: a plain model is left, ready for `save_pretrained`.
        untie: a merge into one holder of a tied weight would leave the other with the old values. That is refused,
            unless this is True: then the two are separate weights from now on (and after `unmerge` one again).

    Raises `StateError` when something is merged already, when `name` is not active or runs after one that is not
    merged;
    `UnsupportedLayerError` for an adapter without a weight form, for a tied weight, and where a merged weight is not
    finite.

    >>> import torch, peftkit
    >>> model = peftkit.wrap(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2)), "lora", init="gaussian")
    >>> model = peftkit.merge(model, keep_base=False)
    >>> list(model.state_dict())
    ['0.weight', '0.bias', '1.weight', '1.bias']
    """
    known = unmerged(model, "merge again")
    refuse_elsewhere(inner(model), "merge")
    names = _names_to_merge(known, name, keep_base=keep_base)
    root = inner(model)
    reshard(root)
    with in_bulk():
        folded = _fold(root, known, names, untie=untie)
    layers = known.layers(names)

    def change() -> nn.Module:
        stash = tuple((layer, weight, original) for layer, weight, original, _ in folded)
        for layer, weight, _, value in folded:
            layer._parameters[weight] = nn.Parameter(value, requires_grad=False)
        running = known.active[len(names) :]
        for layer in layers:
            if is_swapped(layer):
                set_running(layer, running)
        write_record(root, dataclasses.replace(known, merged=names, stash=stash if keep_base else ()))
        if keep_base:
            return model
        if tied is True and untie:
            # Or the saved model would be tied again when transformers loads it.
            config.tie_word_embeddings = False
        return remove(model, names)

    config: Any = getattr(root, "config", None)
    tied = getattr(config, "tie_word_embeddings", None)
    try:
        return atomically(root, [*layers, *known.readers], change)
    except BaseException:
        if tied is True:
            config.tie_word_embeddings = True
        raise


def unmerge(model: nn.Module) -> nn.Module:
    """Put the original weights back: the very parameters that `merge` put aside, so that any number of cycles drift
    by 0.

    If the model was moved or cast while merged, the originals follow it. Raises `StateError` when nothing is merged.

    >>> import torch, peftkit
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
    >>> model = peftkit.wrap(model, "lora", init="pissa", rank=2)
    >>> weight = model[0].weight.clone()
    >>> for _ in range(100):
    ...     model = peftkit.unmerge(peftkit.merge(model))
    >>> torch.equal(model[0].weight, weight)
    True
    """
    known = installed(model)
    if not known.merged:
        raise StateError("nothing is merged; call peftkit.merge first")
    refuse_elsewhere(inner(model), "unmerge")
    layers = known.layers(known.merged)
    values = [
        original.data.to(device=layer._parameters[weight].device, dtype=layer._parameters[weight].dtype)  # type: ignore[union-attr]
        for layer, weight, original in known.stash
    ]

    def change() -> nn.Module:
        for layer, weight, original in known.stash:
            layer._parameters[weight] = original
        for layer in layers:
            if is_swapped(layer):
                set_running(layer, known.active)
        write_record(model, dataclasses.replace(known, merged=(), stash=()))
        for (_, _, original), value in zip(known.stash, values, strict=True):
            original.data = value
        return model

    return atomically(model, layers, change)


def _names_to_merge(known: Installed, name: str | None, *, keep_base: bool) -> tuple[str, ...]:
    if name is not None:
        known.placements(name)
        if name not in known.active:
            raise StateError(
                f"adapter {name!r} does not run now; call peftkit.activate(model, {name!r}) first, then merge"
            )
        if known.active[0] != name:
            raise StateError(
                f"adapter {known.active[0]!r} runs before {name!r}, and would run after it once {name!r} is merged; "
                f"merge both (name=None), or activate them in another order"
            )
        return (name,)
    if not known.active:
        raise StateError(
            f"no adapter runs now; call peftkit.activate first (this model has {', '.join(known.adapters)})"
        )
    left = [other for other in known.adapters if other not in known.active]
    if left and not keep_base:
        raise StateError(
            f"keep_base=False leaves a plain model, but {', '.join(map(repr, left))} does not run and would "
            "stay behind; "
            f"call peftkit.unwrap(model, {left[0]!r}) first, or merge one adapter by name"
        )
    return known.active


def _fold(
    root: nn.Module, known: Installed, names: tuple[str, ...], *, untie: bool
) -> list[tuple[nn.Module, str, nn.Parameter, Tensor]]:
    """What changes: layer, parameter's name, its original, and its merged value. Nothing is changed yet."""
    paths: dict[int, tuple[str, nn.Module]] = {}
    for name in names:
        for placement in known.sites(name):
            if isinstance(placement.adapter, Activation):
                raise UnsupportedLayerError(
                    f"{placement.method.name} at {placement.path or 'the model'} has no weight form, "
                    f"so adapter {name!r} cannot be merged; keep it unmerged"
                )
            if placement.adapter is not None:
                paths[id(placement.layer)] = (placement.path, placement.layer)
    folded = []
    values = {}
    for path, layer in paths.values():
        for weight in state_of(layer).kinds:
            steps = list(steps_for(layer, weight, names))
            if steps and layer._parameters.get(weight, layer) is not None:
                raw, value = _merged(path, layer, weight, steps)
                folded.append((layer, weight, raw, value))
                values[f"{path}.{weight}"] = value
    wrong = find_not_finite(values)
    if wrong is not None:
        raise UnsupportedLayerError(f"the merged {wrong} is not finite; look at its adapter, it is not merged")
    if not untie:
        _refuse_tied(root, folded)
    return folded


def _merged(path: str, layer: nn.Module, weight: str, steps: list[tuple[Adapter, str]]) -> tuple[nn.Parameter, Tensor]:
    """The original of one parameter and its merged value, in the same layout, computed in float32 or better."""
    raw = layer._parameters.get(weight)
    if raw is None:
        raise UnsupportedLayerError(
            f"{path}.{weight} is computed by a parametrization, so there is no weight to merge into; "
            "remove the parametrization before wrapping"
        )
    if is_sharded(raw):
        raise UnsupportedLayerError(
            f"{path}.{weight} is sharded, and FSDP2 would drop what is merged into it; save the adapter, load it on an "
            "unsharded copy of the base, and merge there"
        )
    kind = state_of(layer).kinds[weight]
    if kind.fixed:
        raise UnsupportedLayerError(f"cannot merge into {path}.{weight}: {kind.fixed}")
    with torch.no_grad():
        value = compose(layer, weight, raw.detach(), steps, dropping=False, at_least=torch.float32)
        return raw, torch.empty_like(value).copy_(value)


def _refuse_tied(root: nn.Module, folded: list[tuple[nn.Module, str, nn.Parameter, Tensor]]) -> None:
    """A weight with another holder would change in one of the two alone."""
    holders: dict[int, list[str]] = {}
    for path, module in modules_of(root).items():
        for weight, p in module._parameters.items():
            if p is not None:
                holders.setdefault(id(p), []).append(f"{path}.{weight}" if path else weight)
    for _, _, original, _ in folded:
        names = holders[id(original)]
        if len(names) > 1:
            raise UnsupportedLayerError(
                f"{' and '.join(names)} are one tied weight; merging would change what one of them computes "
                "and not the other. "
                "To make them separate weights, merge(model, untie=True)"
            )
