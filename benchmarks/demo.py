"""The two-minute tour: one pretrained model, one real task, three ways to fine-tune it, measured side by side.

MiniLM (22.7 million parameters) learns to tell favourable from unfavourable film review sentences: with all of it
frozen but a new head, with LoRA on its attention projections and the head, and with every weight trained. All three
see the same sentences in the same order. Then the LoRA file is loaded into a fresh model, merged and unmerged, and
what must be identical is checked to the bit: the demo exits with 1 if it is not.

Run it with `make demo`. Everything is seeded: counts and sizes are the same on every machine, accuracies up to the
rounding of its arithmetic, and the times are this machine's own.
"""

import json
import logging
import math
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the weights come from a package: nothing is asked of a hub
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin while they wait make a busy machine crawl
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler otherwise writes its start and stop to stderr

import torch
import transformers
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import nn

import peftkit
from peftkit.workloads import assets

# transformers imports torchao where that is installed, and torchao says at length what it lacks on this machine.
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)

SEED = 0
TRAIN, TEST = 1_600, 3_000  # sentences
LENGTH = 32  # tokens a sentence
BATCH, EVAL_BATCH = 32, 50  # sentences
EPOCHS = 2
ROUNDS = 12  # training steps of each way that are timed


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to fine-tune: what `peftkit.wrap` is told, and the learning rate that suits it."""

    label: str
    rules: dict[str, object]
    lr: float


WAYS = [
    Way(label="head only", rules={"classifier": "full"}, lr=1e-2),
    Way(
        label="LoRA",
        rules={"{query,key,value}": peftkit.LoRA(rank=8), "classifier": "full"},
        lr=2e-3,
    ),
    Way(label="full", rules={"@all": "full"}, lr=1e-4),
]


@dataclass(frozen=True, kw_only=True)
class Data:
    """Token ids and attention masks `[sentences, tokens]`, labels `[sentences]`."""

    ids: torch.Tensor
    mask: torch.Tensor
    labels: torch.Tensor

    def batches(self, size: int, order: torch.Tensor | None = None) -> Iterator[dict[str, torch.Tensor]]:
        """The sentences in the given order, `size` at a time, as a model's keyword arguments.

        Padding that a whole batch shares is cut off: `[sentences, the longest one's tokens]`.
        """
        order = torch.arange(len(self.labels)) if order is None else order
        for rows in order.split(size):
            tokens = int(self.mask[rows].sum(1).max())
            yield {
                "input_ids": self.ids[rows, :tokens],
                "attention_mask": self.mask[rows, :tokens],
                "labels": self.labels[rows],
            }


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one way of fine-tuning took and gave."""

    way: Way
    model: nn.Module
    optimizer: torch.optim.Optimizer
    file: Path
    logits: torch.Tensor
    trainable: int
    total: int
    peak_bytes: int
    correct: int


class DemoError(RuntimeError):
    """Something that must hold did not."""


def main() -> int:
    console = Console()
    try:
        with tempfile.TemporaryDirectory() as folder:
            run(console, Path(folder))
    except (assets.AssetError, DemoError) as error:
        print(f"\nThe demo stops here. {error}", file=sys.stderr)
        return 1
    return 0


def run(console: Console, folder: Path) -> None:
    """The whole tour."""
    transformers.logging.set_verbosity_error()  # it reports the new head as missing weights, which it is meant to be
    transformers.logging.disable_progress_bar()
    weights, sentences = assets.minilm(), assets.movie_sentences()
    train, test = prepare(weights, sentences)
    console.print(
        f"MiniLM on film review sentences: {TRAIN:,} to train on, {EPOCHS} epochs; {TEST:,} others to test. "
        f"torch {torch.__version__}, threads: {torch.get_num_threads()}.",
        soft_wrap=True,
    )
    outcomes = []
    with progress_bar(console) as progress:
        for way in WAYS:
            task = progress.add_task(way.label, total=EPOCHS * math.ceil(TRAIN / BATCH) + math.ceil(TEST / EVAL_BATCH))
            outcomes.append(fine_tune(way, weights, train, test, folder, tick=lambda task=task: progress.advance(task)))
    times = step_times(outcomes, train)
    console.print(table(outcomes, times))
    console.print(in_words(outcomes, times), soft_wrap=True)
    lora = outcomes[1]
    console.print(round_trips(lora, weights, test), soft_wrap=True)


def prepare(weights: Path, sentences: list[tuple[str, int]]) -> tuple[Data, Data]:
    """Shuffle with a fixed seed, cut into a training and a test set, and tokenize."""
    sentences = random.Random(SEED).sample(sentences, TRAIN + TEST)
    tokenizer = transformers.AutoTokenizer.from_pretrained(weights)
    return tokenized(tokenizer, sentences[:TRAIN]), by_length(tokenized(tokenizer, sentences[TRAIN:]))


