"""Differences of methods over paired seeds, beside a t test written out."""

import math

import numpy as np
import pytest
from scipy import integrate

from benchmarks.experiments.significance import paired


def rows(losses, first=0):
    return [
        {"config": {"seed": seed}, "test_loss": loss} for seed, loss in enumerate(losses, first)
    ]


def p_of(t, freedom):
    """The two-sided p-value, by the density of Student's t."""
    scale = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2) / math.sqrt(freedom * math.pi)

    def density(x):
        return scale * (1 + x * x / freedom) ** (-(freedom + 1) / 2)

    return 2 * integrate.quad(density, abs(t), math.inf)[0]


@pytest.mark.parametrize("count", [2, 3, 5])
def test_it_is_the_paired_t_test(count):
    rng = np.random.default_rng(count)
    shared = rng.normal(4.0, 0.5, count)  # the seeds' batches move both methods alike
    ours, theirs = shared + rng.normal(0.01, 0.004, count), shared + rng.normal(0, 0.004, count)
    made = paired(rows(ours), rows(theirs))
    d = ours - theirs
    error = d.std(ddof=1) / math.sqrt(count)
    assert made.mean == pytest.approx(d.mean()) and made.error == pytest.approx(error)
    assert made.p == pytest.approx(p_of(d.mean() / error, count - 1), rel=1e-6)
    assert made.seeds == count


def test_three_seeds_need_a_t_above_4_3():
    for t, verdict in ((4.2, "level"), (4.4, "ahead")):
        d = np.array([-1.0, 0.0, 1.0])
        d = d / (d.std(ddof=1) / math.sqrt(3)) - t
        assert paired(rows(4 + d), rows([4.0] * 3)).verdict == verdict


def test_seeds_that_one_of_them_lacks_do_not_count():
    made = paired(rows([1.0, 2.0, 9.0]), rows([0.5, 1.25], first=1))
    assert made.seeds == 2 and made.mean == pytest.approx((1.5 + 7.75) / 2)
    assert paired(rows([1.0]), rows([1.0], first=1)) is None


def test_what_is_written():
    text = paired(rows([4.0, 4.1, 4.2]), rows([4.049, 4.15, 4.251])).text()
    assert text == "-4.9 ±0.1 %, ahead"
    assert paired(rows([4.1]), rows([4.0])).text() == "+10.5 %, one seed"
    assert paired(rows([4.0, 4.0]), rows([4.0, 4.0])).text() == "+0.0 ±0.0 %, level"
    assert paired(rows([None, 4.0]), rows([4.0, 4.0])).text() == "diverged"
