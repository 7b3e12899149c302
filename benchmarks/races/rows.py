"""The table of rows: what is raced, over which base, and the figure to reach.

A row has a base and one or more sides. A training step's base is the floor, the same model frozen; work around the
step has no floor, so there the base is HF PEFT and the target is a time. Sides are made when their turn comes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from races import around, steps
from races.models import BILLION, SMALL, Shape
from races.steps import Setting
from races.timing import Side

Make = Callable[[Path], Side]

UNIT_RATIO, UNIT_SECONDS = "ratio", "seconds"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row. `name` is its test's id; `group` is the table that it stands in."""

    name: str
    group: str
    title: str
    base: str | Mapping[str, str]
    """The side that the others are divided by; or, side by side, which."""

    sides: Mapping[str, Make]
    """How each side is made, given an empty folder."""

    unit: str = UNIT_RATIO
    target: float | None = None
    """What peftkit must not exceed: a ratio to the base, or seconds."""

    exact_targets: Mapping[str, float] = field(default_factory=dict)
    """What peftkit's exact figures must not exceed."""

    no_target: str = ""
    """Why there is no target."""

    note: str = ""
    tuned: bool = False
    """Raced once more with glibc's allocator tuned."""

    device: str = "cpu"
    exact: bool = True
    """Whether the sides' exact figures are wanted."""

    def base_of(self, side: str) -> str:
        return self.base if isinstance(self.base, str) else self.base[side]

    def racers(self) -> list[str]:
        """The sides that race: all but those which are nothing but a base."""
        bases = {self.base} if isinstance(self.base, str) else set(self.base.values())
        return [side for side in self.sides if side not in bases]


def _alone(make: Callable[..., Side], *args: object, **options: object) -> Make:
    """A side that needs no folder."""
    return lambda _: make(*args, **options)


def _training(libraries: list[str], setting: Setting, **options: object) -> dict[str, Make]:
    return {name: _alone(steps.training, name, setting, **options) for name in libraries}


# ------------------------------------------------------------------------------------------ the training step

PEERS = ["floor", "peftkit", "by hand", "hf-peft", "loralib", "lycoris", "full"]
MIXED = [
    "floor",
    "peftkit",
    "by hand",
    "hf-peft",
    "full",
]  # loralib and LyCORIS do not mix a bf16 base with float32 factors
BF16 = torch.bfloat16


def _step(name: str, title: str, setting: Setting, target: float, megabytes: float, libraries: list[str]) -> Row:
    return Row(
        name=f"step-{name}",
        group="step",
        title=title,
        base="floor",
        sides=_training(libraries, setting),
        target=target,
        exact_targets={"saved_bytes": megabytes * 1e6},
        tuned=True,
    )


STEPS = [
    _step("fp32", "fp32", Setting(), 1.10, 88.1, PEERS),
    _step("fp32-dropout", "fp32, dropout 0.1", Setting(dropout=0.1), 1.17, 89.5, PEERS),
    _step("autocast", "bf16 autocast", Setting(autocast=True), 1.18, 83, PEERS),
    _step("autocast-dropout", "bf16 autocast, dropout 0.1", Setting(autocast=True, dropout=0.1), 1.32, 83, PEERS),
    _step("bf16", "bf16 base, float32 factors", Setting(dtype=BF16), 1.22, 55, MIXED),
    _step("bf16-dropout", "the same, dropout 0.1", Setting(dtype=BF16, dropout=0.1), 1.35, 55, MIXED),
]

LEAN = replace(
    _step("autocast-lean", "bf16 autocast, `kernels.lean`", Setting(autocast=True, lean=True), 0, 66, MIXED[:2]),
    target=None,
    no_target="the lean mode has a target for its bytes alone",
)

DORA = Row(
    name="step-dora",
    group="methods",
    title="DoRA's step ÷ peftkit's LoRA step, fp32",
    base="peftkit LoRA",
    sides={
        "peftkit LoRA": _alone(steps.training, "peftkit", Setting()),
        "peftkit": _alone(steps.training, "peftkit", Setting(), method="dora"),
        "hf-peft": _alone(steps.training, "hf-peft", Setting(), method="dora"),
    },
    target=1.12,
    exact_targets={"saved_bytes": 106e6},
)

