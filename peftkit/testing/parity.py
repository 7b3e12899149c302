"""Does a method compute what HF PEFT computes, given the same numbers in its tensors?

    from peftkit.testing.parity import compare_with_hf

    def test_linear():
        compare_with_hf(MyMethod(rank=4), lambda: nn.Sequential(nn.Linear(6, 5)), torch.randn(3, 6), targets="0")

Which tensor is which, and how the configuration is written, is read from `method.hf` and from nowhere else: a method
that passes has also shown that its declaration is right. peft itself is needed when the comparison runs, not before.
"""

import copy
import dataclasses
import itertools
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import peftkit

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""The largest difference allowed, relative to the largest value: some hundred terms of a sum, each rounded once."""

PARTS = ("output", "gradients", "merged")
"""What is compared, unless `parts` says otherwise."""

_NAME = "default"


def compare_with_hf(
    method: peftkit.Method,
    build: Callable[[], nn.Module],
    example: Any,
    *,
    targets: Any,
    dtype: torch.dtype = torch.float32,
    config: Mapping[str, Any] | None = None,
    parts: Collection[str] = PARTS,
    output: Callable[[Any], Any] = lambda y: y,
    seed: int = 0,
) -> None:
    """Wrap one copy of a model with HF PEFT and one with peftkit, with equal tensors, and compare what they compute.

    HF's configuration is made of `method.hf.fields` and `method.hf.constants`, then of `config`. Each tensor that HF
    trains gets a random value, and peftkit's counterpart the same numbers, whatever its shape. Compared are the output,
    the gradient of each tensor and of each floating point input, and each weight of the merged model.

    Args:
        method: the method, whose class declares `hf`.
        build: makes the model. It is called once, and both libraries get a copy of it.
        example: the model's input: a tensor, a tuple of arguments, or a mapping of named ones.
        targets: the selector of what is adapted. HF gets the very paths that it stands for.
        dtype: of the model and of the floating point inputs.
        config: further entries of HF's configuration, for what no field of the method says (`task_type`, say).
        parts: which of `PARTS` are compared. Leave one out only where HF does not compute what it says it does.
        output: picks what is compared from each model's output; by default, every floating point tensor in it.
        seed: of every random value: the model's, the adapters', and those that take their place.

    Raises `AssertionError`, which names the tensor that differs, or that only one of the two libraries has; also where
    the adapters change nothing, for then nothing is compared.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        base = build().to(_at_most_float32(dtype)).to(dtype).eval()
        _compare(method, base, example, targets, dtype, dict(config or {}), parts, output)


def _compare(
    method: peftkit.Method,
    base: nn.Module,
    example: Any,
    targets: Any,
    dtype: torch.dtype,
    config: dict[str, Any],
    parts: Collection[str],
    output: Callable[[Any], Any],
) -> None:
    inputs, their_inputs = (_inputs(example, dtype) for _ in range(2))
    with torch.no_grad():
        plain = _leaves(output(_run(base, inputs)))
    sites = [site for site, _ in peftkit.plan(base, method, targets=targets).steps]
    # HF makes some tensors in float32 whatever the layer is, and loses flags of others where the layer is float64.
    theirs = _wrap_with_hf(method, copy.deepcopy(base).to(_at_most_float32(dtype)), sites, config).eval()
    if dtype == torch.float64:
        theirs.double()
    _randomise(theirs)
    ours = peftkit.wrap(base, method, targets=targets, name=_NAME).eval()
    pairs = _copy_tensors(method, ours, theirs, sites)

    limit = TOLERANCE[dtype] * len(sites)
    y, their_y = _leaves(output(_run(ours, inputs))), _leaves(output(_run(theirs, their_inputs)))
    if all(torch.equal(a, b) for a, b in zip(y, plain, strict=True)):
        raise AssertionError(f"{method} with random tensors changes nothing, so nothing would be compared")
    if "output" in parts:
        _expect_all_close([f"output {i}" for i in range(len(y))], y, their_y, limit)
    if "gradients" in parts:
        directions = [torch.randn(each.shape).to(each) for each in y]
        torch.autograd.backward(y, directions)
        torch.autograd.backward(their_y, directions)
        for name, (mine, other) in pairs.items():
            _expect_gradients_close(name, mine, other, limit)
        for i, (mine, other) in enumerate(zip(_leaves(inputs), _leaves(their_inputs), strict=True)):
            _expect_gradients_close(f"input {i}", mine, other, limit)
    if "merged" in parts and not any(isinstance(module, peftkit.Activation) for module in ours.modules()):
        _compare_merged(ours, theirs, limit)


