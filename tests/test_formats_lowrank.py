"""The formats of other LoRA libraries, both ways. Where the library installs, it is the oracle; else the definition is."""

import copy
import json
import math
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import peftkit
from peftkit import errors

FORMATS = ("kohya", "loralib", "diffusers", "mlx")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The tensors here are so small that torch's threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Net(nn.Module):
    """Linear layers below each other, whose paths have both dots and underscores."""

    def __init__(self):
        super().__init__()
        self.to_in = nn.Linear(6, 8)
        self.blocks = nn.ModuleList(nn.ModuleDict({"to_q": nn.Linear(8, 8), "ff": nn.Linear(8, 8)}) for _ in range(2))

    def forward(self, x):
        x = self.to_in(x)
        for block in self.blocks:
            x = x + block["ff"](block["to_q"](x).tanh())
        return x


class CNN(nn.Module):
    """Convolutions of three sorts before a linear layer."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.point = nn.Conv2d(4, 5, 1)
        self.line = nn.Conv1d(5, 6, 3)
        self.fc = nn.Linear(6, 2)

    def forward(self, x):
        x = self.point(self.conv(x).tanh()).flatten(2)
        return self.fc(self.line(x).mean(-1))


class Embedded(nn.Module):
    """An embedding before a linear layer."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 6)
        self.fc = nn.Linear(6, 4)

    def forward(self, x):
        return self.fc(self.embed(x))


INPUTS = {Net: lambda: torch.randn(5, 6), CNN: lambda: torch.randn(2, 3, 6, 6), Embedded: lambda: torch.arange(10)}
RULES = {
    Net: {"to_in": peftkit.LoRA(rank=3, alpha=5.0), "to_q": peftkit.LoRA(rank=4, alpha=8.0, rank_stabilized=True), "ff": peftkit.LoRA(rank=4, alpha=-2.0)},
    CNN: {"conv": peftkit.LoRA(rank=2, alpha=3.0), "point": peftkit.LoRA(rank=3), "line": peftkit.LoRA(rank=2), "fc": peftkit.LoRA(rank=2)},
    Embedded: {"**": peftkit.LoRA(rank=3, alpha=5.0)},
}  # fmt: skip


def base_of(build):
    torch.manual_seed(0)
    return build().eval()


def adapted(build, rules=None, dtype=torch.float32):
    """The base with an adapter of random values."""
    model = peftkit.wrap(base_of(build).to(dtype), rules or RULES[build])
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape) / 2)
    return model


@torch.no_grad()
def run(model, build):
    torch.manual_seed(2)
    x = INPUTS[build]()
    return model(x.to(next(model.parameters()).dtype) if x.is_floating_point() else x)


def close(actual, expected, tolerance=1e-5):
    error, size = (actual - expected).abs().max().item(), expected.abs().max().item()
    assert error <= tolerance * size, f"differs by {error:.3g}, where values go up to {size:.3g}"


def saved(model, path, form, **options):
    peftkit.save(model, path, format=form, **options)
    return path


def again(build, path, **options):
    return peftkit.load(base_of(build), path, check_base=False, **options).eval()


def metadata_of(path):
    """What a safetensors file's header says of itself."""
    data = Path(path).read_bytes()
    return json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]]).get("__metadata__")


def edited(path, change):
    """The file with its tensors changed by a function; its metadata stay."""
    metadata = metadata_of(path)
    tensors = load_file(path)
    change(tensors)
    save_file({key: t.contiguous() for key, t in tensors.items()}, path, metadata)
    return path


# ------------------------------------------------------------------------------------------------ both ways


@pytest.mark.parametrize(
    "form, build",
    [(f, Net) for f in FORMATS] + [("kohya", CNN), ("diffusers", CNN), ("loralib", Embedded), ("mlx", Embedded)],
)
def test_what_is_saved_is_loaded_as_the_same_adapter(form, build, tmp_path):
    """Ranks, scales and signs that differ between layers come back as the same outputs; so does what is saved again."""
    model = adapted(build)
    path = saved(model, tmp_path / "one", form)
    loaded = again(build, path)
    close(run(loaded, build), run(model, build))
    assert (run(loaded, build) - run(base_of(build), build)).abs().max() > 0.01
    close(run(again(build, saved(loaded, tmp_path / "two", form)), build), run(model, build))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal"])
