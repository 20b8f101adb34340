"""CAST beside its published run: how much perplexity 2:4 weights cost."""

from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.plan import Row, perplexity
from benchmarks.provenance import write_atomic, write_json
from benchmarks.published import published
from benchmarks.tables import read_rows

RESULTS = Path(__file__).with_name("results") / "nano-cast.json"
HEADERS = ("method", "zeros", "paper", "ratio", "ours", "ratio", "tokens")
NOTE = (
    "paper: LLaMA2-7B on WikiText-2, CAST and, from the increase that the abstract states, the "
    "dense model. Ours: nano on test text, one seed; ratios are to the dense model trained as "
    "long. Perplexities on different text do not compare: read the ratios. The runs: python -m "
    "benchmarks cast --store."
)


def records(path: Path = RESULTS) -> list[Row]:
    """A record a way: the published figure where there is one, and ours."""
    rows = {row["method"]: row for row in read_rows(path)}
    dense = perplexity(rows["continued"]["test_loss"])
    paper = {r["metric"]: r["values"] for r in reversed(published()) if r["paper"][:4] == "CAST"}
    sparse = paper["WikiText-2 ppl (4096)"]["CAST 2:4 @7.5B tokens"]["LLaMA2-7B"]
    increase = paper["perplexity increase"]["CAST vs dense"]["LLaMA2-7B"]
    known = {"continued": sparse - increase, "cast": sparse}
    return [
        {
            "method": method,
            "label": row["label"],
            "zeros": row["zeros"],
            "paper": known.get(method),
            "paper_ratio": known[method] / known["continued"] if method in known else None,
            "perplexity": perplexity(row["test_loss"]),
            "ratio": perplexity(row["test_loss"]) / dense,
            "tokens": row["tokens"],
        }
        for method, row in rows.items()
    ]


def cells(record: Row) -> list[str]:
    """A record as text, in the order of `HEADERS`."""
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
    made = records()
    grid = Table(title="CAST", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for i, header in enumerate(HEADERS):
        grid.add_column(header, justify="right" if i else "left", no_wrap=i > 0)
    for record in made:
        grid.add_row(*cells(record))
    console = Console()
    console.print(grid)
    console.print(NOTE, highlight=False)
    lines = ["| " + " | ".join(HEADERS) + " |", "|---" + "|--:" * (len(HEADERS) - 1) + "|"]
    lines += ["| " + " | ".join(cells(record)) + " |" for record in made]
    write_atomic(out / "cast.md", "\n".join(["# CAST", "", *lines, "", NOTE, ""]))
    write_json(out / "cast.json", {"records": made})
