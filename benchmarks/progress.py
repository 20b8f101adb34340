"""The progress of training runs: a bar with loss, speed and time left; else a line a run."""

from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


class RunProgress:
    """One bar over the steps of all runs; it also says which run, its loss and its speed."""

    def __init__(self, total_steps: int) -> None:
        self.console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = self._bar.add_task("", total=total_steps, status="")
        self._base = 0

    def __enter__(self) -> "RunProgress":
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def start(self, name: str, steps: int) -> Callable[[int, float, float], None]:
        """Begin a run; what it returns is to be called with (step, loss, tokens per second)."""
        base = self._base
        self._base += steps
        self._bar.update(self._task, description=name, completed=base, status="")

        def report(step: int, loss: float, speed: float) -> None:
            status = f"loss {loss:.3f}  {speed:,.0f} tok/s"
            self._bar.update(self._task, completed=base + step, status=status)

        return report

    def finish(self, text: str) -> None:
        """A line for a finished run."""
        self.console.print(text, highlight=False)


class SideBySide(RunProgress):
    """One bar over runs at the same time: the range of their losses, their speed together."""

    def __init__(self, total_steps: int) -> None:
        super().__init__(total_steps)
        self._running: dict[str, tuple[str, int, float, float]] = {}

    def report(self, key: str, name: str, step: int, loss: float, speed: float) -> None:
        """The run of this key is at a step."""
        self._running[key] = (name, step, loss, speed)
        (first, *others), steps, losses, speeds = zip(*self._running.values(), strict=True)
        between = " to ".join(f"{loss:.3f}" for loss in sorted({min(losses), max(losses)}))
        self._bar.update(
            self._task,
            description=f"{first} and {len(others)} more" if others else first,
            completed=self._base + sum(steps),
            status=f"loss {between}  {sum(speeds):,.0f} tok/s",
        )

    def end(self, key: str, steps: int) -> None:
        """A run of so many steps has ended."""
        self._running.pop(key, None)
        self._base += steps
