"""Native kernel libraries for CPU and CUDA, called through their plain C interface.

``csrc/include/optimzoo.h`` specifies each function; the Triton backend has the same ones. Lists
have one entry per tensor. Tensors are dense ``[rows, cols]``, by ``shapes``, and on one device; a
state that a tensor does not have is None.
"""

import ctypes
import itertools
import struct
from array import array
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from optimzoo.kernels.library import SharedLibrary

_ROWS, _COLUMNS, _SIGN, _ADAM = range(4)
_TENSOR = struct.Struct("=8Q2q2f4i")
_GRAD, _STEP, _LR_TENSOR, _LR_AND_DECAY = 1, 5, 7, 10  # indices of its 8-byte words
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
Shapes = Sequence[tuple[int, int]]
Tensors = Sequence[Tensor]
States = Sequence[Tensor | None]
Rate = float | Tensor  # a tensor is float32, on the weights' device


class _Options(ctypes.Structure):
    """Structure ``oz_options`` of the C interface."""

    _fields_ = [
        *((name, ctypes.c_double) for name in ("momentum", "eps")),
        *((name, ctypes.c_double) for name in ("beta1", "beta2", "adam_eps")),
        *((name, ctypes.c_double) for name in ("l1", "alpha", "max_update")),
        *((name, ctypes.c_void_p) for name in ("grad_scale", "found_inf")),
        ("seed", ctypes.c_uint64),
        ("step", ctypes.c_uint64),
        ("first_index", ctypes.c_uint32),
        *((name, ctypes.c_int32) for name in ("l2", "maximize", "rounding", "eps_before")),
        *((name, ctypes.c_int32) for name in ("direction", "threads", "nesterov")),
        *((name, ctypes.c_int32) for name in ("iterations", "reserved")),
    ]


