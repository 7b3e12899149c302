"""Holds the ledger and `estimate` against CUDA's allocator.

    python benchmarks/gpu_memory.py --out gpu_memory.json

For each model and method, one training step on the GPU: the allocator's own `max_memory_allocated`, a ledger on the
same step, and an estimate that never saw the GPU. What the allocator held before the model was there (the workspace of
cuBLAS) is taken off. Without a GPU it says so, writes that into the file, and has nothing to compare.
"""

import argparse
import gc
import itertools
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import peftkit
from peftkit.memory import Ledger

SCHEMA = "peftkit.gpu-memory/1"
TARGET = 0.05


@dataclass(frozen=True)
class Model:
    """A factory, a batch in shapes, the loss of an output that has none, and how the model is run."""

    build: Callable[[], nn.Module]
    batch: Any
    loss: Callable[[Any], torch.Tensor] | None = None
    dtype: torch.dtype | None = None
    autocast: torch.dtype | None = None


def mean_square(output: torch.Tensor) -> torch.Tensor:
    return output.float().pow(2).mean()


def mlp() -> nn.Module:
    return nn.Sequential(*[layer for _ in range(6) for layer in (nn.Linear(2048, 2048), nn.GELU())])


def cnn() -> nn.Module:
    widths = [3, 64, 128, 256, 256]
    blocks = [
        layer
        for a, b in itertools.pairwise(widths)
        for layer in (nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2))
    ]
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(256 * 16, 100))


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(768, 12, 3072, batch_first=True, dropout=0.0, activation="gelu")
    return nn.TransformerEncoder(layer, 8, enable_nested_tensor=False)


def of_transformers(cls: str, **config: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        model = getattr(transformers, cls)
        return model(model.config_class(**config))

    return build


def tokens(batch: int, sequence: int) -> dict[str, Any]:
    ids = ((batch, sequence), torch.long)
    return {"input_ids": ids, "labels": ids}


DECODER = {"vocab_size": 32_000, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8}
HEADS = {"num_attention_heads": 16, "num_key_value_heads": 4}
HALF = torch.bfloat16
MODELS = {
    "mlp": Model(mlp, ((4096, 2048), torch.float32), mean_square),
    "cnn": Model(cnn, ((32, 3, 64, 64), torch.float32), mean_square),
    "encoder": Model(encoder, ((16, 256, 768), torch.float32), mean_square),
    "bert": Model(
        of_transformers("BertForSequenceClassification"),
        {"input_ids": ((16, 256), torch.long), "labels": ((16,), torch.long)},
    ),
    "gpt2": Model(of_transformers("GPT2LMHeadModel"), tokens(8, 512), autocast=HALF),
    "vit": Model(
        of_transformers("ViTForImageClassification"),
        {"pixel_values": ((32, 3, 224, 224), torch.float32), "labels": ((32,), torch.long)},
    ),
    "llama": Model(of_transformers("LlamaForCausalLM", **DECODER, **HEADS), tokens(8, 1024), dtype=HALF),
    "llama autocast": Model(of_transformers("LlamaForCausalLM", **DECODER, **HEADS), tokens(4, 1024), autocast=HALF),
}
METHODS = {"lora": {}, "full": {"targets": "**"}}
CHECKPOINTED = ("llama", "bert", "vit")


def real(value: Any, device: str) -> Any:
    """Zeros of these shapes: any token, any label."""
    if isinstance(value, dict):
        made = {id(each): real(each, device) for each in value.values()}
        return {key: made[id(each)] for key, each in value.items()}
    shape, dtype = value
    return torch.zeros(shape, dtype=dtype, device=device)


def measure(model: Model, method: str, options: dict[str, Any], *, checkpointing: bool) -> dict[str, Any]:
    """Peaks of one step in bytes: the allocator's, the ledger's, the estimate's."""
    from peftkit.dry_run import checkpoint_blocks

    device = "cuda"
    before = torch.cuda.memory_allocated()
    net = model.build().to(device)
    net = net if model.dtype is None else net.to(model.dtype)
    peftkit.wrap(net, method, **options)
    if checkpointing:
        checkpoint_blocks(net, blocks=True)
    net.train()
    optimizer = torch.optim.AdamW(peftkit.param_groups(net, lr=1e-4))
    batch = real(model.batch, device)

    def step() -> None:
        with torch.autocast(device, dtype=model.autocast or HALF, enabled=model.autocast is not None):
            output = net(**batch) if isinstance(batch, dict) else net(batch)
            loss = output.loss if model.loss is None else model.loss(output)
        del output
        loss.backward()
        del loss
        optimizer.step()
        optimizer.zero_grad()

    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    allocated = torch.cuda.max_memory_allocated() - before
    reserved = torch.cuda.max_memory_reserved()
    with Ledger(net, optimizer) as ledger:
        step()
    found = peftkit.estimate(
        model.build, method, model.batch, loss=model.loss, dtype=model.dtype, autocast=model.autocast,
        checkpointing=checkpointing, device=device, **options,
    )  # fmt: skip
    return {
        "allocated": allocated,
        "reserved": reserved,
        "ledger": ledger.peak,
        "estimate": found.peak,
        "ledger_error": ledger.peak / allocated - 1,
        "estimate_error": found.peak / allocated - 1,
        "largest": found.largest,
        "attention": found.attention,
    }


def cells() -> list[tuple[str, str, bool]]:
    """Model, method, and whether with gradient checkpointing."""
    plain = [(model, method, False) for model in MODELS for method in METHODS]
    return plain + [(model, method, True) for model in CHECKPOINTED for method in METHODS]


def run() -> list[dict[str, Any]]:
    """Every cell; one that fails is a row with its error."""
    warm = torch.zeros(256, 256, device="cuda", requires_grad=True)
    (warm @ warm).sum().backward()
    rows = []
    for name, method, checkpointing in cells():
        row: dict[str, Any] = {"model": name, "method": method, "checkpointing": checkpointing}
        try:
            row |= measure(MODELS[name], method, METHODS[method], checkpointing=checkpointing)
            print(f"{name:15} {method:5} {'again' if checkpointing else '':5} {row['allocated'] / 1e6:9.1f} MB "
                  f"ledger {row['ledger_error']:+.2%} estimate {row['estimate_error']:+.2%}")  # fmt: skip
        except Exception as error:  # noqa: BLE001 - the other cells must still be measured
            row["error"] = f"{type(error).__name__}: {error}"
            print(f"{name:15} {method:5} {row['error'].partition(chr(10))[0]}")
        rows.append(row)
        gc.collect()
        torch.cuda.empty_cache()
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("gpu_memory.json"), help="where the JSON goes")
    out = parser.parse_args().out
    document: dict[str, Any] = {"schema": SCHEMA, "torch": torch.__version__, "target": TARGET}
    if not torch.cuda.is_available():
        document["skipped"] = "torch sees no CUDA device here"
        print(f"skipped: {document['skipped']}; {len(cells())} cells were not measured")
    else:
        rows = run()
        worst = max((abs(row["estimate_error"]) for row in rows if "error" not in row), default=None)
        document |= {"device": torch.cuda.get_device_name(), "worst": worst, "rows": rows}
        failed = [row for row in rows if "error" in row]
        said = "none" if worst is None else f"{worst:.2%}"
        print(f"{len(rows) - len(failed)} of {len(rows)} cells measured; the worst estimate is off by {said}")
    out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
