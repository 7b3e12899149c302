"""Follows the memory of every tensor that lives while code runs, and says what it is for.

Bytes are counted by storage, from the operation that makes it to the moment it is freed: views cost nothing, two
holders of one storage count once. Operations are seen below autograd (a `TorchDispatchMode`), so on every device, meta
too. Only weak references are held, nothing is hooked to a tensor, a parameter or the graph, and no saved-tensor hooks
are set, before which peftkit's own recipes would step aside: what is watched runs as if nobody did.
"""

import sys
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from peftkit import accumulation, workspaces
from peftkit.bookkeeping import (
    ACTIVATIONS,
    BUFFERS,
    CATEGORIES,
    FROZEN,
    GRADIENTS,
    OPTIMIZER,
    TEMPORARY,
    TRAINABLE,
    Book,
    Moment,
    Place,
)
from peftkit.tables import size, table
from peftkit.whereabouts import AGAIN, BACKWARD, FORWARD, Whereabouts
from peftkit.workspaces import Workspaces

__all__ = ["CATEGORIES", "Ledger", "Moment"]


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what lives while the block runs: the model, its gradients and optimizer, activations, temporaries.

    Args:
        model: whose parameters and buffers are told from other tensors. They count from the start.
        optimizer: whose state counts from the start. One that first steps inside is found by itself.
        devices: device types that are counted, such as `("cuda",)`; by default those of the model's tensors.
        block: bytes that every storage is rounded up to a multiple of; by default 512 on CUDA, as its allocator does,
            and 1 elsewhere.

    Bytes are those that torch asks its allocator for. A tensor that was there before, a batch, counts from the start
    as well, once an operation uses it. On the CPU, what a convolution and its like take for themselves is measured when
    the block ends; `docs/memory.md` says how, and what is not seen.

    >>> import torch
    >>> from peftkit.memory import Ledger
    >>> model = torch.nn.Linear(1000, 1000, bias=False)
    >>> with Ledger(model) as ledger:
    ...     model(torch.zeros(1, 1000)).sum().backward()
    >>> ledger.at_peak["trainable"], ledger.at_peak["gradients"]
    (4000000, 4000000)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        *,
        devices: Collection[str] | None = None,
        block: int | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._model = model
        self._optimizers = [] if optimizer is None else [weakref.ref(optimizer)]
        found = {t.device.type for t in (*model.parameters(), *model.buffers())}
        self._devices = frozenset(devices or found or {"cpu"})
        self._cpu = "cpu" in self._devices
        self._block = block
        self._book = Book()
        self._alive: dict[int, tuple[int, Any]] = {}  # storage's address → its number, and a weak reference to it
        self._holders: dict[int, int] = {}  # how many storages go by one number, where more than one
        self._fresh: set[int] = set()  # made in a forward whose end has not come
        self._workspaces = Workspaces(self._book)
        self._sweeps = 0
        self._handles: list[Any] = []
        self._answer: tuple[Any, Moment] | None = None

    # ------------------------------------------------------------------------------------------- the block

    def __enter__(self) -> Self:
        """Begin to count."""
        accumulation.alone()
        self._where = Whereabouts(self._model)
        self._where.open()
        self._sweep()
        self._handles = [
            register_optimizer_step_pre_hook(self._step_begins),
            register_optimizer_step_post_hook(self._step_ends),
        ]
        if self._cpu:  # a checkpoint keeps the generator's state, in a tensor that no operation has made
            self._rng_state = torch.get_rng_state
            torch.get_rng_state = self._see_rng_state
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop counting; the figures stay."""
        super().__exit__(kind, value, traceback)  # type: ignore[no-untyped-call]
        if self._cpu:
            torch.get_rng_state = self._rng_state
        self._where.close()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._sweep()
        if kind is None:
            self._workspaces.measure()
            self._answer = None

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Torch would wrap `__torch_dispatch__` against being compiled, and import its compiler for that."""
        return False

    def count(self, tensors: Any) -> None:
        """Count these from the start, in whatever lists, tuples and dicts: a batch of which not all may be used."""
        for tensor in _nested(tensors):
            self._see(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, and write down which storages it makes."""
        kwargs = kwargs or {}
        answer = self._answered(func, args)
        if answer is not NotImplemented:
            return answer
        self._see_all(args)
        self._see_all(kwargs.values())
        self._mark(func)
        into = None
        if self._where.phase == BACKWARD and accumulation.in_place_of(func, args, sys._getframe()):
            into = self._alive.get(args[0].untyped_storage()._cdata, (None,))[0]
        within = self._workspaces.open(func, args, kwargs, self._where) if self._cpu else None
        result = self._run(func, args, kwargs)
        self._see_all((result,), made=True, into=into)
        if within is not None:
            self._workspaces.close(*within)
        return result

    def _answered(self, func: Any, args: Any) -> Any:  # noqa: ARG002 - for a subclass without values
        """What the operation gives without being run; NotImplemented where it must be."""
        return NotImplemented

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        return func(*args, **kwargs)

    # ------------------------------------------------------------------------------------------ the answers

    @property
    def now(self) -> dict[str, int]:
        """Bytes alive at present, by category."""
        return self._book.now()

    @property
    def peak(self) -> int:
        """The most bytes that lived at any one time."""
        return self._highest().total

    @property
    def at_peak(self) -> dict[str, int]:
        """What they were for: bytes by category, which add up to `peak`."""
        return dict(self._highest().bytes)

    @property
    def moment(self) -> str:
        """Where the peak was reached, and in which operation: `"backward of layers.0 (mm)"`."""
        return self._highest().label

    @property
    def timeline(self) -> list[Moment]:
        """The whole run in order, a moment for each stretch within one module's forward or backward."""
        return list(self._book.moments(by_operation=False))

    def __str__(self) -> str:
        """The peak, by category."""
        rows = [[name, size(n), f"{n:,}"] for name, n in self.at_peak.items() if n]
        text = table(["category", "size", "bytes"], [*rows, ["peak", size(self.peak), f"{self.peak:,}"]], "size bytes")
        return f"{text}\n\nhighest in the {self.moment}"

    def _highest(self) -> Moment:
        state = len(self._book.events), len(self._book.before), self._sweeps
        if self._answer is None or self._answer[0] != state:
            self._answer = state, max(self._book.moments(by_operation=True), key=lambda moment: moment.total)
        return self._answer[1]

    # --------------------------------------------------------------------------------------------- storages

    def _see(self, tensor: Tensor, *, made: bool = False, kind: int | None = None, into: int | None = None) -> None:
        """Write down a tensor's storage, if it is new: one that an operation has made, or else one that was there."""
        if tensor.layout is not torch.strided:
            for part in _parts(tensor):
                self._see(part, made=made, kind=kind)
            return
        if tensor.device.type not in self._devices:
            return
        storage = tensor.untyped_storage()
        address = storage._cdata
        known = self._alive.get(address)
        if known is not None:
            if made:
                self._book.resize(known[0], self._rounded(storage))
            elif kind is not None and self._book.kinds[known[0]] not in (FROZEN, TRAINABLE):
                self._book.kinds[known[0]] = kind
            return
        if into is not None:  # as though the engine had added up in place
            number = into
            self._holders[number] = self._holders.get(number, 1) + 1
        elif made:
            number = self._book.enter(self._rounded(storage), TEMPORARY)
            if self._where.phase in (FORWARD, AGAIN):
                self._fresh.add(number)
        else:
            number = self._book.enter(self._rounded(storage), ACTIVATIONS if kind is None else kind, was_there=True)
        self._alive[address] = number, weakref.ref(storage, self._gone(address, number))

    def _see_all(self, values: Iterable[Any], *, made: bool = False, into: int | None = None) -> None:
        """The tensors among an operation's arguments or results: they stand there as such, or in one list or tuple."""
        for value in values:
            if isinstance(value, Tensor):
                self._see(value, made=made, into=into)
            elif isinstance(value, (list, tuple)):
                for each in value:
                    if isinstance(each, Tensor):
                        self._see(each, made=made, into=into)

    def _gone(self, address: int, number: int) -> Callable[[Any], None]:
        def gone(_: Any) -> None:
            del self._alive[address]
            holders = self._holders.pop(number, 1)
            if holders > 1:
                self._holders[number] = holders - 1
            else:
                self._book.resize(number, 0)
                self._fresh.discard(number)

        return gone

    def _rounded(self, storage: Any) -> int:
        block = self._block or (512 if storage.device.type == "cuda" else 1)
        return int(-(-storage.nbytes() // block) * block)

    def _see_rng_state(self) -> Tensor:
        state = self._rng_state()
        self._see(state, made=True)
        return state

    def _sweep(self) -> None:
        """Write down what storages are, by whom they belong to; a parameter is one whatever else holds it."""
        parameters = list(self._model.parameters())
        owners: list[tuple[int, Iterable[Tensor]]] = [
            (OPTIMIZER, self._states()),
            (GRADIENTS, [p.grad for p in parameters if p.grad is not None]),
            (BUFFERS, self._model.buffers()),
        ]
        if not self._sweeps:
            owners += [(TRAINABLE, [p for p in parameters if p.requires_grad])]
            owners += [(FROZEN, [p for p in parameters if not p.requires_grad])]
        self._sweeps += 1
        for kind, tensors in owners:
            for tensor in tensors:
                self._see(tensor, kind=kind)

    def _states(self) -> Iterator[Tensor]:
        for known in self._optimizers:
            optimizer = known()
            if optimizer is not None:
                yield from _nested(list(optimizer.state.values()))

    # ----------------------------------------------------------------------------------------------- phases

    def _mark(self, func: Any) -> None:
        """Write down where the run is, and settle what is known by its having moved on."""
        where = self._where
        task, node, phase = where.task, where.node, where.phase
        where.look()
        if where.task not in (task, -1):  # when the engine calls back, gradients are complete and still there
            torch.autograd.Variable._execution_engine.queue_callback(self._sweep)
        if where.node != node:
            self._workspaces.release(node)
        if where.phase != phase and where.phase == BACKWARD:  # what a forward has left is what backward needs
            for number in self._fresh:
                if self._book.kinds[number] == TEMPORARY:
                    self._book.kinds[number] = ACTIVATIONS
            self._fresh.clear()
            self._workspaces.release(workspaces.AGAIN)
        self._book.at(Place(where.phase, where.path, workspaces.name_of(func)))

    def _step_begins(self, optimizer: Optimizer, *_: Any) -> None:
        if all(known() is not optimizer for known in self._optimizers):
            self._optimizers.append(weakref.ref(optimizer))
        self._sweep()

    def _step_ends(self, *_: Any) -> None:
        self._sweep()


def _nested(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _nested(each)


def _parts(tensor: Tensor) -> tuple[Tensor, ...]:
    """The dense tensors that a sparse one consists of."""
    return (tensor._indices(), tensor._values()) if tensor.layout is torch.sparse_coo else ()
