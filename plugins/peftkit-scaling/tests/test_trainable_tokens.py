"""Trainable tokens: the kit, which rows change and which don't, and HF PEFT as oracle."""

import copy

import pytest
import torch
from torch import nn

import peftkit
from peftkit.testing import CASES, parametrize_with_checks
from peftkit.testing.parity import compare_with_hf
from peftkit_scaling.trainable_tokens import TrainableTokens

SOME = [
    case
    for case in CASES
    if case.name in ("Linear", "Conv1D", "Embedding", "EmbeddingBag", "Parameter", "tied weights")
]


@parametrize_with_checks([TrainableTokens(tokens=[1, 3])], cases=SOME)
def test_kit(check):
    """It keeps what peftkit promises of every method."""
    check()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_hf(dtype):
    """With HF PEFT's rows it has HF PEFT's output, gradients and merged table."""
    pytest.importorskip("peft")
    ids = torch.tensor([[0, 1, 5], [5, 2, 6]])
    compare_with_hf(
        TrainableTokens(tokens=[5, 2]),
        lambda: nn.Sequential(nn.Embedding(7, 4)),
        ids,
        targets="0",
        dtype=dtype,
        config={"token_indices": [5, 2]},  # a tuple would be one index of two dimensions there
    )


@pytest.mark.parametrize(
    "layer", [nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)], ids=lambda layer: type(layer).__name__
)
def test_only_these_rows_change(layer):
    """Rows of other tokens stay as they are bit for bit, and these become what was trained."""
    before = copy.deepcopy(layer.weight)
    model = peftkit.wrap(nn.Sequential(layer), TrainableTokens(tokens=[6, 2]), targets="0")
    values = torch.arange(8.0).reshape(2, 4)
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).copy_(values)
    merged = peftkit.merge(model, keep_base=False)[0].weight
    expected = before.detach().clone()
    expected[[6, 2]] = values
    assert torch.equal(merged, expected)


@pytest.mark.parametrize("tokens", [[], [-1], [1, 1], [1.0], "12"], ids=str)
def test_fields(tokens):
    """What are no ids is refused by name."""
    with pytest.raises(peftkit.errors.FieldError, match="trainable_tokens: tokens must be a list of token ids"):
        TrainableTokens(tokens=tokens)


def test_a_token_too_many():
    """An id that the layer has no row for is refused, with the number of rows."""
    with pytest.raises(peftkit.errors.FieldError, match=r"below the 7 rows of 0\.weight, got 7"):
        peftkit.wrap(nn.Sequential(nn.Embedding(7, 4)), TrainableTokens(tokens=[7]))
