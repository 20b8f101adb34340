"""Outside oracle: a training run that others have published, repeated by this harness.

nanoGPT's README trains a small GPT on the characters of tiny Shakespeare, on a CPU, to a validation
loss of 1.88. The same model, optimizer and schedule go here through the loop of all commands. Two
things differ from nanoGPT, neither in expectation:

- its training windows begin anywhere and are drawn with replacement; these are those of
  `benchmarks.data.batches`, without overlap, each once an epoch (there are 1.5);
- its loss is the mean of 20 random batches of the validation split, with a standard error of about
  0.02; this one is that of the whole split, so it repeats.
"""

import argparse
import contextlib
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.common.files import RESULTS, make_folder, write_json
from benchmarks.common.progress import RunProgress
from benchmarks.common.provenance import made_on
from benchmarks.common.tables import Table
from benchmarks.data.characters import character_corpus
from benchmarks.data.corpus import Corpus
from benchmarks.training.config import RunConfig
from benchmarks.training.loop import train
from benchmarks.training.models import CHARACTERS
from optimzoo.options import refuse

Row = dict[str, Any]

PUBLISHED: Row = {
    "source": "github.com/karpathy/nanoGPT, README.md: train.py on a CPU, shakespeare_char",
    "valid_loss": 1.88,
    "tolerance": 0.03,
    "sha256": "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
}
SETTING: Row = {
    "model": CHARACTERS,
    "steps": 2000,
    "batch_size": 12,
    "seq_len": 64,
    "warmup": 0.05,
    "min_lr_ratio": 0.1,
    "clip": 1.0,
    "precision": "fp32",
}
LEGEND = "valid loss: per character, the mean over seeds. MB: of the optimizer's state."
RATES = ("lr", "embedding_lr", "head_lr", "vector_lr")


@dataclass(frozen=True)
class Method:
    """Optimizer with its learning rates by role and its other hyperparameters.

    The embedding is tied to the head and has its role; `embedding_lr` is that of the positions.
    """

    label: str
    rates: dict[str, float]
    hyper: Row = field(default_factory=dict)


METHODS = {
    "adamw": Method("AdamW", {"lr": 1e-3}, {"betas": [0.9, 0.99], "weight_decay": 0.1}),
}


def make_config(name: str, rates: dict[str, float], seed: int, corpus: Corpus) -> RunConfig:
    """Return the configuration of a method's run; it evaluates on the whole validation split."""
    rates = METHODS[name].rates | rates
    lr = rates.pop("lr")
    hyper = METHODS[name].hyper | rates
    whole_split = len(corpus.valid)
    return RunConfig(name, lr, hyper=hyper, seed=seed, eval_tokens=whole_split, **SETTING)


def rates_of(row: Row) -> list[float]:
    """Return a row's learning rates in the order of `RATES`."""
    config = row["config"]
    return [config["lr"], *(config["hyper"].get(name, config["lr"]) for name in RATES[1:])]


def table(rows: list[Row]) -> Table:
    """Return the table of all methods: learning rates, mean loss over seeds and range, state."""
    body = []
    for name in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == name]
        losses = [row["valid_loss"] for row in mine]
        rates = [f"{rate:g}" for rate in rates_of(mine[0])]
        state = f"{mine[0]['state_bytes'] / 1e6:.2f}"
        body.append([METHODS[name].label, *rates, mean_text(losses), range_text(losses), state])
    headers = ("method", "lr", "position lr", "head lr", "vector lr", "valid loss", "range", "MB")
    notes = [f"{rows[0]['corpus']['name']}; {made_on(rows[0]['provenance'])}", LEGEND]
    return Table(headers, body, notes=notes)


def mean_text(losses: list[float | None]) -> str:
    """Format the mean of the seeds' losses; None is the loss of a run that diverged."""
    finite = [loss for loss in losses if loss is not None]
    return f"{fmean(finite):.3f}" if len(finite) == len(losses) else "diverged"


def range_text(losses: list[float | None]) -> str:
    """Format the lowest and the highest of several finite losses, or return a dash."""
    finite = [loss for loss in losses if loss is not None]
    return f"{min(finite):.3f} to {max(finite):.3f}" if len(finite) > 1 else "-"


