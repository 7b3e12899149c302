"""The bench measures what it says, survives whatever a cell does, goes on after an interrupt, and knows no plugin by name.

Most runs here measure in this process, so that they are quick; what only a process of its own can show (a crash, a kill,
a hang, a third party's distribution seen from the command line) is shown with one.
"""

import copy
import dataclasses
import importlib
import json
import math
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn

import peftkit
from peftkit import loading, plugins
from peftkit.bench import document as documents
from peftkit.bench import engine, exact, process, quality, statistics, timing, worker
from peftkit.bench.derived import derived
from peftkit.bench.engine import Entry, Settings
from peftkit.bench.subject import Subject, workload_named
from peftkit.workload import Metric

pytest.importorskip("typer")
pytest.importorskip("jsonschema")
from typer.testing import CliRunner

from peftkit.cli.app import app
from peftkit.cli.benching import entry_of

PLUGIN = """
    import os
    from dataclasses import dataclass
    from typing import ClassVar
    import torch
    import peftkit

    @dataclass(frozen=True)
    class Gain(peftkit.Method):
        name: ClassVar[str] = "thirdgain"
        start: float = 1.0
        fault: str = ""

        def adapter(self, site, shared=None):
            if self.fault == "memory":
                raise MemoryError
            if self.fault == "refuses":
                raise peftkit.errors.UnsupportedLayerError("not on this layer")
            if self.fault == "raises":
                raise KeyError("planted")
            return GainAdapter(site, self)

    class GainAdapter(peftkit.Adapter):
        def __init__(self, site, method):
            super().__init__(site)
            self.gain = site.parameter(torch.full((site.fan_out, 1), method.start))

        def weight(self, w):
            return w * self.gain

    class Plane(peftkit.Workload):
        name = "thirdplane"
        summary = "a plane that a third party offers"
        per_step = 4

        def model(self):
            return torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))

        def batches(self, seed):
            generator = torch.Generator().manual_seed(seed)
            while True:
                yield (torch.randn(4, 6, generator=generator),)

        def loss(self, model, batch):
            return model(*batch).square().mean()

    class Falls(Plane):
        name = "thirdfalls"

        def output(self, model, batch):  # the base is run by itself where inference is timed, and nowhere else
            try:
                peftkit.summary(model)
            except peftkit.errors.StateError:
                print("last words", flush=True)
                os._exit(3)
            return super().output(model, batch)

    @peftkit.hookimpl
    def peftkit_methods():
        return [Gain]

    @peftkit.hookimpl
    def peftkit_workloads():
        return [Plane, Falls]
"""
POINTS = "[peftkit.methods]\nthirdgain = third_party\n[peftkit.workloads]\nthirdplane = third_party\nthirdfalls = third_party\n"


def install(folder, code=PLUGIN, points=POINTS, package="third-party", module="third_party"):
    """A fake distribution with its module, as pip would leave it in a folder on the path."""
    (folder / f"{module}.py").write_text(textwrap.dedent(code))
    info = folder / f"{module}-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(points)
    importlib.invalidate_caches()
    plugins.plugins()


