"""Adapter files: exact, strict in both directions, the same bytes for the same adapter, and no harm from a damaged one."""

import copy
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import nn

import peftkit
from peftkit import errors, manifests
from peftkit.finite import find_not_finite
from peftkit.writing import write

RULES = {
    "0": peftkit.LoRA(rank=2, init="pissa"),
    "1": peftkit.LoRA(rank=1, dropout=0.1),
    "{2,3}": peftkit.Full(keep_base=True),
    "4": "full",
}


def make_base(seed=0, width=6):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(width, 6), nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 6, bias=False), nn.Linear(6, 2)
    ).eval()


def make_adapted(seed=0):
    """Wrapped, and moved by a step of every trainable parameter."""
    model = peftkit.wrap(make_base(), RULES, name="task")
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
    return model


@pytest.fixture(scope="module")
def x():
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "task.safetensors"


def test_a_fresh_base_gives_the_same_output_bit_for_bit(path, x):
    """Save, build the base again, load: nothing of the adapter is lost, in-place weights included."""
    model = make_adapted()
    peftkit.save(model, path)
    fresh = peftkit.load(make_base(), path)

    with torch.no_grad():
        assert torch.equal(model(x), fresh(x))
    assert list(peftkit.state_dict(fresh)) == list(peftkit.state_dict(model))
    assert peftkit.summary(fresh).adapters[0].name == "task"


def test_loading_computes_no_initialisation(path, monkeypatch):
    """A PiSSA adapter is restored without a singular value decomposition, and without drawing a random number."""
    peftkit.save(make_adapted(), path)
    base = make_base()
    state = torch.get_rng_state()
    svd = torch.linalg.svd
    devices = []
    monkeypatch.setattr(torch.linalg, "svd", lambda w, **kw: devices.append(w.device.type) or svd(w, **kw))
    peftkit.load(base, path)

    assert devices == ["meta"]
    assert torch.equal(torch.get_rng_state(), state)


def test_same_adapter_same_bytes(tmp_path):
    """One seed, one file: also from another process with another hash seed."""
    code = (
        "import torch, peftkit, sys; from torch import nn; torch.manual_seed(3);"
        "m = peftkit.wrap(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)), {'@linear': 'lora', '@head': 'full'});"
        "peftkit.save(m, sys.argv[1])"
    )
    written = []
    for seed in ("1", "2"):
        target = tmp_path / f"{seed}.safetensors"
        env = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-P", "-c", code, str(target)], check=True, env=env, cwd=tmp_path)
        written.append(target.read_bytes())

    assert written[0] == written[1]


def test_trainable_on_request(path):
    """A loaded adapter is frozen unless it is asked for otherwise; its frozen start factors stay frozen."""
    peftkit.save(make_adapted(), path)

    assert not any(p.requires_grad for p in peftkit.load(make_base(), path).parameters())
    again = peftkit.load(make_base(), path, trainable=True)
    assert peftkit.summary(again).trainable == peftkit.summary(make_adapted()).trainable


def test_a_second_adapter_waits_to_be_activated(tmp_path, x):
    """Loading beside an active adapter changes no output; activating the new one gives its own."""
    rules = {"0": "lora"}
    for name, seed in (("a", 1), ("b", 2)):
        torch.manual_seed(seed)
        peftkit.save(peftkit.wrap(make_base(), rules, name=name), tmp_path / name)
    model = peftkit.load(peftkit.load(make_base(), tmp_path / "a"), tmp_path / "b")

    states = {adapter.name: adapter.active for adapter in peftkit.summary(model).adapters}
    assert states == {"a": True, "b": False}
    peftkit.activate(model, "b")
    with torch.no_grad():
        assert torch.equal(model(x), peftkit.load(make_base(), tmp_path / "b")(x))


