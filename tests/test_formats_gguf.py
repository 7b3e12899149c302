"""GGUF adapters: read by `gguf`'s own reader, with the order of rows that transformers undoes when it reads a base."""

import math
import struct

import numpy as np
import pytest
import torch
from torch import nn

import peftkit
from peftkit import errors
from peftkit.formats import ggufs

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 24, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
TOKENS = torch.arange(16).reshape(2, 8)
RULES = {
    "{q,k,v,o}_proj": peftkit.LoRA(rank=3, alpha=5.0),
    "{up,down,gate}_proj": peftkit.LoRA(rank=2, alpha=3.0, rank_stabilized=True),
    "lm_head": peftkit.LoRA(rank=2, alpha=5.0),
    "embed_tokens": peftkit.LoRA(rank=2, alpha=5.0),
}
PACKED = {"{qkv,o}_proj": RULES["{q,k,v,o}_proj"], "{gate_up,down}_proj": RULES["{up,down,gate}_proj"]}
HEADLESS = {s: method for s, method in RULES.items() if s != "lm_head"}  # llama.cpp has none: it is the embedding
KINDS = {
    "llama": RULES, "mistral": RULES, "qwen2": RULES, "qwen3": RULES, "gemma": HEADLESS, "gemma2": HEADLESS, "phi3": PACKED,
}  # fmt: skip


def base_of(kind="llama", **more):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**SIZES, "head_dim": 4, **more})
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def adapted(kind="llama", rules=None):
    model = peftkit.wrap(base_of(kind), rules or KINDS[kind])
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape) / 4)
    return model


@torch.no_grad()
def run(model):
    return model(input_ids=TOKENS).logits


def close(actual, expected):
    error, size = (actual - expected).abs().max().item(), expected.abs().max().item()
    assert error <= 2e-5 * size, f"differs by {error:.3g}, where values go up to {size:.3g}"


@pytest.fixture
def path(tmp_path):
    peftkit.save(adapted(), tmp_path / "adapter.gguf", format="gguf")
    return tmp_path / "adapter.gguf"


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_is_loaded_as_the_same_adapter(kind, tmp_path):
    """Alphas, ranks, an embedding and a head; the rows come back in the model's own order."""
    model = adapted(kind)
    peftkit.save(model, tmp_path / "file", format="gguf")
    close(run(peftkit.load(base_of(kind), tmp_path / "file")), run(model))
    assert not torch.allclose(run(base_of(kind)), run(model))


def test_the_fields_are_those_that_llama_cpp_demands(path):
    """By `gguf`'s own reader: type, architecture, and one alpha, the most frequent."""
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF")}
    assert fields == {
        "general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 5.0,
    }  # fmt: skip
    names = {tensor.name for tensor in reader.tensors}
    assert {"blk.0.attn_q.weight.lora_a", "blk.1.ffn_down.weight.lora_b", "output.weight.lora_a"} <= names
    assert len(names) == 2 * (7 * 2 + 2)


def test_what_llama_cpp_adds_is_the_update(path):
    """`alpha / rank * lora_b @ lora_a` of each tensor, its rows put back as transformers puts back those of a base."""
    from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

    processor = LlamaTensorProcessor(config={"num_attention_heads": 4, "num_key_value_heads": 2})
    theirs = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    names = {
        "q_proj": "attn_q",
        "k_proj": "attn_k",
        "v_proj": "attn_v",
        "o_proj": "attn_output",
        "gate_proj": "ffn_gate",
    }
    model = adapted()
    originals = {name: p.detach().clone() for name, p in base_of().named_parameters()}
    peftkit.merge(model, keep_base=False)
    for part, name in names.items():
        key = f"blk.1.{name}.weight"
        a, b = theirs[f"{key}.lora_a"], theirs[f"{key}.lora_b"]
        update = 5.0 / b.shape[1] * (b @ a)
        if part in ("q_proj", "k_proj"):
            update = processor.process(update, name=key).weights
        (path_,) = [
            p for p in originals if p.endswith(f"layers.1.{'mlp' if 'gate' in part else 'self_attn'}.{part}.weight")
        ]
        close(torch.from_numpy(np.ascontiguousarray(update)), dict(model.named_parameters())[path_] - originals[path_])


def test_an_embedding_has_its_first_factor_transposed(path):
    """llama.cpp looks tokens up in the rows of `lora_a`."""
    theirs = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    assert theirs["token_embd.weight.lora_a"].shape == (24, 2)
    assert theirs["token_embd.weight.lora_b"].shape == (16, 2)
    down = peftkit.state_dict(adapted())["model.embed_tokens.weight.down"]
    close(torch.from_numpy(theirs["token_embd.weight.lora_a"].copy()), down.T)


