"""Reads an HF PEFT folder as what our own files hold: places in a model, and tensors by our names. Changes nothing.

Where the adapter goes is read from the tensors' names, and what each layer's fields are from the configuration. Every
tensor must be used, every one that is due must be there, and each entry must be understood.
"""

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftkit.adapter import Site
from peftkit.composition import raw_parameter
from peftkit.errors import BaseMismatchError, FormatError, did_you_mean
from peftkit.formats.declared import MODULES, TOKENS, find, find_part, make_method, maker, refuse_unknown
from peftkit.formats.folders import read_folder
from peftkit.formats.layouts import layout_of, ours, theirs
from peftkit.formats.matching import ends
from peftkit.formats.places import ROOT, Places, key_of
from peftkit.install import build, holder_of
from peftkit.installed import inner
from peftkit.method import HuggingFace, Method
from peftkit.plan import plan, shared_for, shared_states, shares
from peftkit.resolve import modules_of, site_of
from peftkit.restoring import Place, made_from

INSIDE = {TOKENS: "token_adapter."}
"""What stands before a part's tensors."""

Step = tuple[Site, Method]


def read(
    model: nn.Module, folder: Path, own: Mapping[str, type[Method]], *, check_base: bool = True
) -> tuple[list[Place], dict[str, Tensor]]:
    """Where the folder's adapter goes in this model, and its tensors by our names: `<layer>.<weight>.<parameter>`.

    `own` are methods that no package offers, by name. Raises `FormatError` for a folder that is damaged or that holds
    what cannot be had here, `BaseMismatchError` for another base, `MethodError` where no method reads it.
    """
    config, tensors = read_folder(folder)
    reader = _Reader(inner(model), folder, config, tensors)
    method = find(config, own)
    refuse_unknown(config, _hf(method))
    steps = reader.steps(method)
    reader.take(_hf(method), steps)
    if config.get(TOKENS):
        part = find_part(TOKENS, own)
        reader.take(_inside(_hf(part), TOKENS), reader.tokens(part))
    reader.take_whole(lambda: find_part(MODULES, own), _hf(method), steps)
    reader.take_base(check_base=check_base)
    return reader.places, reader.values


def _hf(method: type[Method]) -> HuggingFace:
    found: Any = method.hf  # it was found by it
    return found  # type: ignore[no-any-return]


def _inside(hf: HuggingFace, entry: str) -> HuggingFace:
    return dataclasses.replace(hf, tensors={name: INSIDE.get(entry, "") + key for name, key in hf.tensors.items()})


