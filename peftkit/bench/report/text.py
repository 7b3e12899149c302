"""A document for a terminal, and as Markdown."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from peftkit.bench.document import Document, needed, one_line
from peftkit.bench.report import words
from peftkit.bench.report.columns import NOTHING, Column
from peftkit.bench.report.view import Row, Sheet, sheets

if TYPE_CHECKING:
    from rich.console import Console

SHOWN = ("quality", "parameters", "memory", "step", "inference", "file")
"""Columns in a terminal, where there is little room; the Markdown has all of them."""


def terminal(document: Document, console: "Console | None" = None) -> None:
    """Print a table and a few sentences for each workload. In a pipe each row is one line and nothing is cut off."""
    if console is None:
        console = needed("rich.console").Console(highlight=False, markup=False, emoji=False)
        if not console.is_terminal:
            console.width = 10_000
    for sheet in sheets(document):
        console.print(sheet.workload["name"], style="bold", end="")
        console.print(f"  {one_line(sheet.workload['summary'])}")
        shown = [column for column in sheet.columns if column.key in SHOWN]
        _print_table(console, sheet, shown)
        for heading, sentence in words.sentences(sheet):
            console.print(f"{heading}: ", style="bold", end="")
            console.print(sentence)
        for row in sheet.failed:
            console.print(f"{row.label}: {row.fault}", style="red")
        console.print()
    console.print("“2=” is a shared place: the data cannot tell these methods apart. (…) is a 95 % interval.")


def _print_table(console: "Console", sheet: Sheet, shown: list[Column]) -> None:
    """In a terminal intervals have lines of their own, so that the table is narrow."""
    table = needed("rich.table").Table(box=needed("rich.box").SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False)
    between = "\n"
    if not console.is_terminal:
        table.box, between = None, " "
    table.add_column("method", no_wrap=True, overflow="fold")
    for column in shown:
        table.add_column(column.title + (f",{between}{column.unit}" if column.unit else ""), justify="right")
    for row in sheet.rows:
        cells = [_cell(sheet, row, column, between) for column in shown]
        table.add_row(row.label, *(cells if row.values else [row.cell["status"], *cells[1:]]))
    console.print(table)


def _cell(sheet: Sheet, row: Row, column: Column, between: str = " ") -> str:
    """The figure with its interval and its place: `93.4 (92.6 to 94.1), 2=`."""
    value = row.values.get(column.key)
    if value is None:
        return NOTHING
    place = sheet.place(column.key, row.label) if value.interval else ""
    interval = f"({value.interval})" + (f", {place}" if place else "") if value.interval else ""
    if between == "\n":
        interval = interval.replace(" ", "\N{NO-BREAK SPACE}")
    return f"{value.text}{between}{interval}".strip()


def markdown(document: Document) -> str:
    """The whole report but the pictures, as GitHub's Markdown; names are escaped."""
    return "\n".join(_lines(document)) + "\n"


def _lines(document: Document) -> Iterator[str]:
    yield "# Fine-tuning methods, measured"
    for sheet in sheets(document):
        yield from ("", f"## {escaped(sheet.workload['name'])}", "", escaped(sheet.workload["summary"]), "")
        for heading, sentence in words.sentences(sheet):
            yield f"* **{heading}.** {escaped(sentence)}"
        for main in (True, False):
            columns = [column for column in sheet.columns if column.main is main]
            if columns or main:
                yield ""
                yield from _rows(sheet, columns)
        if sheet.failed:
            yield ""
            yield from (f"* {escaped(row.label)}: {escaped(row.fault)}" for row in sheet.failed)
    yield from ("", "## How it was measured", "")
    yield from (f"* {sentence}" for sentence in words.MEASURED)
    yield from ("", "| | |", "|---|---|")
    yield from (_row(heading, escaped(text)) for heading, text in words.facts(document))


def _rows(sheet: Sheet, columns: list[Column]) -> Iterator[str]:
    titles = (f"{column.title}{f', {column.unit}' if column.unit else ''}" for column in columns)
    yield _row("method", *map(escaped, titles))
    yield "|---|" + "---:|" * len(columns)
    for row in sheet.rows:
        state = f" ({row.cell['status']})" if row.fault else ""
        yield _row(f"{escaped(row.label)}{state}", *(escaped(_cell(sheet, row, column)) for column in columns))


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def escaped(text: str) -> str:
    r"""Text that Markdown shows as it is, on one line.

    >>> print(escaped("a|b <i> _c_"))
    a\|b &lt;i&gt; \_c\_
    """
    text = one_line(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    for sign in "\\`*_[]|#":
        text = text.replace(sign, f"\\{sign}")
    return text
