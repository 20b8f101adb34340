"""Text between marks in the README and the pages, from the committed rows."""

import math
import re
import textwrap
from collections.abc import Callable
from functools import partial
from typing import Any

import optimzoo
from benchmarks.common.files import RESULTS, read_json
from benchmarks.common.tables import Table
from benchmarks.experiments import cast, fine_tuning
from benchmarks.experiments.plan import Plan, read_rows
from benchmarks.experiments.significance import LEVEL
from benchmarks.experiments.summary import (
    LEGEND,
    REFERENCE,
    caption,
    comparison,
    stored_records,
    tuned_records,
)
from benchmarks.experiments.tuning import role_rates
from benchmarks.papers import perplexity_tables
from benchmarks.report import batches, choosing, findings, start_checks, tuned_rates
from benchmarks.training.flops import speed_text
from optimzoo.models.llama import get_config

_PLACE = re.compile(r"(<!-- (\w+): (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(text: str) -> str:
    """Replace every table between marks in ``text`` by one from the committed rows."""

    def fill(match: re.Match[str]) -> str:
        return f"{match[1]}{_MADE[match[2]](match[3])}\n{match[4]}"

    return _PLACE.sub(fill, text)


def _comparison(name: str) -> str:
    plan = Plan(name)
    if not plan.results_path.exists():
        raise ValueError(f"{plan.results_path} is missing; run compare --store first")
    rows = read_rows(plan.results_path)
    edge = {(r["method"], r["protocol"]) for r in stored_records(name) if r["edges"]}
    rows = [row for row in rows if (row["method"], row["protocol"]) not in edge]
    return f"{comparison(plan, rows).markdown()}\n\n{caption(rows)}. {LEGEND}"


def _beside(name: str, *, notes: bool = True) -> str:
    """Return a paper's table beside ours, by TABLE@SIZE, with its notes or else its caption."""
    table, size = perplexity_tables.TABLES[name.split("@")[0]], name.split("@")[1]
    rows = perplexity_tables.stored_rows(table, size)
    compared = perplexity_tables.records(table, size, rows)
    if notes:
        return perplexity_tables.markdown(table, compared)
    every = [row for mine in rows.values() for row in mine]
    return f"{perplexity_tables.to_table(table, compared).markdown()}\n\n{caption(every)}."


def _headline(name: str) -> str:
    """Return the sentences on SCALE and AdamW: memory, and perplexity by paired t tests."""
    records = tuned_records(name)
    scale_mb, adamw_mb = (records[method]["bytes_60m"] / 1e6 for method in ("scale", "adamw"))
    text = (
        f"SCALE holds {scale_mb / adamw_mb:.0%} of AdamW's bytes ({scale_mb:.0f} MB against "
        f"{adamw_mb:.0f} MB "
        "of parameters and state at 60M in bfloat16). Both tuned on a nano Llama, its "
        "test perplexity is "
    )
    orders = [f"{_order(records['scale'])} with batches of {Plan(name).batch_tokens:,} tokens"]
    if (larger := Plan(f"{name}-16k")).results_path.exists():
        orders.append(f"{_order(tuned_records(larger.name)['scale'])} with {larger.batch_tokens:,}")
    return textwrap.fill(f"{text}{', and '.join(orders)}.", 100, break_on_hyphens=False)


def _order(record: dict[str, Any]) -> str:
    """Return how a perplexity stands to AdamW's, as ``1.2% above AdamW's``."""
    difference = record["difference"]
    size = f"{abs(math.expm1(difference.mean)):.1%} {'below' if difference.mean < 0 else 'above'}"
    if difference.p is not None and not difference.significant:
        return "level with AdamW's"
    return f"{size} AdamW's" + " (one seed)" * (difference.p is None)


def _methods(name: str) -> str:
    """Return the table of the registry's methods, with the best rates of a plan."""
    plan, rows = Plan(name), []
    tuning = read_rows(plan.tune_path)
    for method in optimzoo.list_optimizers():
        info = optimzoo.get_info(method)
        if not info.make.__module__.startswith("optimzoo."):
            continue
        rates = "-"
        if method in plan.methods and not plan.edges(method, "tuned", tuning):
            rates = " / ".join(f"{r:g}" for r in role_rates(plan.best(method, "tuned")))
        link = source_link(info.source, short=True)
        rows.append([f"`{method}`", info.description, link, info.state, rates])
    headers = ("name", "method", "source", "state", f"lr: hidden / embedding / head, on {name}")
    table = Table(headers, rows, left=5)
    note = (
        "`adamw`, `sgd`, `adafactor` and torch's others have the same names as in torch. state: in "
        "weights of that role; rest: embedding, head and vectors; r: the rank, s: the history. "
        f"lr: `lr`, `embedding_lr` and `head_lr`, each by the same search on {name} "
        f"({_size(name)}), with `vector_lr` {plan.methods['scale']['hyper']['vector_lr']:g}; "
        "-: not tuned by it yet."
    )
    return f"{table.markdown()}\n\n{note}"


def source_link(source: str, *, short: bool = False) -> str:
    """Return a method's source as a link; `short`: named by its number, or by its site."""
    number = source.removeprefix("arXiv ")
    if number == source:
        return f"[{source.split('/')[0] if short else source}](https://{source})"
    return f"[{number if short else source}](https://arxiv.org/abs/{number})"


def _size(name: str) -> str:
    plan = Plan(name)
    return f"batches of {plan.batch_tokens:,} tokens, {plan.values['steps']} steps"


def _results(name: str) -> str:
    """Return a plan's tuned runs in five columns, with a caption of one line."""
    records = tuned_records(name)
    rows = [
        [
            r["label"],
            f"{r['bytes_60m'] / 1e6:.0f}",
            f"{r['perplexity']:.2f} ±{r['spread']:.2f}",
            "" if r["method"] == REFERENCE else r["difference"].text(),
        ]
        for r in records.values()
    ]
    seeds = sorted({r["seeds"] for r in records.values()})
    headers = ("method", "MB at 60M", "test perplexity", "to AdamW")
    return (
        f"{Table(headers, rows).markdown()}\n\nA {name} Llama ({_size(name)}, "
        f"{' or '.join(map(str, seeds))} seeds, float32, CPU), every method tuned by the same "
        "search ([protocol](docs/protocol.md)). MB: parameters and state of the 60M Llama in "
        "bfloat16. ±: standard deviation over the seeds; to AdamW: mean over paired seeds and "
        "its standard error, level where a t test does not tell them apart "
        f"(p < {LEVEL}). The papers' protocol, and what these runs cannot tell: "
        "[results](docs/results.md)."
    )


def _gradients(name: str) -> str:
    """Return the peak of live gradients by mode, from ``release-memory-NAME.json``."""
    rows = read_rows(RESULTS / f"release-memory-{name}.json")
    return ", ".join(f"{row['gradient_bytes'] / 1e6:.0f} MB {row['mode']}" for row in rows) + "."


def _steps(name: str) -> str:
    """Return the step times by method, from ``step-time-NAME.json``."""
    record = read_json(RESULTS / f"step-time-{name}.json")
    rows, host = record["rows"], record["provenance"]
    times = {row["method"]: row["amortised_ms"] for row in rows}
    headers = ("method", "step", "to fused SGD", "to fused AdamW")
    lines = [
        [method, f"{ms:.1f} ms", f"{ms / times['sgd']:.2f}", f"{ms / times['adamw']:.2f}"]
        for method, ms in times.items()
    ]
    settings = record["args"]
    return Table(headers, lines).markdown() + (
        f"\n\n{settings['model']}, {settings['dtype']}, rank {settings['rank']}, refreshes every "
        f"{settings['gap']} steps included; {host['device']}, {host['threads']} threads, torch "
        f"{host['torch']}."
    )


_SHAPES = {"60m": "60M", "1b": "1B", "7b-layer": "7B, one layer"}
_ON_GPU = {
    "sgd": ("cuda", "SGD (fused)"),
    "adamw": ("cuda", "AdamW (fused)"),
    "scale": ("cuda", "SCALE, CUDA kernels"),
    "scale-captured": ("cuda", "the same in a CUDA graph"),
    "scale triton": ("triton", "SCALE, Triton kernels"),
    "scale-loop": ("cuda", "SCALE, a loop over the weights"),
}


def _on_gpu(name: str) -> str:
    """Return the step times by model shape, from the rows of `make gpu`."""
    lines = []
    shapes = {
        s: x for s, x in _SHAPES.items() if (RESULTS / f"step-time-{s}-{name}-cuda.json").exists()
    }
    for key, (kernels, label) in _ON_GPU.items():
        cells = []
        for shape in shapes:
            record = read_json(RESULTS / f"step-time-{shape}-{name}-{kernels}.json")
            row = next(r for r in record["rows"] if r["method"] == key.split()[0])
            share = f" ({row['share_of_stream']:.0%})" if "scale" in key else ""
            cells.append(f"{row['step_ms']:.2f} ms{share}")
        lines.append([label, *cells])
    host = record["provenance"]
    return Table(("step", *shapes.values()), lines).markdown() + (
        f"\n\nbfloat16; {host['device']}, torch {host['torch']}. In brackets: the bytes that the "
        "step must move, a second, as a share of what a copy or a sum in place moves in that run; "
        "above 100 %, part of the embedding's second reading came from the cache."
    )


def _utilisation(name: str) -> str:
    """Return the GPU utilisation of training, from ``utilisation-NAME.json``."""
    rows = read_rows(RESULTS / f"utilisation-{name}.json")
    return "\n".join(
        f"- {row['model'].upper()}, {row['method']}: {speed_text(row, get_config(row['model']))}"
        for row in rows
    )


def _forgetting(_: str) -> str:
    """Return the table of what methods learn and forget, and how it was made."""
    record = fine_tuning.read()
    return f"{fine_tuning.table(record).markdown()}\n\n{fine_tuning.caption(record)}"


def _cast(model: str) -> str:
    """Return the table of CAST and other methods to 2:4, and how it was made."""
    result = cast.table(cast.Comparison(model).rows)
    return "\n\n".join([result.markdown(), *result.notes])


_MADE: dict[str, Callable[[str], str]] = {
    "headline": _headline,
    "batches": batches.text,
    "findings": lambda _: findings.table().markdown(),
    "starting": lambda _: tuned_rates.table().markdown(),
    "start": tuned_rates.example,
    "checked": start_checks.text,
    "forgetting": _forgetting,
    "cast": _cast,
    "choosing": choosing.methods,
    "other": choosing.other_rules,
    "paper": choosing.paper,
    "methods": _methods,
    "results": _results,
    "table": _comparison,
    "beside": _beside,
    "rows": partial(_beside, notes=False),
    "gradients": _gradients,
    "steps": _steps,
    "gpu": _on_gpu,
    "utilisation": _utilisation,
}
