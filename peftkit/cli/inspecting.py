"""`peftkit inspect`: what an adapter file holds, layer by layer, without its model.

Of each low-rank product: its norm (Frobenius), and its effective rank, exp of the entropy of its singular values (Roy
and Vetterli, 2007). Both come from the factors, by matrices of rank × rank; the product itself is never built.
"""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from peftkit.adapter import LowRank
from peftkit.cli.output import others_print_to_stderr, write_json, write_table
from peftkit.errors import FileError, FormatError, PeftkitError
from peftkit.files import format_of, load
from peftkit.finite import find_not_finite
from peftkit.formats import interchange, tensorfiles
from peftkit.formats.folders import CONFIG, WEIGHTS
from peftkit.formats.lowrank import factors_of
from peftkit.formats.skeleton import skeleton_of
from peftkit.installed import Placement, installed
from peftkit.reading import read


@dataclasses.dataclass(frozen=True)
class Row:
    """What one layer's weight gains. None is what cannot be told from the file."""

    path: str
    method: str
    shape: list[int] | None
    """The weight's, as a matrix."""
    rank: int | None
    scale: float | None
    """What the product of the factors is multiplied by."""
    norm: float | None
    effective_rank: float | None
    dead: bool | None
    """Whether the update is zero."""
    not_finite: list[str]
    """The tensors that hold an infinite value or NaN."""


