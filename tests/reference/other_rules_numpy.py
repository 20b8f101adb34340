"""The rules of `optimzoo.core.other_rules` in float64 NumPy, element by element."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class ScaleOther:
    """SCALE's rule: an average of the head's gradients, none of the embedding's."""

    def __init__(self) -> None:
        self.average: dict[str, Array] = {}

    def update(self, name: str, g: Array, t: int, betas: tuple[float, float], eps: float) -> Array:
        if name == "head":
            before = self.average.get(name, np.zeros_like(g))
            self.average[name] = g = betas[0] * before + (1 - betas[0]) * g
        result = np.zeros_like(g)
        if name == "head":  # a token is an output: one scalar for each
            for i, row in enumerate(g):
                result[i] = row / max(np.sqrt(np.mean(row**2)), eps)
        else:  # a token is an input: one scalar for each feature
            for j in range(g.shape[1]):
                result[:, j] = g[:, j] / max(np.sqrt(np.mean(g[:, j] ** 2)), eps)
        return result


class AdafactorOther:
    """Adafactor with a constant beta2 and its bias correction, clipped to an RMS of one."""

    def __init__(self) -> None:
        self.rows: dict[str, Array] = {}
        self.columns: dict[str, Array] = {}

    def update(self, name: str, g: Array, t: int, betas: tuple[float, float], eps: float) -> Array:
        beta, (m, n) = betas[1], g.shape
        rows, columns = self.rows.get(name, np.zeros(m)), self.columns.get(name, np.zeros(n))
        self.rows[name] = rows = np.array(
            [beta * rows[i] + (1 - beta) * np.mean(g[i] ** 2) for i in range(m)]
        )
        self.columns[name] = columns = np.array(
            [beta * columns[j] + (1 - beta) * np.mean(g[:, j] ** 2) for j in range(n)]
        )
        result = np.zeros_like(g)
        if rows.sum() == 0:
            return result
        for i in range(m):
            for j in range(n):
                square = rows[i] * columns[j] / np.mean(rows)
                result[i, j] = g[i, j] / (np.sqrt(square / (1 - beta**t)) + eps)
        return np.asarray(result / max(1.0, np.sqrt(np.mean(result**2))))


OTHER_RULES = {"scale": ScaleOther, "adafactor": AdafactorOther}
