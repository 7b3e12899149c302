"""DDP, FSDP2 and accelerate: the same numbers as one process, one file, and a word of warning before what would break.

What needs two processes is in on_ranks.py, grouped into few launches because each costs seconds. What one process shows as
well runs here, in a group of one.
"""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import torch.distributed as dist
from every_method import NAMES, first_case
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import peftkit
from peftkit import distributed, errors, gathering, recipe
from peftkit.testing import subject

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("torch is built without gloo", allow_module_level=True)

SCRIPT = Path(__file__).with_name("on_ranks.py")
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node=2"]
ACCELERATE = [
    "accelerate.commands.launch",
    "--multi_gpu",
    "--num_processes=2",
    "--num_machines=1",
    "--mixed_precision=no",
]
ACCELERATE += ["--dynamo_backend=no", "--main_process_port=0"]


def launch(module, folder, *checks, timeout=240):
    """Run checks on two processes; what they wrote is shown if one fails."""
    command = [sys.executable, "-m", *module, str(SCRIPT), str(folder), *checks]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, check=False)
    except subprocess.TimeoutExpired as error:
        pytest.fail(f"not done after {timeout} s\n{error.stdout!r}\n{error.stderr!r}")
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert [line.split()[-1] for line in done.stdout.splitlines() if line.startswith("passed ")] == list(checks)


def test_torchrun_on_two_processes(tmp_path):
    """DDP and FSDP2 train as one process does; one file is written; it loads on any number of ranks; a run resumes."""
    pytest.importorskip("transformers")
    launch(
        TORCHRUN,
        tmp_path,
        "ddp_trains_as_one_process",
        "fsdp_trains_as_one_process",
        "fsdp_saves_one_file",
        "what_cannot_be_written_is_an_error_on_every_rank",
        "files_load_on_any_number_of_ranks",
        "ddp_resumes",
        "fsdp_resumes",
        "built_on_meta_and_sharded",
        "ranks_that_switch_after_ddp_part",
        "routing_apart_under_fsdp_mixes_gradients",
    )


@pytest.mark.slow
def test_accelerate_launch_on_two_processes(tmp_path):
    """The same training by `accelerate launch`: DDP by its Accelerator, FSDP2 by torch's own call."""
    pytest.importorskip("accelerate")
    pytest.importorskip("transformers")
    launch(ACCELERATE, tmp_path, "fsdp_trains_as_one_process", "accelerate_trains_as_one_process")


@pytest.mark.slow
def test_compiled_blocks_on_two_processes(tmp_path):
    """DDP and FSDP2 around compiled blocks train as one process does."""
    pytest.importorskip("transformers")
    launch(TORCHRUN, tmp_path, "compiled_trains_as_one_process")


# ------------------------------------------------------------------------------------------ a group of one


