"""`peftkit methods` and `peftkit plugins`: what is installed. The second imports nothing, so nothing can break it."""

from dataclasses import asdict
from typing import Annotated

import typer

from peftkit import plugins as registry
from peftkit.cli.output import write_json, write_table
from peftkit.cli.traits import SIZE, Traits, traits

FAULTS = ("broken", "incompatible", "ambiguous")
"""States of a plugin that `--strict` does not let pass."""


def methods(*, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List every installed method with what it can do. Imports each one's plugin."""
    found = [traits(info) for info in registry.methods()]
    if as_json:
        write_json(methods=[row.as_json() for row in found])
        return
    headers = ["method", "package", "version", "trainable", "form", "properties", "HF PEFT", "not on"]
    write_table(headers, [_cells(row) for row in found], right=["trainable"], fold=["properties", "not on"])
    typer.echo(f"\ntrainable: share of a Linear layer of {SIZE}×{SIZE}, with the default hyperparameters")


def _cells(row: Traits) -> list[str]:
    cells = [row.name, row.package, row.version]
    if row.error:
        return [*cells, "", "error", row.error, "", ""]
    share = "" if row.trainable_share is None else f"{row.trainable_share:.2%}"
    properties = {
        "merges": row.merges,
        "not the identity at the start": row.identity is False,
        "vectors": row.vectors,
        "vectors only": row.vectors and not row.matrices,
        f"scope: {row.scope}": row.scope != "weights",
        "shared state": row.shared_state,
        "step hook": row.step_hook,
        "data": row.data,
        "optimizer groups": row.optimizer_groups,
    }
    if properties["vectors only"]:
        del properties["vectors"]
    words = ", ".join(word for word, holds in properties.items() if holds)
    return [*cells, share, row.form or "", words, row.hf or "", ", ".join(row.declines)]


def plugins(
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    strict: Annotated[bool, typer.Option(help=f"Exit with 1 if one is {', '.join(FAULTS)}.")] = False,
) -> None:
    """List every plugin's entry point with its state. Imports none of them."""
    found = registry.plugins()
    if as_json:
        write_json(plugins=[asdict(each) for each in found])
    elif not found:
        typer.echo("no plugin is installed; `peftkit methods` lists what is built in")
    else:
        headers = ["group", "name", "package", "version", "target", "state", "detail"]
        rows = [[p.group, p.name, p.package, p.version, p.target, p.state, p.detail] for p in found]
        write_table(headers, rows, fold=["name", "target", "detail"])
    if strict and any(each.state in FAULTS for each in found):
        raise typer.Exit(1)
