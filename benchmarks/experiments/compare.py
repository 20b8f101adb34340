"""Comparison of optimizers on the same model and batches, and tuning of their rates."""

import argparse
import contextlib
import shutil
from collections.abc import Iterable
from pathlib import Path

from benchmarks.common.files import make_folder, write_json
from benchmarks.experiments import summary
from benchmarks.experiments.own import (
    add_own,
    add_own_arguments,
    set_model,
    write_comparison,
    write_csv,
)
from benchmarks.experiments.plan import PROTOCOLS, Plan, read_rows
from benchmarks.experiments.run_queue import (
    Session,
    add_run_arguments,
    merged,
    settle_run_arguments,
)
from benchmarks.training.cli import corpus_from
from optimzoo.options import refuse


def tune(session: Session, methods: list[str], protocols: list[str]) -> int:
    """Search for the best values and write the rows that `compare` takes them from.

    Rows are written as they come: with `--committed` a search that was stopped goes on elsewhere.
    """
    plan = session.plan
    pairs = plan.pairs(methods, protocols)
    paths = dict.fromkeys(plan.tune_path_of(method) for method, _ in pairs)
    while runs := [e for pair in pairs for e in plan.tuning_runs(*pair, session.rows)]:
        session.run(runs, test=False)
        _write(paths, session, ended=False)
    _write(paths, session, ended=True)
    for path in paths:
        rows = [row for row in read_rows(path) if row["method"] in plan.methods]
        print(summary.tuning_text(plan, rows))
    for method, protocol in pairs:
        for rate in plan.edges(method, protocol, plan.tuning_rows(method)):
            print(f"note: {method} ({protocol}) is best at the edge of what was tried in {rate}")
    return 0


def _write(paths: Iterable[Path], session: Session, *, ended: bool) -> None:
    """Write a search's rows; a search that goes on keeps those that it has yet to come to."""
    new = [{k: v for k, v in row.items() if k != "curve"} for row in session.rows]
    for path in paths:
        mine = [row for row in new if session.plan.tune_path_of(row["method"]) == path]
        if mine:
            rows = merged(path, mine, ended=ended)
            rows.sort(key=lambda r: (r["method"], r["protocol"], r["valid_loss"] or float("inf")))
            write_json(path, {"rows": rows})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python -m benchmarks compare`."""
    parser.add_argument("--plan", default="nano", help="a file of experiments/configs, by name")
    parser.add_argument(
        "--optimizers", nargs="+", metavar="NAME", help="of the plan, or all; default: its four"
    )
    parser.add_argument("--protocol", choices=[*PROTOCOLS, "both"], default="both")
    parser.add_argument(
        "--tune", action="store_true", help="search for the best rates, store the rows"
    )
    parser.add_argument(
        "--committed", action="store_true", help="take rows of the repository that fit, not run"
    )
    parser.add_argument("--fresh", action="store_true", help="forget the finished runs in --out")
    add_own_arguments(parser)
    add_run_arguments(parser, "runs/compare", seeds=1)


def main(args: argparse.Namespace) -> int:
    """Run what is missing; print the table and write results.json, table.md and the pictures."""
    if args.tune:
        refuse(args, ["seeds"], args.given, "--tune runs seed 0 alone; leave {option} out")
        refuse(args, ["store"], args.given, "--tune always stores its rows; leave {option} out")
        refuse(args, ["csv"], args.given, "--tune compares nothing; leave {option} out")
    if args.optimizer or args.model:
        reason = "what is stored is of the plan's methods and model; leave {option} out"
        refuse(args, ["store"], args.given, reason)
    settle_run_arguments(args)
    plan = Plan(args.plan)
    if args.model:
        set_model(plan, args.model, args.out)
    user_methods = [add_own(plan, where, args.out, **options) for where, options in args.optimizer]
    # The plan's methods are tuned already, but for another model.
    alone = args.tune and user_methods and not args.model and not args.optimizers
    methods = [*([] if alone else plan.select(args.optimizers)), *user_methods]
    protocols = list(PROTOCOLS) if args.protocol == "both" else [args.protocol]
    pairs = plan.pairs(methods, protocols)
    missing = [m for m in methods if m not in dict(pairs)]
    if not pairs:
        names = ", ".join(missing)
        raise ValueError(
            f"--protocol {args.protocol}: plan {args.plan} has none for {names}; leave it out"
        )
    if missing:
        print(f"note: left out, for they have no protocol {args.protocol}: {', '.join(missing)}")
    seeds = range(0 if args.tune else args.seeds)
    entries = [plan.chosen(*pair, seed) for seed in seeds for pair in pairs]
    if args.fresh:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(args.out / "runs")
    make_folder(args.out, "--out")
    session = Session(args, plan, corpus_from(args, plan.values["model"]))
    if args.tune:
        return tune(session, methods, protocols)
    rows = session.run(entries, test=True)
    write_comparison(plan, rows, args.out)
    if args.csv:
        write_csv(args.csv, [(plan, rows)])
    if args.store:
        stored = merged(plan.results_path, rows)
        write_json(plan.results_path, {"plan": plan.values, "rows": stored})
    summary.write_report(plan, rows, args.out)
    summary.comparison(plan, rows).print()
    print(
        f"written: {args.out}/results.json, table.md, loss.png, memory.png\n"
        f"curves: tensorboard --logdir {args.out}/runs"
    )
    return 0
