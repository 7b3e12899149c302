"""Tells a model that is spread over processes from one that is not, at no cost where it is not.

Nothing is imported to find out: where torch's module for it was never imported, nothing can be of its classes.
"""

import sys
from typing import Any

from torch import distributed, nn


def is_spread() -> bool:
    """Whether there is a group of processes at all. Where there is none, nothing else of this has to be asked."""
    return distributed.is_available() and distributed.is_initialized()


def is_sharded(tensor: Any) -> bool:
    """Whether it is a DTensor: each rank holds a part."""
    tensors = sys.modules.get("torch.distributed.tensor")
    return tensors is not None and isinstance(tensor, tensors.DTensor)


def is_unit(module: nn.Module) -> bool:
    """Whether `fully_shard` was called on this very module."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def reshard(root: nn.Module) -> None:
    """Put the sharded parameters back in their places. FSDP2 leaves some gathered after a forward (the root's), and
    what is written to those is lost.
    """
    for module in root.modules() if is_spread() else ():
        if is_unit(module):
            module.reshard()  # type: ignore[operator]
