"""Two benchmarks, before and after: what counts as worse, what as better, and what cannot be compared at all."""

import copy
import json

import pytest
import typer
from typer.testing import CliRunner

from bench_documents import failed_cell, make_cell, make_document, make_workload, many
from peftkit.bench.compare import compare, share
from peftkit.bench.document import write
from peftkit.cli.reporting import compare as compare_command
from peftkit.cli.reporting import report as report_command
from peftkit.errors import FieldError, FormatError


@pytest.fixture(scope="module")
def base():
    return make_document(
        [make_cell("lora", quality=[80.0, 81.0, 82.0], rows=15), make_cell("dora", ratio=0.9, rows=15)]
    )


@pytest.fixture
def before(base):
    return copy.deepcopy(base)


@pytest.fixture
def after(base):
    return copy.deepcopy(base)


def kinds(found):
    return sorted({finding.kind for finding in found.findings})


def test_a_document_is_no_worse_than_itself(base):
    """Every figure is judged, none differs, and the exit code says so."""
    found = compare(base, base)
    assert (found.findings, found.exit_code) == ((), 0)
    assert found.judged > 50
    assert str(found) == f"the same or better: {found.judged} figures judged, no difference that counts"


EXACT = {
    ("trainable_parameters",): ("regression", "regression"),
    ("total_parameters",): ("regression", "regression"),
    ("adapted_layers",): ("regression", "regression"),
    ("adapter_file_bytes",): ("regression", "improvement"),
    ("forward_flops",): ("regression", "improvement"),
    ("backward_flops",): ("regression", "improvement"),
    ("memory", "peak"): ("regression", "improvement"),
    ("memory", "activations"): ("changed", "changed"),
    ("estimated_memory", "peak"): ("changed", "changed"),
    ("merge_error",): ("changed", "changed"),
}


@pytest.mark.parametrize("path", EXACT, ids=".".join)
@pytest.mark.parametrize("step", [1, -1])
def test_an_exact_figure_gates_at_equality(before, after, path, step):
    """One byte or one parameter more is seen; a cost that fell is better; a count must not move at all."""
    before["cells"][0]["times"] = None
    *way, key = path
    place = after["cells"][0]["exact"]
    for part in way:
        place = place[part]
    place[key] += step
    found = compare(before, after)
    (finding,) = found.findings
    kind = EXACT[path][step < 0]
    assert (finding.kind, finding.workload, finding.label, finding.figure) == (kind, "digits", "lora", ".".join(path))
    assert finding.after - finding.before == pytest.approx(step)
    assert found.exit_code == (kind == "regression")


def slower(document, key, factor):
    for cell in document["cells"][:1]:
        rows = cell["times"][key]
        paired = isinstance(rows[0], list)
        cell["times"][key] = (
            [[a, b * factor, c * factor, d] for a, b, c, d in rows] if paired else [t * factor for t in rows]
        )


@pytest.mark.parametrize(
    "key", ["step_pairs", "inference_pairs", "merged_pairs", "wrap", "save", "load", "merge", "unmerge"]
)
@pytest.mark.parametrize("factor, kind", [(1.5, "regression"), (0.5, "improvement"), (1.02, None)])
def test_a_time_counts_when_its_interval_is_clear_of_the_threshold(before, after, key, factor, kind):
    """Half as much again is a regression, two percent are noise."""
    slower(after, key, factor)
    found = compare(before, after)
    assert [finding.kind for finding in found.findings] == ([kind] if kind else [])
    assert found.exit_code == (kind == "regression")


def test_an_interval_across_the_threshold_is_no_regression(before, after):
    """The middle is above 1.10, and still nothing is claimed; the same ratio with less noise is one."""
    noisy, quiet = [make_document([make_cell("lora", noise=noise, rows=8)]) for noise in (0.4, 0.001)]
    for document, expected in ((noisy, 0), (quiet, 1)):
        later = copy.deepcopy(document)
        slower(later, "step_pairs", 1.15)
        assert compare(document, later).exit_code == expected
    slower(after, "step_pairs", 1.15)
    assert compare(before, after, threshold=1.3).findings == ()


def test_a_drift_of_the_whole_machine_cancels(before, after):
    """The pairs are ratios: a machine that is twice as slow today makes no method worse."""
    for cell in after["cells"][:1]:
        for key in ("step_pairs", "inference_pairs", "merged_pairs"):
            cell["times"][key] = [[2 * time for time in row] for row in cell["times"][key]]
    assert compare(before, after).findings == ()


@pytest.mark.parametrize(
    "change", [{"machine": "other"}, {"threads": 4}, {"variables": {"OMP_NUM_THREADS": "2"}}], ids=str
)
def test_times_of_two_machines_are_not_judged(before, after, change):
    """It is said, and everything exact is judged all the same."""
    slower(after, "step_pairs", 3)
    after["environment"].update(change)
    found = compare(before, after)
    assert kinds(found) == ["note"]
    assert "so times are not judged" in found.findings[0].text
    after["cells"][0]["exact"]["forward_flops"] += 1
    assert compare(before, after).exit_code == 1


