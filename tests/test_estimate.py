"""What `estimate` says about models that are not there, what fits, and the command that asks for it.

That its figures are those of torch's allocator is tested in test_memory.py.
"""

import json
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import peftkit
from peftkit.errors import PeftkitError, SelectorError
from peftkit.estimating import nbytes_of
from peftkit.fitting import _most_within, largest, scaled, which_fit
from peftkit.memory import CATEGORIES

FLOAT, LONG = torch.float32, torch.long


def mlp():
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 4))


class Attention(nn.Module):
    """Scaled dot product attention of four heads, with a mask if there is one."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(64, 192)

    def forward(self, x, mask=None):
        q, k, v = self.proj(x).view(*x.shape[:2], 3, 4, 16).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)


# ------------------------------------------------------------------------------------------ the estimate


def test_a_model_of_any_size_needs_no_memory():
    """40 GB of weights are estimated on this machine, from a factory that would need them."""
    found = peftkit.estimate(
        lambda: nn.Sequential(nn.Linear(10**5, 10**5)), "lora", ((1, 10**5), FLOAT), targets="**", rank=1
    )
    assert found.at_peak["frozen"] > 4 * 10**10
    assert found.trainable == 2 * 10**5
    assert found.total == 10**10 + 3 * 10**5


def test_the_parts_add_up():
    """Categories to the peak, parameters to the optimizer's state, and to what stays between steps."""
    batch = ((8, 64), FLOAT)
    found = peftkit.estimate(mlp, "full", batch, targets="**", device="cpu")
    total = sum(p.numel() for p in mlp().parameters())
    assert tuple(found.at_peak) == CATEGORIES
    assert sum(found.at_peak.values()) == found.peak
    assert (found.trainable, found.total) == (total, total)
    assert found.at_peak["optimizer"] == 2 * 4 * total + 6 * 4  # two moments, and six counts of steps
    assert found.steady == 3 * 4 * total + 6 * 4 + 8 * 64 * 4
    assert found.overhead == (0, 0)


def test_a_real_model_is_left_as_it_was():
    """Only its shapes are read."""
    model = peftkit.wrap(mlp(), "lora", rank=2)
    before = {name: (id(t), t.clone()) for name, t in (*model.named_parameters(), *model.named_buffers())}
    model.eval()
    peftkit.estimate(model, None, ((2, 64), FLOAT))
    after = {name: (id(t), t) for name, t in (*model.named_parameters(), *model.named_buffers())}
    assert {name: i for name, (i, _) in before.items()} == {name: i for name, (i, _) in after.items()}
    assert all(torch.equal(t, after[name][1]) for name, (_, t) in before.items())
    assert not model.training
    assert all(p.grad is None for p in model.parameters())


def test_a_model_can_be_trained_as_it_is():
    """`method=None` takes what has `requires_grad`, adapters that are on it too."""
    model = peftkit.wrap(mlp(), "lora", rank=2)
    found = peftkit.estimate(model, None, ((2, 64), FLOAT))
    assert found.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert "as it is" in str(found)


def test_a_factory_that_reads_values_is_run_for_real():
    """Its model is used by its shapes."""

    def build():
        return nn.Sequential(*[nn.Linear(4, 4) for _ in range(int(torch.ones(3).sum().item()))])

    assert peftkit.estimate(build, "lora", ((2, 4), FLOAT), targets="**").total > 3 * 20


def test_inputs_may_be_tensors_shapes_dicts_tuples_or_a_function():
    """All of them mean the same."""
    x, mask = torch.zeros(2, 8, 64), torch.zeros(8, 8)
    shapes = ((2, 8, 64), FLOAT), ((8, 8), FLOAT)
    forms = [(x, mask), shapes, {"x": x, "mask": shapes[1]}, lambda: (x, mask)]
    assert len({peftkit.estimate(Attention, "lora", form, targets="**").peak for form in forms}) == 1


