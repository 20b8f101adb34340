r"""Moments in 8 bits: blocks of 256 elements, each with the largest magnitude in it, ``s``.

A first moment is an int8 code ``c`` of value ``s · sign(c) (c / 127)²``, a second moment a uint8
one of value ``s (c / 255)⁴``: finer where numbers are small, since a moment's entries differ by
orders of magnitude within a block. A number between two codes' values takes the nearer one or,
with a key, the upper one with a probability that makes it its expectation.

Blocks run over the row-major elements, whatever the shape; the last may be shorter. A block of
zeros stays zero; a block with a number that is not finite becomes NaN, all of it. Blocks, scales
and codes of a sharded tensor are those of the whole one (:class:`Part`).

The two codes of an element are rounded independently, so ``|m| / √v`` is unbounded afterwards; the
rules clamp the update to what exact moments allow (``core/adam.py``, `max_direction`).
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from optimzoo.lowbit.stochastic import random_uniform
from optimzoo.lowbit.write_back import RngKey

BLOCK = 256
_CHUNK = 1 << 20  # elements at a time, a multiple of BLOCK


class Part(NamedTuple):
    """Place of this process's elements among the row-major ones of a whole tensor.

    Attributes:
        start: index of the first.
        total: number of elements of the whole tensor.
        max_: takes maxima over the processes, in place, where a block may be in two parts: then
            each process holds the scales of all blocks. None: those of its own.
    """

    start: int
    total: int
    max_: Callable[[Tensor], None] | None = None


def quantize(
    x: Tensor, *, signed: bool, rng_key: RngKey | None = None, part: Part | None = None
) -> tuple[Tensor, Tensor]:
    """Return codes of ``x``'s shape and the float32 scales of its blocks, ``[ceil(n / 256)]``.

    Args:
        x: a floating-point tensor; not negative unless `signed`.
        signed: int8 codes, else uint8.
        rng_key: key of stochastic rounding; None rounds to nearest.
        part: the place of ``x`` in a whole tensor, of which it is this process's part.
    """
    codes = torch.empty(x.shape, dtype=torch.int8 if signed else torch.uint8, device=x.device)
    part = part or Part(0, x.numel())
    flat, out = x.reshape(-1), codes.view(-1)
    count, first = _held_blocks(x, part)
    scales = torch.zeros(count, dtype=torch.float32, device=x.device)
    if part.max_ is not None:
        for where, block, lead in _chunks(part.start, x.numel()):
            sizes = _blocks(flat[where], lead).abs().amax(1)
            # The maximum of NaN and a number is not the same on every backend.
            scales[block : block + len(sizes)] = sizes.nan_to_num_(nan=torch.inf, posinf=torch.inf)
        part.max_(scales)
    for where, block, lead in _chunks(part.start, x.numel()):
        blocks = _blocks(flat[where], lead)
        size = blocks.abs()
        place = slice(block - first, block - first + len(blocks))
        scale = size.amax(1, keepdim=True) if part.max_ is None else scales[place, None]
        ratio = torch.nan_to_num(size / scale, nan=0.0, posinf=0.0)  # 0/0, or not finite
        low = _floor(ratio, signed)
        below, above = _value(low, signed), _value(low + 1, signed)
        threshold: float | Tensor = 0.5
        if rng_key is not None:
            drawn = random_uniform(block * BLOCK, blocks.numel(), rng_key, x.device)
            threshold = drawn.view(-1, BLOCK)
        code = (low + ((ratio - below) / (above - below) > threshold)).clamp_(max=_top(signed))
        code = code.copysign(blocks) if signed else code
        out[where] = code.view(-1)[lead:][: where.stop - where.start].to(codes.dtype)
        if part.max_ is None:
            scales[place] = scale[:, 0]
    return codes, torch.where(scales.isfinite(), scales, torch.nan)


def dequantize(codes: Tensor, scales: Tensor, part: Part | None = None) -> Tensor:
    """Return the float32 values of :func:`quantize`'s codes."""
    signed = codes.dtype == torch.int8
    part = part or Part(0, codes.numel())
    out = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    flat, values = codes.view(-1), out.view(-1)
    first = _held_blocks(codes, part)[1]
    for where, block, lead in _chunks(part.start, codes.numel()):
        blocks = _blocks(flat[where], lead)
        scale = scales[block - first :][: len(blocks), None]
        value = _value(blocks.abs(), signed) * scale
        value = value.copysign(blocks) if signed else value
        values[where] = value.view(-1)[lead:][: where.stop - where.start]
    return out


def _held_blocks(x: Tensor, part: Part) -> tuple[int, int]:
    """Return how many blocks' scales this process has, and the number of the first."""
    if part.max_ is not None:
        return -(-part.total // BLOCK), 0
    return -(-x.numel() // BLOCK), part.start // BLOCK


def _chunks(start: int, count: int) -> Iterator[tuple[slice, int, int]]:
    """Yield slices of ``count`` elements, of which ``start`` is the first one's index.

    With the number of each one's first block, and the place of its first element in that. As their
    bounds are those of the whole tensor, random bits are too.
    """
    end = start + count
    for at in range(start - start % _CHUNK, end, _CHUNK) if count else ():
        low, high = max(at, start), min(at + _CHUNK, end)
        yield slice(low - start, high - start), low // BLOCK, low % BLOCK


def _blocks(part: Tensor, lead: int) -> Tensor:
    """Return elements as blocks in float32, with zeros before the first and after the last."""
    filled = torch.nn.functional.pad(part.float(), (lead, -(lead + part.numel()) % BLOCK))
    return filled.view(-1, BLOCK)


def _top(signed: bool) -> int:
    return 127 if signed else 255


def _value(code: Tensor, signed: bool) -> Tensor:
    """Return a code's value in units of the block's largest magnitude."""
    squared = (code / _top(signed)).square()
    return squared if signed else squared.square()


def _floor(ratio: Tensor, signed: bool) -> Tensor:
    """Return the largest code whose value is not above the ratio."""
    root = ratio.sqrt() if signed else ratio.sqrt().sqrt()
    code = (root * _top(signed)).round()
    return torch.where(_value(code, signed) > ratio, code - 1, code)
