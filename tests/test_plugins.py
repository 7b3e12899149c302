"""Third parties add methods and layer kinds by entry points; nobody imports them until they are asked for.

The plugins here are fake distributions: a `name-1.2.dist-info` folder and a module beside it, on `sys.path` for the length
of one test. Each `BAD` one is wrong in its own way. All of them are held to the same: the error says whose fault it is
and what can be done, it comes again without a second import, and nothing else is touched.
"""

import importlib
import importlib.metadata
import re
import subprocess
import sys
import textwrap
import threading
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import nn

import peftkit
from peftkit import discovery, errors, loading, plugins

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
GOOD = SCALE.format(name="bad")
HOOK = "import peftkit\n@peftkit.hookimpl\ndef peftkit_methods({arguments}):\n    {body}"

LAYER = "import torch\nclass HalvedLinear(torch.nn.Linear):\n    def forward(self, x):\n        return super().forward(x) / 2"
KIND = """
    import peftkit
    from peftkit.layers import Linear

    class Halves(Linear):
        serves = "fake_layer.HalvedLinear"

    @peftkit.hookimpl
    def peftkit_layers():
        return [Halves]
"""
METADATA = "Metadata-Version: 2.1\nName: {package}\nVersion: 1.2\n"


@pytest.fixture
def distribution(tmp_path, monkeypatch):
    """Installs a fake distribution: metadata, entry points and one module, on sys.path for the length of a test."""
    for variable in (discovery.ALLOW, discovery.DENY, discovery.STRICT, discovery.TRACE):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    everything = importlib.metadata.distributions

    def without_real_plugins():
        """What is installed, but for the plugins of this repository, which may be there or not."""
        real = re.compile(r"peftkit_\w+-.*\.dist-info")
        for found in everything():
            path = Path(str(getattr(found, "_path", "")))
            if path.is_relative_to(tmp_path) or not real.fullmatch(path.name):
                yield found

    monkeypatch.setattr(importlib.metadata, "distributions", without_real_plugins)
    plugins.plugins()

    def install(package, module, code, *, group="methods", points=None, metadata=METADATA, lines=None, where=tmp_path):
        where.mkdir(exist_ok=True)
        (where / f"{module}.py").write_text(textwrap.dedent(code))
        folder = where / f"{package.replace('-', '_')}-1.2.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(metadata.format(package=package))
        lines = "".join(f"{point} = {module}\n" for point in points or ()) if lines is None else lines
        (folder / "entry_points.txt").write_text(f"[peftkit.{group}]\n{lines}")
        importlib.invalidate_caches()
        plugins.plugins()

    yield install
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]
    for name, _ in loading._manager().list_name_plugin():
        if str(tmp_path) in name:
            loading._manager().unregister(name=name)
    monkeypatch.undo()
    importlib.invalidate_caches()
    plugins.plugins()


def small():
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))


def listed(name="bad"):
    """State and detail of the plugins of one name."""
    found = [(info.state, info.detail) for info in plugins.plugins() if info.name == name]
    return found[0] if len(found) == 1 else found


def registered(module="fake_bad"):
    return [name for name, _ in loading._manager().list_name_plugin() if module in name]


# ---------------------------------------------------------------------------------------------- what works


def test_a_third_partys_method_works_like_a_built_in(distribution, tmp_path):
    """A 20-line plugin wraps, merges, saves and loads; it is imported when it is asked for, and not when listed."""
    distribution("peftkit-scale", "fake_scale", SCALE.format(name="scale"), points=["scale"])

    assert "scale (peftkit-scale 1.2)" in [str(info) for info in peftkit.methods()]
    assert (
        plugins.PluginInfo("methods", "scale", "peftkit-scale", "1.2", "fake_scale", "available", "")
        in plugins.plugins()
    )
    assert "fake_scale" not in sys.modules

    torch.manual_seed(0)
    base = small()
    x, state = torch.randn(3, 4), {k: v.clone() for k, v in base.state_dict().items()}
    model = peftkit.wrap(base, "scale", targets="**", start=2.0)
    expected = ((x @ (2 * state["0.weight"]).T + 2 * state["0.bias"]) @ (2 * state["1.weight"]).T) + 2 * state["1.bias"]
    torch.testing.assert_close(model(x), expected)
    assert listed("scale") == ("loaded", "")
    y = model(x)
    torch.testing.assert_close(peftkit.merge(model)(x), y)
    peftkit.unmerge(model)
    peftkit.save(model, tmp_path / "scale.safetensors")
    fresh = small()
    fresh.load_state_dict(state)
    assert torch.equal(peftkit.load(fresh, tmp_path / "scale.safetensors")(x), y)


def test_one_module_can_offer_many(distribution):
    """Several names of one module are one plugin, imported and registered once; a layer kind may be among them."""
    code = SCALE.format(name="one") + textwrap.indent(
        "\n@dataclass(frozen=True)\nclass Two(Scale):\n    name: ClassVar[str] = 'two'\n"
        "\n@peftkit.hookimpl\ndef peftkit_layers():\n    return []\n",
        "    ",
    )
    distribution(
        "peftkit-many", "fake_many", code.replace("[Scale]", "(m for m in (Scale, Two))"), points=["one", "two"]
    )

    assert peftkit.method("two").__mro__[1] is peftkit.method("one")
    assert len(registered("fake_many")) == 1


