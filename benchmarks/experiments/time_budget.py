"""Reduction of seeds, tuning and steps to a time budget, decided once per folder of runs."""

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.files import read_json, write_json
from benchmarks.common.timing import timed
from benchmarks.data.corpus import Corpus
from benchmarks.experiments.plan import Entry
from benchmarks.training.run import Run

# An evaluation is forward only: a third of a step's work a token.
EVALUATION = 1 / 3
FEWEST_STEPS = 20


@dataclass(frozen=True)
class Cut:
    """Part of a table's runs that fits a budget, with notes on what was left out."""

    seeds: int
    tune: bool
    share: float  # of the plan's steps
    notes: tuple[str, ...] = ()


def seconds_of(entry: Entry, step_seconds: float) -> float:
    """Estimate the seconds of a run from those of a step."""
    config = entry.config
    evaluated = 2 * config.eval_tokens * EVALUATION / config.tokens_per_step
    return step_seconds * (config.steps + evaluated)


def measure(entries: list[Entry], corpus: Corpus, *, threads: int) -> dict[str, float]:
    """Return each method's seconds per step: the fastest of three, after a warm-up step."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        each = {e.method: e for e in entries}
        return {method: _fastest(entry, corpus) for method, entry in each.items()}
    finally:
        torch.set_num_threads(before)


def _fastest(entry: Entry, corpus: Corpus) -> float:
    run = Run(replace(entry.config, compile=False), corpus)
    times = [timed(lambda: run.train_step(log=False)) for _ in range(4)]
    return min(times[1:]) / 1000


def fit(
    minutes: float,
    final: list[Entry],
    tuning: list[Entry],
    seconds: dict[str, float],
    *,
    seeds: int,
    workers: int = 1,
) -> Cut:
    """Return the mildest cut that fits: all runs; one seed; no tuning; then fewer steps per run.

    ``final`` has one run per method, ``tuning`` the first runs of their searches (empty, if the
    rates are committed).

    Raises:
        ValueError: not even `FEWEST_STEPS` steps of each run fit.
    """
    available = 60 * minutes * workers
    once = sum(seconds_of(e, seconds[e.method]) for e in final)
    search = sum(seconds_of(e, seconds[e.method]) for e in tuning)
    notes: list[str] = []
    tune = bool(tuning)
    if seeds * once + search > available and seeds > 1:
        notes.append(f"1 seed instead of {seeds}")
        seeds = 1
    if once + search > available and tune:
        notes.append("no tuning: the rates that are best on nano")
        tune, search = False, 0.0
    share = min(1.0, (available - search) / (seeds * once))
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
    """Refuse options that differ from those of the decision in ``path``, if there is one.

    Raises:
        ValueError: names the option, its value and that of the decision.
    """
    if not path.exists():
        return
    before = read_json(path).get("asked", {})
    for option, value in asked.items():
        if option in before and before[option] != value:
            raise ValueError(
                f"{option} {value}: {path} was decided for {option} {before[option]}; give that, "
                "or delete the file"
            )


def load_or_decide(path: Path, asked: dict[str, Any], decide: Callable[[], Cut]) -> Cut:
    """Return the decision in ``path``; the first process to call this decides and writes it.

    All processes that share the runs, and a resumed run, need the same one.
    """
    if not path.exists():
        temporary = path.with_name(f"{path.name}.{os.getpid()}.new")
        write_json(temporary, {**asdict(decide()), "asked": asked})
        try:
            os.link(temporary, path)
        except FileExistsError:
            pass
        finally:
            temporary.unlink()
    values = read_json(path)
    values.pop("asked", None)  # older files have none
    return Cut(**{**values, "notes": tuple(values["notes"])})
