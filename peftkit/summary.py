"""What is on a model now, in numbers and as a table."""

from dataclasses import dataclass

from torch import nn

from peftkit.installed import inner, installed, nbytes
from peftkit.tables import count, size, table


@dataclass(frozen=True, slots=True)
class AdapterSummary:
    """One adapter in numbers."""

    name: str
    methods: tuple[str, ...]
    """Its methods, with the fields that differ from their defaults."""
    layers: int
    """In how many layers it sits."""
    parameters: int
    """All its parameters, frozen ones too."""
    trainable: int
    """Those that have `requires_grad` now."""
    bytes: int
    """Of all its tensors, buffers too: about the size of its file."""
    dtypes: tuple[str, ...]
    active: bool
    merged: bool


@dataclass(frozen=True, slots=True)
class Summary:
    """A wrapped model in numbers; `print` it for a table."""

    adapters: tuple[AdapterSummary, ...]
    trainable: int
    """Every parameter of the model that has `requires_grad`."""
    total: int
    """Every parameter of the model, adapters included, a tied one once."""
    bytes: int
    """Of every parameter and buffer of the model, adapters included."""

    def __str__(self) -> str:
        """A table with a line an adapter, and the totals below it."""
        rows = []
        for a in self.adapters:
            state = " ".join(word for word, on in (("active", a.active), ("merged", a.merged)) if on)
            numbers = [str(a.layers), f"{a.trainable:,}", f"{a.parameters:,}", size(a.bytes)]
            rows.append([a.name, ", ".join(a.methods), *numbers, ", ".join(a.dtypes), state or "off"])
        headers = ["adapter", "method", "layers", "trainable", "parameters", "size", "dtype", "state"]
        share = f"{self.trainable / self.total:.2%}" if self.total else "0 %"
        totals = (
            f"trainable: {self.trainable:,} of {count(self.total, 'parameter')} ({share}); {size(self.bytes)} in all"
        )
        return "\n".join([table(headers, rows, right="layers trainable parameters size"), "", totals])


def summary(model: nn.Module) -> Summary:
    """Count what is installed on a model: adapters, their parameters, bytes and states.

    >>> import torch, peftkit
    >>> model = peftkit.wrap(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2)), "lora", rank=2)
    >>> print(peftkit.summary(model))
    adapter  method        layers  trainable  parameters   size  dtype    state
    ───────  ────────────  ──────  ─────────  ──────────  ─────  ───────  ──────
    default  lora(rank=2)       1         32          32  128 B  float32  active
    <BLANKLINE>
    trainable: 32 of 122 parameters (26.23%); 488 B in all
    """
    known = installed(model)
    root = inner(model)
    adapters = []
    for name, placements in known.adapters.items():
        parameters = {
            id(p): p
            for placement in placements
            for p in ([placement.in_place()] if placement.adapter is None else placement.adapter.parameters())
        }
        tensors = [t for placement in placements for _, t in placement.tensors()]
        adapters.append(
            AdapterSummary(
                name=name,
                methods=tuple(dict.fromkeys(str(placement.method) for placement in placements)),
                layers=len({id(placement.layer) for placement in placements if not placement.shared}),
                parameters=sum(p.numel() for p in parameters.values()),
                trainable=sum(p.numel() for p in parameters.values() if p.requires_grad),
                bytes=nbytes(tensors),
                dtypes=tuple(sorted({str(t.dtype).removeprefix("torch.") for t in tensors})),
                active=name in known.active,
                merged=name in known.merged,
            )
        )
    everything = list(root.parameters())
    return Summary(
        tuple(adapters),
        trainable=sum(p.numel() for p in everything if p.requires_grad),
        total=sum(p.numel() for p in everything),
        bytes=nbytes([*everything, *root.buffers()]),
    )
