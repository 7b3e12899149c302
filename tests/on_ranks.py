"""What test_distributed.py runs on each of several processes: `torchrun on_ranks.py FOLDER CHECK …`.

Each check is a function of an empty folder that all ranks share. It builds its models from fixed seeds, so that every rank
can also do by itself what all of them do together, in float64, where only the order of sums may tell the two apart.
"""

import contextlib
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
import transformers
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import peftkit
from peftkit import distributed, errors

STEPS = 6
ROWS = 4
EXACT = {"rtol": 1e-10, "atol": 1e-12}
"""Float64's own error is 1e-16; sums of some thousand terms, taken in another order, over six steps."""


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "vocab_size": 32}
    config = transformers.LlamaConfig(num_hidden_layers=2, use_cache=False, **sizes)
    return transformers.LlamaForCausalLM(config).double()


def stirred(model):
    """Numbers of its own for whatever trains: an adapter that starts at zero hides faults."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) / 4)
    return model


def adapted(names=("a", "b")):
    """A Llama with two adapters of different methods, ranks and targets; a rank of three is uneven on two processes."""
    rules = {"a": peftkit.LoRA(rank=3), "b": {"@mlp": peftkit.LoRA(rank=2), "lm_head": peftkit.Full(keep_base=True)}}
    model = llama()
    for name in names:
        model = peftkit.wrap(model, rules[name], name=name)
    peftkit.set_trainable(model, *names)
    return stirred(model)


def batch(step):
    return torch.randint(32, (ROWS, 6), generator=torch.Generator().manual_seed(step))


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def optimizer_of(model, lr=1e-2):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.1)


def step(call, optimizer, number, *, alone=False):
    """One step on one global batch, of which each rank has its rows; returns the loss of the whole of it."""
    tokens = batch(number) if alone else batch(number)[dist.get_rank() :: world()]
    loss = F.cross_entropy(call(input_ids=tokens).logits.flatten(0, 1), tokens.flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    loss = loss.detach()
    if not alone:
        dist.all_reduce(loss)
        loss /= world()
    return loss


def switching(model, call, optimizer, numbers, *, alone=False):
    """Steps that train a alone, b alone, and both: by `activate` and by `using`."""
    losses = []
    for number in numbers:
        peftkit.activate(model, "ab"[number % 2])
        with peftkit.using(model, "a", "b") if number % 3 == 2 else contextlib.nullcontext():
            losses.append(step(call, optimizer, number, alone=alone))
    return torch.stack(losses)


def alone():
    """What one process makes of it: the model and its losses."""
    model = adapted()
    return model, switching(model, model, optimizer_of(model), range(STEPS), alone=True)


def whole(t):
    return (t.full_tensor() if isinstance(t, DTensor) else t).detach()


def values_of(model):
    return {name: whole(p) for name, p in model.named_parameters()}


def assert_same_model(model, expected):
    """Adapters to rounding; the base to the bit, in both against a new one."""
    found, wanted, fresh = values_of(model), values_of(expected), values_of(llama())
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        if ".adapters." in name:
            torch.testing.assert_close(value, wanted[name], **EXACT)
        else:
            assert torch.equal(value, fresh[name]), name


def mesh():
    return init_device_mesh("cpu", (world(),))


def sharded(model, *, blocks=True):
    if blocks:
        for block in model.model.layers:
            fully_shard(block, mesh=mesh())
    return fully_shard(model, mesh=mesh())


def replicated(model):
    return DistributedDataParallel(model, find_unused_parameters=True)


# ------------------------------------------------------------------------------------------------- training


def ddp_trains_as_one_process(_):
    """Losses, adapters and base under DDP, while adapters are switched between steps."""
    expected, losses = alone()
    model = adapted()
    engine = replicated(model)
    assert distributed.check(engine) == ()
    torch.testing.assert_close(switching(model, engine, optimizer_of(model), range(STEPS)), losses, **EXACT)
    assert_same_model(model, expected)


def fsdp_trains_as_one_process(_):
    """The same under FSDP2."""
    expected, losses = alone()
    model = sharded(adapted())
    assert distributed.check(model) == ()
    assert all(isinstance(p, DTensor) for p in model.parameters())
    torch.testing.assert_close(switching(model, model, optimizer_of(model), range(STEPS)), losses, **EXACT)
    assert_same_model(model, expected)


def compiled_trains_as_one_process(_):
    """The same with DDP and with FSDP2 around compiled blocks."""
    _, losses = alone()
    for engine_of in (replicated, sharded):
        torch.compiler.reset()
        model = adapted()
        for block in model.model.layers:
            block.compile(backend="aot_eager")
        engine = engine_of(model)
        torch.testing.assert_close(switching(model, engine, optimizer_of(model), range(STEPS)), losses, **EXACT)


# --------------------------------------------------------------------------------------------------- files


def fsdp_saves_one_file(folder):
    """Every rank takes part, the first writes; the bytes are those of one process; a forward before it does no harm."""
    model = sharded(adapted())
    with torch.no_grad():
        model(input_ids=batch(0))  # what belongs to the root stays gathered
    for name in "ab":
        peftkit.save(model, folder / f"{name}-{dist.get_rank()}", name)
        there = (folder / f"{name}-0").read_bytes()
        dist.barrier()
        own = folder / f"own-{name}-{dist.get_rank()}"
        peftkit.save(adapted(), own, name)
        assert own.read_bytes() == there
    dist.barrier()
    own = {f"own-{name}-{rank}" for name in "ab" for rank in range(world())}
    assert {path.name for path in folder.iterdir()} - own == {"a-0", "b-0"}


def what_cannot_be_written_is_an_error_on_every_rank(folder):
    """The first rank's, in the others' own words; nobody waits for ever."""
    model = sharded(adapted())
    for path, options in ((folder / "nowhere" / "a.safetensors", {}), (folder / "hf", {"format": "hf"})):
        try:
            peftkit.save(model, path, "a", **options)
        except errors.FileError as error:
            assert ("nowhere" if not options else "sharded") in str(error)  # noqa: PT017
        else:
            raise AssertionError("no error")
    assert not list(folder.iterdir())


def files_load_on_any_number_of_ranks(folder):
    """Onto one process, before sharding, after it, in other units, and into adapters that are there."""
    original = adapted()
    peftkit.activate(original, "a")
    with torch.no_grad():
        expected = original(input_ids=batch(9)).logits
    source = sharded(original)
    peftkit.save(source, folder / "a.safetensors", "a")

    def outputs_of(model):
        with torch.no_grad():
            return model(input_ids=batch(9)).logits

    one = peftkit.load(llama(), folder / "a.safetensors")
    assert torch.equal(outputs_of(one), expected)

    later = sharded(llama())
    outputs_of(later)
    peftkit.load(later, folder / "a.safetensors")  # checks the base, which is sharded
    torch.testing.assert_close(outputs_of(later), expected, **EXACT)
    assert distributed.check(later) == ()
    peftkit.set_trainable(later, "a")
    assert [hazard.kind for hazard in distributed.check(later)] == ["not reduced"]

    other = sharded(peftkit.load(llama(), folder / "a.safetensors", trainable=True), blocks=False)
    torch.testing.assert_close(outputs_of(other), expected, **EXACT)
    again = folder / "again.safetensors"
    peftkit.save(other, again)
    assert again.read_bytes() == (folder / "a.safetensors").read_bytes()

    into = sharded(peftkit.wrap(llama(), peftkit.LoRA(rank=3), name="a"), blocks=False)
    assert not torch.allclose(outputs_of(into), expected)
    peftkit.load_state_dict(into, {key: t.detach() for key, t in peftkit.state_dict(one).items()})
    torch.testing.assert_close(outputs_of(into), expected, **EXACT)
    peftkit.load_state_dict(into, peftkit.state_dict(other))  # sharded alike
    torch.testing.assert_close(outputs_of(into), expected, **EXACT)

    for model in (sharded(llama()), replicated(adapted(("b",)))):
        try:
            peftkit.load(model, folder / "a.safetensors", trainable=True)
        except errors.StateError as error:
            assert "before" in str(error)  # noqa: PT017
        else:
            raise AssertionError("no error")


def resumed(folder, engine_of, save_optimizer, load_optimizer):
    _, losses = alone()
    half = STEPS // 2
    model = adapted()
    engine, optimizer = engine_of(model), optimizer_of(model)
    first = switching(model, engine, optimizer, range(half))
    for name in "ab":
        peftkit.save(engine, folder / name, name)  # under DDP each rank for itself, and all of them the same
    save_optimizer(model, optimizer, folder)
    dist.barrier()

    model = llama()
    for name in "ab":
        peftkit.load(model, folder / name, trainable=True)
    peftkit.set_trainable(model, "a", "b")
    engine, optimizer = engine_of(model), optimizer_of(model)
    load_optimizer(model, optimizer, folder)
    second = switching(model, engine, optimizer, range(half, STEPS))
    torch.testing.assert_close(torch.cat([first, second]), losses, **EXACT)

    uninterrupted = adapted()
    engine = engine_of(uninterrupted)
    every = switching(uninterrupted, engine, optimizer_of(uninterrupted), range(STEPS))
    assert torch.equal(torch.cat([first, second]), every)


def ddp_resumes(folder):
    """Adapters by their files, the optimizer by its state: the losses of an uninterrupted run, to the bit."""

    def save_optimizer(_, optimizer, folder):
        if dist.get_rank() == 0:
            torch.save(optimizer.state_dict(), folder / "optimizer.pt")

    def load_optimizer(_, optimizer, folder):
        optimizer.load_state_dict(torch.load(folder / "optimizer.pt"))

    resumed(folder, replicated, save_optimizer, load_optimizer)


def fsdp_resumes(folder):
    """The same, the optimizer by torch.distributed.checkpoint."""

    def save_optimizer(model, optimizer, folder):
        dcp.save({"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=folder / "optimizer")

    def load_optimizer(model, optimizer, folder):
        state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
        dcp.load(state, checkpoint_id=folder / "optimizer")
        set_optimizer_state_dict(model, optimizer, state["optimizer"])

    resumed(folder, sharded, save_optimizer, load_optimizer)


def built_on_meta_and_sharded(_):
    """Wrapped on meta, sharded, given memory, the base loaded whole: a fresh start, the same on every rank; and a file's."""
    rules = {"@linear": peftkit.LoRA(rank=3, init="pissa"), "lm_head": peftkit.LoRA(rank=3)}
    state = llama().state_dict()
    with torch.device("meta"):
        model = peftkit.wrap(llama(), rules, name="a")
    rotary = llama().model.rotary_emb  # not part of the state
    sharded(model).to_empty(device="cpu")
    model.model.rotary_emb = rotary
    set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True, strict=False))
    torch.manual_seed(5 + dist.get_rank())
    distributed.reset_parameters(model)
    assert distributed.check(model) == ()

    expected = llama()
    torch.manual_seed(5)
    peftkit.wrap(expected, rules, name="a")
    for name, value in values_of(expected).items():
        torch.testing.assert_close(whole(model.get_parameter(name)), value, **EXACT)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=batch(0)).logits, expected(input_ids=batch(0)).logits, **EXACT)


