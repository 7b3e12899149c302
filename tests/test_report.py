"""The document of a benchmark, who is tied with whom, and what a terminal and a text say of it."""

import os
import random
import re
import statistics
import sys
from html import unescape
from pathlib import Path

import pytest
from rich.console import Console

from bench_documents import ODD, failed_cell, make_cell, make_document
from peftkit import plugins, writing
from peftkit.bench import report
from peftkit.bench.document import needed, read, validate, write
from peftkit.bench.report import ties, view, words
from peftkit.bench.report.columns import large, number, percent, seconds, together
from peftkit.errors import FileError, FormatError, PeftkitError

# ------------------------------------------------------------------------------------------ the document


@pytest.mark.parametrize("name", ODD)
def test_what_is_written_is_read_back(name, tmp_path):
    """A document survives a round trip through its file, whatever is missing in it."""
    document = ODD[name]()
    write(tmp_path / "report.json", document)
    assert read(tmp_path / "report.json") == document


FAULTS = {
    "not an object": (lambda d: [], "'peftkit.bench/1'"),
    "another version": (lambda d: d | {"schema": "peftkit.bench/2"}, "'peftkit.bench/2'.*run `peftkit bench run` again"),
    "a key is missing": (lambda d: {k: v for k, v in d.items() if k != "cells"}, "^the document: 'cells' is a required"),
    "a key too many": (lambda d: d["cells"][0].update(speed=1) or d, r"^cells\[0\]: .*'speed' was unexpected"),
    "a key too many, deep": (lambda d: d["cells"][0]["exact"]["memory"].update(heap=1) or d, r"^cells\[0\].exact.memory: "),
    "a text for a number": (lambda d: d["cells"][0]["exact"].update(forward_flops="12") or d, r"^cells\[0\].exact.forward_flops: \"12\" is not of type integer or null"),
    "a status of its own": (lambda d: d["cells"][0].update(status="fine") or d, r"^cells\[0\].status: \"fine\" breaks 'enum'"),
    "ok, with an error": (lambda d: d["cells"][0].update(error={"phase": "step", "type": "E", "message": ""}) or d, r"^cells\[0\].error: "),
    "failed, without one": (lambda d: d["cells"][0].update(status="failed") or d, r"^cells\[0\].error: null is not of type object"),
    "a label twice": (lambda d: d["cells"].append(d["cells"][0]) or d, r"^cells\[2\].label: 'lora' is there twice"),
    "an unknown workload": (lambda d: d["cells"][0].update(workload="tones") or d, r"^cells\[0\].workload: 'tones' is none"),
    "a workload twice": (lambda d: d["workloads"].append(d["workloads"][0]) or d, r"^workloads\[1\].name: "),
    "a label of two lines": (lambda d: d["cells"][0].update(label="a\nb") or d, r"^cells\[0\].label: .* breaks 'pattern'"),
    "a name that rings": (lambda d: d["workloads"][0].update(name="\x07") or d, r"^workloads\[0\].name: .* breaks 'pattern'"),
    "not a number": (lambda d: d["cells"][0]["exact"].update(merge_error=float("nan")) or d, r"^cells\[0\].exact.merge_error: .*not finite"),
    "time that ran backwards": (lambda d: d["cells"][0]["times"].update(wrap=[-0.1]) or d, r"^cells\[0\].times.wrap\[0\]: "),
    "three of a pair": (lambda d: d["cells"][0]["times"].update(step_pairs=[[1.0, 1.0, 1.0]]) or d, r"^cells\[0\].times.step_pairs\[0\]: "),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_refused_at_its_place(name):
    """Whatever the document should not be, the error names the place, and says where the rules are."""
    spoil, message = FAULTS[name]
    document = make_document([make_cell("lora"), make_cell("dora")])
    validate(document)
    with pytest.raises(FormatError, match=message) as caught:
        validate(spoil(document))
    assert "schema.json" in str(caught.value) or "bench run" in str(caught.value)


def test_a_file_that_is_no_document_is_refused_with_its_name(tmp_path):
    """No JSON, or no file: the error names the file."""
    for text in ("{", "\xff", "[" * 100_000):
        (tmp_path / "report.json").write_text(text, encoding="latin-1")
        with pytest.raises(FormatError, match=r"report\.json"):
            read(tmp_path / "report.json")
    with pytest.raises(FormatError, match=r"cannot read .*other\.json: No such file"):
        read(tmp_path / "other.json")


def test_a_write_that_fails_leaves_the_old_document(tmp_path, monkeypatch):
    """Neither a bad document nor a full disk touches what is there."""
    path, old = tmp_path / "report.json", make_document([make_cell("lora")])
    write(path, old)
    with pytest.raises(FormatError):
        write(path, old | {"schema": "peftkit.bench/0"})

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing.os, "replace", full)
    with pytest.raises(FileError, match="No space left"):
        write(path, make_document([make_cell("dora")]))
    assert read(path) == old
    assert os.listdir(tmp_path) == ["report.json"]


