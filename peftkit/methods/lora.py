"""LoRA: a frozen weight plus a trainable product of two thin matrices (Hu et al., arXiv:2106.09685)."""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

import peftkit

INITS = ("default", "gaussian", "orthogonal", "pissa", "olora")


@dataclass(frozen=True)
class LoRA(peftkit.Method):
    """`W + alpha / rank * up @ down`, with `up` `[out, rank]` and `down` `[rank, in]`.

    Args:
        rank: width of the product.
        alpha: the update is scaled by `alpha / rank`.
        dropout: probability with which an element of the input is dropped on its way into `down`, in training.
        init: how the factors start. The output at the start is the base's for all of them, and the base is never
            touched: an init whose product is not zero keeps its start and subtracts it.

            * `default`: `down` uniform in ±1/sqrt(in), `up` zero; on a layer whose input is an index,
              `down` zero and `up` standard normal, as published.
            * `gaussian`: `down` normal with standard deviation 1/rank, `up` zero.
            * `orthogonal`: `up` and `down` in orthogonal halves of the rank space; needs an even rank.
            * `pissa`: the largest singular vectors of the weight (Meng et al., arXiv:2404.02948).
            * `olora`: the first columns of the weight's QR decomposition (Büyükakyüz, arXiv:2406.01775).
        rank_stabilized: scale by `alpha / sqrt(rank)` instead (Kalajdzievski, arXiv:2312.03732).

    >>> import torch, peftkit
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> model = peftkit.wrap(model, "lora", rank=2)
    >>> {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    {'0.adapters.default.weight.down': (2, 8), '0.adapters.default.weight.up': (8, 2)}
    """

    name: ClassVar[str] = "lora"
    hf: ClassVar = peftkit.HuggingFace(
        peft_type="LORA",
        fields={"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "rank_stabilized": "use_rslora"},
        tensors={"down": "lora_A.weight", "up": "lora_B.weight"},
        one_hot={"down": "lora_embedding_A", "up": "lora_embedding_B"},
        layouts={"conv": {"down": "a - kernel", "up": "a b ones"}, "stack": {"down": "ab c", "up": "b ca"}},
        kinds=("Linear", "Conv1D", "Conv1d", "Conv2d", "Conv3d", "Embedding", "Parameter"),
        own_convolution=True,
        patterns={"rank": "rank_pattern", "alpha": "alpha_pattern"},
        bias="lora_only",
        reads={"dropout": 0.0, "rank_stabilized": False},
        # Other inits change the base at every load, or are no init at all.
        ignored={
            "init_lora_weights": (True, "gaussian", "eva", "orthogonal"),
            "eva_config": None, "megatron_core": None, "qalora_group_size": None, "runtime_config": None,
        },
    )  # fmt: skip

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    init: str = "default"
    rank_stabilized: bool = False

    def __post_init__(self) -> None:
        """Refuse values that would fail later, or do nothing."""
        self.require_whole("rank")
        self.require_not_zero("alpha")
        self.require_number("dropout", least=0, below=1)
        self.require(self.init in INITS, "init", f"one of {', '.join(INITS)}")
        self.require_bool("rank_stabilized")
        self.require(self.init != "orthogonal" or self.rank % 2 == 0, "rank", "even with init='orthogonal'")

    @property
    def scale(self) -> float:
        """What the product is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

    def adapter(self, site: peftkit.Site, shared: peftkit.Shared | None = None) -> peftkit.LowRank:
        """Two factors, and their frozen start where the init has one."""
        return LoRAAdapter(site, self)

    def from_factors(self, up: Tensor, down: Tensor) -> "tuple[peftkit.Method, dict[str, Tensor]] | None":
        """The factors as they are: an alpha for which the scale is 1, and no start."""
        rank = up.shape[-1]
        alpha = math.sqrt(rank) if self.rank_stabilized else float(rank)
        return replace(self, rank=rank, alpha=alpha, init="default"), {"up": up, "down": down}


class LoRAAdapter(peftkit.LowRank):
    """The two factors at one site. A variant of LoRA can build on it: by a gain, or by what it trains."""

    def __init__(self, site: peftkit.Site, method: LoRA) -> None:
        super().__init__(site)
        self.scale = method.scale
        self.dropout = method.dropout
        up, down = _factors(site, method)
        self.down = site.parameter(down)
        self.up = site.parameter(up)
        subtracts = method.init in ("orthogonal", "pissa", "olora")
        self.start_down: Tensor | None
        self.start_up: Tensor | None
        self.register_buffer("start_down", self.down.detach().clone() if subtracts else None)
        self.register_buffer("start_up", self.up.detach().clone() if subtracts else None)

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """`up`, `down` and the scale."""
        return self.up, self.down, self.scale

    def start(self) -> tuple[Tensor, Tensor] | None:
        """The factors as they were made, where their product was not zero."""
        if self.start_up is None or self.start_down is None:
            return None
        return self.start_up, self.start_down


def _factors(site: peftkit.Site, method: LoRA) -> tuple[Tensor, Tensor]:
    """`up` `[..., out, rank]` and `down` `[..., rank, in]` as the method's init has them."""
    rank, out_shape, in_shape = method.rank, (*site.batch, site.fan_out), site.fan_in
    up = torch.zeros(*out_shape, rank)
    down = torch.zeros(*site.batch, rank, in_shape)
    if method.init == "gaussian":
        return up, down.normal_(std=1 / rank)
    if method.init == "orthogonal":
        half = rank // 2
        basis = torch.linalg.qr(torch.randn(rank, rank)).Q
        return (
            torch.randn(*out_shape, half) @ basis[:half] / 10,
            basis[half:].mT @ torch.randn(*site.batch, half, in_shape) / 10,
        )
    if method.init in ("pissa", "olora"):
        return _from_weight(site, method)
    if site.one_hot:
        return up.normal_(), down
    bound = 1 / math.sqrt(in_shape)
    return up, down.uniform_(-bound, bound)


def _from_weight(site: peftkit.Site, method: LoRA) -> tuple[Tensor, Tensor]:
    """The factors that hold the most of the weight itself, by singular values or by QR."""
    rank = method.rank
    if rank > min(site.fan_out, site.fan_in):
        raise peftkit.errors.FieldError(
            f"lora: init={method.init!r} takes its factors from the weight, so rank must be at most "
            f"{min(site.fan_out, site.fan_in)} at {site.name} {list(site.shape)}, got {rank}"
        )
    w = site.matrix()
    if method.init == "olora":
        q, r = torch.linalg.qr(w)
        return q[..., :rank], r[..., :rank, :]
    u, s, vh = torch.linalg.svd(w / method.scale, full_matrices=False)
    root = s[..., :rank].sqrt()
    return u[..., :rank] * root.unsqueeze(-2), root.unsqueeze(-1) * vh[..., :rank, :]


@peftkit.hookimpl
def peftkit_methods() -> list[type[peftkit.Method]]:
    """The one method of this module."""
    return [LoRA]
