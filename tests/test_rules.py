"""The rules of docs/design.md, each with what goes wrong without it: the fault is planted, and shows.

And tied weights: an adapter acts in the layer that it is installed in, and no merge reaches the other holder.
"""

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers.utils import logging

import peftkit
from peftkit import composition, errors, install, layers, routing


def moved(model, *names):
    """The adapters of a model, away from their start."""
    torch.manual_seed(7)
    with torch.no_grad():
        for name in names or ("default",):
            for tensor in peftkit.state_dict(model, name).values():
                tensor.add_(torch.randn_like(tensor) * 0.5)
    return model


# --------------------------------------------------------------------------------------------------- R1: frames


def encoder():
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0).eval()


def test_r1_a_weight_that_an_ancestor_reads_is_adapted(monkeypatch):
    """`out_proj` works although nobody calls it; without the scan for readers its adapter is silently dead."""
    x = torch.randn(2, 3, 8)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            base = encoder()(x)
            assert not torch.allclose(moved(peftkit.wrap(encoder(), "lora", targets="**.out_proj"))(x), base)
            with monkeypatch.context() as fault:
                fault.setattr(install, "find_readers", lambda *_: {})
                torch.testing.assert_close(moved(peftkit.wrap(encoder(), "lora", targets="**.out_proj"))(x), base)


def test_r1_outside_a_frame_a_weight_is_the_parameter_itself(monkeypatch):
    """What writes to `layer.weight` reaches the base; where every read adapts, it is silently lost."""
    layer = moved(peftkit.wrap(nn.Linear(3, 3), "lora"))
    nn.init.ones_(layer.weight)
    assert bool((layer._parameters["weight"] == 1).all())
    with monkeypatch.context() as fault:
        fault.setattr(torch.compiler, "is_compiling", lambda: True)
        with torch.no_grad():
            layer.weight.zero_()
    assert bool((layer._parameters["weight"] == 1).all())


# ------------------------------------------------------------------------------------------- R2: the fast path


class ScaledEmbedding(nn.Embedding):
    """As in Gemma and Bart: the rows are multiplied after they are looked up."""

    def forward(self, ids):
        return super().forward(ids) * 10


def test_r2_a_forward_of_ones_own_takes_the_generic_path(monkeypatch):
    """The update is scaled like the row; the fast path, taken all the same, would leave its scale out."""
    ids = torch.tensor([[0, 1, 4]])

    def adapted():
        torch.manual_seed(0)
        return moved(peftkit.wrap(nn.Sequential(ScaledEmbedding(5, 4)), "lora", targets="0", rank=2))

    model = adapted()
    adapter = model[0].adapters["default"]["weight"]
    w = model[0]._parameters["weight"] + (adapter.scale * adapter.up @ adapter.down).T
    torch.testing.assert_close(model(ids), F.embedding(ids, w) * 10)
    with monkeypatch.context() as fault:
        fault.setattr(install, "_fast_kind", lambda _: layers.Embedding())
        assert not torch.allclose(adapted()(ids), F.embedding(ids, w) * 10, rtol=0.5)


# ------------------------------------------------------------------------------------------ R5: samples and rows


