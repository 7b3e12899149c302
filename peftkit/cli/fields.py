"""`--set field=value`: a method's hyperparameters, as they are given on the command line."""

import json
from collections.abc import Sequence
from typing import Any

from peftkit import plugins
from peftkit.cli.output import Refusal, others_print_to_stderr
from peftkit.method import Method


def parse(settings: Sequence[str]) -> dict[str, Any]:
    """Fields with their values, each read as JSON where it is JSON, and as text where it is not.

    >>> parse(["rank=16", "init=pissa", "rank_stabilized=true"])
    {'rank': 16, 'init': 'pissa', 'rank_stabilized': True}
    """
    fields: dict[str, Any] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not (equals and name):
            raise Refusal(f"--set takes field=value, such as --set rank=16; got {setting!r}")
        if name in fields:
            raise Refusal(f"--set gives {name!r} twice; leave one of them out")
        try:
            fields[name] = json.loads(value)
        except ValueError:
            fields[name] = value
    return fields


def make_method(name: str, settings: Sequence[str]) -> Method:
    """The method of that name with these hyperparameters; its package is imported now."""
    fields = parse(settings)
    with others_print_to_stderr():
        method = plugins.method(name)
        try:
            return method(**fields)
        except TypeError as error:  # a field without a default is missing; wrong names have an error of their own
            raise Refusal(f"{name}: {error}") from error
