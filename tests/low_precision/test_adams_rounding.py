"""AdamS on weights of 16 bits: the decay arrives, on average exactly, with stochastic rounding."""

import math

import numpy as np
import pytest
import torch
from reference.adams_numpy import AdamSReference
from torch import nn
from zoo_models import normal

from optimzoo import AdamS
from optimzoo.sparsity import nm_mask, unpack

BF16, F16 = torch.bfloat16, torch.float16


def one(start, **hyper):
    weight = nn.Parameter(start.clone())
    options = {"lr": 2.0**-11, "l1": 0.1, "total_steps": 40, "rounding": "stochastic", **hyper}
    return weight, AdamS([{"params": [weight], "role": "hidden"}], **options)


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("foreach", [None, False])
def test_the_mean_follows_the_transcription(dtype, foreach):
    """Weights alike with gradients alike: their mean, within four standard errors, for 60 steps.

    Steps are a fourth to a thirtieth of the distance between neighbours: to nearest, all are lost.
    """
    size = (512, 64)
    start = torch.tensor([0.75, 0.625, 0.5625, 0.53125]).repeat(size[0], size[1] // 4)
    weight, optimizer = one(start.to(dtype), foreach=foreach)
    oracle = AdamSReference(
        {"w": start[:1].numpy()}, {"w"}, l1=0.1, total_steps=40, lr=2.0**-11, betas=(0.9, 0.999)
    )
    spacing = 2.0**-8 if dtype == BF16 else 2.0**-11
    variance = np.zeros(size[1])
    for step in range(60):
        grad = torch.tensor([1.0, -0.5, 0.25, -0.125]).repeat(size[0], size[1] // 4)
        grad *= 2.0 ** (step % 3)
        before = oracle.params["w"].copy()
        weight.grad = grad.to(dtype)
        optimizer.step()
        oracle.step({"w": grad[:1].numpy()}, lr_factor=1.0)
        moved = np.abs(oracle.params["w"] - before)[0]
        variance += np.minimum(moved, spacing) * spacing  # more than p (1 - p) spacing^2
        mean = weight.detach().double().mean(0).view(-1, 4).mean(0).numpy()
        error = np.sqrt(variance[:4] / (weight.numel() / 4))
        assert (np.abs(mean - oracle.params["w"][0, :4]) < 4 * error).all(), step
    gone = start.to(dtype).double() - weight.detach().double()
    assert (gone.mean(0).abs() > 2 * spacing).all()


def test_kept_weights_without_gradients_stay_and_masked_ones_decay():
    start = normal(64, 64, dtype=torch.float32).to(BF16)
    weight, optimizer = one(start, total_steps=1, lr=1e-3)
    mask = nm_mask(start, 2, 4)
    for _ in range(10):
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
    state = optimizer.state[weight]
    assert torch.equal(unpack(state["mask"], weight.shape), mask)
    assert torch.equal(weight[mask], start[mask])
    gone = (start.double() - weight.detach().double()) * start.double().sign()
    assert gone[~mask].mean() > 1e-3 and (weight[~mask] != start[~mask]).any()
    assert {state[key].dtype for key in ("exp_avg", "exp_avg_sq")} == {torch.float32}


def fitted(dtype, **hyper):
    """Weights fitted to a target by noisy gradients, as the decay ramps up and the rate falls."""
    target = normal(48, 64, seed=1, dtype=torch.float32) / 8
    weight = nn.Parameter((target + normal(48, 64, dtype=torch.float32) / 8).to(dtype))
    optimizer = AdamS(
        [{"params": [weight], "role": "hidden"}],
        lr=0.0,
        betas=(0.9, 0.95),
        l1=1.0,
        total_steps=300,
        **hyper,
    )
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 300)
        noise = normal(48, 64, seed=2 + step, dtype=torch.float32) / 8
        weight.grad = (weight.detach().float() - target + noise).to(dtype)
        optimizer.step()
    mask = nm_mask(weight.detach(), 2, 4)
    size = weight.detach().double().abs()
    return size[~mask].max() / size[mask].median(), (weight.detach() - target)[mask].double()


def test_a_run_ends_as_sparse_as_in_float32():
    """Masked weights at most a thousandth of the kept ones' median, and those as well fitted."""
    masked, error = fitted(BF16, rounding="stochastic")
    masked_exact, error_exact = fitted(torch.float32)
    assert masked_exact < 1e-3 and masked < 1e-3
    assert error.square().mean() < 1.05 * error_exact.square().mean()
    assert math.isfinite(error.square().mean())
