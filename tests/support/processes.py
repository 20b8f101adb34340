"""Scenarios of `parallel_runs.py`, run as a program."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from data_helpers import ROOT

needs_gloo = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo"
)


def run_program(name, *words, timeout=3000):
    """Run a program of this folder, one thread; its output, once it has ended well."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name(name)), *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def scenario(name, folder, *arguments):
    """Run a scenario of `parallel_runs.py`; what it returns."""
    return json.loads(run_program("parallel_runs.py", name, str(folder), json.dumps(arguments)))
