"""``optimzoo memory``: what fits on a GPU, and what a script has taken."""

import argparse
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from optimzoo.memory import report
from optimzoo.memory.account import account
from optimzoo.memory.measure import measure_script
from optimzoo.memory.options import add_arguments as add_arguments
from optimzoo.memory.options import parse_hyper, parse_size, refuse_for_own_step, resolve
from optimzoo.memory.plan import CHANGES, Planner
from optimzoo.memory.simulate import simulate
from optimzoo.memory.sources import convert_model, load_function, load_model
from optimzoo.models import find_public
from optimzoo.registry import get_info, list_optimizers

# Without defaults, since they are choices of training; bytes do not depend on them.
_REQUIRED: dict[str, dict[str, Any]] = {"adams": {"l1": 1e-4, "total_steps": 1000}}


@dataclass
class _Plan:
    """Plan of a page: the options, the model, and the hyperparameters of each method."""

    args: argparse.Namespace
    planners: list[Planner]
    hypers: dict[str, dict[str, Any]]
    title: str
    notes: list[str]
    refused: dict[str, str]
    fixed_batch: int | None
    planned: bool = False  # whether a method is, on some number of GPUs

    @property
    def planner(self) -> Planner:
        """Return the planner of the first number of shards."""
        return self.planners[0]

    @property
    def from_module_alone(self) -> bool:
        """Return whether the model is the user's own and is called as a language model."""
        return self.args.module is not None and self.planner.step is None

    def methods(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield each method's name and hyperparameters, and show the progress."""
        for name, hyper in self.hypers.items():
            _progress(f"{name} ...")
            yield name, hyper
        _progress("")

    def refuse(self, name: str, error: Exception) -> None:
        """Record why a method is left out; raise if no method is left.

        Raises:
            ValueError: no method is left.
        """
        why = report.one_line(error)
        if isinstance(error, TypeError) and self.args.hyper:
            why = f"--hyper {' '.join(self.args.hyper)}: {name} takes no such value; {why}"
        if self.from_module_alone and "unexpected keyword argument" in why:
            why += "; or let the function return the module and a function from it to its loss"
        self.refused[name] = why
        if len(self.refused) == len(self.hypers) and not self.planned:
            first, why = next(iter(self.refused.items()))
            _progress("")
            raise ValueError(why if len(self.hypers) == 1 else f"{first}: {why}") from error


def main(args: argparse.Namespace) -> int:
    """Print the page; return 1 if a script failed or nothing fits."""
    raw_args, args = args, resolve(args)
    try:
        if args.script is not None:
            return _measure(args)
        plan = _plan(raw_args, args)
        return _fits(plan) if args.fits is not None else _table(plan)
    except BaseException:
        _progress("")
        raise


def _plan(raw_args: argparse.Namespace, args: argparse.Namespace) -> _Plan:
    names = [get_info(n).name for n in args.optimizer if n != "all"]
    names = list(dict.fromkeys(names)) if "all" not in args.optimizer else list_optimizers()
    hypers: dict[str, dict[str, Any]] = {name: dict(_REQUIRED.get(name, {})) for name in names}
    notes = []
    for pair, takers in parse_hyper(args.hyper, names).items():
        for name, hyper in takers.items():
            hypers[name] |= hyper
        if len(takers) < len(names):
            key, who = pair.partition("=")[0], ", ".join(takers)
            notes.append(f"{pair} is taken by {who} alone; the other methods here have no {key}.")
    if args.module is not None:
        model, step = load_function(args.module)
    else:
        model, step = load_model(args.model, args.seq), None
    if step is not None:
        refuse_for_own_step(raw_args, args.module)
    if args.convert is not None:
        notes.append(convert_model(model, args.convert))
    settings = {"seq": args.seq, "step": step, "device": args.device}
    settings["dtype"] = getattr(torch, args.dtype)
    fixed = 1 if step is not None else raw_args.batch
    planners = [Planner(model, shards=shards, **settings) for shards in sorted(set(args.shards))]
    return _Plan(args, planners, hypers, _title(args, model), notes, {}, fixed)


def _title(args: argparse.Namespace, model: nn.Module) -> str:
    public = find_public(args.model or "")
    name = public.repository if public else report.cut_left(args.model or args.module, 40)
    if public is None and (args.module or name.endswith(".json") or "/" in name):
        name = f"{type(model).__name__} ({name})"
    count = report.count_of(sum(p.numel() for p in model.parameters()))
    shards = sorted(set(args.shards))
    if len(shards) > 1:
        several = f"{', '.join(map(str, shards[:-1]))} or {shards[-1]}"
        return f"{name}: {count} parameters, {args.dtype}, on each of {several} GPUs"
    one = f", one of {shards[0]} shards" if shards[0] > 1 else ""
    return f"{name}: {count} parameters, {args.dtype}{one}"


def _table(plan: _Plan) -> int:
    args, rows = plan.args, []
    for name, hyper in plan.methods():
        try:
            rows.append(_row(plan, name, hyper))
        except Exception as error:  # torch's optimizers raise what they meet
            plan.refuse(name, error)
    title = plan.title
    if not args.account:
        own_step = plan.planner.step is not None
        notes = ["its own step" if own_step else f"a step of {args.batch} x {args.seq} tokens"]
        notes += ["on a GPU"] if args.device == "cuda" else []
        notes += ["checkpointing"] if args.checkpointing else []
        bound = " (an upper bound)" if len(plan.hypers) > 1 else ""
        notes += [f"release{bound}"] if args.release else []
        title += f"\npeak of {', '.join(notes)}"
    print(report.page(title, rows, plan.refused, plan.notes))
    if len(rows) == 1 and rows[0].peak:
        print("\n" + report.breakdown(rows[0].peak))
    if args.json:
        records = [report.as_record(row) for row in rows]
        value = {"title": title, "methods": records, "refused": plan.refused, "notes": plan.notes}
        report.write_json(args.json, value)
    if args.picture:
        report.write_picture(args.picture, title, report.bars_of(rows))
    return 0


def _row(plan: _Plan, name: str, hyper: dict[str, Any]) -> report.Row:
    args, planner = plan.args, plan.planner
    if args.account:
        model, dtype = planner.model, planner.dtype
        return report.Row(name, account(model, name, dtype=dtype, shards=planner.shards, **hyper))
    settings = {"checkpointing": args.checkpointing, "release": args.release}
    if args.release and len(plan.hypers) == 1:
        counted = account(planner.model, name, dtype=planner.dtype, shards=planner.shards, **hyper)
        simulation = simulate(
            planner.model,
            name,
            batch=args.batch,
            seq=planner.seq,
            step=planner.step,
            dtype=planner.dtype,
            shards=planner.shards,
            device=planner.device,
            **settings,
            **hyper,
        )
        return report.Row(name, counted, simulation.peak)
    method = planner.method(name, **hyper)
    return report.Row(name, method.account, planner.peak(method, args.batch, **settings))


def _fits(plan: _Plan) -> int:
    args = plan.args
    limit, own_step = parse_size(args.fits), plan.planner.step is not None
    settings = {"checkpointing": args.checkpointing, "release": args.release}
    fits = []
    for name, hyper in plan.methods():
        for planner in plan.planners:
            try:
                method = planner.method(name, **hyper)
                fits += list(planner.fits(method, limit, batch=plan.fixed_batch, **settings))
                plan.planned = True
            except Exception as error:  # torch's optimizers raise what they meet
                plan.refuse(name, error)
    order = {change: i for i, change in enumerate(CHANGES)}
    fits.sort(key=lambda f: (f.shards, order[f.setting], f.peak.bytes / f.batch))
    workload = "its own step" if own_step else f"{args.seq} tokens a sequence"
    workload = (
        f"{plan.fixed_batch} x {args.seq} tokens" if plan.fixed_batch and not own_step else workload
    )
    gpu = ", on a GPU" if args.device == "cuda" else ""
    title = f"{plan.title}\nwhat fits in {args.fits} at {workload}{gpu}"
    nothing = f"nothing fits in {args.fits}; {_way_out(plan)}"
    nothing += f"; {args.picture} is not written" if args.picture else ""
    print(
        report.fits_page(title, fits, plan.refused, plan.notes, nothing=nothing, own_step=own_step)
    )
    if args.json:
        value = {"title": title, "fits": [report.asdict(f) for f in fits]}
        report.write_json(args.json, value | {"refused": plan.refused, "notes": plan.notes})
    if args.picture and fits:
        report.write_picture(args.picture, title, report.bars_of_fits(fits, own_step), limit)
    return 0 if fits else 1


def _way_out(plan: _Plan) -> str:
    ways = ["a smaller model"] if plan.planner.step else ["a shorter sequence", "a smaller model"]
    ways = ["more --shards", *ways]
    ways = ["a smaller --batch", *ways] if (plan.fixed_batch or 1) > 1 else ways
    return f"{', '.join(ways[:-1])} or {ways[-1]} may" if ways[1:] else f"{ways[0]} may"


def _measure(args: argparse.Namespace) -> int:
    if not args.script:
        raise ValueError("--script takes a file, and then that file's arguments")
    for option, needs in (("device", args.device == "cuda"), ("snapshot", bool(args.snapshot))):
        if needs and not torch.cuda.is_available():
            value = getattr(args, option)
            text = f"--{option} {value}: torch finds no CUDA device here to measure on"
            raise ValueError(f"{text}; leave --{option} out")
    measurement = measure_script(args.script[0], args.script[1:], snapshot=args.snapshot)
    title = f"{shlex.join(args.script)}, measured"
    print(report.measured_page(title, measurement))
    if args.json:
        report.write_json(args.json, {"title": title, **report.asdict(measurement)})
    if args.picture:
        report.write_picture(args.picture, title, [("", measurement.tensors.by_category)])
    return 1 if measurement.error else 0


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
