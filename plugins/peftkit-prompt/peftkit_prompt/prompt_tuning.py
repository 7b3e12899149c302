"""Prompt tuning: trained embeddings before the embedded input (Lester et al., arXiv:2104.08691)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import peftkit
from peftkit_prompt.checking import require_ids
from peftkit_prompt.prepending import embeddings_of, prepender, vocabulary_rows, whole_model, width_of

INITS = ("vocabulary", "normal")


@dataclass(frozen=True)
class PromptTuning(peftkit.Method):
    """A prompt of `tokens` trained embeddings; the model reads it before every input.

    Args:
        tokens: length of the prompt.
        init: how it starts. `vocabulary`: as the embeddings of random tokens, which is what was found to train well;
            `normal`: normal, with the standard deviation of the vocabulary's embeddings.
        init_ids: start as the embeddings of these tokens instead, repeated or cut to fill the prompt.

    >>> from peftkit.testing.cases import LanguageModel
    >>> model = peftkit.wrap(LanguageModel(), PromptTuning(tokens=5))
    >>> [tuple(p.shape) for p in model.parameters() if p.requires_grad]
    [(5, 16)]
    """

    name: ClassVar[str] = "prompt_tuning"
    scope: ClassVar[Any] = "modules"
    identity: ClassVar[bool] = False
    default_targets: ClassVar[Any] = (whole_model,)
    hf: ClassVar[peftkit.HuggingFace | None] = peftkit.HuggingFace(
        "PROMPT_TUNING",
        fields={"tokens": "num_virtual_tokens"},
        shared={"prompt": "prompt_embeddings"},
        prefix="",
        tasks=("CAUSAL_LM",),
        ignored={
            "token_dim": None, "num_layers": None, "num_attention_heads": None, "num_transformer_submodules": (1,),
            "prompt_tuning_init": None, "prompt_tuning_init_text": None, "tokenizer_name_or_path": None,
            "tokenizer_kwargs": None,
        },
    )  # fmt: skip

    tokens: int = 20
    init: str = "vocabulary"
    init_ids: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Refuse values that would fail later, or do nothing."""
        self.require_whole("tokens")
        self.require(self.init in INITS, "init", f"one of {', '.join(INITS)}")
        require_ids(self, "init_ids")

    def shared(self, sites: Sequence[peftkit.Site]) -> nn.Module:
        """The prompt itself: the root and the encoder have one."""
        return _Prompt(sites[-1], self)

    def adapter(self, site: peftkit.Site, shared: peftkit.Shared | None = None) -> peftkit.Activation:
        """What puts it before the input."""
        return prepender(site, self, shared)


class _Prompt(nn.Module):
    def __init__(self, site: peftkit.Site, method: PromptTuning) -> None:
        super().__init__()
        embeddings = embeddings_of(site, method)
        if method.init == "vocabulary" or method.init_ids is not None:
            value = vocabulary_rows(site, embeddings, method.tokens, method.init_ids)
        else:
            value = torch.randn(method.tokens, width_of(embeddings))
            if site.device.type != "meta":
                value = value * embeddings.weight.detach().float().std().cpu()  # type: ignore[operator]
        self.prompt = site.parameter(value)

    def forward(self) -> Tensor:
        """The prompt `[tokens, width]`."""
        return self.prompt


@peftkit.hookimpl
def peftkit_methods() -> list[type[peftkit.Method]]:
    """The one method of this module."""
    return [PromptTuning]
