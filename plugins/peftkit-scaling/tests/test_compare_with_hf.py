"""`peftkit.testing.parity.compare_with_hf` names what differs: IA3 with one fault each, and IA3 without."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

import peftkit
from peftkit.testing.parity import compare_with_hf
from peftkit_scaling.ia3 import IA3

pytest.importorskip("peft")


@dataclass(frozen=True)
class Planted(IA3):
    """IA3 whose adapter is the one that a test makes."""

    make: ClassVar = None

    def adapter(self, site, shared=None):
        return type(self).make(site)


class Sound(peftkit.Adapter):
    def __init__(self, site):
        super().__init__(site)
        self.scale = site.parameter(torch.ones(site.fan_out, 1))

    def weight(self, w):
        return w * self.scale

    def bias(self, b):
        return b * self.scale.squeeze(1)


class WrongOutput(Sound):
    def weight(self, w):
        return super().weight(w) * 1.001


class WrongGradient(Sound):
    def weight(self, w):
        return w * (2 * self.scale - self.scale.detach())


class WrongBias(Sound):
    def bias(self, b):
        return b


class NoGradient(Sound):
    def weight(self, w):
        return w * self.scale.detach()

    def bias(self, b):
        return b * self.scale.detach().squeeze(1)


class Nan(Sound):
    def weight(self, w):
        return super().weight(w) * float("nan")


class Idle(Sound):
    def weight(self, w):
        return w + 0 * self.scale

    bias = WrongBias.bias


class TooSmall(Sound):
    def __init__(self, site):
        super().__init__(site)
        self.scale = site.parameter(torch.ones(1, 1))


class OneMore(Sound):
    def __init__(self, site):
        super().__init__(site)
        self.shift = site.parameter(torch.zeros(()))


def compare(adapter, hf=IA3.hf, **options):
    """Compare IA3 with this adapter and declaration on two layers, one after another."""
    method = type("Planted", (Planted,), {"make": adapter, "hf": hf})()
    build = lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))  # noqa: E731
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    compare_with_hf(method, build, x, targets=("0", "2"), config={"feedforward_modules": []}, **options)


def test_sound():
    """The sound twin of all these passes."""
    compare(Sound)
    compare(Sound, dtype=torch.float64)


FAULTS = {
    "output": (WrongOutput, {}, r"output 0 differs by"),
    "output, not a number": (Nan, {}, r"output 0 differs by nan"),
    "gradient": (WrongGradient, {}, r"the gradient of 0\.adapters\.default\.weight\.scale differs by"),
    "no gradient": (NoGradient, {}, r"the gradient of 0\.adapters\.default\.weight\.scale exists with HF PEFT only"),
    "merged weight": (WrongOutput, {"parts": ["merged"]}, r"merged 0\.weight differs by"),
    "merged bias": (WrongBias, {"parts": ["merged"]}, r"merged 0\.bias differs by"),
    "no change": (Idle, {}, r"changes nothing"),
    "another size": (TooSmall, {}, r"scale is \[1, 1\], and HF PEFT's 'ia3_l' is \[5, 1\]"),
    "tensor of ours that is not declared": (
        OneMore,
        {},
        r"peftkit trains tensors .* 0\.adapters\.default\.weight\.shift",
    ),
    "tensor that HF has not": (
        Sound,
        {"hf": peftkit.HuggingFace("IA3", tensors={"scale": "ia3_x"})},
        r"HF PEFT has no 'ia3_x' for .*; of the same size it has \['base_model\.model\.0\.ia3_l\.default'\]",
    ),
    "nothing declared": (Sound, {"hf": None}, r"declares no counterpart"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults(fault):
    """Each fault is an `AssertionError` that names where it is."""
    adapter, options, message = FAULTS[fault]
    with pytest.raises(AssertionError, match=message):
        compare(adapter, **options)


@dataclass(frozen=True)
class HalfDeclared(IA3):
    """IA3 whose factors are no parameters here, so that HF PEFT alone trains them."""

    hf: ClassVar = peftkit.HuggingFace("IA3")

    def adapter(self, site, shared=None):
        return Frozen(site)


class Frozen(peftkit.Adapter):
    def weight(self, w):
        return w * 2


def test_a_tensor_that_hf_alone_trains():
    """What HF PEFT trains and the declaration leaves out is named too."""
    with pytest.raises(AssertionError, match=r"HF PEFT trains tensors .*: base_model\.model\.0\.ia3_l\.default"):
        compare_with_hf(
            HalfDeclared(),
            lambda: nn.Sequential(nn.Linear(6, 5)),
            torch.randn(3, 6),
            targets="0",
            config={"feedforward_modules": []},
        )