@pytest.fixture
def third_party(tmp_path, monkeypatch):
    """A folder on the path, with a distribution that offers a method and two workloads; gone after the test."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    monkeypatch.chdir(tmp_path)
    install(folder)
    yield folder
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]
    for name, _ in loading._manager().list_name_plugin():
        if str(folder) in name:
            loading._manager().unregister(name=name)
    monkeypatch.undo()
    importlib.invalidate_caches()
    plugins.plugins()


class Here:
    """Stands for `process.Run`: the job is done in this process. Counts the cells that were measured."""

    measured: ClassVar[list] = []
    phases: ClassVar[list] = []
    interrupt_at = None
    """The number of measured cells at which Ctrl-C is pressed."""

    def __init__(self, job):
        self.job = json.loads(json.dumps(job))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def result(self, timeout):
        if "method" in self.job:
            if len(Here.measured) == Here.interrupt_at:
                raise KeyboardInterrupt
            Here.measured.append((self.job["workload"], self.job["method"], tuple(self.job["fields"].items())))
            Here.phases.append(self.job["phases"])
        job, found = Path("job.json"), Path("result.json")
        job.write_text(json.dumps(self.job))
        worker.main(job, found)
        return {**json.loads(found.read_text()), "seconds": 0.5}


@pytest.fixture
def here(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(engine, "Run", Here)
    monkeypatch.setattr(Here, "measured", [])
    monkeypatch.setattr(Here, "phases", [])
    monkeypatch.setattr(Here, "interrupt_at", None)
    return Here


QUICK = Settings(pairs=1, seconds=1.0, threads=1)
EXACT = Settings(pairs=1, phases=("exact",), threads=1)


def bench(methods, workloads, settings=EXACT, out="bench.json", earlier=None, tell=lambda _: None):
    entries = [entry_of(method) for method in methods]
    command = ["peftkit", "bench", "run"]
    engine.run(entries, workloads, settings, out=Path(out), command=command, earlier=earlier, tell=tell)
    return documents.read(out)


def cell(document, label, workload=None):
    found = [c for c in document["cells"] if c["label"] == label and workload in (None, c["workload"])]
    assert len(found) == 1
    return found[0]


def subject(method, workload="tiny-mlp", **fields):
    return Subject(plugins.workload(workload), peftkit.method(method)(**fields), torch.device("cpu"))


# ------------------------------------------------------------------------------------------------ whole runs


def test_a_run_measures_every_cell(here):
    """Every phase gives its part of each cell; `full` and `frozen` are rows like the others; the document is valid."""
    document = bench(["lora:rank=2", "full", "frozen"], ["tiny-mlp"], QUICK)
    planned = peftkit.plan(plugins.workload("tiny-mlp").model(), {"4": "full", "@linear": peftkit.LoRA(rank=2)})

    assert [(c["label"], c["status"], c["error"]) for c in document["cells"]] == [
        ("lora rank=2", "ok", None), ("full", "ok", None), ("frozen", "ok", None),
    ]  # fmt: skip
    lora = cell(document, "lora rank=2")
    assert lora["exact"]["trainable_parameters"] == planned.trainable
    assert lora["hyperparameters"]["4"] == {"method": "full", "keep_base": False}
    assert lora["hyperparameters"]["@linear"]["rank"] == 2
    assert lora["origin"] == f"peftkit {peftkit.__version__}"
    for each in document["cells"]:
        assert all(value is not None for value in each["exact"].values() if value is not None)
        assert sum(v for k, v in each["exact"]["memory"].items() if k != "peak") == each["exact"]["memory"]["peak"]
        for name in ("step_pairs", "inference_pairs", "merged_pairs"):
            assert [len(row) for row in each["times"][name]] == [4]
        for name in ("forward", "backward", "optimizer", "wrap", "save", "load", "merge", "unmerge"):
            assert len(each["times"][name]) == 1
        assert each["derived"]["step_ratio"]["low"] <= each["derived"]["step_ratio"]["high"]
        assert each["quality"] is None
    workload = document["workloads"][0]
    assert workload["parameters"] == sum(p.numel() for p in plugins.workload("tiny-mlp").model().parameters())
    assert (workload["unit"], workload["per_step"], workload["metric"]["items"]) == ("samples", 16, 512)
    assert cell(document, "frozen")["exact"]["trainable_parameters"] == 33 * 10  # the new head trains there as well


def test_two_runs_agree_in_every_exact_figure(here):
    """The deterministic columns of two runs are identical, whatever else was drawn in between."""
    first = bench(["lora", "full", "frozen"], ["tiny-mlp"])
    torch.rand(7)
    second = bench(["lora", "full", "frozen"], ["tiny-mlp"], out="second.json")

    assert [c["exact"] for c in first["cells"]] == [c["exact"] for c in second["cells"]]
    assert first["workloads"] == second["workloads"]


def test_a_document_tells_no_path_and_no_host(here, tmp_path, monkeypatch):
    """What is shown to others holds no folder of this machine, and not its name; an error's message neither."""
    monkeypatch.setenv("LD_PRELOAD_OF_BENCH", str(tmp_path / "libfast.so"))
    (tmp_path / "own_paths.py").write_text("def build():\n    return open(__file__ + 'absent')\n")
    monkeypatch.syspath_prepend(tmp_path)
    document = copy.deepcopy(bench(["lora"], ["own_paths:build", "tiny-mlp"]))
    assert document["environment"].pop("torch_config")  # the folders in it are those of whoever has built torch
    text = json.dumps(document)

    assert "own_paths.pyabsent" in text
    assert '"libfast.so"' in text
    for folder in (tmp_path, Path.home(), Path(peftkit.__file__).parents[1]):
        assert str(folder) + os.sep not in text
    assert os.uname().nodename not in text


