"""Pictures of a comparison: training losses, and perplexity against memory."""

import io
import math
from collections.abc import Iterable
from typing import Any

from benchmarks.experiments.plan import Plan, Row

Point = tuple[float, float]


def figure() -> tuple[Any, Any]:
    """Return an empty figure and its axes."""
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(7.5, 4.8), dpi=144, layout="constrained")
    axes = canvas.subplots()
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return canvas, axes


def saved(made: Any, **options: Any) -> bytes:
    """Encode a figure as the bytes of an image, PNG unless ``options`` has a ``format``."""
    buffer = io.BytesIO()
    made.savefig(buffer, **{"format": "png", **options})
    return buffer.getvalue()


def lines(curves: dict[str, list[Point]], label: str, *, log: bool = False) -> bytes:
    """Draw a value over the steps, one line per name."""
    canvas, axes = figure()
    for name, points in curves.items():
        axes.plot(*zip(*points, strict=True), label=name)
    if log:
        axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    if axes.has_data():
        axes.legend()
    return saved(canvas)


def _colors(methods: Iterable[str]) -> dict[str, str]:
    return {m: f"C{i}" for i, m in enumerate(dict.fromkeys(methods))}


def losses(plan: Plan, rows: list[Row], records: list[Row]) -> bytes:
    """Draw the training losses of seed 0, in the order of the records."""
    canvas, axes = figure()
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
    return saved(canvas)


def memory(plan: Plan, records: list[Row], **options: Any) -> bytes:
    """Draw perplexity against the bytes of parameters and optimizer state at 60M."""
    canvas, axes = figure()
    colors = _colors(record["method"] for record in records)
    for record in records:
        marker = "o" if record["protocol"] == "tuned" else "x"
        x, y = record["bytes_60m"] / 1e6, record["perplexity"]
        color, spread = colors[record["method"]], record["spread"] or 0
        axes.errorbar(x, y, yerr=spread, marker=marker, color=color, capsize=3)
    axes.margins(x=0.2, y=0.1)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:.0f}")
    axes.yaxis.set_minor_formatter("{x:.0f}")
    axes.set_xlabel("parameters + optimizer state of the 60M Llama, bf16 (MB)")
    axes.set_ylabel(f"test perplexity, {plan.values['model']}")
    axes.set_title("Perplexity against memory (lower left is better)")
    canvas.draw_without_rendering()  # the axes have their limits now
    several = len({record["protocol"] for record in records}) > 1
    points = [
        (r["label"] + f" ({r['protocol']})" * several, r["bytes_60m"] / 1e6, r["perplexity"])
        for r in records
        if math.isfinite(r["perplexity"]) and math.isfinite(r["bytes_60m"])
    ]
    _label(axes, sorted(points, key=lambda point: point[2]))
    return saved(canvas, **options)


def _label(axes: Any, points: list[tuple[str, float, float]]) -> None:
    """Write a name beside each point, higher up where it would cover another one."""
    taken: list[tuple[float, float, float]] = []  # left, right and bottom, in typographic points
    unit = axes.figure.dpi / 72
    for text, x, y in points:
        left, bottom = axes.transData.transform((x, y)) / unit + (7, -3)
        right = left + 4.6 * len(text)
        while any(
            left < end and start < right and abs(bottom - base) < 9 for start, end, base in taken
        ):
            bottom += 1
        taken.append((left, right, bottom))
        shift = bottom - axes.transData.transform((x, y))[1] / unit
        line = {"arrowstyle": "-", "color": "0.6", "linewidth": 0.5} if shift > 6 else None
        axes.annotate(
            text, (x, y), (7, shift), textcoords="offset points", fontsize=8, arrowprops=line
        )
