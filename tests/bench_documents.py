"""Documents of a benchmark that no benchmark has made, for the tests of reports and of the comparison."""

import random
import statistics

from peftkit.bench.statistics import pair_ratios, seeds_interval, spread

PARTS = ("frozen", "trainable", "buffers", "gradients", "optimizer", "activations", "temporary")
NAMES = (
    "full", "frozen", "lora", "lora rank=16", "dora", "ia3", "vera", "hra", "oft", "loha", "lokr", "bitfit", "ln-tuning", "adalora", "lora-plus",
    "lora-fa", "vblora", "houlsby", "pfeiffer", "parallel", "prefix-tuning", "prompt-tuning", "p-tuning", "scale", "row_scale",
)  # fmt: skip


def interval(values):
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def pairs(draw, ratio, seconds=0.02, rows=12, noise=0.02):
    """Rows [a, b, b, a] whose b takes `ratio` of a."""

    def a_time(factor):
        return round(seconds * factor * (1 + abs(draw.gauss(0, noise))), 9)

    return [[a_time(1), a_time(ratio), a_time(ratio), a_time(1)] for _ in range(rows)]


def make_cell(
    label,
    workload="digits",
    *,
    ratio=0.6,
    trained=20_000,
    total=1_000_000,
    quality=None,
    items=800,
    noise=0.02,
    rows=12,
    seed=0,
):
    """A method that was measured in every way; `quality` is a value a seed, in percent."""
    draw = random.Random(f"{label}/{workload}/{seed}")
    memory = {
        "frozen": 4 * (total - trained), "trainable": 4 * trained, "buffers": 8_192, "gradients": 4 * trained, "optimizer": 8 * trained,
        "activations": 1_500_000 + draw.randrange(500_000), "temporary": 200_000,
    }  # fmt: skip
    memory["peak"] = sum(memory.values())
    step, inference, merged = (
        pairs(draw, ratio, rows=rows, noise=noise),
        pairs(draw, 1.08, 0.006, rows, noise),
        pairs(draw, 1.0, 0.006, rows, noise),
    )
    inner = [second for row in step for second in row[1:3]]
    scored = None
    if quality is not None:
        found = seeds_interval(quality, items, 100.0)
        lost = [3.1 + draw.random() / 10 for _ in quality]
        after = seeds_interval(lost)
        scored = {
            "seeds": list(range(len(quality))), "values": list(quality), "mean": found.middle, "low": found.low, "high": found.high, "before": 10.0,
            "learning_rate": 1e-3, "steps": 60, "train_seconds": [1.5 + draw.random() for _ in quality],
            "forgetting": {"name": "loss on 0 to 4", "before": 3.0, "values": lost, "mean": after.middle, "low": after.low, "high": after.high},
        }  # fmt: skip
    return {
        "workload": workload, "method": label.split()[0], "label": label, "hyperparameters": {"rank": 8}, "origin": "peftkit 0.1.0", "status": "ok", "error": None,
        "exact": {
            "trainable_parameters": trained, "total_parameters": total, "adapted_layers": 12, "adapter_file_bytes": 4 * trained + 1_000,
            "forward_flops": 1_547_173_888, "backward_flops": 2_069_547_520 + trained, "memory": memory,
            "estimated_memory": {**memory, "peak": memory["peak"] + 400, "temporary": 200_400}, "merge_error": 3.1e-7, "gpu_peak_allocated": None, "gpu_peak_reserved": None,
        },
        "times": {
            "step_pairs": step, "inference_pairs": inference, "merged_pairs": merged,
            **{name: [round(draw.uniform(0.9, 1.1) * base, 9) for _ in range(7)] for name, base in (
                ("forward", 0.006), ("backward", 0.012), ("optimizer", 0.001), ("wrap", 0.01), ("save", 0.004), ("load", 0.006), ("merge", 0.002), ("unmerge", 0.0004))},
        },
        "derived": {
            "step_seconds": interval(inner), "step_ratio": interval(pair_ratios(step)), "units_per_second": 64 / statistics.median(inner),
            "inference_ratio": interval(pair_ratios(inference)), "merged_ratio": interval(pair_ratios(merged)),
            "spread": spread(inner),
        },
        "quality": scored,
    }  # fmt: skip


def failed_cell(label, workload="digits", status="out of memory"):
    """A method of which nothing was measured."""
    nothing = dict.fromkeys(("exact", "times", "derived", "quality"))
    error = {"phase": "step", "type": "MemoryError", "message": "cannot allocate 12 GB for layers.3.attention"}
    return {
        "workload": workload,
        "method": label.split()[0],
        "label": label,
        "hyperparameters": {},
        "origin": None,
        "status": status,
        "error": error,
        **nothing,
    }


