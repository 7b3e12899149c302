"""P-tuning: a prompt that a small network makes of trained embeddings (Liu et al., arXiv:2103.10385)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import peftkit
from peftkit_prompt.prepending import embeddings_of, prepender, whole_model, width_of

ENCODERS = ("mlp", "lstm")


@dataclass(frozen=True)
class PTuning(peftkit.Method):
    """A prompt of `tokens` embeddings, made by a network of the prompt alone, which is trained with them.

    Args:
        tokens: length of the prompt.
        encoder: `mlp`, three linear layers with ReLU between, each token by itself; or `lstm`, a bidirectional LSTM
            over the tokens and two linear layers.
        width: features of the network's hidden layers; by default those of the model's embeddings.
        layers: of the LSTM.
        dropout: between the LSTM's layers, in training.

    >>> from peftkit.testing.cases import LanguageModel
    >>> model = peftkit.wrap(LanguageModel(), PTuning(tokens=5, width=8))
    >>> sum(p.numel() for p in model.parameters() if p.requires_grad)
    432
    """

    name: ClassVar[str] = "p_tuning"
    scope: ClassVar[Any] = "modules"
    identity: ClassVar[bool] = False
    default_targets: ClassVar[Any] = (whole_model,)

    tokens: int = 20
    encoder: str = "mlp"
    width: int | None = None
    layers: int = 2
    dropout: float = 0.0

    def __post_init__(self) -> None:
        """Refuse values that would fail later, or do nothing."""
        self.require_whole("tokens")
        self.require(self.encoder in ENCODERS, "encoder", f"one of {', '.join(ENCODERS)}")
        self.require_whole("width", optional=True)
        self.require_whole("layers")
        self.require_number("dropout", least=0, below=1)
        self.require(self.dropout == 0 or (self.encoder == "lstm" and self.layers > 1), "dropout", "0 without an LSTM")

    def shared(self, sites: Sequence[peftkit.Site]) -> nn.Module:
        """The embeddings and the network: the root and the encoder have one."""
        return _PromptEncoder(sites[-1], self)

    def adapter(self, site: peftkit.Site, shared: peftkit.Shared | None = None) -> peftkit.Activation:
        """What puts the prompt before the input."""
        return prepender(site, self, shared)


class _PromptEncoder(nn.Module):
    def __init__(self, site: peftkit.Site, method: PTuning) -> None:
        super().__init__()
        features = width_of(embeddings_of(site, method))
        width = method.width or features
        drawn = torch.device("meta" if site.device.type == "meta" else "cpu")
        self.lstm: nn.LSTM | None = None
        with drawn:
            self.embeddings = site.parameter(torch.randn(method.tokens, features))
            if method.encoder == "lstm":
                self.lstm = nn.LSTM(
                    features, width, method.layers, dropout=method.dropout, bidirectional=True, batch_first=True
                )
                linears = [nn.Linear(2 * width, 2 * width), nn.Linear(2 * width, features)]
            else:
                linears = [nn.Linear(features, width), nn.Linear(width, width), nn.Linear(width, features)]
        self.linears = nn.ModuleList(linears)
        self.to(device=site.device, dtype=site.dtype)

    def forward(self) -> Tensor:
        """The prompt `[tokens, width]`."""
        x: Tensor = self.embeddings if self.lstm is None else self.lstm(self.embeddings)[0]
        for i, linear in enumerate(self.linears):
            x = linear(x.relu() if i else x)
        return x


@peftkit.hookimpl
def peftkit_methods() -> list[type[peftkit.Method]]:
    """The one method of this module."""
    return [PTuning]
