"""Comparison of CAST with other methods from a dense model to 2:4, with equal steps."""

import argparse
import contextlib
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from benchmarks.common.files import RESULTS, read_json, write_atomic, write_json
from benchmarks.common.provenance import made_on
from benchmarks.common.tables import Table
from benchmarks.experiments import pictures
from benchmarks.experiments.plan import Entry, Plan, Row, choose, settings, tried
from benchmarks.experiments.run_queue import Session, add_run_arguments, settle_run_arguments, slim
from benchmarks.experiments.significance import by_method, mean_loss, paired
from benchmarks.experiments.sparse_run import Method, SparseRun, sparse_config
from benchmarks.experiments.tuning import Search, Values
from benchmarks.training.cli import corpus_from
from benchmarks.training.config import RunConfig
from benchmarks.training.metrics import perplexity
from optimzoo.options import refuse

# The rates and the decays are where the search begins.
METHODS = {
    "dense": Method("dense", trained=False, distill=False),
    "continued": Method("dense, further", lr=2e-3, distill=False),
    "oneshot": Method("pruned once", prune=True, trained=False, distill=False),
    "fixed": Method("fixed mask", lr=4e-3, prune=True),
    "l2": Method("masked L2", lr=5e-4, decay="l2", l1=0.1),
    "srste": Method("SR-STE", lr=5e-4, decay="l2", l1=0.2, masked_forward=True),
    "cast": Method("CAST", lr=1e-3, decay="l1", l1=1e-2, scale_blocks=2),
}
PROTOCOL = "tuned"
# Options that only some of the methods have.
_TAKERS: dict[str, Callable[[Method], bool]] = {
    "steps": lambda method: method.trained,
    "lr": lambda method: method.trained,
    "other_lr": lambda method: method.trained,
    "l1": lambda method: method.decay is not None,
    "eta": lambda method: method.trained and method.distill,
}
HEADERS = ("method", "lr/other/l1", "valid ppl", "pruned", "test ppl", "to dense", "masked max")


def search_of(name: str) -> Search:
    """Return the search for a method's rates and the strength of its decay."""
    method = METHODS[name]
    start: Values = {"lr": method.lr, "other_lr": method.other_lr}
    axes: tuple[tuple[str, ...], ...] = (("lr",), ("other_lr",), ("lr", "other_lr"))
    if method.decay:
        start["l1"] = method.l1
        axes = (("l1",), *axes)
    return Search(start, axes if method.trained else ())


class Comparison:
    """Runs from dense weights, and what the methods' searches have found.

    Attributes:
        path: of the committed rows: those of the runs, and those of the search.
        searched: rows of the search.
    """

    def __init__(self, model: str) -> None:
        self.path = RESULTS / f"{model}-cast.json"
        record = read_json(self.path) if self.path.exists() else {}
        self.rows: list[Row] = record.get("rows", [])
        self.searched: list[Row] = record.get("search", [])

    def values(self, name: str) -> Values:
        """Return a method's best values, or those where its search begins."""
        search = search_of(name)
        if not tried(self.searched, name, PROTOCOL, search):
            return search.start
        return settings(choose(self.searched, name, PROTOCOL), search.start)

    def edges(self, name: str) -> list[str]:
        """Return the values of a method that are best at the edge of what was tried."""
        search = search_of(name)
        return search.edges(tried(self.searched, name, PROTOCOL, search))


def _sizes(args: argparse.Namespace) -> Row:
    names = ("model", "batch_size", "seq_len", "eval_tokens")
    return {name: getattr(args, name) for name in names}


def train_dense(args: argparse.Namespace, session: Session) -> list[Path]:
    """Train the dense model of each seed by tuned AdamW; return the files of their weights."""
    tuned = Plan("nano").chosen("adamw", PROTOCOL, 0).config
    config = replace(tuned, **_sizes(args), steps=args.dense_steps)
    entries = [Entry("start", PROTOCOL, replace(config, seed=s)) for s in range(args.seeds)]
    session.run(entries, test=False)
    session.rows = []
    return [session.folder(entry) / "weights.pt" for entry in entries]


