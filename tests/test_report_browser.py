"""The page of a benchmark in headless Chromium: from disk, offline, on a phone, in the dark, by keyboard, without scripts."""

import json
import shutil
from pathlib import Path

import pytest

from bench_documents import HOSTILE, ODD, make_cell, make_document, make_workload, many
from peftkit.bench import report

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PHONE, DESK = {"width": 375, "height": 800}, {"width": 1280, "height": 900}


@pytest.fixture(scope="module")
def chromium():
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip("there is no Chromium on PATH")
    with api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])  # in a container we may be root
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pages on disk: every odd document, and one with failed cells and many methods."""
    folder = tmp_path_factory.mktemp("pages")
    documents = {name: ODD[name]() for name in ("hostile names", "long names", "nothing measured", "no task")}
    documents["many"] = many(8, ("digits", "tones"))
    for name, document in documents.items():
        (folder / f"{name}.html").write_text(report.html(document), encoding="utf-8")
        (folder / f"{name}.json").write_text(json.dumps(document), encoding="utf-8")
    return folder


@pytest.fixture
def show(chromium, folder):
    """Opens a page offline; whatever it asks for or complains of is collected."""
    contexts = []

    def open_page(name="many", **options):
        context = chromium.new_context(**{"viewport": DESK, "offline": True, **options})
        contexts.append(context)
        page = context.new_page()
        page.asked, page.said = [], []
        page.on("request", lambda request: page.asked.append(request.url))
        page.on("console", lambda message: page.said.append(message.text))
        page.on("pageerror", lambda error: page.said.append(str(error)))
        page.on("dialog", lambda dialog: (page.said.append(dialog.message), dialog.dismiss()))
        page.goto((folder / f"{name}.html").as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()


def labels(page):
    """The methods in the first table, from top to bottom."""
    return page.locator("table").first.locator("tbody .label").all_inner_texts()


def column(page, title):
    return page.locator("table").first.locator("thead th", has_text=title)


@pytest.mark.parametrize("name", ["many", "hostile names", "long names", "nothing measured", "no task"])
@pytest.mark.parametrize("size", [PHONE, DESK], ids=["phone", "desk"])
def test_it_opens_from_disk_and_fits(show, folder, name, size):
    """One request, for the file itself; nothing on the console; nothing to scroll sideways; every method is there."""
    page = show(name, viewport=size)
    assert len(page.asked) == 1
    assert page.said == []
    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
    document = json.loads((folder / f"{name}.json").read_text())
    first = document["workloads"][0]["name"]
    expected = [cell["label"] for cell in document["cells"] if cell["workload"] == first]
    assert [" ".join(label.split()) for label in labels(page)] == [" ".join(label.split()) for label in expected]


def test_names_with_markup_are_shown_and_not_obeyed(show):
    """No element, attribute or script comes from a name."""
    page = show("hostile names")
    assert page.locator("img").count() == 0
    assert page.locator("script").count() == 2
    assert page.evaluate("JSON.parse(document.getElementById('document').textContent).cells[0].label") == HOSTILE


def test_a_click_sorts_the_best_to_the_top_and_the_next_turns_it_round(show):
    """By the numbers and not by their text; what was not measured stays last; the arrow is in the markup."""
    page = show()
    start = labels(page)
    head = column(page, "trained")
    trained = "[...document.querySelector('table').tBodies[0].rows].map(row => row.cells[2].dataset.value)"
    head.get_by_role("button").click()
    values = [float(value) for value in page.evaluate(trained)[:-1]]
    assert values == sorted(values)
    assert len(set(values)) > 2
    assert head.get_attribute("aria-sort") == "ascending"
    head.get_by_role("button").click()
    assert [float(value) for value in page.evaluate(trained)[:-1]] == sorted(values, reverse=True)
    assert head.get_attribute("aria-sort") == "descending"
    assert labels(page)[-1] == start[-1] == "hra"
    assert sorted(labels(page)) == sorted(start)
    column(page, "accuracy").get_by_role("button").click()
    assert (column(page, "accuracy").get_attribute("aria-sort"), head.get_attribute("aria-sort")) == (
        "descending",
        "none",
    )
    column(page, "method").get_by_role("button").click()
    assert labels(page) == start


def test_the_keyboard_sorts_as_well(show):
    """The heads are reached by Tab, show that they are, and obey Enter and Space."""
    page = show()
    page.locator(".scroll").first.focus()
    for _ in range(3):
        page.keyboard.press("Tab")
    focused = "document.activeElement.closest('th')"
    assert page.evaluate(f"{focused}.textContent").startswith("trained")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    assert page.evaluate(f"{focused}.getAttribute('aria-sort')") == "ascending"
    page.keyboard.press("Space")
    assert page.evaluate(f"{focused}.getAttribute('aria-sort')") == "descending"


def test_without_scripts_every_number_is_there(show):
    """The table is read as it is; nothing pretends to be a button."""
    page = show(java_script_enabled=False)
    assert len(labels(page)) == 8
    assert page.locator("th button").count() == 0
    assert not page.locator("#save").is_visible()
    assert page.locator(".plot svg").first.is_visible()


CONTRAST = """() => {
  const channels = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (rgb) => rgb.slice(0, 3).map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const colour = channels(getComputedStyle(e).backgroundColor);
      if (colour.length < 4 || colour[3] > 0) return colour;
    }
    return channels(getComputedStyle(document.body).backgroundColor);
  };
  const found = [];
  for (const details of document.querySelectorAll("details")) details.open = true;
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some(node => node.nodeType === 3 && node.textContent.trim());
    if (!own || !element.getClientRects().length || ["SCRIPT", "STYLE", "title"].includes(element.tagName)) continue;
    const style = getComputedStyle(element);
    const text = channels(element instanceof SVGElement ? style.fill : style.color);
    const [low, high] = [light(text), light(ground(element))].sort((a, b) => a - b);
    found.push([(high + 0.05) / (low + 0.05), element.tagName, element.textContent.slice(0, 40)]);
  }
  return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_can_be_read(show, scheme):
    """A contrast of 4.5 or more, computed for each element that has text, pictures included."""
    found = show(color_scheme=scheme).evaluate(CONTRAST)
    assert len(found) > 250
    assert {"text", "TD", "SMALL", "FIGCAPTION"} <= {tag for _, tag, _ in found}
    assert [each for each in found if each[0] < 4.5] == []


