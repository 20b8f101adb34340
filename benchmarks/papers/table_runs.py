"""Runs of a published table: a search where no rates are committed, then one run per seed."""

import argparse
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from benchmarks.common.files import make_folder, write_json
from benchmarks.data.corpus import Corpus
from benchmarks.experiments import time_budget as budget
from benchmarks.experiments.plan import Entry, Plan, Row, choose, near, rows_of, settings, tried
from benchmarks.experiments.run_queue import Session, merged, threads_each
from benchmarks.experiments.significance import by_method
from benchmarks.experiments.time_budget import Cut
from benchmarks.papers import perplexity_tables
from benchmarks.papers.perplexity_tables import PaperComparison
from benchmarks.training.cli import corpus_from


class TableRuns:
    """Runs of one table at one model size, resumable and shared with other processes."""

    def __init__(self, args: argparse.Namespace, table: PaperComparison) -> None:
        self.args, self.table = args, table
        pairs = perplexity_tables.methods_at(table, args.size)
        self.pairs = [(p, m) for p, m in pairs if not args.methods or m in args.methods]
        make_folder(args.out, "--out")
        model = self.pairs[0][0].values["model"]
        self.corpus: Corpus = corpus_from(args, model)

    def run(self) -> tuple[dict[str, list[Row]], list[str]]:
        """Train all runs. Return each method's rows, and notes on what was cut."""
        cut = self._cut()
        tuned: list[Row] = []
        tune = [(p, m) for p, m in self.pairs if cut.tune and not self._committed(p, m)]
        for plan, methods in _by_plan(tune):
            session = Session(self.args, plan, self.corpus)
            with self._stored(plan.tune_path, session, {}):
                while runs := self._tuning_runs(plan, methods, session.rows):
                    session.run(runs, test=False)
            tuned += session.rows
        rows: dict[str, list[Row]] = {}
        for plan, methods in _by_plan(self.pairs):
            if cut.share < 1:
                plan.values["steps"] = int(cut.share * plan.values["steps"])
            session = Session(self.args, plan, self.corpus)
            chosen = {m: tuned if (plan, m) in tune else None for m in methods}
            finals = [self._final(plan, m, s, chosen[m]) for s in range(cut.seeds) for m in methods]
            with self._stored(plan.results_path, session, {"plan": plan.values}):
                session.run(finals, test=True)
            rows |= by_method(session.rows)
        return rows, list(cut.notes)

    def _cut(self) -> Cut:
        args = self.args
        if args.budget_minutes is None:
            return Cut(args.seeds, tune=True, share=1.0)

        def decide() -> Cut:
            missing = [(p, m) for p, m in self.pairs if not self._committed(p, m)]
            tuning = [e for p, m in missing for e in self._tuning_runs(p, [m], [])]
            final = [self._final(p, m, 0, None) for p, m in self.pairs]
            seconds = budget.measure(final, self.corpus, threads=threads_each(args.jobs))
            workers = args.jobs * int(os.environ.get("WORLD_SIZE", "1"))
            return budget.fit(
                args.budget_minutes, final, tuning, seconds, seeds=args.seeds, workers=workers
            )

        return budget.load_or_decide(Path(args.out) / "budget.json", _asked(args), decide)

    def _committed(self, plan: Plan, method: str) -> bool:
        """Return whether the method's rates are committed; those of a search that goes on are not.

        Rows that an older search left count, since the tuned values are chosen from them.
        """
        protocol = self.table.protocol
        search = plan.search(method, protocol)
        if not search.axes or "tuned_by" in plan.values:
            return True
        mine = rows_of(plan.tuning_rows(method), method, protocol)
        begun = tried(mine, method, protocol, search)
        return bool(mine) and not (begun and self._tuning_runs(plan, [method], mine))

    def _tuning_runs(self, plan: Plan, methods: list[str], rows: list[Row]) -> list[Entry]:
        """Return the runs that tuning needs next; with a budget, the first ones alone."""
        if rows and self.args.budget_minutes is not None:
            return []
        protocol = self.table.protocol
        return [e for m in methods for e in plan.tuning_runs(m, protocol, rows)]

    def _final(self, plan: Plan, method: str, seed: int, tuned: list[Row] | None) -> Entry:
        protocol = self.table.protocol
        if tuned is not None:
            values = settings(choose(tuned, method, protocol))
        elif self._committed(plan, method):
            values = plan.best(method, protocol)
        else:
            values = plan.search(method, protocol).start
        return plan.entry(method, protocol, seed, **values)

    @contextmanager
    def _stored(self, path: Path, session: Session, more: Row) -> Iterator[None]:
        """Store the session's rows with `--store` when the context ends, also if it is stopped."""
        try:
            yield
        finally:
            if self.args.store and session.rows:
                write_json(path, {**more, "rows": merged(path, session.rows)})


