"""Two figures against each other as a picture: an SVG that takes its colours and its font from the page around it.

matplotlib draws it and lays out the axes. Its colours are placeholders here, exchanged for variables of the page's
style sheet, so that one picture serves the light theme and the dark one. Nothing hangs on colour: the shape of a
marker says how a method stands (a disc on the frontier, a diamond tied with it, a cross for beaten), and labels say
which it is.
"""

import io
import math
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from peftkit.bench.document import needed
from peftkit.bench.report.ties import Standing

WIDTH, HEIGHT, FONT = 400, 320, 12
"""In the units of the picture: pixels where it is shown at its own size. So the text is readable on a phone, too."""

COLOURS = {"#010101": "--text", "#020202": "--muted", "#030303": "--line", "#040404": "--accent", "#050505": "--page"}
TEXT, MUTED, LINE, ACCENT, PAGE = COLOURS

MARKERS: Mapping[Standing, dict[str, Any]] = {
    "frontier": {"marker": "o", "markersize": 7, "color": ACCENT},
    "tied": {"marker": "D", "markersize": 6, "color": ACCENT, "markerfacecolor": PAGE},
    "beaten": {"marker": "x", "markersize": 5, "color": MUTED},
}

SVG = "http://www.w3.org/2000/svg"
LINK = "{http://www.w3.org/1999/xlink}href"


@dataclass(frozen=True)
class Point:
    """One method: its number and label, where it stands, and the ends of its intervals in x and y."""

    number: int
    label: str
    x: float
    y: float
    standing: Standing
    x_ends: tuple[float, float] | None = None
    y_ends: tuple[float, float] | None = None


@dataclass(frozen=True)
class Axis:
    """What it shows, and how a number on it is written."""

    title: str
    write: Any
    higher_is_better: bool = False


@dataclass(frozen=True)
class Picture:
    """The SVG, and the numbers of the points for whose label there was no room."""

    svg: str
    unlabelled: list[int]


def scatter(points: Sequence[Point], x: Axis, y: Axis, name: str) -> Picture:
    """Draw the points; `name` is unique on the page and keeps the identifiers inside apart."""
    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.size": FONT,
        "axes.edgecolor": LINE,
        "axes.labelcolor": TEXT,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "text.color": TEXT,
        "text.parse_math": False,  # a label with two dollar signs is a label
        "axes.unicode_minus": False,
    }
    matplotlib = needed("matplotlib")
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # the page's own font has what matplotlib's lacks
        figure = needed("matplotlib.figure").Figure(figsize=(WIDTH / 72, HEIGHT / 72), dpi=72, layout="constrained")
        axes = figure.add_subplot()
        _axes(axes, points, x, y)
        _marks(axes, points)
        figure.draw_without_rendering()  # the layout settles, so that labels can be placed
        figure.set_layout_engine("none")
        unlabelled = _labels(axes, points)
        written = io.StringIO()
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None})
    return Picture(_clean(written.getvalue(), points, f"{y.title} against {x.title}"), unlabelled)


# -------------------------------------------------------------------------------------------- drawing


