"""What a method is: a frozen dataclass whose fields are the hyperparameters. That object *is* the configuration."""

import dataclasses
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

from torch import Tensor, nn

from peftkit.adapter import Activation, Adapter, Site
from peftkit.errors import FieldError, did_you_mean
from peftkit.selectors import Selector


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

    vectors: ClassVar[bool] = False
    """Whether the method can adapt a vector (a norm's scale, a bias), which it sees as a matrix with one column."""

    affine: ClassVar[bool] = False
    """Whether `weight` and `bias` are affine in the trained parameters, and a new adapter changes nothing: then
    `combine` can add up what adapters with equal fields have learned, parameter by parameter."""

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

    @abstractmethod
    def adapter(self, site: Site, shared: Any = None) -> Adapter | Activation | None:
        """The adapter for one site, or None to install nothing there.

        To train the layer's own weight, call `site.unfreeze()` and return None. It must also run when the site is on
        the meta device, where tensors have shapes and no values: that is how `plan` counts and how `load` prepares.
        """

    def param_groups(self, parameters: Sequence[nn.Parameter], lr: float) -> list[dict[str, Any]]:
        """Optimizer groups for this method's trainable parameters; by default one, with the learning rate given."""
        return [{"params": list(parameters), "lr": lr}]

    def from_factors(self, up: Tensor, down: Tensor) -> "tuple[Method, dict[str, Tensor]] | None":  # noqa: ARG002
        """For `combine`: a method otherwise like this one, and the state of its adapter that makes `w + up @ down`.

        None where there is none. `up` is `[..., out, rank]`, `down` is `[..., rank, in]`, of any rank.
        """
        return None

    def fields(self) -> dict[str, Any]:
        """The hyperparameters as JSON values; `from_fields` gives back an equal method."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return dict(json.loads(json.dumps(fields, allow_nan=False)))

    @property
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

    def require(self, condition: bool, field: str, wants: str) -> None:  # noqa: FBT001 - reads as an assertion does
        """Raise a `FieldError` that names the field, what it must be and what it is, unless `condition` holds."""
        if not condition:
            raise FieldError(f"{self.name}: {field} must be {wants}, got {getattr(self, field)!r}")

    def __str__(self) -> str:
        """The name, with the fields that differ from their defaults: `lora(rank=16)`."""
        changed = [
            f"{f.name}={getattr(self, f.name)!r}"
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != f.default
        ]
        return f"{self.name}({', '.join(changed)})" if changed else self.name
