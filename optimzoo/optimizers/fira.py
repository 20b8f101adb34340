"""Fira: GaLore plus the scaled residual outside its subspace (arXiv 2410.01623)."""

from dataclasses import dataclass
from typing import Any, Unpack

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from optimzoo.core.adam import bias_correction
from optimzoo.core.channel_rule import (
    ChannelUpdate,
    channel_ratio,
    check_limiter,
    limit_norm_growth,
)
from optimzoo.core.matrix_optimizer import adam_direction
from optimzoo.core.optimizer import options_of, signed_decay
from optimzoo.core.record import register
from optimzoo.core.role_options import SharedOptions
from optimzoo.core.rule import Context
from optimzoo.core.update import Number, Update
from optimzoo.core.validation import check_choice
from optimzoo.optimizers.galore import LowRankOptimizer, LowRankUpdate
from optimzoo.stacks import State
from optimzoo.subspace.projector import project, project_back, resolve_side


@register(
    "fira",
    "GaLore plus the scaled residual",
    source="arXiv 2410.01623",
    state="low rank: 2 r x longer side + r x shorter side; 2 x rest",
)
class Fira(LowRankOptimizer):
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
        weight_decay: λ, decoupled, or cautious by `weight_decay_style`.
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

    numbers = ("update_norm",)

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

    def direction(
        self, grad: Tensor, state: State, group: dict[str, Any], context: Context
    ) -> Update:
        """Update Adam's moments in the subspace; return their direction plus scaled residual."""
        shards = context.shards
        low = project(state, grad, shards)
        adam = adam_direction(state, low, group, context.step)
        dim = -2 if resolve_side(group["side"], shards.shape(grad.shape)) == "left" else -1
        alpha, limit = group["scale"], group["limiter"]
        less = alpha if group["residual_scale"] == "alpha" else 1.0
        ratio = channel_ratio(adam, low, dim=dim)
        scale = bias_correction(context.step, group["betas"])
        channels = ChannelUpdate.of(grad, ratio, dim, scale, context)
        # Two parts, one after the other: not for weights that would be rounded after each, nor for
        # a cautious decay, which looks at their sum. With less = 1 the residual's norm would be a
        # difference of numbers that are nearly equal.
        two_parts = context.weight is not None and context.weight.dtype == torch.float32
        if channels is not None and two_parts and less <= 0.5 and signed_decay(group) >= 0:
            squares = channels.squares() - back_squares(state, low, less)
            channels = channels.limited(squares.clamp_min(0), state, limit)
            part = alpha * adam - low * (less * channels.ratio.view_as(ratio))
            return ResidualUpdate(part, scale, state, channels)
        residual = (grad - less * project_back(state, low)) * ratio.to(grad.dtype)
        residual = limit_norm_growth(residual, state, limit, shards)
        return Update(alpha * project_back(state, adam) + residual, scale)


@dataclass(frozen=True)
class ResidualUpdate(LowRankUpdate):
    """Low-rank update, after one of the gradient's channels."""

    channels: ChannelUpdate | None = None

    def subtract_from(self, weight: Tensor, *, lr: Number, weight_decay: float) -> None:
        """Subtract both."""
        assert self.channels is not None
        self.channels.subtract_from(weight, lr=lr, weight_decay=weight_decay)
        super().subtract_from(weight, lr=lr, weight_decay=0.0)


def back_squares(state: State, low: Tensor, less: float) -> Tensor:
    """Return ``‖g‖² − ‖g − less · P r‖²`` of each channel ``g`` with projection ``r = Pᵀg``."""
    left = state.get("projector_left")
    basis, rows = (left, low) if left is not None else (state["projector_right"], low.mT)
    basis, rows = basis.float(), rows.float()
    through = (basis.mT @ basis) @ rows  # P has orthonormal columns only as far as it is rounded
    return (2 * less * rows.square() - less * less * rows * through).sum(0)
