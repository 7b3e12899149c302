"""A speaker encoder of three LSTM layers (Resemblyzer's, trained on many people) learns to tell eight voices apart.

The weights are real, the voices are not: each is a tone with harmonics, of its own pitch, tilt and breathiness, through
resonances of its own vocal tract length, which says random vowels. So nothing is claimed about people. What is measured
is a recurrent network with pretrained features that help, on few examples.
"""

import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peftkit
from peftkit.workload import Metric, Split
from peftkit.workloads import assets
from peftkit.workloads.needs import device_of

RATE, HOP, WINDOW, BANDS = 16_000, 160, 400, 40
FRAMES = 60
"""Of one utterance: 0.6 seconds."""

VOICES = 8
TRAIN, VALIDATION, TEST = 96, 160, 800
"""Utterances, as many of each voice."""

VOWELS = torch.tensor([[730.0, 1090, 2440], [270, 2290, 3010], [300, 870, 2240], [530, 1840, 2480], [570, 840, 2410]])
"""Resonances in hertz of five vowels, averages of men's (Peterson & Barney 1952)."""


class VoiceLstm(peftkit.Workload):
    """An LSTM with a new head."""

    name = "lstm-voices"
    summary = "a pretrained LSTM speaker encoder learns to tell eight synthetic voices apart from 96 utterances"
    per_step = 16
    targets = (nn.LSTM, "linear")
    head = "classifier"
    metric = Metric(name="accuracy", unit="%", higher_is_better=True, items=TEST)
    steps = 60
    forgets = "cosine to the base's embeddings"

    def prepare(self) -> None:
        assets.unpacked(assets.SPEAKERS)

    def model(self) -> nn.Module:
        weights = assets.unpacked(assets.SPEAKERS) / "resemblyzer" / "pretrained.pt"
        state = torch.load(weights, map_location="cpu", weights_only=True)["model_state"]
        model = SpeakerEncoder(VOICES)
        model.load_state_dict({k: v for k, v in state.items() if not k.startswith("similarity")}, strict=False)
        return model

    def batches(self, seed: int) -> Iterator[Any]:
        spectra, labels = utterances("train")
        generator = torch.Generator().manual_seed(seed)
        while True:
            for rows in torch.randperm(TRAIN, generator=generator).view(-1, self.per_step):
                yield spectra[rows], labels[rows]

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        spectra, labels = batch
        return F.cross_entropy(model(spectra), labels)

    def evaluate(self, model: nn.Module, split: Split) -> float:
        spectra, labels = utterances(split)
        logits = torch.cat([model(part.to(device_of(model))).cpu() for part in torch.split(spectra, 200)])
        return 100 * (logits.argmax(1) == labels).float().mean().item()

    def forgetting(self, model: nn.Module) -> float:
        """How near the embeddings of other voices are to what the base makes of them: 1 where nothing is forgotten."""
        spectra, _ = utterances("others")
        return F.cosine_similarity(_embeddings(model, spectra), _embeddings(self.model().eval(), spectra)).mean().item()


