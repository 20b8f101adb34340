"""The Adam rule that the methods of the zoo use beside their own.

It is Adam as the memory-efficient papers' code has it, with eps added *before* the second moment's
bias correction; ``torch.optim.Adam`` adds it after. For whole models with plain Adam use torch's.
"""

import math
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import _default_to_fused_or_foreach, _get_scalar_dtype

from optimzoo.core.update import decaying
from optimzoo.distributed import local_part
from optimzoo.kernels import dispatch
from optimzoo.kernels.native import Rate
from optimzoo.lowbit import LOW, RngKey, apply_with_rounding, widened

_ONE = torch.ones((), device="cpu")


def init_adam_state(
    state: dict[str, Any], param: Tensor, *, capturable: bool, dtype: torch.dtype | None = None
) -> None:
    """Make ``step``, ``exp_avg``, ``exp_avg_sq`` (zeros, like ``param``) where they are missing."""
    if "step" not in state:
        state["step"] = 0
        state["exp_avg"] = torch.zeros_like(param, dtype=dtype)
        state["exp_avg_sq"] = torch.zeros_like(param, dtype=dtype)
    step_as_tensor(state, param, capturable=capturable)


def step_as_tensor(
    state: MutableMapping[str, Any], param: Tensor, *, capturable: bool, key: str = "step"
) -> None:
    """Turn a count that is a number into a tensor, on the CPU unless ``capturable``."""
    count, device = state.get(key), param.device if capturable else torch.device("cpu")
    if isinstance(count, int | float):
        state[key] = torch.tensor(count, dtype=_get_scalar_dtype(), device=device)
    elif capturable and count is not None:  # a load may have brought it to another
        state[key] = count.to(device)


def count_up(steps: list[Tensor]) -> None:
    """Add one to step counts; those of the CPU by the overload that does not wrap it for each."""
    if all(step.is_cpu and step.is_floating_point() for step in steps):
        torch._foreach_add_(steps, _ONE, alpha=1.0)
    else:
        torch._foreach_add_(steps, 1)


def read_counts(steps: Sequence[Tensor]) -> list[float]:
    """Return step counts as numbers: one read for all, as each would wait for its device."""
    if len({step.device for step in steps}) > 1:
        steps = [step.cpu() for step in steps]
    counts: list[float] = torch.stack(list(steps)).tolist() if steps else []
    return counts


def bias_correction(step: float | Tensor, betas: tuple[float, float]) -> Any:
    """Return ``√(1 − β₂ᵗ) / (1 − β₁ᵗ)``, for a number or on the device of a tensor of counts."""
    if isinstance(step, Tensor):
        return (1 - betas[1] ** step).sqrt() / (1 - betas[0] ** step)
    return math.sqrt(1 - betas[1] ** step) / (1 - betas[0] ** step)


def max_direction(step: int | Tensor, betas: tuple[float, float]) -> Any:
    r"""Return the largest ``|m| / √v`` that ``step`` gradients can give, whatever they are.

    With ``m = Σ (1 − β₁) β₁ⁱ gᵢ`` and ``v = Σ (1 − β₂) β₂ⁱ gᵢ²`` over the ages ``i < t``,
    Cauchy–Schwarz gives::

        |m| / √v  ≤  (1 − β₁) / √(1 − β₂) · √(1 + ρ + … + ρᵗ⁻¹),    ρ = β₁² / β₂

    and gradients that grow by ``β₂ / β₁`` a step attain it. Times :func:`bias_correction`, at betas
    of 0.9 and 0.999, it is 1 at the first step, 1.8 after 60, and 7.3 in the end.

    Moments of 8 bits break it: two codes are rounded apart, and where that of ``v`` becomes 0 the
    update is whatever ``m`` is, over eps. No codes on a grid can be unbiased and keep to it: below
    the grid's first value ``V`` the mean of ``√v`` is ``v / √V``, less than ``|m|`` needs. So the
    codes stay unbiased, and the update is clamped to what exact moments could have made of it.
    """
    beta1, beta2 = betas
    if beta2 == 0.0:
        return math.inf if beta1 > 0 else 1.0
    ratio = beta1 * beta1 / beta2
    if isinstance(step, Tensor):
        terms = step if ratio == 1.0 else (1.0 - ratio**step) / (1.0 - ratio)
        return (1.0 - beta1) * (terms / (1.0 - beta2)).sqrt()
    if ratio == 1.0:
        total = float(step)
    elif step * math.log(max(ratio, 1e-300)) > 700.0:
        return math.inf
    else:
        total = (1.0 - ratio**step) / (1.0 - ratio)
    return (1.0 - beta1) * math.sqrt(total / (1.0 - beta2))


