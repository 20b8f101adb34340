"""Comparison of published perplexities with ours: ratios to Adam, ranks, Kendall's tau."""

import math
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.common.files import write_atomic, write_json
from benchmarks.common.tables import Table
from benchmarks.experiments.plan import Plan, Row, read_rows, rows_of
from benchmarks.experiments.summary import MIB, summarise
from benchmarks.papers.comparisons import TABLES, PaperComparison
from benchmarks.papers.published import published

WARNING = (
    "Perplexities on different text do not compare: read the ratios to Adam and the order alone. "
    "Ours: test text, mean and spread over the seeds."
)


def paper_values(table: PaperComparison) -> dict[str, dict[str, float]]:
    """Return published perplexities by size and our method, all of the table's version."""
    values: dict[str, dict[str, float]] = {}
    for record in published():
        key = (record["paper"].rsplit(" ", 1)[0], record.get("version"), record["metric"])
        if key == (table.paper, table.version, table.metric):
            for method, name in table.methods.items():
                for size, value in record["values"].get(name, {}).items():
                    number = math.exp(value) if table.log else float(value)
                    values.setdefault(size, {})[method] = number
    return values


def methods_at(table: PaperComparison, size: str) -> list[tuple[Plan, str]]:
    """Return each method of the table with the first plan at a model size that has it."""
    full = table.plans == ("full",)
    names = [f"{size}-full"] if full else [p.replace("nano", size, 1) for p in table.plans]
    plans, pairs = [Plan(name) for name in names], []
    for method in table.methods:
        plan = next((p for p in plans if table.protocol in p.methods.get(method, {})), None)
        if plan is not None:
            pairs.append((plan, method))
    return pairs


def stored_rows(table: PaperComparison, size: str) -> dict[str, list[Row]]:
    """Return the committed rows of a table by method."""
    by_method: dict[str, list[Row]] = {}
    for plan, method in methods_at(table, size):
        rows = read_rows(plan.results_path) if plan.results_path.exists() else []
        if mine := rows_of(rows, method, table.protocol):
            by_method[method] = mine
    return by_method


def records(table: PaperComparison, size: str, rows: dict[str, list[Row]]) -> list[Row]:
    """Return one record per method: the paper's figure and ours, with their ratios and ranks."""
    plans = {method: plan for plan, method in methods_at(table, size)}
    summaries = {m: summarise(plans[m], mine)[0] for m, mine in rows.items()}
    by_size = paper_values(table)
    paper_size = size.upper() if size.upper() in by_size else table.size
    paper = by_size.get(paper_size, {})
    ours = {method: record["perplexity"] for method, record in summaries.items()}
    compared = []
    for method, record in summaries.items():
        compared.append(
            {
                **record,
                "size": paper_size,
                "tokens": rows[method][0]["tokens"],
                # Runs from which the method's rates were chosen.
                "tried": len(rows_of(plans[method].tuning_rows(method), method, table.protocol)),
                "paper": paper.get(method),
                "paper_ratio": _ratio(paper, method, table.reference),
                "ratio": _ratio(ours, method, table.reference),
            }
        )
    both = [r for r in compared if r["paper"] is not None]
    for key, name in (("paper", "paper_rank"), ("perplexity", "rank")):
        for place, record in enumerate(sorted(both, key=lambda r: r[key]), start=1):
            record[name] = place
    return sorted(compared, key=lambda r: r["perplexity"])


def _ratio(values: dict[str, float], method: str, reference: str) -> float | None:
    if method not in values or reference not in values:
        return None
    return values[method] / values[reference]


def taus(table: PaperComparison, made: list[Row]) -> list[Row]:
    """Return Kendall's tau of our order with the paper's at every published size."""
    from scipy.stats import kendalltau

    results = []
    for size, values in paper_values(table).items():
        pairs = [(values[r["method"]], r["perplexity"]) for r in made if r["method"] in values]
        if len(pairs) > 2:
            tau, p = kendalltau(*zip(*pairs, strict=True))
            results.append({"size": size, "tau": float(tau), "p": float(p), "methods": len(pairs)})
    return results


