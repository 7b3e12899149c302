"""Names what would break under DDP, FSDP and ZeRO-3, before training starts; and draws an adapter's start once more.

The engines are torch's own and DeepSpeed's; nothing here wraps or shards, and only `reset_parameters` communicates.
docs/distributed.md says in which order things are done.
"""

import dataclasses
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from peftkit import gathering
from peftkit.adapter import Site
from peftkit.composition import Routing, running_in
from peftkit.errors import StateError
from peftkit.files import load_state_dict, state_dict
from peftkit.install import build
from peftkit.installed import Installed, Placement, inner, installed
from peftkit.method import Method
from peftkit.plan import shared_for, shared_states
from peftkit.resolve import module_site
from peftkit.sharding import is_sharded, is_unit, reshard

# -------------------------------------------------------------------------------------------------- check


@dataclasses.dataclass(frozen=True, slots=True)
class Hazard:
    """One thing that will break, or be silently wrong, once training starts."""

    kind: str
    """* `no values`: a parameter is on the meta device.
    * `unused`: DDP waits for gradients that will not come.
    * `not reduced`: it trains on each rank by itself, and the ranks part.
    * `routed`: ranks may route to different adapters, and then wait for, or add up, different gradients.
    * `dtypes`: FSDP2 wants one dtype of all that trains in a unit.
    * `own unit`: an adapter is a unit of FSDP by itself, whose weights are gone when its layer computes with them.
    * `shared state`: a unit holds what adapters outside of it read.
    * `flattened`: FSDP1 has put the parameters into one.
    """
    adapter: str
    """The adapter's name; empty where it is about several."""
    path: str
    """Of the first parameter or module that it is about."""
    note: str
    """What happens, and what to do."""

    def __str__(self) -> str:
        """One line."""
        return f"{self.kind}: {self.path}{f' of adapter {self.adapter!r}' if self.adapter else ''}: {self.note}"


def check(model: nn.Module) -> tuple[Hazard, ...]:
    """Name what will break, or be silently wrong, when this model is trained by the engine that has it.

    Call it last: after DDP, `fully_shard`, FSDP or DeepSpeed got the model, with the adapters active and trainable that
    are to be; once more after `activate` or `set_trainable`, and inside `routed` if batches are routed. Nothing is run
    and nothing is communicated, so one rank may call it alone.

    Args:
        model: a wrapped model, or the `DistributedDataParallel` or FSDP object around it.

    Raises `StateError` when nothing is wrapped.

    >>> import torch, peftkit
    >>> from peftkit import distributed
    >>> model = peftkit.wrap(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2)), "lora")
    >>> distributed.check(model)
    ()
    >>> with torch.device("meta"):
    ...     model = peftkit.wrap(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2)), "lora")
    >>> print(distributed.check(model)[0].kind)
    no values
    """
    flat, within = _flattened(model)
    known = installed(within)
    root = inner(within)
    if flat:
        return tuple(flat)
    reshard(root)
    paths = {id(p): path for path, p in root.named_parameters(remove_duplicate=False)}
    learning = [
        (name, paths.get(id(p), ""), p)
        for name, placements in known.adapters.items()
        for placement in placements
        for p in placement.learning()
        if p.requires_grad
    ]
    found = [
        Hazard("no values", name, path, "it is on the meta device; load its values, or call reset_parameters")
        for name, path, p in learning
        if p.is_meta
    ]
    if isinstance(model, DistributedDataParallel):
        found += _of_replicas(model, known, learning, paths)
    if any(is_unit(module) for module in root.modules()):
        found += _of_shards(root, known, learning)
    if any(hasattr(p, "ds_id") for p in root.parameters()):
        found += [
            Hazard("not reduced", name, path, "DeepSpeed got the model before this was there; wrap first")
            for name, path, p in learning
            if not hasattr(p, "ds_id")
        ]
    return tuple(_first_of_each(found))


_Learning = list[tuple[str, str, nn.Parameter]]
"""What trains now: the adapter's name, the parameter's path, the parameter."""


