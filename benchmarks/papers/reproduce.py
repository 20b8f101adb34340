"""`python -m benchmarks reproduce`: a paper's table beside ours."""

import argparse

from benchmarks.experiments.model_sizes import MODEL_SIZES
from benchmarks.experiments.run_queue import add_run_arguments, settle_run_arguments
from benchmarks.papers import cast, memory_columns, perplexity_tables
from benchmarks.papers.memory_columns import print_memory
from benchmarks.papers.table_runs import run_tables
from optimzoo.options import refuse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python -m benchmarks reproduce`."""
    names = sorted({*memory_columns.TABLES, *perplexity_tables.TABLES, "cast"})
    text = f"of {', '.join(names)}"
    parser.add_argument("table", nargs="+", choices=names, metavar="TABLE", help=text)
    parser.add_argument("--memory-only", action="store_true", help="the memory column, in seconds")
    sizes = ("nano", *MODEL_SIZES)
    parser.add_argument("--size", default="nano", choices=sizes, metavar="SIZE")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="some of the table's methods")
    parser.add_argument(
        "--budget-minutes", type=float, help="cut seeds, tuning and steps so that all runs finish"
    )
    parser.add_argument(
        "--stop-after", type=float, metavar="MINUTES", help="stop; the same command goes on"
    )
    parser.add_argument(
        "--galore-eval", action="store_true", help="losses of the table times n / (n + 1)"
    )
    parser.add_argument(
        "--fresh",
        action="store_true",
        help="run what has a committed row too; finished runs in --out stay",
    )
    add_run_arguments(parser, "runs/reproduce", seeds=3)


def main(args: argparse.Namespace) -> int:
    """Print the tables. Return 1 if a computed memory cell differs from the paper's."""
    _refuse_dropped(args)
    settle_run_arguments(args)
    args.committed = not args.fresh
    limits = {"budget-minutes": args.budget_minutes, "stop-after": args.stop_after}
    for option, minutes in limits.items():
        if minutes is not None and not minutes > 0:
            raise ValueError(f"--{option} is {minutes:g}; it must be more than 0")
    if args.memory_only:
        return max(print_memory(name) for name in args.table)
    for name in args.table:
        if name != "cast" and name not in perplexity_tables.TABLES:
            raise ValueError(f"{name} has a memory column alone; add --memory-only")
    if "cast" in args.table:
        cast.show(args.out)
    args.table = [name for name in args.table if name != "cast"]
    return run_tables(args)


def _refuse_dropped(args: argparse.Namespace) -> None:
    """Refuse options without effect on tables that train nothing."""
    names = [name for name in args.given if name not in ("table", "memory_only")]
    if args.memory_only:
        reason = "--memory-only counts bytes and runs nothing; leave {option} out"
        refuse(args, names, args.given, reason)
    if set(args.table) == {"cast"}:
        reason = "the table cast shows the rows of `benchmarks cast --store`; leave {option} out"
        refuse(args, names, args.given, reason, but="out")
