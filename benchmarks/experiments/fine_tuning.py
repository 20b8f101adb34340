"""Fine-tuning: what each method learns of a second text, and what it forgets of the first."""

import argparse
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.files import RESULTS, make_folder, read_json, write_json
from benchmarks.common.progress import RunProgress
from benchmarks.common.provenance import made_on
from benchmarks.common.tables import Table
from benchmarks.data.corpus import Corpus
from benchmarks.experiments.plan import Entry, Row, choose, settings, tried
from benchmarks.experiments.run_queue import Session, add_run_arguments, settle_run_arguments, slim
from benchmarks.experiments.significance import by_method, mean_loss, paired
from benchmarks.experiments.start_check import PROTOCOL, Check, stored
from benchmarks.experiments.tuning import Search, role_rates
from benchmarks.training.cli import corpus_from
from benchmarks.training.loop import train
from benchmarks.training.metrics import perplexity
from benchmarks.training.run import Run

TASK = "fine-tuning"
PATH = RESULTS / "fine-tuning.json"
LORA: Row = {
    "label": "LoRA, rank 8",
    "optimizer": "adamw",
    "lowrank": {"rank": 8, "kind": "lora", "alpha": 16.0, "freeze": True},
    PROTOCOL: {},
}
LORA_LR = 2e-3  # where the search for its rate begins


def pretrain(check: Check, args: argparse.Namespace) -> Corpus:
    """Train the model that a task begins with, or read it; return the first text.

    ``args`` become those of the second text, in the first one's tokens.
    """
    if args.then is None:
        raise ValueError(f"{check.name} continues on a second text; give it as --then FILE")
    corpus = corpus_from(args, check.task.sizes["model"])
    config = replace(check.plan.base.chosen("adamw", PROTOCOL, 0).config, **check.task.sizes)
    config = replace(config, steps=check.task.pretrained)
    out = args.out / "pretrained"
    with RunProgress(config.steps) as bar:
        options: Any = {"save_every": 400, "keep_weights": True, "test": False}
        row = train(config, corpus, out=out, progress=bar.start("AdamW", config.steps), **options)
        bar.finish(f"pretrained: validation perplexity {perplexity(row['valid_loss']):.2f}")
    check.plan.values["weights"] = str(out / "weights.pt")
    args.data, args.tokenizer, args.max_chars = args.then, corpus.folder, None
    return corpus


def entries(check: Check, rows: list[Row], seeds: int) -> list[Entry]:
    """Return the runs of each method of ``rows`` at the best of its grid."""
    runs = []
    for method in dict.fromkeys(row["method"] for row in rows):
        best = choose([r for r in rows if r["config"]["seed"] == 0], method, PROTOCOL)["config"]
        names = ("lr", "hyper", "clip", "warmup")
        values = {name: best[name] for name in names}
        runs += [check.entry(method, values, seed) for seed in range(seeds)]
    return runs


def tune_lora(check: Check, session: Session, seeds: int) -> list[Entry]:
    """Find the rate of LoRA's adapters, and return its runs."""
    check.plan.methods["lora"] = LORA
    start = check.start("adamw")
    fixed = {name: start[name] for name in ("clip", "warmup", "betas")}
    search = Search.of_rates({"lr": LORA_LR}, ["lr"])
    points: list[Row] = [search.start]
    while points:
        session.run([check.entry("lora", fixed | point, 0) for point in points], test=True)
        points = search.next(tried(session.rows, "lora", PROTOCOL, search))
    lr = choose(session.rows, "lora", PROTOCOL)["config"]["lr"]
    return [check.entry("lora", fixed | {"lr": lr}, seed) for seed in range(seeds)]


def on_text(entry: Entry, corpus: Corpus, weights: Path) -> tuple[float | None, int]:
    """Return a trained model's test loss, None if it is not finite, and how much was trained."""
    run = Run(entry.config, corpus)
    run.model.load_state_dict(torch.load(weights, weights_only=True))
    loss = run.evaluate("test")
    trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    return (loss if math.isfinite(loss) else None), trained