def _first_of_each(hazards: Iterable[Hazard]) -> Iterator[Hazard]:
    """One of each kind for each adapter: its other parameters have the same."""
    seen = set()
    for hazard in hazards:
        if (hazard.kind, hazard.adapter) not in seen:
            seen.add((hazard.kind, hazard.adapter))
            yield hazard


def _is_routed(known: Installed) -> bool:
    return any(isinstance(running_in(layer), Routing) for layer in known.layers(known.adapters))


def _of_replicas(
    model: DistributedDataParallel, known: Installed, learning: _Learning, paths: dict[int, str]
) -> Iterator[Hazard]:
    """DDP expects a gradient of everything that was trainable when it was made, and of nothing else."""
    expected = {id(p) for bucket in model.reducer._get_zeros_like_grad_buckets() for p in bucket.parameters()}
    for name, path, p in learning:
        if id(p) not in expected:
            note = "DDP was made before it trained; call wrap and set_trainable first, with all that will ever train"
            yield Hazard("not reduced", name, path, note)
    if model.find_unused_parameters or model.static_graph:
        return
    cure = "make it with find_unused_parameters=True"
    for name, path, p in learning:
        if id(p) in expected and name not in known.active:
            note = f"it trains and does not run, so DDP's next step fails; activate it, or {cure}"
            yield Hazard("unused", name, path, note)
    learns = {id(p) for _, _, p in learning}
    for gone in expected - learns:
        owner = next((p for p in model.parameters() if id(p) == gone), None)
        if owner is not None and not owner.requires_grad:
            yield Hazard("unused", "", paths.get(gone, ""), f"DDP waits for it, but it trains no more; {cure}")
    if _is_routed(known):
        yield Hazard("routed", "", "", f"an adapter that no sample of a batch has gets no gradient; {cure}")


def _of_shards(root: nn.Module, known: Installed, learning: _Learning) -> Iterator[Hazard]:
    units: dict[str, Any] = {path: module for path, module in root.named_modules() if is_unit(module)}
    for name, path, p in learning:
        if not is_sharded(p):
            note = "fully_shard was called before it was there; wrap or load first, then shard"
            yield Hazard("not reduced", name, path, note)
    yield from _of_dtypes(root, units)
    for name, placements in known.adapters.items():
        for placement in placements:
            yield from _of_units(name, placement, placements, units)
    if _is_routed(known):
        groups = [group for unit in units.values() for group in unit._get_fsdp_state()._fsdp_param_groups]
        if not all(getattr(group, "reduce_scatter_unused_params", False) for group in groups):
            note = (
                "where ranks route to different adapters, gradients of one are added to those of another; "
                "call model.set_reduce_scatter_unused_params(True)"
            )
            yield Hazard("routed", "", "", note)


def _of_dtypes(root: nn.Module, units: Iterable[str]) -> Iterator[Hazard]:
    dtypes: dict[str, dict[torch.dtype, str]] = {}
    for path, p in root.named_parameters():
        if p.requires_grad and is_sharded(p):
            dtypes.setdefault(_unit_of(path, units), {}).setdefault(p.dtype, path)
    for unit, held in dtypes.items():
        if len(held) > 1:
            listed = " and ".join(f"{path} in {dtype}" for dtype, path in held.items())
            note = f"it trains {listed}, and FSDP2 takes one dtype a unit; cast one, or give it a unit of its own"
            yield Hazard("dtypes", "", unit, note)


def _unit_of(path: str, units: Iterable[str]) -> str:
    """The innermost unit that a path is in."""
    return max((unit for unit in units if not unit or path == unit or path.startswith(f"{unit}.")), key=len, default="")


