"""The parameter loop of the matrix methods in float64 NumPy, and Adam for the other parameters."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Set
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reference.other_rules_numpy import OTHER_RULES

Array = NDArray[np.float64]


class Reference(ABC):
    """Loops over the parameters: names in `hidden` get the method, all others the rest Adam."""

    def __init__(
        self,
        params: Mapping[str, NDArray[Any]],
        hidden: Set[str],
        *,
        lr: float,
        other_lr: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        other_betas: tuple[float, float] | None = None,
        other_eps: float | None = None,
        weight_decay: float = 0.0,
        weight_decay_style: str = "decoupled",
        stacked: Set[str] = frozenset(),
        maximize: bool = False,
        other: str = "adam",
    ) -> None:
        # A copy, so that the caller's arrays, often views of torch memory, never move.
        self.params = {name: np.array(p, dtype=np.float64) for name, p in params.items()}
        unknown = sorted((hidden | stacked) - self.params.keys())
        if unknown:
            raise ValueError(f"{unknown} are not parameters: use names from {[*self.params]}")
        self.hidden = hidden
        self.stacked = stacked
        self.lr = lr
        self.other_lr = lr if other_lr is None else other_lr
        self.betas = betas
        self.eps = eps
        self.other_betas = betas if other_betas is None else other_betas
        self.other_eps = eps if other_eps is None else other_eps
        self.weight_decay = weight_decay
        self.cautious = weight_decay_style == "cautious"
        self.maximize = maximize
        self.other = None if other == "adam" else OTHER_RULES[other]()
        self.steps = dict.fromkeys(self.params, 0)
        # Keys are a parameter's name, or name[i] for slice i of a stack.
        self.exp_avg: dict[str, Array] = {}
        self.exp_avg_sq: dict[str, Array] = {}

    def step(self, grads: Mapping[str, NDArray[Any]], lr_factor: float = 1.0) -> None:
        """One update; `lr_factor` is the schedule, which scales both learning rates."""
        for name, grad in grads.items():
            g = np.array(grad, dtype=np.float64)
            if g.shape != self.params[name].shape:
                raise ValueError(f"{name}: the gradient has shape {g.shape}, not the parameter's")
            if self.maximize:
                g = np.asarray(-g)  # a negated 0-d array is no array
            self.steps[name] += 1
            lr = lr_factor * (self.lr if name in self.hidden else self.other_lr)
            update = self.update(name, g, self.steps[name])
            kept = shrunk(self.params[name], update, lr * self.weight_decay, self.cautious)
            self.params[name] = kept - lr * update

    def update(self, name: str, g: Array, t: int) -> Array:
        """What the learning rate multiplies, in the parameter's shape."""
        if self.takes_other(name):
            return self.other.update(name, g, t, self.other_betas, self.other_eps)
        if name not in self.hidden:
            scale = correction(self.other_betas, t)
            return scale * self.normalized(name, g, self.other_betas, self.other_eps)
        if name in self.stacked:
            return np.stack([self.matrix_update(f"{name}[{i}]", g[i], t) for i in range(len(g))])
        return self.matrix_update(name, g.reshape(g.shape[0], -1), t).reshape(g.shape)

    def takes_other(self, name: str) -> bool:
        """Whether a parameter takes a rule of `other_rules_numpy`, and not Adam."""
        return self.other is not None and name in ("embedding", "head")

    @abstractmethod
    def matrix_update(self, key: str, g: Array, t: int) -> Array:
        """The method itself, for one [m, n] gradient."""

    def normalized(self, key: str, g: Array, betas: tuple[float, float], eps: float) -> Array:
        """Adam's m / (sqrt(v) + eps), without bias correction."""
        beta1, beta2 = betas
        zero = np.zeros_like(g)
        self.exp_avg[key] = m = beta1 * self.exp_avg.get(key, zero) + (1 - beta1) * g
        self.exp_avg_sq[key] = v = beta2 * self.exp_avg_sq.get(key, zero) + (1 - beta2) * g**2
        result: Array = m / (np.sqrt(v) + eps)
        return result


def shrunk(param: Array, update: Array, by: float, cautious: bool) -> Array:
    """The weights less a part of them: of all or, with caution, of those in the update's way.

    The step subtracts the update: one of the weight's own sign moves it towards zero, as the decay
    does. One of zero is in no way.
    """
    agree = (np.sign(update) == np.sign(param)) | (update == 0)
    return np.where(agree | np.bool_(not cautious), param * (1 - by), param)


def correction(betas: tuple[float, float], t: int) -> float:
    """Both bias corrections in one factor: eps has joined sqrt(v) before v is corrected."""
    return float(np.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t))
