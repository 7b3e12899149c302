"""IA3: the kit, HF PEFT's numbers, and what it means for the outputs and inputs of each layer."""

import copy

import pytest
import torch
from torch import nn

import peftkit
from peftkit.testing import CASES, parametrize_with_checks
from peftkit.testing.parity import compare_with_hf
from peftkit_scaling.ia3 import IA3

CONVOLUTIONS = [case for case in CASES if "Conv" in case.name]


@parametrize_with_checks([IA3()])
def test_kit(check):
    """Scaling outputs keeps what peftkit promises of every method, on every layer kind."""
    check()


@parametrize_with_checks([IA3(scale_inputs=True)], cases=[*CASES[:3], *CONVOLUTIONS])
def test_kit_inputs(check):
    """So does scaling inputs, where a layer's input channels are not simply its columns too."""
    check()


def conv1d_of_transformers():
    return pytest.importorskip("transformers.pytorch_utils").Conv1D(5, 6)


LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (4, 6)),
    "linear, no bias": (lambda: nn.Linear(6, 5, bias=False), (2, 4, 6)),
    "Conv1D": (conv1d_of_transformers, (4, 6)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, padding_mode="reflect"), (2, 4, 5, 5)),
    "conv2d, groups": (lambda: nn.Conv2d(4, 6, (3, 2), dilation=(2, 1), groups=2), (2, 4, 6, 6)),
    "conv3d, groups": (lambda: nn.Conv3d(4, 6, 2, groups=2, bias=False), (2, 4, 3, 3, 3)),
}
NOT_IN_HF = {
    "conv1d, groups": (lambda: nn.Conv1d(4, 6, 3, groups=2, padding=1), (2, 4, 6)),
    "transposed conv1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2), (2, 4, 6)),
    "transposed conv2d, groups": (lambda: nn.ConvTranspose2d(4, 6, (3, 2), groups=2), (2, 4, 5, 5)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale_inputs", [False, True], ids=["outputs", "inputs"])
@pytest.mark.parametrize("layer", LAYERS)
def test_hf(layer, scale_inputs, dtype):
    """With HF PEFT's factors it has HF PEFT's output, gradients and merged weight and bias."""
    pytest.importorskip("peft")
    make, shape = LAYERS[layer]
    compare_with_hf(
        IA3(scale_inputs=scale_inputs),
        lambda: nn.Sequential(make()),
        torch.randn(shape, generator=torch.Generator().manual_seed(1)),
        targets="0",
        dtype=dtype,
        config={"feedforward_modules": "0" if scale_inputs else []},
    )


@pytest.mark.parametrize("scale_inputs", [False, True], ids=["outputs", "inputs"])
@pytest.mark.parametrize("layer", LAYERS | NOT_IN_HF)
def test_definition(layer, scale_inputs):
    """It is the layer with its output channels scaled, or with its input channels scaled."""
    torch.manual_seed(0)
    make, shape = (LAYERS | NOT_IN_HF)[layer]
    base, x = make().double(), torch.randn(shape).double()
    model = peftkit.wrap(nn.Sequential(copy.deepcopy(base)), {"0": IA3(scale_inputs=scale_inputs)})
    scale = model[0].adapters["default"]["weight"].scale
    with torch.no_grad():
        scale.uniform_(0.5, 1.5)
        channels = scale.flatten()  # [channels], and below [channels, 1, 1] for images
        if "conv" in layer:
            channels = channels.view(-1, *[1] * (len(shape) - 2))
        wanted = base(x * channels) if scale_inputs else base(x) * channels
        torch.testing.assert_close(model(x), wanted, atol=1e-12, rtol=0)


def test_combine():
    """A combination adds up how far each adapter's factors are from 1."""
    model = nn.Sequential(nn.Linear(4, 3))
    for i, name in enumerate("ab"):
        peftkit.wrap(model, {"0": IA3()}, name=name)
        nn.init.constant_(model[0].adapters[name]["weight"].scale, 2.0 + i)
    peftkit.combine(model, {"a": 0.5, "b": 0.25}, name="both")
    assert torch.equal(model[0].adapters["both"]["weight"].scale, torch.full((3, 1), 1 + 0.5 * 1 + 0.25 * 2))


@pytest.mark.parametrize("value", [1, "yes", None])
def test_fields(value):
    """A wrong value is refused by name."""
    with pytest.raises(peftkit.errors.FieldError, match="scale_inputs must be True or False"):
        IA3(scale_inputs=value)
