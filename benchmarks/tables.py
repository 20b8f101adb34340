"""Rows of a comparison as a table on the terminal, in Markdown, and as pictures."""

import io
import json
import math
import statistics
from functools import cache
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch.optim.optimizer import Optimizer

from benchmarks.low_rank import on_meta
from benchmarks.plan import Plan, Row, choose, perplexity, settings
from benchmarks.provenance import write_atomic
from benchmarks.scales import SCALES, rescaled
from optimzoo import create_optimizer
from optimzoo.lowrank import support_bytes
from optimzoo.memory import account

MIB = 1024**2


def read_rows(path: Path) -> list[Row]:
    """The rows of a results file."""
    return json.loads(path.read_text(encoding="utf-8"))["rows"]


@cache
def bytes_at(size: str, optimizer: str, hyper: str, lowrank: str = "{}", groups: str = "{}") -> int:
    """Parameters and state in bfloat16 at a published size, from shapes.

    ``hyper``, ``lowrank`` and ``groups`` are JSON. The positions of sparse parts count as
    parameters.
    """
    model = on_meta(size, json.loads(lowrank))
    if by_role := json.loads(groups):

        def make(params: list[dict[str, Any]]) -> Optimizer:
            params = [{**group, **by_role.get(group["role"], {})} for group in params]
            return create_optimizer(optimizer, params, **json.loads(hyper))

        counted = account(model, make, dtype=torch.bfloat16)
    else:
        counted = account(model, optimizer, dtype=torch.bfloat16, **json.loads(hyper))
    return counted.params + support_bytes(model) + counted.state_total


def summarise(plan: Plan, rows: list[Row]) -> list[Row]:
    """One record a method and protocol: mean and spread over seeds, and the other columns."""
    records = []
    pairs = dict.fromkeys((r["method"], r["protocol"]) for r in rows)
    for method, protocol in pairs:
        mine = [r for r in rows if (r["method"], r["protocol"]) == (method, protocol)]
        losses = [perplexity(r["test_loss"]) for r in mine]
        finite = all(map(math.isfinite, losses))
        times = [r["optimizer_ms"] for r in mine if r["optimizer_ms"] is not None]
        first = mine[0]["config"]
        records.append(
            {
                "method": method,
                "label": plan.label(method),
                "protocol": protocol,
                **settings(mine[0]),
                "perplexity": statistics.fmean(losses),
                "spread": statistics.stdev(losses) if len(losses) > 1 and finite else None,
                "seeds": len(mine),
                "held_bytes": mine[0]["parameter_bytes"] + mine[0]["state_bytes"],
                "bytes_60m": bytes_at(
                    "60m",
                    first["optimizer"],
                    *(
                        json.dumps(rescaled(first.get(name, {}), SCALES["60m"]))
                        for name in ("hyper", "lowrank", "groups")
                    ),
                ),
                "peak_bytes": statistics.median(r["peak_bytes"] for r in mine),
                "optimizer_ms": statistics.median(times) if times else math.nan,
                "tokens_per_second": statistics.median(r["tokens_per_second"] for r in mine),
            }
        )
    return sorted(records, key=lambda r: (r["protocol"] != "tuned", r["perplexity"]))


HEADERS = (
    ("method", "left"),
    ("protocol", "left"),
    ("lr/other/clip", "left"),
    ("test ppl", "right"),
    ("held MiB", "right"),
    ("60M MB", "right"),
    ("peak MiB", "right"),
    ("step ms", "right"),
    ("tok/s", "right"),
)


def cells(record: Row) -> list[str]:
    """A record as text, in the order of `HEADERS`."""
    other = "=" if record["other_lr"] is None else f"{record['other_lr']:g}"
    spread = f" ±{record['spread']:.2f}" if record["spread"] is not None else ""
    return [
        record["label"],
        record["protocol"],
        f"{record['lr']:g}/{other}/{record['clip']:g}",
        f"{record['perplexity']:.2f}{spread}",
        f"{record['held_bytes'] / MIB:.1f}",
        f"{record['bytes_60m'] / 1e6:.0f}",
        f"{record['peak_bytes'] / MIB:.0f}",
        f"{record['optimizer_ms']:.1f}",
        f"{record['tokens_per_second']:,.0f}",
    ]


LEGEND = (
    "Same model, same batches in the same order, same steps for every row; learning rates were "
    "chosen on validation text (benchmarks/results), perplexity is on test text. tuned: a learning "
    "rate for the method's weights and one for the rest, and clipping where it helped; paper: one "
    "learning rate, no clipping. held: parameters + optimizer state of this model as trained, "
    "measured from the tensors. 60M: the same for the 58 M Llama in bf16, 1e6 bytes, from shapes, "
    "of rank 128 where a method has a rank. peak: of the process, the interpreter and torch "
    "included (on a GPU: allocated). step: the optimizer alone."
)


