"""What a report says of a document, before it is a terminal's, a page's or a text's: rows and places."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from peftkit.bench import statistics
from peftkit.bench.document import Document, one_line
from peftkit.bench.report import ties
from peftkit.bench.report.columns import Cell, Column, Value, Workload, columns, part
from peftkit.bench.report.ties import Ranking

RANKED = ("quality", "memory", "step", "parameters")
"""Columns in which methods get a place: the ones between which one chooses."""


class Row(NamedTuple):
    """One method on one workload; its number is the same in tables and plots."""

    number: int
    label: str
    cell: Cell
    values: dict[str, Value]

    @property
    def fault(self) -> str:
        """Why figures are missing, in one line."""
        error = self.cell["error"]
        if not error:
            return ""
        kind = "" if error["message"].startswith(error["type"]) else f"{error['type']}: "
        return one_line(f"{self.cell['status']} ({error['phase']}): {kind}{error['message']}")


@dataclass(frozen=True)
class Sheet:
    """All that is said of one workload."""

    workload: Workload
    columns: list[Column]
    rows: list[Row]
    rankings: dict[str, Ranking]

    @property
    def failed(self) -> list[Row]:
        """The rows that lack figures because something went wrong."""
        return [row for row in self.rows if row.fault]

    def having(self, *keys: str) -> list[Row]:
        """The rows that have all of these figures."""
        return [row for row in self.rows if all(key in row.values for key in keys)]

    def place(self, key: str, label: str) -> str:
        """`2`, or `2=` if it is shared; nothing where nobody is ranked or nobody can be told from another."""
        ranking = self.rankings.get(key)
        if ranking is None or label not in ranking.place or len(set(ranking.place.values())) == 1:
            return ""
        place = ranking.place[label]
        return f"{place}=" if list(ranking.place.values()).count(place) > 1 else f"{place}"


def sheets(document: Document) -> list[Sheet]:
    """One for each workload that has cells, in the document's order."""
    made = []
    for workload in document["workloads"]:
        cells = [cell for cell in document["cells"] if cell["workload"] == workload["name"]]
        if cells:
            made.append(_sheet(workload, cells))
    return made


def _sheet(workload: Workload, cells: list[Cell]) -> Sheet:
    shown = columns(workload, cells)
    rows = [
        Row(number, cell["label"], cell, {c.key: v for c in shown if (v := c.value(cell)) is not None})
        for number, cell in enumerate(cells, 1)
    ]
    return Sheet(workload, shown, rows, dict(_rankings(workload, rows)))


def _rankings(workload: Workload, rows: Sequence[Row]) -> Iterator[tuple[str, Ranking]]:
    for key in RANKED:
        having = {row.label: row for row in rows if key in row.values}
        if not having:
            continue
        if key == "quality":
            if workload["metric"] is None:
                continue
            sign = ties.quality({a: row.cell["quality"]["values"] for a, row in having.items()}, workload["metric"])
        elif key == "step":
            pairs = {a: part(row.cell, "times", "step_pairs") or [] for a, row in having.items()}
            sign = ties.times({a: statistics.pair_ratios(rows) for a, rows in pairs.items()})
        else:
            sign = ties.exact({a: row.values[key].number for a, row in having.items()})
        yield key, ties.rank(list(having), sign)