def test_a_plugin_may_be_an_object_of_its_module(distribution):
    """`module:attribute` works, and only the attributes that are named like hooks are looked at."""
    code = SCALE.format(name="scale").replace("def peftkit_methods():", "def peftkit_methods(self=None):")
    code += "\n    class Plugin:\n        peftkit_methods = staticmethod(peftkit_methods)\n"
    code += "        @property\n        def other(self):\n            raise RuntimeError\n"
    code += "        @staticmethod\n        @peftkit.hookimpl\n        def helper():\n            raise RuntimeError\n    plugin = Plugin()\n"
    distribution("peftkit-scale", "fake_scale", code, lines="scale = fake_scale:plugin [extra]\n")

    assert peftkit.method("scale").__module__ == "fake_scale"


@pytest.mark.parametrize(
    "requirement",
    [
        "peftkit",
        "peftkit>=0.1,<1",
        "PEFTkit[transformers] (>=0.0.1)",
        'peftkit>=99; extra == "future"',
        'peftkit>=99; python_version < "3"',
        "peftkit @ https://example.org/peftkit.zip",
        "peftkit-other>=99",
        "no_such_package==7",
        "??? not a requirement",
    ],
)
def test_only_what_applies_to_peftkit_itself_is_checked(distribution, requirement):
    """Extras nobody asked for, markers of other Pythons and other packages' requirements don't keep a plugin from loading."""
    distribution("peftkit-bad", "fake_bad", GOOD, points=["bad"], metadata=f"{METADATA}Requires-Dist: {requirement}\n")

    assert listed() == ("available", "")
    assert peftkit.method("bad").name == "bad"


def test_a_development_version_of_peftkit_is_a_version(distribution, monkeypatch):
    """A pre-release satisfies what its number satisfies, though installers leave pre-releases out unless asked."""
    monkeypatch.setattr(discovery, "__version__", "0.3.0.dev1")
    distribution(
        "peftkit-bad", "fake_bad", GOOD, points=["bad"], metadata=f"{METADATA}Requires-Dist: peftkit>=0.1,<1\n"
    )

    assert listed() == ("available", "")


def test_a_plugin_that_prints_when_imported_is_only_noisy(distribution, capsys):
    """It works, and whoever only lists hears nothing of it."""
    distribution("peftkit-bad", "fake_bad", "    print('hello')\n" + GOOD, points=["bad"])
    peftkit.methods()
    plugins.plugins()
    assert capsys.readouterr().out == ""

    assert peftkit.method("bad").name == "bad"
    assert capsys.readouterr().out == "hello\n"


# ---------------------------------------------------------------------------------------------- bad plugins


@dataclass
class Bad:
    """One way to be wrong: the module, the metadata, what the error says, and the state before it is asked for."""

    code: str
    cause: str
    before: str = "available"
    install: dict = field(default_factory=dict)


