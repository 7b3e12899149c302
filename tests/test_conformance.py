"""The built-in methods through the conformance kit, as a plugin's author would run it on a method of their own."""

import peftkit
from peftkit.testing import CASES, parametrize_with_checks

LORA = peftkit.LoRA(rank=2)
STARTS = [
    peftkit.LoRA(rank=2, init="pissa", rank_stabilized=True),
    peftkit.LoRA(rank=2, init="orthogonal", dropout=0.1),
]
IN_PLACE = [peftkit.Full(), peftkit.Frozen()]
SOME = (
    "Linear",
    "Conv2d",
    "Embedding",
    "LSTM",
    "Parameter",
    "LayerNorm",
    "BatchNorm1d",
    "shared module",
    "language model",
)


@parametrize_with_checks([LORA, peftkit.Full(keep_base=True)])
def test_every_case(check):
    """LoRA and a copy of the weights keep what peftkit promises of every method, on every layer kind."""
    check()


@parametrize_with_checks([*STARTS, *IN_PLACE], cases=[case for case in CASES if case.name in SOME])
def test_some_cases(check):
    """So do LoRA's other starts, and what trains weights in place or not at all."""
    check()
