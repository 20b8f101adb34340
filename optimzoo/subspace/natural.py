"""Natural gradients under an empirical Fisher matrix of the last gradients."""

import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from optimzoo.distributed import UNSHARDED, Shards
from optimzoo.kernels import dispatch, native
from optimzoo.stacks import State, StateStack, each

_JITTERS = (0.0, 1e-10, 1e-8, 1e-6, 1e-4)
_COLUMNS = 2**16  # columns of a low-precision history that are widened at a time
_TOP = 127  # the largest code of 8 bits


def natural_gradient(
    state: State,
    low: Tensor,
    index: int | Tensor,
    *,
    damping: float,
    relative: bool,
    shards: Shards = UNSHARDED,
    over: str = "",
) -> Tensor:
    """Return ``F⁻¹ g`` with ``F = λ I + Σ_j h_j h_jᵀ`` over the history, ``g`` included.

    ``state`` holds the last gradients as ``history`` ``[..., s, a, b]``, whose rows ``h`` have
    ``k = a b`` elements, and their Gram matrix ``gram`` ``[..., s, s]``. The gradient replaces
    row ``i``, and ``H g`` the row ``i`` of the Gram matrix, which is updated, not recomputed. Since
    ``g`` is a row of ``H``::

        F⁻¹ g = Hᵀ w,   (λ I + H Hᵀ) w = e_i

    which is Woodbury's formula without its cancellation. It takes two passes over the history and
    one Cholesky of s × s in float64. A low-precision history is summed in the Gram matrix's dtype:
    rounded to bfloat16, the Gram matrix of similar gradients is not positive definite.

    A history of codes has ``history_scale`` ``[..., s, a, 1]`` beside it. Then ``h`` are the codes'
    values, that of ``g`` among them: Gram matrix and result are those of one matrix, so ``F`` stays
    positive definite whatever the codes lose.

    A damping too small for that dtype (such as zero, with a gradient that repeats) is raised to the
    first sufficient jitter, for each matrix of a stack by itself.

    Args:
        state: state of one parameter; `history` and `gram` are changed in place.
        low: the low-rank gradient ``[..., a, b]``.
        index: the row to replace; a tensor, one for each weight of a stack, is not read by the
            host: then the damping is raised on the device, and a matrix that none makes positive
            definite gives NaN.
        damping: λ.
        relative: take λ in units of the mean squared norm μ of the filled rows, and multiply the
            result by ``(1 + λ) μ``: strong damping then gives back ``g``, whatever its size.
        shards: how the weight is sharded.
        over: the dimension of the weight, `m` or `n`, that ``low`` still has.

    Raises:
        RuntimeError: the damped Gram matrix is not positive definite, even with jitter.
    """
    gram = state["gram"]
    if "history_scale" in state:
        codes, scale = quantized(low, shards, over)
        _put(state, "history", index, codes)
        _put(state, "history_scale", index, scale)
        g = (codes.to(gram.dtype) * scale).flatten(-2)
    else:
        _put(state, "history", index, low)
        g = low.flatten(-2).to(each(state, "history")[0].dtype)
    row = _products(state, g)
    shards.sum_([row], over)
    if isinstance(index, Tensor):
        places = torch.arange(gram.shape[-1], device=gram.device)
        is_replaced = places == index.view((*index.shape[:1], *(1,) * (gram.ndim - 2)))
        changed = torch.where(is_replaced.unsqueeze(-1), row.unsqueeze(-2), gram)
        gram.copy_(torch.where(is_replaced.unsqueeze(-2), row.unsqueeze(-1), changed))
        weights = _solve_on_device(gram, is_replaced, damping, relative).to(gram.dtype)
    else:
        gram[..., index, :] = row
        gram[..., :, index] = row
        weights = _solve_unit(gram, index, damping, relative).to(gram.dtype)
    return _combination(state, weights).to(low.dtype).reshape(low.shape)


def quantized(low: Tensor, shards: Shards = UNSHARDED, over: str = "") -> tuple[Tensor, Tensor]:
    """Return codes of 8 bits, and the scale of each row of a low-rank gradient.

    A code's value is off by at most half a scale, 1/254 of the row's largest magnitude. The scale
    of a row that is not finite is not, and so is all of the row.
    """
    scale = shards.norm(low, math.inf, dim=-1, over=over.replace("m", "")) / _TOP
    codes = torch.nan_to_num(low / scale, nan=0.0, posinf=0.0, neginf=0.0).round_()
    return codes.to(torch.int8), scale