# ------------------------------------------------------------------------------------------------- hazards


def ranks_that_switch_after_ddp_part(_):
    """What trains only after DDP was made is not reduced: `check` says so, and the ranks do part."""
    model = adapted()
    peftkit.activate(model, "a")
    peftkit.set_trainable(model, "a")
    engine = DistributedDataParallel(model)
    assert distributed.check(engine) == ()
    peftkit.activate(model, "b")
    peftkit.set_trainable(model, "b")
    assert {hazard.kind for hazard in distributed.check(engine)} == {"not reduced", "unused"}
    optimizer = optimizer_of(model)
    tokens = batch(0)[dist.get_rank() :: world()]
    model(input_ids=tokens).logits.square().mean().backward()
    optimizer.step()
    mine = torch.cat([p.detach().flatten() for _, p in sorted(peftkit.state_dict(model, "b").items())])
    other = mine.clone()
    dist.broadcast(other, src=0)
    assert torch.equal(mine, other) == (dist.get_rank() == 0)


def routing_apart_under_fsdp_mixes_gradients(_):
    """Ranks that route to different adapters add up what does not belong together, unless FSDP2 is told; `check` says so."""
    names = ("a", "c")

    def routable():
        model = llama()
        for name in names:
            model = peftkit.wrap(model, peftkit.LoRA(rank=2), name=name, targets="@mlp")
        peftkit.set_trainable(model, *names)
        return stirred(model)

    tokens = batch(0)
    one = routable()
    with peftkit.routed(one, [names[row % world()] for row in range(ROWS)]):
        one(input_ids=tokens).logits.square().mean().backward()
    expected = {key: p.grad for key, p in one.named_parameters() if p.grad is not None}

    def found(model):
        mine = tokens[dist.get_rank() :: world()]
        with peftkit.routed(model, [names[dist.get_rank()]] * len(mine)):
            hazards = [hazard.kind for hazard in distributed.check(model)]
            model(input_ids=mine).logits.square().mean().backward()
        return hazards, {key: whole(p.grad) for key, p in model.named_parameters() if p.grad is not None}

    model = sharded(routable())
    if hasattr(model, "set_reduce_scatter_unused_params"):
        model.set_reduce_scatter_unused_params(True)
        hazards, gradients = found(model)
        assert hazards == []
        for key, gradient in expected.items():
            torch.testing.assert_close(gradients[key], gradient, **EXACT)

    hazards, gradients = found(sharded(routable()))
    assert hazards == ["routed"]
    wrong = [
        key
        for key, gradient in expected.items()
        if key not in gradients or not torch.allclose(gradients[key], gradient)
    ]
    assert wrong


