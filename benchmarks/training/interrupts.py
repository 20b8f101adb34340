"""Deferred Ctrl-C and SIGTERM: training stops between two steps, never inside one."""

import signal
import threading
from collections.abc import Callable
from typing import Any


class DeferredInterrupt:
    """Context that defers Ctrl-C and SIGTERM to `check`, which raises KeyboardInterrupt.

    A step interrupted halfway leaves weights from which no run can resume to the same bits. A
    second Ctrl-C is raised at once and sets `urgent`: the state is then not worth saving. A second
    SIGTERM is deferred too: a process pool that shuts down sends one more to each worker.
    """

    def __init__(self) -> None:
        self._previous: dict[int, Any] = {}
        self._held = False
        self.urgent = False

    def __enter__(self) -> "DeferredInterrupt":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if error is None:
            self.check()

    def check(self, agreed: Callable[[bool], bool] = bool) -> None:
        """Raise KeyboardInterrupt if a signal has arrived, here or (by ``agreed``) on any rank."""
        if agreed(self._held):
            raise KeyboardInterrupt

    def _receive(self, number: int, _: Any) -> None:
        self.urgent = self._held and number == signal.SIGINT
        self._held = True
        if self.urgent:
            raise KeyboardInterrupt
