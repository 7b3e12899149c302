"""transformers' Trainer on wrapped models: what it writes, how it goes on from there, and what it refuses."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import peftkit

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from peftkit.trainer import AdapterCheckpoints, Trainer  # noqa: E402 - only once it is known to be there

WORDS, LENGTH = 24, 6
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
OTHERS = {"vocab_size": WORDS, "max_position_embeddings": 16, "pad_token_id": 0}


@pytest.fixture(autouse=True, scope="module")
def quiet():
    """transformers' advice to the user is no test result."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def bert():
    """A tiny classifier with dropout, so that a run depends on the random state too."""
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES, **OTHERS))


class WithBatchNorm(nn.Module):
    """A model that is none of transformers', whose base has buffers that training changes."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(WORDS, 16)
        self.fc = nn.Linear(16, 16)
        self.norm = nn.BatchNorm1d(16)
        self.score = nn.Linear(16, 2)

    def forward(self, input_ids, labels):
        logits = self.score(self.norm(self.fc(self.embed(input_ids).mean(1))))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


BASES = {"bert": bert, "batch norm": WithBatchNorm}


def base(name="bert"):
    torch.manual_seed(0)
    return BASES[name]()


def examples(count=24):
    """Sentences of random words; the label says whether the first word is in the upper half."""
    words = torch.randint(1, WORDS, (count, LENGTH), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": ids, "labels": int(ids[0] >= WORDS // 2)} for ids in words]


def wrapped(name, rules):
    """The base with an adapter for each of `rules`; the same for one seed, whatever was drawn before."""
    model = base(name)
    for adapter, rule in rules.items():
        torch.manual_seed(2)
        model = peftkit.wrap(model, rule, name=adapter)
    return model


def arguments(folder, **options):
    defaults = {
        "max_steps": 6, "save_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "weight_decay": 0.1,
        "use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_steps": 1, "warmup_steps": 2,
    }  # fmt: skip
    return transformers.TrainingArguments(str(folder), **defaults | options)


def trainer(model, folder, *, cls=Trainer, callbacks=(), **options):
    more = {
        key: options.pop(key) for key in ("compute_metrics", "model_init", "optimizer_cls_and_kwargs") if key in options
    }
    return cls(
        model=model,
        args=arguments(folder, **options),
        train_dataset=examples(),
        eval_dataset=examples(8),
        callbacks=list(callbacks),
        **more,
    )


def state(model):
    """Every tensor of the model, base and adapters, as it is now."""
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def same(a, b):
    """Whether two models hold the same tensors, to the bit."""
    a, b = state(a), state(b)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@torch.no_grad()
def output(model):
    batch = {
        "input_ids": torch.stack([example["input_ids"] for example in examples(8)]),
        "labels": torch.ones(8).long(),
    }
    return model.eval()(**batch)["logits"]


LORA = {"@linear": peftkit.LoRA(rank=2, dropout=0.1)}

RULES = {
    # name: the base, and for each adapter its rules
    "dropout": ("bert", {"default": LORA}),
    "head in place": ("bert", {"default": LORA | {"classifier": "full"}}),
    "two adapters": ("bert", {"a": LORA, "b": {"**.query": "lora", "classifier": peftkit.Full(keep_base=True)}}),
    "learning rates of its own": ("bert", {"default": {"**.{query,value}": "lora_plus"}}),
    "follows the steps": ("bert", {"default": {"**.{query,value}": "adalora"}}),
    "buffers of the base": ("batch norm", {"default": {"fc": "lora", "score": "full"}}),
}


SLOW = {"two adapters", "follows the steps", "learning rates of its own"}
every_case = pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow if case in SLOW else ()) for case in RULES]
)


def rules_of(case):
    name, rules = RULES[case]
    installed = {info.name for info in peftkit.methods()}
    for rule in rules.values():
        for method in rule.values():
            if isinstance(method, str) and method not in installed:
                pytest.skip(f"{method} is not installed")
    return name, rules


# ------------------------------------------------------------------------------------------------ checkpoints


@every_case
def test_resume(case, tmp_path):
    """A run that was stopped and resumed ends with the very bits of one that was not: weights, losses, schedule."""
    name, rules = rules_of(case)
    whole = trainer(wrapped(name, rules), tmp_path / "whole")
    whole.train()
    stopped = trainer(wrapped(name, rules), tmp_path / "stopped", callbacks=[StopAfter(3)])
    stopped.train()
    assert stopped.state.global_step == 3
    assert not same(stopped.model, whole.model)
    resumed = trainer(wrapped(name, rules), tmp_path / "stopped")
    resumed.train(resume_from_checkpoint=True)
    assert same(resumed.model, whole.model)
    assert losses(resumed) == losses(whole)
    assert resumed.lr_scheduler.state_dict() == whole.lr_scheduler.state_dict()
    if name == "bert":
        untouched = {key: value for key, value in base(name).state_dict().items() if key in state(whole.model)}
        moved = {key for key, value in untouched.items() if not torch.equal(value, state(whole.model)[key])}
        assert moved == ({"classifier.weight", "classifier.bias"} if case == "head in place" else set())


class StopAfter(transformers.TrainerCallback):
    """Stops training after a step, as a time limit would."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step >= self.step


