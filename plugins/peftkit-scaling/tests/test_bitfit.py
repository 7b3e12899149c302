"""BitFit: the kit, and training of the biases in plain torch."""

import copy

import pytest
import torch
from torch import nn

import peftkit
from peftkit.testing import parametrize_with_checks
from peftkit_scaling.bitfit import BitFit


@parametrize_with_checks([BitFit()])
def test_kit(check):
    """It keeps what peftkit promises of every method."""
    check()


class Net(nn.Module):
    """Biases of every form: of linear layers, norms, convolutions, recurrent layers and packed attention."""

    def __init__(self):
        super().__init__()
        self.relative_bias = nn.Embedding(3, 8)  # a matrix, whatever it is called
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.lstm = nn.LSTM(8, 4, batch_first=True)
        self.score = nn.Linear(4, 2)
        self.shift_bias = nn.Parameter(torch.randn(2))

    def forward(self, x):
        x = x + self.relative_bias.weight[:, None]
        x = self.norm(x + self.conv(x.mT).mT)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.score(self.lstm(x)[0]) * self.shift_bias


BIASES = {
    "conv.bias",
    "norm.bias",
    "attention.in_proj_bias",
    "attention.out_proj.bias",
    "lstm.bias_ih_l0",
    "lstm.bias_hh_l0",
    "score.bias",
    "shift_bias",
}


def net():
    torch.manual_seed(0)
    return Net().double(), torch.randn(3, 5, 8).double()


def test_default_targets():
    """Every vector with "bias" in its name is adapted; no matrix is, and no norm's scale."""
    model, _ = net()
    rows = peftkit.plan(model, BitFit()).rows
    assert {f"{row.path}.{row.weight}".lstrip(".") for row in rows} == BIASES


def train(model, parameters, x):
    optimizer = torch.optim.Adam(parameters, lr=0.05)
    for _ in range(4):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return model(x).detach()


def test_training_the_biases_themselves():
    """Trained with Adam, it goes where the biases go when torch trains them, and the biases stay where they were."""
    model, x = net()
    plain, before = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    biases = [p.requires_grad_() for name, p in plain.requires_grad_(False).named_parameters() if name in BIASES]
    wanted = train(plain, biases, x)
    assert (wanted - model(x)).abs().max() > 1e-2

    peftkit.wrap(model, BitFit())
    y = train(model, [p for p in model.parameters() if p.requires_grad], x)
    torch.testing.assert_close(y, wanted, atol=1e-12, rtol=1e-12)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items() if name in before)

    merged = peftkit.merge(model, keep_base=False)
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], tensor, atol=1e-12, rtol=1e-12)


def test_a_matrix_is_refused():
    """A weight that is no vector is refused by name."""
    with pytest.raises(peftkit.errors.UnsupportedLayerError, match=r"score\.weight"):
        peftkit.wrap(net()[0], BitFit(), targets="score.weight")
