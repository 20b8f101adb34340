"""Symmetric products of Newton–Schulz: in panels where they are large, as NumPy has them."""

import numpy as np
import pytest
import torch
from reference.spectral_numpy import whitened_newton_schulz

from optimzoo.subspace import newton_schulz
from optimzoo.subspace.newton_schulz import orthogonalize, symmetric_product, whiten

SIZES = [(383, 400), (384, 384), (400, 390), (513, 700)]


@pytest.mark.parametrize(("rows", "cols"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_symmetric_product_is_the_product(rows, cols, dtype):
    x = np.random.default_rng(rows).standard_normal((rows, cols))
    bound = 1e-12 if dtype == torch.float64 else 1e-5
    matrix = torch.tensor(x, dtype=dtype)
    gram = symmetric_product(matrix, matrix.mT)
    expected = x @ x.T
    np.testing.assert_allclose(gram, expected, rtol=0, atol=bound * np.abs(expected).max())
    sums = symmetric_product(gram, gram, gram, beta=0.5, alpha=-0.25)
    expected = 0.5 * expected - 0.25 * expected @ expected
    np.testing.assert_allclose(sums, expected, rtol=0, atol=bound * np.abs(expected).max())
    if rows >= 384:
        assert torch.equal(gram, gram.mT) and torch.equal(sums, sums.mT)


def orthogonalized(x, steps=5):
    """The iteration on X in float64."""
    x = x if x.shape[0] <= x.shape[1] else x.T
    x = x / np.linalg.norm(x)
    a, b, c = newton_schulz.COEFFICIENTS
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


@pytest.mark.parametrize("shape", [(390, 400), (900, 390), (400, 900)])
def test_large_matrices_are_orthogonalized_and_whitened_as_numpy_does(shape):
    x = np.random.default_rng(0).standard_normal(shape)
    expected = orthogonalized(x)
    result = orthogonalize(torch.tensor(x)).numpy()
    result = result if shape[0] <= shape[1] else result.T
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-12)
    # Rounding grows with the condition of the Gram matrix: about 1e4 for the square-like one.
    white = whiten(torch.tensor(x), steps=6).numpy()
    np.testing.assert_allclose(white, whitened_newton_schulz(x, 6, 0.5), rtol=0, atol=1e-10)


def test_small_ones_and_stacks_are_multiplied_whole(monkeypatch):
    monkeypatch.setattr(torch, "addmm", None)  # what the panels call
    small, stack = torch.randn(383, 8), torch.randn(2, 400, 8)
    for x in (small, stack, torch.randn(400, 8).bfloat16()):
        assert torch.equal(symmetric_product(x, x.mT), x @ x.mT)


def test_large_matrices_have_a_gradient():
    x = torch.randn(384, 400, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(384, 400, dtype=torch.float64)
    (orthogonalize(x, steps=1) * weight).sum().backward()
    change = 1e-6 * torch.randn_like(weight)
    with torch.no_grad():
        ends = [(orthogonalize(x + s * change, steps=1) * weight).sum() for s in (1, -1)]
    torch.testing.assert_close((x.grad * change).sum(), (ends[0] - ends[1]) / 2, rtol=1e-5, atol=0)


def test_a_zero_matrix_stays_zero():
    zero = torch.zeros(400, 410)
    assert not orthogonalize(zero).any() and not whiten(zero, steps=4).any()
