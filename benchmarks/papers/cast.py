"""Comparison with CAST's published run: the perplexity cost of 2:4 weights."""

from pathlib import Path

from benchmarks.common.files import RESULTS, write_atomic, write_json
from benchmarks.common.tables import Table
from benchmarks.experiments.plan import Row
from benchmarks.experiments.summary import read_rows
from benchmarks.papers.published import published
from benchmarks.training.metrics import perplexity

ROWS = RESULTS / "nano-cast.json"
HEADERS = ("method", "zeros", "paper", "ratio", "ours", "ratio", "tokens")
NOTE = (
    "paper: LLaMA2-7B on WikiText-2, CAST and, from the increase that the abstract states, the "
    "dense model. Ours: nano on test text, one seed; ratios are to the dense model trained as "
    "long. Perplexities on different text do not compare: read the ratios. The runs: python -m "
    "benchmarks cast --store."
)


def records(path: Path = ROWS) -> list[Row]:
    """Return one record per method: our figures, and the published one if there is one."""
    rows = {row["method"]: row for row in read_rows(path)}
    dense = perplexity(rows["continued"]["test_loss"])
    paper = {r["metric"]: r["values"] for r in reversed(published()) if r["paper"][:4] == "CAST"}
    sparse = paper["WikiText-2 ppl (4096)"]["CAST 2:4 @7.5B tokens"]["LLaMA2-7B"]
    increase = paper["perplexity increase"]["CAST vs dense"]["LLaMA2-7B"]
    papers = {"continued": sparse - increase, "cast": sparse}
    return [
        {
            "method": method,
            "label": row["label"],
            "zeros": row["zeros"],
            "paper": papers.get(method),
            "paper_ratio": papers[method] / papers["continued"] if method in papers else None,
            "perplexity": perplexity(row["test_loss"]),
            "ratio": perplexity(row["test_loss"]) / dense,
            "tokens": row["tokens"],
        }
        for method, row in rows.items()
    ]


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
    compared = records()
    table = Table(HEADERS, [cells(record) for record in compared], title="CAST", notes=[NOTE])
    table.print()
    write_atomic(out / "cast.md", f"# CAST\n\n{table.markdown()}\n\n{NOTE}\n")
    write_json(out / "cast.json", {"records": compared})
