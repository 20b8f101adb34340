"""GaLore: Adam in the leading low-rank subspace of each gradient (arXiv 2403.03507)."""

from dataclasses import dataclass, field
from typing import Any, Unpack

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from optimzoo.core.adam import bias_correction
from optimzoo.core.matrix_optimizer import MatrixOptimizer, adam_direction
from optimzoo.core.optimizer import options_of
from optimzoo.core.record import register
from optimzoo.core.role_options import SharedOptions
from optimzoo.core.rule import Context
from optimzoo.core.update import Number, Update
from optimzoo.core.validation import check_choice
from optimzoo.stacks import State
from optimzoo.subspace.bases import KINDS, has_direction
from optimzoo.subspace.natural import rotate_history
from optimzoo.subspace.projector import (
    SIDES,
    has_projector,
    low_rank_update_,
    project,
    project_back,
    refresh,
    resolve_side,
)


def low_dimension(group: dict[str, Any], shape: torch.Size) -> str:
    """Return the weight's dimension that the low-rank gradient still has: `m`, `n` or neither."""
    return {"left": "n", "right": "m", "both": ""}[resolve_side(group["side"], shape)]


class LowRankOptimizer(MatrixOptimizer):
    """Base class of the methods that keep their state in the gradient's leading subspace."""

    def _check_options(self, options: dict[str, Any]) -> None:
        for name in ("rank", "update_proj_gap"):
            if options[name] < 1:
                raise ValueError(f"Invalid {name}: {options[name]}; it must be at least 1")
        check_choice("projector", options["projector"], KINDS)
        check_choice("side", options["side"], SIDES)

    def state_dims(self, group: dict[str, Any], shape: torch.Size) -> dict[str, str]:
        """Return the dimensions of projector, moments and history."""
        low = {"n": ".n", "m": "m.", "": ".."}[low_dimension(group, shape)]
        return {
            **{"exp_avg": low, "exp_avg_sq": low, "history": "." + low},
            "history_scale": f".{low[0]}.",
            **{"projector_left": "m.", "projector_right": "n."},
        }

    def refresh_due(self, state: State, group: dict[str, Any], step: int) -> bool:
        """Return whether the subspace is renewed: first, and every `update_proj_gap` steps."""
        return (step - 1) % group["update_proj_gap"] == 0 or not has_projector(state)

    def refresh(self, grad: Tensor, state: State, group: dict[str, Any], context: Context) -> None:
        """Renew the subspace, and rotate the moments into it."""
        step, shards = context.step, context.shards
        rank = min(group["rank"], *shards.shape(grad.shape)[-2:])
        for key in ("projector_left", "projector_right"):
            if key in state and state[key].shape[-1] != rank:
                raise ValueError(
                    f"rank={group['rank']} in mid-run: the state is of rank "
                    f"{state[key].shape[-1]}; a new rank takes a new optimizer"
                )
        if step == 1:  # drop the subspace of a step whose gradient was zero
            for key in ("projector_left", "projector_right"):
                state.pop(key, None)
            if not has_direction(grad, shards).any():
                state["step"] -= 1  # the next step is the first: this gradient has no subspace
        rotation = refresh(
            state,
            grad,
            rank=group["rank"],
            kind=group["projector"],
            side=group["side"],
            # Another sketch each time, the same on resume.
            seed=group["seed"] + 7919 * context.position + step,
            shards=shards,
        )
        if rotation is not None and group["rotate"] and "exp_avg" in state:
            state["exp_avg"].copy_(rotation(state["exp_avg"]))
            state["exp_avg_sq"].copy_(rotation.rotate_second_moment(state["exp_avg_sq"]))
            if "history" in state:
                over = low_dimension(group, shards.shape(grad.shape))
                rotate_history(state, rotation, shards, over)


@dataclass(frozen=True)
class LowRankUpdate(Update):
    """Update ``scale · P R Qᵀ`` of a low-rank matrix ``R``, one of whose factors may be missing."""

    state: State = field(default_factory=dict)

    def dense(self) -> Tensor:
        """Return ``P R Qᵀ``."""
        return project_back(self.state, self.matrix)

    def subtract_from(self, weight: Tensor, *, lr: Number, weight_decay: float) -> None:
        """Subtract it without a tensor of the weight's size, where the dtypes allow that."""
        if weight_decay < 0:  # cautious: it looks at each element of the update
            super().subtract_from(weight, lr=lr, weight_decay=weight_decay)
            return
        decay = lr * weight_decay if weight_decay else 0.0
        low_rank_update_(weight, self.state, self.matrix, size=lr * self.scale, decay=decay)


@register(
    "galore",
    "Adam in the gradient's leading subspace",
    source="arXiv 2403.03507",
    state="low rank: 2 r x longer side + r x shorter side; 2 x rest",
)
class GaLore(LowRankOptimizer):
    r"""Gradient Low-Rank Projection (GaLore).

    For a hidden weight ``W`` ``[m, n]`` with gradient ``G``, every `update_proj_gap` steps the
    projector ``P`` becomes the leading `rank` left (right, for ``m >= n``) directions of ``G``::

        R = PᵀG                                  (right side: G Q)
        M ← β₁ M + (1 − β₁) R,   V ← β₂ V + (1 − β₂) R²
        W ← (1 − ηλ) W − η √(1 − β₂ᵗ)/(1 − β₁ᵗ) · scale · P (M / (√V + eps))

    All other parameters take Adam with the same betas, eps (before the bias correction) and decay.

    State of a hidden weight, in elements of its dtype (float32 under float16):
    ``2 r max(m, n) + r min(m, n)``. The rest: two of their own size.

    Args:
        params: groups from :func:`optimzoo.param_groups`; bare parameters fall back by shape.
        lr: learning rate; a group (such as the rest) may carry its own.
        betas: Adam's betas.
        eps: 1e-6 in the authors' code, 1e-8 in the paper.
        weight_decay: λ, decoupled, or cautious by `weight_decay_style`.
        rank: rank of the subspace; weights with a smaller dimension use that.
        update_proj_gap: steps between two refreshes of the subspace.
        scale: the paper's α.
        projector: `randomized` (a warm-started range finder, ours), `svd` (published) or `power`.
        side: `auto` projects the shorter dimension (published), or `left`, `right`, `both`.
        rotate: at a refresh, rotate the moments into the new subspace (ours); `False`, published,
            reads them in the new one as they are.
        options: shared options, :class:`~optimzoo.core.role_options.SharedOptions`.

    Raises:
        ValueError: a hyperparameter out of range.
        RuntimeError: a sparse gradient, at `step`.

    A gradient for which the SVD does not converge takes the range finder; one that is zero or not
    finite leaves the subspace as it was, and at the start is not counted as a step. The published
    runs: ``projector="svd", rotate=False``.

    Source: arXiv 2403.03507; jiaweizzhao/GaLore. Ours differs from that code: decay before the
    step, as torch's AdamW; n-D weights are flattened, stacks of matrices taken slice by slice.
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
        projector: str = "randomized",
        side: str = "auto",
        rotate: bool = True,
        **options: Unpack[SharedOptions],
    ) -> None:
        super().__init__(params, options_of(locals()), **options)

    def direction(
        self, grad: Tensor, state: State, group: dict[str, Any], context: Context
    ) -> Update:
        """Return Adam's direction in the subspace."""
        low = project(state, grad, context.shards)
        adam = adam_direction(state, low, group, context.step)
        scale = bias_correction(context.step, group["betas"]) * group["scale"]
        return LowRankUpdate(adam, scale, state)
