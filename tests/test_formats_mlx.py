"""MLX's folders, with mlx-lm itself as the oracle: the same small Llama there and here."""

import json

import pytest
import torch

import peftkit

mx = pytest.importorskip("mlx.core")
pytest.importorskip("mlx_lm")
transformers = pytest.importorskip("transformers")
from mlx.utils import tree_flatten  # noqa: E402 - only once it is known to be there
from mlx_lm.models.llama import Model, ModelArgs  # noqa: E402
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
SIZES = {
    "vocab_size": 24, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
}  # fmt: skip
TOKENS = torch.arange(16).reshape(2, 8)


def base_of():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, pad_token_id=0)).eval()


def theirs_of():
    """The base with the same weights, in mlx-lm."""
    model = Model(ModelArgs(model_type="llama", **SIZES))
    model.load_weights([(name, mx.array(p.detach().numpy())) for name, p in base_of().named_parameters()])
    return model


@torch.no_grad()
def run(model):
    if isinstance(model, Model):
        return torch.tensor(model(mx.array(TOKENS.numpy())).tolist())
    return model(input_ids=TOKENS).logits


def close(actual, expected):
    error, size = (actual - expected).abs().max().item(), expected.abs().max().item()
    assert error <= 2e-5 * size, f"differs by {error:.3g}, where values go up to {size:.3g}"


def test_mlx_computes_what_was_saved(tmp_path):
    """`load_adapters`, with ranks and scales that differ, in one block only, an embedding and a head."""
    model = peftkit.wrap(
        base_of(),
        {
            "q_proj": peftkit.LoRA(rank=3, alpha=5.0),
            "**.1.**.{v,up}_proj": peftkit.LoRA(rank=2, alpha=3.0, rank_stabilized=True),
            "{lm_head,embed_tokens}": peftkit.LoRA(rank=2, alpha=4.0),
        },
    )
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape) / 4)
    peftkit.save(model, tmp_path / "folder", format="mlx")
    close(run(theirs_of()), run(base_of()))
    assert (run(model) - run(base_of())).abs().max() > 0.1
    close(run(load_adapters(theirs_of(), str(tmp_path / "folder"))), run(model))


def test_what_mlx_saves_is_loaded(tmp_path):
    """An adapter of the last block, saved as mlx-lm's trainer saves it."""
    theirs, parameters = (
        theirs_of(),
        {"rank": 3, "scale": 7.0, "dropout": 0.1, "keys": ["self_attn.q_proj", "mlp.up_proj"]},
    )
    theirs.freeze()
    linear_to_lora_layers(theirs, 1, parameters)
    mx.random.seed(1)
    learned = {name: mx.random.normal(value.shape) / 4 for name, value in tree_flatten(theirs.trainable_parameters())}
    theirs.load_weights(list(learned.items()), strict=False)
    theirs.eval()
    assert len(learned) == 4
    folder = tmp_path / "folder"
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), learned)
    config = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": parameters, "learning_rate": 1e-5}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    close(run(peftkit.load(base_of(), folder)), run(theirs))
