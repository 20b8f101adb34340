# mypy: disallow-untyped-defs=False
"""Steps along gradients that are scaled by row, by column or as a whole: ``oz_*_apply``."""

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from optimzoo.kernels.dispatch import COLUMNS, ROWS
from optimzoo.kernels.native import Rate
from optimzoo.kernels.triton import table as T
from optimzoo.kernels.triton.element import (
    direction_again,
    gradient_scale,
    read,
    rounding_key,
    stepped,
    write_param,
)
from optimzoo.kernels.triton.launch import (
    UNSPECIALIZED,
    Plan,
    block_tile,
    scalars,
    written,
)
from optimzoo.kernels.triton.table import (
    Record,
    height,
    number,
    owner,
    pointer,
    rates_of,
    tile,
    unit,
    width,
)

_BY_ROW = tl.constexpr(ROWS)
_BY_COLUMN = tl.constexpr(COLUMNS)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _apply(
    table,
    count,
    one_minus_beta,
    sign,
    grad_scale,
    found_inf,
    seed_low,
    seed_high,
    step_low,
    step_high,
    first_index,
    STOCHASTIC: tl.constexpr,
    NESTEROV: tl.constexpr,
    KIND: tl.constexpr,
    P: tl.constexpr,
    G: tl.constexpr,
    M: tl.constexpr,
    ALIGNED: tl.constexpr,
    HUGE: tl.constexpr,
    SEARCH: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    mine = owner(table, count, SEARCH)
    param = pointer(mine, count, T.PARAM, P, ALIGNED)
    grad = pointer(mine, count, T.GRAD, G, ALIGNED)
    exp_avg = pointer(mine, count, T.EXP_AVG, M, ALIGNED)
    scales = pointer(mine, count, T.EXTRA, tl.float32, False)
    rows = height(mine, count, found_inf)
    cols = width(mine, count, ALIGNED)
    key = rounding_key(mine, count, first_index, step_low, step_high, seed_low, seed_high)
    # From the end: the cache still holds what a pass before this one has read last.
    across = tl.cdiv(cols, C)
    part = tl.cdiv(number(mine, count, T.ROWS), R) * across - 1 - unit(mine, count)
    row = (part // across) * R + tl.arange(0, R)
    col = (part % across) * C + tl.arange(0, C)
    at, inside = tile(row, col, rows, cols)
    if KIND == _BY_ROW:
        by = tl.load(scales + row, mask=row < rows, other=0.0)[:, None]
    elif KIND == _BY_COLUMN:
        by = tl.load(scales + col, mask=col < cols, other=0.0)[None, :]
    else:
        by = tl.load(scales)
    factor = gradient_scale(sign, grad_scale)
    g = direction_again(grad, exp_avg, at, inside, factor, one_minus_beta, M, NESTEROV)
    p = read(param + at, inside)
    lr, weight_decay = rates_of(mine, count)
    p = stepped(p, by * g, lr, weight_decay)
    write_param(param + at, p, inside, at, key, P, STOCHASTIC, HUGE)


def apply_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    scales: Sequence[Tensor],
    kinds: Sequence[int],
    shapes: Sequence[tuple[int, int]],
    *,
    lr: Rate | list[Rate],
    weight_decay: float | list[float],
    maximize: bool = False,
    **shared: Any,
) -> None:
    """Step along ``scales * grads``; ``shared`` as in :func:`launch.scalars`."""
    if not params:
        return
    gradient, rounding = scalars(maximize=maximize, **shared)
    plan = Plan(grads)
    columns = zip(params, grads, scales, shapes, kinds, strict=True)
    by_kind: dict[int, list[Record]] = {}
    for i, (p, g, s, shape, kind) in enumerate(columns):
        record = Record(p, g, None, None, None, None, s, *shape, i)
        by_kind.setdefault(kind, []).append(record)
    for kind, records in by_kind.items():
        add_steps(plan, records, kind)
    plan.run(lr, weight_decay, one_minus_beta=0.0, NESTEROV=False, **gradient, **rounding)
    written(params)


def add_steps(plan: Plan, records: Sequence[Record], kind: int) -> None:
    """Add steps along what momenta, or where there is none gradients, give, by scales of a kind."""
    plan.add(_apply, records, block_tile, KIND=kind)
