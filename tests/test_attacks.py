"""The corpus of attacks: each file is refused, for its own reason, and the model stays as it was."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

import peftkit
from peftkit import errors

FOLDER = Path(__file__).parent / "attacks"
INDEX = json.loads((FOLDER / "index.json").read_text())


def base():
    spec = importlib.util.spec_from_file_location("attacks_make", FOLDER / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.base()


def test_the_corpus_is_whole():
    """Every file has its entry and every entry its file, at least twenty of them."""
    assert {path.stem for path in FOLDER.glob("*.bin")} == set(INDEX)
    assert len(INDEX) >= 20


@pytest.mark.parametrize("name", INDEX)
def test_an_attack_is_refused(name):
    """With the error of its kind and a message that says what is wrong; no bit of the model moves."""
    model = base()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    classes = [type(module) for module in model.modules()]
    with pytest.raises(errors.PeftkitError) as caught:
        peftkit.load(model, FOLDER / f"{name}.bin")
    assert type(caught.value).__name__ == INDEX[name]["error"], str(caught.value)
    assert INDEX[name]["says"] in str(caught.value)
    assert [type(module) for module in model.modules()] == classes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
