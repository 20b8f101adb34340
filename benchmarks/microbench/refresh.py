"""Cost of a subspace refresh against an SVD."""

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.common.timing import in_turn
from optimzoo.subspace import leading_basis

REFRESH_SHAPES = ((1376, 512), (4096, 1376))
REFRESHES = 5  # per method, at most: an SVD takes seconds


def measure_refresh(m: int, n: int, rank: int, repeats: int) -> dict[str, Any]:
    """Time a projector refresh against ``torch.linalg.svd``. Return also its captured energy."""
    generator = torch.Generator().manual_seed(0)
    # singular values k^-1: a power law, as gradients have
    left = torch.linalg.qr(torch.randn(m, n, generator=generator))[0]
    right = torch.linalg.qr(torch.randn(n, n, generator=generator))[0]
    values = torch.arange(1, n + 1).float().reciprocal()
    grad = (left * values) @ right.mT
    best = values[:rank].square().sum()
    # The shorter side is projected: its directions are those of the transpose.
    earlier = grad + 1e-3 * torch.randn(m, n, generator=generator)
    previous = leading_basis(earlier.mT, rank)
    refreshes: dict[str, Callable[[], torch.Tensor]] = {
        "cold": lambda: leading_basis(grad.mT, rank),
        "warm": lambda: leading_basis(grad.mT, rank, previous=previous),
    }
    ms = in_turn({"svd": lambda: torch.linalg.svd(grad, full_matrices=False), **refreshes}, repeats)
    captured = {k: float((grad @ f()).square().sum() / best) for k, f in refreshes.items()}
    return {"shape": [m, n], "rank": rank, "ms": ms, "captured": captured}
