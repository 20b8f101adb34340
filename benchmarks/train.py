"""Train one Llama with one optimizer: the loop that every comparison runs."""

import argparse
import json
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from benchmarks.data import Corpus, load_corpus
from benchmarks.llama import get_config
from benchmarks.parallel import ALONE, KINDS, Parallel, start
from benchmarks.plan import perplexity
from benchmarks.progress import RunProgress
from benchmarks.provenance import make_folder, provenance, write_json
from benchmarks.run import PRECISIONS, Run, RunConfig, fingerprint, refuse_early
from benchmarks.signals import HeldSignals
from benchmarks.telemetry import Scalars, peak_memory, reset_peak_memory
from benchmarks.timing import Spans, step_spans
from benchmarks.utilisation import speed_text
from optimzoo.memory.options import refuse

LOG_EVERY = 10
_OF_OUT = ("eval_every", "save_every", "keep", "skip_damaged")

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
) -> dict[str, Any]:
    """Train, and return the run's row: configuration, losses, bytes, times, provenance.

    With ``out`` the run writes ``checkpoints`` (the last ``keep``), TensorBoard events and
    ``row.json`` there; a finished run is not run again, an unfinished one goes on where it was
    saved, to the same bits, on as many processes as ``parallel`` now has. A run whose loss is not
    finite stops there, with ``diverged`` in its row.
    """
    if row := finished(config, corpus, out, test=test):
        return row
    run = Run(config, corpus, out, parallel=parallel, keep=keep)
    run.resume(skip_damaged=skip_damaged)
    scalars = Scalars(out if parallel.leads else None, first_step=run.step)
    reset_peak_memory()
    optimizer, steps = step_spans(run.optimizer), Spans()
    with HeldSignals() as signals:
        try:
            finite = _take_steps(run, scalars, signals, progress, save_every, eval_every, steps)
            valid = run.evaluate("valid") if finite else math.nan
            tested = run.evaluate("test") if test and math.isfinite(valid) else math.nan
        except KeyboardInterrupt:
            scalars.close()
            if not signals.urgent:
                run.save()
            raise
        row = _row(run, valid, tested, optimizer, steps)
        scalars.close(row["config"], **{"hparam/valid_loss": valid})
        if run.checkpoints is not None and out is not None and parallel.leads:
            write_json(out / "row.json", row)
            run.checkpoints.clear()
    return row


def _take_steps(
    run: Run,
    scalars: Scalars,
    signals: HeldSignals,
    progress: Progress | None,
    save_every: int,
    eval_every: int,
    steps: Spans,
) -> bool:
    """Train to the last step; False where a loss is not finite, and there it stops.

    A GPU is asked for the loss where it is logged: waiting in every step would leave it idle.
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
        if log:
            run.curve.append((run.step, loss))
            values["train/loss"] = loss
            values["train/tokens_per_second"] = run.step * config.tokens_per_step / run.seconds
            values["memory/peak_bytes"] = peak_memory()
            scalars.add(run.step, values)
        if eval_every and run.step % eval_every == 0:
            run.valid_curve.append((run.step, run.evaluate("valid")))
            scalars.add(run.step, {"valid/loss": run.valid_curve[-1][1]})
        if save_every and run.step % save_every == 0:
            scalars.flush()
            run.save()
        if progress is not None:
            progress(run.step, loss, run.step * config.tokens_per_step / run.seconds)
        signals.check(run.parallel.any)
    return True


def _row(run: Run, valid: float, tested: float, optimizer: Spans, steps: Spans) -> dict[str, Any]:
    config, corpus = run.config, run.corpus
    params, state = run.state_bytes()
    return {
        "config": asdict(config),
        "fingerprint": fingerprint(config, corpus),
        "corpus": {"name": corpus.name, "sha256": corpus.sha256, "vocab_size": corpus.vocab_size},
        "provenance": provenance(),
        "precision": run.precision,
        "parallel": {"kind": run.parallel.kind, "processes": run.parallel.size},
        "tokens": config.steps * config.tokens_per_step,
        "diverged": not math.isfinite(perplexity(valid)),
        "valid_loss": _finite(valid),
        "test_loss": _finite(tested),
        "parameter_bytes": params,
        "state_bytes": state,
        "peak_bytes": peak_memory(),
        # Released weights are stepped in the backward, which is not told apart.
        "optimizer_ms": None if config.release else _median(optimizer.milliseconds()),
        "step_ms": _median(steps.milliseconds()),
        "tokens_per_second": run.step * config.tokens_per_step / run.seconds,
        "curve": run.curve,
        "valid_curve": run.valid_curve,
    }


def finished(
    config: RunConfig, corpus: Corpus, out: Path | None, *, test: bool = True
) -> dict[str, Any]:
    """The row of a finished run of these settings in ``out``; empty if there is none."""
    row = _finished_row(out) if out is not None else {}
    complete = not test or row.get("diverged") or row.get("test_loss") is not None
    return row if complete and row.get("fingerprint") == fingerprint(config, corpus) else {}


def _finished_row(out: Path) -> dict[str, Any]:
    path = out / "row.json"
    if not path.exists():
        return {}
    try:
        row = json.loads(path.read_text(encoding="utf-8"))
        return row if isinstance(row["fingerprint"], dict) else {}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} cannot be read ({error}); delete it to run again") from None


def _median(times: list[float]) -> float | None:
    return sorted(times)[len(times) // 2] if times else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def add_corpus_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that choose the text, or its tokens."""
    parser.add_argument(
        "--data",
        nargs="+",
        default=["stdlib"],
        metavar="SOURCE",
        help="stdlib (this Python's own sources), c4, .txt and .jsonl files (.gz, .xz, .zst), "
        "or one folder of tokens: NAME-KEY of a --cache-dir, copied from any machine",
    )
    parser.add_argument("--max-chars", type=int, help="take at most this much training text")
    parser.add_argument("--max-tokens", type=int, help="c4: stream this many training tokens")
    parser.add_argument("--cache-dir", type=Path, default=Path(".cache/optimzoo"))


