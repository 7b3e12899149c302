"""OFT: the kit, HF PEFT's numbers, and rotations that are rotations."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import peftkit
from peftkit.testing import CASES, parametrize_with_checks
from peftkit.testing.parity import compare_with_hf
from peftkit_orthogonal.oft import OFT, _block_size

NEUMANN = OFT(block_size=3, share_blocks=True, neumann=True)
SOME = [case for case in CASES if case.name in ("Linear", "Conv2d", "Embedding", "Parameter", "language model")]


@parametrize_with_checks([OFT(block_size=4)])
def test_kit(check):
    """It keeps what peftkit promises of every method, on every layer kind."""
    check()


@parametrize_with_checks([NEUMANN, OFT(block_size=4, constrained=True, eps=0.5)], cases=SOME)
def test_kit_variants(check):
    """So do a rotation made by a series and shared, and one that is kept small."""
    check()


LAYERS = {
    "linear": (lambda: nn.Linear(12, 5), lambda: torch.randn(4, 12), ("output", "gradients", "merged")),
    "embedding": (lambda: nn.Embedding(7, 12), lambda: torch.randint(7, (3, 4)), ("output", "gradients", "merged")),
    "conv2d, 1x1": (lambda: nn.Conv2d(12, 5, 1), lambda: torch.randn(2, 12, 3, 3), ("output", "gradients", "merged")),
    # HF PEFT rotates the input's patches, then adds up those that overlap: its convolution is not the base's even
    # before training, and not what it merges. What it merges is the definition.
    "conv2d, 3x3": (lambda: nn.Conv2d(4, 5, 3, padding=1), lambda: torch.randn(2, 4, 5, 5), ("merged",)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("neumann", [False, True], ids=["exact", "series"])
@pytest.mark.parametrize("share_blocks", [False, True], ids=["each", "shared"])
@pytest.mark.parametrize("block_size", [4, 5])
@pytest.mark.parametrize("layer", LAYERS)
def test_hf(layer, block_size, share_blocks, neumann, dtype):
    """With HF PEFT's generators it has HF PEFT's output, gradients and merged weight; 5 divides no width here."""
    pytest.importorskip("peft")
    make, example, parts = LAYERS[layer]
    torch.manual_seed(1)
    method = OFT(block_size=block_size, share_blocks=share_blocks, neumann=neumann)
    compare_with_hf(method, lambda: nn.Sequential(make()), example(), targets="0", dtype=dtype, parts=parts)


def test_hf_constrained():
    """Constrained, three steps of training end where HF PEFT's end."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    ours, x = nn.Sequential(nn.Linear(8, 4)), torch.randn(6, 8)
    config = peft.OFTConfig(r=0, oft_block_size=4, target_modules=["0"], coft=True, eps=0.1, use_cayley_neumann=False)
    theirs = nn.Sequential(nn.Linear(8, 4))
    theirs.load_state_dict(ours.state_dict())
    theirs = peft.get_peft_model(theirs, config)
    peftkit.wrap(ours, {"0": OFT(block_size=4, constrained=True, eps=0.1)})
    for model in (ours, theirs):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    generator = ours[0].adapters["default"]["weight"].generator.detach()
    torch.testing.assert_close(math.sqrt(2) * generator.norm(dim=-1), torch.full((2,), 0.1 / math.sqrt(2)))
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)


CONVOLUTIONS = {
    "conv1d": lambda: nn.Conv1d(4, 6, 3, dilation=2, groups=2),
    "conv2d": lambda: nn.Conv2d(4, 6, (3, 2), stride=2, padding=1, padding_mode="reflect"),
    "transposed": lambda: nn.ConvTranspose1d(4, 6, 3, stride=2),
}


@pytest.mark.parametrize("layer", CONVOLUTIONS)
def test_convolution_by_definition(layer):
    """A convolution's kernels, flattened, are rotated by (I - Q) (I + Q)^-1: output and gradient."""
    torch.manual_seed(0)
    base = CONVOLUTIONS[layer]().double().requires_grad_(False)
    kernel = math.prod(base.kernel_size)
    model = peftkit.wrap(nn.Sequential(base), {"0": OFT(block_size=kernel * 2)})
    generator = model[0].adapters["default"]["weight"].generator
    with torch.no_grad():
        generator.normal_()
    v = generator.detach().clone().requires_grad_()
    rows, columns = torch.triu_indices(kernel * 2, kernel * 2, 1)
    blocks = []
    for vector in v:
        q = torch.zeros(kernel * 2, kernel * 2).double().index_put((rows, columns), vector)
        q = q - q.T
        blocks.append((torch.eye(kernel * 2) - q) @ torch.inverse(torch.eye(kernel * 2) + q))
    rotation = torch.block_diag(*blocks)
    transposed = isinstance(base, nn.ConvTranspose1d)
    w = base.weight.transpose(0, 1) if transposed else base.weight
    turned = (w.flatten(1) @ rotation.T).view(w.shape)
    x = torch.randn(2, 4, *[7, 6][: len(base.kernel_size)]).double()
    if transposed:
        wanted = F.conv_transpose1d(x, turned.transpose(0, 1), base.bias, stride=2)
    else:
        wanted = base._conv_forward(x, turned, base.bias)
    y = model(x)
    torch.testing.assert_close(y, wanted, atol=1e-12, rtol=1e-12)
    y.square().sum().backward()
    wanted.square().sum().backward()
    torch.testing.assert_close(generator.grad, v.grad, atol=1e-11, rtol=1e-11)


