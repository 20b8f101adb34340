"""Update kernels in Triton, for GPUs whose native library was not built.

The functions are those of :mod:`optimzoo.kernels.native`, with the semantics of
``csrc/include/optimzoo.h``: ``scale_``, ``adam_``, ``reduce_``, ``apply_``, ``center_``,
``sinkhorn_``. Importing this package does not import Triton; the first use of a function does. With
``TRITON_INTERPRET=1`` in the environment before that, they run on CPU tensors, slowly, for tests.
"""

import functools
import importlib.util
import os
from importlib import import_module
from typing import Any

import torch

_HOMES = {f"{name}_": name for name in ("scale", "adam", "reduce", "apply", "center", "sinkhorn")}
_HOMES["scale_table"] = "scale"


@functools.cache
def why_not() -> str:
    """Return why Triton is not available; empty if it is."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install triton"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return ""
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    if torch.cuda.get_device_capability() < (8, 0):
        return "Triton kernels need a GPU of compute capability 8.0 or more"
    return ""


def available() -> bool:
    """Return whether Triton and a device for it are available."""
    return not why_not()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
