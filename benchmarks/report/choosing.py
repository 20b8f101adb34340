"""Which method one would take for what: its memory, perplexity and time, from the rows."""

import json
from typing import Any

from benchmarks.common.files import RESULTS
from benchmarks.common.tables import Table
from benchmarks.experiments.plan import Plan, read_rows
from benchmarks.experiments.summary import bytes_60m, bytes_at, stored_records, tuned_records
from optimzoo import get_info

# What is wanted, and what to take for it: a method of the plan.
WANTED = {
    "as little memory as can be, and no step may cost more": "scale",
    "that memory, and a matrix iteration a step": "scale_spectral",
    "hidden weights without state, Adam for the rest": "swan",
    "the same, rows and columns normalised instead of a matrix iteration": "sinkgd",
    "nearly so, without a matrix iteration": "apollo_mini",
    "low-rank state, no decomposition": "apollo",
    "low-rank state, and what the subspace leaves out too": "fira",
    "GaLore, to compare with": "galore",
    "natural gradients in the subspace": "natural_galore",
    "half of Adam's state on hidden weights": "muon",
    "the same, rows normalised instead of a matrix iteration": "rmnp",
    "Adam, where the gradients spike": "stable_spam",
    "none of these": "adamw",
}
OTHERS = ("adam", "scale", "adafactor")  # rules for the embedding and the head


def methods(name: str) -> str:
    """Return the table of what to take for what, by a plan."""
    plan, records = Plan(name), tuned_records(name)
    adamw = _bytes(plan, "adamw")
    rows = []
    for wanted, method in WANTED.items():
        record = plan.methods[method]
        optimizer, hyper = record.get("optimizer", method), record.get("hyper", {})
        call = _link(optimizer) if optimizer != "adamw" else "`adamw`"
        if "normalize" in hyper:
            call += f', `normalize="{hyper["normalize"]}"`'
        mine = _bytes(plan, method)
        memory = f"{mine / 1e6:.0f} MB ({100 * mine / adamw:.0f}\u00a0%)"
        figures = [memory, _large(optimizer, hyper), _perplexity(records, method), _step(method)]
        rows.append([wanted, call, *figures])
    rows.insert(
        -1, ["a 2:4 sparse model at the end", _link("adams"), "", "", "[weights](weights.md)", ""]
    )
    headers = ("you want", "take", "memory", "7B", "perplexity", "step")
    return Table(headers, rows, left=2).markdown()


def other_rules(size: str) -> str:
    """Return the table of bytes by method and rule of the embedding and the head, at a size."""
    rows = []
    for method, bits in (("muon", None), ("muon", 8), ("sinkgd", None)):
        label = f"`{method}`{', eight bits' * (bits is not None)}"
        each = [_large(method, {"state_bits": bits, "other": other}, size) for other in OTHERS]
        rows.append([label, *each])
    headers = ("", "Adam", *(f'`other="{other}"`' for other in OTHERS[1:]))
    return f"{Table(headers, rows).markdown()}\n\n`scale` itself holds {_large('scale', {}, size)}."


def paper(name: str) -> str:
    """Return in a sentence what one rate for all roles costs, by a plan's runs under `paper`."""
    plan = Plan(name)
    perplexities = {(r["method"], r["protocol"]): r["perplexity"] for r in stored_records(name)}
    texts = [
        f"{plan.label(m)}'s {_percent(perplexities[m, 'paper'] / perplexities[m, 'tuned'])}"
        for m in ("adamw", "muon", "scale")
    ]
    return (
        "With one rate for all, and without clipping (`paper` below), perplexity is above its own "
        f"under tuning: {', '.join(texts)}."
    )


def _link(optimizer: str) -> str:
    """Return a method's name as a link to its file, from docs/."""
    path = get_info(optimizer).make.__module__.replace(".", "/")
    return f"[`{optimizer}`](../{path}.py)"


def _perplexity(records: dict[str, dict[str, Any]], method: str) -> str:
    """Return the test perplexity, relative to AdamW's; a dash for a method not yet tuned."""
    if method not in records:
        return "-"
    return _percent(records[method]["perplexity"] / records["adamw"]["perplexity"])


def _percent(ratio: float) -> str:
    return f"{round(100 * (ratio - 1)):+d}\u00a0%"


def _bytes(plan: Plan, method: str) -> float:
    """Return the bytes of the 60M Llama and its state in bfloat16."""
    return bytes_60m(vars(plan.tuning_runs(method, "tuned", [])[0].config))


def _large(optimizer: str, hyper: dict[str, Any], size: str = "7b") -> str:
    """Return the gigabytes of a Llama and its state in bfloat16, at rank 1024."""
    hyper = {**hyper, **({"rank": 1024} if hyper.get("rank", 1) > 1 else {})}
    return f"{bytes_at(size, optimizer, json.dumps(hyper)) / 1e9:.1f}"


def _step(method: str) -> str:
    """Return the time of a step at 60M, float32, on a CPU, relative to fused AdamW's."""
    rows = read_rows(RESULTS / "step-time-60m-amx-cpu.json")
    times = {row["method"]: row["amortised_ms"] for row in rows}
    return f"{times[method] / times['adamw']:.2f}" if method in times else "not measured"
