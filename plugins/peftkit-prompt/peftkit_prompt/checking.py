"""A check of a hyperparameter that two methods have."""

import peftkit


def require_ids(method: peftkit.Method, field: str) -> None:
    """Refuse anything but token ids or None; a list becomes a tuple, so that equal methods are equal."""
    value = getattr(method, field)
    if value is None:
        return
    fits = isinstance(value, (list, tuple)) and len(value) > 0 and all(type(i) is int and i >= 0 for i in value)
    method.require(fits, field, "a list of token ids")
    object.__setattr__(method, field, tuple(value))
