"""Writes the files of one version of peftkit that every later one must load: `python tests/golden/make.py tests/golden/0.1`.

Run once for each released version that changes what is written, and never again for the same: the files are the contract.
"""

import sys
from pathlib import Path

import torch
from torch import nn

import peftkit
from peftkit.errors import PeftkitError


class Net(nn.Module):
    """One layer of each family that adapters go to."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.conv = nn.Conv1d(6, 6, 3, padding=1)
        self.norm = nn.LayerNorm(6)
        self.linear = nn.Linear(6, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, ids):
        x = self.conv(self.embedding(ids).mT).mT
        return self.head(torch.tanh(self.linear(self.norm(x))))


INPUT = torch.arange(10).view(2, 5) % 7
CASES = {
    "lora": peftkit.LoRA(rank=2),
    "lora-dropout": peftkit.LoRA(rank=2, alpha=3.5, dropout=0.1, rank_stabilized=True),
    "lora-pissa": peftkit.LoRA(rank=2, init="pissa"),
    "lora-olora": peftkit.LoRA(rank=2, init="olora"),
    "lora-orthogonal": peftkit.LoRA(rank=2, init="orthogonal"),
    "lora-conv": {"conv": peftkit.LoRA(rank=2), "embedding": peftkit.LoRA(rank=3)},
    "full": {"linear": "full"},
    "full-keep-base": {"**": peftkit.Full(keep_base=True)},
    "rules": {"linear": peftkit.LoRA(rank=1), "norm": peftkit.Full(keep_base=True), "head": "full"},
}


def base():
    torch.manual_seed(0)
    return Net().double().eval()


def moved(model):
    """Every trained parameter off its start, by numbers that no generator decides."""
    with torch.no_grad():
        for p in (p for p in model.parameters() if p.requires_grad):
            p.add_(torch.sin(torch.arange(p.numel(), dtype=p.dtype)).view(p.shape) / 10)
    return model


def main(folder):
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    expected = {f"base.{key}": value.clone() for key, value in base().state_dict().items()}
    cases = dict(CASES)
    for info in peftkit.methods():
        if info.package != "peftkit":
            cases[f"{info.name}"] = info.name
    for case, rules in cases.items():
        try:
            model = moved(peftkit.wrap(base(), rules, name=case))
            expected[f"output.{case}"] = model(INPUT).detach()
        except (PeftkitError, TypeError) as error:  # a method for other models, or one that trains nothing
            sys.stderr.write(f"left out: {case}: {error}\n")
            continue
        peftkit.save(model, folder / f"{case}.safetensors")
    save_file(expected, folder / "expected.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