HEADERS = ("method", "paper", "ratio", "rank", "ours", "ratio", "rank", "MiB", "step ms", "tokens")


def cells(record: Row) -> list[str]:
    """Format a record as table cells, in the order of `HEADERS`."""

    def number(key: str, form: str) -> str:
        value = record.get(key)
        return "-" if value is None else format(value, form)

    spread = "" if record["spread"] is None else f" ±{record['spread']:.2f}"
    return [
        record["label"] + ", edge" * bool(record["edges"]),
        number("paper", ".2f"),
        number("paper_ratio", ".3f"),
        number("paper_rank", "d"),
        f"{record['perplexity']:.2f}{spread}",
        number("ratio", ".3f"),
        number("rank", "d"),
        f"{record['held_bytes'] / MIB:.1f}",
        f"{record['optimizer_ms']:.1f}",
        f"{record['tokens']:,}",
    ]


def lines_below(table: PaperComparison, made: list[Row]) -> list[str]:
    """Return the notes below a table: tau, how to read it, seeds, tuning runs."""
    texts = [
        f"{t['size']} {t['tau']:+.2f} (p {t['p']:.2f}, {t['methods']} methods)"
        for t in taus(table, made)
    ]
    lines = ["Too few methods in common for an order."]
    if texts:
        lines = [f"Kendall's tau with the paper's order: {'; '.join(texts)}."]
    size = made[0]["size"] if made else table.size
    seeds = sorted({r["seeds"] for r in made})
    version = f"{table.version}, " if table.version else ""
    lines.append(
        f"paper: {version}C4 at {size}. {WARNING} Ranks count the methods that both have. MiB: "
        f"parameters + optimizer state as trained, exact. Seeds: {', '.join(map(str, seeds))}."
    )
    if any(r["edges"] for r in made):
        lines.append("edge: its best rate is the largest or the smallest that was tried.")
    counts = sorted({r["tried"] for r in made}, reverse=True)
    by_count = [(n, [r["label"] for r in made if r["tried"] == n]) for n in counts]
    texts = [f"{n} ({', '.join(labels)})" for n, labels in by_count]
    lines.append(f"Tuning runs, as committed: {'; '.join(texts)}.")
    return [*lines, *table.notes]


def to_table(table: PaperComparison, made: list[Row], more: Iterable[str] = ()) -> Table:
    """Return the table with its notes."""
    rows = [cells(record) for record in made]
    return Table(HEADERS, rows, title=table.title, notes=[*lines_below(table, made), *more])


def markdown(table: PaperComparison, made: list[Row], more: Iterable[str] = ()) -> str:
    """Return the table as Markdown with its notes."""
    result = to_table(table, made, more)
    return f"{result.markdown()}\n\n" + " ".join(result.notes)


def show(name: str, made: list[Row], out: Path, more: list[str]) -> None:
    """Print a table, and write it as Markdown and as JSON."""
    table = TABLES[name]
    to_table(table, made, more).print()
    write_atomic(out / f"{name}.md", f"# {table.title}\n\n{markdown(table, made, more)}\n")
    value: Any = {"records": [_plain(r) for r in made], "tau": taus(table, made), "notes": more}
    write_json(out / f"{name}.json", value)


def _plain(record: Row) -> Row:
    finite = {k: v for k, v in record.items() if not isinstance(v, float) or math.isfinite(v)}
    difference = record["difference"] and asdict(record["difference"])
    return {**dict.fromkeys(record), **finite, "difference": difference}


def as_galore(row: Row) -> Row:
    """Return a row with the test loss that GaLore's evaluation would give.

    That code starts its count of batches at 1: its loss is the sum over n batches divided by
    n + 1.
    """
    config = row["config"]
    batches = math.ceil(config["eval_tokens"] // config["seq_len"] / config["batch_size"])
    loss = row["test_loss"]
    return {**row, "test_loss": None if loss is None else loss * batches / (batches + 1)}
