"""Checks of hyperparameters that several methods have."""

import peftkit


def require_count(method: peftkit.Method, field: str, *, optional: bool = False) -> None:
    """Refuse anything but a whole number of at least 1 (or None, if that has a meaning)."""
    value = getattr(method, field)
    fits = is_int(value) and value >= 1
    method.require(fits or (optional and value is None), field, "a whole number of at least 1")


def require_ids(method: peftkit.Method, field: str) -> None:
    """Refuse anything but token ids or None; a list becomes a tuple, so that equal methods are equal."""
    value = getattr(method, field)
    if value is None:
        return
    fits = isinstance(value, (list, tuple)) and len(value) > 0 and all(is_int(i) and i >= 0 for i in value)
    method.require(fits, field, "a list of token ids")
    object.__setattr__(method, field, tuple(value))


def require_probability(method: peftkit.Method, field: str) -> None:
    """Refuse anything but a number from 0 to below 1."""
    value = getattr(method, field)
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1
    method.require(fits, field, "a number from 0 to below 1")


def is_int(value: object) -> bool:
    """Whether it is a whole number, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool)
