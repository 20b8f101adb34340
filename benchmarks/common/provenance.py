"""Provenance of a measured figure: commit, device and versions."""

import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import optimzoo
from benchmarks.common.files import ROOT


def provenance() -> dict[str, Any]:
    """Return commit, device and versions of this process, for a results row."""
    return {
        "commit": _commit(),
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "optimzoo": optimzoo.__version__,
    }


def made_on(*provenances: dict[str, Any]) -> str:
    """Format devices, threads, torch versions and commits of provenances, each of them once."""
    places: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for one in provenances:
        places.setdefault((one["device"], one["torch"]), []).append(one)
    texts = []
    for (device, torch_version), ones in places.items():
        threads = sorted({one["threads"] for one in ones})
        commits = dict.fromkeys(str(one["commit"]) for one in ones)
        texts.append(
            f"{device}, {' or '.join(map(str, threads))} thread{'s' * (threads != [1])}, torch "
            f"{torch_version}, commit{'s' * (len(commits) > 1)} {', '.join(commits)}"
        )
    return "; ".join(texts)


def device_name() -> str:
    """Return the GPU's name, or the processor's with its architecture."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        model = platform.processor() or "unknown processor"
    return f"{model} ({platform.machine()})"


def _commit() -> str:
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=10"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