def entry(name: str, values: Values, args: argparse.Namespace, weights: Path, seed: int) -> Entry:
    """Return the run of a method with these values from the dense weights of a seed."""
    options = {k: getattr(args, k) for k in values if getattr(args, k) is not None}
    method = replace(METHODS[name], **values | options)
    config = RunConfig(
        optimizer="adams" if method.decay else "adamw",
        lr=method.lr,
        other_lr=method.other_lr,
        steps=args.steps if method.trained else 1,
        min_lr_ratio=0.0,
        warmup=0.05,
        clip=1.0,
        weights=str(weights),
        seed=seed + 1,  # other batches than the dense run's
        **_sizes(args),
    )
    tag = f"-l1-{method.l1:g}" if method.decay else ""
    return Entry(name, PROTOCOL, sparse_config(config, method, args.eta), tag)


def tune(args: argparse.Namespace, session: Session, weights: Path) -> list[Row]:
    """Search each method's values with seed 0; return the rows, without their curves."""
    names = [name for name in args.methods if METHODS[name].trained]
    searches = {name: search_of(name) for name in names}
    while entries := [
        entry(name, point, args, weights, 0)
        for name, search in searches.items()
        for point in search.next(tried(session.rows, name, PROTOCOL, search))
    ]:
        session.run(entries, test=False)
    rows, session.rows = session.rows, []
    return [slim(row, "curve", "valid_curve", "masked_curve") for row in rows]


def _others(rows: list[Row], args: argparse.Namespace) -> list[Row]:
    return [row for row in rows if row["method"] not in args.methods]


def cells(rows: list[Row], dense: list[Row]) -> list[str]:
    """Format a method's rows as table cells, in the order of `HEADERS`."""
    row, difference = rows[0], paired(rows, dense)
    method = METHODS[row["method"]]
    values = [row["config"]["lr"], row["config"]["other_lr"]]
    values += [row["config"]["hyper"]["l1"]] if method.decay else []
    largest = max((r["masked_max"] for r in rows if "masked_max" in r), default=None)

    def mean(name: str) -> str:
        return f"{perplexity(math.fsum(r[name] for r in rows) / len(rows)):.2f}"

    return [
        method.label,
        "/".join(f"{value:g}" for value in values) if method.trained else "-",
        mean("valid_before"),
        mean("valid_loss"),
        f"{math.exp(mean_loss(rows)):.2f}",
        "" if rows is dense or difference is None else difference.text(),
        "-" if largest is None else f"{largest:.1e}",
    ]


LEGEND = (
    "valid ppl: as trained; pruned: with weights that are 2:4, as are the test figures. masked "
    "max: of the masked weights before that, over the kept ones' median. to dense: to the dense "
    "model trained further. fixed mask: that of the weights pruned once; masked L2: decay of the "
    "masked weights, dense forward; SR-STE: the same, pruned forward. All but the dense ones learn "
    "from the dense model too. lr/other/l1: rate of hidden weights, of the others, strength of the "
    "decay, by a search with seed 0."
)


def table(rows: list[Row]) -> Table:
    """Return the table of methods, means over the seeds, and how it was made."""
    config, groups = rows[0]["config"], by_method(rows)
    trained = max(rows, key=lambda row: row["config"]["steps"])
    seeds = len({row["config"]["seed"] for row in rows})
    origin = (
        f"{config['model']}, {rows[0]['corpus']['name']} text, {trained['tokens']:,} further "
        f"tokens a run, {seeds} seed{'s' * (seeds > 1)}, {rows[0]['precision']}; "
        f"{made_on(*(row['provenance'] for row in rows))}"
    )
    dense = groups.get("continued", [])
    lines = [cells(mine, dense) for mine in groups.values()]
    return Table(HEADERS, lines, notes=[origin, LEGEND], left=2)


