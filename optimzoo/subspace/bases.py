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
) -> Tensor:
    """A basis of the ``min(rank, m, n)`` leading left directions of ``grad``.

    Args:
        grad: ``[..., m, n]``.
        rank: columns asked for.
        kind: `svd`, exact; `randomized`, a range finder that starts from ``previous`` and an eighth
            as many random directions (at least 8), and makes ``power_iterations`` (one more where
            there is no ``previous``); `power`, one block power step from ``previous``:
            ``qr(G Gᵀ B)``.
        previous: the last basis, ``[..., m, r]``.
        seed: of the random directions.
        power_iterations: two products with ``grad`` each, the first in bfloat16 where that is fast:
            what it blurs, the second filters.
    """
    wide = torch.promote_types(grad.dtype, torch.float32)
    grad = grad.to(wide)
    rank = min(rank, *grad.shape[-2:])
    if previous is not None:
        previous = previous.to(wide)
    # The largest entry, not the norm: its square may overflow or vanish.
    size = grad.abs().amax((-2, -1), keepdim=True)  # vector_norm(ord=inf) takes 15 times as long
    usable = (size > 0) & torch.isfinite(size)
    if not usable.any():
        return _coordinates(grad, rank) if previous is None else previous
    if not ((size > 1e-9) & (size < 1e9)).all():
        grad = torch.where(usable, grad / size, 0.0)  # squares must neither overflow nor vanish
    if kind == "svd":
        basis = _svd(grad, rank, seed)
    elif kind == "power":
        start = _random_like(grad, rank, seed) if previous is None else previous
        basis = torch.linalg.qr(grad @ (grad.mT @ start))[0]
    else:
        basis = _randomized(grad, rank, previous, seed, power_iterations)
    if not usable.all():
        kept = _coordinates(grad, rank) if previous is None else previous
        basis = torch.where(usable, basis, kept)
    return basis


def _svd(grad: Tensor, rank: int, seed: int) -> Tensor:
    try:
        return torch.linalg.svd(grad, full_matrices=False)[0][..., :rank]
    except torch.linalg.LinAlgError:
        # Ill-conditioned gradients can keep LAPACK's SVD from converging; training goes on.
        return _randomized(grad, rank, None, seed, power_iterations=2)


def _randomized(
    grad: Tensor, rank: int, previous: Tensor | None, seed: int, power_iterations: int
) -> Tensor:
    m, n = grad.shape[-2:]
    width = min(rank + max(8, rank // 8), m, n)
    if previous is None:
        basis = _random_like(grad, width, seed)
        power_iterations += 2  # one basis a run is made from nothing: let it be a good one
    else:
        extra = _random_like(grad, max(0, width - previous.shape[-1]), seed)
        basis = torch.cat([previous, extra / math.sqrt(m)], dim=-1)
    left = basis
    for _ in range(power_iterations):
        basis = torch.linalg.qr(left)[0] if left is not basis else basis
        left = _times_orthonormal(grad, _blurred_product(grad.mT, basis))
    # `left` is grad times orthonormal columns, so its leading directions are those of the basis.
    vectors = torch.linalg.eigh(left.mT @ left)[1].flip(-1)[..., :rank]
    return torch.linalg.qr(left @ vectors)[0]


def _blurred_product(matrix: Tensor, basis: Tensor) -> Tensor:
    if matrix.dtype == torch.float32 and _has_fast_bfloat16(matrix.device):
        return (matrix.bfloat16() @ basis.bfloat16()).to(matrix.dtype)
    return matrix @ basis


def _has_fast_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _times_orthonormal(grad: Tensor, columns: Tensor) -> Tensor:
    """``grad @ qr(columns)[0]`` but for a rotation, by Cholesky of the Gram matrix where it can.

    The product has fewer rows than the columns, so the triangular solve comes after it.
    """
    factor, info = torch.linalg.cholesky_ex(columns.mT @ columns)
    pivots = factor.diagonal(dim1=-2, dim2=-1)
    if info.any() or not (pivots.amin(-1) > 1e-3 * pivots.amax(-1)).all():
        return grad @ torch.linalg.qr(columns)[0]
    return torch.linalg.solve_triangular(factor.mT, grad @ columns, upper=True, left=False)


def _random_like(grad: Tensor, columns: int, seed: int) -> Tensor:
    generator = torch.Generator(grad.device).manual_seed(seed)
    shape = (*grad.shape[:-1], columns)
    return torch.randn(shape, generator=generator, device=grad.device, dtype=grad.dtype)


def _coordinates(grad: Tensor, rank: int) -> Tensor:
    eye = torch.eye(grad.shape[-2], rank, device=grad.device, dtype=grad.dtype)
    return eye.expand(*grad.shape[:-2], *eye.shape).contiguous()
