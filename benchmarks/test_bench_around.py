"""The work around the training step, peftkit and HF PEFT side by side in one process.

Wrapping, saving, loading, switching and merging happen once or a few times a run, but with many adapters, or in a
server that changes them between requests, they are what one waits for. Every benchmark is run once for each
library on the same model under the same group, does the same thing with each, and asserts that it was done.

Run it with `make bench`; `benchmarks/README.md` says how a number is taken.
"""

import functools
import gc
import itertools
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import transformers
from torch import nn

import peftkit

BLOCKS, HIDDEN, RANK = 200, 64, 4  # 1,400 linears
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SELECTOR = "{q,k,v,o,gate,up,down}_proj"
LINEARS = BLOCKS * len(PROJECTIONS)


class Beside(nn.Module):
    """Runs its children on the same input and adds what they give: no depth in which rounding could grow."""

    def __init__(self, children: dict[str, nn.Module]) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum(child(x) for child in self.children())


def many_small() -> nn.Module:
    """200 blocks of seven square linears, named as in a decoder layer."""
    torch.manual_seed(0)
    blocks = ({name: nn.Linear(HIDDEN, HIDDEN, bias=False) for name in PROJECTIONS} for _ in range(BLOCKS))
    return Beside({f"block{i}": Beside(block) for i, block in enumerate(blocks)})


def seven_billion() -> nn.Module:
    """Llama-7B's shapes, 32 layers of seven linears, on the meta device: no weight is allocated."""
    config = transformers.LlamaConfig(
        hidden_size=4096,
        intermediate_size=11_008,
        num_hidden_layers=32,
        num_attention_heads=32,
        vocab_size=32_000,
    )
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(config)


class Peftkit:
    """The calls of peftkit."""

    def wrap(self, model: nn.Module, rank: int = RANK) -> nn.Module:
        return peftkit.wrap(model, {SELECTOR: peftkit.LoRA(rank=rank)})

    def save(self, model: nn.Module, folder: Path) -> None:
        peftkit.save(model, self.file(folder))

    def load(self, model: nn.Module, folder: Path) -> None:
        peftkit.load(model, self.file(folder), name="second")

    def switch(self, model: nn.Module, name: str) -> None:
        peftkit.activate(model, name)

    def forget(self, model: nn.Module) -> None:
        peftkit.unwrap(model, "second")

    def merge(self, model: nn.Module) -> None:
        peftkit.merge(model)

    def unmerge(self, model: nn.Module) -> None:
        peftkit.unmerge(model)

    def file(self, folder: Path) -> Path:
        return folder / "adapter.safetensors"


class HuggingFace:
    """The calls of HF PEFT that do the same."""

    def wrap(self, model: nn.Module, rank: int = RANK) -> nn.Module:
        return peft.get_peft_model(model, peft.LoraConfig(r=rank, target_modules=PROJECTIONS))

    def save(self, model: nn.Module, folder: Path) -> None:
        model.save_pretrained(folder)

    def load(self, model: nn.Module, folder: Path) -> None:
        model.load_adapter(folder, adapter_name="second")

    def switch(self, model: nn.Module, name: str) -> None:
        model.set_adapter(name)

    def forget(self, model: nn.Module) -> None:
        model.delete_adapter("second")

    def merge(self, model: nn.Module) -> None:
        model.merge_adapter()

    def unmerge(self, model: nn.Module) -> None:
        model.unmerge_adapter()

    def file(self, folder: Path) -> Path:
        return folder / "adapter_model.safetensors"


timing = functools.partial(pytest.mark.benchmark, disable_gc=True)
"""Garbage is collected before each round and not within it: the last round's model is not this one's work."""

Library = Peftkit | HuggingFace
Timer = Callable[..., None]

pytestmark = [
    # HF PEFT asks transformers for a property under its old name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


@pytest.fixture(params=[Peftkit(), HuggingFace()], ids=["peftkit", "hf-peft"])
def library(request: pytest.FixtureRequest) -> Library:
    return request.param


@pytest.fixture
def timed(benchmark) -> Timer:
    """Time `work(*arguments)`, each time with fresh arguments that `fresh` makes outside the clock."""

    def run(work: Callable[..., object], fresh: Callable[[], tuple], *, rounds: int = 5) -> None:
        def setup() -> tuple[tuple, dict]:
            arguments = fresh()
            gc.collect()
            return arguments, {}

        benchmark.pedantic(work, setup=setup, rounds=rounds, warmup_rounds=1)

    return run


def lora_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def probe(model: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.ones(2, HIDDEN))


def perturb(model: nn.Module, std: float = 0.02) -> None:
    """Move the trainable parameters off their start, so that the adapter does something; `std=0` silences it."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=std)


@timing(group="wrap Llama-7B on the meta device, 224 linears, r=8")
def test_wrap_meta(library: Library, timed: Timer) -> None:
    last: list[nn.Module] = []
    timed(lambda model: last.append(library.wrap(model, 8)), lambda: (last.clear() or seven_billion(),))
    assert lora_parameters(last[0]) == 32 * 8 * (4 * (4096 + 4096) + 3 * (4096 + 11_008))


@timing(group="wrap 1,400 linears of 64x64, r=4")
def test_wrap(library: Library, timed: Timer) -> None:
    last: list[nn.Module] = []
    timed(lambda model: last.append(library.wrap(model)), lambda: (last.clear() or many_small(),))
    assert lora_parameters(last[0]) == LINEARS * RANK * 2 * HIDDEN


@timing(group="save an adapter of 1,400 linears")
def test_save(library: Library, timed: Timer, tmp_path: Path) -> None:
    model = library.wrap(many_small())
    timed(library.save, lambda: (model, tmp_path))
    assert library.file(tmp_path).stat().st_size > LINEARS * RANK * 2 * HIDDEN * 4


@timing(group="load a second adapter of 1,400 linears")
def test_load(library: Library, timed: Timer, tmp_path: Path) -> None:
    model = library.wrap(many_small())
    perturb(model)
    expected = probe(model)
    library.save(model, tmp_path)
    library.load(model, tmp_path)

    def fresh() -> tuple[nn.Module, Path]:
        library.forget(model)
        return model, tmp_path

    timed(library.load, fresh)
    perturb(model, std=0.0)  # the first adapter: only the second, as it was in the file, can give what is expected
    library.switch(model, "second")
    torch.testing.assert_close(probe(model), expected)


@timing(group="switch the active adapter of 1,400 linears")
def test_switch(library: Library, timed: Timer, tmp_path: Path) -> None:
    model = library.wrap(many_small())
    start = probe(model)
    perturb(model)
    expected = probe(model)
    library.save(model, tmp_path)
    library.load(model, tmp_path)
    perturb(model, std=0.0)  # the first adapter does nothing, the second what the first one did
    names = itertools.cycle(["second", "default"])
    timed(library.switch, lambda: (model, next(names)), rounds=20)
    for name, output in ("second", expected), ("default", start):
        library.switch(model, name)
        torch.testing.assert_close(probe(model), output)


@timing(group="merge 1,400 linears")
def test_merge(library: Library, timed: Timer) -> None:
    model = library.wrap(many_small())
    perturb(model)
    expected = probe(model)
    library.merge(model)

    def fresh() -> tuple[nn.Module]:
        library.unmerge(model)
        return (model,)

    timed(library.merge, fresh)
    perturb(model, std=0.0)  # merged adapters must not run: their effect is in the weights
    torch.testing.assert_close(probe(model), expected, rtol=1e-4, atol=1e-4)
