"""Launches of a kernel over many tensors: buckets of like tensors, and their tables."""

import functools
import itertools
import struct
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from optimzoo.kernels.table import Rate
from optimzoo.kernels.triton.table import Record

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
# Arguments that change between steps, or have any address: no kernel is specialized for them.
UNSPECIALIZED = (
    *("count", "rates", "grad_scale", "found_inf"),
    *("seed_low", "seed_high", "step_low", "step_high", "first_index"),
)
_STAGING = 1 << 20  # int64s, 8 MiB: tables of some 80 captures of 1,000 tensors


class Tile(NamedTuple):
    """Tiling of a tensor: a kernel's constants, its warps, and the tensor's number of programs."""

    constants: tuple[tuple[str, int], ...]
    warps: int
    units: int


def pow2(n: int) -> int:
    """Return the least power of two that is not below ``n``."""
    return 1 << max(n - 1, 0).bit_length()


def ceil_div(a: int, b: int) -> int:
    """Return ``a / b``, rounded up."""
    return -(-a // b)


def row_tile(record: Record) -> Tile:
    """Return the tile of a kernel on rows: whole up to 16,384 columns, longer ones in parts."""
    width = pow2(record.cols)
    loop = width > 16384
    if loop:
        width = 8192
    height = max(1, 4096 // width)
    constants = (("R", height), ("C", width), ("LOOP", int(loop)))
    warps = height * width // (512 if mixed(record) else 1024)
    return Tile(constants, max(4, warps), ceil_div(record.rows, height))


def block_tile(record: Record, size: int = 4096) -> Tile:
    """Tile blocks of ``size`` elements, 512 columns wide where the tensor is tall enough."""
    height = min(pow2(record.rows), max(8, size // pow2(record.cols)))
    width = min(pow2(record.cols), size // height)
    units = ceil_div(record.rows, height) * ceil_div(record.cols, width)
    return Tile((("R", height), ("C", width)), 4, units)


def flat_tile(record: Record, size: int = 2048) -> Tile:
    """Tile blocks of ``size`` elements in a row; the record is ``[1, n]``."""
    return Tile((("C", size),), 8 if mixed(record) else 4, ceil_div(record.cols, size))


def mixed(record: Record) -> bool:
    """Return whether the outputs differ in element size: to exchange them takes registers."""
    return len({t.element_size() for t in (record.param, record.exp_avg) if t is not None}) > 1


def launch(
    kernel: Any, records: Iterable[Record], tile_of: Callable[[Record], Tile], **arguments: Any
) -> None:
    """Launch once for all records alike in types, alignment and tile; leave out empty ones."""
    buckets: dict[Any, tuple[list[Record], list[int]]] = {}
    for record in records:
        if record.rows and record.cols:
            tile = tile_of(record)
            key = _types(record), _aligned(record), record.rows * record.cols >> 32 > 0, tile[:2]
            bucket, units = buckets.setdefault(key, ([], []))
            bucket.append(record)
            units.append(tile.units)
    for (types, aligned, huge, (constants, warps)), (bucket, units) in buckets.items():
        with torch.cuda.device_of(bucket[0].grad):
            table = _upload(_columns(bucket, units), bucket[0].grad.device)
            kernel[(sum(units),)](
                table,
                len(bucket),
                **arguments,
                **dict(zip("PGM", types, strict=True)),
                ALIGNED=aligned,
                HUGE=huge,
                **dict(constants),
                num_warps=warps,
            )


def rates_table(
    lr: Rate | list[Rate], weight_decay: float | list[float], count: int, device: torch.device
) -> Tensor:
    """Return the learning rate and the decay of ``count`` tensors, in pairs, on the device."""
    lrs = lr if isinstance(lr, list) else [lr] * count
    decays = weight_decay if isinstance(weight_decay, list) else [weight_decay] * count
    numbers = [0.0 if isinstance(rate, Tensor) else rate for rate in lrs]
    pairs = itertools.chain.from_iterable(zip(numbers, decays, strict=True))
    words = struct.unpack(f"={count}q", struct.pack(f"={2 * count}f", *pairs))
    rates = _upload(words, device).view(torch.float32)
    if any(isinstance(rate, Tensor) for rate in lrs):
        own = [r if isinstance(r, Tensor) else rates[2 * i] for i, r in enumerate(lrs)]
        rates = torch.stack([torch.stack(own), rates[1::2]], dim=1)
    return rates


def scalars(
    *,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    seed: int | None = None,
    step: int = 0,
    first_index: int = 0,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the arguments that several kernels take: on gradients, and on rounding."""
    gradient = {
        "sign": -1.0 if maximize else 1.0,
        "grad_scale": grad_scale,
        "found_inf": found_inf,
    }
    rounding = {
        "seed_low": _int32(seed or 0),
        "seed_high": _int32((seed or 0) >> 32),
        "step_low": _int32(step),
        "step_high": _int32(step >> 32),
        "first_index": _int32(first_index),
        "STOCHASTIC": seed is not None,
    }
    return gradient, rounding


def written(*columns: Sequence[Tensor | None]) -> None:
    """Tell autograd that these tensors have changed."""
    torch.autograd.graph.increment_version([t for c in columns for t in c if t is not None])


def _int32(word: int) -> int:
    word &= 0xFFFFFFFF
    return word - (1 << 32) if word >> 31 else word


def _types(record: Record) -> tuple[Any, ...]:
    return tuple(None if t is None else TYPES[t.dtype] for t in record[:3])


def _aligned(record: Record) -> bool:
    """Return whether each row of each tensor begins where a 16-byte load may."""
    tensors = (t for t in record[:4] if t is not None)
    return record.cols % 8 == 0 and all(t.data_ptr() % 16 == 0 for t in tensors)


def _columns(bucket: list[Record], units: list[int]) -> tuple[int, ...]:
    """Return the table's values, field by field."""
    first = itertools.accumulate(units, initial=0)
    rows = [
        (*(0 if t is None else t.data_ptr() for t in record[:7]), *record[7:], start)
        for record, start in zip(bucket, first, strict=False)
    ]
    return tuple(itertools.chain.from_iterable(zip(*rows, strict=True)))


def _upload(values: tuple[int, ...], device: torch.device) -> Tensor:
    if device.type == "cpu":
        return torch.tensor(values)
    if torch.cuda.is_current_stream_capturing():
        return _staging().upload(values, device)
    return _cached(values, device, torch.cuda.current_stream(device).cuda_stream)


@functools.lru_cache(maxsize=64)
def _cached(values: tuple[int, ...], device: torch.device, stream: int) -> Tensor:
    """Copy a table to the device; cached by content, and by the stream on which it is ready."""
    _staging()
    return torch.tensor(values).pin_memory().to(device, non_blocking=True)


class _Staging:
    """Pinned memory from which captured graphs copy their tables at every replay: never reused.

    It is allocated at the first launch, as nothing may be pinned during a capture.
    """

    def __init__(self) -> None:
        self.buffer = torch.empty(_STAGING, dtype=torch.int64, pin_memory=True)
        self.used = 0

    def upload(self, values: tuple[int, ...], device: torch.device) -> Tensor:
        part = self.buffer[self.used : self.used + len(values)]
        if len(part) < len(values):
            raise RuntimeError(
                f"CUDA graphs hold {self.used} words of kernel tables, all of {_STAGING}; "
                "capture fewer graphs in one process"
            )
        self.used += len(values)
        part.copy_(torch.tensor(values))
        return part.to(device, non_blocking=True)


_staging = functools.cache(_Staging)