@pytest.fixture
def alone():
    """A group with one process in it: the engines do all that they do, but for others."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.fc = nn.Linear(6, 6)

    def forward(self, x):
        return x + self.fc(self.norm(x)).tanh()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


def net(method="lora", names=("a",), **options):
    torch.manual_seed(0)
    model = Net()
    for name in names:
        model = peftkit.wrap(model, method, name=name, **options)
    return model


def seeded(make):
    torch.manual_seed(0)
    return make()


def stirred(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=generator))
    return model


def kinds(model):
    return [hazard.kind for hazard in distributed.check(model)]


def train(call, model, steps=2):
    """Some steps; DDP complains of a missing gradient in the step after it."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(steps):
        call(X).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def shard(model, mesh, units=None):
    for unit in model.blocks if units is None else units:
        fully_shard(unit, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def test_ddp_with_an_adapter_that_trains_and_does_not_run(alone):
    """It is named beforehand; without find_unused_parameters the second step fails, with it all is well."""
    model = net(names=("a", "b"))
    peftkit.activate(model, "b")
    engine = DistributedDataParallel(model)
    assert [(hazard.kind, hazard.adapter) for hazard in distributed.check(engine)] == [("unused", "a")]
    with pytest.raises(RuntimeError, match="Expected to have finished reduction"):
        train(engine, model)

    model = net(names=("a", "b"))
    peftkit.activate(model, "b")
    engine = DistributedDataParallel(model, find_unused_parameters=True)
    assert kinds(engine) == []
    train(engine, model)


def test_ddp_with_what_was_frozen_or_added_later(alone):
    """DDP waits for what it knew, and knows nothing of what came; both are named."""
    model = net()
    engine = DistributedDataParallel(model)
    assert kinds(engine) == []
    peftkit.set_trainable(model)
    assert kinds(engine) == ["unused"]
    peftkit.wrap(engine, "lora", name="late")
    peftkit.set_trainable(model, "a", "late")
    assert [(hazard.kind, hazard.adapter) for hazard in distributed.check(engine)] == [("not reduced", "late")]


def test_ddp_while_routed(alone):
    """An adapter that no sample has gets no gradient: named inside `routed`, and the second step fails."""
    model = net(names=("a", "b"))
    engine = DistributedDataParallel(model)
    assert kinds(engine) == []
    with peftkit.routed(engine, ["a"] * len(X)):
        assert kinds(engine) == ["routed"]
        with pytest.raises(RuntimeError, match="Expected to have finished reduction"):
            train(engine, model)


def test_ddp_saves_and_loads_without_anybody_else(alone, tmp_path):
    """The model is whole on each rank, so a rank may save it alone; a file loads into it to run, and not to train."""
    engine = DistributedDataParallel(net())
    peftkit.save(engine, tmp_path / "a")
    peftkit.load(engine, tmp_path / "a", "again")
    with pytest.raises(errors.StateError, match="before DistributedDataParallel"):
        peftkit.load(engine, tmp_path / "a", "third", trainable=True)


def test_fsdp_wants_one_dtype_of_what_trains_in_a_unit(alone):
    """A norm trained in place in bfloat16 beside float32 factors: named, and the first forward fails. Apart, they train."""
    rules = {"**.fc": peftkit.LoRA(rank=2), "**.norm": "full"}
    torch.manual_seed(0)
    model = shard(peftkit.wrap(Net().bfloat16(), rules), alone)
    assert kinds(model) == ["dtypes"]
    assert "blocks.0.norm.weight in torch.bfloat16" in distributed.check(model)[0].note
    with pytest.raises(AssertionError, match="uniform"):
        model(X.bfloat16())

    model = peftkit.wrap(Net().bfloat16(), rules)
    model = shard(model, alone, [block.norm for block in model.blocks] + list(model.blocks))
    assert kinds(model) == []
    model(X.bfloat16()).float().square().mean().backward()


def test_fsdp_before_wrap(alone, tmp_path):
    """A sharded weight is refused; one that FSDP2 left gathered after a forward is not, and then it is named."""
    model = shard(Net(), alone)
    with pytest.raises(errors.UnsupportedLayerError, match="wrap the model first"):
        peftkit.wrap(model, "lora")
    peftkit.save(net(targets="blocks.**.fc"), tmp_path / "a")
    torch.manual_seed(0)
    model = shard(Net(), alone)
    with pytest.raises(errors.StateError, match="before fully_shard"):
        peftkit.load(model, tmp_path / "a", trainable=True)
    peftkit.load(model, tmp_path / "a")
    assert kinds(model) == []
    peftkit.set_trainable(model, "a")
    assert kinds(model) == ["not reduced"]


def test_fsdp_on_an_adapter_itself(alone):
    """Its factors are gone when the layer computes with them: named, and the forward fails."""
    model = net()
    model = shard(model, alone, [model.blocks[0].fc.adapters["a"]["weight"], *model.blocks])
    assert kinds(model) == ["own unit"]
    with pytest.raises(RuntimeError, match="storage"):
        model(X)


@dataclass(frozen=True)
class OneScale(peftkit.Method):
    """One factor for all sites together."""

    name: ClassVar[str] = "one-scale"

    def shared(self, sites):
        state = nn.Module()
        state.scale = sites[0].parameter(torch.full((2,), 0.5))
        return state

    def adapter(self, site, shared=None):
        return OneScaleAdapter(site, shared)


class OneScaleAdapter(peftkit.Adapter):
    def __init__(self, site, shared):
        super().__init__(site)
        self.shared = shared
        self.own = site.parameter(torch.ones(1))

    def weight(self, w):
        return w * self.shared.state.scale.sum() * self.own


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 6)
        self.block = Block()
        self.head = nn.Linear(6, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.block(self.embed(tokens)))


