"""AdaLoRA: the kit, HF PEFT's numbers and its training, and a budget that follows the optimizer by itself."""

import copy
import doctest
import math
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import peftkit
from peftkit.testing import CASES, CHECKS, parametrize_with_checks
from peftkit.testing.parity import compare_with_hf
from peftkit_adalora.adalora import AdaLoRA

SMALL = AdaLoRA(rank=3, target_rank=2, end=6)


@parametrize_with_checks(
    [SMALL],
    expected_failures={"check_learning": "the loss is 0.002 there, which a regulariser of weight 0.5 outweighs"},
)
def test_kit(check):
    """It keeps what peftkit promises of every method, on every layer kind."""
    check()


def test_learning_without_a_regulariser():
    """Without its regulariser it learns what the kit has it learn as well."""
    check = next(check for check in CHECKS if check.__name__ == "check_learning")
    check(AdaLoRA(rank=3, target_rank=2, end=6, orthogonality=0.0), CASES[0])


# -------------------------------------------------------------------------------------------------------- HF PEFT


def conv1d_of_transformers():
    return pytest.importorskip("transformers.pytorch_utils").Conv1D(5, 6)


HF = {
    "linear": (lambda: nn.Linear(6, 5), (4, 6)),
    "linear, no bias": (lambda: nn.Linear(6, 5, bias=False), (2, 4, 6)),
    "Conv1D": (conv1d_of_transformers, (4, 6)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), stride=2, padding=1, dilation=(1, 2)), (2, 4, 5, 5)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("method", [AdaLoRA(rank=4, target_rank=2), AdaLoRA(rank=9, alpha=3.0)], ids=str)
@pytest.mark.parametrize("layer", HF)
def test_hf(layer, method, dtype):
    """With HF PEFT's tensors it has HF PEFT's output, gradients and merged weight."""
    pytest.importorskip("peft")
    make, shape = HF[layer]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    compare_with_hf(method, lambda: nn.Sequential(make()), x, targets="0", dtype=dtype)


class Net(nn.Module):
    """A small model whose output has a `loss`, to which HF PEFT adds its regulariser."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.hidden = nn.Linear(16, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x, y):
        h = torch.tanh(self.hidden(torch.tanh(self.conv(x)).flatten(1)))
        return types.SimpleNamespace(loss=F.cross_entropy(self.head(h), y))


PATHS = ("conv", "hidden", "head")


def batches(n, rows=12):
    """Images and classes, float64, new ones for every step."""
    generator = torch.Generator().manual_seed(7)
    return [
        (torch.randn(rows, 1, 4, 4, generator=generator).double(), torch.randint(3, (rows,), generator=generator))
        for _ in range(n)
    ]


def net(method, seed=0):
    torch.manual_seed(3)
    model = Net().double()
    torch.manual_seed(seed)
    return peftkit.wrap(model, method, targets="*")


def adapters(model):
    return {path: model.get_submodule(path).adapters["default"]["weight"] for path in PATHS}


def progress(model):
    return next(module for name, module in model.named_modules() if name.endswith("adapters.default.shared-0"))


def left(model):
    """Which terms are not zero, in one line."""
    return torch.cat([adapter.values.detach().flatten() != 0 for adapter in adapters(model).values()])


def train(model, data, make=torch.optim.SGD, **options):
    """One optimizer step a batch. Nothing of AdaLoRA's is called."""
    optimizer = make([p for p in model.parameters() if p.requires_grad], **{"lr": 0.1, **options})
    for x, y in data:
        optimizer.zero_grad()
        model(x, y).loss.backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize(
    "fields",
    [
        dict(rank=5, target_rank=2, start=2, end=10, every=1),
        dict(rank=4, target_rank=1, start=0, end=11, every=3, orthogonality=0.05, beta1=0.6, beta2=0.9, alpha=20.0),
        dict(rank=5, target_rank=3, start=3, end=12, every=2, orthogonality=0.0),
    ],
    ids=["every step", "every third", "no regulariser"],
)
def test_training_as_hf(fields, make):
    """Fifteen steps, three to five of them after the end, give HF PEFT's parameters, and prune the same terms."""
    peft = pytest.importorskip("peft")
    method = AdaLoRA(**fields)
    ours = net(method)
    torch.manual_seed(3)
    config = peft.AdaLoraConfig(
        target_modules=list(PATHS),
        tfinal=0,
        **{theirs: getattr(method, name) for name, theirs in method.hf.fields.items()},
    )
    theirs = peft.get_peft_model(
        Net(), config
    ).double()  # made in float32: from other dtypes on it trains `ranknum` too
    layers = {path: theirs.base_model.model.get_submodule(path) for path in PATHS}
    names = {"down": "lora_A", "values": "lora_E", "up": "lora_B"}
    with torch.no_grad():
        for path, adapter in adapters(ours).items():
            for name, other in names.items():
                getattr(layers[path], other)["default"].copy_(getattr(adapter, name))
    options = {"lr": 0.05} if make is torch.optim.AdamW else {"lr": 0.3, "momentum": 0.8}
    mine = make([p for p in ours.parameters() if p.requires_grad], **options)
    others = make([p for p in theirs.parameters() if p.requires_grad], **options)
    patterns = set()
    for step, (x, y) in enumerate(batches(15), 1):
        mine.zero_grad()
        ours(x, y).loss.backward()
        mine.step()
        theirs.base_model(x, y).loss.backward()
        others.step()
        theirs.base_model.update_and_allocate(step)
        others.zero_grad()
        for path, adapter in adapters(ours).items():
            for name, other in names.items():
                a, b = getattr(adapter, name).detach(), getattr(layers[path], other)["default"].detach()
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11, msg=lambda m, s=step: f"after step {s}: {m}")
                if name == "values":
                    assert torch.equal(a == 0, b == 0)
        if step < method.end:
            expect_equal_importance(progress(ours).seen, theirs.base_model.rankallocator, names)
        patterns.add(tuple(left(ours).tolist()))
    assert len(patterns) > 2  # terms are pruned, and come back, on the way
    assert left(ours).sum() == 3 * fields["target_rank"]
    pattern = theirs.peft_config["default"].rank_pattern
    for path, adapter in adapters(ours).items():
        (kept,) = (each for key, each in pattern.items() if f".{path}." in f".{key}")
        assert adapter.kept.flatten().tolist() == kept


