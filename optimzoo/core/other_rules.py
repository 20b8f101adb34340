"""Rules for the embedding and the head of the matrix methods, with less state than Adam's."""

from typing import Any

import torch
from torch import Tensor

from optimzoo.core.rule import Context, Rule, averaged
from optimzoo.core.update import Update
from optimzoo.lowbit import moment_dtype
from optimzoo.roles import input_dim, role_of
from optimzoo.stacks import State


class ScaleRule(Rule):
    r"""SCALE's rule (arXiv 2506.16659), with momentum on the head alone.

    For a weight ``W`` ``[vocab, d]`` with gradient ``G``, learning rate ``η`` and decay ``λ``::

        head:  M ← β₁ M + (1 − β₁) G,   G ← M
        s = max(√(mean G²), eps)        head: of each row; embedding: of each column
        W ← (1 − ηλ) W − η G / s

    State: of the head one `exp_avg` of its own size; of the embedding none.
    """

    counts_steps = False

    def init_state(self, p: Tensor, state: State, group: dict[str, Any]) -> None:
        """Create the head's momentum."""
        if role_of(p, group) == "head" and not {"exp_avg", "exp_avg_codes"} & state.keys():
            state["exp_avg"] = torch.zeros_like(p, dtype=moment_dtype(p, group))

    def direction(
        self, grad: Tensor, state: State, group: dict[str, Any], context: Context
    ) -> Update:
        """Return the gradient, or its average, with rows or columns of RMS one."""
        if "exp_avg" in state:
            grad = averaged(grad, state["exp_avg"], group["betas"][0], group)
        dim = input_dim(group["role"], transposed=False)
        norm = context.shards.norm(grad, dim=dim, over="mn"[dim])
        rms = norm / context.shards.shape(grad.shape)[dim] ** 0.5
        return Update(grad / rms.clamp_min(group["eps"]))


class AdafactorRule(Rule):
    r"""Factored second moment without a first one (Adafactor, arXiv 1804.04235).

    For a weight ``W`` ``[m, n]`` with gradient ``G``, learning rate ``η`` and decay ``λ``, at step
    ``t``::

        r ← β₂ r + (1 − β₂) mean_j G²,   c ← β₂ c + (1 − β₂) mean_i G²
        V = r cᵀ / mean(r) / (1 − β₂ᵗ)
        U = G / (√V + eps)
        W ← (1 − ηλ) W − η U / max(1, RMS(U))

    State, in float32: `row_var` ``[m]``, `col_var` ``[n]``, and a count of steps.

    ``torch.optim.Adafactor`` has a β₂ that grows with the steps, and multiplies ``η`` by the
    weight's own RMS; here β₂ and ``η`` are those that Adam would take.
    """

    def state_dims(self, group: dict[str, Any], shape: torch.Size) -> dict[str, str]:
        """Return the dimensions of the two factors."""
        return {"row_var": "m", "col_var": "n"}

    def direction(
        self, grad: Tensor, state: State, group: dict[str, Any], context: Context
    ) -> Update:
        """Return the gradient over the root of its second moment, of an RMS of at most one."""
        shards, beta2 = context.shards, group["betas"][1]
        grad = grad.to(torch.promote_types(grad.dtype, torch.float32))
        m, n = shards.shape(grad.shape)[-2:]
        squares = grad.square()
        rows, cols = squares.sum(-1), squares.sum(-2)
        del squares
        shards.sum_([rows], "n")
        shards.sum_([cols], "m")
        for key, mean in (("row_var", rows / n), ("col_var", cols / m)):
            if key not in state:
                state[key] = torch.zeros_like(mean)
            state[key].lerp_(mean, 1 - beta2)
        row_var, col_var = state["row_var"], state["col_var"]
        total = row_var.sum(-1, keepdim=True)
        shards.sum_([total], "m")
        share = row_var * m / total.clamp_min(torch.finfo(total.dtype).tiny)
        correction: Any = 1 - beta2**context.step
        if isinstance(correction, Tensor):
            correction = correction.to(grad.dtype)
        root = (share.unsqueeze(-1) * (col_var.unsqueeze(-2) / correction)).sqrt_()
        update = torch.div(grad, root.add_(group["eps"]), out=root)
        norm = shards.norm(update, dim=(-2, -1), over="mn")
        return Update(update.div_((norm / (m * n) ** 0.5).clamp_min_(1.0)))


OTHER_RULES: dict[str, Rule] = {"scale": ScaleRule(), "adafactor": AdafactorRule()}
