"""Dispatch: the one place that chooses the kernels that step a tensor.

A CUDA tensor goes to the native CUDA library, else to Triton; one of ROCm, which torch calls CUDA
too, to Triton alone; a CPU tensor to the native CPU library. The optimizer's eager path steps what
no kernel takes: other dtypes than float32, bfloat16 and float16, weights or state that are not
contiguous, tensor subclasses, other devices (XPU, MPS).
"""

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from optimzoo.kernels import native, triton

BACKENDS: dict[str, tuple[Any, ...]] = {"cpu": (native.CPU,), "cuda": (native.CUDA, triton)}
TYPES = (torch.float32, torch.bfloat16, torch.float16)
PLAIN = (Tensor, torch.nn.Parameter, FakeTensor)
ROWS, COLUMNS, SIGN, ADAM = range(4)  # enum oz_kind
Backend = Any  # an object with the functions of native.py


class TensorArgs(NamedTuple):
    """Parameter (or one matrix of a stack) as the kernels see it: dense, ``[rows, cols]``."""

    param: Tensor
    grad: Tensor
    exp_avg: Tensor | None
    exp_avg_sq: Tensor | None
    step: Tensor | None
    kind: int
    shape: tuple[int, int]
    whole: Tensor  # the parameter, or the stack that this is a matrix of
    rng_key: Any = None  # (seed, step, index) of stochastic rounding; None: to nearest


def matrices(
    param: Tensor,
    grad: Any,
    exp_avg: Tensor | None,
    kind: int,
    *,
    stacked: bool,
    rng_key: Any = None,
) -> list[TensorArgs]:
    """Return a weight as a matrix ``[out, -1]``; a stack by matrix if columns are reduced."""
    shape = param.shape
    if len(shape) == 2:
        size = (shape[0], shape[1])
        return [TensorArgs(param, grad, exp_avg, None, None, kind, size, param, rng_key)]
    if stacked and kind == COLUMNS:
        count = math.prod(shape[:-2])
        averages = [None] * count if exp_avg is None else list(exp_avg.flatten(0, -3))
        slices = zip(param.detach().flatten(0, -3), grad.flatten(0, -3), averages, strict=True)
        return [
            TensorArgs(p, g, m, None, None, kind, (shape[-2], shape[-1]), param, rng_key)
            for p, g, m in slices
        ]
    # Each row of a stack is a row of its own, so a stack is one tall matrix.
    cols = shape[-1] if stacked else math.prod(shape[1:])
    rows = math.prod(shape[:-1]) if stacked else shape[0]
    return [TensorArgs(param, grad, exp_avg, None, None, kind, (rows, cols), param, rng_key)]


def vector(
    param: Tensor,
    grad: Any,
    exp_avg: Tensor | None,
    exp_avg_sq: Tensor | None,
    step: Tensor | None = None,
    rng_key: Any = None,
) -> TensorArgs:
    """Return the item of a parameter that Adam steps."""
    size = (1, param.numel())
    return TensorArgs(param, grad, exp_avg, exp_avg_sq, step, ADAM, size, param, rng_key)


_fused: ContextVar[bool | None] = ContextVar("fused", default=None)


@contextmanager
def fused(option: bool | None, params: Iterable[Tensor] = ()) -> Iterator[None]:
    """Step inside by kernels where there are any (None), by none (False), or by kernels alone.

    Raises:
        RuntimeError: ``option`` is True and no kernel takes one of the parameters.
    """
    for param in params if option else ():
        if backend(param.device.type) is None or not is_supported(
            vector(param, param.detach(), None, None)
        ):
            raise RuntimeError(_refusal(param))
    token = _fused.set(option)
    try:
        yield
    finally:
        _fused.reset(token)


def backend(device_type: str) -> Backend | None:
    """Return the backend that steps tensors on this kind of device, or None."""
    return None if _fused.get() is False else _backend(device_type)


@functools.cache
def _backend(device_type: str) -> Backend | None:
    return next((b for b in BACKENDS.get(device_type, ()) if b.available()), None)


def sinkhorn_backend(device_type: str) -> Backend | None:
    """Return the backend with SinkGD's step, or None: of CUDA's, Triton has it."""
    chosen = backend(device_type)
    if isinstance(chosen, native.Library) and chosen.kind == "cuda":
        return triton if triton.available() else None
    return chosen


