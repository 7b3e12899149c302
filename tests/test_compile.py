"""What `torch.compile` is promised: one graph for a model, the same numbers, and no other graph for what is not new.

Graphs are counted by what the backend is asked to compile. `fullgraph=True` makes every graph break an error.
"""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import peftkit
from peftkit.methods.lora import LoRAAdapter

ADAPTERS = [f"a{i}" for i in range(11)]
"""More than the eight graphs of one function after which torch gives up."""


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def stir(model, seed=1):
    """Give whatever trains numbers of its own, so that every adapter matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) / 4)
    return model


def compiled(model, backend="eager"):
    counter = CompileCounterWithBackend(backend)
    return torch.compile(model, backend=counter, fullgraph=True), counter


# ------------------------------------------------------------------------------------------- whole models

SMALL = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 24, "vocab_size": 32}


def language_model(name):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if name == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))
    if name == "bert":
        return transformers.BertForMaskedLM(transformers.BertConfig(**SMALL))
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 32, "n_positions": 16}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


def drop_nothing(model):
    """What is drawn in a compiled graph is drawn in another order, which is no matter of adapters."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0
    model.config.attention_probs_dropout_prob = model.config.attn_pdrop = 0.0
    return model


def loss_and_gradients(call, model, tokens):
    model.zero_grad()
    logits = call(input_ids=tokens).logits
    loss = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    loss.backward()
    return [logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def assert_all_close(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name, backend", [("gpt2", "eager"), ("bert", "eager"), ("llama", "aot_eager")])
def test_a_model_is_one_graph_that_trains_and_infers_as_it_does_uncompiled(name, backend):
    """Forward and backward, in training and in evaluation, in float64 to its rounding; later calls compile nothing."""
    tokens = torch.randint(32, (2, 6), generator=torch.Generator().manual_seed(0))
    model = stir(peftkit.wrap(drop_nothing(language_model(name)).double(), peftkit.LoRA(rank=2)))
    call, counter = compiled(model, backend)
    optimizer = torch.optim.AdamW(peftkit.param_groups(model, lr=1e-2))

    model.train()
    expected = loss_and_gradients(model, model, tokens)
    assert len(expected) == 1 + 2 * len(peftkit.plan(language_model(name), peftkit.LoRA(rank=2)).rows)
    assert_all_close(loss_and_gradients(call, model, tokens), expected)
    assert counter.frame_count == 1
    optimizer.step()
    with torch.compiler.set_stance("fail_on_recompile"):
        found = loss_and_gradients(call, model, tokens)
    assert_all_close(found, loss_and_gradients(model, model, tokens))
    assert not torch.equal(found[0], expected[0])

    model.eval()
    with torch.no_grad():
        assert_all_close([call(input_ids=tokens).logits], [model(input_ids=tokens).logits])
        assert counter.frame_count == 2
        with torch.compiler.set_stance("fail_on_recompile"):
            call(input_ids=tokens.flip(1))


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"
)  # torch, of its own code
def test_inductor_computes_the_same():
    """With the default backend, forward and backward are those of the uncompiled model to single precision."""
    tokens = torch.randint(32, (2, 6), generator=torch.Generator().manual_seed(0))
    model = stir(peftkit.wrap(drop_nothing(language_model("llama")), peftkit.LoRA(rank=2))).train()
    expected = loss_and_gradients(model, model, tokens)
    found = loss_and_gradients(torch.compile(model, fullgraph=True), model, tokens)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


# --------------------------------------------------------------------------------------------- switching


@dataclass(frozen=True)
class Stretch(peftkit.Method):
    """Multiply each row: a method of whole weights, and of biases."""

    name: ClassVar[str] = "stretch"

    def adapter(self, site, shared=None):
        return StretchAdapter(site)


class StretchAdapter(peftkit.Adapter):
    def __init__(self, site):
        super().__init__(site)
        self.factor = site.parameter(torch.ones(*site.batch, site.fan_out, 1))

    def weight(self, w):
        return w * self.factor

    def bias(self, b):
        return b * self.factor.squeeze(-1)


@dataclass(frozen=True)
class Gained(peftkit.LoRA):
    """A low-rank product, and a factor for each row."""

    name: ClassVar[str] = "gained"

    def adapter(self, site, shared=None):
        return GainedAdapter(site, self)


class GainedAdapter(LoRAAdapter):
    def __init__(self, site, method):
        super().__init__(site, method)
        self.factor = site.parameter(torch.ones(*site.batch, site.fan_out, 1))

    def gain(self, w):
        return self.factor / w.norm(dim=-1, keepdim=True)


@dataclass(frozen=True)
class Around(peftkit.Method):
    """Add something to a layer's output."""

    name: ClassVar[str] = "around"
    scope: ClassVar[str] = "modules"

    def adapter(self, site, shared=None):
        return AroundAdapter(site)


class AroundAdapter(peftkit.Activation):
    def __init__(self, site):
        super().__init__(site)
        self.factor = site.parameter(torch.ones(()))

    def forward(self, base, *args, **kwargs):
        return base(*args, **kwargs) * self.factor


METHODS = {
    "lora": peftkit.LoRA(rank=2),
    "lora with a start": peftkit.LoRA(rank=2, init="olora"),
    "gain": Gained(rank=2),
    "whole weight": Stretch(),
    "around": Around(),
    "full": peftkit.Full(keep_base=True),
}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 6)
        self.conv = nn.Conv1d(6, 6, 3, padding=1)
        self.out = nn.Linear(6, 3)

    def forward(self, tokens):
        return self.out(self.conv(self.embed(tokens).mT).tanh().mT)


