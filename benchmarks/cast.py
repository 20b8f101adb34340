"""CAST from a dense model to 2:4, beside other ways there with the same further steps."""

import argparse
import contextlib
import io
import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.data import Corpus
from benchmarks.plan import perplexity
from benchmarks.progress import RunProgress
from benchmarks.provenance import provenance, write_atomic, write_json
from benchmarks.run import Run, RunConfig, fingerprint
from benchmarks.signals import HeldSignals
from benchmarks.sparse_run import Method, SparseRun
from benchmarks.telemetry import Scalars
from benchmarks.train import add_corpus_arguments, corpus_from, refuse_cache
from optimzoo.memory.options import refuse

RESULTS = Path(__file__).with_name("results")
Row = dict[str, Any]

# Rates and decays: the best of a small grid each, at the default sizes.
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


def take_steps(
    run: Run,
    scalars: Scalars,
    progress: Callable[[int, float, float], None] | None,
    save_every: int,
) -> None:
    """Train to the last step; a signal saves and ends it between two steps.

    Raises:
        ValueError: a loss that is not finite.
    """
    config = run.config
    with HeldSignals() as signals:
        try:
            while run.step < config.steps:
                start = time.perf_counter()
                log = run.out is not None and run.step % 10 == 0
                loss, values = run.train_step(log or run.step + 1 == config.steps)
                run.seconds += time.perf_counter() - start
                if not math.isfinite(loss):
                    raise ValueError(f"the loss is {loss} at step {run.step}; lower the rates")
                if values:
                    run.curve.append((run.step, loss))
                    scalars.add(run.step, {**values, "train/loss": loss})
                if run.step % save_every == 0 or run.step == config.steps:
                    scalars.flush()
                    run.save()
                if progress is not None:
                    progress(run.step, loss, run.step * config.tokens_per_step / run.seconds)
                signals.check()
        except KeyboardInterrupt:
            scalars.close()
            if not signals.urgent:
                run.save()
            raise


def carry_out(run: Run, finish: Callable[[], Row], label: str, progress: Any = None) -> Row:
    """The run's row: read if it is finished, else trained from where it was saved."""
    out = run.out
    assert out is not None
    path, key = out / "row.json", fingerprint(run.config, run.corpus)
    if path.exists() and (out / "weights.pt").exists():
        row: Row = json.loads(path.read_text(encoding="utf-8"))
        if row.get("fingerprint") == key:
            return row
    run.resume()
    scalars = Scalars(out, first_step=run.step)
    take_steps(run, scalars, progress, save_every=100)
    row = {
        "label": label,
        "config": asdict(run.config),
        "fingerprint": key,
        "provenance": provenance(),
        "precision": run.precision,
        "corpus": {"name": run.corpus.name, "sha256": run.corpus.sha256},
        "tokens": run.step * run.config.tokens_per_step if run.seconds else 0,
        "seconds": run.seconds,
        "curve": run.curve,
        "masked_curve": getattr(run, "masked_curve", []),
        **finish(),
    }
    scalars.add(run.step, {"valid/loss": row["valid_loss"], "test/loss": row["test_loss"]})
    scalars.close()
    buffer = io.BytesIO()
    torch.save({k: v.cpu() for k, v in run.model.state_dict().items()}, buffer)
    write_atomic(out / "weights.pt", buffer.getvalue())
    write_json(path, row)
    if run.checkpoints is not None:
        run.checkpoints.clear()
    return row


def train_dense(args: argparse.Namespace, corpus: Corpus, bar: RunProgress) -> dict[str, Tensor]:
    """The dense model's weights, trained or read."""
    config = RunConfig(
        optimizer="adamw",
        lr=args.dense_lr,
        other_lr=args.dense_other_lr,
        hyper={"weight_decay": 0.0},
        steps=args.dense_steps,
        **_sizes(args),
    )
    run = Run(config, corpus, args.out / "start")

    def finish() -> Row:
        return {"valid_loss": run.evaluate("valid"), "test_loss": run.evaluate("test")}

    row = carry_out(run, finish, "start", bar.start("dense", config.steps))
    bar.finish(f"dense: validation perplexity {perplexity(row['valid_loss']):.2f}")
    weights = torch.load(args.out / "start" / "weights.pt", weights_only=True)
    return dict(weights)


def _sizes(args: argparse.Namespace) -> Row:
    names = ("model", "batch_size", "seq_len", "eval_tokens", "seed")
    return {name: getattr(args, name) for name in names} | {"clip": 1.0}


def run_method(
    name: str, args: argparse.Namespace, corpus: Corpus, dense: dict[str, Tensor], bar: RunProgress
) -> Row:
    """One way from the dense weights to the end."""
    method = METHODS[name]
    changes = {k: getattr(args, k) for k in ("lr", "l1") if getattr(args, k) is not None}
    method = replace(method, **changes)
    steps = args.steps if method.trained else 1
    config = RunConfig(
        optimizer="adams" if method.decay else "adamw",
        lr=method.lr,
        other_lr=args.other_lr,
        steps=steps,
        min_lr_ratio=0.0,
        warmup=0.05,
        **{**_sizes(args), "seed": args.seed + 1},  # other batches than the dense run's
    )
    run = SparseRun(config, corpus, args.out / name, method, dense, args.eta)
    if not method.trained:
        run.step = steps  # nothing left to do
    row = carry_out(run, run.finish, method.label, bar.start(name, steps))
    row["method"] = name
    bar.finish(
        f"{method.label}: validation perplexity {perplexity(row['valid_before']):.2f}, "
        f"{perplexity(row['valid_loss']):.2f} after pruning"
    )
    return row


def cells(row: Row) -> list[str]:
    """A row of the table."""
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
    """Write table.md, masked.png and flips.png, and print the table."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for i, name in enumerate(HEADERS):
        table.add_column(name, justify="right" if i else "left")
    lines = ["| " + " | ".join(HEADERS) + " |", "|---" + "|--:" * (len(HEADERS) - 1) + "|"]
    for row in rows:
        table.add_row(*cells(row))
        lines.append("| " + " | ".join(cells(row)) + " |")
    made, config = rows[0]["provenance"], rows[0]["config"]
    caption = (
        f"{config['model']}, {rows[0]['corpus']['name']} text, seed {config['seed']}, "
        f"{rows[0]['precision']}; {made['device']}, {made['threads']} threads, "
        f"torch {made['torch']}, commit {made['commit']}"
    )
    write_atomic(out / "table.md", "\n".join([*lines, "", caption, "", LEGEND, ""]))
    write_atomic(out / "masked.png", _picture(rows, 1, "masked mean / kept median", log=True))
    write_atomic(out / "flips.png", _picture(rows, 3, "share of mask bits flipped in 10 steps"))
    console = Console()
    for part in (table, caption, LEGEND):
        console.print(part, highlight=False)


def _picture(rows: list[Row], column: int, label: str, *, log: bool = False) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.8), dpi=144, layout="constrained")
    axes = figure.subplots()
    for row in rows:
        if row["masked_curve"]:
            # The first report has no older mask to compare with.
            points = row["masked_curve"][1 if column == 3 else 0 :]
            axes.plot([x[0] for x in points], [x[column] for x in points], label=row["label"])
    if log:
        axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.has_data():
        axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m benchmarks cast`."""
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
    """Refuse an option that none of the methods has; say which have none."""
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
    """Run what is missing, print the table, write results.json, table.md and the pictures."""
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