class _Reader:
    """What is left of a folder's tensors, and what has been made of the others."""

    def __init__(self, root: nn.Module, folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.root, self.folder, self.config, self.left = root, folder, config, tensors
        self.all = dict(tensors)
        self.modules = modules_of(root)
        self.model = Places(self.modules, _names(config, "target_parameters"))
        self.places: list[Place] = []
        self.values: dict[str, Tensor] = {}

    def steps(self, method: type[Method]) -> list[Step]:
        """The sites of the folder's method, each with its fields."""
        hf, make = _hf(method), maker(method, self.config)
        if not hf.tensors:  # it adapts the model as a whole, and its tensors name no layer
            return list(plan(self.root, make("")).steps)
        sites = self.model.sites(hf, self.left)
        if not sites:
            raise FormatError(
                f"{self.folder} has no tensor of its method: none is named {', '.join(hf.tensors.values())}"
            )
        if hf.part == TOKENS:
            sites = list({each.name: each for site in sites for each in self._holders(hf, site)}.values())
        return [(site, make(self._target(site))) for site in sites]

    def _target(self, site: Site) -> str:
        """What the keys of a pattern are matched against."""
        return site.name if site.weight in self.model.wrapped.order.get(site.path, ()) else site.path

    def tokens(self, part: type[Method]) -> list[Step]:
        """The embeddings of which some rows are trained beside another method."""
        entry = self.config[TOKENS]
        hf = _inside(_hf(part), TOKENS)
        steps = []
        for first in self.model.sites(hf, self.left):
            for site in self._holders(hf, first):
                rows = entry
                if isinstance(entry, dict):
                    rows = next((rows for name, rows in entry.items() if ends(first.path, [name])), None)
                fields = dict.fromkeys(hf.fields, rows)
                steps.append((site, make_method(part, {**hf.reads, **fields})))
        if not steps:
            raise FormatError(f"{self.folder} lacks the tensors that {TOKENS} speaks of")
        return steps

    def _holders(self, hf: HuggingFace, site: Site) -> Iterator[Site]:
        """The site, and those of other layers that hold the same weight: there, rows are trained for all of them."""
        raw = raw_parameter(site.layer, site.weight)
        yield site
        for path, module in self.modules.items():
            if module is not site.layer and module._parameters.get(site.weight) is raw:
                other = site_of(path, module, site.weight)
                self._copy_keys(hf, site, other)
                yield other

    def _copy_keys(self, hf: HuggingFace, site: Site, other: Site) -> None:
        for name in hf.tensors:
            key, copy = key_of(self.model.wrapped, hf, site, name), key_of(self.model.wrapped, hf, other, name)
            if key in self.left and copy is not None:
                self.left.setdefault(copy, self.left[key])

    # ------------------------------------------------------------------------------------- tensors of adapters

    def take(self, hf: HuggingFace, steps: list[Step]) -> None:
        """The tensors of the adapters at these sites, and of what they share."""
        with made_from(self.folder, "what its sites share"):
            states = shared_states([(site.on_meta(), method) for site, method in steps if shares(method)])
        for number, (shared, state) in enumerate(states.items()):
            first = next(site for site, method in steps if method.key == shared)
            name = f"{holder_of(self.root, first)[0]}.shared-{number}".removeprefix(".")
            for each, tensor in state.module.state_dict().items():
                its = hf.prefix + hf.shared[each] if each in hf.shared else None
                self._take_one(f"{name}.{each}", its, tensor, None, first, hf)
        for site, method in steps:
            with made_from(self.folder, f"{method} at {site.name}"):
                adapter = build(site.on_meta(), method, shared_for(states, method))
            self.places.append(Place(site, method, in_place=False))
            for name, tensor in (adapter.state_dict() if adapter is not None else {}).items():
                there = key_of(self.model.wrapped, hf, site, name)
                self._take_one(f"{site.name}.{name}", there, tensor, layout_of(hf, site, name), site, hf)

    def _take_one(
        self, name: str, key: str | None, own: Tensor, layout: str | None, site: Site, hf: HuggingFace
    ) -> None:
        unsaved = name.rpartition(".")[2]
        if key is None and unsaved in hf.unsaved:
            self.values[name] = torch.full(own.shape, hf.unsaved[unsaved], dtype=own.dtype)
            return
        if key is None:
            raise FormatError(f"{self.folder}: HF PEFT's folders have no place for {name}")
        tensor = self.left.pop(key, None)
        if tensor is None:
            raise FormatError(f"{self.folder} lacks {key!r}{did_you_mean(key, self.left)}")
        shape = theirs(torch.empty(own.shape, device="meta"), layout, site).shape
        if tensor.shape != shape or not tensor.is_floating_point():
            raise FormatError(
                f"{self.folder}: {key} is {tensor.dtype} {list(tensor.shape)}, where floats {list(shape)} are due"
            )
        # Never to fewer digits; but half precision is what weights are stored in, not what an adapter computes in.
        wide = tensor.to(torch.promote_types(tensor.dtype, site.dtype))
        self.values[name] = ours(wide, layout, site, own.shape).contiguous()

    # ------------------------------------------------------------------------------------- weights of the base

    def take_whole(self, part: Any, hf: HuggingFace, steps: Collection[Step]) -> None:
        """Modules that are saved whole, and biases that are trained."""
        saved = _names(self.config, MODULES)
        whole = {path for path in self.modules if path and ends(path, saved)}
        adapted = {site.path for site, _ in steps}
        due = {
            (path, name)
            for path, module in self.modules.items()
            for name, p in module._parameters.items()
            if p is not None and (_within(path, whole) or self._trains_bias(hf, path in adapted, name))
        }
        if not due:
            return
        method = part()
        found = []
        for key, path, name in self._weights(adapted):
            if (path, name) in due:
                due.remove((path, name))
                self.left[ROOT + f"{self.model.wrapped.path(path)}.{name}"] = self.left.pop(key)
                found.append((site_of(path, self.modules[path], name), make_method(method, _hf(method).reads)))
        if due:
            path, name = min(due)
            raise FormatError(
                f"{self.folder} lacks the weight of {path}.{name}, which its configuration says is trained"
            )
        self.take(_hf(method), found)

    def _trains_bias(self, hf: HuggingFace, adapted: bool, name: str) -> bool:  # noqa: FBT001
        value = self.config.get("bias") or "none"
        if value not in ("none", "all", hf.bias) or (value == "all" and hf.bias is None):
            raise FormatError(f"the configuration has bias={value!r}, which is not understood")
        return name == "bias" and (value == "all" or (value == hf.bias and adapted))

    def take_base(self, *, check_base: bool) -> None:
        """What is left can only be the base's own: embeddings that were saved too, and buffers. It must be as here."""
        self._drop_copies()
        for key, path, name in self._weights(set(self.modules)):
            module, tensor = self.modules[path], self.left.pop(key)
            here = module._buffers[name] if name in module._buffers else raw_parameter(module, name)
            if check_base and not _same(here, tensor):
                raise BaseMismatchError(
                    f"{self.folder} brings {key}, a weight of the base that has {list(tensor.shape)} and other values "
                    f"than here ({list(here.shape)}): give the model that weight first, or load with check_base=False"  # type: ignore[union-attr]
                )
        if self.left:
            key = min(self.left)
            raise FormatError(f"{self.folder} holds {len(self.left)} tensors that fit nowhere, the first is {key!r}")

    def _drop_copies(self) -> None:
        """With `bias="all"`, HF PEFT writes biases of modules that are saved whole again, under the wrapper's names."""
        for key in list(self.left):
            first = key.replace(".modules_to_save.", ".", 1)
            if first != key and first in self.all and torch.equal(self.all[first], self.left[key]):
                del self.left[key]
            elif ".original_module." in key:
                self.left.setdefault(key.replace(".original_module.", ".", 1), self.left.pop(key))

    def _weights(self, adapted: Collection[str]) -> list[tuple[str, str, str]]:
        """The keys that are left and name a weight or a buffer of the model: key, path, name."""
        where = {self.model.wrapped.path(path): path for path in self.modules}
        where |= {f"{self.model.wrapped.path(path)}.base_layer": path for path in adapted if path}
        found = []
        for key in sorted(self.left):
            theirs_, _, name = key.removeprefix(ROOT).rpartition(".")
            path = where.get(theirs_)
            if key.startswith(ROOT) and path is not None:
                module = self.modules[path]
                if module._parameters.get(name) is not None or module._buffers.get(name) is not None:
                    found.append((key, path, name))
        return found


def _names(config: Mapping[str, Any], entry: str) -> list[str]:
    names = config.get(entry) or []
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise FormatError(f"{entry} must be a list of names, got {names!r}")
    return names


def _within(path: str, above: Collection[str]) -> bool:
    return any(path == each or path.startswith(each + ".") for each in above)


def _same(here: Tensor | None, there: Tensor) -> bool:
    """Equal up to the rounding of half precision: the base may have been loaded in another."""
    if here is None or here.shape != there.shape:
        return False
    if here.is_meta:
        return True
    a, b = here.detach().double().cpu(), there.double()
    return bool(torch.allclose(a, b, rtol=2**-6, atol=1e-7))