def is_supported(item: TensorArgs) -> bool:
    """Return whether kernels can step the item, whose gradient need not be contiguous."""
    param, grad, exp_avg, exp_avg_sq = item[:4]
    if item.rng_key is not None and param is not item.whole:
        return False  # kernels would count the elements of each matrix of a stack from 0
    if not (
        type(param) in PLAIN
        and type(grad) in (Tensor, FakeTensor)
        and param.dtype in TYPES
        and grad.dtype in TYPES
        and grad.shape == param.shape
        and item.whole.is_contiguous()  # else a stack's matrix may be a copy
        and not grad.is_neg()  # the numbers in memory are then not the gradient's
        and grad.device == param.device
    ):
        return False
    for state in (exp_avg, exp_avg_sq):
        if state is not None and not (
            state.dtype in TYPES
            and state.is_contiguous()
            and state.device == param.device
            and state.shape == param.shape  # a checkpoint may hold another
        ):
            return False
    return exp_avg is None or exp_avg_sq is None or exp_avg.dtype == exp_avg_sq.dtype


def partition_by_backend(
    items: Iterable[TensorArgs],
    fused: bool | None,
    choose: Callable[[str], Backend | None] | None = None,
) -> tuple[list[tuple[Backend, list[TensorArgs]]], list[TensorArgs]]:
    """Split items into calls, each with its device's backend, and those that no kernel takes.

    Args:
        items: see :class:`TensorArgs`.
        fused: `None` uses kernels where there are any; `True` requires them for every item.
        choose: returns the backend for a type of device; default: :func:`backend`.

    Raises:
        RuntimeError: ``fused=True`` and an item that no kernel takes; the message says why.
    """
    choose = choose or backend
    runs: dict[torch.device, list[TensorArgs]] = {}
    others: list[TensorArgs] = []
    for item in items:
        device = item.param.device
        if choose(device.type) is not None and is_supported(item):
            runs.setdefault(device, []).append(item)
        elif fused:
            raise RuntimeError(_refusal(item.param))
        else:
            others.append(item)
    calls = [
        (choose(device.type), call)
        for device, chosen in runs.items()
        for call in split_at_rng_gaps(chosen)
    ]
    return calls, others


def split_at_rng_gaps(items: list[TensorArgs]) -> list[list[TensorArgs]]:
    """Split items where their keys are not consecutive, as within a call."""
    calls: list[list[TensorArgs]] = []
    for item in items:
        expected = None
        if calls and calls[-1][-1].rng_key is not None:
            seed, step, index = calls[-1][-1].rng_key
            expected = (seed, step, index + 1)
        if calls and item.rng_key == expected:
            calls[-1].append(item)
        else:
            calls.append([item])
    return calls


def rounding(items: list[TensorArgs]) -> dict[str, int]:
    """Return the arguments on rounding of a call; rounding to nearest has none."""
    if items[0].rng_key is None:
        return {}
    return dict(zip(("seed", "step", "first_index"), items[0].rng_key, strict=True))


def to_argument_lists(items: list[TensorArgs]) -> tuple[list[Any], ...]:
    """Return the fields of a call as lists, with contiguous gradients and incremented steps."""
    fields = [list(field) for field in list(zip(*items, strict=True))[:7]]
    fields[1] = [g.contiguous() for g in fields[1]]
    fields[4] = increment_steps(fields[4], items[0].param.device)
    return tuple(fields)


def increment_steps(steps: list[Tensor | None], device: torch.device) -> list[Tensor | None]:
    """Increment Adam's step counts; return them in float32 on ``device``, as kernels read them."""
    counts = [step for step in steps if step is not None]
    if counts:
        torch._foreach_add_(counts, 1)
    away = [s for s in counts if s.device != device or s.dtype is not torch.float32]
    if not away:
        return steps
    # One copy for all: each would cost as much.
    moved = torch.stack(away).to(device, torch.float32, non_blocking=True).unbind()
    place = {id(step): copy for step, copy in zip(away, moved, strict=True)}
    return [place.get(id(step), step) for step in steps]


def lr_argument(value: float | Tensor, device: torch.device) -> float | Tensor:
    """Return a learning rate as kernels read it: a number, or a float32 tensor on their GPU."""
    if isinstance(value, Tensor) and value.device == device and device.type != "cpu":
        return value.reshape(()).float()
    return float(value)


def _refusal(param: Tensor) -> str:
    refusal = f"fused=True cannot step a {param.dtype} parameter {tuple(param.shape)}"
    device_type = param.device.type
    if backend(device_type) is None:
        why = (
            "; ".join(b.why_not() for b in BACKENDS.get(device_type, ())) or "there are none for it"
        )
        return f"{refusal} on {device_type}: {why}; run `optimzoo doctor`, or leave fused=None"
    return f"{refusal}: kernels take contiguous float32, bfloat16 and float16; leave fused=None"
