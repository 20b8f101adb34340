"""SCALE (arXiv 2506.16659) in float64 NumPy, written to be read beside the paper.

The paper writes a weight as [d_in, d_out] and gives each of its columns, one output, one scalar.
Where the outputs lie in the stored array depends on the layer: see `OUTPUTS_ARE_ROWS`.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reference.rest_adam_numpy import shrunk

from .spectral_numpy import PowerIteration

Array = NDArray[np.float64]

OUTPUTS_ARE_ROWS = {
    "linear": True,  # [out, in]
    "stack": True,  # [n, out, in], each slice by itself
    "head": True,  # [vocab, d]: a linear layer whose outputs are the vocabulary
    "conv1d": False,  # [in, out]
    "embedding": False,  # [vocab, d]: the vocabulary is the input
}
DIMENSIONS = {"stack": 3, "head": 2, "conv1d": 2, "embedding": 2}


class ScaleReference:
    """`step` updates `params`; a parameter absent from the gradients is left as it is."""

    def __init__(
        self,
        params: Mapping[str, NDArray[Any]],
        kinds: Mapping[str, str],
        *,
        lr: float,
        momentum: float = 0.9,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        weight_decay_style: str = "decoupled",
        normalize: str = "column",
        norm: str = "rms",
        spectral_norm: bool = False,
        eps: float = 1e-8,
        vector_lr: float | None = None,
        other_betas: tuple[float, float] = (0.9, 0.999),
        other_eps: float = 1e-8,
        maximize: bool = False,
    ) -> None:
        if normalize not in ("column", "row", "sign"):
            raise ValueError(f"normalize={normalize!r}: use 'column', 'row' or 'sign'")
        if norm not in ("rms", "l2"):
            raise ValueError(f"norm={norm!r}: use 'rms' or 'l2'")
        # A copy, so that the caller's arrays, often views of torch memory, never move.
        self.params = {name: np.array(p, dtype=np.float64) for name, p in params.items()}
        self.kinds = {name: kinds[name] for name in self.params}
        for name, kind in self.kinds.items():
            ndim = self.params[name].ndim
            if kind != "vector" and kind not in OUTPUTS_ARE_ROWS:
                raise ValueError(f"{name}: kind {kind!r}: use 'vector' or {[*OUTPUTS_ARE_ROWS]}")
            if ndim != DIMENSIONS.get(kind, ndim) or (kind == "linear" and ndim < 2):
                raise ValueError(f"{name}: {ndim} dimensions do not fit the kind {kind!r}")
        self.lr = lr
        self.momentum = momentum
        self.nesterov = nesterov
        self.weight_decay = weight_decay
        self.cautious = weight_decay_style == "cautious"
        self.normalize = normalize
        self.norm = norm
        self.spectral_norm = PowerIteration(2) if spectral_norm else None
        self.eps = eps
        self.vector_lr = lr if vector_lr is None else vector_lr
        self.other_betas = other_betas
        self.other_eps = other_eps
        self.maximize = maximize
        self.steps = dict.fromkeys(self.params, 0)
        self.exp_avg = {name: np.zeros_like(p) for name, p in self.params.items()}
        self.exp_avg_sq = {name: np.zeros_like(p) for name, p in self.params.items()}

    def step(self, grads: Mapping[str, NDArray[Any]], lr_factor: float = 1.0) -> None:
        """One update; `lr_factor` is the schedule, which scales both learning rates."""
        for name, grad in grads.items():
            g = np.array(grad, dtype=np.float64)
            if g.shape != self.params[name].shape:
                raise ValueError(f"{name}: the gradient has shape {g.shape}, not the parameter's")
            if self.maximize:
                g = -g
            self.steps[name] += 1
            if self.kinds[name] == "vector":
                lr, update = self.vector_lr * lr_factor, self.adam(name, g)
            else:
                lr, update = self.lr * lr_factor, self.scale(name, g)
            kept = shrunk(self.params[name], update, lr * self.weight_decay, self.cautious)
            self.params[name] = kept - lr * update

    def scale(self, name: str, g: Array) -> Array:
        kind = self.kinds[name]
        if kind == "head":
            # Averaged first, normalised after; C is scale invariant, so no bias correction.
            beta = self.momentum
            self.exp_avg[name] = beta * self.exp_avg[name] + (1 - beta) * g
            ahead = beta * self.exp_avg[name] + (1 - beta) * g
            g = ahead if self.nesterov else self.exp_avg[name]
        update = self.normal(kind, g)
        if self.spectral_norm is None or kind in ("head", "embedding"):
            return update
        pieces = update if kind == "stack" else update.reshape(1, len(g), -1)
        sizes = [self.spectral_norm(f"{name}[{i}]", piece) for i, piece in enumerate(pieces)]
        return (pieces / np.array(sizes)[:, None, None]).reshape(g.shape)

    def normal(self, kind: str, g: Array) -> Array:
        if self.normalize == "sign":
            return np.sign(g)
        # The "row" ablation gives the scalars to the inputs instead.
        one_per_row = OUTPUTS_ARE_ROWS[kind] == (self.normalize == "column")
        if kind == "stack":
            return np.stack([self.normalized(piece, one_per_row) for piece in g])
        matrix = g.reshape(g.shape[0], -1)  # [out, everything else]; no change to a matrix
        return self.normalized(matrix, one_per_row).reshape(g.shape)

    def normalized(self, matrix: Array, one_per_row: bool) -> Array:
        result = np.zeros_like(matrix)
        if one_per_row:
            for i in range(matrix.shape[0]):
                result[i, :] = matrix[i, :] / self.size(matrix[i, :])
        else:
            for j in range(matrix.shape[1]):
                result[:, j] = matrix[:, j] / self.size(matrix[:, j])
        return result

    def size(self, line: Array) -> float:
        mean_or_sum = np.mean(line**2) if self.norm == "rms" else np.sum(line**2)
        return max(float(np.sqrt(mean_or_sum)), self.eps)

    def adam(self, name: str, g: Array) -> Array:
        beta1, beta2 = self.other_betas
        self.exp_avg[name] = m = beta1 * self.exp_avg[name] + (1 - beta1) * g
        self.exp_avg_sq[name] = v = beta2 * self.exp_avg_sq[name] + (1 - beta2) * g**2
        correction1 = 1 - beta1 ** self.steps[name]
        correction2 = 1 - beta2 ** self.steps[name]
        # As in the authors' code, eps joins sqrt(v) before v is corrected; torch's Adam differs.
        update: Array = np.sqrt(correction2) / correction1 * m / (np.sqrt(v) + self.other_eps)
        return update
