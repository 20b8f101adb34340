"""The natural gradient under an empirical Fisher of the last gradients."""

from collections.abc import Iterator, MutableMapping
from typing import Any

import torch
from torch import Tensor

State = MutableMapping[str, Any]
_JITTERS = (0.0, 1e-10, 1e-8, 1e-6, 1e-4)
_COLUMNS = 2**16  # of a low-precision history, widened at a time


def natural_gradient(
    state: State, low: Tensor, index: int, *, damping: float, relative: bool
) -> Tensor:
    """``F⁻¹ g`` with ``F = λ I + Σ_j h_j h_jᵀ`` over the history, the current ``g`` included.

    ``state`` holds the last gradients as rows of ``history`` ``[..., s, k]`` and their Gram matrix
    ``gram`` ``[..., s, s]``. The gradient replaces row ``i``; the product ``H g`` is the new row of
    the Gram matrix, which is kept, not recomputed. Since ``g`` is a row of ``H``::

        F⁻¹ g = Hᵀ w,   (λ I + H Hᵀ) w = e_i

    which is Woodbury's formula without its cancellation. Two passes over the history and one
    Cholesky of s × s, in float64. A low-precision history is summed in the Gram matrix's dtype:
    rounded to bfloat16, the Gram matrix of similar gradients is not positive definite.

    A damping too small for that dtype (zero, say, and a gradient that repeats) is raised to the
    first jitter that is not. In a stack, by matrix.

    Args:
        state: of one parameter; `history` and `gram` are changed in place.
        low: the low-rank gradient ``[..., a, b]``, flattened to ``k``.
        index: the row to replace.
        damping: λ.
        relative: λ in units of the mean squared norm μ of the rows that are filled, and the result
            times ``(1 + λ) μ``: strong damping then gives back ``g``, whatever its size.

    Raises:
        RuntimeError: the damped Gram matrix is not positive definite, even with jitter.
    """
    history, gram = state["history"], state["gram"]
    g = low.flatten(-2)
    history[..., index, :] = g
    row = torch.zeros_like(gram[..., index, :])
    for h in _widened(history, gram.dtype):
        row += (h @ h[..., index, :, None]).squeeze(-1)
    gram[..., index, :] = row
    gram[..., :, index] = row
    weights = _solve_unit(gram, index, damping, relative).to(gram.dtype).unsqueeze(-1)
    natural = torch.cat([h.mT @ weights for h in _widened(history, gram.dtype)], dim=-2)
    return natural.to(g.dtype).reshape(low.shape)


def _widened(history: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """The history in ``dtype``, a part of its columns at a time where that takes a copy."""
    columns = history.shape[-1] if history.dtype == dtype else _COLUMNS
    return (part.to(dtype) for part in history.split(columns, dim=-1))


def _solve_unit(gram: Tensor, index: int, damping: float, relative: bool) -> Tensor:
    precision = 100 * torch.finfo(gram.dtype).eps
    size = gram.shape[-1]
    eye = torch.eye(size, dtype=torch.float64, device=gram.device)
    finite = gram.isfinite().all(-1).all(-1)
    gram = torch.where(finite[..., None, None], gram.double(), eye)
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    filled = (diagonal > 0).sum(-1).clamp_min(1)
    mean = diagonal.sum(-1) / filled
    ridge = damping * mean if relative else torch.full_like(mean, damping)
    unit = torch.zeros(*gram.shape[:-1], 1, dtype=gram.dtype, device=gram.device)
    unit[..., index, :] = 1
    # An all-zero gradient has no scale to damp relative to; any ridge gives zero then.
    ridge = torch.where(mean > 0, ridge, ridge.clamp_min(1.0))
    added, bad = torch.zeros_like(mean), torch.ones_like(finite)
    for jitter in _JITTERS:
        added = torch.where(bad, jitter * mean, added)
        factor, info = torch.linalg.cholesky_ex(gram + (ridge + added)[..., None, None] * eye)
        # A pivot below the rounding of its row is noise, and would be divided by.
        pivots = factor.diagonal(dim1=-2, dim2=-1).square()
        bad = (info != 0) | (pivots <= precision * diagonal).any(-1)
        if not bad.any():
            weights = torch.cholesky_solve(unit, factor).squeeze(-1)
            if relative:
                weights = weights * ((1 + damping) * mean).unsqueeze(-1)
            # As torch: what is not finite goes into the weights that it touches.
            return torch.where(finite.unsqueeze(-1), weights, torch.nan)
    raise RuntimeError(
        f"the Fisher matrix is not positive definite with damping={damping:g}; raise the damping"
    )


def rotate_history(state: State, rotation: Any, shape: torch.Size) -> None:
    """Take the history into a new subspace, and make its Gram matrix anew."""
    history = state["history"]
    rows = history.unflatten(-1, shape[-2:])
    if rows.ndim > 3:  # a stack of matrices: [n, s, a, b], its rotations [n, a', a]
        rotation = type(rotation)(
            *(None if r is None else r.unsqueeze(-3) for r in (rotation.left, rotation.right))
        )
    history.copy_(rotation(rows).flatten(-2))
    gram = state["gram"]
    gram.zero_()
    for h in _widened(history, gram.dtype):
        gram += h @ h.mT
    # Not every BLAS gives a symmetric product to the bit, and a later update writes row and column.
    gram.copy_((gram + gram.mT) / 2)
