"""The low-rank linear layer against its definition: values, gradients, dropout, dtypes, and what it keeps for backward."""

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import peftkit
from peftkit import kernels

M, K, N, R = (2, 3), 6, 5, 2


def operands(dtype=torch.float64, *, bias=True, factors=None):
    torch.manual_seed(0)
    x = torch.randn(*M, K, dtype=dtype, requires_grad=True)
    w, b = torch.randn(N, K, dtype=dtype), torch.randn(N, dtype=dtype) if bias else None
    up = torch.randn(N, R, dtype=factors or dtype, requires_grad=True)
    down = torch.randn(R, K, dtype=factors or dtype, requires_grad=True)
    return x, w, b, up, down


def seeded(dropout):
    """The layer as a function that draws the same mask each time."""

    def run(x, w, b, up, down):
        torch.manual_seed(3)
        return kernels.linear(x, w, b, up, down, 0.7, dropout)

    return run


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("trained", ["all", "no input", "up", "down", "bias"])
def test_gradients_are_slopes(dropout, bias, trained):
    """gradcheck in float64, whatever it is that asks for a gradient."""
    x, w, b, up, down = operands(bias=bias)
    for name, t in (("input", x), ("up", up), ("down", down)):
        t.requires_grad_(trained in ("all", name) or (trained == "no input" and name != "input"))
    if b is not None and trained in ("all", "bias"):
        b.requires_grad_(True)
    elif trained == "bias":
        x.requires_grad_(True)
    assert torch.autograd.gradcheck(seeded(dropout), (x, w, b, up, down))


@pytest.mark.parametrize("trained", ["all", "no input", "up", "down"])
def test_the_function_without_dropout(trained):
    """The path that mixed dtypes take has the right gradients in float64 too."""
    x, w, b, up, down = operands()
    for name, t in (("input", x), ("up", up), ("down", down)):
        t.requires_grad_(trained in ("all", name) or (trained == "no input" and name != "input"))

    def call(*args):
        return kernels._LowRankLinear.apply(*args, 0.7, None, torch.float64)

    assert torch.autograd.gradcheck(call, (x, w, b, up, down))


def test_it_is_the_definition():
    """`x @ W.T + b + scale * x @ down.T @ up.T`; with dropout, of the input times the mask over what is kept."""
    x, w, b, up, down = operands()
    torch.testing.assert_close(kernels.linear(x, w, b, up, down, 0.7, 0.0), x @ (w + 0.7 * up @ down).mT + b)

    torch.manual_seed(3)
    noise = kernels.draw(x, 0.4)
    mask = kernels.keep_mask(x.shape, noise)
    assert 0 < mask.sum() < mask.numel()
    expected = x @ w.mT + b + 0.7 * (x * mask * 256 / (256 - noise.threshold)) @ down.mT @ up.mT
    torch.testing.assert_close(seeded(0.4)(x, w, b, up, down), expected)
    with torch.no_grad():
        torch.testing.assert_close(seeded(0.4)(x, w, b, up, down), expected)


@pytest.mark.parametrize("probability", [0.001, 0.05, 0.1, 0.5, 0.9, 0.996])
def test_dropout_drops_as_often_as_asked_and_keeps_the_mean(probability):
    """Over many draws the share of zeros is the probability, and the kept ones make up for it."""
    torch.manual_seed(0)
    draws = [kernels.draw(torch.empty(40, 50), probability) for _ in range(400)]
    masks = torch.stack([kernels.keep_mask((40, 50), noise).float() for noise in draws])
    spread = 5 * (probability * (1 - probability) / masks.numel()) ** 0.5 + 5 * 0.5 / 256 / len(draws) ** 0.5
    assert abs(1 - masks.mean().item() - probability) < spread
    raised = torch.tensor([noise.factor for noise in draws])
    if probability <= 0.9:
        assert abs((masks.mean((1, 2)) * raised).mean().item() - 1) < 0.02