def adam_step(params: list[Tensor], states: Mapping[Tensor, dict[str, Any]], **rule: Any) -> None:
    """Step parameters that have a gradient by :func:`adam`; ``states`` has their Adam state.

    Of sharded ones on what this process has.
    """
    state_lists = [
        [local_part(states[p][k]) for p in params] for k in ("exp_avg", "exp_avg_sq", "step")
    ]
    grads = [local_part(p.grad, like=p) for p in params if p.grad is not None]
    adam([local_part(p) for p in params], grads, *state_lists, **rule)


def adam(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    *,
    lr: Rate | list[Rate],
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    maximize: bool,
    foreach: bool | None,
    capturable: bool,
    differentiable: bool = False,
    rng_keys: Sequence[RngKey | None] | None = None,
    max_update: float | Tensor | None = None,
    eps_before: bool = True,
) -> None:
    """Take one step of Adam with decoupled weight decay, in place.

    With step count ``t`` from 1 and everything element-wise::

        m ← β₁ m + (1 − β₁) g
        v ← β₂ v + (1 − β₂) g²
        p ← (1 − lr·wd) p − lr · √(1 − β₂ᵗ) / (1 − β₁ᵗ) · m / (√v + eps)

    Computed in float32 where parameters or moments have 16 bits. Parameters of 16 bits that have a
    key are rounded stochastically. What `lr` multiplies, but for the decay, is clamped to
    ``[-max_update, max_update]``. Without `eps_before`, ``eps`` is added after the bias correction,
    as in ``torch.optim.AdamW``: it is ``eps · √(1 − β₂ᵗ)`` above. ``lr`` may be a list with one for
    each parameter. A negative ``weight_decay`` is cautious.
    """
    if not params:
        return
    rng_keys = rng_keys or [None] * len(params)
    lrs = lr if isinstance(lr, list) else [lr] * len(params)
    on_device = isinstance(max_update, Tensor)  # kernels take a number
    if foreach is None and not differentiable and not on_device:
        items = map(dispatch.vector, params, grads, exp_avgs, exp_avg_sqs, steps, rng_keys)
        runs, eager = dispatch.partition_by_backend(items, None)
        rate = {id(p): lr for p, lr in zip(params, lrs, strict=True)}
        for kernels, chosen in runs:
            kernels.adam_(
                *dispatch.to_argument_lists(chosen)[:5],
                lr=[dispatch.lr_argument(rate[id(i.param)], i.param.device) for i in chosen],
                betas=betas,
                eps=eps,
                weight_decay=weight_decay,
                maximize=maximize,
                eps_before=eps_before,
                max_update=max_update,
                **dispatch.rounding(chosen),
            )
        if not eager:
            return
        lrs = [rate[id(item.param)] for item in eager]
        fields = list(map(list, zip(*eager, strict=True)))
        params, grads, exp_avgs, exp_avg_sqs, steps = fields[:5]
        rng_keys = fields[-1]
        foreach = _default_to_fused_or_foreach(params, differentiable)[1]
    rule = _multi_tensor_adam if foreach and not on_device else _single_tensor_adam

    options = (betas, eps, weight_decay, capturable, max_update, eps_before)

    def step(params: Any, grads: Any, means: Any, squares: Any, steps: Any, lrs: Any) -> None:
        with widened(means, squares) as (means, squares):
            grads = [g.to(m.dtype) for g, m in zip(grads, means, strict=True)]
            if maximize:
                grads = list(torch._foreach_neg(grads))
            rule(params, grads, means, squares, steps, lrs, *options)

    lists = (params, grads, exp_avgs, exp_avg_sqs, steps, lrs)
    apply_with_rounding(step, rng_keys, *lists, alone=any(m.dtype in LOW for m in exp_avgs))