def test_the_loss_is_the_outputs_own_or_the_mean_or_what_is_given():
    """A loss that needs memory shows."""
    batch = ((64, 64), FLOAT)
    plain = peftkit.estimate(mlp, "lora", batch).peak
    costly = peftkit.estimate(mlp, "lora", batch, loss=lambda y: y.repeat(100, 100).pow(2).mean()).peak
    assert costly > plain + 64 * 100 * 4 * 100 * 4
    with pytest.raises(PeftkitError, match="loss="):
        peftkit.estimate(lambda: nn.Sequential(nn.Linear(4, 4), Nothing()), "lora", ((1, 4), FLOAT), targets="**")


class Nothing(nn.Module):
    def forward(self, x):
        return x.argmax(-1)


def test_what_needs_values_is_refused_with_a_way_out():
    """A result whose shape depends on values has none on meta."""

    class Chosen(nn.Linear):
        def forward(self, x):
            return super().forward(x)[x.sum(-1) > 0].nonzero().float()

    with pytest.raises(PeftkitError, match="Ledger"):
        peftkit.estimate(lambda: nn.Sequential(Chosen(4, 4)), "lora", ((3, 4), FLOAT), targets="**")


def test_asking_for_a_value_is_answered():
    """A model that looks at its inputs takes the branch of true and one."""

    class Looks(nn.Linear):
        def forward(self, x):
            assert bool((x > 0).all())
            assert x.sum().item() == 1.0
            return super().forward(x)

    assert peftkit.estimate(lambda: nn.Sequential(Looks(4, 4)), "lora", ((3, 4), FLOAT), targets=Looks).peak > 0


@pytest.mark.parametrize("options, words", [
    ({"optimizer": "adamv"}, "or 'adamw'"),
    ({"attention": "flush"}, "did you mean 'flash'"),
    ({"device": "tpu"}, "device must be cuda, cpu"),
    ({"checkpointing": "layers.*"}, "matches no module"),
    ({"rnak": 4}, "did you mean 'rank'"),
])  # fmt: skip
def test_a_wrong_argument_is_named_with_the_right_one(options, words):
    """What was given, and what would have been right."""
    with pytest.raises(PeftkitError, match=words):
        peftkit.estimate(mlp, "lora", ((1, 64), FLOAT), **options)


# ---------------------------------------------------------------------------- options that change the memory


def test_optimizers_need_what_they_keep():
    """Nothing, one moment, two; and a callable is taken at its word."""

    def state(optimizer):
        return peftkit.estimate(mlp, "full", ((1, 64), FLOAT), targets="**", optimizer=optimizer, device="cpu").at_peak[
            "optimizer"
        ]

    weights = 4 * sum(p.numel() for p in mlp().parameters())
    assert state("sgd") == 0
    assert state("sgd-momentum") == weights
    assert state("adam") == state("adamw") == 2 * weights + 6 * 4
    assert state(lambda groups: torch.optim.Adagrad(groups)) == weights + 6 * 4


def test_cuda_steps_many_tensors_at_once():
    """Its default optimizers take temporaries of the size of all trained weights; those of the CPU, of the largest."""
    peaks = {}
    for device in ("cpu", "cuda"):
        found = peftkit.estimate(
            lambda: nn.Sequential(*[nn.Linear(100, 100) for _ in range(9)]),
            "full",
            ((1, 100), FLOAT),
            targets="**",
            device=device,
        )
        assert found.largest.startswith("optimizer step")
        peaks[device] = found.at_peak["temporary"]
    assert peaks["cuda"] >= 9 * 40_000
    assert peaks["cpu"] < 3 * 40_000
    low, high = found.overhead
    assert 0 < low < high


def test_blocks_of_cuda_are_counted_whole():
    """512 bytes for the smallest bias."""
    found = peftkit.estimate(lambda: nn.Sequential(nn.Linear(1, 1)), "full", ((1, 1), FLOAT), targets="**")
    assert found.at_peak["trainable"] == 1024


def test_dtype_casts_the_model_but_not_the_adapters():
    """A bfloat16 base has float32 adapters."""
    batch = ((1, 64), torch.bfloat16)
    found = peftkit.estimate(mlp, "lora", batch, dtype=torch.bfloat16, rank=1, targets="0", device="cpu")
    assert found.at_peak["frozen"] == 2 * sum(p.numel() for p in mlp().parameters())
    assert found.at_peak["trainable"] == 4 * (64 + 256)


