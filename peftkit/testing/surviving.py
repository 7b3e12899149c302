"""Checks of the ecosystem: copies, casts, autocast, checkpointing, compiling, functional calls, mixed batches."""

import dataclasses
import io
import warnings

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import peftkit
from peftkit.testing.cases import ROWS, Case
from peftkit.testing.subject import (
    NAME,
    TOLERANCE,
    NotApplicableError,
    call,
    close,
    differ,
    duplicate,
    example,
    expect,
    finite,
    loss_of,
    run,
    same,
    stirred,
    trainable,
    with_adapters,
    wrapped,
)


def check_deepcopy(method: peftkit.Method, case: Case) -> None:
    """A deep copy of the model computes the same, and what happens to it does not happen to the original."""
    model = stirred(wrapped(method, case))
    trainable(model)
    wanted = run(model, case)
    copied = duplicate(model)
    same(run(copied, case), wanted, "the copy's output against the original's")
    changed = run(stirred(copied, seed=8), case)
    expect(differ(changed, wanted), "expected other values in the copy to change the copy's output")
    same(run(model, case), wanted, "the original's output after its copy was changed")


def check_pickle(method: peftkit.Method, case: Case) -> None:
    """The model can be pickled, and computes the same afterwards."""
    model = stirred(wrapped(method, case))
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    again = torch.load(stream, weights_only=False)
    same(run(again, case), run(model, case), "the output after pickling")


def check_casts(method: peftkit.Method, case: Case) -> None:
    """`model.to(dtype)` takes adapters along: the output has the new dtype, and is close to what it was."""
    for dtype in (torch.float64, torch.bfloat16):
        model = stirred(wrapped(method, case))
        wanted = run(model, case)
        trainable(model)
        actual = run(model.to(dtype), case, dtype)
        for t in actual:
            expect(t.dtype == dtype, f"expected an output of {dtype}, got {t.dtype}")
        for name, p in model.named_parameters():
            expect(p.dtype == dtype or not p.is_floating_point(), f"expected {name} to be {dtype}, it is {p.dtype}")
        close(
            actual, wanted, f"the output in {dtype} against float32's", max(TOLERANCE[dtype], TOLERANCE[torch.float32])
        )


def check_autocast(method: peftkit.Method, case: Case) -> None:
    """Under bfloat16 autocast output and gradients are finite, and the output is close to float32's."""
    model = stirred(wrapped(method, case))
    parameters = trainable(model)
    wanted = run(model, case)
    with torch.autocast(torch.device(case.device).type, dtype=torch.bfloat16):
        actual = call(model, example(case))
    close([t.float() for t in actual], wanted, "the output under autocast", TOLERANCE[torch.bfloat16])
    loss_of([t.float() for t in actual]).backward()  # type: ignore[no-untyped-call]
    for path, p in parameters.items():
        finite(p.grad, f"the gradient of {path} under autocast")


def check_checkpointing(method: peftkit.Method, case: Case) -> None:
    """Gradient checkpointing, in both modes, gives the same output and gradients."""
    wanted, gradients = _checkpointed(method, case, reentrant=None)
    for reentrant in (True, False):
        mode = f"checkpoint(use_reentrant={reentrant})"
        output, others = _checkpointed(method, case, reentrant=reentrant)
        close(output, wanted, f"the output with {mode}", TOLERANCE[torch.float32])
        for path, gradient in gradients.items():
            close([others[path]], [gradient], f"the gradient of {path} with {mode}", TOLERANCE[torch.float32])


