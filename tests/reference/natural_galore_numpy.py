"""Natural GaLore (arXiv 2410.16029) in float64 NumPy: GaLore on F^-1 g instead of g."""

from collections.abc import Mapping, Set
from typing import Any

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from .rest_adam_numpy import Array, correction
from .subspace_numpy import GaLoreReference, turned


def direction_direct(g: Array, history: Array, damping: float) -> Array:
    """F^-1 g with F = damping I + sum of h h^T over the rows h of `history`, formed in full."""
    fisher = damping * np.eye(g.size)
    for h in history:
        fisher = fisher + np.outer(h, h)
    direction: Array = scipy.linalg.cho_solve(scipy.linalg.cho_factor(fisher), g.reshape(-1))
    return direction.reshape(g.shape)


def direction_woodbury(g: Array, history: Array, damping: float) -> Array:
    """The same from an s x s system, as the paper computes it; zero rows change nothing."""
    flat = g.reshape(-1)
    small = np.eye(len(history)) + history @ history.T / damping
    z = scipy.linalg.cho_solve(scipy.linalg.cho_factor(small), history @ flat)
    direction: Array = flat / damping - history.T @ z / damping**2
    return direction.reshape(g.shape)


class NaturalGaLoreReference(GaLoreReference):
    """`solver` chooses between the two forms of F^-1 g, which agree to rounding."""

    def __init__(
        self,
        params: Mapping[str, NDArray[Any]],
        hidden: Set[str],
        *,
        history: int = 20,
        damping: float = 1e-3,
        relative_damping: bool = False,
        solver: str = "direct",
        **galore: Any,
    ) -> None:
        super().__init__(params, hidden, **galore)
        if solver not in ("direct", "woodbury"):
            raise ValueError(f"solver={solver!r}: use 'direct' or 'woodbury'")
        self.size = history
        self.damping = damping
        self.relative_damping = relative_damping
        self.solve = direction_direct if solver == "direct" else direction_woodbury
        self.history: dict[str, Array] = {}  # [size, k] ring buffers, zero where not yet filled

    def matrix_update(self, key: str, g: Array, t: int) -> Array:
        low = self.project(key, g, t)
        if key not in self.history:
            self.history[key] = np.zeros((self.size, low.size))
        # The current gradient is part of F, in the basis of this step.
        self.history[key][(t - 1) % self.size] = low.reshape(-1)
        damping, unit = self.damping, 1.0
        if self.relative_damping:
            rows = self.history[key]
            mean = float(np.trace(rows @ rows.T)) / min(t, self.size)
            damping, unit = damping * mean, (1 + damping) * mean
        natural = unit * self.solve(low, self.history[key], damping)
        n = self.normalized(key, natural, self.betas, self.eps)
        return correction(self.betas, t) * self.scale * self.projectors[key].back(n)

    def rotate_state(self, key: str, r_p: Array | None, r_q: Array | None) -> None:
        """The rows turn as the first moment does: each is a low gradient."""
        shape = self.exp_avg[key].shape
        super().rotate_state(key, r_p, r_q)
        for i, row in enumerate(self.history[key]):
            self.history[key][i] = turned(row.reshape(shape), r_p, r_q).reshape(-1)
