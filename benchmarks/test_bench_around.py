"""The work around the training step, peftkit and HF PEFT side by side in one process.

Wrapping, saving, loading, switching and merging happen once or a few times a run, but with many adapters, or in a
server that changes them between requests, they are what one waits for. Every benchmark is run once for each
library on the same model under the same group, does the same thing with each, and asserts that it was done.

Run it with `make bench`; `benchmarks/README.md` says how a number is taken.
"""

from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import transformers
from torch import nn

import peftkit

BLOCKS, HIDDEN, RANK = 200, 64, 4  # 200 blocks of seven linears are 1,400
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SELECTOR = "{q,k,v,o,gate,up,down}_proj"
LINEARS = BLOCKS * len(PROJECTIONS)


class Block(nn.Module):
    """Seven square linears, named as in a decoder layer."""

    def __init__(self) -> None:
        super().__init__()
        for name in PROJECTIONS:
            setattr(self, name, nn.Linear(HIDDEN, HIDDEN, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.children():
            x = x + layer(x)
        return x


def many_small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(BLOCKS)))


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

    def merge(self, model: nn.Module) -> None:
        peftkit.merge(model)

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

    def merge(self, model: nn.Module) -> None:
        model.merge_adapter()

    def file(self, folder: Path) -> Path:
        return folder / "adapter_model.safetensors"


Library = Peftkit | HuggingFace
Timer = Callable[..., None]

pytestmark = [
    # HF PEFT warns about the model it is given (no config, tied weights); what it warns of is not what is timed.
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]


@pytest.fixture(params=[Peftkit(), HuggingFace()], ids=["peftkit", "hf-peft"])
def library(request: pytest.FixtureRequest) -> Library:
    return request.param


@pytest.fixture
def timed(benchmark) -> Timer:
    """Time `work(*arguments)`, each time with fresh arguments that `fresh` makes outside the clock."""

    def run(work: Callable[..., object], fresh: Callable[[], tuple], *, rounds: int = 5) -> None:
        benchmark.pedantic(work, setup=lambda: (fresh(), {}), rounds=rounds, warmup_rounds=1)

    return run


def lora_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def probe(model: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.ones(2, HIDDEN))


def perturb(model: nn.Module) -> None:
    """Move the trainable parameters off their start, so that the adapter does something."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.02)


@pytest.mark.benchmark(group="wrap Llama-7B on the meta device, 224 linears, r=8")
def test_wrap_meta(library: Library, timed: Timer) -> None:
    last: list[nn.Module] = []
    timed(lambda model: last.append(library.wrap(model, 8)), lambda: (last.clear() or seven_billion(),), rounds=5)
    assert lora_parameters(last[0]) == 32 * 8 * (4 * (4096 + 4096) + 3 * (4096 + 11_008))


@pytest.mark.benchmark(group="wrap 1,400 linears of 64x64, r=4")
def test_wrap(library: Library, timed: Timer) -> None:
    last: list[nn.Module] = []
    timed(lambda model: last.append(library.wrap(model)), lambda: (last.clear() or many_small(),))
    assert lora_parameters(last[0]) == LINEARS * RANK * 2 * HIDDEN


@pytest.mark.benchmark(group="save an adapter of 1,400 linears")
def test_save(library: Library, timed: Timer, tmp_path: Path) -> None:
    model = library.wrap(many_small())
    timed(library.save, lambda: (model, tmp_path))
    assert library.file(tmp_path).stat().st_size > LINEARS * RANK * 2 * HIDDEN * 4


@pytest.mark.benchmark(group="load a second adapter of 1,400 linears")
def test_load(library: Library, timed: Timer, tmp_path: Path) -> None:
    source = library.wrap(many_small())
    perturb(source)
    library.save(source, tmp_path)
    models: list[nn.Module] = []
    timed(library.load, lambda: (models.append(library.wrap(many_small())) or models[-1], tmp_path))
    library.switch(models[-1], "second")
    torch.testing.assert_close(probe(models[-1]), probe(source))


@pytest.mark.benchmark(group="switch the active adapter of 1,400 linears")
def test_switch(library: Library, timed: Timer, tmp_path: Path) -> None:
    model = library.wrap(many_small())
    start = probe(model)
    perturb(model)
    library.save(model, tmp_path)
    library.load(model, tmp_path)
    names = ["default", "second"]
    timed(library.switch, lambda: (model, names.append(names.pop(0)) or names[0]), rounds=20)
    assert not torch.equal(probe(model), start)


@pytest.mark.benchmark(group="merge 1,400 linears")
def test_merge(library: Library, timed: Timer) -> None:
    models: list[nn.Module] = []

    def fresh() -> tuple[nn.Module]:
        models[:] = [library.wrap(many_small())]
        perturb(models[0])
        return (models[0],)

    timed(library.merge, fresh)
    merged = probe(models[0])
    torch.testing.assert_close(merged, probe(fresh()[0]), rtol=1e-4, atol=1e-4)
