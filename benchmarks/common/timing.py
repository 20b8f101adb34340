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


class Spans:
    """Times from `start` to `stop`, any number of them; a GPU marks them and is not waited for."""

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
        """Of each span, all work waited for."""
        synchronize()
        pairs = zip(self._marks[::2], self._marks[1::2], strict=False)
        if torch.cuda.is_available():
            return [start.elapsed_time(stop) for start, stop in pairs]
        return [1000 * (stop - start) for start, stop in pairs]


def step_spans(optimizer: torch.optim.Optimizer) -> Spans:
    """The times of the optimizer's steps from now on."""
    spans = Spans()
    optimizer.register_step_pre_hook(spans.start)
    optimizer.register_step_post_hook(spans.stop)
    return spans


def timed(call: Callable[[], Any]) -> float:
    """Milliseconds of one call to its end, on a GPU by the GPU's clock."""
    synchronize()
    spans = Spans()
    spans.start()
    call()
    spans.stop()
    return spans.milliseconds()[0]


def in_turn(calls: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median milliseconds of each call, taken in turn after one that warms up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            took = timed(call)
            if turn:
                times[name].append(took)
    return {name: statistics.median(values) for name, values in times.items()}
