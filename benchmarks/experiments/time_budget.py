"""What a time budget allows: seeds, a grid, steps; decided once, kept in the folder of the runs."""

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.files import write_json
from benchmarks.data.corpus import Corpus
from benchmarks.experiments.plan import Entry
from benchmarks.training.run import Run

# An evaluation is forward only: a third of a step's work a token.
EVALUATION = 1 / 3
FEWEST_STEPS = 20


@dataclass(frozen=True)
class Cut:
    """How much of a table is run, and what was left out for it, in words."""

    seeds: int
    tune: bool
    share: float  # of the plan's steps
    notes: tuple[str, ...] = ()


def seconds_of(entry: Entry, step_seconds: float) -> float:
    """A run's time from that of a step."""
    config = entry.config
    evaluated = 2 * config.eval_tokens * EVALUATION / config.tokens_per_step
    return step_seconds * (config.steps + evaluated)


def measure(
    entries: list[Entry], corpus: Corpus, *, threads: int, steps: int = 3
) -> dict[str, float]:
    """Seconds of one step of each method (the quickest of a few, after a first one)."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        each = {e.method: e for e in entries}
        return {method: _measured(entry, corpus, steps) for method, entry in each.items()}
    finally:
        torch.set_num_threads(before)


def _measured(entry: Entry, corpus: Corpus, steps: int) -> float:
    run = Run(replace(entry.config, compile=False), corpus)
    times = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        run.train_step(log=False)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def fit(
    minutes: float,
    final: list[Entry],
    grid: list[Entry],
    seconds: dict[str, float],
    *,
    seeds: int,
    workers: int = 1,
) -> Cut:
    """The most that fits: all; one seed; no grid; then fewer steps for every run.

    ``final`` is one run a method, ``grid`` the runs that choose its rates (none, if they are
    committed).

    Raises:
        ValueError: not even a few steps of each fit.
    """
    available = 60 * minutes * workers
    once = sum(seconds_of(e, seconds[e.method]) for e in final)
    tuning = sum(seconds_of(e, seconds[e.method]) for e in grid)
    notes: list[str] = []
    tune = bool(grid)
    if seeds * once + tuning > available and seeds > 1:
        notes.append(f"1 seed instead of {seeds}")
        seeds = 1
    if once + tuning > available and tune:
        notes.append("no learning-rate grid: the rates that are best on nano")
        tune, tuning = False, 0.0
    share = min(1.0, (available - tuning) / (seeds * once))
    steps = min((e.config.steps for e in final), default=0)
    if share < 1:
        if share * steps < FEWEST_STEPS:
            raise ValueError(
                f"{minutes:g} minutes are {share * steps:.0f} steps of each of {len(final)} runs; "
                f"give at least {60 * FEWEST_STEPS * minutes / (60 * share * steps):.1f}"
            )
        notes.append(f"{max(1, int(share * steps))} steps a run instead of {steps}")
    if notes:
        notes = [f"Cut to fit {minutes:g} minutes: {', '.join(notes)}."]
    return Cut(seeds, tune, share, tuple(notes))


def refuse_other(path: Path, asked: dict[str, Any]) -> None:
    """Refuse options that the decision in ``path``, if there is one, was not made for.

    Raises:
        ValueError: one of them, with the value that it was made for.
    """
    if not path.exists():
        return
    before = json.loads(path.read_text(encoding="utf-8")).get("asked", {})
    for option, value in asked.items():
        if option in before and before[option] != value:
            raise ValueError(
                f"{option} {value}: {path} was decided for {option} {before[option]}; give that, "
                "or delete the file"
            )


def kept(path: Path, asked: dict[str, Any], decide: Callable[[], Cut]) -> Cut:
    """The decision in ``path``; made and kept there, with its options, by the first that asks.

    All processes that share the runs, and a run that goes on, need the same one.
    """
    if not path.exists():
        mine = path.with_name(f"{path.name}.{os.getpid()}.new")
        write_json(mine, {**asdict(decide()), "asked": asked})
        try:
            os.link(mine, path)
        except FileExistsError:
            pass
        finally:
            mine.unlink()
    values = json.loads(path.read_text(encoding="utf-8"))
    values.pop("asked", None)  # a file of before it was kept has none
    return Cut(**{**values, "notes": tuple(values["notes"])})
