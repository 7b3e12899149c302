"""How each library is called for the same work: LoRA, or another method, on all linear layers but the head.

A library that isn't installed makes its sides unavailable (`ImportError`), and the report leaves them out. alpha is 16
everywhere, so that the same factors mean the same update.
"""

import collections
import contextlib
import zlib
from pathlib import Path

import torch
from torch import nn

import peftkit
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


LIBRARIES = {each.name: each for each in (Floor(), Peftkit(), HuggingFace(), Loralib(), Lycoris(), Full())}


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