def test_load_under_another_name(path):
    """`name=` renames; a name that is taken is refused."""
    peftkit.save(make_adapted(), path)
    model = peftkit.load(make_base(), path, "other")

    assert [a.name for a in peftkit.summary(model).adapters] == ["other"]
    with pytest.raises(errors.StateError, match="'other' already"):
        peftkit.load(model, path, "other")


def test_a_half_precision_copy_of_the_base_is_the_same_base(path):
    """An adapter trained on a float32 base loads onto its bfloat16 copy; its own dtype is kept."""
    peftkit.save(peftkit.wrap(make_base(), "lora"), path)
    model = peftkit.load(make_base().to(torch.bfloat16), path)

    assert peftkit.summary(model).adapters[0].dtypes == ("float32",)


def test_a_merged_model_saves_the_same_file(tmp_path):
    """The base that a file remembers is the original one, also while adapters are merged."""
    model = peftkit.wrap(make_base(), "lora", init="gaussian")
    peftkit.save(model, tmp_path / "before")
    peftkit.save(peftkit.merge(model), tmp_path / "after")

    assert (tmp_path / "before").read_bytes() == (tmp_path / "after").read_bytes()


def test_the_file_is_plain_safetensors(path):
    """Any reader of safetensors finds the tensors, and the manifest as JSON."""
    peftkit.save(make_adapted(), path)
    with safe_open(path, framework="pt") as file:
        keys = set(file.keys())
        sealed = json.loads(file.metadata()["peftkit"])

    assert keys == set(peftkit.state_dict(make_adapted()))
    manifest = sealed["manifest"]
    assert [m["name"] for m in manifest["methods"]] == ["lora", "lora", "full", "full"]
    assert manifest["methods"][0]["fields"]["rank"] == 2
    assert [s["path"] for s in manifest["sites"]] == ["0", "1", "2", "2", "3", "4", "4"]
    assert manifest["methods"][0]["package"] == "peftkit"


def test_the_umask_decides_the_mode(path):
    """The file is as readable as any other that the process writes, and no temporary file stays."""
    old = os.umask(0o027)
    try:
        peftkit.save(make_adapted(), path)
    finally:
        os.umask(old)

    assert path.stat().st_mode & 0o777 == 0o640
    assert os.listdir(path.parent) == [path.name]


# ------------------------------------------------------------------------------------------- refusals


def state_of(model):
    return [(type(m), sorted(m.__dict__)) for m in model.modules()], {
        k: (v.clone(), v.requires_grad) for k, v in model.state_dict(keep_vars=True).items()
    }


def assert_untouched(before, model):
    after = state_of(model)
    assert before[0] == after[0]
    assert before[1].keys() == after[1].keys()
    assert all(torch.equal(before[1][k][0], after[1][k][0]) and before[1][k][1] == after[1][k][1] for k in before[1])


OTHER_BASES = {
    "another width": (lambda: make_base(width=5), "0.weight"),
    "other values": (lambda: make_base(seed=9), "0.weight is|0.weight has"),
    "a layer less": (lambda: make_base()[:4], "'4'"),
    "a layer of another type": (lambda: nn.Sequential(make_base()[0], nn.ReLU(), *make_base()[2:]), "1.weight"),
    "a bias less": (lambda: nn.Sequential(*make_base()[:2], nn.LayerNorm(6, bias=False), *make_base()[3:]), "2.bias"),
}


@pytest.mark.parametrize("case", OTHER_BASES)
def test_the_wrong_base_is_told_apart(path, case):
    """Another base is refused, and the first layer that differs is named."""
    peftkit.save(make_adapted(), path)
    make, words = OTHER_BASES[case]
    model = make()
    before = state_of(model)
    with pytest.raises(errors.BaseMismatchError, match=words):
        peftkit.load(model, path)
    assert_untouched(before, model)


def test_other_values_on_request(path):
    """`check_base=False` takes a base with other values, but not one of another shape."""
    peftkit.save(make_adapted(), path)
    peftkit.load(make_base(seed=9), path, check_base=False)
    with pytest.raises(errors.BaseMismatchError):
        peftkit.load(make_base(width=5), path, check_base=False)


