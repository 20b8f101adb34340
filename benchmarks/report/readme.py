"""Write the committed results into the README, and as a page: no figure is typed by hand."""

import argparse
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.common.files import RESULTS, ROOT, write_atomic
from benchmarks.common.tables import Table
from benchmarks.experiments.plan import Plan
from benchmarks.experiments.summary import LEGEND, caption, comparison, read_rows, write_report
from benchmarks.papers import perplexity_tables
from benchmarks.report import results_page
from benchmarks.training.flops import speed_text
from optimzoo.models.llama import get_config
from optimzoo.options import refuse

README = ROOT / "README.md"
_PLACE = re.compile(r"(<!-- (\w+): (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(text: str) -> str:
    """``text`` with every table between its marks made anew from the committed rows."""

    def fill(match: re.Match[str]) -> str:
        return f"{match[1]}{_MADE[match[2]](match[3])}\n{match[4]}"

    return _PLACE.sub(fill, text)


def _comparison(name: str) -> str:
    plan = Plan(name)
    if not plan.results_path.exists():
        raise ValueError(f"{plan.results_path} is missing; run compare --store first")
    rows = read_rows(plan.results_path)
    return f"{comparison(plan, rows).markdown()}\n\n{caption(rows)}. {LEGEND}"


def _beside(name: str, *, notes: bool = True) -> str:
    """A paper's table beside ours, as `scale-main@nano`; without notes, how it was made."""
    table, scale = name.split("@")
    rows = perplexity_tables.stored_rows(perplexity_tables.TABLES[table], scale)
    made = perplexity_tables.records(perplexity_tables.TABLES[table], scale, rows)
    if notes:
        return perplexity_tables.markdown(perplexity_tables.TABLES[table], made)
    every = [row for mine in rows.values() for row in mine]
    grid = perplexity_tables.grid(perplexity_tables.TABLES[table], made)
    return f"{grid.markdown()}\n\n{caption(every)}."


def _gradients(name: str) -> str:
    """Gradients alive at once by way of stepping, of ``release-memory-NAME.json``."""
    rows = json.loads((RESULTS / f"release-memory-{name}.json").read_text(encoding="utf-8"))["rows"]
    return ", ".join(f"{row['gradient_bytes'] / 1e6:.0f} MB {row['mode']}" for row in rows) + "."


def _steps(name: str) -> str:
    """One step's time by method, of ``step-time-NAME.json``."""
    record = json.loads((RESULTS / f"step-time-{name}.json").read_text(encoding="utf-8"))
    rows, made = record["rows"], record["provenance"]
    times = {row["method"]: row["amortised_ms"] for row in rows}
    headers = ("method", "step", "to fused SGD", "to fused AdamW")
    lines = [
        [method, f"{ms:.1f} ms", f"{ms / times['sgd']:.2f}", f"{ms / times['adamw']:.2f}"]
        for method, ms in times.items()
    ]
    settings = record["args"]
    return Table(headers, lines).markdown() + (
        f"\n\n{settings['model']}, {settings['dtype']}, rank {settings['rank']}, refreshes every "
        f"{settings['gap']} steps included; {made['device']}, {made['threads']} threads, torch "
        f"{made['torch']}."
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
    """A step's time by shape, of the rows that `make gpu` wrote on a GPU."""
    lines = []
    for key, (kernels, label) in _ON_GPU.items():
        cells = []
        for shape in _SHAPES:
            path = RESULTS / f"step-time-{shape}-{name}-{kernels}.json"
            record = json.loads(path.read_text(encoding="utf-8"))
            row = next(r for r in record["rows"] if r["method"] == key.split()[0])
            share = f" ({row['share_of_stream']:.0%})" if "scale" in key else ""
            cells.append(f"{row['step_ms']:.2f} ms{share}")
        lines.append([label, *cells])
    made = record["provenance"]
    return Table(("step", *_SHAPES.values()), lines).markdown() + (
        f"\n\nbfloat16; {made['device']}, torch {made['torch']}. In brackets: the bytes that the "
        "step must move, a second, as a share of what a copy or a sum in place moves in that run; "
        "above 100 %, part of the embedding's second reading came from the cache."
    )


def _utilisation(name: str) -> str:
    """What training uses of a GPU, of ``utilisation-NAME.json``."""
    path = RESULTS / f"utilisation-{name}.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return "\n".join(
        f"- {row['model'].upper()}, {row['method']}: {speed_text(row, get_config(row['model']))}"
        for row in rows
    )


_MADE: dict[str, Callable[[str], str]] = {
    "table": _comparison,
    "beside": _beside,
    "rows": partial(_beside, notes=False),
    "gradients": _gradients,
    "steps": _steps,
    "gpu": _on_gpu,
    "utilisation": _utilisation,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m benchmarks report`."""
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if it would differ")
    parser.add_argument("--out", type=Path, default=Path("runs/report"))


def main(args: argparse.Namespace) -> int:
    """Write the README's tables, the page and the pictures; or check the README's tables."""
    if args.check:
        refuse(args, ["out"], args.given, "--check writes nothing; leave {option} out")
    old = README.read_text(encoding="utf-8")
    new = filled(old)
    if args.check:
        if new != old:
            print("README.md differs from the results; run python -m benchmarks report")
        return int(new != old)
    write_atomic(README, new)
    write_atomic(args.out / "index.html", results_page.render())
    for plan in Plan.stored():
        write_report(plan, read_rows(plan.results_path), args.out / plan.name)
    print(f"written: {README.name}, {args.out}/index.html, and loss.png, memory.png by plan")
    return 0
