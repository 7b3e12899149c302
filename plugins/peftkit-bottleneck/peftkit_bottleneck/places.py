"""Where bottleneck adapters go in a transformer, told from the names that people give to its projections.

Each function is a selector. They know the names in BERT, GPT-2, Llama, T5, ViT, OPT, GPT-NeoX and their kin; in other
models give `targets` of your own: any module whose output has a dimension of features.
"""

import re

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

_ATTENTION = re.compile(
    r"(^|\.)[^.]*att[^.]*\.(output\.dense|o_proj|out_proj|c_proj|out_lin|dense|w?o)$", re.IGNORECASE
)
_MLP = re.compile(
    r"(^|\.)((mlp|ffn|feed_?forward)\.c_proj|layer\.\d+\.output\.dense"
    r"|down_proj|fc2|fc_out|wo|w2|lin2|linear2|dense_4h_to_h|ffn_output)$",
    re.IGNORECASE,
)
_BLOCK = re.compile(r"(^|\.)(mlp|ffn|feed_?forward|DenseReluDense)$", re.IGNORECASE)
_BERT_OUTPUT = re.compile(r"(^|\.)layer\.\d+\.output$")


def attention_outputs(path: str, module: nn.Module) -> bool:
    """The projection at the end of each attention.

    For `nn.MultiheadAttention` it is that module itself: it reads its projection's weight, and never calls it.
    """
    if isinstance(module, nn.MultiheadAttention):
        return True
    return _is_layer(module) and bool(_ATTENTION.search(path))


def mlp_outputs(path: str, module: nn.Module) -> bool:
    """The projection at the end of each feed-forward part."""
    return _is_layer(module) and bool(_MLP.search(path)) and not _ATTENTION.search(path)


def output_projections(path: str, module: nn.Module) -> bool:
    """Both: every projection that leads back into the residual stream."""
    return attention_outputs(path, module) or mlp_outputs(path, module)


def mlp_blocks(path: str, module: nn.Module) -> bool:
    """Each feed-forward part as a whole: a module that takes and returns the hidden states.

    BERT and its kin have no such module. There it is the `output` of each layer, which gets the input of the
    feed-forward part as well, to add it. Where a model calls two linear layers by itself (OPT, BART), there is none.
    """
    if _BERT_OUTPUT.search(path):
        return isinstance(getattr(module, "dense", None), nn.Linear)
    return bool(_BLOCK.search(path)) and not _is_leaf(module)


def own_modules(module: nn.Module) -> list[nn.Module]:
    """The module and all below it, without the adapters that an earlier `wrap` has put there."""
    below = [own_modules(child) for name, child in module.named_children() if name != "adapters"]
    return [module, *(each for part in below for each in part)]


def _is_leaf(module: nn.Module) -> bool:
    return len(own_modules(module)) == 1


def _is_layer(module: nn.Module) -> bool:
    return _is_leaf(module) and not isinstance(module, NonDynamicallyQuantizableLinear)
