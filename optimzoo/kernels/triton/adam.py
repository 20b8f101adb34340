# mypy: disallow-untyped-defs=False
"""Adam, AdamW, AdamS and Adam's direction: ``oz_*_adam``."""

import math
from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from optimzoo.kernels.native import Rate
from optimzoo.kernels.triton import table as T
from optimzoo.kernels.triton.element import (
    clipped,
    gradient_scale,
    nearest,
    read,
    rounding_key,
    stepped,
    write_param,
)
from optimzoo.kernels.triton.launch import (
    UNSPECIALIZED,
    Plan,
    Tile,
    flat_tile,
    scalars,
    written,
)
from optimzoo.kernels.triton.table import Record, block, owner, pointer, rates_of


@triton.jit
def _correction(step, log_beta):
    """Return 1 - beta^step as float32, subtracted in float64: at first the two are nearly equal."""
    return (1.0 - tl.exp((step * log_beta).to(tl.float64))).to(tl.float32)


@triton.jit
def _clip(g, clip):
    return tl.load(clip + 2) * clipped(g, tl.load(clip), tl.load(clip + 1))


@triton.jit
def _clamped(update, limit):
    """Clamp to [-limit, limit]; NaN stays NaN."""
    return tl.where(update > limit, limit, tl.where(update < -limit, -limit, update))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _adam(
    table,
    count,
    one_minus_beta1,
    one_minus_beta2,
    log_beta1,
    log_beta2,
    adam_eps,
    alpha,
    pull,
    limit,
    sign,
    grad_scale,
    found_inf,
    seed_low,
    seed_high,
    step_low,
    step_high,
    first_index,
    STOCHASTIC: tl.constexpr,
    BEFORE: tl.constexpr,
    DIRECTION: tl.constexpr,
    P: tl.constexpr,
    G: tl.constexpr,
    M: tl.constexpr,
    ALIGNED: tl.constexpr,
    HUGE: tl.constexpr,
    SEARCH: tl.constexpr,
    C: tl.constexpr,
    MASKED: tl.constexpr,
    CLIPPED: tl.constexpr,
):
    mine = owner(table, count, SEARCH)
    param = pointer(mine, count, T.PARAM, P, ALIGNED)
    exp_avg = pointer(mine, count, T.EXP_AVG, M, ALIGNED)
    exp_avg_sq = pointer(mine, count, T.EXP_AVG_SQ, M, ALIGNED)
    grad = pointer(mine, count, T.GRAD, G, ALIGNED)
    at, inside = block(mine, count, found_inf, ALIGNED, C)
    key = rounding_key(mine, count, first_index, step_low, step_high, seed_low, seed_high)
    g = read(grad + at, inside) * gradient_scale(sign, grad_scale)
    m = read(exp_avg + at, inside)
    v = read(exp_avg_sq + at, inside)
    if CLIPPED:
        g = _clip(g, pointer(mine, count, T.EXTRA, tl.float32, False))
    m += one_minus_beta1 * (g - m)
    moved = m
    if MASKED or not DIRECTION:
        p = read(param + at, inside)
    if MASKED:
        byte = tl.load(
            pointer(mine, count, T.MASK, tl.uint8, False) + at // 8, mask=inside, other=0
        )
        in_mask = (byte >> (at % 8).to(tl.uint8)) & 1
        toward = tl.where(p > 0, pull, tl.where(p < 0, -pull, 0.0))
        moved = tl.where(in_mask != 0, m, (1.0 - alpha) * m + toward)
        g = moved
    v += one_minus_beta2 * (g * g - v)
    tl.store(exp_avg + at, nearest(m, M), mask=inside)
    tl.store(exp_avg_sq + at, nearest(v, M), mask=inside)
    if DIRECTION:
        p = _clamped(moved / (tl.sqrt(v) + adam_eps), limit)
    else:
        lr, weight_decay = rates_of(mine, count)
        step = tl.load(pointer(mine, count, T.STEP, tl.float32, False))
        c1 = _correction(step, log_beta1)
        root = tl.sqrt(_correction(step, log_beta2))
        if BEFORE:
            update = (root / c1) * moved / (tl.sqrt(v) + adam_eps)
        else:
            update = (1.0 / c1) * moved / (tl.sqrt(v) * (1.0 / root) + adam_eps)
        p = stepped(p, _clamped(update, limit), lr, weight_decay)
    write_param(param + at, p, inside, at, key, P, STOCHASTIC, HUGE)


def adam_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor | None],
    *,
    lr: Rate | list[Rate],
    betas: tuple[float, float],
    eps: float,
    weight_decay: float | list[float],
    maximize: bool,
    eps_before: bool,
    masks: Sequence[Tensor | None] | None = None,
    l1: float = 0.0,
    alpha: float = 0.0,
    clips: Sequence[Tensor | None] | None = None,
    direction: bool = False,
    max_update: float | None = None,
    **shared: Any,
) -> None:
    """Take Adam's step, or write its direction; ``shared`` as in :func:`launch.scalars`.

    Raises:
        ValueError: a step count is missing, and ``direction`` is False.
    """
    if not params:
        return
    if not direction and any(step is None for step in steps):
        raise ValueError(f"steps[{[*steps].index(None)}] is None; only direction=True needs none")
    gradient, rounding = scalars(maximize=maximize, **shared)
    none = [None] * len(params)
    options = zip(masks or none, steps, clips or none, strict=True)
    columns = zip(params, grads, exp_avgs, exp_avg_sqs, options, strict=True)
    records = [
        Record(p, g, m, v, *option, 1, p.numel(), i)
        for i, (p, g, m, v, option) in enumerate(columns)
    ]
    plan = Plan(grads)
    plan.add(_adam, records, _tile, BEFORE=eps_before, DIRECTION=direction)
    rule = numbers(betas=betas, eps=eps, l1=l1, alpha=alpha, max_update=max_update)
    plan.run(lr, weight_decay, **rule, **gradient, **rounding)
    written(params, exp_avgs, exp_avg_sqs)


def add_vectors(plan: Plan, records: Sequence[Record]) -> None:
    """Add the step that SCALE takes on its vectors."""
    plan.add(_adam, records, _tile, BEFORE=True, DIRECTION=False)


def numbers(
    *,
    betas: tuple[float, float],
    eps: float,
    l1: float = 0.0,
    alpha: float = 0.0,
    max_update: float | None = None,
) -> dict[str, float]:
    """Return the kernel's arguments of these options."""
    logs = [math.log(beta) if beta > 0 else -math.inf for beta in betas]
    return {
        "one_minus_beta1": 1.0 - betas[0],
        "one_minus_beta2": 1.0 - betas[1],
        "log_beta1": logs[0],
        "log_beta2": logs[1],
        "adam_eps": float(eps),
        "alpha": float(alpha),
        "pull": float(alpha * l1),
        "limit": float(max_update or math.inf),
    }


def _tile(record: Record) -> Tile:
    constants, warps, units = flat_tile(record)
    flags = (("MASKED", record.mask is not None), ("CLIPPED", record.extra is not None))
    return Tile((*constants, *flags), warps, units)
