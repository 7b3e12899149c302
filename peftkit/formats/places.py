"""Finds what a folder's tensors adapt in a model: which site each stands for, by its name."""

import re
from collections.abc import Collection, Iterator, Mapping

from torch import nn

from peftkit import plugins
from peftkit.adapter import Site
from peftkit.composition import base_class
from peftkit.errors import BaseMismatchError, FormatError, UnsupportedLayerError, did_you_mean
from peftkit.formats.declared import refuse_site
from peftkit.formats.matching import Wrapped, targeted
from peftkit.method import HuggingFace
from peftkit.resolve import site_of

ROOT = "base_model.model."
"""What stands before a path of the model, in the tensors' names."""


def key_of(wrapped: Wrapped, hf: HuggingFace, site: Site, name: str) -> str | None:
    """The key in the folder of one tensor at a site; None where it has no counterpart."""
    declared = {**hf.tensors, **hf.one_hot} if site.one_hot else hf.tensors
    if name not in declared:
        return None
    single = site.weight in wrapped.order.get(site.path, ())
    where = wrapped.parameter(site.path, site.weight) if single else wrapped.path(site.path)
    return ROOT + f"{where}.{declared[name]}".removeprefix(".").replace("{weight}", site.weight)


class Places:
    """A model as HF PEFT's names have it. `parameters` are the single ones that it wraps: `target_parameters`."""

    def __init__(self, modules: Mapping[str, nn.Module], parameters: Collection[str]) -> None:
        self.modules = modules
        single = targeted(parameters, modules)
        self.wrapped = Wrapped(single, modules)
        self.where: dict[str, tuple[str, str | None]] = {self.wrapped.path(path): (path, None) for path in modules}
        for path, names in single.items():
            self.where |= {self.wrapped.parameter(path, name): (path, name) for name in names}
        self.order = {path: i for i, path in enumerate(modules)}

    def sites(self, hf: HuggingFace, keys: Collection[str]) -> list[Site]:
        """The sites that these keys are of, in the model's order; keys that name no tensor of the method are left."""
        found: dict[tuple[str, str], Site] = {}
        for key in sorted(keys):
            for path, weight in self._matches(hf, key):
                if (path, weight) not in found:
                    found[path, weight] = self.site(hf, path, weight)
        return sorted(
            found.values(), key=lambda site: (self.order[site.path], list(site.layer._parameters).index(site.weight))
        )

    def _matches(self, hf: HuggingFace, key: str) -> Iterator[tuple[str, str]]:
        if not key.startswith(ROOT):
            return
        for declared in {*hf.tensors.values(), *hf.one_hot.values()}:
            before, _, after = declared.partition("{weight}")
            expression = re.escape("." + before) + (r"([^.]+)" + re.escape(after) if before != declared else "")
            match = re.search(
                expression + r"\Z", "." + key.removeprefix(ROOT)
            )  # made of a declaration, not of the file
            if match is None:
                continue
            theirs = ("." + key.removeprefix(ROOT))[: match.start()].removeprefix(".")
            if theirs not in self.where:
                raise BaseMismatchError(
                    f"this model has no layer {theirs!r}, which the folder adapts{did_you_mean(theirs, self.where)}"
                )
            path, weight = self.where[theirs]
            yield path, match.group(1) if match.groups() else weight or self._only_weight(path)

    def _only_weight(self, path: str) -> str:
        layer = self.modules[path]
        found = plugins.kind_of(base_class(layer))
        weights = list(found[0].weights(layer)) if found else []
        if len(weights) != 1:
            raise BaseMismatchError(
                f"the folder adapts {path or 'the model'}, a {base_class(layer).__name__}, which has not one weight"
            )
        return weights[0]

    def site(self, hf: HuggingFace, path: str, weight: str) -> Site:
        """One site, if HF PEFT can adapt it by the method."""
        try:
            site = site_of(path, self.modules[path], weight)
        except (AttributeError, KeyError, UnsupportedLayerError) as error:
            raise BaseMismatchError(
                f"the folder adapts {path}.{weight}, which this model does not have so: {error}"
            ) from error
        reason = refuse_site(hf, site)
        if reason:
            raise FormatError(f"{site.name}: {reason}")
        return site
