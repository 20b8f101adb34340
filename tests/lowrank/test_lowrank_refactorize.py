"""Refactorization: against SciPy's SVD, at every rank, in every type, and what it refuses."""

import numpy as np
import pytest
import torch
from reference.lowrank_numpy import condition_number, svd_factors
from torch import nn

from optimzoo.lowrank import (
    LoRALinear,
    LowRankLinear,
    SparseLowRankLinear,
    balanced_factors,
    refactorize_,
)

SHAPES = [(12, 7, 4), (7, 12, 4), (129, 5, 5), (5, 129, 3), (9, 9, 9), (1, 7, 1), (7, 1, 1)]
WIDE_RANK = [(3, 5, 8), (5, 3, 4), (4, 4, 9), (1, 1, 3)]  # r > min(m, n)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def draw(m, n, r, dtype=torch.float64, seed=0, condition=1e3):
    """Factors that are far from balanced, with singular values spread over ``condition``."""
    generator = torch.Generator().manual_seed(seed)
    B = torch.randn(m, r, generator=generator, dtype=torch.float64)
    A = torch.randn(r, n, generator=generator, dtype=torch.float64)
    spread = torch.logspace(0, -float(np.log10(condition)), r, dtype=torch.float64)
    return (20 * B).to(dtype), (0.05 * spread[:, None] * A).to(dtype)


def difference(pair, other) -> float:
    ours, theirs = (B.double() @ A.double() for B, A in (pair, other))
    return ((ours - theirs).norm() / theirs.norm().clamp_min(1e-300)).item()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES + WIDE_RANK)
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_the_product_stays_and_the_singular_values_are_shared(shape, dtype, alpha):
    m, n, r = shape
    B, A = draw(m, n, r, dtype)
    newB, newA = balanced_factors(B, A, alpha)
    assert (newB.shape, newA.shape, newB.dtype) == (B.shape, A.shape, dtype)
    assert difference((newB, newA), (B, A)) < TOLERANCE[dtype]
    values = torch.linalg.svdvals(B.double() @ A.double())[:r]
    kept = len(values)
    gram_B, gram_A = newB.double().mT @ newB.double(), newA.double() @ newA.double().mT
    wanted = torch.zeros(r, dtype=torch.float64)
    for gram, power in ((gram_B, 2 * alpha), (gram_A, 2 - 2 * alpha)):
        wanted[:kept] = values**power
        slack = TOLERANCE[dtype] * max(1.0, wanted.max().item())
        torch.testing.assert_close(gram, wanted.diag(), rtol=0, atol=slack * 10)
    if alpha == 0.5:
        assert newB.norm().item() == pytest.approx(newA.norm().item(), rel=10 * TOLERANCE[dtype])


@pytest.mark.parametrize("shape", SHAPES + WIDE_RANK)
@pytest.mark.parametrize("alpha", [0.25, 0.5])
def test_the_factors_are_those_of_the_svd_of_the_product(shape, alpha):
    B, A = draw(*shape, condition=10)
    newB, newA = balanced_factors(B, A, alpha)
    left, right = svd_factors(B.numpy(), A.numpy(), alpha)
    # Each singular pair is free in its sign alone.
    signs = np.sign((left * newB.numpy()).sum(0))
    assert np.abs(signs[: min(shape)]).all()
    size = max(np.abs(left).max(), np.abs(right).max())
    np.testing.assert_allclose(newB.numpy(), left * signs, rtol=0, atol=1e-11 * size)
    np.testing.assert_allclose(newA.numpy(), right * signs[:, None], rtol=0, atol=1e-11 * size)


def test_bf16_loses_what_rounding_the_exact_factors_loses():
    B, A = draw(96, 80, 16, torch.bfloat16, condition=10)
    ours = difference(balanced_factors(B, A), (B, A))
    exact = balanced_factors(B.double(), A.double())
    rounded = difference([t.bfloat16() for t in exact], (B, A))
    assert ours < 1.1 * rounded < 5e-3


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_rank_deficient_and_rank_one(dtype):
    B, A = draw(12, 9, 5, dtype, condition=1)
    B[:, 3:] = B[:, :2]  # rank 3
    one = B[:, :1] @ torch.ones(1, 5, dtype=dtype)
    for left in (B, one):
        newB, newA = balanced_factors(left, A)
        assert difference((newB, newA), (left, A)) < TOLERANCE[dtype]
        assert newB.isfinite().all() and newA.isfinite().all()
        assert newB.norm().item() == pytest.approx(newA.norm().item(), rel=1e-4)
    zero = balanced_factors(torch.zeros_like(B), A)
    assert not zero[0].any() and not zero[1].any()


