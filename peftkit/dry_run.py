"""Puts a model, its inputs and its gradient checkpointing on the meta device, where tensors have shapes and no values.

What torch does otherwise there than on the device that is meant is set right in `dry_kernels` and `dry_autocast`.
"""

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from peftkit.errors import PeftkitError, SelectorError
from peftkit.memory import Ledger
from peftkit.resolve import modules_of
from peftkit.selectors import candidates, compile_selector, describe
from peftkit.workspaces import frozen, name_of

# -------------------------------------------------------------------------------------- models and inputs


class _Shapes(TorchFunctionMode):
    """While it is on, a copy of a tensor has its shape, strides and dtype, on the meta device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._C.TensorBase.clone:  # with which a parameter copies itself
            return shape_of(args[0].detach())
        if func is not Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        if id(tensor) not in memo:
            memo[id(tensor)] = shape_of(tensor)
        return memo[id(tensor)]


def shape_of(tensor: Tensor) -> Tensor:
    """A tensor on the meta device like this one; a parameter where it is one."""
    with torch.no_grad():
        like = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(like, requires_grad=tensor.requires_grad)
    return like.requires_grad_(tensor.requires_grad)


def model_on_meta(build: nn.Module | Callable[[], nn.Module]) -> nn.Module:
    """A copy of a model without its values, or what the factory makes where no tensor has any."""
    model: Any = build
    if not isinstance(model, nn.Module):
        try:
            with torch.device("meta"):
                model = build()
        except Exception:  # noqa: BLE001 - it may read values, which are not there on meta; if not that, it raises again
            model = build()
        if not isinstance(model, nn.Module):
            raise PeftkitError(f"build must be an nn.Module or make one, got {type(model).__name__}")
    with _Shapes():
        return copy.deepcopy(model)


def inputs_on_meta(inputs: Any, known: dict[int, Any] | None = None) -> Any:
    """The inputs without their values: tensors, and pairs of a shape and a dtype, nested in tuples, lists and dicts.

    What is one object in them stays one.
    """
    known = {} if known is None else known
    if id(inputs) in known:
        return known[id(inputs)]
    made = inputs
    if isinstance(inputs, Tensor):
        made = shape_of(inputs)
    elif is_shape(inputs):
        made = torch.empty(inputs[0], dtype=inputs[1], device="meta")
    elif isinstance(inputs, Mapping):
        made = {key: inputs_on_meta(value, known) for key, value in inputs.items()}
    elif type(inputs) in (tuple, list):
        made = type(inputs)(inputs_on_meta(value, known) for value in inputs)
    known[id(inputs)] = made
    return made


def is_shape(value: Any) -> bool:
    """Whether this is a pair of a shape and a dtype: `((4, 128), torch.long)`."""
    return (
        isinstance(value, (tuple, list))
        and len(value) == 2
        and isinstance(value[1], torch.dtype)
        and isinstance(value[0], (tuple, list))
        and all(isinstance(n, int) for n in value[0])
    )


# ------------------------------------------------------------------------------------------- the ledger


class MetaLedger(Ledger):  # type: ignore[no-untyped-call]
    """A ledger that also answers where the model asks for a value: yes, or one."""

    def _answered(self, func: Any, args: Any) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return True if args[0].dtype is torch.bool else (1.0 if args[0].is_floating_point() else 1)
        if func is torch.ops.aten.equal.default and any(t.is_meta for t in args):
            return True
        return False if func is torch.ops.aten.is_pinned.default else NotImplemented

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Blocks of a model are alike, so most results have been had before: only their shapes count, and are kept."""
        if changes_values_only(func) and _is_on_meta(args[0]):
            return args[0] if func._schema.returns else None
        if not _is_new(func):
            return func(*args, **kwargs)
        key = func, frozen(args), frozen(tuple(kwargs.items()))
        try:
            known = _results.get(key)
        except TypeError:  # an argument that has no hash
            return func(*args, **kwargs)
        if known is None:
            result = func(*args, **kwargs)
            views = {t.untyped_storage()._cdata for t in args if isinstance(t, Tensor)}  # `_unsafe_view` gives one
            if result.is_meta and result.is_contiguous() and result.untyped_storage()._cdata not in views:
                if len(_results) >= _MOST:
                    _results.clear()
                _results[key] = result.shape, result.dtype
            return result
        return torch.empty(known[0], dtype=known[1], device="meta")


