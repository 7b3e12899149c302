"""Adapter files from strangers: whatever is done to a valid file, it is refused by one class of errors or read as any
other reader would read it; the model stays as it was; and nothing is imported, run, sent or written.

Everything is seeded: a failure names its seed, and `mutated(valid, random.Random(seed))` gives the bytes again.
"""

import contextlib
import copy
import hashlib
import io
import json
import math
import os
import random
import re
import struct
import sys
import tempfile
import threading
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import peftkit
from peftkit import errors, manifests, reading

MUTATIONS = 1_000_000
PARTS = 10
LOADS = 100_000

RULES = {
    "0": peftkit.LoRA(rank=1, init="pissa"),
    "1": peftkit.LoRA(rank=2, dropout=0.1),
    "2": peftkit.Full(keep_base=True),
}


def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3, bias=False), nn.LayerNorm(3), nn.Linear(3, 2)).eval()


class Valid:
    """A valid file, and the places at which it can be attacked."""

    def __init__(self, folder, rules):
        model = peftkit.wrap(base(), rules, name="task")
        with torch.no_grad():
            for number, p in enumerate(p for p in model.parameters() if p.requires_grad):
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(number)) * 0.1)
        path = Path(folder) / "valid.safetensors"
        peftkit.save(model, path)
        self.bytes = path.read_bytes()
        (length,) = struct.unpack("<Q", self.bytes[:8])
        self.head, self.data = self.bytes[8 : 8 + length].decode().rstrip(), self.bytes[8 + length :]
        self.header = json.loads(self.head)
        self.sealed = self.header["__metadata__"]["peftkit"]
        self.manifest = json.loads(self.sealed)["manifest"]
        self.text = json.dumps(self.manifest)
        self.tensors = {key: value for key, value in self.header.items() if key != "__metadata__"}
        self.places = {name: _tokens(getattr(self, name)) for name in ("head", "text")}


def _tokens(text):
    """Where each number, string, word and bracket of a JSON text stands."""
    return [
        m.span() for m in re.finditer(r'"(?:[^"\\]|\\.)*"|-?[\d.]+(?:[eE][-+]?\d+)?|true|false|null|[\[\]{}:,]', text)
    ]


def assembled(head, data):
    raw = head.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(raw)) + raw + data


def sealed(valid, manifest, data=None, tensors=None):
    """A file whose manifest is sealed as it should be."""
    text = json.dumps(
        {"manifest": manifest, "sha256": manifests.digest(manifests.canonical(manifest))}, ensure_ascii=False
    )
    header = {"__metadata__": {"peftkit": text}, **(valid.tensors if tensors is None else tensors)}
    return assembled(json.dumps(header, ensure_ascii=False), valid.data if data is None else data)


HOSTILE = [
    "-1", "0", "1", "2", "255", "65536", "4294967296", "9223372036854775807", "18446744073709551616", "1e309", "-0.0", "0.5",
    "NaN", "-Infinity", "null", "true", "false", "[]", "{}", '""', '"F64"', '"F4"', '"BOOL"', '"../../etc/passwd"', '"lora"',
    '"frozen"', '"full"', '"os.system"', '"__import__"', '"__class__"', '"weight"', '"module"', '"0"', '"1"', '"\\ud800"', '"\\u0000"',
    "[[[[[[[[]]]]]]]]", '{"a":{"a":{"a":{}}}}', "[0,1099511627776]", "[1,1,1,1,1,1,1,1,1]", ",", ":", "]", "}", "9" * 5000,
]  # fmt: skip


def mutated(valid, chance):
    """The bytes of a file that somebody has worked on; often the seal and the digests are right."""
    return chance.choices(MUTATORS, WEIGHTS)[0](valid, chance)


def _flipped(valid, chance):
    raw = bytearray(valid.bytes)
    for _ in range(chance.choice((1, 1, 1, 2, 8))):
        raw[chance.randrange(len(raw))] ^= 1 << chance.randrange(8)
    return bytes(raw)


def _cut(valid, chance):
    begin, end = sorted(chance.randrange(len(valid.bytes) + 1) for _ in range(2))
    middle = chance.choice((b"", b"", valid.bytes[begin:end] * 2, chance.randbytes(chance.randrange(1, 40))))
    return valid.bytes[:begin] + middle + (valid.bytes[end:] if chance.random() < 0.7 else b"")


