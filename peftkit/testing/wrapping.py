"""Checks of `wrap`: what it changes, what it must not, and what is at the start."""

import torch

import peftkit
from peftkit.testing.cases import Case
from peftkit.testing.subject import (
    NAME,
    Snapshot,
    adapters_of,
    base,
    call,
    close,
    example,
    expect,
    finite,
    loss_of,
    run,
    same,
    sites_of,
    stirred,
    targets_of,
    trainable,
    with_adapters,
    wrapped,
)


def check_only_targets_change(method: peftkit.Method, case: Case) -> None:
    """Wrapping adds adapters to the layers that it targets, and neither replaces nor alters anything else."""
    model = base(case)
    before = Snapshot.of(model)
    targets = {id(model.get_submodule(site.path)) for site in sites_of(method, case)}
    wrapped(method, case, model=model)
    now = dict(model.named_modules(remove_duplicate=False))
    for path, module in before.modules.items():
        where = path or "the model"
        expect(now.get(path) is module, f"expected {where} to be the same object, and it was replaced")
        expect(isinstance(module, before.classes[path]), f"expected {where} to stay a {before.classes[path].__name__}")
        if not any(id(each) in targets for each in module.modules()):
            expect(type(module) is before.classes[path], f"expected {where} to keep its class: no target is in it")
            expect(
                frozenset(module.__dict__) == before.attributes[path],
                f"expected {where} to keep its attributes: no target is in it",
            )
    for path in (*now, *model.state_dict()):
        inside = any(part == "adapters" for part in path.split("."))
        known = path in before.modules or path in before.tensors
        expect(known or inside, f"expected nothing new outside of `adapters`, and there is {path}")
    before.expect_values()


def check_start(method: peftkit.Method, case: Case) -> None:
    """A new adapter changes no bit of the output, where the method says so; elsewhere the output is finite."""
    model = base(case).requires_grad_(False)
    wanted = run(model, case)
    wrapped(method, case, model=model)
    for name, p in model.named_parameters():  # torch chooses kernels by it, for weights that are trained in place
        if "adapters" not in name.split("."):
            p.requires_grad_(False)
    actual = run(model, case)
    if method.identity:
        same(actual, wanted, "the output at the start against the base's, because the method declares `identity`")
    for a, b in zip(actual, wanted, strict=True):
        finite(a, "the output at the start")
        expect(a.shape == b.shape, f"expected an output of shape {list(b.shape)} at the start, got {list(a.shape)}")
        expect(a.dtype == b.dtype, f"expected an output of {b.dtype} at the start, got {a.dtype}")
    for a, b in zip(call(model.train(), example(case)), call(base(case, training=True), example(case)), strict=True):
        expect(a.shape == b.shape, f"expected shape {list(b.shape)} in training, got {list(a.shape)}")


def check_dtypes(method: peftkit.Method, case: Case) -> None:
    """Adapters are float32 on a bfloat16 base and float64 on a float64 one; outputs and gradients fit."""
    for dtype, own in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        model = base(case, dtype=dtype)
        wanted = run(model.requires_grad_(False), case, dtype)
        wrapped(method, case, model=model)
        for path, adapter in with_adapters(model).items():
            for name, p in adapter.named_parameters():
                fits = p.dtype == own or not p.is_floating_point()
                expect(fits, f"expected {path}.{name} to be {own} on a {dtype} base, it is {p.dtype}")
        actual = run(model, case, dtype)
        for a, b in zip(actual, wanted, strict=True):
            expect(a.dtype == b.dtype, f"expected an output of {b.dtype} on a {dtype} base, got {a.dtype}")
        if method.identity:
            same(actual, wanted, f"the output at the start on a {dtype} base")
        stirred(model)
        loss_of(call(model, example(case, dtype))).backward()  # type: ignore[no-untyped-call]
        for path, p in trainable(model).items():
            finite(p.grad, f"the gradient of {path} on a {dtype} base")


