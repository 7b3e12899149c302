"""The command `peftkit`. This file alone must work where its two packages, typer and rich, are not installed."""

import io
import sys


def main() -> int:
    """Run the command line; returns the exit code where typer has not exited with its own."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that has no "×" gets "?" and not an exception
    try:
        from peftkit.cli.app import app
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] not in ("typer", "rich", "click"):
            raise
        sys.stderr.write("the command line needs two more packages: pip install 'peftkit[cli]'\n")
        return 1
    app(prog_name="peftkit")
    return 0
