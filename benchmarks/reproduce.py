"""A paper's table beside ours. So far: the memory column of SCALE's main table."""

import argparse
import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.llama import Llama, get_config
from optimzoo.memory import account

SIZES = ("60M", "130M", "350M", "1B", "7B")

# The paper counts Muon's momentum for every matrix, the embedding and the head included.
ALL_MATRICES = ("hidden", "embedding", "head")
SCALE_MAIN: dict[str, tuple[str, dict[str, Any]]] = {
    "SGD": ("sgd", {}),
    "Adam": ("adam", {}),
    "Muon": ("muon", {"roles": ALL_MATRICES}),
    "SCALE": ("scale", {}),
}
TABLES = {"scale-main": SCALE_MAIN}


@cache
def published() -> list[dict[str, Any]]:
    """The published figures, one record a table and metric, each with its provenance."""
    path = Path(__file__).with_name("published.json")
    return json.loads(path.read_text(encoding="utf-8"))


def published_value(paper: str, metric: str, method: str, size: str) -> float | None:
    """The first published figure of a metric (matched by its beginning), or None."""
    for record in published():
        if record["paper"].startswith(paper) and record["metric"].startswith(metric):
            value = record["values"].get(method, {}).get(size)
            if value is not None:
                return float(value)
    return None


def memory_gigabytes(method: str, hyper: dict[str, Any], size: str) -> tuple[float, float]:
    """Parameters and optimizer state in bfloat16, in units of 1e9 bytes, from shapes."""
    with torch.device("meta"):
        model = Llama(get_config(size.lower()))
    counted = account(model, method, dtype=torch.bfloat16, **hyper)
    return counted.params / 1e9, counted.state_total / 1e9


def memory_cell(params: float, state: float, paper: float | None) -> tuple[str, bool]:
    """Our figure, and whether it is the paper's; starred where the paper adds rounded parts."""
    ours = f"{params + state:.2f}"
    if paper is None or ours == f"{paper:.2f}":
        return ours, True
    rounded_parts = f"{round(params, 2) + round(state, 2):.2f}" == f"{paper:.2f}"
    return f"{ours}{'*' if rounded_parts else ' !'}", rounded_parts


def memory_table(name: str) -> tuple[Table, bool]:
    """Paper beside ours, and whether every published cell is ours to the paper's rounding."""
    title = f"{name}: parameters + optimizer state, bf16, GB (1e9 bytes)"
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("method", no_wrap=True)
    for size in SIZES:
        table.add_column(f"{size}\npaper", justify="right", no_wrap=True)
        table.add_column("\nours", justify="right", no_wrap=True)
    matches = True
    for method, (optimizer, hyper) in TABLES[name].items():
        cells = [method]
        for size in SIZES:
            paper = published_value("SCALE", "memory params+optimizer", method, size)
            ours, same = memory_cell(*memory_gigabytes(optimizer, hyper, size), paper)
            matches &= same
            cells += ["-" if paper is None else f"{paper:.2f}", ours]
        table.add_row(*cells)
    return table, matches


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m benchmarks reproduce`."""
    parser.add_argument("table", choices=sorted(TABLES))
    parser.add_argument("--memory-only", action="store_true", help="the memory column, in seconds")


def main(args: argparse.Namespace) -> int:
    """Print the table; 1 if a cell differs from the paper's."""
    if not args.memory_only:
        raise ValueError("only --memory-only is available so far; for perplexity: compare")
    table, matches = memory_table(args.table)
    console = Console()
    console.print(table)
    console.print(
        "Ours: one step on meta tensors, then the bytes of its state. Muon as the paper counts it: "
        "momentum for all matrices. *: the paper adds its rounded parts, parameters and state. "
        "!: differs. -: no published figure."
    )
    return 0 if matches else 1