def test_too_few_samples_are_said_and_not_judged(before, after):
    """Five samples have no interval of 95 %."""
    slower(after, "wrap", 9)
    after["cells"][0]["times"]["wrap"] = after["cells"][0]["times"]["wrap"][:5]
    (finding,) = compare(before, after).findings
    assert (finding.kind, finding.text) == ("note", "1 time not judged: fewer than 6 samples")


def test_gpu_memory_is_judged_by_the_threshold_on_one_machine(before, after):
    """The allocator rounds: a block more is nothing, a fifth more is a regression."""
    for document, bytes_ in ((before, 1_000_000), (after, 1_000_512)):
        document["cells"][0]["exact"]["gpu_peak_allocated"] = bytes_
    assert compare(before, after).findings == ()
    after["cells"][0]["exact"]["gpu_peak_allocated"] = 1_200_000
    assert compare(before, after).exit_code == 1


@pytest.mark.parametrize("values, kind", [([60.0, 61.0, 62.0], "regression"), ([95.0, 96.0, 97.0], "improvement"), ([79.0, 80.0, 81.0], None), ([10.0], "note")])  # fmt: skip
def test_quality_counts_when_its_interval_is_clear_of_zero(before, after, values, kind):
    """Twenty points less is worse, one point less is noise, and one seed says nothing."""
    after["cells"][0]["quality"]["values"] = values
    found = compare(before, after)
    assert [finding.kind for finding in found.findings] == ([kind] if kind else [])


def test_of_a_loss_more_is_worse(before, after):
    """The direction is the metric's."""
    for document in (before, after):
        document["workloads"][0]["metric"] = {"name": "loss", "unit": "nats", "higher_is_better": False, "items": 800}
    after["cells"][0]["quality"]["values"] = [90.0, 91.0, 92.0]
    assert compare(before, after).exit_code == 1


@pytest.mark.parametrize("key", ["fingerprint", "model", "data", "per_step", "unit", "metric"])
def test_another_workload_under_the_same_name_is_refused(before, after, key):
    """Another base, other data, another batch: no figure is judged, and the reason is given."""
    after["workloads"][0][key] = {"per_step": 32, "unit": "tokens", "metric": None}.get(key, "ef" * 32)
    after["cells"][0]["exact"]["forward_flops"] *= 2
    found = compare(before, after)
    assert (kinds(found), found.judged, found.exit_code) == (["refused"], 0, 2)
    assert "is another (" in found.findings[0].text


def test_one_refused_workload_leaves_the_others_judged():
    """A regression elsewhere is still found, and counts for more than the refusal."""
    before = many(2, ("digits", "tones"))
    after = copy.deepcopy(before)
    after["workloads"][0]["fingerprint"] = "ef" * 32
    found = compare(before, after)
    assert (kinds(found), found.exit_code) == (["refused"], 2)
    assert found.judged
    after["cells"][-2]["exact"]["forward_flops"] += 1
    assert compare(before, after).exit_code == 1


def test_documents_with_nothing_in_common_are_refused(before, after):
    """Another device, other methods, no such workload: exit code 2, with the reason."""
    after["settings"]["device"] = "cuda"
    assert "measured on 'cpu' before and on 'cuda' after" in compare(before, after).findings[0].text
    other = make_document([make_cell("hra")])
    assert "no method on any workload" in compare(before, other).findings[0].text
    later = make_document([make_cell("lora"), make_cell("lora", "tones")], [make_workload(), make_workload("tones")])
    gone = make_document([make_cell("lora")])
    assert [f.text for f in compare(later, gone).of("refused")] == ["the second document does not have this workload"]
    assert {compare(before, after).exit_code, compare(before, other).exit_code, compare(later, gone).exit_code} == {2}


def test_a_method_that_is_another_is_refused(before, after):
    """The same label with other hyperparameters, or of another method, is not the same thing."""
    after["cells"][0]["hyperparameters"] = {"rank": 16}
    found = compare(before, after)
    assert (kinds(found), found.exit_code) == (["refused"], 2)
    assert found.findings[0].text == "another hyperparameters: {'rank': 8} before, {'rank': 16} after"


def test_what_is_gone_cannot_pass(before, after):
    """A method or a figure that the second document lacks is refused; one that only it has is a note."""
    (gone,) = compare(before, make_document([after["cells"][0]])).findings
    assert (gone.kind, gone.label) == ("refused", "dora")
    (new,) = compare(make_document([before["cells"][0]]), after).findings
    assert (new.kind, new.label) == ("note", "dora")
    after["cells"][0]["exact"]["memory"] = None
    found = compare(before, after)
    assert (kinds(found), found.exit_code) == (["refused"], 2)
    before["cells"][0]["exact"]["memory"] = None
    assert compare(before, after).exit_code == 0


