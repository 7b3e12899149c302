"""Writes one adapter as an HF PEFT folder. What that cannot hold is an error that names it, and nothing is written."""

import dataclasses
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftkit.adapter import LowRank, Site
from peftkit.composition import base_class, raw_parameter
from peftkit.errors import FileError
from peftkit.formats.declared import MODULES, TOKENS, declaring, entries, refuse_site
from peftkit.formats.folders import write_folder
from peftkit.formats.from_folder import INSIDE
from peftkit.formats.layouts import layout_of, theirs
from peftkit.formats.matching import Wrapped, named, names_of
from peftkit.formats.parts import at_or_below, bias_entry, first_holders, split_whole
from peftkit.formats.places import ROOT, key_of
from peftkit.formats.servable import even
from peftkit.installed import Placement, inner, installed
from peftkit.layers.kind import Parameter
from peftkit.method import HuggingFace, Method
from peftkit.resolve import module_site, modules_of, site_of

_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
"""How transformers ends the names of its classes for a task → HF PEFT's `task_type`."""


def write(model: nn.Module, name: str, folder: Path, *, servable: bool = False) -> None:
    """Write the adapter `name` to a folder that HF PEFT's `PeftModel.from_pretrained` reads; with `servable`, vLLM too.

    Raises `FileError` for what such a folder cannot hold, and then writes nothing.
    """
    placements = installed(model).placements(name)
    writer = _Writer(inner(model), name, even(placements) if servable else placements)
    write_folder(folder, writer.config(), writer.tensors())


def _declared(placement: Placement) -> tuple[type[Method], HuggingFace]:
    found = declaring(type(placement.method))
    if found is None:
        raise FileError(
            f"{placement.method.name} at {placement.name} has no counterpart in HF PEFT's folders; save it with "
            "format='peftkit'"
        )
    return found


