"""What is the same in every run: parameters, memory by category, FLOPs, file size, and how exact a merge is."""

import contextlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import peftkit
from peftkit.bench.flops import FORMULAS
from peftkit.bench.subject import Subject, evaluating
from peftkit.dry_run import inputs_on_meta
from peftkit.errors import FileError, UnsupportedLayerError
from peftkit.estimating import estimate
from peftkit.memory import Ledger
from peftkit.workload import Workload

WARM_UP = 2
"""Steps before memory is measured, after which the optimizer has its state and every cache is filled."""

NUDGE = 0.02
"""Standard deviation of the noise that stands for training before merged outputs are compared."""


def measured(subject: Subject, report: Callable[[dict[str, Any]], None]) -> None:
    """Measure it all, handing out each figure as soon as it is there."""
    _as_wrapped(subject, report)
    batch = subject.batch()
    _in_training(subject, batch, report)
    report({"estimated_memory": estimated(subject, batch)})


def _as_wrapped(subject: Subject, report: Callable[[dict[str, Any]], None]) -> None:
    model = subject.wrapped()
    summary = peftkit.summary(model)
    report({
        "trainable_parameters": summary.trainable,
        "total_parameters": summary.total,
        "adapted_layers": max((adapter.layers for adapter in summary.adapters), default=0),
        "adapter_file_bytes": file_size(model),
    })  # fmt: skip
    report({"merge_error": merge_error(subject, model)})


def _in_training(subject: Subject, batch: Any, report: Callable[[dict[str, Any]], None]) -> None:
    model = subject.wrapped()
    optimizer = subject.optimizer(model)

    def step() -> None:
        subject.step(model, optimizer, batch)

    for _ in range(WARM_UP):
        step()
    if subject.device.type == "cuda":
        report(gpu_peaks(step))
    report({"memory": memory(model, optimizer, step)})
    forward, backward = flops(subject, model, batch)
    report({"forward_flops": forward, "backward_flops": backward})


def file_size(model: nn.Module) -> int | None:
    """Bytes of the adapter's file; None where there is nothing to save."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "adapter.safetensors")
        try:
            peftkit.save(model, path)
        except FileError:
            return None
        return path.stat().st_size


def memory(model: nn.Module, optimizer: torch.optim.Optimizer | None, step: Callable[[], object]) -> dict[str, int]:
    """Bytes by category at the highest moment of one training step, and their sum."""
    with Ledger(model, optimizer) as ledger:
        step()
    return {**ledger.at_peak, "peak": ledger.peak}


def estimated(subject: Subject, batch: Any) -> dict[str, int] | None:
    """The same, as `peftkit.estimate` tells it without a training step; None where it cannot."""
    workload, on_meta = subject.workload, inputs_on_meta(batch)
    try:
        args, kwargs = _arguments(workload, on_meta)
        found = estimate(
            workload.model,
            subject.rules(),
            inputs=kwargs or args,
            loss=lambda output: workload.loss(_Answer(output), on_meta),
            device=subject.device.type,
        )
    except Exception:  # noqa: BLE001 - a model or method may do on meta what it likes; what was measured stays
        return None
    return {**found.at_peak, "peak": found.peak}


class _Answer(nn.Module):
    """Stands for a model that has run: whatever it is asked, it gives the same output."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((args, kwargs))
        if isinstance(self.output, Exception):
            raise self.output
        return self.output


def _arguments(workload: Workload, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a workload's loss calls the model with."""
    asked = _Answer(_Asked())
    with contextlib.suppress(_Asked):
        workload.loss(asked, batch)
    return asked.calls[0]


class _Asked(Exception):  # noqa: N818 - not a fault: the model was called, and that is all there is to know
    pass


def gpu_peaks(step: Callable[[], object]) -> dict[str, int]:
    """What CUDA's allocator says of one step."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return {
        "gpu_peak_allocated": torch.cuda.max_memory_allocated(),
        "gpu_peak_reserved": torch.cuda.max_memory_reserved(),
    }


def flops(subject: Subject, model: nn.Module, batch: Any) -> tuple[int, int]:
    """Floating point operations of one forward and one backward. What has no formula counts 0: all but products."""
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        loss = subject.workload.loss(model, batch)
        forward = counter.get_total_flops()
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]
    model.zero_grad()
    return forward, counter.get_total_flops() - forward


def merge_error(subject: Subject, model: nn.Module) -> float | None:
    """The largest difference of an output, merged against unmerged; None for what cannot be merged.

    A new adapter often changes nothing, and nothing is folded without an error. So every trained value is first moved
    by normal noise, the same in every run.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(NUDGE * torch.randn(p.shape, generator=generator).to(p))
    batch = subject.batch()
    with evaluating(model):
        unmerged = subject.workload.output(model, batch)
        try:
            peftkit.merge(model)
        except UnsupportedLayerError:
            return None
        merged = subject.workload.output(model, batch)
    return _largest_difference(merged, unmerged)


def _largest_difference(a: Tensor, b: Tensor) -> float | None:
    difference = (a.double() - b.double()).abs().max().item()
    return difference if difference < float("inf") else None
