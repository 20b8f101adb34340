"""With moments of 8 bits no step is larger than exact moments could have made it."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from torch import nn
from zoo_models import METHODS

from optimzoo import SWAN
from optimzoo.core import matrix_optimizer
from optimzoo.core.adam import bias_correction, max_direction
from optimzoo.lowbit import blockwise, moments
from optimzoo.optimizers import fira, galore, natural_galore

BETAS = (0.9, 0.999)
ADAM_METHODS = [name for name in METHODS if name not in ("adams", "muon", "rmnp", "scale")]
LR, STEPS, SHAPE = 1e-3, 30, (16, 64)


def uneven(generator, step):
    """One gradient in 64 is 1, a fifth are tiny, the others zero."""
    x = torch.randn(SHAPE, generator=generator) * 1e-5
    x = torch.where(torch.rand(SHAPE, generator=generator) < 0.2, x, 0.0)
    x.view(-1)[::64] = 1.0
    return x


def magnitudes(generator, step):
    """Each element its own magnitude, from 1e-8 to 1e8, and another sign each time."""
    fixed = torch.linspace(-8, 8, SHAPE[1]).repeat(SHAPE[0], 1)
    return 10.0**fixed * torch.randn(SHAPE, generator=generator).sign()


def mixed(generator, step):
    """Another magnitude each time, a third of them zero."""
    x = 10.0 ** (16 * torch.rand(SHAPE, generator=generator) - 8)
    sign = torch.randint(-1, 2, SHAPE, generator=generator)
    return x * sign


def sudden(generator, step):
    """A million times larger for ten steps, then a million times smaller."""
    x = torch.randn(SHAPE, generator=generator)
    return x * (1e6 if 10 <= step < 15 else 1e-6 if step >= 20 else 1.0)


def growing(generator, step):
    """What takes exact moments to their bound, beside what is steady, and a spike a row."""
    x = torch.ones(SHAPE)
    x[:, ::2] = (BETAS[1] / BETAS[0]) ** step * 1e-6
    x[:, 0] = 1e3 * (step % 7 == 0)
    return x


def flips(generator, step):
    """Signs that flip each time, beside one large element a block."""
    x = torch.full(SHAPE, 1e-4 * (-1.0) ** step)
    x.view(-1)[::256] = 1.0
    return x


PATTERNS = [uneven, magnitudes, mixed, sudden, growing, flips]


@pytest.fixture
def all_sizes(monkeypatch):
    """Codes for the smallest tensors too."""
    monkeypatch.setattr(moments, "SMALLEST", 1)


def extremes(t, betas):
    """The largest |m| / √v of t gradients, by a search in float64 that knows no formula.

    m is linear in the gradients and v a quadratic form, so the largest ratio is a norm.
    """
    ages = np.arange(t, dtype=np.float64)
    mean = (1 - betas[0]) * betas[0] ** ages
    square = (1 - betas[1]) * betas[1] ** ages
    worst = mean / square  # the gradient of the ratio is zero there
    return abs(mean @ worst) / math.sqrt(square @ worst**2)


@pytest.mark.parametrize("betas", [BETAS, (0.0, 0.9), (0.95, 0.9025), (0.95, 0.9), (0.5, 0.99)])
@pytest.mark.parametrize("t", [1, 2, 60, 300])
def test_the_bound_is_what_gradients_can_attain(betas, t):
    bound = max_direction(t, betas)
    assert bound == pytest.approx(extremes(t, betas), rel=1e-9)
    generator = np.random.default_rng(0)
    for _ in range(20):
        m = v = np.zeros(50)
        for _ in range(t):
            g = generator.standard_normal(50) * 10.0 ** generator.uniform(-4, 4, 50)
            m, v = m + (1 - betas[0]) * (g - m), v + (1 - betas[1]) * (g * g - v)
        assert np.all(np.abs(m) <= bound * np.sqrt(v) * (1 + 1e-12))


def test_a_bound_beyond_all_numbers_is_infinite():
    assert max_direction(10**6, (0.99, 0.5)) == math.inf
    assert max_direction(3, (0.9, 0.0)) == math.inf
    assert max_direction(3, (0.0, 0.0)) == 1.0


class Directions:
    """The largest entry of each Adam direction of a low-rank method, over its bound."""

    def __init__(self, monkeypatch):
        self.worst = 0.0
        inner = matrix_optimizer.adam_direction

        def spy(state, grad, group, step):
            direction = inner(state, grad, group, step)
            bound = max_direction(step, group["betas"])
            self.worst = max(self.worst, direction.abs().max().item() / bound)
            return direction

        for module in (galore, natural_galore, fira):
            monkeypatch.setattr(module, "adam_direction", spy)
        monkeypatch.setattr("optimzoo.optimizers.apollo.adam_direction", spy)


@pytest.mark.thorough
@pytest.mark.parametrize("fused", [True, False], ids=["kernels", "eager"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("name", ADAM_METHODS)
def test_no_step_exceeds_what_exact_moments_allow(name, rounding, fused, all_sizes, monkeypatch):
    if not fused:
        monkeypatch.setattr("optimzoo.kernels.dispatch.backend", lambda device: None)
    cls, own = METHODS[name]
    generator = torch.Generator().manual_seed(3)
    cases = list(product(("hidden", "embedding"), PATTERNS))
    weights = [nn.Parameter(torch.randn(SHAPE, generator=generator)) for _ in cases]
    groups = [{"params": [w], "role": role} for w, (role, _) in zip(weights, cases, strict=True)]
    own = {**own, "lr": LR, "betas": BETAS, "weight_decay": 0.0}
    optimizer = cls(groups, state_bits=8, rounding=rounding, **own)
    directions = Directions(monkeypatch)
    age = count = 0
    for step in range(STEPS):
        before = [w.detach().double() for w in weights]
        for w, (_, pattern) in zip(weights, cases, strict=True):
            w.grad = pattern(generator, step)
        optimizer.step()
        age, count = count + 1, count + 1
        if name == "stable_spam" and step and (step + 1) % own["update_proj_gap"] == 0:
            count = 1  # the old moments, under a fresh bias correction
        bound = max_direction(age, BETAS) * bias_correction(count, BETAS)
        age = count
        for w, old, (role, pattern) in zip(weights, before, cases, strict=True):
            moved = (w.detach().double() - old).abs()
            assert moved.isfinite().all(), (step, role, pattern.__name__)
            if role != "hidden" or name == "stable_spam":
                # The weight is rounded once, to float32.
                most = LR * bound * (1 + 1e-5) + 2.0**-23 * old.abs()
                assert (moved <= most).all(), (step, role, pattern.__name__, moved.max() / LR)
    assert directions.worst <= 1 + 1e-6
    assert (directions.worst > 0) == (name not in ("swan", "sinkgd", "stable_spam"))


@pytest.mark.thorough
def test_mean_of_codes_is_the_exact_moment():
    """Over many blocks of the same gradients: the bound on the update is no bound on the codes."""
    blocks = 512
    weight = nn.Parameter(torch.zeros(blocks, 256))
    groups = [{"params": [weight], "role": "embedding"}]  # Adam's
    optimizer = SWAN(groups, betas=BETAS, state_bits=8, rounding="stochastic")
    generator = torch.Generator().manual_seed(1)
    sizes = 10.0 ** torch.linspace(-6, 0, 256)
    m, v = torch.zeros(256, dtype=torch.float64), torch.zeros(256, dtype=torch.float64)
    for _ in range(12):
        g = sizes * torch.randn(256, generator=generator).sign()
        weight.grad = g.repeat(blocks, 1)
        optimizer.step()
        m = m + 0.1 * (g.double() - m)
        v = v + 0.001 * (g.double() ** 2 - v)
    state = optimizer.state[weight]
    for key, exact in (("exp_avg", m), ("exp_avg_sq", v)):
        held = blockwise.dequantize(state[f"{key}_codes"], state[f"{key}_scale"]).double()
        mean, spread = held.mean(0), held.std(0) / math.sqrt(blocks)
        # Where few blocks differ from the others the mean's error is not normal.
        seen = (held != held.mode(0).values).sum(0) >= 100
        z = (mean - exact)[seen] / spread[seen].clamp_min(1e-5 * exact[seen].abs())
        assert seen.sum() > 100
        assert z.abs().max() < 5, (key, z.abs().max())
        assert abs(z.mean()) < 5 / math.sqrt(seen.sum()), (key, z.mean())
