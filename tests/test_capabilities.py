"""The capability table of docs/layers.md, made by running every method on every layer kind; the test says when it is stale.

`python tests/test_capabilities.py` writes the table anew.
"""

import copy
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import peftkit
from peftkit import errors, layers, plugins

PAGE = Path(__file__).parents[1] / "docs" / "layers.md"
BEGIN, END = "<!-- table: made by tests/test_capabilities.py -->", "<!-- end of table -->"
OPERATIONS = ("start", "train", "merge", "save", "routed")
ROWS = 3


class Scaled(peftkit.Method):
    """Defines nothing but `weight`."""

    name = "weight only"
    vectors = True

    def adapter(self, site, shared=None):
        return _Scaled(site)


class _Scaled(peftkit.Adapter):
    def __init__(self, site):
        super().__init__(site)
        self.scale = site.parameter(torch.ones(site.fan_out, 1))

    def weight(self, w):
        return w * self.scale


class Experts(nn.Module):
    """Fused expert weights, each row through the expert that it names."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 5, 6) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("noi,ni->no", self.weight[torch.arange(len(x)) % 2 * 0], x)


def samples() -> dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple], str]]:
    """For each kind: how to make a layer, an input of three samples, and what to select."""
    from transformers.pytorch_utils import Conv1D as HFConv1D

    def x(*shape: int) -> tuple[Tensor, ...]:
        return (torch.randn(ROWS, *shape, dtype=torch.float64),)

    def ids() -> tuple[Tensor, ...]:
        return (torch.randint(0, 9, (ROWS, 4)),)

    def twice(*shape: int) -> tuple[Tensor, ...]:
        return x(*shape) + x(*shape)

    conv = {"stride": 2, "padding": 1, "dilation": 1, "groups": 2}
    return {
        "Linear": (lambda: nn.Linear(6, 5), lambda: x(4, 6), "**"),
        "Conv1D": (lambda: HFConv1D(5, 6), lambda: x(4, 6), "**"),
        "Bilinear": (lambda: nn.Bilinear(4, 3, 5), lambda: x(4) + x(3), "**"),
        **{f"Conv{d}d": (lambda d=d: getattr(nn, f"Conv{d}d")(4, 6, 3, padding_mode="circular", **conv), lambda d=d: x(4, *[5] * d), "**") for d in (1, 2, 3)},
        **{f"ConvTranspose{d}d": (lambda d=d: getattr(nn, f"ConvTranspose{d}d")(4, 6, 3, output_padding=1, **conv), lambda d=d: x(4, *[5] * d), "**") for d in (1, 2, 3)},
        "Embedding": (lambda: nn.Embedding(9, 5), ids, "**"),
        "EmbeddingBag": (lambda: nn.EmbeddingBag(9, 5), ids, "**"),
        "MultiheadAttention": (lambda: nn.MultiheadAttention(6, 2, batch_first=True), lambda: (x(4, 6) * 3), "in_proj_weight"),
        **{name: (lambda name=name: getattr(nn, name)(6, 4, num_layers=2, bidirectional=True, batch_first=True), lambda: x(4, 6), "**") for name in ("LSTM", "GRU", "RNN")},
        **{f"{name}Cell": (lambda name=name: getattr(nn, f"{name}Cell")(6, 4), lambda: x(6), "**") for name in ("LSTM", "GRU", "RNN")},
        "Parameter": (Experts, lambda: x(6), "weight"),
        "LayerNorm (vector)": (lambda: nn.LayerNorm(6), lambda: x(4, 6), "weight"),
        "BatchNorm1d (vector)": (lambda: nn.BatchNorm1d(6), lambda: x(6), "weight"),
    }  # fmt: skip


METHODS = {
    "LoRA": lambda: peftkit.LoRA(rank=2),
    "a method with only `weight`": Scaled,
    "Full(keep_base=True)": lambda: peftkit.Full(keep_base=True),
    "Full": peftkit.Full,
    "Frozen": peftkit.Frozen,
}


class Holder(nn.Module):
    """The layer inside a model, so that it has a path."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, *args: Tensor) -> Tensor:
        out = self.layer(*args)
        return out[0] if isinstance(out, tuple) else out


