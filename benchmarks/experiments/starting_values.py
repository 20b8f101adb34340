"""Starting values beside each method's own best, on tasks that they were not fitted to."""

import argparse
import math
from dataclasses import dataclass

from benchmarks.common.files import make_folder, read_json, write_json
from benchmarks.common.provenance import made_on
from benchmarks.common.tables import Table
from benchmarks.experiments.fine_tuning import add_task_arguments, pretrain
from benchmarks.experiments.plan import Row, choose, settings, tuned_text
from benchmarks.experiments.run_queue import Session, merged, settle_run_arguments, slim
from benchmarks.experiments.significance import Difference, by_method, mean_loss, paired
from benchmarks.experiments.start_check import PROTOCOL, Check
from benchmarks.experiments.start_tasks import TASKS
from benchmarks.experiments.tuning import WITHIN, role_rates
from benchmarks.training.cli import corpus_from
from optimzoo.options import refuse
from optimzoo.tuned_rates import ROLE_RATES


@dataclass(frozen=True)
class Outcome:
    """Starting values of one method beside the best of the grid around them, over the seeds."""

    method: str
    start: Row
    best: Row
    perplexities: tuple[float, float]
    difference: Difference

    @property
    def within(self) -> bool:
        """Return whether the perplexity at the start is at most 2 % above the best."""
        return math.expm1(self.difference.mean) <= WITHIN


def outcomes(check: Check, rows: list[Row]) -> list[Outcome]:
    """Return what came out for each method, that with the lowest perplexity first."""
    results = []
    for method, mine in by_method(rows).items():
        best = settings(choose([r for r in mine if r["config"]["seed"] == 0], method, PROTOCOL))
        at_best = [row for row in mine if tuned_text(settings(row)) == tuned_text(best)]
        at_start = [row for row in mine if check.is_start(row)]
        difference = paired(at_start, at_best)
        assert difference is not None
        perplexities = math.exp(mean_loss(at_start)), math.exp(mean_loss(at_best))
        results.append(Outcome(method, at_start[0], at_best[0], perplexities, difference))
    return sorted(results, key=lambda outcome: outcome.perplexities[0])


def table(check: Check, rows: list[Row]) -> Table:
    """Return the table of starting values beside the best."""
    body = []
    for outcome in outcomes(check, rows):
        error = outcome.difference.error
        percent = f"{100 * math.expm1(outcome.difference.mean):+.1f}"
        percent += "" if error is None else f" ±{100 * error:.1f}"
        percent += " %" if outcome.within else " %, far"
        rates = "/".join(f"{rate:g}" for rate in role_rates(settings(outcome.start)))
        both = [f"{value:.3f}" for value in outcome.perplexities]
        label = check.plan.label(outcome.method)
        body.append([label, rates, *both, _moved(outcome), percent])
    headers = ("method", "hidden / embedding / head", "start", "best", "best at", "difference")
    return Table(headers, body)


def _moved(outcome: Outcome) -> str:
    """Return how the best point of the grid differs from the start, as ``head x 2``."""
    roles = [role for role in ROLE_RATES if role != "vector"]
    rates = [role_rates(settings(row)) for row in (outcome.best, outcome.start)]
    pairs = zip(roles, *rates, strict=True)
    ratios = {role: best / start for role, best, start in pairs if best != start}
    if not ratios:
        return "start"
    which = next(iter(ratios)) if len(ratios) == 1 else "all"
    return f"{which} x {next(iter(ratios.values())):.2g}"


def summary(check: Check, rows: list[Row]) -> str:
    """Return in one sentence how many methods start within 2 % of their best."""
    results = outcomes(check, rows)
    near = sum(outcome.within for outcome in results)
    seeds = sorted({outcome.difference.seeds for outcome in results})
    return (
        f"{near} of {len(results)} methods start within {100 * WITHIN:g} % of the best perplexity "
        f"of a grid around the start ({' or '.join(map(str, seeds))} seeds)"
    )


def adamw_text(check: Check) -> str:
    """Return AdamW's tuned rates in words."""
    rates = "/".join(f"{check.adamw_lr[role]:g}" for role in check.roles)
    return f"AdamW's tuned rates ({'/'.join(check.roles)}) are {rates}"


def moved_text(check: Check) -> str:
    """Return which methods start elsewhere today, as the end of a sentence; empty if none does."""
    labels = [check.plan.label(method) for method in check.moved()]
    of = "" if len(labels) == len(check.starts) else f" of {', '.join(labels)}"
    return f"; since these runs the starting values{of} have moved" if labels else ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python -m benchmarks starting-values`."""
    parser.add_argument("task", choices=list(TASKS))
    add_task_arguments(parser, "runs/starting-values")


def main(args: argparse.Namespace) -> int:
    """Run what is missing and print the table."""
    settle_run_arguments(args)
    check = Check(args.task)
    methods = check.plan.select(args.optimizers) if args.optimizers else check.methods()
    if "sgd" in methods:
        raise ValueError("sgd has no starting values: its rates are of the gradient's size")
    make_folder(args.out, "--out")
    if check.task.pretrained:
        pretrain(check, args)
    else:
        refuse(args, ["then"], args.given, "the task has one text; leave {option} out")
    session = Session(args, check.plan, corpus_from(args, check.task.sizes["model"]))
    rows = check.run(session, methods, args.seeds)
    slim_rows = [slim(row, "curve", "valid_curve") for row in rows]
    starts = {method: check.start(method) for method in methods}
    record = {"adamw_lr": check.adamw_lr, "starts": starts, "rows": slim_rows}
    write_json(args.out / f"{args.task}.json", record)
    if args.store:
        before = read_json(check.path) if check.path.exists() else {"starts": {}}
        both = {"starts": before["starts"] | starts, "rows": merged(check.path, slim_rows)}
        write_json(check.path, record | both)
    table(check, rows).print()
    print(f"{summary(check, rows)}; {adamw_text(check)}; {made_on(rows[0]['provenance'])}")
    return 0
