"""Pictures of a comparison: training losses, and perplexity against memory."""

import io
from collections.abc import Iterable
from typing import Any

from benchmarks.experiments.plan import Plan, Row

Point = tuple[float, float]


def figure() -> tuple[Any, Any]:
    """Return an empty figure and its axes."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(7.5, 4.8), dpi=144, layout="constrained")
    axes = made.subplots()
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return made, axes


def png(made: Any) -> bytes:
    """Return a figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    made.savefig(buffer, format="png")
    return buffer.getvalue()


def lines(curves: dict[str, list[Point]], label: str, *, log: bool = False) -> bytes:
    """Draw a value over the steps, one line for each name."""
    made, axes = figure()
    for name, points in curves.items():
        axes.plot(*zip(*points, strict=True), label=name)
    if log:
        axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    if axes.has_data():
        axes.legend()
    return png(made)


def _colors(methods: Iterable[str]) -> dict[str, str]:
    return {m: f"C{i}" for i, m in enumerate(dict.fromkeys(methods))}


def losses(plan: Plan, rows: list[Row], records: list[Row]) -> bytes:
    """Draw the training loss of seed 0, in the order of the records."""
    made, axes = figure()
    colors = _colors(record["method"] for record in records)
    for row in rows:
        if row["config"]["seed"] == 0 and row["curve"]:
            label = f"{plan.label(row['method'])} ({row['protocol']})"
            style = "-" if row["protocol"] == "tuned" else ":"
            points = zip(*row["curve"], strict=True)
            axes.plot(*points, style, color=colors[row["method"]], label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("training loss (nats a token)")
    axes.set_title("Training loss, seed 0")
    axes.legend()
    return png(made)


def memory(plan: Plan, records: list[Row]) -> bytes:
    """Draw perplexity against the bytes of parameters and optimizer state at 60M."""
    made, axes = figure()
    colors = _colors(record["method"] for record in records)
    for record in records:
        marker = "o" if record["protocol"] == "tuned" else "x"
        x, y = record["bytes_60m"] / 1e6, record["perplexity"]
        color, spread = colors[record["method"]], record["spread"] or 0
        axes.errorbar(x, y, yerr=spread, marker=marker, color=color, capsize=3)
        text = f"{record['label']} ({record['protocol']})"
        axes.annotate(text, (x, y), textcoords="offset points", xytext=(7, 5), fontsize=8)
    axes.margins(x=0.2, y=0.1)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:.0f}")
    axes.yaxis.set_minor_formatter("{x:.0f}")
    axes.set_xlabel("parameters + optimizer state of the 60M Llama, bf16 (MB)")
    axes.set_ylabel(f"test perplexity, {plan.values['model']}")
    axes.set_title("Perplexity against memory (lower left is better)")
    return png(made)
