"""Orthogonalisation by Newton–Schulz iteration."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

# Quintic coefficients of Keller Jordan's Muon: steep at zero, singular values end in about 0.7-1.2.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_STACK = 1 << 25  # elements that are orthogonalised together: 64 MiB in bfloat16, a few times


def orthogonalize(
    matrix: Tensor,
    *,
    steps: int = 5,
    eps: float = 1e-7,
    coefficients: tuple[float, float, float] = COEFFICIENTS,
) -> Tensor:
    """Approximately ``U Vᵀ`` of ``matrix = U S Vᵀ``, for ``[..., m, n]``.

    ``X ← X/‖X‖_F``, then ``steps`` times ``X ← aX + b(XXᵀ)X + c(XXᵀ)²X``, on the shorter side.
    bfloat16 on CUDA as in Muon, but for float64; elsewhere at least float32, where bfloat16 is not
    faster. A zero matrix stays zero.
    """
    dtype = torch.promote_types(matrix.dtype, torch.float32)
    if matrix.is_cuda and dtype == torch.float32:
        dtype = torch.bfloat16
    x = matrix.to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp_min(eps)
    a, b, c = coefficients
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def whiten(matrix: Tensor, *, steps: int, beta: float = 0.5) -> Tensor:
    """``(X Xᵀ)^(−1/2) X`` on the shorter side of ``X`` ``[..., m, n]``, by Newton–Schulz.

    With ``A = X Xᵀ / ‖X Xᵀ‖_F``, ``Y = A``, ``Z = I``, ``steps`` times::

        T = 3 I − Z Y,   Y ← β Y T,   Z ← β T Z

    ``Z`` tends to ``A^(−1/2)`` for β = ½. A zero matrix stays zero.
    """
    x = matrix.mT if matrix.shape[-2] > matrix.shape[-1] else matrix
    gram = x @ x.mT
    size = torch.linalg.matrix_norm(gram, keepdim=True).clamp_min(torch.finfo(gram.dtype).tiny)
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    y, z = gram / size, eye.expand_as(gram)
    for _ in range(steps):
        t = 3 * eye - z @ y
        y, z = beta * y @ t, beta * t @ z
    white = z @ x / size.sqrt()
    return white.mT if matrix.shape[-2] > matrix.shape[-1] else white


def in_stacks(
    rule: Callable[[Tensor], Tensor], matrices: Sequence[Tensor]
) -> Iterator[tuple[int, Tensor]]:
    """``rule`` of each matrix, with its index; on a GPU those of one shape together.

    Small matrices' products are shorter there than their launches. Stacks are of bounded size, and
    one is held at a time. ``rule`` takes ``[..., m, n]``.
    """
    alike: dict[tuple[object, ...], list[int]] = {}
    for i, x in enumerate(matrices):
        key = (x.shape, x.dtype, x.device) if _stackable(x) else (i,)
        alike.setdefault(key, []).append(i)
    for places in alike.values():
        most = max(1, _STACK // max(1, matrices[places[0]].numel()))
        for first in range(0, len(places), most):
            chosen = places[first : first + most]
            if len(chosen) == 1:
                yield chosen[0], rule(matrices[chosen[0]])
            else:
                stack = torch.stack([matrices[i] for i in chosen])
                yield from zip(chosen, rule(stack).unbind(), strict=True)


def _stackable(matrix: Tensor) -> bool:
    return matrix.is_cuda and matrix.ndim == 2 and 0 < 2 * matrix.numel() <= _STACK