_results: dict[Any, tuple[Any, torch.dtype]] = {}
_MOST = 20_000


_POINTWISE = (
    "add sub mul div addcmul addcdiv lerp copy zero fill masked_fill sigmoid tanh relu exp neg sqrt clamp clamp_min"
)
_IN_PLACE = frozenset(f"aten::{name}_" for name in [*_POINTWISE.split(), "addmm", "normal", "uniform", "bernoulli"])


@functools.cache
def changes_values_only(func: Any) -> bool:
    """Whether an operation changes only what its first argument holds, which nothing here has a use for."""
    name = name_of(func)
    return name in _IN_PLACE or (name.startswith("aten::_foreach_") and name.endswith("_"))


def _is_on_meta(value: Any) -> bool:
    first = value[0] if isinstance(value, (list, tuple)) and value else value
    return isinstance(first, Tensor) and first.is_meta


@functools.cache
def _is_new(func: Any) -> bool:
    """Whether an operation's only result is a tensor of its own."""
    schema = func._schema
    if len(schema.returns) != 1 or str(schema.returns[0].type) != "Tensor":
        return False
    return all(value.alias_info is None for value in (*schema.returns, *schema.arguments))


# --------------------------------------------------------------------------------------------- checkpointing


def checkpoint_blocks(model: nn.Module, blocks: Any) -> None:
    """Run parts of the model again in backward, and keep only their inputs: gradient checkpointing without reentry.

    `blocks` is a selector or several; or True, for the model's own way (`gradient_checkpointing_enable`, as models of
    transformers have it), and for one that has none, each member of its outermost lists of layers.
    """
    own = getattr(model, "gradient_checkpointing_enable", None)
    if blocks is True and callable(own):
        own(gradient_checkpointing_kwargs={"use_reentrant": False})
        return
    modules = _blocks(model) if blocks is True else _selected(model, blocks)
    if not modules:
        raise PeftkitError(
            "checkpointing=True finds no list of layers in this model (nn.ModuleList, nn.Sequential) and no "
            "gradient_checkpointing_enable; name the modules to run again: checkpointing='layers.*'"
        )
    for module in modules:
        _run_again(module)


def _blocks(module: nn.Module) -> list[nn.Module]:
    if isinstance(module, (nn.Sequential, nn.ModuleList)):
        return list(module)
    return [block for child in module.children() for block in _blocks(child)]


def _selected(model: nn.Module, blocks: Any) -> list[nn.Module]:
    """The modules that a selector picks, but none within another."""
    modules = modules_of(model)
    chosen: set[str] = set()
    for selector in blocks if isinstance(blocks, (list, tuple)) else (blocks,):
        matches = compile_selector(selector)
        known = [each for each in candidates(modules) if each.path and each.parameter is None]
        mine = {each.path for each in known if matches(each, frozenset())}
        if not mine:
            raise SelectorError(f"checkpointing={describe(selector)} matches no module of the model")
        chosen |= mine
    outermost = [p for p in chosen if not any(p.startswith(f"{other}.") for other in chosen)]
    return [module for path, module in modules.items() if path in outermost]


def _run_again(module: nn.Module) -> None:
    """Checkpoint all calls of a module, by a class of its own: its attributes and its type are asked for as ever."""
    base: Any = type(module)

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(base.__call__, self, *args, use_reentrant=False, **kwargs)

    module.__class__ = type(base.__name__, (base,), {"__call__": call, "__module__": base.__module__})
