"""Comparison with CAST's published run: the perplexity cost of 2:4 weights."""

import math
from pathlib import Path

from benchmarks.common.files import write_atomic, write_json
from benchmarks.common.tables import Table
from benchmarks.experiments.cast import Comparison
from benchmarks.experiments.plan import Row
from benchmarks.experiments.significance import by_method, mean_loss
from benchmarks.papers.published import published

HEADERS = ("method", "zeros", "paper", "ratio", "ours", "ratio", "tokens")
_NOTE = (
    "paper: LLaMA2-7B on WikiText-2, CAST and, from the increase that the abstract states, the "
    "dense model. Ours: nano on test text, {seeds}; ratios are to the dense model trained as "
    "long. Perplexities on different text do not compare: read the ratios. The runs: python -m "
    "benchmarks cast --store."
)


def records(rows: list[Row]) -> list[Row]:
    """Return one record per method: our figures, and the published one if there is one."""
    groups = by_method(rows)
    dense = math.exp(mean_loss(groups["continued"]))
    paper = {r["metric"]: r["values"] for r in reversed(published()) if r["paper"][:4] == "CAST"}
    sparse = paper["WikiText-2 ppl (4096)"]["CAST 2:4 @7.5B tokens"]["LLaMA2-7B"]
    increase = paper["perplexity increase"]["CAST vs dense"]["LLaMA2-7B"]
    paper_perplexities = {"continued": sparse - increase, "cast": sparse}
    return [
        {
            "method": method,
            "label": mine[0]["label"],
            "zeros": mine[0]["zeros"],
            "paper": (theirs := paper_perplexities.get(method)),
            "paper_ratio": theirs and theirs / (sparse - increase),
            "perplexity": math.exp(mean_loss(mine)),
            "ratio": math.exp(mean_loss(mine)) / dense,
            "tokens": mine[0]["tokens"],
        }
        for method, mine in groups.items()
    ]


def note(rows: list[Row]) -> str:
    """Return what the table shows, and how its rows are made."""
    seeds = len({row["config"]["seed"] for row in rows})
    return _NOTE.format(seeds="one seed" if seeds == 1 else f"{seeds} seeds")


def cells(record: Row) -> list[str]:
    """Format a record as table cells, in the order of `HEADERS`."""
    paper = record["paper"]
    return [
        record["label"],
        f"{record['zeros']:.0%}",
        "-" if paper is None else f"{paper:.2f}",
        "-" if paper is None else f"{record['paper_ratio']:.3f}",
        f"{record['perplexity']:.2f}",
        f"{record['ratio']:.3f}",
        f"{record['tokens']:,}",
    ]


def show(out: Path) -> None:
    """Print the table, and write it as Markdown and as JSON."""
    rows = Comparison("nano").rows
    compared, text = records(rows), note(rows)
    table = Table(HEADERS, [cells(record) for record in compared], title="CAST", notes=[text])
    table.print()
    write_atomic(out / "cast.md", f"# CAST\n\n{table.markdown()}\n\n{text}\n")
    write_json(out / "cast.json", {"records": compared})
