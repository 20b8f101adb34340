"""The tuned values that `optimzoo.starting_values` ships, from the committed rows."""

import json
from typing import Any

import torch

from benchmarks.common.files import ROOT
from benchmarks.common.tables import Table
from benchmarks.experiments.plan import Plan, settings, tried
from benchmarks.experiments.tuning import Values, is_rate, middle
from optimzoo.models.llama import Llama, get_config
from optimzoo.tuned_rates import (
    ROLE_RATES,
    VARIANT,
    StartingValues,
    model_width,
    starting_values,
    tuned_settings,
)

PATH = ROOT / "optimzoo" / "tuned_rates.json"
PLANS = ("nano", "nano-1k", "nano-4k", "nano-16k")
KEPT = ("relative_damping", "damping")  # options that its rates belong to


def text() -> str:
    """Return the file: by comparison its batch, width, and each method's values.

    They are those of the best run of its search, with rates in the `middle` of the nearly as good.

    A method is left out where one of its best rates is at an edge of what was tried, and a
    comparison where AdamW is; SGD, whose rates are of the gradient's size.
    """
    by_plan: dict[str, Any] = {}
    for plan in map(Plan, PLANS):
        rows = plan.tuning_rows("adamw")  # and all the other methods'
        if not rows:
            continue
        tuned = [m for m in plan.methods if not plan.edges(m, "tuned", rows)]
        methods = [m for m in tuned if m != "sgd"]
        if "adamw" in methods:
            by_plan[plan.name] = _setting(plan, methods)
    return json.dumps(by_plan, indent=1) + "\n"


def table() -> Table:
    """Return the table of the shipped methods: rates over AdamW's, options, comparisons."""
    lines = {}
    for comparison in tuned_settings().values():
        for record in comparison["methods"]:
            name, variant = record["optimizer"], record["variant"]
            label = ", ".join([f"`{name}`", *(f"`{k}={v!r}`" for k, v in variant.items())])
            lines[label] = _line(label, starting_values(name, adamw_lr=1.0, **variant))
    headers = ("method", "hidden", "embedding", "head", "vectors", "clip", "β or momentum")
    # Without the quotes apollo comes before apollo_mini.
    labels = sorted(lines, key=lambda label: label.replace("`", ""))
    return Table((*headers, "decay", "from"), [lines[label] for label in labels])


def example(name: str) -> str:
    """Return the code for a method at a width of 4,096, Llama-3.1-8B's, where AdamW has 3e-4."""
    with torch.device("meta"):
        model = Llama(get_config("7b"))
    run: dict[str, Any] = {"adamw_lr": 3e-4, "batch_tokens": 131_072, "steps": 10_000}
    return f"```python\n{starting_values(name, model, **run)}\n```"


def _line(label: str, start: StartingValues) -> list[str]:
    options = start.options
    rates = [f"{options[key]:.3g}" for key in ROLE_RATES.values()]
    average = options.get("momentum", options.get("betas", options.get("other_betas", "")))
    decay = options.get("weight_decay", "")
    shown = [str(value).strip("()") for value in (start.clip or "none", average, decay)]
    return [label, *rates, *shown, ", ".join(start.settings)]


def _setting(plan: Plan, methods: list[str]) -> dict[str, Any]:
    with torch.device("meta"):
        width = model_width(Llama(get_config(plan.values["model"])))
    head = {"batch_tokens": plan.batch_tokens, "steps": plan.values["steps"], "width": width}
    return head | {"methods": [_record(plan, method) for method in methods]}


def _record(plan: Plan, method: str) -> dict[str, Any]:
    config = plan.chosen(method, "tuned", 0).config
    search = plan.search(method, "tuned")
    values = settings({"config": vars(config)})
    values |= _rounded(middle(tried(plan.tuning_rows(method), method, "tuned", search)))
    hyper = config.hyper
    rates = {key: values.pop(key, hyper.get(key)) for key in ROLE_RATES.values()}
    return {
        "optimizer": config.optimizer,
        "variant": {key: hyper[key] for key in VARIANT if key in hyper},
        "hyper": {key: hyper[key] for key in KEPT if key in hyper},
        "values": rates | values,
    }


def _rounded(values: Values) -> Values:
    return {key: float(f"{v:.3g}") if is_rate(key) else v for key, v in values.items()}
