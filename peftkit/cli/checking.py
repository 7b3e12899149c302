"""`peftkit check`: runs the conformance kit on an installed method."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import torch
import typer

from peftkit.cli.fields import make_method
from peftkit.cli.output import Refusal, others_print_to_stderr, write_json, write_table

if TYPE_CHECKING:
    from peftkit.testing import Result

STATUSES = ("passed", "failed", "skipped", "expected failure", "unexpected pass")
FAULTS = ("failed", "unexpected pass")


def check(
    method: Annotated[str, typer.Argument(help="Name of an installed method.")],
    *,
    fields: Annotated[list[str] | None, typer.Option("--set", help="A hyperparameter: field=value.")] = None,
    device: Annotated[str, typer.Option(help="Where to run the checks: cpu, cuda.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Hold a method to everything that peftkit promises of methods. Exits with 1 if it breaks a promise."""
    _check_device(device)
    from peftkit.testing import check_method  # here, so that the other commands start without the kit

    made = make_method(method, fields or [])
    with others_print_to_stderr():
        results = check_method(made, device=device)
    statuses = {result.status for result in results}
    passed = "passed" in statuses and not statuses.intersection(FAULTS)  # skipping everything proves nothing
    if as_json:
        write_json(method=made.name, fields=made.fields(), passed=passed, results=[asdict(r) for r in results])
    else:
        _write(str(made), results)
    raise typer.Exit(0 if passed else 1)


def _check_device(device: str) -> None:
    try:
        torch.device(device)
    except RuntimeError as error:
        raise Refusal(f"--device takes the name of a device, such as cpu or cuda:1; got {device!r}") from error


def _write(method: str, results: "Sequence[Result]") -> None:
    """One line a check, then every fault in full, then why checks were skipped."""
    by_check: dict[str, Counter[str]] = {}
    for result in results:
        by_check.setdefault(result.check, Counter())[result.status] += 1
    shown = [status for status in STATUSES if any(counts[status] for counts in by_check.values())]
    rows = [[name, *(str(counts[status] or "") for status in shown)] for name, counts in by_check.items()]
    write_table(["check", *shown], rows, right=shown)
    for result in results:
        if result.status in FAULTS:
            typer.echo(f"\n{result}")
    reasons = Counter(result.detail for result in results if result.status == "skipped")
    for number, (reason, times) in enumerate(reasons.items()):
        typer.echo(f"{'' if number else chr(10)}skipped {times}: {reason}")
    totals = Counter(result.status for result in results)
    typer.echo(f"\n{method}: " + ", ".join(f"{totals[status]} {status}" for status in STATUSES if totals[status]))