def test_fsdp_and_tied_weights(alone):
    """Two units with a holder each are refused by torch; in one unit, an adapter on one holder trains as unsharded."""
    tokens, rules = torch.tensor([[0, 3, 3]]), {"embed": peftkit.LoRA(rank=2), "block.fc": peftkit.LoRA(rank=2)}
    made = [stirred(peftkit.wrap(seeded(Tied), rules)) for _ in range(3)]
    fully_shard(made[0].embed, mesh=alone)
    fully_shard(made[0], mesh=alone)
    with pytest.raises(ValueError, match="shared with a parameter already managed"):
        made[0](tokens)
    fully_shard(made[1].block, mesh=alone)
    fully_shard(made[1], mesh=alone)
    for model in made[1:]:
        model(tokens).square().mean().backward()
    for name, p in made[2].named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(made[1].get_parameter(name).grad.full_tensor(), p.grad)


def test_fsdp_and_a_parameter_without_dimensions(alone):
    """Torch refuses it, by name."""
    model = net()
    model.blocks[0].fc.adapters["a"]["weight"].extra = nn.Parameter(torch.tensor(1.0))
    with pytest.raises(ValueError, match="scalar"):
        shard(model, alone)


def test_fsdp_with_state_that_sites_of_several_units_share(alone):
    """At the model itself it is at hand wherever the model runs; in one block's unit it is not, which is named."""
    model = shard(net(OneScale(), targets="blocks.**.fc"), alone)
    assert kinds(model) == []
    expected = net(OneScale(), targets="blocks.**.fc")
    for each in (model, expected):
        each(X).square().mean().backward()
    for key, p in expected.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(model.get_parameter(key).grad.full_tensor(), p.grad)

    torch.manual_seed(0)
    chain = peftkit.wrap(nn.Sequential(Block(), Block()), OneScale(), targets="**.fc")
    chain = shard(chain, alone, list(chain))
    assert kinds(chain) == ["shared state"]
    with pytest.raises(RuntimeError, match=r"mixed torch\.Tensor and DTensor"):
        chain(X)


def test_fsdp_and_weights_that_are_made_again(alone, monkeypatch):
    """The generic path makes adapted weights again in backward, from parameters that were freed and gathered in between."""
    monkeypatch.setattr(recipe, "SMALLEST", 0)
    expected = net(OneScale(), targets="blocks.**.fc")
    model = shard(net(OneScale(), targets="blocks.**.fc"), alone)
    for each in (expected, model):
        each(X).square().mean().backward()
    for key, p in expected.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(model.get_parameter(key).grad.full_tensor(), p.grad)


WHOLE = pytest.mark.xfail(
    reason="its step computes with whole matrices, of which a rank has a part", raises=RuntimeError
)


