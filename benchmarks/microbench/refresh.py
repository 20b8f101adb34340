"""Cost of a subspace refresh against an SVD."""

import statistics
import time
from typing import Any

import torch

from optimzoo.subspace import leading_basis

REFRESH_SHAPES = ((1376, 512), (4096, 1376))
REFRESHES = 5  # per method, at most: an SVD takes seconds


def measure_refresh(rank: int, repeats: int) -> list[dict[str, Any]]:
    """Time a projector refresh against ``torch.linalg.svd``. Return also its captured energy."""
    rows = []
    for m, n in REFRESH_SHAPES:
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
        times: dict[str, list[float]] = {"svd": [], "cold": [], "warm": []}
        captured = {}
        for _ in range(repeats):
            for kind in times:
                start = time.perf_counter()
                if kind == "svd":
                    torch.linalg.svd(grad, full_matrices=False)
                    basis = None
                else:
                    last = previous if kind == "warm" else None
                    basis = leading_basis(grad.mT, rank, previous=last)
                times[kind].append(1000 * (time.perf_counter() - start))
                if basis is not None:
                    captured[kind] = float((grad @ basis).square().sum() / best)
        medians = {kind: statistics.median(values) for kind, values in times.items()}
        rows.append({"shape": [m, n], "rank": rank, "ms": medians, "captured": captured})
    return rows
