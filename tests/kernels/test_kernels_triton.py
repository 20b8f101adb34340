"""The cases of the Triton kernels, in a process of its own: see tests/support/kernels_triton.py."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from optimzoo.kernels import triton

ROOT = Path(__file__).resolve().parents[2]
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


@needs_triton
@pytest.mark.thorough
@pytest.mark.timeout(600)
@pytest.mark.parametrize("cases", ["rules", "edges", "steps"])
def test_in_the_interpreter(cases):
    file = f"tests/kernels/kernels_triton_{cases}.py"
    done = run("-m", "pytest", "-p", "no:cacheprovider", "-q", file, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout


def test_neither_importing_optimzoo_nor_asking_for_the_backend_loads_its_kernels():
    ask = "import optimzoo.kernels.triton as t; t.available(); print(*sys.modules)"
    done = run("-c", f"import sys, optimzoo; print('triton' in sys.modules); {ask}")
    imported, *modules = done.stdout.split()
    assert imported == "False", done.stderr
    loaded = [m for m in modules if m.startswith("optimzoo.kernels.triton")]
    assert loaded == ["optimzoo.kernels.triton"]


def test_why_not(monkeypatch):
    def reason():
        triton.why_not.cache_clear()
        return triton.why_not()

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install triton" in reason()
    assert not triton.available()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert reason() == "torch finds no CUDA device"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (7, 5))
    assert "8.0" in reason()
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (9, 0))
    assert reason() == ""
    assert triton.available()
    triton.why_not.cache_clear()


def test_a_wrong_name_is_an_attribute_error():
    assert not hasattr(triton, "multiply_")
