"""What a session of races found: a JSON document with every sample, and a Markdown page for people.

A figure's verdict comes from its interval: `met` if all of it is within the target, `missed` if all of it is beyond,
and `open` if the target lies inside, where this run cannot tell. Neither document names a host, a user or a path.
"""

import datetime as dt
import importlib.metadata
import json
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

SCHEMA = "peftkit.races/1"
PACKAGES = ["peftkit", "torch", "transformers", "peft", "loralib", "lycoris-lora", "pytest-benchmark"]
GROUPS = {
    "step": "A LoRA training step ÷ the same model frozen",
    "methods": "Other methods",
    "layer": "One linear layer, forward and backward ÷ the layer frozen",
    "inference": "Inference ÷ the base",
    "routed": "One batch, several adapters ÷ the same with one",
    "around": "Work around the step",
    "growth": "Growth with the number of adapters",
    "scaling": "Scaling: the fp32 step ÷ its floor, one size changed at a time",
    "gpu": "On a GPU: a training step of a 1B decoder, bf16, 2,048 tokens ÷ the same model frozen",
}
HOW_TO_READ = (
    "A figure is the median of the ratios of pairs of rounds taken in turn, with its bootstrap 95 % interval. "
    "A target is *met* or *missed* where the whole interval, of five ratios or more, says "
    "so, and *open* otherwise. Allocator: glibc's "
    "default, and *tuned* so that it keeps the heap between steps."
)
FEWEST = 5
"""Ratios below which an interval says nothing."""

ORDER = ["peftkit", "by hand", "hf-peft", "loralib", "lycoris", "full"]


