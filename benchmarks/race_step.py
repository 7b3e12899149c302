"""A LoRA training step beside the frozen floor and HF PEFT, as ratios taken in turn within one process.

    python benchmarks/race_step.py [rounds]

The model has the shape of a Llama: hidden 512, 4 layers, 4 × 128 tokens, rank 16 on all linear layers but the head.
The floor is the same model frozen, with gradients flowing to the output of its embedding: what no adapter can
undercut. A round times floor, other, other, floor; a figure is the median over the rounds of other ÷ floor.

By default glibc gives the heap back after each step and faults it in again, which flatters whoever allocates less. Run
it also with MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_TOP_PAD_=268435456.
"""

import contextlib
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import peft
import torch
import transformers
from torch import nn

import peftkit

RANK, BATCH, LENGTH = 16, 4, 128
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Setting:
    """One row of the table."""

    name: str
    dropout: float = 0.0
    dtype: torch.dtype = torch.float32
    autocast: bool = False
    time_target: float = 0.0
    bytes_target: float = 0.0


SETTINGS = [
    Setting("fp32", time_target=1.10, bytes_target=88.1),
    Setting("fp32, dropout 0.1", 0.1, time_target=1.17, bytes_target=89.5),
    Setting("bf16 autocast", autocast=True, time_target=1.18, bytes_target=83.0),
    Setting("bf16 autocast, dropout 0.1", 0.1, autocast=True, time_target=1.32, bytes_target=83.0),
    Setting("bf16 base", dtype=torch.bfloat16, time_target=1.22, bytes_target=55.0),
    Setting("bf16 base, dropout 0.1", 0.1, torch.bfloat16, time_target=1.35, bytes_target=55.0),
]


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=512, intermediate_size=1376, num_hidden_layers=4, num_attention_heads=8, vocab_size=1000
    )
    return transformers.LlamaForCausalLM(config)


def step_of(model: nn.Module, setting: Setting) -> Callable[[], None]:
    """Forward, backward, and the optimizer's step over whatever trains."""
    tokens = torch.randint(1000, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5) if trained else None
    embedding = model.get_input_embeddings()
    autocast = torch.autocast("cpu", dtype=torch.bfloat16) if setting.autocast else contextlib.nullcontext()

    def forward() -> torch.Tensor:
        with autocast:
            inputs = embedding(tokens).detach().requires_grad_(True)
            return model(inputs_embeds=inputs, labels=tokens, use_cache=False).loss

    def step() -> None:
        forward().backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    step.forward = forward
    step.model = model
    return step


def variants(setting: Setting) -> dict[str, Callable[[], None]]:
    """The same model under each way of training it."""
    base = llama().to(setting.dtype).train()
    floor = copy.deepcopy(base)
    for p in floor.parameters():
        p.requires_grad_(False)
    ours = peftkit.LoRA(rank=RANK, dropout=setting.dropout)
    theirs = peft.LoraConfig(r=RANK, lora_alpha=16, lora_dropout=setting.dropout, target_modules=PROJECTIONS)
    models = {
        "floor": floor,
        "peftkit": peftkit.wrap(copy.deepcopy(base), ours, targets="{q,k,v,o,gate,up,down}_proj"),
        "hf-peft": peft.get_peft_model(copy.deepcopy(base), theirs),
        "full": base,
    }
    return {name: step_of(model.train(), setting) for name, model in models.items()}


def saved_megabytes(step: Callable[[], None]) -> float:
    """Distinct storages that forward keeps for backward, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in step.model.parameters()}
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes(), t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = step.forward()
    megabytes = sum(n for n, _ in kept.values()) / 1e6
    loss.backward()
    return megabytes


def race(floor: Callable[[], None], other: Callable[[], None], rounds: int) -> list[float]:
    def clock(step: Callable[[], None]) -> float:
        start = time.perf_counter()
        step()
        return time.perf_counter() - start

    for step in (floor, other, floor, other):
        step()
    ratios = []
    for _ in range(rounds):
        first, a, b, last = clock(floor), clock(other), clock(other), clock(floor)
        ratios.append((a + b) / (first + last))
    return ratios


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 12
    rows = []
    for setting in SETTINGS:
        steps = variants(setting)
        row = {"setting": setting.name, "time_target": setting.time_target, "bytes_target": setting.bytes_target}
        for name, step in steps.items():
            row[f"{name} MB"] = round(saved_megabytes(step), 1)
            if name != "floor":
                ratios = race(steps["floor"], step, rounds)
                quartiles = statistics.quantiles(ratios, n=4)
                row[name] = round(statistics.median(ratios), 3)
                row[f"{name} quartiles"] = [round(quartiles[0], 3), round(quartiles[2], 3)]
        rows.append(row)
        print(
            f"{setting.name:28} peftkit {row['peftkit']:.3f} {row['peftkit quartiles']}  hf-peft {row['hf-peft']:.3f}  "
            f"full {row['full']:.3f}  target {setting.time_target:.2f} | MB: floor {row['floor MB']}  peftkit "
            f"{row['peftkit MB']}  hf-peft {row['hf-peft MB']}  full {row['full MB']}  target {setting.bytes_target}",
            flush=True,
        )
    report = {"torch": torch.__version__, "peft": peft.__version__, "rounds": rounds}
    if len(sys.argv) > 2:
        Path(sys.argv[2]).write_text(json.dumps({**report, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
