"""Masks of sharded weights (DTensor): each process has the mask of its shard."""

import math
from typing import Any

import torch
from torch import Tensor

from optimzoo.distributed import Shards, local_part


def check_cut(param: Tensor, m: int, *, transposed: bool, stacked: bool) -> None:
    """Refuse a sharded weight whose groups of m inputs, or bytes of eight mask bits, are cut.

    The check reads the whole weight's shape and placements, so every process refuses alike.

    Raises:
        ValueError: a dimension of the weight is not a multiple of processes times group.
    """
    if not hasattr(param, "device_mesh"):
        return
    shards = Shards.of(param, stacked=stacked)
    inputs = "m" if transposed else "n"
    for axis, dim in (("m", -2), ("n", -1)):
        along_bits = axis == "n" and shards.is_sharded("n")
        unit = math.lcm(m if axis == inputs else 1, 8 if along_bits else 1)
        parts = math.prod(group.size() for group in shards.groups(axis))
        if parts > 1 and unit > 1 and param.shape[dim] % (parts * unit):
            raise ValueError(
                f"dimension {param.ndim + dim} is cut into {parts} parts, which are not multiples "
                f"of {unit}; shard it along the other dimension, or leave this weight out"
            )


def sharded_like(param: Any, bits: Tensor) -> Tensor:
    """Return ``bits``, packed from the local shard of ``param``, as a DTensor sharded like it."""
    if not hasattr(param, "placements"):
        return bits
    local = local_part(param)
    if bits.numel() == 0:
        bits = bits.new_empty(local.shape[0], -(-math.prod(local.shape[1:]) // 8))
    shape = torch.Size((param.shape[0], -(-math.prod(param.shape[1:]) // 8)))
    whole = {"run_check": False, "shape": shape, "stride": (shape[1], 1)}
    return type(param.data).from_local(bits, param.device_mesh, param.placements, **whole)
