"""Cost of low-rank weights: refactorization against SVD, SLTrain against autograd.

As in `step_time`, calls are timed in turn in one process; read the ratios.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from benchmarks.common.files import write_json
from benchmarks.common.provenance import provenance
from benchmarks.common.timing import in_turn, timed
from optimzoo.lowrank import LowRankLinear, SparseLowRankLinear, balanced_factors

MIB = 1024**2


def measure_refactorization(shape: list[int], rank: int, repeats: int) -> dict[str, Any]:
    """Time `balanced_factors` against one SVD of the product. Return also their difference."""
    rows, columns = shape
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    B = torch.randn(rows, rank, generator=generator).to(device)
    A = torch.randn(rank, columns, generator=generator).to(device)
    factors: list[Tensor] = []
    timed(lambda: balanced_factors(B, A))
    times = [timed(lambda: factors.extend(balanced_factors(B, A))) for _ in range(repeats)]
    svd = timed(lambda: torch.linalg.svd(B @ A, full_matrices=False))
    product = B @ A
    difference = (factors[0] @ factors[1] - product).norm() / product.norm()
    return {
        "shape": shape,
        "rank": rank,
        "ms": statistics.median(times),
        "svd_ms": svd,
        "difference": difference.item(),
    }


def measure_sparse(shape: list[int], rank: int, tokens: int, repeats: int) -> dict[str, Any]:
    """Time forward and backward of SLTrain's layer, of autograd's on the dense sum, and others."""
    rows, columns = shape
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    sparse = SparseLowRankLinear(columns, rows, rank, bias=False, device=device)
    low = LowRankLinear(columns, rows, rank, bias=False, device=device)
    dense = nn.Linear(columns, rows, bias=False, device=device)
    x = torch.randn(tokens, columns, device=device, requires_grad=True)
    grad = torch.randn(tokens, rows, device=device)
    calls: dict[str, Callable[[], Tensor]] = {
        "sltrain": lambda: sparse(x),
        "naive": lambda: F.linear(x, sparse.weight),
        "low_rank": lambda: low(x),
        "dense": lambda: dense(x),
    }
    steps = {name: partial(backward, call, grad) for name, call in calls.items()}
    return {
        "shape": shape,
        "rank": rank,
        "tokens": tokens,
        "ms": in_turn(steps, repeats),
        "kept_bytes": {name: kept_bytes(call) for name, call in calls.items()},
    }


def backward(call: Callable[[], Tensor], grad: Tensor) -> None:
    """Run a layer's forward and backward."""
    call().backward(grad)


def kept_bytes(call: Callable[[], Tensor]) -> int:
    """Return the bytes that autograd saves for the backward, each storage counted once."""
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = call()
    del output
    return sum(sizes.values())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python -m benchmarks lowrank-time`."""
    parser.add_argument("--shape", type=int, nargs=2, default=[4096, 11008], help="out in")
    parser.add_argument("--layer", type=int, nargs=2, default=[2048, 2048], help="out in")
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="a JSON file for the rows")


def main(args: argparse.Namespace) -> int:
    """Print both comparisons, and write them to `--out`."""
    balance = measure_refactorization(args.shape, args.rank, args.repeats)
    sparse = measure_sparse(args.layer, args.rank, args.tokens, args.repeats)
    console = Console(highlight=False)
    rows, columns = balance["shape"]
    console.print(
        f"refactorization of {rows} x {columns}, rank {args.rank}: {balance['ms']:.1f} ms; SVD of "
        f"the product {balance['svd_ms']:.0f} ms ({balance['svd_ms'] / balance['ms']:.0f}x); "
        f"the product changes by {balance['difference']:.1e}"
    )
    rows, columns = sparse["shape"]
    console.print(
        f"forward and backward of {rows} x {columns}, rank {args.rank}, {args.tokens} tokens:"
    )
    for name, ms in sparse["ms"].items():
        console.print(
            f"  {name:<9}{ms:8.1f} ms {ms / sparse['ms']['naive']:6.2f} of naive, "
            f"{sparse['kept_bytes'][name] / MIB:6.1f} MiB kept for the backward"
        )
    if args.out:
        facts = {"provenance": provenance(), "refactorization": balance, "layer": sparse}
        write_json(args.out, facts)
    return 0
