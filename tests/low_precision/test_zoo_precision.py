"""The zoo under bfloat16: what is rounded, how often, and what is not."""

import copy

import pytest
import torch
from torch import nn
from zoo_models import METHODS, llama, make, normal, one_weight, reloaded, train

from optimzoo.core.channel_rule import limit_norm_growth

every_method = pytest.mark.parametrize("name", METHODS)


def test_seeds_and_counts_survive_a_load_under_bfloat16_weights():
    """torch casts a state to the dtype of its parameter: bfloat16 knows 8 bits of a seed."""
    model = llama(torch.bfloat16)
    optimizer = make("apollo", model, seed=123_456_789)
    train(model, optimizer, 3)
    before = copy.deepcopy(optimizer.state_dict()["state"])
    optimizer.load_state_dict(reloaded(optimizer.state_dict()))
    after = optimizer.state_dict()["state"]
    seeds = [state["projector_seed"] for state in after.values() if "projector_seed" in state]
    assert len(seeds) == 14
    assert {seed.dtype for seed in seeds} == {torch.int64}
    assert all(int(seed) >= 123_456_789 for seed in seeds)
    for key, state in before.items():
        for part, value in state.items():
            assert after[key][part].dtype == value.dtype
            assert torch.equal(after[key][part], value)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("dtypes", [("float32", "bfloat16"), ("bfloat16", "float32")])
@every_method
def test_a_state_of_another_dtype_goes_on(name, dtypes):
    """The state keeps its dtype, so low-rank products meet weights of another."""
    source_dtype, dtype = (getattr(torch, d) for d in dtypes)
    source, model = llama(source_dtype), llama(dtype)
    first, optimizer = make(name, source), make(name, model)
    train(source, first, 6)
    model.load_state_dict(source.state_dict())
    optimizer.load_state_dict(reloaded(first.state_dict()))
    moments = {s["exp_avg"].dtype for s in optimizer.state.values() if "exp_avg" in s}
    assert moments == {source_dtype}
    losses = train(model, optimizer, 12)
    assert losses[-1] < losses[0]
    assert {p.dtype for p in model.parameters()} == {dtype}


@pytest.mark.parametrize("shape", [(6, 12), (6, 2, 3, 2), (2, 6, 12)], ids=str)
@pytest.mark.parametrize("name", ["galore", "natural_galore", "fira"])
def test_bfloat16_weights_are_rounded_once_a_step(name, shape):
    """Decay and step are each a third of what bfloat16 resolves at one: apart, both are lost."""
    weight = nn.Parameter(torch.ones(shape, dtype=torch.bfloat16))
    layout = {"role": "hidden", "stacked": len(shape) == 3}
    cls = METHODS[name][0]
    options = {"scale": 1.0, "rank": 1, "projector": "svd"}
    optimizer = cls([{"params": [weight], **layout}], lr=0.003, weight_decay=0.4, **options)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert (weight == 1 - 2**-8).all()


def test_the_norm_growth_limiter_is_exact_under_bfloat16():
    """1.01 lies between two of its numbers: a limit rounded to one would raise every norm."""
    state = {}
    update = normal(40, 30, dtype=torch.bfloat16)
    for _ in range(50):
        assert torch.equal(limit_norm_growth(update, state, 1.01), update)
    norm = update.float().norm().item()
    for step in range(1, 40):
        grown = limit_norm_growth(update * 100, state, 1.01)
        assert grown.dtype == torch.bfloat16
        assert grown.float().norm().item() == pytest.approx(norm * 1.01**step, rel=2e-3)


def test_stable_spams_averages_move_under_bfloat16():
    """With 0.999 an average in bfloat16 stops at a part of what it averages, and clips at that."""
    weight, optimizer = one_weight("stable_spam", torch.zeros(8, 8, dtype=torch.bfloat16))
    largest = norm = 0.0
    for step in range(1, 1001):
        weight.grad = normal(8, 8, seed=step, dtype=torch.bfloat16) * (2.0 if step < 500 else 0.5)
        largest = 0.999 * largest + 0.001 * weight.grad.double().abs().max().item()
        optimizer.step()
        norm = weight.grad.double().norm().item()
    state = optimizer.state[weight]
    assert state["max_avg"].item() == pytest.approx(largest, rel=1e-4)
    assert 0.5 * norm < state["norm_avg"].item() < 2 * norm
    assert {state[key].dtype for key in ("max_avg", "norm_avg", "norm_avg_sq")} == {torch.float32}
