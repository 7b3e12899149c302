"""The model that a command line names: `module:callable`, or `hf:` and a transformers configuration.

Built on the meta device where its code allows that: then a model of any size has its shapes and takes no memory.
"""

import importlib
import sys
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peftkit.cli.output import Refusal, others_print_to_stderr

FORMS = "module:callable, such as my_model:build; or hf:FOLDER, with a transformers config.json in it"


def model_named(text: str) -> nn.Module:
    """The model that `text` names; raises `Refusal` where there is none."""
    source, colon, rest = text.partition(":")
    if not (colon and source and rest):
        raise Refusal(f"MODEL is {FORMS}; got {text!r}")
    with others_print_to_stderr():
        model = _from_config(rest) if source == "hf" else _from_code(source, rest)
    if not isinstance(model, nn.Module):
        raise Refusal(f"{text} gives a {type(model).__name__} and no nn.Module; MODEL is {FORMS}")
    return model


def _from_code(module: str, name: str) -> Any:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)  # as `python -m` does; an installed command has only its own folder there
    try:
        found = reduce(getattr, name.split("."), importlib.import_module(module))
    except Exception as error:
        raise Refusal(f"cannot import {module}:{name}: {type(error).__name__}: {error}") from error
    if isinstance(found, nn.Module):
        return found
    if not callable(found):
        raise Refusal(f"{module}:{name} is a {type(found).__name__} and not callable; MODEL is {FORMS}")
    try:
        return _built(found)
    except Exception as error:
        raise Refusal(f"{module}:{name}() raises {type(error).__name__}: {error}") from error


def _built(build: Callable[[], Any]) -> Any:
    try:
        with torch.device("meta"):
            return build()
    except Exception:  # noqa: BLE001 - it may read values, which are not there on meta; if not that, it raises again
        return build()


def _from_config(name: str) -> nn.Module:
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise Refusal(f"hf:{name} needs transformers: pip install 'peftkit[transformers]'") from error
    try:
        # No hub, and no code from the folder.
        config = transformers.AutoConfig.from_pretrained(name, local_files_only=True, trust_remote_code=False)
        build = _architecture(transformers, config)
        return _built(lambda: build(config))  # type: ignore[no-any-return]
    except Exception as error:
        said = str(error).strip().partition("\n")[0]
        raise Refusal(f"cannot build a model from hf:{name}: {type(error).__name__}: {said}") from error


def _architecture(transformers: Any, config: Any) -> Callable[[Any], Any]:
    """The class that the configuration names, with its head; the bare model where it names none that exists."""
    named = getattr(transformers, (config.architectures or [""])[0], None)
    if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel):
        return named
    return transformers.AutoModel.from_config  # type: ignore[no-any-return]
