"""Checks of what a method says of itself: its name, fields and declarations. They need no model, but for the last."""

import copy
import dataclasses
import importlib.machinery
import importlib.metadata
import inspect
import json
import pickle
import random
import re
import subprocess
import sys
import textwrap
from typing import Any

import torch

import peftkit
from peftkit.testing.cases import Case
from peftkit.testing.subject import NAME, NotApplicableError, Snapshot, base, call, example, expect, trainable, wrapped


def check_name(method: peftkit.Method) -> None:
    """The name is lower-case, and the one under which the method is installed, if it is."""
    name = getattr(type(method), "name", None)
    expect(
        re.fullmatch(r"[a-z][a-z0-9_-]*", str(name)),
        f"{name!r} is no name of a method: lower-case letters, digits, _, -",
    )
    points = importlib.metadata.entry_points(group="peftkit.methods")
    installed = sorted({point.name for point in points if point.value.split(":")[0] == type(method).__module__})
    fits = not installed or name in installed
    expect(fits, f"the entry points of its module are {installed}, and the method's name is {name!r}")
    if any(info.name == name for info in peftkit.methods()):
        found = peftkit.method(str(name))
        expect(
            found is type(method), f"{name!r} is the name of another method, {found.__module__}.{found.__qualname__}"
        )


def check_dataclass(method: peftkit.Method) -> None:
    """The method is a frozen dataclass, every hyperparameter one of its fields, each with a default."""
    cls = type(method)
    fields = {f.name for f in dataclasses.fields(method)}
    loose = [name for owner in cls.__mro__ for name in _hyperparameters(owner) if name not in fields]
    expect(not loose, f"{loose} are no fields: is {cls.__name__} decorated with @dataclass(frozen=True)?")
    for field in dataclasses.fields(method):
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        expect(not required, f"expected a default for the field {field.name!r}")
    name = next(iter(fields), "anything")
    try:
        setattr(copy.copy(method), name, None)
    except dataclasses.FrozenInstanceError:
        pass
    else:
        expect(False, f"expected a frozen dataclass, and its {name!r} can be set")


def _hyperparameters(owner: type) -> list[str]:
    """What a class annotates as a variable of its instances."""
    if not issubclass(owner, peftkit.Method):
        return []
    return [name for name, kind in inspect.get_annotations(owner).items() if "ClassVar" not in str(kind)]


def check_fields(method: peftkit.Method) -> None:
    """The fields go through JSON and come back as an equal method; so do the defaults."""
    for each in (method, type(method)()):
        fields = json.loads(json.dumps(each.fields(), allow_nan=False))
        again = type(method).from_fields(fields)
        expect(again == each, f"expected {each} from its own fields {fields}, got {again}")
        expect(again.key == each.key, f"expected the key {each.key}, got {again.key}")


def check_bad_values(method: peftkit.Method) -> None:
    """A value of the wrong type, NaN, or a whole number below 0 is a `FieldError` that names field and value."""
    for field in dataclasses.fields(method):
        value = getattr(method, field.name)
        for bad in _bad_values(value, str(field.type)):
            given = f"{field.name}={bad!r}"
            try:
                dataclasses.replace(method, **{field.name: bad})
            except peftkit.errors.FieldError as error:
                expect(field.name in str(error), f"{given}: expected the field's name in the error, got: {error}")
                expect(repr(bad) in str(error), f"{given}: expected the value in the error, got: {error}")
            except Exception as error:
                raise AssertionError(f"{given}: expected a FieldError, got {type(error).__name__}: {error}") from error
            else:
                expect(False, f"{given} was taken; check it in __post_init__ with self.require(...)")


def _bad_values(value: Any, annotation: str) -> list[Any]:
    """What a field that now holds `value` should refuse, whatever it means."""
    bad: list[Any] = [] if value is None or "None" in annotation or "Any" in annotation else [None]
    if isinstance(value, bool):
        return [*bad, "x", 0.5]
    if isinstance(value, int):
        floats = [] if "float" in annotation else [1.5]
        return [*bad, "x", float("nan"), *floats, *([-1] if value > 0 else [])] if "str" not in annotation else bad
    if isinstance(value, float):
        return [*bad, "x", float("nan"), float("inf")] if "str" not in annotation else bad
    if isinstance(value, str):
        return [*bad, 7.5]
    if isinstance(value, (list, tuple, dict)):
        return [*bad, 7.5]
    return bad


def check_value(method: peftkit.Method) -> None:
    """The method can be copied and pickled, and is then equal, with an equal hash where it has one."""
    pickled: peftkit.Method = pickle.loads(pickle.dumps(method))  # noqa: S301 - its own bytes
    for what, again in (("a deep copy", copy.deepcopy(method)), ("pickling", pickled)):
        expect(again == method, f"expected an equal method from {what}, got {again} for {method}")
        if not any(isinstance(value, (list, dict)) for value in vars(method).values()):
            expect(hash(again) == hash(method), f"expected an equal hash from {what}")


