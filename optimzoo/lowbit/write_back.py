"""Rounding of a step into 16-bit weights: to nearest, or stochastically, by keys.

The eager rules step a float32 copy of such a weight, which is then rounded into it: one rounding
per step, in one place, whatever the rule. The kernels round what they hold in registers, by the
same keys.
"""

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optimzoo.lowbit.stochastic import copy_

ROUNDINGS = ("nearest", "stochastic")
LOW = (torch.bfloat16, torch.float16)
STEP = "rounding_step"  # in a parameter's state: how often it has been rounded


class RngKey(NamedTuple):
    """Counter of which a tensor's random bits are a hash, with the element (:mod:`.stochastic`)."""

    seed: int
    step: int
    index: int  # type: ignore[assignment]  # tuple has a method of this name


def next_rng_key(state: MutableMapping[str, Any], *, seed: int, index: int) -> RngKey:
    """Count a step in ``state``, an int64 on the CPU from 1 on, and return its key.

    The count is a parameter's own, so the bits do not depend on which others are stepped, or when.
    """
    step = int(state.get(STEP, 0)) + 1
    # A new one: a load may have brought the last to another device.
    # A new one: a load may have brought the last to another device.
    state[STEP] = torch.tensor(step, device="cpu")
    return RngKey(seed, step, index)


@contextmanager
def fp32_working_copy(weight: Tensor, rng_key: RngKey | None) -> Iterator[Tensor]:
    """Yield what a rule steps in place of ``weight``: itself, or a float32 copy to be rounded.

    It is a copy where there is a key and the weight is of 16 bits; on leaving the context the
    copy is rounded into the weight. An exception leaves the weight as it was.
    """
    if rng_key is None or weight.dtype not in LOW:
        yield weight
        return
    wide = weight.detach().float()
    yield wide
    copy_(weight, wide, **rng_key._asdict())


@contextmanager
def widened(*columns: Sequence[Tensor]) -> Iterator[list[list[Tensor]]]:
    """Yield the lists with float32 copies of 16-bit tensors; round the copies back afterwards.

    So a rule computes in float32 whatever the dtype of its state, as the kernels do.
    """
    wide = [[t.float() if t.dtype in LOW else t for t in column] for column in columns]
    yield wide
    for narrow, copies in zip(columns, wide, strict=True):
        for tensor, copy in zip(narrow, copies, strict=True):
            if copy is not tensor:
                tensor.copy_(copy)


def apply_with_rounding(
    rule: Callable[..., None],
    rng_keys: Sequence[RngKey | None],
    params: Sequence[Tensor],
    *columns: Sequence[Any],
    alone: bool = False,
) -> None:
    """Apply ``rule`` to the lists ``params, *columns``; round weights that have a key.

    Without keys that is one call for all; else the weights are stepped one after the other,
    with one :func:`fp32_working_copy` at a time. So they are if ``alone``, for a rule that makes
    copies of its own.
    """
    if not any(rng_keys) and not alone:
        rule(params, *columns)
        return
    for rng_key, param, *tensors in zip(rng_keys, params, *columns, strict=True):
        with fp32_working_copy(param, rng_key) as wide:
            rule([wide], *([entry] for entry in tensors))


def at_least_float32(tensor: Tensor) -> torch.dtype:
    """Return the tensor's dtype, or float32 where that is narrower."""
    return tensor.dtype if tensor.dtype.itemsize >= 4 else torch.float32


def moment_dtype(param: Tensor, group: Mapping[str, Any]) -> torch.dtype:
    """Return the moments' dtype: the parameter's; at least float32 for float16, rounding, codes.

    float16 has no squares of gradients below 2.4e-4: a second moment of zero is divided by. In
    bfloat16 one with β₂ = 0.999 hardly moves: its steps are below half a last bit.
    """
    plain = group["rounding"] == "nearest" and group.get("state_bits") is None
    if plain and param.dtype != torch.float16:
        return param.dtype
    return at_least_float32(param)
