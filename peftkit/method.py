"""What a method is: a frozen dataclass whose fields are the hyperparameters. That object *is* the configuration."""

import dataclasses
import functools
import json
import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

from torch import Tensor, nn

from peftkit.adapter import Activation, Adapter, Observer, Shared, Site
from peftkit.errors import FieldError, did_you_mean
from peftkit.selectors import Selector


@dataclasses.dataclass(frozen=True)
class HuggingFace:
    """What a method is called in HF PEFT's adapter folders: with it, files go both ways and no core code knows of it.

    A tensor of ours and its counterpart hold the same numbers: in one shape, or in that of a layout. A field that has
    no counterpart is about the start or the training alone: it may be lost. A subclass that declares nothing of its
    own is written as the class that it inherits from, and read as that.
    """

    peft_type: str
    """The value of `peft_type` in `adapter_config.json`: `"LORA"`. Of a method that stands beside others only, the name
    of its entry there.
    """
    fields: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Our field → theirs: `{"rank": "r"}`."""
    tensors: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Our tensor of one adapter → theirs below the layer, as in a file, where no adapter's name stands:
    `{"down": "lora_A.weight"}`. A tensor that an adapter lacks, by its method's fields, has no counterpart there.
    `{weight}` stands for the name of the site's own parameter.
    """
    one_hot: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """The same on embeddings, where they differ."""
    shared: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Our tensor of the shared state → theirs below the base model."""
    constants: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Entries of the configuration that tell this method from others of its type: `{"use_dora": True}`."""
    layouts: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)
    """How theirs hold the numbers of ours: layer → our tensor → layout, for tensors that are not of one shape. A layer
    is `"conv"`, `"stack"` (weights with leading dimensions) or `""`, any. A layout has a word for each dimension of
    theirs: `a`, `b`, `c` are our dimensions, joined if they stand together; `-` is what is left; `1` is one; `kernel`
    are the kernel's dimensions, `ones` as many ones. `"stored"` is the weight as its layer stores it.
    """
    kinds: Collection[str] = ()
    """The layer kinds that it is for there, by their class names; none means any."""
    own_convolution: bool = False
    """Whether it runs a convolution of its own there, which has the layer's stride and padding and nothing else."""
    patterns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Our field → the entry that holds its other values, for the layers that have these."""
    lists: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Our yes-or-no field → the entry that lists the layers for which it is yes."""
    bias: str | None = None
    """The value of `bias` there that trains the biases of the layers adapted; None where there is no such entry."""
    part: str | None = None
    """The entry by which it stands in another method's folder: `"modules_to_save"`, `"trainable_token_indices"`."""
    reads: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What our fields are where the configuration has nothing to say; otherwise their own defaults."""
    ignored: Mapping[str, Collection[Any] | None] = dataclasses.field(default_factory=dict)
    """Entries that change nothing in what is computed, with the values for which that is so; None for any value."""
    unsaved: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Our tensors, of an adapter or shared, that have no counterpart because only training needs them, with the value
    that they have before it.
    """
    prefix: str = "base_model."
    """What stands before the names of shared tensors."""
    tasks: Collection[str] = ()
    """The values of `task_type` without which it does nothing there, for a method that needs one."""


