"""Restarts: refactorization and momentum reset on one clock, with a learning rate that recovers."""

from collections.abc import Callable

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.optimizer import Optimizer

from optimzoo.lowrank.clock import Clock
from optimzoo.lowrank.layers import LoRALinear
from optimzoo.lowrank.momentum_reset import MomentumReset
from optimzoo.lowrank.refactorize import factored_layers, refactorize_

Schedule = Callable[[int], float]


def quick_recovery(
    base: Schedule,
    every: int,
    recovery_steps: int = 10,
    start: float = 0.001,
    *,
    offset: int = 1,
) -> Schedule:
    """Return a schedule for ``LambdaLR``: ``base``, with a climb back to it after each restart.

    Up to the first restart it is ``base``. From then on, with u = t + offset, t₀ the last multiple
    of ``every`` not above u, and n = recovery_steps, the factor of step t is::

        u - t₀ < n:  target · (start + (1 - start) (u - t₀) / (n - 1)),  target = base(t₀ + n)
        else:        base(u)

    as the authors' loop runs its ``cosine_quick_recovery``. That loop makes the scheduler anew
    after a restart, and making it advances it by one: the first update has the climb's second
    point, about 0.11 of the target, and the point `start` falls to the last update before the next
    restart. ``offset=0`` has the climb where it is meant, from `start` right after the restart.
    The factor depends on t alone, so a resumed scheduler needs nothing else.

    Args:
        base: factor of the learning rate by step, such as warm-up and cosine.
        every: steps between two restarts.
        recovery_steps: steps of the climb, below ``every``; 0: the schedule is ``base``.
        start: where the climb starts, as a share of its target.
        offset: 1 as published, or 0.

    Raises:
        ValueError: an argument out of range.
    """
    if not 0 <= recovery_steps < every:
        raise ValueError(f"recovery_steps is {recovery_steps}; it must be from 0 to every={every}")
    if not 0 <= start <= 1:
        raise ValueError(f"start is {start}; it must be from 0 to 1")
    if offset not in (0, 1):
        raise ValueError(f"offset is {offset}; it must be 0 or 1")

    def factor(step: int) -> float:
        if step < every or not recovery_steps:
            return base(step)
        step += offset
        since = step % every
        if since >= recovery_steps:
            return base(step)
        done = since / (recovery_steps - 1) if recovery_steps > 1 else 1.0
        return base(step - since + recovery_steps) * (start + (1 - start) * done)

    return factor


class _Restarting(Clock):
    """Clock for a model's low-rank layers and its optimizer, with the recovering schedule."""

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, every: int, recovery_steps: int
    ) -> None:
        super().__init__(every)
        quick_recovery(_constant, every, recovery_steps)  # refuses what does not fit
        self.layers = factored_layers(model)
        stepped = {p for group in optimizer.param_groups for p in group["params"]}
        if not any(layer.A in stepped for layer in self.layers.values()):
            raise ValueError(
                f"{type(optimizer).__name__} has no factor of the model's low-rank layers; make it "
                "after convert(model)"
            )
        self.model, self.optimizer, self.recovery_steps = model, optimizer, recovery_steps
        self.reset: MomentumReset | None = None

    def check(self) -> None:
        """Refuse an optimizer whose state the reset does not recognise."""
        if self.reset is not None:
            self.reset.check()

    def scheduler(self, base: Schedule | None = None) -> LambdaLR:
        """Return a ``LambdaLR`` of ``base`` (default: constant) that recovers after each restart.

        Step it once an optimizer step, as always; see :func:`quick_recovery`.
        """
        factor = quick_recovery(base or _constant, self.every, self.recovery_steps)
        return LambdaLR(self.optimizer, factor)


class Restarts(_Restarting):
    """Restarts of arXiv 2505.22922, every ``every`` steps, after the optimizer's step:

    1. ``refactorize``: the factors of every low-rank layer are balanced, the product stays;
    2. ``reset``: both moments and the step count of every parameter start from zero;
    3. with :meth:`scheduler`, the learning rate climbs back in ``recovery_steps`` steps.

    After each of the optimizer's steps the restarts' comes first, then the scheduler's::

        restarts = Restarts(model, optimizer, every=200)
        scheduler = restarts.scheduler(warmup_cosine)
        for batch in batches:
            ...
            optimizer.step(); restarts.step(); scheduler.step()

    Everything is computed from what the replicas share: under DDP the ranks stay equal without
    communication. ``state_dict`` is the count of steps; with the states of model, optimizer and
    scheduler a resumed run gives the same bits.

    Args:
        model: a model with layers of this package.
        optimizer: any that :class:`MomentumReset` knows.
        every: steps between two restarts; the paper's best is 200 (of 11,000 and up).
        refactorize: do 1.
        reset: do 2.
        recovery_steps: steps of 3; the authors' code: 10.

    Raises:
        ValueError: a model without low-rank layers, an optimizer without their factors, an
            option out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        every: int = 200,
        refactorize: bool = True,
        reset: bool = True,
        recovery_steps: int = 10,
    ) -> None:
        super().__init__(model, optimizer, every, recovery_steps)
        self.refactorize = refactorize
        if reset:
            self.reset = MomentumReset(optimizer, every)

    def fire(self) -> None:
        """Restart now."""
        self.check()
        if self.refactorize:
            refactorize_(self.model)
        if self.reset is not None:
            self.reset.fire()


class ReLoRA(_Restarting):
    """Restarts of ReLoRA (arXiv 2307.05695), every ``every`` steps, after the optimizer's step:

    1. each :class:`LoRALinear` is merged: W₀ ← W₀ + s B A, A drawn anew, B = 0;
    2. ``prune`` of the entries of the factors' moments, drawn at random, become zero: what the
       authors' code runs as its "optimizer reset" (the paper's text prunes by magnitude);
    3. with :meth:`scheduler`, the learning rate climbs back in ``recovery_steps`` steps.

    It is used as :class:`Restarts` is. Every draw depends on ``seed`` and the step alone.

    Args:
        model: a model converted with kind ``lora``.
        optimizer: any that :class:`MomentumReset` knows.
        every: steps between two restarts.
        prune: share of the moments' entries that become zero; 0 for none.
        recovery_steps: steps of 3.
        seed: seed of the draws.

    Raises:
        ValueError: a model without LoRA layers, an optimizer without their factors, an
            option out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        every: int = 200,
        prune: float = 0.999,
        recovery_steps: int = 10,
        seed: int = 0,
    ) -> None:
        super().__init__(model, optimizer, every, recovery_steps)
        self.seed = seed
        for name, layer in self.layers.items():
            if not isinstance(layer, LoRALinear):
                raise ValueError(f"{name} has no frozen weight to merge into; convert with 'lora'")
        factors = [p for layer in self.layers.values() for p in (layer.B, layer.A)]
        if prune:
            rule = {"what": "moments", "params": factors, "fraction": prune, "seed": seed}
            self.reset = MomentumReset(optimizer, every, **rule)  # type: ignore[arg-type]

    def fire(self) -> None:
        """Restart now."""
        self.check()
        generator = torch.Generator("cpu").manual_seed(self.seed + self.steps)
        for layer in self.layers.values():
            if isinstance(layer, LoRALinear):
                layer.merge_(generator)
        if self.reset is not None:
            self.reset.steps = self.steps
            self.reset.fire()


def _constant(step: int) -> float:
    return 1.0