def test_every_truncation_is_refused(path):
    """Cut anywhere, the file is refused, and the model untouched."""
    peftkit.save(peftkit.wrap(make_base(), "lora", rank=1, targets="0"), path)
    data = path.read_bytes()
    model = make_base()
    before = state_of(model)
    for length in range(0, len(data), 7):
        path.write_bytes(data[:length])
        with pytest.raises(errors.FormatError):
            peftkit.load(model, path)
    assert_untouched(before, model)


def test_every_altered_byte_is_refused_or_harmless(path):
    """One bit flipped anywhere: refused, or (in a name's own spelling of the same JSON) the same adapter."""
    source = peftkit.wrap(make_base(), "lora", rank=1, targets="0")
    peftkit.save(source, path)
    data = bytearray(path.read_bytes())
    refused = 0
    for i in range(len(data)):
        data[i] ^= 1 << (i % 8)
        path.write_bytes(data)
        data[i] ^= 1 << (i % 8)
        model = make_base()
        before = state_of(model)
        try:
            peftkit.load(model, path)
        except errors.FileError:
            refused += 1
            assert_untouched(before, model)
        else:
            saved, loaded = peftkit.state_dict(source), peftkit.state_dict(model)
            assert all(torch.equal(saved[k], loaded[k]) for k in saved)
    assert refused > len(data) * 0.99


