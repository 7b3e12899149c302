"""`peftkit convert`: an adapter from one format to another, without the weights of the model that it is for."""

from pathlib import Path
from typing import Annotated

import typer
from torch import nn
from torch.nn.modules.conv import _ConvNd

from peftkit.cli.models import FORMS, model_named
from peftkit.cli.output import Refusal, others_print_to_stderr, write_json
from peftkit.errors import FileError
from peftkit.files import FORMATS, format_of, load, save
from peftkit.formats import interchange
from peftkit.formats.skeleton import Unknown, add_namesakes, forget, hollow, layers_of, skeleton_of
from peftkit.installed import installed

_TIES_MATTER = ("loralib", "mlx")
"""Formats in which the adapter of an embedding would act on a head that is one weight with it."""


def convert(
    source: Annotated[Path, typer.Argument(metavar="IN", help="A file or folder, in any format that is read.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="What to write. An older one is replaced.")],
    *,
    form: Annotated[str, typer.Option("--format", help=f"One of {', '.join(FORMATS)}.")] = "peftkit",
    model: Annotated[str | None, typer.Option(help=f"The model that it is for, if it is asked for: {FORMS}.")] = None,
    part: Annotated[str | None, typer.Option(help="What names in OUT begin with: lora_unet, unet.")] = None,
    from_part: Annotated[str | None, typer.Option(help="Which part of IN to take, where it holds several.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Of a file of loralib's: the scale is alpha / rank.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Write an adapter in another format. What that format cannot hold is an error, and nothing is written."""
    if form not in FORMATS:
        raise Refusal(f"--format is one of {', '.join(FORMATS)}; got {form!r}")
    was = format_of(source)
    with others_print_to_stderr():
        built = _skeleton(source, was, form, from_part) if model is None else hollow(model_named(model))
        load(built, source, check_base=False, part=from_part, alpha=alpha)
        forget(built)
        name = next(iter(installed(built).adapters))
        note = ""
        if form in interchange.FORMATS:
            note = interchange.write(built, name, target, form, part=part)
        else:
            save(built, target, format=form, part=part)
    sites = len(installed(built).sites(name))
    if as_json:
        write_json(source=str(source), source_format=was, target=str(target), format=form, sites=sites, note=note)
    else:
        typer.echo(f"wrote {target}: {sites} layers, from {was} to {form}" + (f"\n{note}" if note else ""))


def _skeleton(source: Path, was: str, form: str, part: str | None) -> nn.Module:
    """A model of the file's own layers; `Refusal` where these cannot be told well enough for the target."""
    if form == "gguf":
        raise Refusal(f"{interchange.needs_model(form)}; say for which model it is: --model")
    try:
        built = skeleton_of(source, was, part)
    except FileError as error:
        raise Refusal(f"{error}: --model") from error
    doubtful = []
    if form != was:
        doubtful += [("more than its shape is not", each) for each in layers_of(built, Unknown)]
    if form != was and "peftkit" in (form, was):
        doubtful += [("a convolution's groups and dilation are not", each) for each in layers_of(built, _ConvNd)]
    if form in _TIES_MATTER:
        doubtful += [("whether it is one with the head is not", each) for each in layers_of(built, nn.Embedding)]
    if doubtful:
        why, where = doubtful[0]
        raise Refusal(f"{where or 'the model'}: {why} in the file; say for which model it is: --model")
    add_namesakes(built)
    return built
