"""Timing of calls, with device synchronization and interleaved comparisons."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch


def synchronize() -> None:
    """Wait until the GPU is idle, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Spans:
    """Timer of any number of spans from `start` to `stop`; CUDA events avoid synchronization."""

    def __init__(self) -> None:
        self._marks: list[Any] = []

    def _mark(self, *_: Any) -> None:
        if not torch.cuda.is_available():
            self._marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)

    start = stop = _mark

    def milliseconds(self) -> list[float]:
        """Synchronize, and return the duration of each span in milliseconds."""
        synchronize()
        pairs = zip(self._marks[::2], self._marks[1::2], strict=False)
        if torch.cuda.is_available():
            return [start.elapsed_time(stop) for start, stop in pairs]
        return [1000 * (stop - start) for start, stop in pairs]


def step_spans(optimizer: torch.optim.Optimizer) -> Spans:
    """Register hooks that time every later step of the optimizer, and return the timer."""
    spans = Spans()
    optimizer.register_step_pre_hook(spans.start)
    optimizer.register_step_post_hook(spans.stop)
    return spans


def timed(call: Callable[[], Any]) -> float:
    """Return the milliseconds of one call, device work included; on a GPU by CUDA events."""
    synchronize()
    spans = Spans()
    spans.start()
    call()
    spans.stop()
    return spans.milliseconds()[0]


def in_turn(calls: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Time the calls in turn after one warm-up round; return the median milliseconds of each."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            elapsed = timed(call)
            if turn:
                times[name].append(elapsed)
    return {name: statistics.median(values) for name, values in times.items()}
