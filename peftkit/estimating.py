"""The memory of a training step, by category, of a model that need not be there: the step runs on the meta device.

What is counted is what torch would ask its allocator for in that step: the ledger's figures (`peftkit.memory`) for the
same code, on shapes. What a device takes besides is no tensor, and stands on a line of its own with a range.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW

from peftkit.dry_autocast import autocasting
from peftkit.dry_kernels import ATTENTION, kernels_of
from peftkit.dry_run import MetaLedger, checkpoint_blocks, inputs_on_meta, model_on_meta
from peftkit.errors import PeftkitError, did_you_mean
from peftkit.install import wrap
from peftkit.installed import record
from peftkit.lifecycle import param_groups
from peftkit.method import Method
from peftkit.plan import Rules
from peftkit.rehearsal import leaves
from peftkit.selectors import Selector
from peftkit.tables import count, size, table

DEVICES = ("cuda", "cpu")
OPTIMIZERS: dict[str, tuple[Callable[..., torch.optim.Optimizer], dict[str, Any]]] = {
    "adamw": (AdamW, {}),
    "adam": (Adam, {}),
    "sgd": (SGD, {}),
    "sgd-momentum": (SGD, {"momentum": 0.9}),
}

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

_CONTEXT = 300_000_000, 600_000_000
"""Bytes of a CUDA context with torch's kernels, at least and at most."""
_WORKSPACE = 8 * 2**20, 32 * 2**20
"""Bytes of cuBLAS's workspace: the first on most devices, the second on Hopper."""
_FRAGMENTS = 0.10
"""Share of the peak that may lie in the allocator's blocks beside tensors. A rule of thumb, not a measurement."""


@dataclass(frozen=True)
class Estimate:
    """Bytes that one training step takes at its highest point, by what they are for. Print it for a table."""

    peak: int
    """The most bytes that tensors hold at any one time of the step."""
    at_peak: dict[str, int]
    """What they are for: bytes by category (`peftkit.memory.CATEGORIES`)."""
    steady: int
    """What stays from one step to the next: the model, the optimizer's state and the batch."""
    largest: str
    """Where the peak is: `"backward of layers.3 (mm)"`."""
    overhead: tuple[int, int]
    """What the device takes besides tensors, at least and at most."""
    trainable: int
    """Trainable parameters."""
    total: int
    """All parameters, the adapters' too."""
    method: str
    device: str
    attention: dict[str, int]
    """How often each kernel of scaled dot product attention ran in the step."""

    def fits(self, budget: int | str) -> bool:
        """Whether the peak with the most overhead is within so many bytes (a number, or text such as `"24GB"`)."""
        return self.peak + self.overhead[1] <= nbytes_of(budget)

    def to_json(self) -> dict[str, Any]:
        """Every field under its own name, as JSON values; sizes are in bytes."""
        return asdict(self) | {"overhead": list(self.overhead)}

    def __str__(self) -> str:
        """A table of the categories, and below it what else there is to say."""
        rows = [[name, size(n), f"{n / self.peak:.1%}"] for name, n in self.at_peak.items() if n]
        low, high = self.overhead
        lines = [
            table(["at the peak", "size", "share"], [*rows, ["together", size(self.peak), "100.0%"]], "size share"),
            "",
            f"{self.method} on {self.device}: trains {self.trainable:,} of {count(self.total, 'parameter')}",
            f"highest in the {self.largest}; between steps {size(self.steady)}",
        ]
        if high:
            lines.append(f"besides tensors: {size(low)} to {size(high)} (context, workspace, fragments)")
        if self.attention:
            lines.append("attention: " + ", ".join(f"{name} {n}×" for name, n in sorted(self.attention.items())))
        return "\n".join(lines)


