"""What test_processes.py hands to other processes: they import it by name."""

import torch
from torch import nn

import peftkit


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 6)
        self.rnn = nn.GRU(6, 6, batch_first=True)
        self.norm = nn.LayerNorm(6)
        self.out = nn.Linear(6, 3)

    def forward(self, tokens):
        return self.out(self.norm(self.rnn(self.embed(tokens))[0]))


TOKENS = torch.randint(9, (8, 5), generator=torch.Generator().manual_seed(0))


def wrapped():
    """Two adapters: fast paths and generic ones, one that runs and one that does not."""
    torch.manual_seed(0)
    model = Net()
    for name in ("a", "b"):
        rules = {"out": peftkit.LoRA(rank=2), "{embed,rnn}": peftkit.LoRA(rank=1), "norm": peftkit.Full(keep_base=True)}
        model = peftkit.wrap(model, rules, name=name)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) / 2)
    peftkit.activate(model, "b")
    peftkit.set_trainable(model, "b")
    return model.eval()


class Extractor:
    """Collates rows of tokens into what a wrapped model makes of them."""

    def __init__(self, model):
        self.model = model

    def __call__(self, rows):
        torch.set_num_threads(1)
        with torch.no_grad():
            return torch.utils.data.get_worker_info().id, self.model(torch.stack(rows)).clone()


def child(model, answers):
    """Tell what the model is and computes here; then take one step of training on it."""
    torch.set_num_threads(1)
    with torch.no_grad():
        outputs = model(TOKENS)
        with peftkit.using(model, "a"):
            others = model(TOKENS)
        with peftkit.disabled(model):
            bare = model(TOKENS)
    facts = str(peftkit.summary(model))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(TOKENS).square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        trained = model(TOKENS)
    answers.put([t.numpy().tolist() for t in (outputs, others, bare, trained)] + [facts])