TOKENS = torch.randint(9, (2, 5), generator=torch.Generator().manual_seed(0))


def net(method, names=("default",)):
    torch.manual_seed(0)
    model = Net().eval()
    for i, name in enumerate(names):
        model = peftkit.wrap(model, method, targets=("embed", "conv", "out"), name=name)
        peftkit.activate(model, name)
        peftkit.set_trainable(model, name)
        stir(model, i)
    peftkit.set_trainable(model, *names)
    return model


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_one_graph_serves_all_adapters_of_the_same_shapes(method):
    """Eleven adapters run in turn, by `activate` and by `using`, in the graph of the first, each with its own numbers."""
    model = net(method, ADAPTERS)
    call, counter = compiled(model)
    outputs = []
    with torch.no_grad():
        peftkit.activate(model, ADAPTERS[0])
        call(TOKENS)
        with torch.compiler.set_stance("fail_on_recompile"):
            for name in ADAPTERS:
                peftkit.activate(model, name)
                outputs.append(call(TOKENS))
                torch.testing.assert_close(outputs[-1], model(TOKENS))
            with peftkit.using(model, ADAPTERS[3]):
                assert torch.equal(call(TOKENS), outputs[3])
            assert torch.equal(call(TOKENS), outputs[-1])
    assert counter.frame_count == 1
    for i, y in enumerate(outputs):
        assert all((y - other).abs().max() > 1e-3 for other in outputs[:i])


def test_switching_trains_the_adapter_that_is_active():
    """Backward through the one graph gives its gradients to the adapter that runs, and to no other."""
    model = net(peftkit.LoRA(rank=2), ADAPTERS[:3])
    call, counter = compiled(model, "aot_eager")
    for name in ADAPTERS[:3]:
        peftkit.activate(model, name)
        model.zero_grad()
        call(TOKENS).square().sum().backward()
        found = {path: p.grad for path, p in model.named_parameters() if p.grad is not None}
        assert found
        assert all(f".{name}." in path for path in found)
        model.zero_grad()
        model(TOKENS).square().sum().backward()
        for path, gradient in found.items():
            torch.testing.assert_close(gradient, model.get_parameter(path).grad)
    assert counter.frame_count == 1


