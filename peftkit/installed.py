"""What is installed on a model: which adapters, where, and which of them are active, trainable and merged.

One record on the wrapped model knows it all, so that no operation has to walk the model to find its layers. It is
replaced whole by every operation, never changed in place, and it is copied and pickled with the model.
"""

import dataclasses
import gc
from collections.abc import Callable, Iterable
from contextlib import ContextDecorator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from peftkit import plugins
from peftkit.adapter import Activation, Adapter
from peftkit.errors import StateError, UnknownAdapterError, did_you_mean
from peftkit.method import Method

_INSTALLED = "_peftkit_installed"
_MERGED = "peftkit_merged."
T = TypeVar("T")


def named_parameters(adapter: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
    """`adapter.named_parameters()`, without a walk where there is nothing below: adapters are many and small."""
    if adapter._modules:
        return adapter.named_parameters()
    return [(name, p) for name, p in adapter._parameters.items() if p is not None]


def _state(adapter: nn.Module) -> Iterable[tuple[str, Tensor]]:
    """The items of `adapter.state_dict()`, read where they are registered if that is all that it would do."""
    own = type(adapter)
    if (
        adapter._modules
        or adapter._state_dict_hooks
        or adapter._state_dict_pre_hooks
        or any(getattr(own, name) is not getattr(nn.Module, name) for name in _SAVING)
    ):
        return adapter.state_dict().items()
    hidden = adapter._non_persistent_buffers_set
    registered = (*adapter._parameters.items(), *(item for item in adapter._buffers.items() if item[0] not in hidden))
    return [(name, t.detach()) for name, t in registered if t is not None]


_SAVING = ("state_dict", "_save_to_state_dict", "get_extra_state")


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Placement:
    """One method at one site of the model."""

    path: str
    weight: str
    layer: nn.Module
    method: Method
    adapter: Adapter | Activation | nn.Module | None
    """None where the layer's own weight is trained in place."""
    learns: frozenset[str]
    """Which of the adapter's parameters the method trains."""
    version: int | None = 0
    """The weight's version counter when it was unfrozen, by which a change in place shows; None if it has
    changed already.
    """
    shared: bool = False
    """Whether this is no site but the state that the method's sites share, held at the model itself."""

    @property
    def name(self) -> str:
        """Path of the weight: `"encoder.0.fc.weight"`."""
        return f"{self.path}.{self.weight}" if self.path else self.weight

    def trained(self) -> list[tuple[str, nn.Parameter]]:
        """The parameters that the method trains here, by their name in the adapter's state."""
        if self.adapter is None:
            return [(self.name, self.in_place())]
        return [(f"{self.name}.{n}", p) for n, p in named_parameters(self.adapter) if n in self.learns]

    def learning(self) -> list[nn.Parameter]:
        """The parameters of `trained`."""
        if self.adapter is None:
            return [self.in_place()]
        return [p for name, p in named_parameters(self.adapter) if name in self.learns]

    def tensors(self) -> list[tuple[str, Tensor]]:
        """Everything that a file must hold for this site, by name in the adapter's state."""
        if self.adapter is None:
            return [(self.name, self.in_place().detach())]
        return [(f"{self.name}.{n}", t) for n, t in _state(self.adapter)]

    def in_place(self) -> nn.Parameter:
        """The base's own parameter, where it is trained in place."""
        return self.layer._parameters[self.weight]  # type: ignore[return-value]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Installed:
    """The record of a wrapped model."""

    adapters: dict[str, tuple[Placement, ...]]
    active: tuple[str, ...]
    flags: dict[str, bool]
    """`requires_grad` of every parameter before the first wrap, by path."""
    roles: dict[str, frozenset[str]]
    """Each layer's roles, found before the first wrap."""
    merged: tuple[str, ...] = ()
    stash: tuple[tuple[nn.Module, str, nn.Parameter], ...] = ()
    """The originals that a merge replaced: layer, parameter name, parameter."""
    readers: tuple[nn.Module, ...] = ()
    """Modules whose class was swapped because they read an adapted weight themselves."""
    watch: Any = None
    """Lets methods know of optimizer steps (`peftkit.stepping`), where one of them wants to."""
    trained_in_place: frozenset[str] = frozenset()
    """The adapters that train a weight of the base in place."""

    def placements(self, name: str) -> tuple[Placement, ...]:
        """Where the adapter `name` sits; `UnknownAdapterError` when there is none."""
        if name not in self.adapters:
            raise UnknownAdapterError(
                f"no adapter called {name!r}{did_you_mean(name, self.adapters) or ';'} this model has: "
                f"{', '.join(self.adapters)}"
            )
        return self.adapters[name]

    def sites(self, name: str) -> list[Placement]:
        """Where the adapter `name` sits, without the state that its sites share."""
        return [placement for placement in self.placements(name) if not placement.shared]

    def layers(self, names: Iterable[str]) -> list[nn.Module]:
        """The layers in which any of these adapters is installed, each once; the model too, if it holds their state."""
        return list({id(p.layer): p.layer for name in names for p in self.adapters[name]}.values())

    def in_place(self, name: str) -> Placement | None:
        """The first weight that the adapter trains in place, if it has one."""
        if name not in self.trained_in_place:
            return None
        return next(p for p in self.adapters[name] if p.adapter is None)


class Adapters(nn.ModuleDict):
    """The container at `<layer>.adapters`: adapter name → weight name → adapter.

    A base checkpoint holds nothing of it, and still loads strictly: a state without a single key of this container
    leaves it alone. Whether the rest of the model's adapters are there as well is the root's to say (`_check_state`).
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_pre_hook(_keep_own_values)  # type: ignore[no-untyped-call]

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:  # noqa: FBT001, FBT002 - torch's own signature
        """Out of the meta device come tensors without values: NaN, for whatever was in memory there to be seen."""
        absent = {name for name, t in self.state_dict().items() if t.is_meta}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, t in self.state_dict().items() if absent else ():
            if name in absent and not t.is_meta and t.is_floating_point():
                t.fill_(torch.nan)
        return self

    def forward(self, x: Any) -> Any:
        """Nothing: an adapted `nn.Sequential` calls its members in turn, and this is one of them."""
        return x


def _keep_own_values(container: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    if not any(key.startswith(prefix) for key in state):
        state.update(container.state_dict(prefix=prefix))


def _check_state(
    root: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any, _strict: Any, missing: list[str], *_: Any
) -> None:
    """Before a checkpoint is loaded: refuse it where its weights would be lost, report an adapter that is not whole."""
    known: Installed | None = root.__dict__.get(_INSTALLED)
    if known is None:
        return
    twice = [key.removeprefix(prefix + _MERGED) for key in state if key.startswith(prefix + _MERGED)]
    if twice:
        raise StateError(
            f"this checkpoint was written while {', '.join(map(repr, twice))} was merged: its weights contain what the "
            "adapter does, and would get it twice here. Load it into the model unwrapped, or call peftkit.unmerge "
            "before state_dict"
        )
    if known.merged:
        raise StateError(
            f"cannot load a checkpoint while {', '.join(map(repr, known.merged))} is merged, "
            "because unmerging would undo it; call peftkit.unmerge first"
        )
    keys = [prefix + key for name in known.adapters for key in _keys(known, name)]
    absent = [key for key in keys if key not in state]
    if len(absent) < len(keys):
        missing.extend(absent)


def _mark_merged(root: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """A state that was taken while adapters are merged says so, or a wrapped model would apply them twice."""
    for name in root.__dict__[_INSTALLED].merged:
        state[prefix + _MERGED + name] = torch.tensor(True)


def _keys(known: Installed, name: str) -> list[str]:
    """Where an adapter's tensors stand in the state of the whole model."""
    return [
        ".".join([*filter(None, [placement.path]), "adapters", name, placement.weight, key])
        for placement in known.adapters[name]
        if placement.adapter is not None
        for key in placement.adapter.state_dict()
    ]


def inner(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of `torch.compile`, DataParallel and DistributedDataParallel."""
    while True:
        if "_orig_mod" in model._modules:
            model = model._modules["_orig_mod"]  # type: ignore[assignment]
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        else:
            return model


def record(model: nn.Module) -> Installed | None:
    """The record of what is installed on the model, or None."""
    return inner(model).__dict__.get(_INSTALLED)


def is_wrapped(module: nn.Module) -> bool:
    """Whether this very module holds a record."""
    return _INSTALLED in module.__dict__


def installed(model: nn.Module) -> Installed:
    """The record of what is installed on the model; `StateError` when nothing is."""
    found = record(model)
    if found is None:
        below = next((path for path, m in model.named_modules() if is_wrapped(m)), None)
        where = (
            f"its submodule {below!r} is: call this with that module"
            if below
            else "call peftkit.wrap or peftkit.load first"
        )
        raise StateError(f"this {type(model).__name__} is not wrapped; {where}")
    return found


def unmerged(model: nn.Module, action: str) -> Installed:
    """The record, for an operation that makes no sense while adapters are merged."""
    found = installed(model)
    if found.merged:
        raise StateError(
            f"cannot {action} while {', '.join(map(repr, found.merged))} "
            f"{'is' if len(found.merged) == 1 else 'are'} merged; "
            "call peftkit.unmerge first"
        )
    return found


def write_record(model: nn.Module, new: Installed | None) -> None:
    """Replace the record, or remove it."""
    root = inner(model)
    if new is None:
        root.__dict__.pop(_INSTALLED, None)
        for hooks, ours in ((root._load_state_dict_pre_hooks, _check_state), (root._state_dict_hooks, _mark_merged)):
            for key in [key for key, hook in hooks.items() if getattr(hook, "hook", hook) is ours]:
                del hooks[key]
        return
    if _INSTALLED not in root.__dict__:
        root.register_load_state_dict_pre_hook(_check_state)  # type: ignore[no-untyped-call]
        root._register_state_dict_hook(_mark_merged)  # type: ignore[no-untyped-call]
    root.__dict__[_INSTALLED] = new


def atomically(
    model: nn.Module, touched: Iterable[nn.Module], change: Callable[[], T], *, flags: Iterable[nn.Parameter] = ()
) -> T:
    """Run `change`; whatever it raises, the model and the `touched` modules are first put back as they were.

    Classes, attributes, registered parameters and modules are restored, and `requires_grad` and `data` of every
    parameter that these modules hold themselves, or that is in `flags`. What is written *into* a tensor is not:
    `change` must give a parameter other data instead. The rest of the model is not looked at, so that an operation on
    one adapter costs the same however many others there are.
    """
    root = inner(model)
    modules = list({id(m): m for m in (root, *touched)}.values())
    held = [p for m in modules for p in m._parameters.values() if p is not None]
    parameters = [(p, p.requires_grad, p.data) for p in {id(p): p for p in (*held, *flags)}.values()]
    before = [_Snapshot(module) for module in modules]
    try:
        with in_bulk():
            return change()
    except BaseException:
        for snapshot in before:
            snapshot.restore()
        for p, flag, data in parameters:
            p.data = data
            p.requires_grad_(flag)
        raise


class in_bulk(ContextDecorator):  # noqa: N801 - reads as the decorator that it is
    """For an operation on thousands of layers: collect garbage when it is done, because one collection takes longer
    than all the rest; and look each layer class up once.
    """

    def __enter__(self) -> None:
        self.was_enabled = gc.isenabled()
        gc.disable()
        plugins.begin_operation()

    def __exit__(self, *_: object) -> None:
        plugins.end_operation()
        if self.was_enabled:
            gc.enable()

    def _recreate_cm(self) -> "in_bulk":
        return in_bulk()


class _Snapshot:
    """A module's class and attributes, with the dictionaries in which it registers things."""

    _REGISTERS = ("_parameters", "_buffers", "_modules", "_load_state_dict_pre_hooks", "_state_dict_hooks")

    def __init__(self, module: nn.Module) -> None:
        self.module, self.cls, self.attributes = module, type(module), dict(module.__dict__)
        self.registers = {name: dict(module.__dict__[name]) for name in self._REGISTERS}
        adapters = module._modules.get("adapters")
        self.adapters = (adapters, dict(adapters._modules)) if isinstance(adapters, Adapters) else None

    def restore(self) -> None:
        module = self.module
        object.__setattr__(module, "__class__", self.cls)
        module.__dict__.clear()
        module.__dict__.update(self.attributes)
        for name, entries in self.registers.items():
            module.__dict__[name].clear()
            module.__dict__[name].update(entries)
        if self.adapters is not None:
            container, groups = self.adapters
            container._modules.clear()
            container._modules.update(groups)


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors' elements; a tensor that comes twice counts once."""
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())
