"""GradientStabilizer (arXiv 2502.17055v3) in float64 NumPy, for one tensor."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


class StabilizerReference:
    """Running moments of one gradient's norm, and the gradient that they give."""

    def __init__(self, gamma1: float = 0.6, gamma2: float = 0.999, eps: float = 1e-12) -> None:
        self.gamma1, self.gamma2, self.eps = gamma1, gamma2, eps
        self.norms: list[float] = []

    def __call__(self, grad: NDArray[Any]) -> NDArray[np.float64]:
        """The moments as weighted means of all norms so far: no recursion, no correction."""
        g = np.array(grad, dtype=np.float64)
        norm = float(np.sqrt(np.sum(g * g)))
        if not 0 < norm < np.inf:
            return g
        self.norms.append(norm)
        norms, age = np.array(self.norms), np.arange(len(self.norms))[::-1]
        mean = np.average(norms, weights=self.gamma1**age)
        square = np.average(norms**2, weights=self.gamma2**age)
        return np.asarray(g / norm * (mean / (np.sqrt(square) + self.eps)))