def test_checkpointing_trades_activations():
    """For the layers of a list, for those that a selector names, and for a model's own way."""

    class Own(nn.Sequential):
        def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs):
            assert gradient_checkpointing_kwargs == {"use_reentrant": False}
            self.enabled = True

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=False) if self.enabled else x

    def deep(kind=nn.Sequential):
        return kind(*[nn.Sequential(nn.Linear(64, 64), nn.Sigmoid(), nn.Sigmoid(), nn.Sigmoid()) for _ in range(4)])

    def kept(build, checkpointing):
        found = peftkit.estimate(build, "lora", ((512, 64), FLOAT), targets="**", checkpointing=checkpointing)
        return found.at_peak["activations"]

    everything = kept(deep, checkpointing=False)
    assert kept(deep, checkpointing=True) < 0.6 * everything
    assert kept(deep, checkpointing="*") == kept(deep, checkpointing=True)
    assert kept(deep, checkpointing=["0", "1"]) < everything
    assert kept(lambda: deep(Own), checkpointing=True) > 0
    with pytest.raises(SelectorError):
        kept(deep, checkpointing="blocks.*")
    with pytest.raises(PeftkitError, match="no list of layers"):
        peftkit.estimate(lambda: nn.Linear(4, 4), "lora", ((1, 4), FLOAT), targets=nn.Linear, checkpointing=True)


@pytest.mark.parametrize("device, dtype, masked, wanted, kernel", [
    ("cpu", FLOAT, False, "auto", "flash"),
    ("cpu", FLOAT, True, "auto", "flash"),
    ("cuda", torch.bfloat16, False, "auto", "flash"),
    ("cuda", torch.bfloat16, True, "auto", "efficient"),
    ("cuda", FLOAT, False, "auto", "efficient"),
    ("cuda", FLOAT, False, "flash", "efficient"),
    ("cuda", torch.bfloat16, False, "math", "math"),
])  # fmt: skip
def test_the_attention_kernel_is_the_devices_or_the_one_asked_for(device, dtype, masked, wanted, kernel):
    """One that cannot serve the call is not taken."""
    batch = {"x": ((2, 16, 64), dtype)} | ({"mask": ((16, 16), dtype)} if masked else {})
    found = peftkit.estimate(Attention, "lora", batch, targets="**", dtype=dtype, device=device, attention=wanted)
    assert found.attention == {kernel: 1}
    assert kernel in str(found)


def test_math_attention_keeps_a_square_of_the_sequence():
    """And the others do not."""
    batch = ((1, 512, 64), torch.bfloat16)
    peaks = [
        peftkit.estimate(Attention, "lora", batch, targets="**", dtype=torch.bfloat16, attention=a).peak
        for a in ("flash", "math")
    ]
    assert peaks[1] - peaks[0] > 4 * 512 * 512 * 2


def test_autocast_casts_as_each_device_does():
    """On CUDA a softmax runs in float32, on the CPU in what it is given."""

    class Softmax(nn.Linear):
        def forward(self, x):
            seen.append(super().forward(x).softmax(-1).dtype)
            return super().forward(x)

    for device, dtype in (("cuda", FLOAT), ("cpu", torch.bfloat16)):
        seen = []
        peftkit.estimate(
            lambda: nn.Sequential(Softmax(8, 8)),
            "lora",
            ((2, 8), FLOAT),
            targets=Softmax,
            autocast=torch.bfloat16,
            device=device,
        )
        assert seen == [dtype]
    assert not torch.is_autocast_enabled("cpu")


# ------------------------------------------------------------------------------------------------- what fits


@pytest.mark.parametrize(
    "text, nbytes", [("24GB", 24 * 10**9), ("16 GiB", 16 * 2**30), ("1.5kb", 1500), ("12", 12), (7, 7)]
)
def test_a_budget_is_read(text, nbytes):
    """GB are 10^9 bytes, GiB 2^30."""
    assert nbytes_of(text) == nbytes