class SpeakerEncoder(nn.Module):
    """Mel spectra `[utterances, frames, 40]` to logits; parameters are named as in the file, but for the new head."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(BANDS, 256, 3, batch_first=True)
        self.linear = nn.Linear(256, 256)
        self.classifier = nn.Linear(256, classes)

    def forward(self, spectra: Tensor) -> Tensor:
        _, (hidden, _) = self.lstm(spectra)
        embedding = F.normalize(self.linear(hidden[-1]).relu(), dim=1)
        logits: Tensor = self.classifier(
            16 * embedding
        )  # of length 1 otherwise, which a linear head learns slowly from
        return logits


def _embeddings(model: nn.Module, spectra: Tensor) -> Tensor:
    """What goes into the head."""
    found: list[Tensor] = []
    handle = model.get_submodule("classifier").register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
    try:
        model(spectra.to(device_of(model)))
    finally:
        handle.remove()
    return found[0].cpu()


@functools.cache
def utterances(part: str) -> tuple[Tensor, Tensor]:
    """Mel spectra `[utterances, frames, 40]` and whose voice each is; `"others"` are voices of another draw."""
    seed, count = {"train": (1, TRAIN), "validation": (2, VALIDATION), "test": (3, TEST), "others": (4, 64)}[part]
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % VOICES
    voices = _voices(10 if part == "others" else 0)
    waves = torch.stack([_utterance(voices[label], generator) for label in labels.tolist()])
    return mel(waves), labels


def _voices(seed: int) -> Tensor:
    """Pitch in hertz, factor on resonances, breath and tilt of each voice: near one another, so that it is not easy."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(VOICES, 4, generator=generator)
    low, high = torch.tensor([100.0, 0.9, 0.02, 0.4]), torch.tensor([180.0, 1.2, 0.2, 1.4])
    return low + (high - low) * drawn


def _utterance(voice: Tensor, generator: torch.Generator) -> Tensor:
    """Four random vowels at a wandering pitch, as a wave `[samples]` of random loudness, with noise."""
    pitch, factor, breath, tilt = voice.tolist()
    count = HOP * (FRAMES - 1)
    wander = torch.randn(6, generator=generator)[None, None]
    bend = F.interpolate(wander, count, mode="linear", align_corners=True)[0, 0]
    phase = (pitch * (1 + 0.12 * bend) / RATE).cumsum(0)
    harmonics = torch.arange(1, 31.0)
    vowels = VOWELS[torch.randint(len(VOWELS), (4,), generator=generator)].repeat_interleave(math.ceil(count / 4), 0)
    vowels = F.avg_pool1d(F.pad(vowels[:count].T, (400, 400), mode="replicate"), 801, 1).T * factor  # [samples, 3]
    hertz = pitch * harmonics
    gains = (1 / (1 + ((hertz[None, :, None] - vowels[::HOP, None]) / 90) ** 2)).sum(2) / harmonics**tilt
    gains = gains.repeat_interleave(HOP, 0)[:count]
    wave = (gains * torch.sin(2 * math.pi * phase[:, None] * harmonics)).sum(1)
    wave = wave / wave.std()
    noise = torch.randn(count, generator=generator)
    level = 0.03 * (0.5 + torch.rand(1, generator=generator))
    made: Tensor = level * (wave + (breath + 0.3) * noise)
    return made


def mel(waves: Tensor) -> Tensor:
    """Power spectra `[waves, frames, 40]` on Slaney's mel scale, which the encoder was trained with."""
    spectrum = torch.stft(
        waves, WINDOW, HOP, window=torch.hann_window(WINDOW), pad_mode="constant", return_complex=True
    ).abs()
    return torch.einsum("bf,wft->wtb", _filters(), spectrum**2)


@functools.cache
def _filters() -> Tensor:
    """Triangles of area 1, `[40, frequencies]`; the scale is linear below 1 kHz and logarithmic above."""
    top = 15 + 27 * math.log(RATE / 2 / 1000) / math.log(6.4)
    mels = torch.linspace(0, top, BANDS + 2, dtype=torch.float64)
    linear, above = mels * 200 / 3, 1000 * torch.exp((mels - 15) * math.log(6.4) / 27)
    edges = torch.where(mels < 15, linear, above)
    hertz = torch.linspace(0, RATE / 2, WINDOW // 2 + 1, dtype=torch.float64)
    rising = (hertz - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - hertz) / (edges[2:] - edges[1:-1])[:, None]
    triangles = torch.minimum(rising, falling).clamp_min(0)
    return (triangles * (2 / (edges[2:] - edges[:-2]))[:, None]).float()


@peftkit.hookimpl
def peftkit_workloads() -> list[type[peftkit.Workload]]:
    """The workload of this module."""
    return [VoiceLstm]