def test_only_a_model_of_llama_cpps_is_written(tmp_path):
    """No configuration, or another architecture, is an error that names it."""
    model = peftkit.wrap(nn.Sequential(nn.Linear(4, 4)), {"0": peftkit.LoRA(rank=2)})
    with pytest.raises(errors.FileError, match=r"model_type.*None"):
        peftkit.save(model, tmp_path / "file", format="gguf")
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=2))
    with pytest.raises(errors.FileError, match="'gpt2'"):
        peftkit.save(peftkit.wrap(gpt2, {"c_attn": peftkit.LoRA(rank=2)}), tmp_path / "file", format="gguf")
    extra = base_of()
    extra.scorer = nn.Linear(16, 2)
    with pytest.raises(errors.FileError, match="no name for scorer"):
        peftkit.save(peftkit.wrap(extra, {"scorer": peftkit.LoRA(rank=2)}), tmp_path / "file", format="gguf")
    tied = base_of(tie_word_embeddings=True)
    with pytest.raises(errors.FileError, match="one weight"):
        peftkit.save(peftkit.wrap(tied, {"embed_tokens": peftkit.LoRA(rank=2)}), tmp_path / "file", format="gguf")
    assert not list(tmp_path.iterdir())


def rewritten(path, *, fields=(), tensors=(), architecture="llama"):
    """A GGUF file of these fields and tensors, by `gguf`'s own writer."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in fields:
        writer.add_string(key, value) if isinstance(value, str) else writer.add_float32(key, value)
    for name, value in tensors:
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


KIND = [("general.type", "adapter"), ("adapter.type", "lora")]
PAIR = [
    ("blk.0.attn_v.weight.lora_a", np.ones((2, 16), "float32")),
    ("blk.0.attn_v.weight.lora_b", np.ones((8, 2), "float32")),
]


def test_an_adapter_without_an_alpha_has_a_scale_of_1(tmp_path):
    """As in llama.cpp; so has one whose alpha is 0. Values in half precision are widened."""
    for fields in (KIND, [*KIND, ("adapter.lora.alpha", 0.0)]):
        half = [(name, value.astype("float16")) for name, value in PAIR]
        model = peftkit.load(base_of(), rewritten(tmp_path / "file", fields=fields, tensors=half))
        (adapter,) = [m for m in model.modules() if isinstance(m, peftkit.LowRank)]
        assert adapter.scale == 1
        assert adapter.up.dtype == torch.float32
        peftkit.unwrap(model)


REFUSED = {
    "a model": ([("general.type", "model")], PAIR, errors.FormatError, "general.type='model'"),
    "another kind": ([("general.type", "adapter"), ("adapter.type", "other")], PAIR, errors.FormatError, "'other'"),
    "a prefix of the prompt": ([*KIND, ("adapter.lora.prompt_prefix", "Hi")], PAIR, errors.FormatError, "prompt_prefix='Hi'"),
    "a norm": (KIND, [*PAIR, ("blk.0.attn_norm.weight", np.ones(16, "float32"))], errors.FormatError, "attn_norm"),
    "one factor": (KIND, PAIR[:1], errors.FormatError, "lacks.*up"),
    "whole numbers": (KIND, [(n, v.astype("int32")) for n, v in PAIR], errors.FormatError, "type 26"),
    "a layer that is not there": (KIND, [(n.replace("0", "9"), v) for n, v in PAIR], errors.BaseMismatchError, "blk.9.attn_v"),
    "other rows": (KIND, [PAIR[0], (PAIR[1][0], np.ones((12, 2), "float32"))], errors.BaseMismatchError, "another base"),
    "not finite": (KIND, [PAIR[0], (PAIR[1][0], np.full((8, 2), math.nan, "float32"))], errors.FormatError, "not finite"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_understood_is_refused_by_name(what, tmp_path):
    """Nothing is passed over, and the model is left alone."""
    fields, tensors, error, match = REFUSED[what]
    base = base_of()
    with pytest.raises(error, match=match):
        peftkit.load(base, rewritten(tmp_path / "file", fields=fields, tensors=tensors))
    assert not [name for name, _ in base.named_parameters() if "adapters" in name]


def test_a_file_cut_short_or_altered_is_refused_or_read_whole(path, tmp_path):
    """Wherever it is cut; and with each byte of its head turned over, nothing but an error of ours is raised."""
    whole, base = path.read_bytes(), base_of()
    for end in (*range(4, 200, 13), len(whole) // 2, len(whole) - 64):
        (tmp_path / "cut").write_bytes(whole[:end])
        with pytest.raises(errors.FileError):
            peftkit.load(base, tmp_path / "cut")
    for at in range(4, 400):
        (tmp_path / "cut").write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        try:
            ggufs.read(tmp_path / "cut")
        except errors.FileError:
            continue


def test_sizes_that_a_file_claims_are_checked_before_they_are_taken(tmp_path):
    """A tensor, a text, an array and numbers of fields beyond the file's end."""
    head = b"GGUF" + struct.pack("<I", 3)
    text = struct.pack("<Q", 1) + b"a"
    for body in (
        struct.pack("<QQ", 0, 2**60),
        struct.pack("<QQ", 2**60, 0),
        struct.pack("<QQ", 0, 1) + struct.pack("<Q", 2**62),
        struct.pack("<QQ", 0, 1) + text + struct.pack("<IIQ", 9, 0, 2**62),
        struct.pack("<QQ", 0, 1) + text + struct.pack("<IIQ", 9, 8, 2**62),
        struct.pack("<QQ", 1, 0) + text + struct.pack("<IQQIQ", 2, 2**40, 2**20, 0, 0),
    ):
        (tmp_path / "file").write_bytes(head + body + b"\0" * 64)
        with pytest.raises(errors.FormatError, match="GGUF"):
            peftkit.load(base_of(), tmp_path / "file")