def test_a_start_that_is_subtracted_is_one_more_product(form, init, tmp_path):
    """An adapter with a start of its own is written as plain factors of the sum of both ranks."""
    model = adapted(Net, {"to_q": peftkit.LoRA(rank=2, init=init)})
    loaded = again(Net, saved(model, tmp_path / "file", form))
    close(run(loaded, Net), run(model, Net))
    assert "rank=4" in str(peftkit.summary(loaded).adapters[0].methods)


@pytest.mark.parametrize("form", FORMATS)
def test_half_precision_stays_half_in_the_file_and_is_widened_when_read(form, tmp_path):
    """A bfloat16 adapter is read as float32 with the same values, but for the scale's rounding."""
    model = adapted(Net, {"to_q": peftkit.LoRA(rank=4, alpha=8.0)})
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.bfloat16()
    path = saved(model, tmp_path / "file", form)
    file = path / "adapters.safetensors" if path.is_dir() else path
    assert {t.dtype for t in load_file(file).values() if t.dim()} == {torch.bfloat16}
    loaded = again(Net, path)
    assert {p.dtype for p in peftkit.state_dict(loaded).values()} == {torch.float32}
    close(run(loaded, Net), run(model.float(), Net), 1e-2)


def test_factors_that_are_trained_further_start_from_the_file(tmp_path):
    """`trainable=True` works for them as for any file."""
    model = adapted(Net)
    loaded = again(Net, saved(model, tmp_path / "file", "kohya"), trainable=True)
    run_grad = loaded(torch.randn(3, 6)).square().mean()
    run_grad.backward()
    grads = [p.grad for p in loaded.parameters() if p.requires_grad]
    assert len(grads) == 10
    assert all(g is not None and g.any() for g in grads)


# ------------------------------------------------------------------------------------------------ scale conventions


def test_kohya_has_an_alpha_for_each_layer(tmp_path):
    """alpha / rank is the scale in each layer's own numbers, whatever the method made the scale from."""
    state = load_file(saved(adapted(Net), tmp_path / "file.safetensors", "kohya", part="lora_unet"))
    assert state["lora_unet_to_in.alpha"] == 5
    assert state["lora_unet_blocks_0_to_q.alpha"] == 16  # 8 / sqrt(4) × 4
    assert state["lora_unet_blocks_1_ff.alpha"] == -2
    assert state["lora_unet_to_in.alpha"].shape == ()
    assert state["lora_unet_to_in.lora_down.weight"].shape == (3, 6)
    assert state["lora_unet_to_in.lora_up.weight"].shape == (8, 3)


@pytest.mark.parametrize("alpha", [None, 0.0])
def test_kohya_without_an_alpha_has_a_scale_of_1(alpha, tmp_path):
    """No alpha, or one of 0, is the rank."""
    path = saved(adapted(Net), tmp_path / "file", "kohya")

    def change(tensors):
        for key in [key for key in tensors if key.endswith(".alpha")]:
            del tensors[key]
            if alpha is not None:
                tensors[key] = torch.tensor(alpha)

    loaded = again(Net, edited(path, change))
    methods = {m.scale for m in (p.method for p in _placements(loaded))}
    assert methods == {1.0}


def _placements(model):
    from peftkit.installed import installed

    return installed(model).placements("default")


