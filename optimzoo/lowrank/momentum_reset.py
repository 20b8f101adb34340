"""Momentum reset (arXiv 2505.22922): an optimizer's moments set to zero every so many steps."""

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from optimzoo.lowrank.clock import Clock

# Running averages of gradients and of their squares, under the names of torch.optim and this zoo.
_MOMENTS = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer", "grad_avg"}
# RMSprop to Adafactor
_MOMENTS |= {"square_avg", "acc_delta", "sum", "row_var", "col_var", "variance"}
_MOMENTS |= {"max_avg", "norm_avg", "norm_avg_sq", "history", "history_scale", "gram"}
# Counts that correct the bias of the moments, and the value that they start at.
_COUNTS = {"step": 0, "moment_step": 0, "mu_product": 1}
_MOMENTS |= {"momentum_left"}  # of two factors; the other is what the next step starts from
# Not momentum: subspaces, masks, the growth limiter, the norms of a gradient stabilizer.
_KEPT = {
    "momentum_right",
    "projector_left",
    "projector_right",
    "projector_seed",
    "update_norm",
    "mask",
}
_KEPT |= {"singular_vector", "grad_norm_avg", "grad_norm_avg_sq", "grad_norm_step"}
_EIGHT_BITS = ("exp_avg", "exp_avg_sq", "momentum_buffer")
_MOMENTS |= {f"{name}_codes" for name in _EIGHT_BITS}  # 0 is the code of 0, whatever the scale
_KEPT |= {f"{name}_scale" for name in _EIGHT_BITS} | {"rounding_step"}


class MomentumReset(Clock):
    """Reset the moments of any torch optimizer, in place, every ``every`` steps.

    Call ``step()`` after ``optimizer.step()``; or once and for all
    ``optimizer.register_step_post_hook(lambda *_: reset.step())``, which a captured CUDA graph
    does not replay. State tensors are zeroed where they are, none is replaced: schedulers, hooks,
    compiled and captured steps go on. In a loop::

        reset = MomentumReset(optimizer, every=200)
        for batch in batches:
            ...
            optimizer.step(); reset.step(); scheduler.step()

    Args:
        optimizer: any whose state holds moments under the names of ``torch.optim`` (``exp_avg``,
            ``exp_avg_sq``, ``momentum_buffer``, ``square_avg``, ...).
        every: steps between two resets; the paper's best is 200.
        what: ``"all"``: moments and step counts, as the authors' code, which builds the optimizer
            anew; ``"moments"``: the moments alone. Step counts that go on no longer correct the
            bias of the moments, and Adam's next update is (1 - β₁) / √(1 - β₂) times as long
            (3.2 at the default betas). Or a collection of state names: these and no others.
        params: reset the state of these alone; default: of every parameter, as the authors' code.
        fraction: share of each moment's entries that is zeroed, drawn at random; ReLoRA's code:
            0.999. Step counts are reset whole.
        seed: seed of that draw; the same at every rank, so that replicas stay equal.

    Raises:
        ValueError: an option out of range, or a parameter that the optimizer does not have.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        every: int = 200,
        what: str | Collection[str] = "all",
        params: Iterable[Tensor] | None = None,
        *,
        fraction: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__(every)
        if isinstance(what, str) and what not in ("all", "moments"):
            raise ValueError(f"what is {what!r}; it is 'all', 'moments' or a list of state names")
        if not 0 < fraction <= 1:
            raise ValueError(f"fraction is {fraction}; it must be in (0, 1]")
        self.optimizer, self.what = optimizer, what
        self.fraction, self.seed = fraction, seed
        self.params = None if params is None else list(params)
        param_ids = {id(p) for p in self._all_params()}
        for p in self.params or []:
            if id(p) not in param_ids:
                raise ValueError(f"a parameter of shape {tuple(p.shape)} is not in the optimizer")

    def check(self) -> None:
        """Check that the optimizer's state has the names to reset, as soon as it has a state.

        Raises:
            ValueError: it does not have a name of ``what``; or, without ``what``, it has unknown
                names (then name those to reset), no moments, or AdamS's ramp in its step count.
        """
        self._names(self._states())

    def fire(self) -> None:
        """Reset the selected moments now, whatever the schedule; nothing before the first step.

        Raises:
            ValueError: as :meth:`check`; nothing is changed then.
        """
        states = self._states()
        names = self._names(states)
        generators: dict[torch.device, torch.Generator] = {}
        for state in states:
            for name in sorted(names & state.keys()):  # a set has no order to draw in
                if name in _COUNTS or self.fraction == 1:
                    state[name] = _restarted(state[name], _COUNTS.get(name, 0))
                elif isinstance(state[name], Tensor):
                    self._prune(state[name], generators)

    def _all_params(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _states(self) -> list[dict[str, Any]]:
        params = self._all_params() if self.params is None else self.params
        return [self.optimizer.state[p] for p in params if p in self.optimizer.state]

    def _names(self, states: list[dict[str, Any]]) -> set[str]:
        state_names = dict.fromkeys(name for state in states for name in state)
        if not state_names:
            return set()
        method = type(self.optimizer).__name__
        if not isinstance(self.what, str):
            missing = sorted(set(self.what) - set(state_names))
            if missing:
                raise ValueError(
                    f"{method} has no state {missing[0]!r}; it has {', '.join(state_names)}"
                )
            return set(self.what)
        unknown = [name for name in state_names if name not in _MOMENTS | set(_COUNTS) | _KEPT]
        if unknown or not _MOMENTS & set(state_names):
            raise ValueError(
                f"{method} has the state {', '.join(state_names)}, in which "
                f"{', '.join(unknown) or 'no moment'} is not recognised; name what to reset: "
                "what=['NAME', ...]"
            )
        if self.what == "all" and "mask" in state_names:
            raise ValueError(
                f"{method} counts its moments and its ramp in one, and the ramp would begin anew; "
                "take MomentumReset(what='moments')"
            )
        return (_MOMENTS | set(_COUNTS)) if self.what == "all" else _MOMENTS

    def _prune(self, tensor: Tensor, generators: dict[torch.device, torch.Generator]) -> None:
        device = tensor.device
        if device not in generators:
            # Seeded by the step, not by what was drawn before: a resumed run draws the same.
            generators[device] = torch.Generator(device).manual_seed(self.seed + self.steps)
        draw = torch.rand(tensor.shape, generator=generators[device], device=device)
        tensor.masked_fill_(draw < self.fraction, 0)


def _restarted(value: Any, start: int) -> Any:
    """Return the state's starting value: a tensor is filled in place, a number replaced."""
    if isinstance(value, Tensor):
        return value.fill_(start)
    return start if isinstance(value, int | float) else value