def estimate(
    build: nn.Module | Callable[[], nn.Module],
    method: str | Method | Rules | None = "lora",
    inputs: Any = None,
    *,
    targets: Selector | Sequence[Selector] | None = None,
    exclude: Selector | Sequence[Selector] | None = None,
    loss: Callable[[Any], Tensor] | None = None,
    optimizer: str | Callable[[list[dict[str, Any]]], torch.optim.Optimizer] = "adamw",
    dtype: torch.dtype | None = None,
    checkpointing: bool | Selector | Sequence[Selector] = False,
    attention: str = "auto",
    autocast: torch.dtype | None = None,
    device: str = "cuda",
    **hyperparameters: Any,
) -> Estimate:
    """The memory of a training step, by category. Neither the model nor the memory need be there.

    The step is forward, loss, backward, `optimizer.step()` and `zero_grad()`, with the optimizer's state already there.
    It runs on the meta device: shapes are computed, and no values.

    Args:
        build: a function that makes the model, or a model; of that only the shapes are read.
        method: as in `wrap`; None trains the model as it is.
        inputs: what the model is called with: a dict (keyword arguments), a tuple (positional ones) or one value, in
            which a tensor, or a pair of a shape and a dtype, stands for a tensor; or a function that gives that.
        targets: as in `wrap`.
        exclude: as in `wrap`.
        loss: from the model's output to the loss; by default its `loss`, and without one the mean of every output.
        optimizer: `"adamw"`, `"adam"`, `"sgd"`, `"sgd-momentum"`, or a function of `param_groups`.
        dtype: the model is cast to it before it is wrapped.
        checkpointing: run parts again in backward: True for the model's own way, or every layer of its lists of
            layers; or a selector of the modules.
        attention: `"auto"` is the kernel that torch takes on the device; or `"flash"`, `"efficient"`, `"math"` where
            that one can serve a call.
        autocast: run forward and loss under autocast with this dtype.
        device: `"cuda"`: multi-tensor optimizers, storages in blocks of 512 bytes, and an overhead; or `"cpu"`.
        **hyperparameters: fields of the method, when it is given by name.

    Raises what `wrap` raises, and `PeftkitError` for an argument that is none of these, and for a model that cannot be
    run without values.

    >>> import torch, peftkit
    >>> def build():
    ...     return torch.nn.Sequential(torch.nn.Linear(4096, 4096), torch.nn.ReLU(), torch.nn.Linear(4096, 10))
    >>> found = peftkit.estimate(build, "lora", ((8, 4096), torch.float32), rank=4)
    >>> found.trainable, found.at_peak["optimizer"], found.fits("2GB")
    (32768, 262144, True)
    """
    step = Step(
        build, method, targets=targets, exclude=exclude, loss=loss, optimizer=optimizer, dtype=dtype,
        checkpointing=checkpointing, attention=attention, autocast=autocast, device=device, **hyperparameters,
    )  # fmt: skip
    return step.estimate(inputs() if callable(inputs) else inputs)


