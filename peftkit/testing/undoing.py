"""Checks of merge, unmerge, unwrap and disable: each way back is exact."""

import torch

import peftkit
from peftkit.testing.cases import Case
from peftkit.testing.subject import (
    TOLERANCE,
    Snapshot,
    base,
    close,
    expect,
    run,
    same,
    stirred,
    trainable,
    with_adapters,
    wrapped,
)

_EXACT = torch.float64


def check_merge(method: peftkit.Method, case: Case) -> None:
    """Merged, the model computes the same to rounding; an adapter without a weight form is refused."""
    model = stirred(wrapped(method, case))
    if any(isinstance(adapter, peftkit.Activation) for adapter in with_adapters(model).values()):
        _expect_refused_merge(model, case)
        return
    for dtype in (torch.float32, _EXACT):
        model = stirred(wrapped(method, case, dtype=dtype))
        wanted = run(model, case, dtype)
        peftkit.merge(model, untie=True)
        close(run(model, case, dtype), wanted, f"the merged output against the unmerged one, {dtype}", TOLERANCE[dtype])


def _expect_refused_merge(model: torch.nn.Module, case: Case) -> None:
    wanted = run(model, case)
    try:
        peftkit.merge(model)
    except peftkit.errors.UnsupportedLayerError:
        same(run(model, case), wanted, "the output after a refused merge")
    else:
        expect(False, "expected a merge to be refused with an UnsupportedLayerError: there is no weight form")


def check_merge_leaves_a_plain_model(method: peftkit.Method, case: Case) -> None:
    """`merge(keep_base=False)` leaves the model's own classes and keys, and what was learned."""
    plain = base(case)
    model = stirred(wrapped(method, case, dtype=_EXACT))
    with_adapters(model, peftkit.Adapter)
    wanted = run(model, case, _EXACT)
    peftkit.merge(model, keep_base=False, untie=True)
    before, after = dict(plain.named_modules()), dict(model.named_modules())
    expect(list(before) == list(after), f"expected the modules {list(before)}, got {list(after)}")
    for path, module in after.items():
        expect(type(module) is type(before[path]), f"expected {path or 'the model'} to have its own class again")
    expect(list(plain.state_dict()) == list(model.state_dict()), "expected the base's own keys, and no others")
    close(run(model, case, _EXACT), wanted, "the plain model's output against the adapted one's", TOLERANCE[_EXACT])


def check_unmerge(method: peftkit.Method, case: Case) -> None:
    """Any number of merges and unmerges changes no bit."""
    model = stirred(wrapped(method, case))
    with_adapters(model, peftkit.Adapter)
    before, wanted = Snapshot.of(model), run(model, case)
    for _ in range(3):
        peftkit.unmerge(peftkit.merge(model, untie=True))
    for path, p in model.named_parameters(remove_duplicate=False):
        expect(p is before.tensors.get(path), f"expected unmerge to put the very parameter {path} back")
    before.expect_values()
    same(run(model, case), wanted, "the output after unmerge against the one before merge")


def check_unwrap(method: peftkit.Method, case: Case) -> None:
    """Unwrapped, the model is what it was: objects, classes, attributes, hooks, keys, bits and `requires_grad`."""
    model = base(case)
    for i, p in enumerate(model.parameters()):
        p.requires_grad_(bool(i % 2))
    before, wanted = Snapshot.of(model), run(model, case)
    keys = list(model.state_dict())
    wrapped(method, case, model=model)
    if _installs(model):
        stirred(model)
        run(model, case)
    peftkit.unwrap(model)
    now = Snapshot.of(model)
    expect(list(now.modules) == list(before.modules), f"expected {list(before.modules)}, got {list(now.modules)}")
    for path, module in before.modules.items():
        where = path or "the model"
        expect(now.modules[path] is module, f"expected {where} to be the object that it was")
        expect(now.classes[path] is before.classes[path], f"expected {where} to have its own class again")
        new, lost = now.attributes[path] - before.attributes[path], before.attributes[path] - now.attributes[path]
        expect(
            not new and not lost, f"expected {where} to have its own attributes, got {sorted(new)}, lost {sorted(lost)}"
        )
        expect(now.hooks[path] == before.hooks[path], f"expected {where} to have its own hooks alone")
    for path, tensor in before.tensors.items():
        expect(now.tensors.get(path) is tensor, f"expected {path} to be the tensor that it was")
        expect(now.flags[path] == before.flags[path], f"expected {path}.requires_grad to be {before.flags[path]} again")
    before.expect_values()
    expect(list(model.state_dict()) == keys, "expected the base's own keys")
    same(run(model, case), wanted, "the output after unwrap")


def _installs(model: torch.nn.Module) -> bool:
    return any("adapters" in path.split(".") for path, _ in model.named_modules())


def check_disabled(method: peftkit.Method, case: Case) -> None:
    """Disabled, a trained adapter leaves the base's output as it is, bit for bit."""
    model = base(case).requires_grad_(False)
    wanted = run(model, case)
    stirred(wrapped(method, case, model=model))
    with_adapters(model)
    with peftkit.disabled(model):
        same(run(model, case), wanted, "the output while disabled against the base's")


def check_merge_refuses_nan(method: peftkit.Method, case: Case) -> None:
    """A merge that would put NaN into the base is refused, and the base is left alone."""
    model = wrapped(method, case)
    with_adapters(model, peftkit.Adapter)
    parameters = trainable(model)
    with torch.no_grad():
        for p in parameters.values():
            p.fill_(float("nan"))
    own = {name: p for name, p in model.named_parameters() if "adapters" not in name.split(".")}
    before = Snapshot.of(model)
    try:
        peftkit.merge(model, untie=True)
    except peftkit.errors.UnsupportedLayerError:
        before.expect_values(own)
    else:
        expect(False, "expected a merge of NaN to be refused: whatever hides NaN hides that training has failed")


CHECKS = (
    check_merge,
    check_merge_leaves_a_plain_model,
    check_unmerge,
    check_unwrap,
    check_disabled,
    check_merge_refuses_nan,
)
