"""What the files of other LoRA libraries have in common: low-rank products, each of them for one layer.

A format turns its names and shapes into `Product`s, and back; here these are taken from a model, and given to one. What
is no sum of low-rank products has no place in such a file, and is an error that names it.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from peftkit import plugins
from peftkit.adapter import LowRank, Site
from peftkit.composition import base_class, raw_parameter
from peftkit.errors import BaseMismatchError, FileError, FormatError, UnsupportedLayerError, did_you_mean
from peftkit.formats.declared import find, maker
from peftkit.formats.folders import refuse_unusable
from peftkit.installed import Placement, inner, installed
from peftkit.method import Method
from peftkit.resolve import modules_of, site_of
from peftkit.restoring import Place
from peftkit.running import adds_low_rank

PLAIN = {"peft_type": "LORA"}
"""How HF PEFT's folders call the method that is such a product and nothing more: by it the method is found here."""
_UP, _DOWN = "lora_B.weight", "lora_A.weight"


class Product(NamedTuple):
    """What the weight of one layer gains: `alpha / rank * up @ down`."""

    path: str
    """The layer's path; before it is looked up in a model, as the format has it."""
    up: Tensor
    """`[out, rank]`."""
    down: Tensor
    """`[rank, in]`; of a convolution, `in` is its input channels × kernel."""
    alpha: float
    kernel: tuple[int, ...] | None = None
    """Of a convolution."""
    one_hot: bool = False
    """Whether the layer is an embedding: out is its dimension, in is its rows."""

    @property
    def rank(self) -> int:
        """Of the product as it is written: its own may be less."""
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """What the product is multiplied by."""
        return self.alpha / self.rank


class Format(NamedTuple):
    """What must be known of a format to say what it cannot hold."""

    label: str
    """For messages: `"kohya's files"`."""
    kinds: Collection[str]
    """The layer kinds that it knows, by their class names."""


# ------------------------------------------------------------------------------------------- out of a model


def of_model(model: nn.Module, name: str, form: Format) -> list[Product]:
    """The products of an adapter. Raises `FileError` for whatever it has besides, and for layers that do not fit."""
    placements = installed(model).placements(name)
    modules = modules_of(inner(model))
    holders = Counter(id(p) for module in modules.values() for p in module._parameters.values() if p is not None)
    found = [_product(placement, form, holders) for placement in placements]
    refuse_unusable(
        f"adapter {name!r}",
        {f"{p.path}.{side}": t for p in found for side, t in (("up", p.up), ("down", p.down))},
        FileError,
    )
    return found


def _product(placement: Placement, form: Format, holders: Mapping[int, int]) -> Product:
    adapter = placement.adapter
    if not isinstance(adapter, LowRank) or not adds_low_rank(adapter):
        raise FileError(
            f"{form.label} hold low-rank products, and {placement.method} at {placement.name} is more than that, or "
            "another thing; save it with format='peftkit'"
        )
    site = site_of(placement.path, placement.layer, placement.weight)
    reason = _misfit(site, form)
    if reason is None and holders[id(raw_parameter(placement.layer, placement.weight))] > 1:
        reason = (
            f"it is one weight with that of another layer, and readers of {form.label} would change both or neither"
        )
    if reason:
        raise FileError(f"{site.name}: {reason}")
    up, down, scale = factors_of(adapter)
    if scale == 0:  # some formats take an alpha of 0 for none given
        up, scale = up * 0, 1.0
    up, down = up.cpu(), down.cpu()
    return Product(site.path, up, down, _alpha(scale, down.shape[0]), _kernel(site), site.one_hot)


def factors_of(adapter: LowRank) -> tuple[Tensor, Tensor, float]:
    """Its `up`, `down` and scale, with the start in them: as it is subtracted, its product is one more."""
    up, down, scale = adapter.factors()
    start = adapter.start()
    if start is not None:
        up, down = torch.cat([up, -start[0]], -1), torch.cat([down, start[1]], -2)
    return up.detach(), down.detach(), scale


def _alpha(scale: float, rank: int) -> float:
    """The alpha that gives this scale: the round one, where the scale came from it."""
    alpha = scale * rank
    rounded = float(f"{alpha:.12g}")
    return rounded if rounded / rank == scale else alpha


def _kernel(site: Site) -> tuple[int, ...] | None:
    return tuple(site.layer.kernel_size) if isinstance(site.layer, _ConvNd) else None


def _misfit(site: Site, form: Format) -> str | None:
    """Why the format cannot have this site; None where it can."""
    kind, layer = getattr(site.kind, "label", ""), site.layer
    if kind not in form.kinds:
        return f"{form.label} have adapters of {', '.join(sorted(form.kinds))}, and this is of {kind}"
    if isinstance(layer, NonDynamicallyQuantizableLinear):
        return (
            f"torch's attention reads this weight and never calls the layer, so an adapter of {form.label} never runs"
        )
    if isinstance(layer, _ConvNd) and (
        layer.groups != 1 or set(layer.dilation) != {1} or layer.padding_mode != "zeros"
    ):
        return f"readers of {form.label} run a convolution of their own, without groups, dilation and padding modes"
    return None


# ------------------------------------------------------------------------------------------ into a model


