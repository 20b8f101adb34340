# mypy: disallow-untyped-defs=False
"""Steps along gradients that are scaled by row, by column or as a whole: ``oz_*_apply``."""

from collections.abc import Iterable, Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from optimzoo.kernels.dispatch import COLUMNS, ROWS
from optimzoo.kernels.table import Rate
from optimzoo.kernels.triton import table as T
from optimzoo.kernels.triton.element import gradient_scale, read, rounding_key, write_param
from optimzoo.kernels.triton.launch import (
    UNSPECIALIZED,
    block_tile,
    launch,
    rates_table,
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
    rates,
    sign,
    grad_scale,
    found_inf,
    seed_low,
    seed_high,
    step_low,
    step_high,
    first_index,
    STOCHASTIC: tl.constexpr,
    KIND: tl.constexpr,
    P: tl.constexpr,
    G: tl.constexpr,
    M: tl.constexpr,
    ALIGNED: tl.constexpr,
    HUGE: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    mine = owner(table, count)
    param = pointer(mine, count, T.PARAM, P, ALIGNED)
    grad = pointer(mine, count, T.GRAD, G, ALIGNED)
    scales = pointer(mine, count, T.EXTRA, tl.float32, False)
    rows = height(mine, count, found_inf)
    cols = width(mine, count, ALIGNED)
    key = rounding_key(
        number(mine, count, T.INDEX), first_index, step_low, step_high, seed_low, seed_high
    )
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
    g = read(grad + at, inside) * gradient_scale(sign, grad_scale)
    p = read(param + at, inside)
    lr, weight_decay = rates_of(rates, mine, count)
    p -= lr * (by * g + weight_decay * p)
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
    rates = rates_table(lr, weight_decay, len(params), params[0].device)
    columns = zip(params, grads, scales, shapes, strict=True)
    records = [
        Record(p, g, None, None, None, None, s, *shape, i)
        for i, (p, g, s, shape) in enumerate(columns)
    ]
    apply_records(records, kinds, rates=rates, **gradient, **rounding)
    written(params)


def apply_records(records: Iterable[Record], kinds: Sequence[int], **arguments: Any) -> None:
    """Launch the kernel once for each kind of scale."""
    by_kind: dict[int, list[Record]] = {}
    for record, kind in zip(records, kinds, strict=True):
        by_kind.setdefault(kind, []).append(record)
    for kind, chosen in by_kind.items():
        launch(_apply, chosen, block_tile, KIND=kind, **arguments)
