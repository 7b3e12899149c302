"""Roles: what each layer is for, on tiny versions of real architectures and on models that show one rule each."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from peftkit.roles import find_roles


def family(module):
    families = {
        "linear": nn.Linear,
        "conv": nn.modules.conv._ConvNd,
        "embedding": nn.Embedding,
        "norm": (nn.LayerNorm, nn.modules.batchnorm._BatchNorm),
        "attention": nn.MultiheadAttention,
    }
    if type(module).__qualname__ == "Conv1D":  # transformers' transposed linear layer
        return "linear"
    return next((name for name, classes in families.items() if isinstance(module, classes)), None)


def roles_of(model):
    """Each path's roles as one word, without "all", which all of them have."""
    found = find_roles(model, family)
    assert all("all" in roles for roles in found.values())
    return {path: " ".join(sorted(roles - {"all"})) for path, roles in found.items()}


SIZES = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = SIZES | {"num_key_value_heads": 2, "head_dim": 8}
VISION = SIZES | {"image_size": 8, "patch_size": 4}
TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
WHISPER_ENCODER = {"encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 24, "num_mel_bins": 4}
WHISPER_DECODER = {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 24}

ARCHITECTURES = {
    # class: its config, then the attention, MLP and other linear layers by the last name of their paths, and the heads
    "GPT2LMHeadModel": (
        {"vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 2} | TOKENS,
        ("c_attn c_proj", "c_fc c_proj", "", "lm_head"),
    ),
    "BertForSequenceClassification": (SIZES, ("query key value dense", "dense", "dense", "classifier")),
    "LlamaForCausalLM": (LLAMA, ("q_proj k_proj v_proj o_proj", "gate_proj up_proj down_proj", "", "lm_head")),
    "T5ForConditionalGeneration": (
        {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2},
        ("q k v o", "wi wo", "", "lm_head"),
    ),
    "ViTForImageClassification": (VISION, ("q_proj k_proj v_proj o_proj", "fc1 fc2", "", "classifier")),
    "WhisperForConditionalGeneration": (
        {"vocab_size": 32, "d_model": 16, "decoder_start_token_id": 0} | WHISPER_ENCODER | WHISPER_DECODER | TOKENS,
        ("q_proj k_proj v_proj out_proj", "fc1 fc2", "", "proj_out"),
    ),
    "CLIPModel": (
        {"text_config": SIZES | TOKENS, "vision_config": VISION, "projection_dim": 8},
        ("q_proj k_proj v_proj out_proj", "fc1 fc2", "text_projection visual_projection", ""),
    ),
    "MambaForCausalLM": (
        {"vocab_size": 32, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2},
        ("", "", "in_proj x_proj dt_proj out_proj", "lm_head"),
    ),
    "Qwen3MoeForCausalLM": (
        LLAMA | {"moe_intermediate_size": 8, "num_experts": 4, "num_experts_per_tok": 2},
        ("q_proj k_proj v_proj o_proj", "gate_up_proj down_proj", "", "lm_head"),
    ),
    "OPTForCausalLM": (
        SIZES | {"ffn_dim": 24, "word_embed_proj_dim": 16},
        ("q_proj k_proj v_proj out_proj", "fc1 fc2", "", "lm_head"),
    ),
    # a hybrid: its mixers stand in the same list as its attention
    "JambaForCausalLM": (
        LLAMA | {"num_experts": 1, "attn_layer_offset": 1, "attn_layer_period": 2, "mamba_d_state": 4},
        ("q_proj k_proj v_proj o_proj", "gate_proj up_proj down_proj", "in_proj x_proj dt_proj out_proj", "lm_head"),
    ),
    # one with a list of attentions and a list of MLPs, so that neither is inside a block
    "FlaubertWithLMHeadModel": (
        {"n_words": 32, "emb_dim": 16, "n_layers": 2, "n_heads": 2},
        ("q_lin k_lin v_lin out_lin", "lin1 lin2", "", "pred_layer.proj"),
    ),
}


def build(name):
    transformers = pytest.importorskip("transformers")
    cls = getattr(transformers, name)
    with torch.device("meta"):
        return cls(cls.config_class(**ARCHITECTURES[name][0]))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architecture(name):
    """The attention, the MLP and the head of an architecture are found, and its other linear layers are just that."""
    found = roles_of(build(name))

    def last_names(*roles):
        return {path.rpartition(".")[2] for path, held in found.items() if held in roles}

    attention, mlp, other, heads = (set(names.split()) for names in ARCHITECTURES[name][1])
    assert last_names("attention linear") == attention
    assert last_names("linear mlp", "mlp") == mlp
    assert last_names("linear") == other
    assert {path for path, held in found.items() if held == "head"} == heads


def test_every_layer_with_a_family_is_listed():
    """Whatever `family` knows has a role, and nothing but raw parameters is listed besides and the norms it misses."""
    model = build("Qwen3MoeForCausalLM")
    found = roles_of(model)
    known = {path for path, module in model.named_modules() if family(module)}
    experts = {f"model.layers.{i}.mlp.experts.{name}" for i in (0, 1) for name in ("gate_up_proj", "down_proj")}
    norms = {path for path, module in model.named_modules() if type(module).__name__ == "Qwen3MoeRMSNorm"}
    assert found.keys() == known | experts | norms
    assert {found[path] for path in norms} == {"norm"}
    assert {found[path] for path in experts} == {"mlp"}


def test_transformer_of_torch():
    """torch's own transformer: attention modules and their projections, and an MLP that only its place gives away."""
    model = nn.ModuleDict({"body": nn.Transformer(8, 2, 1, 1, 8, batch_first=True), "generator": nn.Linear(8, 8)})
    assert roles_of(model) == {
        "body.encoder.layers.0.self_attn": "attention",
        "body.encoder.layers.0.self_attn.out_proj": "attention linear",
        "body.encoder.layers.0.linear1": "linear mlp",
        "body.encoder.layers.0.linear2": "linear mlp",
        "body.encoder.layers.0.norm1": "norm",
        "body.encoder.layers.0.norm2": "norm",
        "body.encoder.norm": "norm",
        "body.decoder.layers.0.self_attn": "attention",
        "body.decoder.layers.0.self_attn.out_proj": "attention linear",
        "body.decoder.layers.0.multihead_attn": "attention",
        "body.decoder.layers.0.multihead_attn.out_proj": "attention linear",
        "body.decoder.layers.0.linear1": "linear mlp",
        "body.decoder.layers.0.linear2": "linear mlp",
        "body.decoder.layers.0.norm1": "norm",
        "body.decoder.layers.0.norm2": "norm",
        "body.decoder.layers.0.norm3": "norm",
        "body.decoder.norm": "norm",
        "generator": "head",
    }


def test_convolutional_network():
    """A plain CNN: convolutions, norms, and the last linear layer as its head."""
    features = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten())
    classifier = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    model = nn.ModuleDict({"features": features, "classifier": classifier})
    assert roles_of(model) == {
        "features.0": "conv",
        "features.1": "norm",
        "classifier.0": "linear",
        "classifier.2": "head",
    }


def test_plain_layers():
    """A stack of linear layers has a head, a single one is all the model there is."""
    assert roles_of(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))) == {"0": "linear", "2": "head"}
    assert roles_of(nn.Linear(2, 2)) == {"": "linear"}
    assert roles_of(nn.Sequential(nn.Embedding(2, 2), nn.Linear(2, 2))) == {"0": "embedding", "1": "linear"}
    assert roles_of(nn.ReLU()) == {}


