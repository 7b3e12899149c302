"""Two new tasks for one logistic regression, each an adapter, switched at will. Any `nn.Module` will do.

The model learned to answer one yes-or-no question about 16 features. A second question is learned by LoRA, a third
by a full copy of the weights, and the first is still answered exactly as before.
"""

import torch
from torch import nn

import peftkit

FEATURES = 16


class LogisticRegression(nn.Module):
    """The log-odds of "yes": `x @ w + b`."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(FEATURES, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Features `[n, FEATURES]` to log-odds `[n]`."""
        return self.linear(x).squeeze(1)


class Question:
    """A question whose true answers are a weighted sum of the features above a threshold."""

    def __init__(self, threshold: float) -> None:
        self.weights = torch.randn(FEATURES)
        self.threshold = threshold

    def answers(self, x: torch.Tensor) -> torch.Tensor:
        """1.0 for yes and 0.0 for no, `[n]`."""
        return (x @ self.weights > self.threshold).float()


def learn(model: nn.Module, question: Question) -> None:
    """A plain training loop over whatever requires grad, with the loss of logistic regression."""
    loss_function = nn.BCEWithLogitsLoss()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(300):
        x = torch.randn(128, FEATURES)
        loss = loss_function(model(x), question.answers(x))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def accuracy(model: nn.Module, question: Question, x: torch.Tensor) -> float:
    """The share of right answers."""
    with torch.no_grad():
        return ((model(x) > 0).float() == question.answers(x)).float().mean().item()


def main() -> None:
    """Learn one question without peftkit, two more with it, and switch between the three."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the tensors are too small to be worth sharing out
    first, second, third = Question(0.0), Question(0.0), Question(2.0)
    x = torch.randn(2_000, FEATURES)

    model = LogisticRegression()
    learn(model, first)
    with torch.no_grad():
        base_output = model(x)

    # The second question: LoRA. One output needs no more than rank 1.
    peftkit.wrap(model, "lora", name="second", rank=1, alpha=1.0)
    learn(model, second)

    # The third has another threshold, which LoRA does not learn: a copy of the weight and the bias does. A new adapter
    # runs besides those that run already, so say that it is to run alone, and that it alone is to be trained.
    peftkit.wrap(model, peftkit.Full(keep_base=True), targets="linear", name="third")
    peftkit.activate(model, "third")
    peftkit.set_trainable(model, "third")
    learn(model, third)
    print(peftkit.summary(model))

    scores = {}
    for name, question in {"second": second, "third": third}.items():
        peftkit.activate(model, name)  # from now on
        scores[name] = accuracy(model, question, x)
        print(f"adapter {name!r} on its own question: {scores[name]:.1%}")
    with peftkit.using(model, "second"):  # for the length of this block, whatever happens in it
        print(f"adapter 'second' on the third question: {accuracy(model, third, x):.1%}")
    with peftkit.disabled(model), torch.no_grad():
        unchanged = torch.equal(model(x), base_output)
        print(f"no adapter, on the first question: {accuracy(model, first, x):.1%}")
    print("the base answers exactly as before:", unchanged)

    if not min(scores.values()) > 0.9:
        raise SystemExit("a question was not learned")
    if not unchanged:
        raise SystemExit("the base changed")


if __name__ == "__main__":
    main()
