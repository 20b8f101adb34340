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
ROWS = tl.constexpr(7)
COLS = tl.constexpr(8)
INDEX = tl.constexpr(9)
LENGTH = tl.constexpr(10)
FIRST = tl.constexpr(11)


class Record(NamedTuple):
    """One tensor's column of the table, except its first program; None if it has no such tensor."""

    param: Tensor | None
    grad: Tensor
    exp_avg: Tensor | None
    exp_avg_sq: Tensor | None
    mask: Tensor | None
    step: Tensor | None
    extra: Tensor | None
    rows: int
    cols: int
    order: int = 0  # the tensor's index in the call: of its rates, and in stochastic rounding
    length: int = 0  # how many elements a sum is over


@triton.jit
def number(mine, count, FIELD: tl.constexpr):
    """Load a field of a tensor, `mine` being its column of a table of `count`."""
    return tl.load(mine + FIELD * count)


@triton.jit
def rates_of(rates, mine, count):
    """Load a tensor's learning rate and decay."""
    at = rates + 2 * number(mine, count, INDEX)
    return tl.load(at), tl.load(at + 1)


@triton.jit
def owner(table, count):
    """Return the column of this program's tensor: the last whose first program is not after it."""
    program = tl.program_id(0)
    low = 0
    high = count
    while high - low > 1:
        middle = (low + high) // 2
        before = number(table + middle, count, FIRST) <= program
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    return table + low


@triton.jit
def unit(mine, count):
    """Return the index of this program among those of its tensor."""
    return tl.program_id(0) - number(mine, count, FIRST)


@triton.jit
def pointer(mine, count, FIELD: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Return a pointer to TYPE, aligned to 16 bytes if ALIGNED; the address if TYPE is None."""
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
    if ALIGNED:
        cols = cols // 8 * 8  # unchanged, but tells the compiler that it is a multiple of 8
    return cols


@triton.jit
def tile(row, col, rows, cols):
    """Return row-major indices of all pairs of these rows and columns, and which of them exist."""
    inside = (row < rows)[:, None] & (col < cols)[None, :]
    return row[:, None] * cols + col[None, :], inside


@triton.jit
def block(mine, count, found_inf, ALIGNED: tl.constexpr, C: tl.constexpr):
    """Return indices of this program's C elements of a tensor ``[1, n]``, and which exist."""
    at = unit(mine, count) * C + tl.arange(0, C)
    return at, at < width(mine, count, ALIGNED) * height(mine, count, found_inf)
