"""Comparison of CAST with other methods from a dense model to 2:4, with equal steps."""

import argparse
import contextlib
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.files import RESULTS, write_atomic, write_json
from benchmarks.common.progress import RunProgress
from benchmarks.common.provenance import made_on
from benchmarks.common.tables import Table
from benchmarks.data.corpus import Corpus
from benchmarks.experiments import pictures
from benchmarks.experiments.sparse_run import Method, SparseRun, sparse_config
from benchmarks.training.cli import add_corpus_arguments, corpus_from, refuse_cache
from benchmarks.training.config import RunConfig
from benchmarks.training.loop import train
from benchmarks.training.metrics import perplexity
from benchmarks.training.run import Run
from optimzoo.options import refuse

Row = dict[str, Any]

# Rates and decays: the best of a few tried each, at the default sizes.
METHODS = {
    "dense": Method("dense, as trained", trained=False, distill=False),
    "continued": Method("dense, trained further", lr=2e-3, distill=False),
    "oneshot": Method("pruned once, no training", prune=True, trained=False, distill=False),
    "fixed": Method("pruned once, fixed mask", lr=4e-3, prune=True),
    "l2": Method("masked L2, dense forward", lr=5e-4, decay="l2", l1=0.1),
    "srste": Method(
        "SR-STE (L2, pruned forward)", lr=5e-4, decay="l2", l1=0.2, masked_forward=True
    ),
    "cast": Method("CAST", lr=1e-3, decay="l1", l1=1e-2, scale_blocks=2),
}
# Options that only some of the methods have.
_TAKERS: dict[str, Callable[[Method], bool]] = {
    "steps": lambda method: method.trained,
    "lr": lambda method: method.trained,
    "other_lr": lambda method: method.trained,
    "l1": lambda method: method.decay is not None,
    "eta": lambda method: method.trained and method.distill,
}
HEADERS = ("method", "zeros", "valid ppl", "after pruning", "test ppl", "masked max", "tokens", "s")


def train_or_read(
    name: str,
    config: RunConfig,
    args: argparse.Namespace,
    corpus: Corpus,
    bar: RunProgress,
    make_run: Callable[..., Run] = Run,
) -> Row:
    """Train a run and keep its weights, or read it if it is finished. Return its row.

    Raises:
        ValueError: its loss is not finite.
    """
    options: Any = {"save_every": 100, "keep_weights": True, "make_run": make_run}
    progress = bar.start(name, config.steps)
    row = train(config, corpus, out=args.out / name, progress=progress, **options)
    if row["diverged"]:
        raise ValueError(f"the loss of {name} is not finite; lower the rates")
    return row


def train_dense(args: argparse.Namespace, corpus: Corpus, bar: RunProgress) -> dict[str, Tensor]:
    """Train the dense model, or read it if it is finished. Return its weights."""
    rates = {"lr": args.dense_lr, "other_lr": args.dense_other_lr}
    hyper = {"weight_decay": 0.0}
    config = RunConfig("adamw", hyper=hyper, steps=args.dense_steps, **rates, **_sizes(args))
    row = train_or_read("start", config, args, corpus, bar)
    bar.finish(f"dense: validation perplexity {perplexity(row['valid_loss']):.2f}")
    return dict(torch.load(args.out / "start" / "weights.pt", weights_only=True))


def _sizes(args: argparse.Namespace) -> Row:
    names = ("model", "batch_size", "seq_len", "eval_tokens", "seed")
    return {name: getattr(args, name) for name in names} | {"clip": 1.0}


def run_method(
    name: str, args: argparse.Namespace, corpus: Corpus, dense: dict[str, Tensor], bar: RunProgress
) -> Row:
    """Train one method from the dense weights. Return its row."""
    method = METHODS[name]
    changes = {k: getattr(args, k) for k in ("lr", "l1") if getattr(args, k) is not None}
    method = replace(method, **changes)
    config = RunConfig(
        optimizer="adams" if method.decay else "adamw",
        lr=method.lr,
        other_lr=args.other_lr,
        steps=args.steps if method.trained else 1,
        min_lr_ratio=0.0,
        warmup=0.05,
        **{**_sizes(args), "seed": args.seed + 1},  # other batches than the dense run's
    )
    config = sparse_config(config, method, dense, args.eta)
    make_run = partial(SparseRun, method=method, dense=dense, eta=args.eta)
    row = train_or_read(name, config, args, corpus, bar, make_run)
    bar.finish(
        f"{method.label}: validation perplexity {perplexity(row['valid_before']):.2f}, "
        f"{perplexity(row['valid_loss']):.2f} after pruning"
    )
    return {**row, "method": name}


