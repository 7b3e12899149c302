"""The command line says what the library says, in tables and in JSON, and its errors are one readable line."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

import peftkit

pytest.importorskip("typer")
from typer.main import get_command
from typer.testing import CliRunner

from peftkit.cli.app import app
from peftkit.cli.output import Refusal, write_table

DOCS = Path(__file__).parents[1] / "docs" / "cli.md"


def run(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


def answer(*args):
    """The JSON that a command prints to stdout; it must have succeeded."""
    result = run(*args, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def in_a_process(folder, *args, **environment):
    """The command in a process of its own, with what lies in `folder` installed."""
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH", "")]))
    return subprocess.run(
        [sys.executable, "-m", "peftkit", *args],
        capture_output=True, text=True, encoding="utf-8", check=False, cwd=folder,
        env={**os.environ, "PYTHONPATH": path, **environment},
    )  # fmt: skip


def install(folder, package, points, code=None, group="peftkit.methods"):
    """A fake distribution: metadata with entry points, and a module of the package's name."""
    module = package.replace("-", "_")
    if code is not None:
        (folder / f"{module}.py").write_text(textwrap.dedent(code))
    info = folder / f"{module}-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n" + "".join(f"{point} = {module}\n" for point in points))


@pytest.fixture
def models(tmp_path, monkeypatch):
    """A module of model factories in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "some_models.py").write_text(
        textwrap.dedent("""
        import torch
        from torch import nn

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
                self.score = nn.Linear(8, 2)

        class Holder:
            build = Net

        def huge():
            return nn.Sequential(nn.Linear(10**7, 10**7), nn.Linear(10**7, 2))

        def reads_a_value():
            print("building")
            return nn.Sequential(*[nn.Linear(4, 4) for _ in range(int(torch.ones(2).sum().item()))])

        net = Net()
        number = 3

        def fails():
            raise KeyError("no such size")

        def no_model():
            return [1]
        """)
    )
    yield
    sys.modules.pop("some_models", None)


# ------------------------------------------------------------------------------------------------ methods


def test_methods_lists_the_built_ins_with_their_traits():
    """Share and form are those of the method on the reference layer; the rest is what the class declares."""
    rows = {row["name"]: row for row in answer("methods")["methods"] if row["package"] == "peftkit"}
    with torch.device("meta"):
        reference = nn.Sequential(nn.Linear(1024, 1024))
    planned = peftkit.plan(reference, "lora")

    assert {name: rows[name]["form"] for name in rows} == {"frozen": "nothing", "full": "in place", "lora": "low-rank"}
    assert rows["lora"]["trainable_share"] == planned.trainable / planned.total == 2 * 8 * 1024 / (1024 * 1025)
    assert rows["full"]["trainable_share"] == 1
    assert rows["frozen"]["trainable_share"] == 0
    assert [rows["lora"][key] for key in ("merges", "identity", "matrices", "vectors", "scope", "version")] == [
        True, True, True, False, "weights", peftkit.__version__,
    ]  # fmt: skip
    assert not any(row["error"] for row in rows.values())


VARIETY = """
    from dataclasses import dataclass
    from typing import ClassVar
    import torch
    from torch import nn
    import peftkit

    print("a plugin that talks when it is imported")

    class Times(peftkit.Adapter):
        def __init__(self, site):
            super().__init__(site)
            self.factor = site.parameter(torch.ones(site.fan_out, 1))

        def weight(self, w):
            return w * self.factor

    class Around(peftkit.Activation):
        def forward(self, base, *args, **kwargs):
            return base(*args, **kwargs)

    @dataclass(frozen=True)
    class Vectors(peftkit.Method):
        name: ClassVar[str] = "vectors"
        matrices: ClassVar[bool] = False
        vectors: ClassVar[bool] = True
        default_targets: ClassVar[str] = "**.weight"
        def adapter(self, site, shared=None):
            return Times(site)

    @dataclass(frozen=True)
    class Whole(peftkit.Method):
        name: ClassVar[str] = "whole"
        scope: ClassVar[str] = "modules"
        def adapter(self, site, shared=None):
            raise peftkit.errors.UnsupportedLayerError("needs a language model")

    class Sees(peftkit.Observer):
        pass

    @dataclass(frozen=True)
    class Rich(peftkit.Method):
        name: ClassVar[str] = "rich"
        identity: ClassVar[bool] = False
        declines: ClassVar[dict] = {"Embedding": "its rows are sparse"}
        hf: ClassVar[peftkit.HuggingFace] = peftkit.HuggingFace(peft_type="RICH")
        def shared(self, sites):
            return nn.ParameterDict({"bank": nn.Parameter(torch.zeros(5))})
        def adapter(self, site, shared=None):
            return Times(site)
        def after_step(self, adapters, shared):
            pass
        def observer(self, site):
            return Sees()
        def param_groups(self, parameters, lr, adapters):
            return [{"params": list(parameters), "lr": 2 * lr}]

    @dataclass(frozen=True)
    class Raises(peftkit.Method):
        name: ClassVar[str] = "raises"
        def adapter(self, site, shared=None):
            raise ZeroDivisionError("in [bold]adapter[/bold]")

    @dataclass(frozen=True)
    class Needs(peftkit.Method):
        name: ClassVar[str] = "needs"
        size: int
        def adapter(self, site, shared=None):
            return Times(site)

    @peftkit.hookimpl
    def peftkit_methods():
        return [Vectors, Whole, Rich, Raises, Needs]
