"""AdaLoRA: a singular value decomposition whose least important terms are pruned (Zhang et al., arXiv:2303.10512)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import peftkit


@dataclass(frozen=True)
class AdaLoRA(peftkit.Method):
    """`W + alpha / rank * up @ diag(values) @ down`, pruned from `rank` terms a site to `target_rank` on average.

    Nothing has to be called in the training loop: the budget follows the optimizer's steps, and the regulariser's
    gradient is added before each.

    Args:
        rank: terms a site has at the start.
        target_rank: terms a site has at the end, on average over the sites.
        alpha: the update is scaled by `alpha / rank`.
        dropout: probability with which an element of the input is dropped, in training.
        start: pruning begins after this many optimizer steps.
        end: after this many the target is reached, and what is pruned stays so. Train on from there.
        every: steps between two prunings.
        orthogonality: weight of the regulariser that keeps both factors near orthogonal; 0 for none.
        beta1, beta2: smoothing of the importance of a parameter, and of its uncertainty.

    >>> import torch, peftkit
    >>> from peftkit_adalora.adalora import AdaLoRA
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> peftkit.plan(model, AdaLoRA(rank=4, target_rank=2)).trainable
    68
    """

    name: ClassVar[str] = "adalora"
    hf: ClassVar = peftkit.HuggingFace(
        peft_type="ADALORA",
        fields={
            "rank": "init_r", "target_rank": "target_r", "alpha": "lora_alpha", "dropout": "lora_dropout",
            "start": "tinit", "end": "total_step", "every": "deltaT", "orthogonality": "orth_reg_weight",
            "beta1": "beta1", "beta2": "beta2",
        },
        tensors={"down": "lora_A", "values": "lora_E", "up": "lora_B"},
        kinds=("Linear", "Conv1D", "Conv2d"),
        bias="lora_only",
        ignored={
            "r": None, "init_lora_weights": (True,), "megatron_core": None, "qalora_group_size": None, "tfinal": (0,),
            "runtime_config": None,
        },
        unsaved={"kept": True, "steps": 0},
    )  # fmt: skip

    rank: int = 12
    target_rank: int = 8
    alpha: float = 8.0
    dropout: float = 0.0
    start: int = 0
    end: int = 1000
    every: int = 1
    orthogonality: float = 0.5
    beta1: float = 0.85
    beta2: float = 0.85

    def __post_init__(self) -> None:
        """Refuse values that would fail later, or prune nothing."""
        self.require_whole("rank", "target_rank", "end", "every")
        self.require_whole("start", least=0)
        self.require(self.target_rank <= self.rank, "target_rank", f"at most rank={self.rank}")
        self.require(self.start < self.end, "start", f"below end={self.end}")
        self.require_number("dropout", "beta1", "beta2", least=0, below=1)
        self.require_number("orthogonality", least=0)
        self.require_not_zero("alpha")

    def shared(self, sites: Sequence[peftkit.Site]) -> nn.Module:
        """How far training has come."""
        return Progress(sites[0])

    def adapter(self, site: peftkit.Site, shared: peftkit.Shared | None = None) -> "AdaLoRAAdapter":
        """The three factors."""
        return AdaLoRAAdapter(site, self)

    def before_step(self, adapters: Sequence[Any], shared: Any) -> None:
        """Add the gradient of the mean of `|P Pᵀ - I|` over all factors `P`, times its weight."""
        weight = self.orthogonality / (2 * sum(math.prod(adapter.values.shape[:-2]) for adapter in adapters))
        for adapter in adapters:
            if weight and adapter.down.grad is not None:
                adapter.down.grad += weight * _pull(adapter.down)
            if weight and adapter.up.grad is not None:
                adapter.up.grad += weight * _pull(adapter.up.mT).mT

    def after_step(self, adapters: Sequence[Any], shared: Any) -> None:
        """Count the step, look at what matters, and prune what is over the budget."""
        shared.steps += 1
        step = int(shared.steps)
        if step < self.end or (step == self.end and not shared.seen):  # as when a run goes on from just before the end
            shared.look(adapters, self)
        if step > self.end:
            for adapter in adapters:
                adapter.values *= adapter.kept
        elif step == self.end or step % self.every == 0:
            shared.prune(adapters, self._budget(step, sum(a.values.numel() for a in adapters)), keep=step == self.end)

    def _budget(self, step: int, most: int) -> int:
        """How many terms may stay: by a cubic from all of them (and before the start, more) down to the target."""
        least = most * self.target_rank // self.rank
        left = 1 - (step - self.start) / (self.end - self.start)
        return int((most - least) * left**3 + least)


class Progress(nn.Module):
    """Counts steps, and remembers how important each parameter has been.

    What it remembers is a state of training and no part of the adapter: it is not saved, and starts anew in a run that
    goes on from a file.
    """

    def __init__(self, site: peftkit.Site) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.long, device=site.device))
        self.seen: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}

    def look(self, adapters: Sequence[Any], method: AdaLoRA) -> None:
        """Smooth `|p * gradient|` and how far it is from its smoothed value, element by element."""
        for i, adapter in enumerate(adapters):
            for name, p in adapter.named_parameters():
                if p.grad is None:
                    continue
                now = (p * p.grad).abs()
                importance, uncertainty = self.seen.get((i, name), (torch.zeros_like(now), torch.zeros_like(now)))
                importance = method.beta1 * importance + (1 - method.beta1) * now
                uncertainty = method.beta2 * uncertainty + (1 - method.beta2) * (now - importance).abs()
                self.seen[i, name] = importance, uncertainty

    def prune(self, adapters: Sequence[Any], budget: int, *, keep: bool) -> None:
        """Set to zero the values of all terms but the `budget` most important; for good, with `keep`."""
        scores = [self._score(i, adapter) for i, adapter in enumerate(adapters)]
        over = sum(score.numel() for score in scores) - budget
        if over <= 0 or not self.seen:
            return
        threshold = torch.cat([score.flatten().to(scores[0].device) for score in scores]).kthvalue(over).values
        for adapter, score in zip(adapters, scores, strict=True):
            kept = score > threshold.to(score.device)
            adapter.values *= kept
            if keep:
                adapter.kept.copy_(kept)

    def _score(self, i: int, adapter: Any) -> Tensor:
        """`[..., rank, 1]`: of the value itself, and the means over its row of `down` and its column of `up`."""
        nothing = torch.zeros_like(adapter.values)
        down, values, up = (math.prod(self.seen.get((i, name), [nothing])) for name in ("down", "values", "up"))
        return values + down.mean(-1, keepdim=True) + up.mT.mean(-1, keepdim=True)


class AdaLoRAAdapter(peftkit.LowRank):
    """`up` `[..., out, rank]`, `values` `[..., rank, 1]`, `down` `[..., rank, in]`; `kept` is what was not pruned."""

    def __init__(self, site: peftkit.Site, method: AdaLoRA) -> None:
        super().__init__(site)
        self.dropout = method.dropout
        self.scale = method.alpha / (method.rank + 1e-5)
        self.down = site.parameter(torch.randn(*site.batch, method.rank, site.fan_in) * 0.02)
        self.values = site.parameter(torch.zeros(*site.batch, method.rank, 1))
        self.up = site.parameter(torch.randn(*site.batch, site.fan_out, method.rank) * 0.02)
        self.register_buffer("kept", torch.ones(*site.batch, method.rank, 1, dtype=torch.bool, device=site.device))

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """The singular values go with `down`."""
        return self.up, self.values * self.down, self.scale


def _pull(rows: Tensor) -> Tensor:
    """The gradient of the Frobenius norm `|P Pᵀ - I|` by `P` `[..., rank, n]`."""
    apart = rows @ rows.mT - torch.eye(rows.shape[-2], dtype=rows.dtype, device=rows.device)
    size = torch.linalg.matrix_norm(apart, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
    return 2 * apart @ rows / size


@peftkit.hookimpl
def peftkit_methods() -> list[type[peftkit.Method]]:
    """The one method of this module."""
    return [AdaLoRA]
