"""Model-flops utilisation of a GPU in training, and the optimizer's share of the step.

`python -m benchmarks utilisation` trains on random tokens with the tables' settings: bf16,
compiled, 64 sequences of 256 tokens. Operations that the causal mask skips are not counted.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.files import write_json
from benchmarks.common.progress import RunProgress
from benchmarks.common.provenance import provenance
from benchmarks.common.timing import Spans, step_spans
from benchmarks.data.corpus import Corpus
from benchmarks.experiments.plan import Plan
from benchmarks.training.flops import speed_text
from benchmarks.training.run import Run
from optimzoo.models.llama import get_config


def measure(size: str, method: str, steps: int) -> dict[str, Any]:
    """Train the plan of a size. Return the median milliseconds of a step and of its optimizer."""
    config = Plan(size).entry(method, "tuned", 0, lr=1e-3, other_lr=1e-3, clip=1.0).config
    vocabulary, tokens = get_config(config.model).vocab_size, 2 * config.tokens_per_step
    random = np.random.default_rng(0).integers(0, vocabulary, tokens, dtype=np.uint16)
    run = Run(config, Corpus("random", "", vocabulary, random, random, random))
    optimizer, whole_step = step_spans(run.optimizer), Spans()
    run.train_step(log=False)  # compiles
    with RunProgress(steps) as bar:
        for step in range(steps):
            bar.start(f"{method} at {size}, step {step + 1}", 1)
            whole_step.start()
            run.train_step(log=False, read=step + 1 == steps)
            whole_step.stop()
    return {
        "model": config.model,
        "method": method,
        "config": {k: getattr(config, k) for k in ("batch_size", "accumulate", "seq_len")},
        "step_ms": statistics.median(whole_step.milliseconds()),
        "optimizer_ms": statistics.median(optimizer.milliseconds()),
        "provenance": provenance(),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python -m benchmarks utilisation`."""
    sizes = ["60m", "130m", "350m"]  # --scales: the option's earlier name
    parser.add_argument("--sizes", "--scales", nargs="+", default=sizes, metavar="SIZE")
    parser.add_argument("--optimizers", nargs="+", default=["scale", "adamw"], metavar="NAME")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path, help="a JSON file for the rows")


def main(args: argparse.Namespace) -> int:
    """Print one line per model and method, and write the rows to `--out`."""
    rows = []
    for size in args.sizes:
        for method in args.optimizers:
            rows.append(measure(size, method, args.steps))
            print(f"{size}, {method}: {speed_text(rows[-1], get_config(rows[-1]['model']))}")
    if args.out:
        write_json(args.out, {"rows": rows})
    return 0