def losses(run):
    return [
        (entry["step"], entry["loss"], entry["learning_rate"]) for entry in run.state.log_history if "loss" in entry
    ]


@pytest.mark.parametrize("lost", [pytest.param("optimizer.pt", marks=pytest.mark.slow), "rng_state.pth"])
def test_what_resuming_depends_on(lost, tmp_path):
    """Planted fault: without the optimizer's or the random state in the checkpoint, the same comparison fails."""
    name, rules = RULES["dropout"]
    whole = trainer(wrapped(name, rules), tmp_path)
    whole.train()
    (tmp_path / "checkpoint-3" / lost).unlink()
    resumed = trainer(wrapped(name, rules), tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert not same(resumed.model, whole.model)


@every_case
def test_checkpoint_holds_adapters_only(case, tmp_path):
    """A checkpoint and what `save_model` writes hold one file for each adapter, and no weight of the base."""
    name, rules = rules_of(case)
    run = trainer(wrapped(name, rules), tmp_path)
    run.train()
    run.save_model(tmp_path / "final")
    expected = {f"adapters/{adapter}.safetensors" for adapter in rules} | {"training_args.bin"}
    expected |= {"buffers.safetensors"} if name == "batch norm" else set()
    assert files(tmp_path / "final") == expected
    states = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
    assert files(tmp_path / "checkpoint-6") == expected | states
    loaded = base(name)
    for adapter in rules:
        loaded = peftkit.load(loaded, tmp_path / "final" / "adapters" / f"{adapter}.safetensors")
        held = peftkit.state_dict(loaded, adapter)
        assert all(torch.equal(held[key], value) for key, value in peftkit.state_dict(run.model, adapter).items())
    peftkit.activate(loaded, *rules)
    if name == "bert":
        assert torch.equal(output(loaded), output(run.model))


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_best_model(tmp_path):
    """`load_best_model_at_end` puts the adapters of the best evaluation back, in the optimizer's own parameters."""
    marks = iter([0.1, 0.9, 0.4])
    seen = []

    class Look(transformers.TrainerCallback):
        def on_evaluate(self, args, state, control, model, **_):
            seen.append({key: value.clone() for key, value in peftkit.state_dict(model).items()})

    name, rules = RULES["head in place"]
    run = trainer(
        wrapped(name, rules), tmp_path, callbacks=[Look()], compute_metrics=lambda _: {"mark": next(marks)},
        eval_strategy="steps", eval_steps=2, save_steps=2, load_best_model_at_end=True, metric_for_best_model="mark",
    )  # fmt: skip
    parameters = {key: id(p) for key, p in run.model.named_parameters()}
    run.train()
    assert run.state.best_model_checkpoint.endswith("checkpoint-4")
    held = peftkit.state_dict(run.model)
    assert all(torch.equal(held[key], seen[1][key]) for key in held)
    assert any(not torch.equal(held[key], seen[2][key]) for key in held)
    assert {key: id(p) for key, p in run.model.named_parameters()} == parameters


def test_evaluation(tmp_path):
    """`evaluate` and `predict` give the loss and the logits that the model itself gives."""
    name, rules = RULES["dropout"]
    run = trainer(wrapped(name, rules), tmp_path)
    run.train()
    batch = {"input_ids": torch.stack([e["input_ids"] for e in examples(8)])}
    batch["labels"] = torch.tensor([e["labels"] for e in examples(8)])
    with torch.no_grad():
        expected = run.model.eval()(**batch)
    assert torch.equal(torch.from_numpy(run.predict(examples(8)).predictions), expected.logits)
    assert run.evaluate()["eval_loss"] == pytest.approx(expected.loss.item(), rel=1e-6)


def test_columns(tmp_path):
    """What the model's forward takes reaches it, and what it does not take is left out, as without adapters."""
    seen = set()

    def look(module, args, kwargs):
        seen.update(kwargs)

    model = wrapped(*RULES["dropout"])
    model.register_forward_pre_hook(look, with_kwargs=True)
    run = trainer(model, tmp_path, max_steps=1)
    run.train_dataset = [example | {"attention_mask": torch.ones(LENGTH).long(), "text": 3} for example in examples()]
    run.train()
    assert {"input_ids", "attention_mask", "labels"} <= seen
    assert "text" not in seen


@pytest.mark.parametrize(
    "reentrant", [pytest.param(False, marks=pytest.mark.slow), True], ids=["non-reentrant", "reentrant"]
)
def test_gradient_checkpointing(reentrant, tmp_path):
    """Trained with gradient checkpointing of either kind, the adapters are to the bit what they are without it."""
    name, rules = RULES["dropout"]
    plain = trainer(wrapped(name, rules), tmp_path / "plain")
    plain.train()
    run = trainer(
        wrapped(name, rules), tmp_path / "checkpointed", activation_checkpointing=True,
        activation_checkpointing_kwargs={"use_reentrant": reentrant},
    )  # fmt: skip
    run.train()
    assert run.model.is_activation_checkpointing
    assert same(run.model, plain.model)


def test_bfloat16(tmp_path):
    """With `bf16=True` the adapters stay float32, learn, and resume to the bit."""
    name, rules = RULES["dropout"]
    whole = trainer(wrapped(name, rules), tmp_path, bf16=True)
    before = state(whole.model)
    whole.train()
    after = peftkit.state_dict(whole.model)
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}
    assert any(not torch.equal(state(whole.model)[key], before[key]) for key in before)
    resumed = trainer(wrapped(name, rules), tmp_path, bf16=True)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same(resumed.model, whole.model)


