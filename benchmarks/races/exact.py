"""Figures of one training step that are the same in every run: bytes kept for backward, allocations, the peak.

The bytes kept are counted by torch's saved-tensor hooks, one for each storage, parameters left out. Allocations and
the peak come from the allocator's own events, by torch's profiler. On a GPU the allocator keeps the peak itself.
"""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler otherwise writes its start and stop to stderr


def saved_bytes(model: nn.Module, forward: Callable[[], torch.Tensor]) -> int:
    """Bytes of the distinct storages that `forward`, which returns a loss, keeps for backward."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, tuple[int, torch.Tensor]] = {}  # the tensor stays alive, so that no address comes twice

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes(), t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        forward()
    return sum(size for size, _ in kept.values())


def allocations(step: Callable[[], None]) -> dict[str, int]:
    """How often one step on the CPU allocates, and its peak in bytes above what there was at its start."""
    step()  # optimizer states and caches exist by now
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))  # the only public place that has every single event
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    sizes = [(e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]"]
    held = peak = 0
    for _, size in sorted(sizes, key=lambda event: event[0]):
        held += size
        peak = max(peak, held)
    return {"allocations": sum(size > 0 for _, size in sizes), "peak_bytes": peak}


def gpu_peak(step: Callable[[], None]) -> dict[str, int]:
    """The peak of one step on a GPU, in bytes above what there was at its start."""
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return {"peak_bytes": torch.cuda.max_memory_allocated() - before}
