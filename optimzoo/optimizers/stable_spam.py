"""Stable-SPAM: Adam with adaptive clipping and momentum reset (arXiv 2502.17055)."""

import math
from contextlib import ExitStack
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from optimzoo.core.adam import bias_correction, max_direction
from optimzoo.core.matrix_optimizer import (
    MatrixOptimizer,
    State,
    count_steps,
)
from optimzoo.core.optimizer import options_of, scalar_lr
from optimzoo.core.record import register
from optimzoo.core.role_options import SharedOptions
from optimzoo.core.update import subtract_
from optimzoo.core.validation import check_betas, check_choice
from optimzoo.distributed import WHOLE, Shards
from optimzoo.kernels import dispatch
from optimzoo.lowbit import Counter, moment_dtype, opened, stand_in, widened
from optimzoo.roles import ROLES


@register(
    "stable_spam",
    "Adam with adaptive clipping and momentum reset",
    source="arXiv 2502.17055",
    state="2 x",
)
class StableSPAM(MatrixOptimizer):
    r"""Stable Spike-Aware Adam with Momentum Reset (Stable-SPAM).

    For every parameter, with step count ``t`` from 1::

        c ← γ₃ c + (1 − γ₃) max|g|,    ĉ = c / (1 − γ₃ᵗ)
        g_i ← g_i / max|g| · ĉ         where |g_i| > ĉ                       (clip the spikes)
        a ← γ₁ s a + (1 − γ₁ s) ‖g‖,   b ← γ₂ b + (1 − γ₂) ‖g‖²
        g ← g / ‖g‖ · â / (√b̂ + eps)   â, b̂ bias-corrected                   (clip the norm)
        Adam with β₁ s; every `update_proj_gap` steps its moments and its count start anew

    ``s`` falls along a cosine from 1 to `eta_min` over `total_steps`; it is 1 where that is None.

    State, in elements a parameter: two moments, and three numbers (float32 at least) and two counts
    a tensor. Maxima and norms are those of a tensor; in a stack of matrices, of each matrix.

    Args:
        params: groups from :func:`optimzoo.param_groups`, or bare parameters.
        lr: learning rate; a group may carry its own.
        betas: Adam's betas.
        eps: Adam's eps (after the bias correction, as in torch), and the norm clip's.
        weight_decay: weight decay, decoupled.
        gamma1: decay rate of the norm's mean. 0.7; the authors' bf16 script has 0.85.
        gamma2: decay rate of the norm's second moment. 0.9; the bf16 script has 0.99999.
        gamma3: decay rate of the largest entry, θ in the paper. 0.999.
        update_proj_gap: steps between two resets of the moments, the authors' name; 0: never.
        total_steps: length of the cosine of β₁ and γ₁.
        eta_min: the cosine's end.
        reset_step: `authors`, as in their code, makes the step of a reset with the old moments
            under a fresh bias correction; `clean` (ours) starts the moments anew before it.
        options: shared options, :class:`~optimzoo.core.role_options.SharedOptions`.

    Raises:
        ValueError: a hyperparameter out of range.
        RuntimeError: a sparse gradient, at `step`.

    Source: arXiv 2502.17055; TianjinYellow/StableSPAM.
    """

    _own_roles: ClassVar[tuple[str, ...]] = ROLES

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        gamma1: float = 0.7,
        gamma2: float = 0.9,
        gamma3: float = 0.999,
        update_proj_gap: int = 1000,
        total_steps: int | None = None,
        eta_min: float = 0.5,
        reset_step: str = "authors",
        **options: Unpack[SharedOptions],
    ) -> None:
        if options.get("foreach"):
            raise ValueError("foreach=True: Stable-SPAM steps weight by weight; leave foreach=None")
        super().__init__(params, options_of(locals()), **options)

    def _check_options(self, options: dict[str, Any]) -> None:
        check_betas((options["gamma1"], options["gamma2"], options["gamma3"]), "gamma")
        if options["update_proj_gap"] < 0:
            gap = options["update_proj_gap"]
            raise ValueError(f"Invalid update_proj_gap: {gap}; it must be >= 0 (0: no reset)")
        if options["total_steps"] is not None and options["total_steps"] < 1:
            raise ValueError(f"Invalid total_steps: {options['total_steps']}; it must be >= 1")
        if not 0.0 < options["eta_min"] <= 1.0:
            raise ValueError(f"Invalid eta_min: {options['eta_min']}; it must be in (0, 1]")
        check_choice("reset_step", options["reset_step"], ("authors", "clean"))

    def _letters(self, group: dict[str, Any], shape: torch.Size) -> dict[str, str]:
        whole = "mn" if len(shape) > 1 else "m"
        return {"exp_avg": whole, "exp_avg_sq": whole}

    def _step_matrices(
        self,
        params: list[tuple[int, Tensor]],
        group: dict[str, Any],
        counters: dict[Tensor, Counter],
    ) -> None:
        for index, p in params:
            weight, grad, shards = self._matrix(p, group)
            letters = self._letters(group, shards.shape(grad.shape))
            counter = counters.get(p)
            with ExitStack() as stack:
                state = stack.enter_context(shards.opened(self.state[p], letters))
                if group["state_bits"] == 8:
                    self._refuse_cut_codes(p)
                    stack.enter_context(opened(state, 8, counter))
                wide = stack.enter_context(stand_in(weight, counter))
                self._step_hidden(wide, grad, state, group, index, shards)

    def _step_hidden(
        self,
        weight: Tensor,
        grad: Tensor,
        state: State,
        group: dict[str, Any],
        index: int,
        shards: Shards,
    ) -> None:
        (step,) = count_steps([state], [weight])
        shrink = cosine_factor(step, group["total_steps"], group["eta_min"])
        kernels = _kernels(weight, grad, state, shards)
        dtype = moment_dtype(grad, group)
        if kernels is None:
            grad = grad.to(torch.promote_types(grad.dtype, torch.float32))
            grad = clip_spikes(grad, state, step, group["gamma3"], shards)
            grad = clip_norm(grad, state, step, shrink, group, shards)
        else:
            clips = _clips(kernels, grad, state, step, shrink, group)
        beta1, beta2 = group["betas"][0] * shrink, group["betas"][1]
        if "exp_avg" not in state:
            state["exp_avg"] = torch.zeros_like(grad, dtype=dtype)
            state["exp_avg_sq"] = torch.zeros_like(grad, dtype=dtype)
            state["moment_step"] = torch.zeros_like(state["step"])
        m, v = state["exp_avg"], state["exp_avg_sq"]
        age = int(state["moment_step"].item()) + 1  # gradients in the moments, this one too
        gap = group["update_proj_gap"]
        if gap and step > 1 and step % gap == 0:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(m), torch.zeros_like(v)
            state["moment_step"].zero_()
            if group["reset_step"] == "clean":
                m, v, age = state["exp_avg"], state["exp_avg_sq"], 1
        state["moment_step"] += 1
        k = int(state["moment_step"].item())
        most = math.inf
        if group["state_bits"] == 8:
            most = max_direction(age, (beta1, beta2)) * bias_correction(k, (beta1, beta2))
        lr = float(scalar_lr(group))
        if kernels is not None:
            kernels.adam_(
                *(
                    [weight],
                    [grad],
                    [m],
                    [v],
                    [state["moment_step"].to(grad.device, torch.float32)],
                ),
                lr=lr,
                betas=(beta1, beta2),
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                maximize=False,
                eps_before=False,
                clips=[clips],
                max_update=most,
            )
            return
        with widened([m], [v]) as ([mean], [square]):
            grad = grad.to(mean.dtype)
            mean.lerp_(grad, 1 - beta1)
            square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            denominator = (square / (1 - beta2**k)).sqrt_().add_(group["eps"])
            size = lr / (1 - beta1**k)
            update = mean / denominator
            if most != math.inf:
                most *= 1 - beta1**k  # `size` has the other part of the bias correction
                update.clamp_(-most, most)
            subtract_(weight, update, size=size, decay=lr * group["weight_decay"])


