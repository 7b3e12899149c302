"""peftkit: parameter-efficient fine-tuning for any `nn.Module`, with methods as plugins.

    import peftkit

    model = peftkit.wrap(model, method="lora")
    ...                                              # train as ever
    peftkit.save(model, "adapter.safetensors")

Everything public is here, in `peftkit.errors`, in `peftkit.layers`, and in `peftkit.memory`.
"""

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
from peftkit.combining import combine
from peftkit.estimating import estimate
from peftkit.files import load, load_state_dict, save, state_dict
from peftkit.install import unwrap, wrap
from peftkit.lifecycle import activate, disabled, param_groups, set_trainable, using
from peftkit.merging import merge, unmerge
from peftkit.plan import plan
from peftkit.plugins import method, methods
from peftkit.routing import routed
from peftkit.summary import summary
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
