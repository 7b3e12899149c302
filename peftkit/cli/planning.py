"""`peftkit plan`: what would be adapted in a model, and how much of it would train, before anything is run."""

from dataclasses import asdict
from typing import Annotated

import typer

from peftkit.cli.fields import make_method
from peftkit.cli.models import FORMS, model_named
from peftkit.cli.output import others_print_to_stderr, write_json
from peftkit.plan import Plan
from peftkit.plan import plan as plan_of


def plan(
    model: Annotated[str, typer.Argument(help=FORMS)],
    *,
    method: Annotated[str, typer.Option(help="Name of an installed method.")] = "lora",
    targets: Annotated[list[str] | None, typer.Option(help="What to adapt: a glob or @role. May be repeated.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="What to leave out. May be repeated.")] = None,
    fields: Annotated[list[str] | None, typer.Option("--set", help="A hyperparameter: field=value.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show which weights a method would adapt in a model. Nothing is trained, written or downloaded."""
    made = make_method(method, fields or [])
    built = model_named(model)
    with others_print_to_stderr():
        planned = plan_of(built, made, targets=targets, exclude=exclude)
        text = str(planned)  # counts the parameters, for which the method's own code runs
    if as_json:
        write_json(**_as_json(planned))
    else:
        typer.echo(text)


def _as_json(planned: Plan) -> dict[str, object]:
    return {
        "trainable": planned.trainable,
        "total": planned.total,
        "rows": [asdict(row) for row in planned.rows],
        "rules": [
            {"selector": str(hit.selector), "method": str(hit.method), "weights": hit.weights} for hit in planned.hits
        ],
    }
