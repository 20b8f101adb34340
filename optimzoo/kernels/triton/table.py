# mypy: disallow-untyped-defs=False
"""Table that tells a launch's programs which tensor is theirs, and its addresses.

It is an int64 array ``[fields, tensors]`` on the device: addresses, sizes, and the first program of
each tensor. So one launch steps all tensors of a kind, and its arguments do not grow with them.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

PARAM = tl.constexpr(0)
GRAD = tl.constexpr(1)
EXP_AVG = tl.constexpr(2)
EXP_AVG_SQ = tl.constexpr(3)
MASK = tl.constexpr(4)
STEP = tl.constexpr(5)
EXTRA = tl.constexpr(6)
LR = tl.constexpr(7)  # address of the learning rate; 0: it is in RATES
RATES = tl.constexpr(8)  # two float32: the learning rate and the decay
ROWS = tl.constexpr(9)
COLS = tl.constexpr(10)
INDEX = tl.constexpr(11)
LENGTH = tl.constexpr(12)
FIRST = tl.constexpr(13)  # 14 fields, an even number: each table begins at a multiple of 16 bytes
SEARCHES = (16, 256, 4096, 65536)  # a launch's number of tensors, rounded up
# How 16-byte accesses fit, ALIGNED of a kernel; 0: not at all.
EACH_ROW = tl.constexpr(1)
FIRST_ROW = tl.constexpr(2)


class Record(NamedTuple):
    """One tensor's column of the table: None if it has no such tensor; rates come with a run."""

    param: Tensor | None
    grad: Tensor
    exp_avg: Tensor | None
    exp_avg_sq: Tensor | None  # or partial sums
    mask: Tensor | None
    step: Tensor | None
    extra: Tensor | None
    rows: int
    cols: int
    order: int  # the tensor's index in the call
    length: int = 0  # how many elements a sum is over


@triton.jit
def number(mine, count, FIELD: tl.constexpr):
    """Load a field of a tensor, `mine` being its column of a table of `count`."""
    return tl.load(mine + FIELD * count)


@triton.jit
def rates_of(mine, count):
    """Load a tensor's learning rate and decay."""
    both = number(mine, count, RATES)
    lr = both.to(tl.int32).to(tl.float32, bitcast=True)
    weight_decay = (both >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    away = number(mine, count, LR)
    lr = tl.load(away.to(tl.pointer_type(tl.float32)), mask=away != 0, other=lr)
    return lr, weight_decay


@triton.jit
def owner(table, count, SEARCH: tl.constexpr):
    """Return the column of this program's tensor: the last whose first program is not after it."""
    # All at once: a binary search would be a chain of loads before the first one that matters.
    at = tl.arange(0, SEARCH)
    first = tl.load(table + FIRST * count + at, mask=at < count, other=1 << 62)
    return table + (tl.sum((first <= tl.program_id(0)).to(tl.int32), 0) - 1)


@triton.jit
def unit(mine, count):
    """Return the index of this program among those of its tensor."""
    return tl.program_id(0) - number(mine, count, FIRST)


@triton.jit
def pointer(mine, count, FIELD: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Return a pointer to TYPE, aligned to 16 bytes unless ALIGNED is 0; of no TYPE the address."""
    address = number(mine, count, FIELD)
    if TYPE is not None:
        address = address.to(tl.pointer_type(TYPE))
        if ALIGNED:
            address = tl.multiple_of(address, 16)
    return address


@triton.jit
def height(mine, count, found_inf):
    """Load the number of rows; 0, so that nothing is written, if `found_inf` is not zero."""
    rows = number(mine, count, ROWS)
    if found_inf is not None:
        rows = tl.where(tl.load(found_inf) != 0, 0, rows)
    return rows


@triton.jit
def width(mine, count, ALIGNED: tl.constexpr):
    """Load the number of columns."""
    cols = number(mine, count, COLS)
    if ALIGNED == EACH_ROW:
        cols = cols // 8 * 8  # unchanged, but tells the compiler that it is a multiple of 8
    return cols


@triton.jit
def tile(row, col, rows, cols):
    """Return row-major indices of all pairs of these rows and columns, and which of them exist."""
    inside = (row < rows)[:, None] & (col < cols)[None, :]
    return row[:, None] * cols + col[None, :], inside


@triton.jit
def odd_rows(row, rows, cols, C: tl.constexpr):
    """Return indices in rows that begin anywhere: of vectors of 8, and of up to 7 at each end.

    They are relative to the first of the results, a multiple of 8 not behind the row's beginning,
    as are the vectors' own. With each come which of them exist.
    """
    start = (row * cols)[:, None]
    base = start // 8 * 8
    begin = (start - base).to(tl.int32)
    end = tl.where((row < rows)[:, None], begin + cols.to(tl.int32), begin)
    first = (begin + 7) // 8 * 8
    last = end // 8 * 8
    at = first + tl.arange(0, C)[None, :]
    edge = tl.arange(0, 16)[None, :]
    tail = tl.where(first < end, last, end)
    edges = tl.where(edge < 8, begin + edge, tail + edge - 8)
    return base, at, at < last, edges, edges < tl.where(edge < 8, tl.minimum(first, end), end)


@triton.jit
def block(mine, count, found_inf, ALIGNED: tl.constexpr, C: tl.constexpr):
    """Return indices of this program's C elements of a tensor ``[1, n]``, and which exist."""
    at = unit(mine, count) * C + tl.arange(0, C)
    return at, at < width(mine, count, ALIGNED) * height(mine, count, found_inf)
