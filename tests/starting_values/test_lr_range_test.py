"""The learning-rate range test: its curves, its suggestion, and that it leaves nothing behind."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

import optimzoo
from optimzoo.models.llama import Llama, LlamaConfig

TINY = LlamaConfig(32, 16, 24, 2, 2, 64)


@pytest.fixture
def model():
    return Llama(TINY, seed=0)


def closure_of(model, optimizer, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def closure():
        optimizer.zero_grad()
        tokens = torch.randint(0, 32, (4, 17), generator=generator)
        loss = model(tokens[:, :-1], tokens[:, :-1])  # to copy its input
        loss.backward()
        return loss

    return closure


def snapshot(model, optimizer):
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    return weights, copy.deepcopy(optimizer.state_dict()), torch.get_rng_state()


def assert_same(a, b):
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


@pytest.mark.parametrize("steps_before", [0, 3])
@pytest.mark.parametrize("name", ["scale", "muon", "adamw", "galore"])
def test_everything_is_as_before(model, name, steps_before):
    options = {"rank": 4, "update_proj_gap": 2} if name == "galore" else {}
    optimizer = optimzoo.create_optimizer(name, model, lr=1e-2, embedding_lr=3e-2, **options)
    closure = closure_of(model, optimizer)
    for _ in range(steps_before):
        closure()
        optimizer.step()
    before = snapshot(model, optimizer)
    result = optimzoo.lr_range_test(optimizer, closure, steps=8)
    assert_same(snapshot(model, optimizer), before)
    assert all(p.grad is None for p in model.parameters())
    assert list(result.curves) == ["hidden", "embedding", "head", "vector"]
    first = [curve[0][1] for curve in result.curves.values()]
    assert len(set(first)) == 4, "each role has batches of its own"
    closure(), optimizer.step()  # and it goes on


def test_a_closure_that_fails_leaves_all_as_before(model):
    optimizer = optimzoo.create_optimizer("scale", model, lr=1e-2)
    closure = closure_of(model, optimizer)
    before, calls = snapshot(model, optimizer), []

    def failing():
        calls.append(1)
        if len(calls) == 5:
            raise RuntimeError("no more batches")
        return closure()

    with pytest.raises(RuntimeError, match="no more batches"):
        optimzoo.lr_range_test(optimizer, failing)
    assert_same(snapshot(model, optimizer), before)


def test_only_the_role_moves_at_the_rates_of_its_curve():
    """SGD's weights after each step against the rule in NumPy."""
    torch.manual_seed(0)
    a, b = (nn.Parameter(torch.randn(3, dtype=torch.float64)) for _ in range(2))
    groups = [{"params": [a], "role": "hidden"}, {"params": [b], "role": "head", "lr": 0.5}]
    optimizer = torch.optim.SGD(groups, lr=0.25)
    seen = []

    def closure():
        optimizer.zero_grad()
        seen.append((a.detach().numpy().copy(), b.detach().numpy().copy()))
        loss = (a**2).sum() + (b**2).sum()
        loss.backward()
        return loss

    result = optimzoo.lr_range_test(optimizer, closure, low=0.01, high=1.0, steps=5)
    x, y = seen[0]
    for step, (role, own) in enumerate([("hidden", 0.25)] * 5 + [("head", 0.5)] * 5):
        if step == 5:
            x, y = seen[0]
        assert np.allclose(seen[step][0], x, rtol=1e-12)
        assert np.allclose(seen[step][1], y, rtol=1e-12)
        rate = own * 0.01 ** (1 - step % 5 / 4)
        assert result.curves[role][step % 5] == pytest.approx((rate, (x**2).sum() + (y**2).sum()))
        x, y = (x - 2 * rate * x, y) if role == "hidden" else (x, y - 2 * rate * y)
    assert result.before == {"hidden": 0.25, "head": 0.5}


def test_the_suggestion_is_where_the_smoothed_loss_falls_fastest():
    weight = nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = torch.optim.SGD([weight], lr=1e-2)
    result = optimzoo.lr_range_test(optimizer, lambda: _quadratic(weight), high=1e4, steps=50)
    curve = result.curves["all"]
    assert len(curve) < 50 and curve[-1][0] > 1, "the loss rises where lr > 2 / curvature"
    losses, total, weights = [loss for _, loss in curve], 0.0, 0.0
    means = []
    for loss in losses:
        total, weights = 0.8 * total + loss, 0.8 * weights + 1
        means.append(total / weights)
    falls = [(means[i + 1] - means[i - 1]) / 2 for i in range(1, len(means) - 1)]
    steepest = 1 + int(np.argmin(falls))
    assert result.suggestions["all"] == curve[steepest][0]
    assert 0.01 < result.suggestions["all"] < 2
    assert "all" in str(result) and f"{result.suggestions['all']:.3g}" in str(result)


