"""Updates of hidden weights, and how a step subtracts them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from optimzoo.lowbit import LOW, RngKey, fp32_working_copy

Number = float | Tensor
DECAY_STYLES = ("decoupled", "cautious")


def decaying(
    updates: Sequence[Tensor], weights: Sequence[Tensor], weight_decay: float
) -> list[Tensor]:
    """Return what decays by ``|weight_decay|``: the weights, or some elements, zeros elsewhere.

    Cautious weight decay, of a negative ``weight_decay``::

        W ← W − η (U + λ · 1[U ∘ W ≥ 0] ∘ W)

    leaves out the elements that the update ``U`` (what η multiplies) moves away from zero. At
    equality an element decays, as in the paper: a row whose update is zero decays as it does
    without caution.

    Source: "Cautious Weight Decay", arXiv 2510.12402.
    """
    if weight_decay >= 0:
        return list(weights)
    updates, weights = list(updates), list(weights)
    masks = list(torch._foreach_mul(updates, weights))
    torch._foreach_sign_(masks)
    torch._foreach_add_(masks, 1.0)
    torch._foreach_clamp_max_(masks, 1.0)
    return list(torch._foreach_mul(masks, weights))


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
        """Return ``U`` at full size, without ``scale``."""
        return self.matrix

    def subtract_from(self, weight: Tensor, *, lr: Number, weight_decay: float) -> None:
        """Set ``W ← (1 − lr · weight_decay) W − lr · scale · U``, rounded once."""
        size = lr * self.scale
        subtract_(weight, self.dense(), size=size, lr=lr, weight_decay=weight_decay)


def subtract_(
    weight: Tensor, update: Tensor, *, size: Number, lr: Number, weight_decay: float
) -> None:
    """Set ``W ← (1 − lr · weight_decay) W − size · U``; weights below float32 are rounded once.

    A negative decay is cautious.
    """
    update = update.reshape(weight.shape)
    decay = lr * abs(weight_decay) if weight_decay else 0.0
    in_place = decay == 0.0 or (weight_decay > 0 and weight.dtype not in LOW)
    if isinstance(size, Tensor) or isinstance(decay, Tensor) or not in_place:
        wide = torch.promote_types(weight.dtype, torch.float32)
        step = update.to(wide) * size
        (decayed,) = decaying([step], [weight.to(wide)], weight_decay)
        weight.sub_(step + decayed * decay)
    else:
        if decay != 0.0:
            weight.mul_(1 - decay)
        weight.sub_(update, alpha=size)


def subtract_each_(
    weights: Sequence[Tensor],
    updates: Sequence[Tensor],
    rng_keys: Sequence[RngKey | None],
    *,
    size: Number,
    lr: Number,
    weight_decay: float,
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
                subtract_(wide, update, size=size, lr=lr, weight_decay=weight_decay)
        return
    targets = weights
    if weights[0].dtype in LOW:  # rounded once, from one float32 stack
        targets = list(torch.stack(weights).float().unbind())
    if isinstance(size, Tensor):
        updates, size = torch._foreach_mul(updates, size), 1.0
    if weight_decay < 0:
        decayed = torch._foreach_mul(decaying(updates, targets, weight_decay), -lr * weight_decay)
        torch._foreach_sub_(targets, decayed)
    elif weight_decay:
        torch._foreach_mul_(targets, 1 - lr * weight_decay)
    torch._foreach_sub_(targets, updates, alpha=size)
    if targets is not weights:
        torch._foreach_copy_(weights, targets)
