"""`peftkit bench`: measures methods on workloads; and lists workloads, reports and compares what was measured."""

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Self

import torch
import typer
from rich.console import Console
from rich.live import Live
from rich.text import Text

from peftkit import plugins
from peftkit.bench import document as documents
from peftkit.bench.engine import PHASES, Entry, Progress, Settings
from peftkit.bench.engine import run as measure
from peftkit.cli.fields import parse
from peftkit.cli.output import Refusal, others_print_to_stderr, write_json, write_table
from peftkit.cli.reporting import compare, report
from peftkit.errors import FieldError, PeftkitError

bench = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Measure methods on workloads: memory, speed, quality. Each cell runs in a process of its own.",
)


@bench.command()
def run(
    workloads: Annotated[
        list[str] | None,
        typer.Argument(
            help="Installed workloads, or your own: module:function, which returns (model, batches) or "
            "(model, batches, loss). By default every installed one that is not slow.",
            show_default=False,
        ),
    ] = None,
    *,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="A method, with hyperparameters after a colon: lora:rank=16,alpha=32. May be repeated. [all]"
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="The document to write.")] = Path("peftkit-bench.json"),
    resume: Annotated[bool, typer.Option("--resume", help="Take over what --out has that is finished.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what --out has.")] = False,
    only: Annotated[
        list[str] | None, typer.Option(help=f"Only this phase: {', '.join(PHASES)}. May be repeated.")
    ] = None,
    quality: Annotated[
        bool, typer.Option("--quality", help="Train on the task too, where a workload has one.")
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Few samples: to see that all runs, not to compare.")] = False,
    pairs: Annotated[int, typer.Option(help="Samples of each comparison of times.")] = Settings.pairs,
    seconds: Annotated[float, typer.Option(help="How long one comparison of times may take.")] = Settings.seconds,
    seeds: Annotated[str, typer.Option(help="Seeds of the quality runs.")] = "0,1,2",
    device: Annotated[str, typer.Option(help="Where to run: cpu or cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(help="Threads of torch; 0 leaves it to torch.")] = 0,
    timeout: Annotated[float, typer.Option(help="Seconds after which a cell is given up.")] = Settings.timeout,
) -> None:
    """Measure, write the document, and print the table. A cell that fails is a row that says so."""
    phases = tuple(only) if only else (PHASES if quality else PHASES[:2])
    try:
        settings = Settings(
            device=_device(device),
            phases=phases,
            pairs=min(pairs, 3) if quick else pairs,
            seconds=min(seconds, 10.0) if quick else seconds,
            seeds=_seeds(seeds),
            threads=threads,
            timeout=timeout,
        )
    except FieldError as error:
        raise Refusal(str(error)) from error
    entries = [entry_of(text) for text in method] if method else [Entry(method=info.name) for info in plugins.methods()]
    _check(entries)
    names = _workloads(workloads or [])
    earlier = _earlier(out, resume=resume, overwrite=overwrite)
    command = ["peftkit", *sys.argv[1:]]
    with Screen() as screen, others_print_to_stderr():
        try:
            found = measure(entries, names, settings, out=out, command=command, earlier=earlier, tell=screen.tell)
        except KeyboardInterrupt:
            screen.say(f"interrupted; {out} has what was measured, and --resume goes on from there")
            raise typer.Exit(130) from None
    report(out)
    typer.echo(f"\nwrote {out}; `peftkit bench report {out} --html FILE` makes a page of it")
    if not any(cell["status"] == "ok" for cell in found["cells"]):
        raise typer.Exit(1)


@bench.command("list")
def list_workloads(*, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List every installed workload. Imports each one's plugin; builds and downloads nothing."""
    rows = [_described(info) for info in plugins.workloads()]
    if as_json:
        write_json(workloads=rows)
        return
    headers = ["workload", "package", "version", "unit", "task", "slow", "summary"]
    cells = [
        [row["name"], row["package"], row["version"], row["unit"] or "", row["metric"] or "",
         "slow" if row["slow"] else "", row["error"] or row["summary"] or ""]
        for row in rows
    ]  # fmt: skip
    write_table(headers, cells, fold=["summary"])


for command in (report, compare):
    bench.command()(command)


def entry_of(text: str) -> Entry:
    """A method with its hyperparameters, as the command line has them.

    >>> entry_of("lora:rank=16,init=pissa").label
    'lora rank=16 init=pissa'
    """
    name, _, fields = text.partition(":")
    settings = re.split(r",(?=\w+=)", fields) if fields else []
    try:
        return Entry(method=name, fields=tuple(parse(settings).items()))
    except Refusal as error:
        raise Refusal(f"--method takes a name, or name:field=value,field=value; got {text!r}") from error


class Screen:
    """Tells on stderr how far the run is: a line a cell, and below them, in a terminal, what runs now."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False, markup=False, emoji=False)
        self.live = Live(console=self.console, refresh_per_second=4, transient=True)

    def __enter__(self) -> Self:
        """Begin."""
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End; the lines stay."""
        self.live.stop()

    def tell(self, progress: Progress) -> None:
        """Show what runs, or what a finished cell has come to."""
        if progress.cell is None:
            place = f"{progress.done + 1} of {progress.total}" if progress.label else "preparing"
            self.live.update(Text(f"{progress.workload} × {progress.label or '…'} ({place}{_left(progress)})"))
            if not (self.console.is_terminal or progress.label):
                self.say(f"{progress.workload}: preparing")
            return
        cell = progress.cell
        why = f": {cell['error']['message'].splitlines()[0]}" if cell["error"] else ""
        again = " (taken over)" if progress.reused else ""
        left = "" if self.console.is_terminal else _left(progress)
        place = f"[{progress.done}/{progress.total}] {progress.workload} × {progress.label}"
        self.say(f"{place}: {cell['status']}{again}{left}{why}")

    def say(self, text: str) -> None:
        """A line that stays."""
        self.console.print(Text(text), soft_wrap=True)


def _left(progress: Progress) -> str:
    if progress.seconds_left is None or progress.done == progress.total:
        return ""
    minutes, seconds = divmod(round(progress.seconds_left), 60)
    return f", about {minutes} min {seconds:02d} s left" if minutes else f", about {seconds} s left"


def _check(entries: Sequence[Entry]) -> None:
    """Refuse an unknown method, and one that is asked for twice, before anything runs."""
    installed = {info.name for info in plugins.methods()}
    for entry in entries:
        if entry.method not in installed:
            with others_print_to_stderr():
                plugins.method(entry.method)  # raises, and says what is meant or what to install
    labels = [entry.label for entry in entries]
    for label in labels:
        if labels.count(label) > 1:
            raise Refusal(f"--method gives {label!r} twice; leave one of them out")


def _workloads(asked: Sequence[str]) -> list[str]:
    """The names asked for, or by default all that are not slow; unknown ones are refused."""
    if not asked:
        rows = [_described(info) for info in plugins.workloads()]
        return [row["name"] for row in rows if not row["slow"]]
    installed = {info.name for info in plugins.workloads()}
    for name in asked:
        if ":" not in name and name not in installed:
            plugins.workload(name)  # raises, and says what is meant
        if asked.count(name) > 1:
            raise Refusal(f"workload {name!r} is given twice; leave one of them out")
    return list(asked)


def _described(info: plugins.WorkloadInfo) -> dict[str, Any]:
    """One row of `bench list`; a workload that cannot be loaded has its error, and rows of a run that say why."""
    row: dict[str, Any] = {**asdict(info), "unit": None, "metric": None, "slow": False, "summary": None, "error": ""}
    try:
        with others_print_to_stderr():
            workload = plugins.workload(info.name)
    except PeftkitError as error:
        return {**row, "error": str(error)}
    metric = workload.metric.name if workload.metric else None
    return {**row, "unit": workload.unit, "metric": metric, "slow": workload.slow, "summary": workload.summary}


def _device(name: str) -> str:
    if name not in ("cpu", "cuda"):
        raise Refusal(f"--device is cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise Refusal("--device cuda: torch sees no CUDA device here")
    return name


def _seeds(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(each) for each in text.split(","))
    except ValueError as error:
        raise Refusal(f"--seeds takes whole numbers with commas between them, such as 0,1,2; got {text!r}") from error


def _earlier(out: Path, *, resume: bool, overwrite: bool) -> Mapping[str, Any] | None:
    """The document to go on from; an existing one is never replaced without being asked for."""
    if not out.exists():
        return None
    if overwrite:
        return None
    if not resume:
        raise Refusal(f"{out} exists; --resume goes on with it, --overwrite replaces it")
    return documents.read(out)
