"""SWAN, SinkGD, Stable-SPAM in float64 NumPy: methods on the gradient, not in a subspace."""

from collections.abc import Mapping, Set
from typing import Any

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from .kernels_numpy import random_bits
from .rest_adam_numpy import Array, Reference, correction


def row_normalized(g: Array, eps: float) -> Array:
    """Each row minus its mean, over its population standard deviation."""
    result = np.zeros_like(g)
    for i in range(g.shape[0]):
        centred = g[i, :] - np.mean(g[i, :])
        result[i, :] = centred / max(float(np.sqrt(np.mean(centred**2))), eps)
    return result


def whitened_newton_schulz(matrix: Array, steps: int, beta: float) -> Array:
    """(X X^T)^(-1/2) X by the iteration, X being `matrix` with its short side first."""
    # An eigenvalue p of Z Y goes to beta^2 p (3 - p)^2, whose fixed point 3 - 1/beta attracts only
    # for 1/3 < beta < 2/3. It is 1, the exact result, at beta = 0.5; at 0.8 nothing converges.
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    a = x @ x.T
    size = float(np.linalg.norm(a))
    if size == 0:
        return np.zeros_like(matrix)
    y = a / size
    z = np.eye(len(a))
    for _ in range(steps):
        t = 3 * np.eye(len(a)) - z @ y
        y = beta * y @ t
        z = beta * t @ z
    result: Array = z @ x / np.sqrt(size)
    return result.T if tall else result


def whitened_exact(matrix: Array) -> Array:
    """(X X^T)^(-1/2) X by eigenvalues, with the pseudo-inverse where X X^T is singular."""
    # Rows of mean zero leave rank n - 1 at most, so it is singular whenever m >= n.
    values, vectors = scipy.linalg.eigh(matrix @ matrix.T)
    kept = values > 1e-11 * max(float(values[-1]), np.finfo(np.float64).tiny)
    basis = vectors[:, kept]
    result: Array = (basis / np.sqrt(values[kept])) @ (basis.T @ matrix)
    return result


class SwanReference(Reference):
    """SWAN: row-normalised, then whitened, without state; a column takes Adam."""

    def __init__(
        self,
        params: Mapping[str, NDArray[Any]],
        hidden: Set[str],
        *,
        lr: float = 1e-3,
        steps: int = 10,
        beta: float = 0.5,
        rescale: bool = True,
        eps: float = 1e-8,
        whitening: str = "newton_schulz",
        **common: Any,
    ) -> None:
        super().__init__(params, hidden, lr=lr, eps=eps, **common)
        if whitening not in ("newton_schulz", "exact"):
            raise ValueError(f"whitening={whitening!r}: use 'newton_schulz' or 'exact'")
        self.iterations = steps
        self.beta = beta
        self.rescale = rescale
        self.whitening = whitening

    def matrix_update(self, key: str, g: Array, t: int) -> Array:
        if g.shape[1] == 1:
            return correction(self.betas, t) * self.normalized(key, g, self.betas, self.eps)
        normal = row_normalized(g, self.eps)
        if self.whitening == "exact":
            white = whitened_exact(normal)
        else:
            white = whitened_newton_schulz(normal, self.iterations, self.beta)
        size = float(np.linalg.norm(white))
        if self.rescale and size > 0:
            white = white * float(np.linalg.norm(normal)) / size
        return white


def sr_sinkhorn(g: Array, iterations: int) -> Array:
    """The paper's SR-Sinkhorn: diag(q)^-1 with row norms q, then diag(r)^-1 with column norms r."""
    m, n = g.shape
    x = g
    for _ in range(iterations):
        q = np.array([np.linalg.norm(x[i, :]) for i in range(m)])
        x = np.sqrt(n) * np.diag(inverse(q)) @ x
        r = np.array([np.linalg.norm(x[:, j]) for j in range(n)])
        x = np.sqrt(m) * x @ np.diag(inverse(r))
    return x


def inverse(norms: Array) -> Array:
    """1 / norm; of the zero norm, which the paper does not speak of, zero."""
    return np.array([1 / norm if norm > 0 else 0.0 for norm in norms])


class SinkgdReference(Reference):
    """SinkGD: SR-Sinkhorn of the raw gradient, without state, at alpha times the rate."""

    def __init__(
        self,
        params: Mapping[str, NDArray[Any]],
        hidden: Set[str],
        *,
        lr: float = 2e-2,
        other_lr: float | None = None,
        iterations: int = 5,
        alpha: float = 0.05,
        spectral_norm: bool = False,
        power_iterations: int = 2,
        **common: Any,
    ) -> None:
        other_lr = lr if other_lr is None else other_lr
        super().__init__(params, hidden, lr=alpha * lr, other_lr=other_lr, **common)
        self.iterations = iterations
        self.spectral_norm = PowerIteration(power_iterations) if spectral_norm else None

    def matrix_update(self, key: str, g: Array, t: int) -> Array:
        x = sr_sinkhorn(g, self.iterations)
        return x if self.spectral_norm is None else x / self.spectral_norm(key, x)


