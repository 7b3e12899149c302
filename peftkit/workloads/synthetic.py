"""Models of familiar shapes with random weights, on random inputs: for time and memory, with nothing to download.

The small ones are the published architectures made narrow and shallow, so that a training step takes about a second on
two cores; the tiny ones are for tests, and for trying a command out. None has dropout.
"""

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peftkit
from peftkit.workload import Metric, Split
from peftkit.workloads.needs import device_of, needs_transformers


class _Mlp(peftkit.Workload):
    """Three linear layers learn to reproduce a random teacher of the same shape; its last layer is new to the task."""

    width: ClassVar[int]
    classes: ClassVar[int] = 10

    def model(self) -> nn.Module:
        width = self.width
        return nn.Sequential(
            nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, self.classes)
        )

    def batches(self, seed: int) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            x = torch.randn(self.per_step, self.width, generator=generator)
            yield x, x[:, : self.classes].argmax(1)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        x, y = batch
        return F.cross_entropy(model(x), y)


class TinyMlp(_Mlp):
    """For tests, with a task that is learned in seconds."""

    name = "tiny-mlp"
    summary = "three linear layers of width 32, random weights: which of ten inputs is the largest"
    width = 32
    per_step = 16
    head = "4"
    metric = Metric(name="accuracy", unit="%", higher_is_better=True, items=512)
    steps = 40
    forgets = "agreement with the base"

    def evaluate(self, model: nn.Module, split: Split) -> float:
        x, y = self._items(split)
        found: Tensor = model(x.to(device_of(model))).argmax(1).cpu()
        return 100 * (found == y).float().mean().item()

    def forgetting(self, model: nn.Module) -> float:
        x, _ = self._items("test")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            before = self.model()(x)
        return F.cosine_similarity(model(x.to(device_of(model))).cpu(), before).mean().item()

    def _items(self, split: Split) -> tuple[Tensor, Tensor]:
        x = torch.randn(512, self.width, generator=torch.Generator().manual_seed(1_000_000 + len(split)))
        return x, x[:, : self.classes].argmax(1)


class Mlp(_Mlp):
    """Wide enough that a matrix product is what takes the time."""

    name = "mlp"
    summary = "three linear layers of width 2,048, random weights"
    width = 2048
    per_step = 256


class _Text(peftkit.Workload):
    """A transformers model for token ids, from its configuration alone."""

    unit = "tokens"
    architecture: ClassVar[str]
    configuration: ClassVar[str]
    sizes: ClassVar[dict[str, Any]]
    shape: ClassVar[tuple[int, int]]
    """Sequences and tokens of a batch."""
    labels: ClassVar[int] = 0
    """Classes of a sequence; 0 for a model that predicts the next token."""

    def model(self) -> nn.Module:
        library = needs_transformers(self.name)
        config = getattr(library, self.configuration)(**self.sizes, attn_implementation="sdpa")
        model: nn.Module = getattr(library, self.architecture)(config)
        return model

    def batches(self, seed: int) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            ids = torch.randint(self.sizes["vocab_size"], self.shape, generator=generator)
            labels = torch.randint(self.labels, self.shape[:1], generator=generator) if self.labels else ids
            yield {"input_ids": ids, "labels": labels}


class TinyLlama(_Text):
    """For tests."""

    name = "tiny-llama"
    summary = "a Llama of 2 layers, width 32, random weights"
    architecture, configuration = "LlamaForCausalLM", "LlamaConfig"
    sizes: ClassVar = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    shape = 2, 16
    per_step = 32


class TinyBert(_Text):
    """For tests."""

    name = "tiny-bert"
    summary = "a BERT of 2 layers, width 32, with a head for two classes, random weights"
    architecture, configuration = "BertForSequenceClassification", "BertConfig"
    sizes: ClassVar = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 64, "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip
    shape = 2, 16
    per_step = 32
    labels = 2
    head = "@head"


class LlamaSmall(_Text):
    """Rotary positions, grouped queries, a gated feed-forward part and RMS norms."""

    name = "llama-small"
    summary = "a Llama of 4 layers, width 512, random weights, 4 × 128 tokens"
    architecture, configuration = "LlamaForCausalLM", "LlamaConfig"
    sizes: ClassVar = {
        "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 4,
        "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 512,
    }  # fmt: skip
    shape = 4, 128
    per_step = 512


class Gpt2Small(_Text):
    """Transposed linear layers (`Conv1D`), one for queries, keys and values together."""

    name = "gpt2-small"
    summary = "a GPT-2 of 4 layers, width 384, random weights, 4 × 128 tokens"
    architecture, configuration = "GPT2LMHeadModel", "GPT2Config"
    sizes: ClassVar = {
        "vocab_size": 8192, "n_embd": 384, "n_layer": 4, "n_head": 6, "n_positions": 512, "resid_pdrop": 0.0,
        "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    shape = 4, 128
    per_step = 512


class BertSmall(_Text):
    """Post-norm blocks, with a head for two classes."""

    name = "bert-small"
    summary = "a BERT of 4 layers, width 512, with a head for two classes, random weights, 16 × 64 tokens"
    architecture, configuration = "BertForSequenceClassification", "BertConfig"
    sizes: ClassVar = {
        "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4,
        "num_attention_heads": 8, "max_position_embeddings": 512, "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip
    shape = 16, 64
    per_step = 1024
    labels = 2
    head = "@head"


class VitSmall(peftkit.Workload):
    """A vision transformer."""

    name = "vit-small"
    summary = "a ViT of 6 layers, width 384, random weights, 8 images of 112 × 112"
    per_step = 8
    head = "@head"

    def model(self) -> nn.Module:
        library = needs_transformers(self.name)
        config = library.ViTConfig(
            hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=6, image_size=112,
            patch_size=16, num_labels=10, attn_implementation="sdpa",
        )  # fmt: skip
        model: nn.Module = library.ViTForImageClassification(config)
        return model

    def batches(self, seed: int) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield {
                "pixel_values": torch.randn(self.per_step, 3, 112, 112, generator=generator),
                "labels": torch.randint(10, (self.per_step,), generator=generator),
            }


@peftkit.hookimpl
def peftkit_workloads() -> list[type[peftkit.Workload]]:
    """The workloads of this module."""
    return [TinyMlp, TinyLlama, TinyBert, Mlp, LlamaSmall, Gpt2Small, BertSmall, VitSmall]
