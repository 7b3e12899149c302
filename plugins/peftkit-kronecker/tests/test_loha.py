"""LoHa: the kit, HF PEFT's numbers, and the rank of its update."""

import math

import pytest
import torch
from torch import nn

import peftkit
from peftkit.testing import CASES, parametrize_with_checks
from peftkit.testing.parity import PARTS, compare_with_hf
from peftkit_kronecker.loha import LoHa


@parametrize_with_checks([LoHa(rank=2)])
def test_kit(check):
    """It keeps what peftkit promises of every method, on every layer kind."""
    check()


@parametrize_with_checks([LoHa(rank=2, tucker=True)], cases=[case for case in CASES if "Conv" in case.name])
def test_kit_tucker(check):
    """So does the form with a core, on every convolution; the kit differentiates it by finite differences too."""
    check()


LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (4, 6)),
    "linear, no bias": (lambda: nn.Linear(6, 5, bias=False), (2, 4, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 6)),
    "conv1d, groups": (lambda: nn.Conv1d(4, 6, 3, dilation=2, groups=2), (2, 4, 6)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), stride=2, padding=1), (2, 4, 5, 5)),
    "conv2d, groups": (lambda: nn.Conv2d(4, 6, 3, dilation=2, groups=2), (2, 4, 6, 6)),
    "conv2d, 1x1": (lambda: nn.Conv2d(4, 6, 1), (2, 4, 3, 3)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tucker", [False, True], ids=["products", "cores"])
@pytest.mark.parametrize("layer", LAYERS)
def test_hf(layer, tucker, dtype):
    """With HF PEFT's factors it has HF PEFT's output, gradients and merged weight."""
    pytest.importorskip("peft")
    make, shape = LAYERS[layer]
    # HF PEFT writes the backward of the form with cores by hand, and mixes up the two products in it: its gradients of
    # both `up` are not the derivatives of its output. HF also rounds the scale to float32; 4.5 / 3 is exact there.
    parts = ("output", "merged") if tucker and "conv" in layer and "1x1" not in layer else PARTS
    compare_with_hf(
        LoHa(rank=3, alpha=4.5, tucker=tucker),
        lambda: nn.Sequential(make()),
        torch.randn(shape, generator=torch.Generator().manual_seed(1)),
        targets="0",
        dtype=dtype,
        parts=parts,
    )


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_rank_of_the_update(rank):
    """Two products of rank r make an update of rank r squared."""
    torch.manual_seed(0)
    layer = nn.Linear(20, 16, bias=False).double()
    model = peftkit.wrap(nn.Sequential(layer), {"0": LoHa(rank=rank)})
    adapter = layer.adapters["default"]["weight"]
    with torch.no_grad():
        adapter.down_2.normal_()
        update = adapter.weight(torch.zeros(16, 20).double())
    assert torch.linalg.matrix_rank(update) == rank**2
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * rank * (16 + 20)


@pytest.mark.parametrize(
    "field, value",
    [
        ("rank", 0),
        ("rank", 2.0),
        ("rank", True),
        ("alpha", 0),
        ("alpha", math.nan),
        ("alpha", "8"),
        ("tucker", 1),
    ],
)
def test_fields(field, value):
    """A wrong value is refused by name."""
    with pytest.raises(peftkit.errors.FieldError, match=f"loha: {field} must be"):
        LoHa(**{field: value})
