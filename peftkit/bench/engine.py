"""Runs workloads × methods, each cell in a process of its own, and keeps the document complete on the way.

* The document has every cell from the start, as "not run", and is replaced after each: an interrupt leaves a readable
  one, from which `resume` goes on.
* A cell that crashes, is killed, hangs or runs out of memory is a row that says so. The rest go on.
"""

import datetime as dt
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import peftkit
from peftkit import plugins
from peftkit.bench import document as documents
from peftkit.bench.derived import derived
from peftkit.bench.environment import environment, load
from peftkit.bench.process import Run, without_folders
from peftkit.errors import FieldError

PHASES = ("exact", "speed", "quality")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One row that is asked for: a method with hyperparameters."""

    method: str
    fields: tuple[tuple[str, Any], ...] = ()

    @property
    def label(self) -> str:
        """The method's name and the fields that were given: `lora rank=16`."""
        return " ".join([self.method, *(f"{name}={value}" for name, value in self.fields)])


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How each cell is measured. A cell of an earlier document is reused only if all of these are the same, but for the
    phases, which may be fewer there.
    """

    device: str = "cpu"
    phases: tuple[str, ...] = PHASES[:2]
    pairs: int = 20
    """Rows `[a, b, b, a]` of each comparison of times."""
    seconds: float = 60.0
    """How long one comparison may take before it ends with fewer rows."""
    seeds: tuple[int, ...] = (0, 1, 2)
    threads: int = 0
    """Of torch; 0 leaves it to torch."""
    timeout: float = 3600.0
    """Seconds after which a cell is given up."""

    def __post_init__(self) -> None:
        """Refuse what could only fail later."""
        unknown = set(self.phases) - set(PHASES)
        if unknown or not self.phases:
            raise FieldError(f"phases are {', '.join(PHASES)}; got {', '.join(sorted(unknown)) or 'none'}")
        if self.pairs < 1:
            raise FieldError(f"pairs must be a whole number of at least 1, got {self.pairs}")
        if "quality" in self.phases and len(set(self.seeds)) < 2:
            raise FieldError(f"an interval over seeds needs at least two of them, got {list(self.seeds)}")

    def as_json(self) -> dict[str, Any]:
        """As the document has them."""
        found = {**asdict(self), "quality": "quality" in self.phases}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}


@dataclass(frozen=True)
class Progress:
    """What is told before and after each cell."""

    workload: str
    label: str
    """Empty while the workload is prepared."""
    done: int
    """Cells that are finished, reused ones too."""
    total: int
    seconds_left: float | None
    """As the finished cells let expect; None before any."""
    cell: Mapping[str, Any] | None
    """The finished cell; None before it."""
    reused: bool = False


def run(
    entries: Sequence[Entry],
    workloads: Sequence[str],
    settings: Settings,
    *,
    out: Path,
    command: Sequence[str],
    earlier: Mapping[str, Any] | None = None,
    tell: Callable[[Progress], None] = lambda _: None,
) -> Mapping[str, Any]:
    """Measure every entry on every workload, and return the document, which is also at `out` after each cell.

    `earlier` is a document whose finished cells are taken over, if settings, versions, machine and base model are the
    same. Of a cell that was measured in fewer phases, the others are added: times on a quiet machine, then quality.
    """
    return _Engine(entries, workloads, settings, out, command, earlier, tell).run()


class _Engine:
    def __init__(
        self,
        entries: Sequence[Entry],
        workloads: Sequence[str],
        settings: Settings,
        out: Path,
        command: Sequence[str],
        earlier: Mapping[str, Any] | None,
        tell: Callable[[Progress], None],
    ) -> None:
        self.entries, self.settings, self.out, self.tell = entries, settings, out, tell
        self.owners = {info.name: f"{info.package} {info.version}" for info in peftkit.methods()}
        origins = {info.name: f"{info.package} {info.version}" for info in plugins.workloads()}
        threads = settings.threads or torch.get_num_threads()
        self.document: dict[str, Any] = {
            "schema": documents.SCHEMA,
            "created": dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "command": list(command),
            "settings": {
                "methods": [entry.label for entry in entries],
                "workloads": list(workloads),
                **settings.as_json(),
            },
            "environment": environment(settings.device, threads),
            "workloads": [_workload(name, origins.get(name)) for name in workloads],
            "cells": [_cell(name, entry, self.owners.get(entry.method, "")) for name in workloads for entry in entries],
        }
        self.job = {**settings.as_json(), "threads": threads}
        self.earlier = earlier if earlier is not None and _same_conditions(earlier, self.document) else None
        self._keep_earlier()
        self.taken: dict[str, list[float]] = {name: [] for name in workloads}
        self.done = 0

    def run(self) -> Mapping[str, Any]:
        self._write()
        for entry in self.document["workloads"]:
            cells = [cell for cell in self.document["cells"] if cell["workload"] == entry["name"]]
            self._workload(entry, cells)
        return self.document

    def _keep_earlier(self) -> None:
        """What an earlier document has stays in this one till its turn comes: an interrupt loses nothing."""
        if self.earlier is None:
            return
        workloads = {entry["name"]: entry for entry in self.earlier["workloads"]}
        for entry in self.document["workloads"]:
            entry.update(workloads.get(entry["name"], {}))
        cells = {_identity(cell): cell for cell in self.earlier["cells"]}
        for cell in self.document["cells"]:
            cell.update(cells.get(_identity(cell), {}))

    def _workload(self, facts: dict[str, Any], cells: Sequence[dict[str, Any]]) -> None:
        """Describe a workload, then measure its cells; all of them are "not run" where it cannot be had."""
        self.tell(Progress(facts["name"], "", self.done, len(self.document["cells"]), self._seconds_left(), None))
        described = self._process({"workload": facts["name"]})
        facts.update({k: v for k, v in (described.get("facts") or {}).items() if k in facts})
        for entry, cell in zip(self.entries, cells, strict=True):
            reused = self._earlier(facts, cell)
            missing = [phase for phase in self.settings.phases if _lacks(reused, phase, facts)]
            self._tell(cell, finished=None)
            if described["status"] != "ok":
                cell.update(status="not run", error=described["error"])
            else:
                cell.update(_empty() if reused is None else reused)
                if missing:
                    self._measure(facts, entry, cell, missing)
            self.done += 1
            self._write()
            self._tell(cell, finished=cell, reused=not missing)

    def _measure(self, facts: Mapping[str, Any], entry: Entry, cell: dict[str, Any], phases: Sequence[str]) -> None:
        what = {"workload": facts["name"], "method": entry.method, "fields": dict(entry.fields)}
        job = {**what, "phases": list(phases)}
        found = self._process(job)
        self.taken[facts["name"]].append(found["seconds"])
        for name in ("status", "error", "hyperparameters", "exact", "times", "quality"):
            if found.get(name) is not None:
                cell[name] = found[name]
        cell["error"] = found.get("error")
        if cell["times"] is not None:
            cell["derived"] = derived(cell["times"], facts["per_step"])

    def _process(self, job: Mapping[str, Any]) -> dict[str, Any]:
        with Run({**self.job, **job}) as process:
            found = process.result(self.settings.timeout)
        if found["error"]:
            found["error"]["message"] = without_folders(found["error"]["message"])
        return found

    def _earlier(self, facts: Mapping[str, Any], cell: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """The same cell of the earlier document, if it is finished and was measured on the same base model."""
        if self.earlier is None or not facts["fingerprint"]:
            return None
        same = [w for w in self.earlier["workloads"] if w["name"] == facts["name"]]
        if not same or any(same[0][key] != facts[key] for key in ("origin", "fingerprint", "data", "per_step")):
            return None
        found = [c for c in self.earlier["cells"] if _identity(c) == _identity(cell) and c["status"] == "ok"]
        return found[0] if found else None

    def _tell(self, cell: Mapping[str, Any], *, finished: Mapping[str, Any] | None, reused: bool = False) -> None:
        total = len(self.document["cells"])
        self.tell(Progress(cell["workload"], cell["label"], self.done, total, self._seconds_left(), finished, reused))

    def _seconds_left(self) -> float | None:
        """From the cells that have run: those of the same workload first, else any."""
        every = [seconds for taken in self.taken.values() for seconds in taken]
        if not every:
            return None
        left = 0.0
        for cell in self.document["cells"][self.done :]:
            taken = self.taken[cell["workload"]] or every
            left += sum(taken) / len(taken)
        return left

    def _write(self) -> None:
        self.document["environment"]["load_after"] = load()
        documents.write(self.out, self.document)


def _workload(name: str, origin: str | None) -> dict[str, Any]:
    empty = {"summary": "", "model": None, "parameters": None, "fingerprint": None, "data": None}
    return {"name": name, "origin": origin, **empty, "unit": "samples", "per_step": 0, "metric": None}


def _cell(workload: str, entry: Entry, origin: str) -> dict[str, Any]:
    return {
        "workload": workload,
        "method": entry.method,
        "label": entry.label,
        "hyperparameters": dict(entry.fields),
        "origin": origin,
        **_empty(),
    }


def _empty() -> dict[str, Any]:
    """What a cell is before it has been measured."""
    error = {"phase": "", "type": "", "message": "the run has not come to it; go on with --resume"}
    return {"status": "not run", "error": error, "exact": None, "times": None, "derived": None, "quality": None}


def _identity(cell: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a cell is about."""
    return tuple(cell[key] for key in ("workload", "label", "method", "origin"))


_SECTIONS = dict(zip(PHASES, ("exact", "times", "quality"), strict=True))


def _lacks(cell: Mapping[str, Any] | None, phase: str, facts: Mapping[str, Any]) -> bool:
    """Whether a finished cell has not been through a phase; on a workload without a task there is no quality."""
    if cell is not None and phase == "quality" and facts["metric"] is None:
        return False
    return cell is None or cell[_SECTIONS[phase]] is None


def _same_conditions(earlier: Mapping[str, Any], document: Mapping[str, Any]) -> bool:
    """Whether cells of the earlier document may stand beside new ones: settings, versions, machine, code."""
    measured = [
        key for key in document["settings"] if key not in ("methods", "workloads", "timeout", "phases", "quality")
    ]
    where = ("machine", "threads", "gpu", "python", "torch", "torch_config", "packages", "git", "variables")
    return all(earlier["settings"].get(key) == document["settings"][key] for key in measured) and all(
        earlier["environment"][key] == document["environment"][key] for key in where
    )
