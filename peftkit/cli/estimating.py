"""`peftkit estimate`: the memory of a training step, the largest batch that fits, and which methods fit."""

import inspect
from collections.abc import Sequence
from typing import Annotated, Any

import torch
import typer
from torch import nn

from peftkit.cli import models
from peftkit.cli.fields import make_method
from peftkit.cli.output import Refusal, others_print_to_stderr, write_json
from peftkit.errors import PeftkitError
from peftkit.estimating import Step, nbytes_of
from peftkit.fitting import largest, scaled, which_fit

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def estimate(
    model: Annotated[str, typer.Argument(help=f"{models.FORMS}. A callable may also give a pair of model and inputs.")],
    *,
    method: Annotated[str, typer.Option(help="Name of an installed method.")] = "lora",
    targets: Annotated[list[str] | None, typer.Option(help="What to adapt: a glob or @role. May be repeated.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="What to leave out. May be repeated.")] = None,
    fields: Annotated[list[str] | None, typer.Option("--set", help="A hyperparameter: field=value.")] = None,
    rank: Annotated[int | None, typer.Option(help="Short for --set rank=….")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Samples.")] = 1,
    sequence: Annotated[int | None, typer.Option(min=1, help="Tokens a sample, for a model of tokens. [512]")] = None,
    optimizer: Annotated[str, typer.Option(help="adamw, adam, sgd, sgd-momentum.")] = "adamw",
    dtype: Annotated[str | None, typer.Option(help=f"Of the model: {', '.join(DTYPES)}.")] = None,
    autocast: Annotated[str | None, typer.Option(help="Run under autocast with this dtype.")] = None,
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Gradient checkpointing.")] = False,
    attention: Annotated[str, typer.Option(help="auto, flash, efficient, math.")] = "auto",
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    budget: Annotated[str, typer.Option(help="For --fit and --methods: 24GB, 16GiB.")] = "24GB",
    fit: Annotated[str | None, typer.Option(help="Look for the largest that fits: batch or sequence.")] = None,
    methods: Annotated[str | None, typer.Option(help="Which of these fit: all, or names with commas.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Estimate the memory of a training step. The model is not loaded, and runs on shapes alone."""
    settings = [*(fields or []), *([] if rank is None else [f"rank={rank}"])]
    _check(settings, fit, methods)
    nbytes_of(budget)
    built, inputs = _model_and_inputs(model, batch, sequence)
    arguments: dict[str, Any] = {
        "targets": targets, "exclude": exclude, "optimizer": optimizer, "dtype": _dtype("--dtype", dtype),
        "checkpointing": checkpointing, "attention": attention, "autocast": _dtype("--autocast", autocast),
        "device": device,
    }  # fmt: skip
    with others_print_to_stderr():
        found: Any
        if methods is not None:
            chosen = None if methods == "all" else methods.split(",")
            found = which_fit(built, chosen, inputs, budget=budget, **arguments)
        elif fit is not None:
            found = largest(built, make_method(method, settings), inputs, budget, fit, **arguments)
        else:
            found = Step(built, make_method(method, settings), **arguments).estimate(inputs)
        text = str(found)
    if as_json:
        write_json(**found.to_json())
    else:
        typer.echo(text)


def _check(settings: Sequence[str], fit: str | None, methods: str | None) -> None:
    if fit is not None and methods is not None:
        raise Refusal("--fit is for one method and --methods for one batch; give one of them")
    if methods is not None and settings:
        raise Refusal("--methods takes each method with its default hyperparameters; leave out --set and --rank")
    if fit not in (None, "batch", "sequence"):
        raise Refusal(f"--fit takes batch or sequence; got {fit!r}")


def _dtype(option: str, name: str | None) -> torch.dtype | None:
    if name is None:
        return None
    if name not in DTYPES:
        raise Refusal(f"{option} takes {', '.join(DTYPES)}; got {name!r}")
    return DTYPES[name]


def _model_and_inputs(text: str, batch: int, sequence: int | None) -> tuple[nn.Module, Any]:
    source, colon, rest = text.partition(":")
    if colon and rest and source not in ("", "hf"):
        with others_print_to_stderr():
            found = models._from_code(source, rest)
        if isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], nn.Module):
            inputs = scaled(found[1], "batch", batch)
            return found[0], inputs if sequence is None else scaled(inputs, "sequence", sequence)
        if not isinstance(found, nn.Module):
            raise Refusal(f"{text} gives a {type(found).__name__}, and neither an nn.Module nor a pair (model, inputs)")
        model = found
    else:
        model = models.model_named(text)
    with others_print_to_stderr():
        return model, inputs_of(model, batch, sequence or 512)


def inputs_of(model: nn.Module, batch: int, sequence: int) -> Any:
    """Inputs for a model of transformers, by its configuration: tokens or images, and labels if it takes any."""
    config: Any = getattr(model, "config", None)
    parameters = inspect.signature(model.forward).parameters
    if "input_ids" in parameters and isinstance(getattr(config, "vocab_size", None), int):
        inputs, labels = {"input_ids": ((batch, sequence), torch.long)}, [(batch, sequence), (batch,)]
        small = {"input_ids": ((1, 2), torch.long)}
    elif "pixel_values" in parameters and getattr(config, "image_size", None):
        sides = config.image_size
        image = (getattr(config, "num_channels", 3), *(sides if isinstance(sides, (list, tuple)) else (sides, sides)))
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        inputs, labels = {"pixel_values": ((batch, *image), dtype)}, [(batch,)]
        small = {"pixel_values": ((1, *image), dtype)}
    else:
        raise Refusal(
            "what this model takes is not known; let MODEL be module:callable, which gives a pair of the model and its "
            "inputs, in which a pair of a shape and a dtype stands for a tensor"
        )
    if "labels" in parameters:
        step = Step(model, None)
        for shape in labels:  # one label a token or one a sample: the model says which by running
            try:
                step.estimate(small | {"labels": ((1, *[2] * (len(shape) - 1)), torch.long)})
            except (PeftkitError, RuntimeError, ValueError, IndexError):
                continue
            return inputs | {"labels": (shape, torch.long)}
    return inputs
