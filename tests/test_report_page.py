"""The page of a benchmark: well formed, self-contained, readable, with pictures that say what the tables say."""

import base64
import copy
import hashlib
import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest

from bench_documents import ODD, many
from peftkit.bench import report
from peftkit.bench.report import plots

# -------------------------------------------------------------------------------------------- the page


class Outline(HTMLParser):
    """What is in a page: elements that are closed as they were opened, rows of tables, scripts, addresses."""

    VOID = ("meta", "link", "br", "img", "hr", "input")

    def __init__(self, page):
        super().__init__()
        self.open, self.identifiers, self.addresses, self.scripts, self.faults = [], [], [], [], []
        self.rows, self.heading = {}, ""
        self.feed(page)
        self.close()
        self.faults += self.open
        self.rows.setdefault("Results", [])

    def handle_starttag(self, tag, attributes):
        names = [name for name, _ in attributes]
        self.faults += [f"{tag} {name} twice" for name, count in Counter(names).items() if count > 1]
        found = dict(attributes)
        self.identifiers += [found["id"]] if "id" in found else []
        self.addresses += [
            found[name] for name in ("src", "href", "action", "data", "poster", "srcset") if name in found
        ]
        self.faults += [f"{tag} {name}" for name in names if name.startswith("on")]
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append((found.get("type"), ""))
        if tag == "span" and found.get("class") == "label":
            self.rows.setdefault(self.heading, []).append("")

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        if tag in self.VOID:
            return
        if not self.open or self.open.pop() != tag:
            self.faults.append(f"</{tag}>")

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts[-1] = (self.scripts[-1][0], data)
        elif self.open and self.open[-1] == "h3":
            self.heading = data
        elif (
            self.rows.get(self.heading) and self.open[-3:] == ["tr", "th", "span"] and self.rows[self.heading][-1] == ""
        ):
            self.rows[self.heading][-1] = data


@pytest.mark.parametrize("name", ODD)
def test_the_page_is_well_formed_and_asks_for_nothing(name):
    """Every element is closed in order, no identifier stands twice, every address is inside the page, all rows are there."""
    document = ODD[name]()
    page = report.html(document)
    outline = Outline(page)
    assert outline.rows["Results"] == [cell["label"] for cell in document["cells"]]
    assert outline.faults == []
    assert [name for name, count in Counter(outline.identifiers).items() if count > 1] == []
    assert all(address == "data:," or address.removeprefix("#") in outline.identifiers for address in outline.addresses)
    assert "@import" not in page
    assert "url(" not in page


def test_the_outline_sees_faults():
    """The parser of these tests catches what it is for."""
    assert Outline("<p><b></p></b>").faults
    assert Outline("<p>").faults
    assert Outline('<p id="a" id="b" onclick="x()"></p>').faults == ["p id twice", "p onclick"]


@pytest.mark.parametrize("name", ["hostile names", "nothing measured", "no noise"])
def test_the_page_is_the_document_too(name):
    """The embedded JSON is the whole document, and only the script named in the policy is code."""
    document = ODD[name]()
    page = report.html(document)
    (kind, data), (code_kind, code) = Outline(page).scripts
    assert (kind, code_kind) == ("application/json", None)
    assert json.loads(data) == document
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    assert f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in page


@pytest.mark.parametrize("workloads", [("digits",), pytest.param(("digits", "sentiment", "tones", "voices"), marks=pytest.mark.slow)], ids=len)  # fmt: skip
def test_a_large_page_stays_small(workloads):
    """25 methods on 4 workloads, samples and pictures included, are below a megabyte; so is a quarter of it for one."""
    assert len(report.html(many(25, workloads)).encode()) < 250_000 * len(workloads)


def test_the_same_document_makes_the_same_page():
    """Nothing in it depends on the time or on chance."""
    document = ODD["one method"]()
    assert report.html(document) == report.html(copy.deepcopy(document))


def test_the_colours_of_both_themes_can_be_read():
    """Texts have a contrast of 4.5 on each background that they stand on, by the style sheet alone."""
    css = Path(plots.__file__).with_name("template") / "page.css"
    light, dark = re.findall(r":root \{(.*?)\}", css.read_text(), flags=re.DOTALL)
    for theme in (light, dark):
        colours = dict(re.findall(r"--(\w+): (#\w{6})", theme))
        for text in ("text", "muted", "accent", "fault"):
            for ground in ("page", "raised"):
                assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground, theme)


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


# ------------------------------------------------------------------------------------------- pictures

PLAIN = plots.Axis("cost", "{:g}".format)
GOOD = plots.Axis("quality", "{:g}".format, higher_is_better=True)


def test_a_picture_has_a_mark_for_each_method_with_its_name():
    """Shapes tell how a method stands; a hover, and most labels, tell which it is."""
    points = [plots.Point(1, "a", 1.0, 60.0, "frontier"), plots.Point(2, "b<&>", 5.0, 90.0, "frontier", (4.0, 6.0), (88.0, 92.0)),
              plots.Point(3, "c" * 40, 9.0, 89.0, "tied"), plots.Point(4, "d", 5.0, 70.0, "beaten")]  # fmt: skip
    found = plots.scatter(points, PLAIN, GOOD, "p")
    assert re.findall(r'class="point (\w+)"><title>([^<]*)', found.svg) == [
        ("frontier", "1 a"),
        ("frontier", "2 b&lt;&amp;&gt;"),
        ("tied", f"3 {'c' * 40}"),
        ("beaten", "4 d"),
    ]
    assert re.findall(r">(\d [^<]*)</text>", found.svg) == ["1 a", "2 b&lt;&amp;&gt;", f"3 {'c' * 19}…", "4 d"]
    assert found.unlabelled == []
    assert len(set(re.findall(r'<use [^>]*href="#(\w+)"[^>]*/></g>', found.svg))) == 3
    assert not re.findall(r"#0[1-5]0", found.svg)


def test_a_picture_says_for_whom_it_had_no_room():
    """Labels never lie on each other: what does not fit gives way to its number, and then is named below."""
    points = [
        plots.Point(n, f"method {n}", 5.0 + n / 1000, 90.0, "tied" if n > 1 else "frontier") for n in range(1, 26)
    ]
    found = plots.scatter(points, PLAIN, GOOD, "p")
    texts = re.findall(r">(\d+)(?: method \d+)?</text>", found.svg)
    numbers = [int(text) for text in texts if 1 <= int(text) <= 25]
    assert found.unlabelled
    assert sorted([*numbers, *found.unlabelled]) == list(range(1, 26))


@pytest.mark.parametrize(
    "xs", [(0, 770, 1_000_000), (0, 0, 0), (5, 5, 5), (1, 2, 3), (1e6, 6e6, 18e6), (0.5, 0.6, 0.61)]
)
def test_any_range_makes_an_axis(xs):
    """Zero, one value for all, and many decades each get a handful of ticks."""
    points = [plots.Point(n, f"m{n}", x, n, "tied" if n else "frontier") for n, x in enumerate(xs)]
    svg = plots.scatter(points, PLAIN, GOOD, "p").svg
    ticks = re.findall(r"text-anchor:middle;fill:var\(--muted\)[^>]*>([^<]*)<", svg)
    assert 1 <= len(ticks) <= 8
