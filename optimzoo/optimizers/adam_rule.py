"""The Adam rule that the methods of the zoo use beside their own.

It is Adam as the memory-efficient papers' code has it, with eps added *before* the second moment's
bias correction; ``torch.optim.Adam`` adds it after. For whole models with plain Adam use torch's.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import _get_scalar_dtype


def init_adam_state(
    state: dict[str, Any], param: Tensor, *, capturable: bool, dtype: torch.dtype | None = None
) -> None:
    """Make ``step``, ``exp_avg``, ``exp_avg_sq`` (zeros, like ``param``) where they are missing."""
    if "step" not in state:
        device = param.device if capturable else "cpu"
        state["step"] = torch.zeros((), dtype=_get_scalar_dtype(), device=device)
        state["exp_avg"] = torch.zeros_like(param, dtype=dtype)
        state["exp_avg_sq"] = torch.zeros_like(param, dtype=dtype)


def adam(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    maximize: bool,
    foreach: bool,
    capturable: bool,
) -> None:
    """One step of Adam with decoupled weight decay, in place.

    With step count ``t`` from 1 and everything element-wise::

        m ← β₁ m + (1 − β₁) g
        v ← β₂ v + (1 − β₂) g²
        p ← (1 − lr·wd) p − lr · √(1 − β₂ᵗ) / (1 − β₁ᵗ) · m / (√v + eps)
    """
    if not params:
        return
    rule = _multi_tensor_adam if foreach else _single_tensor_adam
    grads = [g.to(m.dtype) for g, m in zip(grads, exp_avgs, strict=True)]
    if maximize:
        grads = [-g for g in grads]
    rule(params, grads, exp_avgs, exp_avg_sqs, steps, lr, betas, eps, weight_decay, capturable)


def _step_size(
    step: Tensor, lr: float | Tensor, betas: tuple[float, float], capturable: bool
) -> float | Tensor:
    if capturable:
        return lr * (1 - betas[1] ** step).sqrt() / (1 - betas[0] ** step)
    t = step.item()
    return lr * (math.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t))


def _single_tensor_adam(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    capturable: bool,
) -> None:
    beta1, beta2 = betas
    for p, g, m, v, step in zip(params, grads, exp_avgs, exp_avg_sqs, steps, strict=True):
        step += 1
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        if weight_decay != 0:
            p.mul_(1 - lr * weight_decay)
        p.sub_(m / (v.sqrt() + eps) * _step_size(step, lr, betas, capturable))


def _multi_tensor_adam(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    capturable: bool,
) -> None:
    beta1, beta2 = betas
    torch._foreach_add_(steps, 1)
    torch._foreach_lerp_(exp_avgs, grads, 1 - beta1)
    torch._foreach_mul_(exp_avg_sqs, beta2)
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, value=1 - beta2)
    if weight_decay != 0:
        torch._foreach_mul_(params, 1 - lr * weight_decay)
    update = torch._foreach_sqrt(exp_avg_sqs)
    torch._foreach_add_(update, eps)
    torch._foreach_reciprocal_(update)
    torch._foreach_mul_(update, exp_avgs)
    sizes = [_step_size(step, lr, betas, capturable) for step in steps]
    torch._foreach_mul_(update, sizes)
    torch._foreach_sub_(params, update)
