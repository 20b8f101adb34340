"""Queue of a plan's runs, in one or several processes, shared with other processes."""

import argparse
import itertools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from benchmarks.common.progress import SideBySide
from benchmarks.data.corpus import Corpus
from benchmarks.experiments.plan import (
    Entry,
    Plan,
    Row,
    committed_rows,
    read_rows,
    run_key,
    settings,
    tuned_text,
)
from benchmarks.training.cli import add_corpus_arguments, corpus_from, refuse_cache
from benchmarks.training.config import fingerprint
from benchmarks.training.loop import finished, train
from benchmarks.training.metrics import perplexity
from benchmarks.training.run import Run

WAIT = 0.5  # seconds between two looks at what other processes have
Pairs = Iterator[tuple[Entry, Row]]


class Session:
    """Queue that trains entries in one or several processes and collects their rows.

    ``keep_weights`` leaves the trained weights in each run's folder; ``make_run`` is a class of
    runs other than `Run`.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        plan: Plan,
        corpus: Corpus,
        *,
        keep_weights: bool = False,
        make_run: type[Run] = Run,
    ) -> None:
        self.args, self.plan, self.corpus = args, plan, corpus
        self.keep_weights, self.make_run = keep_weights, make_run
        self.rows: list[Row] = []
        self.known = committed_rows() if args.committed else {}

    def run(self, entries: list[Entry], *, test: bool) -> list[Row]:
        """Train ``entries`` and return all rows; read finished ones, resume unfinished ones."""
        steps = sum(entry.config.steps for entry in entries)
        together = min(self.args.jobs, len(entries))
        bar = SideBySide(steps)
        with bar:
            lookups = [(entry, self._known(entry, test)) for entry in entries]
            ready = [(entry, row) for entry, row in lookups if row is not None]
            pending = [entry for entry, row in lookups if row is None]
            if together > 1:
                runs = self._many(pending, together, bar, test)
            else:
                runs = self._each(pending, bar, test)
            pairs = itertools.chain(ready, runs)
            for done, (entry, row) in enumerate(pairs, start=1):
                bar.end(entry.key, entry.config.steps)
                row = {**row, "method": entry.method, "protocol": entry.protocol}
                self.rows.append(row)
                c, loss = entry.config, row["test_loss"] if test else row["valid_loss"]
                bar.finish(
                    f"[{done}/{len(entries)}] {self._name(entry)}"
                    f" {tuned_text(settings(row))} seed {c.seed}:"
                    f" {'test' if test else 'validation'} perplexity {perplexity(loss):.2f}"
                )
        return self.rows

    def _known(self, entry: Entry, test: bool) -> Row | None:
        """Return a committed row with the same settings and text, or None."""
        row = self.known.get(run_key(fingerprint(entry.config, self.corpus)))
        tested = row is not None and (not test or row["diverged"] or row["test_loss"] is not None)
        return row if tested else None

    def _name(self, entry: Entry) -> str:
        return f"{self.plan.label(entry.method)} {entry.protocol}"

    def folder(self, entry: Entry) -> Path:
        """Return the folder of a run."""
        return Path(self.args.out) / "runs" / entry.key

    def _next(self, pending: list[Entry], test: bool) -> tuple[Entry, Row | FileLock] | None:
        """Remove and return the first finished entry with its row, or free one with its lock."""
        for entry in pending:
            folder = self.folder(entry)
            result: Row | FileLock | None = finished(entry.config, self.corpus, folder, test=test)
            result = result or lock_run(folder)
            if result:
                pending.remove(entry)
                return entry, result
        return None

    def _each(self, entries: list[Entry], bar: SideBySide, test: bool) -> Pairs:
        pending = list(entries)
        while pending:
            available = self._next(pending, test)
            if available is None:  # other processes train the pending ones
                time.sleep(WAIT)
                continue
            entry, row = available
            if isinstance(row, FileLock):
                try:
                    yield entry, self._train(entry, bar, test)
                finally:
                    row.release()
            else:
                yield entry, row

    def _train(self, entry: Entry, bar: SideBySide, test: bool) -> Row:
        progress = partial(bar.report, entry.key, self._name(entry))
        options = self._options(entry, test)
        return train(entry.config, self.corpus, progress=progress, **options)

    def _options(self, entry: Entry, test: bool) -> dict[str, Any]:
        options: dict[str, Any] = {"out": self.folder(entry), "test": test}
        options |= {"keep_weights": self.keep_weights, "make_run": self.make_run}
        return options | {"save_every": max(100, entry.config.steps // 5)}

    def _many(self, entries: list[Entry], jobs: int, bar: SideBySide, test: bool) -> Pairs:
        threads = threads_each(jobs)
        # spawn: a forked child would inherit torch's thread pool without its threads.
        context = multiprocessing.get_context("spawn")
        reports = context.SimpleQueue()
        pending, running = list(entries), dict[Future[Row], tuple[Entry, FileLock]]()
        with ProcessPoolExecutor(jobs, context, _start_worker, (threads, reports)) as pool:
            try:
                while pending or running:
                    while len(running) < jobs and (available := self._next(pending, test)):
                        entry, row = available
                        if isinstance(row, FileLock):
                            job = (self.args, entry, self._name(entry), self._options(entry, test))
                            running[pool.submit(_train_in_worker, *job)] = entry, row
                        else:
                            yield entry, row
                    ended = wait(running, WAIT, FIRST_COMPLETED).done
                    while not reports.empty():
                        bar.report(*reports.get())
                    for future in ended:
                        entry, lock = running.pop(future)
                        lock.release()
                        yield entry, future.result()
                    if not running:
                        time.sleep(WAIT if pending else 0)
            except BaseException:
                for worker in multiprocessing.active_children():
                    worker.terminate()  # a run saves and leaves
                pool.shutdown(cancel_futures=True)
                for _, lock in running.values():
                    lock.release()
                raise


def lock_run(folder: Path) -> FileLock | None:
    """Lock the run of a folder until `release`. Return None if another process holds it.

    The kernel releases the lock of a process that ends, however it ends; on a network file system
    its server does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / "run.lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return None
    return lock


