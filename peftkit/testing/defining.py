"""Checks of the definition: what `weight` must be, and that the model computes just that.

The reference is independent of how the library runs an adapter: the case's own model, its parameter replaced by what
`weight` makes of it, runs its own forward in float64.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import peftkit
from peftkit.testing.cases import Case
from peftkit.testing.subject import (
    NAME,
    TOLERANCE,
    NotApplicableError,
    base,
    call,
    close,
    example,
    expect,
    finite,
    loss_of,
    same,
    sites_of,
    stirred,
    trainable,
    with_adapters,
    wrapped,
)

DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def adapted_matrices(
    method: peftkit.Method, case: Case, model: nn.Module
) -> Iterator[tuple[str, peftkit.Adapter, Tensor, Tensor | None]]:
    """For each site its name, its adapter on `model`, and the base's matrix and bias, in the model's dtype."""
    adapters = with_adapters(model, peftkit.Adapter)
    for site in sites_of(method, case):
        path = f"{site.path}.adapters.{NAME}.{site.weight}".removeprefix(".")
        if path in adapters and site.kind is not None:
            layer = model.get_submodule(site.path)
            raw = layer._parameters[site.weight]
            bias = site.kind.weights(layer)[site.weight]
            assert raw is not None  # noqa: S101 - a case's layers hold their weights as parameters
            b = None if bias is None else layer._parameters[bias]
            yield (
                site.name,
                adapters[path],
                site.kind.matrix(layer, site.weight, raw.detach()),
                None if b is None else b.detach(),
            )


def defined(model: nn.Module, reference: nn.Module, sites: Sequence[peftkit.Site], names: Sequence[str]) -> nn.Module:
    """`reference`, a bare base, its weights replaced by what the adapters on `model` make of them in turn."""
    new: dict[tuple[str, str], Tensor] = {}
    for name in names:
        for site in sites:
            group: Any = model.get_submodule(f"{site.path}.adapters.{name}".removeprefix("."))
            adapter = group._modules.get(site.weight)
            layer: Any = reference.get_submodule(site.path)
            if adapter is None or site.kind is None:
                continue
            w = new.get((site.path, site.weight), layer._parameters[site.weight].detach())
            m = adapter.weight(site.kind.matrix(layer, site.weight, w))
            new[site.path, site.weight] = site.kind.restore(layer, site.weight, m)
            bias = site.kind.weights(layer)[site.weight]
            if bias is not None and layer._parameters[bias] is not None:
                b = new.get((site.path, bias), layer._parameters[bias].detach())
                new[site.path, bias] = adapter.bias(b)
    for (path, weight), value in new.items():
        layer = reference.get_submodule(path)
        del layer._parameters[weight]
        setattr(layer, weight, value)
    return reference


def check_definition(method: peftkit.Method, case: Case) -> None:
    """Output and gradients are those of the layer with the weight that `weight` (and `bias`) gives, by any path."""
    model = stirred(wrapped(method, case, dtype=torch.float64))
    with_adapters(model, peftkit.Adapter)
    reference = defined(model, base(case, dtype=torch.float64), sites_of(method, case), [NAME])
    inputs = example(case, torch.float64)
    actual, wanted = call(model, inputs), call(reference, inputs)
    tolerance = TOLERANCE[torch.float64]
    close(actual, wanted, "the output against the definition's", tolerance)
    parameters = trainable(model)
    ours, theirs = _gradients(actual, parameters), _gradients(wanted, parameters)
    for path in parameters:
        close([ours[path]], [theirs[path]], f"the gradient of {path} against the definition's", tolerance)


def _gradients(outputs: Sequence[Tensor], parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    for p in parameters.values():
        p.grad = None
    loss_of(outputs).backward()  # type: ignore[no-untyped-call]
    return {path: torch.zeros_like(p) if p.grad is None else p.grad.to_dense() for path, p in parameters.items()}


def check_weight_is_pure(method: peftkit.Method, case: Case) -> None:
    """`weight` and `bias` give the same bits each time, and write neither their input nor the adapter."""
    model = stirred(wrapped(method, case))
    for name, adapter, w, b in adapted_matrices(method, case, model):
        before, state = w.clone(), {key: t.clone() for key, t in adapter.state_dict().items()}
        given = w.clone()
        first = adapter.weight(given).clone()
        same([given], [before], f"the matrix that weight was given at {name}, afterwards")
        same([adapter.weight(given)], [first], f"a second call of weight at {name} against the first")
        if b is not None:
            given = b.clone()
            first = adapter.bias(given).clone()
            same([given], [b], f"the bias that bias was given at {name}, afterwards")
            same([adapter.bias(given)], [first], f"a second call of bias at {name} against the first")
        for key, tensor in adapter.state_dict().items():
            same([tensor], [state[key]], f"{key} of the adapter at {name}, after weight")


def check_weight_in_every_dtype(method: peftkit.Method, case: Case) -> None:
    """`weight` and `bias` keep shape and dtype in float64, float32 and bfloat16, and stay finite."""
    model = stirred(wrapped(method, case, dtype=torch.float64))
    for dtype in DTYPES:
        for name, adapter, w, b in adapted_matrices(method, case, model.to(dtype)):
            _expect_alike(adapter.weight(w), w, f"weight at {name} in {dtype}")
            if b is not None:
                _expect_alike(adapter.bias(b), b, f"bias at {name} in {dtype}")


def _expect_alike(made: Tensor, given: Tensor, where: str) -> None:
    expect(made.shape == given.shape, f"{where}: expected shape {list(given.shape)}, got {list(made.shape)}")
    expect(made.dtype == given.dtype, f"{where}: expected {given.dtype}, got {made.dtype}")
    finite(made, where)


def check_weight_of_any_layout(method: peftkit.Method, case: Case) -> None:
    """`weight` makes the same of a matrix that is not contiguous."""
    model = stirred(wrapped(method, case, dtype=torch.float64))
    for name, adapter, w, _ in adapted_matrices(method, case, model):
        contiguous, strided = w.contiguous(), w.mT.contiguous().mT
        made = adapter.weight(strided)
        close([made], [adapter.weight(contiguous)], f"weight of a strided matrix at {name}", TOLERANCE[torch.float64])


def check_composition(method: peftkit.Method, case: Case) -> None:
    """Adapters compose in the order of activation, `f2(f1(W))`, with another of the same method and with LoRA."""
    model = stirred(wrapped(method, case, dtype=torch.float64))
    sites = sites_of(method, case)
    with_adapters(model)
    wrapped(method, case, model=model, name="second", seed=2)
    others = ["second"]
    if case.selects != "vector" and method.scope == "weights" and method.matrices:
        torch.manual_seed(3)
        peftkit.wrap(model, peftkit.LoRA(rank=2), targets=[site.path for site in sites], name="third")
        others.append("third")
    peftkit.set_trainable(model, NAME, *others)
    stirred(model, seed=4)
    inputs = example(case, torch.float64)
    for other in others:
        for order in ((NAME, other), (other, NAME)):
            with torch.no_grad(), peftkit.using(model, *order):
                actual = call(model, inputs)
            for t in actual:
                finite(t, f"the output of {' then '.join(order)}")
            if any(site.kind is None for site in sites):
                continue
            with torch.no_grad():
                wanted = call(defined(model, base(case, dtype=torch.float64), sites, order), inputs)
            close(actual, wanted, f"{' then '.join(order)} against the definition", TOLERANCE[torch.float64])


def check_affine(method: peftkit.Method, case: Case) -> None:
    """Where the method says that it is affine, the mean of two adapters' parameters makes the mean of their weights."""
    if not method.affine:
        raise NotApplicableError("it does not declare `affine`")
    model = wrapped(method, case, dtype=torch.float64)
    parameters = trainable(model)
    start = {path: p.detach().clone() for path, p in parameters.items()}
    states = []
    for seed in (1, 2):
        with torch.no_grad():
            for path, p in parameters.items():
                p.copy_(start[path])
        stirred(model, seed)
        states.append({path: p.detach().clone() for path, p in parameters.items()})
    made = []
    for state in (*states, {path: (states[0][path] + states[1][path]) / 2 for path in parameters}):
        with torch.no_grad():
            for path, p in parameters.items():
                p.copy_(state[path])
            made.append(
                {name: adapter.weight(w).clone() for name, adapter, w, _ in adapted_matrices(method, case, model)}
            )
    for name, middle in made[2].items():
        mean = (made[0][name] + made[1][name]) / 2
        close([middle], [mean], f"weight at {name} with the mean of two adapters' parameters", TOLERANCE[torch.float64])