def _axes(axes: Any, points: Sequence[Point], x: Axis, y: Axis) -> None:
    ticker = needed("matplotlib.ticker")
    values = [point.x for point in points]
    if max(values) > 2.5 * min(values):
        least = min(value for value in values if value > 0)
        axes.set_xscale("symlog", linthresh=least, linscale=0.3)  # as a logarithm, but with a place for 0
        axes.xaxis.set_major_locator(ticker.FixedLocator(_powers(min(values), least, max(values))))
        axes.xaxis.set_minor_locator(ticker.NullLocator())
    else:
        axes.xaxis.set_major_locator(ticker.MaxNLocator(5))
    axes.yaxis.set_major_locator(ticker.MaxNLocator(6))
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: x.write(value)))
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: y.write(value)))
    axes.margins(0.12)
    axes.set_xlabel(f"{x.title} ({_better(x)} is better)")
    axes.set_ylabel(f"{y.title} ({_better(y)} is better)")
    axes.grid(color=LINE, linewidth=0.5, alpha=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _powers(lowest: float, least: float, most: float) -> list[float]:
    """Where a logarithmic axis has ticks: powers of ten, steps between them if there are few, and 0 if it is there."""
    first, last = math.floor(math.log10(least)), math.ceil(math.log10(most))
    steps = (1, 2, 5) if last - first < 3 else (1,)
    ticks = [step * 10.0**power for power in range(first, last + 1) for step in steps]
    return [0.0] * (lowest <= 0) + [tick for tick in ticks if least * 0.8 <= tick <= most * 1.2]


def _better(axis: Axis) -> str:
    return "higher" if axis.higher_is_better else "lower"


def _marks(axes: Any, points: Sequence[Point]) -> None:
    front = sorted((point.x, point.y) for point in points if point.standing == "frontier")
    axes.step(*zip(*front, strict=True), where="post", color=ACCENT, linewidth=1, linestyle=(0, (4, 3)))
    for point in points:
        bars = {"color": MUTED, "linewidth": 1, "solid_capstyle": "butt"}
        if point.x_ends and point.x_ends[0] < point.x_ends[1]:
            axes.plot(point.x_ends, [point.y, point.y], **bars)
        if point.y_ends and point.y_ends[0] < point.y_ends[1]:
            axes.plot([point.x, point.x], point.y_ends, **bars)
    for point in points:
        look = MARKERS[point.standing]
        axes.plot([point.x], [point.y], linestyle="none", gid=f"point-{point.number}", zorder=3, **look)


def _labels(axes: Any, points: Sequence[Point]) -> list[int]:
    """Write each label where it touches no marker and no other label: with its name, or else with its number alone."""
    boxes = needed("matplotlib.transforms").Bbox
    at = {point.number: axes.transData.transform((point.x, point.y)) for point in points}
    taken = [boxes.from_bounds(x - 5, y - 5, 10, 10) for x, y in at.values()]
    left, bottom, right, top = axes.bbox.x0, axes.bbox.y0, axes.figure.bbox.x1, axes.figure.bbox.y1
    order: dict[Standing, int] = {"frontier": 0, "tied": 1, "beaten": 2}
    unlabelled = []
    for point in sorted(points, key=lambda point: (order[point.standing], point.number)):
        for text, (side, height) in product(_texts(point), _PLACES):
            x, y = at[point.number][0] + 7 * side, at[point.number][1] + 7 * height
            wide, high = _extent(text)
            box = boxes.from_bounds(x + (side - 1) / 2 * wide, y + (height - 1) / 2 * high, wide, high)
            inside = box.x0 >= left and box.x1 <= right and box.y0 >= bottom and box.y1 <= top
            if inside and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                axes.text(
                    x,
                    y,
                    text,
                    transform=None,
                    ha=("right", "center", "left")[side + 1],
                    va=("top", "center", "bottom")[height + 1],
                    fontsize=FONT - 1,
                    color=MUTED if point.standing == "beaten" else TEXT,
                )
                break
        else:
            unlabelled.append(point.number)
    return sorted(unlabelled)


def _extent(text: str) -> tuple[float, float]:
    """Width and height of a label in matplotlib's own font, which is wider than most: what fits in it fits."""
    font = needed("matplotlib.font_manager").FontProperties(size=FONT - 1)
    measure = needed("matplotlib.textpath").text_to_path.get_text_width_height_descent
    return float(measure(text, font, ismath=False)[0]), FONT + 1.0


_PLACES = ((1, 0), (1, 1), (1, -1), (-1, 0), (-1, 1), (-1, -1), (0, 1), (0, -1))
"""Sides of a marker on which its label may stand, the best first: right or left, above or below."""


def _texts(point: Point) -> Iterator[str]:
    yield f"{point.number} {shortened(point.label)}"
    yield f"{point.number}"


def shortened(label: str, longest: int = 20) -> str:
    """A label of at most so many characters; an ellipsis says that it goes on."""
    return label if len(label) <= longest else f"{label[: longest - 1]}…"


# ------------------------------------------------------------------------------------------- cleaning


def _clean(svg: str, points: Sequence[Point], title: str) -> str:
    """What matplotlib wrote, less its fixed colours, fonts and sizes, and the styles that would leak into the page."""
    ET.register_namespace("", SVG)
    root = ET.fromstring(svg)  # noqa: S314 - matplotlib wrote it, a moment ago
    named = {f"point-{point.number}": point for point in points}
    shared = {element.attrib.get(LINK) for element in root.iter()}
    for element in root.iter():
        own = element.attrib
        if own.get("id") in named:
            point = named[own["id"]]
            own["class"] = f"point {point.standing}"
            title_of_point = ET.Element(f"{{{SVG}}}title")
            title_of_point.text = f"{point.number} {point.label}"
            element.insert(0, title_of_point)
        if f"#{own.get('id')}" not in shared:
            own.pop("id", None)
        if LINK in own:
            own["href"] = own.pop(LINK)
        for key in own.keys() & {"d", "transform", "x", "y"}:
            own[key] = re.sub(
                r"-?\d+\.\d+", lambda found: f"{float(found[0]):.1f}".removesuffix(".0"), own[key]
            ).strip()
        if own.get("transform", "").startswith("rotate(-0 "):
            del own["transform"]
        own.pop("clip-path", None)  # nothing lies outside
        if "style" in own:
            own["style"] = _style(own["style"])
    _prune(root)
    root.attrib.clear()
    root.attrib.update({"viewBox": f"0 0 {WIDTH} {HEIGHT}", "role": "img", "aria-label": title})
    return re.sub(r">\s+<", "><", ET.tostring(root, encoding="unicode"))


def _style(style: str) -> str:
    rules = [rule.strip().split(": ", 1) for rule in style.split(";") if rule.strip()]
    rules = [rule for rule in rules if rule[0] != "font-family"]
    return ";".join(f"{key}:{f'var({COLOURS[value]})' if value in COLOURS else value}" for key, value in rules)


def _prune(element: ET.Element) -> None:
    """Take out what shows nothing, and the groups that only hold what is in them."""
    kept: list[ET.Element] = []
    for child in element:
        _prune(child)
        name = child.tag.removeprefix(f"{{{SVG}}}")
        if name in ("metadata", "style", "clipPath") or (name in ("defs", "g") and not len(child)):
            continue
        if name == "path" and child.get("style") == "fill:none":
            continue
        kept += child if name == "g" and not child.attrib else [child]
    element[:] = kept
