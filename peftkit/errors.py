"""Every error that peftkit raises on purpose, in one tree.

    PeftkitError
    ├── SelectorError           a selector is malformed, or matches nothing that its method can adapt
    ├── UnsupportedLayerError   a layer, or one of its weights, cannot be adapted as asked
    ├── MethodError             something is wrong with a method
    │   ├── UnknownMethodError  no installed method has that name
    │   ├── FieldError          a hyperparameter has a wrong name or value
    │   └── PluginError         a package offers the method or layer kind, but it cannot be loaded, or is disabled
    ├── StateError              calls in an order that has no meaning (merging twice, say)
    ├── UnknownAdapterError     the model has no adapter of that name
    ├── WorkloadError           a benchmark's workload is unknown, or something that it needs cannot be had
    └── FileError               an adapter file cannot be written or read
        ├── FormatError         it is truncated, altered, or no adapter file at all
        └── BaseMismatchError   it was made for another base model

Each message names the thing, the nearest right thing and the remedy. Whatever call raises one has left
the model as it was. Where Python has a customary type for the fault, the class is one of these too, so that
`except ValueError` keeps working for people who have never heard of this module.
"""

import difflib
from collections.abc import Iterable


class PeftkitError(Exception):
    """The root of the tree: `except peftkit.errors.PeftkitError` catches all of it."""


class SelectorError(PeftkitError, ValueError):
    """A selector is malformed, or matches nothing that its method can adapt."""


class UnsupportedLayerError(PeftkitError, TypeError):
    """A layer, or one of its weights, cannot be adapted as asked."""


class MethodError(PeftkitError):
    """Something is wrong with a method."""


class UnknownMethodError(MethodError, LookupError):
    """No installed method has that name."""


class FieldError(MethodError, TypeError, ValueError):
    """A hyperparameter has a wrong name or value."""


class PluginError(MethodError, RuntimeError):
    """A package offers the method or layer kind, but it cannot be loaded, or is disabled."""


class StateError(PeftkitError, RuntimeError):
    """Calls in an order that has no meaning, such as merging twice."""


class UnknownAdapterError(PeftkitError, LookupError):
    """The model has no adapter of that name."""


class WorkloadError(PeftkitError):
    """A benchmark's workload is unknown, or something that it needs cannot be had."""


class FileError(PeftkitError):
    """An adapter file cannot be written or read."""


class FormatError(FileError, ValueError):
    """The file is truncated, altered, or no adapter file at all."""


class BaseMismatchError(FileError, ValueError):
    """The file was made for another base model."""


def nearest(name: str, names: Iterable[str], n: int = 3) -> list[str]:
    """The names most like `name`, best first; empty when nothing comes near.

    >>> nearest("q_porj", ["k_proj", "q_proj", "norm"], n=1)
    ['q_proj']
    """
    return difflib.get_close_matches(name, sorted(set(names)), n=n, cutoff=0.5)


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """`"; did you mean 'q_proj'?"`, or nothing when no name comes near.

    >>> did_you_mean("loar", ["lora", "full"])
    "; did you mean 'lora'?"
    """
    found = [repr(x) for x in nearest(name, names)]
    return f"; did you mean {' or '.join(found)}?" if found else ""
