"""Timing calls: device work is waited for, and what is compared takes turns."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(call: Callable[[], Any]) -> float:
    """Milliseconds of one call, device work waited for."""
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return 1000 * (time.perf_counter() - start)


def in_turn(calls: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median milliseconds of each call, taken in turn after one that warms up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            took = timed(call)
            if turn:
                times[name].append(took)
    return {name: statistics.median(values) for name, values in times.items()}
