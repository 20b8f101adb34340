# mypy: disallow-untyped-defs=False
"""SCALE's step: ``oz_*_scale`` of csrc/include/optimzoo.h."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from optimzoo.kernels.dispatch import ADAM, COLUMNS, ROWS, SIGN
from optimzoo.kernels.table import Rate
from optimzoo.kernels.triton import table as T
from optimzoo.kernels.triton.adam import step_records
from optimzoo.kernels.triton.apply import apply_records
from optimzoo.kernels.triton.element import (
    direction,
    gradient_scale,
    inverse_length,
    read,
    rounding_key,
    write_param,
)
from optimzoo.kernels.triton.launch import (
    UNSPECIALIZED,
    flat_tile,
    launch,
    rates_table,
    row_tile,
    scalars,
    written,
)
from optimzoo.kernels.triton.reduce import column_sums
from optimzoo.kernels.triton.table import (
    Record,
    block,
    height,
    number,
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
    rates,
    rest,
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
    L2: tl.constexpr,
    P: tl.constexpr,
    G: tl.constexpr,
    M: tl.constexpr,
    ALIGNED: tl.constexpr,
    HUGE: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    LOOP: tl.constexpr,
):
    mine = owner(table, count)
    param = pointer(mine, count, T.PARAM, P, ALIGNED)
    grad = pointer(mine, count, T.GRAD, G, ALIGNED)
    exp_avg = pointer(mine, count, T.EXP_AVG, M, ALIGNED)
    rows = height(mine, count, found_inf)
    cols = width(mine, count, ALIGNED)
    key = rounding_key(
        number(mine, count, T.INDEX), first_index, step_low, step_high, seed_low, seed_high
    )
    lr, weight_decay = rates_of(rates, mine, count)
    factor = gradient_scale(sign, grad_scale)
    row = unit(mine, count) * R + tl.arange(0, R)
    if LOOP:
        squares = tl.zeros([R, C], tl.float32)
        for start in range(0, cols, C):
            at, inside = tile(row, start + tl.arange(0, C), rows, cols)
            g = direction(grad, exp_avg, at, inside, factor, rest, M)
            squares += g * g
        by = inverse_length(tl.sum(squares, 1), cols.to(tl.float32), eps, L2)[:, None]
        tl.debug_barrier()  # the momentum may be read by other threads than wrote it
        for start in range(0, cols, C):
            at, inside = tile(row, start + tl.arange(0, C), rows, cols)
            if M is None:
                g = read(grad + at, inside) * factor
            else:
                g = read(exp_avg + at, inside)
            p = read(param + at, inside)
            p -= lr * (g * by + weight_decay * p)
            write_param(param + at, p, inside, at, key, P, STOCHASTIC, HUGE)
    else:
        at, inside = tile(row, tl.arange(0, C), rows, cols)
        g = direction(grad, exp_avg, at, inside, factor, rest, M)
        p = read(param + at, inside)
        by = inverse_length(tl.sum(g * g, 1), cols.to(tl.float32), eps, L2)[:, None]
        p -= lr * (g * by + weight_decay * p)
        write_param(param + at, p, inside, at, key, P, STOCHASTIC, HUGE)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _signs(
    table,
    count,
    rates,
    rest,
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
    M: tl.constexpr,
    ALIGNED: tl.constexpr,
    HUGE: tl.constexpr,
    C: tl.constexpr,
):
    mine = owner(table, count)
    param = pointer(mine, count, T.PARAM, P, ALIGNED)
    grad = pointer(mine, count, T.GRAD, G, ALIGNED)
    exp_avg = pointer(mine, count, T.EXP_AVG, M, ALIGNED)
    at, inside = block(mine, count, found_inf, ALIGNED, C)
    key = rounding_key(
        number(mine, count, T.INDEX), first_index, step_low, step_high, seed_low, seed_high
    )
    lr, weight_decay = rates_of(rates, mine, count)
    g = direction(grad, exp_avg, at, inside, gradient_scale(sign, grad_scale), rest, M)
    g = tl.where(g > 0, 1.0, tl.where(g < 0, -1.0, g))  # zero and NaN stay
    p = read(param + at, inside)
    p -= lr * (g + weight_decay * p)
    write_param(param + at, p, inside, at, key, P, STOCHASTIC, HUGE)


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
    **shared: Any,
) -> None:
    """Take SCALE's step on each tensor by its kind; ``shared`` as in :func:`launch.scalars`."""
    if not params:
        return
    gradient, rounding = scalars(maximize=maximize, **shared)
    records: dict[int, list[Record]] = {ROWS: [], COLUMNS: [], SIGN: [], ADAM: []}
    columns = zip(params, grads, exp_avgs, exp_avg_sqs, steps, kinds, shapes, strict=True)
    for i, (p, g, m, v, t, kind, (rows, cols)) in enumerate(columns):
        if kind in (SIGN, ADAM):
            rows, cols = 1, rows * cols
        records[kind].append(Record(p, g, m, v, None, t, None, rows, cols, i))
    rates = rates_table(lr, weight_decay, len(params), params[0].device)
    common = {"rates": rates, **gradient, **rounding}
    own = {"rest": 1.0 - momentum, **common}
    launch(_rows, records[ROWS], row_tile, eps=eps, L2=l2, **own)
    launch(_signs, records[SIGN], flat_tile, **own)
    _step_columns(records[COLUMNS], own, eps=eps, L2=l2)
    step_records(records[ADAM], betas=betas, eps=adam_eps, eps_before=True, **common)
    written(params, exp_avgs, exp_avg_sqs)


def _step_columns(records: list[Record], own: dict[str, Any], *, eps: float, L2: bool) -> None:
    """Sum squares by column, which also updates the momentum; then step by their inverses."""
    if not records:
        return
    own = dict(own)
    rest = own.pop("rest")
    gradient = {name: own[name] for name in ("sign", "grad_scale", "found_inf")}
    widths = [-(-r.cols // 4) * 4 for r in records]
    device = records[0].grad.device
    factors = torch.empty(sum(widths), dtype=torch.float32, device=device).split(widths)
    records = [r._replace(extra=f) for r, f in zip(records, factors, strict=True)]
    column_sums(records, rest=rest, eps=eps, L2=L2, INVERT=True, **gradient)
    plain = [r for r in records if r.exp_avg is None]
    averaged = [r._replace(grad=r.exp_avg, exp_avg=None) for r in records if r.exp_avg is not None]
    apply_records(plain, [COLUMNS] * len(plain), **own)
    own.update(sign=1.0, grad_scale=None)  # the momentum has them already
    apply_records(averaged, [COLUMNS] * len(averaged), **own)