# torch's own, of models that return a view; these do not write to it.
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor:UserWarning")
@pytest.mark.parametrize("name", [pytest.param(each, marks=[WHOLE] if each == "adalora" else []) for each in NAMES])
def test_every_method_trains_sharded_as_without(alone, name, tmp_path):
    """Three steps with AdamW, and what methods do at a step; then the same file."""
    method, case = first_case(name)
    expected, model = (subject.stirred(subject.wrapped(method, case, training=True)) for _ in range(2))
    fully_shard(model, mesh=alone)
    assert kinds(model) == []
    losses = []
    for each in (expected, model):
        optimizer = torch.optim.AdamW(peftkit.param_groups(each, lr=0.01))
        for number in range(3):
            torch.manual_seed(number)
            loss = subject.loss_of(subject.call(each, subject.example(case)))
            losses.append(loss.detach())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(losses[3:], losses[:3])
    for key, t in peftkit.state_dict(expected).items():
        torch.testing.assert_close(gathering.whole(peftkit.state_dict(model)[key]), t, msg=key)
    peftkit.save(model, tmp_path / "sharded")
    loaded = peftkit.load(subject.base(case), tmp_path / "sharded")
    for key, t in peftkit.state_dict(loaded).items():
        assert torch.equal(t, gathering.whole(peftkit.state_dict(model)[key])), key


def test_fsdp_with_a_precision_policy(alone):
    """A bfloat16 base with float32 factors computes in bfloat16 and keeps its gradients in float32."""
    model = net().bfloat16()
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.float()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for unit in (*model.blocks, model):
        fully_shard(unit, mesh=alone, mp_policy=policy)
    assert kinds(model) == []
    y = model(X)
    assert y.dtype == torch.bfloat16
    y.float().square().mean().backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g is not None and g.dtype == torch.float32 for g in gradients)


def test_what_fsdp_left_gathered_is_not_written_to(alone):
    """After a forward the root's parameters are gathered; values that are loaded then are there in the next forward."""
    model = fully_shard(net(), mesh=alone)
    other = net()
    with torch.no_grad():
        for p in other.parameters():
            if p.requires_grad:
                p.copy_(torch.ones_like(p))
        model(X)
        peftkit.load_state_dict(model, peftkit.state_dict(other))
        torch.testing.assert_close(model(X), other(X))


def test_wrap_on_what_fsdp_left_gathered(alone):
    """It is refused as it is on a sharded weight."""
    model = fully_shard(Net(), mesh=alone)
    with torch.no_grad():
        model(X)
    with pytest.raises(errors.UnsupportedLayerError, match="wrap the model first"):
        peftkit.wrap(model, "lora")


def test_set_trainable_on_what_fsdp_left_gathered(alone):
    """What was frozen then gets no gradient in any later step."""
    model = fully_shard(net(names=("a", "b")), mesh=alone)
    with torch.no_grad():
        model(X)
    peftkit.set_trainable(model, "a")
    for _ in range(2):
        model(X).square().mean().backward()
    assert {name.split(".adapters.")[1][0] for name, p in model.named_parameters() if p.grad is not None} == {"a"}


def test_merge_after_fully_shard(alone):
    """It is refused, or it holds."""
    model = shard(stirred(net()), alone)
    with torch.no_grad():
        expected = model(X)
        try:
            peftkit.merge(model)
        except errors.PeftkitError:
            return
        torch.testing.assert_close(model(X), expected)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:FSDP is switching to use `NO_SHARD`:UserWarning")
def test_fsdp1(alone):
    """It makes one parameter of many: refused by torch where some train, else named; with use_orig_params it trains."""
    model = net()
    with pytest.raises(ValueError, match="uniform `requires_grad`"):
        FullyShardedDataParallel(net({"blocks.0.fc": "full"}), use_orig_params=False, device_id=torch.device("cpu"))
    for p in model.parameters():
        p.requires_grad_(True)
    engine = FullyShardedDataParallel(model, use_orig_params=False, device_id=torch.device("cpu"))
    assert kinds(engine) == ["flattened"]

    model, expected = net({"blocks.**": "lora", "head": "full"}), net({"blocks.**": "lora", "head": "full"})
    engine = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    assert kinds(engine) == []
    train(engine, engine)
    train(expected, expected)
    with torch.no_grad():
        torch.testing.assert_close(engine(X), expected(X))