def test_a_model_of_ones_own(here, tmp_path, third_party):
    """`module:function` with model, batches and loss is a workload."""
    (tmp_path / "own_bench.py").write_text(
        "import torch\n"
        "def build():\n"
        "    batches = [(torch.ones(3, 4), torch.zeros(3, 2)), (torch.ones(3, 4), torch.ones(3, 2))]\n"
        "    loss = lambda model, batch: (model(batch[0]) - batch[1]).square().mean()\n"
        "    return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2)), batches, loss\n"
        "def lossless():\n"
        "    return torch.nn.Linear(4, 4), [torch.ones(3, 4)]\n"
        "def nothing():\n"
        "    return 3\n"
    )
    document = bench(["lora"], ["own_bench:build", "own_bench:lossless", "own_bench:nothing", "own_bench:absent"])

    own, lossless, nothing, absent = document["cells"]
    assert own["status"] == "ok"
    assert own["exact"]["trainable_parameters"] == 8 * (4 + 4)
    assert document["workloads"][0]["per_step"] == 3
    assert lossless["status"] == "failed"
    assert "no loss" in lossless["error"]["message"]
    assert [c["status"] for c in (nothing, absent)] == ["not run", "not run"]
    assert "(model, batches)" in nothing["error"]["message"]
    assert "absent" in absent["error"]["message"]


# ------------------------------------------------------------------------------------------------ what goes wrong


FAULTS = {
    "memory": ("out of memory", "MemoryError"),
    "refuses": ("not applicable", "UnsupportedLayerError"),
    "raises": ("failed", "KeyError"),
}


def test_a_fault_of_one_cell_is_a_row(here, third_party):
    """Running out of memory, refusing the model and any other error are statuses; the cells after them are measured."""
    faulty = [f"thirdgain:fault={fault}" for fault in FAULTS]
    document = bench([*faulty, "thirdgain"], ["thirdplane"])

    for fault, (status, kind) in FAULTS.items():
        found = cell(document, f"thirdgain fault={fault}")
        assert (found["status"], found["error"]["phase"], found["error"]["type"]) == (status, "wrap", kind)
        assert found["exact"] is None
    assert cell(document, "thirdgain")["status"] == "ok"


@pytest.mark.parametrize(
    "error,phase,status",
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "speed", "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "exact", "out of memory"),
        (RuntimeError("shapes differ"), "exact", "failed"),
        (peftkit.errors.SelectorError("no such layer"), "wrap", "not applicable"),
        (peftkit.errors.SelectorError("no such layer"), "speed", "failed"),
        (peftkit.errors.PluginError("broken"), "load", "failed"),
    ],
)
def test_status_of(error, phase, status):
    """An error's status says whether the method does not fit, memory was short, or something is broken."""
    assert worker.status_of(error, phase) == status


def test_what_was_measured_before_a_fault_is_kept(here, third_party, monkeypatch):
    """A cell that fails in one phase keeps the figures of the phases before it, and is not said to be in order."""
    monkeypatch.setattr(timing, "_inference", lambda *_: 1 / 0)
    found = bench(["thirdgain"], ["thirdplane"], QUICK)["cells"][0]

    assert (found["status"], found["error"]["phase"]) == ("failed", "speed")
    assert found["exact"]["trainable_parameters"] == 5  # of the two layers, the second is the head
    assert found["derived"]["step_seconds"]["median"] > 0
    assert found["times"].get("inference_pairs") is None