def test_loralib_has_one_alpha_and_it_stands_in_the_metadata(tmp_path):
    """The most frequent alpha; what differs is in lora_B. The metadata say it, and a file of others must be told."""
    model = adapted(Net, {"to_in": peftkit.LoRA(rank=3, alpha=5.0), "{to_q,ff}": peftkit.LoRA(rank=4, alpha=8.0)})
    path = saved(model, tmp_path / "file", "loralib")
    state, own = load_file(path), peftkit.state_dict(model)
    assert torch.equal(state["blocks.0.ff.lora_B"], own["blocks.0.ff.weight.up"])
    close(state["to_in.lora_B"], own["to_in.weight.up"] * 5 / 8)
    save_file(state, tmp_path / "theirs.safetensors")
    with pytest.raises(errors.FormatError, match="alpha="):
        again(Net, tmp_path / "theirs.safetensors")
    close(run(again(Net, tmp_path / "theirs.safetensors", alpha=8.0), Net), run(model, Net))
    with pytest.raises(errors.FormatError, match="says that its alpha is 8, and alpha=7"):
        again(Net, path, alpha=7.0)


def test_diffusers_files_have_a_scale_of_1_and_one_rank(tmp_path):
    """So that versions that know of no alpha, and those that take one rank for all, compute the same."""
    state = load_file(saved(adapted(Net), tmp_path / "file", "diffusers", part="unet"))
    assert {key.partition(".")[0] for key in state} == {"unet"}
    assert {t.shape[0] for key, t in state.items() if "lora_A" in key} == {4}
    own = peftkit.state_dict(adapted(Net))
    close(state["unet.blocks.0.to_q.lora_B.weight"], own["blocks.0.to_q.weight.up"] * 4)


def test_mlx_has_one_scale_and_transposed_factors(tmp_path):
    """`y + scale * ((x @ lora_a) @ lora_b)` is the layer, by MLX's definition."""
    model = adapted(Net)
    folder = saved(model, tmp_path / "folder", "mlx")
    config = json.loads((folder / "adapter_config.json").read_text())
    state = load_file(folder / "adapters.safetensors")
    parameters = config["lora_parameters"]
    assert parameters["rank"] == 4
    assert parameters["keys"] == ["blocks.0.ff", "blocks.0.to_q", "blocks.1.ff", "blocks.1.to_q", "to_in"]
    base, x = base_of(Net), torch.randn(3, 6)
    with torch.no_grad():
        theirs = base.to_in(x) + parameters["scale"] * ((x @ state["to_in.lora_a"]) @ state["to_in.lora_b"])
        close(theirs, model.to_in(x))


# ------------------------------------------------------------------------------------------------ older and other names


def test_diffusers_older_names_are_read(tmp_path):
    """`.lora.down`, an attention processor's names, and an alpha beside them."""
    model = adapted(Net, {"to_q": peftkit.LoRA(rank=4, alpha=8.0), "ff": peftkit.LoRA(rank=4, alpha=4.0)})
    own, state = peftkit.state_dict(model), {}
    for i in range(2):
        state[f"unet.blocks.{i}.processor.to_q_lora.down.weight"] = own[f"blocks.{i}.to_q.weight.down"]
        state[f"unet.blocks.{i}.processor.to_q_lora.up.weight"] = own[f"blocks.{i}.to_q.weight.up"] * 2
        state[f"unet.blocks.{i}.ff.lora.down.weight"] = own[f"blocks.{i}.ff.weight.down"]
        state[f"unet.blocks.{i}.ff.lora.up.weight"] = own[f"blocks.{i}.ff.weight.up"] / 2
        state[f"unet.blocks.{i}.ff.alpha"] = torch.tensor(8.0)
    save_file(state, tmp_path / "file.safetensors")
    close(run(again(Net, tmp_path / "file.safetensors"), Net), run(model, Net))


