"""Average of gradients, of which only a product of two thin factors is stored between steps."""

import torch
from torch import Tensor

from optimzoo.distributed import UNSHARDED, Shards
from optimzoo.lowbit import at_least_float32
from optimzoo.subspace.newton_schulz import add_product
from optimzoo.subspace.projector import gaussian

# Added to a Gram matrix of unit columns, in float64: far above the rounding of its pivots.
_SHIFT = 1e-12


def initial_factors(
    like: Tensor, rank: int, dtype: torch.dtype, shards: Shards = UNSHARDED
) -> tuple[Tensor, Tensor]:
    """Return the factors of an average of nothing: zeros ``[..., m, r]``, a start ``[..., n, r]``.

    The start has fixed normal numbers, the same for all weights with as many columns.

    Args:
        like: this process's part of a matrix ``[..., m, n]``.
        rank: number of columns of the factors.
        dtype: the factors'.
        shards: how the matrix is sharded.
    """
    start = gaussian(0, shards.shape(like.shape)[-1], rank, like.new_empty(0, dtype=dtype))
    start = shards.local_slice(start, "n").expand(*like.shape[:-2], -1, -1)
    left = like.new_zeros(*like.shape[:-1], rank, dtype=dtype)
    return left, start.clone(memory_format=torch.contiguous_format)


def take_into_low_rank(
    grad: Tensor,
    left: Tensor,
    right: Tensor,
    beta: float,
    *,
    nesterov: bool,
    shards: Shards = UNSHARDED,
) -> Tensor:
    """Take a gradient into the average ``L Rᵀ``, in place; return the average before truncation.

    ``M = β L Rᵀ + (1 − β) G``, then one block power step from the last ``R``::

        L ← orth(M R),  R ← Mᵀ L

    Where ``M`` is zero ``L`` is too, and ``R`` stays: it is what the next step starts from. The
    host reads no value.

    Args:
        grad: ``G``, ``[..., m, n]``; of a sharded weight, what this process has.
        left: ``L``, ``[..., m, r]``, laid out as the gradient's rows are.
        right: ``R``, ``[..., n, r]``, laid out as its columns are.
        beta: decay rate of the average.
        nesterov: return the average with the gradient taken in once more.
        shards: how the gradient is sharded.

    Returns:
        The average, or Nesterov's, in float32 at least.
    """
    columns = shards.transposed
    wide = torch.promote_types(grad.dtype, at_least_float32(left))
    grad, old = grad.to(wide), right.to(wide)
    mean = add_product(grad, left.to(wide), old.mT, beta=1 - beta, alpha=beta)
    old = columns.gather(old)
    # Of columns of one size: the squares of a gradient that has become small would vanish.
    basis = orthonormal_columns(shards.matmul(mean, _scaled(old))).to(wide)
    new = columns.matmul(mean.mT, basis)
    used = (new != 0).any(-1, keepdim=True).any(-2, keepdim=True)
    left.copy_(shards.local_slice(torch.where(used, basis, 0.0)))
    right.copy_(columns.local_slice(torch.where(used, new, old)))
    return mean.lerp_(grad, 1 - beta) if nesterov else mean


def orthonormal_columns(columns: Tensor) -> Tensor:
    """Return a float64 basis of the span of ``[..., m, r]``, for ``r <= m``, by Cholesky.

    Twice, of Gram matrices with a shift: the first leaves columns that are dependent but for a
    ratio of 1e-6 orthonormal to rounding, the second those of 1e-11. What is below is orthogonal,
    and shorter. A column of zeros is taken for one of the identity. Not by ``torch.linalg.qr``,
    which on a GPU takes the matrices of a stack one after the other.
    """
    x = _scaled(columns.double())
    norm = torch.linalg.vector_norm(x, dim=-2, keepdim=True)
    zero = norm == 0
    identity = torch.eye(*x.shape[-2:], dtype=x.dtype, device=x.device)
    x = torch.where(zero, identity, x / norm.masked_fill(zero, 1.0))
    eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    for _ in range(2):
        gram = x.mT @ x
        gram.diagonal(dim1=-2, dim2=-1).add_(_SHIFT)
        factor = torch.linalg.cholesky_ex(gram)[0]
        x = x @ torch.linalg.solve_triangular(factor.mT, eye.expand_as(gram), upper=True)
    return x


def _scaled(columns: Tensor) -> Tensor:
    """Return columns divided by their largest magnitudes; those of zeros stay."""
    size = columns.abs().amax(-2, keepdim=True)
    return columns / size.clamp_min(torch.finfo(columns.dtype).tiny)
