"""What the commands print: tables for people, one versioned JSON object for programs, an error in one line.

Whatever is printed to stdout is the command's own answer. What a plugin or a model's code prints on the way goes to
stderr, so that `--json` can be piped.
"""

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import typer
from rich import box
from rich.console import Console
from rich.table import Table

JSON_VERSION = 1
"""Of the objects that `--json` prints: keys are only added while it stays the same."""


class Refusal(Exception):  # noqa: N818 - not a fault of the program: the command line says no
    """A command cannot do what its arguments say; the text says why, and what would be right."""


def write_json(**content: Any) -> None:
    """One JSON object, with its version first."""
    typer.echo(json.dumps({"version": JSON_VERSION, **content}, indent=2, ensure_ascii=False))


def write_table(
    headers: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = (), fold: Sequence[str] = ()
) -> None:
    """A table; the columns whose headers are in `right` align right.

    In a terminal too narrow for it, the columns in `fold` take several lines. In a pipe or a file each row is one line
    and nothing is cut off.
    """
    console = Console(highlight=False, markup=False, emoji=False)  # a cell may hold [brackets], which are no markup
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), header_style="bold", pad_edge=False)
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, emoji=False, width=10_000, no_color=True)
        table.box, table.padding = None, (0, 2, 0, 0)
    for header in headers:
        justify: Literal["left", "right"] = "right" if header in right else "left"
        table.add_column(header, justify=justify, overflow="fold", no_wrap=header not in fold)
    for row in rows:
        table.add_row(*row)
    with console.capture() as printed:
        console.print(table)
    typer.echo("\n".join(line.rstrip() for line in printed.get().splitlines()).strip("\n"))


@contextlib.contextmanager
def others_print_to_stderr() -> Iterator[None]:
    """While code runs that is not ours: a plugin's import, a model's factory, the checks of a method."""
    with contextlib.redirect_stdout(sys.stderr):
        yield
