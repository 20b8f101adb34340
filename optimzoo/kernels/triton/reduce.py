# mypy: disallow-untyped-defs=False
"""Sums of squares by row, by column and over a clipped tensor: ``oz_*_reduce``.

Each sum is over fixed parts in a fixed order, without atomics: equal inputs give equal bits.
"""

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from optimzoo.kernels.dispatch import COLUMNS, ROWS, SIGN
from optimzoo.kernels.triton import table as T
from optimzoo.kernels.triton.element import (
    clipped,
    direction,
    gradient_scale,
    inverse_length,
    read,
)
from optimzoo.kernels.triton.launch import (
    UNSPECIALIZED,
    Plan,
    Tile,
    ceil_div,
    pow2,
    row_tile,
    scalars,
)
from optimzoo.kernels.triton.table import Record, height, number, owner, pointer, tile, unit, width

_CHUNK = 256  # rows of a partial sum of columns
_SPAN = 1 << 15  # elements of a partial sum of a tensor


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _rows(
    table,
    count,
    sign,
    grad_scale,
    found_inf,
    G: tl.constexpr,
    ALIGNED: tl.constexpr,
    SEARCH: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    mine = owner(table, count, SEARCH)
    grad = pointer(mine, count, T.GRAD, G, ALIGNED)
    out = pointer(mine, count, T.EXTRA, tl.float32, False)
    rows = height(mine, count, found_inf)
    cols = width(mine, count, ALIGNED)
    factor = gradient_scale(sign, grad_scale)
    row = unit(mine, count) * R + tl.arange(0, R)
    squares = tl.zeros([R, C], tl.float32)
    for start in range(0, cols, C):
        at, inside = tile(row, start + tl.arange(0, C), rows, cols)
        g = read(grad + at, inside) * factor
        squares += g * g
    tl.store(out + row, tl.sum(squares, 1), mask=row < rows)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _column_parts(
    table,
    count,
    one_minus_beta,
    sign,
    grad_scale,
    found_inf,
    NESTEROV: tl.constexpr,
    G: tl.constexpr,
    M: tl.constexpr,
    ALIGNED: tl.constexpr,
    SEARCH: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Sum squares of CHUNK rows by column; of momentum, once it has averaged the gradient in."""
    mine = owner(table, count, SEARCH)
    grad = pointer(mine, count, T.GRAD, G, ALIGNED)
    exp_avg = pointer(mine, count, T.EXP_AVG, M, ALIGNED)
    out = pointer(mine, count, T.EXP_AVG_SQ, tl.float32, False)
    rows = height(mine, count, found_inf)
    cols = width(mine, count, ALIGNED)
    factor = gradient_scale(sign, grad_scale)
    part = unit(mine, count)
    across = tl.cdiv(cols, C)
    chunk = part // across
    col = (part % across) * C + tl.arange(0, C)
    squares = tl.zeros([R, C], tl.float32)
    begin = chunk * CHUNK
    for start in range(begin, tl.minimum(begin + CHUNK, rows), R):
        row = start + tl.arange(0, R)
        at, inside = tile(row, col, rows, cols)
        g = direction(grad, exp_avg, at, inside, factor, one_minus_beta, M, NESTEROV, C < 8)
        squares += g * g
    tl.store(out + chunk * cols + col, tl.sum(squares, 0), mask=col < cols)


@triton.jit
def column_totals(mine, count, col, found_inf, R: tl.constexpr, C: tl.constexpr):
    """Return sums by column of the parts, which are the matrix, and which columns there are."""
    parts = pointer(mine, count, T.EXP_AVG_SQ, tl.float32, False)
    rows = height(mine, count, found_inf)
    cols = width(mine, count, False)
    sums = tl.zeros([R, C], tl.float32)
    for start in range(0, rows, R):
        at, inside = tile(start + tl.arange(0, R), col, rows, cols)
        sums += read(parts + at, inside)
    return tl.sum(sums, 0), col < tl.where(rows > 0, cols, 0)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _column_ends(
    table,
    count,
    eps,
    found_inf,
    INVERT: tl.constexpr,
    L2: tl.constexpr,
    SEARCH: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """Sum the parts, which are the matrix; INVERT: write the inverse of SCALE's divisor."""
    mine = owner(table, count, SEARCH)
    out = pointer(mine, count, T.EXTRA, tl.float32, False)
    col = unit(mine, count) * C + tl.arange(0, C)
    total, inside = column_totals(mine, count, col, found_inf, R, C)
    if INVERT:
        total = inverse_length(total, number(mine, count, T.LENGTH).to(tl.float32), eps, L2)
    tl.store(out + col, total, mask=inside)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _clipped_parts(
    table,
    count,
    sign,
    grad_scale,
    G: tl.constexpr,
    ALIGNED: tl.constexpr,
    SEARCH: tl.constexpr,
    C: tl.constexpr,
    SPAN: tl.constexpr,
):
    """Reduce SPAN elements to their largest magnitude and the sum of squares once clipped."""
    mine = owner(table, count, SEARCH)
    grad = pointer(mine, count, T.GRAD, G, ALIGNED)
    extra = pointer(mine, count, T.EXTRA, tl.float32, False)
    parts = pointer(mine, count, T.EXP_AVG_SQ, tl.float32, False)
    n = width(mine, count, ALIGNED)
    factor = gradient_scale(sign, grad_scale)
    bound = tl.load(extra + 2)
    ratio = tl.load(extra + 3)
    part = unit(mine, count)
    squares = tl.zeros([C], tl.float32)
    most = tl.zeros([C], tl.int32)
    for start in range(part * SPAN, tl.minimum((part + 1) * SPAN, n), C):
        at = start + tl.arange(0, C)
        x = tl.abs(read(grad + at, at < n) * factor)
        # The bits of sizes are in the order of the sizes, and those of a NaN above all others.
        most = tl.maximum(most, x.to(tl.int32, bitcast=True))
        x = clipped(x, bound, ratio)
        squares += x * x
    tl.store(parts + 2 * part, tl.max(most, 0).to(tl.float32, bitcast=True))
    tl.store(parts + 2 * part + 1, tl.sum(squares, 0))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _clipped_ends(
    table,
    count,
    found_inf,
    SEARCH: tl.constexpr,
    C: tl.constexpr,
):
    """Reduce the parts, `rows` pairs of a largest magnitude and a sum, to one pair."""
    mine = owner(table, count, SEARCH)
    parts = pointer(mine, count, T.EXP_AVG_SQ, tl.float32, False)
    out = pointer(mine, count, T.EXTRA, tl.float32, False)
    rows = height(mine, count, found_inf)
    squares = tl.zeros([C], tl.float32)
    most = tl.zeros([C], tl.int32)
    for start in range(0, rows, C):
        at = start + tl.arange(0, C)
        most = tl.maximum(most, read(parts + 2 * at, at < rows).to(tl.int32, bitcast=True))
        squares += read(parts + 2 * at + 1, at < rows)
    tl.store(out, tl.max(most, 0).to(tl.float32, bitcast=True), mask=rows > 0)
    tl.store(out + 1, tl.sum(squares, 0), mask=rows > 0)


def reduce_(
    grads: Sequence[Tensor],
    outs: Sequence[Tensor],
    kinds: Sequence[int],
    shapes: Sequence[tuple[int, int]],
    *,
    maximize: bool = False,
    **shared: Any,
) -> None:
    """Write sums to ``outs`` by each tensor's kind; ``shared`` as in :func:`launch.scalars`."""
    if not grads:
        return
    gradient, _ = scalars(maximize=maximize, **shared)
    records: dict[int, list[Record]] = {ROWS: [], COLUMNS: [], SIGN: []}
    columns = zip(grads, outs, kinds, shapes, strict=True)
    for i, (g, out, kind, (rows, cols)) in enumerate(columns):
        if kind == SIGN:
            rows, cols = 1, rows * cols
        records[kind].append(Record(None, g, None, None, None, None, out, rows, cols, i))
    plan = Plan(grads)
    plan.add(_rows, records[ROWS], row_tile)
    add_column_sums(plan, records[COLUMNS], INVERT=False)
    whole = [r for r in records[SIGN] if r.cols]
    parts = [ceil_div(r.cols, _SPAN) for r in whole]
    scratch = plan.scratch([2 * n for n in parts])
    whole = [r._replace(exp_avg_sq=s) for r, s in zip(whole, scratch, strict=True)]
    plan.add(_clipped_parts, whole, _span_tile)
    ended = [r._replace(rows=n, cols=1) for r, n in zip(whole, parts, strict=True)]
    plan.add(_clipped_ends, ended, _last_tile)
    plan.run(one_minus_beta=0.0, NESTEROV=False, eps=0.0, L2=True, **gradient)


def add_column_sums(plan: Plan, records: Sequence[Record], *, INVERT: bool) -> None:
    """Add sums by column of squared gradients, or of updated momenta, into ``extra``."""
    records = [r for r in records if r.rows and r.cols]
    chunks = [ceil_div(r.rows, _CHUNK) for r in records]
    scratch = plan.scratch([n * r.cols for n, r in zip(chunks, records, strict=True)])
    begun = [r._replace(param=None, exp_avg_sq=s) for r, s in zip(records, scratch, strict=True)]
    plan.add(_column_parts, begun, _part_tile)
    ended = [
        r._replace(exp_avg=None, rows=n, length=r.rows) for r, n in zip(begun, chunks, strict=True)
    ]
    plan.add(_column_ends, ended, end_tile, INVERT=INVERT)


def _part_tile(record: Record) -> Tile:
    width = min(pow2(record.cols), 128)
    height = 16 if record.exp_avg is not None else 32
    constants = (("R", height), ("C", width), ("CHUNK", _CHUNK))
    return Tile(constants, 4, ceil_div(record.rows, _CHUNK) * ceil_div(record.cols, width))


def end_tile(record: Record) -> Tile:
    """Tile the columns of partial sums."""
    return Tile((("R", 64), ("C", 32)), 4, ceil_div(record.cols, 32))


def _span_tile(record: Record) -> Tile:
    return Tile((("C", 2048), ("SPAN", _SPAN)), 4, ceil_div(record.cols, _SPAN))


def _last_tile(record: Record) -> Tile:
    return Tile((("C", 1024),), 4, 1)
