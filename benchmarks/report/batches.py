"""Perplexity against AdamW's over batch sizes, ours beside a paper's."""

import math
from typing import Any

from benchmarks.experiments import pictures
from benchmarks.experiments.colors import method_colors
from benchmarks.experiments.plan import Plan
from benchmarks.experiments.significance import Difference
from benchmarks.experiments.summary import REFERENCE, tuned_records
from benchmarks.papers.comparisons import TABLES
from benchmarks.papers.perplexity_tables import paper_values

PLANS = ("1k", "4k", "16k")  # of as many tokens a run
PAPER = ("scale-main", "60M")
PAPER_PLAN = "60m-full"  # the published batch


def differences(name: str) -> dict[str, dict[int, Difference]]:
    """Return each method's differences to AdamW by tokens of a batch, from the committed rows."""
    by_method: dict[str, dict[int, Difference]] = {}
    for plan in (Plan(f"{name}-{batch}") for batch in PLANS):
        records = tuned_records(plan.name) if plan.results_path.exists() else {}
        for method, record in records.items():
            if method != REFERENCE and record["difference"] and not record["edges"]:
                by_method.setdefault(method, {})[plan.batch_tokens] = record["difference"]
    return by_method


def published() -> dict[str, float]:
    """Return the paper's perplexities over AdamW's, by our method."""
    table, size = TABLES[PAPER[0]], PAPER[1]
    values = paper_values(table)[size]
    return {m: values[m] / values[REFERENCE] for m in values if m != REFERENCE}


def text(name: str) -> str:
    """Return the picture's link, and where SCALE stands at each batch."""
    scale = differences(name)["scale"]
    at = ", ".join(f"{scale[batch].text()} at {batch:,}" for batch in sorted(scale))
    batch, ratio = Plan(PAPER_PLAN).batch_tokens, published()["scale"]
    return (
        "![Perplexity to AdamW's against the tokens of a batch](batches.svg)\n\n"
        f"SCALE's perplexity to AdamW's, by the tokens of a batch: {at}; in the paper "
        f"{100 * (ratio - 1):+.1f} % at {batch:,} ({PAPER[1]} weights, C4)."
    )


def figure(name: str) -> Any:
    """Draw each method's perplexity over AdamW's against the tokens of a batch.

    Bars are standard errors; hollow points are the paper's, of another model and text.
    """
    canvas, axes = pictures.figure()
    ours, paper = differences(name), published()
    batch, colors = Plan(PAPER_PLAN).batch_tokens, method_colors(ours)
    label, ends = Plan(f"{name}-{PLANS[0]}").label, []
    axes.axhline(0, color=method_colors([REFERENCE])[REFERENCE], lw=1)
    for method, points in ours.items():
        batches = sorted(points)
        values = [100 * math.expm1(points[b].mean) for b in batches]
        errors = [100 * (points[b].error or 0) for b in batches]
        axes.errorbar(
            batches, values, errors, color=colors[method], marker="o", capsize=2, elinewidth=1
        )
        ends.append((label(method), (float(batches[-1]), values[-1])))
        if method in paper:
            value = 100 * (paper[method] - 1)
            axes.plot(batch, value, "o", mfc="none", color=colors[method])
            ends.append((f"{label(method)}, paper", (float(batch), value)))
    axes.set_xscale("log", base=2)
    ticks = sorted({batch, *(b for points in ours.values() for b in points)})
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.margins(x=0.12, y=0.12)
    axes.set_xlabel("tokens of a batch")
    axes.set_ylabel("test perplexity to AdamW's (%)")
    axes.set_title(f"{name}, every method tuned at each batch (lower is better)")
    pictures.place_labels(axes, [name for name, _ in ends], [at for _, at in ends], [], bold=())
    return canvas
