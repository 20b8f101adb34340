"""Significance of a difference between two methods, paired by seed."""

import math
from dataclasses import dataclass
from typing import Any

LEVEL = 0.05  # of the t test
Row = dict[str, Any]


@dataclass(frozen=True)
class Difference:
    """Difference of two methods' test losses over the seeds that both ran.

    Runs of one seed see the same batches from the same weights, so their losses rise and fall
    together: the test is that of paired samples.

    Attributes:
        mean: mean of the differences, in nats a token; below 0: the first method is better.
        error: standard error of the mean; None with one seed.
        p: two-sided p-value of Student's t; None with one seed.
        seeds: number of seeds.
    """

    mean: float
    error: float | None
    p: float | None
    seeds: int

    @property
    def significant(self) -> bool:
        """Return whether the t test tells the methods apart."""
        return self.p is not None and self.p < LEVEL

    @property
    def verdict(self) -> str:
        """Return ``ahead``, ``behind`` or ``level``, or ``one seed``: nothing to test."""
        if self.p is None:
            return "one seed"
        return ("ahead" if self.mean < 0 else "behind") if self.significant else "level"

    def text(self) -> str:
        """Format the difference in percent of perplexity, with its standard error and verdict."""
        if not math.isfinite(self.mean):
            return "diverged"
        error = "" if self.error is None else f" ±{100 * self.error:.1f}"
        return f"{100 * math.expm1(self.mean):+.1f}{error} %, {self.verdict}"


def paired(ours: list[Row], theirs: list[Row]) -> Difference | None:
    """Compare the test losses of two methods' rows; return None if they have no seed in common."""
    from scipy.stats import ttest_1samp

    by_seed = [{row["config"]["seed"]: _loss(row) for row in rows} for rows in (ours, theirs)]
    seeds = sorted(by_seed[0].keys() & by_seed[1].keys())
    if not seeds:
        return None
    differences = [by_seed[0][seed] - by_seed[1][seed] for seed in seeds]
    mean = math.fsum(differences) / len(seeds)
    if len(seeds) == 1 or not math.isfinite(mean):
        return Difference(mean, None, None, len(seeds))
    if len(set(differences)) == 1:  # a variance of 0: the same method, or no test
        return Difference(mean, 0.0, 0.0 if mean else 1.0, len(seeds))
    test = ttest_1samp(differences, 0.0)
    return Difference(mean, abs(mean / float(test.statistic)), float(test.pvalue), len(seeds))


def by_method(rows: list[Row]) -> dict[str, list[Row]]:
    """Return each method's rows, one a seed."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["method"], []).append(row)
    return groups


def mean_loss(rows: list[Row]) -> float:
    """Return the mean test loss of a method's rows; infinity if one diverged."""
    return math.fsum(map(_loss, rows)) / len(rows)


def _loss(row: Row) -> float:
    return math.inf if row["test_loss"] is None else float(row["test_loss"])
