"""The public surface, the import directions and the documentation, held against the code itself."""

import ast
import doctest
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import pytest

import peftkit

PACKAGE = Path(peftkit.__file__).parent
REPOSITORY = Path(__file__).parents[1]
DOCS = REPOSITORY / "docs"

# Imports only point up this list: a module may import those before it.
ORDER = [
    "errors", "blocks", "discovery", "globs", "selectors", "roles", "tables", "hookspecs", "kernels", "products", "layers.kind", "layers.attention", "layers.conv", "layers.embedding",
    "layers.linear", "layers.recurrent",
    "layers", "adapter", "method", "rehearsal", "workload", "loading", "plugins", "readers", "recipe", "finite", "composition", "checkpoints", "running", "swap", "installed",
    "observing", "stepping", "sharding", "resolve", "plan", "install", "combining", "lifecycle", "stacks", "grouped", "routing", "merging",
    "drift", "verifying", "summary", "bookkeeping", "accumulation", "whereabouts", "workspaces", "memory", "dry_kernels", "dry_autocast", "dry_run", "estimating", "fitting", "manifests", "gathering", "reading", "restoring", "writing",
    "formats.layouts", "formats.matching", "formats.declared", "formats.folders", "formats.places", "formats.from_folder",
    "formats.parts", "formats.servable", "formats.to_folder", "formats.tensorfiles", "formats.lowrank", "formats.kohya", "formats.loralib",
    "formats.diffusers", "formats.mlx", "formats.ggufs", "formats.gguf", "formats.interchange", "formats.skeleton", "formats", "files", "distributed", "trainer", "methods", "methods.frozen", "methods.full", "methods.lora",
    "workloads", "workloads.needs", "workloads.assets", "workloads.synthetic", "workloads.digits", "workloads.pitch", "workloads.voices", "workloads.text",
    "bench", "bench.statistics", "bench.document", "bench.derived", "bench.flops", "bench.subject", "bench.exact", "bench.timing",
    "bench.quality", "bench.worker", "bench.process", "bench.environment", "bench.engine", "bench.compare", "bench.report.columns", "bench.report.ties", "bench.report.view", "bench.report.words",
    "bench.report.plots", "bench.report.page", "bench.report.text", "bench.report",
    "testing.parity", "testing.cases", "testing.subject", "testing.declaring", "testing.wrapping", "testing.training", "testing.keeping",
    "testing.undoing", "testing.defining", "testing.surviving", "testing.kit", "testing",
    "cli.output", "cli.fields", "cli.traits", "cli.listing", "cli.models", "cli.planning", "cli.estimating", "cli.checking", "cli.converting", "cli.inspecting", "cli.new", "cli.reporting", "cli.benching", "cli.app", "cli", "__main__",
]  # fmt: skip

PUBLIC = [getattr(peftkit, name) for name in peftkit.__all__ if hasattr(getattr(peftkit, name), "__qualname__")]


def modules():
    return [name.removeprefix("peftkit.") for _, name, _ in pkgutil.walk_packages([str(PACKAGE)], "peftkit.")]


def imports_of(module):
    """Names of the peftkit modules that a module imports when it is imported itself, TYPE_CHECKING blocks left out."""
    path = PACKAGE.joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    tree = ast.parse(path.read_text())
    for block in [
        node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
    ]:
        block.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "peftkit":
            inside = node.module.removeprefix("peftkit").removeprefix(".")
            for alias in node.names:
                full = f"{inside}.{alias.name}".removeprefix(".")
                yield full if full in ORDER else inside
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "peftkit")


def test_all_lists_what_there_is_in_order():
    """`__all__` is sorted and holds every public name of the package, and nothing else."""
    there = {
        name
        for name in dir(peftkit)
        if not name.startswith("_") and (not inspect.ismodule(getattr(peftkit, name)) or name == "errors")
    }

    assert sorted(there) == peftkit.__all__


def test_every_module_has_its_place_in_the_order():
    """A new module is added to the list above, on purpose."""
    assert sorted(ORDER) == sorted(modules())


