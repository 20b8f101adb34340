"""Summaries of a comparison's rows: one record per method and protocol, and a table."""

import json
import math
import statistics
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import Optimizer

from benchmarks.common.files import write_atomic
from benchmarks.common.provenance import made_on
from benchmarks.common.tables import Table
from benchmarks.experiments import pictures
from benchmarks.experiments.model_sizes import MODEL_SIZES, rescaled
from benchmarks.experiments.plan import Plan, Row, choose, read_rows, rows_of, settings, tuned_text
from benchmarks.experiments.significance import paired
from benchmarks.experiments.tuning import is_rate, role_rates
from benchmarks.training.low_rank_model import on_meta
from benchmarks.training.metrics import perplexity
from benchmarks.training.own import create_own, is_own
from optimzoo import create_optimizer
from optimzoo.lowrank import support_bytes
from optimzoo.memory import account

MIB = 1024**2
REFERENCE = "adamw"  # of the differences


@cache
def bytes_at(size: str, optimizer: str, hyper: str, lowrank: str = "{}", groups: str = "{}") -> int:
    """Return the bytes of parameters and state in bfloat16 at a published size, from shapes.

    ``hyper``, ``lowrank`` and ``groups`` are JSON. The indices of sparse weights count as
    parameters.
    """
    model = on_meta(size, json.loads(lowrank))
    by_role, options = json.loads(groups), json.loads(hyper)

    def make(params: list[dict[str, Any]]) -> Optimizer:
        params = [{**group, **by_role.get(group["role"], {})} for group in params]
        if is_own(optimizer):
            return create_own(optimizer, params, lr=1.0, **options)
        return create_optimizer(optimizer, params, **options)

    if by_role or is_own(optimizer):
        counted = account(model, make, dtype=torch.bfloat16)
    else:
        counted = account(model, optimizer, dtype=torch.bfloat16, **options)
    return counted.params + support_bytes(model) + counted.state_total


def bytes_60m(config: Row) -> float:
    """Return the bytes of the 60M Llama's parameters and state with a run's optimizer.

    NaN: one of one's own cannot be had, or does not step weights on the meta device.
    """
    options = (config.get(name, {}) for name in ("hyper", "lowrank", "groups"))
    texts = [json.dumps(rescaled(values, MODEL_SIZES["60m"])) for values in options]
    try:
        return bytes_at("60m", config["optimizer"], *texts)
    except Exception:
        if is_own(config["optimizer"]):
            return math.nan
        raise


def summarise(plan: Plan, rows: list[Row]) -> list[Row]:
    """Return one record per method and protocol: mean and spread over seeds, and all columns."""
    records = []
    pairs = dict.fromkeys((r["method"], r["protocol"]) for r in rows)
    for method, protocol in pairs:
        mine, reference = (rows_of(rows, name, protocol) for name in (method, REFERENCE))
        losses = [perplexity(r["test_loss"]) for r in mine]
        finite = all(map(math.isfinite, losses))
        times = [r["optimizer_ms"] for r in mine if r["optimizer_ms"] is not None]
        records.append(
            {
                "method": method,
                "label": plan.label(method),
                "protocol": protocol,
                "rates": role_rates(settings(mine[0])),
                "edges": _edges(plan, mine[0]),
                "perplexity": statistics.fmean(losses),
                "spread": statistics.stdev(losses) if len(losses) > 1 and finite else None,
                "seeds": len(mine),
                "difference": paired(mine, reference),
                "held_bytes": mine[0]["parameter_bytes"] + mine[0]["state_bytes"],
                "bytes_60m": bytes_60m(mine[0]["config"]),
                "optimizer_ms": statistics.median(times) if times else math.nan,
            }
        )
    return sorted(records, key=lambda r: (r["protocol"] != "tuned", r["perplexity"]))


HEADERS = ("method", "protocol", "lr hid/emb/head", "test ppl", "held MiB", "60M MB", "step ms")


