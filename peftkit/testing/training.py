"""Checks of training: what trains, that it learns, by right gradients, and that all else stays."""

import torch

import peftkit
from peftkit.testing.cases import Case
from peftkit.testing.subject import (
    NAME,
    NotApplicableError,
    Snapshot,
    base,
    call,
    example,
    expect,
    finite,
    loss_of,
    run,
    stirred,
    train,
    trainable,
    wrapped,
)


def _in_place(model: torch.nn.Module) -> set[str]:
    """The base's own parameters that the adapter trains in place, by path."""
    return set(peftkit.state_dict(model, NAME)) & {name for name, _ in model.named_parameters()}


def check_only_adapters_train(method: peftkit.Method, case: Case) -> None:
    """What trains is the adapters', or a weight that the method trains in place; nothing else gets a gradient."""
    before = base(case)
    own = {name for name, _ in before.named_parameters()}
    model = wrapped(method, case, training=True)
    trainable(model)
    own -= _in_place(model)
    loss_of(call(model, example(case))).backward()  # type: ignore[no-untyped-call]
    for name, p in model.named_parameters():
        expect(name not in own or not p.requires_grad, f"expected {name} of the base to be frozen, and it trains")
        expect(p.requires_grad or p.grad is None, f"expected no gradient for {name}, which does not train")


def check_gradients_arrive(method: peftkit.Method, case: Case) -> None:
    """Every trainable parameter gets a finite gradient, and within two steps one that is not zero."""
    model = wrapped(method, case, training=True)
    steps = train(model, case, range(2))
    for path in steps[0]:
        for step, gradients in enumerate(steps, 1):
            gradient = gradients[path]
            expect(gradient is not None, f"{path} got no gradient in step {step}: the output does not depend on it")
            finite(gradient, f"the gradient of {path} in step {step}")
        moved = any(g is not None and bool(g.to_dense().any()) for g in (gradients[path] for gradients in steps))
        expect(moved, f"{path} got a gradient of nothing but zeros in both of two steps")


def check_base_stays(method: peftkit.Method, case: Case) -> None:
    """Training changes no bit of the base, nor of what an adapter holds frozen."""
    reference = base(case, training=True)
    model = wrapped(method, case, training=True)
    before = Snapshot.of(model)
    train(model, case, range(3), adam=True)
    with torch.no_grad():
        for step in range(3):  # buffers of the base (a norm's statistics) move as they do without adapters
            torch.manual_seed(step)
            call(reference, example(case))
    parameters = dict(model.named_parameters())
    frozen = [name for name in before.flags if name in parameters and not before.flags[name]]
    before.expect_values({name: parameters[name] for name in frozen})
    whole = {name for name, _ in reference.named_parameters()}
    expect(whole - _in_place(model) <= set(frozen), "expected the whole base to be frozen")


def check_learning(method: peftkit.Method, case: Case) -> None:
    """The loss falls on a task that the method can solve: to become a copy of itself with other values."""
    model = wrapped(method, case)
    trainable(model)
    wanted = run(stirred(wrapped(method, case)), case)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        pairs = zip(call(model, example(case)), wanted, strict=True)
        loss = torch.stack([(a - b).square().mean() for a, b in pairs]).sum()
        losses.append(loss.item())
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    expect(losses[0] > 0, "other values of its parameters do not change the output")
    expect(
        min(losses) < 0.8 * losses[0],
        f"expected the loss to fall by a fifth in 30 steps, it went from {losses[0]:.3g} to {min(losses):.3g} at best",
    )


def check_finite_differences(method: peftkit.Method, case: Case) -> None:
    """In float64, each parameter's gradient is the slope that a small step along a random direction measures."""
    model = stirred(wrapped(method, case, dtype=torch.float64))
    parameters = trainable(model)
    inputs = example(case, torch.float64)
    if any("padding_idx" in vars(m) and m.padding_idx is not None for m in model.modules()):
        raise NotApplicableError("torch leaves the padding row out of an embedding's gradient, which then is no slope")
    loss_of(call(model, inputs)).backward()  # type: ignore[no-untyped-call]
    generator = torch.Generator().manual_seed(50)
    for path, p in parameters.items():
        gradient = torch.zeros_like(p) if p.grad is None else p.grad.to_dense()
        direction = torch.randn(p.shape, generator=generator).to(p.device, p.dtype)
        losses = []
        for step in (1e-5, -2e-5, 1e-5):
            with torch.no_grad():
                p.add_(direction * step)
                losses.append(loss_of(call(model, inputs)).item())
        measured = (losses[0] - losses[1]) / 2e-5
        given = (gradient * direction).sum().item()
        size = max(abs(measured), gradient.norm().item(), 1e-3)
        expect(
            abs(measured - given) <= 1e-4 * size,
            f"the gradient of {path} gives the slope {given:.6g}, a finite difference measures {measured:.6g}",
        )


def check_param_groups(method: peftkit.Method, case: Case) -> None:
    """`param_groups` holds every trainable parameter exactly once, in groups that torch's optimizers take."""
    model = wrapped(method, case)
    parameters = trainable(model)
    groups = peftkit.param_groups(model, lr=0.01)
    held = [id(p) for group in groups for p in group["params"]]
    for path, p in parameters.items():
        count = held.count(id(p))
        expect(count == 1, f"expected {path} once in the optimizer groups, it is there {count} times")
    expect(len(held) == len(parameters), "the optimizer groups hold parameters that do not train")
    torch.optim.AdamW(groups)


def check_steps_keep_parameters(method: peftkit.Method, case: Case) -> None:
    """Optimizer steps, with `after_step` behind each, leave the same parameter objects, finite and as trainable."""
    model = wrapped(method, case, training=True)
    trainable(model)
    before = dict(model.named_parameters())
    flags = {path: p.requires_grad for path, p in before.items()}
    shapes = {path: t.shape for path, t in model.state_dict().items()}
    train(model, case, range(4), adam=True)
    after = dict(model.named_parameters())
    expect(list(after) == list(before), f"expected the parameters {list(before)} after training, got {list(after)}")
    for path, p in after.items():
        expect(p is before[path], f"expected {path} to stay the same object: an optimizer holds on to it")
        expect(p.requires_grad is flags[path], f"expected {path}.requires_grad to stay {flags[path]}")
    for path, tensor in model.state_dict().items():
        expect(tensor.shape == shapes.get(path), f"expected {path} to keep its shape {shapes.get(path)}")
        if tensor.is_floating_point():
            finite(tensor, f"{path} after training")


CHECKS = (
    check_only_adapters_train,
    check_gradients_arrive,
    check_base_stays,
    check_finite_differences,
    check_param_groups,
    check_steps_keep_parameters,
)
ON_ONE_CASE = (check_learning,)