def threads_each(jobs: int) -> int:
    """Return the number of threads of each of ``jobs`` concurrent runs."""
    return max(1, torch.get_num_threads() // jobs)


# Of a worker: the queue of its progress reports, and the corpus of its last run, by model.
_reports: Any = None
_corpus: dict[str, Corpus] = {}


def _start_worker(threads: int, reports: Any) -> None:
    global _reports
    _reports = reports
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's; it ends the workers
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
            os.kill(os.getpid(), signal.SIGTERM)  # the run saves and leaves

    threading.Thread(target=follow, daemon=True).start()


def _train_in_worker(
    args: argparse.Namespace, entry: Entry, name: str, options: dict[str, Any]
) -> Row:
    def progress(step: int, loss: float, speed: float) -> None:
        _reports.put((entry.key, name, step, loss, speed))

    try:
        model = entry.config.model
        if model not in _corpus:
            _corpus.clear()
            _corpus[model] = corpus_from(args, model)
        return train(entry.config, _corpus[model], progress=progress, **options)
    except KeyboardInterrupt:
        os._exit(130)  # else the pool would give this worker the next run


def slim(row: Row, *without: str) -> Row:
    """Return a row as it is stored: without some values, and the folder of its weights."""
    config = row["config"] | {"weights": Path(row["config"]["weights"]).name}
    return {k: v for k, v in row.items() if k not in without} | {"config": config}


def merged(path: Path, rows: list[Row], *, ended: bool = True) -> list[Row]:
    """Return a results file's rows with those of the same methods and protocols replaced.

    Unless the runs have ``ended``: then those that are not among them yet stay.
    """
    pairs = {(row["method"], row["protocol"]) for row in rows}
    new_keys = {run_key(row["fingerprint"]) for row in rows}
    stored = read_rows(path) if path.exists() else []

    def stays(row: Row) -> bool:
        if (row["method"], row["protocol"]) not in pairs:
            return True
        return not ended and run_key(row["fingerprint"]) not in new_keys

    return [row for row in stored if stays(row)] + rows


def add_run_arguments(parser: argparse.ArgumentParser, out: str, seeds: int) -> None:
    """Add what every command of several runs takes: seeds, processes, folder and texts."""
    parser.add_argument("--seeds", type=int, default=seeds, metavar="N", help="seeds 0 to N-1")
    parser.add_argument(
        "--jobs",
        type=int,
        help="runs side by side, in processes; on a CPU as many as threads, to eight",
    )
    parser.add_argument("--out", type=Path, default=Path(out))
    parser.add_argument("--store", action="store_true", help="also keep the rows in the repository")
    add_corpus_arguments(parser)
    parser.set_defaults(committed=False)  # what has a committed row is run, too


def settle_run_arguments(args: argparse.Namespace) -> None:
    """Set the default of `--jobs`, and check the counts and the `--cache-dir`.

    Raises:
        ValueError: the number of jobs or seeds is below 1, or a `--cache-dir` without effect.
    """
    refuse_cache(args)
    if args.jobs is None:  # small models scale badly over threads
        args.jobs = 1 if torch.cuda.is_available() else min(8, torch.get_num_threads())
    if args.seeds < 1 or args.jobs < 1:
        raise ValueError("--seeds and --jobs must be at least 1")
