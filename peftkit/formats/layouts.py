"""Turns a tensor of ours into the shape that HF PEFT holds it in, and back, by the words of `HuggingFace.layouts`."""

import math
from collections.abc import Sequence

from torch import Tensor

from peftkit.adapter import Site
from peftkit.method import HuggingFace

STORED = "stored"
_LETTERS = "abcd"  # no word of a layout has one of them


def layout_of(hf: HuggingFace, site: Site, name: str) -> str | None:
    """The layout that is declared for one tensor at one site; None where it has our own shape."""
    family = "stack" if site.shape and site.batch else site.kind.family if site.kind else None
    return hf.layouts.get(family or "", {}).get(name) or hf.layouts.get("", {}).get(name)


def theirs(tensor: Tensor, layout: str | None, site: Site) -> Tensor:
    """The tensor as the layout has it.

    >>> import torch
    >>> theirs(torch.zeros(2, 5, 3), "b ca", Site("", "w", None, None, (2, 5, 7), torch.float32, "cpu")).shape
    torch.Size([5, 6])
    """
    if layout is None:
        return tensor
    if layout == STORED:
        return site.kind.restore(site.layer, site.weight, tensor)  # type: ignore[union-attr]
    order, shape = _parse(layout, tensor.shape, _kernel(site))
    return tensor.permute(order).reshape(shape)


def ours(tensor: Tensor, layout: str | None, site: Site, shape: Sequence[int]) -> Tensor:
    """Undo `theirs`: the tensor in our own `shape`."""
    if layout is None:
        return tensor
    if layout == STORED:
        return site.kind.matrix(site.layer, site.weight, tensor)  # type: ignore[union-attr]
    order, _ = _parse(layout, shape, _kernel(site))
    inverse = [order.index(i) for i in range(len(order))]
    return tensor.reshape([shape[i] for i in order]).permute(inverse)


def _kernel(site: Site) -> tuple[int, ...]:
    return tuple(getattr(site.layer, "kernel_size", ())) if site.kind and site.kind.family == "conv" else ()


def _parse(layout: str, shape: Sequence[int], kernel: tuple[int, ...]) -> tuple[list[int], list[int]]:
    """The order of our dimensions in theirs, and their shape."""
    sizes = dict(zip(_LETTERS, shape, strict=False))
    order = [_LETTERS.index(letter) for letter in layout if letter in sizes]
    made: list[int] = []
    for word in layout.split():
        if word == "kernel":
            made += kernel
        elif word == "ones":
            made += [1] * len(kernel)
        elif word in ("1", "-"):
            made.append(int(word.replace("-", "-1")))
        else:
            made.append(math.prod(sizes[letter] for letter in word))
    order += [i for i in range(len(shape)) if i not in order]
    if -1 in made:
        made[made.index(-1)] = math.prod(shape) // -math.prod(made)
    return order, made
