"""What the tests of this package share."""

import sys
import tomllib
from pathlib import Path

import pytest

import peftkit

FOLDER = Path(__file__).parents[1]


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Let peftkit find the package where it is not installed: by metadata made of its pyproject.toml."""
    project = tomllib.loads(FOLDER.joinpath("pyproject.toml").read_text())["project"]
    if any(info.package == project["name"] for info in peftkit.methods()):
        return
    info = tmp_path / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    info.joinpath("METADATA").write_text(f"Name: {project['name']}\nVersion: {project['version']}\n")
    points = project["entry-points"]["peftkit.methods"].items()
    lines = "".join(f"{name} = {target}\n" for name, target in points)
    info.joinpath("entry_points.txt").write_text(f"[peftkit.methods]\n{lines}")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])


@pytest.fixture
def readme(installed):
    """What the README's example leaves behind."""
    parts = FOLDER.joinpath("README.md").read_text().split("```python\n")[1:]
    made = {}
    exec(compile("\n".join(part.split("```")[0] for part in parts), "README.md", "exec"), made)
    return made
