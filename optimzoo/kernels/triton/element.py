# mypy: disallow-untyped-defs=False
"""Element-wise functions of the kernels: read, round, write. All arithmetic is in float32."""

import triton
import triton.language as tl

from optimzoo.kernels.triton.table import INDEX, number


@triton.jit
def read(pointer, inside):
    """Load elements as float32; zeros outside."""
    return tl.load(pointer, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def gradient_scale(sign, grad_scale):
    """Return the factor of the gradients: the sign, over the loss scale if there is one."""
    if grad_scale is not None:
        sign = sign / tl.load(grad_scale)
    return sign


@triton.jit
def nearest(x, TYPE: tl.constexpr):
    """Round float32 to TYPE, to nearest, ties to even."""
    if TYPE == tl.bfloat16:
        # By hand: the interpreter's cast cuts the low bits off.
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(x != x, (bits >> 16) | 0x40, rounded)
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(TYPE)


@triton.jit
def looked_ahead(m, g, one_minus_beta, NESTEROV: tl.constexpr):
    """Return what is followed of a momentum as stored: it, or what Nesterov's looks ahead to."""
    if NESTEROV:
        m = m + one_minus_beta * (g - m)
    return m


@triton.jit
def direction(
    grad,
    exp_avg,
    at,
    inside,
    factor,
    one_minus_beta,
    M: tl.constexpr,
    NESTEROV: tl.constexpr,
    FEW: tl.constexpr,
):
    """Return the gradient, or what is followed of the momentum that it has been averaged into.

    FEW: there may be fewer elements than threads.
    """
    g = read(grad + at, inside) * factor
    if M is not None:
        m = read(exp_avg + at, inside)
        if FEW:  # several warps then read an element that one of them writes
            tl.debug_barrier()
        stored = nearest(m + one_minus_beta * (g - m), M)
        tl.store(exp_avg + at, stored, mask=inside)
        g = looked_ahead(stored.to(tl.float32), g, one_minus_beta, NESTEROV)
    return g


@triton.jit
def direction_again(
    grad, exp_avg, at, inside, factor, one_minus_beta, M: tl.constexpr, NESTEROV: tl.constexpr
):
    """Return what :func:`direction` has returned, from what it has stored."""
    if M is None:
        x = read(grad + at, inside) * factor
    elif NESTEROV:
        g = read(grad + at, inside) * factor
        x = looked_ahead(read(exp_avg + at, inside), g, one_minus_beta, NESTEROV)
    else:
        x = read(exp_avg + at, inside)
    return x


@triton.jit
def clipped(g, bound, ratio):
    """Multiply g by the ratio where it exceeds the bound, if that is > 0 (Stable-SPAM)."""
    bound = tl.where(bound > 0, bound, float("inf"))
    return tl.where(tl.abs(g) > bound, ratio * g, g)


@triton.jit
def inverse_length(squares, n, eps, L2: tl.constexpr):
    """Return the reciprocal of SCALE's divisor, from a sum of n squares; NaN stays NaN."""
    if not L2:
        squares = squares / n
    length = tl.sqrt(squares)
    return 1.0 / tl.where(length < eps, eps, length)


@triton.jit
def stepped(p, u, lr, weight_decay):
    """Return p less its step; a negative decay is cautious: not where u moves p away from zero."""
    least = tl.where(weight_decay < 0, 0.0, float("-inf"))
    return p - lr * (u + tl.where(u * p >= least, tl.abs(weight_decay), 0.0) * p)


@triton.jit
def hashed(x):
    """Hash uint32 by the 32-bit finaliser of MurmurHash3."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def rounding_key(mine, count, first_index, step_low, step_high, seed_low, seed_high):
    """Return the tensor's key, from its index; the counter's words are int32."""
    key = hashed((number(mine, count, INDEX) + first_index).to(tl.uint32))
    key = hashed(step_high.to(tl.uint32, bitcast=True) ^ key)
    key = hashed(step_low.to(tl.uint32, bitcast=True) ^ key)
    key = hashed(seed_high.to(tl.uint32, bitcast=True) ^ key)
    return hashed(seed_low.to(tl.uint32, bitcast=True) ^ key)


@triton.jit
def random_bits(element, key, HUGE: tl.constexpr):
    """Return the bits of the elements with these indices; HUGE: some may be 2^32 or more."""
    if HUGE:
        inner = hashed((element >> 32).to(tl.uint32) ^ key)
    else:
        inner = hashed(key)
    return hashed(element.to(tl.uint32) ^ inner)


@triton.jit
def _stochastic_float16(x, whole, finite, bits):
    small = (whole & 0x7FFFFFFF) < 0x38800000
    # Below 2^-14, in units of 2^-24: both parts of the number and the bound are exact.
    units = tl.where(small, tl.abs(x), 0.0) * 16777216.0
    floor = units.to(tl.int32).to(tl.float32)
    bound = (16777216 - (bits >> 8).to(tl.int32)).to(tl.float32) * (1.0 / 16777216.0)
    size = (floor + tl.where(units - floor >= bound, 1.0, 0.0)) * (1.0 / 16777216.0)
    tiny = size.to(tl.uint32, bitcast=True) | (whole & 0x80000000)
    up = tl.where(small, tiny, (whole + (bits & 0x1FFF)) & 0xFFFFE000)
    return tl.where(finite, up, whole).to(tl.float32, bitcast=True).to(tl.float16)


@triton.jit
def stochastic(x, bits, TYPE: tl.constexpr):
    """Round float32 to TYPE as :mod:`optimzoo.lowbit.stochastic` specifies."""
    whole = x.to(tl.uint32, bitcast=True)
    finite = (whole & 0x7F800000) != 0x7F800000
    if TYPE == tl.bfloat16:
        special = tl.where(x != x, whole | 0x400000, whole)
        rounded = tl.where(finite, whole + (bits & 0xFFFF), special) >> 16
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return _stochastic_float16(x, whole, finite, bits)


@triton.jit
def write_param(
    pointer,
    x,
    inside,
    element,
    key,
    TYPE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    HUGE: tl.constexpr,
):
    """Round parameters and write them; ``element`` are their indices in the tensor."""
    if STOCHASTIC and TYPE != tl.float32:
        rounded = stochastic(x, random_bits(element, key, HUGE), TYPE)
    else:
        rounded = nearest(x, TYPE)
    tl.store(pointer, rounded, mask=inside)
