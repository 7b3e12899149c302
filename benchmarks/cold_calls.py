"""What one call of torch costs by itself in a loop, and what it costs between the products of a model.

A training step of a small model alternates large products, which fill the caches with their operands, and small work
around them. That work finds nothing of its own in the caches, not even its instructions. So a kernel that is judged by
its time in a loop is judged wrongly: within a model the number of calls counts, more than their size.

    .venv/bin/python benchmarks/cold_calls.py
"""

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from peftkit import kernels

ROUNDS = 300


def microseconds(work: Callable[[], object], between: Callable[[], object]) -> float:
    for _ in range(10):
        work()
    took = []
    for _ in range(ROUNDS):
        between()
        start = time.perf_counter()
        work()
        took.append(time.perf_counter() - start)
    return statistics.median(took) * 1e6


def main() -> None:
    torch.manual_seed(0)
    x, w, up, down = torch.randn(512, 512), torch.randn(512, 512), torch.randn(512, 16), torch.randn(16, 512)
    wide, other = torch.randn(512, 1376), torch.randn(512, 1376)
    pool = [torch.randn(512, 512) for _ in range(40)]
    h, low, y = x @ down.mT, x @ up, torch.randn(512, 512)
    noise = kernels.draw(x, 0.1)
    mask = kernels.keep_mask(x.shape, noise)
    turn = iter(range(10**9))

    def products() -> None:
        F.linear(wide, other)
        pool[next(turn) % len(pool)].mul_(1.0)

    calls: dict[str, Callable[[], object]] = {
        "the layer's own product, 512 × 512 × 512": lambda: F.linear(x, w),
        "x @ down.T": lambda: F.linear(x, down),
        "y += h @ up.T": lambda: y.addmm_(h, up.mT, alpha=0.5),
        "gradient of up": lambda: torch.mm(y.mT, h),
        "gradient of down": lambda: torch.mm(low.mT, x),
        "noise of dropout": lambda: kernels.draw(x, 0.1),
        "mask of dropout": lambda: kernels.keep_mask(x.shape, noise),
        "x * mask": lambda: x * mask,
        "a view": lambda: x.view(-1),
        "a product of 8 × 64": lambda: x[:8, :64] * 2.0,
    }
    print(f"{'µs, median of ' + str(ROUNDS):44} in a loop   between products")
    for name, work in calls.items():
        print(f"{name:44} {microseconds(work, lambda: None):9.1f} {microseconds(work, products):18.1f}")


if __name__ == "__main__":
    main()