def _other_length(valid, chance):
    (length,) = struct.unpack("<Q", valid.bytes[:8])
    other = chance.choice(
        (0, 1, 2, length - 1, length + 1, len(valid.bytes), 2**31, 2**63, 2**64 - 1, chance.randrange(2**40))
    )
    return struct.pack("<Q", other) + valid.bytes[8:]


def _edited(text, places, chance):
    """One to three tokens replaced by hostile ones, by others of the text, or doubled, or taken out."""
    for begin, end in sorted(chance.sample(places, chance.choice((1, 1, 2, 3))), reverse=True):
        other = text[slice(*chance.choice(places))]
        new = chance.choice((chance.choice(HOSTILE), chance.choice(HOSTILE), other, text[begin:end] * 2, ""))
        text = text[:begin] + new + text[end:]
    return text


def _other_head(valid, chance):
    return assembled(_edited(valid.head, valid.places["head"], chance), valid.data)


def _other_manifest(valid, chance):
    text = _edited(valid.text, valid.places["text"], chance)
    try:
        return sealed(valid, json.loads(text))
    except (ValueError, RecursionError):  # no JSON any more: then it stands there as it is
        inner = f'{{"manifest": {text}, "sha256": "{"0" * 64}"}}'
        return assembled(json.dumps({"__metadata__": {"peftkit": inner}, **valid.tensors}), valid.data)


