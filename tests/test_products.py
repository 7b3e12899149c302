"""Fused low-rank updates of convolutions and embeddings: the definition, gradients, and to the byte what they cost."""

import math
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import peftkit
from peftkit import kernels, products
from peftkit.layers import (
    Conv1d,
    Conv2d,
    Conv3d,
    ConvTranspose1d,
    ConvTranspose2d,
    ConvTranspose3d,
    Embedding,
    EmbeddingBag,
    Linear,
)

R, SCALE = 2, 0.7


def numbers(*shape):
    return lambda: torch.randn(*shape, dtype=torch.float64)


def ids(*shape):
    return lambda: torch.randint(7, shape)


CASES = {
    "conv1d": (Conv1d(), lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), numbers(2, 4, 7)),
    "conv2d": (Conv2d(), lambda: nn.Conv2d(2, 3, 3, padding=1, dilation=2), numbers(2, 2, 4, 3)),
    "conv2d, no bias": (Conv2d(), lambda: nn.Conv2d(3, 5, (3, 1), bias=False), numbers(2, 3, 5, 4)),
    "conv2d, pointwise": (Conv2d(), lambda: nn.Conv2d(3, 5, 1), numbers(2, 3, 4, 4)),
    "conv2d, one position": (Conv2d(), lambda: nn.Conv2d(3, 5, 3), numbers(4, 3, 3, 3)),
    "conv2d, one channel": (Conv2d(), lambda: nn.Conv2d(2, 1, 2), numbers(2, 2, 3, 3)),
    "conv2d, groups": (Conv2d(), lambda: nn.Conv2d(4, 6, 2, groups=2), numbers(2, 4, 3, 3)),
    "conv2d, depthwise": (Conv2d(), lambda: nn.Conv2d(4, 8, 3, groups=4, padding=1), numbers(2, 4, 4, 4)),
    "conv2d, circular": (Conv2d(), lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), numbers(1, 3, 4, 4)),
    "conv2d, reflect": (Conv2d(), lambda: nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect"), numbers(2, 2, 4, 4)),
    "conv2d, unbatched": (Conv2d(), lambda: nn.Conv2d(3, 5, 3), numbers(3, 5, 4)),
    "conv3d": (Conv3d(), lambda: nn.Conv3d(2, 3, 2, stride=(1, 2, 1)), numbers(2, 2, 3, 4, 3)),
    "transposed 1d": (ConvTranspose1d(), lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, groups=2), numbers(2, 4, 3)),
    "transposed 2d": (ConvTranspose2d(), lambda: nn.ConvTranspose2d(3, 5, 3, padding=1), numbers(2, 3, 4, 4)),
    "transposed 2d, unbatched": (ConvTranspose2d(), lambda: nn.ConvTranspose2d(3, 5, 2), numbers(3, 3, 3)),
    "transposed 3d": (ConvTranspose3d(), lambda: nn.ConvTranspose3d(2, 3, 2), numbers(1, 2, 2, 3, 2)),
    "embedding": (Embedding(), lambda: nn.Embedding(7, 5), ids(2, 3)),
    "embedding, one token": (Embedding(), lambda: nn.Embedding(7, 5), lambda: torch.tensor(3)),
    "embedding, padding": (Embedding(), lambda: nn.Embedding(7, 5, padding_idx=1), lambda: torch.arange(6).view(2, 3)),
    "bag": (EmbeddingBag(), lambda: nn.EmbeddingBag(7, 5), ids(3, 4)),
    "bag, mean": (EmbeddingBag(), lambda: nn.EmbeddingBag(7, 5, mode="mean", padding_idx=0), ids(3, 4)),
}  # fmt: skip


def operands(case):
    """The kind, the layer, an input and factors, in float64."""
    torch.manual_seed(0)
    kind, make, example = CASES[case]
    layer, x = make().double().requires_grad_(False), example()
    out, fan_in = kind.shape(layer, "weight")
    up = torch.randn(out, R, dtype=torch.float64, requires_grad=True)
    down = torch.randn(R, fan_in, dtype=torch.float64, requires_grad=True)
    return kind, layer, x.requires_grad_(x.is_floating_point()), up, down


def fused(kind, layer, dropout=0.0):
    def run(x, up, down):
        torch.manual_seed(3)
        return kind.adapted(layer, x, layer.weight, getattr(layer, "bias", None), up, down, SCALE, dropout)

    return run


