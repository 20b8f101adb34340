"""Channel-wise gradient scaling and the norm-growth limiter, shared by Fira and APOLLO."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optimzoo.core.matrix_optimizer import State, subtract_
from optimzoo.distributed import WHOLE, Shards
from optimzoo.kernels import dispatch

_KINDS = {-1: dispatch.ROWS, -2: dispatch.COLUMNS, (-2, -1): dispatch.SIGN}
Dim = int | tuple[int, int]


def check_limiter(limiter: float) -> None:
    """Refuse a limiter below 1, which would shrink every update to nothing."""
    if not limiter >= 1.0:
        raise ValueError(f"Invalid limiter: {limiter}; it must be >= 1")


def excess(norm: Tensor, state: State, limit: float) -> Tensor | None:
    """Return the divisor that limits norm growth to ``limit`` per step, or None on the first step.

    This is Fira's limiter: a matrix's norm may grow by a factor of at most ``limit`` per step. The
    norm after the division is stored in ``state["update_norm"]``. A norm of zero is ignored (ours):
    from it a weight would need two thousand steps to its old pace.
    """
    if "update_norm" not in state:
        state["update_norm"] = torch.where(norm == 0, math.inf, norm)
        return None
    growth = norm / (state["update_norm"] + 1e-8)
    by = growth.clamp_min(limit) / limit
    state["update_norm"] = torch.where(norm == 0, state["update_norm"], norm / by)
    return by


def limited(update: Tensor, state: State, limit: float, shards: Shards = WHOLE) -> Tensor:
    """Return ``update`` with its norm, or each norm of a stack, limited by :func:`excess`."""
    # In float32 at least: bfloat16 has no number between 1 and 1.0078.
    norm = shards.norm(update, dim=(-2, -1), over="mn")
    by = excess(norm if update.ndim > 2 else norm.reshape(()), state, limit)
    return update if by is None else update / by


def channel_ratio(
    direction: Tensor, low: Tensor, *, dim: Dim, shards: Shards = WHOLE, over: str = ""
) -> Tensor:
    """Return how much Adam scaled each channel: ``‖N‖ / (‖R‖ + 1e-8)`` along ``dim``."""
    norms = [shards.norm(x, dim=dim, over=over) for x in (direction, low)]
    return norms[0] / (norms[1] + 1e-8)


class Channels(NamedTuple):
    """Kernel calls on the channels of an unsharded matrix and its gradient."""

    kernels: Any
    weight: Tensor
    grad: Tensor
    kind: int

    @classmethod
    def of(cls, weight: Tensor, grad: Tensor, dim: Dim, shards: Shards) -> "Channels | None":
        """Return the channels along ``dim``, or None if no kernel takes them."""
        kernels = dispatch.backend(weight.device.type)
        if kernels is None or shards.mesh is not None:
            return None
        items = dispatch.matrices(weight, grad, None, _KINDS[dim], stacked=False)
        plain = weight.ndim == 2 and grad.is_contiguous() and dispatch.takes(items[0])
        return cls(kernels, weight, grad, _KINDS[dim]) if plain else None

    def squares(self) -> Tensor:
        """Return the sum of squares of each channel, in float32."""
        rows, cols = self.grad.shape
        size = {dispatch.ROWS: rows, dispatch.COLUMNS: cols, dispatch.SIGN: 4}[self.kind]
        out = torch.zeros(size, dtype=torch.float32, device=self.grad.device)
        self.kernels.reduce_([self.grad], [out], [self.kind], [(rows, cols)])
        return out[1] if self.kind == dispatch.SIGN else out

    def subtract_(self, scales: Tensor, *, size: float, keep: float) -> None:
        """Apply ``W ← keep · W − size · scales ∘ G``, rounded once."""
        scales = (scales.float() * size).reshape(-1)
        shape = (self.grad.shape[0], self.grad.shape[1])
        lists = ([self.weight], [self.grad], [scales], [self.kind], [shape])
        self.kernels.apply_(*lists, lr=1.0, weight_decay=1.0 - keep)


def subtract_scaled_(
    weight: Tensor,
    grad: Tensor,
    ratio: Tensor,
    state: State,
    *,
    dim: Dim,
    limit: float,
    size: float,
    keep: float,
    shards: Shards,
) -> None:
    """Apply ``W ← keep · W − size · limited(ratio ∘ G)``, one ratio per channel along ``dim``."""
    channels = Channels.of(weight, grad, dim, shards)
    if channels is None:
        update = limited(grad * ratio, state, limit, shards)
        subtract_(weight, update, size=size, keep=keep)
        return
    ratio = ratio.flatten()
    by = excess((ratio.square() * channels.squares()).sum().sqrt(), state, limit)
    channels.subtract_(ratio if by is None else ratio / by, size=size, keep=keep)