BAD = {
    # The import
    "an import error": Bad("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
    "an exception": Bad("raise RuntimeError('driver\\nmissing')", "RuntimeError: driver missing"),
    "a failed assertion without words": Bad("assert False", "AssertionError"),
    "an exit": Bad("import sys; sys.exit(3)", "SystemExit: 3"),
    "a syntax error": Bad("def broken(:", "SyntaxError: "),
    "an exception that cannot be told": Bad(
        "class Odd(Exception):\n    def __str__(self):\n        raise RuntimeError\nraise Odd", "Odd"
    ),
    "a module that is not there": Bad(GOOD, "ModuleNotFoundError: No module named 'fake_gone'", install={"lines": "bad = fake_gone\n"}),
    "an attribute that is not there": Bad(GOOD, "AttributeError: .*'gone'", install={"lines": "bad = fake_bad:gone\n"}),
    # The registration
    "a misspelt hook": Bad("import peftkit\n@peftkit.hookimpl\ndef peftkit_method():\n    return []", "PluginValidationError: .*peftkit_method"),
    "no hook": Bad("", "it has no function peftkit_methods that is marked with @peftkit.hookimpl"),
    "a hook that is not marked": Bad("def peftkit_methods():\n    return []", "it has no function peftkit_methods that is marked"),
    "None for a plugin": Bad("plugin = None", "it has no function peftkit_methods", install={"lines": "bad = fake_bad:plugin\n"}),
    "a hook with an argument": Bad(HOOK.format(arguments="model", body="return []"), "PluginValidationError: .*model.* can not be found"),
    "a dir() that raises": Bad(
        "class Plugin:\n    def __dir__(self):\n        raise OSError('no names')\nplugin = Plugin()",
        "OSError: no names",
        install={"lines": "bad = fake_bad:plugin\n"},
    ),
    # The answer
    "a hook that raises": Bad(HOOK.format(arguments="", body="raise RuntimeError('driver missing')"), "RuntimeError: driver missing"),
    "a hook that exits": Bad(HOOK.format(arguments="", body="raise SystemExit"), "SystemExit"),
    "every hook raises": Bad(
        HOOK.format(arguments="", body="raise KeyError('a')") + "\n@peftkit.hookimpl\ndef peftkit_layers():\n    raise KeyError('b')", "KeyError: 'a'"
    ),
    "None for an answer": Bad(HOOK.format(arguments="", body="pass"), "its hook peftkit_methods returned None, not a list"),
    "a number for an answer": Bad(HOOK.format(arguments="", body="return 3"), "its hook peftkit_methods returned 3, not a list"),
    "a generator that stops midway": Bad(
        GOOD.replace("return [Scale]", "yield Scale; raise ValueError('midway')"), "ValueError: midway"
    ),
    "a number for a method": Bad(HOOK.format(arguments="", body="return [3]"), "offers 3, which is no subclass of peftkit.Method"),
    "another class for a method": Bad(HOOK.format(arguments="", body="return [dict]"), "offers <class 'dict'>, which is no subclass"),
    "an object for a class": Bad(GOOD.replace("[Scale]", "[Scale()]"), r"offers Scale\(start=1.0\), an object; it must offer the class"),
    "a method that is no dataclass": Bad(
        GOOD.replace("[Scale]", "[type('Plain', (Scale,), {'name': 'bad', '__module__': __name__})]"),
        r"offers <class 'fake_bad.Plain'>, which is no frozen dataclass; decorate it with @dataclass\(frozen=True\)",
    ),
    "a dataclass that is not frozen": Bad(
        GOOD.replace("@dataclass(frozen=True)", "@dataclass"), "TypeError: cannot inherit non-frozen dataclass from a frozen one"
    ),
    "an abstract method": Bad(GOOD.replace("def adapter", "def adapted"), "which does not define adapter"),
    "another name": Bad(SCALE.format(name="other"), r"offers \['other'\], not 'bad' once"),
    "no name": Bad(GOOD.replace('name: ClassVar[str] = "bad"', ""), r"offers \[None\], not 'bad' once"),
    "one name twice": Bad(GOOD.replace("[Scale]", "[Scale, Scale]"), r"offers \['bad', 'bad'\], not 'bad' once"),
    # The metadata: never imported at all
    "a later peftkit": Bad(
        GOOD, "it needs peftkit>=99, this is peftkit 0", "incompatible", {"metadata": METADATA + "Requires-Dist: torch\nRequires-Dist: peftkit>=99\n"}
    ),
    "an earlier peftkit": Bad(GOOD, "it needs peftkit<0.0.1, this is", "incompatible", {"metadata": METADATA + "Requires-Dist: Peftkit (<0.0.1)\n"}),
    "a garbled requirement": Bad(
        GOOD, "its requirement 'peftkit >>> 1' cannot be read: InvalidRequirement", "broken", {"metadata": METADATA + "Requires-Dist: peftkit >>> 1\n"}
    ),
    "a garbled marker": Bad(
        GOOD, "its requirement .* cannot be read", "broken", {"metadata": METADATA + "Requires-Dist: peftkit>=0.1; moon == 'full'\n"}
    ),
    "metadata without a name": Bad(GOOD, "its metadata has no Name", "broken", {"metadata": "Metadata-Version: 2.1\nVersion: 1.2\n"}),
    "metadata without a version": Bad(GOOD, "its metadata has no Version", "broken", {"metadata": "Metadata-Version: 2.1\nName: peftkit-bad\n"}),
    "empty metadata": Bad(GOOD, "its metadata has no Name and no Version", "broken", {"metadata": ""}),
    "an entry point without a target": Bad(GOOD, "its entry point 'bad' leads to '', no module", "broken", {"lines": "bad\n"}),
    "an entry point that is no module": Bad(GOOD, "leads to 'fake-bad.py', no module", "broken", {"lines": "bad = fake-bad.py\n"}),
}  # fmt: skip


def everything_else_works():
    """A good plugin and a built-in wrap a model beside the bad one, and the listings list."""
    assert torch.isfinite(peftkit.wrap(peftkit.wrap(small(), "scale"), "lora", name="second")(torch.ones(1, 4))).all()
    assert {"lora", "scale"} <= {info.name for info in peftkit.methods()}
    assert listed("scale") == ("loaded", "")


@pytest.mark.parametrize("case", BAD)
def test_a_bad_plugin_is_named_and_breaks_only_itself(distribution, monkeypatch, capsys, case):
    """Its error has package, version, cause and remedy, and comes again without another import; all else works."""
    bad = BAD[case]
    distribution("peftkit-scale", "fake_scale", SCALE.format(name="scale"), points=["scale"])
    distribution("peftkit-bad", "fake_bad", bad.code, **{"points": ["bad"], **bad.install})
    assert listed()[0] == bad.before
    assert "bad" in [info.name for info in peftkit.methods()]

    monkeypatch.setenv("PEFTKIT_TRACE_PLUGINS", "1")
    raised = []
    for _ in range(2):
        with pytest.raises(
            errors.PluginError, match=rf"^cannot load method 'bad' from peftkit-bad 1\.2: .*{bad.cause}"
        ) as error:
            peftkit.method("bad")
        raised.append(error.value)
    monkeypatch.delenv("PEFTKIT_TRACE_PLUGINS")

    assert str(raised[0]) == str(raised[1])
    assert raised[0].__cause__ is raised[1].__cause__ is not None
    assert "mend, upgrade or uninstall peftkit-bad, or set PEFTKIT_DISABLE_PLUGINS=peftkit-bad" in str(raised[0])
    assert "\n" not in str(raised[0])
    trace = capsys.readouterr().err
    assert trace.count(": load ") == (1 if bad.before == "available" else 0)
    assert trace.count(": call ") <= 1
    state, detail = listed()
    assert state == ("broken" if bad.before == "available" else bad.before)
    assert detail
    assert detail in str(raised[0])
    assert registered() == []
    with pytest.raises(errors.PluginError, match="'bad' from peftkit-bad"):
        peftkit.wrap(small(), "bad")
    everything_else_works()

    monkeypatch.setenv("PEFTKIT_DISABLE_PLUGINS", "peftkit-bad")
    assert listed()[0] == "disabled"


def test_there_are_bad_plugins_enough():
    """At least twenty, each wrong in a way of its own."""
    assert len({bad.cause for bad in BAD.values()}) >= 20


def test_a_failed_import_is_not_tried_for_each_name(distribution, capsys, monkeypatch):
    """A plugin with two methods is imported once, and both names have the first cause."""
    distribution("peftkit-bad", "fake_bad", "raise RuntimeError('first')", points=["bad", "worse"])
    monkeypatch.setenv("PEFTKIT_TRACE_PLUGINS", "1")

    for name in ("bad", "worse"):
        with pytest.raises(errors.PluginError, match=f"method '{name}'.*RuntimeError: first"):
            peftkit.method(name)
    assert capsys.readouterr().err.count(": load ") == 1


@pytest.mark.parametrize("order", [("bad", "good"), ("good", "bad")])
def test_a_name_that_is_not_offered_leaves_the_plugins_other_names(distribution, order):
    """Metadata that promises too much breaks that name, whichever is asked for first."""
    distribution("peftkit-bad", "fake_bad", SCALE.format(name="good"), points=["bad", "good"])

    for name in order:
        if name == "bad":
            with pytest.raises(errors.PluginError, match=r"offers \['good'\], not 'bad' once"):
                peftkit.method(name)
        else:
            assert peftkit.method(name).name == "good"
    assert (listed("bad")[0], listed("good")[0]) == ("broken", "loaded")
    assert len(registered()) == 1


def test_an_interrupt_is_not_the_plugins_fault(distribution, tmp_path):
    """Ctrl-C while a plugin is imported comes through, is not remembered, and leaves nothing registered."""
    distribution("peftkit-bad", "fake_bad", "raise KeyboardInterrupt", points=["bad"])
    distribution("peftkit-two", "fake_two", HOOK.format(arguments="", body="raise KeyboardInterrupt"), points=["two"])

    for name in ("bad", "two"):
        with pytest.raises(KeyboardInterrupt):
            peftkit.method(name)
        assert listed(name) == ("available", "")
    assert registered() == registered("fake_two") == []


NONSENSE = {
    "raises": ("raise RuntimeError('no adapter today')", RuntimeError),
    "returns a number": ("return 3", errors.UnsupportedLayerError),
    "returns another module": ("return torch.nn.Linear(1, 1)", errors.UnsupportedLayerError),
    "raises at the second layer": ("if site.path == '1': raise RuntimeError\n            return ScaleAdapter(site, self)", RuntimeError),
}  # fmt: skip


@pytest.mark.parametrize("case", NONSENSE)
def test_a_method_that_cannot_make_its_adapter_leaves_the_model_alone(distribution, case):
    """Whatever `adapter` does, wrap fails cleanly, and the model can be wrapped by another method."""
    body, expected = NONSENSE[case]
    distribution("peftkit-bad", "fake_bad", GOOD.replace("return ScaleAdapter(site, self)", body), points=["bad"])
    model = small()
    before = {name: (p, p.requires_grad, p.clone()) for name, p in model.named_parameters()}
    with pytest.raises(expected):
        peftkit.wrap(model, "bad", targets="**")

    assert list(model.state_dict()) == list(before)
    assert [type(layer) for layer in model] == [nn.Linear, nn.Linear]
    for name, p in model.named_parameters():
        assert p is before[name][0]
        assert p.requires_grad == before[name][1]
        assert torch.equal(p, before[name][2])
    peftkit.wrap(model, "lora")


# ---------------------------------------------------------------------------------------------- whose name it is


def test_two_packages_with_one_name(distribution, monkeypatch):
    """A clash is an error that names both and the two ways out; neither is imported; disabling one gives the other."""
    distribution("peftkit-one", "fake_one", SCALE.format(name="clash"), points=["clash"])
    distribution("peftkit-two", "fake_two", SCALE.format(name="clash"), points=["clash"])

    with pytest.raises(
        errors.PluginError,
        match=r"^method 'clash' is offered by peftkit-one 1\.2 \(fake_one\) and peftkit-two 1\.2 \(fake_two\); "
        "uninstall all but one of them, or set PEFTKIT_DISABLE_PLUGINS=peftkit-one or PEFTKIT_DISABLE_PLUGINS=peftkit-two$",
    ):
        peftkit.method("clash")
    assert listed("clash") == [
        ("ambiguous", "also offered by peftkit-two 1.2 (fake_two)"),
        ("ambiguous", "also offered by peftkit-one 1.2 (fake_one)"),
    ]
    assert not {"fake_one", "fake_two"} & set(sys.modules)

    monkeypatch.setenv("PEFTKIT_DISABLE_PLUGINS", "peftkit-one")
    assert peftkit.method("clash").__module__ == "fake_two"
    assert [state for state, _ in listed("clash")] == ["disabled", "loaded"]


def test_one_package_with_one_name_for_two_modules(distribution):
    """It contradicts itself: an error, and not the first of the two."""
    distribution("peftkit-bad", "fake_bad", GOOD, lines="bad = fake_bad\nbad = fake_worse\n")

    with pytest.raises(errors.PluginError, match=r"peftkit-bad 1\.2 \(fake_bad\) and peftkit-bad 1\.2 \(fake_worse\)"):
        peftkit.method("bad")


def test_a_built_ins_name_cannot_be_taken(distribution):
    """A third party's `lora` is never imported, and is listed as what it is; so is a kind for torch's own Linear."""
    distribution("peftkit-evil", "fake_evil", "raise SystemExit", points=["lora"])
    distribution(
        "peftkit-vile", "fake_vile", "raise SystemExit", group="layers", points=["torch.nn.modules.linear.Linear"]
    )

    assert peftkit.method("lora") is peftkit.LoRA
    peftkit.wrap(small(), "lora")
    assert not {"fake_evil", "fake_vile"} & set(sys.modules)
    assert [info.package for info in peftkit.methods() if info.name == "lora"] == ["peftkit"]
    for name in ("lora", "torch.nn.modules.linear.Linear"):
        assert listed(name) == ("ambiguous", "the name is a built-in's, and the built-in is used")


def test_what_is_found_twice_is_no_clash(distribution, tmp_path, monkeypatch):
    """The same distribution in two places, or an entry that is listed twice, is one plugin: the first on the path."""
    distribution("peftkit-scale", "fake_scale", SCALE.format(name="scale"), points=["scale", "scale"])
    distribution("Peftkit_Scale", "fake_old", "raise RuntimeError", points=["scale"], where=tmp_path / "old")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "old")])

    assert listed("scale") == ("available", "")
    assert peftkit.method("scale").__module__ == "fake_scale"


