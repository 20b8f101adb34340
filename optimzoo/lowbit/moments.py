"""Optimizer states whose moments are held in 8-bit codes, sharded or not.

The codes of a sharded moment are sharded as it is. So are the scales where no block of 256 elements
is in two shards and each process has its own, in the chunks of a DTensor; else every process has
the scales of all blocks, from one all-reduce of maxima each time that they are written. Either way
the scales have the shape that one process has, and a checkpoint is resharded as any other.
"""

import math
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from optimzoo.distributed import Shards, local_part
from optimzoo.lowbit.blockwise import BLOCK, Part, dequantize, quantize
from optimzoo.lowbit.write_back import RngKey

SMALLEST = 4096  # elements of the whole moment; with fewer it stays in float32
# Offsets of their keys' indices; no state has two with the same.
_MOMENTS = {"exp_avg": 1 << 31, "exp_avg_sq": 3 << 30, "momentum_buffer": 1 << 31}


@contextmanager
def dequantized_moments(
    state: MutableMapping[str, Any], bits: int, rng_key: RngKey | None
) -> Iterator[MutableMapping[str, Any]]:
    """Yield ``state`` with its moments in float32; quantize them afterwards if ``bits`` is 8.

    The state has ``exp_avg_codes`` and ``exp_avg_scale`` in place of ``exp_avg``, and so on. Of a
    sharded weight it is the state with DTensors, and all processes call this.

    Raises:
        RuntimeError: a moment that is sharded along another dimension than the first.
    """
    stored = {}
    for key in _MOMENTS:
        if f"{key}_codes" in state:
            codes, scales = state.pop(f"{key}_codes"), state.pop(f"{key}_scale")
            stored[key] = codes, scales.to(codes.device)
            state[key] = _dequantized(*stored[key])
    yield state
    for key, offset in _MOMENTS.items():
        moment = state.get(key)
        if bits == 8 and moment is not None and moment.numel() >= SMALLEST:
            moment_rng_key = (
                None if rng_key is None else rng_key._replace(index=rng_key.index + offset)
            )
            part = _part_of(moment, stored[key][1] if key in stored else None)
            local = local_part(moment)
            codes, scales = quantize(
                local, signed=key != "exp_avg_sq", rng_key=moment_rng_key, part=part
            )
            del state[key]
            if key in stored:  # into the same tensors, which a CUDA graph may hold
                local_part(stored[key][0]).copy_(codes)
                local_part(stored[key][1]).copy_(scales)
            else:
                stored[key] = _like(codes, moment), _sharded_scales(scales, moment, part)
            state[f"{key}_codes"], state[f"{key}_scale"] = stored[key]


def _dequantized(codes: Tensor, scales: Tensor) -> Tensor:
    part = _part_of(codes, scales)
    return _like(dequantize(local_part(codes), local_part(scales), part), codes)


def _part_of(moment: Tensor, scales: Tensor | None = None) -> Part:
    """Return which part of a moment this process has; stored scales say who has which."""
    shards = Shards.of(moment)
    total = moment.numel()
    if not shards.is_sharded():
        return Part(0, total)
    if shards.is_sharded("n"):
        raise RuntimeError(
            f"state_bits=8 has blocks along rows, and a moment {list(moment.shape)} is cut along "
            "dimension 1; shard its weight along the other dimension, or leave state_bits=None"
        )
    row = total // moment.shape[0]
    start = shards.spans["m"][0] * row
    has_local_blocks = _own_blocks(moment) if scales is None else hasattr(scales, "device_mesh")
    return Part(start, total, None if has_local_blocks else lambda sizes: shards.max_([sizes], "m"))


def _own_blocks(moment: Any) -> bool:
    """Return whether the blocks, cut as torch cuts dimension 0, are those of the shards."""
    cuts = [i for i, p in enumerate(moment.placements) if hasattr(p, "dim")]
    cuts = [i for i in cuts if moment.device_mesh.size(i) > 1]
    if len(cuts) > 1 or hasattr(moment.placements[cuts[0]], "split_factor"):
        return False
    world, rows = moment.device_mesh.size(cuts[0]), moment.shape[0]
    shard = -(-rows // world) * (moment.numel() // rows)
    blocks = -(-moment.numel() // BLOCK)
    return bool(shard % BLOCK == 0 and -(-blocks // world) * BLOCK == shard)


def _like(local: Tensor, moment: Any) -> Tensor:
    """Wrap a local tensor as ``moment`` is sharded; a plain moment's stays plain."""
    return _wrapped(local, moment, moment.shape) if hasattr(moment, "device_mesh") else local


def _sharded_scales(scales: Tensor, moment: Any, part: Part) -> Tensor:
    if part.max_ is not None or not Shards.of(moment).is_sharded():
        return scales  # of all blocks, the same on every process
    return _wrapped(scales, moment, torch.Size([-(-part.total // BLOCK)]))


def _wrapped(local: Tensor, like: Any, shape: torch.Size) -> Tensor:
    from torch.distributed.tensor import DTensor

    stride = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    whole: dict[str, Any] = {"shape": shape, "stride": stride}
    result: Tensor = DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, **whole
    )
    return result