def defined(kind, layer, x, up, down):
    """The layer's own forward with `W + scale * up @ down` for its weight."""
    w = kind.matrix(layer, "weight", layer.weight) + SCALE * up @ down
    return torch.func.functional_call(layer, {"weight": kind.restore(layer, "weight", w)}, (x,))


@pytest.mark.parametrize("case", CASES)
def test_it_is_the_definition(case):
    """Output and gradients are those of the layer whose weight is `W + scale * up @ down`, or close to rounding."""
    kind, layer, x, up, down = operands(case)
    inputs = [t for t in (x, up, down) if t.requires_grad]
    y, expected = fused(kind, layer)(x, up, down), defined(kind, layer, x, up, down)
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-12)
    direction = torch.randn_like(y)
    if case == "embedding, padding":
        direction[0, 1] = 0  # what the padding row would learn is another test's
    for a, b in zip(
        torch.autograd.grad(y, inputs, direction), torch.autograd.grad(expected, inputs, direction), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    with torch.no_grad():
        assert torch.equal(fused(kind, layer)(x, up, down), y)


@pytest.mark.parametrize("trained", ["all", "up", "down", "input"])
@pytest.mark.parametrize("case", ["conv1d", "conv2d, groups", "transposed 1d", "conv2d, one position"])
def test_derivatives_are_slopes(case, trained):
    """First and second ones, whatever it is that asks for them."""
    kind, layer, *inputs = operands(case)
    for name, t in zip(("input", "up", "down"), inputs, strict=True):
        t.requires_grad_(trained in ("all", name))
    assert torch.autograd.gradcheck(fused(kind, layer), inputs)
    if trained == "all":
        assert torch.autograd.gradgradcheck(fused(kind, layer), inputs)


@pytest.mark.parametrize("trained", ["all", "down", "input"])
@pytest.mark.parametrize("case", ["conv2d", "conv2d, circular", "transposed 1d"])
def test_derivatives_with_dropout(case, trained):
    """First ones are slopes; second ones are refused, not wrong."""
    kind, layer, *inputs = operands(case)
    for name, t in zip(("input", "up", "down"), inputs, strict=True):
        t.requires_grad_(trained in ("all", name))
    run = fused(kind, layer, 0.4)
    assert torch.autograd.gradcheck(run, inputs)
    wanted = inputs[0] if trained == "input" else inputs[2]
    (slope,) = torch.autograd.grad(run(*inputs).square().sum(), wanted, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


def test_dropout_drops_elements_of_the_input():
    """The product is that of the input times the mask, over what is kept; near 1, where torch's own does it, too."""
    kind, layer, x, up, down = operands("conv2d")
    torch.manual_seed(3)
    noise = kernels.draw(x, 0.4)
    mask = kernels.keep_mask(x.shape, noise)
    assert 0 < mask.sum() < mask.numel()
    product = defined(kind, layer, x * mask, up, down) - layer(x * mask)
    expected = layer(x) + product * noise.factor
    torch.testing.assert_close(fused(kind, layer, 0.4)(x, up, down), expected)
    product = fused(kind, layer, 0.9999)(x, up, down) - layer(x)
    assert not product.any() or product.abs().max() > 100 * (defined(kind, layer, x, up, down) - layer(x)).abs().mean()


@pytest.mark.parametrize("case", ["conv2d", "conv2d, groups", "conv3d", "transposed 2d"])
def test_the_layout_is_the_layers_own(case):
    """An input in channels_last comes out as it does from the base, right in values and gradients."""
    kind, layer, x, up, down = operands(case)
    layout = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    laid = x.detach().to(memory_format=layout).requires_grad_()
    y, expected = fused(kind, layer)(laid, up, down), defined(kind, layer, x, up, down)
    assert y.stride() == layer(laid).stride()
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-12)
    for direction in (
        torch.randn_like(y),
        torch.randn(y.shape, dtype=y.dtype),
        torch.ones_like(y[:1, :1]).expand_as(y),
    ):
        found = torch.autograd.grad(y, (laid, up, down), direction, retain_graph=True)
        wanted = torch.autograd.grad(expected, (x, up, down), direction, retain_graph=True)
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("channel", [1, -1])
def test_any_layout_is_added_to(channel):
    """An output whose channels and positions both lie apart, or which is a view, is right too, and nothing else moves."""
    torch.manual_seed(0)
    whole = torch.randn(4, 6, 8, dtype=torch.float64)
    up = torch.randn(6 if channel == 1 else 3, R, dtype=torch.float64)
    for y in (whole[::2, :, 1:7:2], whole[::2, :, :3], whole.transpose(0, 1)[:, ::2, :3].transpose(0, 1)):
        h = torch.randn(2, *((R, 3) if channel == 1 else (6, R)), dtype=torch.float64)
        expected = y + SCALE * (up @ h if channel == 1 else h @ up.mT)
        before = whole.clone()
        for grad in (False, True):
            result = products.add(
                y.clone() if not grad else y, h, up.clone().requires_grad_(grad), SCALE, channel=channel
            )
            torch.testing.assert_close(result, expected)
        assert torch.equal(whole, before)


@pytest.mark.parametrize("hooked", ["adapter", "everything"])
def test_a_hook_on_an_adapter_is_called(hooked):
    """Engines gather parameters in them: the shorter way to the factors is only for adapters without any."""
    model, seen = wrapped(nn.Linear(8, 5)), []
    adapter = model[0].adapters["default"]["weight"]
    if hooked == "adapter":
        handle = adapter.register_forward_pre_hook(lambda module, _: seen.append(module))
    else:
        handle = nn.modules.module.register_module_forward_pre_hook(lambda module, _: seen.append(module))
    model(torch.randn(2, 8))
    handle.remove()
    model(torch.randn(2, 8))
    assert [module is adapter for module in seen].count(True) == 1


def test_the_padding_row_learns_nothing():
    """Through `up` no more than through `down`; its update is added all the same."""
    kind, layer, x, up, down = operands("embedding, padding")
    y = fused(kind, layer)(x, up, down)
    torch.testing.assert_close(y, defined(kind, layer, x, up, down))
    assert not any(g.any() for g in torch.autograd.grad(y[0, 1].sum(), (up, down), retain_graph=True))
    assert all(g.any() for g in torch.autograd.grad(y[0, 2].sum(), (up, down)))


def test_a_convolution_that_treats_its_weight_is_left_to_the_whole_weight():
    """A subclass that standardizes what it convolves with has no sum of products, but its forward is torch's."""

    class Standardized(nn.Conv2d):
        def _conv_forward(self, x, w, b):
            return super()._conv_forward(x, w - w.mean((1, 2, 3), keepdim=True), b)

    torch.manual_seed(0)
    model = peftkit.wrap(nn.Sequential(Standardized(3, 5, 3)), "lora", targets="0", rank=2)
    adapter = model[0].adapters["default"]["weight"]
    nn.init.normal_(adapter.up)
    x = torch.randn(2, 3, 5, 5)
    w = model[0].weight + (adapter.weight(model[0].weight.flatten(1)) - model[0].weight.flatten(1)).view(5, 3, 3, 3)
    torch.testing.assert_close(model(x), F.conv2d(x, w - w.mean((1, 2, 3), keepdim=True), model[0].bias))


# ------------------------------------------------------------------------------------------------- the cost


class Allocations(TorchDispatchMode):
    """The bytes of every new storage that comes out of an operation."""

    def __init__(self):
        super().__init__()
        self.seen, self.nbytes = {}, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        def note(t):
            storage = t.untyped_storage()
            self.seen[storage._cdata] = storage  # held, or its address could be another's
            return storage

        for t in torch.utils._pytree.tree_leaves((args, kwargs)):
            if isinstance(t, torch.Tensor):
                note(t)
        known = set(self.seen)
        result = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(result):
            if isinstance(t, torch.Tensor) and t.untyped_storage()._cdata not in known:
                self.nbytes.append(note(t).nbytes())
        return result


def kept_and_allocated(model, *inputs):
    """Bytes of the distinct storages that forward keeps for backward, parameters left out; and what forward allocates."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), Allocations() as made:
        model(*inputs)
    return sum(t.untyped_storage().nbytes() for t in kept.values()), sorted(made.nbytes)


def wrapped(layer, dropout=0.0, names=("default",)):
    torch.manual_seed(0)
    model = nn.Sequential(layer)
    for name in names:
        peftkit.wrap(model, peftkit.LoRA(rank=R, dropout=dropout, init="gaussian"), targets="0", name=name)
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p)
    return model.train()


N, C, OUT, S = 4, 8, 12, 10
X, Y, H = 4 * N * C * S * S, 4 * N * OUT * S * S, 4 * N * R * S * S


def conv(**options):
    return nn.Conv2d(C, OUT, 3, padding=1, **options)


def image():
    return torch.randn(N, C, S, S, requires_grad=True)


def test_a_convolution_keeps_its_input_and_a_thin_product():
    """Beyond what the frozen layer keeps and allocates there is `h`, once: no second output."""
    frozen = nn.Sequential(conv()).requires_grad_(False)
    assert kept_and_allocated(frozen, image()) == (X, [Y])
    assert kept_and_allocated(wrapped(conv()), image()) == (X + H, [H, Y])
    assert kept_and_allocated(wrapped(nn.ConvTranspose2d(C, OUT, 3, padding=1)), image()) == (X + H, [H, Y])


def test_a_convolution_with_dropout_keeps_the_same():
    """Of the mask it keeps one number for 512 elements; in forward there is one masked input, and one output."""
    kept, made = kept_and_allocated(wrapped(conv(), 0.3), image())
    assert kept == X + H + 8 * math.ceil(X / 4 / 512)
    assert made.count(Y) == 1
    assert made.count(X) == 1
    assert max(n for n in made if n not in (X, Y)) <= X // 4 + 512  # the mask, in bytes, up to whole hashes


def test_autocast_casts_the_input_once():
    """A bfloat16 input, shared by the base and the product; the weight's cast, as the frozen layer keeps it; and `h`."""
    weight = 2 * C * OUT * 9
    frozen = nn.Sequential(conv()).requires_grad_(False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert kept_and_allocated(frozen, image())[0] == X // 2 + weight
        kept, made = kept_and_allocated(wrapped(conv()), image())
    factors = 2 * R * (C * 9 + OUT)
    assert kept == X // 2 + weight + H // 2 + factors
    assert made.count(X // 2) == 1
    assert made.count(Y // 2) == 1


def test_an_input_is_padded_once():
    """With a padding mode of its own the layer keeps the padded input too; the product takes that one."""
    padded = 4 * N * C * (S + 2) ** 2
    frozen = nn.Sequential(conv(padding_mode="reflect")).requires_grad_(False)
    assert kept_and_allocated(frozen, image()) == (X + padded, [padded, Y])
    kept, made = kept_and_allocated(wrapped(conv(padding_mode="reflect")), image())
    assert (kept, made) == (X + padded + H, [H, padded, Y])


@pytest.mark.parametrize("bag", [False, True])
def test_an_embedding_keeps_thin_rows(bag):
    """Rows of `down`, and the indices; one output."""
    x = torch.randint(50, (6, 8))
    layer = nn.EmbeddingBag(50, 16) if bag else nn.Embedding(50, 16)
    rows = 6 if bag else 48
    kept, made = kept_and_allocated(wrapped(layer), x)
    assert made.count(4 * rows * 16) == 1
    if not bag:  # a bag keeps indices of its own too
        assert made == [4 * rows * R, 4 * rows * 16]
        assert kept == 8 * 48 + 4 * rows * R


@pytest.mark.parametrize("adapters", [1, 3])
def test_linear_layers_with_several_adapters(adapters):
    """The input once, one output that all are added into, and an `h` each."""
    x, names = torch.randn(32, 16, requires_grad=True), [f"a{i}" for i in range(adapters)]
    model, h, y = wrapped(nn.Linear(16, 24), names=names), 4 * 32 * R, 4 * 32 * 24
    assert kept_and_allocated(model, x) == (4 * 32 * 16 + adapters * h, [h] * adapters + [y])


@pytest.mark.parametrize("layer", [lambda: nn.Linear(8, 5), lambda: nn.Conv2d(3, 5, 3), lambda: nn.Embedding(7, 5)])
def test_an_adapter_at_its_start_changes_no_bit_of_the_others(layer):
    """One that adds nothing yet may be put on top of a trained one, with gradients and without."""
    torch.manual_seed(0)
    x = {"Linear": numbers(2, 4, 8), "Conv2d": numbers(2, 3, 5, 5), "Embedding": ids(2, 3)}[type(layer()).__name__]()
    model = wrapped(layer()).double()
    y = model(x)
    peftkit.wrap(model, "lora", targets="0", name="new", rank=3)
    assert torch.equal(model(x), y)
    with torch.no_grad():
        assert torch.equal(model(x), y)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_linear_layer_has_one_output(dropout, autocast):
    """Under dropout and autocast too; and in single precision it keeps the input and `h`, and the noise of dropout."""
    x, item = torch.randn(32, 16, requires_grad=True), 2 if autocast else 4
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        kept, made = kept_and_allocated(wrapped(nn.Linear(16, 24), dropout), x)
    assert autocast or kept == 4 * 32 * (16 + R) + (8 if dropout else 0)
    assert made.count(item * 32 * 24) == 1
    assert made.count(item * 32 * 16) == bool(dropout) + autocast  # the masked input; the cast one


def test_a_call_takes_few_steps_of_python():
    """What a layer adds to its products is Python, which a single token feels: no more calls than these."""
    counts = []
    for layer in (nn.Linear(8, 8), wrapped(nn.Linear(8, 8))[0]):
        x, calls = torch.randn(1, 8), []
        layer.eval()
        with torch.no_grad():
            layer(x)
            sys.setprofile(lambda frame, event, _, calls=calls: event == "call" and calls.append(frame.f_code.co_name))
            try:
                layer(x)
            finally:
                sys.setprofile(None)
        counts.append(calls)
    base, ours = counts
    assert len(ours) - len(base) <= 19, ours


@pytest.mark.parametrize("layer", [lambda: nn.Linear(8, 5), lambda: nn.Conv2d(3, 5, 3), lambda: nn.Embedding(7, 5)])
def test_several_adapters_are_their_sum(layer):
    """In output and gradients, whatever their ranks and scales; with dropout in training one by one."""
    torch.manual_seed(0)
    x = {"Linear": numbers(4, 8), "Conv2d": numbers(2, 3, 5, 5), "Embedding": ids(2, 3)}[type(layer()).__name__]()
    model = nn.Sequential(layer()).double()
    base = model(x).detach()
    for i in range(3):
        peftkit.wrap(model, "lora", rank=i + 1, alpha=i + 0.5, dropout=0.1 * i, targets="0", name=f"a{i}")
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p)
    updates = []
    for i in range(3):
        with peftkit.using(model.eval(), f"a{i}"):
            updates.append(model(x) - base)
    y = model(x)
    torch.testing.assert_close(y, base + sum(updates))
    trained = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(y.square().sum(), trained)
    for a, b in zip(found, torch.autograd.grad((base + sum(updates)).square().sum(), trained), strict=True):
        torch.testing.assert_close(a, b)
    assert not torch.allclose(model.train()(x), y)


# ---------------------------------------------------------------------------------------------- factors of rows


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(4, 5), (2, 5, 3, 3)])
def test_rows_times_a_factor(shape, bias):
    """`gain * (y - b) + b` and its slopes; a factor of zero has its slope too."""
    torch.manual_seed(0)
    dims = (5,) if len(shape) == 2 else (5, 1, 1)
    y = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    b = torch.randn(dims, dtype=torch.float64, requires_grad=True) if bias else None
    gain = torch.randn(dims, dtype=torch.float64)
    gain[1] = 0
    gain.requires_grad_()
    expected = gain * y if b is None else gain * (y - b) + b
    torch.testing.assert_close(products.gained(y, b, gain), expected)
    inputs = [y, gain] if b is None else [y, b, gain]
    direction = torch.randn_like(expected)
    found = torch.autograd.grad(products.gained(y, b, gain), inputs, direction)
    for a, c in zip(found, torch.autograd.grad(expected, inputs, direction), strict=True):
        torch.testing.assert_close(a, c)
    with torch.no_grad():
        torch.testing.assert_close(products.gained(y, b, gain), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
def test_a_factor_of_one_changes_nothing(dtype, bias):
    """Not a bit; and one near to it changes something, in half precision too."""
    torch.manual_seed(0)
    y = torch.randn(4000, 3).to(dtype).requires_grad_()
    b = torch.randn(3).to(dtype) if bias else None
    assert torch.equal(products.gained(y, b, torch.ones(3)), y)
    near = torch.full((3,), 1.003)  # 1 in bfloat16
    expected = products.gained(y, b, near)
    assert not torch.equal(expected, y)
    with torch.no_grad():
        assert torch.equal(products.gained(y, b, near), expected)


def test_a_linear_layer_takes_what_is_bare():
    """What these tests call is what a wrapped layer runs."""
    torch.manual_seed(0)
    for kind, layer, x in ((Linear(), nn.Linear(8, 5), torch.randn(3, 8)), (Conv2d(), conv(), image())):
        model = wrapped(layer)
        up, down, scale = model[0].adapters["default"]["weight"].factors()
        expected = kind.adapted(model[0], x, model[0].weight, model[0].bias, up, down, scale, 0.0)
        assert torch.equal(model(x), expected)
