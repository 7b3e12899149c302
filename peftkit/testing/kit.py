"""The list of checks, which of them a method is due, and the two front doors: a list of results, and pytest's table."""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

import peftkit
from peftkit.testing import declaring, defining, keeping, surviving, training, undoing, wrapping
from peftkit.testing.cases import CASES, Case
from peftkit.testing.subject import NotApplicableError, sites_of

_OF_THE_METHOD: tuple[Callable[..., None], ...] = declaring.CHECKS_OF_THE_METHOD
_ON_EVERY_CASE: tuple[Callable[..., None], ...] = (
    *declaring.CHECKS,
    *wrapping.CHECKS,
    *defining.CHECKS,
    *training.CHECKS,
    *keeping.CHECKS,
    *undoing.CHECKS,
    *surviving.CHECKS,
)
_ON_ONE_CASE: tuple[Callable[..., None], ...] = (
    *declaring.ON_ONE_CASE,
    *defining.ON_ONE_CASE,
    *training.ON_ONE_CASE,
    *surviving.ON_ONE_CASE,
)

CHECKS: tuple[Callable[..., None], ...] = (*_OF_THE_METHOD, declaring.check_declined, *_ON_EVERY_CASE, *_ON_ONE_CASE)
"""Every check: a function of a method, or of a method and a case, which raises where its promise does not hold."""


@dataclasses.dataclass(frozen=True)
class Result:
    """What one check found."""

    check: str
    case: str
    """The case's name; empty for a check of the method itself."""
    status: str
    """"passed", "failed", "skipped", "expected failure" or "unexpected pass"."""
    detail: str
    """Of a failure, what was expected and what was seen; of a skip and of an expected failure, the reason."""

    def __str__(self) -> str:
        """`failed: check_merge[Linear]: …`."""
        where = f"[{self.case}]" if self.case else ""
        return f"{self.status}: {self.check}{where}{': ' + self.detail if self.detail else ''}"


@dataclasses.dataclass(frozen=True)
class _Due:
    """One check that a method is due."""

    check: str
    case: str
    run: Callable[[], None]

    @property
    def name(self) -> str:
        return f"{self.check}[{self.case}]" if self.case else self.check


def check_method(
    method: peftkit.Method,
    *,
    device: str = "cpu",
    expected_failures: Mapping[str, str] | None = None,
    cases: Iterable[Case] | None = None,
) -> list[Result]:
    """Try everything that peftkit promises on a method, on every layer kind that it does not decline.

    Args:
        method: an instance; the hyperparameters should fit matrices of 8 by 12 (a rank of 2, say).
        device: where the models are; where there is no such device, each check is skipped and says so.
        expected_failures: what is known not to hold, each with the reason: a check's name, or `"check[case]"`. Where
            it holds after all, the result is an "unexpected pass".
        cases: other cases than `CASES`.

    >>> import peftkit
    >>> from peftkit.testing import CASES, check_method
    >>> results = check_method(peftkit.LoRA(rank=2), cases=[case for case in CASES if case.name == "GRU"])
    >>> [str(result) for result in results if result.status == "failed"]
    []
    """
    expected = dict(expected_failures or {})
    due = list(_due(method, device, cases))
    _refuse_unknown(expected, due)
    if not _is_there(device):
        return [Result(each.check, each.case, "skipped", f"there is no device {device!r} here") for each in due]
    return [_result(each, expected.get(each.name, expected.get(each.check))) for each in due]


def parametrize_with_checks(
    methods: Sequence[peftkit.Method],
    *,
    expected_failures: Mapping[str, str] | None = None,
    cases: Iterable[Case] | None = None,
) -> Callable[[Callable[..., Any]], Any]:
    """A decorator that makes of `def test_it(check): check()` one pytest test for each check of each method.

    `expected_failures` is as for `check_method`, and takes a test's whole name as well: `"dora-check_merge[Linear]"`.
    They are strict xfails.

    >>> import peftkit
    >>> from peftkit.testing import parametrize_with_checks
    >>> @parametrize_with_checks([peftkit.LoRA(rank=2)])
    ... def test_conformance(check):
    ...     check()
    """
    import pytest

    expected, parameters = dict(expected_failures or {}), []
    names = [method.name for method in methods]
    everything: list[_Due] = []
    chosen = CASES if cases is None else tuple(cases)
    for method in methods:
        label = method.name if names.count(method.name) == 1 else str(method)
        for each in _due(method, "cpu", chosen):
            name = f"{label}-{each.name}"
            everything += [each, dataclasses.replace(each, check=f"{label}-{each.check}")]
            reason = next((expected[key] for key in (name, each.name, each.check) if key in expected), None)
            marks = [] if reason is None else [pytest.mark.xfail(reason=reason, strict=True)]
            parameters.append(pytest.param(functools.partial(_for_pytest, each), id=name, marks=marks))
    _refuse_unknown(expected, everything)
    return pytest.mark.parametrize("check", parameters)


def _for_pytest(due: _Due) -> None:
    import pytest

    try:
        _run(due)
    except NotApplicableError as reason:
        pytest.skip(str(reason))


# ------------------------------------------------------------------------------------------------ what is due


