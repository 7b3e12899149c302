"""Norm tuning: the kit, and HF PEFT's numbers on every norm."""

import pytest
import torch
from torch import nn

import peftkit
from peftkit.testing import parametrize_with_checks
from peftkit.testing.parity import compare_with_hf
from peftkit_scaling.ln_tuning import LNTuning


@parametrize_with_checks([LNTuning()])
def test_kit(check):
    """It keeps what peftkit promises of every method."""
    check()


NORMS = {
    "LayerNorm": lambda: nn.LayerNorm(6),
    "LayerNorm, no bias": lambda: nn.LayerNorm(6, bias=False),
    "RMSNorm": lambda: nn.RMSNorm(6),
    "GroupNorm": lambda: nn.GroupNorm(2, 6),
    "BatchNorm1d": lambda: nn.BatchNorm1d(6),
}


# In half precision HF PEFT trains a bfloat16 copy, and peftkit a float32 one.
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_hf(norm, dtype):
    """With HF PEFT's vectors it has HF PEFT's output, gradients and merged norm."""
    pytest.importorskip("peft")
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    compare_with_hf(LNTuning(), lambda: nn.Sequential(NORMS[norm]()), x, targets="0", dtype=dtype)


def test_hf_model():
    """On a transformer, the default targets are its norms, and logits and gradients are HF PEFT's."""
    pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, use_cache=False
    )
    ids = {"input_ids": torch.randint(32, (2, 7), generator=torch.Generator().manual_seed(1))}
    build = lambda: transformers.LlamaForCausalLM(config)  # noqa: E731
    assert len(peftkit.plan(build(), LNTuning()).rows) == 5
    compare_with_hf(LNTuning(), build, ids, targets=None)


def test_default_targets():
    """Both vectors of each norm are adapted, and no other."""
    model = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Conv1d(6, 6, 1), nn.BatchNorm1d(6))
    rows = peftkit.plan(model, LNTuning()).rows
    assert [(row.path, row.weight) for row in rows] == [("1", "weight"), ("1", "bias"), ("3", "weight"), ("3", "bias")]


def test_a_matrix_is_refused():
    """A weight that is no vector is refused by name."""
    with pytest.raises(peftkit.errors.UnsupportedLayerError, match=r"0\.weight"):
        peftkit.wrap(nn.Sequential(nn.Linear(6, 6)), LNTuning(), targets="0.weight")