def rewritten(path, edit):
    """Write the file again with another manifest, properly sealed: what a malicious or mistaken writer could do."""
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        manifest = json.loads(file.metadata()["peftkit"])["manifest"]
    edit(manifest, tensors)
    if "sites" in manifest and all("layer" in s for s in manifest["sites"]):
        manifest["fingerprint"] = manifests.fingerprint(manifest["sites"])
    seal = manifests.digest(json.dumps(manifest, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode())
    sealed = json.dumps({"manifest": manifest, "sha256": seal})
    path.write_bytes(safetensors.torch.save(tensors, {"peftkit": sealed}))


def _nan(manifest, tensors):
    key = "0.weight.up"
    tensors[key][0] = float("nan")
    manifest["tensors"][key] = manifests.tensor_digest(tensors[key])


def _extra(manifest, tensors):
    tensors["0.weight.more"] = torch.zeros(1)
    manifest["tensors"]["0.weight.more"] = manifests.tensor_digest(tensors["0.weight.more"])


def _missing(manifest, tensors):
    del tensors["0.weight.up"], manifest["tensors"]["0.weight.up"]


def _shape(manifest, tensors):
    tensors["0.weight.up"] = tensors["0.weight.up"].T.contiguous()
    manifest["tensors"]["0.weight.up"] = manifests.tensor_digest(tensors["0.weight.up"])


EDITS = {
    "a later format": (lambda m, _: m.update(format=2), errors.FormatError, "format 2"),
    "an unknown method": (lambda m, _: m["methods"][0].update(name="os"), errors.UnknownMethodError, "'os'"),
    "a method that is a path": (
        lambda m, _: m["methods"][0].update(name="../x"),
        errors.UnknownMethodError,
        "installed",
    ),
    "an unknown field": (lambda m, _: m["methods"][0]["fields"].update(evil=1), errors.FormatError, "'evil'"),
    "a missing field": (lambda m, _: m["methods"][0]["fields"].pop("alpha"), errors.FormatError, "'alpha'"),
    "a field's wrong value": (lambda m, _: m["methods"][0]["fields"].update(rank=-1), errors.FormatError, "rank"),
    "a huge rank": (
        lambda m, _: m["methods"][0]["fields"].update(rank=10**9, init="default"),
        errors.FormatError,
        "0.weight",
    ),
    "a site twice": (lambda m, _: m["sites"].append(m["sites"][0]), errors.FormatError, "contradicts"),
    "a site less": (lambda m, _: m["sites"].pop(), errors.FormatError, "no site|nothing|contradicts|place"),
    "a method's number too high": (lambda m, _: m["sites"][0].update(method=9), errors.FormatError, "contradicts"),
    "a site in place that is none": (lambda m, _: m["sites"][0].update(in_place=True), errors.FormatError, "in place"),
    "a number that JSON does not have": (
        lambda m, _: m["methods"][0]["fields"].update(alpha=float("nan")),
        errors.FormatError,
        "damaged",
    ),
    "no sites": (lambda m, _: m.pop("sites"), errors.FormatError, "lacks"),
    "a bad name": (lambda m, _: m.update(name="a.b"), errors.StateError, "a.b"),
    "a value that is not a number": (_nan, errors.FormatError, "0.weight.up.*not finite"),
    "a tensor too many": (_extra, errors.FormatError, "0.weight.more"),
    "a tensor too few": (_missing, errors.FormatError, "0.weight.up"),
    "a tensor of another shape": (_shape, errors.FormatError, "0.weight.up"),
}


@pytest.mark.parametrize("case", EDITS)
def test_a_file_that_lies_is_refused(path, case):
    """Sealed properly, but wrong: each lie is found before the model is touched."""
    edit, error, words = EDITS[case]
    peftkit.save(make_adapted(), path)
    rewritten(path, edit)
    model = make_base()
    before = state_of(model)
    with pytest.raises(error, match=words):
        peftkit.load(model, path)
    assert_untouched(before, model)


def test_a_rewritten_file_that_tells_the_truth_loads(path, x):
    """The guard's own control: rewriting without an edit changes nothing."""
    peftkit.save(make_adapted(), path)
    rewritten(path, lambda manifest, tensors: None)
    with torch.no_grad():
        assert torch.equal(peftkit.load(make_base(), path)(x), make_adapted()(x))


def test_what_is_no_file(tmp_path):
    """A missing file, a folder, a text, a foreign safetensors file: each is said to be so."""
    with pytest.raises(errors.FileError, match="cannot read"):
        peftkit.load(make_base(), tmp_path / "none")
    with pytest.raises(errors.FileError, match="cannot read"):
        peftkit.load(make_base(), tmp_path)
    (tmp_path / "text").write_text("hello, this is no adapter")
    with pytest.raises(errors.FormatError, match="no adapter file"):
        peftkit.load(make_base(), tmp_path / "text")
    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "foreign")
    with pytest.raises(errors.FormatError, match="no adapter file"):
        peftkit.load(make_base(), tmp_path / "foreign")


def test_saving_what_holds_nothing(path):
    """An adapter whose every weight is frozen has no file; one on the meta device has no values."""
    with pytest.raises(errors.FileError, match="holds nothing"):
        peftkit.save(peftkit.wrap(make_base(), "frozen"), path)
    with torch.device("meta"):
        meta = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    with pytest.raises(errors.FileError, match="meta"):
        peftkit.save(peftkit.wrap(meta, "lora"), path)
    assert not path.exists()


def test_a_failed_save_leaves_the_old_file(path, monkeypatch):
    """When the disk refuses, the previous file is still there, whole, and nothing else."""
    peftkit.save(make_adapted(1), path)
    old = path.read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(errors.FileError, match="No space left"):
        peftkit.save(make_adapted(2), path)

    assert path.read_bytes() == old
    assert os.listdir(path.parent) == [path.name]


def test_load_state_dict_is_strict_and_whole(x):
    """Missing, unexpected and misshapen tensors are refused before any is copied."""
    model, other = make_adapted(1), make_adapted(2)
    state = peftkit.state_dict(other)
    before = state_of(model)
    for edit, words in (
        (lambda s: s.pop("0.weight.up"), "0.weight.up"),
        (lambda s: s.update(extra=torch.zeros(1)), "extra"),
        (lambda s: s.update({"4.bias": torch.zeros(3)}), "4.bias"),
    ):
        wrong = dict(state)
        edit(wrong)
        with pytest.raises(errors.FormatError, match=words):
            peftkit.load_state_dict(model, wrong)
    assert_untouched(before, model)

    peftkit.load_state_dict(model, state)
    with torch.no_grad():
        assert torch.equal(model(x), other(x))


