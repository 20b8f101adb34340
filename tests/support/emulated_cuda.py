"""The CUDA kernels on a CPU (tests/support/cuda_emulation), behind the same Python functions."""

import contextlib
import ctypes
import functools
import importlib.util
import os
import shutil
import types
from pathlib import Path

import pytest
import torch

from optimzoo.kernels import native

ROOT = Path(__file__).resolve().parents[2]
EMULATION = ROOT / "tests" / "support" / "cuda_emulation"


@functools.cache
def built():
    """The emulated library; compiled at the first use (about five seconds), then kept in build/.

    A test that asks for it where no compiler is, is skipped.
    """
    if not (os.environ.get("CXX") or shutil.which("g++")):
        pytest.skip("needs g++ to emulate the CUDA kernels")
    spec = importlib.util.spec_from_file_location("emulation", EMULATION / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return ctypes.CDLL(str(module.build(ROOT / "build" / "emulated")))


@functools.cache
def backend():
    """As native.CUDA, for tensors on the CPU, inside of :func:`streams`."""
    library = native.Library("cuda")
    library.__dict__["_loaded"] = (built(), "")  # a cached property
    return library


@contextlib.contextmanager
def streams():
    """Let native.py ask for the current stream where there is none."""
    patch = {
        "device": lambda device: contextlib.nullcontext(),
        "current_stream": lambda device: types.SimpleNamespace(cuda_stream=0),
    }
    kept = {name: getattr(torch.cuda, name) for name in patch}
    try:
        for name, replacement in patch.items():
            setattr(torch.cuda, name, replacement)
        yield
    finally:
        for name, original in kept.items():
            setattr(torch.cuda, name, original)