@pytest.mark.slow
def test_model_init(tmp_path):
    """A model that the Trainer makes itself, wrapped, is trained, saved and resumed like another."""
    whole = trainer(None, tmp_path, model_init=lambda: wrapped(*RULES["dropout"]))
    whole.train()
    resumed = trainer(None, tmp_path, model_init=lambda: wrapped(*RULES["dropout"]))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same(resumed.model, whole.model)
    assert "adapters/default.safetensors" in files(tmp_path / "checkpoint-6")


# ----------------------------------------------------------------------------------------------- the optimizer


def test_learning_rates_of_a_method(tmp_path):
    """A method's own learning rates reach the optimizer, with the weight decay that the Trainer gives by name."""
    model = wrapped("bert", rules_of("learning rates of its own")[1])
    ups = {id(p) for path, p in model.named_parameters() if path.endswith(".up")}
    run = trainer(model, tmp_path)
    run.create_optimizer()
    given = {
        id(p): (group["lr"], group["weight_decay"]) for group in run.optimizer.param_groups for p in group["params"]
    }
    assert given.keys() == {id(p) for p in model.parameters() if p.requires_grad}
    ratio = peftkit.method("lora_plus")().ratio
    assert ratio != 1
    assert {values for key, values in given.items() if key in ups} == {(1e-2 * ratio, 0.1)}
    assert {values for key, values in given.items() if key not in ups} == {(1e-2, 0.1)}


def test_learning_rate_of_an_optimizer_of_ones_own(tmp_path):
    """Where the optimizer's class and options are given, a method's rates start from the rate that stands there."""
    model = wrapped("bert", rules_of("learning rates of its own")[1])
    ups = {id(p) for path, p in model.named_parameters() if path.endswith(".up")}
    run = trainer(model, tmp_path, optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.5, "momentum": 0.9}))
    run.create_optimizer()
    rates = {id(p): group["lr"] for group in run.optimizer.param_groups for p in group["params"]}
    assert {rate for key, rate in rates.items() if key not in ups} == {0.5}
    assert {rate for key, rate in rates.items() if key in ups} == {0.5 * peftkit.method("lora_plus")().ratio}
    assert {group["momentum"] for group in run.optimizer.param_groups} == {0.9}


