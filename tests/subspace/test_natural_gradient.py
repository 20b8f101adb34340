"""The natural gradient from a kept Gram matrix, against the inverse of the whole Fisher matrix."""

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn
from torch.testing import assert_close

from optimzoo import NaturalGaLore
from optimzoo.subspace.natural import natural_gradient, quantized, rotate_history
from optimzoo.subspace.projector import Rotation

ROWS, COLUMNS = 3, 8


def normal(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def ring(size, *shape, batch=(), dtype=torch.float64, gram=None):
    gram = gram or torch.promote_types(dtype, torch.float32)
    return {
        "history": torch.zeros(*batch, size, *shape, dtype=dtype),
        "gram": torch.zeros(*batch, size, size, dtype=gram),
    }


def coded(size, *shape, batch=(), dtype=torch.float64):
    """A ring of codes."""
    return {
        "history": torch.zeros(*batch, size, *shape, dtype=torch.int8),
        "history_scale": torch.zeros(*batch, size, shape[0], 1, dtype=dtype),
        "gram": torch.zeros(*batch, size, size, dtype=dtype),
    }


def decoded(gradient):
    """A gradient as its codes have it: 127 steps to the largest magnitude of each row."""
    rows = gradient.numpy()
    steps = np.abs(rows).max(-1, keepdims=True) / rows.dtype.type(127)
    codes = np.round(rows / np.where(steps > 0, steps, 1))
    return torch.tensor(codes.astype(np.float64) * steps.astype(np.float64))


def direct(gradients, damping):
    """F^-1 g of the last gradient, with F formed in full from all of them."""
    h = np.stack([g.double().numpy().reshape(-1) for g in gradients])
    fisher = damping * np.eye(h.shape[1]) + h.T @ h
    return torch.tensor(
        scipy.linalg.solve(fisher, h[-1], assume_a="pos").reshape(*gradients[-1].shape)
    )


def distance(a, b):
    return (torch.linalg.norm(a.double() - b) / torch.linalg.norm(b)).item()


def expectation(known, damping, mean=None):
    """The direct inverse; relative to `mean`, in its units."""
    if mean is None:
        return direct(known, damping)
    return direct(known, damping * mean) * (1 + damping) * mean


def walk(state, gradients, damping, relative=False):
    """The natural gradients of a sequence."""
    size = state["gram"].shape[-1]
    return [
        natural_gradient(state, g, t % size, damping=damping, relative=relative)
        for t, g in enumerate(gradients)
    ]


def similar(count, noise, shape=(4, 128), dtype=torch.float32):
    """Gradients that are one and the same but for noise."""
    steady = normal(*shape, seed=99)
    return [(steady + noise * normal(*shape, seed=i)).to(dtype) for i in range(count)]


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("damping", [1e-3, 0.1, 10.0])
@pytest.mark.parametrize("size", [1, 4, 20, 60])
def test_is_the_direct_inverse_while_the_ring_fills_and_after(size, damping, relative):
    """60 rows are more than the 24 elements of a gradient."""
    state = ring(size, ROWS * COLUMNS)
    gradients = [normal(ROWS, COLUMNS, seed=t) * 2.0 ** (t % 5 - 2) for t in range(45)]
    for t, natural in enumerate(walk(state, gradients, damping, relative)):
        known = gradients[max(0, t + 1 - size) : t + 1]
        mean = sum(g.square().sum().item() for g in known) / len(known)
        expected = expectation(known, damping, mean if relative else None)
        assert natural.shape == (ROWS, COLUMNS)
        assert distance(natural, expected) < 1e-10, t


def test_strong_relative_damping_gives_the_gradient_back():
    gradients = [normal(ROWS, COLUMNS, seed=t) * 10.0 ** (t % 5 - 2) for t in range(9)]
    naturals = walk(ring(4, ROWS * COLUMNS), gradients, 1e6, relative=True)
    for natural, gradient in zip(naturals, gradients, strict=True):
        assert distance(natural, gradient) < 1e-5


def test_a_stack_is_each_of_its_matrices_by_itself():
    size, stack = 4, [normal(3, ROWS, COLUMNS, seed=t) for t in range(9)]
    for gradients in stack:
        gradients *= torch.tensor([1e-3, 1.0, 1e3], dtype=torch.float64)[:, None, None]
    for damping, relative in ((1e-3, False), (0.0, False), (0.1, True)):
        together = walk(ring(size, ROWS * COLUMNS, batch=(3,)), stack, damping, relative)
        for i in range(3):
            alone = walk(ring(size, ROWS * COLUMNS), [g[i] for g in stack], damping, relative)
            assert_close(torch.stack(together)[:, i], torch.stack(alone), rtol=1e-9, atol=0)


def test_an_empty_slice_or_a_bad_one_leaves_the_others_alone():
    stack = [normal(3, ROWS, COLUMNS, seed=t) for t in range(6)]
    expected = torch.stack(walk(ring(4, ROWS * COLUMNS, batch=(3,)), stack, 0.1))
    for bad in (0.0, float("nan"), float("inf")):
        spoilt = [g.clone() for g in stack]
        spoilt[2][1] = bad
        found = torch.stack(walk(ring(4, ROWS * COLUMNS, batch=(3,)), spoilt, 0.1))
        assert_close(found[:, [0, 2]], expected[:, [0, 2]])
        if bad == 0:
            assert (found[2, 1] == 0).all()
            assert found.isfinite().all()
        else:  # for as long as it is in the ring
            assert found[2:, 1].isnan().all()
            assert found[:2].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_gram_matrix_stays_that_of_the_history(dtype):
    """Through many updates, and through rotations into other subspaces."""
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 1e-5}[dtype]
    for batch in ((), (2,)):
        state = ring(6, ROWS, COLUMNS, batch=batch, dtype=dtype)
        shape = (*batch, ROWS, COLUMNS)
        for t in range(200):
            g = normal(*shape, seed=t, dtype=dtype)
            natural_gradient(state, g, t % 6, damping=1e-3, relative=False)
            if t % 30 == 20:
                turn = torch.linalg.qr(normal(*batch, ROWS, ROWS, seed=t))[0]
                rotate_history(state, Rotation(turn, None))
            if t % 30 == 29:
                turn = torch.linalg.qr(normal(*batch, COLUMNS, COLUMNS, seed=t))[0]
                rotate_history(state, Rotation(None, turn))
            history = state["history"].double().flatten(-2)
            products = history @ history.mT
            assert (state["gram"] - products).abs().max() < tolerance * products.abs().max()
            assert torch.equal(state["gram"], state["gram"].mT) or t % 30 in (20, 29)


