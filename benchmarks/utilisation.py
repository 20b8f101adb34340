"""How much of a GPU a training run uses, and how much of its step is the optimizer's.

`python -m benchmarks utilisation` trains on random tokens, as the tables do: bf16, compiled, 64
sequences of 256 tokens. Operations are counted without what the causal mask leaves out.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.data import Corpus
from benchmarks.llama import LlamaConfig, flops_per_token, get_config
from benchmarks.plan import Plan
from benchmarks.progress import RunProgress
from benchmarks.provenance import provenance, write_json
from benchmarks.run import Run
from benchmarks.timing import Spans, step_spans

# Dense bfloat16 products, 1e12 operations a second, from the vendors' data sheets.
PEAK = {
    "B200": 2250.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "4090": 165.0,
}


def peak_flops(device: str) -> float | None:
    """Operations a second of a GPU by its name; None if it is not in the table."""
    return next((1e12 * value for name, value in PEAK.items() if name in device), None)


def speed_text(row: dict[str, Any], config: LlamaConfig) -> str:
    """The optimizer's share of the median step, and the model-flops utilisation."""
    run = row["config"]
    tokens = run["batch_size"] * run["accumulate"] * run["seq_len"]
    seconds = row["step_ms"] / 1000
    flops = flops_per_token(config, run["seq_len"], causal=True) * tokens / seconds
    share = row["optimizer_ms"] / row["step_ms"]
    text = f"step {row['step_ms']:.1f} ms, the optimizer {share:.1%} of it; "
    text += f"{flops / 1e12:.1f} model Tflop/s"
    peak = peak_flops(row["provenance"]["device"])
    return text + (f", {flops / peak:.1%} of the GPU's peak in bf16" if peak else "")


def measure(size: str, method: str, steps: int) -> dict[str, Any]:
    """Median times of a step and of its optimizer, in the plan of this size."""
    config = Plan(size).entry(method, "tuned", 0, lr=1e-3, other_lr=1e-3, clip=1.0).config
    vocabulary, tokens = get_config(config.model).vocab_size, 2 * config.tokens_per_step
    random = np.random.default_rng(0).integers(0, vocabulary, tokens, dtype=np.uint16)
    run = Run(config, Corpus("random", "", vocabulary, random, random, random))
    optimizer, whole = step_spans(run.optimizer), Spans()
    run.train_step(log=False)  # compiles
    with RunProgress(steps) as bar:
        for step in range(steps):
            bar.start(f"{method} at {size}, step {step + 1}", 1)
            whole.start()
            run.train_step(log=False, read=step + 1 == steps)
            whole.stop()
    return {
        "model": config.model,
        "method": method,
        "config": {k: getattr(config, k) for k in ("batch_size", "accumulate", "seq_len")},
        "step_ms": statistics.median(whole.milliseconds()),
        "optimizer_ms": statistics.median(optimizer.milliseconds()),
        "provenance": provenance(),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m benchmarks utilisation`."""
    parser.add_argument("--scales", nargs="+", default=["60m", "130m", "350m"], metavar="SIZE")
    parser.add_argument("--optimizers", nargs="+", default=["scale", "adamw"], metavar="NAME")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path, help="a JSON file for the rows")


def main(args: argparse.Namespace) -> int:
    """Print a line a model and method, and write the rows where asked to."""
    rows = []
    for size in args.scales:
        for method in args.optimizers:
            rows.append(measure(size, method, args.steps))
            print(f"{size}, {method}: {speed_text(rows[-1], get_config(rows[-1]['model']))}")
    if args.out:
        write_json(args.out, {"rows": rows})
    return 0
