"""Learning-rate range test, one role of parameters after another."""

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

Curve = list[tuple[float, float]]  # learning rates and losses
SMOOTHING = 0.8  # of the losses' running mean
RISE = 1.5  # times the lowest mean loss ends a curve


@dataclass(frozen=True)
class LRRangeTest:
    """Result of :func:`optimzoo.lr_range_test`.

    Attributes:
        curves: by role, the learning rates of its steps with the loss at each, in that order.
        suggestions: by role, the rate at which the smoothed loss falls fastest; None: nowhere.
        before: by role, the rate that the optimizer has.
    """

    curves: dict[str, Curve]
    suggestions: dict[str, float | None] = field(default_factory=dict)
    before: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        """Format a table: role, the optimizer's rate, the suggested one, where the loss rose."""
        lines = [f"{'role':<10}{'lr':>10}{'suggested':>11}  losses"]
        for role, curve in self.curves.items():
            losses = [loss for _, loss in curve if math.isfinite(loss)] or [math.nan]
            rate = self.suggestions[role]
            lines.append(
                f"{role:<10}{self.before[role]:>10.3g}{'-' if rate is None else f'{rate:.3g}':>11}"
                f"  {losses[0]:.4g}, at best {min(losses):.4g} in {len(curve)} steps"
                f" to lr {curve[-1][0]:.3g}"
            )
        return "\n".join(lines)

    def plot(self, ax: Any = None) -> Any:
        """Draw the smoothed losses over the learning rates on a matplotlib axis, and return it.

        Raises:
            ImportError: matplotlib is not installed.
        """
        if ax is None:
            try:
                from matplotlib import pyplot
            except ImportError:
                raise ImportError("a plot needs matplotlib: pip install matplotlib") from None
            ax = pyplot.figure().subplots()
        for role, curve in self.curves.items():
            rates = [rate for rate, _ in curve]
            (line,) = ax.plot(rates, _smoothed(curve), label=role)
            if (rate := self.suggestions[role]) is not None:
                ax.axvline(rate, color=line.get_color(), linestyle=":")
        ax.set_xscale("log")
        ax.set_xlabel("learning rate")
        ax.set_ylabel("loss")
        ax.legend()
        return ax


def lr_range_test(
    optimizer: Optimizer,
    closure: Callable[[], Any],
    *,
    roles: Iterable[str] | None = None,
    low: float = 1 / 64,
    high: float = 64.0,
    steps: int = 60,
    model: nn.Module | None = None,
) -> LRRangeTest:
    """Raise the learning rate of one role after another, and return losses and suggestions.

    From the weights as they are, ``steps`` steps are taken for a role with its learning rate
    growing geometrically from ``low`` to ``high`` times what its groups have, and those of the
    other roles at 0, so that what the loss does is this role's doing. The curve ends early where
    the loss is not finite, or its running mean 1.5 times its lowest. The suggestion is the rate at
    which the running mean falls fastest over log(lr), as in Lightning and torch-lr-finder: a start
    for a run, not its best rate.

    Afterwards weights, state, learning rates, the buffers of ``model`` and torch's random numbers
    are as before, to the bit, and gradients are cleared; batches that the closure drew are gone.

    Args:
        optimizer: any optimizer; groups without a ``role`` are one role, ``all``.
        closure: as that of ``optimizer.step``: clears gradients, draws a batch, runs forward and
            backward, returns the loss.
        roles: which roles to test, in this order; default: each that has a group.
        low: first learning rate of a role, times its own.
        high: last one.
        steps: steps of a role.
        model: to restore its buffers too.

    Raises:
        ValueError: a role that no group has, a range or a number of steps that is none, a rate of
            0, a closure that returns no number.

    Examples:
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = model(next(batches))
        ...     loss.backward()
        ...     return loss
        >>> print(optimzoo.lr_range_test(optimizer, closure))
    """
    by_role: dict[str, list[dict[str, Any]]] = {}
    for group in optimizer.param_groups:
        by_role.setdefault(group.get("role") or "all", []).append(group)
    chosen = list(by_role if roles is None else roles)
    for role in chosen:
        if role not in by_role:
            raise ValueError(f"no group has the role {role!r}; there are {', '.join(by_role)}")
        if not all(float(group["lr"]) > 0 for group in by_role[role]):
            raise ValueError(f"a group of role {role} has lr=0; give it a rate to multiply")
    if not 0 < low < high < math.inf:
        raise ValueError(f"low={low} and high={high}: they must be positive, low below high")
    if steps < 2:
        raise ValueError(f"steps={steps}; it must be at least 2")
    before = {role: float(by_role[role][0]["lr"]) for role in chosen}
    snapshot = _Snapshot(optimizer, model)
    curves: dict[str, Curve] = {}
    for role in chosen:
        try:
            curves[role] = _curve(optimizer, closure, role, np.geomspace(low, high, steps))
        finally:
            snapshot.restore()
    return LRRangeTest(curves, {role: _steepest(curves[role]) for role in chosen}, before)