class Step:
    """A model, wrapped and with an optimizer, on the meta device: what `estimate` runs, on one batch or on several."""

    def __init__(
        self,
        build: nn.Module | Callable[[], nn.Module],
        method: str | Method | Rules | None,
        *,
        targets: Any = None,
        exclude: Any = None,
        loss: Callable[[Any], Tensor] | None = None,
        optimizer: str | Callable[[list[dict[str, Any]]], torch.optim.Optimizer] = "adamw",
        dtype: torch.dtype | None = None,
        checkpointing: bool | Selector | Sequence[Selector] = False,
        attention: str = "auto",
        autocast: torch.dtype | None = None,
        device: str = "cuda",
        **hyperparameters: Any,
    ) -> None:
        _choose("attention", attention, ATTENTION)
        _choose("device", device, DEVICES)
        if not callable(optimizer):
            _choose("optimizer", optimizer, OPTIMIZERS, "or a function of parameter groups")
        self.loss, self.attention, self.autocast, self.device = loss, attention, autocast, device
        self.model = model_on_meta(build)
        if dtype is not None:
            self.model = self.model.to(dtype)
        if method is not None:
            self.model = wrap(self.model, method, targets=targets, exclude=exclude, **hyperparameters)
        self.method = "the model as it is" if method is None else _named(method, hyperparameters)
        self.model.train()
        if checkpointing:
            checkpoint_blocks(self.model, checkpointing)
        self.optimizer = self._optimizer(optimizer)

    def estimate(self, inputs: Any) -> Estimate:
        """The figures of one step on this batch."""
        batch = inputs_on_meta(inputs)
        taken: dict[str, int] = {}
        ledger = self._ledger()
        with kernels_of(self.device, self.attention, taken), autocasting(self.device, self.autocast) as cast, ledger:
            ledger.count(batch)
            self._run(batch, cast)
        parameters = list(self.model.parameters())
        return Estimate(
            peak=ledger.peak,
            at_peak=ledger.at_peak,
            steady=sum(ledger.now.values()),
            largest=ledger.moment,
            overhead=_overhead(self.device, ledger.peak),
            trainable=sum(p.numel() for p in parameters if p.requires_grad),
            total=sum(p.numel() for p in parameters),
            method=self.method,
            device=self.device,
            attention=taken,
        )

    def _run(self, batch: Any, cast: Any) -> None:
        try:
            with torch.device("meta"), cast():
                output = _call(self.model, batch)
                value = _loss(output) if self.loss is None else self.loss(output)
        except NotImplementedError as error:  # an operation whose result depends on values: nonzero, unique
            raise PeftkitError(
                f"the model cannot be run without values: {str(error).strip().partition(chr(10))[0]} Measure a real "
                "step instead, with peftkit.memory.Ledger"
            ) from error
        del output
        if self.optimizer is not None:
            torch.autograd.backward(value)
            del value
            self.optimizer.step()
            self.optimizer.zero_grad()

    def _ledger(self) -> MetaLedger:
        """On CUDA some tensors stay on the CPU (a step's number, a generator's state) and are none of its memory."""
        devices = ("meta", "cpu") if self.device == "cpu" else ("meta",)
        return MetaLedger(self.model, self.optimizer, devices=devices, block=512 if self.device == "cuda" else 1)

    def _optimizer(self, optimizer: Any) -> torch.optim.Optimizer | None:
        """The optimizer after its first step, so that its state is there; None where nothing trains."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        if not trained:
            return None
        groups = param_groups(self.model, lr=1e-3) if record(self.model) else [{"params": trained, "lr": 1e-3}]
        if callable(optimizer):
            made: torch.optim.Optimizer = optimizer(groups)
        else:
            kind, options = OPTIMIZERS[optimizer]
            made = kind(groups, foreach=self.device == "cuda", **options)
        for p in trained:
            p.grad = torch.empty_like(p)
        self.optimizer = None
        with self._ledger():
            made.step()
        made.zero_grad()
        return made


def nbytes_of(budget: int | str) -> int:
    """A number of bytes, or text such as `"24GB"` (10^9 bytes each) and `"24GiB"` (2^30).

    >>> nbytes_of("24GB"), nbytes_of("1.5 MiB")
    (24000000000, 1572864)
    """
    if isinstance(budget, int):
        return budget
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", budget)
    if not found or found[2].upper() not in _UNITS:
        raise PeftkitError(f"a budget is a number of bytes or text such as '24GB' or '16GiB', got {budget!r}")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if type(batch) in (tuple, list) else model(batch)


def _loss(output: Any) -> Tensor:
    found = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(found, Tensor):
        return found
    means = [leaf.mean() for leaf in leaves(output)]
    if not means:
        raise PeftkitError("the model's output holds no floating point tensor to train on; give loss=")
    return sum(means[1:], means[0])


def _named(method: str | Method | Rules, hyperparameters: Mapping[str, Any]) -> str:
    if isinstance(method, Mapping):
        return ", ".join(f"{selector} → {each}" for selector, each in method.items())
    fields = ", ".join(f"{name}={value!r}" for name, value in hyperparameters.items())
    return f"{method}({fields})" if fields else str(method)


def _choose(name: str, given: Any, known: Any, beyond: str = "") -> None:
    if given not in known:
        hint = did_you_mean(str(given), known)
        raise PeftkitError(f"{name} must be {', '.join(known)} {beyond}".rstrip() + f", got {given!r}{hint}")


def _overhead(device: str, peak: int) -> tuple[int, int]:
    if device != "cuda":
        return 0, 0
    return _CONTEXT[0] + _WORKSPACE[0], _CONTEXT[1] + _WORKSPACE[1] + int(peak * _FRAGMENTS)
