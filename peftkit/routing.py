"""One adapter for each sample of a batch, for every method, in training too.

A layer cannot know which of its rows belong to which sample; sizes coincide. So a row is given to a sample only where
that is certain (rule R5 in docs/design.md), and everything else is refused by name. Where all adapters of a layer are
low-rank sums, it runs once and all updates are added together (`peftkit.grouped`). Elsewhere rows are grouped by
adapter, each group runs alone, and the outputs are put back in order: a method's author writes nothing for it.

`split=True` groups the model's own batch instead and runs the whole model once per adapter: it serves every model whose
outputs treat samples alone, also where rows cannot be told.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from peftkit.adapter import Activation
from peftkit.blocks import block
from peftkit.composition import RUNNING, Routing, Running, base_class, is_swapped, running_in, state_of
from peftkit.errors import StateError, UnsupportedLayerError
from peftkit.grouped import Grouped, grouped
from peftkit.installed import Installed, inner, unmerged
from peftkit.lifecycle import using
from peftkit.running import set_running

REMEDY = "use routed(model, names, split=True), which runs the model once for each adapter"


@contextmanager
def routed(model: nn.Module, names: Sequence[str | None], *, dim: int = 0, split: bool = False) -> Iterator[nn.Module]:
    """Run each sample of the batch with its own adapter, or with none, for the length of a `with` block.

    The output of every sample equals that of the sample run alone with its adapter. A batch may hold a whole number of
    rows for each name, side by side, as beam search does. With gradient checkpointing, call `backward()` inside.

    Where a layer's adapters are low-rank sums on a linear layer, the base runs once for the whole batch. Without
    gradients the block then keeps copies of their factors: stay in it for many calls rather than enter it for each,
    and do not write into `parameter.data` meanwhile, which nobody can see.

    Args:
        model: a wrapped model.
        names: one adapter's name, or None for the bare base, for each sample.
        dim: which dimension of the model's inputs is the batch; 1 for a sequence-first model.
        split: run the model once for each adapter on its part of the batch. For models that cannot be routed
            layer by layer; not for `generate` with a cache, nor for outputs that couple samples.

    Raises `UnsupportedLayerError`, with the layer's name, where rows cannot be given to samples with certainty.

    >>> import torch, peftkit
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    >>> for name in ("a", "b"):
    ...     model = peftkit.wrap(model, "lora", name=name)
    >>> with peftkit.routed(model, ["a", "b", None]):
    ...     model(torch.randn(3, 4)).shape
    torch.Size([3, 2])
    """
    known = unmerged(model, "route adapters")
    if not names:
        raise StateError("routed needs a name, or None, for each sample; got none")
    chosen = tuple(dict.fromkeys(name for name in names if name is not None))
    for name in chosen:
        known.placements(name)
    for name in known.adapters:
        in_place = known.in_place(name)
        if in_place is not None and any(other != name for other in names):
            raise StateError(
                f"adapter {name!r} trains {in_place.name} in place, so it runs for every sample; "
                "use Full(keep_base=True)"
            )
    own = tuple(names)
    with block(inner(model)), _split(model, own, dim) if split else _routed(model, known, own, chosen, dim):
        yield model


# --------------------------------------------------------------------------------------- layer by layer


class _Batch:
    """How many rows the model's current batch has, and into how many parts its samples may have been flattened."""

    def __init__(self, names: tuple[str | None, ...], dim: int) -> None:
        self.names = names
        self.dim = dim
        self.rows = len(names)
        self.lengths: frozenset[int] = frozenset()
        self.depth = 0
        self.scope: list[str | None] | None = None
        """Inside a layer that runs a part of the rows: the names of that part."""

    def enter(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the model's forward: read the batch's size off its inputs."""
        self.depth += 1
        tensors = list(_tensors((args, kwargs)))
        if not tensors or tensors[0].dim() <= self.dim:
            raise UnsupportedLayerError("routed reads the batch from the model's first tensor argument; it has none")
        self.rows = tensors[0].shape[self.dim]
        if self.rows % len(self.names):
            raise StateError(f"the batch has {self.rows} rows, which is no multiple of the {len(self.names)} names")
        others = [t for t in tensors if t.dim() > self.dim and t.shape[self.dim] == self.rows]
        self.lengths = frozenset(s for t in others for i, s in enumerate(t.shape[:2]) if i != self.dim)

    def leave(self, *_: Any) -> None:
        """After it."""
        self.depth -= 1

    def row_names(self) -> list[str | None]:
        """The adapter of each row."""
        if self.scope is not None:
            return self.scope
        repeat = self.all_rows() // len(self.names)
        return [name for name in self.names for _ in range(repeat)]

    def all_rows(self) -> int:
        """How many rows the batch has; where the model is entered by a part of it (an encoder), one for each sample."""
        inside = self.depth or torch._C._current_graph_task_id() != -1
        return self.rows if inside else len(self.names)

    def dim_of(self, x: Tensor, rows: int | None = None) -> int | None:
        """The dimension of `x` in which the samples' rows are, flattened with others perhaps; None if not certain."""
        rows = self.all_rows() if rows is None else rows
        if x.dim() >= self.dim + 2 and x.shape[self.dim] == rows:
            return self.dim
        if self.dim == 0 and x.dim() == 2 and any(x.shape[0] == rows * t for t in self.lengths):
            return 0
        return None


@dataclasses.dataclass(eq=False)
class _LayerRouting(Routing):
    """What one layer does under `routed`: stands in the place of its running adapters."""

    path: str
    batch: _Batch
    running: Mapping[str | None, Running | None]
    alike: bool
    """Whether that is the same for every sample."""
    grouped: Grouped | None
    """Runs the whole batch at once, where the layer's adapters allow it."""

    def run(self, layer: nn.Module, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the layer's rows in groups. `call(running, args, kwargs)` runs some of them with some adapters."""
        batch = self.batch
        if batch.scope is None:
            if self.alike:
                return call(self.running[batch.names[0]], args, kwargs)
            if self.grouped is not None:
                y = self.grouped.run(layer, args, kwargs, batch.dim_of)
                if y is not None:
                    return y
        return self.loop(layer, call, args, kwargs)

    def loop(self, layer: nn.Module, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the rows of each adapter alone."""
        names = self.batch.row_names()
        if len({self.running[name] for name in names}) == 1:
            return call(self.running[names[0]], args, kwargs)
        plan = _layout(self, layer, args, kwargs, len(names))
        repeat = plan.size // len(names)
        groups: dict[Running | None, list[int]] = {}
        for i, name in enumerate(names):
            groups.setdefault(self.running[name], []).extend(range(i * repeat, (i + 1) * repeat))
        device = next(_tensors((args, kwargs))).device
        outputs, order = [], []
        scope = self.batch.scope
        try:
            for running, members in groups.items():
                self.batch.scope = [names[i // repeat] for i in members]
                part_args, part_kwargs = plan.take((args, kwargs), torch.tensor(members, device=device))
                outputs.append(plan.spread(call(running, part_args, part_kwargs), len(members)))
                order += members
        finally:
            self.batch.scope = scope
        back = torch.empty(len(order), dtype=torch.long, device=device)
        back[torch.tensor(order, device=device)] = torch.arange(len(order), device=device)
        return plan.join(outputs, back)


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Where a layer's rows are: their number, their dimension in inputs and outputs, or that the input is shared."""

    size: int
    dim: int
    shared: bool = False
    state_dim: int | None = None
    """The dimension in recurrent states, inside the second argument and the second output."""

    def take(self, inputs: tuple[tuple[Any, ...], dict[str, Any]], index: Tensor) -> Any:
        """The rows of every tensor that has as many."""
        if self.shared:
            return inputs
        args, kwargs = inputs
        if self.state_dim is not None and len(args) > 1:
            return (
                _select(args[0], self.dim, self.size, index),
                _select(args[1], self.state_dim, self.size, index),
            ), {}
        return _select(args, self.dim, self.size, index), _select(kwargs, self.dim, self.size, index)

    def spread(self, output: Any, rows: int) -> Any:
        """An output that was computed once for all rows of a group, once for each."""
        return output.expand(rows, *output.shape[1:]) if self.shared else output

    def join(self, outputs: list[Any], back: Tensor) -> Any:
        """The groups' outputs, in the order of the samples."""
        if self.state_dim is None:
            return _joined(outputs, self.dim, back)
        return _joined([o[0] for o in outputs], self.dim, back), _joined([o[1] for o in outputs], self.state_dim, back)


def _layout(
    routing: _LayerRouting, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], rows: int
) -> _Layout:
    """Rule R5: which rows belong to which sample, where that is certain."""
    batch, dim = routing.batch, routing.batch.dim
    x = next(_tensors((args, kwargs)), None)
    family = state_of(layer).family
    if x is not None and family == "recurrent" and x.dim() == 3 and not _is_packed(args):
        own = 0 if getattr(layer, "batch_first", False) else 1
        if x.shape[own] == rows:
            return _Layout(rows, own, state_dim=1)
    elif x is not None and family == "attention" and x.dim() == 3 and not _masked_by_head(args, kwargs):
        own = 0 if getattr(layer, "batch_first", False) else 1
        if x.shape[own] == rows and own == 0:
            return _Layout(rows, 0)
    elif x is not None and family == "embedding" and dim == 0 and x.dim() >= 2 and x.shape[0] == 1 and rows > 1:
        return _Layout(rows, 0, shared=True)
    elif x is not None and not (isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.training):
        own_dim = batch.dim_of(x, rows)
        if own_dim is not None:
            return _Layout(x.shape[own_dim], own_dim)
    shape = "no tensor" if x is None else f"an input of shape {list(x.shape)}"
    raise UnsupportedLayerError(
        f"cannot tell which rows of {routing.path or 'the model'} ({base_class(layer).__name__}) belong to which of "
        f"the {rows} samples: it gets {shape}; {REMEDY}"
    )


@contextmanager
def _routed(
    model: nn.Module, known: Installed, names: tuple[str | None, ...], chosen: tuple[str, ...], dim: int
) -> Iterator[None]:
    root = inner(model)
    _refuse_what_cannot_be_routed(root, known, chosen, dim)
    batch = _Batch(names, dim)
    paths = {id(p.layer): p.path for placements in known.adapters.values() for p in placements}
    layers = [layer for layer in known.layers({*known.active, *chosen}) if is_swapped(layer)]
    routed_layers = {id(layer) for layer in known.layers(chosen)}
    before = [(layer, running_in(layer)) for layer in layers]
    together: list[Grouped] = []

    def forget(*_: Any) -> None:
        for group in together:
            group.forget()

    handles: list[Any] = []
    try:
        handles.append(register_optimizer_step_post_hook(forget))
        handles.append(root.register_forward_pre_hook(batch.enter, with_kwargs=True, prepend=True))
        handles.append(root.register_forward_hook(batch.leave, always_call=True))
        for layer in layers:
            if id(layer) not in routed_layers:
                set_running(layer, ())
                continue
            running: dict[str | None, Any] = {}
            for name in (None, *chosen):
                set_running(layer, () if name is None else (name,))
                running[name] = running_in(layer)
            alike = len({running[name] for name in names}) == 1
            group = None if alike else grouped(layer, names, running)
            together += [] if group is None else [group]
            layer.__dict__[RUNNING] = _LayerRouting(paths[id(layer)], batch, running, alike, group)
        yield
    finally:
        for handle in handles:
            handle.remove()
        for layer, running_before in before:
            layer.__dict__[RUNNING] = running_before


def _refuse_what_cannot_be_routed(root: nn.Module, known: Installed, chosen: tuple[str, ...], dim: int) -> None:
    read = {id(layer): reader for reader in known.readers for layer in state_of(reader).reads}
    for name in chosen:
        for placement in known.sites(name):
            where = placement.path or "the model"
            if isinstance(placement.adapter, Activation):
                raise UnsupportedLayerError(f"{placement.method.name} at {where} surrounds a whole layer; {REMEDY}")
            if id(placement.layer) in read:
                reader = base_class(read[id(placement.layer)]).__name__
                raise UnsupportedLayerError(
                    f"the weight of {where} is read by the {reader} above it, which does not split its rows; {REMEDY}"
                )
    if dim == 0:
        for path, module in root.named_modules():
            # Past nn.Module's own look-up, which is slow for what is not there.
            if module.__dict__.get("batch_first", getattr(type(module), "batch_first", True)) is False:
                raise UnsupportedLayerError(
                    f"{path or 'the model'} ({base_class(module).__name__}) has batch_first=False; if the whole model "
                    f"takes sequence-first inputs, say dim=1; otherwise {REMEDY}"
                )


# ------------------------------------------------------------------------------------- the model's own batch


@contextmanager
def _split(model: nn.Module, names: tuple[str | None, ...], dim: int) -> Iterator[None]:
    root = inner(model)
    own = root.__dict__.get("forward")
    forward = root.forward

    def split_forward(*args: Any, **kwargs: Any) -> Any:
        if any(kwargs.get(key) is not None for key in ("past_key_values", "cache_params")):
            raise UnsupportedLayerError(
                "split=True cannot share a key-value cache among adapters; call it without a cache"
            )
        x = next(_tensors((args, kwargs)), None)
        if x is None or x.dim() <= dim or x.shape[dim] % len(names):
            raise StateError(
                f"the model's first tensor has no batch of a multiple of {len(names)} rows in dimension {dim}"
            )
        rows, device = x.shape[dim], x.device
        repeat = rows // len(names)
        outputs, order = [], []
        for name in dict.fromkeys(names):
            members = [i * repeat + j for i, other in enumerate(names) if other == name for j in range(repeat)]
            index = torch.tensor(members, device=device)
            with using(model, *([] if name is None else [name])):
                outputs.append(forward(*_select(args, dim, rows, index), **_select(kwargs, dim, rows, index)))
            order += members
        back = torch.empty(rows, dtype=torch.long, device=device)
        back[torch.tensor(order, device=device)] = torch.arange(rows, device=device)
        return _joined(outputs, dim, back, [len([n for n in names if n == name]) for name in dict.fromkeys(names)])

    root.__dict__["forward"] = split_forward
    try:
        yield
    finally:
        if own is None:
            root.__dict__.pop("forward", None)
        else:
            root.__dict__["forward"] = own


# --------------------------------------------------------------------------------- tensors inside structures


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _select(value: Any, dim: int, size: int, index: Tensor) -> Any:
    """The rows `index` of every tensor that has `size` of them; the rest as it is."""
    if isinstance(value, Tensor):
        return value.index_select(dim, index) if value.dim() > dim and value.shape[dim] == size else value
    if isinstance(value, Mapping):
        return {key: _select(item, dim, size, index) for key, item in value.items()}
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(_select(item, dim, size, index) for item in value)
    return value


def _joined(outputs: list[Any], dim: int, back: Tensor, weights: list[int] | None = None) -> Any:
    """Outputs of the groups as one, rows in order; a number (a mean loss) as the weighted mean of the groups'."""
    first = outputs[0]
    if isinstance(first, Tensor):
        if first.dim() > dim and sum(o.shape[dim] for o in outputs) == back.numel():
            return torch.cat(outputs, dim).index_select(dim, back)
        if first.dim() == 0 and weights is not None:
            return sum(o * (w / sum(weights)) for o, w in zip(outputs, weights, strict=True))
    elif first is None:
        return None
    elif isinstance(first, Mapping):
        joined = {key: _joined([o[key] for o in outputs], dim, back, weights) for key in first}
        return _like(first, joined)
    elif isinstance(first, (list, tuple)):
        return type(first)(_joined(list(items), dim, back, weights) for items in zip(*outputs, strict=True))
    raise UnsupportedLayerError(
        f"an output of type {type(first).__name__} couples the samples, so it cannot be put together from parts; "
        "ask the model not to return it (use_cache=False, say)"
    )


def _like(first: Any, joined: dict[str, Any]) -> Any:
    """A mapping of the same type; transformers' outputs are dataclasses as well."""
    made: Callable[..., Any] = type(first)
    return made(**joined) if dataclasses.is_dataclass(first) else made(joined)


def _is_packed(args: tuple[Any, ...]) -> bool:
    return bool(args) and isinstance(args[0], nn.utils.rnn.PackedSequence)


def _masked_by_head(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether an attention has a mask for each head of each sample, whose rows are not the samples'."""
    mask = kwargs.get("attn_mask", args[5] if len(args) > 5 else None)
    return isinstance(mask, Tensor) and mask.dim() == 3