def test_a_workload_that_cannot_be_had(here, third_party):
    """All cells of a workload that is broken or lacks its data are "not run", with the reason; the others are measured."""
    code = """
        import peftkit

        class Bare(peftkit.Workload):
            name, summary, per_step = "bare", "lacks its data", 1
            def prepare(self):
                raise peftkit.errors.WorkloadError("its data cannot be downloaded")
            def model(self):
                raise AssertionError
            def batches(self, seed):
                raise AssertionError

        @peftkit.hookimpl
        def peftkit_workloads():
            return [Bare]
    """
    install(third_party, code, "[peftkit.workloads]\nbare = bare_party\nhollow = bare_party\n", "bare", "bare_party")
    document = bench(["lora", "full"], ["bare", "hollow", "thirdplane"])

    assert [c["status"] for c in document["cells"]] == ["not run"] * 4 + ["ok"] * 2
    assert "its data cannot be downloaded" in document["cells"][0]["error"]["message"]
    assert document["workloads"][0]["summary"] == "lacks its data"
    assert "'hollow'" in document["cells"][2]["error"]["message"]
    assert document["workloads"][1]["fingerprint"] is None


@pytest.mark.parametrize("how", ["kill", "hang"])
def test_a_process_that_is_killed_or_hangs(how):
    """A kill from outside and a hang end in a failed cell that says which, and leave no process."""
    job = {"workload": "tiny-mlp", "threads": 1}
    with process.Run(job) as run:
        if how == "kill":
            os.kill(run.process.pid, signal.SIGKILL)
        found = run.result(timeout=60 if how == "kill" else 0.2)

    assert run.process.poll() is not None
    assert found["status"] == "failed"
    assert found["error"]["type"] == {"kill": "SIGKILL", "hang": "Timeout"}[how]
    assert {"kill": "memory runs out", "hang": "0.2 seconds"}[how] in found["error"]["message"]


