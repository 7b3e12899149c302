"""One cell in a process of its own: `python -m peftkit.bench.worker JOB RESULT`, both JSON files.

What has been measured is in RESULT at any moment, so that a crash loses only what came after it. Whatever a method, a
model or a plugin does here, the engine lives on.
"""

import hashlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peftkit import plugins
from peftkit.bench import exact, quality, timing
from peftkit.bench.subject import Subject, workload_named
from peftkit.discovery import told
from peftkit.errors import SelectorError, UnsupportedLayerError
from peftkit.workload import Workload

Report = Callable[[dict[str, Any]], None]


def main(job: Path, result: Path) -> None:
    """Do what the job says, and write down what came of it."""
    asked = json.loads(job.read_text(encoding="utf-8"))
    if asked["threads"]:
        torch.set_num_threads(asked["threads"])
    notes = Notes(result)
    try:
        if "method" in asked:
            _measure(asked, notes)
        else:
            _describe(asked, notes)
        notes.write(status="ok", phase=None)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a plugin may raise anything; its row says what
        failure = {"phase": notes.found["phase"], "type": type(error).__name__, "message": told(error)}
        notes.write(status=status_of(error, notes.found["phase"]), error=failure)


class Notes:
    """What is known so far, in a file that is replaced at every change."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, Any] = {"status": None, "error": None, "phase": "start"}

    def write(self, **changes: Any) -> None:
        """Note something, and keep it."""
        self.found.update(changes)
        sibling = self.path.with_suffix(".new")
        sibling.write_text(json.dumps(self.found), encoding="utf-8")
        sibling.replace(self.path)

    def section(self, name: str) -> Report:
        """A function that adds figures to one section."""

        def report(figures: dict[str, Any]) -> None:
            self.write(**{name: {**(self.found.get(name) or {}), **figures}})

        return report


def status_of(error: BaseException, phase: str) -> str:
    """The status of a cell that has ended in this error.

    >>> status_of(MemoryError(), "speed"), status_of(KeyError(), "speed")
    ('out of memory', 'failed')
    """
    if phase == "wrap" and isinstance(error, (SelectorError, UnsupportedLayerError)):
        return "not applicable"
    no_memory_on_cpu = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or no_memory_on_cpu:
        return "out of memory"
    return "failed"


def _describe(job: dict[str, Any], notes: Notes) -> None:
    """What a workload is, once it has fetched what it needs."""
    notes.write(phase="load")
    workload = workload_named(job["workload"])
    notes.write(facts=_declared(workload))
    notes.write(phase="prepare")
    workload.prepare()
    notes.write(phase="model")
    torch.manual_seed(0)
    model = workload.model()
    notes.write(facts={**_declared(workload), **_built(workload, model)})


def _declared(workload: Workload) -> dict[str, Any]:
    metric = workload.metric
    found: dict[str, Any] = {
        "summary": workload.summary,
        "unit": workload.unit,
        "metric": None,
        "slow": workload.slow,
    }
    if metric is not None and workload.steps:
        names = ("name", "unit", "higher_is_better", "items")
        found["metric"] = {name: getattr(metric, name) for name in names}
    return found


def _built(workload: Workload, model: nn.Module) -> dict[str, Any]:
    return {
        "model": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "fingerprint": fingerprint(model),
        "data": workload.data(),
        "per_step": workload.per_step,
    }


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of every tensor of a model: name, type, shape and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _measure(job: dict[str, Any], notes: Notes) -> None:
    notes.write(phase="load")
    workload = workload_named(job["workload"])
    method = plugins.method(job["method"])(**job["fields"])
    workload.prepare()
    subject = Subject(workload, method, torch.device(job["device"]))
    notes.write(hyperparameters=subject.rules_as_json(), phase="wrap")
    subject.wrapped()
    if "exact" in job["phases"]:
        notes.write(phase="exact")
        exact.measured(subject, notes.section("exact"))
    if "speed" in job["phases"]:
        notes.write(phase="speed")
        timing.measured(subject, notes.section("times"), pairs=job["pairs"], seconds=job["seconds"])
    if "quality" in job["phases"] and workload.steps:
        notes.write(phase="quality")
        quality.measured(subject, job["seeds"], notes.section("quality"))


def leave_with_parent() -> None:
    """End this process soon after the one that has started it, however that one ends."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("asked to end"))  # so that temporary folders are put away


if __name__ == "__main__":
    leave_with_parent()
    main(Path(sys.argv[1]), Path(sys.argv[2]))
