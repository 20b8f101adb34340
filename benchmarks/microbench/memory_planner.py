"""Checks of the memory planner against torch: account, simulated peaks, the 7B plan.

On a CPU a peak is that of all tensors; on a GPU that of CUDA's allocator.
"""

import argparse
import gc
import inspect
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

import optimzoo
from benchmarks.common.files import write_json
from benchmarks.common.provenance import provenance
from benchmarks.training.low_rank_model import on_meta
from optimzoo.memory import account, checkpoint_blocks, language_model_step, measure, simulate
from optimzoo.models import from_config, is_config
from optimzoo.models.llama import rope_table
from optimzoo.options import refuse

CHECKS = ("account", "simulate", "plan")
_CHECKS_OF = {
    "models": ("account", "simulate"),
    "optimizers": ("account", "simulate"),
    "dtype": ("simulate",),
    "batch": ("simulate",),
    "seq": ("simulate",),
    "plan_model": ("plan",),
}
PLAN: dict[str, Any] = {"batch": 1, "seq": 256, "checkpointing": True, "release": True}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PROJECTED = "update_proj_gap"


def shapes(name: str) -> nn.Module:
    """Return a model on meta: our Llama of a size, or one of transformers, with its own loss."""
    return from_config(name, "meta") if is_config(name) else on_meta(name)


def real(name: str, dtype: torch.dtype, device: str) -> nn.Module:
    """Return a model with weights drawn on ``device``: on a CPU 7B would take minutes."""
    if is_config(name):
        return from_config(name, device).to(dtype)
    model: Any = on_meta(name).to(dtype).to_empty(device=device)
    for p in model.parameters():
        nn.init.ones_(p) if p.ndim == 1 else nn.init.normal_(p, std=0.02)
    model.model.rope.copy_(rope_table(model.config))
    return model


def account_rows(models: list[str], names: list[str]) -> Iterator[dict[str, Any]]:
    """Yield bytes counted from shapes, and those held after a real step on random gradients."""
    for model in models:
        for dtype in DTYPES:
            for name in names:
                row: dict[str, Any] = {"check": "account", "model": model, "dtype": dtype}
                hyper = dict(optimzoo.get_info(name).required)
                try:
                    start = time.perf_counter()
                    counted = account(shapes(model), name, dtype=DTYPES[dtype], **hyper)
                    row["ms"] = round(1000 * (time.perf_counter() - start), 1)
                except ValueError as error:
                    yield {**row, "method": name, "refused": str(error)}
                    continue
                parts = (counted.params, counted.grads, counted.state_total)
                actual = held_after_a_step(model, DTYPES[dtype], name, hyper)
                row |= {"method": name, "counted": parts, "held": actual}
                yield {**row, "same": parts == actual}


def held_after_a_step(
    model: str, dtype: torch.dtype, name: str, hyper: dict[str, Any]
) -> tuple[int, int, int]:
    """Return the bytes of parameters, gradients and state after a CPU step on random gradients."""
    weights = real(model, dtype, "cpu")
    optimizer = optimzoo.create_optimizer(name, weights, lr=1e-4, **hyper)
    for p in weights.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    state = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    grads = [p.grad for p in weights.parameters() if p.grad is not None]
    params = sum(p.nbytes for p in weights.parameters())
    return params, sum(grad.nbytes for grad in grads), sum(t.nbytes for t in state)


def simulate_rows(
    models: list[str], names: list[str], dtype: str, batch: int, seq: int, device: str
) -> Iterator[dict[str, Any]]:
    """Yield simulated and measured peaks with and without checkpointing, a refresh included."""
    for model in models:
        for name in names:
            for checkpointing in (False, True):
                settings = {"batch": batch, "seq": seq, "checkpointing": checkpointing}
                yield one_peak(model, name, dtype, device, settings | {"release": False})