def test_attention_alone():
    """The projection of an attention is never taken for a head, be it the last linear layer of the model."""
    assert roles_of(nn.MultiheadAttention(4, 2)) == {"": "attention", "out_proj": "attention linear"}
    two = nn.ModuleDict({"left": nn.MultiheadAttention(4, 2), "right": nn.MultiheadAttention(4, 2)})
    assert "head" not in roles_of(two).values()


class Named(nn.Module):
    """A module with the given children; `Named.of("X", ...)` makes one whose class is named X."""

    def __init__(self, **children):
        super().__init__()
        for name, child in children.items():
            setattr(self, name, child)

    @classmethod
    def of(cls, class_name, **children):
        return type(class_name, (cls,), {})(**children)


def linear():
    return nn.Linear(2, 2)


@pytest.mark.parametrize(
    "attribute, class_name, part",
    [
        ("attn", "Thing", "attention"),
        ("self_attention", "Thing", "attention"),
        ("x", "MultiHeadAttend", "attention"),
        ("mlp", "Thing", "mlp"),
        ("x", "FeedForward", "mlp"),
        ("feed_forward", "Thing", "mlp"),
        ("x", "SwitchFFN", "mlp"),
        ("shared_expert", "Thing", "mlp"),
        ("mlp", "AttentionThing", "mlp"),
        ("moe", "SparseMoeBlock", ""),
        ("mixer", "Thing", ""),
    ],
)
def test_telling_names(attribute, class_name, part):
    """The name of an attribute or class on the way up tells the part; an attribute before its class, never "moe"."""
    model = Named(**{attribute: Named.of(class_name, inner=Named(proj=linear())), "head": linear()})
    assert roles_of(model)[f"{attribute}.inner.proj"] == f"{part} linear".strip() if part != "mlp" else "linear mlp"


