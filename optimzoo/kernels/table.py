"""Table of one call's tensors for the native kernels: `oz_tensor` of csrc/include/optimzoo.h."""

import ctypes
import itertools
import struct
from array import array
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_TENSOR = struct.Struct("=8Q2q2f4i")
_GRAD, _STEP, _LR_TENSOR, _LR_AND_DECAY = 1, 5, 7, 10  # indices of its 8-byte words
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
Shapes = Sequence[tuple[int, int]]
Tensors = Sequence[Tensor]
States = Sequence[Tensor | None]
Rate = float | Tensor  # a tensor is float32, on the weights' device


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
