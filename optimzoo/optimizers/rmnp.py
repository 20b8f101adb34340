"""RMNP: momentum with normalised rows on the hidden weights, AdamW on the rest."""

import itertools
from typing import Any, Unpack

from torch import Tensor
from torch.optim.optimizer import ParamsT

from optimzoo.core.matrix_optimizer import as_matrix, kernel_items, step_lr
from optimzoo.core.momentum_optimizer import (
    MomentumOptimizer,
    MomentumOptions,
    adjustment,
    momentum_of,
)
from optimzoo.core.optimizer import options_of, signed_decay
from optimzoo.core.record import register
from optimzoo.core.rule import Context
from optimzoo.core.update import Update
from optimzoo.kernels import dispatch
from optimzoo.lowbit import RngKey
from optimzoo.stacks import State

FLOOR = 1e-12  # of a row's norm: rows of zeros stay zero, and those that underflow do not explode


@register(
    "rmnp",
    "momentum with normalised rows on hidden weights, AdamW on the rest",
    source="arXiv 2603.20527",
    state="1 x hidden + 2 x rest",
    width_power={"hidden": 0.5},
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
        weight_decay: λ, decoupled, or cautious by `weight_decay_style`.
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
        if options.get("other_lr") is None:
            options["other_lr"] = 1e-3
        super().__init__(params, options_of(locals()), **options)

    def direction(
        self, grad: Tensor, state: State, group: dict[str, Any], context: Context
    ) -> Update:
        """Return the momentum with its rows normalised."""
        momentum = momentum_of(grad, state, group)
        norms = context.shards.norm(momentum, dim=-1, over="n").clamp_min_(FLOOR)
        return Update(momentum / norms, adjustment(context.shards.shape(grad.shape), group))

    def _step_matrices(
        self,
        params: list[tuple[int, Tensor]],
        group: dict[str, Any],
        rng_keys: dict[Tensor, RngKey],
    ) -> None:
        """Step what the kernels take in one call, and the others by `direction`."""
        items = [self._kernel_items(p, group, rng_keys.get(p)) for _, p in params]
        others = [param for param, args in zip(params, items, strict=True) if not args]
        calls, _ = dispatch.partition_by_backend(itertools.chain(*items), fused=None)
        for kernels, call in calls:
            shapes = [as_matrix(item.param.detach(), group).shape for item in call]
            scales = [adjustment(shape, group) for shape in shapes]
            lr, device = step_lr(group), call[0].param.device
            rates = {scale: dispatch.lr_argument(lr * scale, device) for scale in set(scales)}
            kernels.scale_(
                *dispatch.to_argument_lists(call),
                lr=[rates[scale] for scale in scales],
                weight_decay=[signed_decay(group) / scale for scale in scales],
                **{key: group[key] for key in ("momentum", "nesterov", "maximize")},
                **{"l2": True, "eps": FLOOR, "betas": (0.0, 0.0), "adam_eps": 0.0},
                **dispatch.rounding(call),
            )
        super()._step_matrices(others, group, rng_keys)

    def _kernel_items(
        self, p: Tensor, group: dict[str, Any], rng_key: RngKey | None
    ) -> list[dispatch.TensorArgs]:
        """Return a weight's matrices as kernels read them; none if it takes another path."""
        if dispatch.backend(p.device.type) is None or group["state_bits"]:
            return []
        self.init_state(p, self.state[p], group)
        return kernel_items(p, self.state[p]["momentum_buffer"], group, rng_key)