@dataclasses.dataclass(frozen=True)
class Method(ABC):
    """One way of fine-tuning; subclass it as a frozen dataclass with one field a hyperparameter.

    Fields hold JSON values (numbers, strings, booleans, None, lists of these), because a file carries them. Check
    them in `__post_init__` with `require`.

    >>> import peftkit
    >>> peftkit.LoRA(rank=16).fields()["rank"]
    16
    >>> peftkit.LoRA(rnak=16)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    peftkit.errors.FieldError: lora has no field 'rnak'; did you mean 'rank'? Its fields: rank, alpha, ...
    """

    name: ClassVar[str]
    """How users ask for the method: lower-case letters, digits, `_` and `-`. It is also the entry point's name."""

    scope: ClassVar[Literal["weights", "parameters", "modules"]] = "weights"
    """What a selector stands for: the weights that a layer kind knows as matrices (the common case); every parameter
    at or below the module, whatever its kind; or the module as a whole, for an `Activation`."""

    matrices: ClassVar[bool] = True
    """Whether the method can adapt a matrix."""

    vectors: ClassVar[bool] = False
    """Whether the method can adapt a vector (a norm's scale, a bias), which it sees as a matrix with one column."""

    identity: ClassVar[bool] = True
    """Whether a new adapter changes nothing, bit for bit."""

    declines: ClassVar[Mapping[str, str]] = {}
    """Layer kinds, by their class name, at which `adapter` raises `UnsupportedLayerError`, each with the reason."""

    hf: ClassVar[HuggingFace | None] = None
    """What the method is called in HF PEFT's files; None where that library has no such method."""

    affine: ClassVar[bool] = False
    """Whether `weight` and `bias` are affine in the trained parameters, and a new adapter changes nothing: then
    `combine` can add up what adapters with equal fields have learned, parameter by parameter. Not with shared state."""

    default_targets: ClassVar[Selector | Sequence[Selector]] = "@linear"
    """What is adapted when the user names no targets."""

    def __new__(cls, *args: object, **fields: object) -> Self:
        """Name the right field where a wrong one is given; dataclasses would only name the wrong one."""
        known = [f.name for f in dataclasses.fields(cls)]
        for name in fields:
            if name not in known:
                raise FieldError(
                    f"{cls.name} has no field {name!r}{did_you_mean(name, known)} "
                    f"{'Its fields: ' + ', '.join(known) if known else 'It has none.'}".replace("  ", " ")
                )
        if len(args) > len(known):
            raise FieldError(f"{cls.name} takes at most {len(known)} values, got {len(args)}")
        return super().__new__(cls)

    def shared(self, sites: Sequence[Site]) -> nn.Module | None:  # noqa: ARG002 - most methods share nothing
        """State that all of this method's sites share, as one module: held once, saved once; None for none.

        A method that has it must give every site an adapter. Like `adapter`, it must also run on the meta device.
        """
        return None

    def observer(self, site: Site) -> Observer | None:  # noqa: ARG002 - most methods start from no data
        """For a start that depends on data: what is to see the data at this site, before `adapter` is called."""
        return None

    @abstractmethod
    def adapter(self, site: Site, shared: Shared | None = None) -> Adapter | Activation | None:
        """The adapter for one site, or None to install nothing there. `shared.state` is what `shared` has returned.

        To train the layer's own weight, call `site.unfreeze()` and return None. It must also run when the site is on
        the meta device, where tensors have shapes and no values: that is how `plan` counts and how `load` prepares.
        """

    def param_groups(
        self,
        parameters: Sequence[nn.Parameter],
        lr: float,
        adapters: Sequence[Adapter | Activation],  # noqa: ARG002 - only who tells their parameters apart asks for them
    ) -> list[dict[str, Any]]:
        """Optimizer groups for this method's trainable parameters; by default one, with the learning rate given.

        `adapters` are those that hold them, so that a method can tell one factor from another (LoRA+).
        """
        return [{"params": list(parameters), "lr": lr}]

    def before_step(self, adapters: Sequence[Adapter | Activation], shared: Any) -> None:  # noqa: B027 - optional
        """Called before each step of an optimizer that trains these adapters, under `no_grad`, gradients complete.

        The place for a regulariser: add its gradient to each `p.grad`. Then it counts once a step, however the loss
        was scaled and over however many batches it was accumulated. Arguments as for `after_step`.
        """

    def after_step(self, adapters: Sequence[Adapter | Activation], shared: Any) -> None:  # noqa: B027 - optional
        """Called after each step of an optimizer that trains these adapters, under `no_grad`, gradients still there.

        `adapters` are all that this method has in one named adapter, `shared` is their shared state or None. Change
        tensors in place; keep what must last (a count of steps, say) in buffers, which are saved.
        """

    def from_factors(self, up: Tensor, down: Tensor) -> "tuple[Method, dict[str, Tensor]] | None":  # noqa: ARG002
        """For `combine`: a method otherwise like this one, and the state of its adapter that makes `w + up @ down`.

        None where there is none. `up` is `[..., out, rank]`, `down` is `[..., rank, in]`, of any rank.
        """
        return None

    def fields(self) -> dict[str, Any]:
        """The hyperparameters as JSON values; `from_fields` gives back an equal method."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return dict(json.loads(json.dumps(fields, allow_nan=False)))

    @functools.cached_property
    def key(self) -> str:
        """Name and fields as one text: equal for equal methods, also where a field is a list and has no hash."""
        return f"{self.name} {json.dumps(self.fields(), sort_keys=True)}"

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Self:
        """The method with these hyperparameters; each field must be named, and no other.

        Raises `FieldError` for an unknown, missing or invalid field: a file's meaning is never guessed.
        """
        method = cls(**fields)
        missing = [f.name for f in dataclasses.fields(cls) if f.name not in fields]
        if missing:
            raise FieldError(f"{cls.name} needs its field {missing[0]!r}")
        return method

    @classmethod
    def upgraded(cls, fields: dict[str, Any], version: str) -> dict[str, Any]:  # noqa: ARG003 - until a field is added
        """The fields of a file in terms of this version of the method; `version` is that of the package that wrote it.

        Override it when a field is added, renamed or takes other values, so that older files keep their meaning:
        `return {"gate": 1.0, **fields}` says what files without the field meant. A file is read as it is otherwise.
        """
        return fields

    def require(self, condition: bool, field: str, wants: str) -> None:  # noqa: FBT001 - reads as an assertion does
        """Raise a `FieldError` that names the field, what it must be and what it is, unless `condition` holds."""
        if not condition:
            raise FieldError(f"{self.name}: {field} must be {wants}, got {getattr(self, field)!r}")

    def require_whole(self, *fields: str, least: int | None = 1, optional: bool = False) -> None:
        """Each of these fields must be a whole number of at least `least`; or None, if it is `optional`."""
        for field in fields:
            value: Any = getattr(self, field)
            fits = (optional and value is None) or (type(value) is int and (least is None or value >= least))
            words = "a whole number" + ("" if least is None else f" of at least {least}")
            self.require(fits, field, words + (", or None" if optional else ""))

    def require_number(
        self, *fields: str, least: float | None = None, above: float | None = None, below: float | None = None
    ) -> None:
        """Each of these fields must be a finite number, within the bounds given."""
        bounds = [("from", least, operator.ge), ("above", above, operator.gt), ("below", below, operator.lt)]
        words = " ".join(f"{word} {bound:g}" for word, bound, _ in bounds if bound is not None)
        for field in fields:
            value: Any = getattr(self, field)
            fits = type(value) in (int, float) and math.isfinite(value)
            fits = fits and all(holds(value, bound) for _, bound, holds in bounds if bound is not None)
            self.require(fits, field, f"a finite number {words}".rstrip())

    def require_not_zero(self, *fields: str) -> None:
        """Each of these fields must be a finite number other than 0."""
        for field in fields:
            value: Any = getattr(self, field)
            fits = type(value) in (int, float) and math.isfinite(value) and value != 0
            self.require(fits, field, "a finite number other than 0")

    def require_bool(self, *fields: str) -> None:
        """Each of these fields must be True or False."""
        for field in fields:
            self.require(isinstance(getattr(self, field), bool), field, "True or False")

    def __str__(self) -> str:
        """The name, with the fields that differ from their defaults: `lora(rank=16)`."""
        changed = [
            f"{f.name}={getattr(self, f.name)!r}"
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != f.default
        ]
        return f"{self.name}({', '.join(changed)})" if changed else self.name