def into_model(
    model: nn.Module, path: Path, products: Sequence[Product], form: Format, own: Mapping[str, type[Method]]
) -> tuple[list[Place], dict[str, Tensor]]:
    """Where the products go in this model, and their tensors by our names: `<layer>.<weight>.<parameter>`.

    Raises `BaseMismatchError` where the model is another than they were made for, `FormatError` for values that cannot
    be. Changes nothing.
    """
    if not products:
        raise FormatError(f"{path} holds no adapter")
    method = find(PLAIN, own)
    ours = {theirs: name for name, theirs in method.hf.tensors.items()}  # type: ignore[union-attr]
    modules = modules_of(inner(model))
    order = {each: i for i, each in enumerate(modules)}
    placed: list[tuple[int, Place]] = []
    tensors: dict[str, Tensor] = {}
    for product in products:
        site = _site(modules, path, product, form)
        fields = {**PLAIN, "r": product.rank, "lora_alpha": product.alpha}
        placed.append((order[site.path], Place(site, maker(method, fields)(""), in_place=False)))
        for side, tensor in ((_UP, product.up), (_DOWN, product.down)):
            wide = tensor.to(torch.promote_types(tensor.dtype, site.dtype))  # never to fewer digits
            tensors[f"{site.name}.{ours[side]}"] = wide.contiguous()
    return [place for _, place in sorted(placed, key=lambda each: each[0])], tensors


def _site(modules: Mapping[str, nn.Module], path: Path, product: Product, form: Format) -> Site:
    layer = modules.get(product.path)
    if layer is None:
        raise BaseMismatchError(
            f"this model has no layer {product.path!r}, which {path} adapts{did_you_mean(product.path, modules)}"
        )
    found = plugins.kind_of(base_class(layer))
    weights = list(found[0].weights(layer)) if found else []
    what = f"{product.path or 'the model'}, a {base_class(layer).__name__},"
    if len(weights) != 1:
        raise BaseMismatchError(f"{path} adapts {what} which has not one weight")
    try:
        site = site_of(product.path, layer, weights[0])
    except UnsupportedLayerError as error:
        raise BaseMismatchError(f"{path} adapts {what} which cannot be adapted here: {error}") from error
    reason = _misfit(site, form)
    if reason:
        raise BaseMismatchError(f"{path} adapts {site.name}: {reason}")
    _check_shapes(path, product, site)
    return site


def _check_shapes(path: Path, product: Product, site: Site) -> None:
    up, down = tuple(product.up.shape), tuple(product.down.shape)
    kernel = _kernel(site)
    flat = kernel is None and set(product.kernel or ()) == {
        1
    }  # a linear layer that is written as a convolution of 1 × 1
    same = flat or product.kernel in (None, kernel)
    if (*up[:-1], *down[1:]) != site.shape or up[-1] != down[0] or not same:
        kernels = "" if same else f", kernels {product.kernel} and {kernel}"
        raise BaseMismatchError(
            f"{path} was made for another base: its factors for {site.name} are {list(up)} and {list(down)}, and the "
            f"weight's matrix here is {list(site.shape)}{kernels}"
        )


# ------------------------------------------------------------------------------------ what formats share


def paired(path: Path, factors: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Refuse a file in which a layer has one factor and not the other, or one that is no float of two dimensions."""
    for layer, sides in factors.items():
        for side in ("up", "down"):
            if side not in sides:
                raise FormatError(f"{path} lacks one of two factors for {layer!r}: its {side} projection")
            tensor = sides[side]
            if tensor.dim() < 2 or not tensor.is_floating_point():
                raise FormatError(
                    f"{path}: a factor for {layer!r} is {tensor.dtype} {list(tensor.shape)}, where floats of two or "
                    "more dimensions are due"
                )


def number(path: Path, key: str, tensor: Tensor) -> float:
    """The one value of a tensor such as `alpha`."""
    if tensor.numel() != 1:
        raise FormatError(f"{path}: {key} is {list(tensor.shape)}, where one number is due")
    return float(tensor.double().item())


def one_rank(products: Sequence[Product]) -> list[Product]:
    """The same updates with one rank: factors are filled up with zeros, and alphas keep each scale."""
    rank = max(product.rank for product in products)
    return [_filled(product, rank - product.rank) for product in products]


def _filled(product: Product, more: int) -> Product:
    if not more:
        return product
    up = torch.cat([product.up, product.up.new_zeros(product.up.shape[0], more)], 1)
    down = torch.cat([product.down, product.down.new_zeros(more, product.down.shape[1])], 0)
    return product._replace(up=up, down=down, alpha=_alpha(product.scale, product.rank + more))


def one_alpha(products: Sequence[Product], alpha: float | None = None) -> tuple[float, list[Product]]:
    """The same updates with one alpha, by default the most frequent; what differs is put into `up`."""
    if alpha is None:
        alpha = Counter(product.alpha for product in products).most_common(1)[0][0]
    return alpha, [
        product if product.alpha == alpha else product._replace(up=product.up * (product.alpha / alpha), alpha=alpha)
        for product in products
    ]


def plain(products: Sequence[Product]) -> list[Product]:
    """The same updates with a scale of 1: it is put into `up`."""
    return [
        product if product.scale == 1 else product._replace(up=product.up * product.scale, alpha=float(product.rank))
        for product in products
    ]


def text_of(value: Any) -> str:
    """A number as short text, whole where it is whole."""
    return f"{value:g}" if float(f"{value:g}") == value else repr(float(value))


def refuse_part(part: str | None) -> None:
    """For formats whose names are those of one model, with nothing before them."""
    if part is not None:
        raise FileError(f"part= is for files whose names begin with it, and here they are the model's own: {part!r}")


def refuse_alpha(alpha: float | None) -> None:
    """For formats that have their scale in them."""
    if alpha is not None:
        raise FileError(f"alpha= is for files that do not say their scale, and these do; got alpha={alpha:g}")
