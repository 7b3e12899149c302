"""Files that earlier versions wrote load for ever, and compute what they computed then."""

import importlib.util
import json
import struct
from pathlib import Path

import jsonschema
import pytest
import safetensors.torch
import torch

import peftkit
from peftkit import errors

GOLDEN = Path(__file__).parent / "golden"
FILES = sorted(path for path in GOLDEN.glob("*/*.safetensors") if path.name != "expected.safetensors")
SCHEMA = json.loads((GOLDEN.parents[1] / "docs" / "manifest.schema.json").read_text())


def make():
    spec = importlib.util.spec_from_file_location("golden_make", GOLDEN / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def manifest_of(path):
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(json.loads(raw[8 : 8 + length])["__metadata__"]["peftkit"])["manifest"]


def loaded(path):
    """A base with the weights of then, and the adapter."""
    expected = safetensors.torch.load_file(path.parent / "expected.safetensors")
    net = make().Net().double().eval()
    net.load_state_dict({key.removeprefix("base."): t for key, t in expected.items() if key.startswith("base.")})
    return peftkit.load(net, path), expected[f"output.{path.stem}"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_file_of_an_earlier_version_loads_and_computes_the_same(path):
    """The output of then, to rounding in float64; with the methods that are installed."""
    names = {m["name"] for m in manifest_of(path)["methods"]}
    missing = names - {info.name for info in peftkit.methods()}
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    model, output = loaded(path)
    with torch.no_grad():
        torch.testing.assert_close(model(make().INPUT), output, rtol=1e-12, atol=1e-13)


def test_there_are_files_of_this_format():
    """At least one of each built-in form, of the first version."""
    assert {path.stem for path in FILES if path.parent.name == "0.1"} >= set(make().CASES)


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_manifests_fit_the_schema(path):
    """docs/manifest.schema.json describes what is written."""
    jsonschema.validate(manifest_of(path), SCHEMA)


@pytest.mark.parametrize("key", SCHEMA["required"])
def test_the_schema_refuses_what_the_reader_refuses(key):
    """Without one of its keys, or with one of another type, a manifest fits no more."""
    manifest = manifest_of(GOLDEN / "0.1" / "lora.safetensors")
    jsonschema.validate(manifest, SCHEMA)
    for broken in ({k: v for k, v in manifest.items() if k != key}, {**manifest, key: 2.5}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(broken, SCHEMA)


def test_a_field_that_was_added_later(tmp_path):
    """A method with one field more reads older files where it says what they meant, and refuses them where it doesn't."""
    from dataclasses import dataclass
    from typing import ClassVar

    old = GOLDEN / "0.1" / "lora.safetensors"

    @dataclass(frozen=True)
    class Newer(peftkit.LoRA):
        name: ClassVar[str] = "lora"
        gate: float = 2.0

        def adapter(self, site, shared=None):
            adapter = super().adapter(site, shared)
            adapter.scale *= self.gate
            return adapter

    class Upgraded(Newer):
        @classmethod
        def upgraded(cls, fields, version):
            assert version
            return {"gate": 1.0, **fields}

    expected = safetensors.torch.load_file(old.parent / "expected.safetensors")
    net = make().Net().double().eval()
    net.load_state_dict({key.removeprefix("base."): t for key, t in expected.items() if key.startswith("base.")})
    with pytest.raises(errors.FormatError, match="needs its field 'gate'"):
        peftkit.load(net, old, methods=[Newer])
    peftkit.load(net, old, methods=[Upgraded])
    with torch.no_grad():
        torch.testing.assert_close(net(make().INPUT), expected["output.lora"], rtol=1e-12, atol=1e-13)
