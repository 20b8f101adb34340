"""An optimizer or a model of one's own in a comparison, tuned as hard as the plan's methods."""

import argparse
import csv
import hashlib
import inspect
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.common.files import read_json, write_atomic, write_json
from benchmarks.experiments.plan import PROTOCOLS, TUNED, Plan, Row, near
from benchmarks.experiments.tuning import is_rate
from benchmarks.training.cli import MODEL, as_json
from benchmarks.training.metrics import perplexity
from benchmarks.training.models import config_sha256
from benchmarks.training.own import is_own, load_class, source_sha256
from benchmarks.training.run import refuse_early
from optimzoo.models import get_config, is_config


class _OfOptimizer(argparse.Action):
    """An option of the `--optimizer` before it."""

    def __call__(self, parser: Any, args: Any, values: Any, option: str | None = None) -> None:
        if not args.optimizer:
            parser.error(f"{option} is of the --optimizer before it; there is none")
        args.optimizer[-1][1][self.dest] = values


def add_own_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `compare` for an optimizer and a model of one's own."""
    parser.add_argument(
        "--optimizer",
        action="append",
        default=[],
        type=lambda where: (where, {}),
        metavar="WHERE",
        help="one's own, package.module:Class or FILE.py:Class, beside those of the plan; again "
        "for another",
    )
    for name, text in {
        "hyper": "its options, which are not tuned, JSON",
        "groups": "options of a role's weights, JSON, as in train",
        "start": "where its search starts, JSON; default: where AdamW's does",
    }.items():
        options: Any = {"action": _OfOptimizer, "default": argparse.SUPPRESS, "type": as_json}
        parser.add_argument(f"--{name}", metavar="JSON", help=text, **options)
    parser.add_argument("--model", help=f"{MODEL}; default: the plan's")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the rows as CSV, too")


def set_model(plan: Plan, name: str, out: Path) -> None:
    """Give a plan another model; its methods are tuned for that in ``out``.

    Raises:
        ValueError: an unknown model, or a plan that is tuned by another one.
    """
    _refuse_tuned_by(plan)
    key = Path(name).stem
    if is_config(name):
        key += f"-{config_sha256(name)[:8]}"
    else:
        get_config(name)
    plan.values["model"] = name
    plan.tune_paths = dict.fromkeys(plan.methods, out / f"{plan.name}-{key}-tune.json")


def add_own(plan: Plan, where: str, out: Path, **options: Any) -> str:
    """Add an optimizer of one's own to a plan, tuned in ``out``; return its name there.

    The name has a hash of the class's source and the options: others are another method.

    Raises:
        ValueError: a class that is none or refuses its options, or a plan without a search to take.
    """
    _refuse_tuned_by(plan)
    if not is_own(where):
        raise ValueError(
            f"--optimizer {where} is no class, as package.module:Class or FILE.py:Class; those of "
            "the plan are --optimizers"
        )
    options = {name: options.get(name, {}) for name in ("hyper", "groups", "start")}
    for name, value in options.items():
        if not isinstance(value, dict):
            raise ValueError(f"--{name} {json.dumps(value)} is no JSON object, as {{...}}")
    record = _record(plan, where, **options)
    fixed = [source_sha256(where), options["hyper"], options["groups"]]
    label = where.rpartition(":")[2]
    key = hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()[:8]
    name = f"{label}-{key}"
    if any(method["label"] == f"{label} (own)" for method in plan.methods.values()):
        label = name
    record["label"] = f"{label} (own)"
    for searched in {plan, plan.base}:
        searched.methods[name] = record
        searched.tune_paths[name] = out / f"{searched.name}-tune.json"
    if plan.tune_paths.keys() >= plan.methods.keys():  # with a model of one's own
        plan.tune_paths[name] = next(iter(plan.tune_paths.values()))
    refuse_early(plan.tuning_runs(name, "tuned", [])[0].config)
    return name


def _refuse_tuned_by(plan: Plan) -> None:
    if "tuned_by" in plan.values:
        by = plan.values["tuned_by"]
        raise ValueError(f"plan {plan.name} is tuned by plan {by}, for its own methods; take that")


