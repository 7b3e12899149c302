"""The plugins in plugins/: each a distribution of its own, installed by pip, imported only when it is asked for."""

import re
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest

import peftkit

REPOSITORY = Path(__file__).parents[1]
PROJECTS = {path.parent.name: tomllib.loads(path.read_text()) for path in REPOSITORY.glob("plugins/*/pyproject.toml")}
METHODS = {
    method: package
    for package, project in PROJECTS.items()
    for method in project["project"]["entry-points"].get("peftkit.methods", {})
}
LIBRARIES = {
    layer.partition(".")[0]: package
    for package, project in PROJECTS.items()
    for layer in project["project"]["entry-points"].get("peftkit.layers", {})
}
"""Whose layers, or whose tensors, a package has kinds for."""

WRAP = """
import sys, torch, peftkit
model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
model = peftkit.wrap(model, {method!r})
model(torch.randn(3, 4)).sum().backward()
print(sorted(m for m in sys.modules if m.startswith("peftkit_")))
"""


def run(code, *path):
    """A fresh process that finds packages in these folders only."""
    start = f"import sys; sys.path += {[str(each) for each in path]!r}\n"
    return subprocess.run([sys.executable, "-S", "-E", "-c", start + code], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def without_plugins(tmp_path_factory):
    """A folder like the environment's own, with peftkit and all else but its plugins."""
    folder = tmp_path_factory.mktemp("site")
    for site in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for entry in Path(site).iterdir():
            if not re.match(r"_*(peftkit|editable)", entry.name, re.IGNORECASE) and not (folder / entry.name).exists():
                (folder / entry.name).symlink_to(entry)
    own = Path(peftkit.__file__).parent
    (folder / "peftkit").symlink_to(own)
    for info in Path(sysconfig.get_path("purelib")).glob("peftkit-*.dist-info"):
        (folder / info.name).symlink_to(info)
    return folder


def test_there_are_ten_and_each_is_known_by_an_extra():
    """`pip install 'peftkit[dora]'` brings the package that offers dora: for every method and every library, and for no other name."""
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    known = {name: requires for name, requires in extras.items() if any(r.startswith("peftkit-") for r in requires)}

    assert len(PROJECTS) == 10
    assert known == {name.replace("_", "-"): [package] for name, package in (METHODS | LIBRARIES).items()}


def test_every_method_is_installed_and_is_what_it_says():
    """Each entry point's method loads, under its own name, from its own package."""
    installed = {info.name: info.package for info in peftkit.methods()}

    assert {name: installed.get(name) for name in METHODS} == METHODS
    for name in METHODS:
        assert peftkit.method(name).name == name


def test_a_process_that_uses_lora_imports_no_plugin():
    """With all of them installed, none is imported until its name is asked for; then only that one is."""
    for method, expected in (("lora", []), ("dora", ["peftkit_dora", "peftkit_dora.dora"])):
        code = WRAP.format(method=method)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == str(expected)


def test_without_the_package_the_error_says_what_to_install(without_plugins):
    """A known method that is not installed is an error that names its package; an unknown one has no such hint."""
    done = run(WRAP.format(method="dora"), without_plugins)
    last = done.stderr.strip().splitlines()[-1]
    assert "UnknownMethodError" in last
    assert "'dora'" in last
    assert "pip install peftkit-dora" in last

    done = run(WRAP.format(method="dorado"), without_plugins)
    assert "pip install peftkit-dorado" not in done.stderr


def test_pip_install_makes_the_method_work(without_plugins, tmp_path):
    """`pip install ./plugins/peftkit-dora`, and `wrap(model, "dora")` works."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-index"]
    source = REPOSITORY / "plugins" / "peftkit-dora"
    subprocess.run([*pip, "--no-build-isolation", "--target", str(tmp_path), str(source)], check=True)
    done = run(WRAP.format(method="dora"), without_plugins, tmp_path)
    assert done.stdout.strip() == "['peftkit_dora', 'peftkit_dora.dora']", done.stderr


@pytest.mark.parametrize("package", PROJECTS)
def test_a_plugin_imports_peftkit_and_torch_alone(package):
    """A plugin stands on the public package and its own dependencies: of the core it imports at most a method or a kind to build on."""
    needs = {re.match(r"[\w-]+", each)[0] for each in PROJECTS[package]["project"]["dependencies"]}
    sources = list((REPOSITORY / "plugins" / package).glob("peftkit_*/*.py"))
    assert sources
    for source in sources:
        imports = re.findall(r"^\s*(?:from|import) ([\w.]+)", source.read_text(), flags=re.MULTILINE)
        for name in imports:
            top = name.split(".")[0]
            assert top in {"torch", source.parent.name} | needs | set(sys.stdlib_module_names), (source, name)
            public = name in ("peftkit", "peftkit.errors", "peftkit.layers") or name.startswith("peftkit.methods.")
            assert top != "peftkit" or public, name


@pytest.mark.parametrize("package", PROJECTS)
def test_the_example_in_its_readme_runs(package, tmp_path, monkeypatch):
    """The Python blocks of a plugin's README run, top to bottom, with the package installed."""
    for each in PROJECTS[package]["project"]["dependencies"]:
        pytest.importorskip(re.match(r"[\w-]+", each)[0])
    monkeypatch.chdir(tmp_path)
    readme = (REPOSITORY / "plugins" / package / "README.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", readme, flags=re.MULTILINE | re.DOTALL)
    assert blocks
    exec(compile("\n".join(blocks), f"{package}/README.md", "exec"), {"__name__": "readme"})
