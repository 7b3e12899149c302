"""Where a benchmark has run: hardware, versions and settings that decide its figures. No host name, no path."""

import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

import peftkit
from peftkit import plugins
from peftkit.bench.process import VARIABLES

PREFIXES = (
    "MALLOC_",
    "OMP_",
    "MKL_",
    "KMP_",
    "GOMP_",
    "TORCH_",
    "PYTORCH_",
    "CUDA_",
    "CUBLAS_",
    "NVIDIA_TF32",
    "LD_PRELOAD",
)
"""Beginnings of the names of variables that change times or memory."""

PACKAGES = ("peftkit", "torch", "numpy", "safetensors", "pluggy", "transformers")


def environment(device: str, threads: int) -> dict[str, Any]:
    """The `environment` of a document; its last entry, the load afterwards, is filled in when the run ends."""
    found_gpu = gpu() if device == "cuda" else None
    cpu, cores, memory = _cpu(), os.cpu_count() or 1, _memory()
    return {
        "machine": machine(cpu, cores, memory, found_gpu),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": cpu,
        "cores": cores,
        "threads": threads,
        "memory_bytes": memory,
        "gpu": found_gpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_config": torch.__config__.show(),
        "packages": _packages(),
        "plugins": [{"method": m.name, "distribution": m.package, "version": m.version} for m in peftkit.methods()],
        "git": _git(Path(peftkit.__file__).parents[1]),
        "variables": _variables(),
        "load_before": load(),
        "load_after": load(),
    }


def machine(cpu: str, cores: int, memory: int, gpu: dict[str, Any] | None) -> str:
    """A short neutral name that is the same for equal hardware.

    >>> machine("Some CPU", 2, 2**33, None)
    'cpu-2cores-4d01fc8b'
    """
    facts = f"{cpu}|{cores}|{round(memory / 2**30)}|{gpu['name'] if gpu else ''}"
    digest = hashlib.sha256(facts.encode()).hexdigest()[:8]
    if gpu is None:
        return f"cpu-{cores}cores-{digest}"
    return f"{re.sub(r'[^a-z0-9]+', '-', gpu['name'].lower()).strip('-')}-{digest}"


def load() -> list[float] | None:
    """The load averages of 1, 5 and 15 minutes; None where the system keeps none."""
    return [round(each, 2) for each in os.getloadavg()] if hasattr(os, "getloadavg") else None


def gpu() -> dict[str, Any] | None:
    """Name, driver and memory of the first GPU. Asked of its own tool, since torch would take memory there to ask."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader,nounits"]
    answer = _answer(query)
    if not answer:
        return None
    name, driver, mebibytes = (each.strip() for each in answer.splitlines()[0].split(","))
    return {"name": name, "driver": driver, "memory_bytes": int(float(mebibytes) * 2**20)}


def _cpu() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine()
    named = re.search(r"^model name\s*:\s*(.+)$", text, flags=re.MULTILINE)
    return named[1].strip() if named else platform.machine()


def _memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


def _packages() -> dict[str, str]:
    """Versions of what decides the figures: the libraries, and every plugin's distribution."""
    names = {*PACKAGES, *(info.package for info in plugins.plugins())}
    found = {}
    for name in sorted(names):
        try:
            found[name] = importlib.metadata.version(name)
        except (importlib.metadata.PackageNotFoundError, ValueError):
            continue
    return {**found, "peftkit": peftkit.__version__}


def _variables() -> dict[str, str]:
    """Variables that matter, with the last part of each path in them alone."""
    every = {**VARIABLES, **os.environ}
    named = {name: value for name, value in sorted(every.items()) if name.startswith(PREFIXES)}
    return {name: re.sub(r"[^\s:;,=]*[/\\]", "", value) for name, value in named.items()}


def _git(folder: Path) -> dict[str, Any] | None:
    """The commit that peftkit's code is at, where it runs from a checkout."""
    if not (folder / ".git").exists():
        return None
    commit = _answer(["git", "-C", str(folder), "rev-parse", "HEAD"])
    changes = _answer(["git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no"])
    return {"commit": commit, "dirty": bool(changes)} if commit else None


def _answer(command: list[str]) -> str:
    """What a tool prints, or nothing where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
