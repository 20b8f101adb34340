# mypy: disallow-untyped-defs=False
"""SCALE's step: ``oz_*_scale`` of csrc/include/optimzoo.h.

Bytes moved for each element of 2 bytes, by kind: rows and signs 6 (the gradient and the weight are
read once and the weight written), with momentum 10; columns 8 in two passes, with momentum 12, and
float32 sums of 256 rows each between them, less than 1 %; Adam 14. A pass is one launch for all
tensors alike in types, alignment and tile: a Llama in bfloat16 takes seven, of which three are of
rows (the two widths of its hidden weights, and the head with its momentum), three of columns (sums,
their inverses, the step) and one of Adam.
"""

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from optimzoo.kernels.dispatch import ADAM, COLUMNS, ROWS, SIGN
from optimzoo.kernels.native import Rate
from optimzoo.kernels.triton import table as T
from optimzoo.kernels.triton.adam import add_vectors, numbers
from optimzoo.kernels.triton.apply import add_steps
from optimzoo.kernels.triton.element import (
    direction,
    direction_again,
    gradient_scale,
    inverse_length,
    read,
    rounding_key,
    stepped,
    write_param,
)
from optimzoo.kernels.triton.launch import (
    UNSPECIALIZED,
    Plan,
    flat_tile,
    row_tile,
    scalars,
    written,
)
from optimzoo.kernels.triton.reduce import add_column_sums
from optimzoo.kernels.triton.table import (
    Record,
    block,
    height,
    odd_rows,
    owner,
    pointer,
    rates_of,
    tile,
    unit,
    width,
)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _rows(
    table,
    count,
    one_minus_beta,
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
    NESTEROV: tl.constexpr,
    L2: tl.constexpr,
    P: tl.constexpr,
    G: tl.constexpr,
    M: tl.constexpr,
    ALIGNED: tl.constexpr,
    HUGE: tl.constexpr,
    SEARCH: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    LOOP: tl.constexpr,
):
    mine = owner(table, count, SEARCH)
    param = pointer(mine, count, T.PARAM, P, ALIGNED)
    grad = pointer(mine, count, T.GRAD, G, ALIGNED)
    exp_avg = pointer(mine, count, T.EXP_AVG, M, ALIGNED)
    rows = height(mine, count, found_inf)
    cols = width(mine, count, ALIGNED)
    key = rounding_key(mine, count, first_index, step_low, step_high, seed_low, seed_high)
    lr, weight_decay = rates_of(mine, count)
    factor = gradient_scale(sign, grad_scale)
    row = unit(mine, count) * R + tl.arange(0, R)
    if LOOP:
        squares = tl.zeros([R, C], tl.float32)
        for start in range(0, cols, C):
            at, inside = tile(row, start + tl.arange(0, C), rows, cols)
            g = direction(grad, exp_avg, at, inside, factor, one_minus_beta, M, NESTEROV, False)
            squares += g * g
        by = inverse_length(tl.sum(squares, 1), cols.to(tl.float32), eps, L2)[:, None]
        tl.debug_barrier()  # the momentum may be read by other threads than wrote it
        for start in range(0, cols, C):
            at, inside = tile(row, start + tl.arange(0, C), rows, cols)
            g = direction_again(grad, exp_avg, at, inside, factor, one_minus_beta, M, NESTEROV)
            p = read(param + at, inside)
            p = stepped(p, g * by, lr, weight_decay)
            write_param(param + at, p, inside, at, key, P, STOCHASTIC, HUGE)
    elif ALIGNED == T.FIRST_ROW:
        base, at, inside, edges, at_edge = odd_rows(row, rows, cols, C)
        param += base
        grad += base
        exp_avg += base
        g = direction(grad, exp_avg, at, inside, factor, one_minus_beta, M, NESTEROV, False)
        h = direction(grad, exp_avg, edges, at_edge, factor, one_minus_beta, M, NESTEROV, True)
        p = read(param + at, inside)
        q = read(param + edges, at_edge)
        squares = tl.sum(g * g, 1) + tl.sum(h * h, 1)
        by = inverse_length(squares, cols.to(tl.float32), eps, L2)[:, None]
        p = stepped(p, g * by, lr, weight_decay)
        q = stepped(q, h * by, lr, weight_decay)
        write_param(param + at, p, inside, base + at, key, P, STOCHASTIC, HUGE)
        write_param(param + edges, q, at_edge, base + edges, key, P, STOCHASTIC, HUGE)
    else:
        at, inside = tile(row, tl.arange(0, C), rows, cols)
        p = read(param + at, inside)
        g = direction(grad, exp_avg, at, inside, factor, one_minus_beta, M, NESTEROV, False)
        by = inverse_length(tl.sum(g * g, 1), cols.to(tl.float32), eps, L2)[:, None]
        p = stepped(p, g * by, lr, weight_decay)
        write_param(param + at, p, inside, at, key, P, STOCHASTIC, HUGE)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _signs(
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
    P: tl.constexpr,
    G: tl.constexpr,
    M: tl.constexpr,
    ALIGNED: tl.constexpr,
    HUGE: tl.constexpr,
    SEARCH: tl.constexpr,
    C: tl.constexpr,
):
    mine = owner(table, count, SEARCH)
    param = pointer(mine, count, T.PARAM, P, ALIGNED)
    grad = pointer(mine, count, T.GRAD, G, ALIGNED)
    exp_avg = pointer(mine, count, T.EXP_AVG, M, ALIGNED)
    at, inside = block(mine, count, found_inf, ALIGNED, C)
    key = rounding_key(mine, count, first_index, step_low, step_high, seed_low, seed_high)
    lr, weight_decay = rates_of(mine, count)
    g = direction(
        grad,
        exp_avg,
        at,
        inside,
        gradient_scale(sign, grad_scale),
        one_minus_beta,
        M,
        NESTEROV,
        False,
    )
    g = tl.where(g > 0, 1.0, tl.where(g < 0, -1.0, g))  # zero and NaN stay
    p = read(param + at, inside)
    p = stepped(p, g, lr, weight_decay)
    write_param(param + at, p, inside, at, key, P, STOCHASTIC, HUGE)


