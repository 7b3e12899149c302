"""What is adapted: decoders in the shape of a Llama, a single layer, and many small layers side by side.

Weights are random. Nothing here depends on what a model has learned, only on its shapes.
"""

from dataclasses import dataclass

import torch
import transformers
from torch import nn

NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
"""All linear layers of a decoder but its head."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A decoder's sizes and those of its batch."""

    hidden: int = 512
    intermediate: int = 1376
    layers: int = 4
    heads: int = 8
    kv_heads: int = 8
    vocabulary: int = 1000
    batch: int = 4
    length: int = 128

    def config(self) -> transformers.LlamaConfig:
        return transformers.LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            vocab_size=self.vocabulary,
            max_position_embeddings=max(2048, self.length),
        )

    def lora_parameters(self, rank: int) -> int:
        """How many parameters LoRA of this rank has on all linear layers but the head."""
        kv = self.hidden * self.kv_heads // self.heads
        attention = 2 * (self.hidden + self.hidden) + 2 * (self.hidden + kv)
        return self.layers * rank * (attention + 3 * (self.hidden + self.intermediate))

    def tokens(self, device: str = "cpu") -> torch.Tensor:
        """A batch of token ids `[batch, length]`, the same each time."""
        chance = torch.Generator().manual_seed(0)
        return torch.randint(self.vocabulary, (self.batch, self.length), generator=chance).to(device)


SMALL = Shape()
"""The decoder of TARGETS: what fits two cores, and still spends its time in matrix products."""

BILLION = Shape(
    hidden=2048, intermediate=8192, layers=16, heads=32, kv_heads=8, vocabulary=32_000, batch=1, length=2048
)
"""Llama-3.2-1B's shape with a smaller vocabulary, 2,048 tokens: for a GPU."""

TINY = Shape(hidden=64, intermediate=160, layers=2, heads=4, kv_heads=2, vocabulary=100, batch=2, length=16)
"""For tests of what is exact."""


def decoder(shape: Shape, dtype: torch.dtype = torch.float32, device: str = "cpu") -> nn.Module:
    """A decoder with random weights, the same each time, made where it will run."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return transformers.LlamaForCausalLM(shape.config())
    finally:
        torch.set_default_dtype(before)


def seven_billion() -> nn.Module:
    """Llama-7B's shapes, 32 layers of seven linears, on the meta device: no weight is allocated."""
    shape = Shape(hidden=4096, intermediate=11_008, layers=32, heads=32, kv_heads=32, vocabulary=32_000)
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(shape.config())


class Beside(nn.Module):
    """Runs its children on the same input and adds what they give: no depth in which rounding could grow."""

    def __init__(self, children: dict[str, nn.Module]) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum(child(x) for child in self.children())


def many_small(blocks: int, hidden: int = 64) -> nn.Module:
    """Blocks of seven square linears, named as in a decoder layer: each layer's cost shows, arithmetic does not."""
    torch.manual_seed(0)
    made = ({name: nn.Linear(hidden, hidden, bias=False) for name in NAMES} for _ in range(blocks))
    return Beside({f"block{i}": Beside(block) for i, block in enumerate(made)})


class OneLayer(nn.Module):
    """A single linear layer under a name that every library can be told."""

    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q_proj = nn.Linear(fan_in, fan_out, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.q_proj(x)
