"""Report of what an optimizer has taken over, and of what it has not."""

import textwrap
from collections import Counter
from dataclasses import dataclass

USED, CONVERTED, UNUSED = "used", "converted", "not used"
_INDENT = 31


@dataclass(frozen=True)
class AdoptedState:
    """What became of the old state of one parameter.

    Attributes:
        name: the parameter's name, or its position.
        role: its role in the new optimizer; "" if that has no such parameter.
        outcome: ``used``, the numbers as they were; ``converted``, to another scale, precision or
            form; ``not used``.
        detail: what was taken over, and how it was converted; or why nothing was.
    """

    name: str
    role: str
    outcome: str
    detail: str


@dataclass(frozen=True)
class AdoptionReport:
    """What became of an old optimizer's state; ``str()`` is a table of at most 80 columns.

    Attributes:
        parameters: one entry for each, in the order of the new optimizer.
    """

    parameters: tuple[AdoptedState, ...]

    @property
    def used(self) -> dict[str, str]:
        """Return what was taken over as it was, by the parameter's name."""
        return self._details(USED)

    @property
    def converted(self) -> dict[str, str]:
        """Return what was converted, and how, by the parameter's name."""
        return self._details(CONVERTED)

    @property
    def not_used(self) -> dict[str, str]:
        """Return why a parameter starts without its old state, by its name."""
        return self._details(UNUSED)

    def _details(self, outcome: str) -> dict[str, str]:
        return {p.name: p.detail for p in self.parameters if p.outcome == outcome}

    def __str__(self) -> str:
        lines = [f"{'role':<10}{'tensors':>8}  {'old state':<11}what, or why not"]
        counts = Counter((p.role or "-", p.outcome, p.detail) for p in self.parameters)
        for (role, outcome, detail), count in counts.items():
            first, *others = textwrap.wrap(detail, 80 - _INDENT)
            lines.append(f"{role:<10}{count:>8}  {outcome:<11}{first}")
            lines += [" " * _INDENT + line for line in others]
        return "\n".join(lines)