def test_innermost_name_wins():
    """Of two telling names on the way up the inner one counts."""
    model = Named(attention=Named(mlp=Named(fc=linear())), mlp=Named(attn=Named(q=linear())), head=linear())
    assert roles_of(model) == {"attention.mlp.fc": "linear mlp", "mlp.attn.q": "attention linear", "head": "head"}


def test_name_of_the_model_tells_nothing():
    """The class of the root names the model, not a part of it, and neither does that of a block."""
    block = Named.of("AttentionLayer", attn=Named(q=linear()), fc=linear())
    model = Named.of("AttentionIsAllYouNeed", embed=linear(), layers=nn.ModuleList([block]), head=linear())
    found = roles_of(model)
    assert found["embed"] == "linear"
    assert found["layers.0.fc"] == "linear mlp"


def test_beside_a_mixer_nothing_is_mlp():
    """In a block with attention an unnamed layer is MLP, but not where it stands beside a convolution or recurrence."""
    block = Named(
        attn=Named(q=linear()),
        mamba=Named(conv=nn.Conv1d(2, 2, 1), in_proj=linear()),
        memory=Named(rnn=nn.GRU(2, 2), in_proj=linear()),
        output=Named(dense=linear()),
    )
    found = roles_of(Named(layers=nn.ModuleList([block]), head=linear()))
    assert found["layers.0.mamba.in_proj"] == "linear"
    assert found["layers.0.memory.in_proj"] == "linear"
    assert found["layers.0.output.dense"] == "linear mlp"


def test_mlp_needs_attention_beside_it():
    """Without attention anywhere in the block an unnamed layer has no part."""
    model = Named(layers=nn.ModuleList([Named(up=linear(), down=linear())]), head=linear())
    assert roles_of(model) == {"layers.0.up": "linear", "layers.0.down": "linear", "head": "head"}


def test_head_is_outside_every_block():
    """Without more to go by, the head is the last linear layer outside every block, wherever it stands."""
    model = Named(first=linear(), out=linear(), layers=nn.ModuleList([Named(fc=linear())]))
    assert roles_of(model) == {"first": "linear", "out": "head", "layers.0.fc": "linear"}


class Pretrained(Named):
    """What transformers models can say about themselves."""

    output = "nowhere"

    @property
    def base_model(self):
        return getattr(self, "backbone", self)

    def get_output_embeddings(self):
        return getattr(self, self.output, None)


def test_heads_are_outside_the_base_model():
    """Everything linear outside `base_model` is a head, and keeps no other role."""
    model = Pretrained(backbone=Named(pooler=linear()), mlp_head=Named(fc1=linear(), fc2=linear()))
    assert roles_of(model) == {"backbone.pooler": "linear", "mlp_head.fc1": "head", "mlp_head.fc2": "head"}


