"""Progress of training runs: a bar with loss, speed and time left, or one line per run."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

LINE_EVERY = 60.0  # seconds, where no terminal shows the bar


class RunProgress:
    """One progress bar over the steps of all runs, with the current run's name, loss and speed.

    Into a file or a pipe, a line a minute.
    """

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
        self._printed = time.monotonic()

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def start(self, name: str, steps: int) -> Callable[[int, float, float], None]:
        """Begin a run. Return the callback to call with (step, loss, tokens per second)."""
        base = self._base
        self._base += steps
        self._bar.update(self._task, description=name, completed=base, status="")

        def report(step: int, loss: float, speed: float) -> None:
            status = f"loss {loss:.3f}  {speed:,.0f} tok/s"
            self._update(completed=base + step, description=name, status=status)

        return report

    def _update(self, *, completed: int, description: str, status: str) -> None:
        self._bar.update(self._task, completed=completed, description=description, status=status)
        now = time.monotonic()
        if self._bar.disable and now - self._printed >= LINE_EVERY:
            self._printed = now
            total = self._bar.tasks[0].total
            self.finish(f"{description}: {completed:,} of {total:,.0f} steps, {status}")

    def finish(self, text: str) -> None:
        """Print the line of a finished run."""
        self.console.print(text, highlight=False)


class SideBySide(RunProgress):
    """One progress bar over concurrent runs: the range of their losses and their total speed."""

    def __init__(self, total_steps: int) -> None:
        super().__init__(total_steps)
        self._running: dict[str, tuple[str, int, float, float]] = {}

    def report(self, key: str, name: str, step: int, loss: float, speed: float) -> None:
        """Update the step, loss and speed of the run ``key``."""
        self._running[key] = (name, step, loss, speed)
        (first, *others), steps, losses, speeds = zip(*self._running.values(), strict=True)
        between = " to ".join(f"{loss:.3f}" for loss in sorted({min(losses), max(losses)}))
        self._update(
            description=f"{first} and {len(others)} more" if others else first,
            completed=self._base + sum(steps),
            status=f"loss {between}  {sum(speeds):,.0f} tok/s",
        )

    def end(self, key: str, steps: int) -> None:
        """Count a run's ``steps`` as done, and remove it from the running ones."""
        self._running.pop(key, None)
        self._base += steps


class _Amount(ProgressColumn):
    def render(self, task: Task) -> Text:
        unit = task.fields["unit"]
        return Text(f"{task.completed:,.0f} {unit}" if unit else "", no_wrap=True)


class Bars:
    """Progress bars on stderr that fit in 80 columns, or no output if not ``shown``."""

    def __init__(self, shown: bool) -> None:
        self._progress = Progress(
            TextColumn("{task.description:<14}"),
            BarColumn(bar_width=16),
            _Amount(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not shown,
        )

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    @contextmanager
    def bar(
        self, description: str, total: int | None, unit: str
    ) -> Iterator[Callable[[int], None]]:
        """Show a bar and yield the function that advances it; afterwards it stays, complete.

        Without a total it only counts.
        """
        task = self._progress.add_task(description, total=total, unit=unit)
        yield lambda amount: self._progress.advance(task, amount)
        done = self._progress.tasks[task].completed or 1
        self._progress.update(task, completed=done, total=done)
