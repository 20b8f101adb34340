"""csrc/include/optimzoo.h once more, in NumPy: float64 arithmetic, integer rounding."""

import numpy as np

ROWS, COLUMNS, SIGN, ADAM = range(4)


def gradient(g, *, maximize=False, grad_scale=1.0):
    g = np.asarray(g, np.float64) / grad_scale
    return -g if maximize else g


def lengths(g, kind, *, l2, eps):
    """The divisor of each row or column."""
    axis = 1 if kind == ROWS else 0
    squares = np.sum(g * g, axis=axis, keepdims=True)
    if not l2:
        squares = squares / max(g.shape[axis], 1)
    return np.where(np.sqrt(squares) < eps, eps, np.sqrt(squares))


def decayed(p, u, weight_decay):
    """The weights that decay; of a negative decay, cautious, those not moved away from zero."""
    away = np.sign(u) * np.sign(p) < 0
    return abs(weight_decay) * np.where(away & (weight_decay < 0), 0.0, p)


def scale(
    p,
    g,
    m,
    *,
    kind,
    lr,
    momentum,
    weight_decay,
    l2,
    eps,
    nesterov=False,
    stored=lambda x: x,
    **options,
):
    """p, m after a SCALE step on a matrix; `stored` rounds the momentum as its type does."""
    p, g = np.asarray(p, np.float64), gradient(g, **options)
    if m is not None:
        m = stored(m + (1 - momentum) * (g - m))
        g = momentum * m + (1 - momentum) * g if nesterov else m
    u = np.sign(g) if kind == SIGN else g / lengths(g, kind, l2=l2, eps=eps)
    return p - lr * (u + decayed(p, u, weight_decay)), m


def adam(
    p,
    g,
    m,
    v,
    t,
    *,
    lr,
    betas,
    eps,
    weight_decay,
    eps_before,
    mask=None,
    l1=0.0,
    alpha=0.0,
    clip=None,
    direction=False,
    max_update=np.inf,
    **options,
):
    """p (or the direction), m, v after an Adam step; `mask` is boolean, `clip` three numbers."""
    p, g = np.asarray(p, np.float64), gradient(g, **options)
    if clip is not None:
        g = clip[2] * clipped(g, clip[0], clip[1])
    m = m + (1 - betas[0]) * (g - m)
    moved = m
    if mask is not None:
        moved = np.where(mask, m, (1 - alpha) * m + alpha * l1 * np.sign(p))
    v = v + (1 - betas[1]) * ((g if mask is None else moved) ** 2 - v)
    if direction:
        return np.clip(moved / (np.sqrt(v) + eps), -max_update, max_update), m, v
    c1, c2 = 1 - betas[0] ** t, 1 - betas[1] ** t
    if eps_before:
        u = np.sqrt(c2) / c1 * moved / (np.sqrt(v) + eps)
    else:
        u = moved / c1 / (np.sqrt(v / c2) + eps)
    u = np.clip(u, -max_update, max_update)
    return p - lr * (u + decayed(p, u, weight_decay)), m, v


def clipped(g, bound, ratio):
    return np.where((bound > 0) & (np.abs(g) > bound), ratio * g, g)


def reduce(g, kind, *, bound=0.0, ratio=0.0, **options):
    g = gradient(g, **options)
    if kind == SIGN:
        return np.array([np.abs(g).max(initial=0), np.sum(clipped(g, bound, ratio) ** 2)])
    return np.sum(g * g, axis=1 if kind == ROWS else 0)


def apply(p, g, scales, kind, *, lr, weight_decay, **options):
    g = gradient(g, **options)
    by = {ROWS: scales[:, None], COLUMNS: scales[None, :], SIGN: scales[0]}[kind]
    p = np.asarray(p, np.float64)
    return p - lr * (by * g + decayed(p, by * g, weight_decay))


def center(g, *, eps, **options):
    g = gradient(g, **options)
    g = g - g.mean(axis=1, keepdims=True)
    deviation = np.sqrt((g * g).mean(axis=1, keepdims=True))
    return g / np.where(deviation < eps, eps, deviation)


def sinkhorn(p, g, kind, *, iterations, lr, weight_decay, **options):
    """p after a SinkGD step; each iteration has the rows first, or the columns."""
    x = gradient(g, **options)
    for _ in range(iterations):
        for reduced in (kind, ROWS + COLUMNS - kind):
            x = x / lengths(x, reduced, l2=False, eps=2.0**-126)
    return np.asarray(p, np.float64) - lr * (x + weight_decay * np.asarray(p, np.float64))


def finaliser(x):
    """MurmurHash3's, of uint32."""
    x = np.asarray(x, np.uint64) & 0xFFFFFFFF
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = ((x ^ (x >> np.uint64(shift))) * np.uint64(factor)) & np.uint64(0xFFFFFFFF)
    return x ^ (x >> np.uint64(16))


def random_bits(count, seed, step, index):
    """uint32 for elements 0 to count - 1 of tensor `index`."""
    low, high = (lambda x: x & 0xFFFFFFFF), (lambda x: x >> 32)
    key = int(finaliser(index))
    for word in (high(step), low(step), high(seed), low(seed)):
        key = int(finaliser(word ^ key))
    e = np.arange(count, dtype=np.uint64)
    inner = finaliser((e >> np.uint64(32)) ^ np.uint64(key))
    return finaliser((e & np.uint64(0xFFFFFFFF)) ^ inner).astype(np.uint32)


def round_stochastic(x, kind, *, seed, step, index):
    """float32 values to `bfloat16` or `float16`, as float32 values that these hold exactly."""
    x = np.asarray(x, np.float32)
    bits = random_bits(x.size, seed, step, index).reshape(x.shape)
    u = x.view(np.uint32)
    if kind == "bfloat16":
        return ((u + (bits & 0xFFFF)) & np.uint32(0xFFFF0000)).view(np.float32)
    normal = ((u + (bits & 0x1FFF)) & np.uint32(0xFFFFE000)).view(np.float32)
    units = np.floor(np.abs(x.astype(np.float64)) * 2**24 + (bits >> 8) * 2.0**-24)
    tiny = np.copysign(units * 2.0**-24, x).astype(np.float32)
    return np.where(np.abs(x) >= 2.0**-14, normal, tiny)
