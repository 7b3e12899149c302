"""LoKr: the kit, HF PEFT's numbers, and factors for every number of outputs and inputs."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import peftkit
from peftkit.testing import CASES, parametrize_with_checks
from peftkit.testing.parity import compare_with_hf
from peftkit_kronecker.lokr import LoKr, split


@parametrize_with_checks([LoKr(rank=1, alpha=1.0)])
def test_kit(check):
    """It keeps what peftkit promises of every method, on every layer kind."""
    check()


@parametrize_with_checks(
    [LoKr(rank=1, alpha=1.0, decompose_both=True, tucker=True), LoKr(rank=4)],
    cases=[case for case in CASES if "Conv" in case.name or case.name in ("Linear", "Parameter")],
)
def test_kit_variants(check):
    """So do the form with every part a product, on convolutions with a core, and the form with none."""
    check()


LAYERS = {
    "linear": (lambda: nn.Linear(12, 10), (4, 12)),
    "linear, primes": (lambda: nn.Linear(7, 5, bias=False), (2, 4, 7)),
    "conv1d": (lambda: nn.Conv1d(8, 12, 3, stride=2, padding=1, groups=2), (2, 8, 6)),
    "conv2d": (lambda: nn.Conv2d(8, 12, (3, 2), stride=2, padding=1), (2, 8, 5, 5)),
    "conv2d, groups": (lambda: nn.Conv2d(8, 12, 3, dilation=2, groups=2), (2, 8, 6, 6)),
    "conv2d, 1x1": (lambda: nn.Conv2d(8, 12, 1), (2, 8, 3, 3)),
}


OPTIONS = [{}, {"factor": 2}, {"factor": 4}, {"decompose_both": True}, {"tucker": True}, {"tucker": True, "factor": 2}]
# HF PEFT's Conv1d is left out where `second` is whole (there it aligns outputs with inputs, and inputs with kernels) and
# where it has a core (torch.kron refuses the strides that HF gives it). `test_conv1d_by_definition` has both.
COMPARED = [
    (layer, rank, options)
    for layer in LAYERS
    for rank in (1, 6)
    for options in OPTIONS
    if layer != "conv1d" or (rank == 1 and "tucker" not in options)
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("layer, rank, options", COMPARED, ids=str)
def test_hf(layer, rank, options, dtype):
    """With HF PEFT's factors it has HF PEFT's output, gradients and merged weight."""
    pytest.importorskip("peft")
    make, shape = LAYERS[layer]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    method = LoKr(rank=rank, alpha=4.5, **options)
    compare_with_hf(method, lambda: nn.Sequential(make()), x, targets="0", dtype=dtype)


@settings(max_examples=60, deadline=None)
@given(
    out=st.integers(1, 40),
    inputs=st.integers(1, 40),
    rank=st.integers(1, 6),
    factor=st.sampled_from([-1, 1, 2, 3, 8]),
    both=st.booleans(),
)
def test_any_shape(out, inputs, rank, factor, both):
    """For any number of outputs and inputs, primes too, the update is the Kronecker product of two matrices."""
    method = LoKr(rank=rank, alpha=3.0, factor=factor, decompose_both=both)
    layer = nn.Linear(inputs, out).double()
    adapter = peftkit.wrap(nn.Sequential(layer), {"0": method})[0].adapters["default"]["weight"]
    with torch.no_grad():
        for p in adapter.parameters():
            p.normal_()
        state = adapter.state_dict()
        first = state["first"] if "first" in state else state["first_up"] @ state["first_down"]
        second = state["second"] if "second" in state else state["second_up"] @ state["second_down"]
        update = adapter.weight(torch.zeros(out, inputs).double())
    torch.testing.assert_close(update, 3.0 / rank * torch.kron(first, second), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("tucker", [False, True], ids=["matrix", "core"])
def test_conv1d_by_definition(tucker):
    """A convolution's update pairs the factors of outputs and of channels, with the kernels kept whole in `second`."""
    torch.manual_seed(0)
    layer = nn.Conv1d(8, 12, 3).double()
    method = LoKr(rank=1 if tucker else 8, alpha=2.0, tucker=tucker)
    adapter = peftkit.wrap(nn.Sequential(layer), {"0": method})[0].adapters["default"]["weight"]
    with torch.no_grad():
        for p in adapter.parameters():
            p.normal_()
        state = adapter.state_dict()
        if tucker:
            core, up, down = (state[f"second_{name}"] for name in ("core", "up", "down"))
            second = torch.einsum("ijk,io,jc->ock", core, up, down)
        else:
            second = state["second"].view(4, 4, 3)
        wanted = 2.0 / method.rank * torch.stack([torch.kron(state["first"], second[:, :, k]) for k in range(3)], -1)
        update = adapter.weight(torch.zeros(12, 24).double())
    torch.testing.assert_close(update.view(12, 8, 3), wanted, atol=1e-12, rtol=1e-12)


def test_splits():
    """Every size is split as HF PEFT splits it, for every factor."""
    pytest.importorskip("peft")
    from peft.tuners.lokr.layer import factorization

    for size in range(1, 200):
        for factor in (-1, *range(1, 40)):
            assert split(size, factor) == tuple(factorization(size, factor))


@pytest.mark.parametrize(
    "field, value",
    [
        ("rank", 0),
        ("rank", 2.0),
        ("alpha", 0),
        ("alpha", math.inf),
        ("factor", 0),
        ("factor", -2),
        ("factor", 2.0),
        ("decompose_both", 1),
        ("tucker", "no"),
    ],
)
def test_fields(field, value):
    """A wrong value is refused by name."""
    with pytest.raises(peftkit.errors.FieldError, match=f"lokr: {field} must be"):
        LoKr(**{field: value})