class _Writer:
    """One adapter's placements, sorted by what becomes of them."""

    def __init__(self, root: nn.Module, name: str, placements: Sequence[Placement]) -> None:
        self.root, self.name = root, name
        self.modules = modules_of(root)
        declared = [(placement, *_declared(placement)) for placement in placements]
        self.tokens = [p for p, _, hf in declared if hf.part == TOKENS]
        self.whole = [p for p, _, hf in declared if hf.part == MODULES]
        main = sorted(((p, cls) for p, cls, hf in declared if hf.part is None), key=lambda each: each[0].shared)
        if not main:
            main, self.tokens = [(p, cls) for p, cls, hf in declared if hf.part == TOKENS], []
        if not main:
            raise FileError(
                f"adapter {name!r} has no method that HF PEFT's folders can be of: "
                f"{', '.join(sorted({p.method.name for p in placements}))} stands there beside another only"
            )
        self._refuse_several(main)
        self.hf: HuggingFace = main[0][1].hf  # type: ignore[assignment]
        self.main = [p for p, _ in main if not p.shared]
        self.shared = [p for p, _ in main if p.shared]
        self.sites = {p.name: _site(p) for p in (*self.main, *self.tokens, *self.whole)}
        for p in self.main:
            self._refuse(p)
        by_module = any("{weight}" in key for key in self.hf.tensors.values())
        single: dict[str, list[str]] = {}
        for p in self.main:
            if isinstance(self.sites[p.name].kind, Parameter) and not by_module:
                single.setdefault(p.path, []).append(p.weight)
        self.wrapped = Wrapped(single, self.modules)
        self.whole_paths, self.biases = split_whole(self.modules, self.whole)

    def _refuse_several(self, main: Sequence[tuple[Placement, type[Method]]]) -> None:
        first, cls = main[0]
        other = next((p for p, its in main if its is not cls), None)
        if other is not None:
            raise FileError(
                f"HF PEFT's folder is of one method, and adapter {self.name!r} has {first.method.name} at "
                f"{first.name}, {other.method.name} at {other.name}; save them as two adapters"
            )

    def _refuse(self, placement: Placement) -> None:
        site, adapter = self.sites[placement.name], placement.adapter
        reason = refuse_site(self.hf, site)
        if isinstance(adapter, LowRank) and adapter.dropout and isinstance(site.kind, Parameter):
            reason = "HF PEFT has no dropout on single parameters"
        if reason:
            raise FileError(f"{placement.name}: {reason}")

    # ------------------------------------------------------------------------------------------- configuration

    def config(self) -> dict[str, Any]:
        """The entries that are needed, and none that is at its default."""
        made: dict[str, Any] = {"peft_type": self.hf.peft_type, "inference_mode": True}
        base = getattr(getattr(self.root, "config", None), "name_or_path", None)
        if isinstance(base, str) and base:
            made["base_model_name_or_path"] = base
        methods = {self._target(p): p.method for p in self.main}
        if self.hf.tasks:
            made["task_type"] = self._task()
        if not self.hf.tensors:
            return made | entries(self.hf, methods, [])
        paths = [path for path in self.modules if path]
        chosen = first_holders(self.modules, self.main) if self.hf.part == TOKENS else self.main
        layers = {p.path for p in chosen if p.path not in self.wrapped.order}
        if "" in layers:
            raise FileError("HF PEFT adapts layers within a model, and this model is a single layer; put it in another")
        targets = names_of(layers, paths) if layers else []
        made |= {"target_modules": targets, **entries(self.hf, methods, targets)}
        if self.wrapped.order:
            made["target_parameters"] = self._parameters()
        if any(_is_transposed(self.sites[p.name]) for p in self.main):
            made["fan_in_fan_out"] = True
        if self.whole_paths:
            made[MODULES] = sorted(self.whole_paths)
        if self.biases:
            made["bias"] = bias_entry(self.modules, self.hf, self.main, self.biases, self.whole_paths)
        if self.tokens:
            made[TOKENS] = {
                p.path: next(iter(_plain_fields(p).values())) for p in first_holders(self.modules, self.tokens)
            }
        return made

    def _target(self, placement: Placement) -> str:
        return placement.name if placement.path in self.wrapped.order else placement.path

    def _parameters(self) -> list[str]:
        """Last segments, if they mean these parameters alone; else whole paths."""
        wanted = {f"{path}.{name}" for path, names in self.wrapped.order.items() for name in names}
        there = {f"{path}.{name}" for path, module in self.modules.items() for name in module._parameters}
        for names in (sorted({each.rpartition(".")[2] for each in wanted}), sorted(wanted)):
            if {each for each in there if named(each, names)} == wanted:
                return names
        other = next(each for each in sorted(there - wanted) if named(each, wanted))
        raise FileError(f"HF PEFT's target_parameters would mean {other} too, which is not adapted here")

    def _task(self) -> str:
        name = base_class(self.root).__name__
        task = next((task for end, task in _TASKS.items() if name.endswith(end)), "")
        if task in self.hf.tasks:
            return task
        raise FileError(
            f"HF PEFT runs {self.hf.peft_type} by a task, which must be one of {', '.join(self.hf.tasks)}; "
            f"of {name} it is {task or 'not known'}"
        )

    # ------------------------------------------------------------------------------------------------- tensors

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the adapter, under HF PEFT's names."""
        made: dict[str, Tensor] = {}
        lost: list[str] = []
        for p in self.shared:
            for name, tensor in p.adapter.state_dict().items():  # type: ignore[union-attr]
                key = self.hf.prefix + self.hf.shared[name] if name in self.hf.shared else None
                self._put(made, lost, p, name, key, tensor)
        for p in self.main:
            self._put_adapter(made, lost, p, self.hf)
        for p in first_holders(self.modules, self.tokens):
            hf: Any = _declared(p)[1]
            inside = {n: INSIDE[TOKENS] + key for n, key in hf.tensors.items()}
            self._put_adapter(made, lost, p, dataclasses.replace(hf, tensors=inside))
        self._put_whole(made)
        if lost:
            warnings.warn(
                f"HF PEFT's folders do not hold what only further training needs: {', '.join(sorted(set(lost)))}. "
                "Training that goes on from the folder begins its schedule anew",
                stacklevel=5,
            )
        return made

    def _put_adapter(self, made: dict[str, Tensor], lost: list[str], p: Placement, hf: HuggingFace) -> None:
        site = self.sites[p.name]
        for name, tensor in p.adapter.state_dict().items():  # type: ignore[union-attr]
            key = key_of(self.wrapped, hf, site, name)
            self._put(made, lost, p, name, key, theirs(tensor.detach(), layout_of(hf, site, name), site))

    def _put(
        self, made: dict[str, Tensor], lost: list[str], p: Placement, name: str, key: str | None, tensor: Tensor
    ) -> None:
        if key is not None:
            made[key] = tensor
        elif name not in self.hf.unsaved:
            starts = isinstance(p.adapter, LowRank) and p.adapter.start() is not None
            hint = (
                f". peftkit.combine(model, {{{self.name!r}: 1.0}}, name=..., how='cat') makes plain factors of it"
                if starts
                else ""
            )
            raise FileError(f"HF PEFT's folders have no place for {p.name}.{name}, which {p.method} has{hint}")
        elif not (tensor == self.hf.unsaved[name]).all():
            lost.append(name)

    def _put_whole(self, made: dict[str, Tensor]) -> None:
        adapted = {p.path for p in self.main}
        for p in self.whole:
            bias = p in self.biases and p.path in adapted
            key = ROOT + f"{self.wrapped.path(p.path)}{'.base_layer' if bias else ''}.{p.weight}".removeprefix(".")
            site = self.sites[p.name]
            if p.adapter is None:
                made[key] = p.in_place().detach()
                continue
            for name, tensor in p.adapter.state_dict().items():
                made[key] = theirs(tensor.detach(), layout_of(_declared(p)[1], site, name), site)
        for path in self.whole_paths:
            for below, module in self.modules.items():
                if at_or_below(below, path):
                    for name, buffer in module._buffers.items():
                        if buffer is not None and name not in module._non_persistent_buffers_set:
                            made[f"{ROOT}{self.wrapped.path(below)}.{name}"] = buffer


def _site(placement: Placement) -> Site:
    if placement.weight == "module":
        return module_site(placement.path, placement.layer)
    return site_of(placement.path, placement.layer, placement.weight)


def _plain_fields(placement: Placement) -> dict[str, Any]:
    fields = placement.method.fields()
    return {entry: fields[ours] for ours, entry in _declared(placement)[1].fields.items()}


def _is_transposed(site: Site) -> bool:
    """Whether a linear layer stores its weight as `[in, out]`."""
    if site.kind is None or site.kind.family != "linear":
        return False
    stored = torch.empty(raw_parameter(site.layer, site.weight).shape, device="meta")
    return not site.kind.matrix(site.layer, site.weight, stored).is_contiguous()
