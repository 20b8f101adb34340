"""One optimizer made of several: each parameter group goes to the torch optimizer of its role."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, ParamsT

from optimzoo.core.optimizer import RoleOptimizer, check_rounding, copy_group
from optimzoo.distributed import local_part
from optimzoo.lowbit import LOW, copy_, next_counter
from optimzoo.roles import role_of

Rule = tuple[type[Optimizer], Mapping[str, Any]]


class ByRole(RoleOptimizer):
    """Existing optimizers behind one ``param_groups``, one ``state`` and one ``state_dict``.

    Schedulers, checkpoints and hooks see a single optimizer; the inner ones share its group dicts
    and its state, and step one after the other. Bare parameters are split by shape.

    Args:
        params: groups from :func:`optimzoo.param_groups`, or parameters.
        rules: for each role its optimizer class and that class's hyperparameters.
        rounding: of weights of 16 bits: `nearest`, as the inner optimizers have it, or
            `stochastic`: each steps a float32 stand-in of one weight after the other, so that its
            state is in float32, and the result is rounded into the weight. float16 weights are
            stepped so to nearest too: torch's rules divide by the zeros that their squares become.
        seed: of stochastic rounding.

    Raises:
        ValueError: a role without a rule; whatever the inner optimizer refuses.
    """

    def __init__(
        self,
        params: ParamsT,
        rules: Mapping[str, Rule],
        *,
        rounding: str = "nearest",
        seed: int = 0,
    ) -> None:
        self._rules = dict(rules)
        self._stochastic = rounding == "stochastic"
        self._inner: dict[type[Optimizer], Optimizer] = {}
        # torch adds this default on a load; there from the start, a load leaves the groups alike.
        defaults = {"differentiable": False, "rounding": rounding, "seed": seed}
        check_rounding(defaults)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group and hand it to the optimizer of its role."""
        group = copy_group(param_group)
        if group.get("role") is None and not isinstance(group["params"], set):
            params = group["params"] = _as_list(group["params"])
            self._check_group(group)
            by_shape: dict[str, list[Any]] = {}
            for item in params:
                tensor = item[1] if isinstance(item, tuple) else item
                role = role_of(tensor, {}) if hasattr(tensor, "ndim") else "hidden"
                by_shape.setdefault(role, []).append(item)
            for role, part in by_shape.items() or [("vector", [])]:
                self.add_param_group({**group, "params": part, "role": role})
            return
        if group.get("role") in self._rules:
            cls, hyper = self._rules[group["role"]]
            group = {**hyper, **group}
        super().add_param_group(group)
        group = self.param_groups[-1]
        try:
            if group["role"] not in self._rules:
                raise ValueError(
                    f"{type(self).__name__} has no rule for the role {group['role']!r}"
                )
            self._adopt(cls, group)
        except Exception:
            self.param_groups.pop()  # a refused group leaves the optimizer as it was
            raise

    def _adopt(self, cls: type[Optimizer], group: dict[str, Any]) -> None:
        """Let the inner optimizer of class ``cls`` train ``group``: the same dict, not a copy."""
        # Made for every group: torch's Muon looks at the shapes when it is made, and only then.
        alone = cls([group])  # type: ignore[call-arg]
        if cls in self._inner:
            self._inner[cls].add_param_group(group)
        else:
            self._inner[cls] = alone
            self._inner[cls].state = self.state

    def _update(self) -> None:
        places = (p for group in self.param_groups for p in group["params"])
        indices = {p: i for i, p in enumerate(places, start=self.first_index)}
        for cls, inner in self._inner.items():
            # Ours are what is stepped: of a likeness that `optimzoo.release` makes, some of them.
            inner.param_groups = [g for g in self.param_groups if self._rules[g["role"]][0] is cls]
            if any(self._keeps_state_dtype(p) for g in inner.param_groups for p in g["params"]):
                self._step_one_by_one(inner, indices)
            elif inner.param_groups:
                inner.step()

    def _keeps_state_dtype(self, param: Tensor) -> bool:
        """Whether it is stepped by a float32 stand-in.

        Else torch's rules compute in the weight's dtype: they need a loaded state cast.
        """
        return self._stochastic or param.dtype == torch.float16

    def _step_one_by_one(self, inner: Optimizer, indices: dict[Tensor, int]) -> None:
        groups = inner.param_groups
        try:
            for group in groups:
                for p in group["params"]:
                    if p.grad is None:
                        continue
                    if not self._keeps_state_dtype(p):
                        inner.param_groups, inner.state = [{**group, "params": [p]}], self.state
                        inner.step()
                        continue
                    rounded, state = p.dtype in LOW, self.state[p]
                    weight = nn.Parameter(p.detach().float() if rounded else p.detach())
                    weight.grad = p.grad.to(weight.dtype)
                    inner.param_groups = [{**group, "params": [weight]}]
                    inner.state = defaultdict(dict, {weight: state})
                    inner.step()
                    if rounded and self._stochastic:
                        # Counted now: to torch, a state that is empty is a first step.
                        counter = next_counter(state, seed=group["seed"], index=indices[p])
                        copy_(local_part(p), local_part(weight), **counter._asdict())
                    elif rounded:
                        local_part(p).copy_(local_part(weight))
        finally:
            inner.param_groups, inner.state = groups, self.state

    def __getstate__(self) -> dict[str, Any]:
        own = {"_rules": self._rules, "_stochastic": self._stochastic}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # A load (and a copy) brings new groups and a new state dict: link the inner ones to them.
        self._inner = {}
        for group in self.param_groups:
            cls, hyper = self._rules[group["role"]]
            for name, default in hyper.items():
                group.setdefault(name, default)
            self._adopt(cls, group)
        for inner in self._inner.values():
            inner.__setstate__({"state": self.state, "param_groups": inner.param_groups})


def _as_list(params: Any) -> list[Any]:
    return [params] if hasattr(params, "ndim") else list(params)
