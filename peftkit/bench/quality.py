"""What is learned: the task's metric over seeds, with the learning rate chosen on other items than those tested.

The rate is the best of a grid on the validation split, with one seed; then each seed trains anew and is tested on the
test split. No method is favoured by a rate that its author, or we, happened to know.
"""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from peftkit.bench.statistics import Interval, seeds_interval
from peftkit.bench.subject import Subject, evaluating
from peftkit.errors import WorkloadError
from peftkit.workload import Metric, Split

LEARNING_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
CHOOSING_SEED = 1_000
"""Of the runs that choose the learning rate; none of those that are reported has it."""

WARM_UP = 0.1
"""Share of the steps in which the learning rate rises to its full value, from which it then falls to 0."""


def measured(
    subject: Subject,
    seeds: Sequence[int],
    report: Callable[[dict[str, Any]], None],
    *,
    rates: Sequence[float] = LEARNING_RATES,
) -> None:
    """Choose a learning rate, train with each seed, test. Nothing is reported for a workload without a task."""
    workload, metric = subject.workload, subject.workload.metric
    if metric is None:
        return
    model = subject.wrapped()
    before = _evaluate(subject, model, "test")
    remembered = _forgetting(subject, subject.base())
    trains = any(p.requires_grad for p in model.parameters())
    del model
    rate = _best_rate(subject, metric, rates) if trains else rates[0]
    values, forgotten, taken = [], [], []
    for seed in seeds:
        start = time.perf_counter()
        trained = _trained(subject, rate, seed)
        taken.append(time.perf_counter() - start)
        values.append(_evaluate(subject, trained, "test"))
        forgotten.append(_forgetting(subject, trained))
        del trained
    share_of = metric.items if metric.unit == "%" else None
    found = {"seeds": list(seeds), "values": values, **_interval(seeds_interval(values, share_of, 100.0))}
    found |= {"before": before, "learning_rate": rate, "steps": workload.steps, "train_seconds": taken}
    if remembered is not None:
        after = [value for value in forgotten if value is not None]
        interval = _interval(seeds_interval(after))
        found["forgetting"] = {"name": workload.forgets, "before": remembered, "values": after, **interval}
    report(found)


def _best_rate(subject: Subject, metric: Metric, rates: Sequence[float]) -> float:
    """The rate with the best value on the validation split; the smaller of two that are equal."""
    sign = 1 if metric.higher_is_better else -1
    scores = {rate: _validated(subject, rate) for rate in sorted(rates)}
    finite = {rate: sign * score for rate, score in scores.items() if score is not None}
    if not finite:
        raise WorkloadError(f"training diverged at every learning rate of {', '.join(map(str, rates))}")
    return max(finite, key=lambda rate: finite[rate])


def _validated(subject: Subject, rate: float) -> float | None:
    """The metric on the validation split; None where training diverged."""
    value = _evaluate(subject, _trained(subject, rate, CHOOSING_SEED), "validation", strict=False)
    return value if math.isfinite(value) else None


def _trained(subject: Subject, rate: float, seed: int) -> nn.Module:
    """A new base, wrapped and trained: AdamW, a short rise and a linear fall of the learning rate."""
    model = subject.wrapped(seed)
    optimizer = subject.optimizer(model, rate)
    if optimizer is None:
        return model
    steps = subject.workload.steps
    rise = max(1, round(WARM_UP * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / rise, (steps - step) / max(1, steps - rise))
    )
    for _, batch in zip(range(steps), subject.batches(seed), strict=False):
        subject.step(model, optimizer, batch)
        schedule.step()
    return model


def _evaluate(subject: Subject, model: nn.Module, split: Split, *, strict: bool = True) -> float:
    with evaluating(model):
        value = float(subject.workload.evaluate(model, split))
    if strict and not math.isfinite(value):
        raise WorkloadError(f"the {split} value is {value}: training has diverged")
    return value


def _forgetting(subject: Subject, model: nn.Module) -> float | None:
    if not subject.workload.forgets:
        return None
    with evaluating(model):
        return float(subject.workload.forgetting(model))


def _interval(found: Interval) -> dict[str, float]:
    return {"mean": found.middle, "low": found.low, "high": found.high}
