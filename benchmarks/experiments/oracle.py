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
import shutil
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
ADAMW: Row = {"betas": [0.9, 0.99], "weight_decay": 0.1}


def make_config(seed: int, corpus: Corpus) -> RunConfig:
    """Return the configuration of a run; it evaluates on the whole validation split."""
    options: Any = {"hyper": ADAMW, "seed": seed, "eval_tokens": len(corpus.valid)}
    return RunConfig("adamw", 1e-3, **options, **SETTING)


def table(rows: list[Row]) -> Table:
    """Return the table: the mean loss over seeds and its range, the optimizer's state."""
    losses = [row["valid_loss"] for row in rows]
    state = f"{rows[0]['state_bytes'] / 1e6:.2f}"
    notes = [
        f"{rows[0]['corpus']['name']}; {made_on(rows[0]['provenance'])}",
        "valid loss: per character, the mean over seeds. MB: of the optimizer's state.",
    ]
    body = [["AdamW", f"{rows[0]['config']['lr']:g}", mean_text(losses), range_text(losses), state]]
    return Table(("method", "lr", "valid loss", "range", "MB"), body, notes=notes)


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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python -m benchmarks oracle`."""
    parser.add_argument("name", choices=["shakespeare"], help="the published run")
    parser.add_argument(
        "--data", type=Path, required=True, help="tiny Shakespeare: .txt, plain or .gz, .xz, .zst"
    )
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="seeds 0 to N-1")
    parser.add_argument("--out", type=Path, default=Path("runs/oracle"))
    parser.add_argument("--store", action="store_true", help="also keep the rows in the repository")
    parser.add_argument("--fresh", action="store_true", help="forget the finished runs in --out")


def main(args: argparse.Namespace) -> int:
    """Run what is missing, print the table and the verdict. Return 1 if the loss differs."""
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
    with RunProgress(args.seeds * SETTING["steps"]) as bar:
        rows = [_run(seed, args.out, corpus, bar) for seed in range(args.seeds)]
    for path in [args.out / "results.json", *[RESULTS / "shakespeare.json"] * args.store]:
        write_json(path, {"published": PUBLISHED, "rows": rows})
    table(rows).print()
    text, agrees = verdict([row["valid_loss"] for row in rows])
    print(text)
    return 0 if agrees else 1


def _run(seed: int, out: Path, corpus: Corpus, bar: RunProgress) -> Row:
    config, label = make_config(seed, corpus), f"AdamW seed {seed}"
    options: Any = {"save_every": 500, "test": False, "progress": bar.start(label, config.steps)}
    row = train(config, corpus, out=out / f"adamw-seed{seed}", **options)
    bar.finish(f"{label}: validation loss {mean_text([row['valid_loss']])}")
    return {**row, "method": "adamw"}