# ---------------------------------------------------------------------------------------------- accelerate


def accelerate_trains_as_one_process(folder):
    """`Accelerator.prepare` makes the DDP model, the loader and the optimizer; the same losses as one process, and one file."""
    from accelerate import Accelerator, DistributedDataParallelKwargs

    expected, losses = alone()
    accelerator = Accelerator(cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)])
    assert accelerator.num_processes == world() == 2
    rows = torch.cat([batch(number) for number in range(STEPS)])
    model = adapted()
    loader = torch.utils.data.DataLoader(rows, batch_size=ROWS // world())
    engine, optimizer, loader = accelerator.prepare(model, optimizer_of(model), loader)
    assert distributed.check(engine) == ()
    found = []
    for number, tokens in enumerate(loader):
        peftkit.activate(engine, "ab"[number % 2])
        with peftkit.using(engine, "a", "b") if number % 3 == 2 else contextlib.nullcontext():
            loss = F.cross_entropy(engine(input_ids=tokens).logits.flatten(0, 1), tokens.flatten())
            accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        found.append(accelerator.gather(loss.detach()).mean())
    torch.testing.assert_close(torch.stack(found), losses, **EXACT)
    assert_same_model(accelerator.unwrap_model(engine), expected)
    if accelerator.is_main_process:
        peftkit.save(engine, folder / "a.safetensors", "a")
    accelerator.wait_for_everyone()
    loaded = peftkit.load(llama(), folder / "a.safetensors")
    for key, t in peftkit.state_dict(loaded).items():
        assert torch.equal(t, peftkit.state_dict(engine, "a")[key])


def main(folder, *checks):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    for check in checks:
        own = Path(folder) / check
        own.mkdir(exist_ok=True)
        dist.barrier()
        globals()[check](own)
        if dist.get_rank() == 0:
            sys.stdout.write(f"passed {check}\n")
            sys.stdout.flush()
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    main(*sys.argv[1:])
