"""``optimzoo memory``: what fits, before renting the GPU, and what a script really took."""

import argparse
import ast
import inspect
import os
import re
import sys
from pathlib import Path
from typing import Any

import torch

from optimzoo.memory import report
from optimzoo.memory.account import account
from optimzoo.memory.measure import measure_script
from optimzoo.memory.plan import Planner
from optimzoo.memory.simulate import simulate
from optimzoo.memory.sources import load_function, load_model
from optimzoo.registry import get_info, list_optimizers

# Without defaults, since they are choices of training; bytes do not depend on them.
_REQUIRED: dict[str, dict[str, Any]] = {"adams": {"l1": 1e-4, "total_steps": 1000}}
_SIZES = {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
_SIZES |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``optimzoo memory``."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="llama-60m ... llama-7b, or a Hugging Face config.json")
    source.add_argument("--module", metavar="FILE.py:FUNCTION", help="returns an nn.Module")
    source.add_argument("--script", nargs=argparse.REMAINDER, help="measure it; then its arguments")
    parser.add_argument("--optimizer", nargs="+", default=["all"], help="names, or all")
    parser.add_argument("--hyper", nargs="+", default=[], metavar="NAME=VALUE", help="rank=256")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--shards", type=int, default=1, help="processes that share under FSDP2")
    parser.add_argument("--batch", type=int, default=1, help="sequences a micro-batch")
    parser.add_argument("--seq", type=int, default=256, help="tokens a sequence")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations")
    parser.add_argument("--release", action="store_true", help="step in the backward pass")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="to simulate")
    parser.add_argument("--account", action="store_true", help="exact bytes only, no peaks")
    parser.add_argument("--fits", metavar="24GB", help="methods and micro-batches that fit")
    parser.add_argument("--json", type=Path, help="a file for the figures")
    parser.add_argument("--picture", type=Path, help="a file for stacked bars")
    parser.add_argument("--snapshot", type=Path, help="of a script on CUDA, for memory_viz")


def main(args: argparse.Namespace) -> int:
    """Print the page; 1 if a script failed."""
    for option in ("json", "picture", "snapshot"):  # before minutes of work, not after
        path = getattr(args, option)
        if path is not None and not os.access(path.absolute().parent, os.W_OK):
            raise ValueError(f"--{option} {path}: its folder is not there, or not to be written in")
    if args.script is not None:
        return _measure(args)
    if args.snapshot is not None:
        raise ValueError("--snapshot is of a script on CUDA; add --script FILE.py")
    for option in ("batch", "seq", "shards"):
        if getattr(args, option) < 1:
            raise ValueError(f"--{option} is {getattr(args, option)}; it must be at least 1")
    names = [get_info(n).name for n in args.optimizer if n != "all"]
    names = names if "all" not in args.optimizer else list_optimizers()
    model, step = load_function(args.module) if args.module else (load_model(args.model), None)
    dtype = getattr(torch, args.dtype)
    planner = Planner(model, dtype=dtype, seq=args.seq, step=step, device=args.device)
    hypers = {name: _hyper(name, args.hyper, len(names) == 1) for name in names}
    count = sum(p.numel() for p in model.parameters())
    title = f"{args.model or args.module}: {count / 1e6:,.1f} M parameters, {args.dtype}"
    if args.fits:
        return _fits(args, planner, hypers, title)
    rows, refused = [], {}
    for name, hyper in hypers.items():
        _progress(f"{name} ...")
        try:
            rows.append(_row(args, planner, name, hyper))
        except (ValueError, RuntimeError) as error:
            if len(names) == 1:
                raise
            refused[name] = str(error)
    _progress("")
    if not args.account and args.shards == 1:
        notes = [f"{args.batch} x {args.seq} tokens"]
        notes += ["checkpointing"] if args.checkpointing else []
        notes += ["release"] if args.release else []
        title += "\npeak of a step of " + ", ".join(notes)
    if args.shards > 1:
        title += f"\none of {args.shards} shards"
    print(report.page(title, rows, refused))
    if len(rows) == 1 and rows[0].peak:
        print("\n" + report.breakdown(rows[0].peak))
    _write(args, title, rows)
    return 0