def test_dropout_of_nearly_everything():
    """A probability nearer to 1 than a byte can say is torch's own dropout; the mean is kept there too."""
    x, w, b, up, down = operands()
    torch.manual_seed(0)
    with torch.no_grad():
        base = F.linear(x, w, b)
        updates = torch.stack([kernels.linear(x, w, b, up, down, 0.7, 0.998) - base for _ in range(500)])
        full = 0.7 * x @ down.mT @ up.mT
    assert (updates.abs().amax((1, 2, 3)) == 0).float().mean() > 0.9
    assert updates.abs().max() > 100 * full.abs().mean()


def test_the_mask_has_no_pattern():
    """Rows, columns, byte lanes, neighbours and other seeds are independent, to five standard deviations."""
    n, width = 4096, 512
    torch.manual_seed(7)
    mask, other = (
        kernels.keep_mask((n, width), kernels.draw(torch.empty(n, width), 0.5)._replace(threshold=128))
        for _ in range(2)
    )
    mask, other = mask.double() - 0.5, other.double().flatten() - 0.5
    for sums, count in ((mask.sum(0), n), (mask.sum(1), width), (mask.view(-1, 8).sum(0), n * width // 8)):
        assert sums.abs().max() < 5.5 * 0.5 * count**0.5
    flat = mask.flatten()
    for lag in (1, 2, 7, 8, 9, 64, 511, 512, 513, 4096):
        assert abs((flat[lag:] * flat[:-lag]).sum()) < 5 * 0.25 * flat.numel() ** 0.5
    assert abs((flat * other).sum()) < 5 * 0.25 * flat.numel() ** 0.5


def model(dropout, dtype=torch.float32):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 8)).to(dtype)
    net = peftkit.wrap(net, peftkit.LoRA(rank=2, dropout=dropout, init="gaussian"), targets=["0", "2"])
    with torch.no_grad():
        for p in net.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape) / 4)
    return net.train()


def gradients(net):
    return [p.grad.clone() for p in net.parameters() if p.requires_grad]


