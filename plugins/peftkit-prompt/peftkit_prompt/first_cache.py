"""What the key-value cache of a model looks like: read from the first cache that the model makes itself.

A configuration does not say it reliably: heads are shared, keys and values differ in size, some layers keep none. So
the model is run once on one token, with fake tensors, which have shapes and cost nothing.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import peftkit
from peftkit_prompt.caches import cache_of
from peftkit_prompt.prepending import embeddings_of, vocabulary_ids


@dataclass(frozen=True)
class Layout:
    """For each layer of the cache the shapes `(heads, features)` of its keys and values, or None; and its classes."""

    layers: tuple[tuple[tuple[int, int], tuple[int, int]] | None, ...]
    classes: tuple[type, ...]

    @property
    def size(self) -> int:
        """Elements for one token."""
        return sum(heads * features for pair in self.layers if pair for heads, features in pair)

    def split(self, prefix: Tensor) -> list[tuple[Tensor, Tensor] | None]:
        """The flat prefix `[tokens, size]` as keys and values `[1, heads, tokens, features]` of each layer."""
        shapes = [shape for pair in self.layers if pair for shape in pair]
        flat = torch.split(prefix, [heads * features for heads, features in shapes], 1)
        parts = iter(x.reshape(-1, *shape).transpose(0, 1)[None] for x, shape in zip(flat, shapes, strict=True))
        return [(next(parts), next(parts)) if pair else None for pair in self.layers]

    def flatten(self, pairs: Sequence[tuple[Tensor, Tensor] | None]) -> Tensor:
        """The inverse of `split`."""
        return torch.cat([x[0].transpose(0, 1).flatten(1) for pair in pairs if pair for x in pair], 1)

    def new_cache(self, model: nn.Module) -> Any:
        """An empty cache, as the model makes one for itself."""
        outer, *parts = self.classes
        made = [each(config=model.config) for each in parts]
        return outer(*made) if made else outer(config=model.config)


def layout_of(site: peftkit.Site, method: peftkit.Method) -> Layout:
    """The layout of the cache of the model at a site; `UnsupportedLayerError` where it has none."""
    embeddings = embeddings_of(site, method)
    device = next(embeddings.parameters()).device
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device(device):
        cache = _first_cache(site.layer, torch.zeros(1, 1, dtype=torch.long))
        pairs = None if cache is None else _pairs(cache)
    if pairs is None or not any(pairs):
        raise peftkit.errors.UnsupportedLayerError(
            f"{method.name} needs a model that keeps keys and values in a cache; {site.path or 'the model'} "
            f"({type(site.layer).__name__}) makes none. prompt_tuning works without"
        )
    shapes = tuple(pair and tuple((x.shape[1], x.shape[3]) for x in pair) for pair in pairs)
    parts = [getattr(cache, name, None) for name in ("self_attention_cache", "cross_attention_cache")]
    return Layout(shapes, tuple(type(each) for each in (cache, *parts) if each is not None))  # type: ignore[arg-type]


def keys_and_values(site: peftkit.Site, tokens: int, ids: Sequence[int] | None) -> list[tuple[Tensor, Tensor] | None]:
    """What the bare model has in its cache after it has read these tokens, or random ones."""
    embeddings: Any = site.layer.get_input_embeddings()  # type: ignore[operator]
    chosen = vocabulary_ids(embeddings, tokens, ids)
    with _bare(site.layer):
        cache = _first_cache(site.layer, chosen[None].to(embeddings.weight.device))
    return _pairs(cache)


def _first_cache(model: nn.Module, ids: Tensor) -> Any:
    """The cache that the model makes when it reads these ids; None where it has no such thing."""
    takes = inspect.signature(type(model).forward).parameters
    if not {"past_key_values", "use_cache"} <= takes.keys():
        return None
    both = {name: ids for name in ("input_ids", "decoder_input_ids") if name in takes}
    with torch.no_grad():
        return cache_of(model(**both, use_cache=True))


def _pairs(cache: Any) -> list[tuple[Tensor, Tensor] | None]:
    """Keys and values of each layer; None for one that keeps another kind of state."""
    layers = getattr(cache, "self_attention_cache", cache).layers
    pairs = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in layers]
    return [(k, v) if k is not None and v is not None else None for k, v in pairs]


@contextmanager
def _bare(model: nn.Module) -> Iterator[None]:
    """Without dropout and without other adapters, for the length of a block."""
    training = [module for module in model.modules() if module.training]
    with ExitStack() as stack:
        with suppress(peftkit.errors.StateError):  # it has no adapters yet
            stack.enter_context(peftkit.disabled(model))
        model.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True
