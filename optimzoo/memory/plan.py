"""Peaks of many methods and settings, from a few simulations that they share.

Between its backward pass and its step a training loop keeps nothing but weights, gradients and
state. So the peak of a method is ``max(passes + state, held + temporaries)``, where only the second
term and the state are the method's: forward and backward are simulated once for all of them.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from optimzoo.memory.account import Account, account
from optimzoo.memory.sharded import shard_of
from optimzoo.memory.simulate import Session, Step, blocks_of, language_model_step
from optimzoo.memory.tracker import (
    GRADIENTS,
    OTHER,
    PARAMETERS,
    STATE,
    STEP,
    TEMPORARIES,
    WORKSPACES,
    Peak,
)
from optimzoo.registry import create_optimizer
from optimzoo.roles import param_groups

# What a user changes, smallest change first.
CHANGES = ((False, False), (False, True), (True, False), (True, True))  # checkpointing, release
MOST = 1024  # the largest micro-batch that is tried


@dataclass(frozen=True)
class Method:
    """Memory of a method on one model: what it holds, and what its step needs beside that.

    Attributes:
        name: its name in the registry.
        account: parameters, gradients and state.
        temporaries: temporary bytes of a step of all parameters.
        alone: most temporary bytes of a step of one parameter, as release takes it.
    """

    name: str
    account: Account
    temporaries: int
    alone: int


@dataclass(frozen=True)
class Fit:
    """Setting that fits: its peak and the largest micro-batch, on each of ``shards`` GPUs."""

    method: str
    checkpointing: bool
    release: bool
    batch: int
    peak: Peak
    shards: int = 1

    @property
    def setting(self) -> tuple[bool, bool]:
        """Return ``(checkpointing, release)``."""
        return self.checkpointing, self.release


class Planner:
    """Planner of peaks for one model; what does not depend on the method is simulated once."""

    def __init__(
        self,
        model: nn.Module,
        *,
        dtype: torch.dtype | None = None,
        seq: int = 256,
        step: Step | None = None,
        device: str = "cpu",
        shards: int = 1,
    ) -> None:
        self.model, self.dtype, self.seq, self.step, self.device = model, dtype, seq, step, device
        self.shards = shards
        self._passes: dict[tuple[int, bool, bool], Peak] = {}

    def method(self, name: str, **hyper: Any) -> Method:
        """Account for a method, and simulate its step.

        Raises:
            ValueError: the method refuses the model, its dtype or a hyperparameter.
        """
        counted = account(self.model, name, dtype=self.dtype, shards=self.shards, **hyper)
        one, two = (self._step_of(name, hyper, copies) for copies in (1, 2))
        # A step that needs no more for twice as many weights takes them one after the other; but
        # shards may be dealt out whole among the processes.
        apply_with_rounding = two == one and self.shards == 1
        whole = one if apply_with_rounding else self._step_of(name, hyper, None)
        return Method(name, counted, whole, one)

    def peak(
        self, method: Method, batch: int, *, checkpointing: bool = False, release: bool = False
    ) -> Peak:
        """Return the peak of a training step; with ``release`` an upper bound of it."""
        counted = method.account
        passes = self.passes(batch, checkpointing, release).plus(STATE, counted.state_total)
        if release:
            return passes.plus(TEMPORARIES, method.alone)
        parts = {PARAMETERS: counted.params, GRADIENTS: counted.grads, STATE: counted.state_total}
        parts |= {TEMPORARIES: method.temporaries, OTHER: self._buffers}
        parts |= {WORKSPACES: passes.by_category.get(WORKSPACES, 0)}
        step = Peak(sum(parts.values()), STEP, {k: v for k, v in parts.items() if v})
        return max(passes, step, key=lambda peak: peak.bytes)

    def fits(
        self,
        method: Method,
        limit: int,
        *,
        batch: int | None = None,
        checkpointing: bool = False,
        release: bool = False,
    ) -> Iterator[Fit]:
        """Yield for each setting the largest micro-batch that fits in ``limit`` bytes.

        The micro-batch is a power of two, or ``batch`` where it is given. A setting has those of
        ``checkpointing`` and ``release`` that are true, and may add the other, checkpointing if the
        model has blocks. The smallest change comes first; a setting that does not allow more than a
        smaller change is left out.
        """
        best = 0
        sizes = [2**power for power in range(MOST.bit_length())] if batch is None else [batch]
        for setting in CHANGES:
            if setting[0] < checkpointing or setting[1] < release:
                continue
            if setting[0] > checkpointing and not blocks_of(self.model):
                continue
            waiting = 0 if setting[1] else method.account.grads
            if method.account.params + method.account.state_total + waiting > limit:
                continue  # whatever the passes take
            peak = partial(self.peak, method, checkpointing=setting[0], release=setting[1])

            def bytes_of(size: int, peak: Callable[[int], Peak] = peak) -> int:
                return peak(size).bytes

            larger = [size for size in sizes if size > best]
            fitting = bisect_right(larger, limit, key=bytes_of)
            if fitting:
                best = larger[fitting - 1]
                yield Fit(method.name, *setting, best, peak(best), self.shards)

    def passes(self, batch: int, checkpointing: bool, release: bool) -> Peak:
        """Return the peak of forward and backward without any state, simulated once."""
        key = (batch, checkpointing, release)
        if key not in self._passes:
            more: dict[str, Any] = {"checkpointing": checkpointing, "shards": self.shards}
            session = Session(self.model, self.dtype, self.device, **more)
            with session:
                if release:
                    session.tracker.bracket(session.model.parameters(), lambda: _drop(session))
                peak = session.run_model(self.step or language_model_step(batch, self.seq))
            self._passes[key] = session.on_device(peak)
        return self._passes[key]

    @cached_property
    def _buffers(self) -> int:
        return sum(b.numel() * b.element_size() for b in self.model.buffers())

    def _step_of(self, name: str, hyper: dict[str, Any], copies: int | None) -> int:
        """Return a step's temporary bytes with ``copies`` parameters of each kind (None: all)."""
        session = Session(nn.Module(), None, self.device, shards=self.shards)
        with session:
            groups = param_groups(self.model)
            for group in groups:
                group["params"] = self._shapes(group["params"], copies, session.mesh)
                del group["param_names"]
            optimizer = create_optimizer(name, groups, **hyper)
            steps = session.run_steps(optimizer)
        return max(peak.by_category.get(TEMPORARIES, 0) for peak in steps.values())

    def _shapes(self, params: list[Tensor], copies: int | None, mesh: Any) -> list[Tensor]:
        seen: dict[Any, int] = {}
        shapes: list[Tensor] = []
        for p in params:
            layout = (p.shape, p.stride(), p.dtype)
            seen[layout] = seen.get(layout, 0) + 1
            if copies is None or seen[layout] <= copies:
                dtype = self.dtype if p.is_floating_point() and self.dtype else p.dtype
                if mesh is not None:
                    shapes.append(shard_of(p, dtype, mesh))
                    continue
                shape = nn.Parameter(torch.empty_like(p, dtype=dtype, device="cpu"))
                shape.grad = torch.empty_like(shape)
                shapes.append(shape)
        return shapes


def _drop(session: Session) -> None:
    def drop(parameter: Tensor) -> None:
        parameter.grad = None

    for p in session.model.parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(drop)
