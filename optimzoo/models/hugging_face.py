"""Causal language models from the `config.json` of Hugging Face transformers, without weights."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from optimzoo.models.public import find_public
from optimzoo.options import brief


def is_config(name: str) -> bool:
    """Return whether a name is that of a Hugging Face config.

    That is the path of a ``config.json``, of a folder with one, or the name of a public model.
    """
    return _is_path(name) or find_public(name) is not None


def _is_path(name: str) -> bool:
    return Path(name).suffix == ".json" or Path(name).is_dir()


def read_config(name: str) -> dict[str, Any]:
    """Return the fields of a Hugging Face ``config.json``, by its path, its folder's, or a name.

    Raises:
        ValueError: a file that is no config.
    """
    public = None if _is_path(name) else find_public(name)
    if public is not None:
        return copy.deepcopy(public.config)
    path = Path(name)
    path = path / "config.json" if path.is_dir() else path
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{path} is not a Hugging Face config: {reason}") from None
    if not isinstance(fields, dict) or not isinstance(fields.get("model_type"), str):
        raise ValueError(f"{path} is not a Hugging Face config: it has no 'model_type'")
    return fields


def from_config(name: str, device: str = "cpu", **changes: Any) -> nn.Module:
    """Return a new causal language model of `transformers`, from a ``config.json``.

    Its weights are drawn from torch's generator.

    Args:
        name: path of the file, of its folder, or the name of a public model.
        device: where its weights are; on `meta` they take no memory.
        **changes: fields that replace those of the file.

    Raises:
        ValueError: a file that is no config, or not that of a causal language model.
        ImportError: `transformers` is not installed.
    """
    fields = {**read_config(name), "use_cache": False, **changes}  # a cache is for generation
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError:
        source_type = "config" if name.endswith(".json") else "model"
        raise ImportError(
            f"{name} is a Hugging Face {source_type}, which needs transformers: pip install "
            "transformers"
        ) from None
    try:
        config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        with torch.device(device):
            model: nn.Module = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # transformers raises many
        raise ValueError(f"{name} makes no causal language model: {brief(error)}") from error
    return model.train()
