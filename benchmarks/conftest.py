"""Options of `pytest benchmarks`, and the report at its end."""

from pathlib import Path

import pytest

from races import report

RECORDS = pytest.StashKey[list]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("races")
    group.addoption("--device", choices=["cpu", "cuda"], default="cpu", help="which rows to race")
    group.addoption("--rounds", type=_even, help="rounds of each side; otherwise as many as fit into --seconds")
    group.addoption("--seconds", type=float, default=6.0, help="time for each side of each row")
    group.addoption("--report", type=Path, help="where the JSON goes, and the Markdown beside it")


def _even(text: str) -> int:
    """Two rounds make one ratio, so an odd number of them is raised by one."""
    return max(2, -(-int(text) // 2) * 2)


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RECORDS] = []


@pytest.fixture
def records(request: pytest.FixtureRequest) -> list:
    """What this session has measured so far, one dictionary for each side of each row."""
    return request.config.stash[RECORDS]


def pytest_benchmark_update_machine_info(machine_info: dict) -> None:
    """Whatever pytest-benchmark saves by itself names no host either."""
    machine_info["node"] = report.machine()


def pytest_sessionfinish(session: pytest.Session) -> None:
    found = session.config.stash[RECORDS]
    if not found:
        return
    device = session.config.getoption("device")
    path = session.config.getoption("report") or report.default_path(Path(__file__).parent / "results", device)
    report.write(report.document(found, device), path)
    print(f"\n\nThe report is {path} and {path.with_suffix('.md').name}.")