# ---------------------------------------------------------------------------------------------- broken metadata


def test_metadata_that_cannot_be_read_breaks_only_its_own_package(distribution, tmp_path):
    """Whatever stands in a package's files, listings list, and other packages work."""
    distribution("peftkit-scale", "fake_scale", SCALE.format(name="scale"), points=["scale"])
    distribution("peftkit-bytes", "fake_bytes", GOOD, points=["bytes"])
    (tmp_path / "peftkit_bytes-1.2.dist-info" / "METADATA").write_bytes(b"Name: peftkit-bytes\nVersion: \xff\xfe\n")
    distribution("peftkit-points", "fake_points", GOOD, points=["points"])
    (tmp_path / "peftkit_points-1.2.dist-info" / "entry_points.txt").write_bytes(
        b"[peftkit.methods]\npoints = fake_\xff\n"
    )
    distribution("unrelated", "fake_unrelated", "", lines="")
    (tmp_path / "unrelated-1.2.dist-info" / "entry_points.txt").write_text("no section\nno [equals\n")
    (tmp_path / "nothing-1.2.dist-info").mkdir()
    distribution(
        "peftkit-junk",
        "fake_junk",
        GOOD,
        lines="\n# a comment\n; another\njunk = fake_junk\nbroken line\n[other]\nx = y\n",
    )
    importlib.invalidate_caches()

    found = {info.name: info for info in plugins.plugins()}
    assert found["bytes"].state == found["points"].state == found["broken line"].state == "broken"
    assert (found["bytes"].package, found["bytes"].version) == ("peftkit-bytes", "1.2")
    assert "its metadata cannot be read: UnicodeDecodeError" in found["bytes"].detail
    assert found["junk"].state == "available"
    assert "x" not in found
    for name in ("bytes", "points"):
        with pytest.raises(errors.PluginError, match=rf"method '{name}' from peftkit-{name} 1\.2"):
            peftkit.method(name)
    peftkit.wrap(small(), "scale")
    everything_else_works()


