"""The races: every side of every row in `races/rows.py`, timed by pytest-benchmark with its base in turn.

`make bench` runs them; `benchmarks/README.md` says how a number is taken. Nothing here fails because of a time: a test
fails if the work was not done.
"""

import gc
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from races import rows as table
from races.report import allocator
from races.rows import Row
from races.timing import Side, Turns, pair_ratios, quiet_collector, rounds_for, summary, warm_up

TUNED = {
    "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
    "MALLOC_TOP_PAD_": str(256 << 20),
}
"""glibc keeps the heap between steps. By default it gives the memory back and faults it in again at every step, which
flatters whoever allocates less. The variables are read when a process starts."""

pytestmark = [
    # HF PEFT asks transformers for a property under its old name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


class Prepared:
    """A row whose sides are made when they are asked for, once."""

    def __init__(self, row: Row, folder: Path) -> None:
        self.row, self.folder = row, folder
        self._made: dict[str, tuple[Side, dict[str, float]]] = {}

    def side(self, name: str) -> tuple[Side, dict[str, float]]:
        """The side and its exact figures."""
        if name not in self._made:
            folder = self.folder / name.replace(" ", "-")
            folder.mkdir()
            side = self.row.sides[name](folder)
            self._made[name] = side, side.exact() if self.row.exact else {}
        return self._made[name]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "racer" not in metafunc.fixturenames:
        return
    chosen = table.rows_for(metafunc.config.getoption("device"))
    if os.environ.get("PEFTKIT_TUNED_ROWS"):
        chosen = [row for row in chosen if row.tuned]
    pairs = [pytest.param((row, side), id=f"{row.name}-{side}") for row in chosen for side in row.racers()]
    metafunc.parametrize("racer", pairs)


@pytest.fixture(scope="session")
def kept() -> list[Prepared]:
    """The row that is being raced, so that its sides share their base. One at a time: models are large."""
    return []


@pytest.fixture
def prepared(racer: tuple[Row, str], kept: list[Prepared], tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    row, _ = racer
    if row.device == "cuda" and not torch.cuda.is_available():
        pytest.skip("these rows run on a GPU, and torch finds no CUDA device here")
    if not kept or kept[0].row is not row:
        kept.clear()
        torch.compiler.reset()
        gc.collect()
        kept.append(Prepared(row, tmp_path_factory.mktemp(row.name)))
    return kept[0]


def test_row(
    racer: tuple[Row, str], prepared: Prepared, benchmark, records: list, request: pytest.FixtureRequest
) -> None:
    row, side = racer
    base = row.base_of(side)
    benchmark.group = row.title
    try:
        (based, base_exact), (raced, exact) = prepared.side(base), prepared.side(side)
    except ImportError as error:
        pytest.skip(f"{side} cannot take part: {error}")
    turns = Turns(based, raced)
    with quiet_collector():
        turn = warm_up(based, raced)
        rounds = request.config.getoption("rounds") or rounds_for(request.config.getoption("seconds"), turn)
        benchmark.pedantic(turns.target, setup=turns.setup, teardown=turns.teardown, rounds=rounds)
    for one in based, raced:
        one.check()
    record = {
        "row": row.name,
        "group": row.group,
        "title": row.title,
        "side": side,
        "base": base,
        "unit": row.unit,
        "allocator": allocator(),
        "target": row.target,
        "no_target": row.no_target,
        "note": row.note,
        "ratio": summary(pair_ratios(turns.side_seconds, turns.base_seconds)),
        "seconds": summary(turns.side_seconds) | {"samples": turns.side_seconds},
        "base_seconds": summary(turns.base_seconds) | {"samples": turns.base_seconds},
        "exact": exact,
        "base_exact": base_exact,
        "exact_targets": dict(row.exact_targets),
    }
    benchmark.extra_info.update(record)
    records.append(record)


def test_step_rows_with_tuned_allocator(records: list, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """The same rows in a process whose allocator is tuned; its records join this session's."""
    options = request.config.option
    if options.device != "cpu" or platform.libc_ver()[0] != "glibc":
        pytest.skip("the variables are glibc's, and matter on a CPU")
    if allocator() == "tuned":
        pytest.skip("the allocator is tuned already")
    file = tmp_path / "tuned.json"
    command = [sys.executable, "-m", "pytest", __file__, "-q", "-p", "no:cacheprovider"]
    command += [f"--seconds={options.seconds}", f"--report={file}", "-k", "test_row"]
    if options.rounds:
        command.append(f"--rounds={options.rounds}")
    # The command is made of constants and this session's numbers, and runs without a shell.
    done = subprocess.run(  # noqa: S603
        command, env={**os.environ, **TUNED, "PEFTKIT_TUNED_ROWS": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:]
    records += json.loads(file.read_text(encoding="utf-8"))["records"]
