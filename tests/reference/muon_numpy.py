"""Muon and RMNP in float64 NumPy: momentum, a polynomial of singular values or rows, AdamW."""

import math
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .rest_adam_numpy import Array, Reference, shrunk

JORDAN = (3.4445, -4.7750, 2.0315)


def iterated(x: Array, triples: Sequence[tuple[float, float, float]]) -> Array:
    """The iteration as an odd polynomial of each singular value, without a product of matrices."""
    size = float(np.linalg.norm(x))
    if size == 0:
        return np.zeros_like(x)
    u, s, vt = np.linalg.svd(x / size, full_matrices=False)
    for a, b, c in triples:
        s = a * s + b * s**3 + c * s**5
    result: Array = (u * s) @ vt
    return result


def adjustment(name: str | None, rows: int, cols: int) -> float:
    """What the learning rate of a matrix is multiplied by."""
    if name == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, cols))
    ratio = rows / cols
    return math.sqrt(ratio if name == "spectral_unclamped" else max(1.0, ratio))


class MuonReference(Reference):
    """Muon on matrices, AdamW on what has no rows and columns and on all other parameters."""

    def __init__(
        self,
        params: Mapping[str, NDArray[Any]],
        hidden: Set[str],
        *,
        lr: float = 2e-2,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        ns_coefficients: Any = JORDAN,
        ns_dtype: Any = None,
        adjust_lr_fn: str | None = None,
        heads: int = 1,
        momentum_rank: int | None = None,
        start: Callable[[int, int], Array] | None = None,
        other_betas: tuple[float, float] = (0.9, 0.95),
        other_eps: float = 1e-10,
        other_weight_decay: float = 0.0,
        **common: Any,
    ) -> None:
        super().__init__(
            params, hidden, lr=lr, other_betas=other_betas, other_eps=other_eps, **common
        )
        self.momentum, self.nesterov = momentum, nesterov
        one = np.ndim(ns_coefficients) == 1
        self.triples = [ns_coefficients] * ns_steps if one else ns_coefficients
        self.adjust, self.heads, self.other_weight_decay = adjust_lr_fn, heads, other_weight_decay
        self.momentum_buffer: dict[str, Array] = {}
        self.momentum_rank, self.start = momentum_rank, start
        self.right: dict[str, Array] = {}

    def step(self, grads: Mapping[str, NDArray[Any]], lr_factor: float = 1.0) -> None:
        for name, grad in grads.items():
            g = np.array(grad, dtype=np.float64)
            g = np.asarray(-g) if self.maximize else g
            self.steps[name] += 1
            lr = lr_factor * (self.lr if name in self.hidden else self.other_lr)
            decay = self.weight_decay if self.is_matrix(name) else self.other_weight_decay
            update = self.update(name, g, self.steps[name])
            kept = shrunk(self.params[name], update, lr * decay, self.cautious)
            self.params[name] = kept - lr * update

    def is_matrix(self, name: str) -> bool:
        shape = self.params[name].shape
        if name not in self.hidden:
            return False
        return min(shape[-2:] if name in self.stacked else shape[:2]) > 1

    def update(self, name: str, g: Array, t: int) -> Array:
        if self.is_matrix(name) or self.takes_other(name):
            return super().update(name, g, t)
        (beta1, beta2), eps = self.other_betas, self.other_eps
        zero = np.zeros_like(g)
        self.exp_avg[name] = m = beta1 * self.exp_avg.get(name, zero) + (1 - beta1) * g
        self.exp_avg_sq[name] = v = beta2 * self.exp_avg_sq.get(name, zero) + (1 - beta2) * g**2
        result: Array = m / (1 - beta1**t) / (np.sqrt(v / (1 - beta2**t)) + eps)
        return result

    def matrix_update(self, key: str, g: Array, t: int) -> Array:
        mu = self.momentum
        mean = mu * self.momentum_buffer.get(key, np.zeros_like(g)) + (1 - mu) * g
        self.momentum_buffer[key] = self.truncated(key, mean)
        x = mu * mean + (1 - mu) * g if self.nesterov else mean
        blocks = np.split(x, self.heads)
        factor = adjustment(self.adjust, *blocks[0].shape)
        return factor * np.concatenate([iterated(block, self.triples) for block in blocks])

    def truncated(self, key: str, mean: Array) -> Array:
        """What is kept of a momentum: its part in the span of a power step from the last factor."""
        rank, (m, n) = self.momentum_rank, mean.shape
        if rank is None or rank >= min(m, n):
            return mean
        if key not in self.right:
            assert self.start is not None
            self.right[key] = self.start(n, rank)
        if mean.any():
            basis = np.linalg.qr(mean @ self.right[key])[0]
            self.right[key] = mean.T @ basis
            mean = basis @ self.right[key].T
        return mean


class RmnpReference(MuonReference):
    """RMNP, by the summed momentum of the authors' package: it has the same directions.

    The floor of a norm is 1e-12 for the averaged momentum of their Llama code.
    """

    def __init__(
        self,
        params: Mapping[str, NDArray[Any]],
        hidden: Set[str],
        *,
        lr: float = 5e-3,
        floor: float = 1e-12,
        **muons: Any,
    ) -> None:
        super().__init__(params, hidden, lr=lr, **muons)
        self.floor = floor

    def matrix_update(self, key: str, g: Array, t: int) -> Array:
        mu = self.momentum
        total = mu * self.momentum_buffer.get(key, np.zeros_like(g)) + g
        self.momentum_buffer[key] = total
        x = g + mu * total if self.nesterov else total
        rows = [row / max(float(np.linalg.norm(row)), self.floor / (1 - mu)) for row in x]
        m, n = x.shape
        return adjustment(self.adjust, m // self.heads, n) * np.stack(rows)
