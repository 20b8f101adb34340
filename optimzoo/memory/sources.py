"""Sources of a model to plan for: a name, a Hugging Face config, a function of the user."""

import difflib
import importlib.util
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from optimzoo import lowrank, sparsity
from optimzoo.memory.simulate import Step
from optimzoo.models import (
    CONFIGS,
    Llama,
    LlamaConfig,
    from_config,
    get_config,
    is_config,
    public_models,
)
from optimzoo.options import brief


def load_model(name: str, seq: int = 1) -> nn.Module:
    """Return a model on ``meta``, by a name or by the path of a Hugging Face ``config.json``.

    Names are `llama-7b` or `7b`, and those of :func:`optimzoo.models.public_models`. Our Llama
    takes sequences of ``seq`` tokens, longer than it was trained with if need be.

    Raises:
        ValueError: an unknown name (the message has the nearest ones), a file that is no config.
        ImportError: a model of Hugging Face, and `transformers` is not installed.
    """
    if not is_config(name):
        with torch.device("meta"):
            config = _config_of(name)
            positions = max(seq, config.max_position_embeddings)
            return Llama(replace(config, max_position_embeddings=positions))
    return from_config(name, "meta")


def _config_of(name: str) -> LlamaConfig:
    try:
        return get_config(name)
    except ValueError:
        names = [f"llama-{short}" for short in CONFIGS]
        names += [other for model in public_models() for other in model.names]
        proper = {other.lower(): other for other in names}
        near = difflib.get_close_matches(name.rpartition("/")[2].lower(), proper, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(proper[key] for key in near)}? " if near else ""
        raise ValueError(
            f"unknown model {name!r}: {hint}`optimzoo models` lists the names; "
            "or give the path of a Hugging Face config.json"
        ) from None


def convert_model(model: nn.Module, conversion: str) -> str:
    """Convert a model in place by `low_rank=128`, `sltrain=128`, `lora=16` or `cast=2:4`.

    Returns:
        A line that says what was converted.

    Raises:
        ValueError: no such conversion, or one that the model cannot have.
    """
    method, _, value = conversion.partition("=")
    try:
        numbers = [int(part) for part in value.split(":")]
        if method == "cast" and len(numbers) == 2:
            layers = sparsity.prepare(model, *numbers)
            return f"{len(layers)} layers to {value} sparse ones, with CAST's weight scaling."
        if method in lowrank.KINDS and len(numbers) == 1:
            audit = lowrank.convert(model, numbers[0], method)
            parameters, trained = (
                sum(getattr(r, key) for r in audit) for key in ("held", "trained")
            )
            return (
                f"{len(audit)} layers to {method}: {parameters:,} parameters, {trained:,} of them "
                "trained."
            )
    except ValueError as error:
        if "invalid literal" not in str(error):
            raise ValueError(f"--convert {conversion}: {error}") from None
    forms = ", ".join(f"{name}=128" for name in lowrank.KINDS)
    raise ValueError(f"--convert {conversion}: it takes {forms} or cast=2:4")


@contextmanager
def _explained(path: str) -> Iterator[None]:
    """Raise an error in the user's file as a ValueError of one line that says where it is."""
    try:
        yield
    except Exception as error:
        file = str(Path(path).resolve())
        frames = traceback.extract_tb(error.__traceback__)
        lines = [f.lineno for f in frames if str(Path(f.filename).resolve()) == file]
        where = f"{path}:{lines[-1]}" if lines else path
        raise ValueError(f"{where} failed: {brief(error)}") from error


def load_function(where: str) -> tuple[nn.Module, Step | None]:
    """Return the module that ``path.py:function`` returns, and its function to the loss or None.

    It is called under ``torch.device("meta")``, so that a large model takes no memory.

    Raises:
        ValueError: no such file or function, or it returns something else.
    """
    path, _, name = where.rpartition(":")
    if not path or not Path(path).is_file():
        raise ValueError(f"--module takes FILE.py:FUNCTION, and {where!r} is not that of a file")
    spec = importlib.util.spec_from_file_location(f"optimzoo_module_{Path(path).stem}", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"--module takes FILE.py:FUNCTION, and {path!r} does not end in .py")
    module = importlib.util.module_from_spec(spec)
    # As of a script: its neighbours can be imported, and it finds itself, as dataclasses ask.
    sys.path.insert(0, str(Path(path).resolve().parent))
    sys.modules[spec.name] = module
    with _explained(path):
        spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"{path} has no function {name!r}")
    with _explained(path), torch.device("meta"):
        result = function()
    model, step = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
    if not isinstance(model, nn.Module):
        raise ValueError(f"{where} returns a {type(model).__name__}, not a torch.nn.Module")
    if step is not None and not callable(step):
        raise ValueError(
            f"{where} returns a module and a {type(step).__name__}; the second must be a function "
            "from the module to its loss"
        )
    return model, step