def test_optimizer_that_picks_its_parameters(tmp_path):
    """One that brings its own parameters leaves a method's rates no place, which is an error."""
    model = wrapped("bert", rules_of("learning rates of its own")[1])
    given = (torch.optim.SGD, {"params": [{"params": list(model.parameters())}], "lr": 0.5})
    with pytest.raises(peftkit.errors.StateError, match="picks its parameters itself"):
        trainer(model, tmp_path, optimizer_cls_and_kwargs=given).create_optimizer()


def test_weight_decay(tmp_path):
    """Without learning rates of a method's own the groups are the Trainer's: no decay on biases."""
    model = wrapped(*RULES["head in place"])
    run = trainer(model, tmp_path)
    run.create_optimizer()
    decay = {id(p): group["weight_decay"] for group in run.optimizer.param_groups for p in group["params"]}
    assert decay[id(model.classifier.bias)] == 0.0
    assert decay[id(model.classifier.weight)] == 0.1


# ----------------------------------------------------------------------------------------- what is refused, and more


def test_needs_a_wrapped_model(tmp_path):
    """A model without adapters is refused before any training."""
    with pytest.raises(peftkit.errors.StateError, match="not wrapped"):
        trainer(base(), tmp_path)


@pytest.mark.parametrize("engine", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_engines_that_write_checkpoints(engine, tmp_path):
    """Where FSDP or DeepSpeed writes the checkpoints, this Trainer is refused before any training."""

    class Engine(transformers.Trainer):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            setattr(self, engine, True)

    class Both(AdapterCheckpoints, Engine):
        pass

    with pytest.raises(peftkit.errors.StateError, match="the engine writes checkpoints"):
        trainer(wrapped(*RULES["dropout"]), tmp_path, cls=Both)


MISTAKES = {
    # how the model is wrapped for the resumed run: what the error says
    "another rank": (lambda: wrapped("bert", {"default": {"@linear": peftkit.LoRA(rank=3, dropout=0.1)}}), "rank=2.*rank=3"),
    "another scale": (
        lambda: wrapped("bert", {"default": {"@linear": peftkit.LoRA(rank=2, dropout=0.1, alpha=8.0)}}),
        "alpha=16.0.*alpha=8.0",
    ),
    "fewer layers": (lambda: wrapped("bert", {"default": {"**.query": peftkit.LoRA(rank=2, dropout=0.1)}}), "nothing in the model"),
    "another name": (lambda: wrapped("bert", {"other": LORA}), "no adapter 'default'"),
    "one adapter more": (lambda: wrapped("bert", {"default": LORA, "b": LORA}), "b.safetensors"),
    "another base": (lambda: (torch.manual_seed(9), peftkit.wrap(bert(), LORA))[1], "another base"),
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint of one adapter, and one of two."""
    folder = tmp_path_factory.mktemp("runs")
    for case in ("dropout", "two adapters"):
        trainer(wrapped(*RULES[case]), folder / case, max_steps=1, save_steps=1).train()
    return folder / "dropout" / "checkpoint-1"


@pytest.mark.parametrize("mistake", MISTAKES)
def test_resume_with_another_model(mistake, checkpoint, tmp_path):
    """A checkpoint that was written for a model wrapped otherwise is refused, and the model stays as it is."""
    build, said = MISTAKES[mistake]
    model = build()
    before = state(model)
    with pytest.raises(peftkit.errors.FileError, match=said):
        trainer(model, tmp_path).train(resume_from_checkpoint=str(checkpoint))
    assert all(torch.equal(value, before[key]) for key, value in state(model).items())


def test_resume_with_an_adapter_less(checkpoint, tmp_path):
    """A checkpoint with an adapter that the model does not have is refused."""
    model = wrapped("bert", {"a": LORA})
    with pytest.raises(peftkit.errors.BaseMismatchError, match="'b'"):
        trainer(model, tmp_path).train(
            resume_from_checkpoint=str(checkpoint.parents[1] / "two adapters" / "checkpoint-1")
        )


def test_resume_from_no_checkpoint_of_ours(checkpoint, tmp_path):
    """A folder without adapters is refused."""
    other = shutil.copytree(checkpoint, tmp_path / "checkpoint-1")
    shutil.rmtree(other / "adapters")
    with pytest.raises(peftkit.errors.FileError, match="no adapters"):
        trainer(wrapped(*RULES["dropout"]), tmp_path).train(resume_from_checkpoint=str(other))


def test_quantised_base(tmp_path):
    """A wrapped base that calls itself quantised is trained, which transformers' own Trainer refuses."""

    class Quantizer:
        is_trainable = True
        is_qat_trainable = False

    models = [wrapped(*RULES["dropout"]) for _ in range(2)]
    for model in models:
        model.is_quantized, model.hf_quantizer = True, Quantizer()
    with pytest.raises(ValueError, match="purely quantized"):
        trainer(models[0], tmp_path, cls=transformers.Trainer)
    trainer(models[1], tmp_path).train()
    assert "_hf_peft_config_loaded" not in models[1].__dict__


@pytest.mark.slow
def test_other_trainers(tmp_path):
    """`AdapterCheckpoints` does the same for another Trainer class: one that generates, on an encoder-decoder."""

    class Seq2Seq(AdapterCheckpoints, transformers.Seq2SeqTrainer):
        pass

    def t5():
        torch.manual_seed(0)
        config = transformers.T5Config(
            vocab_size=WORDS, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0
        )
        model = transformers.T5ForConditionalGeneration(config)
        model.generation_config.max_new_tokens = 4
        return peftkit.wrap(model, "lora", rank=2)

    data = [{"input_ids": e["input_ids"], "labels": e["input_ids"][:4]} for e in examples()]

    def run():
        options = arguments(tmp_path).to_dict() | {"predict_with_generate": True}
        made = transformers.Seq2SeqTrainingArguments(
            **{key: options[key] for key in (*CHOSEN, "predict_with_generate")}
        )
        return Seq2Seq(model=t5(), args=made, train_dataset=data, eval_dataset=data[:4])

    whole = run()
    whole.train()
    resumed = run()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same(resumed.model, whole.model)
    assert "adapters/default.safetensors" in files(tmp_path / "checkpoint-6")
    generated = torch.from_numpy(whole.predict(data[:4]).predictions)
    ids = torch.stack([e["input_ids"] for e in data[:4]])
    expected = whole.model.eval().generate(input_ids=ids)
    assert torch.equal(generated[:, : expected.shape[1]], expected)  # the Trainer fills up to a length


CHOSEN = (
    "output_dir", "max_steps", "save_steps", "per_device_train_batch_size", "learning_rate", "use_cpu", "report_to",
    "disable_tqdm",
)  # fmt: skip


@pytest.mark.slow
def test_transformers_own_trainer(tmp_path):
    """transformers' own Trainer trains a wrapped model as well: its checkpoints hold the whole model, and resume."""
    name, rules = RULES["dropout"]
    whole = trainer(wrapped(name, rules), tmp_path / "whole", cls=transformers.Trainer)
    whole.train()
    assert "model.safetensors" in files(tmp_path / "whole" / "checkpoint-6")
    ours = trainer(wrapped(name, rules), tmp_path / "ours")
    ours.train()
    assert same(whole.model, ours.model)
    assert losses(whole) == losses(ours)
    resumed = trainer(wrapped(name, rules), tmp_path / "whole", cls=transformers.Trainer)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert same(resumed.model, whole.model)


ON_TWO = """
import sys
sys.path.insert(0, {tests!r})
import torch
from pathlib import Path
from test_trainer import RULES, same, trainer, wrapped

torch.set_num_threads(1)
folder = Path({folder!r})
whole = trainer(wrapped(*RULES["head in place"]), folder, ddp_backend="gloo")
whole.train()
resumed = trainer(wrapped(*RULES["head in place"]), folder, ddp_backend="gloo")
resumed.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
print("rank", whole.args.process_index, "of", whole.args.world_size, same(resumed.model, whole.model), flush=True)
"""


@pytest.mark.slow
def test_two_processes(tmp_path):
    """Under DistributedDataParallel one process writes the adapters, and both resume from them to the bit."""
    script, folder = tmp_path / "train.py", tmp_path / "run"
    script.write_text(ON_TWO.format(tests=str(Path(__file__).parent), folder=str(folder)))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert {line for line in done.stdout.splitlines() if line.startswith("rank")} == {
        "rank 0 of 2 True",
        "rank 1 of 2 True",
    }
    states = {"optimizer.pt", "scheduler.pt", "rng_state_0.pth", "rng_state_1.pth", "trainer_state.json"}
    assert files(folder / "checkpoint-6") == {"adapters/default.safetensors", "training_args.bin"} | states
