# mypy: disallow-untyped-defs=False
"""SinkGD's step: ``oz_cpu_sinkhorn`` of csrc/include/optimzoo.h.

The normalised matrix diag(r) G diag(c) is never written. A pass reads the gradient once: it makes
the scales r of its rows anew and, while the rows are in registers, adds their squares to sums by
column, one for each chunk of rows. From these, added up in their order and without atomics, another
launch makes c anew. Rows of more than 16,384 columns are read twice a pass, then from a cache.
"""

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from optimzoo.kernels.dispatch import ROWS
from optimzoo.kernels.native import Rate
from optimzoo.kernels.triton import table as T
from optimzoo.kernels.triton.element import (
    gradient_scale,
    read,
    rounding_key,
    stepped,
    write_param,
)
from optimzoo.kernels.triton.launch import (
    UNSPECIALIZED,
    Plan,
    Tile,
    ceil_div,
    pow2,
    scalars,
    written,
)
from optimzoo.kernels.triton.reduce import column_totals, end_tile
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

_CHUNK = 64  # rows of a partial sum of columns


@triton.jit
def _divisor(squares, n):
    """Return the root of the mean of n squares, or the least normal number; NaN stays NaN."""
    rms = tl.sqrt(squares / n)
    return tl.where(rms < 1.1754943508222875e-38, 1.1754943508222875e-38, rms)


@triton.jit
def _rescaled(scale, divisor):
    """Return the scale of a row or column; one of zeros keeps a finite one, so it stays zero."""
    quotient = scale / divisor
    quotient = tl.where(quotient > 3.4028234663852886e38, 3.4028234663852886e38, quotient)
    return tl.where(quotient < -3.4028234663852886e38, -3.4028234663852886e38, quotient)


@triton.jit
def _columns(scales, col, cols, FIRST: tl.constexpr, C: tl.constexpr):
    """Return the scales of columns, which are one at FIRST."""
    if FIRST:
        c = tl.full([C], 1.0, tl.float32)
    else:
        c = tl.load(scales + col, mask=col < cols, other=1.0)
    return c


@triton.jit
def _scaled(grad, row, col, r, c, rows, cols):
    """Return elements of diag(r) G diag(c)."""
    at, inside = tile(row, col, rows, cols)
    return read(grad + at, inside) * r[:, None] * c[None, :]  # r is in the inverse unit of G