def test_a_document_is_written_a_line_a_key(tmp_path):
    """Two documents can be compared line by line, and raw samples do not fill the screen."""
    write(tmp_path / "report.json", make_document([make_cell("lora")]))
    lines = (tmp_path / "report.json").read_text().splitlines()
    assert sum('"merge_error"' in line for line in lines) == 1
    assert sum(line.strip().startswith('"step_pairs": [[') for line in lines) == 1


def test_a_missing_package_is_named_with_its_remedy(monkeypatch):
    """Without the extra, the error says what to install; an error inside a package that is there is not disguised."""
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(PeftkitError, match=r"jinja2: pip install 'peftkit\[bench\]'"):
        report.html(make_document([make_cell("lora")]))
    with pytest.raises(ModuleNotFoundError):
        needed("jsonschema.nothing_of_that_name")


# ------------------------------------------------------------------------------------------------- ties

SCORES = {
    "best": [90.0, 90.5, 91.0],
    "near": [90.2, 89.8, 90.4],
    "middle": [88.0, 90.0, 89.4],
    "bad": [60.0, 61.0, 62.0],
    "once": [99.0],
}
METRIC = {"name": "accuracy", "unit": "%", "higher_is_better": True, "items": 800}


def test_methods_that_the_data_cannot_tell_apart_share_a_place():
    """Near ones are tied, far ones are not, and with one seed nothing is claimed."""
    found = ties.rank(list(SCORES), ties.quality(SCORES, METRIC))
    assert found.place == {"best": 1, "near": 1, "middle": 1, "bad": 4, "once": 1}
    assert found.tied == {
        "best": ["near", "middle", "once"], "near": ["best", "middle", "once"], "middle": ["best", "near", "once"],
        "bad": ["once"], "once": ["best", "near", "middle", "bad"],
    }  # fmt: skip


def test_the_noise_of_the_test_set_counts():
    """Seeds that agree do not separate methods whose test set is too small to do so."""
    values = {"a": [90.0, 90.1, 89.9], "b": [88.0, 88.1, 87.9]}
    assert ties.quality(values, METRIC | {"items": 100_000})("a", "b") == 1
    assert ties.quality(values, METRIC | {"items": 200})("a", "b") == 0
    assert ties.quality(values, METRIC | {"unit": "nats"})("a", "b") == 1


def test_of_a_loss_less_is_better():
    """The direction is the metric's, not the report's."""
    values = {"a": [1.0, 1.1, 0.9], "b": [2.0, 2.1, 1.9]}
    metric = {"name": "loss", "unit": "nats", "higher_is_better": False, "items": 800}
    assert ties.quality(values, metric)("a", "b") == 1
    assert ties.rank("ab", ties.quality(values, metric)).place == {"a": 1, "b": 2}


def test_times_are_told_apart_by_their_intervals():
    """A ratio clear of 1 separates, one around 1 does not; five samples do if none is among the others, three never among
    three.
    """
    draw = random.Random(0)
    samples = {name: [ratio * draw.gauss(1, 0.02) for _ in range(count)] for name, ratio, count in (
        ("fast", 0.6, 20), ("too", 0.601, 20), ("slow", 0.7, 20), ("few", 0.1, 5), ("three", 0.1, 3), ("other", 0.9, 3))}  # fmt: skip
    samples["among"] = [0.1] * 4 + [samples["slow"][0]]
    sign = ties.times(samples)
    assert (sign("fast", "too"), sign("fast", "slow"), sign("slow", "too")) == (0, 1, -1)
    assert (sign("few", "slow"), sign("slow", "few"), sign("among", "slow"), sign("three", "other")) == (1, -1, 0, 0)


