"""Tables for the terminal and for Markdown."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table as Grid


@dataclass(frozen=True)
class Table:
    """A table of text cells with a title above and notes below.

    Attributes:
        headers: one per column; on a terminal they wrap at spaces.
        rows: one list of cells per row.
        title: printed above the table.
        notes: printed below the table, one paragraph each.
        left: number of left-aligned columns; the first of them may wrap.
        gap: spaces between two columns on a terminal.
    """

    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str | None = None
    notes: Sequence[str] = ()
    left: int = 1
    gap: int = 1

    def print(self) -> None:
        """Print the table and its notes."""
        grid = Grid(
            title=self.title, box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, self.gap, 0, 0)
        )
        for i, header in enumerate(self.headers):
            side = "left" if i < self.left else "right"
            whole = i > 0 and not any(", " in row[i] for row in self.rows)  # else it may wrap
            grid.add_column(header.replace(" ", "\n"), justify=side, no_wrap=whole)  # type: ignore[arg-type]
        for row in self.rows:
            grid.add_row(*row)
        console = Console()
        console.print(grid)
        for note in self.notes:
            console.print(note, highlight=False)

    def markdown(self) -> str:
        """Return the table as Markdown, without title and notes."""
        sides = ["---" if i < self.left else "--:" for i in range(len(self.headers))]
        lines = [" | ".join(cells) for cells in (self.headers, *self.rows)]
        return "\n".join(
            [f"| {lines[0]} |", f"|{'|'.join(sides)}|", *(f"| {x} |" for x in lines[1:])]
        )
