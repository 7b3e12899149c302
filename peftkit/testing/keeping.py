"""Checks of state: what a file holds is the adapter, all of it, and nothing else."""

from torch import nn

import peftkit
from peftkit.testing.cases import Case
from peftkit.testing.subject import (
    NAME,
    Snapshot,
    adapters_of,
    base,
    expect,
    loaded,
    run,
    same,
    saved_bytes,
    stirred,
    targets_of,
    train,
    trainable,
    with_adapters,
    wrapped,
)


def check_state_is_the_adapters(method: peftkit.Method, case: Case) -> None:
    """The state holds every trainable tensor, and no tensor of the base that is not trained in place."""
    own = {id(p) for p in base(case).parameters()}
    model = base(case)
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    wrapped(method, case, model=model)
    trained = {p.untyped_storage().data_ptr() for p in trainable(model).values()}
    held = {name: t.untyped_storage().data_ptr() for name, t in peftkit.state_dict(model, NAME).items()}
    for name, pointer in held.items():
        expect(pointer not in own or pointer in trained, f"expected no tensor of the base in the state, {name} is one")
    missing = [path for path, p in trainable(model).items() if p.untyped_storage().data_ptr() not in held.values()]
    expect(not missing, f"expected everything that trains in the state, and it lacks {missing}")


def check_save_and_load(method: peftkit.Method, case: Case) -> None:
    """What is saved and loaded onto a fresh base computes the same, bit for bit."""
    model = stirred(wrapped(method, case))
    trainable(model)
    fresh = loaded(method, base(case), saved_bytes(model))
    wanted, actual = peftkit.state_dict(model, NAME), peftkit.state_dict(fresh, NAME)
    expect(list(actual) == list(wanted), f"expected the tensors {list(wanted)} after loading, got {list(actual)}")
    for name in wanted:
        same([actual[name]], [wanted[name]], f"{name} after loading")
    for p in model.parameters():
        p.requires_grad_(False)  # torch chooses kernels by it, for weights that are trained in place
    for p in fresh.parameters():
        p.requires_grad_(False)
    same(run(fresh, case), run(model, case), "the output of the loaded adapter against the saved one's")


def check_strict_state(method: peftkit.Method, case: Case) -> None:
    """`load_state_dict` takes the adapter's tensors and no others, and then the adapter has their values."""
    model = wrapped(method, case)
    trainable(model)
    wanted = {name: t.clone() for name, t in peftkit.state_dict(stirred(wrapped(method, case)), NAME).items()}
    first = next(iter(wanted))
    wrong = {
        "a missing tensor": {name: t for name, t in wanted.items() if name != first},
        "a tensor too many": {**wanted, "no.such.tensor": wanted[first]},
        "a tensor of another shape": {**wanted, first: wanted[first].new_zeros(7, 7, 7)},
    }
    before = Snapshot.of(model)
    for what, state in wrong.items():
        try:
            peftkit.load_state_dict(model, state, NAME)
        except peftkit.errors.FormatError:
            before.expect_values()
        else:
            expect(False, f"expected a FormatError for {what}, it was taken")
    peftkit.load_state_dict(model, wanted, NAME)
    for name, tensor in peftkit.state_dict(model, NAME).items():
        same([tensor], [wanted[name]], f"{name} after load_state_dict")
    same(
        run(model.requires_grad_(False), case),
        run(stirred(wrapped(method, case)).requires_grad_(False), case),
        "the output after load_state_dict",
    )


def check_saved_bytes(method: peftkit.Method, case: Case) -> None:
    """The same adapter gives the same bytes, also after it has run."""
    model = stirred(wrapped(method, case))
    trainable(model)
    first = saved_bytes(model)
    run(model, case)
    expect(saved_bytes(model) == first, "expected the same file from the same adapter, and its bytes differ")


def check_no_shared_storage(method: peftkit.Method, case: Case) -> None:
    """No two tensors of the state share memory, and each is one that safetensors can hold."""
    state = peftkit.state_dict(wrapped(method, case), NAME)
    owners: dict[int, str] = {}
    for name, tensor in state.items():
        expect(not tensor.is_sparse and not tensor.is_complex(), f"{name} is {tensor.dtype}, which a file cannot hold")
        pointer = tensor.untyped_storage().data_ptr()
        other = owners.setdefault(pointer, name)
        expect(not pointer or other == name, f"{other} and {name} share memory: loading them would part them")


def check_shared_state(method: peftkit.Method, case: Case) -> None:
    """State that sites share is held once, at the model, and saved once."""
    state = method.shared(sites_with_values(method, case))
    if state is None:
        return
    shapes = [tuple(t.shape) for t in state.state_dict().values()]
    model = wrapped(method, case)
    root = [name for name in peftkit.state_dict(model, NAME) if name.startswith("shared-")]
    expect(len(root) == len(shapes), f"expected {len(shapes)} shared tensors in the state, got {root}")
    shared: nn.Module = model.get_submodule(f"adapters.{NAME}.shared-0")
    pointers = {t.untyped_storage().data_ptr() for t in shared.state_dict().values()}
    for path, adapter in adapters_of(model).items():
        for name, tensor in adapter.state_dict().items():
            own = tensor.untyped_storage().data_ptr() not in pointers
            expect(own, f"expected the shared state at the model alone, and {path}.{name} holds it too")


def sites_with_values(method: peftkit.Method, case: Case) -> list[peftkit.Site]:
    """The case's sites on a real device."""
    return [site for site, _ in peftkit.plan(base(case), method, targets=targets_of(method, case)).steps]


def check_resume(method: peftkit.Method, case: Case) -> None:
    """Training that goes on from a file gives the bits of training that was never interrupted."""
    straight = wrapped(method, case, training=True)
    with_adapters(straight)
    train(straight, case, range(4))
    halted = wrapped(method, case, training=True)
    train(halted, case, range(2))
    fresh = base(case, training=True)
    fresh.load_state_dict(  # buffers of the base (a norm's statistics) are no part of an adapter's file
        {name: t for name, t in halted.state_dict().items() if "adapters" not in name.split(".")}
    )
    resumed = loaded(method, fresh, saved_bytes(halted), trainable=True)
    train(resumed, case, range(2, 4))
    wanted = peftkit.state_dict(straight, NAME)
    for name, tensor in peftkit.state_dict(resumed, NAME).items():
        same([tensor], [wanted[name]], f"{name} after 2 + 2 steps through a file, against 4 steps")


CHECKS = (
    check_state_is_the_adapters,
    check_save_and_load,
    check_strict_state,
    check_saved_bytes,
    check_no_shared_storage,
    check_shared_state,
    check_resume,
)
