"""Prefix tuning: trained keys and values before those of the input, in every attention (Li and Liang,
arXiv:2101.00190).

They go into the model's own key-value cache, as if the model had read a text already. So it works on every decoder
that has such a cache, and its sizes are those of the cache that the model itself makes. In an encoder-decoder model it
is the decoder's self-attention that gets a prefix.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

import peftkit
from peftkit_prompt.arguments import extend_mask, named_arguments, shift_positions
from peftkit_prompt.caches import cache_in, cache_of, inside, length_of, mark, new_key, prompts_in, refuse_unfit
from peftkit_prompt.checking import require_ids
from peftkit_prompt.first_cache import Layout, keys_and_values, layout_of
from peftkit_prompt.prepending import embeddings_of, width_of

INITS = ("vocabulary", "normal")


def root(path: str, module: nn.Module) -> bool:  # noqa: ARG001 - a selector's signature
    """The site of a prefix: the whole model."""
    return path == ""


@dataclass(frozen=True)
class PrefixTuning(peftkit.Method):
    """`tokens` trained keys and values in each attention layer.

    Args:
        tokens: length of the prefix.
        init: how it starts. `vocabulary`: as the keys and values that the model itself computes for random tokens,
            which is what was found to train well; `normal`: normal, with standard deviation 0.02.
        init_ids: start as the keys and values of these tokens instead, repeated or cut to fill the prefix.
        projection: make the prefix of trained embeddings by two linear layers with tanh between. It then starts at
            random, whatever `init` says.
        width: features of the projection's hidden layer.

    >>> PrefixTuning(tokens=5, init_ids=[3, 4]).fields()["init_ids"]
    [3, 4]
    """

    name: ClassVar[str] = "prefix_tuning"
    scope: ClassVar[Any] = "modules"
    identity: ClassVar[bool] = False
    default_targets: ClassVar[Any] = (root,)
    hf: ClassVar[peftkit.HuggingFace | None] = peftkit.HuggingFace(
        "PREFIX_TUNING",
        fields={"tokens": "num_virtual_tokens"},
        shared={"prefix": "prompt_embeddings"},
        constants={"prefix_projection": False},
        prefix="",
        tasks=("CAUSAL_LM",),
        ignored={
            "token_dim": None, "num_layers": None, "num_attention_heads": None, "num_transformer_submodules": (1,),
            "encoder_hidden_size": None, "init_weights": None,
        },
    )  # fmt: skip

    tokens: int = 20
    init: str = "vocabulary"
    init_ids: tuple[int, ...] | None = None
    projection: bool = False
    width: int = 512

    def __post_init__(self) -> None:
        """Refuse values that would fail later, or do nothing."""
        self.require_whole("tokens")
        self.require(self.init in INITS, "init", f"one of {', '.join(INITS)}")
        require_ids(self, "init_ids")
        self.require_bool("projection")
        self.require(not (self.projection and self.init_ids), "init_ids", "None with a projection")
        self.require_whole("width")

    def shared(self, sites: Sequence[peftkit.Site]) -> nn.Module:
        """The prefix itself."""
        if len(sites) > 1:
            raise peftkit.errors.UnsupportedLayerError("prefix_tuning adapts one model at one site: choose one target")
        layout = layout_of(sites[0], self)
        return _Projected(sites[0], self, layout) if self.projection else _Prefix(sites[0], self, layout)

    def adapter(self, site: peftkit.Site, shared: peftkit.Shared | None = None) -> peftkit.Activation:
        """What fills the cache with it."""
        return _PrefixAdapter(site, self, shared)


class _Prefix(nn.Module):
    """The prefix as one tensor: for each token and layer all heads' keys, then all heads' values."""

    def __init__(self, site: peftkit.Site, method: PrefixTuning, layout: Layout) -> None:
        super().__init__()
        self.layout = layout
        if site.device.type == "meta":
            value = torch.empty(method.tokens, layout.size)
        elif method.init == "normal" and method.init_ids is None:
            value = torch.randn(method.tokens, layout.size) * 0.02
        else:
            value = layout.flatten(keys_and_values(site, method.tokens, method.init_ids))
        self.prefix = site.parameter(value)

    def forward(self) -> list[Any]:
        """Keys and values `[1, heads, tokens, features]` of each layer of the cache; None for one without."""
        return self.layout.split(self.prefix)


class _Projected(nn.Module):
    """The prefix as made of embeddings."""

    def __init__(self, site: peftkit.Site, method: PrefixTuning, layout: Layout) -> None:
        super().__init__()
        self.layout = layout
        features = width_of(embeddings_of(site, method))
        with torch.device("meta" if site.device.type == "meta" else "cpu"):
            self.embeddings = site.parameter(torch.randn(method.tokens, features))
            self.hidden = nn.Linear(features, method.width)
            self.out = nn.Linear(method.width, layout.size)
        self.to(device=site.device, dtype=site.dtype)

    def forward(self) -> list[Any]:
        """As for `_Prefix`."""
        return self.layout.split(self.out(self.hidden(self.embeddings).tanh()))


class _PrefixAdapter(peftkit.Activation):
    def __init__(self, site: peftkit.Site, method: PrefixTuning, shared: Any) -> None:
        super().__init__(site)
        self.bank = shared
        self.tokens = int(method.tokens)
        self.where = f"prefix_tuning at {site.path or 'the model'}"
        self.key = new_key()

    def forward(self, base: Any, *args: Any, **kwargs: Any) -> Any:
        self.refuse_checkpointing(base.model)
        named = named_arguments(base, args, kwargs)
        decoder_mask = "decoder_attention_mask" in base.names
        extend_mask(named, "decoder_attention_mask" if decoder_mask else "attention_mask", self.tokens, self.where)
        shift_positions(named, self.tokens)
        given = cache_in(named)
        cache = self.bank.state.layout.new_cache(base.model) if given is None else given
        named["past_key_values"] = cache
        if self.key not in prompts_in(cache):
            refuse_unfit(cache, self.where)
            self.fill(cache, base.model, _rows(named))
        before = length_of(cache)
        with inside(cache):
            output = base(**named)
        if length_of(cache) == before:
            raise peftkit.errors.StateError(f"{self.where}: the model has not used the cache that holds the prefix")
        wanted = named.get("use_cache")
        if wanted is None:
            wanted = getattr(base.model.config, "use_cache", True)
        return output if wanted or given is not None else _without_cache(output)

    def refuse_checkpointing(self, model: nn.Module) -> None:
        """Checkpointed blocks of transformers drop the cache, because it would be filled twice."""
        if model.training and any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
            raise peftkit.errors.StateError(
                f"{self.where} keeps its prefix in the cache, which gradient checkpointing drops; switch that off: "
                "model.activation_checkpointing_disable()"
            )

    def fill(self, cache: Any, model: nn.Module, rows: int) -> None:
        """Put the prefix into the cache, for each row of the batch."""
        mark(cache, self.key, self.tokens)
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        store = getattr(cache, "self_attention_cache", cache)
        for layer, pair in enumerate(self.bank.state()):
            if pair is not None:
                store.update(*(each.to(dtype).expand(rows, -1, -1, -1) for each in pair), layer)


def _rows(named: dict[str, Any]) -> int:
    """The size of the batch."""
    names = ("decoder_input_ids", "decoder_inputs_embeds", "input_ids", "inputs_embeds", "labels", "encoder_outputs")
    value = next((named[name] for name in names if named.get(name) is not None), None)
    if value is None:
        raise peftkit.errors.UnsupportedLayerError("prefix_tuning needs input_ids or inputs_embeds, and got neither")
    return int((value if isinstance(value, torch.Tensor) else value[0]).shape[0])


def _without_cache(output: Any) -> Any:
    """The output for a caller who wants no cache."""
    if isinstance(output, dict):
        make: Any = type(output)
        return make(**{name: value for name, value in output.items() if name != "past_key_values"})
    if isinstance(output, tuple):
        return tuple(each for each in output if each is not cache_of(output))
    return output


@peftkit.hookimpl
def peftkit_methods() -> list[type[peftkit.Method]]:
    """The one method of this module."""
    return [PrefixTuning]