def check_meta(method: peftkit.Method, case: Case) -> None:
    """On the meta device wrapping allocates nothing, and makes the same parameters as on a real one."""
    if type(method).observer is not peftkit.Method.observer:
        _check_plan_on_meta(method, case)
        return
    real = wrapped(method, case)
    meta = wrapped(method, case, model=base(case).to("meta"))
    for name, tensor in meta.state_dict().items():
        expect(tensor.is_meta, f"expected {name} on the meta device, it is on {tensor.device}")
    wanted = {name: tuple(p.shape) for name, p in real.named_parameters() if p.requires_grad}
    actual = {name: tuple(p.shape) for name, p in meta.named_parameters() if p.requires_grad}
    expect(actual == wanted, f"expected the trainable parameters {wanted} on the meta device, got {actual}")


def _check_plan_on_meta(method: peftkit.Method, case: Case) -> None:
    """A start from data needs values, so such a method is planned on the meta device and wrapped on a real one."""
    planned = peftkit.plan(base(case).to("meta"), method, targets=targets_of(method, case)).trainable
    real = sum(p.numel() for p in wrapped(method, case).parameters() if p.requires_grad)
    expect(planned == real, f"planned on the meta device it trains {planned} parameters, wrapped {real}")


def check_count(method: peftkit.Method, case: Case) -> None:
    """`plan` counts what `wrap` then trains, and each site gets one adapter, also where two paths lead to it."""
    plan = peftkit.plan(base(case), method, targets=targets_of(method, case))
    model = wrapped(method, case)
    actual = sum(p.numel() for p in model.parameters() if p.requires_grad)
    expect(actual == plan.trainable, f"plan counts {plan.trainable} trainable parameters, wrap trains {actual}")
    summed = peftkit.summary(model).trainable if adapters_of(model) else actual
    expect(summed == actual, f"summary counts {summed} trainable parameters, there are {actual}")
    adapters = with_adapters(model)
    expect(len(adapters) <= len(plan.steps), f"expected one adapter a site ({len(plan.steps)}), got {len(adapters)}")
    distinct = {id(adapter) for adapter in adapters.values()}
    expect(len(distinct) == len(adapters), "expected an adapter of its own at each site, two sites have the same")


def check_modes(method: peftkit.Method, case: Case) -> None:
    """A new adapter is in its layer's mode, train or eval, and follows the model."""
    for training in (True, False):
        model = wrapped(method, case, training=training)
        for now in (training, not training):
            for path, adapter in with_adapters(model.train(now)).items():
                for name, module in adapter.named_modules():
                    where = f"{path}.{name}".rstrip(".")
                    expect(module.training is now, f"expected {where}.training to be {now}, as the model's is")


def check_seed(method: peftkit.Method, case: Case) -> None:
    """The same seed makes the same adapter."""
    with_adapters(wrapped(method, case))
    first, second = (peftkit.state_dict(wrapped(method, case, seed=7), NAME) for _ in range(2))
    expect(list(first) == list(second), f"the same seed gave the tensors {list(first)}, then {list(second)}")
    for name, tensor in first.items():
        same([second[name]], [tensor], f"{name} from the same seed")


def check_forward_draws_nothing(method: peftkit.Method, case: Case) -> None:
    """In eval mode the output is deterministic: no random number is drawn, and no state changes."""
    model = stirred(wrapped(method, case))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = run(model, case)
    expect(torch.equal(torch.get_rng_state(), before), "expected no random number to be drawn in eval mode")
    state = {name: t.clone() for name, t in model.state_dict().items()}
    close(run(model, case), first, "a second run in eval mode against the first", 0.0)
    for name, tensor in model.state_dict().items():
        same([tensor], [state[name]], f"{name} after a run in eval mode")


CHECKS = (
    check_only_targets_change,
    check_start,
    check_dtypes,
    check_meta,
    check_count,
    check_modes,
    check_seed,
    check_forward_draws_nothing,
)
