"""Full fine-tuning: the weights themselves are trained, in place or as a copy that can be switched."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

import peftkit


@dataclass(frozen=True)
class Full(peftkit.Method):
    """Train the weights themselves, and save them whole.

    Args:
        keep_base: train a copy and leave the base weight alone, so that the copy can be switched, merged and
            unwrapped like any adapter (a classifier head for each task). It costs the copy's memory. By default the
            base's own parameter is trained: no extra memory, but there is no way back to its old values.

    >>> import torch, peftkit
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    >>> model = peftkit.wrap(model, {"0": "lora", "1": peftkit.Full(keep_base=True)}, name="task_a")
    >>> sorted(peftkit.state_dict(model, "task_a"))
    ['0.weight.down', '0.weight.up', '1.bias.value', '1.weight.value']
    """

    name: ClassVar[str] = "full"
    scope: ClassVar = "parameters"
    vectors: ClassVar = True
    affine: ClassVar = True
    default_targets: ClassVar = "**"
    hf: ClassVar = peftkit.HuggingFace(
        peft_type="MODULES_TO_SAVE",
        part="modules_to_save",
        tensors={"value": "{weight}"},
        layouts={"": {"value": "stored"}},
        reads={"keep_base": True},
    )

    keep_base: bool = False

    def __post_init__(self) -> None:
        """Refuse what is not a yes or a no."""
        self.require_bool("keep_base")

    def adapter(self, site: peftkit.Site, shared: peftkit.Shared | None = None) -> peftkit.Adapter | None:
        """A copy of the weight, or nothing but the permission to train it."""
        if self.keep_base:
            return _Copy(site)
        site.unfreeze()
        return None


class _Copy(peftkit.Adapter):
    """A weight that takes the base's place."""

    def __init__(self, site: peftkit.Site) -> None:
        super().__init__(site)
        self.value = site.parameter(site.matrix().clone())

    def weight(self, w: Tensor) -> Tensor:
        """The copy, whatever the base is."""
        return self.value


@peftkit.hookimpl
def peftkit_methods() -> list[type[peftkit.Method]]:
    """The one method of this module."""
    return [Full]