def test_copies_save_alike(tmp_path):
    """A deep copy of a wrapped model writes the same file."""
    model = make_adapted()
    peftkit.save(model, tmp_path / "a")
    peftkit.save(copy.deepcopy(model), tmp_path / "b")

    assert Path(tmp_path / "a").read_bytes() == Path(tmp_path / "b").read_bytes()


def test_the_header_is_bounded_before_it_is_read(path):
    """A length field that claims more than the file has, or than the limit, is refused by its number."""
    path.write_bytes(struct.pack("<Q", 2**60) + b"{}")
    with pytest.raises(errors.FormatError, match=str(2**60)):
        peftkit.load(make_base(), path)


# ---------------------------------------------------------------------------------------- the container


def test_the_bytes_are_those_of_safetensors(path):
    """Every dtype and shape, names that JSON escapes, tensors that share memory: written as by the library itself."""
    tensors = {f'{name}.é"\\\n\x7f': torch.ones(3, 2).to(dtype) for name, dtype in manifests.DTYPES.items()}
    tensors |= {"scalar": torch.tensor(1.5), "empty": torch.empty(0, 3), "odd": torch.ones(3, dtype=torch.uint8)}
    shared = torch.arange(6.0)
    write(path, {**tensors, "a": shared, "b": shared}, "peftkit", "text é")

    assert path.read_bytes() == safetensors.torch.save(
        {**tensors, "a": shared, "b": shared.clone()}, {"peftkit": "text é"}
    )


def test_what_a_file_cannot_hold_is_named(path):
    """A dtype that safetensors does not have is an error that names the tensor, and nothing is written."""
    with pytest.raises(errors.FileError, match=r"'?b'? is torch\.complex128"):
        write(path, {"a": torch.ones(1), "b": torch.ones(1, dtype=torch.complex128)}, "peftkit", "")
    assert not path.exists()


def _offsets(*numbers):
    return lambda header: header["0.weight.up"].update(data_offsets=list(numbers))


