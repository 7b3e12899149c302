"""A document as one HTML page that opens from disk: no network, no script needed to read it, light or dark, any width.

The document itself is embedded, so that the page can be passed on in its place. Every text is escaped by the template
engine, and a policy in the page's head lets nothing run but the one script that is named by its hash.
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from importlib import resources
from typing import Any, NamedTuple

from peftkit.bench.document import Document, memory_parts, needed
from peftkit.bench.report import columns, plots, ties, words
from peftkit.bench.report.columns import number, part
from peftkit.bench.report.plots import Axis, Picture, Point
from peftkit.bench.report.view import Row, Sheet, sheets
from peftkit.tables import size

ARROWS = {"lower": "↓", "higher": "↑", "": ""}
PLACED = ("quality", "step")
"""Columns whose places are shown: in the exact ones the number says it."""


class Plot(NamedTuple):
    """A picture, its title, and in words who stands where."""

    title: str
    picture: Picture
    standings: list[tuple[str, str]]


class Bar(NamedTuple):
    """A stacked bar: parts with their share of the widest bar in percent, and the estimate's place on it."""

    row: Row
    segments: list[tuple[str, str, str]]
    total: str
    estimate: tuple[str, str] | None
    text: str


def html(document: Document) -> str:
    """The page, as text to be written to a file in UTF-8."""
    jinja2 = needed("jinja2")
    folder = resources.files("peftkit.bench.report").joinpath("template")
    script = folder.joinpath("page.js").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: folder.joinpath(name).read_text(encoding="utf-8")),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(shown=number, tight=_tight)
    page: str = environment.get_template("page.html").render(
        document=document,
        sections=[_section(sheet, f"w{index}") for index, sheet in enumerate(sheets(document), 1)],
        facts=words.facts(document),
        measured=words.MEASURED,
        css=folder.joinpath("page.css").read_text(encoding="utf-8"),
        script=script,
        script_hash=f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}",
        json=_embedded(document),
        ARROWS=ARROWS,
        PARTS=memory_parts(),
        PLACED=PLACED,
    )
    return page


def _tight(text: str) -> str:
    """A sentence whose numbers stay on a line with their units."""
    return re.sub(r"(?<=\d) (?=%|[kMG]?B\b)", "\N{NO-BREAK SPACE}", text)


def _embedded(document: Document) -> str:
    """JSON that cannot end the element that it stands in, nor open a comment: each `<` is written as an escape."""
    text = json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def _section(sheet: Sheet, name: str) -> Mapping[str, Any]:
    return {
        "id": name,
        "sheet": sheet,
        "sentences": words.sentences(sheet),
        "main": [column for column in sheet.columns if column.main],
        "details": [column for column in sheet.columns if not column.main],
        "ties": list(_ties(sheet)),
        "plots": list(_plots(sheet, name)),
        "bars": _bars(sheet),
    }


def _ties(sheet: Sheet) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    for column in sheet.columns:
        ranking = sheet.rankings.get(column.key)
        if column.key in PLACED and ranking and len(ranking.place) > 1:
            yield (
                column.title,
                [(a, words.tied_with(sheet, column.key, a) or "tied with nobody") for a in ranking.place],
            )


# ------------------------------------------------------------------------------------------------ plots


def _plots(sheet: Sheet, name: str) -> Iterator[Plot]:
    """Quality against each cost; without quality, the time of a step against the other two."""
    costs = ("memory", "step", "parameters")
    against = "quality" if "quality" in sheet.rankings else "step"
    for cost in costs:
        rows = sheet.having(cost, against)
        if cost != against and cost in sheet.rankings and against in sheet.rankings and len(rows) > 1:
            yield _plot(sheet, rows, cost, against, f"{name}-{cost}")


def _plot(sheet: Sheet, rows: list[Row], cost: str, against: str, name: str) -> Plot:
    x, y = _axis(sheet, cost), _axis(sheet, against)
    stand = ties.standings(
        {row.label: (row.values[cost].number, row.values[against].number) for row in rows},
        sheet.rankings[cost].sign,
        sheet.rankings[against].sign,
        higher_is_better=y.higher_is_better,
    )
    points = [
        Point(
            row.number,
            row.label,
            row.values[cost].number,
            row.values[against].number,
            stand[row.label],
            _ends(row, cost),
            _ends(row, against),
        )
        for row in rows
    ]
    groups = (("On the frontier", "frontier"), ("Tied with it", "tied"), ("Clearly beaten", "beaten"))
    named = [(text, ", ".join(p.label for p in points if p.standing == each)) for text, each in groups]
    return Plot(
        f"{y.title} against {x.title}",
        plots.scatter(points, x, y, name),
        [(text, names) for text, names in named if names],
    )


def _axis(sheet: Sheet, key: str) -> Axis:
    column = next(column for column in sheet.columns if column.key == key)
    write = {"memory": _round_size, "parameters": _round_count}.get(key, "{:g}".format)
    unit = f", {column.unit}" if key == "quality" and column.unit else ""
    title = "parameters trained" if key == "parameters" else f"{column.title}{unit}"
    return Axis(title, write, higher_is_better=column.better == "higher")


def _round_size(value: float) -> str:
    return size(round(value)).replace(".0 ", " ")


def _round_count(value: float) -> str:
    return re.sub(r"\.0+ ", " ", columns.large(value))


def _ends(row: Row, key: str) -> tuple[float, float] | None:
    found = part(row.cell, "quality") if key == "quality" else part(row.cell, "derived", f"{key}_ratio")
    return (found["low"], found["high"]) if found else None


# ------------------------------------------------------------------------------------------------- bars


def _bars(sheet: Sheet) -> list[Bar]:
    rows = sheet.having("memory")
    widest = max(
        (part(row.cell, "exact", kind, "peak") or 0 for row in rows for kind in ("memory", "estimated_memory")),
        default=0,
    )
    return [_bar(row, widest) for row in rows] if widest else []


def _bar(row: Row, widest: int) -> Bar:
    memory, estimated = row.cell["exact"]["memory"], part(row.cell, "exact", "estimated_memory", "peak")
    texts = {name: f"{name} {size(memory[name])}" for name in memory_parts() if memory[name]}
    segments = [(name, f"{100 * memory[name] / widest:.3f}", text) for name, text in texts.items()]
    mark = None if estimated is None else (f"{100 * estimated / widest:.3f}", f"estimated {size(estimated)}")
    total = size(memory["peak"])
    said = ", ".join([*texts.values(), f"in all {total}", *([mark[1]] if mark else [])])
    return Bar(row, segments, total, mark, said)
