"""RMNP: momentum with normalised rows on the hidden weights, AdamW on the rest."""

from dataclasses import dataclass
from typing import Any, Unpack

from torch import Tensor
from torch.optim.optimizer import ParamsT

from optimzoo.core.matrix_optimizer import Context, State
from optimzoo.core.momentum_optimizer import (
    MomentumOptimizer,
    MomentumOptions,
    adjustment,
    momentum_of,
)
from optimzoo.core.optimizer import options_of
from optimzoo.core.record import register
from optimzoo.core.update import Number, Update
from optimzoo.kernels import dispatch

FLOOR = 1e-12  # of a row's norm: rows of zeros stay zero, and those that underflow do not explode


@register(
    "rmnp",
    "momentum with normalised rows on hidden weights, AdamW on the rest",
    source="arXiv 2603.20527",
    state="1 x hidden + 2 x rest",
)
class RMNP(MomentumOptimizer):
    r"""Row-Momentum Normalized Preconditioning: Muon with its iteration replaced by row norms.

    For a weight of ``roles`` ``[m, n]`` with gradient ``G``, momentum ``M`` and ``μ`` `momentum`::

        M ← μ M + (1 − μ) G
        X = μ M + (1 − μ) G                      (`nesterov`; else X = M)
        X_i: ← X_i: / max(‖X_i:‖, 1e-12)         each row i, the inputs of one output
        W ← (1 − ηλ) W − η s X                   s by `adjust_lr_fn`

    What is a matrix, and what takes the rule of the rest, is as in Muon; so are the state and its
    dtypes: `momentum_buffer`, of the weight's size. No product of matrices: a step costs as SGD's
    with momentum. Sharded rows need nothing of other processes, sharded columns m sums.

    Args:
        params: groups from :func:`optimzoo.param_groups`, or bare parameters (split by shape). A
            group may have `heads`, as in Muon; rows are alone anyway, so it only makes s that of a
            block of ``m / heads`` rows.
        lr: η, RMNP's learning rate. A group may carry its own.
        momentum: μ.
        weight_decay: λ, decoupled.
        nesterov: Nesterov momentum.
        adjust_lr_fn: s: `None` or `original`, √max(1, m/n), with which a row's entries have the RMS
            √(max(m, n)) / n; `match_rms_adamw` and `spectral_unclamped` as in Muon.
        options: shared options, AdamW's among them,
            :class:`~optimzoo.core.momentum_optimizer.MomentumOptions`.

    Raises:
        ValueError: a hyperparameter out of range; `heads` that do not divide a matrix's rows.
        RuntimeError: a sparse gradient, at `step`.

    Source: arXiv 2603.20527 (ICML 2026) and its code, github.com/Dominator-Index/RMNP. The paper's
    algorithm has neither Nesterov's momentum nor s, and adds ε to a norm; the code, which is
    followed here, has both and the floor. `lr` and AdamW's rate are the defaults of its Llama
    trainer. Its package sums the momentum instead, M ← μ M + G: X has the same direction. Ours are
    float32 norms for 16-bit weights; the outputs of a transposed weight or a convolution as rows
    (the trainer norms the last dimension); AdamW for matrices of one row or column, for the
    embedding and the head (as the trainer; its GPT-2 script gives RMNP every matrix: `roles`); and
    AdamW's rule as torch has it (the trainer's eps is before the bias correction, and its decay at
    the corrected rate).
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 5e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        *,
        nesterov: bool = True,
        adjust_lr_fn: str | None = None,
        **options: Unpack[MomentumOptions],
    ) -> None:
        options.setdefault("other_lr", 1e-3)
        super().__init__(params, options_of(locals()), **options)

    def direction(
        self, grad: Tensor, state: State, group: dict[str, Any], context: Context
    ) -> Update:
        """Return the momentum with its rows normalised."""
        scale = adjustment(context.shards.shape(grad.shape), group)
        fused = FusedUpdate.of(grad, scale, state, group, context)
        if fused is not None:
            return fused
        momentum = momentum_of(grad, state, group)
        norms = context.shards.norm(momentum, dim=-1, over="n")
        return Update(momentum / norms.clamp_min_(FLOOR), scale)


@dataclass(frozen=True)
class FusedUpdate(Update):
    """Update of a gradient by a kernel that takes momentum, norms and step in one pass.

    So the momentum changes as the update is subtracted.

    Attributes:
        item: what the kernel reads: the weight, the gradient and the momentum.
        group: the options.
    """

    item: Any = None
    group: Any = None

    @classmethod
    def of(
        cls, grad: Tensor, scale: float, state: State, group: dict[str, Any], context: Context
    ) -> "FusedUpdate | None":
        """Return the update, or None if no kernel of the CPU takes the weight."""
        weight, shards = context.weight, context.shards
        if weight is None or shards.is_sharded("n") or dispatch.backend("cpu") is None:
            return None
        mean = state["momentum_buffer"]
        item = dispatch.matrices(weight, grad, mean, dispatch.ROWS, stacked=group["stacked"])[0]
        fits = weight.device.type == "cpu" and dispatch.is_supported(item)
        return cls(grad, scale, item, group) if fits else None

    def subtract_from(self, weight: Tensor, *, lr: Number, weight_decay: float) -> None:
        """Take the gradient into the momentum and subtract the update, rounded once."""
        kernels: Any = dispatch.backend("cpu")
        kernels.scale_(
            *dispatch.to_argument_lists([self.item]),
            lr=dispatch.lr_argument(lr * self.scale, weight.device),
            weight_decay=weight_decay / self.scale,
            momentum=self.group["momentum"],
            nesterov=self.group["nesterov"],
            **{"l2": True, "eps": FLOOR, "betas": (0.0, 0.0), "adam_eps": 0.0, "maximize": False},
        )