def test_a_rotated_history_is_the_history_of_rotated_gradients():
    left, right = (torch.linalg.qr(normal(n, n, seed=n))[0] for n in (ROWS, COLUMNS))
    gradients = [normal(ROWS, COLUMNS, seed=t) for t in range(7)]
    for rotation in (Rotation(left, None), Rotation(None, right), Rotation(left, right)):
        turned, plain = ring(4, ROWS, COLUMNS), ring(4, ROWS, COLUMNS)
        walk(plain, gradients, 0.1)
        rotate_history(plain, rotation)
        walk(turned, [rotation(g) for g in gradients], 0.1)
        assert_close(plain, turned)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_without_damping_a_gradient_that_repeats_goes_through_jitter(dtype):
    """The history is singular: the limit of no damping is g / (j |g|^2) after j steps."""
    limit = {torch.float64: 1e-5, torch.float32: 5e-3, torch.bfloat16: 2e-2}[dtype]
    for shape in ((1, 5), (4, 32)):
        g = normal(*shape, dtype=dtype)
        state = ring(4, g.numel(), dtype=dtype)
        for t, natural in enumerate(walk(state, [g] * 9, 0.0)):
            expected = g.double() / (min(t + 1, 4) * g.double().square().sum())
            assert natural.dtype == dtype
            assert distance(natural, expected) < limit, t