def _edges(plan: Plan, row: Row) -> list[str]:
    """Return the row's learning rates at an edge of what was tried; all, if it is another point."""
    values = settings(row)
    try:
        if values == plan.best(row["method"], row["protocol"]):
            tuning = plan.tuning_rows(row["method"])
            return plan.edges(row["method"], row["protocol"], tuning)
    except ValueError:  # not tuned
        pass
    return [name for name in values if is_rate(name)]


def cells(record: Row) -> list[str]:
    """Format a record as table cells, in the order of `HEADERS`."""
    spread = f" ±{record['spread']:.2f}" if record["spread"] is not None else ""
    rates = record["rates"] if len(set(record["rates"])) > 1 else record["rates"][:1]
    return [
        record["label"],
        record["protocol"],
        "/".join(f"{r:g}" for r in rates) + " edge" * bool(record["edges"]),
        f"{record['perplexity']:.2f}{spread}",
        f"{record['held_bytes'] / MIB:.1f}",
        f"{record['bytes_60m'] / 1e6:.0f}" if math.isfinite(record["bytes_60m"]) else "-",
        f"{record['optimizer_ms']:.1f}",
    ]


def stored_records(name: str) -> list[Row]:
    """Return the records of a plan's committed rows."""
    plan = Plan(name)
    return summarise(plan, read_rows(plan.results_path))


def tuned_records(name: str) -> dict[str, Row]:
    """Return the records of a plan's tuned runs, by method."""
    return {r["method"]: r for r in stored_records(name) if r["protocol"] == "tuned"}


LEGEND = (
    "Same model, same batches in the same order, same steps for every row; what is tuned was "
    "chosen on validation text (benchmarks/results), perplexity is on test text. tuned: a "
    "learning rate for the hidden weights, the embedding and the head, clipping, Adam's betas or "
    "momentum, weight decay; paper: one learning rate, no clipping. edge: the best rate is the "
    "largest or the smallest that was tried. held: parameters + optimizer state of this model, "
    "measured from the tensors. 60M: the same for the 60M Llama in bf16, 1e6 bytes, from shapes, "
    "of rank 128 where a method has a rank. step: the optimizer alone."
)


def caption(rows: list[Row]) -> str:
    """Format model, text, precision, seeds and provenance of the rows in one line."""
    row = rows[0]
    config = row["config"]
    seeds = len({r["config"]["seed"] for r in rows})
    return (
        f"{config['model']}, {row['corpus']['name']} text (sha256 {row['corpus']['sha256'][:12]}), "
        f"{row['tokens']:,} tokens a run, {row['precision']}, {seeds} seed{'s' * (seeds > 1)}; "
        + made_on(*(r["provenance"] for r in rows))
    )


def comparison(plan: Plan, rows: list[Row]) -> Table:
    """Return the table of a comparison, with its caption and legend as notes."""
    lines = [cells(record) for record in summarise(plan, rows)]
    return Table(HEADERS, lines, notes=[caption(rows), LEGEND], left=3, gap=0)


def tuning_text(plan: Plan, rows: list[Row]) -> str:
    """Format the chosen point of each method and protocol, one line each."""
    lines = []
    for method, protocol in dict.fromkeys((r["method"], r["protocol"]) for r in rows):
        best = choose(rows, method, protocol)
        values = tuned_text(settings(best))
        lines.append(
            f"{plan.label(method):<12} {protocol:<6} {values}: validation perplexity "
            f"{perplexity(best['valid_loss']):.2f} (best of {len(rows_of(rows, method, protocol))})"
        )
    return "\n".join(lines)


def write_report(plan: Plan, rows: list[Row], out: Path) -> None:
    """Write table.md, loss.png and memory.png to ``out``."""
    table = comparison(plan, rows)
    text = "\n\n".join([f"# {plan.name}", table.markdown(), *table.notes])
    write_atomic(out / "table.md", f"{text}\n")
    records = summarise(plan, rows)
    write_atomic(out / "loss.png", pictures.losses(plan, rows, records))
    write_atomic(out / "memory.png", pictures.saved(pictures.memory_figure(plan, records)))
