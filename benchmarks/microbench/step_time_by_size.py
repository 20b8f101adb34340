"""Step time by number of hidden weights, from 1 M to 1 G."""

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.common.files import write_json
from benchmarks.common.progress import RunProgress
from benchmarks.common.provenance import provenance
from benchmarks.common.tables import Table
from benchmarks.common.timing import in_turn
from benchmarks.microbench.step_time import ours

SIZES = [2**20, 2**22, 2**24, 2**26, 2**28, 2**30]
SIDE = 4096  # of the largest matrix


def shape(size: int) -> tuple[int, int, int]:
    """Return the shape of a stack of square matrices with at most ``size`` elements in total."""
    side = SIDE
    while side * side > size:
        side //= 2
    return size // side**2, side, side


def measure(
    matrices: tuple[int, int, int], names: list[str], dtype: torch.dtype, repeats: int
) -> dict[str, float]:
    """Return the median milliseconds of a step of each method on so many square matrices."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    count, *square = matrices
    grads = [torch.randn(square, dtype=dtype, device=device) for _ in range(count)]
    steps = {}
    for name in names:
        params = [nn.Parameter(torch.full_like(grad, 0.5)) for grad in grads]
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        steps[name] = ours(name, 128, 200)([{"params": params, "role": "hidden"}]).step
    return in_turn(steps, repeats)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python -m benchmarks growth`."""
    parser.add_argument("--optimizers", nargs="+", default=["sgd", "adamw", "scale"])
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES, metavar="WEIGHTS")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, help="a JSON file for the rows")


def main(args: argparse.Namespace) -> int:
    """Print milliseconds and picoseconds per weight by size, and write the rows to `--out`."""
    for size in args.sizes:
        if size < 1:
            raise ValueError(f"--sizes {size}: a model has at least one weight")
    rows: list[dict[str, Any]] = []
    with RunProgress(len(args.sizes)) as bar:
        for size in map(shape, args.sizes):
            weights = math.prod(size)
            bar.start(f"{weights:,} weights", 1)
            ms = measure(size, args.optimizers, getattr(torch, args.dtype), args.repeats)
            rows.append({"weights": weights, "ms": ms})
    title = f"step of hidden weights, {args.dtype}: ms (ps a weight)"
    cells = [
        [
            f"{row['weights']:,}",
            *(f"{ms:.2f} ({1e9 * ms / row['weights']:.0f})" for ms in row["ms"].values()),
        ]
        for row in rows
    ]
    Table(("weights", *args.optimizers), cells, title=title, left=0, gap=2).print()
    if args.out:
        settings = {"dtype": args.dtype, "repeats": args.repeats}
        write_json(args.out, {"provenance": provenance(), "args": settings, "rows": rows})
    return 0
