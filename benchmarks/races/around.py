"""The work around the training step: import, wrap, save, load, switch, merge.

These happen once or a few times a run, but with many adapters, or in a server that changes them between requests,
they are what one waits for. Both libraries use their own defaults, and these differ in what they do for the time:
peftkit's file has a digest of each tensor, and its merge keeps the original weights for an exact `unmerge`, where HF
PEFT subtracts again.
"""

import itertools
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

from races.libraries import LIBRARIES, count, move
from races.models import NAMES, many_small, seven_billion
from races.timing import Side

HIDDEN, RANK, BLOCKS = 64, 4, 200  # 1,400 linears


def importing(package: str) -> Side:
    """Import a package in a fresh interpreter that has torch already, and that times it itself."""
    code = f"import torch, time; start = time.perf_counter()\nimport {package}\nprint(time.perf_counter() - start)"

    def run() -> float:
        # The command is made of constants, and runs without a shell.
        done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)  # noqa: S603
        return float(done.stdout)

    return Side(run=run)


def wrap_meta(library: str, rank: int = 8) -> Side:
    """Wrap all 224 linears of Llama-7B's shapes on the meta device."""
    last: list[nn.Module] = []

    def run() -> None:
        last.append(LIBRARIES[library].lora(last.pop(), rank))

    def check() -> None:
        assert count(last[0]) == 32 * rank * (4 * (4096 + 4096) + 3 * (4096 + 11_008))

    def fresh() -> None:
        last.clear()
        last.append(seven_billion())

    return Side(run=run, before=fresh, check=check)


def wrap(library: str, blocks: int = BLOCKS) -> Side:
    """Wrap many small linears."""
    last: list[nn.Module] = []

    def run() -> None:
        last.append(LIBRARIES[library].lora(last.pop(), RANK))

    def fresh() -> None:
        last.clear()
        last.append(many_small(blocks, HIDDEN))

    return Side(run=run, before=fresh, check=lambda: _has_all(last[0], blocks))


def save(library: str, folder: Path, blocks: int = BLOCKS) -> Side:
    """Save their adapter."""
    tune = LIBRARIES[library]
    model, file = tune.lora(many_small(blocks, HIDDEN), RANK), tune.file(folder)

    def check() -> None:
        assert file.stat().st_size > _parameters(blocks) * 4

    return Side(
        run=lambda: tune.save(model, folder),
        before=lambda: file.unlink(missing_ok=True),
        check=check,
        exact=lambda: {"file_bytes": file.stat().st_size} if file.exists() else {},
    )


def load(library: str, folder: Path, blocks: int = BLOCKS, nth: int = 2) -> Side:
    """Load a file as the `nth` adapter of a model, again and again."""
    tune = LIBRARIES[library]
    model, expected = _saved(library, folder, blocks)
    for i in range(nth - 2):
        tune.load(model, folder, f"other{i}")
    loaded = False

    def forget() -> None:
        if loaded:
            tune.forget(model, "next")

    def run() -> None:
        nonlocal loaded
        tune.load(model, folder, "next")
        loaded = True

    def check() -> None:
        move(model, std=0.0)  # the first adapter: only the new one, as it was in the file, can give what is expected
        tune.switch(model, "next")
        torch.testing.assert_close(_probe(model), expected)

    return Side(run=run, before=forget, check=check)


def switch(library: str, folder: Path, blocks: int = BLOCKS, adapters: int = 2) -> Side:
    """Make another adapter the active one."""
    tune = LIBRARIES[library]
    base = _probe(many_small(blocks, HIDDEN))
    model, expected = _saved(library, folder, blocks)
    move(model, std=0.0)  # the first adapter does nothing, the others what the first one did
    names = [f"other{i}" for i in range(adapters - 1)]
    for name in names:
        tune.load(model, folder, name)
    turns = itertools.cycle([*names, "default"])

    def check() -> None:
        for name, output in (names[0], expected), ("default", base):
            tune.switch(model, name)
            torch.testing.assert_close(_probe(model), output)

    return Side(run=lambda: tune.switch(model, next(turns)), calls=2 * adapters, check=check)


def merge(library: str, blocks: int = BLOCKS) -> Side:
    """Merge all of an adapter into the weights."""
    tune = LIBRARIES[library]
    model = tune.lora(many_small(blocks, HIDDEN), RANK)
    move(model)
    expected = _probe(model)
    merged = False

    def unmerge() -> None:
        if merged:
            tune.unmerge(model)

    def run() -> None:
        nonlocal merged
        tune.merge(model)
        merged = True

    def check() -> None:
        move(model, std=0.0)  # merged adapters must not run: their effect is in the weights
        torch.testing.assert_close(_probe(model), expected, rtol=1e-4, atol=1e-4)

    return Side(run=run, before=unmerge, check=check)


def _saved(library: str, folder: Path, blocks: int) -> tuple[nn.Module, torch.Tensor]:
    """A model whose adapter is in a file of the folder, and what it gives."""
    tune = LIBRARIES[library]
    model = tune.lora(many_small(blocks, HIDDEN), RANK)
    move(model)
    tune.save(model, folder)
    return model, _probe(model)


def _probe(model: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.ones(2, HIDDEN))


def _parameters(blocks: int) -> int:
    return blocks * len(NAMES) * RANK * 2 * HIDDEN


def _has_all(model: nn.Module, blocks: int) -> None:
    assert count(model) == _parameters(blocks)
