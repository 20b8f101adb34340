"""Collectives that the optimizers call, and a counter of their traffic."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

Count = dict[str, list[int]]
_counts: list[Count] = []


@contextmanager
def traffic() -> Iterator[Count]:
    """Count what the optimizers of this process send: ``{"all_reduce": [calls, bytes]}``.

    Bytes are those of the tensors passed to a collective; how often the network moves them depends
    on the backend. ``OPTIMZOO_TRAFFIC=1`` in the environment prints a line for each step.
    """
    count: Count = {}
    _counts.append(count)
    try:
        yield count
    finally:
        _counts.remove(count)


def _record(name: str, tensor: Tensor) -> None:
    for count in _counts:
        entry = count.setdefault(name, [0, 0])
        entry[0] += 1
        entry[1] += tensor.numel() * tensor.element_size()


def _print_steps() -> None:
    count: Count = {}
    _counts.append(count)

    def report(optimizer: Any, *_: Any) -> None:
        if count and torch.distributed.get_rank() == 0:
            sent = ", ".join(f"{k} {n} x, {b:,} bytes" for k, (n, b) in sorted(count.items()))
            print(f"{type(optimizer).__name__}: {sent}", flush=True)
        count.clear()

    register_optimizer_step_post_hook(report)


if os.environ.get("OPTIMZOO_TRAFFIC", "0") not in ("", "0"):
    _print_steps()


def all_reduce_(tensors: Sequence[Tensor], group: Any, *, largest: bool = False) -> None:
    """Sum each tensor, or take its maximum, over ``group`` in place, in one call per dtype.

    Sixteen-bit tensors are summed in float32 and rounded once.
    """
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for t in tensors:
        by_dtype.setdefault(torch.promote_types(t.dtype, torch.float32), []).append(t)
    ops = torch.distributed.ReduceOp
    for dtype, some in by_dtype.items():
        buffer = torch.cat([t.reshape(-1).to(dtype) for t in some])
        if buffer.numel() == 0:
            continue
        _record("all_reduce", buffer)
        torch.distributed.all_reduce(buffer, ops.MAX if largest else ops.SUM, group=group)
        for t, part in zip(some, buffer.split([t.numel() for t in some]), strict=True):
            t.copy_(part.view(t.shape))


def all_to_all(parts: Sequence[Tensor], sizes: Sequence[int], group: Any) -> list[Tensor]:
    """Send ``parts[i]`` to process ``i``; return what each sent here, of ``sizes`` elements."""
    sent = torch.cat([part.reshape(-1) for part in parts])
    received = sent.new_empty(sum(sizes))
    _record("all_to_all", sent)
    torch.distributed.all_to_all_single(
        received, sent, list(sizes), [part.numel() for part in parts], group=group
    )
    return list(received.split(list(sizes)))
