# mypy: disallow-untyped-defs=False
"""SWAN's row normalisation, rows less their mean over their deviation: ``oz_*_center``."""

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from optimzoo.kernels.triton import table as T
from optimzoo.kernels.triton.element import (
    gradient_scale,
    inverse_length,
    read,
    rounding_key,
    write_param,
)
from optimzoo.kernels.triton.launch import UNSPECIALIZED, Plan, row_tile, scalars, written
from optimzoo.kernels.triton.table import Record, height, owner, pointer, tile, unit, width


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _center(
    table,
    count,
    eps,
    sign,
    grad_scale,
    found_inf,
    seed_low,
    seed_high,
    step_low,
    step_high,
    first_index,
    STOCHASTIC: tl.constexpr,
    P: tl.constexpr,
    G: tl.constexpr,
    ALIGNED: tl.constexpr,
    HUGE: tl.constexpr,
    SEARCH: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    LOOP: tl.constexpr,
):
    mine = owner(table, count, SEARCH)
    out = pointer(mine, count, T.PARAM, P, ALIGNED)
    grad = pointer(mine, count, T.GRAD, G, ALIGNED)
    rows = height(mine, count, found_inf)
    cols = width(mine, count, ALIGNED)
    key = rounding_key(mine, count, first_index, step_low, step_high, seed_low, seed_high)
    factor = gradient_scale(sign, grad_scale)
    n = cols.to(tl.float32)
    row = unit(mine, count) * R + tl.arange(0, R)
    if LOOP:
        sums = tl.zeros([R, C], tl.float32)
        for start in range(0, cols, C):
            at, inside = tile(row, start + tl.arange(0, C), rows, cols)
            sums += read(grad + at, inside) * factor
        mean = (tl.sum(sums, 1) / n)[:, None]
        squares = tl.zeros([R, C], tl.float32)
        for start in range(0, cols, C):
            at, inside = tile(row, start + tl.arange(0, C), rows, cols)
            g = tl.where(inside, read(grad + at, inside) * factor - mean, 0.0)
            squares += g * g
        by = inverse_length(tl.sum(squares, 1), n, eps, False)[:, None]
        for start in range(0, cols, C):
            at, inside = tile(row, start + tl.arange(0, C), rows, cols)
            g = (read(grad + at, inside) * factor - mean) * by
            write_param(out + at, g, inside, at, key, P, STOCHASTIC, HUGE)
    else:
        at, inside = tile(row, tl.arange(0, C), rows, cols)
        g = read(grad + at, inside) * factor
        g = tl.where(inside, g - (tl.sum(g, 1) / n)[:, None], 0.0)
        g *= inverse_length(tl.sum(g * g, 1), n, eps, False)[:, None]
        write_param(out + at, g, inside, at, key, P, STOCHASTIC, HUGE)


def center_(
    outs: Sequence[Tensor],
    grads: Sequence[Tensor],
    shapes: Sequence[tuple[int, int]],
    *,
    eps: float,
    maximize: bool = False,
    **shared: Any,
) -> None:
    """Write centred and scaled rows to ``outs``; ``shared`` as in :func:`launch.scalars`."""
    if not outs:
        return
    gradient, rounding = scalars(maximize=maximize, **shared)
    records = [
        Record(out, g, None, None, None, None, None, *shape, i)
        for i, (out, g, shape) in enumerate(zip(outs, grads, shapes, strict=True))
    ]
    plan = Plan(grads)
    plan.add(_center, records, row_tile)
    plan.run(eps=float(eps), **gradient, **rounding)
    written(outs)