def test_diffusers_metadata_say_the_alphas(tmp_path):
    """The configuration in the metadata, for each part, with its patterns."""
    model = adapted(
        Net,
        {
            "to_in": peftkit.LoRA(rank=4, alpha=3.0, rank_stabilized=True),
            "ff": peftkit.LoRA(rank=4, alpha=8.0, rank_stabilized=True),
        },
    )
    own, names = peftkit.state_dict(model), {"down": "lora_A", "up": "lora_B"}
    state = {}
    for key, tensor in own.items():
        path, _, name = key.rpartition(".")
        state[f"unet.{path.removesuffix('.weight')}.{names[name]}.weight"] = tensor
    config = {"r": 4, "lora_alpha": 8, "alpha_pattern": {"to_in": 3}, "use_rslora": True, "target_modules": ["ff"]}
    metadata = {"lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in config.items()})}
    save_file(state, tmp_path / "file.safetensors", metadata)
    close(run(again(Net, tmp_path / "file.safetensors"), Net), run(model, Net))
    metadata["lora_adapter_metadata"] = json.dumps({"unet.r": 4, "unet.lora_alpha": 8, "unet.use_dora": True})
    save_file(state, tmp_path / "file.safetensors", metadata)
    with pytest.raises(errors.FormatError, match="use_dora=True"):
        again(Net, tmp_path / "file.safetensors")


def test_a_file_for_several_models_is_read_part_by_part(tmp_path):
    """`part` chooses; without it the parts are named, and none is taken by guess."""
    for form, parts, dot in (("kohya", ("lora_unet", "lora_te"), "_"), ("diffusers", ("unet", "text_encoder"), ".")):
        model, other = adapted(Net), adapted(CNN)
        path = saved(model, tmp_path / "one", form, part=parts[0])
        state = load_file(path) | load_file(saved(other, tmp_path / "two", form, part=parts[1]))
        save_file(state, tmp_path / "both.safetensors")
        with pytest.raises(errors.FormatError, match=f"{'.*'.join(sorted(parts))}.*part="):
            again(Net, tmp_path / "both.safetensors")
        close(run(again(Net, tmp_path / "both.safetensors", part=parts[0]), Net), run(model, Net))
        close(run(again(CNN, tmp_path / "both.safetensors", part=parts[1]), CNN), run(other, CNN))
        with pytest.raises(errors.FormatError, match=f"begins with nothing{'[.]' if dot == '.' else dot}"):
            again(Net, tmp_path / "both.safetensors", part="nothing")


# ------------------------------------------------------------------------------------------------ what cannot be held


def scaled():
    return pytest.importorskip("peftkit_dora.dora").DoRA(rank=2)


REFUSED = {
    "another method beside it": (Net, {"to_q": peftkit.LoRA(rank=2), "ff": peftkit.Full(keep_base=True)}, FORMATS, "full.*ff"),
    "a weight trained in place": (Net, {"to_q": peftkit.LoRA(rank=2), "ff": "full"}, FORMATS, "full.*ff"),
    "a gain": (Net, lambda: {"to_q": scaled()}, FORMATS, "dora.*to_q"),
    "an embedding": (Embedded, {"embed": peftkit.LoRA(rank=2)}, ("kohya", "diffusers"), "embed.weight.*Embedding"),
    "a convolution": (CNN, {"conv": peftkit.LoRA(rank=2)}, ("mlx",), "conv.weight.*Conv2d"),
    "a convolution of one dimension": (CNN, {"line": peftkit.LoRA(rank=2)}, ("loralib", "mlx"), "line.weight.*Conv1d"),
    "a convolution with groups": (lambda: nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), {"0": peftkit.LoRA(rank=2)}, ("kohya", "diffusers", "loralib"), "groups"),
    "a dilated convolution": (lambda: nn.Sequential(nn.Conv2d(4, 4, 3, dilation=2)), {"0": peftkit.LoRA(rank=2)}, ("kohya", "diffusers", "loralib"), "dilation"),
    "a recurrent layer": (lambda: nn.Sequential(nn.LSTM(4, 4)), {"0": peftkit.LoRA(rank=2)}, FORMATS, "LSTM"),
    "attention's output projection": (lambda: nn.Sequential(nn.MultiheadAttention(4, 2)), {"0.out_proj": peftkit.LoRA(rank=2)}, FORMATS, "never"),
    "a single layer": (lambda: nn.Linear(4, 4), {nn.Linear: peftkit.LoRA(rank=2)}, ("kohya", "diffusers", "mlx"), "single layer"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_format_cannot_hold_is_an_error_that_names_it(what, tmp_path):
    """And nothing is written."""
    build, rules, forms, match = REFUSED[what]
    model = peftkit.wrap(base_of(build), rules() if callable(rules) else rules)
    for form in forms:
        with pytest.raises(errors.FileError, match=match):
            peftkit.save(model, tmp_path / "file", format=form)
    assert not list(tmp_path.iterdir())


def test_a_tied_weight_is_refused(tmp_path):
    """Its readers would adapt the other layer too, or take the two apart."""
    model = Embedded()
    model.head = nn.Linear(6, 10, bias=False)
    model.head.weight = model.embed.weight
    peftkit.wrap(model, {"head": peftkit.LoRA(rank=2)})
    for form in FORMATS:
        with pytest.raises(errors.FileError, match=r"head\.weight.*one weight"):
            peftkit.save(model, tmp_path / "file", format=form)


def test_paths_that_kohya_cannot_tell_apart_are_refused(tmp_path):
    """`a.b_c` and `a_b.c` have one name there, for writing and for reading."""
    model = nn.Module()
    model.a, model.a_b = nn.ModuleDict({"b_c": nn.Linear(3, 3)}), nn.ModuleDict({"c": nn.Linear(3, 3)})
    peftkit.wrap(copy.deepcopy(model), {"b_c": peftkit.LoRA(rank=2)})
    with pytest.raises(errors.FileError, match=r"a\.b_c and a_b\.c"):
        peftkit.save(
            peftkit.wrap(copy.deepcopy(model), {"b_c": peftkit.LoRA(rank=2)}), tmp_path / "file", format="kohya"
        )
    save_file(
        {"lycoris_a_b_c.lora_down.weight": torch.ones(2, 3), "lycoris_a_b_c.lora_up.weight": torch.ones(3, 2)},
        tmp_path / "file",
    )
    with pytest.raises(errors.BaseMismatchError, match=r"a\.b_c and a_b\.c"):
        peftkit.load(model, tmp_path / "file")


@pytest.mark.parametrize("form", FORMATS)
def test_values_that_are_not_finite_are_not_written(form, tmp_path):
    """The layer is named."""
    model = adapted(Net)
    model.to_in.adapters["default"]["weight"].up.data[0, 0] = math.nan
    with pytest.raises(errors.FileError, match=r"to_in.*not finite"):
        peftkit.save(model, tmp_path / "file", format=form)


def test_options_are_refused_where_they_mean_nothing(tmp_path):
    """`part` and `alpha` are for some formats."""
    model = adapted(Net)
    for form in ("peftkit", "hf", "vllm", "loralib", "mlx"):
        with pytest.raises(errors.FileError, match="part="):
            peftkit.save(model, tmp_path / "file", format=form, part="unet")
    for form in ("peftkit", "hf", "kohya", "diffusers", "mlx"):
        path = saved(model if form != "hf" else adapted(Net, {"ff": peftkit.LoRA(rank=2)}), tmp_path / form, form)
        with pytest.raises(errors.FileError, match="alpha="):
            again(Net, path, alpha=2.0)


# ------------------------------------------------------------------------------------------------ what is not read


def rename(old, new):
    def change(tensors):
        key = next(key for key in tensors if old in key)
        tensors[key.replace(old, new)] = tensors.pop(key)

    return change


def drop(word):
    return lambda tensors: tensors.pop(next(key for key in tensors if word in key))


def put(word, value):
    return lambda tensors: tensors.update({next(key for key in tensors if word in key): value})


DAMAGED = {
    "kohya, a factor missing": ("kohya", drop("lora_up"), errors.FormatError, "lacks.*up"),
    "kohya, another of its methods": ("kohya", rename("lora_up.weight", "hada_w1_a"), errors.FormatError, "hada_w1_a"),
    "kohya, a layer that is not there": ("kohya", lambda t: [rename("to_in", "to_inn")(t) for _ in range(3)], errors.BaseMismatchError, "to_inn"),
    "kohya, an alpha that is no number": ("kohya", put("alpha", torch.ones(2)), errors.FormatError, "one number"),
    "kohya, an unknown beginning": ("kohya", rename("lycoris_to_in", "xyz_to_in"), errors.FormatError, "xyz_to_in"),
    "kohya, another shape": ("kohya", put("to_in.lora_down", torch.ones(3, 7)), errors.BaseMismatchError, "another base"),
    "kohya, ranks that differ": ("kohya", put("to_in.lora_down", torch.ones(4, 6)), errors.BaseMismatchError, "another base"),
    "kohya, whole numbers": ("kohya", put("to_in.lora_down", torch.ones(3, 6, dtype=torch.int32)), errors.FormatError, "floats"),
    "kohya, infinite": ("kohya", put("to_in.lora_down", torch.full((3, 6), math.inf)), errors.FormatError, "not finite"),
    "loralib, a factor missing": ("loralib", drop("lora_A"), errors.FormatError, "lacks.*down"),
    "loralib, a bias": ("loralib", lambda t: t.update({"to_in.bias": torch.ones(8)}), errors.FormatError, r"to_in\.bias"),
    "loralib, a layer that is not there": ("loralib", lambda t: [rename("to_in", "to_inn")(t) for _ in range(2)], errors.BaseMismatchError, "to_in'"),
    "diffusers, a magnitude": ("diffusers", rename("lora_B.weight", "lora_magnitude_vector"), errors.FormatError, "lora_magnitude_vector"),
    "diffusers, a factor missing": ("diffusers", drop("lora_A"), errors.FormatError, "lacks.*down"),
    "diffusers, another shape": ("diffusers", put("to_in.lora_A", torch.ones(4, 7)), errors.BaseMismatchError, "another base"),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGED)
def test_a_file_that_is_not_right_is_refused_and_the_model_left_alone(what, tmp_path):
    """Each fault is named, and the model is as it was."""
    form, change, error, match = DAMAGED[what]
    path = edited(saved(adapted(Net), tmp_path / "file", form), change)
    base = base_of(Net)
    with pytest.raises(error, match=match):
        peftkit.load(base, path)
    assert not [name for name, _ in base.named_parameters() if "adapters" in name]
    assert type(base.to_in) is nn.Linear


MLX_CONFIG = {
    "dora": (lambda c: c.update(fine_tune_type="dora"), "fine_tune_type='dora'"),
    "no parameters": (lambda c: c.pop("lora_parameters"), "no lora_parameters"),
    "an alpha": (lambda c: c["lora_parameters"].update(alpha=16.0), "alpha=16.0"),
    "no scale": (lambda c: c["lora_parameters"].pop("scale"), "scale=None"),
    "a scale that is no number": (lambda c: c["lora_parameters"].update(scale=True), "scale=True"),
}


@pytest.mark.parametrize("what", MLX_CONFIG)
def test_an_mlx_configuration_that_is_not_understood_is_refused(what, tmp_path):
    """Whatever may mean another scale or method is an error that names it."""
    folder = saved(adapted(Net), tmp_path / "folder", "mlx")
    change, match = MLX_CONFIG[what]
    config = json.loads((folder / "adapter_config.json").read_text())
    change(config)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(errors.FormatError, match=match):
        again(Net, folder)


def test_mlx_stacks_of_experts_are_refused(tmp_path):
    """A factor of three dimensions is named."""
    folder = saved(adapted(Net), tmp_path / "folder", "mlx")
    edited(folder / "adapters.safetensors", put("to_in.lora_a", torch.ones(2, 3, 4)))
    with pytest.raises(errors.FormatError, match=r"to_in\.lora_a.*experts"):
        again(Net, folder)


def test_a_pickle_is_never_opened(tmp_path):
    """What loralib and kohya's early programs save is refused, with the way out."""
    torch.save({"to_in.lora_A": torch.ones(2, 6)}, tmp_path / "lora.pt")
    with pytest.raises(errors.FormatError, match=r"pickle.*save_file"):
        again(Net, tmp_path / "lora.pt")


def test_no_pickle_function_is_called(tmp_path, monkeypatch):
    """Reading any of the formats unpickles nothing."""
    import pickle

    paths = [saved(adapted(Net), tmp_path / form, form) for form in FORMATS]

    def never(*args, **kwargs):
        raise AssertionError("unpickled")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, never)
    for path in paths:
        again(Net, path)


@pytest.mark.parametrize("form", ["kohya", "loralib", "diffusers"])
def test_a_file_cut_short_is_refused(form, tmp_path):
    """Anywhere."""
    path = saved(adapted(Net), tmp_path / "file", form)
    whole = path.read_bytes()
    for end in (0, 5, 8, 40, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:end])
        with pytest.raises(errors.FileError):
            again(Net, path)


