"""torch's own optimizers, with stochastic rounding of weights of 16 bits."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, ParamsT

from optimzoo.core.optimizer import RoleOptimizer
from optimzoo.core.validation import check_rounding
from optimzoo.distributed import local_part
from optimzoo.lowbit import LOW, copy_, next_rng_key
from optimzoo.roles import ROLES


class Rounded(RoleOptimizer):
    """An optimizer of torch's that steps a float32 stand-in of one weight after the other.

    So its state is in float32, and its result is rounded into the weight. Schedulers, checkpoints
    and hooks see this optimizer; the inner one has a group and a state for the time of a step.

    Args:
        params: groups or parameters.
        make: the class.
        hyper: its hyperparameters.
        rounding: `stochastic`.
        seed: of stochastic rounding.

    Raises:
        ValueError: an unknown rounding; whatever the inner optimizer refuses.
    """

    _matrix_roles = ROLES

    def __init__(
        self,
        params: ParamsT,
        make: type[Optimizer],
        hyper: Mapping[str, Any],
        *,
        rounding: str,
        seed: int = 0,
    ) -> None:
        options = {"rounding": rounding, "seed": seed}
        check_rounding(options)
        self._make, self._hyper = make, dict(hyper)
        self._inner = self._new_inner()
        super().__init__(params, {"differentiable": False, **self._inner.defaults, **options})

    def _new_inner(self) -> Optimizer:
        return self._make([torch.zeros(1)], **self._hyper)

    def _update(self) -> None:
        params = [(group, p) for group in self.param_groups for p in group["params"]]
        for index, (group, p) in enumerate(params, start=self.first_index):
            if p.grad is not None:
                self._step_one(p, group, index)

    def _step_one(self, p: Tensor, group: dict[str, Any], index: int) -> None:
        inner, state = self._inner, self.state[p]
        weight = nn.Parameter(p.detach().float() if p.dtype in LOW else p.detach())
        weight.grad = p.grad.to(weight.dtype)  # type: ignore[union-attr]
        inner.param_groups = [{**group, "params": [weight]}]
        inner.state = defaultdict(dict, {weight: state})
        try:
            inner.step()
        finally:
            inner.param_groups, inner.state = [], defaultdict(dict)
        if p.dtype in LOW:
            # Counted now: to torch, a state that is empty is a first step.
            rng_key = next_rng_key(state, seed=group["seed"], index=index)
            copy_(local_part(p), local_part(weight), **rng_key._asdict())

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_make": self._make, "_hyper": self._hyper}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_inner" not in self.__dict__:  # a copy
            self._inner = self._new_inner()
        self._inner.__setstate__({"state": self.state, "param_groups": self.param_groups})
        self._inner.param_groups, self._inner.state = [], defaultdict(dict)
