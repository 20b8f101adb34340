"""The search for the best rates: where it goes, where it ends, what it calls an edge."""

import math

import pytest

from benchmarks.experiments.tuning import FACTOR, Search, is_rate, middle, scaled

START = {"embedding_lr": 0.08, "head_lr": 0.02, "lr": 0.01, "clip": 1.0, "betas": [0.9, 0.99]}
BETAS = [[0.9, 0.95], [0.9, 0.98], [0.9, 0.99], [0.9, 0.999]]
SEARCH = Search(
    START, (("embedding_lr",), ("head_lr",), ("lr",)), {"clip": [1.0, 0.0], "betas": BETAS}
)


def loss_around(optimum):
    """A bowl in the logarithms of the rates, and in the places of the options."""

    def loss(point):
        bowl = sum((math.log2(point[k] / v)) ** 2 for k, v in optimum.items() if is_rate(k))
        betas = abs(BETAS.index(point["betas"]) - BETAS.index(optimum["betas"]))
        return bowl + 0.3 * betas + 0.1 * (point["clip"] != optimum["clip"])

    return loss


def run(search, loss, most=200):
    tried = []
    while points := search.next(tried):
        assert not any(point == known for point in points for known, _ in tried)
        tried += [(point, loss(point)) for point in points]
        assert len(tried) <= most
    return tried


OPTIMA = [
    START,
    {**START, "embedding_lr": 0.64, "head_lr": 0.0025, "lr": 0.04},
    {**START, "lr": 0.00125, "clip": 0.0, "betas": [0.9, 0.95]},
    {**START, "embedding_lr": 0.01, "betas": [0.9, 0.999], "clip": 0.0},
]


@pytest.mark.parametrize("optimum", OPTIMA, ids=range(4))
def test_it_ends_at_the_best_point_with_worse_ones_on_every_side(optimum):
    loss = loss_around(optimum)
    tried = run(SEARCH, loss, most=35)
    best = min(tried, key=lambda point: point[1])[0]
    assert all(best[k] == pytest.approx(v) for k, v in optimum.items())
    for name in ("embedding_lr", "head_lr", "lr"):
        rest = best.keys() - {name}
        line = [point[name] for point, _ in tried if all(point[k] == best[k] for k in rest)]
        assert min(line) < best[name] < max(line)
    assert SEARCH.edges(tried) == []


def test_without_a_move_it_takes_those_beside_an_option_and_two_runs_a_rate():
    tried = [point for point, _ in run(SEARCH, loss_around(START))]
    beside = [{**START, "betas": BETAS[1]}, {**START, "betas": BETAS[3]}]
    assert tried[:4] == [START, {**START, "clip": 0.0}, *beside]
    up, down = (scaled(START, ["embedding_lr"], factor) for factor in (FACTOR, 1 / FACTOR))
    assert tried[4:6] == [up, down] and len(tried) == 4 + 2 * 3


def test_an_edge_is_a_side_on_which_nothing_was_tried():
    def at(**values):
        return {**START, **values}

    assert SEARCH.edges([(START, 1.0)]) == ["embedding_lr", "head_lr", "lr"]
    tried = [(START, 1.0), *((at(head_lr=v), 2.0) for v in (0.5, 0.001))]
    assert SEARCH.edges(tried) == ["embedding_lr", "lr"]
    tried += [(at(lr=0.02), math.inf), (at(lr=0.005), 2.0)]  # a run that diverged bounds, too
    assert SEARCH.edges(tried) == ["embedding_lr"]
    tried += [(at(embedding_lr=0.16), 2.0), (at(embedding_lr=0.04, clip=0.0), 2.0)]
    assert SEARCH.edges(tried) == ["embedding_lr"], "the smaller one has no clipping"
    beside = [at(clip=0.0), *(at(betas=BETAS[i]) for i in (1, 3))]
    tried += [(point, 2.0) for point in beside]
    assert SEARCH.next(tried) == [at(embedding_lr=0.04)]


def test_rates_that_change_together_are_one_line_with_a_limit():
    search = Search({"lr": 1e-3, "other_lr": 1e-2, "clip": 0.0}, (("lr", "other_lr"),), most=5)
    tried = run(search, lambda point: point["lr"])
    assert [point["lr"] for point, _ in tried] == [1e-3, 2e-3, 5e-4, 2.5e-4, 1.25e-4]
    assert all(point["other_lr"] == pytest.approx(10 * point["lr"]) for point, _ in tried)
    assert search.edges(tried) == ["lr and other_lr"] and search.next(tried) == []


RATES = ("embedding_lr", "head_lr", "lr")


def test_on_a_ridge_the_rates_move_together():
    start = dict.fromkeys(RATES, 0.01)

    def loss(point):
        """A narrow valley along all rates alike, that falls towards 0.08."""
        places = [math.log2(point[name] / 0.08) for name in RATES]
        mean = sum(places) / 3
        return 0.01 * mean**2 + sum((place - mean) ** 2 for place in places)

    alone = run(Search(start, tuple((name,) for name in RATES)), loss)
    assert min(alone, key=lambda point: point[1])[0] == start
    together = Search.of_rates(start, RATES)
    assert together.axes == (*((name,) for name in RATES), RATES)
    assert Search.of_rates({"lr": 1.0}, ["lr"], clip=[0.0]) == Search(
        {"lr": 1.0}, (("lr",),), {"clip": [0.0]}
    )
    assert together.edges(alone) == [" and ".join(RATES)]
    tried = run(together, loss)
    best = min(tried, key=lambda point: point[1])[0]
    assert best == {name: pytest.approx(0.08) for name in RATES}
    assert together.edges(tried) == [] and tried[: len(alone)] == alone
    assert together.edges([]) == [*RATES, " and ".join(RATES)]


def test_where_all_is_fixed_there_is_one_run():
    search = Search({"lr": 1e-3, "clip": 0.0})
    assert len(run(search, lambda point: 1.0)) == 1 and search.edges([(search.start, 1.0)]) == []


def test_the_middle_is_the_geometric_mean_of_what_is_nearly_as_good():
    flat = [{**START, "head_lr": rate} for rate in (0.01, 0.02, 0.04, 0.08)]
    losses = [1.0 + math.log(1.0199), 1.01, 1.0, 1.0 + math.log(1.0201)]
    tried = list(zip(flat, losses, strict=True))
    tried.append(({**START, "lr": 0.02, "clip": 0.0}, 1.001))  # other options: of another valley
    tried.append(({**START, "lr": 0.04}, math.inf))
    found = middle(tried)
    assert found == START | {"head_lr": pytest.approx(0.02), "lr": pytest.approx(0.01)} | {
        "embedding_lr": pytest.approx(0.08)
    }
    assert middle([(START, math.inf)])["lr"] == pytest.approx(START["lr"])
