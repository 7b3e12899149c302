"""peftkit: parameter-efficient fine-tuning for any `nn.Module`, with methods as plugins.

    import peftkit

    model = peftkit.wrap(model, method="lora")
    ...                                              # train as ever
    peftkit.save(model, "adapter.safetensors")

Everything public is here, and in `peftkit.errors`, `layers`, `memory`, `trainer` and `distributed`.
"""

import importlib
import typing

__version__ = "0.1.0"

# isort: split
from peftkit import errors
from peftkit.adapter import Activation, Adapter, LowRank, Observer, Shared, Site
from peftkit.hookspecs import hookimpl
from peftkit.layers.kind import LayerKind
from peftkit.method import HuggingFace, Method
from peftkit.methods.frozen import Frozen
from peftkit.methods.full import Full
from peftkit.methods.lora import LoRA
from peftkit.workload import Workload

# isort: split
from peftkit.files import load, load_state_dict, save, state_dict
from peftkit.install import unwrap, wrap
from peftkit.lifecycle import activate, disabled, param_groups, set_trainable, using
from peftkit.merging import merge, unmerge
from peftkit.plan import plan
from peftkit.plugins import method, methods
from peftkit.summary import summary

if typing.TYPE_CHECKING:
    from peftkit.combining import combine
    from peftkit.estimating import estimate
    from peftkit.routing import routed
    from peftkit.verifying import verify

__all__ = [
    "Activation",
    "Adapter",
    "Frozen",
    "Full",
    "HuggingFace",
    "LayerKind",
    "LoRA",
    "LowRank",
    "Method",
    "Observer",
    "Shared",
    "Site",
    "Workload",
    "activate",
    "combine",
    "disabled",
    "errors",
    "estimate",
    "hookimpl",
    "load",
    "load_state_dict",
    "merge",
    "method",
    "methods",
    "param_groups",
    "plan",
    "routed",
    "save",
    "set_trainable",
    "state_dict",
    "summary",
    "unmerge",
    "unwrap",
    "using",
    "verify",
    "wrap",
]

# What most programs never call is imported when it is first asked for.
_LATER = {"combine": "combining", "estimate": "estimating", "routed": "routing", "verify": "verifying"}


def __getattr__(name: str) -> typing.Any:
    if name not in _LATER:
        raise AttributeError(f"module 'peftkit' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"peftkit.{_LATER[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
