"""What `peftkit new` writes is a whole package: it installs, is found by its name, and passes its own tests."""

import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import peftkit

pytest.importorskip("typer")
from typer.testing import CliRunner

from peftkit.cli.app import app
from peftkit.cli.new import class_name

NAME = "row_scale"
SERIES = ".".join(peftkit.__version__.split(".")[:2])


def new(*args):
    return CliRunner().invoke(app, ["new", *map(str, args)])


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """The folder of a new package."""
    folder = tmp_path_factory.mktemp("new")
    result = new(NAME, "--folder", folder)
    assert result.exit_code == 0, result.output
    assert "pip install -e '.[test]'" in result.stdout
    return folder / "peftkit-row-scale"


def python(*args, path, cwd):
    """Run Python with `path` in front of its own."""
    joined = os.pathsep.join(filter(None, [str(path), os.environ.get("PYTHONPATH", "")]))
    return subprocess.run(
        [sys.executable, *args],
        capture_output=True, text=True, check=False, cwd=cwd, env={**os.environ, "PYTHONPATH": joined},
    )  # fmt: skip


def files_below(folder):
    return {str(file.relative_to(folder).as_posix()) for file in folder.rglob("*") if file.is_file()}


def test_the_files_are_these_and_no_others(package):
    """The exact set; nothing of the template is left unfilled."""
    assert files_below(package) == {
        ".github/workflows/ci.yml",
        ".gitignore",
        "README.md",
        "peftkit_row_scale.py",
        "pyproject.toml",
        "tests/test_row_scale.py",
    }
    for file in files_below(package):
        assert "$" not in (package / file).read_text().replace("${{ matrix.python }}", ""), file


def test_the_metadata_is_that_of_a_plugin(package):
    """Name, entry point and the series of peftkit that it is written for."""
    project = tomllib.loads((package / "pyproject.toml").read_text())["project"]

    assert project["name"] == "peftkit-row-scale"
    assert project["entry-points"] == {"peftkit.methods": {NAME: "peftkit_row_scale"}}
    (requirement,) = project["dependencies"]
    assert requirement.startswith(f"peftkit>={SERIES},<")


def test_the_code_is_clean(package):
    """The linter and the formatter have nothing to say, with the package's own settings."""
    pytest.importorskip("ruff")
    for command in (
        ["check", "--select", "ALL", "--ignore", "ANN,ARG002,COM812,CPY001,D107,D203,D213,INP001,S101"],
        ["format", "--check"],
    ):
        result = python("-m", "ruff", *command, "--no-cache", ".", path="", cwd=package)
        assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    "chosen",
    [
        pytest.param("not conformance or Linear or check_fields or check_import", id="on linear layers"),
        pytest.param("", id="on every layer kind", marks=pytest.mark.slow),
    ],
)
def test_it_installs_and_passes_its_own_tests(package, tmp_path, chosen):
    """Built and installed from its metadata, it holds the module alone; its test suite then passes as written."""
    if importlib.util.find_spec("hatchling") is None:
        pytest.skip("hatchling is not installed, so no wheel can be built")
    built = python(
        "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps", "--no-build-isolation",
        "--target", tmp_path, package, path="", cwd=tmp_path,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    installed = {file for file in files_below(tmp_path) if ".dist-info" not in file and "__pycache__" not in file}
    assert installed == {"peftkit_row_scale.py"}

    listing = python("-m", "peftkit", "methods", path=tmp_path, cwd=tmp_path)
    assert re.search(r"^row_scale +peftkit-row-scale +0\.1\.0 +0\.10% +weight +merges", listing.stdout, re.MULTILINE)

    (example,) = re.findall(
        r"^```python\n(.*?)^```", (package / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL
    )
    shown = python("-c", example, path=tmp_path, cwd=tmp_path)
    assert f"{NAME} " in shown.stdout, shown.stderr

    tests = python("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, path=tmp_path, cwd=package)
    assert tests.returncode == 0, tests.stdout[-4000:] + tests.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", tests.stdout)[1]) > 50


def test_the_tutorial_shows_these_files(tmp_path):
    """docs/write-a-method.md has the metadata and the list of files that `peftkit new waves` writes, to the letter."""
    assert new("waves", "--folder", tmp_path).exit_code == 0
    package = tmp_path / "peftkit-waves"
    text = (Path(__file__).parents[1] / "docs" / "write-a-method.md").read_text()

    (toml,) = re.findall(r"^```toml\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    assert toml == (package / "pyproject.toml").read_text()
    (listed,) = re.findall(r"^```text\npeftkit-waves/\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    assert set(listed.split()) == files_below(package)


REFUSED = {
    "capitals": ("RowScale", "lower-case letters, digits and _"),
    "a hyphen": ("row-scale", "lower-case letters, digits and _"),
    "a digit in front": ("3d", "lower-case letters, digits and _"),
    "an underscore at an end": ("row_", "lower-case letters, digits and _"),
    "a path": ("../row", "lower-case letters, digits and _"),
    "nothing": ("", "lower-case letters, digits and _"),
    "a built-in": ("lora", "there is a method lora (peftkit"),
    "a class of Python's": ("none", "a class called None"),
    "a class that the file imports": ("class_var", "a class called ClassVar"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_name_that_cannot_work_is_refused(case, tmp_path):
    """One line with the reason, and nothing is written."""
    name, words = REFUSED[case]
    result = new("--folder", tmp_path, "--", name)

    assert result.exit_code == 2
    assert words in result.stderr
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_left_alone(tmp_path):
    """Also where it is empty: what stands there is never written into."""
    (tmp_path / "peftkit-row-scale").mkdir()
    result = new(NAME, "--folder", tmp_path)

    assert result.exit_code == 2
    assert "exists already" in result.stderr
    assert not list((tmp_path / "peftkit-row-scale").iterdir())


def test_names_become_class_names():
    """Each part of the name begins with a capital."""
    assert [class_name(name) for name in ("scale", "row_scale", "l2_0")] == ["Scale", "RowScale", "L20"]
