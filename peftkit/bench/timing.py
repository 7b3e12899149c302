"""How long things take: raw samples in seconds, the compared ones taken in turn in one process.

Rows are `[a, b, b, a]`: a machine that slows down steadily slows both alike, and the ratio of a row is free of it.
Garbage is collected before and not during; on a GPU every clock is read when its work is done.
"""

import contextlib
import copy
import gc
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import peftkit
from peftkit.bench.subject import Subject
from peftkit.errors import FileError, UnsupportedLayerError

WARM_UP = 3
"""Rows that are run and thrown away before any is kept."""

FEWEST = 5
"""Rows that are kept even if they take longer than they should."""


def measured(subject: Subject, report: Callable[[dict[str, Any]], None], *, pairs: int, seconds: float) -> None:
    """Measure it all, handing out each list of samples as soon as it is there.

    `pairs` is the number of rows; there are fewer, but at least `FEWEST`, where a comparison has taken `seconds`.
    """
    clock = Clock(subject.device, pairs, seconds)
    with _no_garbage():
        _training(subject, clock, report)
        _inference(subject, clock, report)
        _handling(subject, clock, report)


class Clock:
    """Takes samples on one device."""

    def __init__(self, device: torch.device, pairs: int, seconds: float) -> None:
        self.device = device
        self.pairs = pairs
        self.seconds = seconds

    def time(self, call: Callable[[], object]) -> float:
        """Seconds of one call."""
        self._wait()
        start = time.perf_counter()
        call()
        self._wait()
        return time.perf_counter() - start

    def rows(self, a: Callable[[], object], b: Callable[[], object]) -> list[list[float]]:
        """Rows `[a, b, b, a]`, after warming up."""
        for _ in range(min(WARM_UP, self.pairs)):
            self._row(a, b)
        rows: list[list[float]] = []
        start = time.perf_counter()
        while len(rows) < self.pairs and not self._late(start, len(rows)):
            rows.append(self._row(a, b))
        return rows

    def samples(self, call: Callable[[], float]) -> list[float]:
        """What `call` returns, once to warm up and then as often as there are pairs, but ten times at most."""
        call()
        samples: list[float] = []
        start = time.perf_counter()
        while len(samples) < min(self.pairs, 10) and not self._late(start, len(samples)):
            samples.append(call())
        return samples

    def _row(self, a: Callable[[], object], b: Callable[[], object]) -> list[float]:
        return [self.time(call) for call in (a, b, b, a)]

    def _late(self, start: float, done: int) -> bool:
        return done >= FEWEST and time.perf_counter() - start > self.seconds

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


# ------------------------------------------------------------------------------------------ what is timed


def _training(subject: Subject, clock: Clock, report: Callable[[dict[str, Any]], None]) -> None:
    """The training step beside that of full fine-tuning, and its parts."""
    batch = subject.batch()
    model = subject.wrapped()
    step = _stepper(subject, model, batch)
    full = Subject(subject.workload, peftkit.Full(), subject.device)
    try:
        baseline = _stepper(full, full.wrapped(), batch)
        report({"step_pairs": clock.rows(baseline, step)})
        del baseline
    except (torch.OutOfMemoryError, MemoryError):  # what the method is there for: it has no baseline here
        report({"step_pairs": None})
    report(_parts(subject, clock, model, batch))


def _stepper(subject: Subject, model: nn.Module, batch: Any) -> Callable[[], object]:
    optimizer = subject.optimizer(model)
    return lambda: subject.step(model, optimizer, batch)


def _parts(subject: Subject, clock: Clock, model: nn.Module, batch: Any) -> dict[str, list[float] | None]:
    """Forward, backward and optimizer, each for itself."""
    optimizer = subject.optimizer(model)
    parts: dict[str, list[float]] = {"forward": [], "backward": [], "optimizer": []}

    def run() -> float:
        losses: list[torch.Tensor] = []
        parts["forward"].append(clock.time(lambda: losses.append(subject.workload.loss(model, batch))))
        if optimizer is not None:
            parts["backward"].append(clock.time(losses[0].backward))
            parts["optimizer"].append(clock.time(lambda: (optimizer.step(), optimizer.zero_grad())))
        return 0.0

    clock.samples(run)
    return {name: samples[1:] or None for name, samples in parts.items()}  # the first is for warming up


def _inference(subject: Subject, clock: Clock, report: Callable[[dict[str, Any]], None]) -> None:
    """The forward without gradients, before and after merging, beside the base's own."""
    batch = subject.batch()
    base, model = subject.base().eval(), subject.wrapped().eval()

    def run(chosen: nn.Module) -> Callable[[], object]:
        return lambda: subject.workload.output(chosen, batch)

    with torch.no_grad():
        report({"inference_pairs": clock.rows(run(base), run(model))})
        with contextlib.suppress(UnsupportedLayerError):
            peftkit.merge(model)
            report({"merged_pairs": clock.rows(run(base), run(model))})


def _handling(subject: Subject, clock: Clock, report: Callable[[dict[str, Any]], None]) -> None:
    """Wrapping, saving, loading, merging and unmerging. Each time on a base that was not wrapped before."""
    base = subject.base()

    def fresh() -> nn.Module:
        gc.collect()  # a model that is no longer used may hold on to itself
        return copy.deepcopy(base)

    rules, data = subject.rules(), subject.data(base)

    def wrapping() -> float:
        model = fresh()
        return clock.time(lambda: peftkit.wrap(model, rules, data=data))

    report({"wrap": clock.samples(wrapping)})
    model = subject.wrap(fresh())
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(FileError):
        path = Path(folder, "adapter.safetensors")
        report({"save": clock.samples(lambda: clock.time(lambda: peftkit.save(model, path)))})

        def loading() -> float:
            target = fresh()
            return clock.time(lambda: peftkit.load(target, path))

        report({"load": clock.samples(loading)})
    unmerging: list[float] = []

    def merging() -> float:
        taken = clock.time(lambda: peftkit.merge(model))
        unmerging.append(clock.time(lambda: peftkit.unmerge(model)))
        return taken

    with contextlib.suppress(UnsupportedLayerError):
        report({"merge": clock.samples(merging), "unmerge": unmerging[1:]})


@contextlib.contextmanager
def _no_garbage() -> Iterator[None]:
    gc.collect()
    gc.freeze()  # what is there already need not be looked at again, so that collecting in between is quick
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()
        gc.collect()