def _other_values(valid, chance):
    """Other bytes in a tensor, with the digest that goes with them: a true file, unless a value is not finite."""
    key, entry = chance.choice(list(valid.tensors.items()))
    begin, end = entry["data_offsets"]
    data = bytearray(valid.data)
    new = chance.choice(
        (chance.randbytes(end - begin), struct.pack("<f", math.nan) * ((end - begin) // 4), b"\xff" * (end - begin))
    )
    data[begin:end] = new
    return sealed(
        valid, {**valid.manifest, "tensors": {**valid.manifest["tensors"], key: _digest(entry, new)}}, bytes(data)
    )


def _other_tensors(valid, chance):
    """Entries of the header renamed, reshaped, retyped, moved or taken out; the manifest may go along."""
    tensors, digests = copy.deepcopy(valid.tensors), dict(valid.manifest["tensors"])
    key = chance.choice(list(tensors))
    entry = tensors[key]
    begin, end = entry["data_offsets"]
    what = chance.randrange(6)
    if what == 0:
        new = chance.choice(("", "0", "a" * 2000, "\u202e", f"{key}.x", chance.choice(list(tensors))))
        tensors[new], digests[new] = tensors.pop(key), digests.pop(key)
    elif what == 1:
        entry["shape"] = chance.choice(
            ([-1, -1], [0, 2**62], [2**32, 2**32], entry["shape"][::-1], [*entry["shape"], 1], [end - begin])
        )
    elif what == 2:
        entry["dtype"] = chance.choice((*manifests.DTYPES, "F4", "", None, 1))
    elif what == 3:
        entry["data_offsets"] = chance.choice(
            ([end, begin], [begin, end + 1], [0, 0], [begin], [begin, end, end], [-4, end], "ab")
        )
    elif what == 4:
        del tensors[key]
    else:
        tensors[f"{key}2"], digests[f"{key}2"] = copy.deepcopy(entry), digests[key]
    if key in tensors and chance.random() < 0.5:
        digests[key] = _digest(entry, valid.data[begin:end])
    return sealed(valid, {**valid.manifest, "tensors": digests}, tensors=tensors)


def _digest(entry, data):
    dtype = manifests.DTYPES.get(entry["dtype"])
    return hashlib.sha256(f"{dtype}{entry['shape']}".encode() + data).hexdigest()


MUTATORS, WEIGHTS = zip(
    (_flipped, 25), (_cut, 15), (_other_length, 5), (_other_head, 25), (_other_manifest, 18), (_other_values, 6), (_other_tensors, 6),
    strict=True,
)  # fmt: skip


# ------------------------------------------------------------------------------------------------ the reader


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    return Valid(tmp_path_factory.mktemp("valid"), RULES)


def means_the_same(raw, found):
    """Whether a file that is accepted is what safetensors' own reader makes of it, sealed, and finite."""
    (length,) = struct.unpack("<Q", raw[:8])
    told = json.loads(json.loads(raw[8 : 8 + length])["__metadata__"]["peftkit"])
    theirs = safetensors.torch.load(raw)
    return (
        told["manifest"] == found.manifest
        and manifests.digest(manifests.canonical(found.manifest)) == told["sha256"]
        and theirs.keys() == found.tensors.keys() == found.manifest["tensors"].keys()
        and all(torch.equal(theirs[key], tensor) for key, tensor in found.tensors.items())
        and all(manifests.tensor_digest(tensor) == found.manifest["tensors"][key] for key, tensor in theirs.items())
        and all(tensor.isfinite().all() for tensor in theirs.values() if tensor.is_floating_point())
    )


def read(raw):
    return reading.parse(io.BytesIO(raw), len(raw), Path("stranger.safetensors"))


@pytest.mark.parametrize("part", range(PARTS))
def test_a_million_mutations_are_refused_or_mean_what_they_say(valid, part):
    """Each is a FileError, or is read as safetensors reads it with every digest right. Both happen, for each mutator."""
    outcomes = {"refused": 0, "accepted": 0}
    for seed in range(part * MUTATIONS // PARTS, (part + 1) * MUTATIONS // PARTS):
        raw = mutated(valid, random.Random(seed))
        try:
            found = read(raw)
        except errors.FileError:
            outcomes["refused"] += 1
            continue
        except Exception as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error
        assert raw == valid.bytes or means_the_same(raw, found), f"seed {seed}"
        outcomes["accepted"] += 1
    assert outcomes["refused"] > 0.8 * MUTATIONS / PARTS
    assert outcomes["accepted"] > 0.001 * MUTATIONS / PARTS


@pytest.mark.parametrize("mutator", MUTATORS, ids=lambda mutator: mutator.__name__)
def test_every_mutator_changes_something(valid, mutator):
    """None is idle; and the oracle is not: a file with another value under the old digest does not pass it."""
    made = {mutator(valid, random.Random(seed)) for seed in range(50)} - {valid.bytes}
    assert len(made) > 5
    found = read(valid.bytes)
    assert means_the_same(valid.bytes, found)
    next(iter(found.tensors.values())).add_(1)
    assert not means_the_same(valid.bytes, found)


# ------------------------------------------------------------------------------------------------- the model


def state_of(model):
    """A digest of all that a model is: classes, attributes, registered names, and every byte of every tensor."""
    digest = hashlib.sha256()
    for path, module in model.named_modules():
        digest.update(
            repr((path, id(type(module)), sorted(vars(module)), module.training, list(module._modules))).encode()
        )
        for register in (module._parameters, module._buffers):
            for name, tensor in register.items():
                digest.update(repr((name, id(tensor), getattr(tensor, "requires_grad", None))).encode())
                if tensor is not None and tensor.numel():
                    digest.update(manifests.data_of(tensor.detach()))
    return digest.hexdigest()


@pytest.fixture
def quick(tmp_path):
    """A folder in memory, where there is one: each of these files lives for a millisecond."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


class Stranger:
    """Loads files into one model, and looks after it."""

    def __init__(self, folder):
        self.model, self.path = base(), Path(folder) / "stranger.safetensors"
        self.before = state_of(self.model)

    def load(self, raw, about):
        """Whether it was accepted. After an error the model is what it was; after none, an unwrapped one is."""
        self.path.write_bytes(raw)
        try:
            with watched():
                peftkit.load(self.model, self.path)
        except errors.PeftkitError:
            assert state_of(self.model) == self.before, about
            return False
        except Exception as error:
            raise AssertionError(f"{about}: {type(error).__name__}: {error}") from error
        peftkit.unwrap(self.model)
        assert state_of(self.model) == self.before, about
        return True


FORBIDDEN = re.compile(
    r"import$|exec|socket|subprocess|os\.(system|exec|fork|posix_spawn|spawn|remove|rename|mkdir|rmdir|link|symlink"
    r"|truncate|chmod|chown|putenv|unsetenv|kill)|shutil|pickle|marshal|ctypes\.dlopen|urllib|http|ftplib|smtplib|webbrowser|code\."
)
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC
seen = []
watching = threading.Event()


def _hook(event, args):
    if watching.is_set():
        writes = event == "open" and (set(args[1] or "") & set("wax+") or (args[2] or 0) & WRITING)
        if writes or FORBIDDEN.match(event):
            seen.append((event, str(args)[:200]))


class watched:
    """Notes what Python's audit hooks tell of while the block runs, if it is forbidden."""

    def __enter__(self):
        watching.set()

    def __exit__(self, *_):
        watching.clear()


@pytest.fixture(scope="module")
def audit():
    """The hook stays for the rest of the process, silent."""
    sys.addaudithook(_hook)
    seen.clear()
    return seen


def test_the_audit_sees_what_it_is_to_see(audit, tmp_path):
    """An import, an exec, a socket, a process, a file that is written: each is noted; reading a file is not."""
    import socket
    import subprocess

    acts = {
        "import": lambda: __import__("this_module_is_not_there"),
        "exec": lambda: exec("pass"),
        "socket.__new__": lambda: socket.socket().close(),
        "subprocess.Popen": lambda: subprocess.run(["true"], check=True),
        "open": lambda: (tmp_path / "new").write_text(""),
        "os.remove": lambda: (tmp_path / "new").unlink(),
    }
    for event, act in acts.items():
        audit.clear()
        with watched(), contextlib.suppress(ModuleNotFoundError):
            act()
        assert event in [name for name, _ in audit]
    (tmp_path / "there").write_text("")
    audit.clear()
    with watched():
        (tmp_path / "there").read_text()
    assert not audit


@pytest.mark.parametrize("part", [pytest.param(part, marks=pytest.mark.slow if part else ()) for part in range(PARTS)])
def test_hostile_loads_do_nothing_but_read(valid, part, audit, quick):
    """A hundred thousand loads of mutated files: no import, exec, socket or write, one tree of errors, the model as it was."""
    stranger = Stranger(quick)
    assert stranger.load(valid.bytes, "the valid file")  # what is imported late is imported now
    unknown = copy.deepcopy(valid.manifest)
    unknown["methods"][0]["name"] = "nobody-has-this"
    assert not stranger.load(sealed(valid, unknown), "for which it is looked up what is installed")
    for seed in range(20):
        stranger.load(mutated(valid, random.Random(-1 - seed)), f"warm-up {seed}")
    audit.clear()
    # Most mutations end in the reader, which the test above has; here those come more often that get further.
    deep = [_other_manifest] * 6 + [_other_values, _other_tensors, _other_head, _flipped]
    accepted = 0
    for seed in range(part * LOADS // PARTS, (part + 1) * LOADS // PARTS):
        chance = random.Random(seed)
        accepted += stranger.load(chance.choice(deep)(valid, chance), f"seed {seed}")
        assert not audit, f"seed {seed}: {audit[:5]}"
    assert accepted > 0.001 * LOADS / PARTS


def test_every_bit_and_every_length_of_a_small_file(quick):
    """Of a file of 4 KB: each single bit flipped and each truncation is refused, and the model stays as it was."""
    small = Valid(quick, {**RULES, "3": peftkit.LoRA(rank=24)})
    assert 4000 < len(small.bytes) < 5000
    stranger = Stranger(quick)
    harmless = []
    for length in range(len(small.bytes)):
        assert not stranger.load(small.bytes[:length], f"the first {length} bytes")
    for place in range(8 * len(small.bytes)):
        raw = bytearray(small.bytes)
        raw[place // 8] ^= 1 << place % 8
        if stranger.load(bytes(raw), f"bit {place}"):
            harmless.append(bytes(raw))
    for raw in harmless:  # white space of the header is nobody's
        assert read(raw).manifest == small.manifest
        assert all(torch.equal(t, read(small.bytes).tensors[key]) for key, t in read(raw).tensors.items())
    assert len(harmless) <= 8 * 8


# ------------------------------------------------------------------------------------------- random manifests


def _tree(chance, depth=3):
    kind = chance.randrange(9 if depth else 7)
    if kind == 7:
        return [_tree(chance, depth - 1) for _ in range(chance.randrange(4))]
    if kind == 8:
        return {chance.choice(WORDS): _tree(chance, depth - 1) for _ in range(chance.randrange(4))}
    return (
        None,
        True,
        False,
        chance.randrange(-2, 5),
        chance.choice((2**31, 2**63, -(2**70), 1e300, 0.5)),
        chance.choice(WORDS),
        "",
    )[kind]


WORDS = [
    "0", "1", "2", "3", "weight", "bias", "module", "lora", "full", "frozen", "dora", "rank", "alpha", "Linear", "LayerNorm", "path",
    "method", "in_place", "shape", "sample", "fields", "name", "package", "float32", "\x00", "ß", "a.b", "..", "*", "@head", "x" * 2000,
]  # fmt: skip


def _random_manifest(valid, chance):
    """One that is made as it should be, with parts of it made of anything."""
    manifest = copy.deepcopy(valid.manifest)
    for _ in range(chance.choice((1, 1, 2, 4))):
        where = manifest
        while True:
            key = chance.choice(list(where)) if isinstance(where, dict) else chance.randrange(len(where))
            inner = where[key]
            if isinstance(inner, (dict, list)) and inner and chance.random() < 0.8:
                where = inner
                continue
            where[key] = (
                _tree(chance) if chance.random() < 0.7 else copy.deepcopy(chance.choice(list(manifest.values())))
            )
            break
    if chance.random() < 0.6:  # who forges the seal forges the fingerprint too
        with contextlib.suppress(TypeError, KeyError, ValueError, RecursionError):
            manifest["fingerprint"] = manifests.fingerprint(manifest["sites"])
    return manifest


def test_random_manifests(valid, quick):
    """Ten thousand, each sealed as it should be: an error that says something, or an adapter that can be taken off again."""
    stranger = Stranger(quick)
    accepted = 0
    for seed in range(10_000):
        try:
            raw = sealed(valid, _random_manifest(valid, random.Random(seed)))
        except ValueError:  # of what JSON cannot hold nobody can make a seal
            continue
        accepted += stranger.load(raw, f"seed {seed}")
    assert 0 < accepted < 5000


# ------------------------------------------------------------------------------------------------------ bounds


def forged(valid, fields=None, **entries):
    """A sealed file with other fields of its first method, or other entries."""
    manifest = copy.deepcopy(valid.manifest) | entries
    manifest["methods"][0]["fields"].update(fields or {})
    return sealed(valid, manifest)


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation gives, outside of the meta device."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                self.nbytes = max(self.nbytes, tensor.untyped_storage().nbytes())
        return found


def test_bounds_hold_before_memory_is_taken(valid, tmp_path):
    """A rank of a billion, a shape of exabytes, a header of 2**60 bytes, 200,001 tensors, a name of a megabyte: refused, and
    no tensor of more bytes than the file has is ever made."""
    stranger = Stranger(tmp_path)
    none = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    many = {str(i): none for i in range(reading.MAX_TENSORS + 1)}
    attacks = {
        "rank": forged(valid, {"rank": 10**9}),
        "a rank that overflows": forged(valid, {"rank": 2**62}),
        "a shape": sealed(valid, valid.manifest, tensors={**valid.tensors, "x": {**none, "shape": [0, 2**62, 2**62]}}),
        "the header": struct.pack("<Q", 2**60) + valid.bytes[8:],
        "tensors": sealed(valid, valid.manifest, tensors={**many, **valid.tensors}),
        "a name": sealed(valid, valid.manifest, tensors={**valid.tensors, "x" * 2**20: none}),
    }
    for what, raw in attacks.items():
        with Largest() as largest:
            assert not stranger.load(raw, what)
        assert largest.nbytes <= len(raw), what


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused_unless_asked_for(valid, tmp_path, value):
    """By the tensor's name; with `check_finite=False` they are loaded as they are."""
    key, entry = next(iter(valid.tensors.items()))
    begin, _ = entry["data_offsets"]
    data = bytearray(valid.data)
    data[begin : begin + 4] = struct.pack("<f", value)
    new = bytes(data[begin : entry["data_offsets"][1]])
    path = tmp_path / "a.safetensors"
    path.write_bytes(
        sealed(
            valid, {**valid.manifest, "tensors": {**valid.manifest["tensors"], key: _digest(entry, new)}}, bytes(data)
        )
    )

    with pytest.raises(errors.FormatError, match=f"{re.escape(key)} holds values that are not finite"):
        peftkit.load(base(), path)
    model = peftkit.load(base(), path, check_finite=False)
    assert not peftkit.state_dict(model)[key].isfinite().all()


def test_a_pickle_is_never_read(tmp_path):
    """A file that torch.save wrote, alone or as `adapter_model.bin` in a folder, is refused and not opened as a pickle."""

    class Bomb:
        def __reduce__(self):
            return (os.system, ("touch exploded",))

    folder = tmp_path / "folder"
    folder.mkdir()
    torch.save({"weight": Bomb()}, tmp_path / "adapter.pt")
    torch.save({"weight": Bomb()}, folder / "adapter_model.bin")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "target_modules": ["0"]}))
    for path in (tmp_path / "adapter.pt", folder):
        with pytest.raises(errors.FileError):
            peftkit.load(base(), path)
    assert not Path("exploded").exists()
    assert not (tmp_path / "exploded").exists()


# ------------------------------------------------------------------------------------- folders and other formats

FORMATS = {"hf": 1500, "kohya": 1000, "diffusers": 1000, "loralib": 1000, "mlx": 1000}


class Attacked:
    """What a save in another format wrote: files of JSON and of safetensors, to be worked on like ours."""

    def __init__(self, folder, format_):
        model = peftkit.wrap(base(), peftkit.LoRA(rank=2), targets="{0,1,3}")
        with torch.no_grad():
            for tensor in peftkit.state_dict(model).values():
                tensor.add_(0.1)
        self.path = Path(folder) / ("adapter" if format_ in ("hf", "mlx") else "adapter.safetensors")
        peftkit.save(model, self.path, format=format_)
        files = sorted(self.path.iterdir()) if self.path.is_dir() else [self.path]
        self.files = {file: file.read_bytes() for file in files}

    def attack(self, chance):
        """Work on one file; the others are as they were."""
        for file, raw in self.files.items():
            file.write_bytes(raw)
        file = chance.choice(list(self.files))
        raw = self.files[file]
        if file.suffix == ".json":
            text = raw.decode()
            new = _edited(text, _tokens(text), chance).encode("utf-8", "surrogatepass")
        elif chance.random() < 0.5:
            (length,) = struct.unpack("<Q", raw[:8])
            head = raw[8 : 8 + length].decode()
            new = assembled(_edited(head, _tokens(head), chance), raw[8 + length :])
        else:
            begin = chance.randrange(len(raw))
            new = raw[:begin] + chance.choice((b"", bytes([raw[begin] ^ 1 << chance.randrange(8)]))) + raw[begin + 1 :]
        file.write_bytes(new)


@pytest.mark.parametrize("format_", FORMATS)
def test_other_formats_are_read_by_the_same_rules(format_, audit, quick):
    """Whatever is done to their files: one tree of errors, nothing run or written, and the model as it was."""
    attacked, model = Attacked(quick, format_), base()
    before = state_of(model)

    def load(about):
        try:
            with watched():
                peftkit.load(model, attacked.path)
        except errors.PeftkitError:
            assert state_of(model) == before, about
            return False
        except Exception as error:
            raise AssertionError(f"{about}: {type(error).__name__}: {error}") from error
        for p in peftkit.state_dict(model).values():
            assert p.isfinite().all(), about
        peftkit.unwrap(model)
        assert state_of(model) == before, about
        return True

    assert load("as it was written")
    for seed in range(20):
        attacked.attack(random.Random(-1 - seed))
        load(f"warm-up {seed}")
    audit.clear()
    refused = 0
    for seed in range(FORMATS[format_]):
        attacked.attack(random.Random(seed))
        refused += not load(f"seed {seed}")
        assert not audit, f"seed {seed}: {audit[:5]}"
    assert refused > FORMATS[format_] / 10
