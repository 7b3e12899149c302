"""What runs a model: training steps of a decoder, a single layer, inference, and batches of several adapters.

Each function gives a `Side`. All sides of a row use the same weights, batch, rank and optimizer.
"""

import contextlib
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

import peftkit
from peftkit import kernels
from races import exact
from races.libraries import LIBRARIES, HuggingFace, Peftkit, count, many_by_hand, move, trained
from races.models import SMALL, OneLayer, Shape, decoder
from races.timing import Side

RANK = 16


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How a step is trained."""

    dropout: float = 0.0
    dtype: torch.dtype = torch.float32
    autocast: bool = False
    lean: bool = False
    """peftkit keeps no copy of a frozen weight in autocast's dtype for backward, but makes it again."""

    device: str = "cpu"
    compiler: str = ""
    """The backend of `torch.compile`; empty for eager."""


class TrainingStep:
    """Forward, backward, and the optimizer's step over whatever trains, on the same batch each time."""

    def __init__(self, model: nn.Module, shape: Shape, setting: Setting) -> None:
        self.model = model.train()
        self.setting = setting
        self.tokens = shape.tokens(setting.device)
        parameters = trained(model)
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-5) if parameters else None
        self.call: Callable[..., object] = torch.compile(model, backend=setting.compiler) if setting.compiler else model

    def forward(self) -> torch.Tensor:
        on = self.setting
        with contextlib.ExitStack() as modes:
            if on.autocast:
                modes.enter_context(torch.autocast(on.device, dtype=torch.bfloat16))
            if on.lean:
                modes.enter_context(kernels.lean())
            inputs = self.model.get_input_embeddings()(self.tokens).detach().requires_grad_(True)
            return self.call(inputs_embeds=inputs, labels=self.tokens, use_cache=False).loss

    def __call__(self) -> None:
        self.forward().backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        if self.setting.device != "cpu":
            torch.cuda.synchronize()

    def exact(self) -> dict[str, float]:
        """What is the same in every run. The loss is that of the start, where no adapter changes the model."""
        figures: dict[str, float] = {"trainable_parameters": count(self.model)}
        if not self.setting.compiler:  # compiled graphs keep what they keep where no hook sees it
            figures["saved_bytes"] = exact.saved_bytes(self.model, self.forward)
        figures["start_loss"] = self.forward().item()
        if self.setting.device == "cpu":
            return figures | exact.allocations(self)
        return figures | exact.gpu_peak(self)


def training(library: str, setting: Setting, shape: Shape = SMALL, rank: int = RANK, method: str = "lora") -> Side:
    """One training step of a decoder."""
    base = decoder(shape, setting.dtype, setting.device)
    tune = LIBRARIES[library]
    options = {"dropout": setting.dropout} if method == "lora" else {}
    model = getattr(tune, method)(base, rank=rank, **options)
    expected = None if library in {"floor", "full"} or method != "lora" else shape.lora_parameters(rank)
    if expected not in {None, count(model)}:
        raise AssertionError(f"{library} trains {count(model)} parameters instead of {expected}")
    step = TrainingStep(model, shape, setting)
    return Side(run=step, exact=step.exact)


def layer(library: str, tokens: int, fan_in: int, fan_out: int, dropout: float = 0.0) -> Side:
    """Forward and backward of one linear layer, without an optimizer."""
    model = LIBRARIES[library].lora(OneLayer(fan_in, fan_out), rank=RANK, dropout=dropout).train()
    parameters = trained(model)
    chance = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, fan_in, generator=chance, requires_grad=True)
    gradient = torch.randn(tokens, fan_out, generator=chance)

    def run() -> None:
        # A view, because a leaf's gradient is copied if it came as a view, and kept as it is otherwise.
        model(x.view_as(x)).backward(gradient)
        for p in (x, *parameters):
            p.grad = None

    def figures() -> dict[str, float]:
        view = x.view_as(x)
        return {
            "trainable_parameters": count(model),
            "saved_bytes": exact.saved_bytes(model, lambda: model(view)),
        }

    return Side(run=run, calls=5, exact=figures)