@pytest.mark.parametrize("size", [1e30, 1e-30])
def test_factors_whose_product_of_triangles_leaves_float32(size):
    B, A = draw(12, 9, 4, torch.float32, condition=1)
    newB, newA = balanced_factors(B * size, A * size)
    ours = newB.double() @ newA.double() / size / size
    assert difference((B, A), (ours, torch.eye(9))) < 1e-5
    assert newB.norm().item() == pytest.approx(newA.norm().item(), rel=1e-5)


@pytest.mark.parametrize("shape", [(7, 5, 3), (4, 9, 2)])
def test_lemma_4_1_the_condition_number_is_best_in_the_middle(shape):
    """½ ‖B A - W‖² at its minimum, with singular values 10 to 0.1 of W."""
    B, A = (t.numpy() for t in draw(*shape, condition=100))
    numbers = {}
    for alpha in (0.0, 0.25, 0.5, 0.75, 1.0):
        factors = balanced_factors(torch.tensor(B), torch.tensor(A), alpha)
        numbers[alpha] = condition_number(*(t.numpy() for t in factors))
    assert min(numbers, key=lambda alpha: numbers[alpha]) == 0.5
    assert numbers[0.5] < numbers[0.25] < numbers[0.0]
    assert numbers[0.5] < numbers[0.75] < numbers[1.0]


def model(dtype=torch.float64) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(
        LowRankLinear(8, 12, 3, dtype=dtype),
        nn.Tanh(),
        SparseLowRankLinear(12, 6, 4, sparsity=0.2, dtype=dtype),
        LoRALinear(6, 9, 2, dtype=dtype),
        nn.Linear(9, 5, dtype=dtype),
    )
    with torch.no_grad():
        for layer in (layers[2], layers[3]):
            layer.B.normal_(std=3.0)
    return layers


def test_in_a_model_the_function_scale_and_other_parts_stay():
    net = model()
    x = torch.randn(4, 8, dtype=torch.float64)
    before, kept = net(x), {k: v.clone() for k, v in net.state_dict().items()}
    pointers = [p.data_ptr() for p in net.parameters()]
    assert refactorize_(net) == 3
    torch.testing.assert_close(net(x), before, rtol=1e-12, atol=1e-12)
    for name, value in net.state_dict().items():
        assert torch.equal(value, kept[name]) == (not name.endswith((".A", ".B"))), name
    assert [p.data_ptr() for p in net.parameters()] == pointers
    for layer in (net[0], net[2], net[3]):
        assert layer.B.norm().item() == pytest.approx(layer.A.norm().item())
    assert refactorize_(net[0], alpha=1.0) == 1
    assert torch.allclose(net[0].A @ net[0].A.mT, torch.eye(3, dtype=torch.float64))


def test_a_product_of_zero_keeps_its_way_to_learn():
    net = model()
    with torch.no_grad():
        net[2].B.zero_()
        net[3].A.zero_()
    kept = [net[2].A.clone(), net[3].B.clone()]
    assert refactorize_(net) == 1
    assert torch.equal(net[2].A, kept[0]) and torch.equal(net[3].B, kept[1])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_factors_that_are_not_finite_change_nothing(value):
    net = model()
    with torch.no_grad():
        net[2].A[1, 2] = value
    kept = net[0].B.clone()
    with pytest.raises(ValueError, match=r"^2 has factors that are not finite; go back") as caught:
        refactorize_(net)
    assert "\n" not in str(caught.value) and torch.equal(net[0].B, kept)
    with pytest.raises(ValueError, match=r"^SparseLowRankLinear has factors"):
        refactorize_(net[2])


def test_what_it_refuses():
    with pytest.raises(ValueError, match="Linear has no low-rank layer; convert it first"):
        refactorize_(nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"alpha is 1\.5; it must be from 0 to 1"):
        balanced_factors(torch.eye(2), torch.eye(2), 1.5)
    with pytest.raises(ValueError, match=r"shapes \(2, 2\) and \(3, 3\) are not"):
        balanced_factors(torch.eye(2), torch.eye(3))
