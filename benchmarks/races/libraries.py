"""How each library is called for the same work: LoRA, or another method, on all linear layers but the head.

A library that isn't installed makes its sides unavailable (`ImportError`), and the report leaves them out. alpha is 16
everywhere, so that the same factors mean the same update.
"""

import collections
import contextlib
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import peftkit
from peftkit import kernels
from races.models import NAMES

ALPHA = 16
SELECTOR = "{q,k,v,o,gate,up,down}_proj"


class Peftkit:
    """peftkit."""

    name = "peftkit"

    def lora(self, model: nn.Module, rank: int, dropout: float = 0.0, name: str = "default") -> nn.Module:
        method = peftkit.LoRA(rank=rank, alpha=ALPHA, dropout=dropout)
        return peftkit.wrap(model, method, targets=SELECTOR, name=name)

    def dora(self, model: nn.Module, rank: int) -> nn.Module:
        return peftkit.wrap(model, "dora", targets=SELECTOR, rank=rank, alpha=ALPHA)

    def save(self, model: nn.Module, folder: Path) -> None:
        peftkit.save(model, self.file(folder), name="default")

    def load(self, model: nn.Module, folder: Path, name: str) -> None:
        peftkit.load(model, self.file(folder), name=name)

    def switch(self, model: nn.Module, name: str) -> None:
        peftkit.activate(model, name)

    def forget(self, model: nn.Module, name: str) -> None:
        peftkit.unwrap(model, name)

    def merge(self, model: nn.Module) -> None:
        peftkit.merge(model)

    def unmerge(self, model: nn.Module) -> None:
        peftkit.unmerge(model)

    def file(self, folder: Path) -> Path:
        return folder / "adapter.safetensors"


class HuggingFace:
    """HF PEFT."""

    name = "hf-peft"

    def _config(self, rank: int, dropout: float = 0.0, *, dora: bool = False):
        import peft

        return peft.LoraConfig(r=rank, lora_alpha=ALPHA, lora_dropout=dropout, use_dora=dora, target_modules=NAMES)

    def lora(self, model: nn.Module, rank: int, dropout: float = 0.0, name: str = "default") -> nn.Module:
        import peft

        if isinstance(model, peft.PeftModel):
            model.add_adapter(name, self._config(rank, dropout))
            return model
        return peft.get_peft_model(model, self._config(rank, dropout), adapter_name=name)

    def dora(self, model: nn.Module, rank: int) -> nn.Module:
        import peft

        return peft.get_peft_model(model, self._config(rank, dora=True))

    def save(self, model: nn.Module, folder: Path) -> None:
        model.save_pretrained(folder)

    def load(self, model: nn.Module, folder: Path, name: str) -> None:
        model.load_adapter(folder, adapter_name=name)

    def switch(self, model: nn.Module, name: str) -> None:
        model.set_adapter(name)

    def forget(self, model: nn.Module, name: str) -> None:
        model.delete_adapter(name)

    def merge(self, model: nn.Module) -> None:
        model.merge_adapter()

    def unmerge(self, model: nn.Module) -> None:
        model.unmerge_adapter()

    def file(self, folder: Path) -> Path:
        return folder / "adapter_model.safetensors"


class Loralib:
    """loralib: layers of its own take the place of the model's."""

    name = "loralib"

    def lora(self, model: nn.Module, rank: int, dropout: float = 0.0) -> nn.Module:
        import loralib

        model.requires_grad_(False)
        for parent in list(model.modules()):
            for name, layer in list(parent.named_children()):
                if name in NAMES:
                    out, into = layer.weight.shape
                    new = loralib.Linear(
                        into, out, r=rank, lora_alpha=ALPHA, lora_dropout=dropout, merge_weights=False, bias=False
                    )
                    new.weight = layer.weight
                    setattr(parent, name, new)
        return model


