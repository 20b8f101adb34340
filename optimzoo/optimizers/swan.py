"""SWAN: stateless SGD with row normalisation and whitening (arXiv 2412.13148)."""

import math
from functools import partial
from typing import Any, Unpack

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from optimzoo.core.matrix_optimizer import MatrixOptimizer, descent, step_lr
from optimzoo.core.optimizer import options_of, signed_decay
from optimzoo.core.record import register
from optimzoo.core.role_options import SharedOptions
from optimzoo.core.rule import Context, Matrix
from optimzoo.core.update import Update, subtract_
from optimzoo.distributed import map_whole_matrices
from optimzoo.kernels import dispatch
from optimzoo.lowbit import RngKey, fp32_working_copy
from optimzoo.stacks import State
from optimzoo.subspace.newton_schulz import whiten


@register(
    "swan",
    "stateless row normalisation and whitening",
    source="arXiv 2412.13148",
    state="none; 2 x rest",
)
class SWAN(MatrixOptimizer):
    r"""SGD with Whitening And Normalisation (SWAN).

    For a hidden weight ``W`` ``[m, n]`` with gradient ``G``, keeping nothing between steps::

        Ĝ_i = (G_i − mean(G_i)) / std(G_i)       each row i over its n entries
        U = (Ĝ Ĝᵀ)^(−1/2) Ĝ                      by Newton–Schulz iteration, on the shorter side
        U ← U · ‖Ĝ‖_F / ‖U‖_F                    (`rescale`: the entries of U have RMS 1)
        W ← (1 − ηλ) W − η U

    All other parameters (the embedding and the head among them, as in the paper) take Adam, and so
    do hidden weights whose rows have one entry (ours): each is its own mean, and would never move.
    A row of equal gradients is not moved, whatever its length: that is the rule.

    State of a hidden weight: none. The rest: two of their own size.

    Args:
        params: groups from :func:`optimzoo.param_groups`; bare parameters fall back by shape.
        lr: step of the hidden weights, the RMS of their update with `rescale`. A group may carry
            its own.
        betas: Adam's betas, for the rest.
        eps: Adam's eps (before the bias correction), and the floor of the rows' deviation.
        weight_decay: λ, decoupled, or cautious by `weight_decay_style`.
        steps: Newton–Schulz iterations. Re-implementations differ (6, 10); ours is 10.
        beta: the iteration's factor. 0.5 is Newton–Schulz and converges to the whitening; another
            value in use, 0.8, does not.
        rescale: give U the norm of Ĝ.
        options: shared options, :class:`~optimzoo.core.role_options.SharedOptions`.

    Raises:
        ValueError: a hyperparameter out of range.
        RuntimeError: a sparse gradient, at `step`.

    Source: arXiv 2412.13148. There is no public code of the authors: a re-implementation; `steps`,
    `beta` and the unit of `lr` are our choices.
    """

    counts_steps = False

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        steps: int = 10,
        beta: float = 0.5,
        rescale: bool = True,
        **options: Unpack[SharedOptions],
    ) -> None:
        super().__init__(params, options_of(locals()), **options)

    def _check_options(self, options: dict[str, Any]) -> None:
        if options["steps"] < 1:
            raise ValueError(f"Invalid steps: {options['steps']}; it must be at least 1")
        if not 0.0 < options["beta"] <= 1.0:
            raise ValueError(f"Invalid beta: {options['beta']}; it must be in (0, 1]")

    def scale_invariant(self, param: Tensor, group: dict[str, Any]) -> bool:
        """Return whether ``param``'s step is the same for every positive multiple of its gradient.

        It is for a hidden weight, as long as each row's deviation is above `eps`.
        """
        return self._is_own(param, group)

    def _is_own(self, p: Tensor, group: dict[str, Any]) -> bool:
        return super()._is_own(p, group) and _row_length(p, group) > 1

    def direction(
        self, grad: Tensor, state: State, group: dict[str, Any], context: Context
    ) -> Update:
        """Return the whitened rows."""
        return Update(direction(grad, group))

    def _step_sharded(
        self, matrices: list[Matrix], group: dict[str, Any], rng_keys: dict[Tensor, RngKey]
    ) -> None:
        grads = [descent(matrix.grad, group, matrix.weight.dtype) for matrix in matrices]
        rule = partial(direction, group=group)
        lr = step_lr(group)
        rates: Any = {"lr": lr, "weight_decay": signed_decay(group)}
        for i, update in map_whole_matrices(rule, grads, [matrix.shards for matrix in matrices]):
            with fp32_working_copy(matrices[i].weight, rng_keys.get(matrices[i].param)) as weight:
                subtract_(weight, update, size=lr, **rates)


def _row_length(p: Tensor, group: dict[str, Any]) -> int:
    """Return the number of entries of a row of the weight as a matrix, sharded or not."""
    if p.ndim > 2 and not group["stacked"]:
        return math.prod(p.shape[1:])
    return p.shape[-2 if group["transposed"] else -1]


def direction(grad: Tensor, group: dict[str, Any]) -> Tensor:
    """Return ``U`` for a whole gradient."""
    rows = normalize_rows(grad, group["eps"])
    update = whiten(rows, steps=group["steps"], beta=group["beta"])
    if not group["rescale"]:
        return update
    norms = [torch.linalg.matrix_norm(x, keepdim=True) for x in (rows, update)]
    return update * (norms[0] / norms[1].clamp_min(group["eps"]))


def normalize_rows(grad: Tensor, eps: float) -> Tensor:
    """Return each row less its mean, over its standard deviation, in at least float32.

    A row of equal entries gives zeros: its difference from its mean is rounding.
    """
    out = torch.empty_like(grad, dtype=torch.promote_types(grad.dtype, torch.float32))
    kernels = dispatch.backend(grad.device.type)
    item = dispatch.matrices(out, grad, None, dispatch.ROWS, stacked=True)[0]
    if kernels is not None and grad.is_contiguous() and dispatch.is_supported(item):
        kernels.center_([out], [grad], [item.shape], eps=eps)
    else:
        wide = grad.to(out.dtype)
        centred = wide - wide.mean(-1, keepdim=True)
        out = centred / centred.square().mean(-1, keepdim=True).sqrt().clamp_min(eps)
    low, high = grad.aminmax(dim=-1, keepdim=True)
    return out.masked_fill_(low == high, 0.0)