def cells(row: Row) -> list[str]:
    """Format a row as table cells, in the order of `HEADERS`."""
    largest = row.get("masked_max")
    return [
        row["label"],
        f"{row['zeros']:.0%}",
        f"{perplexity(row['valid_before']):.2f}",
        f"{perplexity(row['valid_loss']):.2f}",
        f"{perplexity(row['test_loss']):.2f}",
        "-" if largest is None else f"{largest:.1e}",
        f"{row['tokens']:,}",
        f"{row['seconds']:.0f}",
    ]


LEGEND = (
    "zeros: of the hidden linear weights. valid ppl: as trained; masked max: the largest masked "
    "weight then, in units of the kept ones' median. after pruning: 2:4, as are the test figures. "
    "tokens, s: of the further training alone; every trained row but the dense one learns from the "
    "dense model too."
)


def write_report(rows: list[Row], out: Path) -> None:
    """Print the table, and write table.md, masked.png and flips.png."""
    config = rows[0]["config"]
    origin = (
        f"{config['model']}, {rows[0]['corpus']['name']} text, seed {config['seed']}, "
        f"{rows[0]['precision']}; {made_on(rows[0]['provenance'])}"
    )
    table = Table(HEADERS, [cells(row) for row in rows], notes=[origin, LEGEND], gap=2)
    write_atomic(out / "table.md", "\n\n".join([table.markdown(), origin, LEGEND]) + "\n")
    # The first report has no older mask to compare with.
    columns = {"masked": (1, "masked mean / kept median", 0)}
    columns["flips"] = (3, "share of mask bits flipped in 10 steps", 1)
    for name, (column, label, first) in columns.items():
        curves = {
            row["label"]: [(point[0], point[column]) for point in row["masked_curve"][first:]]
            for row in rows
            if row["masked_curve"][first:]
        }
        picture = pictures.lines(curves, label, log=name == "masked")
        write_atomic(out / f"{name}.png", picture)
    table.print()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python -m benchmarks cast`."""
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--model", default="nano")
    parser.add_argument("--dense-steps", type=int, default=400, help="of the dense model")
    parser.add_argument("--steps", type=int, default=300, help="further steps of every method")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--eval-tokens", type=int, default=65536)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eta", type=float, default=1 / 3, help="the teacher's share of the loss")
    parser.add_argument("--dense-lr", type=float, default=1e-3)
    parser.add_argument("--dense-other-lr", type=float, default=1.6e-2)
    parser.add_argument("--lr", type=float, help="of hidden weights; default: each method's")
    parser.add_argument("--other-lr", type=float, default=4e-3, help="of the rest, all methods")
    parser.add_argument("--l1", type=float, help="decay, of the methods that have one")
    parser.add_argument("--out", type=Path, default=Path("runs/cast"))
    parser.add_argument("--store", action="store_true", help="also keep the rows in the repository")
    parser.add_argument("--fresh", action="store_true", help="forget the finished runs in --out")
    add_corpus_arguments(parser)


def _refuse_dropped(args: argparse.Namespace) -> None:
    """Refuse an option that no method has, and print a note if only some have it."""
    for name, takes in _TAKERS.items():
        without = [m for m in args.methods if not takes(METHODS[m])]
        if len(without) == len(args.methods):
            others = ", ".join(m for m in METHODS if takes(METHODS[m]))
            reason = f"none of the --methods has it; add one of {others}, or leave {{option}} out"
            refuse(args, [name], args.given, reason)
        elif without and name in args.given:
            option = f"--{name.replace('_', '-')} {getattr(args, name):g}"
            print(f"note: {option} is without effect on {', '.join(without)}")
    refuse_cache(args)


def main(args: argparse.Namespace) -> int:
    """Run what is missing; print the table and write results.json, table.md and the pictures."""
    _refuse_dropped(args)
    if args.fresh:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(args.out)
    corpus = corpus_from(args, args.model)
    trained = sum(METHODS[name].trained for name in args.methods)
    with RunProgress(args.dense_steps + trained * args.steps) as bar:
        dense = train_dense(args, corpus, bar)
        rows = [run_method(name, args, corpus, dense, bar) for name in args.methods]
    write_json(args.out / "results.json", {"rows": rows})
    if args.store:
        write_json(RESULTS / f"{args.model}-cast.json", {"rows": rows})
    write_report(rows, args.out)
    print(
        f"written: {args.out}/results.json, table.md, masked.png, flips.png, METHOD/weights.pt\n"
        f"curves: tensorboard --logdir {args.out}"
    )
    return 0
