"""Third parties add methods and layer kinds by entry points; nobody imports them until they are asked for."""

import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

import peftkit
from peftkit import errors, plugins

SCALE = """
    from dataclasses import dataclass
    from typing import ClassVar
    import torch
    import peftkit

    @dataclass(frozen=True)
    class Scale(peftkit.Method):
        name: ClassVar[str] = "{name}"
        start: float = 1.0

        def adapter(self, site, shared=None):
            return ScaleAdapter(site, self)

    class ScaleAdapter(peftkit.Adapter):
        def __init__(self, site, method):
            super().__init__(site)
            self.scale = site.parameter(torch.full((site.fan_out, 1), method.start))

        def weight(self, w):
            return w * self.scale

        def bias(self, b):
            return b * self.scale.squeeze(1)

    @peftkit.hookimpl
    def peftkit_methods():
        return [Scale]
"""

KIND = """
    import peftkit
    from peftkit.layers import Linear

    class Halves(Linear):
        serves = "{module}.HalvedLinear"

    @peftkit.hookimpl
    def peftkit_layers():
        return [Halves]
"""


@pytest.fixture
def distribution(tmp_path, monkeypatch):
    """Installs a fake distribution: metadata, entry points and one module, on sys.path for the length of a test."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(plugins, "_loaded", {})
    made = []

    def install(package, module, code, *, group="peftkit.methods", points=None):
        (tmp_path / f"{module}.py").write_text(textwrap.dedent(code))
        folder = tmp_path / f"{package.replace('-', '_')}-1.2.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.2\n")
        lines = "".join(f"{point} = {module}\n" for point in points)
        (folder / "entry_points.txt").write_text(f"[{group}]\n{lines}")
        made.append(module)

    for cached in (plugins._kind_named, plugins._layer_points):
        cached.cache_clear()
    plugins._kinds.clear()
    yield install
    for module in made:
        loaded = sys.modules.pop(module, None)
        if loaded and plugins._manager().is_registered(loaded):
            plugins._manager().unregister(loaded)
    for cached in (plugins._kind_named, plugins._layer_points):
        cached.cache_clear()
    plugins._kinds.clear()


def test_a_third_partys_method_works_like_a_built_in(distribution, tmp_path):
    """A 20-line plugin wraps, merges, saves and loads; it is imported when it is asked for, and not when listed."""
    distribution("peftkit-scale", "fake_scale", SCALE.format(name="scale"), points=["scale"])

    assert "scale (peftkit-scale 1.2)" in [str(info) for info in peftkit.methods()]
    assert "fake_scale" not in sys.modules

    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    x, state = torch.randn(3, 4), {k: v.clone() for k, v in base.state_dict().items()}
    model = peftkit.wrap(base, "scale", targets="**", start=2.0)
    expected = ((x @ (2 * state["0.weight"]).T + 2 * state["0.bias"]) @ (2 * state["1.weight"]).T) + 2 * state["1.bias"]
    torch.testing.assert_close(model(x), expected)
    y = model(x)
    torch.testing.assert_close(peftkit.merge(model)(x), y)
    peftkit.unmerge(model)
    peftkit.save(model, tmp_path / "scale.safetensors")
    fresh = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    fresh.load_state_dict(state)
    assert torch.equal(peftkit.load(fresh, tmp_path / "scale.safetensors")(x), y)


def test_the_error_for_a_method_that_is_gone_says_what_to_install(distribution, tmp_path, monkeypatch):
    """A file knows which package its method came from."""
    distribution("peftkit-scale", "fake_scale", SCALE.format(name="scale"), points=["scale"])
    peftkit.save(peftkit.wrap(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), "scale"), tmp_path / "a")
    monkeypatch.setattr(plugins, "_loaded", {})
    (tmp_path / "peftkit_scale-1.2.dist-info" / "entry_points.txt").write_text("")

    with pytest.raises(errors.UnknownMethodError, match=r"'scale'.*peftkit-scale 1\.2, install it"):
        peftkit.load(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), tmp_path / "a")


BROKEN = {
    "an import error": ("import no_such_module", r"ModuleNotFoundError: No module named 'no_such_module'"),
    "a misspelt hook": (
        "import peftkit\n@peftkit.hookimpl\ndef peftkit_method():\n    return []",
        r"PluginValidationError.*peftkit_method",
    ),
    "no hook at all": ("", r"offers \[\], not 'bad' once"),
    "another name": (SCALE.format(name="other"), r"offers \['other'\]"),
    "a hook that raises": (
        "import peftkit\n@peftkit.hookimpl\ndef peftkit_methods():\n    raise RuntimeError('driver missing')",
        "driver missing",
    ),
    "a hook that returns nonsense": (
        "import peftkit\n@peftkit.hookimpl\ndef peftkit_methods():\n    return [3]",
        r"\[3\]",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_plugin_is_named_and_breaks_only_itself(distribution, case):
    """The error has package, version and cause; it comes again at each try; everything else goes on working."""
    code, words = BROKEN[case]
    distribution("peftkit-bad", "fake_bad", code, points=["bad"])

    for _ in range(2):
        with pytest.raises(errors.PluginError, match=rf"(?s)'bad' from peftkit-bad 1\.2.*{words}"):
            peftkit.method("bad")
    assert peftkit.method("lora") is peftkit.LoRA
    assert "bad" in [info.name for info in peftkit.methods()]
    assert not [p for p in plugins._manager().get_plugins() if getattr(p, "__name__", "") == "fake_bad"]


def test_two_packages_with_one_name(distribution):
    """A clash is an error that names both; neither is imported."""
    distribution("peftkit-one", "fake_one", SCALE.format(name="clash"), points=["clash"])
    distribution("peftkit-two", "fake_two", SCALE.format(name="clash"), points=["clash"])

    with pytest.raises(errors.PluginError, match=r"'clash' is offered by peftkit-\w+ 1\.2 and peftkit-\w+ 1\.2"):
        peftkit.method("clash")
    assert not {"fake_one", "fake_two"} & set(sys.modules)


def test_a_built_ins_name_cannot_be_taken(distribution):
    """A third party's `lora` is never imported."""
    distribution("peftkit-evil", "fake_evil", "raise SystemExit", points=["lora"])

    assert peftkit.method("lora") is peftkit.LoRA
    assert "fake_evil" not in sys.modules