def _put(state: State, key: str, index: int | Tensor, values: Tensor) -> None:
    """Write the newest gradient's values into the ring of each weight."""
    dim = each(state, "gram")[0].ndim - 2
    rings = each(state, key)
    parts = values.unbind() if isinstance(state, StateStack) else [values]
    if isinstance(index, Tensor):
        for ring, i, x in zip(rings, index.view(-1), parts, strict=True):
            ring.index_copy_(dim, i.view(1), x.unsqueeze(dim).to(ring.dtype))
    else:
        rows = [ring.select(dim, index) for ring in rings]
        torch._foreach_copy_(rows, [x.view(row.shape) for row, x in zip(rows, parts, strict=True)])


def _products(state: State, g: Tensor) -> Tensor:
    """Return the product of each gradient of the history with ``g``, in the Gram matrix's dtype."""
    history, gram = _rows(state), state["gram"]
    if _has_kernel(history, gram):
        return native.CPU.history_dot(history, g.contiguous())
    parts = g.split(_columns(state, gram.dtype), dim=-1)
    blocks = zip(_widened(state, gram.dtype), parts, strict=True)
    rows = [(h @ part.to(gram.dtype).unsqueeze(-1)).squeeze(-1) for h, part in blocks]
    return functools.reduce(torch.add, rows)


def _combination(state: State, weights: Tensor) -> Tensor:
    """Return ``Hᵀ w``."""
    history = _rows(state)
    if _has_kernel(history, weights):
        return native.CPU.history_combine(history, weights)
    parts = [h.mT @ weights.unsqueeze(-1) for h in _widened(state, weights.dtype)]
    return torch.cat(parts, dim=-2) if len(parts) > 1 else parts[0]


def _rows(state: State) -> Tensor:
    """Return the history as a matrix ``[..., s, k]``."""
    return state["history"].flatten(state["gram"].ndim - 1)


def _has_kernel(history: Tensor, other: Tensor) -> bool:
    """Return whether the CPU kernels take the history; all threads read it, in BLAS only one."""
    plain = history.device.type == "cpu" and history.ndim == 2 and history.is_contiguous()
    floats = history.dtype in (torch.float32, torch.bfloat16) and other.dtype == torch.float32
    return plain and floats and dispatch.backend("cpu") is not None


def _widened(state: State, dtype: torch.dtype) -> Iterator[Tensor]:
    """Yield the history ``[..., s, k]`` in ``dtype``, by columns where that takes a copy."""
    scale = state.get("history_scale")
    width, row = state["history"].shape[-1], 0
    for block in _rows(state).split(_columns(state, dtype), dim=-1):
        block = block.to(dtype)
        if scale is not None:
            block = block.unflatten(-1, (-1, width))
            scales = scale.narrow(-2, row, block.shape[-2])
            row += block.shape[-2]
            block = (block * scales).flatten(-2)
        yield block