def cosine_factor(step: int, total: int | None, low: float) -> float:
    """Return ``s``, which falls from 1 at the start to ``low`` from step ``total`` on."""
    if total is None:
        return 1.0
    return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(step, total) / total))


def clip_spikes(
    grad: Tensor, state: State, step: int, gamma: float, shards: Shards = WHOLE
) -> Tensor:
    """Scale entries beyond the running largest entry down to it."""
    largest = _norm(grad, math.inf, shards)
    bound = _spike_bound(largest, state, step, gamma)
    tiny = torch.finfo(largest.dtype).tiny
    clipped = grad / largest.clamp_min(tiny) * bound
    return torch.where(grad.abs() > bound, clipped, grad).to(grad.dtype)


def clip_norm(
    grad: Tensor,
    state: State,
    step: int,
    shrink: float,
    group: dict[str, Any],
    shards: Shards = WHOLE,
) -> Tensor:
    """Scale the gradient from its own norm to the running norm."""
    norm = _norm(grad, 2, shards)
    return (grad * _norm_factor(norm, state, step, shrink, group)).to(grad.dtype)


def _spike_bound(largest: Tensor, state: State, step: int, gamma: float) -> Tensor:
    """Update the running mean of the largest entry; return it, bias-corrected."""
    if "max_avg" not in state:
        state["max_avg"] = torch.zeros_like(largest)
    average = state["max_avg"].mul_(gamma).add_(largest, alpha=1 - gamma)
    return average / (1 - gamma**step)


