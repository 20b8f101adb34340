"""CAST's AdamS (arXiv 2509.25996, Algorithm 1) in float64 NumPy, with Adam for the rest.

Written for one [out, in] matrix at a time, with the mask found by sorting each group.
"""

from collections.abc import Mapping, Set
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reference.rest_adam_numpy import Array, Reference

Mask = NDArray[np.bool_]


def nm_mask(weight: NDArray[Any], n: int, m: int) -> Mask:
    """Eq. 6: of each m consecutive columns the n largest; of equals, the one further left."""
    keep = np.zeros(weight.shape, dtype=bool)
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], m):
            group = np.abs(weight[row, start : start + m])
            order = sorted(range(m), key=lambda i, group=group: (-group[i], i))
            for i in order[:n]:
                keep[row, start + i] = True
    return keep


class AdamSReference(Reference):
    """Names in `hidden` get AdamS; those in `transposed` are [in, out]."""

    def __init__(
        self,
        params: Mapping[str, NDArray[Any]],
        hidden: Set[str],
        *,
        l1: float,
        total_steps: int,
        n: int = 2,
        m: int = 4,
        mask_every: int = 10,
        decay: str = "l1",
        transposed: Set[str] = frozenset(),
        **common: Any,
    ) -> None:
        super().__init__(params, hidden, **common)
        self.l1, self.total_steps, self.decay = l1, total_steps, decay
        self.n, self.m, self.mask_every = n, m, mask_every
        self.transposed = transposed
        self.masks: dict[str, Mask] = {}
        self.flips: dict[str, int] = dict.fromkeys(hidden, 0)

    def update(self, name: str, g: Array, t: int) -> Array:
        """For a matrix, its transpose, each slice of a stack, or a convolution's [out, -1]."""
        if name not in self.hidden:
            return super().update(name, g, t)
        theta = self.params[name]
        if name in self.stacked:
            parts = [self.adams(f"{name}[{i}]", theta[i], g[i], t) for i in range(len(g))]
            return np.stack(parts)
        if name in self.transposed:
            return self.adams(name, theta.T, g.T, t).T
        rows = g.shape[0]
        return self.adams(name, theta.reshape(rows, -1), g.reshape(rows, -1), t).reshape(g.shape)

    def matrix_update(self, key: str, g: Array, t: int) -> Array:
        raise NotImplementedError("AdamS looks at the weight too: see adams")

    def adams(self, key: str, theta: Array, g: Array, t: int) -> Array:
        """Lines 10 to 21 for step t, from 1; what the learning rate multiplies."""
        beta1, beta2 = self.betas
        if (t - 1) % self.mask_every == 0:
            new = nm_mask(theta, self.n, self.m)
            if key in self.masks:
                self.flips[key.split("[")[0]] += int((new != self.masks[key]).sum())
            self.masks[key] = new
        zero = np.zeros_like(g)
        mu = beta1 * self.exp_avg.get(key, zero) + (1 - beta1) * g
        alpha = min(1.0, t / self.total_steps)
        if self.decay == "l1":
            pulled = (1 - alpha) * mu + alpha * self.l1 * np.sign(theta)
        else:  # the predecessor: the gradient's part does not fade, and the decay is the weight
            pulled = mu + alpha * self.l1 * theta
        modified = np.where(self.masks[key], mu, pulled)
        v = beta2 * self.exp_avg_sq.get(key, zero) + (1 - beta2) * modified**2
        self.exp_avg[key], self.exp_avg_sq[key] = mu, v
        v_hat = v / (1 - beta2**t)
        result: Array = (modified / (1 - beta1**t)) / (np.sqrt(v_hat) + self.eps)
        return result