def _columns(state: State, dtype: torch.dtype) -> int:
    """Return how many columns of the history are widened at a time: of codes, whole rows."""
    history = _rows(state)
    if history.dtype == dtype:
        return max(1, history.shape[-1])
    width = state["history"].shape[-1] if "history_scale" in state else 1
    return width * max(1, _COLUMNS // max(1, width))


def _solve_unit(gram: Tensor, index: int, damping: float, relative: bool) -> Tensor:
    if gram.ndim == 2 and gram.device.type == "cpu":
        one = _solve_one(gram, index, damping, relative, 100 * torch.finfo(gram.dtype).eps)
        if one is not None:
            return one
    unit = torch.zeros(*gram.shape[:-1], dtype=torch.bool, device=gram.device)
    unit[..., index] = True
    for good, weights in _solutions(gram, unit, damping, relative):
        if not int((~good).sum()):  # a count: of shapes alone, which have no values, it is zero
            return weights
    raise RuntimeError(
        f"the Fisher matrix is not positive definite with damping={damping:g}; raise the damping"
    )


def _solve_on_device(gram: Tensor, unit: Tensor, damping: float, relative: bool) -> Tensor:
    """Solve without a read by the host: the first good solution of each matrix, else NaN."""
    solved = torch.full_like(gram[..., 0], math.nan, dtype=torch.float64)
    for good, weights in reversed([*_solutions(gram, unit, damping, relative)]):
        solved = torch.where(good.unsqueeze(-1), weights, solved)
    return solved


def _solutions(
    gram: Tensor, unit: Tensor, damping: float, relative: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield, for a jitter after the other, which matrices are solved, and the solutions."""
    precision = 100 * torch.finfo(gram.dtype).eps
    eye = torch.eye(gram.shape[-1], dtype=torch.float64, device=gram.device)
    finite = gram.sum((-2, -1), dtype=torch.float64).isfinite()
    gram = torch.where(finite[..., None, None], gram.double(), eye)
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    filled = (diagonal > 0).sum(-1).clamp_min(1)
    mean = diagonal.sum(-1) / filled
    ridge = damping * mean if relative else torch.full_like(mean, damping)
    # An all-zero gradient has no scale to damp relative to; any ridge gives zero then.
    ridge = least = torch.where(mean > 0, ridge, ridge.clamp_min(1.0))
    column = unit.to(gram.dtype).unsqueeze(-1)
    good: Tensor | None = None
    for jitter in _JITTERS:
        if good is not None:  # more for those alone that have not succeeded
            ridge = torch.where(good, ridge, least + jitter * mean)
        factor, info = torch.linalg.cholesky_ex(gram + ridge[..., None, None] * eye)
        # A pivot below the rounding of its row is noise, and would be divided by.
        pivots = factor.diagonal(dim1=-2, dim2=-1).square()
        good = (info == 0) & (pivots > precision * diagonal).all(-1)
        # Not `cholesky_solve`: on a GPU it allocates, which a CUDA graph cannot hold.
        half = torch.linalg.solve_triangular(factor, column, upper=False)
        weights = torch.linalg.solve_triangular(factor.mT, half, upper=True).squeeze(-1)
        if relative:
            weights = weights * ((1 + damping) * mean).unsqueeze(-1)
        # As in torch, NaN and infinity propagate into the weights that they touch.
        yield good, torch.where(finite.unsqueeze(-1), weights, torch.nan)


def _solve_one(
    gram: Tensor, index: int, damping: float, relative: bool, precision: float
) -> Tensor | None:
    """Solve for one matrix without jitter, in a tenth of the time; return None if that fails."""
    damped = gram.double()
    diagonal = damped.diagonal().tolist()
    mean = sum(diagonal) / max(1, sum(d > 0 for d in diagonal))
    if not 0 < mean < math.inf:
        return None
    damped = damped.clone() if damped is gram else damped
    damped.diagonal().add_(damping * mean if relative else damping)
    factor, info = torch.linalg.cholesky_ex(damped)
    pivots = factor.diagonal().tolist()
    if info.item() or any(not p * p > precision * d for p, d in zip(pivots, diagonal, strict=True)):
        return None
    unit = torch.zeros(len(diagonal), 1, dtype=torch.float64, device="cpu")
    unit[index] = (1 + damping) * mean if relative else 1.0
    return torch.cholesky_solve(unit, factor).squeeze(-1)


def rotate_history(state: State, rotation: Any, shards: Shards = UNSHARDED, over: str = "") -> None:
    """Rotate the history into a new subspace and recompute its Gram matrix."""
    history, dim = state["history"], state["gram"].ndim - 2
    if "history_scale" in state:  # one gradient after the other: widened, all take four times it
        for j in range(history.shape[dim]):
            codes, scale = (state[key].select(dim, j) for key in ("history", "history_scale"))
            new = quantized(rotation(codes.to(state["gram"].dtype) * scale), shards, over)
            codes.copy_(new[0])
            scale.copy_(new[1])
    else:
        if history.ndim > 3:  # a stack of matrices: [n, s, a, b], its rotations [n, a', a]
            rotation = type(rotation)(
                *(None if r is None else r.unsqueeze(-3) for r in (rotation.left, rotation.right))
            )
        history.copy_(rotation(history))
    gram = state["gram"]
    gram.zero_()
    for h in _widened(state, gram.dtype):
        gram += h @ h.mT
    shards.sum_([gram], over)
    # Not every BLAS gives a symmetric product to the bit, and a later update writes row and column.
    gram.copy_((gram + gram.mT) / 2)