def _norm_factor(
    norm: Tensor, state: State, step: int, shrink: float, group: dict[str, Any]
) -> Tensor:
    """Update the running norm; return the factor that gives it to a gradient of norm ``norm``."""
    if "norm_avg" not in state:
        state["norm_avg"], state["norm_avg_sq"] = torch.zeros_like(norm), torch.zeros_like(norm)
    gamma1, gamma2 = group["gamma1"] * shrink, group["gamma2"]
    mean = state["norm_avg"].mul_(gamma1).add_(norm, alpha=1 - gamma1)
    square = state["norm_avg_sq"].mul_(gamma2).add_(norm.square(), alpha=1 - gamma2)
    target = mean / (1 - gamma1**step) / ((square / (1 - gamma2**step)).sqrt() + group["eps"])
    return target / norm.clamp_min(torch.finfo(norm.dtype).tiny)


def _kernels(weight: Tensor, grad: Tensor, state: State, shards: Shards) -> Any:
    """Return the kernels that step an unsharded weight, or None."""
    kernels = dispatch.backend(grad.device.type)
    if kernels is None or shards.mesh is not None or grad.ndim > 2:
        return None
    item = dispatch.vector(weight, grad, state.get("exp_avg"), state.get("exp_avg_sq"))
    return kernels if grad.is_contiguous() and dispatch.takes(item) else None


def _clips(
    kernels: Any, grad: Tensor, state: State, step: int, shrink: float, group: dict[str, Any]
) -> Tensor:
    """Return both clips for the kernels: bound of an entry, ratio beyond it, factor of all."""
    tiny = torch.finfo(torch.float32).tiny
    # Largest entry, sum of squares, bound, ratio.
    sums = torch.zeros(4, dtype=torch.float32, device=grad.device)
    call = ([grad], [sums], [dispatch.SIGN], [(1, grad.numel())])
    kernels.reduce_(*call)
    bound = _spike_bound(sums[0].clone(), state, step, group["gamma3"])
    ratio = bound / sums[0].clamp_min(tiny)
    sums[2:] = torch.stack((bound, ratio))
    kernels.reduce_(*call)
    factor = _norm_factor(sums[1].sqrt(), state, step, shrink, group)
    return torch.stack((bound, ratio, factor))


def _norm(grad: Tensor, order: float, shards: Shards) -> Tensor:
    """Return the norm, of each matrix in a stack, in float32: γ₃ = 0.999 is 1 in bfloat16."""
    dims = tuple(range(-min(grad.ndim, 2), 0))
    norm = shards.norm(grad, order, dim=dims, over="mn")
    return norm if grad.ndim > 2 else norm.reshape(())
