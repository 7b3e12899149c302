"""Which prompts a key-value cache begins with: a mark on the cache itself.

Whether a call starts a text or goes on with one cannot be read from a cache's length: a state space model's has none,
and another prompt may have filled it. So whoever puts a prompt before a text marks the cache with its own key.

Seen from outside of the model's forward, a marked cache is as long as the tokens that the user gave: `generate`
computes with that length which tokens are new, and knows nothing of prompts.
"""

import functools
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

import peftkit

_PROMPTS = "_peftkit_prompts"  # on the cache: the length of each prompt in it, by the key of its adapter
_INSIDE = "_peftkit_inside"  # on the cache: in how many forwards it is now

new_key = itertools.count().__next__
"""A key of its own for each adapter."""


def cache_in(named: dict[str, Any]) -> Any:
    """The cache among a forward's arguments, or None. Mamba's goes by another name."""
    return next((named[name] for name in ("past_key_values", "cache_params") if named.get(name) is not None), None)


def cache_of(output: Any) -> Any:
    """The cache in a forward's output, or None."""
    if isinstance(output, dict):
        return cache_in(output)
    each: tuple[Any, ...] = output if isinstance(output, tuple) else ()
    return next((x for x in each if callable(getattr(x, "get_seq_length", None))), None)


def prompts_in(cache: Any) -> dict[int, int]:
    """The lengths of the prompts that a cache begins with, by key."""
    found: dict[int, int] = cache.__dict__.get(_PROMPTS, {})
    return found


def mark(cache: Any, key: int, length: int) -> None:
    """Note that the cache begins with a prompt, or is about to."""
    cache.__dict__[_PROMPTS] = {**prompts_in(cache), key: length}
    if not torch.compiler.is_compiling() and not isinstance(cache, _Marked):
        plain: Any = type(cache)
        cache.__class__ = _marked(plain)


def length_of(cache: Any) -> int:
    """How many tokens are in the cache, prompts and all; 0 for a cache that keeps no length."""
    with inside(cache):
        try:
            return int(cache.get_seq_length())
        except ValueError:  # so says transformers' cache that has states of linear attention alone
            return 0


@contextmanager
def inside(cache: Any) -> Iterator[None]:
    """Show the cache as it is, prompts and all, to the model whose forward runs in this block."""
    cache.__dict__[_INSIDE] = cache.__dict__.get(_INSIDE, 0) + 1
    try:
        yield
    finally:
        cache.__dict__[_INSIDE] -= 1


def refuse_unfit(cache: Any, where: str) -> None:
    """Refuse a cache that a prompt cannot go into: one of a fixed size, or one that holds a text already."""
    layers = getattr(cache, "self_attention_cache", cache).layers
    if any(getattr(layer, "max_cache_len", None) is not None for layer in layers):
        raise peftkit.errors.UnsupportedLayerError(
            f"{where} needs a cache that grows; a static one is sized without the prompt, so leave "
            "cache_implementation='static' out"
        )
    if length_of(cache) > sum(prompts_in(cache).values()):
        raise peftkit.errors.StateError(
            f"{where} was not active when this cache was filled, so the cache does not begin with its prompt; start "
            "again without the cache"
        )


class _Marked:
    """Mixed into the class of a marked cache."""

    def get_seq_length(self, *args: Any, **kwargs: Any) -> Any:
        length = super().get_seq_length(*args, **kwargs)  # type: ignore[misc]
        return length if self.__dict__.get(_INSIDE) else max(0, length - sum(prompts_in(self).values()))

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self.__dict__.pop(_PROMPTS, None)


@functools.cache
def _marked(cache_class: type) -> type:
    return type(cache_class.__name__, (_Marked, cache_class), {"__module__": cache_class.__module__})
