"""Weights that are spread over processes: a file holds them whole, and one process writes it.

FSDP2 leaves each rank a part of every parameter, as a DTensor. To read it whole, all ranks of its mesh must take part,
in the same order, so what is decided here is decided alike on all of them. Without DTensors nothing is communicated,
and nothing is imported: under plain data parallelism each rank has the whole model, and each call is its own.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn

from peftkit import manifests
from peftkit.adapter import Site, adapter_dtype
from peftkit.composition import raw_parameter
from peftkit.errors import FileError, StateError
from peftkit.installed import Placement, inner
from peftkit.resolve import kind_for, site_of
from peftkit.sharding import is_sharded, is_spread


def whole(tensor: Any) -> Any:
    """All of a tensor: of a sharded one, every rank of its mesh must ask for it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def copy_into(tensor: Any, value: Tensor) -> None:
    """Write a whole value into a tensor, sharded or not; where it is, that of the mesh's first rank is what counts."""
    if is_sharded(tensor) and not is_sharded(value):
        from torch.distributed.tensor import distribute_tensor

        value = value.to(device=tensor.device, dtype=tensor.dtype)
        value = distribute_tensor(value, tensor.device_mesh, tensor.placements)
    tensor.copy_(value)


# ------------------------------------------------------------------------------------------------ saving


def mesh_over(placements: Iterable[Placement]) -> Any:
    """The mesh over which an adapter, or a weight that it adapts, is spread; None where none is."""
    if not is_spread():
        return None
    tensors = [t for placement in placements for t in (*(t for _, t in placement.tensors()), _base(placement))]
    return next((t.device_mesh for t in tensors if is_sharded(t)), None)


def _base(placement: Placement) -> Any:
    if placement.shared or placement.weight == "module":
        return None
    return raw_parameter(placement.layer, placement.weight)


def write_once(mesh: Any, write: Callable[[], None]) -> None:
    """Let the mesh's first rank write; the others return when that is done, or raise what was wrong with it."""
    if mesh is None:
        write()
        return
    first, failure = int(mesh.mesh.min()), [""]
    group = mesh.get_group() if mesh.ndim == 1 else None
    try:
        if distributed.get_rank() == first:
            write()
    except BaseException as error:
        failure = [str(error) or repr(error)]
        raise
    finally:
        distributed.broadcast_object_list(failure, src=first, group=group)
    if failure[0]:
        raise FileError(f"rank {first}: {failure[0]}")


def refuse_sharded(placements: Iterable[Placement], what: str) -> None:
    """For what cannot be written from a sharded model."""
    if mesh_over(placements) is not None:
        raise FileError(
            f"format {what!r} is not written from a sharded model; save it in peftkit's own format, load that file on "
            "an unsharded copy of the base, and save it from there"
        )


def refuse_absent(placements: Iterable[Placement]) -> None:
    """Under ZeRO-3 a parameter is empty outside of its module's forward, and so it would be in the file."""
    for placement in placements if is_spread() else ():
        for key, p in placement.trained():
            if tuple(getattr(p, "ds_shape", p.shape)) != tuple(p.shape):
                raise FileError(
                    f"{key} is not at hand, because ZeRO-3 keeps it on several ranks; on all of them, save inside "
                    "`with deepspeed.zero.GatheredParameters(list(model.parameters())):`"
                )


# ------------------------------------------------------------------------------- the values a file remembers


def samples(weights: Sequence[Any]) -> list[str | None]:
    """`manifests.samples` of weights of which some are sharded. These are gathered, one at a time."""
    found = manifests.samples([None if is_sharded(w) else w for w in weights])
    return [
        manifests.samples([whole(w.detach())])[0] if is_sharded(w) else sample
        for w, sample in zip(weights, found, strict=True)
    ]


def describe(
    name: str,
    placements: tuple[Placement, ...],
    tensors: Mapping[str, Tensor],
    originals: Mapping[tuple[int, str], Tensor],
) -> dict[str, Any]:
    """`manifests.describe` of an adapter whose base may be sharded."""
    sites = [placement for placement in placements if not placement.shared]
    bases = {(id(p.layer), p.weight): raw for p in sites if is_sharded(raw := _base(p))}
    shapes = {key: torch.empty(raw.shape, dtype=raw.dtype, device="meta") for key, raw in bases.items()}
    manifest = manifests.describe(name, placements, tensors, {**originals, **shapes})
    for entry, placement in zip(manifest["sites"], sites, strict=True):
        raw = bases.get((id(placement.layer), placement.weight))
        if raw is not None and placement.adapter is not None:
            entry["sample"] = samples([raw])[0]
    return manifest


# ----------------------------------------------------------------------------------------------- loading


def refuse_late(model: nn.Module, *, trainable: bool, in_place: bool) -> None:
    """A model that is spread over ranks already: nobody would reduce the gradients of what comes now."""
    if not (is_spread() and (trainable or in_place)):
        return
    replicated = isinstance(model, nn.parallel.DistributedDataParallel)
    if (replicated and trainable) or any(is_sharded(p) for p in inner(model).parameters()):
        engine = "DistributedDataParallel" if replicated else "fully_shard"
        raise StateError(
            f"{'to train it' if trainable else 'because it holds weights that are trained in place'}, load the adapter "
            f"before {engine} gets the model: what comes later is not reduced over the ranks"
        )


class _ShardedSite(Site):
    """A site whose weight each rank has a part of."""

    def matrix(self) -> Tensor:
        """Gathered, on every rank; its shape alone on the meta device."""
        raw = raw_parameter(self.layer, self.weight).detach()
        raw = torch.empty(raw.shape, device="meta") if self.device.type == "meta" else whole(raw)
        assert self.kind is not None  # noqa: S101 - `site_at` gives it one
        return self.kind.matrix(self.layer, self.weight, raw).to(device=self.device, dtype=self.dtype)


def site_at(path: str, layer: nn.Module, weight: str) -> Site:
    """The site of one parameter, sharded or not. A new adapter is whole on every rank: it runs so, and cannot train."""
    raw = raw_parameter(layer, weight)
    if not is_sharded(raw):
        return site_of(path, layer, weight)
    kind = kind_for(layer, weight)
    return _ShardedSite(path, weight, layer, kind, kind.shape(layer, weight), adapter_dtype(raw.dtype), raw.device)