def expect_equal_importance(seen, allocator, names):
    """Both smoothed averages of every parameter are those of HF PEFT's allocator, to rounding."""
    assert len(seen) == len(allocator.exp_avg_ipt) == 9
    for (i, name), averages in seen.items():
        key = f"{PATHS[i]}.{names[name]}.default"
        for mine, theirs in zip(averages, (allocator.exp_avg_ipt, allocator.exp_avg_unc), strict=True):
            torch.testing.assert_close(mine, theirs[key], rtol=1e-6, atol=1e-12)


# ------------------------------------------------------------------------------------------------------ the budget


@pytest.mark.parametrize("start, end, every", [(0, 8, 1), (3, 9, 1), (2, 12, 4), (0, 1, 1), (4, 5, 9)])
def test_budget(start, end, every):
    """After each pruning as many terms are left as the cubic says; all before the start, the target from the end on."""
    method = AdaLoRA(rank=6, target_rank=2, start=start, end=end, every=every)
    model = net(method)
    most, least = 3 * 6, 3 * 2
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for step, (x, y) in enumerate(batches(end + 3), 1):
        optimizer.zero_grad()
        model(x, y).loss.backward()
        optimizer.step()
        count = int(left(model).sum())
        if step >= end:
            assert count == least
        elif step <= start:
            assert count == most
        elif step % every == 0:
            assert count == int((most - least) * (1 - (step - start) / (end - start)) ** 3 + least)
    assert progress(model).steps == end + 3


def test_what_is_pruned_stays_so_after_the_end():
    """With momentum that would move them, pruned values stay zero, and the others go on learning."""
    model = net(AdaLoRA(rank=6, target_rank=2, end=5))
    data = batches(25)
    train(model, data[:5], torch.optim.AdamW, lr=0.02)
    kept, before = left(model), [adapter.values.detach().clone() for adapter in adapters(model).values()]
    assert int(kept.sum()) == 6
    train(model, data[5:], torch.optim.SGD, lr=0.1, momentum=0.9)
    assert torch.equal(left(model), kept)
    assert any(not torch.equal(b, a.values) for b, a in zip(before, adapters(model).values(), strict=True))


def test_no_pruning_where_the_target_is_the_rank():
    """With nothing to prune, nothing is pruned."""
    model = train(net(AdaLoRA(rank=3, target_rank=3, end=4)), batches(6))
    assert left(model).all()