LAYOUTS = {
    "a gap": lambda header: [entry.update(data_offsets=[n + 4 for n in entry["data_offsets"]]) for entry in header.values() if "dtype" in entry],
    "an overlap": lambda header: header["0.weight.up"].update(data_offsets=header["0.weight.down"]["data_offsets"]),
    "two tensors in one place": lambda header: header.update(more={"dtype": "F32", "shape": [6], "data_offsets": [24, 48]}),
    "an end before the start": _offsets(48, 24),
    "a negative start": _offsets(-24, 0),
    "a fractional place": _offsets(24.0, 48.0),
    "a place that is false": lambda header: header["0.weight.down"].update(data_offsets=[False, 24]),
    "three numbers for a place": _offsets(24, 48, 48),
    "a size that does not fit the shape": lambda header: header["0.weight.up"].update(shape=[7, 1]),
    "a negative shape": lambda header: header["0.weight.up"].update(shape=[-6, -1]),
    "a text for a shape": lambda header: header["0.weight.up"].update(shape="61"),
    "no shape": lambda header: header["0.weight.up"].pop("shape"),
    "a shape that overflows": lambda header: header.update(none={"dtype": "F32", "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}),
    "an unknown dtype": lambda header: header["0.weight.up"].update(dtype="F33"),
    "a tensor that is none": lambda header: header.update(more=3),
    "no metadata": lambda header: header.pop("__metadata__"),
    "metadata that are a list": lambda header: header.update(__metadata__=["peftkit"]),
}  # fmt: skip


@pytest.mark.parametrize("case", LAYOUTS)
def test_a_header_that_lies_is_refused(path, case):
    """What the library refuses is refused: places that leave gaps, overlap or are none, and sizes that do not fit."""
    peftkit.save(peftkit.wrap(make_base(), "lora", rank=1, targets="0"), path)
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    LAYOUTS[case](header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

    model = make_base()
    before = state_of(model)
    with pytest.raises(errors.FormatError, match="no adapter file"):
        peftkit.load(model, path)
    assert_untouched(before, model)


def test_bytes_after_the_last_tensor_are_refused(path):
    """A file that goes on after its tensors is no file of ours."""
    peftkit.save(make_adapted(), path)
    path.write_bytes(path.read_bytes() + bytes(4))
    with pytest.raises(errors.FormatError, match="take"):
        peftkit.load(make_base(), path)


def test_a_header_of_another_layout_is_read(path, x):
    """Data that are not aligned, and entries in another order, are as good: safetensors allows them."""
    peftkit.save(make_adapted(), path)
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    text = json.dumps(dict(reversed(header.items()))).encode()
    text += b" " * (1 - len(text) % 2)  # an odd length
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    assert len(safetensors.torch.load_file(path)) == len(header) - 1

    with torch.no_grad():
        assert torch.equal(peftkit.load(make_base(), path)(x), make_adapted()(x))


# ------------------------------------------------------------------------------------- values at a glance


FINITE = {
    "nothing": {},
    "no values": {"a": torch.empty(0)},
    "whole numbers": {"a": torch.tensor([2**62, 2**62])},
    "a sum that overflows": {"a": torch.full((4,), 3e38), "b": torch.full((4,), 6e4, dtype=torch.float16)},
    "the meta device": {"a": torch.empty(3, device="meta")},
    "8 bits": {"a": torch.full((300,), 448.0).to(torch.float8_e4m3fn)},
}


@pytest.mark.parametrize("case", FINITE)
def test_finite_values_are_let_through(case):
    """Also where their sum is not finite."""
    assert find_not_finite(FINITE[case]) is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2])
@pytest.mark.parametrize("values", [[float("nan")], [float("inf")], [float("inf"), float("-inf")]], ids=str)
def test_one_value_that_is_not_finite_is_found(dtype, values):
    """The tensor is named that holds it, among others of its dtype and of other dtypes."""
    wrong = torch.ones(40)
    wrong[7 : 7 + len(values)] = torch.tensor(values)
    tensors = {"a": torch.ones(3), "b": torch.ones(3).to(dtype), "c": wrong.to(dtype), "d": torch.ones(3).to(dtype)}
    assert find_not_finite(tensors) == "c"


WEIGHTS = {
    "a matrix": torch.randn(5, 7),
    "a transposed one": torch.randn(5, 7).T,
    "a stack, permuted": torch.randn(3, 4, 5).permute(2, 0, 1),
    "few values": torch.randn(3),
    "a scalar": torch.tensor(2.5),
    "half precision": torch.randn(9, 9).bfloat16(),
    "8 bits": torch.randn(9, 9).to(torch.float8_e4m3fn),
    "8 bits, transposed": torch.randn(9, 5).to(torch.float8_e5m2).T,
    "whole numbers": torch.arange(100),
}


def test_samples_are_those_of_each_weight_alone():
    """Weights of several dtypes and layouts at once, with some that have no values: each gets its own eight."""
    weights = [None, *WEIGHTS.values(), torch.empty(0, 3), torch.empty(3, device="meta")]
    expected = [None, *map(_sample_by_the_book, WEIGHTS.values()), "", None]
    assert manifests.samples(weights) == expected


def _sample_by_the_book(weight):
    """As docs/files.md has it."""
    values = weight.double().flatten() if weight.is_floating_point() else weight.flatten()
    picked = [values[i * (len(values) - 1) // 7] for i in range(8)]
    return struct.pack("<8h", *torch.stack(picked).bfloat16().view(torch.int16).tolist()).hex()
