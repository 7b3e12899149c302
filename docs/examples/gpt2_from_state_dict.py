"""Adapt a GPT-2 whose weights come from a file of their own, and keep what it learned in a second, small file.

The base has learned to count up. LoRA on its attention and its MLP teaches it to count down, without touching the
base: the adapter's file, loaded onto the same base weights, gives the very same logits.

The model is tiny and made from a configuration, so nothing is downloaded. GPT-2's layers are transformers' `Conv1D`,
which store their weight transposed; nothing in this script has to know.
"""

import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel

import peftkit

NUMBERS = 24  # the vocabulary: the numbers 0 to 23
CONFIG = GPT2Config(
    vocab_size=NUMBERS, n_embd=32, n_layer=2, n_head=4, n_positions=16, bos_token_id=None, eos_token_id=None
)


def sequences(step: int) -> torch.Tensor:
    """A batch `[24, 12]`: from every number, count up (step 1) or down (step -1), around the clock."""
    return (torch.arange(NUMBERS)[:, None] + step * torch.arange(12)) % NUMBERS


def train(model: GPT2LMHeadModel, tokens: torch.Tensor, steps: int, lr: float) -> list[float]:
    """A plain training loop over whatever requires grad."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    model.train()
    for _ in range(steps):
        logits = model(input_ids=tokens).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


def continuation(model: GPT2LMHeadModel) -> list[int]:
    """What the model says after 10."""
    start = torch.tensor([[10]])
    out = model.generate(start, attention_mask=torch.ones_like(start), max_new_tokens=6, do_sample=False)
    return out[0].tolist()


def load_base(path: Path) -> GPT2LMHeadModel:
    """A GPT-2 as its configuration makes it, with the weights of a file."""
    model = GPT2LMHeadModel(CONFIG)
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.eval()


def main() -> None:
    """Pretrain and save a base; then load it, adapt it, save the adapter, and load both."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the tensors are too small to be worth sharing out
    with tempfile.TemporaryDirectory() as folder:
        base_file, adapter_file = Path(folder, "gpt2.pt"), Path(folder, "count_down.safetensors")

        # Somebody trained a base, and gave us its state dict.
        pretrained = GPT2LMHeadModel(CONFIG)
        train(pretrained, sequences(+1), steps=60, lr=1e-2)
        torch.save(pretrained.state_dict(), base_file)

        # Load it and adapt it. c_proj is in the attention and in the MLP, and is adapted in both.
        model = load_base(base_file)
        print("base:   ", continuation(model))
        rules = {("c_attn", "c_fc", "c_proj"): peftkit.LoRA(rank=8)}
        print(peftkit.plan(model, rules))  # a dry run: nothing is changed yet
        model = peftkit.wrap(model, rules)

        losses = train(model, sequences(-1), steps=100, lr=1e-2)
        print(f"loss: {losses[0]:.2f} -> {losses[-1]:.2f}")
        print("adapted:", continuation(model))

        # Keep the adapter alone, and put it on the same base somewhere else.
        peftkit.save(model, adapter_file)
        print(f"files: base {base_file.stat().st_size:,} bytes, adapter {adapter_file.stat().st_size:,} bytes")
        reloaded = peftkit.load(load_base(base_file), adapter_file)

        with torch.no_grad():
            tokens = sequences(-1)
            identical = torch.equal(reloaded(tokens).logits, model(tokens).logits)
        print("identical logits after loading:", identical)

        if not losses[-1] < 0.5 * losses[0]:
            raise SystemExit("the loss did not fall")
        if not identical:
            raise SystemExit("the loaded adapter computes something else")


if __name__ == "__main__":
    main()
