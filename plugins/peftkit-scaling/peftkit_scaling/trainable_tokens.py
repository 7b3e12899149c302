"""Trainable tokens: a few rows of an embedding are trained, those of new tokens say, and the others stay as they are.

HF PEFT's method of that name; there is no paper.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

import peftkit


@dataclass(frozen=True)
class TrainableTokens(peftkit.Method):
    """The embeddings of some tokens, trained in the place of the base's.

    On a layer whose input is no index, such as an output head, it trains the rows of these outputs. A head that is one
    weight with the embedding has rows of its own here: adapt both, or untie them.

    Args:
        tokens: the ids of the tokens; by default the first alone.

    >>> import torch, peftkit
    >>> from peftkit_scaling.trainable_tokens import TrainableTokens
    >>> model = torch.nn.Sequential(torch.nn.Embedding(100, 8), torch.nn.Linear(8, 2))
    >>> model = peftkit.wrap(model, TrainableTokens(tokens=[98, 99]))
    >>> {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    {'0.adapters.default.weight.values': (2, 8)}
    """

    name: ClassVar[str] = "trainable_tokens"
    default_targets: ClassVar[str] = "@embedding"
    hf: ClassVar = peftkit.HuggingFace(
        peft_type="TRAINABLE_TOKENS",
        part="trainable_token_indices",
        fields={"tokens": "token_indices"},
        tensors={"values": "trainable_tokens_delta"},
        kinds=("Embedding", "Linear"),
        ignored={"init_weights": (True,)},
    )

    tokens: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        """Refuse what are no ids; a list becomes a tuple, so that equal methods are equal."""
        ids = self.tokens
        fits = isinstance(ids, (list, tuple)) and len(ids) > 0 and all(type(i) is int and i >= 0 for i in ids)
        self.require(fits and len(set(ids)) == len(ids), "tokens", "a list of token ids, each once")
        object.__setattr__(self, "tokens", tuple(ids))

    def adapter(self, site: peftkit.Site, shared: peftkit.Shared | None = None) -> peftkit.Adapter:
        """The rows of one weight."""
        return TrainableTokensAdapter(site, self)


class TrainableTokensAdapter(peftkit.Adapter):
    """`values` `[..., tokens, dim]`. As a matrix, an embedding has its rows as columns."""

    def __init__(self, site: peftkit.Site, method: TrainableTokens) -> None:
        super().__init__(site)
        self.one_hot, self.tokens = site.one_hot, method.tokens
        rows = site.fan_in if site.one_hot else site.fan_out
        if max(method.tokens) >= rows:
            raise peftkit.errors.FieldError(
                f"trainable_tokens: tokens must be below the {rows} rows of {site.name}, got {max(method.tokens)}"
            )
        table = site.matrix().mT if site.one_hot else site.matrix()
        self.values = site.parameter(table[..., list(method.tokens), :].clone())

    def weight(self, w: Tensor) -> Tensor:
        places = torch.tensor(self.tokens, device=w.device)
        values = self.values.to(w.dtype)
        return w.index_copy(-1, places, values.mT) if self.one_hot else w.index_copy(-2, places, values)


@peftkit.hookimpl
def peftkit_methods() -> list[type[peftkit.Method]]:
    """The one method of this module."""
    return [TrainableTokens]