def test_a_layer_kind_is_loaded_when_such_a_layer_is_met(distribution, tmp_path):
    """A plugin serves a class by its qualified name; a model without such a layer leaves it alone."""
    layer = "import torch\nclass HalvedLinear(torch.nn.Linear):\n    def forward(self, x):\n        return super().forward(x) / 2"
    (tmp_path / "fake_layer.py").write_text(layer)
    distribution(
        "peftkit-halves",
        "fake_kind",
        KIND.format(module="fake_layer"),
        group="peftkit.layers",
        points=["fake_layer.HalvedLinear"],
    )
    peftkit.wrap(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), "lora")
    assert "fake_kind" not in sys.modules

    import fake_layer

    model = nn.Sequential(fake_layer.HalvedLinear(4, 4), nn.Linear(4, 2))
    plan = peftkit.plan(model, "lora", targets="0")
    assert "fake_kind" in sys.modules
    assert type(plan.steps[0][0].kind).__name__ == "Halves"
    sys.modules.pop("fake_layer")


def test_wrapping_imports_no_plugin(tmp_path):
    """In a fresh process, listing and wrapping leave an installed plugin out of sys.modules."""
    folder = tmp_path / "peftkit_x-1.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: peftkit-x\nVersion: 1\n")
    (folder / "entry_points.txt").write_text("[peftkit.methods]\nx = fake_x\n")
    (tmp_path / "fake_x.py").write_text("raise SystemExit('imported')")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import torch, peftkit;"
        "m = peftkit.wrap(torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)), 'lora');"
        "print('x' in [i.name for i in peftkit.methods()], 'fake_x' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert run.stdout.split() == ["True", "False"]
