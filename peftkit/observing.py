"""Shows a method the data before its adapters are made, for a start that depends on it; the model is left as it was."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from peftkit.adapter import Observer, Site
from peftkit.errors import MethodError, StateError, UnsupportedLayerError
from peftkit.installed import atomically
from peftkit.method import Method
from peftkit.rehearsal import call, untouched


def observe(
    root: nn.Module, steps: Sequence[tuple[Site, Method]], data: Iterable[Any] | None
) -> tuple[tuple[Site, Method], ...]:
    """The steps, with each site's observer fed; `MethodError` for data that nobody asks for, or that is missing."""
    observers = [(site, method, method.observer(site)) for site, method in steps]
    asking = next((method for _, method, observer in observers if observer is not None), None)
    if asking is None:
        if data is not None:
            names = ", ".join(dict.fromkeys(str(method) for _, method in steps))
            raise MethodError(f"{names} starts from no data; leave out data=")
        return tuple(steps)
    if data is None:
        raise MethodError(f"{asking} takes its start from data; give wrap(…, data=batches)")
    if any(p.is_meta for p in root.parameters()):
        raise StateError(
            f"{asking} takes its start from data, and a model on the meta device has no values to run with"
        )
    seen = [(site, observer) for site, _, observer in observers if observer is not None]
    atomically(root, root.modules(), functools.partial(_show, root, seen, data, asking))
    return tuple((dataclasses.replace(site, observed=observer), method) for site, method, observer in observers)


def _show(root: nn.Module, seen: Sequence[tuple[Site, Observer]], data: Iterable[Any], asking: Method) -> None:
    differentiates = [pair for pair in seen if type(pair[1]).gradient is not Observer.gradient]
    flags = [(p, p.requires_grad) for p in root.parameters()]
    with untouched(root), ExitStack() as stack:
        root.eval()
        for site, observer in seen:
            if type(observer).inputs is not Observer.inputs:
                stack.enter_context(site.layer.register_forward_pre_hook(_Inputs(site, observer)))
        for p, _ in flags:
            p.requires_grad_(False)
        _ask_for_gradients(differentiates, stack)
        if not _run(root, data, asking, backward=bool(differentiates)):
            raise MethodError(f"{asking} takes its start from data, and data= holds no batch")
    for p, flag in flags:
        p.requires_grad_(flag)


def _run(root: nn.Module, data: Iterable[Any], asking: Method, *, backward: bool) -> int:
    batches = 0
    for batch in data:
        batches += 1
        with torch.set_grad_enabled(backward):
            output = batch(root) if callable(batch) else call(root, batch)
        if backward:
            _loss(output, asking).backward()  # type: ignore[no-untyped-call]
    return batches


def _loss(output: Any, asking: Method) -> Tensor:
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", output)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise MethodError(
            f"{asking} asks for gradients, so a batch must give a loss: let it hold labels, or be a function of the "
            "model that returns the loss"
        )
    return loss


class _Inputs:
    """A forward pre-hook that hands on what the layer's matrix is applied to."""

    def __init__(self, site: Site, observer: Observer) -> None:
        self.site = site
        self.observer = observer

    def __call__(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        kind = self.site.kind
        rows = kind.rows(layer, self.site.weight, args[0].detach()) if kind is not None and args else None
        if rows is None:
            raise UnsupportedLayerError(
                f"what the matrix of {self.site.name} is applied to is not known for a {type(layer).__name__}, so no "
                "start can be taken from it; exclude it"
            )
        self.observer.inputs(rows)


def _ask_for_gradients(seen: Sequence[tuple[Site, Observer]], stack: ExitStack) -> None:
    """Differentiate by these weights; each gradient is handed on and freed as soon as it is there."""
    by_parameter: dict[int, tuple[nn.Parameter, list[tuple[Site, Observer]]]] = {}
    for site, observer in seen:
        p = site.layer._parameters.get(site.weight)
        if p is None:
            raise UnsupportedLayerError(f"{site.name} is no parameter of its layer, so it has no gradient; exclude it")
        if site.kind is not None and site.kind.quantised:
            raise UnsupportedLayerError(f"{site.name} is quantised, so there is no gradient by it; exclude it")
        by_parameter.setdefault(id(p), (p, []))[1].append((site, observer))
    for p, asking in by_parameter.values():
        p.requires_grad_(True)

        def hand_on(p: Tensor, asking: Sequence[tuple[Site, Observer]] = asking) -> None:
            assert p.grad is not None  # noqa: S101 - torch calls this when it is there
            for site, observer in asking:
                assert site.kind is not None  # noqa: S101 - it is a weight
                observer.gradient(site.kind.matrix(site.layer, site.weight, p.grad.detach()))
            p.grad = None

        handle = p.register_post_accumulate_grad_hook(hand_on)  # type: ignore[no-untyped-call]
        stack.callback(handle.remove)
