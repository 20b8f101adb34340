"""Exact bytes of parameters, gradients and optimizer state, without allocating any of them."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from optimzoo.registry import create_optimizer
from optimzoo.roles import param_groups, role_of


@dataclass
class Account:
    """Bytes of one training setup: `params`, `grads`, and `state` by (role, state tensor)."""

    params: int = 0
    grads: int = 0
    state: Counter[tuple[str, str]] = field(default_factory=Counter)

    @property
    def state_total(self) -> int:
        """Bytes of the optimizer's state."""
        return sum(self.state.values())


def account(
    model: nn.Module,
    optimizer: str | Callable[[list[dict[str, Any]]], Optimizer],
    *,
    dtype: torch.dtype | None = None,
    **hyper: Any,
) -> Account:
    """Count the bytes that training ``model`` with ``optimizer`` holds between two steps.

    The state is the one that the optimizer makes: it takes one step on meta tensors of the model's
    shapes. Nothing is allocated, and the model itself, which may be on ``meta``, is not touched.

    Args:
        model: any module.
        optimizer: a name of the registry, or a function from parameter groups to an optimizer.
        dtype: parameters and gradients in this dtype; default: as the model has them.
        **hyper: hyperparameters, where ``optimizer`` is a name.
    """
    groups = param_groups(model)
    for group in groups:
        group["params"] = [_on_meta(p, dtype) for p in group["params"]]
    if isinstance(optimizer, str):
        made = create_optimizer(optimizer, groups, **hyper)
    else:
        made = optimizer(groups)
    made.step()
    frozen = [p for p in model.parameters() if not p.requires_grad]
    result = Account(params=sum(p.numel() * (dtype or p.dtype).itemsize for p in frozen))
    for group in made.param_groups:
        for p in group["params"]:
            result.params += p.numel() * p.element_size()
            result.grads += p.numel() * p.element_size()
            for name, value in made.state.get(p, {}).items():
                if isinstance(value, Tensor):
                    bytes_ = value.numel() * value.element_size()
                    result.state[role_of(p, group), name] += bytes_
    return result


def _on_meta(param: nn.Parameter, dtype: torch.dtype | None) -> nn.Parameter:
    shadow = nn.Parameter(torch.empty_like(param, device="meta", dtype=dtype))
    shadow.grad = torch.empty_like(shadow)
    return shadow
