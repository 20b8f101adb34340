"""The training loop of all commands."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.common.files import read_json, write_json
from benchmarks.common.provenance import provenance
from benchmarks.common.timing import Spans, step_spans
from benchmarks.data.corpus import Corpus
from benchmarks.training.config import RunConfig, fingerprint
from benchmarks.training.distributed import ALONE, Parallel
from benchmarks.training.interrupts import DeferredInterrupt
from benchmarks.training.metrics import Scalars, peak_memory, perplexity, reset_peak_memory
from benchmarks.training.own import is_own
from benchmarks.training.run import Run

LOG_EVERY = 10

Progress = Callable[[int, float, float], None]  # step, loss, tokens per second


def train(
    config: RunConfig,
    corpus: Corpus,
    *,
    out: Path | None = None,
    progress: Progress | None = None,
    save_every: int = 0,
    eval_every: int = 0,
    test: bool = True,
    parallel: Parallel = ALONE,
    keep: int = 3,
    skip_damaged: bool = False,
    keep_weights: bool = False,
    make_run: type[Run] = Run,
) -> dict[str, Any]:
    """Train, and return the run's row: configuration, losses, bytes, times, provenance.

    With ``out`` the run writes ``checkpoints`` (the last ``keep``), TensorBoard events and
    ``row.json`` there; a finished run is not repeated, an unfinished one resumes from its newest
    checkpoint, to the same bits, on as many processes as ``parallel`` has. A run stops at the first
    loss that is not finite, with ``diverged`` in its row. ``keep_weights`` writes the trained ones
    to ``weights.pt`` there.
    """
    weights = out / "weights.pt" if out is not None and keep_weights else None
    row = finished(config, corpus, out, test=test)
    if row and (weights is None or weights.exists()):
        return row
    run = make_run(config, corpus, out, parallel=parallel, keep=keep)
    run.resume(skip_damaged=skip_damaged)
    scalars = Scalars(out if parallel.leads else None, first_step=run.step)
    reset_peak_memory()
    optimizer, steps = step_spans(run.optimizer), Spans()
    with DeferredInterrupt() as signals:
        try:
            finite = _take_steps(run, scalars, signals, progress, save_every, eval_every, steps)
            results = run.results(test) if finite else {"valid_loss": None, "test_loss": None}
        except KeyboardInterrupt:
            scalars.close()
            if not signals.urgent:
                run.save()
            raise
        row = _row(run, results, optimizer, steps)
        valid = results["valid_loss"]
        scalars.close(row["config"], **{"hparam/valid_loss": math.nan if valid is None else valid})
        if weights is not None:
            run.save_weights(weights)
        if run.checkpoints is not None and out is not None and parallel.leads:
            write_json(out / "row.json", row)
            run.checkpoints.clear()
    return row


def _take_steps(
    run: Run,
    scalars: Scalars,
    signals: DeferredInterrupt,
    progress: Progress | None,
    save_every: int,
    eval_every: int,
    steps: Spans,
) -> bool:
    """Train to the last step. Stop and return False at a loss that is not finite.

    The loss is read from a GPU only where it is logged: waiting in every step would leave it idle.
    """
    config = run.config
    while run.step < config.steps:
        start = time.perf_counter()
        log = run.step % LOG_EVERY == 0 or run.step + 1 == config.steps
        steps.start()
        loss, values = run.train_step(log and run.out is not None, read=log)
        steps.stop()
        run.seconds += time.perf_counter() - start
        if not math.isfinite(loss):
            return False
        speed = run.step * config.tokens_per_step / run.seconds
        if log:
            run.curve.append((run.step, loss))
            values["train/loss"] = loss
            values["train/tokens_per_second"] = speed
            values["memory/peak_bytes"] = peak_memory()
            scalars.add(run.step, values)
        if eval_every and run.step % eval_every == 0:
            run.valid_curve.append((run.step, run.evaluate("valid")))
            scalars.add(run.step, {"valid/loss": run.valid_curve[-1][1]})
        if save_every and run.step % save_every == 0:
            scalars.flush()
            run.save()
        if progress is not None:
            progress(run.step, loss, speed)
        signals.check(run.parallel.any)
    return True


def _row(run: Run, results: dict[str, Any], optimizer: Spans, steps: Spans) -> dict[str, Any]:
    config, corpus = run.config, run.corpus
    params, state = run.state_bytes()
    return {
        "config": asdict(config),
        **({"own": True} if is_own(config.optimizer) else {}),
        "fingerprint": fingerprint(config, corpus),
        "corpus": {"name": corpus.name, "sha256": corpus.sha256, "vocab_size": corpus.vocab_size},
        "provenance": provenance(),
        "precision": run.precision,
        "parallel": {"kind": run.parallel.kind, "processes": run.parallel.size},
        "tokens": config.steps * config.tokens_per_step,
        "diverged": not math.isfinite(perplexity(results["valid_loss"])),
        "parameter_bytes": params,
        "state_bytes": state,
        "peak_bytes": peak_memory(),
        # Released weights are stepped in the backward, which is not told apart.
        "optimizer_ms": None if config.release else _median(optimizer.milliseconds()),
        "step_ms": _median(steps.milliseconds()),
        "seconds": run.seconds,
        "tokens_per_second": run.step * config.tokens_per_step / (run.seconds or math.inf),
        "curve": run.curve,
        "valid_curve": run.valid_curve,
        **results,
    }


def finished(
    config: RunConfig, corpus: Corpus, out: Path | None, *, test: bool = True
) -> dict[str, Any]:
    """Return the row of a finished run with these settings in ``out``, or an empty dict.

    Raises:
        ValueError: row.json cannot be read.
    """
    path = out / "row.json" if out is not None else None
    if path is None or not path.exists():
        return {}
    try:
        row = read_json(path)
        same = row["fingerprint"] == fingerprint(config, corpus)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} cannot be read ({error}); delete it to run again") from None
    complete = not test or row.get("diverged") or row.get("test_loss") is not None
    return row if same and complete else {}


def _median(times: list[float]) -> float | None:
    return sorted(times)[len(times) // 2] if times else None