def test_a_site_that_gets_no_gradient_is_pruned_first():
    """A layer that the model does not run is not important, and no error."""
    model = net(AdaLoRA(rank=4, target_rank=2, end=4))
    spare = copy.deepcopy(model)
    model.forward = types.MethodType(
        lambda self, x, y: types.SimpleNamespace(loss=self.hidden(x.flatten(1)).square().mean() + 0 * y.sum()), model
    )
    train(model, batches(6), torch.optim.AdamW, lr=0.01)
    kept = {path: int(adapter.kept.sum()) for path, adapter in adapters(model).items()}
    assert kept["conv"] == kept["head"] == 0
    assert 0 < kept["hidden"] <= 4
    assert adapters(spare)["conv"].kept.all()


# ---------------------------------------------------------------------------------------------------------- files


def saved_and_loaded(model, path):
    peftkit.save(model, path)
    torch.manual_seed(3)
    base = Net().double()
    torch.manual_seed(77)
    return peftkit.load(base, path, trainable=True, methods=[AdaLoRA])


def test_the_count_of_steps_is_resumed(tmp_path):
    """A run that goes on from a file knows how far it has come, and ends at the same step with the target."""
    method, data = AdaLoRA(rank=6, target_rank=2, start=1, end=10), batches(12)
    model = train(net(method), data[:5], torch.optim.AdamW, lr=0.02)
    resumed = saved_and_loaded(model, tmp_path / "a.safetensors")
    assert progress(resumed).steps == 5
    train(resumed, data[5:6], torch.optim.AdamW, lr=0.02)
    assert int(left(resumed).sum()) == int(12 * (1 - 5 / 9) ** 3 + 6)
    train(resumed, data[6:], torch.optim.AdamW, lr=0.02)
    assert progress(resumed).steps == 12
    assert int(left(resumed).sum()) == 6


@pytest.mark.parametrize("steps", [9, 10, 12])
def test_resuming_around_the_end(steps, tmp_path):
    """Saved just before the end, at it or after it: the target is reached, and what was pruned for good stays so."""
    method, data = AdaLoRA(rank=6, target_rank=2, start=1, end=10), batches(15)
    model = train(net(method), data[:steps], torch.optim.AdamW, lr=0.02)
    resumed = saved_and_loaded(model, tmp_path / "a.safetensors")
    train(resumed, data[steps:])
    assert int(left(resumed).sum()) == 6
    if steps >= 10:
        assert torch.equal(left(resumed), left(model))
        train(model, data[steps:])
        for path, adapter in adapters(model).items():
            assert all(torch.equal(t, adapters(resumed)[path].state_dict()[n]) for n, t in adapter.state_dict().items())


def test_importance_starts_anew_in_a_resumed_run(tmp_path):
    """Averages of importance are in no file, as it says of itself: the first step after loading starts new ones."""
    data = batches(6)
    model = train(net(AdaLoRA(rank=6, target_rank=2, end=10)), data[:5])
    resumed = saved_and_loaded(model, tmp_path / "a.safetensors")
    assert progress(model).seen
    assert not progress(resumed).seen
    train(resumed, data[5:])
    assert len(progress(resumed).seen) == 9


# ---------------------------------------------------------------------------------------------- loops of all sorts


def test_gradient_accumulation():
    """Over two halves of each batch the run is the one over whole batches: what counts is the optimizer's step."""
    method, data = AdaLoRA(rank=5, target_rank=2, start=1, end=6), batches(9)
    whole = train(net(method), data)
    halves = net(method)
    optimizer = torch.optim.SGD([p for p in halves.parameters() if p.requires_grad], lr=0.1)
    for x, y in data:
        optimizer.zero_grad()
        for part in (slice(0, 6), slice(6, 12)):
            (halves(x[part], y[part]).loss / 2).backward()
        optimizer.step()
    assert torch.equal(left(whole), left(halves))
    for path, adapter in adapters(whole).items():
        torch.testing.assert_close(dict(adapter.state_dict()), dict(adapters(halves)[path].state_dict()))


