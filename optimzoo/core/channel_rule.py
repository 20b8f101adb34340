"""Channel-wise gradient scaling and the norm-growth limiter, shared by Fira and APOLLO."""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from optimzoo.core.rule import Context
from optimzoo.core.update import Number, Update
from optimzoo.distributed import UNSHARDED, Shards
from optimzoo.kernels import dispatch
from optimzoo.stacks import State

_KINDS = {-1: dispatch.ROWS, -2: dispatch.COLUMNS, (-2, -1): dispatch.SIGN}
Dim = int | tuple[int, int]


def check_limiter(limiter: float) -> None:
    """Refuse a limiter below 1, which would shrink every update to nothing."""
    if not limiter >= 1.0:
        raise ValueError(f"Invalid limiter: {limiter}; it must be >= 1")


def norm_growth_divisor(norm: Tensor, state: State, limit: float) -> Tensor | None:
    """Return the divisor that limits norm growth to ``limit`` per step, or None on the first step.

    This is Fira's limiter: a matrix's norm may grow by a factor of at most ``limit`` per step. The
    norm after the division is stored in ``state["update_norm"]``. A norm of zero is ignored (ours):
    from it a weight would need two thousand steps to its old pace.
    """
    if "update_norm" not in state:
        state["update_norm"] = torch.where(norm == 0, math.inf, norm)
        return None
    last = state["update_norm"]
    most = torch.rsub(last, 1e-8 * limit, alpha=-limit)  # limit · (last + 1e-8), in one operation
    divisor = (norm / most).clamp_min_(1.0)
    limited = (norm / divisor).to(last.dtype)
    torch.where(norm == 0, last, limited, out=last)  # in place: a graph may hold it
    return divisor


def limit_norm_growth(
    update: Tensor, state: State, limit: float, shards: Shards = UNSHARDED
) -> Tensor:
    """Divide ``update``, or each matrix of a stack, by :func:`norm_growth_divisor`."""
    # In float32 at least: bfloat16 has no number between 1 and 1.0078.
    norm = shards.norm(update, dim=(-2, -1), over="mn")
    norm = norm if update.ndim > 2 else norm.reshape(())
    divisor = norm_growth_divisor(norm, state, limit)
    return update if divisor is None else update / divisor


def channel_ratio(
    direction: Tensor, low: Tensor, *, dim: Dim, shards: Shards = UNSHARDED, over: str = ""
) -> Tensor:
    """Return how much Adam scaled each channel: ``‖N‖ / (‖R‖ + 1e-8)`` along ``dim``."""
    norms = [shards.norm(x, dim=dim, over=over) for x in (direction, low)]
    return norms[0] / (norms[1] + 1e-8)


@dataclass(frozen=True)
class ChannelUpdate(Update):
    """Update ``scale · s ∘ G`` of a gradient, with a number ``s`` for each channel along ``dim``.

    By kernels, for an unsharded 2-D weight that is stepped alone.
    """

    ratio: Tensor = field(default_factory=lambda: torch.ones(()))
    dim: Dim = -1
    kernels: Any = None

    @classmethod
    def of(
        cls, grad: Tensor, ratio: Tensor, dim: Dim, scale: float, context: Context
    ) -> "ChannelUpdate | None":
        """Return the update, or None if no kernel takes the weight."""
        weight = context.weight
        kernels = dispatch.backend(grad.device.type)
        if kernels is None or weight is None or context.shards.mesh is not None:
            return None
        item = dispatch.matrices(weight, grad, None, _KINDS[dim], stacked=False)[0]
        plain = weight.ndim == 2 and grad.is_contiguous() and dispatch.is_supported(item)
        return cls(grad, scale, ratio.flatten(), dim, kernels) if plain else None

    def squares(self) -> Tensor:
        """Return the sum of squares of each channel of the gradient, in float32."""
        rows, cols = self.matrix.shape
        kind = _KINDS[self.dim]
        size = {dispatch.ROWS: rows, dispatch.COLUMNS: cols, dispatch.SIGN: 4}[kind]
        out = torch.zeros(size, dtype=torch.float32, device=self.matrix.device)
        self.kernels.reduce_([self.matrix], [out], [kind], [(rows, cols)])
        return out[1] if kind == dispatch.SIGN else out

    def limited(self, squares: Tensor, state: State, limit: float) -> "ChannelUpdate":
        """Return the update with its norm limited, of the sums of squares of its channels."""
        norm = (self.ratio.square() * squares).sum().sqrt()
        divisor = norm_growth_divisor(norm, state, limit)
        return self if divisor is None else replace(self, ratio=self.ratio / divisor)

    def subtract_from(self, weight: Tensor, *, lr: Number, weight_decay: float) -> None:
        """Subtract it, rounded once."""
        scales = (self.ratio.float() * self.scale).reshape(-1).float()
        shape = (self.matrix.shape[0], self.matrix.shape[1])
        lists = ([weight], [self.matrix], [scales], [_KINDS[self.dim]], [shape])
        lr = dispatch.lr_argument(lr, weight.device)
        self.kernels.apply_(*lists, lr=lr, weight_decay=weight_decay)


def scaled_channels(
    grad: Tensor,
    ratio: Tensor,
    state: State,
    context: Context,
    *,
    dim: Dim,
    limit: float,
    scale: float,
) -> Update:
    """Return ``scale · limit(ratio ∘ G)``, with one ratio per channel along ``dim``."""
    update = ChannelUpdate.of(grad, ratio, dim, scale, context)
    if update is not None:
        return update.limited(update.squares(), state, limit)
    return Update(limit_norm_growth(grad * ratio, state, limit, context.shards), scale)