def _corrections(
    steps: list[Tensor], betas: tuple[float, float], eps: float, eps_before: bool, capturable: bool
) -> tuple[list[Any], list[Any]]:
    """Return the factor of each update, and what is added to the roots of its second moments."""
    floors: list[Any] = [eps] * len(steps)
    if capturable:
        counts = torch.stack(steps).double()  # at first 1 and the powers of betas are nearly equal
        if not eps_before:
            floors = list((eps * (1 - betas[1] ** counts).sqrt()).unbind())
        return list(bias_correction(counts, betas).unbind()), floors
    numbers = read_counts(steps)
    if not eps_before:
        floors = [eps * math.sqrt(1 - betas[1] ** n) for n in numbers]
    return [bias_correction(n, betas) for n in numbers], floors


def _single_tensor_adam(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    lrs: list[Rate],
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    capturable: bool,
    max_update: Any,
    eps_before: bool,
) -> None:
    beta1, beta2 = betas
    lists = (params, grads, exp_avgs, exp_avg_sqs, steps, lrs)
    for p, g, m, v, step, lr in zip(*lists, strict=True):
        step += 1
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        # With `differentiable` autograd keeps m for the backward, and the next step changes it.
        mean = m.clone() if m.requires_grad else m
        (factor,), (floor,) = _corrections([step], betas, eps, eps_before, capturable)
        update = mean / (v.sqrt() + floor) * factor
        if max_update is not None:
            update = update.clamp(-max_update, max_update)
        if weight_decay != 0:
            # Inside the update, so that a low-precision weight is rounded once a step, not twice.
            (decayed,) = decaying([update], [p], weight_decay)
            update = update.add(decayed, alpha=abs(weight_decay))
        p.sub_(update * lr)


def _multi_tensor_adam(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    lrs: list[Rate],
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    capturable: bool,
    max_update: Any,
    eps_before: bool,
) -> None:
    beta1, beta2 = betas
    count_up(steps)
    torch._foreach_lerp_(exp_avgs, grads, 1 - beta1)
    torch._foreach_mul_(exp_avg_sqs, beta2)
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, value=1 - beta2)
    update = torch._foreach_sqrt(exp_avg_sqs)
    factors, floors = _corrections(steps, betas, eps, eps_before, capturable)
    torch._foreach_add_(update, floors)
    numbers = not capturable and not any(isinstance(lr, Tensor) for lr in lrs)
    if numbers and weight_decay == 0 and max_update is None:
        sizes = [-lr * factor for lr, factor in zip(lrs, factors, strict=True)]
        torch._foreach_addcdiv_(params, exp_avgs, update, sizes)
        return
    torch._foreach_reciprocal_(update)
    torch._foreach_mul_(update, exp_avgs)
    torch._foreach_mul_(update, factors)
    if max_update is not None:
        torch._foreach_clamp_max_(update, max_update)
        torch._foreach_clamp_min_(update, -max_update)
    if weight_decay != 0:
        decayed = decaying(update, params, weight_decay)
        torch._foreach_add_(update, decayed, alpha=abs(weight_decay))
    rates: Any = lrs[0] if all(lr is lrs[0] for lr in lrs) else lrs
    if isinstance(rates, list) and any(isinstance(lr, Tensor) for lr in lrs):
        rates = [torch.as_tensor(lr, device=u.device) for lr, u in zip(lrs, update, strict=True)]
    torch._foreach_mul_(update, rates)
    torch._foreach_sub_(params, update)