@pytest.mark.parametrize("module", ORDER)
def test_imports_point_up(module):
    """A module imports only what comes before it; methods and the kit import the public package alone."""
    imports, before = set(imports_of(module)) - {""}, set(ORDER[: ORDER.index(module)])
    if module.startswith("methods"):
        assert imports <= {"peftkit"}
    elif module.startswith("testing"):
        assert imports <= {"peftkit", "errors", "layers"} | {other for other in before if other.startswith("testing")}
    elif module.startswith(("cli", "bench", "workloads")):
        assert imports <= before | {"peftkit"}
    else:
        assert imports <= before


def test_the_core_names_no_method():
    """No module of the core knows a method by name, except as the default argument that the public API promises."""
    names = [info.name for info in peftkit.methods() if info.package == "peftkit"]
    assert names
    for project in REPOSITORY.glob("plugins/*/pyproject.toml"):
        names += tomllib.loads(project.read_text())["project"]["entry-points"].get("peftkit.methods", {})
    for module in modules():
        if module.startswith("methods"):
            continue
        path = PACKAGE.joinpath(*module.split("."))
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        tree = ast.parse(path.read_text())
        defaults = {
            id(d)
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef) and node.name in ("wrap", "plan", "estimate")
            for d in (*node.args.defaults, *(d for d in node.args.kw_defaults if d))
        }
        strings = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in defaults]
        assert not [name for name in names if name in strings], path


@pytest.mark.parametrize("value", PUBLIC, ids=lambda value: value.__name__)
def test_every_public_name_has_a_docstring_with_an_example(value):
    """Public functions and built-in methods show an example that runs; contracts say what they are for."""
    doc = inspect.getdoc(value)
    assert doc
    if inspect.isfunction(value) or value in (
        peftkit.LoRA,
        peftkit.Full,
        peftkit.Frozen,
        peftkit.Method,
        peftkit.LayerKind,
    ):
        assert ">>>" in doc


@pytest.mark.parametrize("module", ["", *ORDER])
def test_doctests(module):
    """Every example in a docstring runs and prints what it says."""
    found = importlib.import_module(f"peftkit.{module}".rstrip("."))
    result = doctest.testmod(found, extraglobs={"MyMethod": peftkit.LoRA, "MyLinear4bit": None, "MyWorkload": None})
    assert result.failed == 0


def test_the_api_page_lists_every_public_name():
    """docs/api.md has a heading for each public name, and for nothing that is not there."""
    headings = set(re.findall(r"^### `(\w+)", (DOCS / "api.md").read_text(), flags=re.MULTILINE))
    assert headings == set(peftkit.__all__)


def test_every_hook_is_documented_with_its_signature():
    """docs/concepts.md names each hook as it is declared."""
    from peftkit import hookspecs

    text = (DOCS / "concepts.md").read_text()
    hooks = [name for name in vars(hookspecs) if name.startswith("peftkit_")]
    assert hooks
    for name in hooks:
        assert f"`{name}()`" in text


@pytest.mark.parametrize("page", sorted([REPOSITORY / "README.md", *DOCS.glob("*.md")]), ids=lambda page: page.name)
def test_links_between_documents_lead_somewhere(page):
    """A relative link in the README or the docs names a file that exists."""
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_import_is_light():
    """`import peftkit` brings in neither transformers nor anything else that is heavy, and scans nothing."""
    code = (
        "import sys, torch; before = set(sys.modules); import peftkit; new = {m.split('.')[0] for m in set(sys.modules) - before};"
        "print(*sorted(new - set(sys.stdlib_module_names)))"
    )
    run = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert set(run.stdout.split()) <= {"peftkit", "pluggy", "safetensors", "torch", "numpy"}


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_python_in_the_docs_runs(page, tmp_path, monkeypatch):
    """The Python blocks of each page run, top to bottom, as one program."""
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    if not blocks:
        return
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType(page.stem)
    monkeypatch.setitem(sys.modules, page.stem, module)  # what a page defines can be pickled and compiled
    exec(compile("\n".join(blocks), str(page), "exec"), vars(module))
