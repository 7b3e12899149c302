"""HRA: the kit, HF PEFT's numbers, and reflections that are reflections."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import peftkit
from peftkit.testing import parametrize_with_checks
from peftkit.testing.parity import compare_with_hf
from peftkit_orthogonal.hra import HRA


@parametrize_with_checks([HRA(rank=4)])
def test_kit(check):
    """It keeps what peftkit promises of every method, on every layer kind."""
    check()


LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (4, 6)),
    "linear, no bias": (lambda: nn.Linear(6, 5, bias=False), (2, 4, 6)),
    "conv2d, 1x1": (lambda: nn.Conv2d(6, 5, 1), (2, 6, 3, 3)),
    "conv2d, 3x3": (lambda: nn.Conv2d(4, 5, 3, stride=2, padding=1), (2, 4, 5, 5)),
}


# In half precision HF PEFT multiplies matrices of the inputs' size squared, so there it is no oracle to a few roundings.
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("rank", [2, 8])
@pytest.mark.parametrize("layer", LAYERS)
def test_hf(layer, rank, dtype):
    """With HF PEFT's normals it has HF PEFT's output, gradients and merged weight."""
    pytest.importorskip("peft")
    make, shape = LAYERS[layer]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    compare_with_hf(HRA(rank=rank), lambda: nn.Sequential(make()), x, targets="0", dtype=dtype)


def adapter_of(layer, rank):
    return peftkit.wrap(nn.Sequential(layer), {"0": HRA(rank=rank)})[0].adapters["default"]["weight"]


@settings(max_examples=40, deadline=None)
@given(width=st.integers(2, 24), pairs=st.integers(1, 10), seed=st.integers(0, 99))
def test_it_is_the_product_of_the_reflections(width, pairs, seed):
    """At any rank, more than the width too, it is the reflections one after another, and orthogonal."""
    torch.manual_seed(seed)
    adapter = adapter_of(nn.Linear(width, 3).double(), 2 * pairs)
    with torch.no_grad():
        adapter.normals.normal_()
        left, right = adapter.product()
        product = torch.eye(width).double() + left @ right
        wanted = torch.eye(width).double()
        for u in adapter.normals.T:
            wanted = wanted @ (torch.eye(width) - 2 * torch.outer(u, u) / (u @ u))
    torch.testing.assert_close(product, wanted, atol=1e-11, rtol=0)
    torch.testing.assert_close(product.T @ product, torch.eye(width).double(), atol=1e-11, rtol=0)


def test_an_embedding_is_reflected_in_the_space_of_its_dimensions():
    """Each row of the table is multiplied by the reflections, so the parameters do not grow with its rows."""
    torch.manual_seed(0)
    adapter = adapter_of(layer := nn.Embedding(100, 6).double(), 4)
    assert adapter.normals.shape == (6, 4)
    with torch.no_grad():
        adapter.normals.normal_()
        left, right = adapter.product()
        wanted = layer.weight @ (torch.eye(6) + left @ right)
        torch.testing.assert_close(layer(torch.arange(100)), wanted, atol=1e-12, rtol=0)


def test_a_single_input_is_refused():
    """A pair of reflections of one input changes nothing, and the error says which layer has one."""
    with pytest.raises(peftkit.errors.UnsupportedLayerError, match=r"0\.weight has a single input"):
        peftkit.wrap(nn.Sequential(nn.Linear(1, 4)), {"0": HRA()})


@pytest.mark.parametrize("rank", [0, -2, 3, 2.0, True, "2", None])
def test_fields(rank):
    """A rank that is not even is refused, as is any other wrong value."""
    with pytest.raises(peftkit.errors.FieldError, match=r"hra: rank must be an? (even )?whole number"):
        HRA(rank=rank)
