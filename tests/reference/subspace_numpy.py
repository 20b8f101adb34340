"""GaLore, Fira and APOLLO in float64 NumPy, one weight [m, n] = [out, in] at a time.

Flipping the sign of a basis vector flips that line of the moments, so weights do not depend on the
signs within one basis. Across a refresh they are free of them only with rotate=True: without it the
old moments meet the new vectors, and each sign counts. Then pass `signs`, or kind='given'.
A basis rotated within its span gives other weights: kind='svd' needs distinct singular values.
"""

from collections.abc import Callable, Mapping, Set
from typing import Any

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from .rest_adam_numpy import Array, Reference, correction

# (name, step) -> [m, r] or [n, r], whichever side is projected; (P, Q) when both are.
Bases = Callable[[str, int], Array | tuple[Array, Array]]


class Projector:
    """The basis of one matrix: P [m, r] on the left, Q [n, r] on the right, or both."""

    def __init__(
        self, key: str, shape: tuple[int, ...], side: str, rank: int, kind: str, given: Bases | None
    ) -> None:
        m, n = shape
        if side == "auto":
            side = "right" if m >= n else "left"
        if side not in ("left", "right", "both"):
            raise ValueError(f"side={side!r}: use 'auto', 'left', 'right' or 'both'")
        if kind not in ("svd", "power", "given"):
            raise ValueError(f"kind={kind!r}: use 'svd', 'power' or 'given'")
        if kind != "svd" and given is None:
            raise ValueError(f"kind={kind!r} needs a basis: pass given=(name, step) -> array")
        self.key = key
        self.side = side
        self.rank = min(rank, m, n)
        self.kind = kind
        self.given = given
        self.p: Array | None = None
        self.q: Array | None = None

    def refresh(self, g: Array, t: int, signs: Bases | None) -> None:
        """A new basis from this gradient; its vectors take the signs of those in `signs`."""
        first = self.p is None and self.q is None
        if self.kind == "given" or (self.kind == "power" and first):
            assert self.given is not None
            p, q = self.sides(self.given(self.key, t))
        elif self.kind == "power":
            p = None if self.p is None else orthonormal(g @ g.T @ self.p)
            q = None if self.q is None else orthonormal(g.T @ g @ self.q)
        else:
            u, _, vt = scipy.linalg.svd(g, full_matrices=False)
            p = None if self.side == "right" else u[:, : self.rank]
            q = None if self.side == "left" else vt[: self.rank, :].T
        if signs is not None:
            like_p, like_q = self.sides(signs(self.key, t))
            p, q = aligned(p, like_p), aligned(q, like_q)
        self.p, self.q = p, q

    def sides(self, basis: Array | tuple[Array, Array]) -> tuple[Array | None, Array | None]:
        """What the caller supplied, as (P or None, Q or None)."""
        if isinstance(basis, tuple):
            return np.array(basis[0], dtype=np.float64), np.array(basis[1], dtype=np.float64)
        one = np.array(basis, dtype=np.float64)
        return (one, None) if self.side == "left" else (None, one)

    def project(self, g: Array) -> Array:
        """P^T G, G Q or P^T G Q."""
        if self.p is not None:
            g = self.p.T @ g
        if self.q is not None:
            g = g @ self.q
        return g

    def back(self, low: Array) -> Array:
        """P low, low Q^T or P low Q^T."""
        if self.p is not None:
            low = self.p @ low
        if self.q is not None:
            low = low @ self.q.T
        return low


def orthonormal(matrix: Array) -> Array:
    """Q of the thin QR factorisation."""
    q: Array = scipy.linalg.qr(matrix, mode="economic")[0]
    return q


def aligned(basis: Array | None, like: Array | None) -> Array | None:
    """Each column times +1 or -1, so that it points the way of the same column of `like`."""
    if basis is None or like is None:
        return basis
    return basis * np.where(np.sum(basis * like, axis=0) < 0, -1.0, 1.0)


def turned(x: Array, left: Array | None, right: Array | None) -> Array:
    """left x right^T, where either may be missing."""
    if left is not None:
        x = left @ x
    if right is not None:
        x = x @ right.T
    return x


class GaLoreReference(Reference):
    """GaLore: Adam in a subspace that is renewed every `update_proj_gap` steps."""

    def __init__(
        self,
        params: Mapping[str, NDArray[Any]],
        hidden: Set[str],
        *,
        lr: float = 1e-2,
        rank: int = 128,
        update_proj_gap: int = 200,
        scale: float = 0.25,
        side: str = "auto",
        kind: str = "svd",
        rotate: bool = False,
        given: Bases | None = None,
        signs: Bases | None = None,
        **common: Any,
    ) -> None:
        super().__init__(params, hidden, lr=lr, **common)
        self.rank = rank
        self.gap = update_proj_gap
        self.scale = scale
        self.side = side
        self.kind = kind
        self.rotate = rotate
        self.given = given
        self.signs = signs
        self.projectors: dict[str, Projector] = {}

    def matrix_update(self, key: str, g: Array, t: int) -> Array:
        low = self.project(key, g, t)
        n = self.normalized(key, low, self.betas, self.eps)
        return correction(self.betas, t) * self.scale * self.projectors[key].back(n)

    def project(self, key: str, g: Array, t: int) -> Array:
        """The low gradient, in a new basis at steps 1, 1 + gap, 1 + 2 gap, ..."""
        if key not in self.projectors:
            self.projectors[key] = Projector(
                key, g.shape, self.side, self.rank, self.kind, self.given
            )
        projector = self.projectors[key]
        if (t - 1) % self.gap == 0:
            old_p, old_q = projector.p, projector.q
            projector.refresh(g, t, self.signs)
            if self.rotate and t > 1:
                r_p = None if old_p is None or projector.p is None else projector.p.T @ old_p
                r_q = None if old_q is None or projector.q is None else projector.q.T @ old_q
                self.rotate_state(key, r_p, r_q)
        return projector.project(g)

    def rotate_state(self, key: str, r_p: Array | None, r_q: Array | None) -> None:
        """Moments from the old coordinates to the new: m by R, v by the squares of R's entries."""
        squared_p = None if r_p is None else r_p * r_p
        squared_q = None if r_q is None else r_q * r_q
        self.exp_avg[key] = turned(self.exp_avg[key], r_p, r_q)
        self.exp_avg_sq[key] = turned(self.exp_avg_sq[key], squared_p, squared_q)


