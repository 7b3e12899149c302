"""Makes a new adapter from old ones: a weighted sum of what they do to the weights, or a sparse variant of one.

What is combined are *task tensors*, each of which says what an adapter has changed at one site:

* low-rank adapters: the update `scale * (up @ down - start)`, the whole matrix. Sums of factors are no sums of updates:
  `(Σ √w_i up_i) @ (Σ √w_i down_i)`, as elsewhere, also multiplies each adapter's `up` by every other's `down`.
* methods that are `affine`: the trained parameters less those of a new adapter, which changes nothing. (For a copy of
  the weight: the copy less the base.)

Everything is computed first; then the new adapter is installed whole, or not at all.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peftkit.adapter import Adapter, Site
from peftkit.errors import FieldError, MethodError, StateError, UnsupportedLayerError, did_you_mean
from peftkit.install import build, check_name, install
from peftkit.installed import Placement, unmerged
from peftkit.method import Method
from peftkit.resolve import site_of
from peftkit.running import adds_low_rank

_SPARSE = ("ties", "dare", "magnitude_prune")
HOWS = ("linear", "cat", "svd", *_SPARSE)


def combine(
    model: nn.Module,
    weights: Mapping[str, float],
    *,
    name: str,
    how: str = "linear",
    rank: int | None = None,
    density: float = 0.2,
    majority_sign: str = "total",
    seed: int = 0,
) -> nn.Module:
    """Install a new adapter made from old ones; it neither runs nor trains until it is told to.

    It covers every site that any of the old ones covers; one that an adapter does not cover counts as unchanged by it.
    Ranks may differ. With `W + d_i` the weight that adapter `i` makes, the new one makes:

    * `linear`: `W + Σ w_i d_i`, exactly. For low-rank adapters its rank is the sum of theirs.
    * `cat`: the same, for low-rank adapters.
    * `svd`: of that sum the best approximation of rank `rank`, for low-rank adapters.
    * `ties`: of each `d_i` the share `density` of largest magnitude; per element, the mean of the `w_i d_i` that have
      the majority's sign (Yadav et al., arXiv:2306.01708).
    * `dare`: of each `d_i` a random share `density`, divided by `density`; then the sum (Yu et al., arXiv:2311.03099).
    * `magnitude_prune`: of each `d_i` the share `density` of largest magnitude; then the sum.

    The last three leave no matrix of low rank; low-rank adapters get its best approximation of rank `rank`. The share
    is taken site by site, not over the whole model. Where a method's weight is affine in its parameters (`full` with
    `keep_base`), `d_i` is what these have learned, there is no rank, and `cat` and `svd` are `linear`.

    Args:
        model: a wrapped model, not merged.
        weights: the old adapters' names, each with its factor `w_i`.
        name: the new adapter's.
        how: one of the above.
        rank: of the result, where it is approximated; by default the largest among the old ones. A site that is smaller
            than that gets what it can have.
        density: the share that is kept, above 0 and up to 1.
        majority_sign: `"total"` weighs each sign by magnitude, as published; `"frequency"` counts.
        seed: for `dare`: one seed gives one adapter on every device.

    A method's other fields (dropout, say) are those of the first adapter named that has the site.

    Raises `UnknownAdapterError`, `FieldError` for a wrong argument, `StateError` while merged and for weights that were
    trained in place, `UnsupportedLayerError` for what has no such sum; the model is then as it was.

    >>> import torch, peftkit
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
    >>> for name, rank in (("a", 2), ("b", 3)):
    ...     model = peftkit.wrap(model, "lora", name=name, rank=rank, init="gaussian")
    >>> model = peftkit.combine(model, {"a": 0.7, "b": 0.3}, name="mix")
    >>> peftkit.activate(model, "mix")
    >>> print(peftkit.summary(model).adapters[2].methods)
    ('lora(rank=5, alpha=5.0)',)
    """
    known = unmerged(model, "combine adapters")
    check_name(model, name)
    way = _Way(how, rank, density, majority_sign, _generator(seed))
    by_site: dict[tuple[str, str], list[_Part]] = {}
    for source, factor in _checked(weights).items():
        for placement in known.sites(source):
            by_site.setdefault((placement.path, placement.weight), []).append(_Part(source, placement, factor))
    if not by_site:
        raise StateError(f"{', '.join(map(repr, weights))} hold nothing to combine: all that they cover is frozen")
    _refuse_rank_of_nothing(list(by_site.values()), way)
    with torch.no_grad():
        built = [_combined(parts, way) for parts in by_site.values()]
    return install(model, name, built, known.roles, known.active, trainable=False)


def _checked(weights: Mapping[str, float]) -> dict[str, float]:
    given: Any = weights
    if not isinstance(given, Mapping) or not given:
        raise FieldError(
            f'combine: weights name adapters, each with its factor ({{"a": 0.5, "b": 0.5}}), got {given!r}'
        )
    for source, factor in given.items():
        if not _is_number(factor):
            raise FieldError(f"combine: the factor of {source!r} must be a finite number, got {factor!r}")
    return {source: float(factor) for source, factor in given.items()}


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _generator(seed: object) -> torch.Generator:
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise FieldError(f"combine: seed must be a whole number, got {seed!r}")
    return torch.Generator().manual_seed(seed)


@dataclasses.dataclass(frozen=True, slots=True)
class _Way:
    """How to combine, checked."""

    how: str
    rank: int | None
    density: float
    majority_sign: str
    generator: torch.Generator

    def __post_init__(self) -> None:
        self._require(self.how in HOWS, "how", f"one of {', '.join(HOWS)}", did_you_mean(str(self.how), HOWS))
        rank_fits = isinstance(self.rank, int) and not isinstance(self.rank, bool) and self.rank >= 1
        self._require(self.rank is None or rank_fits, "rank", "a whole number of at least 1, or None")
        exact = self.how in ("linear", "cat")
        self._require(
            self.rank is None or not exact,
            "rank",
            f"None with how={self.how!r}, whose sum is exact",
            "; how='svd' has one",
        )
        self._require(_is_number(self.density) and 0 < self.density <= 1, "density", "above 0 and up to 1")
        self._require(self.majority_sign in ("total", "frequency"), "majority_sign", "'total' or 'frequency'")

    def _require(self, condition: bool, field: str, wants: str, hint: str = "") -> None:  # noqa: FBT001 - as in Method
        if not condition:
            raise FieldError(f"combine: {field} must be {wants}, got {getattr(self, field)!r}{hint}")

    def mix(self, tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """One task tensor of several."""
        if self.how == "ties":
            return ties(tensors, weights, self.density, self.majority_sign)
        if self.how == "dare":
            return dare(tensors, weights, self.density, self.generator)
        if self.how == "magnitude_prune":
            return magnitude_prune(tensors, weights, self.density)
        return linear(tensors, weights)


# ------------------------------------------------------------------------------------------- task tensors


def linear(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """`Σ w_i t_i`: task arithmetic (Ilharco et al., arXiv:2212.04089).

    >>> linear([torch.tensor([1.0, 2.0]), torch.tensor([4.0, 4.0])], [1.0, 0.5])
    tensor([3., 4.])
    """
    return torch.stack([t * w for t, w in zip(tensors, weights, strict=True)]).sum(0)


def magnitude_prune(tensors: Sequence[Tensor], weights: Sequence[float], density: float) -> Tensor:
    """Of each tensor the share `density` of largest magnitude, then the weighted sum.

    >>> magnitude_prune([torch.tensor([1.0, -3.0]), torch.tensor([2.0, 1.0])], [1.0, 1.0], 0.5)
    tensor([ 2., -3.])
    """
    return linear([_largest(t, density) for t in tensors], weights)


def dare(tensors: Sequence[Tensor], weights: Sequence[float], density: float, generator: torch.Generator) -> Tensor:
    """Of each tensor a random share `density`, divided by `density` (so that its mean stays), then the weighted sum.

    The generator is the CPU's.
    """
    masks = [torch.bernoulli(torch.full(t.shape, density), generator=generator).to(t) for t in tensors]
    return linear([t * mask / density for t, mask in zip(tensors, masks, strict=True)], weights)


def ties(tensors: Sequence[Tensor], weights: Sequence[float], density: float, majority_sign: str = "total") -> Tensor:
    """Trim, elect a sign, and average what agrees with it, each element for itself.

    The election is among the trimmed tensors; the factors scale them afterwards. What was trimmed does not count in
    the average.

    >>> ties([torch.tensor([1.0, -3.0]), torch.tensor([3.0, 1.0])], [1.0, 1.0], 1.0)
    tensor([ 2., -3.])
    """
    trimmed = torch.stack([_largest(t, density) for t in tensors])
    signs = trimmed.sign()
    votes = (trimmed if majority_sign == "total" else signs).sum(0)
    agreeing = signs == torch.where(votes >= 0, 1, -1)
    return linear(list(trimmed * agreeing), weights) / agreeing.sum(0).clamp(min=1)


def _largest(tensor: Tensor, density: float) -> Tensor:
    """The tensor with all but its largest elements, at least one, set to zero."""
    kept = tensor.abs().flatten().topk(max(1, int(density * tensor.numel()))).indices
    flat = tensor.flatten()
    return torch.zeros_like(flat).index_copy_(0, kept, flat[kept]).reshape(tensor.shape)


# ------------------------------------------------------------------------------------------------- one site


@dataclasses.dataclass(frozen=True, slots=True)
class _Part:
    """What one of the old adapters contributes at one site."""

    source: str
    placement: Placement
    factor: float

    @property
    def method(self) -> Method:
        return self.placement.method

    @property
    def adapter(self) -> Any:
        return self.placement.adapter

    def state(self) -> dict[str, Tensor]:
        """Everything that makes the adapter what it is, in the precision in which sums are computed."""
        tensors: dict[str, Tensor] = self.adapter.state_dict()
        return {key: _precise(t) if t.is_floating_point() else t for key, t in tensors.items()}

    def __str__(self) -> str:
        return f"{self.source!r} is {self.method} there"


def _combined(parts: Sequence[_Part], way: _Way) -> tuple[Site, Method, Adapter]:
    placement = parts[0].placement
    for part in parts:
        _refuse_without_values(part)
    if len({type(part.method) for part in parts}) > 1:
        raise UnsupportedLayerError(
            f"cannot combine different methods at {placement.name}: {', '.join(map(str, parts))}; "
            "adapters of different methods run together: peftkit.activate(model, "
            f"{', '.join(repr(part.source) for part in parts)})"
        )
    site = site_of(placement.path, placement.layer, placement.weight)
    if all(adds_low_rank(part.adapter) for part in parts):
        method, state = _low_rank(parts, way, site)
    elif parts[0].method.affine:
        method, state = _affine(parts, way, site)
    else:
        raise _no_sum(parts[0], "its adapters have no sum that is an adapter of the method again")
    return site, method, _filled(site, method, state)


def _refuse_without_values(part: _Part) -> None:
    """What has no task tensor: a weight trained in place, a function of activations, a tensor on the meta device."""
    name = part.placement.name
    if part.adapter is None:
        raise StateError(
            f"{part.source!r} trained {name} in place, so that what it changed is not known; "
            f"use Full(keep_base=True) for {part.source!r}"
        )
    if not isinstance(part.adapter, Adapter):
        raise _no_sum(part, "it has no weight form")
    if any(t.is_meta for t in part.adapter.state_dict().values()):
        raise StateError(
            f"{part.source!r} is on the meta device at {name} and has no values; give the model real weights"
        )
    if not all(t.isfinite().all() for t in part.adapter.state_dict().values()):
        raise UnsupportedLayerError(f"{part.source!r} holds values at {name} that are not finite; leave it out")


def _refuse_rank_of_nothing(sites: Sequence[Sequence[_Part]], way: _Way) -> None:
    """A rank, where no adapter has one."""
    if (way.how in ("cat", "svd") or way.rank is not None) and not any(
        adds_low_rank(part.adapter) for parts in sites for part in parts
    ):
        what = f"how={way.how!r}" if way.rank is None else f"rank={way.rank}"
        raise _no_sum(sites[0][0], f"{what} is for low-rank adapters; how='linear' without rank= may be what you want")


def _no_sum(part: _Part, why: str) -> UnsupportedLayerError:
    return UnsupportedLayerError(
        f"cannot combine {part.source!r} at {part.placement.name}: {part.method} there, and {why}; leave it out of "
        "weights=, or run the adapters together with peftkit.activate"
    )


def _low_rank(parts: Sequence[_Part], way: _Way, site: Site) -> tuple[Method, dict[str, Tensor]]:
    products = [_product(part, site) for part in parts]
    factors = [part.factor for part in parts]
    if way.how in _SPARSE:
        delta = way.mix([up @ down for up, down in products], factors)
        up, down = _nearest(delta.to(torch.promote_types(site.dtype, torch.float32)), _rank(parts, way))
    else:
        up = torch.cat([up * factor for (up, _), factor in zip(products, factors, strict=True)], -1)
        down = torch.cat([down for _, down in products], -2)
        if way.how == "svd":
            up, down = _shortened(up, down, _rank(parts, way))
    made = parts[0].method.from_factors(up, down)
    if made is None:
        raise _no_sum(
            parts[0], f"{type(parts[0].method).__name__}.from_factors does not say how to make one from factors"
        )
    return made


def _rank(parts: Sequence[_Part], way: _Way) -> int:
    return way.rank or max(part.adapter("factors")[0].shape[-1] for part in parts)


def _product(part: _Part, site: Site) -> tuple[Tensor, Tensor]:
    """An adapter's whole update as one product: its scale within, its start subtracted."""
    up, down, scale = part.adapter("factors")
    start = part.adapter.start()
    up, down = (_precise(t.to(site.device)) for t in (up, down))
    if start is not None:
        up = torch.cat([up, -_precise(start[0].to(site.device))], -1)
        down = torch.cat([down, _precise(start[1].to(site.device))], -2)
    return up * scale, down


