"""Updates of hidden weights, and how a step subtracts them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from optimzoo.lowbit import LOW, RngKey, fp32_working_copy

Number = float | Tensor


@dataclass(frozen=True)
class Update:
    """Direction ``scale · U`` of a weight, or of a stack of weights of one shape.

    Subclasses hold ``U`` as factors, and may subtract it without a tensor of the weight's size.

    Attributes:
        matrix: ``U``, ``[..., m, n]``; of a subclass, the tensor that it is made of.
        scale: a number, or a tensor that broadcasts.
    """

    matrix: Tensor
    scale: Number = 1.0

    def dense(self) -> Tensor:
        """Return ``U``."""
        return self.matrix

    def subtract_from(self, weight: Tensor, *, lr: Number, weight_decay: float) -> None:
        """Set ``W ← (1 − lr · weight_decay) W − lr · scale · U``, rounded once."""
        decay = lr * weight_decay if weight_decay else 0.0
        subtract_(weight, self.dense(), size=lr * self.scale, decay=decay)


def subtract_(weight: Tensor, update: Tensor, *, size: Number, decay: Number) -> None:
    """Set ``W ← (1 − decay) W − size · U``, rounded once where the weight is of low precision."""
    update = update.reshape(weight.shape)
    if isinstance(size, Tensor) or isinstance(decay, Tensor) or decay != 0.0:
        wide = torch.promote_types(weight.dtype, torch.float32)
        weight.sub_(update.to(wide) * size + weight.to(wide) * decay)
    else:
        weight.sub_(update, alpha=size)


def subtract_each_(
    weights: Sequence[Tensor],
    updates: Sequence[Tensor],
    rng_keys: Sequence[RngKey | None],
    *,
    size: Number,
    decay: Number,
) -> None:
    """Apply :func:`subtract_` to weights of one shape and dtype, by multi-tensor operations.

    The updates are in float32 at least.

    Where weights are rounded stochastically they are stepped one after the other.
    """
    weights = list(weights)
    shape = weights[0].shape
    updates = [u if u.shape == shape else u.reshape(shape) for u in updates]
    if any(rng_keys):
        for weight, update, rng_key in zip(weights, updates, rng_keys, strict=True):
            with fp32_working_copy(weight, rng_key) as wide:
                subtract_(wide, update, size=size, decay=decay)
        return
    targets = weights
    if weights[0].dtype in LOW:  # rounded once, from one float32 stack
        targets = list(torch.stack(weights).float().unbind())
    if isinstance(size, Tensor):
        updates, size = torch._foreach_mul(updates, size), 1.0
    if isinstance(decay, Tensor) or decay != 0.0:
        torch._foreach_mul_(targets, 1 - decay)
    torch._foreach_sub_(targets, updates, alpha=size)
    if targets is not weights:
        torch._foreach_copy_(weights, targets)