def tokenized(tokenizer: Callable[..., dict[str, torch.Tensor]], sentences: list[tuple[str, int]]) -> Data:
    texts, labels = zip(*sentences, strict=True)
    padding = {"padding": "max_length", "truncation": True, "max_length": LENGTH}
    tokens = tokenizer(list(texts), return_tensors="pt", **padding)
    return Data(ids=tokens["input_ids"], mask=tokens["attention_mask"], labels=torch.tensor(labels))


def by_length(data: Data) -> Data:
    """The same sentences, short ones first, so that batches for testing hold little padding."""
    order = data.mask.sum(1).argsort(stable=True)
    return Data(ids=data.ids[order], mask=data.mask[order], labels=data.labels[order])


def pretrained(weights: Path, seed: int = SEED) -> nn.Module:
    """MiniLM with a new head for two classes, whose start depends on the seed."""
    torch.manual_seed(seed)
    return transformers.AutoModelForSequenceClassification.from_pretrained(weights, num_labels=2)


def fine_tune(way: Way, weights: Path, train: Data, test: Data, folder: Path, *, tick: Callable[[], object]) -> Outcome:
    """Wrap a fresh model, train it, test it, save it, and measure the memory of a step."""
    model = peftkit.wrap(pretrained(weights), way.rules)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=way.lr, weight_decay=0.01)
    steps = EPOCHS * math.ceil(TRAIN / BATCH)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    shuffle = torch.Generator().manual_seed(SEED)  # its own generator: the order is the same for all three

    model.train()
    for _ in range(EPOCHS):
        for batch in train.batches(BATCH, torch.randperm(TRAIN, generator=shuffle)):
            training_step(model, optimizer, batch)
            schedule.step()
            tick()

    logits = predict(model, test, tick=tick)
    file = folder / f"{way.label}.safetensors"
    peftkit.save(model, file)
    return Outcome(
        way=way,
        model=model,
        optimizer=optimizer,
        file=file,
        logits=logits,
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        total=sum(p.numel() for p in model.parameters()),
        # One step more than the file and the predictions have; the schedule has ended at a learning rate of zero.
        peak_bytes=peak_of_a_step(model, optimizer, next(train.batches(BATCH))),
        correct=int((logits.argmax(1) == test.labels).sum()),
    )


def training_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, torch.Tensor]) -> None:
    model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def predict(model: nn.Module, data: Data, *, tick: Callable[[], object] = lambda: None) -> torch.Tensor:
    """Logits `[sentences, 2]` in evaluation mode."""
    model.eval()
    logits = []
    with torch.inference_mode():
        for batch in data.batches(EVAL_BATCH):
            logits.append(model(**batch).logits)
            tick()
    return torch.cat(logits)


def peak_of_a_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, torch.Tensor]) -> int:
    """The most bytes that tensors hold at any one time of a training step.

    This is what the allocator hands out, not the size of the process, which differs from run to run by as much as
    the methods differ. The profiler records each allocation (positive) and release (negative) of one step; their
    running sum, at its highest, is what the step adds to the tensors that were there before it: weights,
    optimizer state and the batch. The optimizer has stepped before, so its state is there and not counted twice.
    """
    model.train()
    before = {}  # by storage, since two tensors may share one
    state = (t for entry in optimizer.state.values() for t in entry.values() if isinstance(t, torch.Tensor))
    for tensor in [*model.parameters(), *model.buffers(), *state, *batch.values()]:
        storage = tensor.untyped_storage()
        before[storage.data_ptr()] = storage.nbytes()

    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        training_step(model, optimizer, batch)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))  # the only public place that has every single event
        events = [
            e for e in json.loads(trace.read_text(encoding="utf-8"))["traceEvents"] if e.get("name") == "[memory]"
        ]
    if not events:
        raise DemoError("torch's profiler recorded no memory event, so the memory of a step cannot be told.")

    added = highest = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        added += event["args"]["Bytes"]
        highest = max(highest, added)
    return sum(before.values()) + highest


def step_times(outcomes: list[Outcome], train: Data) -> list[list[float]]:
    """Seconds of a training step, for each way and round.

    The ways take turns, one step each, so that whatever else the machine does meets all of them alike: the ratio of
    two ways within a round says more than the ratio of their medians. The learning rates are zero by now.
    """
    batch = next(train.batches(BATCH))
    seconds: list[list[float]] = [[] for _ in outcomes]
    for _ in range(ROUNDS):
        for outcome, taken in zip(outcomes, seconds, strict=True):
            outcome.model.train()
            start = time.perf_counter()
            training_step(outcome.model, outcome.optimizer, batch)
            taken.append(time.perf_counter() - start)
    return seconds


