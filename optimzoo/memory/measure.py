"""Live peak of real code: tensors by category, the process, and the CUDA allocator."""

import os
import runpy
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from optimzoo.memory.tracker import Peak, Tracker

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]


@dataclass
class Measurement:
    """Result of :func:`measure` and :func:`measure_script`; sizes are in bytes.

    Attributes:
        tensors: the peak of all tensors, exact, on all devices.
        rss_before: resident memory of the process before the run.
        rss_peak: peak of the resident memory, as the kernel counts it: per CPU, so that it may be
            off by some MiB.
        cuda_allocated: the peak of CUDA's allocator, blocks in use; None without CUDA.
        cuda_reserved: the peak of what the allocator has from the driver; None without CUDA.
        seconds: duration of the run.
        error: traceback of a script that failed; the figures then end at the failure.
    """

    tensors: Peak = field(default_factory=Peak)
    rss_before: int = 0
    rss_peak: int = 0
    cuda_allocated: int | None = None
    cuda_reserved: int | None = None
    seconds: float = 0.0
    error: str | None = None


def measure(
    step: Callable[[], Any], *, steps: int = 1, snapshot: str | Path | None = None
) -> Measurement:
    """Run ``step()`` and return the peak of its memory.

    Every existing tensor counts from the beginning, whoever made it. To get exact bytes, each
    operation is intercepted, which slows small ones down; do not time what is measured.

    Args:
        step: a training step, or anything.
        steps: number of calls. The first creates the optimizer's state.
        snapshot: a file for CUDA's allocation history, for https://pytorch.org/memory_viz.

    Raises:
        ValueError: a snapshot is asked for and there is no CUDA.
    """
    result = Measurement()
    with _watched(result, snapshot):
        for _ in range(steps):
            step()
    return result


def measure_script(
    path: str | Path, arguments: list[str] | None = None, *, snapshot: str | Path | None = None
) -> Measurement:
    """Run a Python script as ``python path arguments`` does, in this process, and measure it.

    If the script fails or is interrupted, the result ends there and has its ``error``.

    Args:
        path: the script.
        arguments: its ``sys.argv[1:]``.
        snapshot: as for :func:`measure`.

    Raises:
        ValueError: there is no such file, or a snapshot is asked for and there is no CUDA.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no script {str(path)!r}")
    _refuse_snapshot(snapshot)  # before the script: errors below are taken for the script's
    result = Measurement()
    argv, place = sys.argv, sys.path[0]
    sys.argv, sys.path[0] = [str(path), *(arguments or [])], str(path.resolve().parent)
    try:
        with _watched(result, snapshot):
            runpy.run_path(str(path), run_name="__main__")
    except SystemExit as exit_:
        if exit_.code not in (None, 0):
            result.error = f"SystemExit: {exit_.code}"
    except (Exception, KeyboardInterrupt) as error:
        result.error = _traceback_of(error, path)
    finally:
        sys.argv, sys.path[0] = argv, place
    return result


@contextmanager
def _watched(result: Measurement, snapshot: str | Path | None) -> Iterator[None]:
    _refuse_snapshot(snapshot)
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    if snapshot is not None:
        torch.cuda.memory._record_memory_history()
    tracker = Tracker()
    tracker.count_existing()
    tracker.restart()
    result.rss_before = _reset_rss()
    start = time.perf_counter()
    try:
        with tracker:
            yield
    finally:
        result.seconds = time.perf_counter() - start
        result.rss_peak = _peak_rss()
        result.tensors = tracker.peak()
        if cuda:
            result.cuda_allocated = torch.cuda.max_memory_allocated()
            result.cuda_reserved = torch.cuda.max_memory_reserved()
        if snapshot is not None:
            torch.cuda.memory._dump_snapshot(str(snapshot))
            torch.cuda.memory._record_memory_history(enabled=None)


def _refuse_snapshot(snapshot: str | Path | None) -> None:
    if snapshot is not None and not torch.cuda.is_available():
        raise ValueError(
            f"a snapshot is CUDA's, and torch finds no CUDA device; leave {str(snapshot)!r} out"
        )


def _reset_rss() -> int:
    """Return the resident bytes, and restart their peak from here where Linux allows it."""
    with suppress(OSError):  # the peak is then that of the process since it began
        Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS") or _peak_rss()


def _peak_rss() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    if resource is None:
        return 0
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status(name: str) -> int:
    if not os.path.exists("/proc/self/status"):
        return 0
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0


def _traceback_of(error: BaseException, path: Path) -> str:
    """Return the traceback from the script's own first line on."""
    frames = traceback.extract_tb(error.__traceback__)
    first = next((i for i, f in enumerate(frames) if f.filename == str(path)), 0)
    lines = traceback.format_list(frames[first:]) + traceback.format_exception_only(error)
    return "".join(lines).rstrip()