def inspect(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A file or folder, in any format that is read.")],
    *,
    part: Annotated[str | None, typer.Option(help="Which part to show, where a file holds several models'.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Of a file of loralib's: the scale is alpha / rank.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what an adapter file holds: layers, ranks, norms, and what is wrong with it. Needs no model."""
    form = format_of(file)
    with others_print_to_stderr():
        rows, note = _rows(file, form, part, alpha)
    dead = [row.path for row in rows if row.dead]
    broken = [row.path for row in rows if row.not_finite]
    if as_json:
        layers = [dataclasses.asdict(row) for row in rows]
        write_json(file=str(file), format=form, layers=layers, dead=dead, not_finite=broken, note=note)
        return
    headers = ["path", "method", "matrix", "rank", "scale", "norm", "effective rank", ""]
    write_table(headers, [_cells(row) for row in rows], right=headers[3:7], fold=["path"])
    typer.echo(
        f"\n{form}: {len(rows)} weights, {len(dead)} without effect, {len(broken)} with values that are not finite"
    )
    if note:
        typer.echo(note)


def _cells(row: Row) -> list[str]:
    fault = "not finite: " + ", ".join(row.not_finite) if row.not_finite else "no effect" if row.dead else ""
    numbers = [f"{value:.4g}" if value is not None else "" for value in (row.scale, row.norm, row.effective_rank)]
    return [
        row.path, row.method, "×".join(map(str, row.shape or [])), "" if row.rank is None else str(row.rank),
        *numbers, fault,
    ]  # fmt: skip


def _rows(file: Path, form: str, part: str | None, alpha: float | None) -> tuple[list[Row], str]:
    """The rows, and why they say less than they could."""
    if form in interchange.FORMATS:
        return list(_of_products(file, form, part, alpha)), ""
    try:
        built = skeleton_of(file, form)
        load(built, file, check_base=False, check_finite=False)
    except PeftkitError as error:
        return list(_of_tensors(file, form)), f"shown tensor by tensor: {error}"
    name = next(iter(installed(built).adapters))
    return [_of_placement(placement) for placement in installed(built).placements(name)], ""


def _of_products(file: Path, form: str, part: str | None, alpha: float | None) -> Iterator[Row]:
    unknown = False
    try:
        found = interchange.products(file, form, part=part, alpha=alpha, check_finite=False)
    except FormatError:
        if alpha is not None or form != "loralib":
            raise
        unknown = True  # its alpha is not in the file
        found = interchange.products(file, form, part=part, alpha=1.0, check_finite=False)
    for product in found:
        shape = [product.up.shape[0], product.down.shape[1]]
        scale = None if unknown else product.scale
        if product.up.shape[1] != product.rank and form == "loralib":  # parts with factors of their own, in one matrix
            wrong = _not_finite({"up": product.up, "down": product.down})
            yield Row(product.path, "merged", None, product.up.shape[1], None, None, None, None, wrong)
            continue
        if product.up.shape[1] != product.rank:
            raise FormatError(
                f"{file}: the factors for {product.path!r} do not fit each other: {list(product.up.shape)} and "
                f"{list(product.down.shape)}"
            )
        yield _row(product.path, "low-rank", shape, product.up, product.down, scale, {})


def _of_placement(placement: Placement) -> Row:
    adapter, tensors = placement.adapter, dict(placement.tensors())
    if not isinstance(adapter, LowRank):
        wrong = _not_finite(tensors)
        return Row(placement.name, str(placement.method), None, None, None, None, None, None, wrong)
    up, down, scale = factors_of(adapter)
    shape = [*up.shape[:-1], down.shape[-1]]
    return _row(placement.name, str(placement.method), shape, up, down, scale, tensors)


def _row(
    path: str, method: str, shape: list[int], up: Tensor, down: Tensor, scale: float | None, tensors: dict[str, Tensor]
) -> Row:
    wrong = _not_finite(tensors or {"up": up, "down": down})
    if scale is not None and not math.isfinite(scale):
        scale, wrong = None, [*wrong, "scale"]
    if wrong:
        return Row(path, method, shape, down.shape[-2], scale, None, None, None, wrong)
    values = singular_values(up, down)
    size = None if scale is None else abs(scale) * float(values.norm())
    dead = not bool(values.any()) or scale == 0
    return Row(path, method, shape, down.shape[-2], scale, size, 0.0 if dead else effective_rank(values), dead, [])


def _not_finite(tensors: dict[str, Tensor]) -> list[str]:
    return [name for name, tensor in tensors.items() if find_not_finite({name: tensor})]


def singular_values(up: Tensor, down: Tensor) -> Tensor:
    """Those of `up @ down`, in float64: of the product of the triangles of both factors.

    >>> singular_values(torch.tensor([[3.0], [4.0]]), torch.tensor([[0.0, 2.0, 0.0]]))
    tensor([10.], dtype=torch.float64)
    """
    left = torch.linalg.qr(up.double(), mode="r").R
    right = torch.linalg.qr(down.double().mT, mode="r").R
    values: Tensor = torch.linalg.svdvals(left @ right.mT)
    return values


def effective_rank(values: Tensor) -> float:
    """Exp of the entropy of singular values: n where n of them are equal and the others zero; of a stack, the mean.

    >>> effective_rank(torch.tensor([2.0, 2.0, 0.0]))
    2.0
    """
    shares = values / values.sum(-1, keepdim=True).clamp_min(torch.finfo(values.dtype).tiny)
    return round(float(torch.special.entr(shares).sum(-1).exp().mean()), 6)


def _of_tensors(file: Path, form: str) -> Iterator[Row]:
    """One row a tensor, for what no layers can be made for."""
    if form == "peftkit":
        manifest, tensors = read(file, check_finite=False)
        methods = [method["name"] for method in manifest["methods"]]
        sites = {f"{site['path']}.{site['weight']}".lstrip("."): methods[site["method"]] for site in manifest["sites"]}
    else:
        kind = tensorfiles.read_json(file / CONFIG).get("peft_type", "")
        tensors, sites = tensorfiles.read(file / WEIGHTS, check_finite=False).tensors, {"": str(kind)}
    if not tensors:
        raise FileError(f"{file} holds no tensors")
    for name, tensor in tensors.items():
        method = next((m for site, m in sites.items() if name.startswith(site)), "")
        wrong = _not_finite({name: tensor})
        norm = None if wrong else float(tensor.double().norm())
        yield Row(name, method, list(tensor.shape), None, None, norm, None, None, wrong)
