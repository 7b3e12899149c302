"""Puts a prompt before the input of a whole model: what prompt tuning and P-tuning have in common.

A decoder, or an encoder alone, is adapted at its root. In an encoder-decoder model the prompt goes into the encoder,
which `generate` calls directly, and the root lengthens the mask with which the decoder looks at the encoder's output.

Per-token outputs lose the prompt's positions again, so logits have the length of the input. Hidden states and
attentions keep them.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import peftkit
from peftkit_prompt.arguments import (
    before,
    embedded_tokens,
    extend_mask,
    keep_what_is_asked_for,
    named_arguments,
    refuse_pooled_padding,
    rows_of,
    shift_positions,
    without_prompt,
)
from peftkit_prompt.caches import cache_in, cache_of, inside, mark, new_key, prompts_in, refuse_unfit

IGNORED = -100
"""The label of a position that does not count in the loss."""


def is_encoder(path: str, module: nn.Module) -> bool:
    """Whether this is the text encoder of an encoder-decoder model: called `encoder`, and takes embedded tokens."""
    return path.rpartition(".")[2] == "encoder" and _takes_embeddings(module)


def whole_model(path: str, module: nn.Module) -> bool:
    """The sites of a prompt: the root, and the encoder if there is one."""
    return path == "" or is_encoder(path, module)


def embeddings_of(site: peftkit.Site, method: peftkit.Method) -> nn.Module:
    """The layer that looks up tokens in the model at this site; an error where there is none."""
    model = site.layer
    if not _takes_embeddings(model) and not _encoders_in(model):
        raise peftkit.errors.UnsupportedLayerError(
            f"{method.name} needs a language model, with get_input_embeddings() and a forward that takes "
            f"inputs_embeds; {site.path or 'the model'} ({type(model).__name__}) has none. Give targets= for a part "
            "that has"
        )
    found: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    return found


def width_of(embeddings: nn.Module) -> int:
    """The length of one embedding."""
    width: Any = getattr(embeddings, "embedding_dim", None)
    return int(width or embeddings.weight.shape[-1])  # type: ignore[index]


def vocabulary_ids(embeddings: nn.Module, tokens: int, ids: Sequence[int] | None) -> Tensor:
    """The ids given, in turn and from the start again until there are enough; or random ones."""
    rows = int(embeddings.weight.shape[0])  # type: ignore[index]
    if ids is None:
        return torch.randint(rows, (tokens,))
    if max(ids) >= rows:
        raise peftkit.errors.FieldError(f"init_ids has {max(ids)}, but the vocabulary has {rows} tokens")
    return torch.tensor(ids).repeat(tokens)[:tokens]


def vocabulary_rows(site: peftkit.Site, embeddings: nn.Module, tokens: int, ids: Sequence[int] | None) -> Tensor:
    """The embeddings `[tokens, width]` of these ids, or of random ones."""
    if site.device.type == "meta":
        return torch.empty(tokens, width_of(embeddings))
    chosen = vocabulary_ids(embeddings, tokens, ids)
    with torch.no_grad():
        found: Tensor = embeddings(chosen.to(next(embeddings.parameters()).device))
    return found.detach()


def prepender(site: peftkit.Site, method: Any, shared: Any) -> peftkit.Activation:
    """The adapter for one of the sites."""
    if is_encoder(site.path, site.layer):
        return _AtEncoder(site, method, shared)
    return _AroundEncoder(site, method) if _encoders_in(site.layer) else _AtRoot(site, method, shared)


class _AtRoot(peftkit.Activation):
    """A decoder, or an encoder alone: prompt in, prompt's outputs out again."""

    def __init__(self, site: peftkit.Site, method: Any, shared: peftkit.Shared) -> None:
        super().__init__(site)
        self.bank = shared
        self.tokens = int(method.tokens)
        self.where = f"{method.name} at {site.path or 'the model'}"
        self.key = new_key()

    def forward(self, base: Any, *args: Any, **kwargs: Any) -> Any:
        named = named_arguments(base, args, kwargs)
        given = dict(named)
        extend_mask(named, "attention_mask", self.tokens, self.where)
        cache = cache_in(named)
        if cache is not None and self.key in prompts_in(cache):
            shift_positions(named, self.tokens)
            with inside(cache):
                return base(**named)
        length = self.put_first(base.model, named)
        if cache is None:
            output = base(**named)
            made = cache_of(output)
            if made is not None:
                mark(made, self.key, self.tokens)
        else:
            refuse_unfit(cache, self.where)
            mark(cache, self.key, self.tokens)
            with inside(cache):
                output = base(**named)
        refuse_pooled_padding(base, given, output, self.where)
        return without_prompt(output, self.tokens, length)

    def put_first(self, model: nn.Module, named: dict[str, Any]) -> int:
        """Put the prompt before the embedded tokens and whatever goes with each; returns the number of tokens."""
        embedded = embedded_tokens(model, named, self.where)
        rows, length = embedded.shape[:2]
        named["inputs_embeds"] = torch.cat([rows_of(self.bank.state(), embedded), embedded], 1)
        positions = named.get("position_ids")
        if positions is not None:
            first = torch.arange(self.tokens, dtype=positions.dtype, device=positions.device)
            named["position_ids"] = torch.cat([first.expand(*positions.shape[:-1], -1), positions + self.tokens], -1)
        if named.get("token_type_ids") is not None:
            named["token_type_ids"] = before(named["token_type_ids"], self.tokens, 0)
        labels = named.get("labels")
        if labels is not None and labels.shape == (rows, length) and not labels.is_floating_point():
            named["labels"] = before(labels, self.tokens, IGNORED)
        for name in ("start_positions", "end_positions"):
            if named.get(name) is not None:
                named[name] = named[name] + self.tokens
        keep_what_is_asked_for(named, self.tokens, length)
        return length


