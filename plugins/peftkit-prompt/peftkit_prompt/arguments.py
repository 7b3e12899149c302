"""A language model's arguments and outputs, by the names that transformers gives them."""

from typing import Any

import torch
from torch import Tensor, nn

import peftkit

_PER_TOKEN = ("logits", "last_hidden_state")
_PER_TOKEN_2D = ("start_logits", "end_logits")


def named_arguments(base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A forward's arguments by name."""
    return dict(zip(base.names, args, strict=False)) | kwargs


def extend_mask(named: dict[str, Any], name: str, tokens: int, where: str) -> None:
    """Let the prompt's positions be seen."""
    mask = named.get(name)
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise peftkit.errors.UnsupportedLayerError(
            f"{where} can lengthen a mask [batch, tokens], got {name} {shape}; give the two-dimensional one, and use "
            "no static cache"
        )
    named[name] = before(mask, tokens, 1)


def shift_positions(named: dict[str, Any], tokens: int) -> None:
    """Positions of tokens that stand behind a prompt."""
    if named.get("position_ids") is not None:
        named["position_ids"] = named["position_ids"] + tokens


def embedded_tokens(model: nn.Module, named: dict[str, Any], where: str) -> Tensor:
    """The input as embeddings `[batch, tokens, width]`; it is taken out of the arguments."""
    embedded, ids = named.pop("inputs_embeds", None), named.pop("input_ids", None)
    if embedded is not None:
        return embedded  # type: ignore[no-any-return]
    if ids is None:
        raise peftkit.errors.UnsupportedLayerError(f"{where} needs input_ids or inputs_embeds, and got neither")
    return model.get_input_embeddings()(ids)  # type: ignore[operator, no-any-return]


def rows_of(prompt: Tensor, like: Tensor) -> Tensor:
    """The prompt `[tokens, width]` for each row of the batch, in its dtype."""
    return prompt.to(dtype=like.dtype, device=like.device).expand(like.shape[0], -1, -1)


def without_prompt(output: Any, tokens: int, length: int) -> Any:
    """The outputs that have one entry a token, for the tokens of the input alone."""
    if isinstance(output, Tensor):
        return _cut(output, tokens, length, 3)
    if isinstance(output, dict):
        for names, dims in ((_PER_TOKEN, 3), (_PER_TOKEN_2D, 2)):
            for name in names:
                if isinstance(output.get(name), Tensor):
                    output[name] = _cut(output[name], tokens, length, dims)
        return output
    if isinstance(output, tuple):
        make = getattr(type(output), "_make", type(output))
        return make(_cut(each, tokens, length, 3) if isinstance(each, Tensor) else each for each in output)
    return output


def _cut(x: Tensor, tokens: int, length: int, dims: int) -> Tensor:
    return x[:, tokens:] if x.dim() >= dims and x.shape[1] == tokens + length else x


def before(x: Tensor, tokens: int, value: int) -> Tensor:
    return torch.cat([x.new_full((x.shape[0], tokens), value), x], 1)


def keep_what_is_asked_for(named: dict[str, Any], tokens: int, length: int) -> None:
    """`logits_to_keep` counts from the end, or gives positions in the input."""
    kept = named.get("logits_to_keep")
    if isinstance(kept, Tensor):
        named["logits_to_keep"] = kept + tokens
    elif kept:
        named["logits_to_keep"] = min(kept, length)


def refuse_pooled_padding(base: Any, given: dict[str, Any], output: Any, where: str) -> None:
    """Decoders that classify do it at the last token, which they find by its id; of embedded ones they take the last
    position, padding or not.
    """
    scores = output.get("logits") if isinstance(output, dict) else None
    if scores is None or scores.dim() != 2 or "past_key_values" not in base.names or torch.compiler.is_compiling():
        return
    mask, ids = given.get("attention_mask"), given.get("input_ids")
    padding = getattr(base.model.config, "pad_token_id", None)
    if mask is None and ids is not None and padding is not None:
        mask = ids != padding
    if mask is not None and not bool(mask[:, -1].all()):
        raise peftkit.errors.UnsupportedLayerError(
            f"{where}: {type(base.model).__name__} scores the last position, which is padding here; pad on the left"
        )