def _of_units(
    name: str, placement: Placement, placements: Iterable[Placement], units: Iterable[str]
) -> Iterator[Hazard]:
    held = f"{placement.path}.adapters.".removeprefix(".")
    inside = next((path for path in units if path.startswith(held)), None)
    if inside is not None:
        note = "call fully_shard on the layer, or on its block, and not on what is below"
        yield Hazard("own unit", name, inside, note)
    if placement.shared:
        unit = _unit_of(held, units)
        if any(_unit_of(p.name, units) != unit and unit for p in placements if p.method.key == placement.method.key):
            note = f"adapters outside of the unit {unit!r} read it; put all of them in one unit"
            yield Hazard("shared state", name, placement.name, note)


def _flattened(model: nn.Module) -> tuple[list[Hazard], nn.Module]:
    """What FSDP1 does where it is not told to keep parameters as they are, and the model within it."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return [], model
    wrappers = [m for m in model.modules() if isinstance(m, fsdp.FullyShardedDataParallel)]
    flat = [m for m in wrappers if not m._use_orig_params]
    while isinstance(model, fsdp.FullyShardedDataParallel):
        model = model.module
    note = (
        "FSDP(use_orig_params=False) has made one parameter of many, of which no adapter knows any more; "
        "use fully_shard, or use_orig_params=True"
    )
    return [Hazard("flattened", "", "", note)] if flat else [], model


# --------------------------------------------------------------------------------------------- fresh values


def reset_parameters(model: nn.Module, name: str | None = None) -> None:
    """Give an adapter the values of a fresh start, drawn as `wrap` draws them; for after `to_empty`.

    A model that was built and wrapped on the meta device has memory without values after `to_empty`. Load the base
    first, because a start may be taken from its weights, then call this, then make the optimizer. Where FSDP2 has
    sharded the model, every rank must call it, and the first rank's draw is everybody's. Weights that are trained in
    place belong to the base and stay.

    Args:
        model: a wrapped model that is not on the meta device any more.
        name: the adapter; by default all of them.

    Raises `StateError` while there are no values to be given; `MethodError` for a method that needs data to start.

    >>> import torch, peftkit
    >>> from peftkit import distributed
    >>> with torch.device("meta"):
    ...     model = peftkit.wrap(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2)), "lora")
    >>> _ = model.to_empty(device="cpu")
    >>> distributed.reset_parameters(model)
    >>> bool((model[0].adapters["default"]["weight"].up == 0).all())
    True
    """
    known = installed(model)
    reshard(inner(model))
    for each in known.adapters if name is None else (name,):
        placements = known.placements(each)
        steps = [(_site(p), p.method) for p in placements if not p.shared and p.adapter is not None]
        _give_memory(placements, steps)
        values = {key: gathering.whole(t) for key, t in state_dict(model, each).items()}
        absent = next((key for key, t in values.items() if t.is_meta), None)
        if absent is not None:
            raise StateError(f"{absent} is on the meta device; call model.to_empty(device=...) and load the base first")
        values.update(_start(steps, [p for p in placements if p.shared]))
        load_state_dict(model, values, each)


def _give_memory(placements: Iterable[Placement], steps: list[tuple[Site, Method]]) -> None:
    """A base whose checkpoint was assigned has left meta without its adapters."""
    device = next((site.device for site, _ in steps), torch.device("meta"))
    for placement in placements:
        adapter = placement.adapter
        if adapter is not None and device.type != "meta" and any(t.is_meta for _, t in placement.tensors()):
            adapter.to_empty(device=device)


def _site(placement: Placement) -> Site:
    if placement.weight == "module":
        return module_site(placement.path, placement.layer)
    return gathering.site_at(placement.path, placement.layer, placement.weight)


def _start(steps: list[tuple[Site, Method]], shared: list[Placement]) -> dict[str, Any]:
    """The tensors of adapters at these sites, and of the state that they share, as they are when they are new."""
    states = shared_states(steps)
    values = {}
    for placement, state in zip(shared, states.values(), strict=True):
        values.update({f"{placement.name}.{key}": t for key, t in state.module.state_dict().items()})
    for site, method in steps:
        adapter = build(site, method, shared_for(states, method))
        if adapter is not None:
            values.update({f"{site.name}.{key}": t for key, t in adapter.state_dict().items()})
    return values