def test_an_import_hook_that_breaks_the_listing_is_in_the_listing(distribution, monkeypatch):
    """Where Python itself cannot list packages, peftkit says so and goes on with its built-ins."""

    class Finder:
        def find_distributions(self, context):
            raise OSError("the network is down")

        def find_spec(self, *args):
            return None

    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])

    assert [(info.state, info.detail) for info in plugins.plugins()] == [
        ("broken", "packages cannot be listed: OSError: the network is down")
    ]
    assert peftkit.method("lora") is peftkit.LoRA
    with pytest.raises(errors.UnknownMethodError):
        peftkit.method("scale")


# ---------------------------------------------------------------------------------------------- allowed and denied

SCALE_ALLOWED = {
    "neither is set": ({}, ""),
    "allowed by name": ({"PEFTKIT_PLUGINS": "peftkit-scale"}, ""),
    "allowed among others": ({"PEFTKIT_PLUGINS": " other , Peftkit_Scale,"}, ""),
    "denied others": ({"PEFTKIT_DISABLE_PLUGINS": "peftkit-scal,scale"}, ""),
    "denied none": ({"PEFTKIT_DISABLE_PLUGINS": ""}, ""),
    "allowed none": ({"PEFTKIT_PLUGINS": ""}, "PEFTKIT_PLUGINS does not name it"),
    "allowed others": ({"PEFTKIT_PLUGINS": "peftkit-other,scale"}, "PEFTKIT_PLUGINS does not name it"),
    "denied by name": ({"PEFTKIT_DISABLE_PLUGINS": "x,peftkit.SCALE"}, "PEFTKIT_DISABLE_PLUGINS names it"),
    "denied and allowed": (
        {"PEFTKIT_PLUGINS": "peftkit-scale", "PEFTKIT_DISABLE_PLUGINS": "peftkit-scale"},
        "PEFTKIT_DISABLE_PLUGINS names it",
    ),
}


@pytest.mark.parametrize("case", SCALE_ALLOWED)
def test_a_distribution_is_allowed_or_denied_before_it_is_imported(distribution, monkeypatch, case):
    """Unset allows any, empty none, a list only these; a denial wins; names are compared as PEP 503 has them."""
    variables, reason = SCALE_ALLOWED[case]
    distribution("peftkit-scale", "fake_scale", SCALE.format(name="scale"), points=["scale"])
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    assert listed("scale") == (("disabled", reason) if reason else ("available", ""))
    assert ("scale" in [info.name for info in peftkit.methods()]) == (not reason)
    if reason:
        with pytest.raises(
            errors.PluginError, match=f"'scale' is offered by peftkit-scale 1.2, which is disabled: {reason}"
        ):
            peftkit.method("scale")
        assert "fake_scale" not in sys.modules
    else:
        peftkit.method("scale")
    assert peftkit.method("lora") is peftkit.LoRA


def test_the_variables_are_read_at_each_call(distribution, monkeypatch):
    """A plugin that is loaded already can still be disabled, and be had back."""
    distribution("peftkit-scale", "fake_scale", SCALE.format(name="scale"), points=["scale"])
    found = peftkit.method("scale")

    with monkeypatch.context() as patch:
        patch.setenv("PEFTKIT_PLUGINS", "")
        assert listed("scale")[0] == "disabled"
        with pytest.raises(errors.PluginError, match="disabled"):
            peftkit.method("scale")
    assert peftkit.method("scale") is found


# ---------------------------------------------------------------------------------------------- strict and trace