class Table:
    """Plan of calls that differ in gradients, counts and rates alone, made by the first of them."""

    def __init__(self) -> None:
        self.plan: Plan | None = None


def scale_table(*_: Any) -> Table:
    """Return a table for calls of :func:`scale_` on these tensors."""
    return Table()


def scale_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor | None],
    exp_avg_sqs: Sequence[Tensor | None],
    steps: Sequence[Tensor | None],
    kinds: Sequence[int],
    shapes: Sequence[tuple[int, int]],
    *,
    lr: Rate | list[Rate],
    momentum: float,
    weight_decay: float | list[float],
    l2: bool,
    eps: float,
    betas: tuple[float, float],
    adam_eps: float,
    maximize: bool,
    nesterov: bool = False,
    table: Table | None = None,
    **shared: Any,
) -> None:
    """Take SCALE's step on each tensor by its kind; ``shared`` as in :func:`launch.scalars`."""
    if not params:
        return
    plan = table.plan if table is not None else None
    if plan is None or not plan.renew(grads, steps):
        plan = _plan(params, grads, exp_avgs, exp_avg_sqs, steps, kinds, shapes)
        if table is not None and not plan.captured:
            table.plan = plan
    gradient, rounding = scalars(maximize=maximize, **shared)
    rule = {"one_minus_beta": 1.0 - momentum, "NESTEROV": nesterov, "eps": float(eps), "L2": l2}
    rule |= numbers(betas=betas, eps=adam_eps)
    plan.run(lr, weight_decay, **rule, **gradient, **rounding)
    written(params, exp_avgs, exp_avg_sqs)


def _plan(*columns: Sequence[Any]) -> Plan:
    plan = Plan(columns[1], columns[4])
    records: dict[int, list[Record]] = {ROWS: [], COLUMNS: [], SIGN: [], ADAM: []}
    for i, (p, g, m, v, t, kind, (rows, cols)) in enumerate(zip(*columns, strict=True)):
        if kind in (SIGN, ADAM):
            rows, cols = 1, rows * cols
        records[kind].append(Record(p, g, m, v, None, t, None, rows, cols, i))
    plan.add(_rows, records[ROWS], row_tile)
    plan.add(_signs, records[SIGN], flat_tile)
    # Sums by column, which also update the momentum, and their inverses; then the step by these.
    factors = plan.scratch([r.cols for r in records[COLUMNS]])
    by_column = [r._replace(extra=f) for r, f in zip(records[COLUMNS], factors, strict=True)]
    add_column_sums(plan, by_column, INVERT=True)
    add_steps(plan, by_column, COLUMNS)
    add_vectors(plan, records[ADAM])
    return plan