def wilson(correct: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share, after Wilson (1927), who stays between 0 and 1.

    >>> [round(end, 3) for end in wilson(80, 100)]
    [0.711, 0.867]
    """
    share, shrink = correct / total, 1 + z * z / total
    middle = (share + z * z / (2 * total)) / shrink
    half = z / shrink * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return middle - half, middle + half


def progress_bar(console: Console) -> Progress:
    columns = TextColumn("{task.description:<9}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    return Progress(*columns, console=console)


def table(outcomes: list[Outcome], times: list[list[float]]) -> Table:
    """One row for each way, one column for each question; it fits into 80 characters."""
    made = Table(
        title="Three ways to fine-tune the same model",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 0, 0, 1),
        show_edge=False,
    )
    made.add_column("", no_wrap=True)
    headings = [
        "trained\nweights",
        "share",
        "file",
        "tensor\nmemory",
        "step\nms",
        "samples\n/s",
        "correct\n(95 % interval)",
    ]
    for heading in headings:
        made.add_column(heading, justify="right", no_wrap=True)
    for outcome, taken in zip(outcomes, times, strict=True):
        step = statistics.median(taken)
        low, high = wilson(outcome.correct, TEST)
        share = outcome.trainable / outcome.total
        made.add_row(
            outcome.way.label,
            f"{outcome.trainable:,}",
            f"{share:.1%}" if share > 0.001 else f"{share:.3%}",
            size(outcome.file.stat().st_size),
            size(outcome.peak_bytes),
            f"{step * 1000:.0f}",
            f"{BATCH / step:.0f}",
            f"{outcome.correct / TEST:.1%} ({low * 100:.1f}–{high * 100:.1f})",
        )
    return made


def size(count: int) -> str:
    """Bytes in the unit that suits them, in powers of ten.

    >>> size(302_000), size(91_000_000)
    ('302 kB', '91 MB')
    """
    return f"{count / 1e6:.0f} MB" if count >= 1e7 else f"{count / 1e3:,.0f} kB"


def in_words(outcomes: list[Outcome], times: list[list[float]]) -> str:
    """The table as sentences that the numbers of this very run decide."""
    frozen, lora, full = outcomes
    _, lora_times, full_times = times
    time_share = statistics.median(a / b for a, b in zip(lora_times, full_times, strict=True))
    fewer = full.trainable / lora.trainable
    smaller = full.file.stat().st_size / lora.file.stat().st_size
    return (
        f"LoRA trained {fewer:,.0f} times fewer weights than full fine-tuning, and its file is {smaller:,.0f} times "
        f"smaller. A training step held {lora.peak_bytes / full.peak_bytes:.0%} of the tensor memory and took "
        f"{time_share:.0%} of the time.\n"
        f"In accuracy, {compared(lora, full)}, and {compared(lora, frozen)}.\n"
        "This is one seed on one task: try yours before you believe a ranking.\n"
    )


def compared(a: Outcome, b: Outcome) -> str:
    """Better, worse, or not to be told apart: the intervals decide."""
    (a_low, a_high), (b_low, b_high) = wilson(a.correct, TEST), wilson(b.correct, TEST)
    points = abs(a.correct - b.correct) / TEST * 100
    if a_low > b_high:
        return f"{a.way.label} beats {b.way.label} by {points:.1f} points"
    if a_high < b_low:
        return f"{a.way.label} stays {points:.1f} points behind {b.way.label}"
    return f"{a.way.label} and {b.way.label} cannot be told apart on {TEST:,} sentences (the intervals overlap)"


def round_trips(lora: Outcome, weights: Path, test: Data) -> str:
    """Load the LoRA file into a fresh model, merge it and unmerge it, and compare all predictions each time."""
    fresh = pretrained(weights, seed=SEED + 1)  # another start of the head, so that agreement is the file's doing
    peftkit.load(fresh, lora.file)
    loaded = predict(fresh, test)
    if not torch.equal(loaded, lora.logits):
        raise DemoError(
            f"The reloaded LoRA file gives other predictions: logits differ by up to {gap(loaded, lora.logits):.3g}."
        )
    peftkit.merge(fresh)
    merged = predict(fresh, test)
    peftkit.unmerge(fresh)
    unmerged = predict(fresh, test)
    if not torch.equal(unmerged, loaded):
        raise DemoError(f"After unmerge the predictions are others: by up to {gap(unmerged, loaded):.3g}.")
    largest = loaded.abs().max().item()
    moved = int((merged.argmax(1) != loaded.argmax(1)).sum())
    error = gap(merged, loaded)
    return (
        f"Loaded the LoRA file ({size(lora.file.stat().st_size)}) into a fresh MiniLM: all {TEST:,} predictions are "
        "identical to the bit.\n"
        f"Merged it into the weights: logits differ by at most {error:.1e}, which is {error / largest:.1e} of the "
        f"largest logit; {moved} of {TEST:,} predicted classes changed.\n"
        f"Unmerged it again: all {TEST:,} predictions are identical to the bit to those before the merge."
    )


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest absolute difference."""
    return (a - b).abs().max().item()


if __name__ == "__main__":
    sys.exit(main())