def machine(device: str = "cpu") -> str:
    """A short neutral label: the number of usable cores, or the GPU's model.

    >>> machine().startswith("cpu-")
    True
    """
    if device == "cpu":
        return f"cpu-{cores()}cores"
    name = torch.cuda.get_device_name()
    model = re.search(r"\b[A-Z]{1,3}\d{2,4}\b", name)
    return (model[0] if model else re.sub(r"\W+", "-", name)).lower()


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def environment(device: str) -> dict[str, Any]:
    """What a reader needs to judge the figures, and nothing that names the machine or its owner."""
    return {
        "machine": machine(device),
        "cpu": _cpu_model(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "system": platform.system(),
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "mkl": torch.backends.mkl.is_available(),
        "onednn": torch.backends.mkldnn.is_available(),
        "allocator": allocator(),
        "load": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
    }


def allocator() -> str:
    """`tuned` where an environment variable changes glibc's allocator, `default` otherwise."""
    return "tuned" if any(name.startswith("MALLOC_") for name in os.environ) else "default"


def document(records: list[dict[str, Any]], device: str) -> dict[str, Any]:
    """The whole session. A record is one side of one row under one allocator: `benchmarks/test_rows.py` makes it."""
    now = dt.datetime.now(tz=dt.UTC).replace(microsecond=0)
    return {
        "schema": SCHEMA,
        "created": now.isoformat(),
        "environment": environment(device),
        "records": records,
    }


def write(report: dict[str, Any], path: Path) -> None:
    """Write `path` as JSON, and the Markdown page beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(markdown(report), encoding="utf-8")


def default_path(folder: Path, device: str) -> Path:
    return folder / f"{machine(device)}-{dt.datetime.now(tz=dt.UTC).date()}.json"


def verdict(found: dict[str, Any], target: float | None) -> str:
    """`met`, `missed`, or `open` where the target lies inside the interval, or too few ratios make one.

    >>> [verdict({"interval": [low, low + 0.03], "count": 9}, 1.10) for low in (1.05, 1.08, 1.11)]
    ['met', 'open', 'missed']
    """
    if target is None:
        return ""
    if found["count"] < FEWEST:
        return "open"
    low, high = found["interval"]
    return "met" if high <= target else "missed" if low > target else "open"


# ------------------------------------------------------------------------------------------------- Markdown


def markdown(report: dict[str, Any]) -> str:
    """The page: one table of ratios a group, one of exact bytes, one of milliseconds."""
    env, records = report["environment"], report["records"]
    packages = ", ".join(f"{name} {version}" for name, version in env["packages"].items())
    parts = [
        f"# Races on {env['machine']}, {report['created'][:10]}",
        f"{env['gpu'] or env['cpu']}, {env['threads']} threads; Python {env['python']}; {packages}.",
        HOW_TO_READ,
    ]
    for group, title in GROUPS.items():
        chosen = [record for record in records if record["group"] == group]
        if chosen:
            parts += [f"## {title}", _times(chosen) if chosen[0]["unit"] == "seconds" else _ratios(chosen)]
    exact = [record for record in records if "saved_bytes" in record["exact"] and record["allocator"] == "default"]
    if exact:
        parts += [
            "## Kept for backward, MB; allocations in a step",
            "The same in every run. Parameters are left out.",
            _bytes(exact),
        ]
    noisy = [record for record in records if record["ratio"]["spread"] > 0.10]
    if noisy:
        parts.append(
            f"{len(noisy)} of {len(records)} figures have quartiles more than 10 % apart, so something else ran on "
            "this machine, or the work is too short: " + ", ".join(f"{r['row']} ({r['side']})" for r in noisy) + "."
        )
    return "\n\n".join(parts) + "\n"


def _by_row(records: list[dict[str, Any]]) -> list[dict[str, dict[str, Any]]]:
    """Records of a row under one allocator together, by side."""
    rows: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for record in records:
        rows.setdefault((record["row"], record["allocator"]), {})[record["side"]] = record
    return list(rows.values())


def _table(head: list[str], lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *lines])


def _ratios(records: list[dict[str, Any]]) -> str:
    sides = [side for side in ORDER if any(record["side"] == side for record in records)]
    base = "floor" if all(record["base"] == "floor" for record in records) else "base"
    lines = []
    for row in _by_row(records):
        any_side = next(iter(row.values()))
        cells = [_ratio(row.get(side)) for side in sides]
        lines.append([any_side["title"], any_side["allocator"], *cells, _target(row.get("peftkit"))])
    return _table(["", "allocator", *(f"{side} ÷ {base}" for side in sides), "target"], lines)


def _ratio(record: dict[str, Any] | None) -> str:
    if record is None:
        return "–"
    low, high = record["ratio"]["interval"]
    return f"{record['ratio']['median']:.3f} ({low:.3f} to {high:.3f})"


def _target(record: dict[str, Any] | None) -> str:
    if record is None or record["target"] is None:
        return "–"
    return f"≤ {record['target']:.2f} {verdict(record['ratio'], record['target'])}"


def _times(records: list[dict[str, Any]]) -> str:
    lines = []
    for record in records:
        side, base = record["seconds"], record["base_seconds"]
        judged = verdict(side, record["target"])
        own = f"{_ms(side['median'])} ({_ms(side['interval'][0])} to {_ms(side['interval'][1])})"
        lines.append(
            [record["title"], own, _ms(base["median"]), _ratio(record), f"≤ {_ms(record['target'])} {judged}".strip()]
        )
    base = records[0]["base"]
    return _table(["", "peftkit, ms", f"{base}, ms", f"peftkit ÷ {base}", "target, ms"], lines)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.2f}" if seconds < 0.01 else f"{seconds * 1e3:,.0f}"


def _bytes(records: list[dict[str, Any]]) -> str:
    sides = [side for side in ORDER if any(record["side"] == side for record in records)]
    base = "floor" if all(record["base"] in {"floor", "peftkit LoRA"} for record in records) else "base"
    lines = []
    for row in _by_row(records):
        any_side = next(iter(row.values()))
        cells = [_kept(any_side["base_exact"])] + [_kept(row[s]["exact"]) if s in row else "–" for s in sides]
        goal = any_side["exact_targets"].get("saved_bytes")
        own = row.get("peftkit", any_side)["exact"]["saved_bytes"]
        met = "" if goal is None else "met" if own <= goal else "missed"
        lines.append([any_side["title"], *cells, "–" if goal is None else f"≤ {goal / 1e6:.1f} {met}"])
    return _table(["", base, *sides, "target"], lines)


def _kept(exact: dict[str, float]) -> str:
    if "saved_bytes" not in exact:
        return "–"
    allocations = f"; {exact['allocations']:,}" if "allocations" in exact else ""
    return f"{exact['saved_bytes'] / 1e6:.1f}{allocations}"


# ---------------------------------------------------------------------------------------------- environment


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