class _Snapshot:
    """Copy of all that a test changes."""

    def __init__(self, optimizer: Optimizer, model: nn.Module | None) -> None:
        self.optimizer = optimizer
        tensors = [p for group in optimizer.param_groups for p in group["params"]]
        tensors += [] if model is None else list(model.buffers())
        self.tensors = [(tensor, tensor.detach().clone()) for tensor in tensors]
        self.state = copy.deepcopy(optimizer.state_dict())
        self.stepped = getattr(optimizer, "_opt_called", None)  # torch's schedulers set it
        self.rates = [(group["lr"], float(group["lr"])) for group in optimizer.param_groups]
        self.random = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def restore(self) -> None:
        """Write everything back; a rate that is a tensor stays the same tensor."""
        with torch.no_grad():
            for tensor, value in self.tensors:
                tensor.copy_(value)
        self.optimizer.load_state_dict(copy.deepcopy(self.state))
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        for number, values in self.state["state"].items():  # a load casts some to another dtype
            tensors = {key: v.clone() for key, v in values.items() if isinstance(v, Tensor)}
            self.optimizer.state[params[number]].update(tensors)
        if self.stepped is None:
            vars(self.optimizer).pop("_opt_called", None)
        else:
            self.optimizer._opt_called = self.stepped  # type: ignore[attr-defined]
        for group, (lr, value) in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = lr.fill_(value) if isinstance(lr, Tensor) else lr
        self.optimizer.zero_grad()
        torch.set_rng_state(self.random)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)


def _curve(optimizer: Optimizer, closure: Callable[[], Any], role: str, factors: Any) -> Curve:
    base_lrs = [float(group["lr"]) for group in optimizer.param_groups]
    tested = [(group.get("role") or "all") == role for group in optimizer.param_groups]
    first = next(rate for rate, mine in zip(base_lrs, tested, strict=True) if mine)
    curve: Curve = []
    lowest = math.inf
    for factor in map(float, factors):
        for group, rate, mine in zip(optimizer.param_groups, base_lrs, tested, strict=True):
            value = rate * factor if mine else 0.0
            group["lr"] = lr.fill_(value) if isinstance(lr := group["lr"], Tensor) else value
        with torch.enable_grad():
            loss = closure()
        if loss is None:
            raise ValueError("the closure returned None; it must return the loss")
        number = float(loss.detach() if isinstance(loss, Tensor) else loss)
        curve.append((first * factor, number))
        optimizer.step()  # of a released optimizer it ends the round, so before a break
        mean = _smoothed(curve)[-1]
        if not math.isfinite(mean) or mean > lowest + (RISE - 1) * abs(lowest):
            break
        lowest = min(lowest, mean)
    return curve


def _smoothed(curve: Curve) -> list[float]:
    """Return the running mean of the losses, each with the weight of what came before it."""
    means, total, weight = [], 0.0, 0.0
    for _, loss in curve:
        total, weight = SMOOTHING * total + loss, SMOOTHING * weight + 1
        means.append(total / weight)
    return means


def _steepest(curve: Curve) -> float | None:
    """Return the learning rate at which the smoothed loss falls fastest, None if nowhere."""
    means = np.array(_smoothed(curve))
    means = means[np.isfinite(means)]
    if len(means) < 2:
        return None
    slopes = np.gradient(means)  # the rates are spaced evenly in their logarithm
    steepest = int(slopes.argmin())
    return curve[steepest][0] if slopes[steepest] < 0 else None