def refuse_cache(args: argparse.Namespace) -> None:
    """Refuse a `--cache-dir` that is not read, before anything is done.

    Raises:
        ValueError: it was given with a folder of tokens.
    """
    named = args.data in (["stdlib"], ["c4"])
    if not named and len(args.data) == 1 and Path(args.data[0]).is_dir():
        reason = "--data is a folder of tokens, which are read where they lie; leave {option} out"
        refuse(args, ["cache_dir"], args.given, reason)


def corpus_from(args: argparse.Namespace, model: str, *, progress: bool = True) -> Corpus:
    """The corpus that the options ask for, tokenised for a model."""
    source = args.data[0] if args.data in (["stdlib"], ["c4"]) else args.data
    return load_corpus(
        source,
        vocab_size=get_config(model).vocab_size,
        cache_dir=args.cache_dir,
        progress=progress,
        max_chars=args.max_chars,
        max_tokens=args.max_tokens,
    )


def as_json(text: str) -> Any:
    """JSON, of an option whose help has an example."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON ({error}); see --help") from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m benchmarks train`: those of `RunConfig`, and where to write."""
    parser.add_argument("--optimizer", required=True, help="a name of optimzoo.list_optimizers()")
    parser.add_argument("--lr", type=float, required=True, help="of the method's own weights")
    parser.add_argument("--hyper", type=as_json, default={}, help="JSON, e.g. '{\"eps\": 1e-6}'")
    parser.add_argument(
        "--lowrank", type=as_json, default={}, help="JSON, e.g. '{\"rank\": 32}' (see RunConfig)"
    )
    parser.add_argument(
        "--groups", type=as_json, default={}, help="JSON, further options of a role's weights"
    )
    known = {"optimizer", "lr", "hyper", "lowrank", "groups"}
    for option in fields(RunConfig):
        if option.name in known:
            continue
        name = "--" + option.name.replace("_", "-")
        if option.name == "compile":
            parser.add_argument(name, action="store_true", help="torch.compile the model")
        elif option.name == "release":
            parser.add_argument(name, action="store_true", help="step weights in the backward")
        elif option.name == "other_lr":
            parser.add_argument(name, type=float, help="of the rest (see optimzoo.get_info)")
        else:
            choices = PRECISIONS if option.name == "precision" else None
            kind = type(option.default)
            parser.add_argument(name, type=kind, default=option.default, choices=choices)
    add_corpus_arguments(parser)
    parser.add_argument("--out", type=Path, help="folder of checkpoints, TensorBoard and row.json")
    parser.add_argument("--save-every", type=int, default=100, metavar="STEPS")
    parser.add_argument("--keep", type=int, default=3, metavar="N", help="checkpoints to keep")
    parser.add_argument(
        "--skip-damaged", action="store_true", help="go on from the newest whole checkpoint"
    )
    parser.add_argument("--eval-every", type=int, default=0, metavar="STEPS")
    parser.add_argument(
        "--parallel", choices=KINDS, default="none", help="how the processes of torchrun share it"
    )


def main(args: argparse.Namespace) -> int:
    """Train with a progress bar, and print the result."""
    if args.out is None:
        reason = "it is of what --out keeps; add --out FOLDER, or leave {option} out"
        refuse(args, _OF_OUT, args.given, reason)
    refuse_cache(args)
    config = RunConfig(**{f.name: getattr(args, f.name) for f in fields(RunConfig)})
    refuse_early(config)
    if args.out is not None:
        make_folder(args.out, "--out")
    with start(args.parallel) as parallel:
        corpus = parallel.first(lambda: corpus_from(args, config.model, progress=parallel.leads))
        late = [name for name in (*_OF_OUT, "parallel") if name in args.given]
        if late and parallel.leads and finished(config, corpus, args.out):
            names = ", ".join("--" + name.replace("_", "-") for name in late)
            print(f"note: without effect, {args.out} is finished: {names}; take another --out")
        bars = RunProgress(config.steps) if parallel.leads else nullcontext()
        with bars as bar:
            row = train(
                config,
                corpus,
                out=args.out,
                progress=bar.start(config.optimizer, config.steps) if bar else None,
                save_every=args.save_every,
                eval_every=args.eval_every,
                parallel=parallel,
                keep=args.keep,
                skip_damaged=args.skip_damaged,
            )
    return _print_result(config, row) if parallel.leads else int(row["diverged"])


def _print_result(config: RunConfig, row: dict[str, Any]) -> int:
    if row["diverged"]:
        print(f"{config.optimizer} diverged; try a smaller --lr than {config.lr:g}")
        return 1
    print(
        f"{config.optimizer}: validation perplexity {perplexity(row['valid_loss']):.2f}, "
        f"test {perplexity(row['test_loss']):.2f}, {row['tokens_per_second']:,.0f} tokens/s"
    )
    if torch.cuda.is_available() and row.get("step_ms") and row["optimizer_ms"]:
        print(speed_text(row, get_config(config.model)))
    return 0
