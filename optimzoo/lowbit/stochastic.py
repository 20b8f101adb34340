r"""Stochastic rounding: the specification, with which every backend's kernels agree bit for bit.

A number ``x`` between two neighbours ``a < b`` of the low type becomes ``b`` with probability
``(x - a) / (b - a)``, so its expectation is ``x``: updates too small to move a bfloat16 weight
move it now and then, and by the right amount on average.

The random bits are a hash of a counter, not a generator's state: the same seed, step, tensor and
element give the same bits on any device, in any order. With ``h`` the 32-bit finaliser of
MurmurHash3, ``lo`` and ``hi`` the halves of a 64-bit integer and ``e`` the element's row-major
index::

    key  = h(lo(seed) ^ h(hi(seed) ^ h(lo(step) ^ h(hi(step) ^ h(index)))))
    bits = h(lo(e) ^ h(hi(e) ^ key))

bfloat16 has the upper 16 of float32's bits: ``bits mod 2^16`` is added to the lower ones and the
carry, if any, is the step up. float16 keeps 10 of the 23 bits of the fraction, so the same is done
with 13 bits; below ``2^-14`` its numbers are ``2^-24`` apart, and 24 random bits decide.
"""

import torch
from torch import Tensor

_CHUNK = 1 << 20  # elements at a time: temporaries of a few MB, whatever the tensor's size
_MASK = 0xFFFFFFFF
_TINY = 2.0**-14  # the smallest normal number of float16


def round_stochastic(x: Tensor, dtype: torch.dtype, *, seed: int, step: int, index: int) -> Tensor:
    """Round ``x`` to ``dtype``, up or down at random, with ``x`` as the expectation.

    Args:
        x: float32; another floating type is converted to it first, to nearest.
        dtype: `bfloat16` or `float16`; `float32` converts, without randomness.
        seed: from 0 to 2^64 - 1.
        step: from 0 to 2^64 - 1; each step of a training run has its own bits.
        index: from 0 to 2^32 - 1; each tensor of a step has its own bits.

    Returns:
        A new tensor. NaN and infinity are converted as by ``x.to(dtype)``. A finite number beyond
        the largest of ``dtype`` may become infinite, as it may to nearest.

    Raises:
        ValueError: another dtype, or a seed, step or index out of range.
    """
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    _round_into(out.view(-1), x.reshape(-1), seed, step, index)
    return out


def copy_(dst: Tensor, src: Tensor, *, seed: int, step: int, index: int) -> Tensor:
    """Copy ``src`` into ``dst`` by :func:`round_stochastic` and return ``dst``.

    Raises:
        ValueError: the shapes differ, or as :func:`round_stochastic`.
    """
    if dst.shape != src.shape:
        raise ValueError(f"cannot copy {tuple(src.shape)} into {tuple(dst.shape)}; reshape it")
    if dst.is_contiguous():
        _round_into(dst.view(-1), src.reshape(-1), seed, step, index)
        return dst
    with torch.no_grad():
        return dst.copy_(round_stochastic(src, dst.dtype, seed=seed, step=step, index=index))


def random_uniform(
    start: int, count: int, rng_key: tuple[int, int, int], device: torch.device
) -> Tensor:
    """Draw multiples of 2^-24 in [0, 1) for ``count`` elements from ``start``, by the key."""
    return _shift(_random_bits(start, count, _key(*rng_key), device), 8).float() * 2.0**-24


@torch.no_grad()
def _round_into(out: Tensor, x: Tensor, seed: int, step: int, index: int) -> None:
    key = _key(seed, step, index)
    if out.dtype == torch.float32:
        out.copy_(x)
        return
    if out.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"cannot round to {out.dtype}; use bfloat16, float16 or float32")
    rule = _bfloat16 if out.dtype == torch.bfloat16 else _float16
    for at in range(0, x.numel(), _CHUNK):
        part = x[at : at + _CHUNK].float()
        rounded = rule(part, _random_bits(at, part.numel(), key, x.device))
        out[at : at + _CHUNK] = torch.where(part.isfinite(), rounded, part)


def _bfloat16(x: Tensor, bits: Tensor) -> Tensor:
    return ((x.view(torch.int32) + (bits & 0xFFFF)) & ~0xFFFF).view(torch.float32)


def _float16(x: Tensor, bits: Tensor) -> Tensor:
    normal = ((x.view(torch.int32) + (bits & 0x1FFF)) & ~0x1FFF).view(torch.float32)
    # float64 holds exactly every such sum that comes close to an integer.
    units = x.abs().double() * 2.0**24 + _shift(bits, 8).double() * 2.0**-24
    subnormal = (units.floor() * 2.0**-24).float().copysign(x)
    return torch.where(x.abs() < _TINY, subnormal, normal)


def _key(seed: int, step: int, index: int) -> int:
    for name, value, width in (("seed", seed, 64), ("step", step, 64), ("index", index, 32)):
        if not 0 <= value < 1 << width:
            raise ValueError(f"Invalid {name}: {value}; it must be from 0 to 2^{width} - 1")
    key = 0
    for word in (index, step >> 32, step & _MASK, seed >> 32, seed & _MASK):
        key = _hash_int(word ^ key)
    return key


def _random_bits(start: int, count: int, key: int, device: torch.device) -> Tensor:
    """Return bits of ``count`` elements from ``start``, which must not cross a multiple of 2^32."""
    inner = _hash_int((start >> 32) ^ key)
    low = torch.arange(count, dtype=torch.int32, device=device) + _signed(start & _MASK)
    return _hash(low ^ _signed(inner))


def _hash_int(x: int) -> int:
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _MASK
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _MASK
    return x ^ (x >> 16)


def _hash(x: Tensor) -> Tensor:
    """Apply :func:`_hash_int` to each element; int32 wraps around as uint32 does."""
    x = (x ^ _shift(x, 16)) * _signed(0x85EBCA6B)
    x = (x ^ _shift(x, 13)) * _signed(0xC2B2AE35)
    return x ^ _shift(x, 16)


def _shift(x: Tensor, by: int) -> Tensor:
    """Shift right, filling with zeros; torch's own shift copies the sign."""
    return (x >> by) & ((1 << (32 - by)) - 1)


def _signed(x: int) -> int:
    return x - (1 << 32) if x >= 1 << 31 else x