def test_a_header_that_claims_more_than_there_is_allocates_nothing(tmp_path):
    """A tensor of a terabyte in a file of some bytes."""
    header = json.dumps(
        {"lycoris_a.lora_down.weight": {"dtype": "F32", "shape": [2**19, 2**19], "data_offsets": [0, 2**40]}}
    ).encode()
    (tmp_path / "file").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 64)
    with pytest.raises(errors.FormatError):
        again(Net, tmp_path / "file")


# ------------------------------------------------------------------------------------------------ LyCORIS


def lycoris_on(build, path):
    lycoris = pytest.importorskip("lycoris")
    model = base_of(build)
    network, _ = lycoris.create_lycoris_from_weights(1.0, str(path), model)
    network.apply_to()
    return model.eval(), network


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("build", [Net, CNN])
def test_lycoris_computes_what_was_saved(build, tmp_path):
    """Its own reader, on linear layers and convolutions, with ranks and alphas that differ."""
    model = adapted(build)
    path = saved(model, tmp_path / "file.safetensors", "kohya")
    theirs, network = lycoris_on(build, path)
    assert len(network.loras) == len(_placements(model))
    close(run(theirs, build), run(model, build))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [{}, {"rs_lora": True}, {"use_tucker": True}], ids=str)
@pytest.mark.parametrize("build", [Net, CNN])
def test_what_lycoris_saves_is_loaded(build, options, tmp_path):
    """Plain, rank-stabilised, and with the kernel between two projections."""
    lycoris = pytest.importorskip("lycoris")
    theirs = base_of(build)
    lycoris.LycorisNetwork.apply_preset({"target_module": ["Linear", "Conv1d", "Conv2d"]})
    network = lycoris.create_lycoris(
        theirs, 1.0, linear_dim=3, linear_alpha=2.0, conv_dim=2, conv_alpha=3.0, algo="lora", **options
    )
    network.apply_to()
    torch.manual_seed(1)
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(torch.randn(p.shape) / 2)
    path = tmp_path / "file.safetensors"
    network.save_weights(str(path), torch.float32, {"made": "here"})
    close(run(again(build, path), build), run(theirs.eval(), build))