def _at_most_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.float64 else dtype


def _compare_merged(ours: nn.Module, theirs: Any, limit: float) -> None:
    mine = peftkit.merge(ours, keep_base=False).state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = theirs.merge_and_unload().state_dict()
    if set(mine) != set(other):
        raise AssertionError(f"merged, only one of the two models has {sorted(set(mine) ^ set(other))}")
    for name, tensor in mine.items():
        _expect_close(f"merged {name}", tensor, other[name], limit)


# --------------------------------------------------------------------------------------- HF's side of the matter


def _wrap_with_hf(method: peftkit.Method, model: nn.Module, sites: list[peftkit.Site], config: dict[str, Any]) -> Any:
    import peft

    declared = _declared(method)
    made = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(declared.peft_type)]
    known = {field.name for field in dataclasses.fields(made)}
    entries: dict[str, Any] = {theirs: getattr(method, ours) for ours, theirs in declared.fields.items()}
    entries |= dict(declared.constants)
    paths = sorted({site.path for site in sites} - {""})
    if "target_modules" in known and paths:
        entries["target_modules"] = "|".join(re.escape(path) for path in paths)
    if "fan_in_fan_out" in known:
        entries["fan_in_fan_out"] = any(type(model.get_submodule(path)).__name__ == "Conv1D" for path in paths)
    with warnings.catch_warnings():  # what HF has to say about its configuration is no concern of the comparison
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, made(**(entries | config)), adapter_name=_NAME)


def _declared(method: peftkit.Method) -> peftkit.HuggingFace:
    if method.hf is None:
        raise AssertionError(f"{method.name} declares no counterpart in HF PEFT: its class needs `hf`")
    return method.hf


def _randomise(theirs: nn.Module) -> None:
    """Move what HF trains away from its start, by about half of what such tensors usually hold."""
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_((torch.randn(p.shape) / 2).to(p))


def _tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, those that are not saved too."""
    return dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))


def _find(tensors: Mapping[str, Tensor], path: str, declared: str) -> Tensor | None:
    """HF's tensor by its declared name below a layer (or the base model), in which the adapter's name is left out."""
    parts = declared.split(".")
    named = {".".join([*parts[:i], _NAME, *parts[i:]]) for i in range(1, len(parts) + 1)} | {declared}
    named |= (
        {f"prompt_encoder.{_NAME}.embedding.weight"} if declared == "prompt_embeddings" else set()
    )  # its name in files
    below = [f"base_model.model.{path}.".replace("..", "."), "base_model.", ""]
    for prefix, suffix in itertools.product(below, ("", ".weight")):  # a file leaves some `.weight` out
        names = [prefix + name + suffix for name in sorted(named)]
        found = [tensors[name] for name in names if name in tensors]
        if len(found) > 1:
            raise AssertionError(f"more than one tensor of HF PEFT may be {declared!r} at {path or 'the model'}")
        if found:
            return found[0]
    return None


# ------------------------------------------------------------------------------------------- tensors of both sides


def _copy_tensors(
    method: peftkit.Method, ours: nn.Module, theirs: nn.Module, sites: list[peftkit.Site]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Give each declared tensor of ours the numbers of HF's; return the pairs that both sides train, by our names."""
    tensors = _tensors_of(theirs)
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for name, path, mine, declared in _declarations(_declared(method), ours, sites):
        other = _find(tensors, path, declared)
        if other is None:
            near = sorted(n for n, t in tensors.items() if _NAME in n.split(".") and t.numel() == mine.numel())
            raise AssertionError(f"HF PEFT has no {declared!r} for {name}; of the same size it has {near}")
        if other.numel() != mine.numel():
            raise AssertionError(f"{name} is {list(mine.shape)}, and HF PEFT's {declared!r} is {list(other.shape)}")
        with torch.no_grad():
            mine.copy_(other.reshape(mine.shape))
        pairs[name] = (mine, other)
    _expect_nothing_left_out(pairs, ours, theirs)
    return {name: pair for name, pair in pairs.items() if any(t.requires_grad for t in pair)}


