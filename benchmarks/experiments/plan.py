"""Plans of comparisons: methods, protocols, grids and tuned hyperparameters."""

import difflib
import itertools
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import files
from benchmarks.experiments.model_sizes import MODEL_SIZES, ModelSize, rescaled
from benchmarks.training.config import RunConfig

PROTOCOLS = ("tuned", "paper")
_CONFIGS = Path(__file__).with_name("configs")
_RESULTS = files.RESULTS
GROWTH = 2  # points by which a grid is extended whose best is at its edge
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
        c = self.config
        other = "" if c.other_lr is None else f"-other{c.other_lr:g}"
        return (
            f"{self.method}-{self.protocol}-lr{c.lr:g}{other}-clip{c.clip:g}-seed{c.seed}{self.tag}"
        )


class Plan:
    """Comparison of methods that a JSON file describes.

    The file names the model, the steps and the batch, and for each method the optimizer's fixed
    hyperparameters (`lowrank` and `groups` too, see `RunConfig`) and, for each protocol, a grid.
    `tuned`: a learning rate for the method's own weights and one for the rest, with clipping, then
    without at the best point. `paper`: one learning rate, no clipping (SCALE's vectors at the 2e-2
    of its published scripts).

    A plan of another size is one of these with a size for `nano` in its name (`60m`,
    `9m-ablation`, see `MODEL_SIZES`): the same methods, and a grid around what is best on nano.

    A plan may take the tuned values of another, `tuned_by`, for each method those of the method
    `tuned_as`; a method's `run` has further options of `RunConfig`.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.size, file = _size_of(name)
        self.values: Row = json.loads(file.read_text(encoding="utf-8"))
        self.methods: Row = self.values["methods"]
        self.base = Plan(file.stem) if self.size else self
        if self.size:
            self.values |= self.size.sizes
        self.tune_path = _RESULTS / f"{self.values.get('tuned_by', name)}-tune.json"
        self.results_path = _RESULTS / f"{name}-compare.json"

    @classmethod
    def stored(cls) -> "list[Plan]":
        """Return the plans that have committed rows."""
        return [
            cls(p.stem.removesuffix("-compare")) for p in sorted(_RESULTS.glob("*-compare.json"))
        ]

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
        protocols = list(protocols)
        return [(m, p) for p in protocols for m in methods if p in self.methods[m]]

    def entry(self, method: str, protocol: str, seed: int, **values: Any) -> Entry:
        """Return one run; ``values`` are its learning rates and clipping."""
        record = self.methods[method]
        rules = record[protocol]
        if rules.get("same_lr"):
            values["other_lr"] = values["lr"]
        sizes = {k: v for k, v in self.values.items() if k not in _NO_SIZES}
        hyper = {**record.get("hyper", {}), **rules.get("hyper", {})}
        if self.size:
            hyper, record = rescaled(hyper, self.size), rescaled(record, self.size)
        name = record.get("optimizer", method)
        options: Row = {"hyper": hyper, "seed": seed}
        options |= {name: record.get(name, {}) for name in ("lowrank", "groups")}
        sizes |= record.get("run", {})
        config = RunConfig(optimizer=name, **{**options, **sizes, **values})
        tag = "" if config.steps == self.values["steps"] else f"-steps{config.steps}"
        return Entry(method, protocol, config, tag)

    def grid(self, method: str, protocol: str) -> list[Entry]:
        """Return the first stage of tuning: the grid's product, or a line at another size.

        Raises:
            ValueError: another plan has the grids.
        """
        if self.size:
            best = self.base.centre(method, protocol)
            steps = min(self.size.grid_steps, self.values["steps"])
            points = [_times(best, self.size.centre, factor) for factor in self.size.factors]
            return [self.entry(method, protocol, 0, **point, steps=steps) for point in points]
        rules = self.methods[method][protocol]
        if "grid" not in rules:
            by = self.values["tuned_by"]
            raise ValueError(f"plan {self.name} is tuned by plan {by}; run compare --tune on that")
        names, axes = list(rules["grid"]), list(rules["grid"].values())
        points = [dict(zip(names, point, strict=True)) for point in itertools.product(*axes)]
        return [self.entry(method, protocol, 0, **point, **rules["fixed"]) for point in points]

    def beyond(self, method: str, protocol: str, rows: list[Row]) -> list[Entry]:
        """If the best learning rate is at the edge of another size's grid, return one point beyond.

        A grid is extended by `GROWTH` points at most.
        """
        points = self.grid(method, protocol)
        mine = [r for r in rows if (r["method"], r["protocol"]) == (method, protocol)]
        if not self.size or len(points) == 1 or len(mine) >= len(points) + GROWTH:
            return []
        best = settings(choose(mine, method, protocol))
        tried = [settings(row)["lr"] for row in mine]
        if best["lr"] not in (min(tried), max(tried)):
            return []
        point = _times(best, (1.0, 1.0), 0.5 if best["lr"] == min(tried) else 2.0)
        return [self.entry(method, protocol, 0, **point, steps=points[0].config.steps)]

    def second(self, method: str, protocol: str, rows: list[Row]) -> list[Entry]:
        """Return the second stage of tuning: variations of the first stage's best point."""
        rules = self.methods[method][protocol] if not self.size else {}
        best = settings(choose(rows, method, protocol))
        return [
            self.entry(method, protocol, 0, **{**best, name: value})
            for name, values in rules.get("then", {}).items()
            for value in values
        ]

    def best(self, method: str, protocol: str) -> Row:
        """Return the tuned values: those of the committed row with the lowest validation loss.

        A grid of one point needs no tuning.

        Raises:
            ValueError: the plan has not been tuned.
        """
        if "tuned_by" not in self.values:
            grid = self.grid(method, protocol)
            if len(grid) == 1:
                return settings({"config": asdict(grid[0].config)})
        if not self.tune_path.exists():
            raise ValueError(f"plan {self.name} has no tuned values; run compare --tune first")
        rows = json.loads(self.tune_path.read_text(encoding="utf-8"))["rows"]
        tuned = self.methods[method].get("tuned_as", method)
        return settings(choose(rows, tuned, protocol))

    def centre(self, method: str, protocol: str) -> Row:
        """Return the centre of other sizes' grids: the tuned values, or this grid's middle."""
        if self.tune_path.exists():
            rows = json.loads(self.tune_path.read_text(encoding="utf-8"))["rows"]
            if any((r["method"], r["protocol"]) == (method, protocol) for r in rows):
                return settings(choose(rows, method, protocol))
        points = self.grid(method, protocol)
        return settings({"config": asdict(points[len(points) // 2].config)})

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


def near(name: str, known: Iterable[str]) -> str:
    """Return a "did you mean" question with similar names, or an empty string."""
    names = difflib.get_close_matches(name, list(known), n=3, cutoff=0.3)
    return f"did you mean {' or '.join(names)}? " if names else ""


def _times(values: Row, centre: tuple[float, float], factor: float) -> Row:
    """Multiply the learning rates of tuned values by the size's multiples and a factor."""
    pairs = zip(("lr", "other_lr"), centre, strict=True)
    rates = {k: values[k] * c * factor for k, c in pairs if values[k] is not None}
    return {**values, **rates}


def same_run(fingerprint: Row) -> str:
    """Return a fingerprint as a key, equal for equal settings on the same text."""
    return json.dumps(fingerprint, sort_keys=True)


def committed_rows() -> dict[str, Row]:
    """Return the committed rows by `same_run`; a tested row replaces an untested one."""
    rows: dict[str, Row] = {}
    for pattern in ("*-tune.json", "*-compare.json"):
        for path in sorted(_RESULTS.glob(pattern)):
            for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
                rows[same_run(row["fingerprint"])] = row
    return rows


def settings(row: Row) -> Row:
    """Return a row's tuned values: learning rates and clipping."""
    return {name: row["config"][name] for name in ("lr", "other_lr", "clip")}


def choose(rows: list[Row], method: str, protocol: str) -> Row:
    """Return the row of a method and protocol with the lowest validation loss.

    Raises:
        ValueError: there is no row, or all diverged.
    """
    mine = [r for r in rows if r["method"] == method and r["protocol"] == protocol]
    finite = [r for r in mine if r["valid_loss"] is not None]
    if not finite:
        what = "diverged everywhere" if mine else "has no tuning row"
        raise ValueError(f"{method} ({protocol}) {what}; run compare --tune, or lower its grid")
    return min(finite, key=lambda r: float(r["valid_loss"]))


def on_edge(rows: list[Row], plan: Plan, method: str, protocol: str) -> list[str]:
    """Return the axes along which the best point is at the edge of its grid."""
    best = settings(choose(rows, method, protocol))
    if plan.size:
        tried = {settings(row)["lr"] for row in rows if row["method"] == method}
        return ["lr"] if best["lr"] in (min(tried), max(tried)) else []
    axes = plan.methods[method][protocol]["grid"]
    return [name for name, values in axes.items() if best[name] in (min(values), max(values))]
