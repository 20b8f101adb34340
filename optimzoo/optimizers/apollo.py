"""APOLLO and APOLLO-Mini: Adam's scaling, estimated in a random subspace (arXiv 2412.05270)."""

from typing import Any, Unpack

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from optimzoo.core.adam import bias_correction
from optimzoo.core.channel_rule import channel_ratio, check_limiter, scaled_channels
from optimzoo.core.matrix_optimizer import MatrixOptimizer, adam_direction
from optimzoo.core.optimizer import options_of
from optimzoo.core.record import register
from optimzoo.core.role_options import SharedOptions
from optimzoo.core.rule import Context
from optimzoo.core.update import Update
from optimzoo.core.validation import check_choice
from optimzoo.stacks import State
from optimzoo.subspace.projector import gaussian, resolve_side


@register(
    "apollo",
    "Adam's channel scaling, estimated in a random subspace",
    source="arXiv 2412.05270",
    state="low rank: 2 r x longer side; 2 x rest",
)
class APOLLO(MatrixOptimizer):
    r"""Approximated Gradient Scaling (APOLLO).

    With ``Ω`` of N(0, 1/r) entries, drawn anew from a seed every `update_proj_gap` steps and never
    stored, for a hidden weight ``W`` ``[m, n]`` with gradient ``G``::

        R = ΩᵀG  (m < n)  or  G Ω                the random projection of the shorter dimension
        N = M / (√V + eps)                       Adam's moments of R
        s = ‖N_j‖ / (‖R_j‖ + 1e-8)               a channel of the longer dimension, or a tensor
        U = √scale · limit(G · s)                (`scale_front`: the factor before the limit)
        W ← (1 − ηλ) W − η √(1 − β₂ᵗ)/(1 − β₁ᵗ) · U

    ``limit`` lets the norm grow by a factor of at most `limiter` per step; a norm of zero is
    ignored (ours). All other parameters take Adam.

    State of a hidden weight, in elements: ``2 r max(m, n)``, a seed and one number; APOLLO-Mini
    (`rank=1`): ``2 max(m, n)``.

    Args:
        params: groups from :func:`optimzoo.param_groups`; bare parameters fall back by shape.
        lr: learning rate; a group may carry its own.
        betas: Adam's betas.
        eps: Adam's eps, before the bias correction.
        weight_decay: λ, decoupled, or cautious by `weight_decay_style`.
        rank: rows of the projection; a quarter of the hidden size in the paper.
        update_proj_gap: steps between two draws of Ω.
        scale: enters as its square root. 1, or 128 for APOLLO-Mini.
        scale_type: `channel`, or `tensor` for one number a weight (APOLLO-Mini).
        scale_front: scale before the limiter instead of after it.
        limiter: the largest growth of the update's norm from one step to the next.
        options: shared options, :class:`~optimzoo.core.role_options.SharedOptions`.

    Raises:
        ValueError: a hyperparameter out of range.
        RuntimeError: a sparse gradient, at `step`.

    APOLLO-Mini is :class:`APOLLOMini`.

    Source: arXiv 2412.05270, from the paper: the authors' code is licensed for non-commercial use
    and was not used.
    """

    numbers = ("update_norm", "projector_seed")

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
        scale: float = 1.0,
        scale_type: str = "channel",
        scale_front: bool = False,
        limiter: float = 1.01,
        **options: Unpack[SharedOptions],
    ) -> None:
        super().__init__(params, options_of(locals()), **options)

    def _check_options(self, options: dict[str, Any]) -> None:
        for name in ("rank", "update_proj_gap"):
            if options[name] < 1:
                raise ValueError(f"Invalid {name}: {options[name]}; it must be at least 1")
        if not options["scale"] > 0:
            raise ValueError(f"Invalid scale: {options['scale']}; it must be > 0")
        check_choice("scale_type", options["scale_type"], ("channel", "tensor"))
        check_limiter(options["limiter"])

    def state_dims(self, group: dict[str, Any], shape: torch.Size) -> dict[str, str]:
        """Return the dimensions of the low-rank moments."""
        low = ".n" if resolve_side("auto", shape) == "left" else "m."
        return {"exp_avg": low, "exp_avg_sq": low}

    def refresh_due(self, state: State, group: dict[str, Any], step: int) -> bool:
        """Return whether Ω is drawn anew: first, and every `update_proj_gap` steps."""
        return "projector_seed" not in state or (step - 1) % group["update_proj_gap"] == 0

    def refresh(self, grad: Tensor, state: State, group: dict[str, Any], context: Context) -> None:
        """Store the seed of another Ω."""
        # Kept, not derived from the step, so that a run continued with another gap is the same.
        seed = group["seed"] + 7919 * context.position + context.step
        if "projector_seed" in state:
            state["projector_seed"].fill_(seed)  # in place: a CUDA graph may hold it
        else:
            device = grad.device if group["capturable"] else "cpu"
            state["projector_seed"] = torch.tensor(seed, dtype=torch.int64, device=device)

    def direction(
        self, grad: Tensor, state: State, group: dict[str, Any], context: Context
    ) -> Update:
        """Return the gradient with its channels scaled as Adam scales those of ``R``."""
        step, shards = context.step, context.shards
        shape = shards.shape(grad.shape)
        on_left = resolve_side("auto", shape) == "left"
        omega = gaussian(state["projector_seed"], min(shape[-2:]), group["rank"], grad)
        projected, over = ("m", "n") if on_left else ("n", "m")
        omega = shards.local_slice(omega, projected)
        low = omega.mT @ grad if on_left else grad @ omega
        shards.sum_([low], projected)
        adam = adam_direction(state, low, group, step)
        dim: int | tuple[int, int] = (-2, -1)
        if group["scale_type"] == "channel":
            dim = -2 if on_left else -1
            ratio = channel_ratio(adam, low, dim=dim)
        else:
            ratio = channel_ratio(adam, low, dim=dim, shards=shards, over=over)
        front = group["scale"] ** 0.5 if group["scale_front"] else 1.0
        scale = bias_correction(step, group["betas"])
        return scaled_channels(
            grad,
            ratio * front if front != 1.0 else ratio,
            state,
            context,
            dim=dim,
            limit=group["limiter"],
            scale=scale if group["scale_front"] else scale * group["scale"] ** 0.5,
        )


@register(
    "apollo_mini",
    "APOLLO at rank 1 with one scale a tensor",
    source="arXiv 2412.05270",
    state="2 x longer side; 2 x rest",
)
class APOLLOMini(APOLLO):
    """APOLLO at rank 1, with one scale a tensor: state of SGD's size (arXiv 2412.05270).

    The rule, the arguments and the errors are those of :class:`APOLLO`; the defaults differ.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        rank: int = 1,
        update_proj_gap: int = 200,
        scale: float = 128.0,
        scale_type: str = "tensor",
        scale_front: bool = False,
        limiter: float = 1.01,
        **options: Unpack[SharedOptions],
    ) -> None:
        super().__init__(params, **options_of(locals()), **options)
