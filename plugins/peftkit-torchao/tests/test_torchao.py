"""What is particular to torchao's weights; what holds for every quantised base is in tests/test_quantised.py."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import peftkit
from peftkit_torchao.layers import QuantisedLinear, dequantised

quantization = pytest.importorskip("torchao.quantization")

CONFIGS = {
    "int8": lambda: quantization.Int8WeightOnlyConfig(),
    "int8, dynamic": lambda: quantization.Int8DynamicActivationInt8WeightConfig(),
    "int4": lambda: quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4),
    "float8": lambda: quantization.Float8WeightOnlyConfig(),
}


def model_in(config):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96, dtype=torch.bfloat16)).requires_grad_(False)
    quantization.quantize_(model, CONFIGS[config]())
    return model


@pytest.mark.parametrize("config", CONFIGS)
def test_values(config):
    """The values are near the weight that was quantised, and the kernel's product is the product with them."""
    torch.manual_seed(0)
    original = nn.Linear(64, 96, dtype=torch.bfloat16).weight
    model = model_in(config)
    (site, _), = peftkit.plan(model, "lora", targets="0").steps  # fmt: skip
    assert type(site.kind) is QuantisedLinear
    values = site.matrix()
    assert values.shape == (96, 64)
    step = 1 / 7 if config == "int4" else 1 / 16 if config == "float8" else 1 / 100
    assert (values - original.float()).abs().max() <= step * original.abs().max()
    x = torch.randn(5, 64, dtype=torch.bfloat16)
    expected = F.linear(x.float(), values, model[0].bias.float())
    assert (model(x).float() - expected).abs().max() <= (3e-2 if "dynamic" in config else 1e-2) * expected.abs().max()


def test_values_of_a_class_that_cannot_say_them():
    """By its products with unit vectors, each value comes out exactly."""

    class Silent:
        """Shows a product and nothing else."""

        dtype, device, shape = torch.float32, torch.device("cpu"), (4, 6)

        def __init__(self, w):
            self.w = w

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            return function(*(a.w if isinstance(a, cls) else a for a in args), **(kwargs or {}))

    w = torch.randn(4, 6)
    assert torch.equal(dequantised(Silent(w)), w)


@pytest.mark.parametrize("config", CONFIGS)
def test_gradients_through_a_kernel_that_has_none(config):
    """The input's gradient is the product with the dequantised weight, and the bias's the sum over the rows."""
    model = peftkit.wrap(model_in(config), {"0.weight": peftkit.LoRA(rank=2), "0.bias": "full"})
    x = torch.randn(2, 5, 64, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(2, 5, 96, dtype=torch.bfloat16)
    model(x).backward(grad)
    torch.testing.assert_close(x.grad, grad @ dequantised(model[0]._parameters["weight"]), rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(model[0].bias.grad, grad.sum((0, 1)), rtol=2e-2, atol=2e-2)


def test_a_packed_embedding_is_refused():
    """The kind is one of linear layers; elsewhere such a weight is an error that says so."""
    model = nn.Sequential(nn.Embedding(64, 32), nn.Linear(32, 32))
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig(), filter_fn=lambda _, path: path == "1")
    model[0].weight = nn.Parameter(copy.deepcopy(model[1].weight), requires_grad=False)
    with pytest.raises(peftkit.errors.UnsupportedLayerError, match=r"0\.weight.*Embedding.*torchao"):
        peftkit.wrap(model, "lora", targets="0")