def _by_plan(pairs: list[tuple[Plan, str]]) -> list[tuple[Plan, list[str]]]:
    plans = dict.fromkeys(plan for plan, _ in pairs)
    return [(plan, [m for p, m in pairs if p is plan]) for plan in plans]


def _asked(args: argparse.Namespace) -> dict[str, str]:
    """Return the options for which a budget is decided, with their values."""
    return {
        "--budget-minutes": f"{args.budget_minutes:g}",
        "--seeds": str(args.seeds),
        "--methods": " ".join(sorted(args.methods)) if args.methods else "of the whole table",
        "--jobs": str(args.jobs),
    }


def _refuse_early(args: argparse.Namespace) -> None:
    """Refuse unknown methods and a changed budget before the first table is run."""
    has = {}
    for name in args.table:
        table = perplexity_tables.TABLES[name]
        has[name] = [m for _, m in perplexity_tables.methods_at(table, args.size)]
    known = list(dict.fromkeys(m for methods in has.values() for m in methods))
    for method in args.methods or []:
        if method not in known:
            raise ValueError(
                f"--methods {method}: unknown; {near(method, known)}there are {', '.join(known)}"
            )
    for name, methods in has.items():
        if args.methods and not set(args.methods) & set(methods):
            names = " ".join(args.methods)
            raise ValueError(f"--methods {names}: none is in {name}; it has {', '.join(methods)}")
        if args.budget_minutes is not None:
            asked = _asked(args)
            if "jobs" not in args.given:
                del asked["--jobs"]  # the default is the machine's, and a run may go on on another
            budget.refuse_other(_folder(args.out, name, args) / "budget.json", asked)


def _folder(out: Path, name: str, args: argparse.Namespace) -> Path:
    return out / f"{name}-{args.size}"


def run_tables(args: argparse.Namespace) -> int:
    """Run the tables in order; print and write each, and store its rows with `--store`."""
    _refuse_early(args)
    _own_device()
    if args.stop_after is not None:
        _stop_after(args.stop_after)
    out = args.out
    for name in args.table:
        table = perplexity_tables.TABLES[name]
        args.out = _folder(out, name, args)
        rows, cut = TableRuns(args, table).run()
        if args.galore_eval:
            rows = {
                m: [perplexity_tables.as_galore(row) for row in mine] for m, mine in rows.items()
            }
            cut.append("Test losses as GaLore's evaluation counts them: times n / (n + 1).")
            if args.store:
                cut.append("The rows that are stored have them as they were measured.")
        perplexity_tables.show(
            name, perplexity_tables.records(table, args.size, rows), args.out, cut
        )
        print(f"written: {args.out}/{name}.md and .json\ncurves: tensorboard --logdir {args.out}")
    args.out = out
    return 0


def _own_device() -> None:
    """Select one GPU per rank under torchrun."""
    if torch.cuda.is_available() and "LOCAL_RANK" in os.environ:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())


def _stop_after(minutes: float) -> None:
    """Send SIGTERM to this process after ``minutes``: unfinished runs are saved."""
    timer = threading.Timer(60 * minutes, os.kill, (os.getpid(), signal.SIGTERM))
    timer.daemon = True
    timer.start()