@pytest.mark.parametrize("text", ["24 bananas", "", "GB", "-1GB"])
def test_no_budget_is_guessed(text):
    """What is no number of bytes is refused."""
    with pytest.raises(PeftkitError, match="budget"):
        nbytes_of(text)


@pytest.mark.parametrize("needs", [
    lambda n: 1000 + 7 * n,
    lambda n: 1000 + n * n,
    lambda n: max(5000, 100 * n),
    lambda n: 10**9,
    lambda n: 100 * 2 ** (n // 10),
])  # fmt: skip
def test_the_largest_is_found_in_few_tries(needs):
    """Whatever the growth, and with its successor, which does not fit, tried as well."""
    for room in (999, 1001, 5000, 20_000, 1_000_000):
        tried = []

        def needed(n, tried=tried):
            tried.append(n)
            return needs(n)

        found = _most_within(needed, room)
        assert found == next(n for n in range(10**6) if needs(n + 1) > room)
        assert found + 1 in tried
        assert len(tried) == len(set(tried)) <= 40


def test_the_largest_batch_and_sequence_are_at_the_edge():
    """One more does not fit."""
    for over, dim in (("batch", 0), ("sequence", 1)):
        found = largest(Attention, "lora", {"x": ((1, 16, 64), FLOAT)}, "3MB", over, targets="**", device="cpu")
        shape = [1, 16, 64]
        shape[dim] = found.size + 1
        beyond = peftkit.estimate(Attention, "lora", (tuple(shape), FLOAT), targets="**", device="cpu")
        assert found.size > 1
        assert found.estimate.peak <= 3_000_000 < found.beyond.peak == beyond.peak
        assert str(found).startswith(f"largest {over} in 3.0 MB: {found.size}")


def test_it_is_said_when_nothing_or_everything_fits():
    """No batch at all, or no bound."""
    none = largest(mlp, "lora", ((1, 64), FLOAT), "10kB", device="cpu")
    assert (none.size, none.estimate) == (0, None)
    assert "not even" in str(none)
    with pytest.raises(PeftkitError, match="does not depend"):
        largest(mlp, "lora", lambda batch: ((1, 64), FLOAT), "10MB", device="cpu")


def test_inputs_are_scaled_in_the_dimension_that_is_meant():
    """A mask of another length stays, and one tensor that stands twice stays one."""
    ids = torch.zeros(2, 16, dtype=LONG)
    made = scaled(
        {"ids": ids, "labels": ids, "classes": ((2,), LONG), "table": [((5, 16), FLOAT)], "flag": True}, "sequence", 9
    )
    assert made == {
        "ids": ((2, 9), LONG),
        "labels": ((2, 9), LONG),
        "classes": ((2,), LONG),
        "table": [((5, 9), FLOAT)],
        "flag": True,
    }
    assert made["ids"] is made["labels"]
    assert scaled({"ids": ids, "classes": ((2,), LONG)}, "batch", 7)["classes"] == ((7,), LONG)
    with pytest.raises(PeftkitError, match="no input has a dimension 1"):
        scaled(((2,), LONG), "sequence", 4)


def test_which_methods_fit_is_a_table_with_reasons():
    """Those that fit first, then those that don't, then those that cannot be run."""
    found = which_fit(
        mlp, ["frozen", "full", peftkit.LoRA(rank=2), "loar"], ((8, 64), FLOAT), budget=300_000, device="cpu"
    )
    assert [(row.method, row.fits) for row in found.rows] == [
        ("frozen", True), ("lora(rank=2)", True), ("full", False), ("loar", False),
    ]  # fmt: skip
    assert "did you mean 'lora'" in found.rows[-1].error
    assert found.rows[-1].estimate is None
    assert "did you mean" in str(found)
    assert json.loads(json.dumps(found.to_json()))["rows"][0]["estimate"]["method"] == "frozen"


def test_every_installed_method_has_a_row():
    """With an estimate, or with the reason for which it has none."""
    found = which_fit(mlp, None, ((2, 64), FLOAT))
    assert {row.method.partition("(")[0] for row in found.rows} == {info.name for info in peftkit.methods()}
    assert all(bool(row.error) == (row.estimate is None) for row in found.rows)


# ---------------------------------------------------------------------------------------------- the command


@pytest.fixture
def command(tmp_path, monkeypatch):
    """The command line, in a folder with a module of factories and a configuration of transformers."""
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    from peftkit.cli.app import app

    (tmp_path / "memory_models.py").write_text(
        textwrap.dedent("""
        import torch
        from torch import nn

        def net():
            return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 4))

        def pair():
            return net(), ((1, 64), torch.float32)
        """)
    )
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64,
    }  # fmt: skip
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text(json.dumps(config))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield lambda *args: CliRunner().invoke(app, ["estimate", *args])
    sys.modules.pop("memory_models", None)