def _shortened(up: Tensor, down: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The product of rank `rank` nearest to `up @ down`, without building that matrix."""
    (q, r), (p, t) = torch.linalg.qr(up), torch.linalg.qr(down.mT)
    left, right = _nearest(r @ t.mT, rank)
    return q @ left, right @ p.mT


def _nearest(delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The product of rank `rank` nearest to a matrix (Eckart-Young), its singular values shared out evenly."""
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    root = s[..., :rank].sqrt()
    return u[..., :rank] * root.unsqueeze(-2), root.unsqueeze(-1) * vh[..., :rank, :]


def _affine(parts: Sequence[_Part], way: _Way, site: Site) -> tuple[Method, dict[str, Tensor]]:
    """Parameters `p0 + mix(p_i - p0)`, where those of a new adapter, `p0`, change nothing."""
    first = parts[0]
    for part in parts:
        if part.method != first.method:
            raise _no_sum(part, f"{first.source!r} has other fields there ({first.method}), so they have no sum")
    with torch.random.fork_rng(devices=[]):
        new = build(site, first.method)
    assert isinstance(new, Adapter)  # noqa: S101 - its siblings are
    w = site.matrix()
    if not torch.equal(new("weight", w), w):
        raise _no_sum(first, "a new adapter of it changes the weight, so what was learned is not known")
    learns = first.placement.learns
    start = {key: t.to(site.device) for key, t in new.state_dict().items()}
    states = [{key: t.to(site.device) for key, t in part.state().items()} for part in parts]
    for part, state in zip(parts, states, strict=True):
        for key in start.keys() - learns:
            if not torch.equal(state[key], start[key].to(state[key].dtype)):
                raise _no_sum(part, f"its frozen {key!r} differs from a new adapter's, so they have no sum")
    factors = [part.factor for part in parts]
    for key in learns:
        origin = _precise(start[key])
        start[key] = origin + way.mix([state[key] - origin for state in states], factors)
    return first.method, start


def _precise(t: Tensor) -> Tensor:
    """In float64, where the device has it: then a factor of 1 gives back an adapter's values bit for bit."""
    return t.detach().to(torch.float32 if t.device.type == "mps" else torch.float64)


def _filled(site: Site, method: Method, state: Mapping[str, Tensor]) -> Adapter:
    """The method's adapter with these values: made on the meta device, so that no initialisation is computed."""
    adapter = build(site.on_meta(), method)
    values = {key: site.tensor(t) if t.is_floating_point() else t.to(site.device) for key, t in state.items()}
    for key, tensor in values.items():
        if not tensor.isfinite().all():
            raise UnsupportedLayerError(f"the combination at {site.name} is not finite ({key}); use smaller factors")
    try:
        assert isinstance(adapter, Adapter)  # noqa: S101 - its siblings are
        adapter.load_state_dict(values, assign=True)
    except RuntimeError as error:
        raise MethodError(f"{method}: the state for {site.name} does not fit its adapter: {error}") from error
    left = [name for name, t in (*adapter.named_parameters(), *adapter.named_buffers()) if t.is_meta]
    if left:
        raise MethodError(
            f"{method}: {left[0]!r} of its adapter at {site.name} is not part of its state; "
            "register it as a persistent buffer"
        )
    return adapter