def test_a_worker_does_not_outlive_its_parent(tmp_path):
    """A worker whose parent is killed, and so cannot end it, ends by itself."""
    code = (
        "import subprocess, sys, time\n"
        "worker = 'from peftkit.bench.worker import leave_with_parent; leave_with_parent();'\n"
        "worker += 'import pathlib, time; pathlib.Path(sys.argv[1]).touch(); time.sleep(600)'\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import sys;' + worker, sys.argv[1]])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    ready = tmp_path / "ready"
    with subprocess.Popen([sys.executable, "-c", code, str(ready)], stdout=subprocess.PIPE, text=True) as parent:
        child = int(parent.stdout.readline())
        wait_for(ready.exists)
        parent.kill()
    wait_for(lambda: not Path(f"/proc/{child}").exists() or "State:\tZ" in Path(f"/proc/{child}/status").read_text())


def wait_for(happened):
    """Wait until it has happened; a minute is enough for a busy machine."""
    for _ in range(600):
        if happened():
            return
        time.sleep(0.1)
    pytest.fail("it has not happened")


def test_leaving_a_run_early_ends_its_process():
    """An interrupt while a cell is measured leaves no process behind."""
    with pytest.raises(KeyboardInterrupt), process.Run({"workload": "tiny-mlp", "threads": 1}) as run:
        raise KeyboardInterrupt

    assert run.process.poll() is not None


def test_a_third_partys_distribution_from_the_command_line(third_party, tmp_path):
    """A method and workloads that pip has installed are listed, measured and reported without a line of code; a cell
    that crashes in the middle keeps what it had, and is shown.
    """
    listed = CliRunner().invoke(app, ["bench", "list", "--json"])
    rows = {row["name"]: row for row in json.loads(listed.stdout)["workloads"]}
    assert (rows["thirdplane"]["package"], rows["thirdplane"]["error"]) == ("third-party", "")

    out = str(tmp_path / "bench.json")
    arguments = ["bench", "run", "thirdfalls", "--method", "thirdgain", "--out", out, "--quick", "--threads", "1"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1, result.output  # its only cell has crashed
    document = documents.read(out)
    crashed = document["cells"][0]
    assert (document["workloads"][0]["origin"], crashed["origin"]) == ("third-party 1.2", "third-party 1.2")
    assert (crashed["status"], crashed["error"]["phase"], crashed["error"]["type"]) == ("failed", "speed", "Exit")
    assert "exit code 3" in crashed["error"]["message"]
    assert "last words" in crashed["error"]["message"]
    assert crashed["exact"]["trainable_parameters"] == 5
    assert crashed["derived"]["step_ratio"] is not None
    assert "thirdgain" in result.stdout
    assert "third-party" in document["environment"]["packages"]


# ------------------------------------------------------------------------------------------ interrupt and resume


def test_an_interrupted_run_resumes(here, tmp_path):
    """Ctrl-C leaves a valid document with every cell; `--resume` measures only what is missing, and ends like a whole run."""
    arguments = ["bench", "run", "tiny-mlp", "--only", "exact", "--threads", "1", "--out", "bench.json"]
    arguments += [word for name in ("frozen", "lora", "full") for word in ("--method", name)]
    here.interrupt_at = 1
    interrupted = CliRunner().invoke(app, arguments)
    assert interrupted.exit_code == 130
    assert "--resume" in interrupted.stderr
    left = documents.read("bench.json")
    assert [c["status"] for c in left["cells"]] == ["ok", "not run", "not run"]

    here.interrupt_at = None
    refused = CliRunner().invoke(app, arguments)
    assert (refused.exit_code, documents.read("bench.json")) == (2, left)
    assert "--resume" in refused.stderr
    here.interrupt_at = 1
    CliRunner().invoke(app, [*arguments, "--resume"])  # a second interrupt, before anything new
    assert documents.read("bench.json")["cells"] == left["cells"]
    here.interrupt_at = None
    resumed = CliRunner().invoke(app, [*arguments, "--resume"])
    assert resumed.exit_code == 0, resumed.output
    assert "frozen: ok (taken over)" in resumed.stderr
    assert [name for _, name, _ in here.measured] == ["frozen", "lora", "full"]
    whole = bench(["frozen", "lora", "full"], ["tiny-mlp"], EXACT, out="whole.json")
    assert [c["exact"] for c in documents.read("bench.json")["cells"]] == [c["exact"] for c in whole["cells"]]


CHANGES = {
    "settings": lambda document: document["settings"].update(pairs=9),
    "a version": lambda document: document["environment"]["packages"].update(torch="0.1"),
    "the machine": lambda document: document["environment"].update(machine="another"),
    "the code": lambda document: document["environment"].update(git={"commit": "abc", "dirty": False}),
    "the base": lambda document: document["workloads"][0].update(fingerprint="0" * 64),
    "the method's package": lambda document: document["cells"][0].update(origin="peftkit 0.0"),
    "a failure": lambda document: document["cells"][0].update(
        status="failed", error={"phase": "speed", "type": "KeyError", "message": ""}
    ),
}


@pytest.mark.parametrize("change", ["nothing", *CHANGES])
def test_resume_takes_over_only_what_is_the_same(here, change):
    """A cell is measured again if settings, versions, machine, code, base or the method's package differ, or it failed."""
    earlier = copy.deepcopy(bench(["frozen"], ["tiny-mlp"]))
    CHANGES.get(change, lambda _: None)(earlier)
    here.measured.clear()
    again = bench(["frozen"], ["tiny-mlp"], earlier=earlier)

    assert len(here.measured) == (0 if change == "nothing" else 1)
    assert again["cells"][0]["status"] == "ok"


def test_resume_adds_the_phases_that_are_missing(here):
    """A cell keeps what it has and gets the rest, once."""
    both = Settings(pairs=1, phases=("exact", "quality"), seeds=(0, 1), threads=1)
    first = copy.deepcopy(bench(["lora"], ["tiny-mlp"], dataclasses.replace(both, phases=("exact",))))
    second = copy.deepcopy(bench(["lora"], ["tiny-mlp"], both, earlier=first))
    third = bench(["lora"], ["tiny-mlp"], both, earlier=second)

    assert here.phases == [["exact"], ["quality"]]
    assert second["cells"][0]["exact"] == first["cells"][0]["exact"]
    assert third["cells"] == second["cells"]
    assert len(second["cells"][0]["quality"]["values"]) == 2


def test_progress_says_what_is_left(here):
    """Each cell is told before and after it; the time left is known from the second cell on, and runs out."""
    told = []
    bench(["frozen", "lora"], ["tiny-mlp"], tell=told.append)

    assert [(t.label, t.done, t.cell is not None) for t in told] == [
        ("", 0, False), ("frozen", 0, False), ("frozen", 1, True), ("lora", 1, False), ("lora", 2, True),
    ]  # fmt: skip
    assert [t.seconds_left for t in told] == [None, None, 0.5, 0.5, 0.0]


# ------------------------------------------------------------------------------------------------ the figures


def test_flops_are_those_of_the_products():
    """2 m k n for each product; backward twice that in full fine-tuning, without the first layer's input gradient."""
    batch, width = 16, 32
    each = 2 * batch * width * width
    head = 2 * batch * width * 10
    full, frozen = subject("full"), subject("frozen")

    assert exact.flops(full, full.wrapped(), full.batch()) == (2 * each + head, 3 * each + 2 * head)
    assert exact.flops(frozen, frozen.wrapped(), frozen.batch()) == (2 * each + head, head)


def test_flops_of_fused_kernels_are_counted():
    """Attention and recurrent layers count on the CPU as their products do, which torch's counter leaves out there."""
    from torch.utils.flop_counter import FlopCounterMode

    from peftkit.bench.flops import FORMULAS

    q = torch.randn(2, 4, 8, 16, requires_grad=True)
    lstm, x = nn.LSTM(6, 5, num_layers=2), torch.randn(7, 3, 6)

    def counted(call):
        with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
            output = call()
            forward = counter.get_total_flops()
            output.sum().backward()
        return forward, counter.get_total_flops() - forward

    product = 2 * (2 * 4) * 8 * 8 * 16
    assert counted(lambda: nn.functional.scaled_dot_product_attention(q, q, q)) == (2 * product, 5 * product)
    once = 2 * 7 * 3 * 20 * ((6 + 5) + (5 + 5))
    assert counted(lambda: lstm(x)[0]) == (once, 2 * once)


@pytest.mark.parametrize("method", ["lora", "full", "frozen"])
def test_memory_measured_and_estimated_agree(method):
    """One real step's peak, and the same told from shapes; each category within 1 % of the peak."""
    figures = {}
    exact.measured(subject(method), figures.update)
    peak = figures["memory"]["peak"]

    assert figures["estimated_memory"] is not None
    for category, measured in figures["memory"].items():
        assert abs(measured - figures["estimated_memory"][category]) <= 0.01 * peak, category


def test_merge_error_is_that_of_an_adapter_that_does_something():
    """Merging is compared on an adapter that was moved from its start: rounding for a weight, nothing for `full`."""
    lora = subject("lora")
    model = lora.wrapped()
    before = lora.workload.output(lora.base(), lora.batch())
    error = exact.merge_error(lora, model)

    assert 0 < error < 1e-5
    assert (lora.workload.output(model, lora.batch()) - before).abs().max() > 1e-3
    assert exact.merge_error(subject("full"), subject("full").wrapped()) == 0


def test_without_a_baseline_the_parts_give_the_step(monkeypatch):
    """Where full fine-tuning runs out of memory, the method is still timed, without a ratio."""

    def starved(self):
        raise torch.OutOfMemoryError

    found, lora = {}, subject("lora")
    wrapped = Subject.wrapped
    monkeypatch.setattr(
        Subject, "wrapped", lambda self, seed=0: (starved if isinstance(self.method, peftkit.Full) else wrapped)(self)
    )
    timing.measured(lora, found.update, pairs=1, seconds=1)

    assert found["step_pairs"] is None
    result = derived(found, per_step=16)
    assert result["step_ratio"] is None
    seconds = sum(found[part][0] for part in ("forward", "backward", "optimizer"))
    assert result["step_seconds"]["median"] == seconds
    assert result["units_per_second"] == pytest.approx(16 / seconds)


def test_rows_end_when_their_time_is_up():
    """There are as many rows as asked for, or fewer where they take too long, but never fewer than five."""
    clock = timing.Clock(torch.device("cpu"), pairs=12, seconds=0)
    calls = []

    assert len(clock.rows(lambda: calls.append("a"), lambda: calls.append("b"))) == timing.FEWEST
    assert "".join(calls[:8]) == "abbaabba"
    assert len(timing.Clock(torch.device("cpu"), pairs=12, seconds=60).rows(int, int)) == 12


# ------------------------------------------------------------------------------------------------ quality


class Slope(peftkit.Workload):
    """One weight that is to become `target`: what a learning rate does to it is known."""

    name, summary, per_step, steps = "slope", "", 1, 10
    metric = Metric(name="distance", unit="units", higher_is_better=False, items=1)
    forgets = "distance from where it was"
    explodes = False

    def model(self):
        layer = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(layer.weight)
        return nn.Sequential(layer, nn.Identity())

    def batches(self, seed):
        while True:
            yield torch.ones(1, 1)

    def loss(self, model, batch):
        return (model(batch) - 1).square().mean() * (math.nan if self.explodes else 1)

    def evaluate(self, model, split):
        return (model(torch.ones(1, 1)) - 1).abs().item()

    def forgetting(self, model):
        return model(torch.ones(1, 1)).abs().item()


def test_quality_takes_the_best_rate_of_the_validation_split():
    """Of a grid the rate that does best is chosen; every seed is reported, with what it was before."""
    found = {}
    slope = Subject(Slope(), peftkit.Full(), torch.device("cpu"))
    quality.measured(slope, (0, 1), found.update, rates=(1e-3, 0.2, 1e-2))

    assert found["learning_rate"] == 0.2
    assert found["before"] == 1
    assert len(found["values"]) == 2
    assert max(found["values"]) < 0.2
    assert found["steps"] == 10
    assert found["forgetting"]["before"] == 0
    assert found["forgetting"]["mean"] > 0.8


def test_quality_of_what_diverges_is_a_failure():
    """Training that ends in nan at every rate is an error, and no value."""
    found = {}
    slope = Slope()
    slope.explodes = True
    with pytest.raises(peftkit.errors.WorkloadError, match="diverged at every learning rate"):
        quality.measured(Subject(slope, peftkit.Full(), torch.device("cpu")), (0, 1), found.update, rates=(0.1,))
    assert not found


def test_quality_in_a_run(here):
    """A workload with a task has values over seeds with an interval that the items widen, and what was forgotten."""
    settings = Settings(phases=("quality",), seeds=(0, 1), threads=1)
    found = bench(["frozen"], ["tiny-mlp"], settings)["cells"][0]
    values, interval = found["quality"]["values"], found["quality"]

    assert found["status"] == "ok"
    assert found["exact"] is None
    assert interval["mean"] == pytest.approx(sum(values) / 2)
    low, high = (100 * end for end in statistics.wilson(interval["mean"] / 100, 512))
    assert interval["low"] <= low < interval["mean"] < high <= interval["high"]
    assert interval["mean"] > interval["before"]
    assert len(interval["forgetting"]["values"]) == 2


# ------------------------------------------------------------------------------------------------ statistics


def test_students_quantiles():
    """The quantiles are those of the tables."""
    tables = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 5: 2.5706, 9: 2.2622, 30: 2.0423, 31: 2.0395, 100: 1.9840}
    assert {freedom: round(statistics.student(freedom), 4) for freedom in tables} == tables


def test_intervals_cover_as_often_as_they_say():
    """In 400 draws of which the truth is known, a 95 % interval holds it in 92 to 98 %; with no shift, 0 is within."""
    rng = random.Random(0)
    draws = [[rng.gauss(5, 2) for _ in range(3)] for _ in range(400)]
    means = [statistics.seeds_interval(values) for values in draws]
    differences = [statistics.difference_interval(a, b) for a, b in zip(draws[::2], draws[1::2], strict=True)]

    assert 0.92 <= sum(low <= 5 <= high for _, low, high in means) / 400 <= 0.98
    assert sum(low <= 0 <= high for _, low, high in differences) / 200 >= 0.92
    assert statistics.difference_interval([9.0, 9.1, 8.9], [5.0, 5.2, 5.1]).low > 0


def test_bootstrap_of_medians_covers():
    """In 60 draws the bootstrap's interval holds the true median in 85 % at least (it is a little narrow for few values)."""
    rng = random.Random(1)
    draws = [[rng.lognormvariate(0, 0.3) for _ in range(15)] for _ in range(60)]
    intervals = [statistics.bootstrap_median(values) for values in draws]

    assert sum(low <= 1 <= high for _, low, high in intervals) / 60 >= 0.85
    assert statistics.bootstrap_median([2.0]) == (2.0, 2.0, 2.0)


def test_a_drift_cancels_in_a_row():
    """A machine that slows down steadily changes no ratio of a row; the ratio is of b to a."""
    rows = [[1.0 + i, 2 * (1.1 + i), 2 * (1.2 + i), 1.3 + i] for i in range(6)]
    assert statistics.ratio_of_pairs(rows) == pytest.approx((2.0, 2.0, 2.0))


def test_the_same_samples_give_the_same_interval():
    """The bootstrap draws the same resamples each time, and the order of calls does not matter."""
    values = [1.0, 1.2, 0.8, 1.1, 5.0]
    first = statistics.bootstrap_median(values)
    random.random()
    assert statistics.bootstrap_median(values) == first
    assert statistics.ratio_of_medians(values, values).low <= 1 <= statistics.ratio_of_medians(values, values).high


# ---------------------------------------------------------------------------------------- asking for a run


@pytest.mark.parametrize(
    "arguments,words",
    [
        (["tiny-mpl"], "'tiny-mlp'"),
        (["tiny-mlp", "--method", "loar"], "'lora'"),
        (["tiny-mlp", "--method", "lora:rank"], "field=value"),
        (["tiny-mlp", "--method", "lora", "--method", "lora"], "twice"),
        (["tiny-mlp", "tiny-mlp"], "twice"),
        (["tiny-mlp", "--only", "speeds"], "exact, speed, quality"),
        (["tiny-mlp", "--quality", "--seeds", "0"], "at least two"),
        (["tiny-mlp", "--seeds", "a"], "0,1,2"),
        (["tiny-mlp", "--pairs", "0"], "at least 1"),
        (["tiny-mlp", "--device", "tpu"], "cpu or cuda"),
    ],
)
def test_what_cannot_be_run_is_refused_at_once(arguments, words, tmp_path, monkeypatch):
    """A wrong argument is one line that names the right one, before anything is measured or written."""
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["bench", "run", *arguments])

    assert result.exit_code == 2
    assert words in result.stderr
    assert not list(tmp_path.iterdir())