def test_the_command_says_what_the_library_says(command):
    """As a table and as JSON, with a batch size of its own."""
    wanted = peftkit.estimate(mlp, "lora", ((32, 64), FLOAT), rank=4, device="cpu")
    args = ["memory_models:pair", "--rank", "4", "--batch", "32", "--device", "cpu"]
    assert command(*args).output.splitlines()[:-2] == str(wanted).splitlines()[:-2]
    said = json.loads(command(*args, "--json").output)
    assert said["peak"] == wanted.peak
    assert said["version"] == 1


def test_the_command_finds_what_fits(command):
    """The largest batch, and the methods."""
    said = json.loads(
        command("memory_models:pair", "--fit", "batch", "--budget", "1MB", "--device", "cpu", "--json").output
    )
    assert said["size"] == largest(mlp, "lora", ((1, 64), FLOAT), "1MB", device="cpu").size > 1
    said = json.loads(command("memory_models:pair", "--methods", "lora,frozen", "--device", "cpu", "--json").output)
    assert [row["method"] for row in said["rows"]] == ["frozen", "lora"]


def test_the_command_makes_inputs_for_a_configuration(command):
    """Tokens and a label for each, as a causal language model takes them."""
    pytest.importorskip("transformers")
    result = command("hf:llama", "--batch", "2", "--sequence", "10", "--device", "cpu", "--json")
    assert result.exit_code == 0, result.output
    small, large = (
        json.loads(command("hf:llama", "--batch", n, "--device", "cpu", "--json").output)["peak"] for n in "12"
    )
    assert small < large
    assert (
        "log_softmax" in json.loads(result.output)["largest"] or json.loads(result.output)["at_peak"]["activations"] > 0
    )


@pytest.mark.parametrize("args, words", [
    (["memory_models:net"], "pair of the model and its inputs"),
    (["memory_models:pair", "--dtype", "float8"], "--dtype takes"),
    (["memory_models:pair", "--fit", "depth"], "--fit takes batch or sequence"),
    (["memory_models:pair", "--fit", "batch", "--methods", "all"], "give one of them"),
    (["memory_models:pair", "--methods", "all", "--rank", "4"], "leave out --set and --rank"),
    (["memory_models:pair", "--budget", "lots"], "budget"),
    (["memory_models:pair", "--attention", "flush"], "did you mean 'flash'"),
])  # fmt: skip
def test_the_command_refuses_in_one_line(command, args, words):
    """With exit code 2."""
    result = command(*args)
    assert result.exit_code == 2
    assert words in result.output


# ----------------------------------------------------------------------------------------------- a large one


@pytest.mark.slow
def test_llama_3_8b_is_estimated_within_a_gigabyte():
    """The process with torch and transformers in it; the frozen weights alone would be sixteen."""
    pytest.importorskip("transformers")
    code = """
import resource, torch, transformers, peftkit
config = transformers.LlamaConfig(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                                  num_attention_heads=32, num_key_value_heads=8)
ids = torch.zeros(4, 4096, dtype=torch.long, device="meta")
found = peftkit.estimate(lambda: transformers.LlamaForCausalLM(config), "lora", {"input_ids": ids, "labels": ids},
                         dtype=torch.bfloat16, rank=16)
print(found.at_peak["frozen"], found.peak, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    frozen, peak, used = map(int, done.stdout.split())
    assert frozen == 2 * 8_030_261_248
    assert peak > 130e9
    assert used < 1e9