def test_the_measure_of_contrast_sees_grey_on_grey(show):
    """The measure itself: a text made faint is found."""
    page = show()
    page.evaluate("document.querySelector('.hint').style.color = '#999'")
    assert {tag for ratio, tag, _ in page.evaluate(CONTRAST) if ratio < 4.5} == {"P"}


def test_the_dark_theme_reaches_the_pictures(show):
    """Page, text and marks change with the system's setting."""
    look = """() => [document.body, document.querySelector('.plot text'), document.querySelector('.point.frontier use')]
        .map(e => [getComputedStyle(e).backgroundColor, getComputedStyle(e).color, getComputedStyle(e).fill])"""
    light, dark = (show(color_scheme=scheme).evaluate(look) for scheme in ("light", "dark"))
    assert light[0][0] == "rgb(255, 255, 255)"
    assert all(one != other for one, other in zip(light, dark, strict=True))


def test_nothing_hangs_on_colour(show):
    """Parts of a bar differ in their pattern, or widely in lightness; marks differ in shape."""
    page = show()
    patterns = page.evaluate(
        "[...document.querySelectorAll('#w1 .legend .swatch')].map(e => getComputedStyle(e).backgroundImage)"
    )
    assert len(patterns) == 7
    assert len(set(patterns)) == 6  # two are plain: pale grey and strong
    plain = page.evaluate(
        "['frozen', 'trainable'].map(e => getComputedStyle(document.querySelector('.swatch.' + e)).backgroundColor)"
    )
    pale, strong = (sum(map(int, colour.strip("rgb()").split(","))) for colour in plain)
    assert pale > 2 * strong
    shapes = page.evaluate("""['frontier', 'tied', 'beaten'].map(kind => {
        const use = document.querySelector(`.plot .point.${kind} use`);
        return use && document.querySelector(use.getAttribute('href')).getAttribute('d'); })""")
    assert None not in shapes
    assert len(set(shapes)) == 3