def verdict(losses: list[float | None]) -> tuple[str, bool]:
    """Compare the mean of the seeds' losses with the published one; None: a run diverged."""
    published, tolerance = PUBLISHED["valid_loss"], PUBLISHED["tolerance"]
    finite = [loss for loss in losses if loss is not None]
    agrees = len(finite) == len(losses) and abs(fmean(finite) - published) <= tolerance
    seeds = f" ({len(losses)} seeds: {range_text(losses)})" if len(losses) > 1 else ""
    return (
        f"validation loss {mean_text(losses)}{seeds}, published {published} ± {tolerance}: "
        f"{'agrees' if agrees else 'differs'}",
        agrees,
    )


def store(path: Path, rows: list[Row]) -> None:
    """Write the rows into a results file, in place of those of the same methods."""
    methods = {row["method"] for row in rows}
    old = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    others = [row for row in old if row["method"] not in methods]
    write_json(path, {"published": PUBLISHED, "rows": others + rows})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python -m benchmarks oracle`."""
    parser.add_argument("name", choices=["shakespeare"], help="the published run")
    parser.add_argument(
        "--data", type=Path, required=True, help="tiny Shakespeare: .txt, plain or .gz, .xz, .zst"
    )
    parser.add_argument(
        "--optimizers",
        nargs="+",
        choices=[*METHODS, "all"],
        default=["adamw"],
        help="default: adamw, the published one",
    )
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="seeds 0 to N-1")
    for name in RATES:
        option = "--" + name.replace("_", "-")
        parser.add_argument(option, type=float, help="of one method beside adamw")
    parser.add_argument("--out", type=Path, default=Path("runs/oracle"))
    parser.add_argument("--store", action="store_true", help="also keep the rows in the repository")
    parser.add_argument("--fresh", action="store_true", help="forget the finished runs in --out")


def main(args: argparse.Namespace) -> int:
    """Run what is missing, print the table and the verdict. Return 1 if AdamW's loss differs."""
    methods = list(METHODS) if args.optimizers == ["all"] else list(dict.fromkeys(args.optimizers))
    if "all" in methods:
        raise ValueError("--optimizers takes all or some, not both")
    if methods == ["adamw"] or len(methods) > 1:
        reason = "it is for one method beside adamw, of which it is published; leave {option} out"
        refuse(args, RATES, args.given, reason)
    if args.seeds < 1:
        raise ValueError(f"--seeds is {args.seeds}; it must be at least 1")
    corpus = character_corpus(args.data, SETTING["seq_len"])
    if corpus.sha256 != PUBLISHED["sha256"]:
        if args.store:
            raise ValueError(f"--store: {args.data} is not the published text; leave --store out")
        print(f"note: {args.data} is not the text of the published run (its sha256 differs)")
    if args.fresh:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(args.out)
    make_folder(args.out, "--out")
    rates = {name: getattr(args, name) for name in RATES if getattr(args, name) is not None}
    runs = [(name, seed) for name in methods for seed in range(args.seeds)]
    with RunProgress(len(runs) * SETTING["steps"]) as bar:
        rows = [_run(name, rates, seed, args, corpus, bar) for name, seed in runs]
    write_json(args.out / "results.json", {"published": PUBLISHED, "rows": rows})
    if args.store:
        store(RESULTS / "shakespeare.json", rows)
    table(rows).print()
    if "adamw" not in methods:
        return 0
    text, agrees = verdict([row["valid_loss"] for row in rows if row["method"] == "adamw"])
    print(text)
    return 0 if agrees else 1


def _run(
    name: str,
    rates: dict[str, float],
    seed: int,
    args: argparse.Namespace,
    corpus: Corpus,
    bar: RunProgress,
) -> Row:
    config = make_config(name, rates, seed, corpus)
    label = f"{METHODS[name].label} seed {seed}"
    shown = "-".join(f"{value:g}" for value in rates_of({"config": vars(config)}))
    out = args.out / f"{name}-lr{shown}-seed{seed}"
    progress = bar.start(label, config.steps)
    options: Any = {"save_every": 500, "test": False, "progress": progress}
    row = train(config, corpus, out=out, **options)
    bar.finish(f"{label}: validation loss {mean_text([row['valid_loss']])}")
    return {**row, "method": name}