class Lycoris:
    """LyCORIS, with its algorithm "lora": a network beside the model, whose layers take over the model's forwards."""

    name = "lycoris"

    def lora(self, model: nn.Module, rank: int, dropout: float = 0.0) -> nn.Module:
        with contextlib.redirect_stdout(
            None
        ):  # it reports each step on standard output, and does so from its import on
            import lycoris
            from lycoris.logging import logger

            logger.setLevel("ERROR")
        model.requires_grad_(False)
        patterns = {"target_module": [], "target_name": [f"*.{name}" for name in NAMES] + NAMES, "use_fnmatch": True}
        lycoris.LycorisNetwork.apply_preset({"enable_conv": False, **patterns})
        network = lycoris.LycorisNetwork(
            model,
            lora_dim=rank,
            conv_lora_dim=0,
            alpha=ALPHA,
            dropout=dropout,
            network_module="lora",
            warn_on_unmatched=False,
        )
        network.apply_to()
        model.add_module("lycoris_network", network)
        return model


class ByHand:
    """The same arithmetic with no library around it: two products written into a layer's forward.

    What a library adds to that is its own; what is left to the floor are the products themselves, and the calls of
    torch that make them. Dropout and mixed dtypes take peftkit's kernel, called directly.
    """

    name = "by hand"

    def lora(self, model: nn.Module, rank: int, dropout: float = 0.0) -> nn.Module:
        return _replace(model.requires_grad_(False), lambda layer: LinearByHand(layer, rank, dropout))


def many_by_hand(model: nn.Module, rank: int, adapters: int) -> nn.Module:
    """For a batch in which each sample has an adapter of its own."""
    return _replace(model, lambda layer: LinearOfMany(layer, rank, adapters))


def _replace(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if name in NAMES:
                setattr(parent, name, make(layer))
    return model


class LinearByHand(nn.Module):
    """A linear layer without bias, and its adapter."""

    def __init__(self, layer: nn.Linear, rank: int, dropout: float) -> None:
        super().__init__()
        self.weight, self.dropout = layer.weight, dropout
        self.down = nn.Parameter(torch.randn(rank, layer.in_features, device=layer.weight.device) / rank)
        self.up = nn.Parameter(torch.zeros(layer.out_features, rank, device=layer.weight.device))
        self.scale = ALPHA / rank

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.dropout or self.weight.dtype != self.up.dtype or torch.is_autocast_enabled(x.device.type):
            return kernels.linear(x, self.weight, None, self.up, self.down, self.scale, self.dropout)
        rows = x.reshape(-1, x.shape[-1])
        y = F.linear(rows, self.weight).addmm_(F.linear(rows, self.down), self.up.mT, alpha=self.scale)
        return y.view(*x.shape[:-1], -1)


class LinearOfMany(nn.Module):
    """The same with as many adapters as samples, their factors stacked beforehand."""

    def __init__(self, layer: nn.Linear, rank: int, adapters: int) -> None:
        super().__init__()
        self.weight, self.scale = layer.weight, ALPHA / rank
        self.down = nn.Parameter(torch.randn(adapters, layer.in_features, rank) / rank)
        self.up = nn.Parameter(torch.zeros(adapters, rank, layer.out_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.linear(x, self.weight)
        return y.baddbmm_(torch.bmm(x, self.down), self.up, alpha=self.scale)


class Floor:
    """No adapter: every weight frozen, with gradients still flowing to the input. No adapter can be faster."""

    name = "floor"

    def lora(self, model: nn.Module, rank: int, dropout: float = 0.0) -> nn.Module:  # noqa: ARG002 - as the others
        return model.requires_grad_(False)


class Full:
    """Every weight trained, by torch alone."""

    name = "full"

    def lora(self, model: nn.Module, rank: int, dropout: float = 0.0) -> nn.Module:  # noqa: ARG002 - as the others
        return model.requires_grad_(True)


LIBRARIES = {each.name: each for each in (Floor(), Peftkit(), ByHand(), HuggingFace(), Loralib(), Lycoris(), Full())}


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def count(model: nn.Module) -> int:
    """How many numbers train."""
    return sum(p.numel() for p in trained(model))


def move(model: nn.Module, std: float = 0.02) -> None:
    """Move the adapter off its start, to the same place in every library; `std=0` silences it.

    The k-th trained parameter of a shape gets the same numbers in all: the libraries name and order the two factors
    of a layer differently, but go through the layers in the same order.
    """
    seen: collections.Counter[tuple[int, ...]] = collections.Counter()
    with torch.no_grad():
        for parameter in trained(model):
            shape = tuple(parameter.shape)
            chance = torch.Generator().manual_seed(zlib.crc32(repr((shape, seen[shape])).encode()))
            parameter.copy_(torch.randn(shape, generator=chance) * std)
            seen[shape] += 1