def test_an_indefinite_gram_matrix_is_refused_in_one_line():
    state = ring(4, 24)
    walk(state, [normal(ROWS, COLUMNS, seed=t) for t in range(4)], 1e-3)
    state["gram"][1, 2] = state["gram"][2, 1] = 1e3
    with pytest.raises(RuntimeError, match=r"not positive definite with damping=0.001") as caught:
        natural_gradient(state, normal(ROWS, COLUMNS), 0, damping=1e-3, relative=False)
    assert "\n" not in str(caught.value)
    assert "raise the damping" in str(caught.value)
    state["gram"].copy_(-100 * torch.eye(4))
    with pytest.raises(RuntimeError, match="not positive definite"):
        natural_gradient(state, normal(ROWS, COLUMNS), 0, damping=1e-3, relative=False)


@pytest.mark.sampled(4)
@pytest.mark.parametrize(("damping", "relative"), [(1e-3, False), (1e-3, True), (1e-1, True)])
@pytest.mark.parametrize("noise", [1.0, 0.1, 0.01, 0.0])
def test_a_bfloat16_gradient_gives_the_inverse_of_its_own_history(noise, damping, relative):
    """Similar gradients too, whose Gram matrix bfloat16 would make indefinite."""
    gradients = similar(30, noise, dtype=torch.bfloat16)
    state = ring(20, 512, dtype=torch.bfloat16)
    for t, natural in enumerate(walk(state, gradients, damping, relative)):
        known = gradients[max(0, t - 19) : t + 1]
        mean = sum(g.double().square().sum().item() for g in known) / len(known)
        expected = expectation(known, damping, mean if relative else None)
        # Of the float32 Gram matrix, whatever order the machine sums in, beside the damping.
        rounding = 0.0 if relative else 2**-24 * mean / damping
        assert distance(natural, expected) < 2e-2 + rounding, t


@pytest.mark.parametrize("noise", [1.0, 0.3, 0.1])
def test_a_bfloat16_history_is_off_by_its_rounding(noise):
    """2^-9 of the gradient, which weighs as much as it does beside what tells gradients apart."""
    gradients = similar(30, noise)
    for relative in (False, True):
        naturals = walk(ring(20, 512, dtype=torch.bfloat16), gradients, 1e-3, relative)
        assert {n.dtype for n in naturals} == {torch.float32}
        for t, natural in enumerate(naturals):
            known = gradients[max(0, t - 19) : t + 1]
            mean = sum(g.double().square().sum().item() for g in known) / len(known)
            expected = expectation(known, 1e-3, mean if relative else None)
            assert distance(natural, expected) < 2**-8 / noise + 2**-8, t


