"""The natural gradient under an empirical Fisher of the last gradients."""

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor

State = MutableMapping[str, Any]
_JITTERS = (0.0, 1e-10, 1e-8, 1e-6, 1e-4)


def natural_gradient(
    state: State, low: Tensor, index: int, *, damping: float, relative: bool
) -> Tensor:
    """``F⁻¹ g`` with ``F = λ I + Σ_j h_j h_jᵀ`` over the history, the current ``g`` included.

    ``state`` holds the last gradients as rows of ``history`` ``[..., s, k]`` and their Gram matrix
    ``gram`` ``[..., s, s]``. The gradient replaces row ``i``; the product ``H g`` is the new row of
    the Gram matrix, which is kept, not recomputed. Since ``g`` is a row of ``H``::

        F⁻¹ g = Hᵀ w,   (λ I + H Hᵀ) w = e_i

    which is Woodbury's formula without its cancellation. Two passes over the history and one
    Cholesky of s × s, in float64.

    Args:
        state: of one parameter; `history` and `gram` are changed in place.
        low: the low-rank gradient ``[..., a, b]``, flattened to ``k``.
        index: the row to replace.
        damping: λ.
        relative: λ in units of the mean squared norm of the rows that are filled.

    Raises:
        RuntimeError: the damped Gram matrix is not positive definite, even with jitter.
    """
    history, gram = state["history"], state["gram"]
    g = low.flatten(-2)
    history[..., index, :] = g
    row = (history @ g.to(history.dtype).unsqueeze(-1)).squeeze(-1).to(gram.dtype)
    gram[..., index, :] = row
    gram[..., :, index] = row
    weights = _solve_unit(gram, index, damping, relative).to(g.dtype)
    natural = (history.mT @ weights.to(history.dtype).unsqueeze(-1)).squeeze(-1).to(g.dtype)
    if history.dtype != g.dtype:  # the current gradient at its own precision
        natural = natural + weights[..., index, None] * (g - history[..., index, :].to(g.dtype))
    return natural.reshape(low.shape)


def _solve_unit(gram: Tensor, index: int, damping: float, relative: bool) -> Tensor:
    gram = gram.double()
    size = gram.shape[-1]
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    filled = (diagonal > 0).sum(-1).clamp_min(1)
    mean = diagonal.sum(-1) / filled
    ridge = damping * mean if relative else torch.full_like(mean, damping)
    unit = torch.zeros(*gram.shape[:-1], 1, dtype=gram.dtype, device=gram.device)
    unit[..., index, :] = 1
    if not torch.isfinite(diagonal).all():
        return torch.full_like(unit.squeeze(-1), torch.nan)  # as torch: into the weights it touches
    eye = torch.eye(size, dtype=gram.dtype, device=gram.device)
    # An all-zero gradient has no scale to damp relative to; any ridge gives zero then.
    ridge = torch.where(mean > 0, ridge, ridge.clamp_min(1.0))
    for jitter in _JITTERS:
        damped = gram + (ridge + jitter * mean)[..., None, None] * eye
        factor, info = torch.linalg.cholesky_ex(damped)
        if not info.any():
            return torch.cholesky_solve(unit, factor).squeeze(-1)
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
    state["gram"].copy_(history @ history.mT)
