"""What every plugin's tests stand on."""

import tomllib

import pytest
import torch

import peftkit


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """One thread, as in the tests of peftkit itself: the models are tiny, and threads would wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture
def installed(request: pytest.FixtureRequest, tmp_path, monkeypatch) -> None:  # noqa: ANN001 - pytest's own fixtures
    """The plugin's metadata on the path, whether or not it is installed: files name methods and never classes."""
    folder = next(parent for parent in request.path.parents if (parent / "pyproject.toml").exists())
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    if any(info.package == project["name"] for info in peftkit.methods()):
        return
    info = tmp_path / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Name: {project['name']}\nVersion: {project['version']}\n")
    points = project["entry-points"]["peftkit.methods"].items()
    lines = "".join(f"{name} = {target}\n" for name, target in points)
    (info / "entry_points.txt").write_text(f"[peftkit.methods]\n{lines}")
    monkeypatch.syspath_prepend(tmp_path)
