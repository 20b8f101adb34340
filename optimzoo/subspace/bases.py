"""Orthonormal bases of a gradient's leading subspace.

All take ``[..., m, n]`` and return ``[..., m, r]`` with orthonormal columns, in at least float32;
for the right side hand in the transpose. A gradient that is zero or not finite gives no direction:
the previous basis stays, and without one the first ``r`` coordinates serve. In a stack each matrix
is taken by itself.
"""

import math

import torch
from torch import Tensor

KINDS = ("randomized", "svd", "power")


def leading_basis(
    grad: Tensor,
    rank: int,
    *,
    kind: str = "randomized",
    previous: Tensor | None = None,
    seed: int = 0,
    power_iterations: int = 1,
    oversample: int = 8,
) -> Tensor:
    """A basis of the ``min(rank, m, n)`` leading left directions of ``grad``.

    Args:
        grad: ``[..., m, n]``.
        rank: columns asked for.
        kind: `svd`, exact; `randomized`, a range finder started from ``previous`` and
            ``oversample`` random directions, with ``power_iterations`` further passes (two more
            where there is no ``previous``); `power`, one block power step from ``previous``:
            ``qr(G Gᵀ B)``.
        previous: the last basis, ``[..., m, r]``.
        seed: of the random directions.
        power_iterations: two products with ``grad`` each.
        oversample: random directions beyond the rank.
    """
    wide = torch.promote_types(grad.dtype, torch.float32)
    grad = grad.to(wide)
    rank = min(rank, *grad.shape[-2:])
    if previous is not None:
        previous = previous.to(wide)
    # The largest entry, not the norm: its square may overflow or vanish.
    size = torch.linalg.vector_norm(grad, ord=math.inf, dim=(-2, -1), keepdim=True)
    usable = (size > 0) & torch.isfinite(size)
    if not usable.any():
        return _coordinates(grad, rank) if previous is None else previous
    grad = grad / size  # so that squares neither overflow nor vanish
    if not usable.all():
        grad = torch.where(usable, grad, 0.0)
    if kind == "svd":
        basis = _svd(grad, rank, seed)
    elif kind == "power":
        start = _random_like(grad, rank, seed) if previous is None else previous
        basis = torch.linalg.qr(grad @ (grad.mT @ start))[0]
    else:
        basis = _randomized(grad, rank, previous, seed, power_iterations, oversample)
    if not usable.all():
        kept = _coordinates(grad, rank) if previous is None else previous
        basis = torch.where(usable, basis, kept)
    return basis


def _svd(grad: Tensor, rank: int, seed: int) -> Tensor:
    try:
        return torch.linalg.svd(grad, full_matrices=False)[0][..., :rank]
    except torch.linalg.LinAlgError:
        # Ill-conditioned gradients can keep LAPACK's SVD from converging; training goes on.
        return _randomized(grad, rank, None, seed, power_iterations=1, oversample=16)


def _randomized(
    grad: Tensor,
    rank: int,
    previous: Tensor | None,
    seed: int,
    power_iterations: int,
    oversample: int,
) -> Tensor:
    m, n = grad.shape[-2:]
    width = min(rank + oversample, m, n)
    if previous is None:
        sketch = grad @ _random_like(grad.mT, width, seed)
        power_iterations += 2  # one basis a run is made from nothing: let it be a good one
    else:
        extra = _random_like(grad, max(0, width - previous.shape[-1]), seed)
        sketch = grad @ (grad.mT @ torch.cat([previous, extra], dim=-1))
    basis = torch.linalg.qr(sketch)[0]
    for _ in range(power_iterations):
        basis = torch.linalg.qr(grad @ (grad.mT @ basis))[0]
    small = basis.mT @ grad
    # The leading left directions of the small [width, n] matrix, largest first.
    vectors = torch.linalg.eigh(small @ small.mT)[1].flip(-1)
    return basis @ vectors[..., :rank]


def _random_like(grad: Tensor, columns: int, seed: int) -> Tensor:
    generator = torch.Generator(grad.device).manual_seed(seed)
    shape = (*grad.shape[:-1], columns)
    return torch.randn(shape, generator=generator, device=grad.device, dtype=grad.dtype)


def _coordinates(grad: Tensor, rank: int) -> Tensor:
    eye = torch.eye(grad.shape[-2], rank, device=grad.device, dtype=grad.dtype)
    return eye.expand(*grad.shape[:-2], *eye.shape).contiguous()
