"""What is particular to bitsandbytes' layers; what holds for every quantised base is in tests/test_quantised.py."""

import copy

import pytest
import torch
from torch import nn

import peftkit
from peftkit_bitsandbytes.layers import Linear4bit, Linear8bitLt

bnb = pytest.importorskip("bitsandbytes")


def layer(**options):
    torch.manual_seed(0)
    return nn.Sequential(bnb.nn.Linear4bit(64, 96, **options)).to("cpu")


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("compress", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16], ids=str)
def test_values(quant_type, compress, storage):
    """The values are what bitsandbytes' own dequantisation gives, however the packed numbers are stored."""
    model = layer(quant_type=quant_type, compress_statistics=compress, quant_storage=storage)
    own = model[0].weight
    expected = bnb.functional.dequantize_4bit(own.data, own.quant_state)
    (site, _), = peftkit.plan(model, "lora", targets="0").steps  # fmt: skip
    assert type(site.kind) is Linear4bit
    assert site.shape == (96, 64)
    assert torch.equal(site.matrix(), expected.float())


@pytest.mark.parametrize("compute", [None, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_compute_dtype_is_the_layers_affair(compute, dtype):
    """Whatever it computes in, the output is the bare layer's, and in the input's dtype with an adapter too."""
    base = layer(compute_dtype=compute)
    model = peftkit.wrap(copy.deepcopy(base), "lora", targets="0")
    x = torch.randn(5, 64, dtype=dtype)
    assert torch.equal(model(x), base(x))
    assert model(x).dtype == base(x).dtype
    nn.init.normal_(model[0].adapters["default"]["weight"].up)
    assert model(x).dtype == base(x).dtype


def test_a_subclass_with_the_same_forward_is_served():
    """LinearNF4 is a Linear4bit that sets an option."""
    model = nn.Sequential(bnb.nn.LinearNF4(64, 64)).to("cpu")
    assert peftkit.plan(model, "lora", targets="0").rows[0].layer == "LinearNF4"


class Doubled(bnb.nn.Linear4bit):
    """Does more than to apply its weight."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_a_subclass_with_another_forward_is_not():
    """What it does with its packed weight is not known, so nothing could be added to it."""
    with pytest.raises(peftkit.errors.UnsupportedLayerError, match="Doubled"):
        peftkit.wrap(nn.Sequential(Doubled(64, 64)).to("cpu"), "lora", targets="0")


def test_a_layer_that_is_not_packed_yet_can_be_wrapped():
    """Built, wrapped and then moved: the move packs the weight, as it would have before."""
    torch.manual_seed(0)
    model = nn.Sequential(bnb.nn.Linear4bit(64, 96))
    twin = copy.deepcopy(model).to("cpu")
    model = peftkit.wrap(model, "lora", targets="0").to("cpu")
    x = torch.randn(3, 64)
    assert torch.equal(model(x), twin(x))
    nn.init.normal_(model[0].adapters["default"]["weight"].up)
    assert not torch.equal(model(x), twin(x))


def test_int8_before_and_after_its_first_forward():
    """The first forward moves the scales from the weight to the layer; the values stay the same."""
    torch.manual_seed(0)
    plain = nn.Linear(64, 32, dtype=torch.bfloat16)
    packed = bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False)
    packed.load_state_dict(plain.state_dict())
    model = nn.Sequential(packed).to("cpu")

    def values():
        (site, _), = peftkit.plan(model, "lora", targets="0").steps  # fmt: skip
        assert type(site.kind) is Linear8bitLt
        return site.matrix()

    before = values()
    model(torch.randn(2, 64, dtype=torch.bfloat16))
    assert torch.equal(values(), before)
    assert (before - plain.weight.float()).abs().max() <= plain.weight.abs().max() / 127


@pytest.mark.parametrize("compress", [True, False], ids=["double", "single"])
def test_gradients_after_inference(compress):
    """Inference may put the numbers in an order that bitsandbytes cannot differentiate; here the gradients are right all the same."""
    if not bnb.functional.has_avx512bf16():
        pytest.skip("this CPU has no such order")
    model = peftkit.wrap(layer(compress_statistics=compress, quant_type="nf4").eval(), "lora", targets="0")
    nn.init.normal_(model[0].adapters["default"]["weight"].up)
    before = peftkit.plan(model, "lora", targets="0").steps[0][0].matrix()
    with torch.no_grad():
        model(torch.randn(2, 64))
    assert model[0].weight.quant_state.packing_format_for_cpu
    (site, _), = peftkit.plan(model, "lora", targets="0").steps  # fmt: skip
    values = site.matrix()
    assert site.dtype == torch.float32
    assert 0 < (values - before).abs().max() < 2**-8 * before.abs().max()  # the scales are rounded to bfloat16 by then

    model.train()
    x, grad = torch.randn(3, 64, requires_grad=True), torch.randn(3, 96)
    y = model(x)
    y.backward(grad)
    up, down, scale = model[0].adapters["default"]["weight"].factors()
    torch.testing.assert_close(x.grad, grad @ (values + scale * up @ down), rtol=1e-4, atol=1e-4)
    expected = torch.nn.functional.linear(x, values + scale * up @ down, model[0].bias)
    assert (y - expected).abs().max() < 2e-2 * expected.abs().max()
