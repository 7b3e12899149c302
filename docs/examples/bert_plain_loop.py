"""Fine-tune a BERT classifier with a plain PyTorch loop: LoRA in its encoder, and the new classifier trained in full.

The task is synthetic: does the word 5 come before the word 6? Shown here are the rules: an ordered mapping from
selectors to methods, and how a selector tells apart layers that have the same last name.

The model is tiny and made from a configuration, so nothing is downloaded.
"""

import torch
from transformers import BertConfig, BertForSequenceClassification

import peftkit

WORDS, LENGTH = 16, 8

# The first selector that matches a layer decides; what none matches is frozen.
RULES = {
    # Without a dot, a selector is tested on the last part of a path.
    "{query,key,value}": peftkit.LoRA(rank=8),
    # `*` stays within one part of a path. So this takes encoder.layer.0.output.dense, the feed-forward network's, and
    # leaves encoder.layer.0.attention.output.dense, the attention's.
    "**.layer.*.{intermediate,output}.dense": peftkit.LoRA(rank=8),
    # The head is new, so there is nothing to keep: train its own weights.
    "classifier": "full",
}


def sentences(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random sentences `[count, LENGTH]` that hold 5 and 6 once each, and whether 5 comes first `[count]`."""
    words = torch.randint(7, WORDS, (count, LENGTH))
    places = torch.rand(count, LENGTH).argsort(dim=1)
    five, six = places[:, 0], places[:, 1]
    rows = torch.arange(count)
    words[rows, five], words[rows, six] = 5, 6
    return words, (five < six).long()


def main() -> None:
    """Wrap, look, train, and measure on sentences that were not seen."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the tensors are too small to be worth sharing out
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=WORDS,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
        )
    )

    plan = peftkit.plan(model, RULES)  # a dry run: nothing is changed yet
    print(plan)
    adapted = {row.path for row in plan.rows}
    if "bert.encoder.layer.0.output.dense" not in adapted or "bert.encoder.layer.0.attention.output.dense" in adapted:
        raise SystemExit("the selectors took other layers than they should")

    peftkit.wrap(model, RULES)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    model.train()
    for _ in range(150):
        words, labels = sentences(64)
        loss = model(input_ids=words, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    model.eval()
    words, labels = sentences(1_000)
    with torch.no_grad():
        accuracy = (model(input_ids=words).logits.argmax(dim=1) == labels).float().mean().item()
    print(peftkit.summary(model))
    print(f"loss: {losses[0]:.2f} -> {losses[-1]:.2f}")
    print(f"accuracy on new sentences: {accuracy:.1%}")

    if not losses[-1] < 0.5 * losses[0]:
        raise SystemExit("the loss did not fall")
    if not accuracy > 0.9:
        raise SystemExit("the task was not learned")


if __name__ == "__main__":
    main()