class _AtEncoder(peftkit.Activation):
    """The encoder of an encoder-decoder model: prompt in, and its outputs stay, for the decoder to look at."""

    def __init__(self, site: peftkit.Site, method: Any, shared: peftkit.Shared) -> None:
        super().__init__(site)
        self.bank = shared
        self.tokens = int(method.tokens)
        self.where = f"{method.name} at {site.path}"

    def forward(self, base: Any, *args: Any, **kwargs: Any) -> Any:
        named = named_arguments(base, args, kwargs)
        embedded = embedded_tokens(base.model, named, self.where)
        mask = named.get("attention_mask")
        if mask is not None and mask.shape[-1] == embedded.shape[1]:  # else the model's own adapter has been there
            extend_mask(named, "attention_mask", self.tokens, self.where)
        named["inputs_embeds"] = torch.cat([rows_of(self.bank.state(), embedded), embedded], 1)
        return base(**named)


class _AroundEncoder(peftkit.Activation):
    """The root of an encoder-decoder model: the decoder is to look at the prompt too."""

    def __init__(self, site: peftkit.Site, method: Any) -> None:
        super().__init__(site)
        self.tokens = int(method.tokens)
        self.where = f"{method.name} at {site.path or 'the model'}"

    def forward(self, base: Any, *args: Any, **kwargs: Any) -> Any:
        named = named_arguments(base, args, kwargs)
        encoded, mask = named.get("encoder_outputs"), named.get("attention_mask")
        if encoded is not None and mask is not None and encoded[0].shape[1] < mask.shape[-1] + self.tokens:
            raise peftkit.errors.StateError(f"{self.where}: the encoder_outputs given were made without its prompt")
        extend_mask(named, "attention_mask", self.tokens, self.where)
        output = base(**named)
        given = named.get("input_ids") if named.get("input_ids") is not None else named.get("inputs_embeds")
        if "decoder_input_ids" in base.names or given is None:
            return output
        return without_prompt(output, self.tokens, given.shape[1])  # an encoder alone, as T5EncoderModel


def _takes_embeddings(module: nn.Module) -> bool:
    if not callable(getattr(module, "get_input_embeddings", None)):
        return False
    return "inputs_embeds" in inspect.signature(type(module).forward).parameters


def _encoders_in(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if path and is_encoder(path, module)]