def test_grad_scaler():
    """With a scaled loss the run is the same; a step that the scaler skips is not counted."""
    method, data = AdaLoRA(rank=5, target_rank=2, start=1, end=6), batches(9)
    plain = train(net(method), data)
    scaled = net(method)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = torch.optim.SGD([p for p in scaled.parameters() if p.requires_grad], lr=0.1)
    for i, (x, y) in enumerate([data[0], *data]):
        optimizer.zero_grad()
        scaler.scale(scaled(x, y).loss * (math.inf if i == 0 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        assert progress(scaled).steps == i
    assert torch.equal(left(plain), left(scaled))
    for path, adapter in adapters(plain).items():
        torch.testing.assert_close(dict(adapter.state_dict()), dict(adapters(scaled)[path].state_dict()))


def test_half_precision():
    """A model that is bfloat16 through and through trains and prunes too."""
    model = net(AdaLoRA(rank=5, target_rank=2, end=5)).bfloat16()
    train(model, [(x.bfloat16(), y) for x, y in batches(8)], torch.optim.AdamW, lr=0.01)
    assert int(left(model).sum()) == 6
    assert all(p.isfinite().all() for p in model.parameters())


def test_each_adapter_has_its_own_count():
    """An optimizer's step counts for the adapters that it trains, and for no others."""
    model = net(AdaLoRA(rank=5, target_rank=2, end=5))
    peftkit.wrap(model, SMALL, targets="*", name="other")
    peftkit.set_trainable(model, "default")
    train(model, batches(3))
    steps = {name: int(t) for name, t in model.state_dict().items() if name.endswith(".steps")}
    assert sorted((name.split(".")[-3], count) for name, count in steps.items()) == [("default", 3), ("other", 0)]


# --------------------------------------------------------------------------------------------------- the regulariser


class Stack(nn.Module):
    """A stack of matrices, and one matrix."""

    def __init__(self):
        super().__init__()
        self.experts = nn.Parameter(torch.randn(3, 5, 6).double())
        self.linear = nn.Linear(6, 4).double()

    def forward(self, x):
        return self.linear(x).sum() + torch.einsum("eoi,ri->reo", self.experts, x).sum()


def test_regulariser():
    """A step moves each factor by the gradient of the mean of |P Pᵀ - I| over all, each matrix of a stack by itself."""
    torch.manual_seed(0)
    model = peftkit.wrap(Stack(), AdaLoRA(rank=3, target_rank=1, orthogonality=0.25), targets=["experts", "linear"])
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for p in trained.values():
            p.normal_()
    norms = []
    for name, p in trained.items():
        rows = {"down": p, "up": p.mT}.get(name.rsplit(".", 1)[1])
        if rows is not None:
            norms += [
                torch.linalg.matrix_norm(each @ each.T - torch.eye(3)) for each in rows.reshape(-1, 3, rows.shape[-1])
            ]
    assert len(norms) == 8
    loss = model(torch.randn(2, 6).double())
    wanted = torch.autograd.grad(loss + 0.25 * torch.stack(norms).mean(), list(trained.values()), retain_graph=True)
    loss.backward()
    optimizer = torch.optim.SGD(trained.values(), lr=1e-3)
    before = [p.detach().clone() for p in trained.values()]
    optimizer.step()
    for name, p, start, gradient in zip(trained, trained.values(), before, wanted, strict=True):
        if not name.endswith("values"):  # those are pruned besides
            torch.testing.assert_close(start - p.detach(), 1e-3 * gradient, rtol=1e-9, atol=1e-12)


def test_orthogonal_factors_have_no_pull():
    """Where every factor is orthogonal already the regulariser is zero, and so is its gradient; it is no NaN."""
    model = net(AdaLoRA(rank=3, target_rank=2, end=9))
    with torch.no_grad():
        for adapter in adapters(model).values():
            for p in (adapter.down, adapter.up):
                nn.init.eye_(p)
    before = [adapter.down.detach().clone() for adapter in adapters(model).values()]
    train(model, [(x * 0, y) for x, y in batches(1)])
    assert all(adapter.down.isfinite().all() for adapter in adapters(model).values())
    assert torch.equal(before[0], adapters(model)["conv"].down)


@pytest.mark.parametrize(
    "field, value",
    [
        ("rank", 0),
        ("target_rank", 0),
        ("target_rank", 13),
        ("alpha", 0),
        ("alpha", math.inf),
        ("dropout", 1.0),
        ("start", -1),
        ("start", 1000),
        ("end", 0),
        ("end", 10.0),
        ("every", 0),
        ("orthogonality", -0.1),
        ("beta1", 1.0),
        ("beta2", -0.5),
        ("beta2", "0.5"),
    ],
)
def test_fields(field, value):
    """A wrong value is refused by name."""
    with pytest.raises(peftkit.errors.FieldError, match=f"adalora: {field} must be"):
        AdaLoRA(**{field: value})


def test_docstrings():
    """The examples in the docstrings are true."""
    found = doctest.testmod(sys.modules[AdaLoRA.__module__])
    assert found.attempted > 0
    assert found.failed == 0