# ------------------------------------------------------------------------------------------------ loralib


def loralib_net(alpha, ranks):
    lora = pytest.importorskip("loralib")
    model = base_of(Net)
    for path, r in ranks.items():
        parent, _, name = path.rpartition(".")
        old = model.get_submodule(path)
        made = lora.Linear(old.in_features, old.out_features, r=r, lora_alpha=alpha, merge_weights=False)
        made.load_state_dict(old.state_dict(), strict=False)
        holder = model.get_submodule(parent)
        if isinstance(holder, nn.ModuleDict):
            holder[name] = made
        else:
            setattr(holder, name, made)
    return model.eval()


def test_loralib_computes_what_was_saved(tmp_path):
    """Its layers, made with the alpha that the metadata say and the ranks of the file."""
    model = adapted(Net)
    state = load_file(saved(model, tmp_path / "file", "loralib"))
    ranks = {key.removesuffix(".lora_A"): t.shape[0] for key, t in state.items() if key.endswith("lora_A")}
    theirs = loralib_net(float(metadata_of(tmp_path / "file")["lora_alpha"]), ranks)
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected
    assert not [key for key in missing if "lora" in key]
    close(run(theirs, Net), run(model, Net))


def test_what_loralib_has_trained_is_loaded(tmp_path):
    """`lora_state_dict` in a safetensors file, with the alpha said."""
    lora = pytest.importorskip("loralib")
    theirs = loralib_net(6.0, {"to_in": 2, "blocks.1.ff": 3})
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn(p.shape) / 2)
    save_file(lora.lora_state_dict(theirs), tmp_path / "file.safetensors")
    close(run(again(Net, tmp_path / "file.safetensors", alpha=6.0), Net), run(theirs, Net))


