"""What a workload is: a model, batches to train it with, and perhaps a task to measure what it has learned.

`peftkit bench` runs methods on workloads. A package of anyone's offers them by the hook `peftkit_workloads`, as it
offers methods: the class says what there is, and nothing is built or downloaded before it is asked for.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from peftkit.errors import WorkloadError
from peftkit.method import Method
from peftkit.rehearsal import leaves
from peftkit.selectors import Selector

Split = Literal["validation", "test"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """What `Workload.evaluate` returns."""

    name: str
    """`"accuracy"`."""
    unit: str
    """`"%"` for a share of the items, which then has an interval of its own; or `"nats"`, say."""
    higher_is_better: bool
    items: int
    """How many items the test split has."""


class Workload(ABC):
    """A model with batches to train it; one instance is made, without arguments.

    Everything it returns must be the same in every process: batches depend on the seed alone. Tensors are on the CPU;
    the engine moves models and batches. It also seeds torch before `model` is called, so that random weights are fine.

    >>> import torch, peftkit
    >>> class Tiny(peftkit.Workload):
    ...     name = "tiny"
    ...     summary = "one linear layer learns to copy"
    ...     per_step = 4
    ...     def model(self):
    ...         return torch.nn.Sequential(torch.nn.Linear(8, 8))
    ...     def batches(self, seed):
    ...         generator = torch.Generator().manual_seed(seed)
    ...         while True:
    ...             yield torch.randn(4, 8, generator=generator)
    ...     def loss(self, model, batch):
    ...         return (model(batch) - batch).square().mean()
    >>> tiny = Tiny()
    >>> tiny.loss(tiny.model(), next(tiny.batches(seed=0))).shape
    torch.Size([])
    """

    name: ClassVar[str]
    """How users ask for it; also the name of its entry point in the group `peftkit.workloads`."""

    summary: ClassVar[str]
    """What it is, in one line."""

    unit: ClassVar[Literal["samples", "tokens"]] = "samples"
    """What a batch is counted in."""

    per_step: ClassVar[int]
    """How many of these a batch has."""

    slow: ClassVar[bool] = False
    """Whether it is left out where nobody has asked for it by name: large downloads, minutes a method."""

    targets: ClassVar[Selector | Sequence[Selector] | None] = None
    """What a method adapts that has no default targets of its own (its `default_targets` are those of `Method`)."""

    head: ClassVar[Selector | None] = None
    """What is new and so has to be trained in full, whatever the method: a classifier's head, `"@head"`."""

    metric: ClassVar[Metric | None] = None
    """What `evaluate` returns; None where there is no task."""

    steps: ClassVar[int] = 0
    """Training steps of one run of the task."""

    forgets: ClassVar[str] = ""
    """What `forgetting` returns, as a column's title; empty where there is no such measurement."""

    def prepare(self) -> None:  # noqa: B027 - most have nothing to fetch
        """Fetch or make whatever is needed and kept in the cache. Raises `WorkloadError` if it cannot be had."""

    def data(self) -> str | None:
        """A digest of the data, or None where they are drawn from a generator."""
        return None

    @abstractmethod
    def model(self) -> nn.Module:
        """A new base model, with the same values every time."""

    @abstractmethod
    def batches(self, seed: int) -> Iterator[Any]:
        """Training batches without end, the same ones for the same seed.

        A tuple holds the forward's positional arguments, a mapping its keyword arguments.
        """

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The training loss, a scalar; by default what the model returns as `loss`."""
        output = forward(model, batch)
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if not isinstance(loss, Tensor):
            raise WorkloadError(
                f"workload {self.name!r}: a {type(output).__name__} came from the model, which has no loss; give "
                "labels in the batch, or a loss(model, batch) of your own"
            )
        return loss

    def output(self, model: nn.Module, batch: Any) -> Tensor:
        """What the model computes, for comparing it merged and unmerged, and for timing its forward.

        By default what it returned when `loss` ran it: `logits`, or its largest tensor.
        """
        found: list[Any] = []
        handle = model.register_forward_hook(lambda _, __, output: found.append(output))
        try:
            self.loss(model, batch)
        finally:
            handle.remove()
        logits = found[0].get("logits") if isinstance(found[0], Mapping) else getattr(found[0], "logits", None)
        return logits if isinstance(logits, Tensor) else max(leaves(found[0]), key=Tensor.numel)

    def rules(self, method: Method) -> Mapping[Any, Method] | None:  # noqa: ARG002 - for whoever wants other rules
        """What to adapt with this method, as `wrap` takes it; None for `head` in full and the method on `targets`."""
        return None

    def evaluate(self, model: nn.Module, split: Split) -> float:
        """The metric on a split that was not trained on. The model is in evaluation mode, gradients are off."""
        raise NotImplementedError

    def forgetting(self, model: nn.Module) -> float:
        """How well the model still does what it could before, where `forgets` says what that is."""
        raise NotImplementedError


def forward(model: nn.Module, batch: Any) -> Any:
    """Run a model on a batch: a tuple is positional arguments, a mapping keyword arguments, else one argument."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if type(batch) is tuple else model(batch)
