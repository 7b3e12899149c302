"""QLoRA (Dettmers et al., arXiv:2305.14314): the base is packed into 4-bit numbers and frozen, and LoRA trains on top.

    python qlora.py              a tiny Llama with random weights learns to count backwards
    python qlora.py --smollm2    SmolLM2-135M goes on with film review sentences (downloads 95 MB once; a few minutes)

The packed weights stay packed: bitsandbytes dequantises a layer's weight when it runs and forgets it again. So the base
takes an eighth of its float32 memory, and no gradient and no optimizer state is kept for it.

The file that comes out holds the adapter alone. It is checked against the packed base when it is loaded, to the bit.
"""

import argparse
import copy
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import peftkit
from peftkit.plugins import workload


def pack(model: nn.Module) -> nn.Module:
    """Put a 4-bit layer in the place of every linear layer but the output head, which is one with the embedding.

    With transformers one would write `from_pretrained(..., quantization_config=BitsAndBytesConfig(load_in_4bit=True))`;
    this is what that does. `nf4` has its 16 values where normally distributed weights need them, and
    `compress_statistics` packs the scales of the blocks as well.
    """
    linear = {path: layer for path, layer in model.named_modules() if type(layer) is nn.Linear and path != "lm_head"}
    for path, layer in linear.items():
        packed = bnb.nn.Linear4bit(
            layer.in_features, layer.out_features, layer.bias is not None, quant_type="nf4", compress_statistics=True
        )
        packed.load_state_dict(layer.state_dict())
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, packed)
    return model.to("cpu")  # moving them is what packs them


def megabytes(model: nn.Module) -> float:
    """What the model's parameters take, packed ones as they are."""
    return sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6


def loss_on(model: nn.Module, batch: dict[str, torch.Tensor]) -> float:
    """The loss of one batch, without a gradient."""
    with torch.no_grad():
        return float(model(**batch).loss)


def countdown() -> Iterator[dict[str, torch.Tensor]]:
    """Batches of 16 sequences that count backwards, modulo 32, from somewhere."""
    while True:
        ids = (torch.randint(32, (16, 1)) - torch.arange(12)) % 32
        yield {"input_ids": ids, "labels": ids}


def tiny() -> tuple[nn.Module, Iterator[Any], int, float]:
    """A model, its batches, how many steps to train, and the learning rate."""
    config = LlamaConfig(
        vocab_size=32, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=16, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config), countdown(), 60, 2e-2


def smollm2() -> tuple[nn.Module, Iterator[Any], int, float]:
    """The same of the real one."""
    reviews = workload("smollm2-reviews")
    reviews.prepare()
    return reviews.model(), reviews.batches(seed=0), 20, 1e-3


def main() -> None:
    """Pack, wrap, train, save, and load again on a fresh copy of the packed base."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--smollm2", action="store_true", help="a real model in place of the tiny one")
    real = parser.parse_args().smollm2
    torch.manual_seed(0)
    torch.set_num_threads(1 if not real else torch.get_num_threads())

    model, batches, steps, lr = smollm2() if real else tiny()
    before = megabytes(model)
    model = pack(model)
    print(f"parameters of the base: {before:.2f} MB, packed {megabytes(model):.2f} MB")
    base = copy.deepcopy(model)
    bits = {name: p.detach().clone() for name, p in base.named_parameters()}

    model = peftkit.wrap(model, "lora", rank=8)
    print(peftkit.summary(model))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    held_out = next(batches)
    model.train()  # in eval mode some CPUs put packed numbers in another order
    first = loss_on(model, held_out)
    for _ in range(steps):
        loss = model(**next(batches)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    last = loss_on(model, held_out)
    print(f"loss on a batch that was held out: {first:.3f} -> {last:.3f}")
    own = dict(model.named_parameters())
    print(f"packed base unchanged, to the bit: {all(torch.equal(own[name], p) for name, p in bits.items())}")

    model.eval()
    example = next(batches)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        file = Path(folder) / "adapter.safetensors"
        peftkit.save(model, file)
        loaded = peftkit.load(base.eval(), file)
        same = torch.equal(loaded(**example).logits, model(**example).logits)
    print(f"identical logits after loading: {same}")
    if not last < (0.98 if real else 0.8) * first:
        raise SystemExit("the loss did not fall")


if __name__ == "__main__":
    main()