@torch.no_grad()
def trained(layer, state):
    torch.manual_seed(1)
    for name, p in layer.named_parameters():
        if "lora_" in name:
            p.copy_(torch.randn(p.shape) / 2)
            state[f"0.{name}"] = p.detach().clone()
    return layer


def test_loralib_embeddings_go_both_ways(tmp_path):
    """One layer, as their program makes it."""
    lora = pytest.importorskip("loralib")
    base, state = nn.Sequential(nn.Embedding(9, 5)), {}
    theirs = trained(lora.Embedding(9, 5, r=2, lora_alpha=3, merge_weights=False), state)
    theirs.load_state_dict(base[0].state_dict(), strict=False)
    save_file(state, tmp_path / "file")
    ours = peftkit.load(base, tmp_path / "file", alpha=3.0)
    close(ours(torch.arange(9)), theirs(torch.arange(9)))
    assert {k: v.tolist() for k, v in load_file(saved(ours, tmp_path / "again", "loralib")).items()} == {
        k: v.tolist() for k, v in state.items()
    }


def test_loralib_convolutions_go_both_ways(tmp_path):
    """Theirs have factors of rank × kernel for a kernel in rows; what is read has the same product."""
    lora = pytest.importorskip("loralib")
    base, state, x = nn.Sequential(nn.Conv2d(3, 4, 3)), {}, torch.randn(2, 3, 6, 6)
    theirs = trained(lora.Conv2d(3, 4, 3, r=2, lora_alpha=3, merge_weights=False), state)
    theirs.conv.load_state_dict(base[0].state_dict())
    save_file(state, tmp_path / "file")
    ours = peftkit.load(copy.deepcopy(base), tmp_path / "file", alpha=3.0)
    close(ours(x), theirs(x))
    mine = peftkit.wrap(copy.deepcopy(base), {"0": peftkit.LoRA(rank=2, alpha=3.0)})
    nn.init.normal_(mine[0].adapters["default"]["weight"].up)
    made = load_file(saved(mine, tmp_path / "mine", "loralib"))
    theirs.load_state_dict({key.removeprefix("0."): value for key, value in made.items()}, strict=False)
    close(mine(x), theirs(x))
    back = peftkit.load(copy.deepcopy(base), tmp_path / "mine")
    assert peftkit.state_dict(back)["0.weight.down"].shape == (2, 27)
    close(back(x), mine(x))


