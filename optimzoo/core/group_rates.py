"""Warning about training loops that overwrite the groups' own learning rates with one."""

import sys
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

Groups = Sequence[dict[str, Any]]


class GroupRates:
    """Learning rates that an optimizer's groups were built with, compared with each step's.

    Rates that are 0 (a warm-up's start), that are tensors, or that a torch scheduler has brought to
    one floor do not count. A plateau's floor is recognised because it stays: rates that become
    equal after steps with different ones are reported when they change again.
    """

    def __init__(self) -> None:
        self._built: list[tuple[str, Any]] = []
        self._last: list[Any] = []
        self._watching = self._were_apart = self._came_together = False

    def add(self, index: int, group: dict[str, Any]) -> None:
        """Record the group at ``index``, which may have no rate yet; forget those after it."""
        self._built = [*self._built[:index], (group.get("role") or "by shape", group.get("lr"))]
        rates = [rate for _, rate in self._built]
        tensors = any(isinstance(rate, Tensor) for rate in rates)
        self._watching = not tensors and len(set(rates)) > 1

    def resume(self) -> None:
        """Continue from loaded groups, whose rates are those of the checkpoint."""
        self._last, self._were_apart, self._came_together = [], True, False

    def check(self, groups: Groups) -> None:
        """Warn once if the rates, which were different, are all equal now."""
        if not self._watching or len(groups) != len(self._built):
            return
        rates = [group["lr"] for group in groups]
        if any(isinstance(rate, Tensor) for rate in rates) or rates == self._last:
            return
        self._last = rates
        if any(rate != rates[0] for rate in rates):
            self._were_apart, self._came_together = True, False
        elif rates[0] == 0 or _scheduled_apart(groups):
            pass
        elif self._were_apart and not self._came_together:
            self._came_together = True
        else:
            self._watching = False
            _warn(rates[0], self._built)


def watch(optimizer: Optimizer) -> None:
    """Check the rates of an optimizer other than a ``RoleOptimizer`` before each of its steps."""
    rates = GroupRates()
    for index, group in enumerate(optimizer.param_groups):
        rates.add(index, group)

    def check(optimizer: Optimizer, *_: Any) -> None:
        if not torch.compiler.is_compiling():
            rates.check(optimizer.param_groups)

    optimizer.register_step_pre_hook(check)
    optimizer.register_load_state_dict_post_hook(lambda _: rates.resume())


def _scheduled_apart(groups: Groups) -> bool:
    """Return whether a torch scheduler's initial rates (`initial_lr`) differ between groups."""
    initial = [group.get("initial_lr") for group in groups]
    return None not in initial and any(rate != initial[0] for rate in initial)


def _warn(rate: float, built: list[tuple[str, Any]]) -> None:
    roles = ", ".join(f"{role} {lr:g}" for role, lr in dict.fromkeys(built))
    level, frame = 1, sys._getframe()
    packages = ("torch", "optimzoo", "")  # a compiled frame has no name
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] in packages:
        level, frame = level + 1, frame.f_back
    warnings.warn(
        f"every parameter group has the learning rate {rate:g} now, over the rates that were set "
        f"apart ({roles}); keep their ratios: base = [g['lr'] for g in optimizer.param_groups] "
        "once, then g['lr'] = factor * base[i], or use a scheduler such as LambdaLR",
        stacklevel=level,
    )
