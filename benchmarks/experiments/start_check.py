"""Check of starting values: the runs of a task, each method at its start and around it."""

import json
from collections.abc import Iterator, Mapping

from benchmarks.common.files import RESULTS, read_json
from benchmarks.experiments.plan import Entry, Plan, Row, choose, settings, tried, tuned_text
from benchmarks.experiments.run_queue import Session
from benchmarks.experiments.start_tasks import TASKS
from benchmarks.experiments.tuning import FACTOR, Search, Values, middle, scaled
from benchmarks.training.models import make_model
from optimzoo import param_groups, starting_values
from optimzoo.tuned_rates import ROLE_RATES, VARIANT, tuned_settings

PROTOCOL = "tuned"  # of the plan whose methods and labels these are


class Check:
    """Runs of a task: each method at its starting values, and with rates around them.

    Starting values are for somebody who has tuned AdamW. So AdamW is tuned first, all its rates on
    one line and then each, until half and twice are worse; taken is the middle of what is nearly as
    good as the best (`middle`).

    Attributes:
        adamw_lr: AdamW's tuned rates by role; vectors follow the hidden weights.
        starts: starting values by method, where rows were made with them; else today's.
        roles: what has a rate of its own.
    """

    def __init__(
        self,
        name: str,
        adamw_lr: Mapping[str, float] | None = None,
        starts: Mapping[str, Values] | None = None,
    ) -> None:
        self.starts = dict(starts or {})
        self.name, self.task = name, TASKS[name]
        self.adamw_lr = dict(adamw_lr or {"hidden": self.task.adamw_lr})
        self.plan = Plan("nano")
        self.plan.values |= self.task.sizes
        self.groups = param_groups(make_model(self.task.sizes["model"], device="meta"))
        present = {group["role"] for group in self.groups}
        self.roles = [role for role in ROLE_RATES if role in present and role != "vector"]
        self.path = RESULTS / f"starting-values-{name}.json"

    def methods(self) -> list[str]:
        """Return the plan's methods that have starting values: tuned, to the end, and not SGD."""
        records = [r for setting in tuned_settings().values() for r in setting["methods"]]
        calls = [(r["optimizer"], r["variant"]) for r in records]
        methods = self.plan.methods.items()
        return [m for m, r in methods if PROTOCOL in r and self._call(m) in calls]

    def _call(self, method: str) -> tuple[str, Values]:
        """Return the optimizer's name and the options with which it is tuned apart."""
        record = self.plan.methods[method]
        hyper = record.get("hyper", {})
        return record.get("optimizer", method), {key: hyper[key] for key in VARIANT if key in hyper}

    def start(self, method: str) -> Values:
        """Return a method's starting values, as `RunConfig` and its optimizer take them."""
        if method in self.starts:
            return self.starts[method]
        name, variant = self._call(method)
        options = {"adamw_lr": self.adamw_lr, "batch_tokens": self.task.batch_tokens, **variant}
        start = starting_values(name, self.groups, **options)
        return {"clip": start.clip or 0.0, "warmup": start.warmup, **start.options}

    def moved(self) -> list[str]:
        """Return the methods whose starting values are others today than those of the rows."""
        today = Check(self.name, self.adamw_lr)
        methods = [m for m in self.starts if m in today.methods()]
        return [m for m in methods if _text(today.start(m)) != _text(self.starts[m])]

    def points(self, method: str) -> Iterator[Values]:
        """Yield the starting values, and half and twice of each role's rate and of all three."""
        start = self.start(method)
        rates = [ROLE_RATES[role] for role in self.roles]
        yield start
        for axis in ([rate] for rate in rates):
            yield from (scaled(start, axis, factor) for factor in (FACTOR, 1 / FACTOR))
        yield from (scaled(start, rates, factor) for factor in (FACTOR, 1 / FACTOR))

    def entry(self, method: str, values: Values, seed: int) -> Entry:
        """Return the run of a method with these values."""
        return self.plan.entry(method, PROTOCOL, seed, **values)

    def is_start(self, row: Row) -> bool:
        """Return whether a row was made with the method's starting values."""
        entry = self.entry(row["method"], self.start(row["method"]), row["config"]["seed"])
        return tuned_text(settings(row)) == tuned_text(settings({"config": vars(entry.config)}))

    def tune_adamw(self, session: Session) -> None:
        """Find the rates that AdamW wants here, with seed 0."""
        keys = {ROLE_RATES[role]: role for role in self.roles}
        start = self.start("adamw")
        at: Values = {key: start[key] for key in keys}
        for each in (False, True):
            search = Search.of_rates(at, list(keys)) if each else Search(at, (tuple(keys),))
            while points := search.next(results := tried(session.rows, "adamw", PROTOCOL, search)):
                entries = []
                for point in points:
                    self.adamw_lr = {role: point[key] for key, role in keys.items()}
                    entries.append(self.entry("adamw", self.start("adamw") | point, 0))
                session.run(entries, test=True)
            at = min(results, key=lambda point: point[1])[0]
        centre = middle(results)
        self.adamw_lr = {role: float(f"{centre[key]:.3g}") for key, role in keys.items()}

    def run(self, session: Session, methods: list[str], seeds: int) -> list[Row]:
        """Train the grid of each method with seed 0; then the start and the best with the rest."""
        self.tune_adamw(session)
        session.rows = []  # those that are of the grid are read again
        grid = [self.entry(m, point, 0) for m in methods for point in self.points(m)]
        session.run(grid, test=True)
        rows = list(session.rows)
        rest: list[Entry] = []
        for method in methods:
            best = settings(choose(rows, method, PROTOCOL))
            same = {key: value for key, value in self.start(method).items() if key not in best}
            for seed in range(1, seeds):
                pair = (self.start(method), {**same, **best})
                rest += {e.key: e for e in (self.entry(method, v, seed) for v in pair)}.values()
        return session.run(rest, test=True) if rest else rows


def stored() -> Iterator[tuple[Check, list[Row]]]:
    """Yield the tasks that have committed rows."""
    for name in TASKS:
        path = Check(name).path
        if path.exists():
            record = read_json(path)
            yield Check(name, record["adamw_lr"], record["starts"]), record["rows"]


def _text(values: Values) -> str:
    return json.dumps(values, sort_keys=True)