def caption(rows: list[Row]) -> str:
    """How the rows were made, in one line."""
    row = rows[0]
    config = row["config"]
    places = [
        f"{made['device']}, {made['threads']} threads, torch {made['torch']}, commit "
        f"{made['commit']}"
        for made in (r["provenance"] for r in rows)
    ]
    seeds = len({r["config"]["seed"] for r in rows})
    return (
        f"{config['model']}, {row['corpus']['name']} text (sha256 {row['corpus']['sha256'][:12]}), "
        f"{row['tokens']:,} tokens a run, {row['precision']}, {seeds} seed{'s' * (seeds > 1)}; "
        + "; ".join(dict.fromkeys(places))
    )


def print_table(plan: Plan, rows: list[Row]) -> None:
    """The comparison on the terminal."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=0)
    for name, side in HEADERS:
        table.add_column(
            name.replace(" ", "\n"),
            justify=side,  # type: ignore[arg-type]
            no_wrap=name != "method",
        )
    for record in summarise(plan, rows):
        table.add_row(*cells(record))
    console = Console()
    console.print(table)
    console.print(caption(rows), highlight=False)
    console.print(LEGEND, highlight=False)


def markdown_table(plan: Plan, rows: list[Row]) -> str:
    """The comparison in Markdown."""
    lines = ["| " + " | ".join(name for name, _ in HEADERS) + " |"]
    lines.append("|" + "|".join("---" if side == "left" else "--:" for _, side in HEADERS) + "|")
    lines += ["| " + " | ".join(cells(record)) + " |" for record in summarise(plan, rows)]
    return "\n".join(lines)


def tuning_text(plan: Plan, rows: list[Row]) -> str:
    """The chosen point of each method and protocol, as lines."""
    lines = []
    for method, protocol in dict.fromkeys((r["method"], r["protocol"]) for r in rows):
        best = choose(rows, method, protocol)
        tried = sum((r["method"], r["protocol"]) == (method, protocol) for r in rows)
        values = ", ".join(f"{k}={v}" for k, v in settings(best).items())
        lines.append(
            f"{plan.label(method):<12} {protocol:<6} {values}: validation perplexity "
            f"{perplexity(best['valid_loss']):.2f} (best of {tried})"
        )
    return "\n".join(lines)


def write_report(plan: Plan, rows: list[Row], out: Path) -> None:
    """Write table.md, loss.png and memory.png into ``out``."""
    text = f"# {plan.name}\n\n{markdown_table(plan, rows)}\n\n{caption(rows)}\n\n{LEGEND}\n"
    write_atomic(out / "table.md", text)
    write_atomic(out / "loss.png", _loss_picture(plan, rows))
    write_atomic(out / "memory.png", _memory_picture(plan, rows))


def _loss_picture(plan: Plan, rows: list[Row]) -> bytes:
    figure, axes = _figure()
    order = [record["method"] for record in summarise(plan, rows)]
    colors = {m: f"C{i}" for i, m in enumerate(dict.fromkeys(order))}
    for row in rows:
        if row["config"]["seed"] == 0 and row["curve"]:
            steps, losses = zip(*row["curve"], strict=True)
            label = f"{plan.label(row['method'])} ({row['protocol']})"
            style = "-" if row["protocol"] == "tuned" else ":"
            axes.plot(steps, losses, style, color=colors[row["method"]], label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("training loss (nats a token)")
    axes.set_title("Training loss, seed 0")
    axes.legend()
    return _png(figure)


def _memory_picture(plan: Plan, rows: list[Row]) -> bytes:
    figure, axes = _figure()
    records = summarise(plan, rows)
    colors = {m: f"C{i}" for i, m in enumerate(dict.fromkeys(r["method"] for r in records))}
    for record in records:
        marker = "o" if record["protocol"] == "tuned" else "x"
        x, y = record["bytes_60m"] / 1e6, record["perplexity"]
        spread = record["spread"] or 0
        axes.errorbar(x, y, yerr=spread, marker=marker, color=colors[record["method"]], capsize=3)
        text = f"{record['label']} ({record['protocol']})"
        axes.annotate(text, (x, y), textcoords="offset points", xytext=(7, 5), fontsize=8)
    axes.margins(x=0.2, y=0.1)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:.0f}")
    axes.yaxis.set_minor_formatter("{x:.0f}")
    axes.set_xlabel("parameters + optimizer state of the 60M Llama, bf16 (MB)")
    axes.set_ylabel(f"test perplexity, {plan.values['model']}")
    axes.set_title("Perplexity against memory (lower left is better)")
    return _png(figure)


def _figure() -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.8), dpi=144, layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