"""


@pytest.fixture(scope="module")
def variety(tmp_path_factory):
    """`peftkit methods` among plugins of every sort, some of them broken: the JSON and the table."""
    folder = tmp_path_factory.mktemp("variety")
    install(folder, "peftkit-variety", ["vectors", "whole", "rich", "raises", "needs"], VARIETY)
    install(folder, "peftkit-broken", ["broken"], "import no_such_module")
    install(folder, "peftkit-quits", ["quits"], "raise SystemExit(3)")
    as_json, table = in_a_process(folder, "methods", "--json"), in_a_process(folder, "methods")
    assert (as_json.returncode, table.returncode) == (0, 0), as_json.stderr + table.stderr
    return json.loads(as_json.stdout), table.stdout


def test_methods_shows_what_a_plugin_declares(variety):
    """Shared state, step hook, data, optimizer groups, HF name, declined kinds; a share only where there is one."""
    rows = {row["name"]: row for row in variety[0]["methods"]}
    rich = rows["rich"]

    assert variety[0]["version"] == 1
    assert [rich[key] for key in ("shared_state", "step_hook", "data", "optimizer_groups", "hf")] == [
        *[True] * 4,
        "RICH",
    ]
    assert (rich["identity"], rich["form"], rich["declines"]) == (False, "weight", {"Embedding": "its rows are sparse"})
    assert rich["trainable_share"] == (1024 + 5) / (1024 * 1025)
    assert (rows["vectors"]["form"], rows["vectors"]["trainable_share"]) == ("weight", None)
    assert [rows["whole"][key] for key in ("form", "merges", "scope", "error")] == ["activation", False, "modules", ""]


def test_methods_goes_on_past_a_broken_plugin(variety):
    """A plugin that fails on import, quits, or raises in its own code is a row with the error; the rest is there."""
    rows = {row["name"]: row for row in variety[0]["methods"]}

    assert {"frozen", "full", "lora", "vectors"} <= {name for name, row in rows.items() if not row["error"]}
    assert re.search(r"peftkit-broken 1\.2.*no_such_module", rows["broken"]["error"])
    assert "peftkit-quits" in rows["quits"]["error"]
    assert "ZeroDivisionError: in [bold]adapter[/bold]" in rows["raises"]["error"]
    assert "size" in rows["needs"]["error"]


def test_a_table_in_a_pipe_is_plain_and_whole(variety):
    """One line a row, nothing cut off, no colours, no markup read from the cells."""
    lines = {line.split()[0]: line for line in variety[1].splitlines() if line}

    assert "\x1b" not in variety[1]
    assert "ZeroDivisionError: in [bold]adapter[/bold]" in lines["raises"]
    assert "no_such_module" in lines["broken"]
    assert "not the identity at the start, shared state, step hook, data, optimizer groups" in lines["rich"]
    assert "vectors only" in lines["vectors"]


def test_a_table_in_a_terminal_fits(monkeypatch, capsys):
    """Where the terminal is narrow, sentences take several lines; names and numbers stay whole, to the right if asked."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "40")
    write_table(
        ["name", "size", "what"], [["a-rather-long-name", "1.00%", "it has a [good] deal to say"]],
        right=["size"], fold=["what"],
    )  # fmt: skip
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).rstrip() for line in capsys.readouterr().out.splitlines()]

    assert lines == [
        " name                 size  what",
        " ──────────────────────────────────────",
        " a-rather-long-name  1.00%  it has a",
        "                            [good] deal",
        "                            to say",
    ]