def test_second_transformer_outside_the_base_model_is_no_head():
    """Blocks with attention keep their roles, even outside `base_model`."""
    layers = nn.ModuleList([Named(attn=Named(q=linear()), fc=linear())])
    found = roles_of(Pretrained(backbone=Named(fc=linear()), codec=Named(layers=layers), score=linear()))
    assert found["codec.layers.0.attn.q"] == "attention linear"
    assert found["codec.layers.0.fc"] == "linear mlp"
    assert found["score"] == "head"


def test_output_embedding_is_the_head():
    """A model that is its own `base_model` has its output embedding as its head, or none."""
    model = Pretrained(fc=linear(), unembed=linear(), last=linear())
    assert "head" not in roles_of(model).values()
    model.output = "unembed"
    assert roles_of(model) == {"fc": "linear", "unembed": "head", "last": "linear"}


@pytest.mark.parametrize("error", [AttributeError, NotImplementedError, KeyError])
def test_what_a_model_raises_is_no_answer(error):
    """A `base_model` and a `get_output_embeddings` that raise are as good as none."""

    class Raising(Pretrained):
        @property
        def base_model(self):
            raise error

        @property
        def get_output_embeddings(self):
            raise error

    class RaisingLate(Raising):
        def get_output_embeddings(self):
            raise error

    assert roles_of(Raising(a=linear(), b=linear())) == {"a": "linear", "b": "head"}
    assert roles_of(RaisingLate(a=linear(), b=linear())) == {"a": "linear", "b": "linear"}


def test_foreign_base_model():
    """A `base_model` that is no part of the model says nothing about its heads."""

    class Foreign(Named):
        @property
        def base_model(self):
            return nn.Linear(1, 1)

    assert roles_of(Foreign(a=linear(), b=linear())) == {"a": "linear", "b": "head"}


def raw(*shape):
    return nn.Parameter(torch.zeros(shape))


def test_stacked_experts():
    """Stacked matrices that an "expert" module holds itself are MLP; its biases, and others' tensors, have no role."""
    model = Named(
        experts=Named(up=raw(2, 3, 3), up_bias=raw(2, 3)),
        x=Named.of("MixtralExperts", down=raw(2, 3, 3)),
        other=Named(table=raw(2, 3, 3)),
        expert_conv=nn.Conv2d(1, 1, 1),
    )
    assert roles_of(model) == {"experts.up": "mlp", "x.down": "mlp", "expert_conv": "conv"}


def test_norms_by_name():
    """A leaf that is called a norm and has a vector is one; a container, or one without a vector, is not."""
    model = Named(
        a=Named.of("T5LayerNorm", weight=raw(4)),
        b=Named.of("RMSNorm2d", weight=raw(4, 1)),
        c=Named.of("PreNorm", weight=raw(4), inner=nn.ReLU()),
        d=nn.Identity(),
    )
    assert roles_of(model) == {"a": "norm"}


def test_shared_module_has_its_first_path():
    """A layer under two paths is listed once, with the roles of the first."""
    shared = linear()
    assert roles_of(Named(attn=Named(q=shared), mlp=Named(fc=shared), head=linear())) == {
        "attn.q": "attention linear",
        "head": "head",
    }


def test_unknown_family_is_in_all():
    """A family that is no role by itself puts its modules in "all" alone."""
    found = find_roles(Named(rnn=nn.GRU(2, 2)), lambda module: "recurrent" if isinstance(module, nn.GRU) else None)
    assert found == {"rnn": {"all"}}


def test_uninitialised_parameters():
    """Lazy layers have no shape yet, and that is no reason to fail."""
    model = Named.of("Experts", experts=Named(lazy=nn.parameter.UninitializedParameter()), fc=nn.LazyLinear(2))
    assert roles_of(model) == {"fc": "linear"}


def test_each_module_is_asked_once():
    """`family` is called once for each module, shared ones included."""
    asked = []
    shared = linear()
    model = Named(a=shared, b=shared, c=Named(d=linear()))
    find_roles(model, asked.append)
    assert asked == list(model.modules())


def test_transformers_is_never_imported():
    """Finding roles does not import transformers."""
    code = "import sys; from peftkit.roles import find_roles; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