IN_DISORDER = {
    "broken": dict(package="peftkit-bad", module="fake_bad", code="raise RuntimeError('driver')", points=["bad"]),
    "incompatible": dict(package="peftkit-bad", module="fake_bad", code=GOOD, points=["bad"], metadata=METADATA + "Requires-Dist: peftkit>=99\n"),
    "ambiguous": dict(package="peftkit-bad", module="fake_bad", code=GOOD, points=["lora"]),
}  # fmt: skip


@pytest.mark.parametrize("state", IN_DISORDER)
def test_strict_mode_refuses_any_plugin_that_is_out_of_order(distribution, monkeypatch, state):
    """Every first use is an error that names the plugin and its state, built-ins included; listing still lists."""
    distribution(**IN_DISORDER[state])
    assert peftkit.method("lora") is peftkit.LoRA
    monkeypatch.setenv("PEFTKIT_STRICT_PLUGINS", "1")

    uses = [peftkit.methods, lambda: peftkit.method("lora"), lambda: plugins.kind_of(nn.Linear), peftkit.methods]
    for use in uses:
        with pytest.raises(
            errors.PluginError, match=rf"PEFTKIT_STRICT_PLUGINS is set.*of peftkit-bad 1\.2 is {state}: "
        ):
            use()
    assert [info.state for info in plugins.plugins()] == [state]

    with monkeypatch.context() as patch:
        patch.setenv("PEFTKIT_DISABLE_PLUGINS", "peftkit-bad")
        for use in uses:
            use()
    monkeypatch.setenv("PEFTKIT_STRICT_PLUGINS", "0")
    for use in uses:
        use()


def test_strict_mode_loads_what_is_in_order(distribution, monkeypatch, tmp_path):
    """All plugins are loaded at the first use, kinds too, and one that asks for methods itself meanwhile may."""
    (tmp_path / "fake_layer.py").write_text(LAYER)
    distribution(
        "peftkit-scale",
        "fake_scale",
        "    import peftkit; peftkit.methods()\n" + SCALE.format(name="scale"),
        points=["scale"],
    )
    distribution("peftkit-kind", "fake_kind", KIND, group="layers", points=["fake_layer.HalvedLinear"])
    monkeypatch.setenv("PEFTKIT_STRICT_PLUGINS", "1")

    peftkit.wrap(small(), "lora")
    assert {info.name: info.state for info in plugins.plugins()} == {
        "scale": "loaded",
        "fake_layer.HalvedLinear": "loaded",
    }


def test_tracing_tells_each_load_and_each_call(distribution, monkeypatch, capsys):
    """One line on stderr for each, with package and version; nothing when it is off, and nothing for a listing."""
    distribution("peftkit-scale", "fake_scale", SCALE.format(name="scale"), points=["scale"])
    distribution("peftkit-bad", "fake_bad", "raise RuntimeError('driver')", points=["bad"])
    monkeypatch.setenv("PEFTKIT_TRACE_PLUGINS", "1")
    peftkit.methods()
    plugins.plugins()
    assert capsys.readouterr() == ("", "")

    peftkit.method("scale")
    peftkit.method("scale")
    with pytest.raises(errors.PluginError):
        peftkit.method("bad")
    assert capsys.readouterr().err.splitlines() == [
        "peftkit: peftkit-scale 1.2: load fake_scale",
        "peftkit: peftkit-scale 1.2: call peftkit_methods",
        "peftkit: peftkit-bad 1.2: load fake_bad",
        "peftkit: peftkit-bad 1.2: failed: RuntimeError: driver",
    ]


def test_tracing_is_off_unless_asked_for(distribution, monkeypatch, capsys):
    """Without the variable, or with 0, nothing is written."""
    distribution("peftkit-scale", "fake_scale", SCALE.format(name="scale"), points=["scale"])
    monkeypatch.setenv("PEFTKIT_TRACE_PLUGINS", "0")
    peftkit.method("scale")

    assert capsys.readouterr() == ("", "")


# ---------------------------------------------------------------------------------------------- names nobody offers


def test_the_error_for_a_method_that_is_gone_says_what_to_install(distribution, tmp_path):
    """A file knows which package its method came from."""
    distribution("peftkit-scale", "fake_scale", SCALE.format(name="scale"), points=["scale"])
    peftkit.save(peftkit.wrap(small(), "scale"), tmp_path / "a")
    (tmp_path / "peftkit_scale-1.2.dist-info" / "entry_points.txt").write_text("")

    with pytest.raises(errors.UnknownMethodError, match=r"'scale'.*peftkit-scale 1\.2, install it"):
        peftkit.load(small(), tmp_path / "a")


OWN = """\
Metadata-Version: 2.4
Name: peftkit
Version: 0.1.0
Provides-Extra: ln-tuning
Requires-Dist: torch>=2
Requires-Dist: peftkit-ln; extra == "ln-tuning"
Provides-Extra: cli
Requires-Dist: typer>=0.16; extra == "cli"
Provides-Extra: all
Requires-Dist: peftkit-ln; extra == "all"
Requires-Dist: peftkit-other; extra == "all"
"""


def test_a_method_that_is_published_but_not_installed_says_what_to_install(distribution):
    """Peftkit's own extras know which package offers a method; an extra for something else is no method."""
    distribution("peftkit", "fake_peftkit", "", lines="", metadata=OWN)

    with pytest.raises(
        errors.UnknownMethodError,
        match=r"'ln_tuning' is offered by peftkit-ln, which is not installed: pip install peftkit-ln. Installed: .*lora",
    ):
        peftkit.method("ln_tuning")
    for name in ("cli", "all", "torch"):
        with pytest.raises(errors.UnknownMethodError) as error:
            peftkit.method(name)
        assert "pip install" not in str(error.value)


