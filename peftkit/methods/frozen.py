"""Leave weights as they are: the rule for an exception, and the floor that every other method is measured against."""

from dataclasses import dataclass
from typing import ClassVar

import peftkit


@dataclass(frozen=True)
class Frozen(peftkit.Method):
    """Train nothing here. What no rule matches is frozen anyway; this says so, ahead of a broader rule.

    >>> import torch, peftkit
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    >>> plan = peftkit.plan(model, {"0": "frozen", "@linear": "lora"})
    >>> [row.path for row in plan.rows if row.parameters]
    ['1']
    """

    name: ClassVar[str] = "frozen"
    scope: ClassVar = "parameters"
    vectors: ClassVar = True
    default_targets: ClassVar = "**"

    def adapter(self, site: peftkit.Site, shared: peftkit.Shared | None = None) -> None:
        """Nothing to install, nothing to train."""


@peftkit.hookimpl
def peftkit_methods() -> list[type[peftkit.Method]]:
    """The one method of this module."""
    return [Frozen]
