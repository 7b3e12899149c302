"""Half precision bases, float32 adapters, autocast and gradient scaling: what is kept, and how near the result is.

The reference is the same model in float64. Bounds are made of the dtypes' own roundings and of how many of them stand
one after another; each comparison also shows that what was learned is far above its bound.
"""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import peftkit

HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
every_half = pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)
EXACT = torch.float64
WIDTH, DEPTH = 16, 4


class Net(nn.Module):
    """Linear layers, an embedding and a convolution, with norms between them that keep values near one."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(12, WIDTH)
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.fc = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.norm = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, tokens):  # [batch, length] -> [batch, 4]
        x = self.embed(tokens)
        x = self.norm[0](x + self.conv(x.mT).mT)
        for fc, norm in zip(self.fc, self.norm[1:], strict=True):
            x = norm(x + torch.tanh(fc(x)))
        return self.head(x.mean(1))


METHODS = {
    # the fast path of every layer here; the generic path; several of one weight's own values
    "lora": lambda: peftkit.LoRA(rank=4, alpha=8.0),
    "started": lambda: peftkit.LoRA(rank=4, alpha=8.0, init="orthogonal"),
    "copy": lambda: peftkit.Full(keep_base=True),
}
every_method = pytest.mark.parametrize("method", METHODS)
TARGETS = ("@linear", "embed", "conv")


def tokens():
    return torch.randint(12, (8, 5), generator=torch.Generator().manual_seed(1))


LABELS = torch.randint(4, (8,), generator=torch.Generator().manual_seed(2))


def rounded_base(dtype):
    """A base whose weights are numbers of `dtype`, so that the same base exists in every wider one."""
    torch.manual_seed(0)
    return Net().to(dtype)


def adapted(method, dtype, *, base=None):
    """A wrapped base of `dtype` with an adapter that has learned something, the same numbers for every wider dtype."""
    model = peftkit.wrap(rounded_base(base or dtype).to(dtype), METHODS[method](), targets=TARGETS)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in peftkit.state_dict(model).values():
            tensor.add_(torch.randn(tensor.shape, generator=generator).to(base or dtype).to(tensor.dtype) / 4)
    return model


def reference(method, dtype):
    """The same adapted model with every operation in float64."""
    model = adapted(method, dtype)
    exact = peftkit.wrap(rounded_base(dtype).to(EXACT), METHODS[method](), targets=TARGETS)
    state = {key: tensor.to(EXACT) for key, tensor in model.state_dict().items()}
    missing = exact.load_state_dict(state)
    assert not missing.missing_keys
    return exact


def adapters_of(model):
    return {path: p for path, p in model.named_parameters() if p.requires_grad}


def autocast(dtype, *, enabled):
    return torch.autocast("cpu", dtype=dtype, enabled=enabled)


def difference(a, b):
    """How far `a` is from `b`, relative to `b`."""
    a, b = a.detach().double(), b.detach().double()
    return ((a - b).norm() / b.norm()).item()


def bound(dtype):
    """Two standard deviations of the roundings, taken as independent. One is off by eps / sqrt(12) in the mean square, and
    each of the four adapted layers has at most 8: of its weight and update, output, activation, norm and residual sum.
    """
    return 2 * torch.finfo(dtype).eps / math.sqrt(12) * math.sqrt(8 * DEPTH)


CASTS = {
    # the base's dtype, autocast's dtype or None
    "half base": (True, False),
    "half base, autocast": (True, True),
    "float32 base, autocast": (False, True),
}
every_cast = pytest.mark.parametrize("cast", CASTS)


# -------------------------------------------------------------------------------------------------- the adapters


@every_half
@every_method
def test_adapters_are_float32(method, dtype):
    """On a half precision base the adapters are float32; on a wider one they have its dtype."""
    assert {p.dtype for p in adapters_of(adapted(method, dtype)).values()} == {torch.float32}
    for wide in (torch.float32, torch.float64):
        assert {p.dtype for p in adapters_of(adapted(method, wide)).values()} == {wide}


@every_half
@every_cast
@every_method
def test_output(method, cast, dtype):
    """Output and gradients are those of float64, within the roundings of the half precision that computes them."""
    half, casting = CASTS[cast]
    model = adapted(method, dtype if half else torch.float32, base=dtype)
    exact = reference(method, dtype)
    with autocast(dtype, enabled=casting):
        y = model(tokens())
        loss = F.cross_entropy(y.float(), LABELS)
    loss.backward()
    assert y.dtype == dtype
    expected = exact(tokens())
    F.cross_entropy(expected, LABELS).backward()
    with torch.no_grad(), peftkit.disabled(exact):
        assert difference(exact(tokens()), expected) > 10 * bound(dtype), "the adapter drowns in rounding"
    assert difference(y, expected) < bound(dtype)
    theirs = adapters_of(exact)
    for path, p in adapters_of(model).items():
        assert p.grad.dtype == p.dtype
        assert p.grad.isfinite().all()
        # A gradient goes through every layer twice: forward, and back.
        assert difference(p.grad, theirs[path].grad) < 2 * bound(dtype), path


@every_half
@every_method
def test_training(method, dtype):
    """A half precision base is trained through float32 adapters: they stay float32, the base moves by no bit, the loss
    follows the one of float64.
    """
    model, exact = adapted(method, dtype), reference(method, dtype)
    before = {key: value.clone() for key, value in model.state_dict().items() if ".adapters." not in key}
    losses = {}
    for each, name in ((model, "half"), (exact, "exact")):
        optimizer = torch.optim.SGD(peftkit.param_groups(each, lr=0.2))
        losses[name] = []
        for _ in range(6):
            optimizer.zero_grad()
            loss = F.cross_entropy(each(tokens()).double(), LABELS)
            loss.backward()
            optimizer.step()
            losses[name].append(loss.item())
    assert losses["exact"][-1] < losses["exact"][0] - 0.1
    for ours, theirs in zip(losses["half"], losses["exact"], strict=True):
        assert abs(ours - theirs) < 2 * bound(dtype)
    assert {p.dtype for p in adapters_of(model).values()} == {torch.float32}
    after = model.state_dict()
    assert all(torch.equal(after[key], value) and after[key].dtype == dtype for key, value in before.items())


@every_half
def test_small_updates(dtype):
    """Updates that half precision would lose are kept: a thousand steps of a thousandth of a rounding add up."""
    model = adapted("lora", dtype)
    optimizer = torch.optim.SGD(peftkit.param_groups(model, lr=1.0))
    parameter = next(iter(adapters_of(model).values()))
    with torch.no_grad():
        parameter.fill_(1.0)
    step = torch.finfo(dtype).eps / 1000
    for _ in range(1000):
        for p in adapters_of(model).values():
            p.grad = torch.zeros_like(p)
        parameter.grad.fill_(-step)
        optimizer.step()
    assert (parameter - 1.0).mean().item() == pytest.approx(torch.finfo(dtype).eps, rel=0.05)
    lost = torch.ones((), dtype=dtype)
    for _ in range(1000):
        lost += step
    assert lost == 1.0


# ------------------------------------------------------------------------------------------------ gradient scaling


def scaled_step(model, scaler, optimizer, dtype, *, factor=1.0):
    optimizer.zero_grad()
    with autocast(dtype, enabled=True):
        loss = F.cross_entropy(model(tokens()).float(), LABELS) * factor
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    return loss


@pytest.mark.parametrize("half_base", [False, True], ids=["float32 base", "float16 base"])
@every_method
def test_gradient_scaler(method, half_base):
    """Under a gradient scaler a float16 run takes the steps that it takes without one; a step whose gradients overflow
    is left out, and the scale halved.
    """
    dtype = torch.float16
    model = adapted(method, dtype if half_base else torch.float32, base=dtype)
    plain = copy.deepcopy(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=1000)
    optimizer = torch.optim.SGD(peftkit.param_groups(model, lr=0.1))
    other = torch.optim.SGD(peftkit.param_groups(plain, lr=0.1))
    scaled_step(model, scaler, optimizer, dtype)
    with autocast(dtype, enabled=True):
        loss = F.cross_entropy(plain(tokens()).float(), LABELS)
    loss.backward()
    other.step()
    start = adapters_of(adapted(method, dtype if half_base else torch.float32, base=dtype))
    for (path, p), q in zip(adapters_of(model).items(), adapters_of(plain).values(), strict=True):
        moved, expected = p - start[path], q - start[path]
        assert moved.any()
        assert difference(moved, expected) < 2 * bound(dtype)
    before = {path: p.detach().clone() for path, p in adapters_of(model).items()}
    scaled_step(model, scaler, optimizer, dtype, factor=1e30)
    assert scaler.get_scale() == 2.0**7
    assert all(torch.equal(p, before[path]) for path, p in adapters_of(model).items())
    scaled_step(model, scaler, optimizer, dtype)
    assert all(p.isfinite().all() for p in adapters_of(model).values())
    assert any(not torch.equal(p, before[path]) for path, p in adapters_of(model).items())


def test_skipped_steps_are_none():
    """A method that counts the optimizer's steps does not count one that a gradient scaler leaves out."""
    if "adalora" not in {info.name for info in peftkit.methods()}:
        pytest.skip("adalora is not installed")
    model = peftkit.wrap(rounded_base(torch.float32), "adalora")
    optimizer = torch.optim.SGD(peftkit.param_groups(model, lr=0.1))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    buffers = {path: b.clone() for path, b in model.named_buffers() if ".adapters." in f".{path}"}
    assert buffers
    scaled_step(model, scaler, optimizer, torch.float16, factor=1e30)
    assert all(torch.equal(b, buffers[path]) for path, b in model.named_buffers() if path in buffers)
    scaled_step(model, scaler, optimizer, torch.float16)
    assert any(not torch.equal(b, buffers[path]) for path, b in model.named_buffers() if path in buffers)


