"""Every script in docs/examples runs to its end, as its reader would run it, and shows what it promises."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"

SHOWN = {
    # script: the modules it needs besides torch, and lines that its output must have
    "bert_plain_loop.py": (
        ("transformers",),
        (
            "rule {query,key,value} → lora: 6 weights",
            "rule **.layer.*.{intermediate,output}.dense → lora: 4 weights",
            "rule classifier → full: 2 weights",
        ),
    ),
    "cnn_classifier.py": (
        (),
        ("rule Conv2d → lora: 2 weights", "plain model loaded without peftkit, identical: True"),
    ),
    "gpt2_from_state_dict.py": (
        ("transformers",),
        (
            "base:    [10, 11, 12, 13, 14, 15, 16]",
            "adapted: [10, 9, 8, 7, 6, 5, 4]",
            "identical logits after loading: True",
        ),
    ),
    "qlora.py": (
        ("transformers", "bitsandbytes"),
        ("packed base unchanged, to the bit: True", "identical logits after loading: True"),
    ),
    "logistic_regression.py": ((), ("the base answers exactly as before: True",)),
    "trainer_minilm.py": (
        ("transformers", "accelerate"),
        ("files with weights of the base in the checkpoint: 0", "the same on a fresh base: True"),
    ),
    "trainer_smollm2.py": (("transformers", "accelerate", "gguf"), ("resumed half-way, identical: True",)),
}
SLOW = {"trainer_minilm.py", "trainer_smollm2.py"}
"""Those with real weights, which they fetch from the package index."""


def test_every_example_is_listed():
    """No script is in docs/examples that the table above does not run, nor the other way round."""
    assert {path.name for path in EXAMPLES.glob("*.py")} == SHOWN.keys()


@pytest.mark.parametrize("script", [pytest.param(s, marks=pytest.mark.slow if s in SLOW else ()) for s in SHOWN])
def test_example(script, tmp_path):
    """A script runs from any folder, without a warning and without a network, and prints what it is there to show."""
    needed, lines = SHOWN[script]
    for module in needed:
        pytest.importorskip(module)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / script)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        timeout=600 if script in SLOW else 300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    printed = done.stdout.splitlines()
    assert [line for line in lines if line not in printed] == [], done.stdout
    assert not list(tmp_path.iterdir()), "it left files behind"