# ------------------------------------------------------------------------------------------------ one layer


def _layer(tokens: int, fan_out: int, dropout: float) -> Row:
    return Row(
        name=f"layer-{tokens}-{fan_out}" + ("-dropout" if dropout else ""),
        group="layer",
        title=f"{tokens:,} tokens, 1024 × {fan_out}" + (f", dropout {dropout}" if dropout else ""),
        base="floor",
        sides={
            library: _alone(steps.layer, library, tokens, 1024, fan_out, dropout)
            for library in ("floor", "peftkit", "hf-peft", "loralib")
        },
        target=None if dropout else 1.13,
        no_target="with dropout the goal is stated for whole steps; HF PEFT's known range is 1.17 to 1.60"
        if dropout
        else "",
    )


LAYERS = [_layer(tokens, out, p) for p in (0.0, 0.1) for tokens in (256, 2048) for out in (1024, 4096)]

# ------------------------------------------------------------------------------------------------ inference

INFERENCE = [
    Row(
        name=f"inference-{tokens}",
        group="inference",
        title=f"{tokens} token{'s' * (tokens > 1)}, not merged",
        base="floor",
        sides={name: _alone(steps.inference, name, tokens) for name in ("floor", "peftkit", "by hand", "hf-peft")},
        target=target,
    )
    for tokens, target in ((1, 1.12), (512, 1.07))
]

# ------------------------------------------------------------------------------------------- many adapters


def _routed(tokens: int, *, kept: bool) -> Row:
    many = partial(_alone, steps.batch_of_many)
    return Row(
        name=f"routed-{tokens}" + ("" if kept else "-entered"),
        group="routed",
        title=f"8 samples of {tokens} token{'s' * (tokens > 1)}, 8 adapters"
        + ("" if kept else ", `routed` entered for every batch"),
        base="one adapter",
        sides={
            "one adapter": _alone(steps.batch_of_one, tokens),
            "peftkit": many("peftkit", tokens, kept=kept),
            **({"by hand": many("by hand", tokens)} if kept else {}),
            "hf-peft": many("hf-peft", tokens),
        },
        target=1.15 if tokens == 1 else 1.06,
        note="at least twice as fast as HF PEFT" if tokens == 1 else "",
    )


ROUTED = [
    *(_routed(tokens, kept=True) for tokens in (1, 16, 128)),
    _routed(1, kept=False),
    Row(
        name="routed-training-64",
        group="routed",
        title="8 samples of 64 tokens, 8 adapters, forward and backward",
        base="one adapter",
        sides={
            "one adapter": _alone(steps.training_of_many, 1, 64),
            "peftkit": _alone(steps.training_of_many, 8, 64),
        },
        target=1.06,
        note="HF PEFT has no such training",
    ),
]

# --------------------------------------------------------------------------------------- around the step


def _around(
    name: str,
    title: str,
    target: float,
    make: Callable[[str], Make],
    libraries: tuple[str, ...] = ("hf-peft", "peftkit"),
) -> Row:
    return Row(
        name=name,
        group="around",
        title=title,
        base="hf-peft",
        sides={library: make(library) for library in libraries},
        unit=UNIT_SECONDS,
        target=target,
    )


def _in_folder(work: Callable[..., Side], **options: object) -> Callable[[str], Make]:
    return lambda library: lambda folder: work(library, folder, **options)


def _without(work: Callable[..., Side]) -> Callable[[str], Make]:
    return lambda library: _alone(work, library)


PACKAGES = {"peftkit": "peftkit", "hf-peft": "peft"}

AROUND = [
    _around("import", "`import` on top of torch", 0.05, lambda library: _alone(around.importing, PACKAGES[library])),
    _around("wrap-meta", "wrap Llama-7B on the meta device, 224 linears", 0.03, _without(around.wrap_meta)),
    _around("wrap-1400", "wrap 1,400 small linears, rank 4", 0.18, _without(around.wrap)),
    _around("save-1400", "save their adapter", 0.08, _in_folder(around.save)),
    _around("load-1400", "load it as a second adapter", 0.17, _in_folder(around.load)),
    _around("switch-1400", "switch the active adapter", 0.005, _in_folder(around.switch)),
    _around("merge-1400", "merge them all", 0.10, _without(around.merge)),
]