@pytest.mark.parametrize(("damping", "relative"), [(1e-3, False), (0.1, True), (100.0, True)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_codes_give_the_inverse_of_what_they_stand_for(dtype, damping, relative):
    """With a row of zeros, and through a history that wraps around."""
    gradients = [normal(4, 128, seed=t, dtype=dtype) * 2.0 ** (t % 3) for t in range(12)]
    gradients[5][2] = 0
    naturals = walk(coded(5, 4, 128, dtype=dtype), gradients, damping, relative)
    for t, natural in enumerate(naturals):
        known = [decoded(g) for g in gradients[max(0, t - 4) : t + 1]]
        mean = sum(g.square().sum().item() for g in known) / len(known)
        expected = expectation(known, damping, mean if relative else None)
        assert natural.dtype == dtype
        assert distance(natural, expected) < {torch.float64: 1e-8, torch.float32: 2e-3}[dtype], t


def test_codes_are_off_by_half_a_step_and_keep_what_is_not_finite():
    low = normal(6, 40, dtype=torch.float32)
    low[3] = 0
    codes, scale = quantized(low)
    assert (codes * scale - low).abs().le(low.abs().amax(-1, keepdim=True) / 253.9).all()
    for bad in (torch.nan, torch.inf):
        low[1, 2] = bad
        codes, scale = quantized(low)
        values = codes * scale
        assert not values[1].isfinite().any() and values[[0, 2, 3, 4, 5]].isfinite().all()


@pytest.mark.parametrize("noise", [1.0, 0.3])
def test_a_history_of_codes_is_off_by_their_rounding(noise):
    """Half a step of a row, which weighs as much as it does beside what tells gradients apart."""
    gradients = similar(30, noise)
    naturals = walk(coded(20, 4, 128, dtype=torch.float32), gradients, 0.1, relative=True)
    exact = walk(ring(20, 4, 128, dtype=torch.float32), gradients, 0.1, relative=True)
    for natural, expected in zip(naturals, exact, strict=True):
        assert distance(natural, expected.double()) < 2**-5 / noise


@pytest.mark.parametrize("batch", [(), (2,)], ids=str)
def test_a_rotated_history_of_codes_has_its_gram_matrix(batch):
    state = coded(4, ROWS, COLUMNS, batch=batch)
    gradients = [normal(*batch, ROWS, COLUMNS, seed=t) for t in range(4)]
    walk(state, gradients, 0.1)
    before = state["history"].double() * state["history_scale"]
    turn = torch.linalg.qr(normal(*batch, ROWS, ROWS, seed=9))[0]
    rotate_history(state, Rotation(turn, None))
    values = state["history"].double() * state["history_scale"]
    assert distance(values, turn.unsqueeze(-3) @ before) < 2**-6
    rows = values.flatten(-2)
    assert_close(state["gram"], rows @ rows.mT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_long_low_precision_history_is_summed_in_parts(dtype):
    """More columns than are widened at a time; float16 alone would overflow at 65504."""
    gradients = [normal(3, 50_000, seed=t, dtype=torch.float32) for t in range(4)]
    naturals = walk(ring(3, 150_000, dtype=dtype), gradients, 1e-3, relative=True)
    exact = walk(ring(3, 150_000, dtype=torch.float32), gradients, 1e-3, relative=True)
    for natural, expected in zip(naturals, exact, strict=True):
        assert distance(natural, expected.double()) < 1e-2


@pytest.mark.parametrize(
    "history_dtype", ["auto", "float32", "bfloat16", "float16", "float64", "int8"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_history_dtype_is_that_of_the_state_and_trains(history_dtype, dtype):
    weight = nn.Parameter(normal(12, 7, dtype=dtype))
    target = normal(12, 7, seed=1, dtype=dtype)
    optimizer = NaturalGaLore(
        [{"params": [weight], "role": "hidden"}],
        lr=0.2,
        rank=4,
        update_proj_gap=5,
        history=3,
        history_dtype=history_dtype,
    )
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (weight - target).float().square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    state = optimizer.state[weight]
    kept = dtype if history_dtype == "auto" else getattr(torch, history_dtype)
    assert state["history"].dtype == kept
    assert state["gram"].dtype == torch.promote_types(kept, torch.float32)
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_goes_into_its_own_weight_alone(bad):
    """As in torch. The subspace outlives it."""
    weights = [nn.Parameter(normal(12, 7, seed=i)) for i in range(2)]
    optimizer = NaturalGaLore(
        [{"params": weights, "role": "hidden"}], rank=3, update_proj_gap=2, history=3
    )
    for step in range(4):
        for i, weight in enumerate(weights):
            weight.grad = normal(12, 7, seed=10 * step + i)
        if step == 2:  # a refresh
            weights[0].grad[1, 2] = bad
        optimizer.step()
    assert weights[0].isnan().any()
    assert weights[1].isfinite().all()
    assert optimizer.state[weights[0]]["projector_right"].isfinite().all()
