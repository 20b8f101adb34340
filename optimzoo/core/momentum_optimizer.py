"""Base of Muon and RMNP: a direction made of each matrix's momentum, and AdamW on the rest."""

import math
from typing import Any, Unpack

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from optimzoo.core.matrix_optimizer import MatrixOptimizer, as_matrix
from optimzoo.core.optimizer import copy_group
from optimzoo.core.role_options import SharedOptions, with_role_options
from optimzoo.core.rule import averaged
from optimzoo.core.validation import check_betas, check_choice, check_nonnegative
from optimzoo.lowbit import moment_dtype
from optimzoo.roles import ROLES, role_of
from optimzoo.stacks import State

# What torch multiplies a matrix's learning rate by, of its rows and columns.
ADJUSTMENTS = {
    "original": lambda rows, cols: math.sqrt(max(1.0, rows / cols)),
    "match_rms_adamw": lambda rows, cols: 0.2 * math.sqrt(max(rows, cols)),
    "spectral_unclamped": lambda rows, cols: math.sqrt(rows / cols),
}


class MomentumOptions(SharedOptions, total=False):
    """Options of Muon and RMNP beside their own.

    The rest has ``torch.optim.AdamW``'s rule, eps after the bias correction, with the defaults of
    Muon's repository: `other_lr` 3e-4 (RMNP: 1e-3), `other_betas` (0.9, 0.95), `other_eps` 1e-10,
    `other_weight_decay` 0. `state_bits` and `rounding` are those of the momentum too.

    Attributes:
        roles: the roles whose matrices take the method's own rule; default: `hidden` alone.
    """

    roles: tuple[str, ...]


ADAMW: MomentumOptions = {
    "other_lr": 3e-4,
    "other_betas": (0.9, 0.95),
    "other_eps": 1e-10,
    "other_weight_decay": 0.0,
}


class MomentumOptimizer(MatrixOptimizer):
    """Base of methods with momentum on matrices: a subclass makes a direction of `momentum_of`.

    Groups hold `momentum`, `nesterov`, `adjust_lr_fn` and `heads`. A weight of `roles` that is no
    matrix in truth takes the rule of the rest; its group is split for it.
    """

    _options = MomentumOptions
    counts_steps = False
    _eps_before = False

    def __init__(
        self, params: ParamsT, defaults: dict[str, Any], **options: Unpack[MomentumOptions]
    ) -> None:
        settings = {key: value for key, value in options.items() if value is not None}
        others: dict[str, Any] = {**ADAMW, **settings}
        roles = tuple(others.pop("roles", ("hidden",)))
        betas, eps = others.pop("other_betas"), others.pop("other_eps")
        check_betas(betas)
        check_nonnegative(other_eps=eps)
        unknown = set(roles) - set(ROLES)
        if unknown:
            raise ValueError(f"unknown role {unknown.pop()!r}; the roles are {', '.join(ROLES)}")
        self._matrix_roles = roles  # type: ignore[misc]
        # In the groups alone: among the defaults, schedulers would cycle betas, not the momentum.
        self._adam = {"betas": betas, "eps": eps}
        super().__init__(params, {"heads": 1, **defaults}, **others)

    def __getstate__(self) -> dict[str, Any]:
        attributes = {key: getattr(self, key) for key in ("_matrix_roles", "_adam")}
        return {**super().__getstate__(), **attributes}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as one for each rule and, of bare parameters, for each role."""
        group = copy_group(param_group)
        params = group["params"]
        if isinstance(params, set):  # torch has the error for this
            Optimizer.add_param_group(self, group)
        group["params"] = params = [params] if hasattr(params, "ndim") else list(params)
        self._check_group(group)
        if group.get("role") is None:  # split by shape: none becomes an embedding or a head
            rates = {
                k: v for k, v in self._role_options.items() if k in ("embedding_lr", "head_lr")
            }
            with_role_options(group, rates, ())
        names = group.pop("param_names", None)
        parts: dict[tuple[str, bool], list[int]] = {}
        for i, item in enumerate(params):
            p = item[1] if isinstance(item, tuple) else item
            role = role_of(p, group) if hasattr(p, "ndim") else "vector"
            has_matrix_rule = role in self._matrix_roles and is_matrix(p, group)
            parts.setdefault((role, has_matrix_rule), []).append(i)
            if has_matrix_rule:
                _check_heads(p, {**self.defaults, **group})
        parts = parts or {(group.get("role") or "vector", False): []}
        before = len(self.param_groups)
        try:
            for (role, has_matrix_rule), places in parts.items():
                part = {**self._adam, **group, "role": role}
                part = with_role_options(
                    part, self._role_options, [role] if has_matrix_rule else []
                )
                part["params"] = [params[i] for i in places]
                if names is not None:
                    part["param_names"] = [names[i] for i in places]
                super().add_param_group(part)
        except Exception:
            del self.param_groups[before:]  # a refused group leaves the optimizer as it was
            raise

    def _check_options(self, options: dict[str, Any]) -> None:
        if not 0.0 <= options["momentum"] < 1.0:
            raise ValueError(f"Invalid momentum value: {options['momentum']}; it must be in [0, 1)")
        if options["adjust_lr_fn"] is not None:
            check_choice("adjust_lr_fn", options["adjust_lr_fn"], ADJUSTMENTS)

    def _is_own(self, p: Tensor, group: dict[str, Any]) -> bool:
        return super()._is_own(p, group) and is_matrix(p, group)

    def init_state(self, p: Tensor, state: State, group: dict[str, Any]) -> None:
        """Create the momentum."""
        if "momentum_buffer" not in state and "momentum_buffer_codes" not in state:
            state["momentum_buffer"] = torch.zeros_like(p, dtype=moment_dtype(p, group))


def momentum_of(grad: Tensor, state: State, group: dict[str, Any]) -> Tensor:
    """Take the gradient into the momentum; return it, or Nesterov's, as a matrix."""
    mean, beta = state["momentum_buffer"], group["momentum"]
    return averaged(grad, mean, beta, group, nesterov=group["nesterov"])


def adjustment(shape: torch.Size, group: dict[str, Any]) -> float:
    """Return what multiplies the learning rate of a whole matrix."""
    adjust = ADJUSTMENTS[group["adjust_lr_fn"] or "original"]
    return adjust(shape[-2] / group["heads"], shape[-1])


def is_matrix(p: Tensor, group: dict[str, Any]) -> bool:
    """Return whether a parameter has rows and columns, and each row has several inputs."""
    if p.ndim > 2 and not group.get("stacked"):
        return p.shape[0] > 1 and p.shape[1] > 1
    return p.ndim > 1 and min(p.shape[-2:]) > 1


def _check_heads(p: Tensor, options: dict[str, Any]) -> None:
    heads = options["heads"]
    if heads != 1:
        rows = as_matrix(p.detach(), options).shape[-2]
        if not isinstance(heads, int) or heads < 1 or rows % heads:
            raise ValueError(
                f"Invalid heads: {heads}; it must divide the {rows} rows of {list(p.shape)}"
            )