def test_times_and_quality_that_were_not_measured_again_are_notes(before, after):
    """A quick run after a long one judges what it has, and says what it has not."""
    after["cells"][0]["times"] = after["cells"][0]["quality"] = None
    found = compare(before, after)
    assert (kinds(found), found.exit_code) == (["note"], 0)
    assert {finding.figure for finding in found.findings} >= {"step ratio", "wrap seconds", "quality"}


@pytest.mark.parametrize("status", ["failed", "out of memory", "not applicable", "not run"])
def test_a_method_that_fails_now_is_a_regression(before, after, status):
    """And one that failed before is an improvement."""
    after["cells"][1] = failed_cell("dora", status=status) | {"hyperparameters": {"rank": 8}}
    after["cells"][1]["error"]["message"] += "\n\x1b[31mand more"
    found = compare(before, after)
    assert found.exit_code == 1
    assert found.of("regression")[0].text.endswith(": cannot allocate 12 GB for layers.3.attention [31mand more")
    assert (kinds(compare(after, before)), compare(after, before).exit_code) == (["improvement"], 0)


def test_other_software_is_a_note(before, after):
    """Another torch does not stop the comparison; the reader is told."""
    after["environment"]["torch"] = "2.14.0"
    found = compare(before, after)
    assert ([f.text for f in found.findings], found.exit_code) == (
        ["torch: 2.13.0+cpu before, 2.14.0 after; a difference may come from it"],
        0,
    )


def test_a_threshold_below_one_is_an_error(base):
    """It would call equal times a regression."""
    for threshold in (0.9, float("nan")):
        with pytest.raises(FieldError, match=r"is below 1; 1\.10 lets times grow"):
            compare(base, base, threshold)


def test_only_shares_carry_the_noise_of_the_test_set():
    """A loss is no share of the items."""
    assert share({"unit": "nats", "items": 800}) == {}
    assert share({"unit": "%", "items": None}) == {}


# ------------------------------------------------------------------------------------------ command line


@pytest.fixture
def run(tmp_path, before, after):
    """Runs `compare before.json after.json` or `report before.json` with further arguments."""
    app = typer.Typer()
    app.command("compare")(compare_command)
    app.command("report")(report_command)

    def call(command, *arguments):
        write(tmp_path / "before.json", before)
        write(tmp_path / "after.json", after)
        names = ["before.json", "after.json"] if command == "compare" else ["before.json"]
        return CliRunner().invoke(app, [command, *(str(tmp_path / name) for name in names), *map(str, arguments)])

    return call


def test_the_command_exits_with_the_verdict(run, after):
    """0, 1 and 2, with a table that names workload, method and figure."""
    assert (run("compare").exit_code, run("compare").stdout.startswith("the same or better")) == (0, True)
    after["cells"][0]["exact"]["adapter_file_bytes"] += 8
    worse = run("compare")
    assert worse.exit_code == 1
    assert "regression  digits    lora    adapter_file_bytes  81,000 bytes before, 81,008 after" in worse.stdout
    assert worse.stdout.rstrip().endswith("figures judged, 1 regression")
    after["settings"]["device"] = "cuda"
    assert run("compare").exit_code == 2


def test_the_command_speaks_json(run, after):
    """The same findings for a program."""
    after["cells"][0]["exact"]["adapter_file_bytes"] += 8
    found = json.loads(run("compare", "--json").stdout)
    assert (found["version"], found["exit_code"]) == (1, 1)
    assert [(f["kind"], f["figure"], f["before"], f["after"]) for f in found["findings"]] == [
        ("regression", "adapter_file_bytes", 81_000, 81_008)
    ]


def test_the_threshold_is_an_option(run, after):
    """A looser one lets a slower step pass; below 1 is refused."""
    slower(after, "step_pairs", 1.5)
    assert run("compare").exit_code == 1
    assert run("compare", "--threshold", "2").exit_code == 0
    assert run("compare", "--threshold", "0.5").exit_code == 2


def test_a_bad_file_is_an_error_of_the_reader(run, tmp_path, after):
    """The program around the commands shows it as one line, and exits with 2."""
    result = run("compare")
    assert result.exit_code == 0
    (tmp_path / "bad.json").write_text("{}")
    result = run("report", "--html", tmp_path / "nowhere" / "page.html")
    assert "cannot write" in str(result.exception)
    with pytest.raises(FormatError, match=r"bad\.json: this document is None"):
        report_command(tmp_path / "bad.json")


def test_reports_are_written_where_one_says(run, tmp_path):
    """A table by default; a page and Markdown on request, replacing what is there."""
    assert "lora" in run("report").stdout
    (tmp_path / "page.html").write_text("old")
    result = run("report", "--html", tmp_path / "page.html", "--markdown", tmp_path / "page.md")
    assert result.stdout.splitlines() == [f"wrote {tmp_path / 'page.html'}", f"wrote {tmp_path / 'page.md'}"]
    assert (tmp_path / "page.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert (tmp_path / "page.md").read_text(encoding="utf-8").startswith("# Fine-tuning methods, measured\n")
