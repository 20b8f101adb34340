"""Cost and gain of N:M sparsity: masks against copies, 2:4 layers against dense ones.

As in `step_time`, calls are timed in turn in one process; read the ratios.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

import optimzoo
from benchmarks.common.files import write_json
from benchmarks.common.provenance import provenance
from benchmarks.common.timing import in_turn
from optimzoo.models.llama import Llama, get_config
from optimzoo.options import refuse
from optimzoo.sparsity import nm_mask, packed_mask, to_semi_structured

LAYERS = ((4096, 4096), (11008, 4096), (4096, 11008))  # of a 7B Llama, [out, in]


def measure_mask(model: str, dtype: torch.dtype, repeats: int) -> dict[str, float]:
    """Time 2:4 masks of a model's hidden weights against one read and one copy of them."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device("meta"):
        groups = optimzoo.param_groups(Llama(get_config(model)))
    shapes = [p.shape for g in groups if g["role"] == "hidden" for p in g["params"]]
    torch.manual_seed(0)
    weights = [torch.randn(s).to(device, dtype) for s in shapes]
    targets = [torch.empty_like(w) for w in weights]
    calls: dict[str, Callable[[], Any]] = {
        "read": lambda: [w.sum() for w in weights],
        "copy": lambda: [t.copy_(w) for t, w in zip(targets, weights, strict=True)],
        "mask": lambda: [packed_mask(w, 2, 4) for w in weights],
    }
    return in_turn(calls, repeats)


@torch.no_grad()
def measure_layer(shape: tuple[int, int], tokens: int, repeats: int) -> dict[str, Any]:
    """Time a pruned bfloat16 layer with hardware sparsity against its dense product."""
    torch.manual_seed(0)
    dense = nn.Linear(shape[1], shape[0], bias=False, device="cuda", dtype=torch.bfloat16)
    dense.weight.mul_(nm_mask(dense.weight, 2, 4))
    sparse = nn.Sequential(nn.Linear(shape[1], shape[0], bias=False, device="meta"))
    sparse[0].weight = nn.Parameter(dense.weight.clone())
    to_semi_structured(sparse)
    x = torch.randn(tokens, shape[1], device="cuda", dtype=torch.bfloat16)
    error = (sparse(x) - dense(x)).float().norm() / dense(x).float().norm()
    ms = in_turn({"dense": lambda: dense(x), "sparse": lambda: sparse(x)}, repeats)
    return {"shape": list(shape), "tokens": tokens, "ms": ms, "error": error.item()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python -m benchmarks sparse-time`."""
    parser.add_argument("--model", default="60m", help="whose hidden weights are masked")
    parser.add_argument("--tokens", type=int, default=4096, help="of the layers on a GPU")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, help="a JSON file for the rows")


def main(args: argparse.Namespace) -> int:
    """Print the comparisons, layers on a GPU alone, and write them to `--out`."""
    if not torch.cuda.is_available():
        reason = "it is of 2:4 layers, which are not measured on a CPU; leave {option} out"
        refuse(args, ["tokens"], args.given, reason)
    console = Console(highlight=False)
    masks = {}
    for dtype in (torch.float32, torch.bfloat16):
        ms = masks[str(dtype).removeprefix("torch.")] = measure_mask(
            args.model, dtype, args.repeats
        )
        console.print(
            f"2:4 masks of {args.model}'s hidden weights, {dtype}: {ms['mask']:.2f} ms, "
            f"{ms['mask'] / ms['read']:.2f} reads of them ({ms['read']:.2f} ms), "
            f"{ms['mask'] / ms['copy']:.2f} copies ({ms['copy']:.2f} ms)"
        )
    layers = []
    if torch.cuda.is_available():
        layers = [measure_layer(shape, args.tokens, args.repeats) for shape in LAYERS]
    else:
        console.print("2:4 layers are not measured: a CPU has no sparse matrix units")
    for row in layers:
        ms, (rows, columns) = row["ms"], row["shape"]
        console.print(
            f"{rows} x {columns}, {row['tokens']} tokens, bfloat16: dense {ms['dense']:.3f} ms, "
            f"2:4 {ms['sparse']:.3f} ms ({ms['dense'] / ms['sparse']:.2f}x), "
            f"error {row['error']:.1e}"
        )
    if args.out:
        write_json(args.out, {"provenance": provenance(), "masks": masks, "layers": layers})
    return 0
