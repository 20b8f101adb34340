"""Low-rank projectors, stored as plain tensors in an optimizer's per-parameter state.

The state's keys are ``projector_left`` ``[m, r]`` and ``projector_right`` ``[n, r]``, one or both;
or ``projector_seed`` for a Gaussian projector, which is drawn again at each use and never stored.
"""

import math
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optimzoo.distributed import UNSHARDED, Shards
from optimzoo.lowbit import at_least_float32
from optimzoo.subspace.bases import leading_basis

State = MutableMapping[str, Any]
Number = float | Tensor
# Odd multipliers of a multiplicative hash, as signed 64-bit integers.
_GOLDEN, _ODD = 0x9E3779B97F4A7C15 - (1 << 64), 0xD6E8FEB86659FD93 - (1 << 64)
# Half the distance of two uniform numbers. A tensor: with a number, torch's default dtype decides.
_HALF = {
    dtype: torch.tensor(2.0**-24, dtype=dtype, device="cpu")
    for dtype in (torch.float32, torch.float64)
}
SIDES = ("auto", "left", "right", "both")


@dataclass(frozen=True)
class Rotation:
    """Change of basis from the previous subspace to the new one: ``x → L x Rᵀ``."""

    left: Tensor | None
    right: Tensor | None

    def __call__(self, low: Tensor) -> Tensor:
        """Rotate low-rank matrices ``[..., a, b]``."""
        low = low if self.left is None else self.left.to(low.dtype) @ low
        return low if self.right is None else low @ self.right.to(low.dtype).mT

    def rotate_second_moment(self, low: Tensor) -> Tensor:
        """Rotate second moments by the squared entries, as if coordinates were uncorrelated."""
        left = None if self.left is None else self.left.square()
        right = None if self.right is None else self.right.square()
        return Rotation(left, right)(low)


def resolve_side(side: str, shape: torch.Size) -> str:
    """Resolve `auto` to the shorter dimension: `right` for ``m >= n``, else `left`."""
    if side != "auto":
        return side
    return "right" if shape[-2] >= shape[-1] else "left"


def refresh(
    state: State,
    grad: Tensor,
    *,
    rank: int,
    kind: str,
    side: str,
    seed: int,
    shards: Shards = UNSHARDED,
) -> Rotation | None:
    """Store the leading subspace of ``grad`` ``[..., m, n]`` in ``state``.

    A projector is sharded like its dimension of the gradient. Returns the rotation from the
    previous subspace to the new one, or None if there was no previous one.
    """
    side = resolve_side(side, shards.shape(grad.shape))
    rotations: dict[str, Tensor | None] = {"left": None, "right": None}
    rotated = False
    for name, matrix, cut in (("left", grad, shards), ("right", grad.mT, shards.transposed)):
        if side not in (name, "both"):
            continue
        key = f"projector_{name}"
        old = cut.gather(state[key]) if key in state else None
        new = leading_basis(matrix, rank, kind=kind, previous=old, seed=seed, shards=cut)
        if old is not None:
            rotations[name] = new.mT @ old.to(new.dtype)
            rotated = True
        # Contiguous, as a checkpoint gives it back: products round by the layout of their factors.
        # And a copy: a slice would keep the storage of the whole.
        part, last = cut.local_slice(new).to(grad.dtype), state.get(key)
        if last is not None and (last.shape, last.dtype) == (part.shape, part.dtype):
            last.copy_(part)  # in place: a CUDA graph may hold it
        else:
            state[key] = part.clone(memory_format=torch.contiguous_format)
    return Rotation(**rotations) if rotated else None


def has_projector(state: State) -> bool:
    """Return whether ``state`` holds a projector."""
    return "projector_left" in state or "projector_right" in state


def project(state: State, grad: Tensor, shards: Shards = UNSHARDED) -> Tensor:
    """Project a gradient onto the subspace: ``PᵀG``, ``G Q`` or ``PᵀG Q``."""
    left, right = _factors(state, grad)
    low = grad if left is None else left.mT @ grad
    low = low if right is None else low @ right
    shards.sum_([low], "m" * (left is not None) + "n" * (right is not None))
    return low


def low_rank_update_(
    weight: Tensor, state: State, low: Tensor, *, size: Number, decay: Number
) -> None:
    """Apply ``W ← (1 − decay) W − size · back(low)`` in place (see :func:`project_back`).

    A 2-D weight takes no full-size temporary, unless ``size`` or ``decay`` is a tensor or its dtype
    is narrower than that of ``low``: the factors of the product would be rounded to it.
    """
    narrower = torch.promote_types(weight.dtype, low.dtype) != weight.dtype
    if isinstance(size, Tensor) or isinstance(decay, Tensor) or narrower or weight.ndim != 2:
        update = project_back(state, low).reshape(weight.shape)
        # One sum, so that a low-precision weight is rounded once.
        wide = torch.promote_types(weight.dtype, torch.float32)
        weight.sub_(update.to(wide) * size + weight.to(wide) * decay)
        return
    left, right = _factors(state, low)
    if left is not None and right is not None:
        first, second = left @ low, right.mT
    else:
        first, second = (left, low) if left is not None else (low, right.mT)  # type: ignore[union-attr]
    weight.addmm_(first.to(weight.dtype), second.to(weight.dtype), beta=1 - decay, alpha=-size)


def project_back(state: State, low: Tensor) -> Tensor:
    """Map ``low`` back to the weight's shape: ``P low``, ``low Qᵀ`` or ``P low Qᵀ``."""
    left, right = _factors(state, low)
    full = low if left is None else left @ low
    return full if right is None else full @ right.mT


def _factors(state: State, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Return ``P`` and ``Q`` in the dtype of ``like``, from which a loaded state may differ."""
    left, right = state.get("projector_left"), state.get("projector_right")
    return (
        None if left is None else left.to(like.dtype),
        None if right is None else right.to(like.dtype),
    )


def gaussian(seed: int | Tensor, rows: int, rank: int, like: Tensor) -> Tensor:
    """Draw ``[rows, rank]`` from N(0, 1/rank) for a seed, or ``[k, rows, rank]`` for ``k`` seeds.

    Each number is a hash of seed and place, so matrices that are drawn together are those that are
    drawn alone, and every device draws the same but for rounding.
    """
    count = rows * rank
    seeds = torch.as_tensor(seed, device=like.device)
    place = torch.arange(-(-count // 2), device=like.device)
    bits = place.add(seeds.reshape(-1, 1), alpha=_GOLDEN).mul_(_GOLDEN)
    bits = bits.bitwise_xor_(bits >> 32).mul_(_ODD)
    # Each has two integers from -2^23 to 2^23 - 1: a uniform number's place among as many.
    uniform = _HALF[at_least_float32(like)].add(bits.view(torch.int32) >> 8, alpha=2.0**-23)
    omega = uniform.erfinv_().mul_(math.sqrt(2 / rank))
    # Seeds of stacks [k, e, m, n] are one for each k.
    stack = (*seeds.shape[:1], *(1,) * (like.ndim - 3)) if seeds.ndim else ()
    return omega[:, :count].reshape(*stack, rows, rank).to(like.dtype)