@settings(max_examples=40, deadline=None)
@given(
    width=st.integers(2, 40),
    block_size=st.integers(2, 40),
    share=st.booleans(),
    size=st.floats(0.01, 100),
    seed=st.integers(0, 99),
)
def test_a_rotation_is_orthogonal(width, block_size, share, size, seed):
    """However large the generators are, the rows keep their lengths and the angles between them."""
    torch.manual_seed(seed)
    model = peftkit.wrap(nn.Sequential(nn.Linear(width, 3)), {"0": OFT(block_size=block_size, share_blocks=share)})
    adapter = model[0].adapters["default"]["weight"]
    with torch.no_grad():
        adapter.generator.normal_(std=size)
        turn = adapter.double().turn() + torch.eye(adapter.size)
        w = model[0].weight.detach().double()
        adapted = adapter.weight(w)
    torch.testing.assert_close(turn.mT @ turn, torch.eye(adapter.size).double().expand_as(turn), atol=1e-10, rtol=0)
    torch.testing.assert_close(adapted @ adapted.T, w @ w.T, atol=1e-10, rtol=1e-10)


def test_a_rotation_is_orthogonal_in_float32():
    """In the precision in which it is trained, to 1e-6."""
    torch.manual_seed(0)
    model = peftkit.wrap(nn.Sequential(nn.Linear(64, 3)), {"0": OFT()})
    adapter = model[0].adapters["default"]["weight"]
    with torch.no_grad():
        adapter.generator.normal_(std=0.1)
        turn = adapter.turn() + torch.eye(32)
    assert not torch.equal(turn, torch.eye(32).expand_as(turn))
    assert (turn.mT @ turn - torch.eye(32)).abs().max() < 1e-6


@pytest.mark.parametrize("terms, error", [(4, {6: -1}), (5, {4: -2, 8: 1}), (16, {})])
def test_how_far_the_series_is_from_a_rotation(terms, error):
    """R^T R - I is -Q^6 with four terms, -2 Q^4 + Q^8 with five, and below 1e-14 with sixteen."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 3).double()
    peftkit.wrap(nn.Sequential(layer), {"0": OFT(block_size=4, neumann=True, neumann_terms=terms)})
    adapter = layer.adapters["default"]["weight"]
    with torch.no_grad():
        adapter.generator.normal_(std=0.05)
        turn = adapter.turn()[0] + torch.eye(4)
    rows, columns = torch.triu_indices(4, 4, 1)
    q = torch.zeros(4, 4).double().index_put((rows, columns), adapter.generator[0].detach())
    q = q - q.T
    wanted = torch.eye(4).double() + sum(
        factor * torch.linalg.matrix_power(q, power) for power, factor in error.items()
    )
    torch.testing.assert_close(turn.T @ turn, wanted, atol=1e-14, rtol=0)


def test_block_sizes():
    """The block size is the divisor that HF PEFT falls back to, but never 1, which would leave nothing to train."""
    pytest.importorskip("peft")
    from peft.tuners.oft.layer import OFTLayer

    for width in range(2, 130):
        for wanted in range(2, 70):
            theirs = OFTLayer.adjust_oft_parameters(None, width, wanted) if width % wanted else wanted
            ours = _block_size(width, wanted)
            assert width % ours == 0
            assert ours == theirs or (theirs == 1 and ours == min(n for n in range(2, width + 1) if width % n == 0))


def test_a_single_input_is_refused():
    """One input cannot be rotated with anything, and the error says which layer has one."""
    with pytest.raises(peftkit.errors.UnsupportedLayerError, match=r"0\.weight has a single input"):
        peftkit.wrap(nn.Sequential(nn.Linear(1, 4)), {"0": OFT()})


@pytest.mark.parametrize(
    "field, value",
    [
        ("block_size", 1),
        ("block_size", 4.0),
        ("block_size", True),
        ("share_blocks", 1),
        ("neumann", "no"),
        ("neumann_terms", 3),
        ("constrained", None),
        ("eps", 0),
        ("eps", math.inf),
        ("eps", "1"),
    ],
)
def test_fields(field, value):
    """A wrong value is refused by name."""
    with pytest.raises(peftkit.errors.FieldError, match=f"oft: {field} must be"):
        OFT(**{field: value})