def _row(
    args: argparse.Namespace, planner: Planner, name: str, hyper: dict[str, Any]
) -> report.Row:
    counted = account(planner.model, name, dtype=planner.dtype, shards=args.shards, **hyper)
    if args.account or args.shards > 1:
        return report.Row(name, counted)
    settings = {"checkpointing": args.checkpointing, "release": args.release}
    if args.release and len(args.optimizer) == 1 and args.optimizer != ["all"]:
        found = simulate(
            planner.model,
            name,
            batch=args.batch,
            seq=planner.seq,
            step=planner.step,
            dtype=planner.dtype,
            device=planner.device,
            **settings,
            **hyper,
        )
        return report.Row(name, counted, found.peak)
    return report.Row(
        name, counted, planner.peak(planner.method(name, **hyper), args.batch, **settings)
    )


def _fits(
    args: argparse.Namespace, planner: Planner, hypers: dict[str, dict[str, Any]], title: str
) -> int:
    limit = parse_size(args.fits)
    fits = []
    for name, hyper in hypers.items():
        _progress(f"{name} ...")
        try:
            fits += list(planner.fits(planner.method(name, **hyper), limit))
        except (ValueError, RuntimeError):
            if len(hypers) == 1:
                raise
    _progress("")
    order = {change: i for i, change in enumerate(report.CHANGES)}
    fits.sort(key=lambda f: (order[f.checkpointing, f.release], f.peak.bytes / f.batch))
    title += f"\nwhat fits in {args.fits} at {args.seq} tokens a sequence"
    print(report.fits_page(title, fits, args.fits))
    if args.json:
        report.write_json(args.json, {"title": title, "fits": [report.asdict(f) for f in fits]})
    return 0 if fits else 1


def _measure(args: argparse.Namespace) -> int:
    if not args.script:
        raise ValueError("--script takes a file, and then that file's arguments")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("torch finds no CUDA device here to measure on; leave --device out")
    found = measure_script(args.script[0], args.script[1:], snapshot=args.snapshot)
    print(report.measured_page(f"{args.script[0]}, measured", found))
    if args.json:
        report.write_json(args.json, report.asdict(found))
    return 1 if found.error else 0


def _write(args: argparse.Namespace, title: str, rows: list[report.Row]) -> None:
    if args.json:
        records = [report.as_record(row) for row in rows]
        report.write_json(args.json, {"title": title, "methods": records})
    if args.picture and rows:
        report.write_picture(args.picture, title, rows)


def _hyper(name: str, pairs: list[str], strict: bool) -> dict[str, Any]:
    """Hyperparameters for one method; those of others are left out, unless it is the only one."""
    hyper = dict(_REQUIRED.get(name, {}))
    accepted = inspect.signature(get_info(name).make).parameters
    for pair in pairs:
        key, found, text = pair.partition("=")
        if not found:
            raise ValueError(f"--hyper takes NAME=VALUE, not {pair!r}")
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        if strict or key in accepted:
            hyper[key] = value
    return hyper


def parse_size(text: str) -> int:
    """Bytes of `24GB` (1e9), `24GiB` (2^30).

    Raises:
        ValueError: it is no size.
    """
    match = re.fullmatch(r"([0-9.]+)\s*([kmgt]?i?b?)", text.strip(), re.IGNORECASE)
    unit = match[2].upper() if match else ""
    unit = unit if unit.endswith("B") else f"{unit}B"
    if not match or unit not in _SIZES or match[1].count(".") > 1:
        raise ValueError(f"{text!r} is not a size; write 24GB or 24GiB")
    return int(float(match[1]) * _SIZES[unit])


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
