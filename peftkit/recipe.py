"""Keeps no second copy of an adapted weight for backward: it is computed again when backward asks for it.

The generic path builds `W' = f(W)` and hands it to the layer's own forward, which saves it; `f` saves tensors of its
size as well. A recipe packs both away as a way to make them: hooks on what `f` saves and on what the layer saves of
`W'` (told by its storage), and one shared recomputation that serves them all. Cost: `f` twice; kept: nothing.

It steps aside where it would be wrong or useless: under somebody else's saved-tensor hooks (non-reentrant checkpointing
and offloading do the same job), in functorch, without gradients, while compiling, and for small weights.
"""

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

SMALLEST = 1_000_000
"""Weights of fewer bytes are simply kept: two hooks cost tens of microseconds."""


class _Open(threading.local):
    """The recipes of the frames that are open in this thread, by the storage of what they made; None outside."""

    def __init__(self) -> None:
        self.recipes: dict[int, Recipe] | None = None
        self.pack: Any = None
        """The hook that recognises them."""


_open = _Open()


class Recipe:
    """One adapted weight, and how to make it again."""

    def __init__(self, make: Callable[[], Tensor], remake: Callable[[], Tensor], ingredients: Sequence[Tensor]) -> None:
        self.make = make
        self.remake = remake
        """Makes the same from what was there in forward, whatever has become of the model since."""
        self.ingredients = [(t, t._version) for t in ingredients]
        self.grad = torch.is_grad_enabled()
        self.packed = 0
        self.keeps = False
        """Whether the value can be kept from its first use in backward to its last, which its gradient marks."""
        self.remade: dict[int, Tensor] = {}
        self.value: Tensor | None = None

    def first(self) -> Tensor:
        """Make the weight, packing away what its computation saves."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            w = self.make()
        if w.requires_grad:
            self.keeps = True
            recipe = weakref.ref(self)  # the hook lives as long as the graph, which must not keep the value

            def consumed(_: Tensor) -> None:
                mine = recipe()
                if mine is not None:
                    mine.value = None

            w.register_hook(consumed)  # type: ignore[no-untyped-call]
        return w

    def again(self) -> Tensor:
        """The weight's value, for backward."""
        value = self._remake() if self.value is None else self.value
        self.value = value if self.keeps else None
        return value

    def _pack(self, tensor: Tensor) -> Any:
        if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.layout is not torch.strided:
            return tensor
        self.packed += 1
        return self.packed - 1

    def _unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        if packed not in self.remade:
            value = self._remake()
            self.value = value if self.keeps and self.value is not None else None
        return self.remade.pop(packed)  # asked for again (retain_graph), it is made again

    def _remake(self) -> Tensor:
        for tensor, version in self.ingredients:
            if tensor._version != version:
                raise RuntimeError(
                    "a weight or an adapter's parameter was changed in place between forward and backward, so the "
                    "adapted weight cannot be made again; call backward() before optimizer.step()"
                )
        collected: list[Tensor] = []

        def collect(tensor: Tensor) -> None:
            if type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout is torch.strided:
                collected.append(tensor.detach())

        # The graph of this second time is never used: it need keep nothing.
        with torch.set_grad_enabled(self.grad), torch.autograd.graph.saved_tensors_hooks(collect, _never):
            value = self.remake().detach()
        if len(collected) != self.packed:
            raise RuntimeError(
                f"an adapter's weight() saved {self.packed} tensors in forward and {len(collected)} when it ran again; "
                "it must be deterministic"
            )
        self.remade = dict(enumerate(collected))
        if torch._C._current_graph_task_id() != -1:
            # A backward that does not reach the weight (for the input alone, say) asks for no gradient of it.
            torch.autograd.Variable._execution_engine.queue_callback(self._drop)
        return value

    def _drop(self) -> None:
        self.value, self.remade = None, {}


@contextmanager
def recipes() -> Iterator[None]:
    """Pack away what is saved of the adapted weights that are made inside. Nested, it adds to what is open."""
    if _open.recipes is not None or not _may_hook():
        yield
        return
    table: dict[int, Recipe] = {}
    _open.recipes = table

    def pack(tensor: Tensor) -> Any:
        if type(tensor) is not Tensor or tensor.layout is not torch.strided:
            return tensor
        recipe = table.get(tensor.untyped_storage()._cdata)
        if recipe is None:
            return tensor if tensor.is_leaf else tensor.detach()  # an output that held itself would never be freed
        return recipe, tensor.size(), tensor.stride(), tensor.storage_offset()

    _open.pack = pack
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, _unpack_view):
            yield
    finally:
        _open.recipes = _open.pack = None


def _never(_: None) -> Tensor:
    raise AssertionError("nobody runs backward through a weight that was made again")


def forget(tensors: Iterable[Any]) -> None:
    """Recognise these adapted weights no longer: their frame closes, and their storage may soon be somebody else's."""
    if _open.recipes is not None:
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                _open.recipes.pop(tensor.untyped_storage()._cdata, None)


def _unpack_view(packed: Any) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    recipe, size, stride, offset = packed
    return torch.as_strided(recipe.again(), size, stride, offset)


def wanted(nbytes: int) -> bool:
    """Whether a weight of this size is to be made by a recipe, here and now.

    Not where somebody has put hooks on top of ours since: a checkpointed block inside a frame of its parent's must save
    what it saves when it runs again, outside that frame.
    """
    if _open.recipes is None or nbytes < SMALLEST:
        return False
    return torch._C._autograd._top_saved_tensors_default_hooks(False)[0] is _open.pack


def made(make: Callable[[], Tensor], remake: Callable[[], Tensor], ingredients: Sequence[Tensor]) -> Tensor:
    """`make()`, by a recipe; `remake()` makes the same again from `ingredients`."""
    assert _open.recipes is not None  # noqa: S101 - `wanted` has said so
    recipe = Recipe(make, remake, ingredients)
    w = recipe.first()
    _open.recipes[w.untyped_storage()._cdata] = recipe
    return w


def _may_hook() -> bool:
    """Whether saved-tensor hooks can be set here without coming between somebody else's and their tensors."""
    return (
        torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and torch._C._autograd._saved_tensors_hooks_is_enabled()  # type: ignore[attr-defined]
        and torch._C._autograd._top_saved_tensors_default_hooks(False) is None
        and torch._C._functorch.peek_interpreter_stack() is None
    )