def _no_loss(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=tokens, use_cache=False).logits


def inference(library: str, tokens: int, shape: Shape = SMALL) -> Side:
    """One sequence through a decoder whose adapter, not merged, does something."""
    model = LIBRARIES[library].lora(decoder(shape), rank=RANK).eval()
    move(model)
    ids = shape.tokens().flatten()[:tokens][None]
    return Side(
        run=lambda: _no_loss(model, ids),
        calls=5 if tokens < 16 else 1,
        exact=lambda: {"checksum": _no_loss(model, ids).double().abs().sum().item()},
    )


def _eight(library: Peftkit | HuggingFace, shape: Shape, adapters: int) -> tuple[nn.Module, list[str]]:
    """A decoder with `adapters` adapters, and the name for each of eight samples."""
    model = decoder(shape)
    names = [f"a{i}" for i in range(adapters)]
    for name in names:
        model = library.lora(model, RANK, name=name)
        library.switch(model, name)
        move(model)
    return model.eval(), list(itertools.islice(itertools.cycle(names), 8))


def batch_of_one(tokens: int, shape: Shape = SMALL) -> Side:
    """Eight samples that all go through the same adapter, with peftkit."""
    model, _ = _eight(Peftkit(), shape, 1)
    ids = _samples(tokens, shape)
    return Side(run=lambda: _no_loss(model, ids), calls=5 if tokens < 16 else 1)


def batch_of_many(library: str, tokens: int, shape: Shape = SMALL, *, adapters: int = 8, kept: bool = True) -> Side:
    """Eight samples that go through eight adapters.

    `kept`: what is timed is in the midst of a `routed` block of peftkit, as in a loop that generates; otherwise it is
    entered for every batch, and all of it is timed. HF PEFT is told the names with every call.
    """
    ids = _samples(tokens, shape)
    calls = 5 if tokens < 16 else 1
    if library == "hf-peft":
        model, names = _eight(HuggingFace(), shape, adapters)

        def with_names() -> torch.Tensor:
            with torch.inference_mode():
                return model(input_ids=ids, use_cache=False, adapter_names=names).logits

        return Side(run=with_names, calls=calls, exact=lambda: _checksum(with_names()))

    if library == "by hand":
        by_hand = many_by_hand(decoder(shape), RANK, adapters).eval()
        return Side(run=lambda: _no_loss(by_hand, ids), calls=calls)

    model, names = _eight(Peftkit(), shape, adapters)

    def entered() -> torch.Tensor:
        with peftkit.routed(model, names):
            return _no_loss(model, ids)

    def generate() -> float:
        with peftkit.routed(model, names):
            for _ in range(2):  # of which the second keeps what all later calls use
                _no_loss(model, ids)
            start = time.perf_counter()
            for _ in range(calls):
                _no_loss(model, ids)
            return (time.perf_counter() - start) / calls

    exactly = {"exact": lambda: _checksum(entered())}
    return Side(run=generate, **exactly) if kept else Side(run=entered, calls=calls, **exactly)


def training_of_many(adapters: int, tokens: int, shape: Shape = SMALL) -> Side:
    """Forward and backward of eight samples with as many of peftkit's adapters, all of them training."""
    model, names = _eight(Peftkit(), shape, adapters)
    peftkit.set_trainable(model, *dict.fromkeys(names))
    model.train()
    ids = _samples(tokens, shape)
    parameters = trained(model)

    def run() -> None:
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_(True)
        with peftkit.routed(model, names) if adapters > 1 else contextlib.nullcontext():
            model(inputs_embeds=embedded, labels=ids, use_cache=False).loss.backward()
        for p in parameters:
            p.grad = None

    return Side(run=run, exact=lambda: {"trainable_parameters": count(model)})


def _samples(tokens: int, shape: Shape) -> torch.Tensor:
    chance = torch.Generator().manual_seed(0)
    return torch.randint(shape.vocabulary, (8, tokens), generator=chance)


def _checksum(logits: torch.Tensor) -> dict[str, float]:
    return {"checksum": logits.double().abs().sum().item()}
