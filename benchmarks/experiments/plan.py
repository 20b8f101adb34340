"""Plans of comparisons: methods, protocols, searches and tuned hyperparameters."""

import difflib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from benchmarks.common import files
from benchmarks.experiments.model_sizes import MODEL_SIZES, ModelSize, rescaled
from benchmarks.experiments.tuning import Search, Values, is_rate, scaled
from benchmarks.training.config import RunConfig

PROTOCOLS = ("tuned", "paper")
_CONFIGS = Path(__file__).with_name("configs")
_RESULTS = files.RESULTS
MOST_ON_A_LINE = 5  # points of a search along one line
# What is tuned, in the order of tables: fields of `RunConfig` and options of optimizers.
TUNED = (
    *("lr", "embedding_lr", "head_lr", "other_lr", "clip"),
    *("betas", "other_betas", "momentum", "weight_decay"),
)
_FIELDS = {field.name for field in fields(RunConfig)}
_NO_SIZES = ("methods", "default", "tuned_by")
Row = dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """One run of a comparison: a method under a protocol, with its configuration."""

    method: str
    protocol: str
    config: RunConfig
    tag: str = ""

    @property
    def key(self) -> str:
        """Return a folder name that identifies this run."""
        values = tuned_text(settings({"config": vars(self.config)})).replace(" ", "-")
        return f"{self.method}-{self.protocol}-{values}-seed-{self.config.seed}{self.tag}"