def test_loralib_merged_layers_are_read_if_every_part_is_adapted(tmp_path):
    """Three projections in one: each has its own factors; which of them, if not all, is not in the file."""
    lora = pytest.importorskip("loralib")
    base, x = nn.Sequential(nn.Linear(4, 12)), torch.randn(5, 4)
    for enabled in ([True] * 3, [True, False, True]):
        state = {}
        theirs = trained(lora.MergedLinear(4, 12, r=2, lora_alpha=3, enable_lora=enabled, merge_weights=False), state)
        theirs.load_state_dict(base[0].state_dict(), strict=False)
        save_file(state, tmp_path / "file")
        if all(enabled):
            delta = (theirs.merge_AB() * theirs.scaling).detach()
            close(peftkit.load(copy.deepcopy(base), tmp_path / "file", alpha=3.0)(x), base(x) + x @ delta.T)
        else:
            with pytest.raises(errors.FormatError, match="enable_lora"):
                peftkit.load(copy.deepcopy(base), tmp_path / "file", alpha=3.0)


# ------------------------------------------------------------------------------------------------ recognising


@pytest.mark.parametrize("form", ["peftkit", *FORMATS])
def test_each_format_is_recognised_by_what_is_in_it(form, tmp_path):
    """Never by the file's name."""
    from peftkit.files import format_of

    assert format_of(Path(saved(adapted(Net), tmp_path / "something.bin", form))) == form
