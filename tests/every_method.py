"""Every installed method that trains something, and a small model for each."""

import dataclasses

import pytest
import torch

import peftkit
from peftkit import errors
from peftkit.testing import CASES, Case, subject

NAMES = [info.name for info in peftkit.methods() if info.name != peftkit.Frozen.name]


def llama():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "vocab_size": 32}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=1, **sizes))


LLAMA = Case("Llama", llama, lambda: {"input_ids": torch.arange(12).view(2, 6)}, targets=None, selects="model")


def small(name):
    """A method whose sizes fit the kit's small models."""
    kind = peftkit.method(name)
    own = {field.name: field.default for field in dataclasses.fields(kind)}
    fits = {
        "rank": 2,
        "target_rank": 1,
        "width": 4,
        "block_size": 4,
        "length": 4,
        "vectors_in_bank": 8,
        "tokens": 2 if isinstance(own.get("tokens"), int) else (1, 3),
    }
    return kind(**{field: value for field, value in fits.items() if field in own})


def first_case(name):
    """A method, and the first of the kit's models that it does not decline."""
    method = small(name)
    for case in (*CASES, LLAMA):
        try:
            model = subject.wrapped(method, case)
        except errors.PeftkitError:
            continue
        if any(p.requires_grad for p in model.parameters()):
            return method, case
    raise AssertionError(f"no model for {name}")