class Plan:
    """Comparison of methods that a JSON file describes.

    The file names the model, the steps and the batch, and for each method the optimizer's fixed
    hyperparameters (`lowrank` and `groups` too, see `RunConfig`) and, for each protocol, how the
    rest is tuned: where the `Search` starts, the values that are `fixed`, the `choices` of options,
    and whether the learning rates change `together`, on one line. `tuned`: a learning rate for each
    role, clipping, Adam's betas or momentum, weight decay. `paper`: one learning rate, no clipping
    (SCALE's vectors at the 2e-2 of its published scripts).

    A plan of another size is one of these with a size for `nano` in its name (`60m`,
    `9m-ablation`, `nano-16k`, see `MODEL_SIZES`): the same methods, searched around what is best
    on nano, at most sizes with all learning rates on one line.

    A plan may take the tuned values of another, `tuned_by`, for each method those of the method
    `tuned_as`; a method's `run` has further options of `RunConfig`.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.size, file = _size_of(name)
        self.values: Row = files.read_json(file)
        self.methods: Row = self.values["methods"]
        self.base = Plan(file.stem) if self.size else self
        if self.size:
            self.values |= self.size.sizes
        self.tune_path = _RESULTS / f"{self.values.get('tuned_by', name)}-tune.json"
        self.tune_paths: dict[str, Path] = {}  # by method: those that are not tuned for every user
        self.results_path = _RESULTS / f"{name}-compare.json"

    @classmethod
    def stored(cls) -> "list[Plan]":
        """Return the plans that have committed rows."""
        return [
            cls(p.stem.removesuffix("-compare")) for p in sorted(_RESULTS.glob("*-compare.json"))
        ]

    def tune_path_of(self, method: str) -> Path:
        """Return the file that keeps the rows of a method's search."""
        return self.tune_paths.get(method, self.tune_path)

    def tuning_rows(self, method: str) -> list[Row]:
        """Return the rows of the file that keeps a method's search, if there is one."""
        path = self.tune_path_of(method)
        return read_rows(path) if path.exists() else []

    @property
    def batch_tokens(self) -> int:
        """Return the tokens of a step."""
        values = self.values
        return int(values["batch_size"] * values.get("accumulate", 1) * values["seq_len"])

    def label(self, method: str) -> str:
        """Return the method's name in tables."""
        return str(self.methods[method]["label"])

    def select(self, methods: Iterable[str] | None) -> list[str]:
        """Return the requested methods (`all`: every one), or the plan's defaults.

        Raises:
            ValueError: the plan does not have a method; the message has the nearest names.
        """
        chosen = list(methods or self.values.get("default", self.methods))
        if chosen == ["all"]:
            chosen = list(self.methods)
        for method in chosen:
            if method not in self.methods:
                raise ValueError(
                    f"unknown method {method!r}: {near(method, self.methods)}"
                    f"plan {self.name} has {', '.join(self.methods)}"
                )
        return chosen

    def pairs(self, methods: Iterable[str], protocols: Iterable[str]) -> list[tuple[str, str]]:
        """Return the pairs of method and protocol that the plan has."""
        return [(m, p) for p in protocols for m in methods if p in self.methods[m]]

    def entry(self, method: str, protocol: str, seed: int, **values: Any) -> Entry:
        """Return one run; ``values`` are fields of `RunConfig`, or options of the optimizer."""
        record = self.methods[method]
        rules = record[protocol]
        sizes = {k: v for k, v in self.values.items() if k not in _NO_SIZES}
        hyper = {**record.get("hyper", {}), **rules.get("hyper", {})}
        if self.size:
            hyper, record = rescaled(hyper, self.size), rescaled(record, self.size)
        name = record.get("optimizer", method)
        options: Row = {"hyper": hyper, "seed": seed}
        options |= {name: record.get(name, {}) for name in ("lowrank", "groups")}
        sizes |= record.get("run", {})
        hyper |= {name: values.pop(name) for name in list(values) if name not in _FIELDS}
        config = RunConfig(optimizer=name, **{**options, **sizes, **values})
        tag = "" if config.steps == self.values["steps"] else f"-steps{config.steps}"
        return Entry(method, protocol, config, tag)

    def search(self, method: str, protocol: str) -> Search:
        """Return the search for a method's tuned values."""
        rules = self.methods[method][protocol]
        start = {**rules.get("start", {}), **rules.get("fixed", {})}
        rates = tuple(name for name in rules.get("start", {}) if is_rate(name))
        one_line = rules.get("together", False)
        if self.size:
            start = self.base.centre(method, protocol)
            rates = rates and tuple(name for name in start if is_rate(name))
            one_line = self.size.one_line
            for name in rates:
                start = scaled(start, [name], self.size.centre[name != "lr"])
        if one_line:
            return Search(start, (rates,), most=MOST_ON_A_LINE) if rates else Search(start)
        return Search.of_rates(start, rates, **rules.get("choices", {}))

    def tuning_runs(self, method: str, protocol: str, rows: list[Row]) -> list[Entry]:
        """Return the runs that tuning needs next, given its rows so far; none: it has ended.

        Raises:
            ValueError: another plan is tuned for this one.
        """
        if "tuned_by" in self.values:
            by = self.values["tuned_by"]
            raise ValueError(f"plan {self.name} is tuned by plan {by}; run compare --tune on that")
        search = self.search(method, protocol)
        points = search.next(tried(rows, method, protocol, search))
        steps = {"steps": min(self.size.tuning_steps, self.values["steps"])} if self.size else {}
        return [self.entry(method, protocol, 0, **point, **steps) for point in points]

    def edges(self, method: str, protocol: str, rows: list[Row]) -> list[str]:
        """Return the learning rates, and those together, that are best at the edge of the tried."""
        if "tuned_by" in self.values:
            tuned_as = self.methods[method].get("tuned_as", method)
            return Plan(self.values["tuned_by"]).edges(tuned_as, protocol, rows)
        search = self.search(method, protocol)
        return search.edges(tried(rows, method, protocol, search))

    def best(self, method: str, protocol: str) -> Row:
        """Return the tuned values: those of the committed row with the lowest validation loss.

        A plan that fixes all of them needs no tuning.

        Raises:
            ValueError: the plan has not been tuned.
        """
        if "tuned_by" not in self.values:
            search = self.search(method, protocol)
            if not search.axes:
                return search.start
        rows = self.tuning_rows(method)
        if not rows:
            which = f" for {self.label(method)}" if method in self.tune_paths else ""
            raise ValueError(
                f"plan {self.name} has no tuned values{which}; run compare --tune first"
            )
        return settings(choose(rows, self.methods[method].get("tuned_as", method), protocol))

    def centre(self, method: str, protocol: str) -> Row:
        """Return the tuned values where there are any, else the start of their search."""
        if rows := rows_of(self.tuning_rows(method), method, protocol):
            return settings(choose(rows, method, protocol))
        return self.search(method, protocol).start

    def chosen(self, method: str, protocol: str, seed: int) -> Entry:
        """Return the run at the tuned values."""
        return self.entry(method, protocol, seed, **self.best(method, protocol))