class Table:
    """Array of `oz_tensor`; a cached one gets the gradients, counts and rates of each step."""

    def __init__(
        self, columns: tuple[Sequence[Any], ...], shapes: Shapes, kinds: Sequence[int]
    ) -> None:
        self.size = len(shapes)
        self.bytes = bytearray(_TENSOR.size * self.size)
        self.buffer = (ctypes.c_char * len(self.bytes)).from_buffer(self.bytes)
        self._words = memoryview(self.bytes).cast("Q")
        self._extras = columns[6]  # keeps the scratch memory alive
        pointers = [[0 if t is None else t.data_ptr() for t in column] for column in columns]
        types = [
            (TYPES[p.dtype], TYPES[g.dtype], 0 if m is None else TYPES[m.dtype])
            for p, g, m in zip(*columns[:3], strict=True)
        ]
        rows = zip(zip(*pointers, strict=True), shapes, types, kinds, strict=True)
        for i, (row, shape, kind_of, kind) in enumerate(rows):
            row = (*row, 0, *shape, 0.0, 0.0, *kind_of, kind)
            _TENSOR.pack_into(self.bytes, i * _TENSOR.size, *row)

    def set(self, grads: Tensors, steps: States) -> None:
        """Set the gradients, of the same dtypes as before, and the step counts."""
        for word, tensors in ((_GRAD, grads), (_STEP, steps)):
            self._write(word, array("Q", [0 if t is None else t.data_ptr() for t in tensors]))

    def set_rates(self, lr: Rate | list[Rate], weight_decay: float | list[float]) -> None:
        """Set the learning rate and the decay: a list with one per tensor, or one for all."""
        lrs = lr if isinstance(lr, list) else [lr] * self.size
        decays = weight_decay if isinstance(weight_decay, list) else [weight_decay] * self.size
        away = [rate.data_ptr() if isinstance(rate, Tensor) else 0 for rate in lrs]
        numbers = [0.0 if isinstance(rate, Tensor) else rate for rate in lrs]
        self._write(_LR_TENSOR, array("Q", away))
        pairs = itertools.chain.from_iterable(zip(numbers, decays, strict=True))
        self._write(_LR_AND_DECAY, array("f", pairs))

    def _write(self, word: int, values: "array[Any]") -> None:
        self._words[word :: _TENSOR.size // 8] = memoryview(values).cast("B").cast("Q")


class Library(SharedLibrary):
    """Kernels of one type of device."""

    def scale_(
        self,
        params: Tensors,
        grads: Tensors,
        exp_avgs: States,
        exp_avg_sqs: States,
        steps: States,
        kinds: Sequence[int],
        shapes: Shapes,
        *,
        lr: Rate | list[Rate],
        momentum: float,
        weight_decay: float | list[float],
        l2: bool,
        eps: float,
        betas: tuple[float, float],
        adam_eps: float,
        maximize: bool,
        nesterov: bool = False,
        table: Table | None = None,
        **shared: Any,
    ) -> None:
        """Take SCALE's step (``oz_*_scale``); ``shared`` and ``table`` are :meth:`_call`'s."""
        extras: States = [] if table else self._scale_scratch(params, kinds, shapes)
        options = _Options(
            momentum=momentum,
            l2=l2,
            eps=eps,
            beta1=betas[0],
            beta2=betas[1],
            adam_eps=adam_eps,
            maximize=maximize,
            nesterov=nesterov,
        )
        columns = (params, grads, exp_avgs, exp_avg_sqs, [None] * len(params), steps, extras)
        shared.update(lr=lr, weight_decay=weight_decay, table=table)
        self._call("scale", columns, shapes, kinds, options, **shared)

    def adam_(
        self,
        params: Tensors,
        grads: Tensors,
        exp_avgs: Tensors,
        exp_avg_sqs: Tensors,
        steps: States,
        *,
        lr: Rate | list[Rate],
        betas: tuple[float, float],
        eps: float,
        weight_decay: float | list[float],
        maximize: bool,
        eps_before: bool,
        masks: States | None = None,
        l1: float = 0.0,
        alpha: float = 0.0,
        clips: States | None = None,
        direction: bool = False,
        max_update: float | None = None,
        **shared: Any,
    ) -> None:
        """Take a step of Adam, AdamW or AdamS, or write Adam's direction (``oz_*_adam``)."""
        none: States = [None] * len(params)
        options = _Options(
            beta1=betas[0],
            beta2=betas[1],
            adam_eps=eps,
            maximize=maximize,
            eps_before=eps_before,
            l1=l1,
            alpha=alpha,
            direction=direction,
            max_update=max_update or 0.0,
        )
        columns = (params, grads, exp_avgs, exp_avg_sqs, masks or none, steps, clips or none)
        shapes = [(1, p.numel()) for p in params]
        shared.update(lr=lr, weight_decay=weight_decay)
        self._call("adam", columns, shapes, [_ADAM] * len(params), options, **shared)

    def reduce_(
        self,
        grads: Tensors,
        outs: Tensors,
        kinds: Sequence[int],
        shapes: Shapes,
        *,
        maximize: bool = False,
        **shared: Any,
    ) -> None:
        """Write sums of squares by row or column, or clipped, to ``outs`` (``oz_*_reduce``)."""
        none: States = [None] * len(grads)
        columns = (grads, grads, none, none, none, none, outs)
        self._call("reduce", columns, shapes, kinds, _Options(maximize=maximize), **shared)

    def apply_(
        self,
        params: Tensors,
        grads: Tensors,
        scales: Tensors,
        kinds: Sequence[int],
        shapes: Shapes,
        *,
        lr: float | Tensor,
        weight_decay: float,
        maximize: bool = False,
        **shared: Any,
    ) -> None:
        """Step along the gradients scaled by ``scales`` (``oz_*_apply``)."""
        none: States = [None] * len(params)
        options = _Options(maximize=maximize)
        columns = (params, grads, none, none, none, none, scales)
        shared.update(lr=lr, weight_decay=weight_decay)
        self._call("apply", columns, shapes, kinds, options, **shared)

    def center_(
        self,
        outs: Tensors,
        grads: Tensors,
        shapes: Shapes,
        *,
        eps: float,
        maximize: bool = False,
        **shared: Any,
    ) -> None:
        """Write rows less their mean, over their deviation, to ``outs`` (``oz_*_center``)."""
        none: States = [None] * len(outs)
        options = _Options(eps=eps, maximize=maximize)
        columns = (outs, grads, none, none, none, none, none)
        self._call("center", columns, shapes, [_ROWS] * len(outs), options, **shared)

    def sinkhorn_(
        self,
        params: Tensors,
        grads: Tensors,
        kinds: Sequence[int],
        shapes: Shapes,
        *,
        lr: Rate | list[Rate],
        weight_decay: float,
        iterations: int,
        maximize: bool = False,
        **shared: Any,
    ) -> None:
        """Take SinkGD's step (``oz_cpu_sinkhorn``); on a GPU Triton has it.

        ``kinds`` says what an iteration normalises first, rows or columns.
        """
        none: States = [None] * len(params)
        options = _Options(iterations=iterations, maximize=maximize)
        columns = (params, grads, none, none, none, none, none)
        shared.update(lr=lr, weight_decay=weight_decay)
        self._call("sinkhorn", columns, shapes, kinds, options, **shared)

    def history_dot(self, history: Tensor, vector: Tensor) -> Tensor:
        """Return ``history @ vector``, both float32 or bfloat16, in float32; CPU only."""
        return self._history("dot", history, vector, history.shape[0])

    def history_combine(self, history: Tensor, weights: Tensor) -> Tensor:
        """Return ``weights @ history`` for a float32 or bfloat16 history, in float32; CPU only."""
        return self._history("combine", history, weights, history.shape[1])

    def _history(self, operation: str, history: Tensor, vector: Tensor, size: int) -> Tensor:
        out = torch.empty(size, dtype=torch.float32, device=history.device)
        if isinstance(history, FakeTensor):
            return out
        library = self._loaded[0]
        assert library is not None
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (history, vector, out)]
        sizes = [ctypes.c_int64(n) for n in history.shape]
        settings = map(ctypes.c_int32, (TYPES[history.dtype], torch.get_num_threads()))
        getattr(library, f"oz_cpu_history_{operation}")(*pointers, *sizes, *settings)
        return out

    def nm_mask(self, weight: Tensor, n: int, m: int) -> Tensor:
        """Return the packed N:M mask of a contiguous weight, ``[rows, ⌈cols / 8⌉]``; CPU only."""
        rows, cols = weight.shape[0], weight[:1].numel()
        mask = torch.empty(rows, -(-cols // 8), dtype=torch.uint8, device=weight.device)
        if isinstance(weight, FakeTensor):
            return mask
        library = self._loaded[0]
        assert library is not None
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (weight, mask)]
        numbers = [TYPES[weight.dtype], n, m, torch.get_num_threads()]
        library.oz_cpu_nm_mask(
            *pointers, *(ctypes.c_int64(x) for x in (rows, cols)), *map(ctypes.c_int32, numbers)
        )
        return mask

    def _call(
        self,
        operation: str,
        columns: tuple[Sequence[Any], ...],
        shapes: Shapes,
        kinds: Sequence[int],
        options: _Options,
        *,
        lr: Rate | list[Rate] = 0.0,
        weight_decay: float | list[float] = 0.0,
        seed: int | None = None,
        step: int = 0,
        first_index: int = 0,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        table: Table | None = None,
    ) -> None:
        """Fill the table and call the kernel.

        Args:
            operation: the function's name without its prefix.
            columns: parameters, gradients, both moments, masks, steps, extras.
            shapes: rows and columns of each.
            kinds: ``enum oz_kind`` of each.
            options: options of this operation alone.
            lr: a number or a float32 tensor on the device, or a list with one for each tensor.
            weight_decay: a number, or a list with one for each tensor; negative: cautious.
            seed: seed of stochastic rounding; None rounds to nearest.
            step: step count of stochastic rounding.
            first_index: index of the first tensor in stochastic rounding.
            grad_scale: a float32 tensor; gradients are divided by it.
            found_inf: a float32 tensor; if it is not zero, nothing is written.
            table: table of an earlier call that differs in gradients, counts and rates alone.
        """
        params, grads = columns[:2]
        if not params or isinstance(params[0], FakeTensor):
            return  # shapes alone: kernels allocate nothing
        library, why = self._loaded
        if library is None:
            raise RuntimeError(f"no {self.kind} kernels: {why}")
        options.seed, options.step = seed or 0, step
        options.rounding, options.first_index = seed is not None, first_index
        options.grad_scale = None if grad_scale is None else grad_scale.data_ptr()
        options.found_inf = None if found_inf is None else found_inf.data_ptr()
        if table is None:
            table = Table(columns, shapes, kinds)
        else:
            table.set(grads, columns[5])
        table.set_rates(lr, weight_decay)
        function = getattr(library, f"oz_{self.kind}_{operation}")
        device = params[0].device
        arguments = (table.buffer, ctypes.c_int64(table.size), ctypes.byref(options))
        if self.kind == "cuda":
            with torch.cuda.device(device):
                stream = ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)
                status = function(*arguments, stream)
        else:
            options.threads = torch.get_num_threads()
            status = function(*arguments, None)
        if status:
            raise RuntimeError(
                f"the {self.kind} kernel {operation} failed with CUDA error {status}"
            )
        if operation != "reduce":
            torch.autograd.graph.increment_version(_written(columns))

    def scale_table(
        self,
        params: Tensors,
        grads: Tensors,
        exp_avgs: States,
        exp_avg_sqs: States,
        steps: States,
        kinds: Sequence[int],
        shapes: Shapes,
    ) -> Table:
        """Return a table for calls of :meth:`scale_` on these tensors."""
        extras = self._scale_scratch(params, kinds, shapes)
        none = [None] * len(params)
        columns = (params, grads, exp_avgs, exp_avg_sqs, none, steps, extras)
        return Table(columns, shapes, kinds)

    def _scale_scratch(self, params: Tensors, kinds: Sequence[int], shapes: Shapes) -> States:
        """Allocate the scratch memory of SCALE's step: on a GPU, for the sums by column."""
        scratch: list[Tensor | None] = [None] * len(params)
        library = self._loaded[0]
        if self.kind == "cpu" or library is None:
            return scratch
        library.oz_cuda_scale_scratch.restype = ctypes.c_int64
        for i, (p, kind, shape) in enumerate(zip(params, kinds, shapes, strict=True)):
            if kind == _COLUMNS:
                size = library.oz_cuda_scale_scratch(*map(ctypes.c_int64, shape))
                scratch[i] = torch.empty(size // 4 + 1, dtype=torch.float32, device=p.device)
        return scratch


def _written(columns: tuple[Sequence[Any], ...]) -> Iterable[Tensor]:
    """Return the parameters and moments, whose autograd version a call increments."""
    return [t for column in (columns[0], columns[2], columns[3]) for t in column if t is not None]


CPU = Library("cpu")
CUDA = Library("cuda")
