"""Orthogonalisation by Newton–Schulz iteration."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from optimzoo import stacks

Triple = tuple[float, float, float]
# Quintic coefficients of Keller Jordan's Muon: steep at zero, singular values end in about 0.7-1.2.
COEFFICIENTS: Triple = (3.4445, -4.7750, 2.0315)
_PANEL = 128  # rows of a symmetric product at a time
_GRAM_PAYS = 1.5  # columns a row: two iterations on X are 8 m²n + 4 m³, by Gram 4 m²n + 10 m³


def orthogonalize(
    matrix: Tensor,
    *,
    steps: int = 5,
    eps: float = 1e-7,
    coefficients: Triple | Sequence[Triple] = COEFFICIENTS,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return approximately ``U Vᵀ`` of ``matrix = U S Vᵀ``, for ``[..., m, n]``.

    ``X ← X/‖X‖_F``, then ``steps`` times ``X ← aX + b(XXᵀ)X + c(XXᵀ)²X``, on the shorter side, or
    once with each triple ``(a, b, c)`` of a sequence. In ``dtype``; by default in bfloat16 on CUDA
    as in Muon, but for float64, elsewhere in float32 at least. A zero matrix stays zero.

    In float32 and above, where one side is long enough, the iteration is on Gram matrices (ours).
    """
    if dtype is None:
        dtype = torch.promote_types(matrix.dtype, torch.float32)
        dtype = torch.bfloat16 if stacks.on_gpu(matrix) and dtype == torch.float32 else dtype
    # float16 would lose small and large matrices before the division.
    first = torch.promote_types(matrix.dtype, torch.float32) if dtype == torch.float16 else dtype
    x = matrix.to(first)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp_min(eps)
    x = (x / norm if first == matrix.dtype else x.div_(norm)).to(dtype)  # in place in a copy
    one = isinstance(coefficients[0], int | float)
    triples: Any = [coefficients] * steps if one else coefficients
    if dtype.itemsize >= 4 and x.shape[-1] > _GRAM_PAYS * x.shape[-2]:
        x = _iterate_on_gram(x, triples)
    else:
        for a, b, c in triples:
            gram = symmetric_product(x, x.mT)
            x = add_product(x, symmetric_product(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def _iterate_on_gram(x: Tensor, triples: Sequence[Triple]) -> Tensor:
    """Run the same iterations, with one product with ``X`` for several of them.

    With ``R = XXᵀ`` an iteration is ``P = aI + bR + cR²``, ``X ← P X`` and so ``R ← P R P``, for
    ``P`` and ``R`` commute. ``R`` holds the squares of the singular values, so rounding takes the
    small ones from it, and each iteration enlarges what it has taken by a²: after five the error
    is a hundred times that of the iteration on ``X``. With ``R`` made anew for the last two, and
    for each two before them but the first three, it is no larger, whatever the condition.
    """
    count = len(triples)
    for begin, end in pairwise([0, *range(2 + count % 2, count, 2), count]):
        gram = symmetric_product(x, x.mT)
        product = None
        for i in range(begin, end):
            a, b, c = triples[i]
            factor = symmetric_product(gram, gram, gram, beta=b, alpha=c)
            factor.diagonal(dim1=-2, dim2=-1).add_(a)
            product = factor if product is None else symmetric_product(factor, product)
            if i + 1 < end:
                gram = symmetric_product(symmetric_product(factor, gram), factor)
        x = product @ x  # type: ignore[operator]
    return x


def add_product(
    matrix: Tensor, left: Tensor, right: Tensor, *, beta: float, alpha: float = 1
) -> Tensor:
    """Return ``beta · matrix + alpha · left @ right`` of ``[..., m, n]`` without a temporary."""
    if matrix.ndim == 2:
        return torch.addmm(matrix, left, right, beta=beta, alpha=alpha)
    flat = [x.reshape(-1, *x.shape[-2:]) for x in (matrix, left, right)]
    return torch.baddbmm(*flat, beta=beta, alpha=alpha).view(matrix.shape)


def symmetric_product(
    left: Tensor, right: Tensor, matrix: Tensor | None = None, *, beta: float = 0, alpha: float = 1
) -> Tensor:
    """Return ``left @ right``, or `add_product`; the caller knows that it is symmetric.

    On a CPU a large one is multiplied in panels of rows, each up to the diagonal (at 512 rows 5/8
    of the products), and mirrored.
    """
    size = left.shape[-2]
    large = left.ndim == 2 and size >= 3 * _PANEL and left.dtype.itemsize >= 4
    traced = torch.compiler.is_compiling() or (torch.is_grad_enabled() and left.requires_grad)
    if traced or not large or left.device.type != "cpu":
        if matrix is None:
            return left @ right
        return add_product(matrix, left, right, beta=beta, alpha=alpha)
    out = left.new_empty(size, size)
    for begin in range(0, size, _PANEL):
        end = min(size, begin + _PANEL)
        panel = out[begin:end, :end]
        start = panel if matrix is None else matrix[begin:end, :end]
        torch.addmm(start, left[begin:end], right[:, :end], beta=beta, alpha=alpha, out=panel)
        out[:begin, begin:end].copy_(panel[:, :begin].mT)
    return out


def fast_dtype(matrix: Tensor) -> torch.dtype:
    """Return the dtype that is multiplied fastest: bfloat16 on CUDA and on a CPU with AMX.

    float64 stays, and so does float32 elsewhere.
    """
    wide = torch.promote_types(matrix.dtype, torch.float32)
    amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    fast = stacks.on_gpu(matrix) or (matrix.device.type == "cpu" and amx())
    return torch.bfloat16 if fast and wide == torch.float32 else wide


def whiten(matrix: Tensor, *, steps: int, beta: float = 0.5) -> Tensor:
    """Return ``(X Xᵀ)^(−1/2) X`` on the shorter side of ``[..., m, n]``, by Newton–Schulz.

    With ``A = X Xᵀ / ‖X Xᵀ‖_F``, ``Y = A``, ``Z = I``, ``steps`` times::

        T = 3 I − Z Y,   Y ← β Y T,   Z ← β T Z

    ``Z`` tends to ``A^(−1/2)`` for β = ½. A zero matrix stays zero.
    """
    x = matrix.mT if matrix.shape[-2] > matrix.shape[-1] else matrix
    gram = symmetric_product(x, x.mT)
    size = torch.linalg.matrix_norm(gram, keepdim=True).clamp_min(torch.finfo(gram.dtype).tiny)
    y = gram / size
    eye = torch.eye(y.shape[-1], dtype=y.dtype, device=y.device).expand_as(y)
    z = beta * (3 * eye - y)  # the first iteration: Z = I
    y = symmetric_product(y, z) if steps > 1 else y
    for step in range(1, steps):
        t = symmetric_product(z, y, eye, beta=3, alpha=-1)
        if step + 1 < steps:  # the last is not used
            y = symmetric_product(y, t, y, alpha=beta)
        z = symmetric_product(t, z, z, alpha=beta)
    white = z @ x / size.sqrt()
    return white.mT if matrix.shape[-2] > matrix.shape[-1] else white