def test_listing_loads_neither_the_kit_nor_transformers():
    """`methods` and `plugins` start as fast as the library does."""
    code = (
        "import sys; from peftkit.cli.app import app\n"
        "for command in ('methods', 'plugins'): app([command], standalone_mode=False)\n"
        "print('loaded:', *sorted({'transformers', 'peftkit.testing', 'peft'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[0].startswith("method ")
    assert result.stdout.splitlines()[-1] == "loaded:"


# ------------------------------------------------------------------------------------------------ plugins


def test_plugins_imports_nothing_and_works_when_all_are_broken(tmp_path):
    """Plugins that end the process on import are listed with package, version and target, and never imported."""
    code = "import pathlib; pathlib.Path('imported').touch(); raise SystemExit(3)"
    install(tmp_path, "peftkit-one", ["one", "clash"], code)
    install(tmp_path, "peftkit-two", ["clash"], code)
    install(tmp_path, "peftkit-kind", ["some.Layer"], code, group="peftkit.layers")

    listing = in_a_process(tmp_path, "plugins", "--json")
    assert listing.returncode == 0, listing.stderr
    found = json.loads(listing.stdout)
    rows = {(p["name"], p["package"]): p for p in found["plugins"]}
    assert found["version"] == 1
    assert rows["one", "peftkit-one"] == {
        "group": "methods", "name": "one", "package": "peftkit-one", "version": "1.2",
        "target": "peftkit_one", "state": "available", "detail": "",
    }  # fmt: skip
    assert rows["some.Layer", "peftkit-kind"]["group"] == "layers"
    assert {rows["clash", package]["state"] for package in ("peftkit-one", "peftkit-two")} == {"ambiguous"}

    strict = in_a_process(tmp_path, "plugins", "--strict")
    assert strict.returncode == 1
    assert "peftkit-one" in strict.stdout
    assert not (tmp_path / "imported").exists()


def test_without_plugins_the_list_says_so(monkeypatch):
    """No table of nothing."""
    from peftkit import plugins

    monkeypatch.setattr(plugins, "plugins", list)
    assert run("plugins").stdout.startswith("no plugin is installed")
    assert answer("plugins")["plugins"] == []


@pytest.mark.parametrize(
    "state, code",
    [("available", 0), ("loaded", 0), ("disabled", 0), ("broken", 1), ("incompatible", 1), ("ambiguous", 1)],
)
def test_strict_is_about_faults(state, code, monkeypatch):
    """`--strict` lets available, loaded and disabled plugins pass; without it nothing fails."""
    from peftkit import plugins

    found = [plugins.PluginInfo("methods", "x", "peftkit-x", "1.2", "peftkit_x", state, "the reason")]
    monkeypatch.setattr(plugins, "plugins", lambda: found)

    assert run("plugins", "--strict").exit_code == code
    assert run("plugins").exit_code == 0
    assert re.search(rf"methods +x +peftkit-x +1\.2 +peftkit_x +{state} +the reason", run("plugins").stdout)


# --------------------------------------------------------------------------------------------------- plan


def test_plan_prints_the_plan(models):
    """The table is `str(peftkit.plan(...))` with the same arguments."""
    options = ["--targets", "layers.**", "--targets", "score", "--exclude", "layers.1", "--method", "lora"]
    result = run(
        "plan", "some_models:Net", *options, "--set", "rank=3", "--set", "init=default", "--set", "rank_stabilized=true"
    )
    import some_models  # found in the current folder by the command itself

    expected = peftkit.plan(
        some_models.Net(), "lora", targets=["layers.**", "score"], exclude="layers.1", rank=3, rank_stabilized=True
    )
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{expected}\n"


def test_plan_as_json(models):
    """Rows, totals and hits, with stable keys."""
    found = answer("plan", "some_models:Net", "--set", "rank=3")
    import some_models

    expected = peftkit.plan(some_models.Net(), "lora", rank=3)
    assert set(found) == {"version", "trainable", "total", "rows", "rules"}
    assert (found["trainable"], found["total"]) == (expected.trainable, expected.total)
    assert found["rows"] == json.loads(json.dumps([dataclasses.asdict(row) for row in expected.rows]))
    assert found["rules"] == [{"selector": "@linear", "method": "lora(rank=3)", "weights": 3}]


@pytest.mark.parametrize("name, total", [("Net", 234), ("Holder.build", 234), ("net", 234), ("reads_a_value", 40)])
def test_plan_takes_classes_factories_and_models(models, name, total):
    """What the name stands for may be any of these; what its code prints doesn't get into the JSON."""
    assert answer("plan", f"some_models:{name}", "--targets", "**")["total"] == total


def test_plan_builds_on_the_meta_device(models):
    """A model of 400 TB is no matter."""
    assert answer("plan", "some_models:huge")["total"] == 10**14 + 3 * 10**7 + 2


def test_plan_reads_a_transformers_configuration(models, tmp_path):
    """The architecture that the configuration names, with its head; the bare model where it names none."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_embd=10**5, n_layer=2, n_head=4, vocab_size=11, architectures=["GPT2LMHeadModel"]
    )
    config.save_pretrained(tmp_path / "with_head")
    config.architectures = None
    config.save_pretrained(tmp_path / "bare")

    paths = {
        name: {row["path"] for row in answer("plan", f"hf:{tmp_path / name}")["rows"]} for name in ("with_head", "bare")
    }
    assert "transformer.h.1.attn.c_attn" in paths["with_head"]
    assert "h.1.attn.c_attn" in paths["bare"]


# ------------------------------------------------------------------------------------------------- errors

REFUSED = {
    "no model of that form": (["plan", "resnet"], "MODEL is module:callable"),
    "no such module": (["plan", "no_such_module:Net"], "cannot import no_such_module:Net: ModuleNotFoundError"),
    "no such name": (["plan", "some_models:Nut"], "cannot import some_models:Nut: AttributeError"),
    "no callable": (["plan", "some_models:number"], "some_models:number is a int and not callable"),
    "a factory that fails": (["plan", "some_models:fails"], "some_models:fails() raises KeyError: 'no such size'"),
    "a factory of something else": (["plan", "some_models:no_model"], "gives a list and no nn.Module"),
    "no such folder": (["plan", "hf:no_such_folder"], "cannot build a model from hf:no_such_folder"),
    "no such method": (["plan", "some_models:Net", "--method", "loar"], "did you mean "),
    "no such field": (["plan", "some_models:Net", "--set", "rnak=3"], "lora has no field 'rnak'; did you mean 'rank'?"),
    "a wrong value": (["plan", "some_models:Net", "--set", "rank=many"], "'many'"),
    "no value": (["plan", "some_models:Net", "--set", "rank"], "--set takes field=value"),
    "a field twice": (["plan", "some_models:Net", "--set", "rank=1", "--set", "rank=2"], "--set gives 'rank' twice"),
    "targets that match nothing": (["plan", "some_models:Net", "--targets", "scroe"], "score"),
    "no such device": (["check", "lora", "--device", "tpu:x"], "--device takes the name of a device"),
    "a check of no method": (["check", "loar"], "did you mean "),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_error_is_one_line(models, case):
    """The message alone, on stderr, with exit code 2; stdout stays empty, for a program that reads JSON there."""
    args, words = REFUSED[case]
    result = run(*args, "--json")

    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert words in result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_traceback_shows_where(models):
    """`--traceback` lets the error through, with its cause."""
    result = run("--traceback", "plan", "some_models:fails")

    assert isinstance(result.exception, Refusal)
    assert isinstance(result.exception.__cause__, KeyError)


def test_without_its_packages_the_command_says_what_to_install():
    """`typer` missing: exit code 1 and one line."""
    code = "import sys; sys.modules['typer'] = None; import peftkit.cli; sys.exit(peftkit.cli.main())"
    result = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)

    assert result.returncode == 1
    assert result.stderr == "the command line needs two more packages: pip install 'peftkit[cli]'\n"


def test_a_stream_without_the_signs_gets_question_marks(tmp_path):
    """A terminal that has no × is no reason to fail."""
    result = in_a_process(tmp_path, "plan", "torch.nn:LSTM", PYTHONIOENCODING="iso8859-5")
    assert "Error: torch.nn:LSTM() raises" in result.stderr

    (tmp_path / "tiny.py").write_text(
        "import torch\ndef build():\n    return torch.nn.Sequential(torch.nn.Linear(3, 2))\n"
    )
    result = in_a_process(tmp_path, "plan", "tiny:build", PYTHONIOENCODING="iso8859-5")
    assert result.returncode == 0, result.stderr
    assert "2?3" in result.stdout


def test_version():
    """`peftkit --version` is the library's."""
    assert run("--version").stdout == f"peftkit {peftkit.__version__}\n"


# -------------------------------------------------------------------------------------------------- check


@pytest.mark.parametrize(
    "statuses, code, line",
    [
        (["passed", "expected failure"], 0, "lora(rank=2): 1 passed, 1 expected failure"),
        (["passed", "skipped"], 0, "skipped 1: saw [skipped]"),
        (["passed", "failed"], 1, "failed: check_merge: saw [failed]"),
        (["passed", "unexpected pass"], 1, "unexpected pass: check_merge: saw [unexpected pass]"),
        (["skipped", "skipped"], 1, "skipped 2: saw [skipped]"),
    ],
)
def test_check_reports_what_the_kit_finds(statuses, code, line, monkeypatch):
    """A row a check, then faults and reasons for skips; exit code 1 for any fault, and where nothing could be tried."""
    from peftkit import testing

    asked = []

    def kit(method, *, device="cpu"):
        asked.append((method, device))
        cases = zip(("Linear", ""), statuses, strict=True)
        return [testing.Result("check_merge", case, status, f"saw [{status}]") for case, status in cases]

    monkeypatch.setattr(testing, "check_method", kit)
    table = run("check", "lora", "--set", "rank=2", "--device", "cuda")
    as_json = run("check", "lora", "--set", "rank=2", "--json")

    assert asked == [(peftkit.LoRA(rank=2), "cuda"), (peftkit.LoRA(rank=2), "cpu")]
    assert (table.exit_code, as_json.exit_code) == (code, code)
    lines = table.stdout.splitlines()
    assert lines[0].split()[0] == "check"
    assert lines[1].split()[0] == "check_merge"
    assert line in lines
    assert ("saw" in table.stdout) == ("saw" in line)
    found = json.loads(as_json.stdout)
    assert (found["version"], found["method"], found["passed"]) == (1, "lora", not code)
    assert found["fields"]["rank"] == 2
    assert [result["status"] for result in found["results"]] == statuses
    assert found["results"][0]["case"] == "Linear"


def test_check_runs_the_kit(monkeypatch):
    """On a built-in method, here on one layer kind, the real kit finds nothing and tries much."""
    from peftkit import testing

    monkeypatch.setattr("peftkit.testing.kit.CASES", testing.CASES[:1])
    found = answer("check", "lora", "--set", "rank=2")

    assert found["passed"]
    assert len([result for result in found["results"] if result["status"] == "passed"]) > 40


# --------------------------------------------------------------------------------------------------- docs


def sections():
    """docs/cli.md: command → text of its section."""
    parts = re.split(r"^## `peftkit (\w+)`.*$", DOCS.read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_every_command_is_documented_with_its_options():
    """docs/cli.md has a section for each command, with an example and every option; and none that is not there."""
    commands = get_command(app).commands
    assert set(sections()) == set(commands)
    for name, command in commands.items():
        text = sections()[name]
        assert f"$ peftkit {name}" in text
        for parameter in command.params:
            for option in parameter.opts:
                if option.startswith("--") and option != "--help":
                    assert f"`{option}" in text, (name, option)


def test_the_plan_in_the_docs_is_what_is_printed(tmp_path, monkeypatch):
    """The example of `peftkit plan` in docs/cli.md, run."""
    text = sections()["plan"]
    (code,) = re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    ((command, expected),) = re.findall(
        r"^```console\n\$ peftkit (plan my_model.*?)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL
    )
    (tmp_path / "my_model.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])

    result = run(*[word.strip("'") for word in command.split()])
    sys.modules.pop("my_model", None)

    assert result.stdout == expected
