"""`peftkit bench report` and `peftkit bench compare`: what a benchmark says, and whether a change made it worse."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from peftkit.bench import report as reports
from peftkit.bench.compare import compare as judge
from peftkit.bench.document import read
from peftkit.cli.output import write_json
from peftkit.writing import replace


def report(
    document: Annotated[Path, typer.Argument(help="What `peftkit bench run --out` wrote.")],
    *,
    html: Annotated[Path | None, typer.Option(help="Write one self-contained page here.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write Markdown here.")] = None,
) -> None:
    """Show a benchmark as tables in the terminal, or write it as a page or as Markdown. Nothing is measured."""
    found = read(document)
    if html is None and markdown is None:
        reports.terminal(found)
    for path, form in ((html, reports.html), (markdown, reports.markdown)):
        if path is not None:
            replace(path, [form(found).encode()])
            typer.echo(f"wrote {path}")


def compare(
    before: Annotated[Path, typer.Argument(help="The document to compare with.")],
    after: Annotated[Path, typer.Argument(help="The document to judge.")],
    *,
    threshold: Annotated[
        float, typer.Option(min=1.0, help="A time is worse if its whole interval, after ÷ before, is above this.")
    ] = 1.10,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Judge a benchmark against an earlier one. Exits with 0 (the same or better), 1 (worse) or 2 (not comparable)."""
    found = judge(read(before), read(after), threshold)
    if as_json:
        findings = [asdict(finding) for finding in found.findings]
        write_json(exit_code=found.exit_code, judged=found.judged, threshold=threshold, findings=findings)
    else:
        typer.echo(str(found))
    if found.exit_code:
        raise typer.Exit(found.exit_code)
