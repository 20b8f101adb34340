"""Masks of sharded weights (DTensor): each process has the mask of the rows that it holds."""

from typing import Any

import torch
from torch import Tensor


def local_part(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor that this process holds, in place; others as they are."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def sharded_like(param: Any, bits: Tensor) -> Tensor:
    """``bits``, packed from the local part of ``param``, sharded as ``param`` is."""
    if not hasattr(param, "placements"):
        return bits
    shape = torch.Size((param.shape[0], bits.shape[1]))
    whole = {"run_check": False, "shape": shape, "stride": (bits.shape[1], 1)}
    return type(param.data).from_local(bits, param.device_mesh, param.placements, **whole)