def make_workload(name="digits", *, metric=True):
    return {
        "name": name, "summary": f"A small vision transformer on the {name}, 5 to 9", "origin": "peftkit 0.1.0", "model": "ViT", "parameters": 1_000_000, "fingerprint": "ab" * 32,
        "data": "cd" * 32, "unit": "samples", "per_step": 64,
        "metric": {"name": "accuracy", "unit": "%", "higher_is_better": True, "items": 800} if metric else None,
    }  # fmt: skip


def make_document(cells, workloads=None):
    return {
        "schema": "peftkit.bench/1", "created": "2026-11-21T16:30:00Z", "command": ["peftkit", "bench", "run", "digits"],
        "settings": {"methods": sorted({c["label"] for c in cells}), "workloads": ["digits"], "device": "cpu", "pairs": 12, "seeds": [0, 1, 2], "quality": True},
        "environment": {
            "machine": "cpu-2cores-1a2b3c4d", "platform": "Linux-6.1-x86_64", "cpu": "A processor", "cores": 2, "threads": 1, "memory_bytes": 24_000_000_000, "gpu": None,
            "python": "3.11.7", "torch": "2.13.0+cpu", "torch_config": "PyTorch built with: …", "packages": {"peftkit": "0.1.0", "transformers": "5.23.0"},
            "plugins": [{"method": "dora", "distribution": "peftkit-dora", "version": "0.1.0"}], "git": {"commit": "34159e9", "dirty": False},
            "variables": {"OMP_NUM_THREADS": "1"}, "load_before": [0.5, 0.6, 0.7], "load_after": [1.5, 1.0, 0.8],
        },
        "workloads": workloads or [make_workload()], "cells": cells,
    }  # fmt: skip


def many(methods=25, workloads=("digits", "sentiment", "tones", "voices")):
    """A large document: as many methods as there are names, some alike and some not, on each workload."""
    cells = []
    for workload in workloads:
        draw = random.Random(workload)
        for index, label in enumerate(NAMES[:methods]):
            trained = {0: 1_000_000, 1: 0}.get(index, draw.choice((770, 5_000, 20_000, 74_498, 150_000)))
            middle = 92 - 20 / (1 + trained / 5_000) + draw.gauss(0, 1)
            ratio = 1.0 if index == 0 else 0.55 + 0.3 * draw.random()
            cells.append(
                make_cell(
                    label,
                    workload,
                    ratio=ratio,
                    trained=trained,
                    quality=[middle + draw.gauss(0, 0.5) for _ in range(3)],
                )
            )
        cells[-1] = failed_cell(NAMES[methods - 1], workload)
    return make_document(cells, [make_workload(name) for name in workloads])


HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> | `a` \"'&amp; $x$"


def nulls():
    cell = make_cell("lora")
    for part in ("exact", "times", "derived"):
        cell[part] = dict.fromkeys(cell[part])
    return make_document([cell])


def no_noise():
    cells = [
        make_cell(label, noise=0.0, ratio=0.5, quality=[80.0, 80.0, 80.0], items=None) for label in ("lora", "dora")
    ]
    work = make_workload()
    work["metric"]["items"] = None
    return make_document(cells, [work])


def hostile_names():
    cell = make_cell("lora", quality=[80.0, 81.0, 82.0])
    cell |= {"label": HOSTILE, "method": HOSTILE, "origin": HOSTILE, "hyperparameters": {HOSTILE: HOSTILE}}
    fault = failed_cell("dora")
    fault["error"]["message"] = HOSTILE
    document = make_document([cell, fault], [make_workload() | {"summary": HOSTILE, "model": HOSTILE}])
    document["command"] += [HOSTILE]
    return document


# Documents at the edges.
ODD = {
    "nothing measured": lambda: make_document([failed_cell("lora"), failed_cell("dora", status="not run")]),
    "nulls": nulls,
    "one method": lambda: make_document([make_cell("lora", quality=[80.0, 81.0, 82.0])]),
    "one seed": lambda: make_document([make_cell("lora", quality=[80.0]), make_cell("dora", quality=[90.0])]),
    "no task": lambda: make_document([make_cell("lora"), make_cell("dora", ratio=0.9)], [make_workload(metric=False)]),
    "no noise": no_noise,
    "long names": lambda: make_document([make_cell("very-long-" * 12 + str(n), quality=[80.0 + n, 81.0, 82.0]) for n in range(3)]),
    "hostile names": hostile_names,
    "other scripts": lambda: make_document([make_cell(a, quality=[80.0, 81.0, 82.0]) for a in ("方法 🚀", "مرحبا", "ñandú")], [make_workload() | {"metric": {"name": "точность", "unit": "%", "higher_is_better": True, "items": 800}}]),
    "no cells": lambda: make_document([]),
    "several": lambda: many(8, ("digits", "tones")),
}  # fmt: skip