def one_peak(
    model: str, name: str, dtype: str, device: str, settings: dict[str, Any]
) -> dict[str, Any]:
    """Return a simulated and the measured peak; on a CPU 7B is only simulated."""
    hyper: dict[str, Any] = dict(optimzoo.get_info(name).required)
    if PROJECTED in inspect.signature(optimzoo.get_info(name).make).parameters:
        hyper[PROJECTED] = 2  # the third step refreshes, as the third simulated one does
    start = time.perf_counter()
    simulated = simulate(
        shapes(model), name, dtype=DTYPES[dtype], device=device, **settings, **hyper
    )
    row = {"check": "simulate", "model": model, "method": name, "dtype": dtype, **settings}
    row |= {"seconds": round(time.perf_counter() - start, 1), "simulated": simulated.peak.bytes}
    row |= {"phase": simulated.peak.phase, "parts": simulated.peak.by_category}
    if model == "7b" and device == "cpu":
        return row
    workspaces = cuda_workspaces() if device == "cuda" else 0
    weights = real(model, DTYPES[dtype], device)
    optimizer = optimzoo.create_optimizer(name, weights, lr=1e-4, **hyper)
    measured = measure(training_step(weights, optimizer, settings), steps=3)
    peak = measured.cuda_allocated if device == "cuda" else measured.tensors.bytes
    row |= {"measured": peak, "workspaces": workspaces, "tensors": measured.tensors.bytes}
    row["difference"] = simulated.peak.bytes / peak - 1 if peak else None
    del weights, optimizer
    gc.collect()
    return row


def training_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any]
) -> Callable[[], None]:
    """Return a function that takes a training step with these settings."""
    if settings["checkpointing"]:
        checkpoint_blocks(model)
    if settings["release"]:
        optimzoo.release(optimizer)
    loss_of = language_model_step(settings["batch"], settings["seq"])

    def step() -> None:
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def cuda_workspaces() -> int:
    """Return the bytes of cuBLAS workspaces after a forward and a backward."""
    weight = torch.ones(64, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    (weight @ weight).sum().backward()
    del weight
    gc.collect()
    return torch.cuda.memory_allocated()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python -m benchmarks memory`."""
    parser.add_argument("--checks", nargs="+", choices=CHECKS, default=list(CHECKS))
    text = "of account and simulate: Llamas by size, public models by name, or a config.json"
    parser.add_argument("--models", nargs="+", default=["nano", "9m", "60m"], help=text)
    parser.add_argument(
        "--optimizers",
        nargs="+",
        metavar="NAME",
        help="of account and simulate; default: all, to account",
    )
    of_peaks = "of simulate; account has both, plan bfloat16"
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16", help=of_peaks)
    parser.add_argument("--batch", type=int, default=2, help="of simulate; plan has 1")
    parser.add_argument("--seq", type=int, default=128, help="of simulate; plan has 256")
    parser.add_argument("--plan-model", default="7b", help="of plan, with SCALE")
    parser.add_argument("--out", type=Path, help="a JSON file for the rows")


def main(args: argparse.Namespace) -> int:
    """Print all rows. Return 1 if an account differs by a byte, or a peak by 2 %."""
    for option, checks in _CHECKS_OF.items():
        if not set(checks) & set(args.checks):
            text = " or ".join(checks)
            reason = f"it is of the check {text}; add that to --checks, or leave {{option}} out"
            refuse(args, [option], args.given, reason)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name in [*args.models, args.plan_model]:
        shapes(name)  # an unknown one fails at once
    names = [optimzoo.get_info(n).name for n in args.optimizers or optimzoo.list_optimizers()]
    three = names if args.optimizers else ["adamw", "scale", "galore"]
    makers: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
        "account": lambda: account_rows(args.models, names),
        "simulate": lambda: simulate_rows(
            args.models, three, args.dtype, args.batch, args.seq, device
        ),
        "plan": lambda: iter([one_peak(args.plan_model, "scale", "bfloat16", device, PLAN)]),
    }
    console, rows, good = Console(highlight=False), [], True
    for check in args.checks:
        for row in makers[check]():
            rows.append(row)
            good &= row.get("same", True) and abs(row.get("difference") or 0) < 0.02
            console.print(line(row))
            if args.out:
                write_json(args.out, {"rows": rows, "provenance": provenance()})
    return 0 if good else 1


def line(row: dict[str, Any]) -> str:
    """Format a row as a line of text."""
    head = f"{row['model']:<14} {row['method']:<15} {row['dtype']:<9}"
    if "refused" in row:
        return f"{head} refused"
    if row["check"] == "account":
        return f"{head} {sum(row['counted']):>14,} held {sum(row['held']):>14,} in {row['ms']} ms"
    more = "checkpointing " * row["checkpointing"] + "release " * row["release"]
    text = f"{head} {row['simulated']:>14,} in {row['seconds']} s {more}"
    if "measured" in row:
        text += f"measured {row['measured']:,} ({100 * row['difference']:+.2f} %)"
    return text