def test_being_tied_is_not_passed_on():
    """A is tied with B and B with C, and yet C is worse than A: places follow the comparisons, not groups."""
    worse = {("a", "c")}
    found = ties.rank("abc", lambda one, other: ((one, other) in worse) - ((other, one) in worse))
    assert found.place == {"a": 1, "b": 1, "c": 2}
    assert found.tied == {"a": ["b"], "b": ["a", "c"], "c": ["b"]}


def test_only_the_clearly_beaten_are_off_the_frontier():
    """What lies below the frontier within the noise is tied with it; equal cost and clearly worse quality is beaten."""
    values = {
        "cheap": [60.0, 61.0, 62.0],
        "best": [90.0, 90.5, 91.0],
        "dear": [89.9, 90.3, 90.6],
        "poor": [70.0, 71.0, 72.0],
        "same": [60.0, 61.0, 62.0],
    }
    cost = {"cheap": 1, "best": 5, "dear": 9, "poor": 5, "same": 2}
    points = {name: (cost[name], statistics.fmean(values[name])) for name in values}
    found = ties.standings(points, ties.exact(cost), ties.quality(values, METRIC), higher_is_better=True)
    assert found == {"cheap": "frontier", "best": "frontier", "dear": "tied", "poor": "beaten", "same": "tied"}


def test_places_are_shown_only_where_they_say_something():
    """Nobody has a place where all are tied, and a shared place says that it is shared."""
    (sheet,) = view.sheets(make_document([make_cell(a, quality=q) for a, q in SCORES.items() if a != "once"]))
    assert [sheet.place("quality", a) for a in ("best", "near", "bad")] == ["1=", "1=", "4"]
    (sheet,) = view.sheets(ODD["one seed"]())
    assert [sheet.place("quality", a) for a in ("lora", "dora")] == ["", ""]


# -------------------------------------------------------------------------------------------- in words


def said(document):
    (sheet,) = view.sheets(document)
    return dict(words.sentences(sheet))


def test_the_summary_names_the_best_and_who_is_tied_with_it():
    """The choice is made among those whose quality is tied with the best."""
    cells = [
        make_cell("full", ratio=1.0, trained=1_000_000, quality=[90.0, 90.5, 91.0]),
        make_cell("lora", ratio=0.6, trained=20_000, quality=[90.2, 89.8, 90.4]),
        make_cell("frozen", ratio=0.4, trained=0, quality=[60.0, 61.0, 62.0]),
    ]
    found = said(make_document([*cells, failed_cell("dora")]))
    assert found["Best quality"].startswith("full has the best accuracy: 90.5 % (")
    assert found["Best quality"].endswith(", tied with lora; 1 of 2 others is clearly worse.")
    assert found["Least memory"].startswith("Of those, lora needs the least memory: ")
    assert found["Fastest step"].startswith("Of those, lora has the fastest step: 0.6")
    assert found["Fewest parameters"] == "Of those, lora trains the fewest parameters: 20,000 (2 % of all)."
    assert found["Not measured in full"].startswith("dora;")


def test_the_summary_claims_no_more_than_the_data():
    """All tied, one seed, no task, one method, nothing at all: each has its own words."""
    assert said(ODD["one seed"]())["Best quality"].endswith("but the data cannot tell it from lora.")
    assert said(ODD["one method"]())["Best quality"].endswith("no other method was measured.")
    assert "Best quality" not in said(ODD["no task"]())
    assert said(ODD["no task"]())["Fastest step"].startswith("Of all methods that train anything, lora ")
    assert said(ODD["no noise"]())["Fastest step"] == "Of those, the data cannot tell whose step is the fastest."
    assert list(said(ODD["nothing measured"]())) == ["Not measured in full"]
    assert said(ODD["nulls"]()) == {}


