"""VB-LoRA: LoRA's factors, put together from one bank of vectors for all sites (Li et al., arXiv:2405.15179)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import peftkit


@dataclass(frozen=True)
class VBLoRA(peftkit.Method):
    """`W + up @ down`, whose every piece of `length` numbers is a mixture of `top` vectors of the bank.

    The mixture is a softmax over the `top` largest of the piece's logits, one for each vector of the bank. As
    published, the product is small but not zero at the start: a new adapter changes the output a little.

    Args:
        rank: width of the product.
        vectors_in_bank: how many vectors the bank has.
        length: of each vector; it must divide the inputs and outputs of every site.
        top: how many vectors a piece is a mixture of.
        dropout: probability with which an element of the input is dropped, in training.
        bank_bound: vectors start uniform within this bound.
        logits_std: logits start normal with this standard deviation.

    >>> import torch, peftkit
    >>> from peftkit_vera.vblora import VBLoRA
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> print(peftkit.plan(model, VBLoRA(rank=2, length=4, vectors_in_bank=10)).rows[0].parameters)
    40
    """

    name: ClassVar[str] = "vblora"
    identity: ClassVar[bool] = False
    hf: ClassVar = peftkit.HuggingFace(
        peft_type="VBLORA",
        fields={
            "rank": "r", "vectors_in_bank": "num_vectors", "length": "vector_length", "top": "topk",
            "dropout": "vblora_dropout", "bank_bound": "init_vector_bank_bound", "logits_std": "init_logits_std",
        },
        tensors={"down": "vblora_logits_A", "up": "vblora_logits_B"},
        shared={"bank": "vblora_vector_bank"},
        kinds=("Linear", "Conv1D"),
        bias="vblora_only",
    )  # fmt: skip

    rank: int = 4
    vectors_in_bank: int = 256
    length: int = 256
    top: int = 2
    dropout: float = 0.0
    bank_bound: float = 0.02
    logits_std: float = 0.1

    def __post_init__(self) -> None:
        """Refuse values that would fail later, or learn nothing."""
        self.require_whole("rank", "vectors_in_bank", "length", "top")
        self.require(self.top <= self.vectors_in_bank, "top", f"at most vectors_in_bank={self.vectors_in_bank}")
        self.require_number("bank_bound", "logits_std", above=0)
        self.require_number("dropout", least=0, below=1)

    def shared(self, sites: Sequence[peftkit.Site]) -> nn.Module:
        """The bank, if its vectors fit every site."""
        sizes = [size for site in sites for size in site.shape[-2:]]
        for site in sites:
            if site.fan_out % self.length or site.fan_in % self.length:
                raise peftkit.errors.UnsupportedLayerError(
                    f"vblora: length={self.length} does not divide the {site.fan_out} outputs and {site.fan_in} inputs "
                    f"of {site.name}; take {math.gcd(*sizes)}, which divides all sizes here, or exclude this layer"
                )
        return Bank(sites[0], self)

    def adapter(self, site: peftkit.Site, shared: Any = None) -> "VBLoRAAdapter":
        """The logits of every piece, and a handle on the bank."""
        return VBLoRAAdapter(site, self, shared)


class Bank(nn.Module):
    """The vectors `[vectors_in_bank, length]`, trained from every site."""

    def __init__(self, site: peftkit.Site, method: VBLoRA) -> None:
        super().__init__()
        bank = torch.empty(method.vectors_in_bank, method.length)
        self.bank = site.parameter(bank.uniform_(-method.bank_bound, method.bank_bound))


class VBLoRAAdapter(peftkit.LowRank):
    """Logits `[..., rank, in / length, bank]` for `down` and `[..., out / length, rank, bank]` for `up`."""

    def __init__(self, site: peftkit.Site, method: VBLoRA, shared: peftkit.Shared) -> None:
        super().__init__(site)
        self.vectors = shared
        self.top = method.top
        self.dropout = method.dropout
        down = (*site.batch, method.rank, site.fan_in // method.length, method.vectors_in_bank)
        up = (*site.batch, site.fan_out // method.length, method.rank, method.vectors_in_bank)
        self.down = site.parameter(torch.randn(down) * method.logits_std)
        self.up = site.parameter(torch.randn(up) * method.logits_std)

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """Each piece from the bank; pieces of one factor side by side."""
        down = self._mixed(self.down).flatten(-2)  # [..., rank, in / length, length] -> [..., rank, in]
        up = self._mixed(self.up).mT.flatten(-3, -2)  # [..., out / length, rank, length] -> [..., out, rank]
        return up, down, 1.0

    def _mixed(self, logits: Tensor) -> Tensor:
        """`[..., bank] -> [..., length]`."""
        largest, places = logits.topk(self.top, dim=-1)
        bank = self.vectors.state.bank.to(logits)  # a site may be on another device
        return (largest.softmax(-1).unsqueeze(-1) * bank[places]).sum(-2)


@peftkit.hookimpl
def peftkit_methods() -> list[type[peftkit.Method]]:
    """The one method of this module."""
    return [VBLoRA]
