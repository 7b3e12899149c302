"""diffusers' files, with diffusers itself as the oracle: small models made from configurations, without a hub."""

import warnings

import pytest
import torch

import peftkit

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    from diffusers import SD3Transformer2DModel, UNet2DConditionModel
pytestmark = pytest.mark.filterwarnings("ignore")


def unet():
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8, attention_head_dim=4,
    )  # fmt: skip


def transformer():
    return SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=1, attention_head_dim=4, num_attention_heads=2,
        joint_attention_dim=8, caption_projection_dim=8, pooled_projection_dim=8, out_channels=4,
    )  # fmt: skip


@torch.no_grad()
def run(model):
    torch.manual_seed(2)
    x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 3, 8)
    if isinstance(model, UNet2DConditionModel):
        return model(x, torch.tensor([5]), text).sample
    return model(x, text, torch.randn(1, 8), torch.tensor([5])).sample


def base_of(build):
    torch.manual_seed(0)
    return build().eval()


@torch.no_grad()
def randomised(model, word):
    torch.manual_seed(1)
    for name, p in sorted(model.named_parameters()):
        if word in name:
            p.copy_(torch.randn(p.shape) / 4)
    return model.eval()


def close(actual, expected):
    error, size = (actual - expected).abs().max().item(), expected.abs().max().item()
    assert error <= 2e-5 * size, f"differs by {error:.3g}, where values go up to {size:.3g}"


RULES = {
    unet: {
        "to_q": peftkit.LoRA(rank=3, alpha=5.0),
        "{to_k,to_v}": peftkit.LoRA(rank=2, alpha=3.0, rank_stabilized=True),
        "{conv1,conv2}": peftkit.LoRA(rank=2, alpha=1.0),
    },
    transformer: {"{to_q,to_k}": peftkit.LoRA(rank=3, alpha=5.0), "to_v": peftkit.LoRA(rank=2, alpha=7.0)},
}


@pytest.mark.parametrize("build, part", [(unet, "unet"), (transformer, "transformer")])
def test_diffusers_computes_what_was_saved(build, part, tmp_path):
    """`load_lora_adapter`, on a UNet with convolutions and on a transformer; ranks and alphas differ."""
    model = randomised(peftkit.wrap(base_of(build), RULES[build]), "adapters")
    assert (run(model) - run(base_of(build))).abs().max() > 0.01
    peftkit.save(model, tmp_path / "pytorch_lora_weights.safetensors", format="diffusers")
    theirs = base_of(build)
    theirs.load_lora_adapter(str(tmp_path), prefix=part, weight_name="pytorch_lora_weights.safetensors")
    close(run(theirs), run(model))


@pytest.mark.parametrize("build, part", [(unet, "unet"), (transformer, "transformer")])
def test_what_diffusers_saves_is_loaded(build, part, tmp_path):
    """An adapter of theirs, saved by their pipelines' own function: names, and alphas in the metadata."""
    from diffusers.loaders.lora_base import LoraBaseMixin, _pack_dict_with_prefix
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    theirs = base_of(build)
    theirs.add_adapter(
        LoraConfig(
            r=4, lora_alpha=6, target_modules=["to_q", "to_v"], alpha_pattern={"to_v": 3}, rank_pattern={"to_q": 2}
        )
    )
    randomised(theirs, "lora_")
    state = _pack_dict_with_prefix(get_peft_model_state_dict(theirs), part)
    config = theirs.peft_config["default"].to_dict()
    config["target_modules"] = sorted(config["target_modules"])
    LoraBaseMixin.write_lora_layers(
        state_dict=state, save_directory=str(tmp_path), is_main_process=True, weight_name=None, save_function=None,
        safe_serialization=True, lora_adapter_metadata=_pack_dict_with_prefix(config, part),
    )  # fmt: skip
    ours = peftkit.load(base_of(build), tmp_path / "pytorch_lora_weights.safetensors")
    close(run(ours), run(theirs))


def test_a_file_of_kohyas_names_is_for_the_same_unet(tmp_path):
    """What is saved for the one format is loaded from the other, by the model's own paths."""
    model = randomised(peftkit.wrap(base_of(unet), RULES[unet]), "adapters")
    peftkit.save(model, tmp_path / "kohya.safetensors", format="kohya", part="lora_unet")
    close(run(peftkit.load(base_of(unet), tmp_path / "kohya.safetensors")), run(model))
