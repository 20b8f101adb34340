"""Fira: GaLore plus the scaled residual outside its subspace (arXiv 2410.01623)."""

from typing import Any, Unpack

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from optimzoo.core.channel_rule import (
    Channels,
    channel_ratio,
    check_limiter,
    excess,
    limited,
)
from optimzoo.core.matrix_optimizer import (
    State,
    adam_direction,
    bias_correction,
    count_step,
    subtract_,
)
from optimzoo.core.optimizer import options_of, scalar_lr
from optimzoo.core.record import register
from optimzoo.core.role_options import SharedOptions
from optimzoo.core.validation import check_choice
from optimzoo.distributed import Shards
from optimzoo.optimizers.galore import Projected
from optimzoo.subspace.projector import back, resolve_side, subtract_back_


@register(
    "fira",
    "GaLore plus the scaled residual",
    source="arXiv 2410.01623",
    state="low rank: 2 r x longer side + r x shorter side; 2 x rest",
)
class Fira(Projected):
    r"""Full-rank training under low-rank state (Fira).

    With GaLore's ``R``, ``N = M / (√V + eps)`` and ``P``, and ``s_j`` one number for each channel
    ``j`` of the dimension that is not projected::

        s_j = ‖N_j‖ / (‖R_j‖ + 1e-8)
        S = limit((G − c P R) · s)               c = α, or 1 with `residual_scale="one"`
        W ← (1 − ηλ) W − η √(1 − β₂ᵗ)/(1 − β₁ᵗ) · (α P N + S)

    ``limit`` lets the norm of ``S`` grow by a factor of at most `limiter` per step; a norm of zero
    is ignored (ours: the code's next steps would grow from nothing).

    State of a hidden weight: GaLore's, and one number.

    Args:
        params: groups from :func:`optimzoo.param_groups`; bare parameters fall back by shape.
        lr: learning rate; a group may carry its own.
        betas: Adam's betas.
        eps: Adam's eps, before the bias correction.
        weight_decay: λ, decoupled.
        rank: rank of the subspace.
        update_proj_gap: steps between two refreshes.
        scale: α.
        limiter: the largest growth of the residual's norm from one step to the next.
        residual_scale: `alpha`, the authors' code, which subtracts α P R; or `one`, the paper's
            formula, which subtracts P R.
        projector: `randomized` (ours), `svd` (published) or `power`.
        side: `auto` (published), `left` or `right`.
        rotate: at a refresh, rotate the moments (ours); `False` is the published behaviour.
        options: shared options, :class:`~optimzoo.core.role_options.SharedOptions`.

    Raises:
        ValueError: a hyperparameter out of range; `side="both"`.
        RuntimeError: a sparse gradient, at `step`.

    Source: arXiv 2410.01623; xichen-fy/Fira.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        rank: int = 128,
        update_proj_gap: int = 200,
        scale: float = 0.25,
        limiter: float = 1.01,
        residual_scale: str = "alpha",
        projector: str = "randomized",
        side: str = "auto",
        rotate: bool = True,
        **options: Unpack[SharedOptions],
    ) -> None:
        super().__init__(params, options_of(locals()), **options)

    def _check_options(self, options: dict[str, Any]) -> None:
        super()._check_options(options)
        check_choice("side", options["side"], ("auto", "left", "right"))
        check_choice("residual_scale", options["residual_scale"], ("alpha", "one"))
        check_limiter(options["limiter"])

    def _step_hidden(
        self,
        weight: Tensor,
        grad: Tensor,
        state: State,
        group: dict[str, Any],
        index: int,
        shards: Shards,
    ) -> None:
        step = count_step(state, weight)
        low = self._project(state, grad, group, step, index, shards)
        direction = adam_direction(state, low, group)
        dim = -2 if resolve_side(group["side"], shards.shape(grad.shape)) == "left" else -1
        alpha = group["scale"]
        less = alpha if group["residual_scale"] == "alpha" else 1.0
        ratio = channel_ratio(direction, low, dim=dim)
        lr = float(scalar_lr(group))
        size = lr * bias_correction(step, group["betas"])
        keep = 1 - lr * group["weight_decay"]
        channels = Channels.of(weight, grad, dim, shards)
        # Two parts, one after the other: not for weights that would be rounded after each. With
        # less = 1 the residual's norm would be a difference of numbers that are nearly equal.
        if channels is not None and weight.dtype == torch.float32 and less <= 0.5:
            squares = channels.squares() - back_squares(state, low, less)
            norm = (ratio.flatten().square() * squares.clamp_min(0)).sum().sqrt()
            by = excess(norm, state, group["limiter"])
            ratio = ratio if by is None else ratio / by
            channels.subtract_(ratio, size=size, keep=keep)
            part = alpha * direction - low * (less * ratio)
            subtract_back_(weight, state, part, size=size, keep=1.0)
            return
        residual = (grad - less * back(state, low)) * ratio.to(grad.dtype)
        residual = limited(residual, state, group["limiter"], shards)
        update = alpha * back(state, direction) + residual
        subtract_(weight, update, size=size, keep=keep)


def back_squares(state: State, low: Tensor, less: float) -> Tensor:
    """Return ``‖g‖² − ‖g − less · P r‖²`` of each channel ``g`` with projection ``r = Pᵀg``."""
    left = state.get("projector_left")
    basis, rows = (left, low) if left is not None else (state["projector_right"], low.mT)
    basis, rows = basis.float(), rows.float()
    through = (basis.mT @ basis) @ rows  # P has orthonormal columns only as far as it is rounded
    return (2 * less * rows.square() - less * less * rows * through).sum(0)