# --------------------------------------------------------------------------------------------------- files, merging


@pytest.mark.parametrize("dtype", [*HALVES.values(), torch.float32, torch.float64], ids=[*HALVES, "float32", "float64"])
@every_method
def test_save_and_load(method, dtype, tmp_path):
    """A file keeps the adapters' dtypes and bits, and loads onto the base in its own dtype."""
    model = adapted(method, dtype)
    peftkit.save(model, tmp_path / "adapter.safetensors")
    loaded = peftkit.load(rounded_base(dtype), tmp_path / "adapter.safetensors")
    saved, found = peftkit.state_dict(model), peftkit.state_dict(loaded)
    assert saved.keys() == found.keys()
    for key, tensor in saved.items():
        assert tensor.dtype == found[key].dtype == (torch.float32 if dtype.itemsize == 2 else dtype)
        assert torch.equal(tensor, found[key])
    with torch.no_grad():
        assert torch.equal(loaded(tokens()), model(tokens()))


@every_half
@every_method
def test_merge(method, dtype):
    """Merged into half precision weights, a model gives the output of float64 within the same bound; unmerging gives the
    weights back, bit for bit.
    """
    model, exact = adapted(method, dtype), reference(method, dtype)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        peftkit.merge(model)
        assert {p.dtype for path, p in model.named_parameters() if ".adapters." not in path} == {dtype}
        assert difference(model(tokens()), exact(tokens())) < bound(dtype)
    peftkit.unmerge(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_merge_that_overflows():
    """A merge whose result is beyond float16 is refused, and the model is as it was; bfloat16 can hold the same."""
    for dtype, fits in ((torch.float16, False), (torch.bfloat16, True)):
        model = adapted("lora", dtype)
        with torch.no_grad():
            model.fc[0].adapters["default"]["weight"].up.fill_(1e5)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        if fits:
            peftkit.merge(model)
            continue
        with pytest.raises(peftkit.errors.UnsupportedLayerError, match=r"fc\.0\.weight is not finite"):
            peftkit.merge(model)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        peftkit.activate(model)  # nothing is merged, so this is allowed


@every_half
def test_cast_by_hand(dtype):
    """`model.to(dtype)` casts the adapters too, which was asked for; `summary` says so."""
    model = adapted("lora", torch.float32).to(dtype)
    assert {p.dtype for p in adapters_of(model).values()} == {dtype}
    assert str(dtype).removeprefix("torch.") in str(peftkit.summary(model))
