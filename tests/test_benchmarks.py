"""The races: their statistics, their table, their report, and what each side is worth. No time is asserted."""

import gc
import getpass
import json
import math
import os
import re
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from races import report, rows, steps, timing
from races.exact import allocations, saved_bytes
from races.libraries import LIBRARIES, count, move
from races.models import NAMES, SMALL, TINY, decoder
from races.steps import RANK, Setting, training
from races.timing import Side, Turns, interval, pair_ratios, quiet_collector, rounds_for, summary

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
# pytest-benchmark times nothing in what it takes for a worker of pytest-xdist.
ONE_THREAD = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")} | {"OMP_NUM_THREADS": "1"}
pytestmark = [
    # HF PEFT asks transformers for a property under its old name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
LORA = ["peftkit", "by hand", "hf-peft", "loralib", "lycoris"]

# ---------------------------------------------------------------------------------------------- the engine


def test_turns_cancel_a_steady_drift():
    """Of a machine that slows down from turn to turn, nothing is left in the ratios; in plain alternation it would be."""
    drifting = [1.0 + 0.01 * turn for turn in range(40)]
    took = iter(drifting)
    base, side = Side(run=lambda: next(took)), Side(run=lambda: next(took))
    turns = Turns(base, side)
    with quiet_collector():
        for _ in range(20):
            turns.setup()
            turns.target()
            turns.teardown()
    assert sorted(turns.base_seconds + turns.side_seconds) == drifting
    assert pair_ratios(turns.side_seconds, turns.base_seconds) == pytest.approx([1.0] * 10, rel=1e-12)
    assert min(pair_ratios(drifting[1::2], drifting[::2])) > 1.005


def test_pairs_must_be_complete():
    """An odd number of rounds, or sides of different lengths, is an error."""
    for side, base in ([1.0], [1.0]), ([1.0, 2.0], [1.0]), ([], []):
        with pytest.raises(ValueError, match="in pairs"):
            pair_ratios(side, base)


def test_turns_alternate():
    """Base and side run a b, b a, a b: setup and teardown give the base its turn on alternating ends."""
    order = []
    turns = Turns(
        Side(run=lambda: order.append("a")), Side(run=lambda: order.append("b"), before=lambda: order.append("|"))
    )
    with quiet_collector():
        for _ in range(4):
            turns.setup()
            turns.target()
            turns.teardown()
    assert "".join(order) == "a|b|baa|b|ba"
    assert len(turns.base_seconds) == len(turns.side_seconds) == 4


def test_a_side_is_timed_per_call_and_may_time_itself():
    """`calls` divides the clock's seconds; a number that `run` returns is taken in their place."""
    ran = []
    assert Side(run=lambda: ran.append(0), calls=7).clock() < 1
    assert len(ran) == 7
    assert Side(run=lambda: 42.0).clock() == 42.0


def test_summary_of_known_numbers():
    """Median, quartiles and spread of 1 to 9, and an interval around the median that is the same each time."""
    found = summary([float(n) for n in range(1, 10)])
    assert (found["median"], found["quartiles"], found["count"]) == (5, [3, 7], 9)
    assert found["spread"] == pytest.approx(0.8)
    assert found["interval"] == list(interval([float(n) for n in range(1, 10)]))
    assert summary([2.0])["interval"] == [2.0, 2.0]


def test_interval_covers_as_often_as_it_says():
    """Of 200 samples of 25 draws of known median, the 95 % interval holds it in about 95 %."""
    chance = torch.Generator().manual_seed(0)
    hits = 0
    for _ in range(200):
        low, high = interval(torch.randn(25, generator=chance).tolist(), draws=400)
        hits += low <= 0 <= high
    assert 178 <= hits <= 199  # 190 expected, standard deviation 3.1


def test_rounds_fit_the_time_and_are_even():
    """As many as fit, within bounds, in pairs."""
    assert [rounds_for(6, turn) for turn in (10.0, 0.4, 0.1, 1e-5)] == [10, 14, 60, 60]


def test_garbage_is_not_collected_inside_a_race():
    """The collector is off within the block, on after it, also after an error."""

    def fail():
        with quiet_collector():
            assert not gc.isenabled()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


# -------------------------------------------------------------------------------------------------- the table


def test_every_row_has_a_target_or_says_why_not():
    """Names are unique, bases exist, and a row without a target has a reason."""
    assert len({row.name for row in rows.ROWS}) == len(rows.ROWS)
    for row in rows.ROWS:
        assert (row.target is None) == bool(row.no_target), row.name
        assert "peftkit" in row.racers(), row.name
        assert row.group in report.GROUPS
        assert {row.base_of(side) for side in row.racers()} <= set(row.sides)
        assert set(row.racers()) <= set(report.ORDER)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
def test_every_side_does_the_same_work(autocast, dropout):
    """Before training all sides have one loss, and the LoRA sides as many parameters as the shapes say."""
    setting = Setting(autocast=autocast, dropout=dropout)
    sides = {name: training(name, setting, TINY).run for name in LIBRARIES}
    losses = {name: step.forward().item() for name, step in sides.items()}
    assert losses == pytest.approx(dict.fromkeys(losses, losses["floor"]), rel=1e-6)
    counts = {name: count(step.model) for name, step in sides.items()}
    assert counts == {
        **dict.fromkeys(LORA, TINY.lora_parameters(RANK)),
        "floor": 0,
        "full": sum(p.numel() for p in decoder(TINY).parameters()),
    }


def test_the_same_factors_give_the_same_loss_everywhere():
    """Moved off their start to the same place, the adapters of all libraries change the loss by the same amount."""
    losses = {}
    for name in LORA:
        step = training(name, Setting(), TINY).run
        start = step.forward().item()
        move(step.model, std=0.3)
        losses[name] = step.forward().item()
        assert abs(losses[name] - start) > 1e-3
    assert losses == pytest.approx(dict.fromkeys(losses, losses["peftkit"]), rel=1e-5)


def test_a_step_trains():
    """After a step, the adapter of every library has moved and the base has not."""
    for name in LORA:
        step = training(name, Setting(), TINY).run
        before = {path: p.detach().clone() for path, p in step.model.named_parameters()}
        step()
        moved = {path for path, p in step.model.named_parameters() if not torch.equal(p, before[path])}
        assert moved
        assert moved <= {path for path, p in step.model.named_parameters() if p.requires_grad}


# ------------------------------------------------------------------------------------------- exact figures


def expected_excess(shape, dtype_bytes):
    """Bytes that LoRA keeps over the floor where every input of an adapted layer is one that the floor does not keep.

    A decoder's seven layers have four inputs between them: queries, keys and values share one, gate and up another. The
    attention's output is kept by the attention itself. To them come the seven products with the first factor.
    """
    tokens = shape.batch * shape.length
    inputs = 2 * shape.hidden + shape.intermediate
    return shape.layers * tokens * dtype_bytes * (inputs + len(NAMES) * RANK)


def test_bytes_kept_in_fp32_are_the_inputs_and_the_products():
    """In float32 peftkit keeps exactly the inputs of the adapted layers and its rank-sized products, dropout or not."""
    floor = training("floor", Setting(), TINY).exact()["saved_bytes"]
    ours = training("peftkit", Setting(), TINY).exact()["saved_bytes"]
    assert ours - floor == expected_excess(TINY, 4)
    dropped = training("peftkit", Setting(dropout=0.1), TINY).exact()["saved_bytes"]
    assert dropped <= ours + 2 * 8 * (6 * 32 * 64 + 32 * 160) // 512  # the noise, in two layers


@pytest.mark.parametrize("row", [*rows.STEPS, rows.LEAN], ids=lambda row: row.name)
def test_bytes_kept_are_within_the_target(row, tmp_path):
    """At full size, peftkit's step keeps no more bytes for backward than its target, and no more than HF PEFT's."""
    kept = {}
    for name in {"peftkit", "hf-peft"} & set(row.sides):
        step = row.sides[name](tmp_path).run
        kept[name] = saved_bytes(step.model, step.forward)
    assert kept["peftkit"] <= row.exact_targets["saved_bytes"]
    assert kept["peftkit"] == min(kept.values())


def test_allocations_are_counted_and_repeat():
    """A step allocates as often each time, at the same peak; two tensors of known size are seen as such."""

    def work():
        a = torch.empty(1000)
        b = torch.empty(500)
        del a, b

    assert allocations(work) == {"allocations": 2, "peak_bytes": 6000}
    step = training("peftkit", Setting(), TINY).run
    assert allocations(step) == allocations(step)


def test_allocations_are_fewer_than_hf_peft_makes():
    """Without dropout, one step of peftkit allocates less often than HF PEFT's."""
    ours, theirs = (allocations(training(name, Setting(), TINY).run) for name in ("peftkit", "hf-peft"))
    assert ours["allocations"] < theirs["allocations"]


# ------------------------------------------------------------------------------------------------- the report


def record(side, ratio, *, row="step-x", group="step", target=1.1, unit="ratio", **more):
    samples = summary([ratio] * 5)
    return {
        "row": row, "group": group, "title": "fp32", "side": side, "base": "floor", "unit": unit, "allocator": "default",
        "target": target, "no_target": "", "note": "", "ratio": samples, "seconds": samples, "base_seconds": samples,
        "exact": {"saved_bytes": 82.8e6, "allocations": 1303}, "base_exact": {"saved_bytes": 62.2e6},
        "exact_targets": {"saved_bytes": 88.1e6}, **more,
    }  # fmt: skip


def test_a_report_has_the_columns_and_the_verdicts():
    """peftkit ÷ floor, peers ÷ floor, target; bytes; a missing side is a dash."""
    page = report.markdown(
        report.document(
            [
                record("peftkit", 1.08),
                record("hf-peft", 1.2),
                record("peftkit", 1.3, row="step-y"),
                record(
                    "peftkit", 0.05, row="wrap", group="around", unit="seconds", target=0.18, base="hf-peft", exact={}
                ),
            ],
            "cpu",
        )
    )
    assert "|  | allocator | peftkit ÷ floor | hf-peft ÷ floor | target |" in page
    assert "| fp32 | default | 1.080 (1.080 to 1.080) | 1.200 (1.200 to 1.200) | ≤ 1.10 met |" in page
    assert "| fp32 | default | 1.300 (1.300 to 1.300) | – | ≤ 1.10 missed |" in page
    assert "| fp32 | 50 (50 to 50) | 50 | 0.050 (0.050 to 0.050) | ≤ 180 met |" in page
    assert "| fp32 | 62.2 | 82.8; 1,303 | 82.8; 1,303 | ≤ 88.1 met |" in page
    assert report.verdict({"interval": [1.0, 1.2], "count": 5}, 1.1) == "open"
    assert report.verdict({"interval": [1.0, 1.0], "count": 4}, 1.1) == "open"


def test_a_report_names_no_host_and_no_path(tmp_path):
    """The document is JSON, the page lies beside it, and neither knows this machine's name, user or folders."""
    path = tmp_path / "results" / "x.json"
    report.write(report.document([record("peftkit", 1.08)], "cpu"), path)
    text = path.read_text(encoding="utf-8")
    assert json.loads(text)["schema"] == report.SCHEMA
    assert path.with_suffix(".md").exists()
    for secret in (
        socket.gethostname(),
        str(Path.home()) + "/",
        str(Path(__file__).parents[1]),
        f'"{getpass.getuser()}"',
    ):
        assert secret not in text
    assert re.fullmatch(r"cpu-\d+cores", report.machine())


@pytest.mark.parametrize("name, label", [("NVIDIA H100 80GB HBM3", "h100"), ("Tesla T4", "tesla-t4")])
def test_a_gpu_is_named_by_its_model(name, label, monkeypatch):
    """The label is the model alone where it can be told."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert report.machine("cuda") == label


def test_a_session_of_races_writes_its_report(tmp_path):
    """`pytest benchmarks` races a row in turns, asserts the work and writes JSON and Markdown."""
    out = tmp_path / "out.json"
    command = [
        sys.executable,
        "-m",
        "pytest",
        str(BENCHMARKS),
        "-q",
        "-p",
        "no:cacheprovider",
        "-n0",
    ]
    command += ["--rounds=3", f"--report={out}", "-k", "test_row and layer-256-1024-peftkit"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False, env=ONE_THREAD)
    assert done.returncode == 0, done.stdout
    (found,) = json.loads(out.read_text(encoding="utf-8"))["records"]
    assert (found["row"], found["side"], found["base"]) == ("layer-256-1024", "peftkit", "floor")
    assert len(found["seconds"]["samples"]) == len(found["base_seconds"]["samples"]) == 4
    first = (sum(found["seconds"]["samples"][:2])) / sum(found["base_seconds"]["samples"][:2])
    second = (sum(found["seconds"]["samples"][2:])) / sum(found["base_seconds"]["samples"][2:])
    assert found["ratio"]["median"] == pytest.approx((first + second) / 2)
    assert "peftkit ÷ floor" in out.with_suffix(".md").read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------------- on a GPU


def _run_small(row, folder):
    losses = []
    for make in row.sides.values():
        side = make(folder)
        losses.append(side.exact()["start_loss"])
        assert math.isfinite(timing.warm_up(side, side, patience=0))
    assert losses == pytest.approx([losses[0]] * len(losses), rel=2e-2)


@pytest.mark.slow
def test_gpu_rows_run(tmp_path):
    """The GPU's rows, small and on the CPU: every side trains, from the same loss."""
    for row in rows.gpu_rows(TINY, "cpu", "eager"):
        if "compiled" not in row.name:
            _run_small(row, tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning")  # torch, of what its dynamo does
def test_compiled_gpu_rows_run(tmp_path):
    """The same for the compiled rows, with a compiler that only traces."""
    torch.compiler.reset()
    for row in rows.gpu_rows(replace(TINY, layers=1), "cpu", "eager"):
        if row.name == "gpu-compiled":
            _run_small(row, tmp_path)
    torch.compiler.reset()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_gpu_rows_are_skipped_with_a_reason_where_there_is_none(tmp_path):
    """`--device cuda` without CUDA skips every row and says why."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        str(BENCHMARKS),
        "--device=cuda",
        "-n0",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False, env=ONE_THREAD)
    assert "torch finds no CUDA device here" in done.stdout
    assert "passed" not in done.stdout


def test_the_shape_is_that_of_the_targets():
    """Hidden 512, 4 layers, 4 × 128 tokens, rank 16 on all linear layers but the head."""
    assert (SMALL.hidden, SMALL.layers, SMALL.batch, SMALL.length, steps.RANK) == (512, 4, 4, 128, 16)
    assert len(NAMES) == 7
