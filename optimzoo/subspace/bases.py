"""Orthonormal bases of a gradient's leading subspace.

All take ``[..., m, n]`` and return ``[..., m, r]`` with orthonormal columns, in at least float32;
for the right side pass the transpose. A gradient that is zero or not finite has no direction: the
previous basis stays, and without one the first ``r`` coordinates are the basis. In a stack each
matrix is treated by itself.

With a sharded gradient each process passes its shard and gets the whole basis, the same bits on
every process: all that is computed from the gradient are products with whole thin matrices.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from optimzoo.distributed import UNSHARDED, Shards

KINDS = ("randomized", "svd", "power")


def leading_basis(
    grad: Tensor,
    rank: int,
    *,
    kind: str = "randomized",
    previous: Tensor | None = None,
    seed: int = 0,
    power_iterations: int = 1,
    shards: Shards = UNSHARDED,
) -> Tensor:
    """Return a basis of the ``min(rank, m, n)`` leading left directions of ``grad``.

    Args:
        grad: ``[..., m, n]``.
        rank: number of columns.
        kind: `svd`, exact; `randomized`, a range finder that starts from ``previous`` and an eighth
            as many random directions (at least 8), and makes ``power_iterations`` (one more where
            there is no ``previous``); `power`, one block power step from ``previous``:
            ``qr(G Gᵀ B)``.
        previous: the last basis, ``[..., m, r]``.
        seed: seed of the random directions.
        power_iterations: two products with ``grad`` each, the first in bfloat16 where that is fast:
            what it blurs, the second filters.
        shards: how the gradient is sharded.

    Raises:
        RuntimeError: `svd` of a gradient that is sharded along ``m``.
    """
    wide = torch.promote_types(grad.dtype, torch.float32)
    grad = grad.to(wide)
    rank = min(rank, *shards.shape(grad.shape)[-2:])
    if previous is not None:
        previous = previous.to(wide)
    size = _largest(grad, shards)
    usable = _usable(size)
    if not usable.any():
        return _coordinates(grad, rank, shards) if previous is None else previous
    if not ((size > 1e-9) & (size < 1e9)).all():
        grad = torch.where(usable, grad / size, 0.0)  # squares must neither overflow nor vanish
    if kind == "svd":
        basis = _svd(grad, rank, seed, shards)
    elif kind == "power":
        start = _random_like(grad, rank, seed, shards) if previous is None else previous
        basis = torch.linalg.qr(shards.matmul(grad, shards.transposed.matmul(grad.mT, start)))[0]
    else:
        basis = _randomized(grad, rank, previous, seed, power_iterations, shards)
    if not usable.all():
        fallback = _coordinates(grad, rank, shards) if previous is None else previous
        basis = torch.where(usable, basis, fallback)
    return basis


def has_direction(grad: Tensor, shards: Shards = UNSHARDED) -> Tensor:
    """Return whether each matrix is finite and not zero, ``[..., 1, 1]``."""
    return _usable(_largest(grad, shards))


def _usable(size: Tensor) -> Tensor:
    # The largest entry, not the norm: its square may overflow or vanish.
    return (size > 0) & torch.isfinite(size)


def _largest(grad: Tensor, shards: Shards) -> Tensor:
    """Return the largest magnitude of each matrix ``[..., 1, 1]``, infinite if it has a NaN."""
    if grad.numel() == 0:
        size = grad.new_zeros(*grad.shape[:-2], 1, 1)
    elif grad.ndim == 2:  # one pass, no temporary; vector_norm(ord=inf) takes 15 times as long
        low, high = (grad if grad.is_contiguous() else grad.mT).aminmax()
        size = torch.maximum(-low, high).reshape(1, 1)
    else:
        size = grad.abs().amax((-2, -1), keepdim=True)
    size = size.nan_to_num(nan=math.inf, posinf=math.inf)
    shards.max_([size])
    return size


def _svd(grad: Tensor, rank: int, seed: int, shards: Shards) -> Tensor:
    if shards.is_sharded():
        return _gram_basis(grad, rank, shards)
    try:
        return torch.linalg.svd(grad, full_matrices=False)[0][..., :rank]
    except torch.linalg.LinAlgError:
        # Ill-conditioned gradients can keep LAPACK's SVD from converging; training goes on.
        return _randomized(grad, rank, None, seed, 2, shards)


def _gram_basis(grad: Tensor, rank: int, shards: Shards) -> Tensor:
    """Return eigenvectors of ``G Gᵀ`` as the basis, in float64: its eigenvalues are squares."""
    if shards.is_sharded("m"):
        raise RuntimeError(
            f"projector='svd' of a weight {list(shards.size)} whose projected dimension is cut "
            "needs the whole gradient; use projector='randomized'"
        )
    gram = grad.double() @ grad.double().mT
    shards.sum_([gram], "n")
    return torch.linalg.eigh(gram)[1].flip(-1)[..., :rank].to(grad.dtype)


def _randomized(
    grad: Tensor,
    rank: int,
    previous: Tensor | None,
    seed: int,
    power_iterations: int,
    shards: Shards,
) -> Tensor:
    m, n = shards.shape(grad.shape)[-2:]
    width = min(rank + max(8, rank // 8), m, n)
    if previous is None:
        basis = _random_like(grad, width, seed, shards)
        power_iterations += 2  # only the first basis of a run has no start: make it a good one
    else:
        random_columns = _random_like(grad, max(0, width - previous.shape[-1]), seed, shards)
        basis = torch.cat([previous, random_columns / math.sqrt(m)], dim=-1)
    left = basis

    def times(columns: Tensor) -> Tensor:
        return shards.matmul(grad, columns)

    for _ in range(power_iterations):
        basis = torch.linalg.qr(left)[0] if left is not basis else basis
        left = _orthonormal(_blurred_product(grad.mT, basis, shards.transposed), 1e-3, times)
    # `left` is grad times orthonormal columns, so its leading directions are those of the basis.
    gram = left.mT @ left
    # At 1e-13 the float32 solver may not converge. A power of two changes no digit.
    exponent = torch.frexp(gram.diagonal(dim1=-2, dim2=-1).amax(-1))[1][..., None, None]
    scaled = torch.ldexp(gram, -exponent).to(gram.dtype)  # torch 2.9 gives the default dtype
    vectors = torch.linalg.eigh(scaled)[1].flip(-1)[..., :rank]
    basis = left @ vectors
    # Orthogonal but for rounding: of unit columns, the Gram matrix is nearly the identity.
    norms = torch.linalg.vector_norm(basis, dim=-2, keepdim=True)
    basis = basis / norms.clamp_min(torch.finfo(basis.dtype).tiny)
    return _orthonormal(basis, 0.9, lambda columns: columns)


def _blurred_product(matrix: Tensor, basis: Tensor, shards: Shards) -> Tensor:
    if matrix.dtype != torch.float32 or not _has_fast_bfloat16(matrix.device):
        return shards.matmul(matrix, basis)
    matrix, basis = matrix.bfloat16(), basis.bfloat16()
    if shards.is_sharded("n"):
        # Partial sums, rounded one by one, would blur it more than one process does.
        return shards.matmul(matrix.float(), basis.float()).bfloat16().float()
    return shards.matmul(matrix, basis).float()


def _has_fast_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _orthonormal(columns: Tensor, pivot: float, times: Callable[[Tensor], Tensor]) -> Tensor:
    """Return ``times(qr(columns)[0])``, by Cholesky of the Gram matrix where that is accurate.

    It is where all pivots are above ``pivot`` times the largest: the error grows with the square
    of their ratio. A product has fewer rows than ``columns``, so the triangle's inverse is applied
    after it: a product with a small matrix takes a quarter of a triangular solve's time.
    """
    factor, info = torch.linalg.cholesky_ex(columns.mT @ columns)
    pivots = factor.diagonal(dim1=-2, dim2=-1)
    if info.any() or not (pivots.amin(-1) > pivot * pivots.amax(-1)).all():
        basis, triangle = torch.linalg.qr(columns)
        signs = triangle.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)  # Cholesky's are positive
        return times(torch.where(signs < 0, -basis, basis))
    eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    inverse = torch.linalg.solve_triangular(factor.mT, eye.expand_as(factor), upper=True)
    return times(columns) @ inverse


def _random_like(grad: Tensor, columns: int, seed: int, shards: Shards) -> Tensor:
    generator = torch.Generator(grad.device).manual_seed(seed)
    shape = (*shards.shape(grad.shape)[:-1], columns)
    drawn = torch.randn(shape, generator=generator, device=grad.device, dtype=grad.dtype)
    return shards.local_slice(drawn, "s", 0)  # the matrices of a stack that this process holds


def _coordinates(grad: Tensor, rank: int, shards: Shards) -> Tensor:
    eye = torch.eye(shards.shape(grad.shape)[-2], rank, device=grad.device, dtype=grad.dtype)
    return eye.expand(*grad.shape[:-2], *eye.shape).contiguous()