def test_the_bars_add_up_and_carry_the_estimate(show):
    """The parts of the longest bar fill it, a bar's length is its share, and the mark stands where the estimate is."""
    page = show()
    bars = page.evaluate("""[...document.querySelectorAll('#w1 .bar')].map(bar => {
        const all = bar.getBoundingClientRect(), parts = [...bar.querySelectorAll(':scope > :not(.estimate)')];
        const mark = bar.querySelector('.estimate').getBoundingClientRect();
        return [(parts.at(-1).getBoundingClientRect().right - all.left) / all.width, (mark.left - all.left) / all.width, bar.getAttribute('aria-label')]; })""")
    document = json.loads(page.locator("#document").text_content())
    peaks = [
        cell["exact"]["memory"]["peak"] for cell in document["cells"] if cell["workload"] == "digits" and cell["exact"]
    ]
    longest = max(peaks) + 400  # of estimates
    assert len(bars) == len(peaks) == 7
    for (length, mark, text), peak in zip(bars, peaks, strict=True):
        assert length == pytest.approx(peak / longest, abs=0.003)
        assert mark == pytest.approx((peak + 400) / longest, abs=0.003)
        assert "activations" in text


def test_a_wide_table_scrolls_in_its_box_with_the_names_in_place(show):
    """On a phone the first column stays while the others move."""
    page = show(viewport=PHONE)
    box = page.locator(".scroll").first
    where = "e => [e.querySelector('tbody th').getBoundingClientRect().left, e.querySelector('tbody td').getBoundingClientRect().left]"
    name, figure = box.evaluate(where)
    box.evaluate("e => e.scrollLeft = 200")
    assert box.evaluate("e => e.scrollLeft") == 200
    assert box.evaluate(where) == [pytest.approx(name, abs=1), pytest.approx(figure - 200, abs=1)]
    assert box.get_attribute("tabindex") == "0"


def test_motion_only_for_those_who_want_it(show):
    """Jumps scroll smoothly unless the system asks for less motion."""
    behaviour = "getComputedStyle(document.documentElement).scrollBehavior"
    assert show(reduced_motion="reduce").evaluate(behaviour) == "auto"
    assert show(reduced_motion="no-preference").evaluate(behaviour) == "smooth"


def test_on_paper_nothing_is_hidden(show):
    """Printing opens what is folded, lets wide tables run on, and leaves out what only a screen can do."""
    page = show()
    folded = page.locator("details li").first
    assert folded.evaluate("e => e.checkVisibility({contentVisibilityAuto: true})") is False
    page.emulate_media(media="print")
    assert folded.evaluate("e => e.checkVisibility({contentVisibilityAuto: true})") is True
    assert page.locator(".scroll").first.evaluate("e => getComputedStyle(e).overflowX") == "visible"
    assert not page.locator("nav").is_visible()
    assert not page.locator("#save").is_visible()


def test_the_document_can_be_saved_from_the_page(show, folder):
    """What is saved is the document, number for number."""
    page = show(accept_downloads=True)
    with page.expect_download() as download:
        page.locator("#save").click()
    assert json.loads(Path(download.value.path()).read_text()) == json.loads((folder / "many.json").read_text())


def test_labels_in_a_picture_do_not_lie_on_each_other(show):
    """With the browser's own font, too, no two labels overlap, and none is cut off by the picture's edge."""
    overlaps = """() => [...document.querySelectorAll('.plot svg')].flatMap(svg => {
        const frame = svg.getBoundingClientRect(), boxes = [...svg.querySelectorAll('text')].map(t => [t.getBoundingClientRect(), t.textContent]);
        const cut = boxes.filter(([b]) => b.left < frame.left - 1 || b.right > frame.right + 1);
        const over = boxes.flatMap(([a, one], i) => boxes.slice(i + 1).filter(([b]) =>
            Math.min(a.right, b.right) - Math.max(a.left, b.left) > 2 && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 4).map(([, two]) => [one, two]));
        return [...cut.map(([, text]) => ['cut', text]), ...over]; })"""
    assert show().evaluate(overlaps) == []
    assert show("no task").evaluate(overlaps) == []


def test_ties_are_said_where_they_are(show, folder):
    """A shared place stands in the table, and who shares it can be unfolded."""
    cells = [
        make_cell(name, quality=values)
        for name, values in (("one", [90.0, 90.5, 91.0]), ("two", [90.2, 89.8, 90.4]), ("three", [60.0, 61.0, 62.0]))
    ]
    (folder / "ties.html").write_text(report.html(make_document(cells, [make_workload()])), encoding="utf-8")
    page = show("ties")
    assert page.locator("td:nth-child(2) .place").all_inner_texts() == ["place 1=", "place 1=", "place 3"]
    page.locator("summary", has_text="Who is tied with whom").click()
    assert page.locator(".ties").first.locator("li").all_inner_texts() == [
        "one tied with two",
        "two tied with one",
        "three tied with nobody",
    ]
