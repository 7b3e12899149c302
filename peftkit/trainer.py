"""transformers' Trainer with checkpoints that hold the adapters, and nothing of the base.

* `AdapterCheckpoints` goes in front of any Trainer class, a library's or your own; `Trainer` is transformers' with it.
* A checkpoint's folder `adapters` holds each adapter of the model as an ordinary adapter file, whether it runs or not.
  Whatever else is in a checkpoint is the Trainer's own: optimizer, scheduler, random state, arguments.
* To resume is to copy a file's values into the adapter that is installed, so that the optimizer keeps its parameters.
  The model must be wrapped as it was.
* It needs transformers and accelerate. No other module imports this one.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peftkit.errors import BaseMismatchError, FileError, StateError
from peftkit.files import load_state_dict, save
from peftkit.installed import inner, installed, is_wrapped
from peftkit.lifecycle import param_groups
from peftkit.manifests import tensor_digest
from peftkit.reading import read
from peftkit.resolve import modules_of
from peftkit.restoring import find_places

FOLDER = "adapters"
"""The folder of a checkpoint that holds the adapters, each in a file of its name."""

BUFFERS = "buffers.safetensors"
"""The file beside them with those of the base's buffers that training has changed (a batch norm's, say), if any has."""

_ARGUMENTS = "training_args.bin"  # as transformers calls it


class AdapterCheckpoints:
    """Makes any Trainer class train a wrapped model as `peftkit.trainer.Trainer` does: name it first among the bases.

    >>> import transformers
    >>> from peftkit.trainer import AdapterCheckpoints
    >>> class Seq2SeqTrainer(AdapterCheckpoints, transformers.Seq2SeqTrainer):
    ...     pass

    Raises `StateError` for a model that is not wrapped, and where FSDP or DeepSpeed is to write the checkpoints, which
    hold a whole model then.
    """

    model: Any
    args: Any
    state: Any
    optimizer: Any
    optimizer_cls_and_kwargs: Any
    processing_class: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with _counted_as_adapted(kwargs.get("model", args[0] if args else None)):
            super().__init__(*args, **kwargs)
        installed(self.model)
        this: Any = self
        if this.is_fsdp_enabled or this.is_deepspeed_enabled:
            raise StateError(
                "under FSDP and DeepSpeed the engine writes checkpoints of the whole model; use transformers.Trainer "
                "there, and peftkit.save for the adapters"
            )
        self._buffers_before = _digests(_base_buffers(self.model))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer that the arguments name, with the learning rates that methods have of their own (LoRA+)."""
        this: Any = super()
        trained = self.model if model is None else model
        if self.optimizer is not None or not _wants_groups(trained):
            return this.create_optimizer(model)  # type: ignore[no-any-return]
        own: Any = self
        chosen = self.optimizer_cls_and_kwargs
        cls, options = chosen or own.get_optimizer_cls_and_kwargs(self.args, self.model)
        if not isinstance(cls, type) or {"params", "model", "optimizer_dict"} & options.keys():
            raise StateError(
                f"a method wants learning rates of its own, but {getattr(cls, '__name__', cls)} picks its parameters "
                "itself; choose another optimizer"
            )
        groups = self._groups_of_methods(trained, options.get("lr", self.args.learning_rate))
        self.optimizer_cls_and_kwargs = (cls, {**options, "optimizer_dict": groups})
        try:
            return this.create_optimizer(model)  # type: ignore[no-any-return]
        finally:
            self.optimizer_cls_and_kwargs = chosen

    def _groups_of_methods(self, model: nn.Module, lr: float) -> list[dict[str, Any]]:
        """Optimizer groups by method, each in two parts for weight decay."""
        groups = param_groups(model, lr=lr)
        this: Any = self
        decaying = {*this.get_decay_parameter_names(model)}
        names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
        grouped = {id(p) for group in groups for p in group["params"]}
        groups.append({"params": [p for p in model.parameters() if p.requires_grad and id(p) not in grouped]})
        parts = []
        for group in groups:
            for decays in (True, False):
                params = [p for p in group["params"] if (names[id(p)] in decaying) is decays]
                if params:
                    decay = self.args.weight_decay if decays else 0.0
                    parts.append({"weight_decay": decay, **group, "params": params})
        return parts

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:  # noqa: ARG002 - the Trainer's own
        """What the Trainer calls for a checkpoint and for `save_model`."""
        if not self.args.should_save:
            return
        folder = Path(self.args.output_dir if output_dir is None else output_dir)
        (folder / FOLDER).mkdir(parents=True, exist_ok=True)
        known = installed(self.model)
        for name, placements in known.adapters.items():
            if placements:
                save(self.model, _file(folder, name), name)
        buffers = _base_buffers(self.model)
        moved = [path for path, digest in _digests(buffers).items() if self._buffers_before.get(path) != digest]
        if moved:
            save_file({path: buffers[path].detach().cpu().clone() for path in moved}, folder / BUFFERS)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        torch.save(self.args, folder / _ARGUMENTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """What the Trainer calls to resume."""
        _restore(self.model if model is None else model, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        """What the Trainer calls at the end of `load_best_model_at_end`."""
        _restore(self.model, Path(self.state.best_model_checkpoint))


class Trainer(AdapterCheckpoints, transformers.Trainer):
    """`transformers.Trainer` for a wrapped model: the same arguments, and checkpoints of some megabytes.

    It trains whatever the adapters train, with the learning rates that their methods have of their own. A checkpoint,
    and what `save_model` writes, holds every adapter of the model as a file for `peftkit.load`, in a folder `adapters`.
    `train(resume_from_checkpoint=...)` goes on bit for bit where a run was stopped, and `load_best_model_at_end` works;
    both need the model wrapped as it was, and refuse another with `BaseMismatchError`.

    >>> import os, tempfile, transformers, peftkit
    >>> from peftkit.trainer import Trainer
    >>> config = transformers.BertConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    >>> model = peftkit.wrap(transformers.BertForSequenceClassification(config), {"@linear": "lora", "@head": "full"})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     trainer = Trainer(model, transformers.TrainingArguments(folder, use_cpu=True))
    ...     trainer.save_model()
    ...     sorted(os.listdir(folder)), os.listdir(f"{folder}/adapters")
    (['adapters', 'training_args.bin'], ['default.safetensors'])
    """


def _wants_groups(model: nn.Module) -> bool:
    """Whether a method asks for more than one group with the learning rate of all."""
    return any(group.keys() - {"params", "lr"} or group.get("lr", 1.0) != 1.0 for group in param_groups(model, lr=1.0))


def _file(folder: Path, name: str) -> Path:
    if Path(name).name != name:
        raise FileError(f"adapter {name!r} cannot be in a checkpoint: its name cannot name a file")
    return folder / FOLDER / f"{name}.safetensors"


def _restore(model: nn.Module, checkpoint: Path) -> None:
    """Copy a checkpoint's values into the adapters that the model has; nothing is changed if one does not fit."""
    if not (checkpoint / FOLDER).is_dir():
        raise FileError(
            f"{checkpoint} holds no adapters: it was not written by peftkit's Trainer. Load its weights yourself, "
            "or resume with the class that wrote it"
        )
    known = installed(model).adapters
    for path in (checkpoint / FOLDER).glob("*.safetensors"):
        if path.stem not in known:
            raise BaseMismatchError(f"{path}: the model has no adapter {path.stem!r}; wrap the model as it was")
    found = {}
    for name, placements in known.items():
        if placements:
            path = _file(checkpoint, name)
            manifest, found[name] = read(path)
            own = {placement.method.name: type(placement.method) for placement in placements}
            places = find_places(model, manifest, own, check_base=True)
            there = {(place.site.path, place.site.weight): (place.method, place.in_place) for place in places}
            here = {(p.path, p.weight): (p.method, p.adapter is None) for p in placements if not p.shared}
            if there != here:
                raise BaseMismatchError(f"{path}: {_first_difference(there, here)}; wrap the model as it was")
    buffers = load_file(checkpoint / BUFFERS) if (checkpoint / BUFFERS).exists() else {}
    targets = _base_buffers(model)
    if buffers.keys() - targets.keys():
        raise BaseMismatchError(f"{checkpoint / BUFFERS} has {min(buffers.keys() - targets.keys())}, the model has not")
    for name, tensors in found.items():
        load_state_dict(model, tensors, name)
    for key, value in buffers.items():
        targets[key].copy_(value)


def _first_difference(there: dict[tuple[str, str], Any], here: dict[tuple[str, str], Any]) -> str:
    """Where a file and a model do not agree, in words."""
    key = min(key for key in there.keys() | here.keys() if there.get(key) != here.get(key))
    saved, own = (f"{held[0]!r}" if held else "nothing" for held in (there.get(key), here.get(key)))
    return f"{'.'.join(filter(None, key))} has {saved} in the file and {own} in the model"


def _base_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers of the base that belong to its state, by path."""
    return {
        f"{path}.{name}".removeprefix("."): buffer
        for path, module in modules_of(inner(model)).items()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    }


def _digests(buffers: dict[str, Tensor]) -> dict[str, str]:
    """By value: a batch norm writes its statistics past the tensors' version counters."""
    return {path: tensor_digest(buffer.detach().cpu().contiguous()) for path, buffer in buffers.items()}


@contextmanager
def _counted_as_adapted(model: Any) -> Iterator[None]:
    """Let the Trainer accept a quantised base: it looks for adapters by a flag, which would do more if it stayed."""
    flag = "_hf_peft_config_loaded"
    if not (isinstance(model, nn.Module) and is_wrapped(model) and getattr(model, "is_quantized", False)):
        yield
        return
    model.__dict__[flag] = True
    try:
        yield
    finally:
        del model.__dict__[flag]