def test_a_published_package_that_is_too_old_for_a_method_says_so(distribution):
    """It is there, but not with that method."""
    distribution("peftkit", "fake_peftkit", "", lines="", metadata=OWN)
    distribution("peftkit-ln", "fake_ln", "", lines="")

    with pytest.raises(
        errors.UnknownMethodError, match=r"peftkit-ln 1\.2 is installed without it: pip install --upgrade peftkit-ln\."
    ):
        peftkit.method("ln_tuning")


@pytest.mark.parametrize("metadata", ["", "Name: peftkit\nVersion: 0.1.0\nRequires-Dist: ???\n"])
def test_peftkits_own_metadata_may_be_missing_or_broken(distribution, metadata):
    """Then there is no hint, and the error is the same as ever."""
    distribution("peftkit", "fake_peftkit", "", lines="", metadata=metadata)

    with pytest.raises(errors.UnknownMethodError, match="no method called 'ln_tuning' is installed; Installed: "):
        peftkit.method("ln_tuning")


# ---------------------------------------------------------------------------------------------- layer kinds


@pytest.fixture
def layer(distribution, tmp_path):
    """A package with a layer of its own, as if it were installed."""
    (tmp_path / "fake_layer.py").write_text(LAYER)
    importlib.invalidate_caches()
    import fake_layer

    return fake_layer.HalvedLinear


def install_kind(distribution, code=KIND, **options):
    distribution("peftkit-bad", "fake_bad", code, group="layers", points=["fake_layer.HalvedLinear"], **options)


def test_a_layer_kind_is_loaded_when_such_a_layer_is_met(distribution, layer):
    """A plugin serves a class by its qualified name; a model without such a layer leaves it alone."""
    install_kind(distribution)
    peftkit.wrap(small(), "lora")
    assert "fake_bad" not in sys.modules
    assert listed("fake_layer.HalvedLinear") == ("available", "")

    plan = peftkit.plan(nn.Sequential(layer(4, 4), nn.Linear(4, 2)), "lora", targets="0")
    assert type(plan.steps[0][0].kind).__name__ == "Halves"
    assert plugins.kind_of(layer)[0] is plugins.kind_of(layer)[0]
    assert listed("fake_layer.HalvedLinear") == ("loaded", "")
    assert registered()


def test_a_layer_kind_that_is_installed_meanwhile_is_found_after_a_listing(distribution, layer):
    """Kinds that were looked up are kept; a listing reads again what there is."""
    assert type(plugins.kind_of(layer)[0]).__name__ == "Linear"
    install_kind(distribution)
    plugins.plugins()

    assert type(plugins.kind_of(layer)[0]).__name__ == "Halves"


def test_an_operation_reads_the_environment_once_a_layer_class(monkeypatch):
    """Not for each of thousands of layers; and the next operation, or anybody outside of one, reads it again."""
    reads = []
    monkeypatch.setattr(discovery, "settings", lambda: reads.append(None) or (None, None, None))
    models = [nn.Sequential(*(nn.Linear(2, 2) for _ in range(n))) for n in (3, 30)]
    counts = []
    for model in models:
        reads.clear()
        peftkit.wrap(model, "lora")
        counts.append(len(reads))
    assert 0 < counts[0] == counts[1]
    with pytest.raises(peftkit.errors.SelectorError):
        peftkit.wrap(nn.Sequential(nn.Linear(2, 2)), "lora", targets="nothing")
    reads.clear()
    plugins.kind_of(nn.Linear), plugins.kind_of(nn.Linear)
    assert len(reads) == 2


def test_a_kind_that_is_disabled_between_two_operations_is_used_no_more(distribution, layer, monkeypatch):
    """What one operation has looked up once is not kept for the next."""
    install_kind(distribution)

    def kind_in_use():
        model = peftkit.wrap(nn.Sequential(layer(4, 4), nn.Linear(4, 2)), "lora", targets="0")
        return type(model[0].__dict__["_peftkit_layer"].kinds["weight"]).__name__

    assert kind_in_use() == "Halves"
    monkeypatch.setenv("PEFTKIT_DISABLE_PLUGINS", "peftkit-bad")
    assert kind_in_use() == "Linear"