def test_fields_of_a_method_on_the_command_line():
    """Fields stand after a colon, with commas between them; a value may hold commas of its own."""
    assert dict(entry_of("lora:rank=16,init=pissa").fields) == {"rank": 16, "init": "pissa"}
    assert dict(entry_of("oft:sizes=[1,2],on=true").fields) == {"sizes": [1, 2], "on": True}
    assert Entry(method="lora").label == "lora"


def test_what_a_method_adapts_by_default():
    """A workload's head trains in full; its targets stand in for the library's default, not for a method's own."""
    found = Subject(workload_named("tiny-mlp"), peftkit.LoRA(), torch.device("cpu"))
    targeted = type("Targeted", (type(found.workload),), {"targets": "0"})()

    assert list(found.rules()) == ["4", "@linear"]
    assert list(Subject(targeted, peftkit.LoRA(), found.device).rules()) == ["4", "0"]
    assert list(Subject(targeted, peftkit.Full(), found.device).rules()) == ["4", "**"]


def test_every_option_of_a_run_is_documented():
    """docs/cli.md has each option of `peftkit bench run`, and of `list`."""
    from typer.main import get_command

    text = (Path(__file__).parents[1] / "docs" / "cli.md").read_text()
    commands = get_command(app).commands["bench"].commands
    options = [o for name in ("run", "list") for p in commands[name].params for o in p.opts if o.startswith("--")]

    assert {"--method", "--json"} <= set(options)
    assert not [option for option in options if option != "--help" and f"`{option}`" not in text]