def check_declines(method: peftkit.Method) -> None:
    """What is declined are layer kinds, by their class names, each with a reason."""
    known = {kind.__name__ for kind in _subclasses(peftkit.LayerKind)}
    known |= {cls.__name__ for cls in _subclasses(torch.nn.Module)}  # a method for modules declines these
    for name, reason in method.declines.items():
        expect(name in known, f"declines names {name!r}, which is no layer kind")
        expect(str(reason or "").strip(), f"expected a reason why {name!r} is declined, got {reason!r}")


def _subclasses(cls: type) -> set[type]:
    below: list[type] = cls.__subclasses__()
    return {cls}.union(*(_subclasses(each) for each in below))


def check_huggingface(method: peftkit.Method) -> None:
    """What `hf` maps are fields of the method."""
    if method.hf is None:
        raise NotApplicableError("it declares no names in HF PEFT")
    fields = {f.name for f in dataclasses.fields(method)}
    unknown = sorted(set(method.hf.fields) - fields)
    expect(not unknown, f"hf.fields names {unknown}, which are no fields; the fields are {sorted(fields)}")
    expect(method.hf.peft_type.isupper(), f"expected hf.peft_type in upper case, got {method.hf.peft_type!r}")


def check_import(method: peftkit.Method) -> None:
    """Importing the method's module prints nothing, warns of nothing, changes no global and starts no device."""
    module = type(method).__module__
    found = importlib.machinery.PathFinder.find_spec(module.partition(".")[0])
    if found is None or found.origin is None:  # a script, or a test
        raise NotApplicableError(f"its module {module!r} cannot be imported by its name")
    run = subprocess.run(  # noqa: S603 - this interpreter, and a program from this file
        [sys.executable, "-c", _IMPORT, json.dumps(sys.path), module], capture_output=True, text=True, check=False
    )
    expect(run.returncode == 0, f"cannot import {module}: {run.stderr.strip()}")
    expect(not run.stdout and not run.stderr, f"importing {module} printed: {(run.stdout + run.stderr).strip()}")


_IMPORT = textwrap.dedent("""
    import json, random, sys, warnings
    sys.path[:] = json.loads(sys.argv[1])
    import peftkit, torch

    def globals_now():
        return (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(), random.getstate(),
                torch.get_rng_state().tolist(), torch.are_deterministic_algorithms_enabled())

    before = globals_now()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        __import__(sys.argv[2])
    if globals_now() != before:
        print("a global of torch or Python was changed")
    if torch.cuda.is_initialized():
        print("a device was started")
""")


def _globals() -> dict[str, Any]:
    return {
        "torch's default dtype": torch.get_default_dtype(),
        "torch's default device": torch.get_default_device(),
        "the number of threads": torch.get_num_threads(),
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "Python's random state": random.getstate(),
    }


def check_making_changes_no_global(method: peftkit.Method) -> None:
    """Making the method draws no random number and changes no global."""
    before, drawn = _globals(), torch.get_rng_state()
    type(method).from_fields(method.fields())
    _expect_globals(before, "making the method")
    expect(torch.equal(torch.get_rng_state(), drawn), "expected no random number to be drawn when the method is made")


def check_adapting_changes_no_global(method: peftkit.Method, case: Case) -> None:
    """Wrapping and running change no global of torch or Python."""
    before = _globals()
    model = wrapped(method, case)
    _expect_globals(before, "wrapping")
    call(model, example(case))
    _expect_globals(before, "the forward")


def _expect_globals(before: dict[str, Any], what: str) -> None:
    for name, value in _globals().items():
        expect(value == before[name], f"expected {name} to stay as it was, and {what} changed it")


def check_declined(method: peftkit.Method, case: Case) -> None:
    """At a layer kind that the method declines it is refused with an `UnsupportedLayerError`, the model untouched."""
    model = base(case)
    before = Snapshot.of(model)
    try:
        wrapped(method, case, model=model)
    except peftkit.errors.UnsupportedLayerError:
        expect(list(Snapshot.of(model).tensors) == list(before.tensors), "expected the model as it was after a refusal")
        before.expect_values()
    else:
        expect(False, "expected an UnsupportedLayerError: `declines` names this kind")


def check_huggingface_tensors(method: peftkit.Method, case: Case) -> None:
    """Everything that trains has a counterpart in what `hf` maps, so that files can go both ways."""
    if method.hf is None:
        raise NotApplicableError("it declares no names in HF PEFT")
    model = wrapped(method, case)
    for path, p in trainable(model).items():
        within = path.partition(f"adapters.{NAME}.")[2]
        if not within:
            continue  # a weight of the base, which needs no name
        where, _, tensor = within.partition(".")
        mapped = method.hf.shared if where.startswith("shared-") else {**method.hf.tensors, **method.hf.one_hot}
        expect(tensor in mapped, f"{tensor!r} of shape {list(p.shape)} trains, and hf maps only {sorted(mapped)}")


CHECKS_OF_THE_METHOD = (
    check_name,
    check_dataclass,
    check_fields,
    check_bad_values,
    check_value,
    check_declines,
    check_huggingface,
    check_import,
    check_making_changes_no_global,
)
CHECKS = (check_adapting_changes_no_global,)
ON_ONE_CASE = (check_huggingface_tensors,)
