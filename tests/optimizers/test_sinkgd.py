"""What SinkGD's normalisation keeps to; its steps are in `test_zoo_fidelity`."""

import numpy as np
import pytest
import torch
from reference.spectral_numpy import sr_sinkhorn
from torch import nn
from torch.testing import assert_close

from optimzoo import SinkGD
from optimzoo.optimizers.sinkgd import sinkhorn

SHAPES = [(12, 7), (7, 12), (9, 9), (129, 5), (1, 7), (7, 1), (1, 1)]


def normal(*shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def rms(x, dim):
    return x.square().mean(dim).sqrt()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_and_columns_tend_to_the_rms_one(shape):
    x = sinkhorn(normal(*shape), 5)
    assert_close(rms(x, 0), torch.ones(shape[1], dtype=x.dtype), rtol=1e-12, atol=0)
    x = sinkhorn(normal(*shape), 300)
    assert_close(rms(x, 1), torch.ones(shape[0], dtype=x.dtype), rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(1, 7), (7, 1)], ids=str)
def test_a_line_gives_its_signs(shape):
    grad = normal(*shape)
    assert_close(sinkhorn(grad, 1), grad.sign())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_zero_rows_and_columns_stay_zero_and_leave_the_others_alone(dtype):
    grad = normal(12, 7, dtype=dtype)
    grad[[0, 5]] = 0
    grad[:, [2, 6]] = 0
    x = sinkhorn(grad, 5)
    assert x.dtype == torch.promote_types(dtype, torch.float32)
    assert not x[[0, 5]].any() and not x[:, [2, 6]].any()
    expected = sr_sinkhorn(grad.double().numpy(), 5)
    assert_close(x.double(), torch.from_numpy(expected), rtol=1e-5, atol=1e-5)
    assert not sinkhorn(torch.zeros(12, 7, dtype=dtype), 5).any()


@pytest.mark.parametrize("power", [-60, -20, 20, 50])
def test_only_the_direction_of_a_gradient_counts(power):
    """Of a small one too: an eps beside its norms would change the rule."""
    grad = normal(12, 7, dtype=torch.float32)
    assert torch.equal(sinkhorn(grad * 2.0**power, 5), sinkhorn(grad, 5))


def test_a_stack_is_its_matrices_and_the_gradient_stays():
    grad = normal(2, 3, 12, 7, dtype=torch.float32)
    before = grad.clone()
    x = sinkhorn(grad, 5)
    assert torch.equal(grad, before)
    for matrix, own in zip(grad.flatten(0, 1), x.flatten(0, 1), strict=True):
        assert_close(own, sinkhorn(matrix, 5))


@pytest.mark.parametrize("shape", [(24, 40), (33, 17)], ids=str)
def test_thirty_steps_in_bfloat16_follow_the_reference(shape):
    """Normalised in float32, and rounded once: each step is the reference's, rounded."""
    weight = nn.Parameter(normal(*shape, dtype=torch.bfloat16))
    optimizer = SinkGD([{"params": [weight], "role": "hidden"}], weight_decay=0.1, alpha=1.0)
    lr = optimizer.param_groups[0]["lr"]
    for step in range(30):
        before = weight.detach().double().numpy()
        grad = (normal(*shape) * (1 + step) + normal(*shape[::-1]).mT).to(torch.bfloat16)
        weight.grad = grad
        optimizer.step()
        exact = before * (1 - 0.1 * lr) - lr * sr_sinkhorn(grad.double().numpy(), 5)
        off = np.abs(weight.detach().double().numpy() - exact)
        assert (off <= 2.0**-8 * np.abs(exact) + 1e-6).all(), step
    assert optimizer.state[weight] == {}


def test_the_rate_of_a_hidden_weight_is_alpha_times_that_of_the_others():
    weights = [nn.Parameter(torch.ones(8, 6)) for _ in range(2)]
    rates = [{"lr": 0.02}, {"lr": 0.001, "alpha": 1.0}]
    for weight, own in zip(weights, rates, strict=True):
        optimizer = SinkGD([{"params": [weight], "role": "hidden"}], weight_decay=0.5, **own)
        weight.grad = normal(8, 6, dtype=torch.float32)
        optimizer.step()
        assert optimizer.param_groups[0]["lr"] == own["lr"]
    assert_close(*weights)
