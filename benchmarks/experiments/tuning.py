"""Search for a method's best options and rates, until the best rates are inside."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

Values = dict[str, Any]
Tried = Sequence[tuple[Values, float]]  # tuned values, and the loss they led to
FACTOR = 2.0  # between neighbouring learning rates
WITHIN = 0.02  # of the lowest perplexity: points that a search of one seed can hardly order


def is_rate(name: str) -> bool:
    """Return whether a tuned value is a learning rate."""
    return name == "lr" or name.endswith("_lr")


def role_rates(values: Values) -> list[float]:
    """Return the rates of the hidden weights, the embedding and the head, by default `other_lr`."""
    other = values.get("other_lr", values["lr"])
    return [values["lr"], *(values.get(f"{role}_lr", other) for role in ("embedding", "head"))]


@dataclass(frozen=True)
class Search:
    """Coordinate search over options, then over learning rates.

    At the learning rates of the start the options are chosen, one after another, each by its
    neighbours in its list. Then, from the best point so far, half and twice of one axis after
    another are tried, until both are worse for each of them: the best rates are inside what was
    tried.

    Attributes:
        start: first point.
        axes: names of learning rates that are multiplied together: of one, or of several, without
            which a search of one after another stops on a ridge.
        choices: lists of values of options.
        most: limit of the number of points; a best rate may then be at an edge.
    """

    start: Values
    axes: tuple[tuple[str, ...], ...] = ()
    choices: dict[str, list[Any]] = field(default_factory=dict)
    most: int | None = None

    @classmethod
    def of_rates(cls, start: Values, rates: Sequence[str], **choices: list[Any]) -> "Search":
        """Return the search over one rate after another, then over all together."""
        axes = [(rate,) for rate in rates] + [tuple(rates)] * (len(rates) > 1)
        return cls(start, tuple(axes), choices)

    def next(self, tried: Tried) -> list[Values]:
        """Return the points to try next; none: the search has ended."""
        if not tried:
            return [self.start, *self.next([(self.start, 0.0)])]
        if self.most is not None and len(tried) >= self.most:
            return []
        at_start = [p for p in tried if _same(p[0], self.start, but=tuple(self.choices))]
        missing = [*self._other_choices(at_start or tried), *self._beside(_best(tried), tried)]
        return next((points for points in missing if points), [])

    def edges(self, tried: Tried) -> list[str]:
        """Return the axes on which the best point has no worse one above or below."""
        points = self._beside(_best(tried), tried) if tried else [[self.start]] * len(self.axes)
        missing = zip(self.axes, points, strict=True)
        return [" and ".join(axis) for axis, points in missing if points]

    def _beside(self, best: Values, tried: Tried) -> Iterator[list[Values]]:
        """Yield for each axis the neighbours beyond which nothing was tried."""
        for axis in self.axes:
            factors = [_factor(v, best, axis) for v, _ in tried if _same(v, best, but=axis)]
            up = any(factor > 1 for factor in factors)
            down = any(factor < 1 for factor in factors)
            missing = [FACTOR] * (not up) + [1 / FACTOR] * (not down)
            yield [scaled(best, axis, factor) for factor in missing]

    def _other_choices(self, tried: Tried) -> Iterator[list[Values]]:
        """Yield for each option the neighbours of its best value that were not tried."""
        best = _best(tried)
        for name, values in self.choices.items():
            if name not in best:  # the values of an older search
                continue
            at = values.index(best[name])
            points = [{**best, name: value} for value in values[max(0, at - 1) : at + 2]]
            yield [p for p in points if not any(_same(v, p) for v, _ in tried)]


def middle(tried: Tried) -> Values:
    """Return the best point with its rates moved to the middle of what is nearly as good.

    Rates with which the perplexity is flat come out anywhere on the flat part; its geometric mean,
    over the points with the best one's options within 2 % of its perplexity, is a steadier value.
    """
    best, loss = min(tried, key=lambda point: point[1])
    rates = tuple(filter(is_rate, best))
    near = [v for v, x in tried if x <= loss + math.log1p(WITHIN) and _same(v, best, but=rates)]
    return best | {r: math.exp(math.fsum(math.log(v[r]) for v in near) / len(near)) for r in rates}


def _best(tried: Tried) -> Values:
    return min(tried, key=lambda point: point[1])[0]


def _factor(point: Values, best: Values, axis: tuple[str, ...]) -> float:
    """Return by what the values of an axis were multiplied; 1 if each by another factor."""
    factors = [point[name] / best[name] for name in axis]
    return factors[0] if max(factors) < 1.001 * min(factors) else 1.0


def scaled(point: Values, names: Sequence[str], factor: float) -> Values:
    """Return a point with some of its values multiplied."""
    return {**point, **{name: float(f"{point[name] * factor:.6g}") for name in names}}


def _same(a: Values, b: Values, but: tuple[str, ...] = ()) -> bool:
    return a.keys() == b.keys() and all(a[name] == b[name] for name in a if name not in but)