class PowerIteration:
    """The largest singular value of each matrix, from the left vector that the last call left."""

    def __init__(self, iterations: int) -> None:
        self.iterations = iterations
        self.vectors: dict[str, Array] = {}

    def __call__(self, key: str, x: Array) -> float:
        x = x if x.shape[0] <= x.shape[1] else x.T
        if key not in self.vectors:
            drawn = (random_bits(len(x), 0, 0, 0) >> 8) * 2.0**-24 - 0.5
            self.vectors[key] = drawn / np.linalg.norm(drawn)
        if not x.any():
            return 1.0
        for _ in range(self.iterations):
            v = x.T @ self.vectors[key]
            w = x @ (v / np.linalg.norm(v))
            self.vectors[key] = w / np.linalg.norm(w)
        least = np.sqrt(np.sum(x * x) / len(x))
        return float(max(np.linalg.norm(w), least))


class StableSpamReference(Reference):
    """Stable-SPAM on every parameter; `hidden` only chooses the learning rate."""

    # Statistics are per tensor, except that names in `stacked` have them per slice.

    def __init__(
        self,
        params: Mapping[str, NDArray[Any]],
        hidden: Set[str],
        *,
        lr: float = 1e-3,
        eps: float = 1e-8,
        gamma1: float = 0.7,
        gamma2: float = 0.9,
        gamma3: float = 0.999,
        update_proj_gap: int = 1000,
        eta_min: float = 0.5,
        total_steps: int | None = None,
        reset_step: str = "authors",
        **common: Any,
    ) -> None:
        super().__init__(params, hidden, lr=lr, eps=eps, **common)
        if reset_step not in ("clean", "authors"):
            raise ValueError(f"reset_step={reset_step!r}: use 'clean' or 'authors'")
        self.gamma1 = gamma1
        self.gamma2 = gamma2
        self.gamma3 = gamma3
        self.gap = update_proj_gap
        self.eta_min = eta_min
        self.total_steps = total_steps
        self.reset_step = reset_step
        self.maximum: dict[str, float] = {}
        self.norm: dict[str, float] = {}
        self.norm_sq: dict[str, float] = {}
        self.since_reset: dict[str, int] = {}

    def update(self, name: str, g: Array, t: int) -> Array:
        if name in self.stacked:
            return np.stack([self.matrix_update(f"{name}[{i}]", g[i], t) for i in range(len(g))])
        return self.matrix_update(name, g, t)

    def matrix_update(self, key: str, g: Array, t: int) -> Array:
        s = self.momentum_factor(t)
        g = self.clipped(key, g, t)
        g = self.renormed(key, g, t, s)
        return self.adam(key, g, t, self.betas[0] * s)

    def momentum_factor(self, t: int) -> float:
        """Falls as a cosine from 1 to eta_min over total_steps; 1 without them."""
        if self.total_steps is None:
            return 1.0
        angle = np.pi * min(t, self.total_steps) / self.total_steps
        return float(self.eta_min + (1 - self.eta_min) * 0.5 * (1 + np.cos(angle)))

    def clipped(self, key: str, g: Array, t: int) -> Array:
        """Entries above the running maximum shrink by the factor that brings the largest to it."""
        largest = float(np.max(np.abs(g)))
        before = self.maximum.get(key, 0.0)
        self.maximum[key] = self.gamma3 * before + (1 - self.gamma3) * largest
        limit = self.maximum[key] / (1 - self.gamma3**t)
        result = g.copy()
        large = np.abs(g) > limit
        result[large] = g[large] / largest * limit
        return result

    def renormed(self, key: str, g: Array, t: int, s: float) -> Array:
        """The gradient with the norm that the running norm and its square call for."""
        norm = float(np.linalg.norm(g))
        beta1, beta2 = self.gamma1 * s, self.gamma2
        self.norm[key] = beta1 * self.norm.get(key, 0.0) + (1 - beta1) * norm
        self.norm_sq[key] = beta2 * self.norm_sq.get(key, 0.0) + (1 - beta2) * norm**2
        mean = self.norm[key] / (1 - beta1**t)
        square = self.norm_sq[key] / (1 - beta2**t)
        if norm == 0:
            return g
        result: Array = g / norm * (mean / (np.sqrt(square) + self.eps))
        return result

    def adam(self, key: str, g: Array, t: int, beta1: float) -> Array:
        """Adam in torch's form, its moments cleared at every multiple of the gap."""
        beta2 = self.betas[1]
        zero = np.zeros_like(g)
        reset = t > 1 and t % self.gap == 0
        if reset:
            self.since_reset[key] = 0
            if self.reset_step == "clean":
                self.exp_avg[key] = zero
                self.exp_avg_sq[key] = zero
        self.since_reset[key] = k = self.since_reset.get(key, 0) + 1
        self.exp_avg[key] = m = beta1 * self.exp_avg.get(key, zero) + (1 - beta1) * g
        self.exp_avg_sq[key] = v = beta2 * self.exp_avg_sq.get(key, zero) + (1 - beta2) * g**2
        if reset and self.reset_step == "authors":
            # That step still moves by the old moments; the zeros replace them only after it.
            self.exp_avg[key] = zero
            self.exp_avg_sq[key] = zero
        m_hat = m / (1 - beta1**k)
        v_hat = v / (1 - beta2**k)
        update: Array = m_hat / (np.sqrt(v_hat) + self.eps)
        return update