def _checkpointed(
    method: peftkit.Method, case: Case, *, reentrant: bool | None
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Output and gradients, without checkpointing where `reentrant` is None."""
    model = stirred(wrapped(method, case, training=True))
    parameters = trainable(model)
    inputs = example(case)
    anchor = torch.zeros(
        (), requires_grad=True, device=case.device
    )  # the reentrant mode needs an input with a gradient

    def forward(anchor: Tensor) -> tuple[Tensor, ...]:
        return tuple(t + anchor for t in call(model, inputs))

    torch.manual_seed(6)
    outputs = forward(anchor) if reentrant is None else checkpoint(forward, anchor, use_reentrant=reentrant)
    loss_of(outputs).backward()  # type: ignore[no-untyped-call]
    for path, p in parameters.items():
        finite(p.grad, f"the gradient of {path}")
    return [t.detach() for t in outputs], {
        path: p.grad.to_dense() for path, p in parameters.items() if p.grad is not None
    }


def check_compile(method: peftkit.Method, case: Case) -> None:
    """`torch.compile` captures the model as one graph, which gives the same, and is used again by a second call."""
    model = stirred(wrapped(method, case))
    parameters = trainable(model)
    eager = call(model, example(case))
    wanted = torch.autograd.grad(loss_of(eager), list(parameters.values()))
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the compiler says of itself is not the method's to answer for
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        first = call(compiled, example(case))
        with torch.compiler.set_stance("fail_on_recompile"):
            second = call(compiled, example(case))
        actual = torch.autograd.grad(loss_of(second), list(parameters.values()))
    torch.compiler.reset()
    close(first, eager, "the compiled output against the eager one", TOLERANCE[torch.float32])
    close(second, eager, "the compiled output of a second call", TOLERANCE[torch.float32])
    close(actual, wanted, "the compiled gradients against the eager ones", TOLERANCE[torch.float32])


def check_functional_call(method: peftkit.Method, case: Case) -> None:
    """Everything that the output depends on is a parameter or buffer of the model: `functional_call` can replace it."""
    start, trained = wrapped(method, case), stirred(wrapped(method, case))
    trainable(start)
    state = {**dict(trained.named_parameters()), **dict(trained.named_buffers())}

    def functional(*args: object, **kwargs: object) -> object:
        return torch.func.functional_call(start, state, args, kwargs)

    with torch.no_grad():
        close(call(functional, example(case)), run(trained, case), "functional_call", TOLERANCE[torch.float32])


def check_routed(method: peftkit.Method, case: Case) -> None:
    """In a batch whose samples have different adapters each is what it is alone; an `Activation` is refused."""
    model = stirred(wrapped(method, case, dtype=torch.float64))
    adapters = with_adapters(model)
    wrapped(method, case, model=model, name="other", seed=2)
    peftkit.set_trainable(model, "other")
    stirred(model, seed=3)
    names = [NAME, None, "other"]
    inputs = example(case, torch.float64)
    if any(isinstance(adapter, peftkit.Activation) for adapter in adapters.values()):
        try:
            with torch.no_grad(), peftkit.routed(model, names):
                call(model, inputs)
        except peftkit.errors.UnsupportedLayerError:
            return
        expect(False, "expected routing to be refused with an UnsupportedLayerError: it surrounds a whole layer")
    with torch.no_grad():
        with peftkit.routed(model, names):
            mixed = call(model, inputs)
        for row, name in enumerate(names):
            with peftkit.using(model, *([name] if name else [])):
                alone = call(model, inputs)
            what = f"sample {row} of {ROWS} with adapter {name!r} in a mixed batch"
            close([t[row] for t in mixed], [t[row] for t in alone], what, TOLERANCE[torch.float64])


def check_summary(method: peftkit.Method, case: Case) -> None:
    """`summary` counts what is there and can be printed."""
    model = wrapped(method, case)
    parameters = trainable(model)
    (row,) = peftkit.summary(model).adapters
    count = sum(p.numel() for p in parameters.values())
    expect(row.trainable == count, f"summary counts {row.trainable} trainable parameters, there are {count}")
    expect(str(method) in str(peftkit.summary(model)), f"expected {method} in the printed summary")


def check_verify(method: peftkit.Method, case: Case) -> None:
    """`verify` finds no fault with a trained adapter."""
    model = stirred(wrapped(method, case))
    trainable(model)
    report = peftkit.verify(model, example(case))
    expect(report.ok, f"expected no fault, verify found:\n{report}")


def check_device(method: peftkit.Method, case: Case) -> None:
    """Another device gives the same adapter from the same seed, and the same output to rounding."""
    if case.device == "cpu":
        raise NotApplicableError('no other device was asked for: check_method(method, device="cuda")')
    there, here = wrapped(method, case), wrapped(method, dataclasses.replace(case, device="cpu"))
    theirs, ours = peftkit.state_dict(there, NAME), peftkit.state_dict(here, NAME)
    for name, tensor in ours.items():
        expect(theirs[name].device.type == torch.device(case.device).type, f"{name} is on {theirs[name].device}")
        close([theirs[name].cpu()], [tensor], f"{name} on {case.device} against cpu", TOLERANCE[torch.float32])
    actual, wanted = run(stirred(there), case), run(stirred(here), dataclasses.replace(case, device="cpu"))
    close([t.cpu() for t in actual], wanted, f"the output on {case.device} against cpu", 10 * TOLERANCE[torch.float32])


CHECKS = (check_deepcopy, check_casts, check_functional_call, check_verify, check_device)
ON_ONE_CASE = (
    check_pickle,
    check_autocast,
    check_checkpointing,
    check_compile,
    check_routed,
    check_summary,
)