def _size_of(name: str) -> tuple[ModelSize | None, Path]:
    """Split a plan's name into its model size, None if it is the file's, and its file."""
    names = sorted(path.stem for path in _CONFIGS.glob("*.json"))
    if name in names:
        return None, _CONFIGS / f"{name}.json"
    for size in sorted(MODEL_SIZES, key=len, reverse=True):
        base = "full" if size.endswith("-full") else name.replace(size, "nano", 1)
        if name.startswith(size) and base in names:
            return MODEL_SIZES[size], _CONFIGS / f"{base}.json"
    raise ValueError(f"unknown plan {name!r}: {near(name, names)}there are {', '.join(names)}")


def near(name: str, choices: Iterable[str]) -> str:
    """Return a "did you mean" question with similar names, or an empty string."""
    names = difflib.get_close_matches(name, list(choices), n=3, cutoff=0.3)
    return f"did you mean {' or '.join(names)}? " if names else ""


def tuned_text(values: Row) -> str:
    """Format tuned values, as in ``lr 0.001 embedding 0.032 clip 1``."""

    def text(value: Any) -> str:
        return ",".join(f"{v:g}" for v in (value if isinstance(value, list | tuple) else [value]))

    return " ".join(f"{k.removesuffix('_lr')} {text(v)}" for k, v in values.items())


def run_key(fingerprint: Row) -> str:
    """Return a fingerprint as a key, equal for equal settings on the same text."""
    return json.dumps(fingerprint, sort_keys=True)


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a results file, which is read once as long as it stays the same."""
    stat = path.stat()
    return _read_rows(path, stat.st_mtime_ns, stat.st_size)


@lru_cache(16)
def _read_rows(path: Path, *_: int) -> list[Row]:
    return files.read_json(path)["rows"]


def rows_of(rows: list[Row], method: str, protocol: str) -> list[Row]:
    """Return the rows of a method and protocol."""
    return [r for r in rows if (r["method"], r["protocol"]) == (method, protocol)]


def committed_rows() -> dict[str, Row]:
    """Return the committed rows by `run_key`; a tested row replaces an untested one."""
    rows: dict[str, Row] = {}
    for pattern in ("*-tune.json", "*-compare.json"):
        for path in sorted(_RESULTS.glob(pattern)):
            rows |= {run_key(row["fingerprint"]): row for row in read_rows(path)}
    return rows


def settings(row: Row, names: Iterable[str] = TUNED) -> Row:
    """Return a row's tuned values: learning rates, clipping, options of its optimizer."""
    config = {**row["config"].get("hyper", {}), **row["config"]}
    return {name: config[name] for name in names if config.get(name) is not None}


def tried(
    rows: list[Row], method: str, protocol: str, search: Search
) -> list[tuple[Values, float]]:
    """Return the points of a search that have rows, each with its validation loss."""
    points = []
    for row in rows_of(rows, method, protocol):
        values, loss = settings(row, search.start), row["valid_loss"]
        if len(values) == len(search.start):
            points.append((values, math.inf if loss is None else float(loss)))
    return points


def choose(rows: list[Row], method: str, protocol: str) -> Row:
    """Return the row of a method and protocol with the lowest validation loss.

    Raises:
        ValueError: there is no row, or all diverged.
    """
    mine = rows_of(rows, method, protocol)
    finite = [r for r in mine if r["valid_loss"] is not None]
    if not finite:
        problem = "diverged everywhere" if mine else "has no tuning row"
        raise ValueError(f"{method} ({protocol}) {problem}; run compare --tune, or start lower")
    return min(finite, key=lambda r: float(r["valid_loss"]))
