"""Something that happens every so many optimizer steps."""

from abc import ABC, abstractmethod
from typing import Any


class Clock(ABC):
    """Counts steps and calls :meth:`fire` at every ``every``-th; before that, once, :meth:`check`.

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
        """Count one optimizer step; True where it was one of those that :meth:`fire` follows."""
        if self.steps == 0:
            self.check()  # now, not when the first restart is due
        self.steps += 1
        due = self.steps % self.every == 0
        if due:
            self.fire()
        return due

    @abstractmethod
    def check(self) -> None:
        """Refuse what :meth:`fire` could not do, as far as it can be known by the first step."""

    @abstractmethod
    def fire(self) -> None:
        """Do it now."""

    def state_dict(self) -> dict[str, Any]:
        """How many steps were counted."""
        return {"steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved count."""
        self.steps = int(state_dict["steps"])