@pytest.mark.parametrize("reentrant", [False, True])
def test_dropout_repeats_itself_under_a_checkpoint(reentrant):
    """A seed gives one result, and a block that runs again in backward drops the same elements."""
    x = torch.randn(5, 16, requires_grad=True)
    results = []
    for wrapped in (False, True):
        net = model(0.4)
        torch.manual_seed(5)
        y = checkpoint(net, x, use_reentrant=reentrant) if wrapped else net(x)
        y.square().sum().backward()
        results.append([y.detach(), *gradients(net)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    torch.manual_seed(5)
    first = model(0.4)(x)
    assert not torch.equal(first, model(0.0)(x))


def saved_bytes(net, x):
    """Bytes of distinct storages that forward keeps for backward, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in net.parameters()}
    kept = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = net(x)
    return sum(n for n, _ in kept.values()), y


def test_dropout_keeps_nothing_more():
    """With dropout, backward keeps no mask and no masked input: one random number for 512 elements is all."""
    x = torch.randn(64, 16, requires_grad=True)
    without, with_dropout = saved_bytes(model(0.0), x)[0], saved_bytes(model(0.3), x)[0]
    # x, tanh's output (which is the second layer's input), and two times x @ down.T
    assert without == 4 * 64 * (16 + 24 + 2 + 2)
    assert with_dropout == without + 8 * (64 * 16 // 512 + 64 * 24 // 512)


@pytest.mark.parametrize("is_lean", [False, True])
def test_autocast_shares_the_cast_of_an_input_and_lean_keeps_no_cast_weight(is_lean):
    """Three layers on one float32 input keep one bfloat16 copy of it; one of each weight too, but not in `lean`."""
    torch.manual_seed(0)

    class Three(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(16, 8) for _ in range(3))

        def forward(self, x):
            return self.q_proj(x) + self.k_proj(x) + self.v_proj(x)

    net = peftkit.wrap(Three(), "lora", rank=2, targets="*_proj")
    x = torch.randn(64, 16, requires_grad=True)
    with kernels.lean() if is_lean else nullcontext(), torch.autocast("cpu", dtype=torch.bfloat16):
        kept, _ = saved_bytes(net, x)
    assert kept == 2 * 64 * (16 + 3 * 2) + (0 if is_lean else 3 * 2 * 16 * 8)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_autocast_and_half_precision_stay_close(dropout):
    """In bfloat16, by autocast or by the base's dtype, output and gradients are those of float64 up to rounding."""
    x = torch.randn(32, 16)
    reference = copy.deepcopy(model(dropout)).double()
    torch.manual_seed(5)
    expected = reference(x.double())
    expected.square().sum().backward()
    for dtype in (torch.float32, torch.bfloat16):
        net = model(dropout)
        for layer in (net[0], net[2]):
            layer.weight.data, layer.bias.data = layer.weight.data.to(dtype), layer.bias.data.to(dtype)
        torch.manual_seed(5)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.float32):
            y = net(x.to(dtype))
        assert y.dtype == torch.bfloat16
        y.float().square().sum().backward()
        assert (y - expected).abs().max() < 0.03 * expected.abs().max()
        for ours, theirs in zip(gradients(net), gradients(reference), strict=True):
            assert ours.dtype == torch.float32
            assert (ours - theirs).norm() < 0.03 * theirs.norm()


def test_float64_is_left_alone_by_autocast():
    """Autocast does not touch float64, in the layer or here."""
    net, x = model(0.0).double(), torch.randn(3, 16, dtype=torch.float64)
    expected = net(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(net(x), expected)


def test_second_derivatives_are_right_or_refused():
    """Without dropout and casts they are right; otherwise torch says that there are none."""
    x, w, b, up, down = operands()
    assert torch.autograd.gradgradcheck(seeded(0.0), (x, w, b, up, down))
    (slope,) = torch.autograd.grad(seeded(0.3)(x, w, b, up, down).square().sum(), up, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


def test_a_wrong_dtype_is_torchs_own_error():
    """An input of another dtype than the layer's is refused as the layer refuses it, and never cast in silence."""
    x = torch.randn(3, 16, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="same dtype"):
        F.linear(x, torch.ones(2, 16))
    for dropout in (0.0, 0.3):
        with pytest.raises(RuntimeError, match="same dtype"):
            model(dropout)(x)


def test_an_output_may_be_changed_in_place():
    """What comes out is nobody's view: an activation that works in place is right after it, with dropout too."""
    for dropout in (0.0, 0.3):
        x, w, b, up, down = operands()
        plain = seeded(dropout)(x, w, b, up, down)
        assert torch.equal(seeded(dropout)(x, w, b, up, down).relu_(), plain.relu())
        (in_place,) = torch.autograd.grad(seeded(dropout)(x, w, b, up, down).relu_().sum(), up)
        (expected,) = torch.autograd.grad(plain.relu().sum(), up)
        torch.testing.assert_close(in_place, expected)


def test_transforms_and_odd_layouts_take_plain_operations():
    """vmap and functional gradients see plain operations; an input that is not contiguous starts bit for bit."""
    net = model(0.0).eval()
    x = torch.randn(7, 4, 16)
    torch.testing.assert_close(torch.func.vmap(net)(x), net(x))
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 8))
    odd = torch.randn(7, 16, 4).mT
    with torch.no_grad():
        expected = base(odd)
    assert torch.equal(peftkit.wrap(base, "lora", targets="**")(odd), expected)


def test_a_default_device_changes_nothing():
    """Noise comes from the generator of the tensor's device wherever new tensors go by default."""
    x = torch.empty(40, 50)
    torch.manual_seed(3)
    expected = kernels.draw(x, 0.3)
    torch.manual_seed(3)
    with torch.device("meta"):
        noise = kernels.draw(x, 0.3)
        assert noise.threshold == expected.threshold
        assert torch.equal(noise.bits, expected.bits)
        assert kernels.keep_mask(x.shape, noise).device.type == "cpu"


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_on_the_meta_device_runs(dtype, dropout):
    """Where there are no values, and no autocast, an adapted model still gives shapes, forward and backward."""
    with torch.device("meta"):
        net = peftkit.wrap(nn.Sequential(nn.Linear(6, 5, dtype=dtype)), "lora", rank=2, dropout=dropout, targets="0")
        y = net(torch.empty(3, 6, dtype=dtype))
    y.sum().backward()
    assert (y.shape, y.dtype) == ((3, 5), dtype)
    assert all(p.grad.shape == p.shape for p in net.parameters() if p.requires_grad)
