"""Pictures of a comparison: training losses, and perplexity against memory."""

import io
import math
from itertools import pairwise
from typing import Any

import numpy as np

from benchmarks.experiments import labels
from benchmarks.experiments.colors import method_colors
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


def saved(canvas: Any, **options: Any) -> bytes:
    """Encode a figure as the bytes of an image, PNG unless ``options`` has a ``format``."""
    buffer = io.BytesIO()
    canvas.savefig(buffer, **{"format": "png", **options})
    return buffer.getvalue()


def lines(curves: dict[str, list[Point]], label: str, *, log: bool = False) -> bytes:
    """Return a PNG of a value over the steps, one line per name."""
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


def losses(plan: Plan, rows: list[Row], records: list[Row]) -> bytes:
    """Return a PNG of the training losses of seed 0, in the order of the records."""
    canvas, axes = figure()
    colors = method_colors(record["method"] for record in records)
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


def pareto_front(points: list[Point]) -> list[int]:
    """Return the indices of the (memory, perplexity) that no other beats, by memory.

    Memory counts in whole MB, as tables have it.
    """
    front: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: (round(points[i][0]), points[i][1])):
        if not front or points[i][1] < points[front[-1]][1]:
            front.append(i)
    return front


def memory_figure(plan: Plan, records: list[Row]) -> Any:
    """Return the figure of perplexity against the bytes of parameters and state at 60M.

    It has points, their names, and the front of the best ones.
    """
    canvas, axes = figure()
    colors = method_colors(record["method"] for record in records)
    records = [r for r in records if math.isfinite(r["perplexity"] + r["bytes_60m"])]
    points = [(r["bytes_60m"] / 1e6, r["perplexity"]) for r in records]
    front = pareto_front(points)
    for record, (x, y) in zip(records, points, strict=True):
        marker = "o" if record["protocol"] == "tuned" else "X"
        color, spread = colors[record["method"]], record["spread"] or 0
        axes.errorbar(x, y, spread, marker=marker, color=color, elinewidth=1, capsize=2)
    axes.margins(x=0.08, y=0.1)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.grid(alpha=0.25, axis="y", which="minor")
    axes.set_xlabel("parameters + optimizer state of the 60M Llama, bf16 (MB)")
    axes.set_ylabel(f"test perplexity, {plan.values['model']}")
    axes.set_title("Perplexity against memory (lower left is better; line: Pareto front)")
    best = [points[i] for i in front]
    corners = [*best[:1], *(c for a, b in pairwise(best) for c in ((b[0], a[1]), b))]
    corners += [(axes.get_xlim()[1], y) for _, y in best[-1:]]
    axes.autoscale(False)
    axes.plot([x for x, _ in corners], [y for _, y in corners], color="0.55", lw=1.2, zorder=1)
    spreads = [record["spread"] or 0 for record in records]
    bars = [((x, y - by), (x, y + by)) for (x, y), by in zip(points, spreads, strict=True)]
    several = len({record["protocol"] for record in records}) > 1
    names = [r["label"] + f" ({r['protocol']})" * several for r in records]
    place_labels(axes, names, points, [*bars, *pairwise(corners)], bold=front)
    return canvas


def place_labels(
    axes: Any, names: list[str], points: list[Point], lines: list[tuple[Point, Point]], bold: Any
) -> None:
    """Write a name beside each point, on no other one, and rather not on one of the lines."""
    if not names:
        return
    canvas = axes.figure
    canvas.draw_without_rendering()  # the axes have their limits and their place now
    canvas.set_layout_engine("none")
    unit = canvas.dpi / 72  # typographic points from here on
    weights = ("bold" if i in bold else "normal" for i in range(len(names)))
    colors = {"bold": "0.1", "normal": "0.3"}
    fonts: list[Any] = [{"fontsize": 9, "weight": w, "color": colors[w]} for w in weights]
    sizes = []
    for name, font in zip(names, fonts, strict=True):
        text = axes.text(0, 0, name, **font)
        sizes.append(text.get_window_extent().size / unit)
        text.remove()
    places = axes.transData.transform(points) / unit
    ends = axes.transData.transform(np.reshape(lines, (-1, 2))).reshape(-1, 2, 2) / unit
    boxes = labels.place(
        np.array(sizes),
        places,
        radius=4.5,
        lines=np.hstack([ends.min(axis=1) - 1, ends.max(axis=1) + 1]),
        frame=axes.bbox.extents / unit,
    )
    nearest = labels.nearest(places, boxes)
    for i, (left, bottom, right, top) in enumerate(boxes - np.tile(places, 2)):
        # Held at the point's side: in another font than was measured it stays near.
        side = "left" if left > 0 else "right" if right < 0 else "center"
        x = {"left": left, "right": right, "center": (left + right) / 2}[side]
        end = nearest[i] - places[i]
        line = {"arrowstyle": "-", "color": "0.6", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 4}
        line["relpos"] = tuple((end - (left, bottom)) / (right - left, top - bottom))
        axes.annotate(
            names[i],
            points[i],
            (x, bottom),
            textcoords="offset points",
            horizontalalignment=side,
            verticalalignment="bottom",
            arrowprops=line if np.hypot(*end) > 10 else None,
            **fonts[i],
        )
