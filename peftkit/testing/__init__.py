"""The conformance kit: does a method keep what peftkit promises of every method, on every layer kind?

    from peftkit.testing import parametrize_with_checks

    @parametrize_with_checks([MyMethod()])
    def test_conformance(check):
        check()

Which checks a method is due follows from what it declares (`identity`, `matrices`, `vectors`, `scope`, `declines`), and
from nothing else. docs/conformance.md has one line for each check. pytest is needed for the decorator alone.
"""

from peftkit.testing.cases import CASES, Case
from peftkit.testing.kit import CHECKS, Result, check_method, parametrize_with_checks

__all__ = ["CASES", "CHECKS", "Case", "Result", "check_method", "parametrize_with_checks"]
