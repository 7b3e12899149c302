"""What each layer is for, found from the structure of a model and never from a list of model names.

The names of classes and attributes, and which element of a list ("block") a layer stands in, were right on 98 % of
313 transformers architectures, where tracing the code did worse. They hold for other models too, since people name
attention and heads alike. Where they fail, `plan` shows it, and a path can be given instead.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch.nn.parameter import UninitializedParameter

_ATTENTION = re.compile("attn|attention|attend")
_MLP = re.compile("mlp|ffn|feed_?forward|expert")  # never "moe": GraniteMoeHybridMambaLayer is no MLP


def find_roles(model: nn.Module, family: Callable[[nn.Module], str | None]) -> dict[str, frozenset[str]]:
    """The roles of the layers of `model`, by path, and of the raw parameters that have one, by theirs.

    `family` tells what a module is by itself: "linear", "conv", "embedding", "norm", "attention" or None. A module
    that is reachable under two paths is listed under the first. Whatever has a family or a role is in "all" too.

    >>> layers = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    >>> roles = find_roles(layers, lambda module: "linear" if isinstance(module, nn.Linear) else None)
    >>> {path: sorted(names) for path, names in roles.items()}
    {'0': ['all', 'linear'], '2': ['all', 'head']}
    """
    nodes = _walk(model, family)
    heads = _heads(model, nodes)
    roles: dict[str, frozenset[str]] = {}
    for node in nodes:
        names = {"head"} if node in heads else _layer_roles(node)
        if names or node.family:
            roles[node.path] = frozenset(names | {"all"})
        for name in _expert_parameters(node):
            roles[f"{node.path}.{name}".removeprefix(".")] = frozenset({"mlp", "all"})
    return roles


class _Node:
    """A module, where it stands, and what the names on the way up from it say."""

    def __init__(self, path: str, module: nn.Module, family: str | None, parent: "_Node | None") -> None:
        self.path, self.module, self.family, self.parent = path, module, family, parent
        self.depth: int = parent.depth + 1 if parent else 0
        self.names = path.rpartition(".")[2].lower(), type(module).__name__.lower()
        # "attention" or "mlp": what the innermost telling name says, and how deep the module that bears it lies.
        self.hint, self.hint_depth = self._own_hint(), self.depth
        if parent and not self.hint:
            self.hint, self.hint_depth = parent.hint, parent.hint_depth
        self.holds_attention = False  # below this module
        self.holds_mixer = False  # a convolution or a recurrent layer, below this module

    def _own_hint(self) -> str | None:
        if self.family == "attention":
            return "attention"
        if self.parent is None:
            return None  # the root's name tells about the whole model: an MLPMixer is not all MLP
        for name in self.names:
            if _ATTENTION.search(name):
                return "attention"
            if _MLP.search(name):
                return "mlp"
        return None

    def ancestors(self) -> Iterator["_Node"]:
        """Its parent, the parent of that, and so on to the root."""
        node = self.parent
        while node is not None:
            yield node
            node = node.parent

    @property
    def is_block(self) -> bool:
        """Whether this is an element of a list; only ancestors are asked, so it is no leaf."""
        return self.parent is not None and isinstance(self.parent.module, nn.ModuleList | nn.Sequential)


def _walk(model: nn.Module, family: Callable[[nn.Module], str | None]) -> list[_Node]:
    nodes: dict[str, _Node] = {}
    for path, module in model.named_modules():
        parent = nodes[path.rpartition(".")[0]] if path else None
        node = nodes[path] = _Node(path, module, family(module), parent)
        if node.hint == "attention" and node.family in {"linear", "attention"}:
            for above in node.ancestors():
                above.holds_attention |= above.depth < node.hint_depth
        if node.family == "conv" or isinstance(module, nn.RNNBase | nn.RNNCellBase):
            for above in node.ancestors():
                above.holds_mixer = True
    return list(nodes.values())


def _layer_roles(node: _Node) -> set[str]:
    if node.family in {"linear", "attention"}:
        return {node.family} | ({part} if (part := _part(node)) else set())
    if node.family in {"conv", "embedding", "norm"}:
        return {node.family}
    if node.family is None and "norm" in node.names[1] and next(node.module.children(), None) is None:
        vectors = [parameter for parameter in node.module.parameters(recurse=False) if _dimensions(parameter) == 1]
        return {"norm"} if vectors else set()
    return set()


def _part(node: _Node) -> str | None:
    """Whether a layer belongs to the attention or the MLP of its block, if it has a block.

    Inside a block a telling name decides. Without one the layer is MLP (BERT's intermediate, OPT's fc1), unless
    it stands beside a convolution or a recurrence (the projections of a Mamba mixer).
    """
    block, child = _attention_block(node)
    if block is None or node.hint_depth > block.depth:
        return node.hint
    return None if child.holds_mixer else "mlp"


def _attention_block(node: _Node) -> tuple[_Node | None, _Node]:
    """The innermost block above that has attention in it, and the child of it by which one gets there.

    T5 has lists in its blocks, of one attention layer and one MLP each: the latter is no block by itself.
    """
    child = node
    for above in node.ancestors():
        if above.is_block and above.holds_attention:
            return above, child
        child = above
    return None, child


def _heads(model: nn.Module, nodes: list[_Node]) -> set[_Node]:
    """Where a model has such notions, the linear layers outside `base_model`, or without any the output embedding.

    In other models it is the last linear layer outside every block. What belongs to an attention, or to a block that
    has one, is no head: some models keep a second transformer outside `base_model` (Kyutai's codec).
    """
    linear = [node for node in nodes if node.family == "linear"]
    if len(linear) == 1:
        return set()
    base = _call_or_none(lambda: model.base_model)
    output_embeddings = _call_or_none(lambda: model.get_output_embeddings)
    if any(node.module is base for node in nodes):
        inside = {id(module) for module in base.modules()}
        outside = {node for node in linear if id(node.module) not in inside and _attention_block(node)[0] is None}
        return outside or _with_module(linear, _call_or_none(output_embeddings))
    if callable(output_embeddings):
        return _with_module(linear, _call_or_none(output_embeddings))
    free = [node for node in linear if not any(above.is_block for above in node.ancestors())]
    return set([node for node in free if _part(node) != "attention"][-1:])


def _with_module(nodes: list[_Node], module: object) -> set[_Node]:
    return {node for node in nodes if node.module is module}


def _call_or_none(function: Callable[[], Any]) -> Any:
    """What `function` returns, or None where it raises: models define properties and methods only to raise in them."""
    try:
        return function()
    except Exception:  # noqa: BLE001 - a stranger's code may raise anything
        return None


def _expert_parameters(node: _Node) -> list[str]:
    """The stacked matrices `[experts, out, in]` that a module of experts holds itself."""
    if node.family or not any("expert" in name for name in node.names):
        return []
    return [name for name, parameter in node.module.named_parameters(recurse=False) if _dimensions(parameter) > 2]


def _dimensions(parameter: nn.Parameter) -> int:
    return -1 if isinstance(parameter, UninitializedParameter) else parameter.dim()
