"""Base class of actions that are taken every so many optimizer steps."""

from abc import ABC, abstractmethod
from typing import Any


class Clock(ABC):
    """Step counter that calls :meth:`check` once, and :meth:`fire` at every ``every``-th step.

    Args:
        every: steps between two calls, at least 1.

    Raises:
        ValueError: ``every`` is below 1.
    """

    def __init__(self, every: int) -> None:
        if every < 1:
            raise ValueError(f"every is {every}; it must be at least 1")
        self.every, self.steps = every, 0

    def step(self) -> bool:
        """Count one optimizer step; return whether :meth:`fire` was called."""
        if self.steps == 0:
            self.check()  # now, not when the first restart is due
        self.steps += 1
        due = self.steps % self.every == 0
        if due:
            self.fire()
        return due

    @abstractmethod
    def check(self) -> None:
        """Raise what :meth:`fire` would raise later, as far as it is known by the first step."""

    @abstractmethod
    def fire(self) -> None:
        """Take the action now."""

    def state_dict(self) -> dict[str, Any]:
        """Return the number of counted steps."""
        return {"steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a saved count."""
        self.steps = int(state_dict["steps"])
