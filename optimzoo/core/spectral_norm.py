"""Updates of spectral norm one, by a power iteration that goes on from step to step."""

import torch
from torch import Tensor

from optimzoo.distributed import UNSHARDED, Shards
from optimzoo.lowbit.stochastic import random_uniform
from optimzoo.stacks import State

ITERATIONS = 2
KEY = "singular_vector"


def divide_by_spectral_norm_(update: Tensor, state: State, shards: Shards = UNSHARDED) -> Tensor:
    r"""Divide each matrix of ``[..., m, n]``, in place, by an estimate of its spectral norm.

    With ``X`` the matrix, transposed if it is tall, and ``u`` the state, each iteration takes::

        v = Xᵀ u / ‖Xᵀ u‖,   w = X v,   u ← w / ‖w‖

    and the estimate is ‖w‖, which is at most the norm, but at least ‖X‖_F / √min(m, n), which no
    spectral norm is below: so a ``u`` that is far from X's makes no long step. A matrix of zeros,
    or with an entry that is not finite, leaves ``u`` as it was.

    Args:
        update: matrices, in at least float32; of a sharded weight, what this process has.
        state: has ``u`` under `KEY`, ``[..., min(m, n)]``; the first step draws it, from the length
            alone, so that it does not depend on the order of the weights.
        shards: how the weight is sharded; ``u`` is whole on every process.

    Returns:
        ``update``.
    """
    m, n = shards.shape(update.shape)[-2:]
    x, sides = (update, shards) if m <= n else (update.mT, shards.transposed)
    if KEY not in state:
        drawn = random_uniform(0, min(m, n), (0, 0, 0), update.device).to(update.dtype) - 0.5
        drawn /= torch.linalg.vector_norm(drawn)
        state[KEY] = drawn.expand(*update.shape[:-2], -1).clone()
    u, tiny = state[KEY], torch.finfo(update.dtype).tiny
    start = u.unsqueeze(-1)
    left = start
    for _ in range(ITERATIONS):
        right = x.mT @ sides.local_slice(left, "m")
        sides.sum_([right], "m")
        right /= sides.norm(right, dim=-2, over="n").clamp_min_(tiny)
        left = x @ right
        sides.sum_([left], "n")
        norm = sides.norm(left, dim=-2, over="m")
        left = sides.gather(left) / norm.clamp_min(tiny)
    u.copy_(torch.where((norm > 0) & norm.isfinite(), left, start).squeeze(-1))
    least = shards.norm(update, dim=(-2, -1), over="mn") / min(m, n) ** 0.5
    return update.div_(torch.maximum(norm, least).clamp_min_(tiny))
