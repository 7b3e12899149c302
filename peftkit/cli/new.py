"""`peftkit new`: a complete package for a method of one's own, from the files in `peftkit/template`."""

import re
import string
from importlib import resources
from pathlib import Path
from typing import Annotated

import typer

from peftkit import __version__, plugins
from peftkit.cli.output import Refusal

FILES = {
    "pyproject.toml": "pyproject.toml",
    "README.md": "README.md",
    "gitignore": ".gitignore",
    "ci.yml": ".github/workflows/ci.yml",
    "method.py": "peftkit_{name}.py",
    "test_method.py": "tests/test_{name}.py",
}
"""Each file of the template (there with `.txt` behind it), and where it goes in the new package."""

RESERVED = ("ClassVar", "False", "None", "Tensor", "True")
"""Class names that would clash with what the generated file imports, or with Python itself."""


def new(
    name: Annotated[str, typer.Argument(help="The method's name: lower-case letters, digits and _.")],
    *,
    folder: Annotated[Path, typer.Option(help="Where the package's own folder is made.")] = Path(),
) -> None:
    """Write a package with a method that works, its tests and its continuous integration."""
    _check_name(name)
    package = f"peftkit-{name.replace('_', '-')}"
    target = folder / package
    try:
        _write(target, name, package)
    except FileExistsError as error:
        raise Refusal(f"{target} exists already; give another --folder, or take it away") from error
    except OSError as error:
        raise Refusal(f"cannot write {target}: {error}") from error
    typer.echo(f"wrote {target}\n\nnext:\n    cd {target}\n    pip install -e '.[test]'\n    pytest")


def class_name(name: str) -> str:
    """The method's name in the form of a class name.

    >>> class_name("row_scale")
    'RowScale'
    """
    return "".join(part.capitalize() for part in name.split("_"))


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name):
        raise Refusal(f"a method's name is lower-case letters, digits and _, such as row_scale; got {name!r}")
    if class_name(name) in RESERVED:
        raise Refusal(
            f"{name!r} would make a class called {class_name(name)}, which means something else; take another"
        )
    for info in plugins.methods():
        if info.name == name:
            raise Refusal(f"there is a method {info}; two of one name cannot be told apart, so take another")


def _write(target: Path, name: str, package: str) -> None:
    values = {"name": name, "package": package, "Class": class_name(name), "requires": _requirement(__version__)}
    target.mkdir(parents=True)
    template = resources.files("peftkit") / "template"
    for source, path in FILES.items():
        text = (template / f"{source}.txt").read_text(encoding="utf-8")
        file = target / path.format(name=name)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(string.Template(text).substitute(values), encoding="utf-8", newline="\n")


def _requirement(version: str) -> str:
    """This series of peftkit: the next one may change the contract.

    >>> _requirement("0.3.2"), _requirement("2.1.0")
    ('peftkit>=0.3,<0.4', 'peftkit>=2.1,<3')
    """
    major, minor = map(int, version.split(".")[:2])
    return f"peftkit>={major}.{minor},<{f'0.{minor + 1}' if major == 0 else major + 1}"