def test_several_at_once():
    """Two adapters together are another graph than one, and one graph for any two."""
    model = net(peftkit.LoRA(rank=2), ADAPTERS[:4])
    call, counter = compiled(model)
    with torch.no_grad():
        for names in (("a0",), ("a1", "a2"), ("a3",), ("a3", "a0"), ("a2", "a1")):
            peftkit.activate(model, *names)
            torch.testing.assert_close(call(TOKENS), model(TOKENS))
    assert counter.frame_count == 2


def test_new_numbers_in_place_need_no_new_graph():
    """An adapter loaded into, and an adapter trained further, run with their new numbers in the same graph."""
    model, other = net(peftkit.LoRA(rank=2)), stir(net(peftkit.LoRA(rank=2)), 7)
    call, _ = compiled(model)
    with torch.no_grad():
        before = call(TOKENS)
        with torch.compiler.set_stance("fail_on_recompile"):
            peftkit.load_state_dict(model, peftkit.state_dict(other, "default"), "default")
            loaded = call(TOKENS)
            stir(model, 8)
            stirred = call(TOKENS)
        torch.testing.assert_close(loaded, other(TOKENS))
        torch.testing.assert_close(stirred, model(TOKENS))
    assert not torch.equal(before, loaded)


def test_the_bare_base_costs_one_graph_once():
    """`disabled` is one more graph, the first time; leaving it and entering it again is none."""
    model = net(peftkit.LoRA(rank=2))
    base = Net()
    base.load_state_dict({key: t for key, t in model.state_dict().items() if ".adapters." not in key})
    call, counter = compiled(model)
    with torch.no_grad():
        adapted = call(TOKENS)
        for _ in range(2):
            with peftkit.disabled(model):
                assert torch.equal(call(TOKENS), base(TOKENS))
            assert torch.equal(call(TOKENS), adapted)
    assert counter.frame_count == 2


# ------------------------------------------------------------------------------------ changes after compiling


def test_wrapping_after_compiling_is_seen():
    """A compiled model that is wrapped, wrapped again, and unwrapped runs what it then is, never an old graph."""
    torch.manual_seed(0)
    model = Net().eval()
    call, _ = compiled(model)
    with torch.no_grad():
        base = call(TOKENS)
        stir(peftkit.wrap(model, "lora", rank=2, targets=("conv", "out")))
        first = call(TOKENS)
        torch.testing.assert_close(first, model(TOKENS))
        stir(peftkit.wrap(model, "lora", rank=3, name="second", targets=("embed", "out")), 2)
        second = call(TOKENS)
        torch.testing.assert_close(second, model(TOKENS))
        peftkit.unwrap(model, "second")
        torch.testing.assert_close(call(TOKENS), model(TOKENS))
        peftkit.unwrap(model)
        assert torch.equal(call(TOKENS), base)
    assert not torch.allclose(first, base)
    assert not torch.allclose(second, first)


def test_a_merged_model_compiles():
    """Merged for a while or for good it is one graph, which computes what the adapters do."""
    model = net(peftkit.LoRA(rank=2))
    call, _ = compiled(model)
    with torch.no_grad():
        adapted = call(TOKENS)
        peftkit.merge(model)
        merged = call(TOKENS)
        torch.testing.assert_close(merged, adapted)
        assert torch.equal(merged, model(TOKENS))
        peftkit.unmerge(model)
        assert torch.equal(call(TOKENS), adapted)
        peftkit.merge(model, keep_base=False)
        assert torch.equal(call(TOKENS), merged)


def test_weights_trained_in_place_compile():
    """`full` is the model's own weights, and so one graph, forward and backward."""
    torch.manual_seed(0)
    model = peftkit.wrap(Net().double(), {"out": "full", "conv": peftkit.LoRA(rank=2)})
    call, counter = compiled(stir(model), "aot_eager")
    results = []
    for run in (model, call):
        model.zero_grad()
        y = run(TOKENS)
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert_all_close(*results)
    assert len(results[0]) == 1 + 2 + 2
    assert counter.frame_count == 1