BAD_KINDS = {
    "an import error": ("import no_such_module", "ModuleNotFoundError"),
    "a misspelt hook": (KIND.replace("peftkit_layers", "peftkit_layer"), "PluginValidationError: .*peftkit_layer"),
    "no hook": ("", "no function peftkit_layers that is marked"),
    "a hook that is not marked": (KIND.replace("@peftkit.hookimpl", ""), "no function peftkit_layers that is marked"),
    "a hook that raises": (KIND.replace("return [Halves]", "raise RuntimeError('driver')"), "RuntimeError: driver"),
    "None": (KIND.replace("return [Halves]", "pass"), "returned None, not a list"),
    "an object": (KIND.replace("[Halves]", "[Halves()]"), r"offers Halves\(\), an object"),
    "a method": (KIND.replace("[Halves]", "[peftkit.LoRA]"), "which is no subclass of peftkit.LayerKind"),
    "an abstract kind": (KIND.replace("(Linear)", "(peftkit.LayerKind)"), "which does not define shape, weights"),
    "another class": (KIND.replace("HalvedLinear", "Other"), r"offers \['fake_layer.Other'\], not 'fake_layer.HalvedLinear' once"),
    "a kind that cannot be made": (
        KIND.replace("serves =", "def __init__(self):\n            raise OSError('no device')\n        serves ="),
        "OSError: no device",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_KINDS)
def test_a_broken_layer_kind_is_named_when_its_layer_is_met(distribution, layer, monkeypatch, capsys, case):
    """Not silence: an error each time, until it is disabled; models without the layer don't notice."""
    code, cause = BAD_KINDS[case]
    install_kind(distribution, code)
    peftkit.wrap(small(), "lora")
    assert "fake_bad" not in sys.modules
    model = nn.Sequential(layer(4, 4), nn.Linear(4, 2))
    before = model.state_dict()

    monkeypatch.setenv("PEFTKIT_TRACE_PLUGINS", "1")
    for _ in range(2):
        with pytest.raises(
            errors.PluginError,
            match=rf"^cannot load layer kind 'fake_layer.HalvedLinear' from peftkit-bad 1\.2: .*{cause}.*PEFTKIT_DISABLE_PLUGINS=peftkit-bad",
        ) as error:
            peftkit.wrap(model, "lora")
        assert error.value.__cause__ is not None
    assert capsys.readouterr().err.count("1.2: load ") == 1
    assert listed("fake_layer.HalvedLinear")[0] == "broken"
    assert registered() == []
    assert list(model.state_dict()) == list(before)
    assert type(model[0]) is layer
    peftkit.wrap(small(), "lora")

    monkeypatch.setenv("PEFTKIT_DISABLE_PLUGINS", "peftkit-bad")
    assert type(plugins.kind_of(layer)[0]).__name__ == "Linear"
    peftkit.wrap(model, "lora", targets="0")


@pytest.mark.parametrize("variables", [{"PEFTKIT_PLUGINS": ""}, {"PEFTKIT_DISABLE_PLUGINS": "peftkit-bad"}])
def test_a_disabled_layer_kind_is_not_imported(distribution, layer, monkeypatch, variables):
    """The layer is then served as its base class is; allowed again, by its own kind."""
    install_kind(distribution)
    with monkeypatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        assert type(plugins.kind_of(layer)[0]).__name__ == "Linear"
        assert "fake_bad" not in sys.modules

    assert type(plugins.kind_of(layer)[0]).__name__ == "Halves"


def test_a_layer_kind_for_another_peftkit_is_an_error_where_its_layer_is_met(distribution, layer):
    """Requirements hold for layer kinds too, before import; so do clashes."""
    install_kind(distribution, metadata=METADATA + "Requires-Dist: peftkit>=99\n")
    with pytest.raises(errors.PluginError, match=r"layer kind 'fake_layer.HalvedLinear' .* it needs peftkit>=99"):
        plugins.kind_of(layer)

    distribution("peftkit-two", "fake_two", KIND, group="layers", points=["fake_layer.HalvedLinear"])
    with pytest.raises(
        errors.PluginError, match=r"layer kind 'fake_layer.HalvedLinear' is offered by peftkit-bad 1.2 .* and"
    ):
        plugins.kind_of(layer)
    assert not {"fake_bad", "fake_two"} & set(sys.modules)


# ---------------------------------------------------------------------------------------------- once, and only when asked


def test_threads_that_ask_at_once_load_once(distribution, tmp_path):
    """Eight threads get one class from one import, and one error from one failing import."""
    mark = "    import time\n    time.sleep(0.05)\n    with open({path!r}, 'a') as file:\n        file.write('x')\n"
    distribution(
        "peftkit-scale",
        "fake_scale",
        mark.format(path=str(tmp_path / "good")) + SCALE.format(name="scale"),
        points=["scale"],
    )
    bad = mark.format(path=str(tmp_path / "bad")) + "    raise RuntimeError"
    distribution("peftkit-bad", "fake_bad", bad, points=["bad"])
    found, barrier = [], threading.Barrier(8)

    def ask(name):
        barrier.wait()
        try:
            found.append(peftkit.method(name))
        except errors.PluginError as error:
            found.append(str(error))

    threads = [threading.Thread(target=ask, args=(name,)) for name in ["scale", "bad"] * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(found) == 8
    assert len(set(found)) == 2
    assert (tmp_path / "good").read_text() == (tmp_path / "bad").read_text() == "x"


def test_nothing_is_imported_that_was_not_named(tmp_path):
    """In a fresh process, listing, wrapping, saving and loading leave every other plugin out of sys.modules."""
    for number, group in enumerate(["methods", "layers"]):
        folder = tmp_path / f"peftkit_x{number}-1.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: peftkit-x{number}\nVersion: 1\n")
        (folder / "entry_points.txt").write_text(f"[peftkit.{group}]\nx{number} = fake_x{number}\n")
        (tmp_path / f"fake_x{number}.py").write_text("raise SystemExit('imported')")
    code = f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        import torch, peftkit
        from peftkit.plugins import plugins
        make = lambda: torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
        model = peftkit.wrap(make(), "lora")
        peftkit.save(model, "a.safetensors")
        peftkit.load(make(), "a.safetensors", check_base=False)
        print(*(m for m in sys.modules if m.split(".")[0] in ("packaging", "transformers", "typer")))
        print([p.name for p in plugins() if p.name in ("x0", "x1")], "x0" in [i.name for i in peftkit.methods()])
        print([m for m in sys.modules if m.startswith(("fake_x", "peftkit_"))])
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert run.stdout.splitlines() == ["", "['x1', 'x0'] True", "[]"]


def test_discovery_needs_no_torch():
    """What reads metadata can be reasoned about alone: it imports the standard library, the version, and packaging when needed."""
    code = "import sys; sys.modules['torch'] = None; import types; p = types.ModuleType('peftkit'); p.__version__ = '0.1.0'; "
    code += f"sys.modules['peftkit'] = p; p.__path__ = [{str(plugins.__file__).rsplit('/', 1)[0]!r}]; import peftkit.discovery as d; d.claims(); print('read')"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "read\n"
