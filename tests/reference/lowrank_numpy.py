"""Low-rank layers and restarts in float64 NumPy and SciPy, from the papers' formulas."""

from collections.abc import Callable

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

Array = NDArray[np.float64]


def svd_factors(B: Array, A: Array, alpha: float) -> tuple[Array, Array]:
    """Balanced factors from the SVD of the whole product; r columns, the rest zeros."""
    rank = B.shape[1]
    U, S, Vh = scipy.linalg.svd(B @ A, full_matrices=False)
    kept = min(rank, len(S))
    left, right = np.zeros_like(B), np.zeros_like(A)
    left[:, :kept] = U[:, :kept] * S[:kept] ** alpha
    right[:kept] = S[:kept, None] ** (1 - alpha) * Vh[:kept]
    return left, right


def hessian(B: Array, A: Array) -> Array:
    """The Hessian of ½ ‖B A - W‖² at a minimum, B A = W, over (vec dB, vec dA).

    There it is JᵀJ with J the derivative of the product: dW = dB A + B dA.
    """
    (m, r), n = B.shape, A.shape[1]
    columns = []
    for i in range(m * r + r * n):
        step = np.zeros(m * r + r * n)
        step[i] = 1.0
        dB, dA = step[: m * r].reshape(m, r), step[m * r :].reshape(r, n)
        columns.append((dB @ A + B @ dA).ravel())
    J = np.stack(columns, axis=1)
    return J.T @ J


def condition_number(B: Array, A: Array) -> float:
    """Largest over smallest eigenvalue; the r² zeros of B → B R, A → R⁻¹ A are left out."""
    rank = B.shape[1]
    eigenvalues = np.sort(scipy.linalg.eigvalsh(hessian(B, A)))[rank * rank :]
    return float(eigenvalues[-1] / eigenvalues[0])


def sparse_layer(
    x: Array, B: Array, A: Array, values: Array, indices: NDArray[np.int64], scale: float, g: Array
) -> dict[str, Array]:
    """SLTrain's output and, for an output gradient ``g``, its gradients, by way of dense S."""
    S = np.zeros(B.shape[0] * A.shape[1])
    S[indices] = values
    W = scale * B @ A + S.reshape(B.shape[0], A.shape[1])
    G = g.T @ x
    return {
        "y": x @ W.T,
        "x": g @ W,
        "B": scale * G @ A.T,
        "A": scale * B.T @ G,
        "values": G.ravel()[indices],
    }


def recovering(base: Callable[[int], float], every: int, n: int, steps: int) -> list[float]:
    """The factor of each update in the authors' loop, walked with its counter.

    A restart, after the update that it is due at, makes the scheduler anew at that update's number;
    making it advances it by one. Before the first restart the schedule is the base.
    """
    factors: list[float] = []
    counter, restarted = 0, False
    for update in range(1, steps + 1):
        since = counter % every
        if restarted and since < n:
            target = base(counter - since + n)
            done = since / (n - 1) if n > 1 else 1.0
            factors.append(0.001 * target + (target - 0.001 * target) * done)
        else:
            factors.append(base(counter))
        counter += 1
        if update % every == 0:
            counter, restarted = update + 1, True
    return factors


def adam_with_resets(
    p: Array, grads: list[Array], lr: float, every: int, what: str, eps: float = 1e-8
) -> list[Array]:
    """Adam (betas 0.9, 0.999) after each step, with moments zeroed after every ``every``-th.

    ``all``: the step count starts again too; ``moments``: it goes on.
    """
    m, v, t = np.zeros_like(p), np.zeros_like(p), 0
    path = []
    for i, g in enumerate(grads, start=1):
        t += 1
        m = 0.9 * m + 0.1 * g
        v = 0.999 * v + 0.001 * g * g
        p = p - lr * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + eps)
        path.append(p)
        if i % every == 0:
            m, v, t = np.zeros_like(p), np.zeros_like(p), 0 if what == "all" else t
    return path
