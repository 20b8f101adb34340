"""Ctrl-C and SIGTERM during training: stop between two steps, never inside one."""

import signal
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any


class HeldSignals:
    """Holds Ctrl-C and SIGTERM back until `check`, and raises them there as KeyboardInterrupt.

    A step that is cut in two leaves weights from which no run can go on to the same bits. A second
    Ctrl-C is raised at once, and makes `urgent` true: what there is then is not worth saving. A
    second SIGTERM is held too: a pool of processes that ends sends one more to each.
    """

    def __init__(self) -> None:
        self._previous: dict[int, Any] = {}
        self._held = False
        self.urgent = False

    def __enter__(self) -> "HeldSignals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if error is None:
            self.check()

    def check(self, agreed: Callable[[bool], bool] = bool) -> None:
        """Raise KeyboardInterrupt if a signal has come, or as processes have ``agreed``."""
        if agreed(self._held):
            raise KeyboardInterrupt

    def _receive(self, number: int, _: Any) -> None:
        self.urgent = self._held and number == signal.SIGINT
        self._held = True
        if self.urgent:
            raise KeyboardInterrupt