LOAD_35TH = Row(
    name="load-35th",
    group="growth",
    title="load the adapter of 1,400 linears as the 35th ÷ as the 2nd",
    base="as the 2nd",
    sides={
        "as the 2nd": _in_folder(around.load)("peftkit"),
        "peftkit": _in_folder(around.load, nth=35)("peftkit"),
    },
    target=1.0,
    note="HF PEFT would take minutes to get there; the curve over adapters has it on a smaller model",
)

# ------------------------------------------------------------------------------------------- scaling curves

CURVE = "a curve: how a ratio moves, not where it must be"


def _curve(axis: str, value: int, shape: Shape = SMALL, rank: int = steps.RANK) -> Row:
    return Row(
        name=f"scaling-{axis}-{value}",
        group="scaling",
        title=f"{axis} {value:,}",
        base="floor",
        sides=_training(["floor", "peftkit", "hf-peft"], Setting(), shape=shape, rank=rank),
        no_target=CURVE,
        exact=False,
    )


def _adapters(work: str, make: Callable[..., Side], option: str, first: int, value: int, blocks: int = 20) -> Row:
    """With `value` adapters ÷ with `first`, for each library by itself, on 140 linears."""
    libraries = ("peftkit", "hf-peft")
    sides = {
        f"{library}, {first}": _in_folder(make, blocks=blocks, **{option: first})(library) for library in libraries
    }
    sides |= {library: _in_folder(make, blocks=blocks, **{option: value})(library) for library in libraries}
    return Row(
        name=f"scaling-{work}-{value}",
        group="growth",
        title=f"140 linears: {work} with {value} adapters ÷ with {first}",
        base={library: f"{library}, {first}" for library in libraries},
        sides=sides,
        no_target=CURVE,
        exact=False,
    )


SCALING = [
    *(_curve("tokens", n, replace(SMALL, length=n // SMALL.batch)) for n in (64, 256, 1024, 2048)),
    *(_curve("rank", n, rank=n) for n in (4, 64, 128)),
    *(
        _curve("width", n, replace(SMALL, hidden=n, intermediate=n * 43 // 16, heads=n // 64, kv_heads=n // 64))
        for n in (128, 256, 1024)
    ),
    *(_curve("layers", n, replace(SMALL, layers=n)) for n in (1, 2, 8)),
    *(_adapters("load", around.load, "nth", 2, n) for n in (4, 16)),
    *(_adapters("switch", around.switch, "adapters", 2, n) for n in (4, 16)),
]

# ------------------------------------------------------------------------------------------------- on a GPU


def gpu_rows(shape: Shape = BILLION, device: str = "cuda", compiler: str = "inductor") -> list[Row]:
    """A training step of a 1B decoder in bf16, eager and compiled. The arguments let a test run it small, on a CPU."""
    return [
        Row(
            name=f"gpu-{'compiled' if backend else 'eager'}" + ("-dropout" if dropout else ""),
            group="gpu",
            title=f"{'compiled' if backend else 'eager'}" + (f", dropout {dropout}" if dropout else ""),
            base="floor",
            sides=_training(
                MIXED,
                Setting(dropout=dropout, dtype=BF16, device=device, compiler=backend),
                shape=shape,
            ),
            no_target="no figure was set for a GPU before there were measurements",
            device=device,
        )
        for backend in ("", compiler)
        for dropout in (0.0, 0.1)
    ]


ROWS = [*STEPS, LEAN, DORA, *LAYERS, *INFERENCE, *ROUTED, *AROUND, LOAD_35TH, *SCALING, *gpu_rows()]


def rows_for(device: str) -> list[Row]:
    """The rows of one device, `"cpu"` or `"cuda"`."""
    return [row for row in ROWS if row.device == device]