def check_from_factors(method: peftkit.Method, case: Case) -> None:
    """What `from_factors` makes of two factors is an adapter whose weight is `w + up @ down`."""
    model = wrapped(method, case, dtype=torch.float64)
    site, *_ = sites_of(method, case)
    with_adapters(model, peftkit.Adapter)
    up, down = (
        torch.randn(*site.batch, *shape, dtype=torch.float64) for shape in ((site.fan_out, 3), (3, site.fan_in))
    )
    made = method.from_factors(up, down)
    if made is None:
        raise NotApplicableError("it makes no adapter from factors")
    other, state = made
    model = wrapped(other, case, dtype=torch.float64)
    name, adapter, w, _ = next(adapted_matrices(other, case, model))
    own = {key: t for key, t in peftkit.state_dict(model, NAME).items() if not key.startswith(f"{name}.")}
    peftkit.load_state_dict(model, {**own, **{f"{name}.{key}": t for key, t in state.items()}}, NAME)
    close([adapter.weight(w)], [w + up @ down], "the weight of what from_factors makes", TOLERANCE[torch.float64])


CHECKS = (check_definition, check_affine, check_weight_is_pure, check_weight_in_every_dtype, check_weight_of_any_layout)
ON_ONE_CASE = (check_composition, check_from_factors)