def _record(plan: Plan, where: str, hyper: Row, groups: Row, start: Row) -> Row:
    """Return a method's record: AdamW's search, with the choices that other methods have.

    The choices are those of clipping, and of each of betas, momentum and weight decay that the
    class takes by this name. What ``hyper`` has is not tuned.
    """
    methods = plan.base.methods
    adamw = methods.get("adamw", {})
    if "start" not in adamw.get("tuned", {}):
        raise ValueError(f"plan {plan.name} has no search to take over; take --plan nano")
    parameters = inspect.signature(load_class(where)).parameters
    betas = getattr(parameters.get("betas"), "default", None)
    three = isinstance(betas, list | tuple) and len(betas) != 2

    def takes(name: str) -> bool:
        tunable = name in parameters and not (name == "betas" and three)
        return name not in hyper and (is_rate(name) or name == "clip" or tunable)

    values: Row = {}
    choices: Row = {}
    for rules in (adamw["tuned"], *(m.get("tuned", {}) for m in methods.values())):
        for name, choice in rules.get("choices", {}).items():
            if name in rules.get("start", {}) and takes(name):
                values.setdefault(name, rules["start"][name])
                choices.setdefault(name, choice)
    rates = {k: v for k, v in adamw["tuned"]["start"].items() if is_rate(k) and takes(k)}
    values = {**rates, **{name: values[name] for name in TUNED if name in values}}
    for name, value in start.items():
        if name not in values:
            raise ValueError(
                f"--start has {name!r}; {near(name, values)}it takes {', '.join(values)}"
            )
        if is_rate(name) and not (isinstance(value, int | float) and value > 0):
            raise ValueError(f"--start has {name} {value!r}; it must be a number above 0")
        if name in choices and value not in choices[name]:
            choices[name] = sorted([*choices[name], value])
    record: Row = {"optimizer": where, "hyper": hyper, "groups": groups}
    for protocol in PROTOCOLS:
        rules = adamw.get(protocol, {})
        if "start" in rules:
            fixed = {**adamw.get("hyper", {}), **rules.get("hyper", {})}
            record[protocol] = {
                "start": {
                    k: start.get(k, v) if is_rate(k) else v for k, v in rules["start"].items()
                },
                "hyper": {k: v for k, v in fixed.items() if takes(k)},
            }
    record["tuned"] |= {"start": {**values, **start}, "choices": choices}
    return record


def write_comparison(plan: Plan, rows: list[Row], out: Path) -> None:
    """Write results.json, which `read_comparison` reads."""
    files = {method: path.name for method, path in plan.tune_paths.items()}
    values = {"name": plan.name, "plan": plan.values, "tuned_in": files, "rows": rows}
    write_json(out / "results.json", values)


def read_comparison(out: Path) -> tuple[Plan, list[Row]]:
    """Return plan and rows of a comparison from its folder.

    Raises:
        ValueError: the folder has no results.json of `compare`.
    """
    try:
        values = read_json(out / "results.json")
        plan = Plan(values["name"])
        plan.values, plan.methods = values["plan"], values["plan"]["methods"]
        plan.base.methods = {**plan.methods, **plan.base.methods}
        plan.tune_paths = {method: out / name for method, name in values["tuned_in"].items()}
        return plan, values["rows"]
    except (OSError, TypeError, KeyError, ValueError) as error:
        raise ValueError(
            f"{out} has no results.json of compare ({error}); give the --out of one"
        ) from None


_OF_ROW = (
    *("tokens", "diverged", "valid_loss", "test_loss", "parameter_bytes", "state_bytes"),
    *("optimizer_ms", "step_ms", "seconds", "precision"),
)


def write_csv(path: Path, comparisons: Iterable[tuple[Plan, list[Row]]]) -> None:
    """Write the rows of comparisons as CSV, one line a run; lists and objects are JSON."""
    lines = [_flat(plan, row) for plan, rows in comparisons for row in rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for line in lines for key in line)))
    writer.writeheader()
    writer.writerows(lines)
    write_atomic(path, text.getvalue())


def _flat(plan: Plan, row: Row) -> Row:
    config = row["config"]
    hyper = config.get("hyper", {})
    others = {name: value for name, value in hyper.items() if name not in TUNED}
    provenance = row["provenance"]
    values = {
        "plan": plan.name,
        "method": plan.label(row["method"]),
        "own": row.get("own", False),
        "protocol": row["protocol"],
        "seed": config["seed"],
        "model": config["model"],
        "optimizer": config["optimizer"],
        **{name: hyper.get(name, config.get(name)) for name in TUNED},
        "hyper": others,
        "groups": config.get("groups", {}),
        "steps": config["steps"],
        "batch_tokens": config["batch_size"] * config["accumulate"] * config["seq_len"],
        **{name: row.get(name) for name in _OF_ROW},
        "test_perplexity": perplexity(row["test_loss"]),
        "corpus": row["corpus"]["name"],
        "corpus_sha256": row["corpus"]["sha256"],
        **{name: provenance.get(name) for name in ("commit", "device", "threads", "torch")},
    }
    return {
        name: json.dumps(value) if isinstance(value, list | tuple | dict) else value
        for name, value in values.items()
    }