def write_report(rows: list[Row], out: Path) -> None:
    """Print the table, and write table.md, masked.png and flips.png."""
    result = table(rows)
    write_atomic(out / "table.md", "\n\n".join([result.markdown(), *result.notes]) + "\n")
    # The first report has no older mask to compare with.
    columns = {"masked": (1, "masked mean / kept median", 0)}
    columns["flips"] = (3, "share of mask bits flipped in 10 steps", 1)
    for name, (column, label, first) in columns.items():
        curves = {
            row["label"]: [(point[0], point[column]) for point in row["masked_curve"][first:]]
            for row in reversed(rows)  # seed 0's
            if row["masked_curve"][first:]
        }
        picture = pictures.lines(curves, label, log=name == "masked")
        write_atomic(out / f"{name}.png", picture)
    result.print()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python -m benchmarks cast`."""
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--model", default="nano")
    parser.add_argument("--dense-steps", type=int, default=400, help="of the dense model")
    parser.add_argument("--steps", type=int, default=300, help="further steps of every method")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--eval-tokens", type=int, default=65536)
    parser.add_argument("--eta", type=float, default=1 / 3, help="the teacher's share of the loss")
    parser.add_argument("--tune", action="store_true", help="search rates and decay with seed 0")
    parser.add_argument("--lr", type=float, help="of hidden weights; default: each method's")
    parser.add_argument("--other-lr", type=float, help="of the others; default: each method's")
    parser.add_argument("--l1", type=float, help="decay, of the methods that have one")
    parser.add_argument("--fresh", action="store_true", help="forget the finished runs in --out")
    add_run_arguments(parser, "runs/cast", seeds=1)


def _refuse_dropped(args: argparse.Namespace) -> None:
    """Refuse an option that no method has, and print a note if only some have it."""
    if args.tune:
        reason = "--tune searches it; leave one of the two out"
        refuse(args, ["lr", "other_lr", "l1"], args.given, reason)
    for name, takes in _TAKERS.items():
        without = [m for m in args.methods if not takes(METHODS[m])]
        if len(without) == len(args.methods):
            others = ", ".join(m for m in METHODS if takes(METHODS[m]))
            reason = f"none of the --methods has it; add one of {others}, or leave {{option}} out"
            refuse(args, [name], args.given, reason)
        elif without and name in args.given:
            option = f"--{name.replace('_', '-')} {getattr(args, name):g}"
            print(f"note: {option} is without effect on {', '.join(without)}")


def main(args: argparse.Namespace) -> int:
    """Run what is missing; print the table and write results.json, table.md and the pictures."""
    _refuse_dropped(args)
    settle_run_arguments(args)
    if args.fresh:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(args.out)
    corpus = corpus_from(args, args.model)
    comparison, plan = Comparison(args.model), Plan("nano")
    plan.methods = {name: {"label": method.label} for name, method in METHODS.items()}
    plan.methods["start"] = {"label": "dense"}
    starts = train_dense(args, Session(args, plan, corpus, keep_weights=True))
    session = Session(args, plan, corpus, keep_weights=True, make_run=SparseRun)
    if args.tune:
        comparison.searched = _others(comparison.searched, args) + tune(args, session, starts[0])
    entries = [
        entry(name, comparison.values(name), args, weights, seed)
        for name in args.methods
        for seed, weights in enumerate(starts)
    ]
    places = {(e.method, e.config.seed): place for place, e in enumerate(entries)}
    rows = [slim(row, "valid_curve") for row in session.run(entries, test=True)]
    rows.sort(key=lambda row: places[row["method"], row["config"]["seed"]])
    if diverged := [row["method"] for row in rows if row["diverged"]]:
        raise ValueError(f"the loss of {diverged[0]} is not finite; lower the rates")
    write_json(args.out / "results.json", {"rows": rows, "search": comparison.searched})
    if args.store:
        every = _others(comparison.rows, args) + rows
        every.sort(key=lambda row: list(METHODS).index(row["method"]))
        write_json(comparison.path, {"rows": every, "search": comparison.searched})
    write_report(rows, args.out)
    print(
        f"written: {args.out}/results.json, table.md, masked.png, flips.png, runs/*/weights.pt\n"
        f"curves: tensorboard --logdir {args.out}"
    )
    return 0
