"""The commands, put together; and what all of them have in common: `--version`, and how errors are shown."""

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from peftkit import __version__
from peftkit.cli.benching import bench
from peftkit.cli.checking import check
from peftkit.cli.converting import convert
from peftkit.cli.estimating import estimate
from peftkit.cli.inspecting import inspect
from peftkit.cli.listing import methods, plugins
from peftkit.cli.new import new
from peftkit.cli.output import Refusal
from peftkit.cli.planning import plan
from peftkit.errors import PeftkitError


class Commands(TyperGroup):
    """Shows an error that is meant for the reader as its message alone, and exits with 2."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was asked for."""
        try:
            return super().invoke(ctx)
        except (PeftkitError, Refusal) as error:
            if ctx.params["traceback"]:
                raise
            typer.echo(f"Error: {error}", err=True)
            raise typer.Exit(2) from error


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # help and errors as plain text: the same in a terminal, a pipe and a log
)


def _version(asked: bool) -> None:  # noqa: FBT001 - typer calls it so
    if asked:
        typer.echo(f"peftkit {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error was raised.")] = False,
) -> None:
    """Parameter-efficient fine-tuning, with methods as plugins."""


for command in (methods, plugins, plan, estimate, inspect, convert, check, new):
    app.command()(command)
app.add_typer(bench, name="bench")