def test_numbers_are_written_for_people():
    """As many digits as mean something, with units."""
    assert [number(x) for x in (0, 1234.5, 12.34, 0.001234, 1e-12)] == ["0", "1,234", "12.3", "0.00123", "1.00e-12"]
    assert [seconds(x) for x in (1.234, 0.0456, 789e-6, 5e-9)] == ["1.23 s", "45.6 ms", "789 µs", "5.00 ns"]
    assert [large(x) for x in (1.547e9, 2_000, 12)] == ["1.55 G", "2.00 k", "12"]
    assert [percent(x) for x in (1, 0.0033, 0, 1e-9)] == ["100 %", "0.33 %", "0 %", "< 0.001 %"]
    assert together(0.5, 0.5, 0.5) == ("0.500", "0.500", "0.500")


# ----------------------------------------------------------------------------------- terminal and Markdown


def printed(document, **options):
    console = Console(highlight=False, markup=False, emoji=False, **options)
    with console.capture() as found:
        report.terminal(document, console)
    return found.get()


@pytest.mark.parametrize("name", ODD)
def test_every_method_is_in_the_texts(name):
    """Whatever is missing, each method is in the terminal's table and in the Markdown's."""
    document = ODD[name]()
    labels = [cell["label"] for cell in document["cells"]]
    narrow, wide = printed(document, width=80, force_terminal=True, no_color=True), printed(document, width=10_000)
    assert narrow.strip()
    text = report.markdown(document)
    for label in labels:
        assert label in wide
        assert label in unescape(re.sub(r"\\(.)", r"\1", text))


def test_a_pipe_gets_one_line_a_method(capsys):
    """Without a terminal no line is folded, nothing is cut off, and there are no colours."""
    report.terminal(ODD["several"]())
    lines = capsys.readouterr().out.splitlines()
    assert not [line for line in lines if "\x1b" in line]
    rows = [line for line in lines if line.startswith("lora rank=16 ")]
    assert len(rows) == 2
    assert all(" to " in row and row.endswith("kB") for row in rows)


def test_texts_do_not_control_the_terminal():
    """Whatever an error's message holds, it stays on its line."""
    document = make_document([failed_cell("lora")])
    document["cells"][0]["error"]["message"] = "one\ntwo\x1b[31m\x07 three"
    document["workloads"][0]["summary"] = "some\n\x1b]0;thing"
    text = printed(document, width=10_000)
    assert "lora: out of memory (step): MemoryError: one two [31m three\n" in text
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", text)
    assert "one two \\[31m three\n" in report.markdown(document)


def test_a_terminal_shows_intervals_below_the_figures():
    """In 100 columns a method of normal length is not folded."""
    text = printed(
        make_document([make_cell("lora", quality=[80.0, 81.0, 82.0])]), width=100, force_terminal=True, no_color=True
    )
    (row,) = [line for line in text.splitlines() if line.startswith(" lora ")]
    assert " to " not in row
    assert re.search(r"\(\d\d\.\d\xa0to\xa0\d\d\.\d\)", text)


def test_markdown_tables_have_their_columns():
    """Each row has as many cells as its head, whatever is in the names."""
    for document in (ODD["several"](), ODD["hostile names"]()):
        lines = report.markdown(document).splitlines()
        widths = [len(re.findall(r"(?<!\\)\|", line)) for line in lines if line.startswith("|")]
        tables = [len(re.findall(r"(?<!\\)\|", line)) for line in lines if line.startswith("|---")]
        assert set(widths) == set(tables)
        assert len(tables) == 1 + 2 * len(document["workloads"])
        assert "<img" not in "\n".join(lines)


# ------------------------------------------------------------------------------------- the one in the repository

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "results").glob("methods-*.json")), ids=lambda p: p.stem)
def test_the_committed_report_is_whole(path):
    """It compares every method of this repository on three models and more, and the page beside it was made of it."""
    document = read(path)
    assert report.markdown(document) == path.with_suffix(".md").read_text()
    ours = {folder.name for folder in (ROOT / "plugins").iterdir()} | {"peftkit"}
    methods = {info.name for info in plugins.methods() if info.package in ours}
    learned = 0
    for workload in document["workloads"]:
        cells = [cell for cell in document["cells"] if cell["workload"] == workload["name"]]
        assert {cell["method"] for cell in cells} == methods
        assert {cell["status"] for cell in cells} <= {"ok", "not applicable"}
        learned += all(cell["quality"] for cell in cells if cell["status"] == "ok")
    assert learned >= 3


def test_there_is_a_committed_report():
    """The test above has something to look at."""
    assert list((ROOT / "benchmarks" / "results").glob("methods-*.json"))