class GrowthLimiter:
    """Lets the norm of one matrix's update grow by at most `limit` per step."""

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.previous: dict[str, float] = {}

    def __call__(self, key: str, update: Array) -> Array:
        norm = float(np.linalg.norm(update))
        if norm == 0:
            return update
        if key not in self.previous:
            self.previous[key] = norm
            return update
        excess = max(norm / (self.previous[key] + 1e-8), self.limit) / self.limit
        self.previous[key] = norm / excess
        return update / excess


class FiraReference(GaLoreReference):
    """Fira: GaLore plus the scaled part of the gradient that the subspace leaves out."""

    def __init__(
        self,
        params: Mapping[str, NDArray[Any]],
        hidden: Set[str],
        *,
        limiter: float = 1.01,
        residual_scale: str = "alpha",
        **galore: Any,
    ) -> None:
        super().__init__(params, hidden, **galore)
        if self.side == "both":
            raise ValueError("side='both' has no per-channel scale: use 'auto', 'left' or 'right'")
        if residual_scale not in ("alpha", "one"):
            raise ValueError(f"residual_scale={residual_scale!r}: use 'alpha' or 'one'")
        self.inside = self.scale if residual_scale == "alpha" else 1.0
        self.limiter = GrowthLimiter(limiter)

    def matrix_update(self, key: str, g: Array, t: int) -> Array:
        low = self.project(key, g, t)
        n = self.normalized(key, low, self.betas, self.eps)
        projector = self.projectors[key]
        axis = 0 if projector.side == "left" else 1  # the axis of length r
        ratio = channel_ratio(n, low, axis)
        residual = self.limiter(key, (g - self.inside * projector.back(low)) * ratio)
        return correction(self.betas, t) * (self.scale * projector.back(n) + residual)


def channel_ratio(n: Array, low: Array, axis: int) -> Array:
    """||N|| / (||R|| + 1e-8) along one axis, shaped to scale the columns or rows of [m, n]."""
    top = np.sqrt(np.sum(n**2, axis=axis, keepdims=True))
    bottom = np.sqrt(np.sum(low**2, axis=axis, keepdims=True))
    ratio: Array = top / (bottom + 1e-8)
    return ratio


class ApolloReference(Reference):
    """APOLLO: the whole gradient, scaled by ratios that Adam finds in a random projection."""

    def __init__(
        self,
        params: Mapping[str, NDArray[Any]],
        hidden: Set[str],
        *,
        omega: Callable[[str, int], Array],
        lr: float = 1e-2,
        rank: int = 128,
        update_proj_gap: int = 200,
        scale: float = 1.0,
        scale_type: str = "channel",
        scale_front: bool = False,
        limiter: float = 1.01,
        **common: Any,
    ) -> None:
        super().__init__(params, hidden, lr=lr, **common)
        if scale_type not in ("channel", "tensor"):
            raise ValueError(f"scale_type={scale_type!r}: use 'channel' or 'tensor'")
        self.omega = omega
        self.rank = rank
        self.gap = update_proj_gap
        self.scale = scale
        self.scale_type = scale_type
        self.scale_front = scale_front
        self.limiter = GrowthLimiter(limiter)
        self.omegas: dict[str, Array] = {}

    def matrix_update(self, key: str, g: Array, t: int) -> Array:
        m, n = g.shape
        if (t - 1) % self.gap == 0:
            omega = np.array(self.omega(key, t), dtype=np.float64)
            # The rank may exceed both sides: nothing here is orthonormal.
            if omega.shape != (min(m, n), self.rank):
                raise ValueError(f"{key}: Omega is {omega.shape}: use {(min(m, n), self.rank)}")
            self.omegas[key] = omega
        low = self.omegas[key].T @ g if m < n else g @ self.omegas[key]
        adam = self.normalized(key, low, self.betas, self.eps)
        if self.scale_type == "channel":
            update = g * channel_ratio(adam, low, axis=0 if m < n else 1)
        else:
            update = g * (np.linalg.norm(adam) / (np.linalg.norm(low) + 1e-8))
        if self.scale_front:
            update = self.limiter(key, update * np.sqrt(self.scale))
        else:
            update = self.limiter(key, update) * np.sqrt(self.scale)
        return correction(self.betas, t) * update