def _due(method: peftkit.Method, device: str, cases: Iterable[Case] | None) -> Iterator[_Due]:
    """Every check that the method's declarations make it due."""
    for check in _OF_THE_METHOD:
        yield _Due(check.__name__, "", functools.partial(check, method))
    adapted = []
    for case in CASES if cases is None else cases:
        there = dataclasses.replace(case, device=device)
        if not is_for(method, case):
            continue
        if _declined(method, case):
            check = declaring.check_declined
            yield _Due(check.__name__, case.name, functools.partial(check, method, there))
        else:
            adapted.append(there)
    yield _Due("check_some_case", "", functools.partial(_check_some_case, adapted))
    for case in adapted:
        for check in _ON_EVERY_CASE:
            yield _Due(check.__name__, case.name, functools.partial(check, method, case))
    plain = next((case for case in adapted if _is_plain(case)), None)
    for check in _ON_ONE_CASE if adapted else ():
        if plain is None:
            yield _Due(check.__name__, "", _skip_without_plain_case)
        else:
            yield _Due(check.__name__, plain.name, functools.partial(check, method, plain))


def _is_plain(case: Case) -> bool:
    """Whether the model compiles and routes whatever the method: torch does not compile recurrent layers, and attention
    reads its output projection's weight itself.
    """
    composite = (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)
    return not any(
        isinstance(module, composite) for module in dataclasses.replace(case, device="cpu").build().modules()
    )


def _skip_without_plain_case() -> None:
    raise NotApplicableError("every case that the method adapts is a recurrent layer or an attention")


def _check_some_case(adapted: Sequence[Case]) -> None:
    """A method for which nothing can be tried has not been checked."""
    if not adapted:
        raise AssertionError(
            "no case is left on which to try the method: `declines`, `matrices`, `vectors` and its default targets "
            "leave out all of them; give cases= of its own"
        )


def is_for(method: peftkit.Method, case: Case) -> bool:
    """Whether the case has what the method says that it adapts: matrices, vectors, modules, or the whole model."""
    if case.selects == "model":
        return _finds_targets(method, case)
    if method.scope == "modules":
        return case.selects == "layer" and not _is_for_whole_models(method)
    if method.scope == "parameters":
        return _holds_parameters(method, case)
    return method.vectors if case.selects == "vector" else method.matrices


def _holds_parameters(method: peftkit.Method, case: Case) -> bool:
    """Whether there is any parameter, in the case's layer, of the number of dimensions that the method adapts.

    Not where two layers hold one weight: `wrap` refuses to put another one in the place of one of them only.
    """
    if case.selects != "layer":
        return method.vectors if case.selects == "vector" else method.matrices
    if not any(method.matrices if p.dim() >= 2 else method.vectors for p in case.build().parameters()):
        return False
    return not any(site.tied for site in sites_of(method, case))


def _finds_targets(method: peftkit.Method, case: Case) -> bool:
    """Whether the method's own default targets find anything in a model, which is for them to say."""
    try:
        return bool(sites_of(method, case))
    except (peftkit.errors.SelectorError, peftkit.errors.UnsupportedLayerError):
        return False


def _is_for_whole_models(method: peftkit.Method) -> bool:
    """Whether the method's default targets select a model's root."""
    whole = [case for case in CASES if case.selects == "model" and _finds_targets(method, case)]
    return any(site.path == "" for case in whole for site in sites_of(method, case))


def _declined(method: peftkit.Method, case: Case) -> bool:
    """Whether `declines` names the kind of any of the case's layers (for modules: their class)."""
    if not method.declines:
        return False
    sites = sites_of(method, case)
    kinds = {type(site.layer).__name__ if site.kind is None else site.kind.label for site in sites}
    return any(kind in method.declines for kind in kinds)


def _refuse_unknown(expected: Mapping[str, str], due: Sequence[_Due]) -> None:
    known = {each.check for each in due} | {each.name for each in due}
    unknown = sorted(set(expected) - known)
    if unknown:
        raise ValueError(f"expected_failures names {unknown[0]!r}, which is no check that this method is due")


# -------------------------------------------------------------------------------------------------- running


def _run(due: _Due) -> None:
    """Run one check; torch's random state is the caller's again afterwards."""
    # Other kernels from run to run, or shorter factors on tensor cores, are not a method's doing.
    exact = torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
    with exact, torch.random.fork_rng(), warnings.catch_warnings():
        # torch says this once of every LSTM with projections, adapted or not.
        warnings.filterwarnings("ignore", message="LSTM with projections", category=UserWarning)
        torch.manual_seed(0)
        due.run()


def _result(due: _Due, expected: str | None) -> Result:
    try:
        _run(due)
    except NotApplicableError as reason:
        return Result(due.check, due.case, "skipped", str(reason))
    except Exception as error:  # noqa: BLE001 - whatever a method raises is this check's result
        if expected is not None:
            return Result(due.check, due.case, "expected failure", expected)
        plain = isinstance(error, AssertionError)
        return Result(due.check, due.case, "failed", str(error) if plain else f"{type(error).__name__}: {error}")
    if expected is not None:
        return Result(due.check, due.case, "unexpected pass", f"expected to fail: {expected}")
    return Result(due.check, due.case, "passed", "")


def _is_there(device: str) -> bool:
    wanted, accelerator = torch.device(device), torch.accelerator.current_accelerator()
    if wanted.type == "cpu":
        return True
    there = torch.accelerator.is_available() and accelerator is not None and accelerator.type == wanted.type
    return there and (wanted.index or 0) < torch.accelerator.device_count()
