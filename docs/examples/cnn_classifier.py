"""Adapt an image classifier: LoRA on its convolutions, a head trained in full, then a plain model again.

Merging with `keep_base=False` folds the adapters into the weights and leaves nothing of peftkit behind: the result is
saved with torch, and loaded where peftkit is not installed.

The images are synthetic: a horizontal, a vertical or a diagonal bar in noise.
"""

import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import peftkit

SIZE = 12


class Classifier(nn.Module):
    """Two convolutions, a mean over the places, and a linear head for three classes."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, kernel_size=5, padding=2), nn.ReLU(), nn.Conv2d(16, 32, kernel_size=3), nn.ReLU()
        )
        self.head = nn.Linear(32, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images `[n, 1, SIZE, SIZE]` to logits `[n, 3]`."""
        return self.head(self.features(images).mean(dim=(2, 3)))


def images(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy images `[count, 1, SIZE, SIZE]` of one bar each, and its direction `[count]`."""
    labels = torch.randint(3, (count,))
    pixels = 0.3 * torch.randn(count, SIZE, SIZE)
    for i, place in enumerate(torch.randint(2, SIZE - 2, (count,)).tolist()):
        bar = torch.zeros(SIZE, SIZE)
        bar[place] = 1
        pixels[i] += (bar, bar.T, torch.eye(SIZE).roll(place, dims=0))[labels[i]]
    return pixels.unsqueeze(1), labels


def accuracy(model: nn.Module, x: torch.Tensor, labels: torch.Tensor) -> float:
    """The share of images whose class the model gets right."""
    with torch.no_grad():
        return (model(x).argmax(dim=1) == labels).float().mean().item()


def main() -> None:
    """Wrap by a class and by a name, train, merge for good, save with torch."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the tensors are too small to be worth sharing out
    model = Classifier()

    # A selector can be a class. The first rule that matches a layer decides, and the rest of the model is frozen.
    rules = {nn.Conv2d: peftkit.LoRA(rank=8), "head": "full"}
    print(peftkit.plan(model, rules))
    peftkit.wrap(model, rules)

    optimizer = torch.optim.AdamW(peftkit.param_groups(model, lr=1e-2))
    for _ in range(200):
        x, labels = images(64)
        loss = F.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    model.eval()
    x, labels = images(500)
    reached = accuracy(model, x, labels)
    print(f"accuracy on new images: {reached:.1%}")

    # Fold the adapters in, and drop the original weights.
    with torch.no_grad():
        before = model(x)
        peftkit.merge(model, keep_base=False)
        error = ((model(x) - before).norm() / before.norm()).item()
    print(f"merged: relative difference {error:.1e}")

    # What is left is the model's own class with its own keys, so torch alone can save and load it.
    plain = Classifier().eval()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "classifier.pt")
        torch.save(model.state_dict(), path)
        plain.load_state_dict(torch.load(path, weights_only=True))
    with torch.no_grad():
        identical = torch.equal(plain(x), model(x))
    print("plain model loaded without peftkit, identical:", identical)

    if not reached > 0.9:
        raise SystemExit("the task was not learned")
    if not error < 1e-5:
        raise SystemExit("merging changed what the model computes")
    if not identical:
        raise SystemExit("the saved model computes something else")


if __name__ == "__main__":
    main()
