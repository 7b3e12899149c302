"""What the workloads of this package have in common: what they need besides torch, and where a model is."""

from typing import Any

import torch
from torch import nn

import peftkit


def needs_transformers(name: str) -> Any:
    """The package transformers; `WorkloadError` that names the remedy where it is not installed."""
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise peftkit.errors.WorkloadError(
            f"workload {name!r} needs transformers: pip install 'peftkit[transformers]'"
        ) from error
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call] # a new head is meant to be new
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    return transformers


def device_of(model: nn.Module) -> torch.device:
    """Where a model's parameters are."""
    return next(model.parameters()).device
