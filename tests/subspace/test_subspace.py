"""Bases of gradients, compared as subspaces, and what a refresh does to the moments."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn
from torch.testing import assert_close

from optimzoo import GaLore
from optimzoo.models import llama
from optimzoo.subspace import projector
from optimzoo.subspace.bases import KINDS, leading_basis
from optimzoo.subspace.projector import Rotation, project, project_back, refresh, resolve_side

no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")
EVERY_SHAPE = [(12, 7), (7, 12), (9, 9), (1, 7), (7, 1), (1, 1), (129, 7), (3, 8, 5), (2, 3, 5, 8)]


def normal(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def with_spectrum(m, n, values, seed=0):
    k = min(m, n)
    u, v = (torch.linalg.qr(normal(x, k, seed=seed + i))[0] for i, x in enumerate((m, n)))
    return (u * torch.as_tensor(values, dtype=torch.float64)) @ v.mT


def power_law(m, n, exponent, seed=0):
    return with_spectrum(m, n, np.arange(1.0, min(m, n) + 1) ** -exponent, seed)


def angle(a, b):
    """The largest principal angle between two subspaces, in radians."""
    return scipy.linalg.subspace_angles(a.double().numpy(), b.double().numpy()).max()


def energy(basis, grad, rank):
    """What the basis captures of what the best one of this rank does."""
    values = torch.linalg.svdvals(grad.double())[:rank]
    return (
        torch.linalg.norm(basis.double().mT @ grad.double()) ** 2 / values.square().sum()
    ).item()


def assert_orthonormal(basis, tolerance=2e-6):
    eye = torch.eye(basis.shape[-1], dtype=torch.float64)
    products = basis.double().mT @ basis.double()
    assert_close(products, eye.expand_as(products), atol=tolerance, rtol=0)


def test_svd_is_the_leading_subspace():
    for shape in [(129, 40), (40, 129), (33, 33)]:
        for rank in (1, 5, 16):
            grad = power_law(*shape, 0.7)
            exact = torch.tensor(scipy.linalg.svd(grad.numpy())[0][:, :rank])
            assert angle(leading_basis(grad, rank, kind="svd"), exact) < 1e-10
            assert angle(leading_basis(grad.float(), rank, kind="svd"), exact) < 1e-4


@pytest.mark.sampled(4)
@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("shape", [(129, 64), (64, 129), (256, 256), (7, 129)], ids=str)
def test_randomized_captures_the_energy_of_a_power_law(shape, exponent):
    for rank in (1, 4, 16, 32):
        basis = None
        for refreshed in range(3):  # the first is a cold start
            grad = power_law(*shape, exponent).float()
            basis = leading_basis(grad, rank, previous=basis, seed=refreshed)
            assert energy(basis, grad, min(rank, *shape)) > 0.99, (rank, refreshed)


def test_randomized_is_exact_where_the_spectrum_ends():
    for shape in [(129, 40), (40, 129)]:
        values = np.zeros(40)
        values[:5] = (3.0, 2.5, 2.0, 1.0, 0.5)
        grad = with_spectrum(*shape, values)
        for previous in (None, torch.linalg.qr(normal(shape[0], 5, seed=9))[0]):
            basis = leading_basis(grad, 5, previous=previous, seed=1)
            assert angle(basis, leading_basis(grad, 5, kind="svd")) < 1e-7


@pytest.fixture(scope="module")
def real_gradients():
    """Of a small Llama that learns the bytes of the licence: name -> one gradient a step."""
    text = torch.tensor(list((Path(__file__).resolve().parents[2] / "LICENSE").read_bytes()))
    model = llama.Llama(llama.LlamaConfig(256, 96, 256, 2, 4), seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    kept = {name: [] for name, p in model.named_parameters() if "proj" in name}
    for step in range(7):
        start = torch.randint(
            0, len(text) - 65, (8,), generator=torch.Generator().manual_seed(step)
        )
        tokens = torch.stack([text[i : i + 65] for i in start])
        optimizer.zero_grad()
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        if step % 3 == 0:
            for name in kept:
                kept[name].append(model.get_parameter(name).grad.clone())
        optimizer.step()
    return kept


@pytest.mark.parametrize("rank", [4, 24])
def test_randomized_captures_the_energy_of_real_gradients(real_gradients, rank):
    for name, grads in real_gradients.items():
        for transposed in (False, True):
            warm = None
            for step, grad in enumerate(g.mT if transposed else g for g in grads):
                warm = leading_basis(grad, rank, previous=warm, seed=step)
                cold = leading_basis(grad, rank, seed=step)
                assert energy(warm, grad, rank) > 0.99, (name, step)
                assert energy(cold, grad, rank) > 0.99, (name, step)
                assert_orthonormal(warm)


def test_power_converges_under_repeated_refreshes():
    for shape in [(129, 40), (40, 129), (33, 33)]:
        grad = power_law(*shape, 1.0)
        exact = leading_basis(grad, 4, kind="svd")
        basis, angles = None, []
        for step in range(40):
            basis = leading_basis(grad, 4, kind="power", previous=basis, seed=step)
            angles.append(angle(basis, exact))
        assert angles[-1] < 1e-5 < angles[0]
        assert all(after < before or after < 1e-7 for before, after in pairwise(angles[3:]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_columns_are_orthonormal_for_every_shape_and_rank(kind, dtype):
    for shape in EVERY_SHAPE:
        for rank in (1, 3, min(shape[-2:]), 200):
            grad = normal(*shape, dtype=dtype)
            previous = None
            for step in range(2):
                basis = leading_basis(grad, rank, kind=kind, previous=previous, seed=step)
                assert basis.shape == (*shape[:-1], min(rank, *shape[-2:]))
                assert basis.dtype == torch.promote_types(dtype, torch.float32)
                assert_orthonormal(basis)
                previous = basis.to(dtype)  # as the state keeps it


@pytest.mark.parametrize("kind", KINDS)
def test_a_stack_has_the_subspaces_of_its_matrices(kind):
    stack = torch.stack([power_law(12, 7, a, seed=i) for i, a in enumerate((1.0, 2.0, 3.0))])
    stack *= torch.tensor([1e-6, 1.0, 1e6], dtype=torch.float64)[:, None, None]
    basis = None
    for step in range(30 if kind == "power" else 2):
        basis = leading_basis(stack, 2, kind=kind, previous=basis, seed=step)
    for matrix, found in zip(stack, basis, strict=True):
        assert angle(found, leading_basis(matrix, 2, kind="svd")) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf"), -float("inf")])
def test_a_gradient_without_direction_keeps_the_basis(kind, bad):
    for shape in [(12, 7), (7, 12)]:
        grad = torch.zeros(shape)
        grad[2, 3] = bad
        first = leading_basis(grad, 3, kind=kind)
        assert torch.equal(first, torch.eye(shape[0], 3))
        previous = leading_basis(normal(*shape, dtype=torch.float32), 3, kind="svd")
        assert torch.equal(leading_basis(grad, 3, kind=kind, previous=previous), previous)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_a_matrix_without_direction_leaves_the_rest_of_its_stack_alone(kind, bad):
    """An expert that no token reached."""
    previous = leading_basis(normal(3, 12, 7), 2, kind="svd")
    whole = power_law(12, 7, 1.0, seed=5).expand(3, 12, 7).clone()
    partly = whole.clone()
    partly[1] = 0
    partly[1, 4, 4] = bad
    for start, kept in ((previous, previous[1]), (None, torch.eye(12, 2, dtype=torch.float64))):
        expected = leading_basis(whole, 2, kind=kind, previous=start, seed=3)
        found = leading_basis(partly, 2, kind=kind, previous=start, seed=3)
        assert torch.equal(found[1], kept)
        assert_close(found[[0, 2]], expected[[0, 2]], atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_low_rank_and_ill_conditioned_gradients(kind):
    for shape in [(24, 15), (15, 24)]:
        values = np.zeros(15)
        values[:3] = (2.0, 1.0, 0.5)
        spectra = {"rank three": values, "ratio 1e30": np.logspace(15, -15, 15)}
        for name, spectrum in spectra.items():
            grad = with_spectrum(*shape, spectrum).float()
            basis = None
            for step in range(12 if kind == "power" else 2):
                basis = leading_basis(grad, 8, kind=kind, previous=basis, seed=step)
                assert_orthonormal(basis)
            leading = leading_basis(grad.double(), 3, kind="svd")
            missed = leading[:, :1] - basis.double() @ (basis.double().mT @ leading[:, :1])
            assert torch.linalg.norm(missed) < 1e-3, name
            assert energy(basis, grad, 8) > 0.9999, name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e18, 1e30])
def test_the_size_of_the_gradient_does_not_matter(kind, scale):
    grad = power_law(20, 12, 2.0).float()
    expected = leading_basis(grad, 3, kind=kind, seed=1)
    assert angle(leading_basis(grad * scale, 3, kind=kind, seed=1), expected) < 1e-3


def test_an_svd_that_does_not_converge_gives_way_to_the_range_finder(monkeypatch):
    """LAPACK gives up on some ill-conditioned gradients (jiaweizzhao/GaLore issue 58)."""
    calls = []

    def refuse(matrix, **options):
        calls.append(matrix.shape)
        raise torch.linalg.LinAlgError("linalg.svd: The algorithm failed to converge")

    grad = power_law(40, 24, 1.0)
    exact = leading_basis(grad, 4, kind="svd")
    weight = nn.Parameter(normal(12, 7))
    group = {"params": [weight], "role": "hidden", "scale": 1.0, "update_proj_gap": 5}
    optimizer = GaLore([group], lr=0.1, rank=2, projector="svd")
    target, losses = normal(12, 7, seed=4), []
    monkeypatch.setattr(torch.linalg, "svd", refuse)
    assert angle(leading_basis(grad, 4, kind="svd"), exact) < 1e-2
    for _ in range(20):
        optimizer.zero_grad()
        loss = (weight - target).square().sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert len(calls) == 5  # the direct call, and steps 1, 6, 11 and 16
    assert losses[-1] < 0.8 * losses[0]


def test_the_sketch_depends_on_the_seed_alone():
    grad = normal(40, 30)
    torch.manual_seed(1)
    first = leading_basis(grad, 3, seed=5)
    before = torch.get_rng_state()
    assert torch.equal(leading_basis(grad, 3, seed=5), first)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(leading_basis(grad, 3, seed=6), first)


@pytest.mark.parametrize("side", ["auto", "left", "right", "both"])
def test_project_then_back_is_the_projection(side):
    for shape in EVERY_SHAPE:
        state, grad = {}, normal(*shape)
        assert refresh(state, grad, rank=3, kind="svd", side=side, seed=0) is None
        again = project_back(state, project(state, grad))
        rank = min(3, *shape[-2:])
        u, s, vh = torch.linalg.svd(grad, full_matrices=False)
        assert_close(again, (u * s.unsqueeze(-2))[..., :rank] @ vh[..., :rank, :])
        chosen = resolve_side(side, grad.shape)
        assert chosen == side or side == "auto"
        keys = {"left": ["projector_left"], "right": ["projector_right"]}
        assert sorted(state) == keys.get(chosen, ["projector_left", "projector_right"])


def signed_permutation(size, seed):
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    signs = normal(size, seed=seed).sign()
    return torch.eye(size, dtype=torch.float64)[order] * signs


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (3, 8, 5)], ids=str)
def test_weights_do_not_feel_other_signs_or_another_order(monkeypatch, side, shape):
    """The same subspace, found with other vectors: rotated moments make nothing of it."""
    ends = []
    for turned in (False, True):
        weight = nn.Parameter(normal(*shape))
        group = {"params": [weight], "role": "hidden", "stacked": len(shape) > 2}
        optimizer = GaLore([group], rank=3, projector="svd", side=side, update_proj_gap=4)
        bases = []

        def steady(grad, rank, *, previous, turned=turned, bases=bases, **options):
            if previous is None:
                return leading_basis(grad, rank, kind="svd")
            bases.append(previous)
            return previous @ signed_permutation(rank, len(bases)) if turned else previous

        monkeypatch.setattr(projector, "leading_basis", steady)
        for step in range(14):
            weight.grad = normal(*shape, seed=step)
            optimizer.step()
        assert len(bases) == (6 if side == "both" else 3)
        ends.append(weight.detach())
    assert_close(ends[1], ends[0], rtol=1e-12, atol=1e-12)


def test_a_rotated_basis_keeps_the_mean_and_the_total_of_the_squares():
    """Another basis of the same subspace: the first moment is the same matrix of full size."""
    turn = torch.linalg.qr(normal(4, 4, seed=3))[0]
    old = torch.linalg.qr(normal(12, 4))[0]
    new = old @ turn
    m, v = normal(4, 9, seed=1), normal(4, 9, seed=2).square()
    rotation = Rotation(new.mT @ old, None)
    assert_close(new @ rotation(m), old @ m)
    assert_close(rotation.rotate_second_moment(v).sum(0), v.sum(0))
    assert (rotation.rotate_second_moment(v) >= 0).all()
    both = Rotation(new.mT @ old, new.mT @ old)
    square = normal(4, 4, seed=5)
    assert_close(new @ both(square) @ new.mT, old @ square @ old.mT)


def test_what_leaves_the_subspace_leaves_the_moments():
    """Directions that the new subspace lacks are forgotten, those that it keeps are not."""
    basis = torch.linalg.qr(normal(12, 5))[0]
    old, new = basis[:, :3], basis[:, 2:]
    m = normal(3, 9, seed=1)
    rotation = Rotation(new.mT @ old, None)
    assert_close(rotation(m), torch.cat([m[2:], torch.zeros(2, 9, dtype=m.dtype)]))
