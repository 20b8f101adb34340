r"""Moments in 8 bits: blocks of 256 elements, each with the largest magnitude in it, ``s``.

A first moment is an int8 code ``c`` of value ``s · sign(c) (c / 127)²``, a second moment a uint8
one of value ``s (c / 255)⁴``: finer where numbers are small, since a moment's entries differ by
orders of magnitude within a block. A number between two codes' values takes the nearer one or,
with a key, the upper one with a probability that makes it its expectation.

Blocks run over the row-major elements, whatever the shape; the last may be shorter. A block of
zeros stays zero; a block with a number that is not finite becomes NaN, all of it.

The two codes of an element are rounded independently, so ``|m| / √v`` is unbounded afterwards; the
rules clamp the update to what exact moments allow (``core/adam.py``, `max_direction`).
"""

from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from optimzoo.lowbit.stochastic import random_uniform
from optimzoo.lowbit.write_back import RngKey

BLOCK = 256
SMALLEST = 4096  # elements; moments with fewer stay in float32
_CHUNK = 1 << 20  # elements at a time, a multiple of BLOCK
# Offsets of their keys' indices; no state has two with the same.
_MOMENTS = {"exp_avg": 1 << 31, "exp_avg_sq": 3 << 30, "momentum_buffer": 1 << 31}


def quantize(x: Tensor, *, signed: bool, rng_key: RngKey | None = None) -> tuple[Tensor, Tensor]:
    """Return codes of ``x``'s shape and the float32 scales of its blocks, ``[ceil(n / 256)]``.

    Args:
        x: a floating-point tensor; not negative unless `signed`.
        signed: int8 codes, else uint8.
        rng_key: key of stochastic rounding; None rounds to nearest.
    """
    codes = torch.empty(x.shape, dtype=torch.int8 if signed else torch.uint8, device=x.device)
    flat, out = x.reshape(-1), codes.view(-1)
    scales = torch.empty(-(-x.numel() // BLOCK), dtype=torch.float32, device=x.device)
    for at in range(0, x.numel(), _CHUNK):
        part = flat[at : at + _CHUNK].float()
        blocks = torch.nn.functional.pad(part, (0, -part.numel() % BLOCK)).view(-1, BLOCK)
        size = blocks.abs()
        scale = size.amax(1, keepdim=True)
        ratio = torch.nan_to_num(size / scale, nan=0.0, posinf=0.0)  # 0/0, or not finite
        low = _floor(ratio, signed)
        below, above = _value(low, signed), _value(low + 1, signed)
        threshold: float | Tensor = 0.5
        if rng_key is not None:
            drawn = random_uniform(at, blocks.numel(), rng_key, x.device)
            threshold = drawn.view(-1, BLOCK)
        code = (low + ((ratio - below) / (above - below) > threshold)).clamp_(max=_top(signed))
        code = code.copysign(blocks) if signed else code
        out[at : at + _CHUNK] = code.view(-1)[: part.numel()].to(codes.dtype)
        scales[at // BLOCK :][: len(scale)] = torch.where(scale.isfinite(), scale, torch.nan)[:, 0]
    return codes, scales


def dequantize(codes: Tensor, scales: Tensor) -> Tensor:
    """Return the float32 values of :func:`quantize`'s codes."""
    signed = codes.dtype == torch.int8
    out = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    flat, values = codes.view(-1), out.view(-1)
    for at in range(0, codes.numel(), _CHUNK):
        part = flat[at : at + _CHUNK].float()
        blocks = torch.nn.functional.pad(part, (0, -part.numel() % BLOCK)).view(-1, BLOCK)
        scale = scales[at // BLOCK :][: len(blocks), None]
        value = _value(blocks.abs(), signed) * scale
        value = value.copysign(blocks) if signed else value
        values[at : at + _CHUNK] = value.view(-1)[: part.numel()]
    return out


@contextmanager
def dequantized_moments(
    state: MutableMapping[str, Any], bits: int, rng_key: RngKey | None
) -> Iterator[MutableMapping[str, Any]]:
    """Yield ``state`` with its moments in float32; quantize them afterwards if ``bits`` is 8.

    The state has ``exp_avg_codes`` and ``exp_avg_scale`` in place of ``exp_avg``, and so on.
    """
    stored = {}
    for key in _MOMENTS:
        if f"{key}_codes" in state:
            codes = state.pop(f"{key}_codes")
            stored[key] = codes, state.pop(f"{key}_scale").to(codes.device)
            state[key] = dequantize(*stored[key])
    yield state
    for key, offset in _MOMENTS.items():
        moment = state.get(key)
        if bits == 8 and moment is not None and moment.numel() >= SMALLEST:
            own = None if rng_key is None else rng_key._replace(index=rng_key.index + offset)
            codes, scales = quantize(moment, signed=key != "exp_avg_sq", rng_key=own)
            del state[key]
            if key in stored:  # into the same tensors, which a CUDA graph may hold
                codes, scales = (
                    old.copy_(new) for old, new in zip(stored[key], (codes, scales), strict=True)
                )
            state[f"{key}_codes"], state[f"{key}_scale"] = codes, scales


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