def probe(
    make: Callable[[], nn.Module], example: Callable[[], tuple], target: str, method: peftkit.Method
) -> list[str]:
    """Run each operation; return those that work, exactly. What is refused, is refused by an error of ours."""
    torch.manual_seed(0)
    base = Holder(make()).double().eval().requires_grad_(False)
    args = example()
    targets = "layer.**" if target == "**" else f"layer.{target}"
    with torch.no_grad():
        y = base(*args)
    try:
        model = peftkit.wrap(copy.deepcopy(base), method, targets=targets, name="a")
    except errors.UnsupportedLayerError:
        return []
    works = []
    with torch.no_grad():
        # What is trained in place requires grad, and torch chooses other kernels for recurrent layers that do.
        flags = {name: p.requires_grad for name, p in model.named_parameters()}
        for name, p in base.named_parameters():
            p.requires_grad_(flags[name])
        if torch.equal(model(*args), base(*args)):
            works.append("start")
        base.requires_grad_(False)
    trainable = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for p in trainable:
            p.add_(torch.randn_like(p) * 0.3)
    if trainable:
        model(*args).pow(2).sum().backward()
        if all(p.grad is not None and p.grad.isfinite().all() for p in trainable) and not torch.allclose(
            model(*args), y
        ):
            works.append("train")
    if trainable:
        peftkit.set_trainable(model)
        works += _undoable(model, base, args)
    return works


def _undoable(model: nn.Module, base: nn.Module, args: tuple) -> list[str]:
    works = []
    with torch.no_grad():
        after = model(*args)
        if any(".adapters." in name for name, _ in model.named_parameters()):
            merged = peftkit.merge(model)
            if torch.allclose(merged(*args), after, rtol=1e-10) and torch.equal(peftkit.unmerge(model)(*args), after):
                works.append("merge")
        with tempfile.TemporaryDirectory() as folder:
            peftkit.save(model, f"{folder}/a", "a")
            fresh = peftkit.load(copy.deepcopy(base), f"{folder}/a", methods=[Scaled])
        if torch.equal(fresh(*args), after):
            works.append("save")
        try:
            with peftkit.routed(model, ["a", None, "a"]):
                mixed = model(*args)
        except (errors.UnsupportedLayerError, errors.StateError):
            return works
        expected = after.clone()
        expected[1] = base(*args)[1]
        if torch.allclose(mixed, expected, rtol=1e-10):
            works.append("routed")
    return works


def cell(works: list[str], method: str) -> str:
    """What a reader needs: everything that makes sense for the method, or what is missing of it."""
    expected = {"Frozen": ["start"], "Full": ["start", "train", "save"]}.get(method, list(OPERATIONS))
    if not works:
        return "–"
    missing = [operation for operation in expected if operation not in works]
    return "all" if not missing else "all but " + ", ".join(missing)


def table() -> str:
    """The table as Markdown."""
    lines = ["| layer kind | " + " | ".join(METHODS) + " |", "| --- " * (len(METHODS) + 1) + "|"]
    for kind, (make, example, target) in samples().items():
        cells = [cell(probe(make, example, target, method()), name) for name, method in METHODS.items()]
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def test_the_table_is_what_running_it_gives():
    """docs/layers.md shows what works today; `python tests/test_capabilities.py` writes it anew."""
    text = PAGE.read_text()
    assert text[text.index(BEGIN) + len(BEGIN) : text.index(END)].strip() == table()


def test_every_kind_has_a_row():
    """A layer kind that is added appears in the table."""
    assert {kind.__name__ for kind in layers.peftkit_layers()} | {"Parameter"} <= set(samples())


@pytest.mark.parametrize("kind", [k for k in samples() if "vector" not in k])
def test_a_sample_is_of_its_kind(kind):
    """The layer that stands for a kind in the table is served by it."""
    layer = samples()[kind][0]()
    found = plugins.kind_of(type(layer))
    assert (type(found[0]).__name__ if found else "Parameter") == kind


if __name__ == "__main__":
    torch.set_num_threads(1)
    page = PAGE.read_text()
    page = re.sub(f"(?s){re.escape(BEGIN)}.*{re.escape(END)}", f"{BEGIN}\n\n{table()}\n\n{END}", page)
    PAGE.write_text(page)
    sys.stdout.write(page)