@triton.jit
def _normalized_rows(
    grad, scales, row, r, rows, cols, FIRST: tl.constexpr, R: tl.constexpr, C: tl.constexpr
):
    """Return the scales of rows anew, C columns at a time."""
    squares = tl.zeros([R, C], tl.float32)
    for left in range(0, cols, C):
        col = left + tl.arange(0, C)
        x = _scaled(grad, row, col, r, _columns(scales, col, cols, FIRST, C), rows, cols)
        squares += x * x
    return _rescaled(r, _divisor(tl.sum(squares, 1), cols.to(tl.float32)))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _pass(
    table,
    count,
    sign,
    grad_scale,
    found_inf,
    FIRST: tl.constexpr,
    NORMALIZE: tl.constexpr,
    G: tl.constexpr,
    ALIGNED: tl.constexpr,
    SEARCH: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    LOOP: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Normalise CHUNK rows, if NORMALIZE, and sum their squares by column."""
    mine = owner(table, count, SEARCH)
    grad = pointer(mine, count, T.GRAD, G, ALIGNED)
    scales = pointer(mine, count, T.EXTRA, tl.float32, False)
    rows = height(mine, count, found_inf)
    cols = width(mine, count, ALIGNED)
    chunk = unit(mine, count)
    out = pointer(mine, count, T.EXP_AVG_SQ, tl.float32, False) + chunk * cols
    begin = chunk * CHUNK
    col = tl.arange(0, C)
    sums = tl.zeros([R, C], tl.float32)
    if not LOOP:
        c = _columns(scales, col, cols, FIRST, C)
    for start in range(begin, tl.minimum(begin + CHUNK, rows), R):
        row = start + tl.arange(0, R)
        if FIRST:
            r = tl.zeros([R], tl.float32) + gradient_scale(sign, grad_scale)
        else:
            r = tl.load(scales + cols + row, mask=row < rows, other=1.0)
        if LOOP:
            if NORMALIZE:
                r = _normalized_rows(grad, scales, row, r, rows, cols, FIRST, R, C)
            for left in range(0, cols, C):
                part = _columns(scales, left + col, cols, FIRST, C)
                x = _scaled(grad, row, left + col, r, part, rows, cols)
                has_sum = (left + col < cols) & (start > begin)
                so_far = tl.load(out + left + col, mask=has_sum, other=0.0)
                tl.debug_barrier()  # several threads may read a sum that one of them writes
                tl.store(out + left + col, so_far + tl.sum(x * x, 0), mask=left + col < cols)
            tl.debug_barrier()
        else:
            x = _scaled(grad, row, col, r, c, rows, cols)
            if NORMALIZE:
                divisor = _divisor(tl.sum(x * x, 1), cols.to(tl.float32))
                r = _rescaled(r, divisor)
                x = x / divisor[:, None]
            sums += x * x
        tl.store(scales + cols + row, r, mask=row < rows)
    if not LOOP:
        tl.store(out + col, tl.sum(sums, 0), mask=col < cols)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _column_scales(
    table,
    count,
    found_inf,
    FIRST: tl.constexpr,
    SEARCH: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """Make the scales of columns anew from the sums of the chunks, which are the matrix."""
    mine = owner(table, count, SEARCH)
    scales = pointer(mine, count, T.EXTRA, tl.float32, False)
    col = unit(mine, count) * C + tl.arange(0, C)
    total, inside = column_totals(mine, count, col, found_inf, R, C)
    c = _columns(scales, col, width(mine, count, False), FIRST, C)
    tl.debug_barrier()  # several warps may read a scale that one of them writes
    divisor = _divisor(total, number(mine, count, T.LENGTH).to(tl.float32))
    tl.store(scales + col, _rescaled(c, divisor), mask=inside)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _step(
    table,
    count,
    found_inf,
    seed_low,
    seed_high,
    step_low,
    step_high,
    first_index,
    STOCHASTIC: tl.constexpr,
    NORMALIZE: tl.constexpr,
    P: tl.constexpr,
    G: tl.constexpr,
    ALIGNED: tl.constexpr,
    HUGE: tl.constexpr,
    SEARCH: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    LOOP: tl.constexpr,
):
    """Step along the scaled rows, normalised once more if NORMALIZE."""
    mine = owner(table, count, SEARCH)
    param = pointer(mine, count, T.PARAM, P, ALIGNED)
    grad = pointer(mine, count, T.GRAD, G, ALIGNED)
    scales = pointer(mine, count, T.EXTRA, tl.float32, False)
    rows = height(mine, count, found_inf)
    cols = width(mine, count, ALIGNED)
    key = rounding_key(mine, count, first_index, step_low, step_high, seed_low, seed_high)
    lr, weight_decay = rates_of(mine, count)
    row = unit(mine, count) * R + tl.arange(0, R)
    r = tl.load(scales + cols + row, mask=row < rows, other=1.0)
    if LOOP and NORMALIZE:
        r = _normalized_rows(grad, scales, row, r, rows, cols, False, R, C)
    for left in range(0, cols, C):
        col = left + tl.arange(0, C)
        at, inside = tile(row, col, rows, cols)
        p = read(param + at, inside)
        x = _scaled(grad, row, col, r, _columns(scales, col, cols, False, C), rows, cols)
        if NORMALIZE and not LOOP:
            x = x / _divisor(tl.sum(x * x, 1), cols.to(tl.float32))[:, None]
        p = stepped(p, x, lr, weight_decay)
        write_param(param + at, p, inside, at, key, P, STOCHASTIC, HUGE)


def sinkhorn_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    kinds: Sequence[int],
    shapes: Sequence[tuple[int, int]],
    *,
    lr: Rate | list[Rate],
    weight_decay: float | list[float],
    iterations: int,
    maximize: bool = False,
    **shared: Any,
) -> None:
    """Take SinkGD's step, by ``kinds`` with rows or columns first; ``shared`` as in `scalars`."""
    if not params:
        return
    plan = Plan(grads)
    columns = enumerate(zip(params, grads, shapes, strict=True))
    records = [
        Record(p, g, None, None, None, None, None, rows, cols, i)
        for i, (p, g, (rows, cols)) in columns
        if rows and cols
    ]
    chunks = [ceil_div(r.rows, _CHUNK) for r in records]
    sums = plan.scratch([n * r.cols for n, r in zip(chunks, records, strict=True)])
    scales = plan.scratch([r.cols + r.rows for r in records])
    records = [
        r._replace(exp_avg_sq=parts, extra=extra, length=r.rows)
        for r, parts, extra in zip(records, sums, scales, strict=True)
    ]
    read_only = [r._replace(param=None) for r in records]
    ends = [r._replace(rows=n) for r, n in zip(read_only, chunks, strict=True)]
    for normalize in (True, False):  # columns come first where rows do not
        first = [r for r in read_only if (kinds[r.order] == ROWS) == normalize]
        plan.add(_pass, first, _pass_tile, FIRST=True, NORMALIZE=normalize)
    plan.add(_column_scales, ends, end_tile, FIRST=True)
    with plan.repeated(iterations - 1):
        plan.add(_pass, read_only, _pass_tile, FIRST=False, NORMALIZE=True)
        plan.add(_column_scales, ends, end_tile, FIRST=False)
    for normalize in (True, False):
        last = [r for r in records if (kinds[r.order] == ROWS) != normalize]
        plan.add(_step, last, _step_tile, NORMALIZE=normalize)
    gradient, rounding = scalars(maximize=maximize, **shared)
    plan.run(lr, weight_decay, **gradient, **rounding)
    written(params)


def _step_tile(record: Record) -> Tile:
    """Tile whole rows, or parts of long ones, by 16 elements a thread: three numbers of each."""
    width = pow2(record.cols)
    loop = width > 16384
    width = 4096 if loop else width
    height = min(_CHUNK, max(1, 4096 // width))
    constants = (("R", height), ("C", width), ("LOOP", int(loop)))
    return Tile(constants, max(4, height * width // 512), ceil_div(record.rows, height))


def _pass_tile(record: Record) -> Tile:
    constants, warps, _ = _step_tile(record)
    return Tile((*constants, ("CHUNK", _CHUNK)), warps, ceil_div(record.rows, _CHUNK))