def _declarations(
    hf: peftkit.HuggingFace, ours: nn.Module, sites: list[peftkit.Site]
) -> Iterator[tuple[str, str, Tensor, str]]:
    """For each tensor of ours that is declared: its name, the path of its layer, the tensor, its name with HF."""
    for site in sites:
        prefix = f"{site.path}.adapters.{_NAME}.{site.weight}".lstrip(".")
        own = _tensors_of(ours.get_submodule(prefix))
        declared = {**hf.tensors, **hf.one_hot} if site.one_hot else hf.tensors
        for name, theirs in declared.items():
            if name in own:  # which tensors an adapter has may hang on its method's fields
                yield f"{prefix}.{name}", site.path, own[name], theirs.replace("{weight}", site.weight)
    if hf.shared:
        held = f".adapters.{_NAME}.shared-0"  # by whichever layer the core has chosen
        root = next(path for path, _ in ours.named_modules() if f".{path}".endswith(held))
        own = _tensors_of(ours.get_submodule(root))
        for name, theirs in hf.shared.items():
            yield f"{root}.{name}", "", own[name], theirs


def _expect_nothing_left_out(pairs: Mapping[str, tuple[Tensor, Tensor]], ours: nn.Module, theirs: nn.Module) -> None:
    """Every tensor that either side trains has its counterpart, or the comparison would miss it."""
    for side, (library, model) in enumerate((("peftkit", ours), ("HF PEFT", theirs))):
        known = {id(pair[side]) for pair in pairs.values()}
        missed = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in known]
        if missed:
            raise AssertionError(f"{library} trains tensors that `hf` does not declare: {', '.join(missed)}")


# ------------------------------------------------------------------------------------------------ runs, comparisons


def _inputs(example: Any, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments and named arguments; floating point tensors are leaves of their own, in the dtype."""

    def leaf(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.detach().to(dtype).clone().requires_grad_()
        return value

    if isinstance(example, Mapping):
        return (), {name: leaf(value) for name, value in example.items()}
    return tuple(leaf(value) for value in (example if isinstance(example, tuple) else (example,))), {}


def _run(model: nn.Module, inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
    args, kwargs = inputs
    return model(*args, **kwargs)


def _leaves(value: Any) -> list[Tensor]:
    """The floating point tensors in an output, or in arguments, in order."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, Mapping):
        value = tuple(value.values())
    return [leaf for each in value for leaf in _leaves(each)] if isinstance(value, (tuple, list)) else []


def _expect_gradients_close(name: str, mine: Tensor, other: Tensor, limit: float) -> None:
    if mine.grad is None and other.grad is None:
        return
    if mine.grad is None or other.grad is None:
        raise AssertionError(f"the gradient of {name} exists {'with HF PEFT' if mine.grad is None else 'here'} only")
    _expect_close(f"the gradient of {name}", mine.grad, other.grad.reshape(mine.shape), limit)


def _expect_all_close(names: list[str], mine: list[Tensor], others: list[Tensor], limit: float) -> None:
    if len(mine) != len(others):
        raise AssertionError(f"{len(mine)} tensors come out here, {len(others)} with HF PEFT")
    for name, a, b in zip(names, mine, others, strict=True):
        _expect_close(name, a, b, limit)


def _expect_close(name: str, mine: Tensor, other: Tensor, limit: float) -> None:
    if mine.shape != other.shape or mine.dtype != other.dtype:
        raise AssertionError(
            f"{name} is {mine.dtype} {list(mine.shape)} here, {other.dtype} {list(other.shape)} with HF PEFT"
        )
    if not mine.numel():
        return
    a, b = mine.detach().double(), other.detach().double()
    error, size = (a - b).abs().max().item(), b.abs().max().item()
    if not error <= limit * size:  # so that NaN is a difference too
        raise AssertionError(f"{name} differs by {error:.3g} from HF PEFT's, whose values go up to {size:.3g}")