class SequenceFirst(nn.Module):
    """Transposes its batch-first input before a linear layer, as many models do."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(x.transpose(0, 1)[: x.shape[1]]).transpose(0, 1)


def test_r5_sizes_are_no_proof(monkeypatch):
    """A layer whose first dimension is not the batch is refused; a guess by divisibility mixes the samples up."""
    torch.manual_seed(0)
    model = SequenceFirst()
    for name in ("a", "b"):
        model = peftkit.wrap(model, "lora", name=name)
    moved(model, "a", "b")
    x = torch.randn(2, 4, 4)
    with torch.no_grad():
        alone = []
        for i, name in enumerate(("a", "b")):
            with peftkit.using(model, name):
                alone.append(model(x[i : i + 1]))
        with (
            pytest.raises(errors.UnsupportedLayerError, match=r"fc \(Linear\).*\[4, 2, 4\]"),
            peftkit.routed(model, ["a", "b"]),
        ):
            model(x)
        with peftkit.routed(model, ["a", "b"], split=True):
            torch.testing.assert_close(model(x), torch.cat(alone))
        with monkeypatch.context() as fault:
            fault.setattr(routing, "_layout", lambda _, __, args, ___, rows: routing._Layout(args[0].shape[0], 0))
            with peftkit.routed(model, ["a", "b"]):
                assert not torch.allclose(model(x), torch.cat(alone))


# --------------------------------------------------------------------------------------------- R6: number formats


class Turned(peftkit.Method):
    """Multiplies by a matrix, which does not promote number formats as sums do."""

    name = "turned"

    def adapter(self, site, shared=None):
        return _Turned(site)


class _Turned(peftkit.Adapter):
    def __init__(self, site):
        super().__init__(site)
        self.turn = site.parameter(torch.eye(site.fan_out))

    def weight(self, w):
        return self.turn @ w


def test_r6_the_weight_comes_in_the_adapters_format(monkeypatch):
    """A bfloat16 base with float32 adapters needs nothing from a method; without the cast `R @ w` raises."""
    model = moved(peftkit.wrap(nn.Sequential(nn.Linear(4, 4)).bfloat16(), Turned(), targets="0"))
    x = torch.randn(3, 4, dtype=torch.bfloat16)
    y = model(x)
    assert y.dtype == torch.bfloat16
    w = (model[0].adapters["default"]["weight"].turn @ model[0].weight.float()).bfloat16()
    assert torch.equal(y, F.linear(x, w, model[0].bias))
    with monkeypatch.context() as fault:
        fault.setattr(composition, "_dtype", lambda _: None)
        with pytest.raises(RuntimeError, match="dtype"):
            model(x)


def test_a_half_precision_adapter_merges_in_float32():
    """Cast by its owner, an adapter still merges: its tensors are taken in float32 for it."""
    model = moved(peftkit.wrap(nn.Sequential(nn.Linear(4, 4)), Turned(), targets="0")).bfloat16()
    adapter = model[0].adapters["default"]["weight"]
    expected = (adapter.turn.float() @ model[0].weight.float()).bfloat16()
    assert torch.equal(peftkit.merge(model)[0].weight, expected)


# --------------------------------------------------------------------------------------------------- tied weights


@pytest.fixture(autouse=True)
def _quiet():
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(level)


def gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=1, n_embd=16, n_head=2, vocab_size=11, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    assert model.lm_head.weight is model.transformer.wte.weight
    return model


@pytest.mark.parametrize("targets", [["wte"], ["lm_head"], ["wte", "lm_head"]], ids=" and ".join)
def test_adapters_on_either_or_both_holders_of_a_tied_weight(targets, tmp_path):
    """Each acts in its own layer alone; a merge is refused until it may untie, is undone to one weight, and survives a reload."""
    ids = torch.tensor([[1, 2, 3, 4]])
    model = moved(peftkit.wrap(gpt2(), "lora", targets=targets, rank=2))
    shared = model.lm_head.weight
    deltas = {}
    for name, layer in (("wte", model.transformer.wte), ("lm_head", model.lm_head)):
        if name in targets:
            adapter = layer.adapters["default"]["weight"]
            delta = (adapter.scale * adapter.up @ adapter.down).detach()
            deltas[name] = delta.T if name == "wte" else delta
    plain = gpt2()
    plain.transformer.wte.weight = nn.Parameter(shared.detach() + deltas.get("wte", 0))
    plain.lm_head.weight = nn.Parameter(shared.detach() + deltas.get("lm_head", 0))
    with torch.no_grad():
        y = model(ids).logits
        torch.testing.assert_close(y, plain(ids).logits)
        with pytest.raises(errors.UnsupportedLayerError, match=r"wte\.weight and lm_head\.weight are one tied weight"):
            peftkit.merge(model)
        peftkit.merge(model, untie=True)
        torch.testing.assert_close(model(ids).logits, y)
        peftkit.unmerge(model)
        assert model.lm_head.weight is model.transformer.wte.weight is shared
        peftkit.merge(model, keep_base=False, untie=True)
        model.save_pretrained(tmp_path)
        again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
        torch.testing.assert_close(again(ids).logits, y)


# ------------------------------------------------------------------------------------------------- model surgery


def test_requires_grad_by_hand():
    """A base parameter unfrozen by hand trains beside the adapter, and unwrap puts its flag back."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model[0].bias.requires_grad_(False)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    model = moved(peftkit.wrap(model, "lora", targets="0"))
    model[0].weight.requires_grad_(True)
    x = torch.randn(3, 4)
    model(x).square().sum().backward()
    adapter = model[0].adapters["default"]["weight"]
    w = (model[0].weight.detach() + adapter.scale * adapter.up.detach() @ adapter.down.detach()).requires_grad_()
    F.linear(F.linear(x, w, model[0].bias), model[1].weight, model[1].bias).square().sum().backward()
    torch.testing.assert_close(model[0].weight.grad, w.grad)
    assert {n: p.requires_grad for n, p in peftkit.unwrap(model).named_parameters()} == flags


def test_wrapping_again_after_unwrap():
    """A model can be wrapped, unwrapped and wrapped any number of times; the second time is like the first."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    outputs = []
    for _ in range(3):
        torch.manual_seed(1)
        moved(peftkit.wrap(model, "lora", rank=2))
        outputs.append(model(torch.ones(1, 4)))
        peftkit.unwrap(model)
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