def table(record: Row) -> Table:
    """Return the table: both texts' perplexities, differences from AdamW's, state."""
    rows = record["rows"]
    adamw = by_method(rows)["adamw"]
    check = Check(TASK)
    check.plan.methods["lora"] = LORA
    before = record["before"]
    body = [(before["test_loss"], ["not fine-tuned", "", *_cells([before]), "", "", "", ""])]
    for method, mine in by_method(rows).items():
        second, first = paired(mine, adamw), paired(_on_first(mine), _on_first(adamw))
        assert second is not None and first is not None
        rates = [f"{rate:g}" for rate in role_rates(settings(mine[0]))]
        cells = [
            check.plan.label(method),
            "/".join(rates[:1] if method == "lora" else rates),
            *_cells(mine),
            *("" if method == "adamw" else d.text() for d in (second, first)),
            f"{mine[0]['trained'] / 1e6:.2f}",
            f"{mine[0]['state_bytes'] / 2**20:.2f}",
        ]
        body.append((mean_loss(mine), cells))
    headers = (
        *("method", "hidden / embedding / head", "second text", "first text"),
        *("second, from AdamW", "first, from AdamW", "trained, M", "state, MiB"),
    )
    return Table(headers, [cells for _, cells in sorted(body, key=lambda item: item[0])])


def _on_first(rows: list[Row]) -> list[Row]:
    return [row | {"test_loss": row["first_loss"]} for row in rows]


def _cells(rows: list[Row]) -> list[str]:
    return [f"{math.exp(mean_loss(some)):.2f}" for some in (rows, _on_first(rows))]


def caption(record: Row) -> str:
    """Return how the rows were made."""
    check, rows = Check(TASK), record["rows"]
    sizes = check.task.sizes
    seeds = len({row["config"]["seed"] for row in rows})
    return (
        f"Test perplexity, the mean of {seeds} seeds. {check.task.text[0].upper()}"
        f"{check.task.text[1:]}: {sizes['steps']} steps of {sizes['batch_size']} x "
        f"{sizes['seq_len']} tokens of the second text. Rates: the best of nine points around the "
        f"starting values, by the validation loss of seed 0; LoRA's until half and twice were "
        f"worse. {made_on(rows[0]['provenance'])}."
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python -m benchmarks fine-tuning`."""
    add_task_arguments(parser, "runs/fine-tuning")


def add_task_arguments(parser: argparse.ArgumentParser, out: str) -> None:
    """Add what a task's runs need: methods, and a second text."""
    parser.add_argument("--optimizers", nargs="+", metavar="NAME", help="of plan nano")
    add_run_arguments(parser, out, seeds=3)
    parser.add_argument(
        "--then", nargs="+", metavar="SOURCE", help="fine-tuning: the text after that of --data"
    )


def main(args: argparse.Namespace) -> int:
    """Run what is missing and print the table."""
    settle_run_arguments(args)
    tasks = {check.name: (check, rows) for check, rows in stored()}
    if TASK not in tasks:
        raise ValueError(f"{Check(TASK).path} is missing; run starting-values {TASK} --store first")
    check, rows = tasks[TASK]
    if args.optimizers:
        chosen = {"adamw", *check.plan.select(args.optimizers)}
        rows = [row for row in rows if row["method"] in chosen]
    make_folder(args.out, "--out")
    first = pretrain(check, args)
    second = corpus_from(args, check.task.sizes["model"])
    session = Session(args, check.plan, second, keep_weights=True)
    runs = entries(check, rows, args.seeds) + tune_lora(check, session, args.seeds)
    session.rows = []
    trained_rows = session.run(runs, test=True)
    by_key = {(row["method"], row["config"]["seed"]): row for row in trained_rows}
    slim_rows = []
    for entry in runs:
        row = by_key[entry.method, entry.config.seed]
        loss, trained = on_text(entry, first, session.folder(entry) / "weights.pt")
        row = slim(row, "curve", "valid_curve")
        slim_rows.append(row | {"first_loss": loss, "trained": trained})
    pretrained = Path(check.plan.values["weights"])
    losses = [on_text(runs[0], corpus, pretrained)[0] for corpus in (first, second)]
    record = {
        "before": dict(zip(("first_loss", "test_loss"), losses, strict=True)),
        "rows": slim_rows,
    }
    write_json(args.out / "fine-tuning.json", record)
    if args.store:
        write_json(PATH, record)
    table(record).print()
    print(caption(record))
    return 0


def read() -> Row:
    """Return the committed record.

    Raises:
        ValueError: there is none.
    """
    if not PATH.exists():
        raise ValueError(f"{PATH} is missing; run fine-tuning --store first")
    return read_json(PATH)
