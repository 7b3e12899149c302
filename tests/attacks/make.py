"""Writes the corpus of attacks next to itself: `python tests/attacks/make.py`. The files are committed; this says how they came.

Each is made from one valid adapter (of `base()` below) by somebody who knows the format and can compute every digest.
"""

import copy
import hashlib
import io
import json
import pickle
import struct
import zipfile
from pathlib import Path

import torch
from torch import nn

import peftkit
from peftkit import manifests

HERE = Path(__file__).parent


def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).eval()


def valid():
    """Header, manifest and data of the file that all are made from."""
    path = HERE / "valid.safetensors"
    peftkit.save(peftkit.wrap(base(), peftkit.LoRA(rank=2), targets="**", name="stranger"), path)
    raw = path.read_bytes()
    path.unlink()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    sealed = json.loads(header.pop("__metadata__")["peftkit"])
    return header, sealed["manifest"], raw[8 + length :]


def file(header, metadata, data):
    raw = json.dumps({"__metadata__": metadata, **header}, ensure_ascii=False).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(raw)) + raw + data


def seal(manifest):
    return {
        "peftkit": json.dumps(
            {"manifest": manifest, "sha256": manifests.digest(manifests.canonical(manifest))}, ensure_ascii=False
        )
    }


def attacks():
    """Name → bytes, class of the error, and a part of its message."""
    header, manifest, data = valid()
    good = file(header, seal(manifest), data)

    def lying(change, *, forge=True):
        other = copy.deepcopy(manifest)
        change(other)
        if forge:
            other["fingerprint"] = manifests.fingerprint(other["sites"])
        return file(header, seal(other), data)

    def relaid(change):
        other = copy.deepcopy(header)
        change(other)
        return file(
            other, seal({**manifest, "tensors": {key: manifest["tensors"].get(key, "0" * 64) for key in other}}), data
        )

    key = next(iter(header))
    begin, end = header[key]["data_offsets"]
    nan = struct.pack("<f", float("nan")) + data[begin + 4 : end]
    digest = hashlib.sha256(f"torch.float32{header[key]['shape']}".encode() + nan).hexdigest()

    class Bomb:
        def __reduce__(self):
            return (exec, ("raise SystemExit('exploded')",))

    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as zipped:
        zipped.writestr("archive/data.pkl", pickle.dumps(Bomb()))
    deep = "[" * 900 + "]" * 900
    twice = file(header, seal(manifest), data).replace(
        b'"__metadata__"', b'"' + key.encode() + b'": {}, "__metadata__"', 1
    )
    twice = struct.pack("<Q", len(twice) - 8 - len(data)) + twice[8:]

    def first(**entries):
        return lambda m: m["sites"][0].update(entries)

    def fields(**entries):
        return lambda m: m["methods"][0]["fields"].update(entries)

    F, B = "FormatError", "BaseMismatchError"
    return {
        "a-pickle": (pickle.dumps(Bomb()), F, "is a pickle"),
        "a-torch-archive": (archive.getvalue(), F, "is a pickle"),
        "a-polyglot": (good + archive.getvalue(), F, "its tensors take"),
        "empty": (b"", F, "0 bytes"),
        "a-header-of-exabytes": (struct.pack("<Q", 2**62) + good[8:], F, "claims"),
        "a-header-of-nothing": (struct.pack("<Q", 0) + good[8:], F, "claims 0"),
        "nested-without-end": (struct.pack("<Q", 200_000) + b"[" * 200_000 + data, F, "no adapter file"),
        "a-manifest-nested-deep": (lying(lambda m: m["methods"][0]["fields"].update(init=json.loads(deep))), F, ""),
        "keys-twice": (twice, F, "stands twice"),
        "no-seal": (
            file(header, {"peftkit": json.dumps({"manifest": manifest, "sha256": ""})}, data),
            F,
            "not what was saved",
        ),
        "no-manifest": (file(header, {"format": "pt"}, data), F, "no adapter file"),
        "a-shape-of-exabytes": (relaid(lambda h: h[key].update(shape=[0, 2**62, 2**62])), F, "no adapter file"),
        "a-negative-shape": (relaid(lambda h: h[key].update(shape=[-2, -4])), F, "shape or place"),
        "overlapping-tensors": (
            relaid(lambda h: h[list(h)[1]].update(data_offsets=[begin, end], shape=h[key]["shape"])),
            F,
            "does not fit",
        ),
        "a-hole-between-tensors": (relaid(lambda h: h.pop(list(h)[1])), F, ""),
        "beyond-the-end": (relaid(lambda h: h[key].update(data_offsets=[begin, 2**40])), F, "does not fit"),
        "a-dtype-of-nowhere": (relaid(lambda h: h[key].update(dtype="F4_E2M1")), F, "no adapter file"),
        "a-fraction-of-a-place": (relaid(lambda h: h[key].update(data_offsets=[0.0, 32.0])), F, "shape or place"),
        "a-tensor-too-many": (
            relaid(lambda h: h.update(extra={"dtype": "F32", "shape": [0], "data_offsets": [0, 0]})),
            F,
            "",
        ),
        "not-a-number": (
            file(
                header,
                seal({**manifest, "tensors": {**manifest["tensors"], key: digest}}),
                data[:begin] + nan + data[end:],
            ),
            F,
            "not finite",
        ),
        "other-weights-old-digest": (file(header, seal(manifest), b"\x01" + data[1:]), F, "is not what was saved"),
        "a-later-format": (lying(lambda m: m.update(format=2)), F, "has format 2"),
        "a-method-by-import-path": (
            lying(lambda m: m["methods"][0].update(name="os.system")),
            "UnknownMethodError",
            "os.system",
        ),
        "a-method-that-traverses": (
            lying(lambda m: m["methods"][0].update(name="../../evil")),
            "UnknownMethodError",
            "evil",
        ),
        "a-field-of-nowhere": (lying(fields(trust_remote_code=True)), F, "trust_remote_code"),
        "a-field-of-another-type": (lying(fields(rank={"__class__": "x"})), F, "rank"),
        "a-rank-of-a-billion": (lying(fields(rank=10**9)), F, ""),
        "a-rank-that-overflows": (lying(fields(rank=2**62)), F, ""),
        "an-infinite-scale": (lying(fields(alpha="1e999")), F, "alpha"),
        "a-path-of-attributes": (lying(first(path="0.__class__")), B, "0.__class__"),
        "a-weight-of-attributes": (lying(first(weight="__dict__")), B, ""),
        "a-path-outside": (lying(first(path="../../etc/passwd")), B, "etc/passwd"),
        "a-pattern-that-backtracks": (lying(first(path="(((a+)+)+)+$" * 50)), B, ""),
        "a-site-twice": (lying(lambda m: m["sites"].append(m["sites"][0])), F, "contradicts"),
        "a-method-beyond-the-list": (lying(first(method=7)), F, "contradicts"),
        "no-sites": (lying(lambda m: m.update(sites=[])), F, "contradicts"),
        "in-place-by-a-lie": (lying(first(in_place=True)), F, "in place"),
        "another-base": (lying(first(shape=[30, 4])), B, "another base"),
        "a-name-with-dots": (lying(lambda m: m.update(name="a.b")), "StateError", "a.b"),
        "a-name-of-torch": (lying(lambda m: m.update(name="keys")), "StateError", "keys"),
        "a-name-that-turns-around": (lying(lambda m: m.update(name="\u202eevil")), "StateError", "name"),
    }


if __name__ == "__main__":
    for old in HERE.glob("*.bin"):
        old.unlink()
    index = {}
    for name, (raw, error, words) in attacks().items():
        (HERE / f"{name}.bin").write_bytes(raw)
        index[name] = {"error": error, "says": words}
    (HERE / "index.json").write_text(json.dumps(index, indent=2) + "\n")