def _quadratic(weight):
    weight.grad = weight.detach().clone()
    return 0.5 * weight.detach().square().sum()


def test_a_loss_that_only_rises_or_is_not_finite_has_no_suggestion():
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    losses = iter([1.0, 1.1, math.nan, 5.0])
    result = optimzoo.lr_range_test(optimizer, lambda: next(losses), steps=4)
    assert len(result.curves["all"]) == 3 and result.suggestions["all"] is None
    assert "-" in str(result)


def test_a_rate_that_is_a_tensor_stays_that_tensor(model):
    rate = torch.tensor(1e-2)
    optimizer = optimzoo.SCALE(optimzoo.param_groups(model), lr=rate)
    objects = [group["lr"] for group in optimizer.param_groups]
    values = [float(lr) for lr in objects]
    optimzoo.lr_range_test(optimizer, closure_of(model, optimizer), steps=3, roles=["head"])
    after = [group["lr"] for group in optimizer.param_groups]
    assert all(a is b for a, b in zip(objects, after, strict=True))
    assert [float(lr) for lr in after] == values


def test_buffers_and_random_numbers_are_restored():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(8, 3)

    def closure():
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    before = snapshot(model, optimizer)
    optimzoo.lr_range_test(optimizer, closure, steps=4, model=model)
    assert_same(snapshot(model, optimizer), before)


def test_the_plot_has_a_line_a_role(model):
    figure = pytest.importorskip("matplotlib.figure")
    optimizer = optimzoo.create_optimizer("scale", model, lr=1e-2)
    result = optimzoo.lr_range_test(optimizer, closure_of(model, optimizer), steps=6)
    ax = result.plot(figure.Figure().subplots())
    labels = [line.get_label() for line in ax.lines if not line.get_label().startswith("_")]
    assert labels == ["hidden", "embedding", "head", "vector"] and ax.get_xscale() == "log"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"roles": ["heads"]}, "no group has the role 'heads'; there are hidden, embedding"),
        ({"low": 2.0, "high": 1.0}, "low=2.0 and high=1.0: they must be positive, low below high"),
        ({"low": 0.0}, "low=0.0"),
        ({"steps": 1}, "steps=1; it must be at least 2"),
    ],
)
def test_wrong_options_are_refused(model, options, message):
    optimizer = optimzoo.create_optimizer("scale", model, lr=1e-2)
    with pytest.raises(ValueError, match=message):
        optimzoo.lr_range_test(optimizer, closure_of(model, optimizer), **options)


def test_a_rate_of_zero_and_a_closure_without_a_loss_are_refused(model):
    optimizer = optimzoo.create_optimizer("scale", model, lr=1e-2, head_lr=0.0)
    closure = closure_of(model, optimizer)
    with pytest.raises(ValueError, match="role head has lr=0"):
        optimzoo.lr_range_test(optimizer, closure)
    with pytest.raises(ValueError, match="returned None; it must return the loss"):
        optimzoo.lr_range_test(optimizer, lambda: None, roles=["hidden"])


def test_a_released_optimizer_trains_on_after_a_curve_that_ended_early(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    optimzoo.release(optimizer)
    closure = closure_of(model, optimizer)
    test = optimzoo.lr_range_test(optimizer, closure, low=1e-3, high=1e6, steps=20)
    assert min(len(curve) for curve in test.curves.values()) < 20
    closure()
    optimizer.step()


def test_states_that_a_load_casts_and_the_flag_of_the_schedulers_are_restored(model):
    model.bfloat16()
    optimizer = torch.optim.NAdam(model.parameters(), lr=1e-4)
    closure = closure_of(model, optimizer)
    for _ in range(3):
        closure()
        optimizer.step()
    products = [state["mu_product"].clone() for state in optimizer.state.values()]
    optimzoo.lr_range_test(optimizer, closure, steps=4)
    after = [state["mu_product"] for state in optimizer.state.values()]
    assert all(
        a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(products, after, strict=True)
    )
    fresh = optimzoo.create_optimizer("scale", model, lr=1e-3)
    optimzoo.lr_range_test(fresh, closure_of(model, fresh), steps=3)
    assert not getattr(fresh, "_opt_called", False)
