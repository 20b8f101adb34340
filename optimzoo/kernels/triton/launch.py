"""Launches of a kernel over many tensors: buckets of like tensors, and their tables."""

import functools
import itertools
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from optimzoo.kernels.native import Rate
from optimzoo.kernels.triton import table as T
from optimzoo.kernels.triton.table import Record

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
# Arguments that change between steps, or have any address: no kernel is specialized for them.
UNSPECIALIZED = (
    *("count", "grad_scale", "found_inf"),
    *("seed_low", "seed_high", "step_low", "step_high", "first_index"),
)
_SHORT = 256  # columns: of shorter rows too much would be beside the vectors
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


class _Launch:
    """One kernel on all tensors that are alike in types, alignment and tile."""

    def __init__(
        self, kernel: Any, at: int, orders: list[int], programs: int, constants: dict[str, Any]
    ) -> None:
        self.kernel = kernel
        self.at = at  # where its table begins, in words
        self.orders = orders  # the tensors' indices in the call
        self.grid = (programs, 1, 1)
        self.warps = constants.pop("num_warps")
        self.constants = {**constants, "count": len(orders)}
        self.compiled: dict[Any, Any] = {}

    def __call__(self, table: Tensor, arguments: dict[str, Any], variant: Any) -> None:
        values_by_name = {**arguments, **self.constants, "table": table}
        values = [values_by_name[name] for name in self.kernel.arg_names]
        compiled = self.compiled.get(variant)
        if compiled is not None:  # Triton then does not look at each argument again
            compiled[self.grid](*values)
        else:  # the interpreter returns None
            self.compiled[variant] = self.kernel[self.grid](*values, num_warps=self.warps)


class Plan:
    """Launches of one call, with one table for all of them."""

    def __init__(self, grads: Sequence[Tensor], steps: Sequence[Tensor | None] = ()) -> None:
        self._device = grads[0].device
        self._stream = _stream(self._device)
        self.captured = _capturing(self._device)
        self._addresses = _addresses(grads), _addresses(steps)
        self._rates: Any = None
        self._launches: list[_Launch] = []
        self._words = array("q")
        self._tables: list[Tensor] | None = None  # one a launch, on the device
        self._memory: list[Tensor] = []

    def scratch(self, sizes: Sequence[int]) -> Sequence[Tensor]:
        """Return float32 memory of these sizes, which lives as long as the plan."""
        if not sizes:
            return ()
        padded = [-(-size // 4) * 4 for size in sizes]
        whole = torch.empty(sum(padded), dtype=torch.float32, device=self._device)
        self._memory.append(whole)
        return whole.split(padded)

    def add(
        self,
        kernel: Any,
        records: Iterable[Record],
        tile_of: Callable[[Record], Tile],
        **constants: Any,
    ) -> None:
        """Add a launch for all records alike in types, alignment and tile; leave out empty ones."""
        buckets: dict[Any, tuple[list[Record], list[int]]] = {}
        for record in records:
            if record.rows and record.cols:
                aligned = _aligned(record)
                tile = tile_of(record)
                key = _types(record), aligned, record.rows * record.cols >> 32 > 0, tile[:2]
                bucket, units = buckets.setdefault(key, ([], []))
                bucket.append(record)
                units.append(tile.units)
        for (types, aligned, huge, (shape, warps)), (bucket, units) in buckets.items():
            launch_constants = {**constants, **dict(zip("PGM", types, strict=True)), **dict(shape)}
            launch_constants |= {"ALIGNED": aligned, "HUGE": huge, "num_warps": warps}
            launch_constants["SEARCH"] = next(size for size in T.SEARCHES if len(bucket) <= size)
            orders = [record.order for record in bucket]
            self._launches.append(
                _Launch(kernel, len(self._words), orders, sum(units), launch_constants)
            )
            self._words.extend(_columns(bucket, units))

    @contextmanager
    def repeated(self, times: int) -> Iterator[None]:
        """Run the launches that are added inside ``times`` times."""
        start = len(self._launches)
        yield
        self._launches[start:] *= times

    def renew(self, grads: Sequence[Tensor], steps: Sequence[Tensor | None]) -> bool:
        """Take other gradients and counts; return False if they need another plan."""
        if self._stream != _stream(self._device) or _capturing(self._device):
            return False
        addresses = _addresses(grads), _addresses(steps)
        if addresses != self._addresses:
            pairs = zip(addresses[0], self._addresses[0], strict=True)
            if any((new ^ old) % 16 for new, old in pairs):
                return False  # 16-byte accesses fit other tensors than before
            self._addresses = addresses
            self._write(T.GRAD, addresses[0])
            self._write(T.STEP, addresses[1])
        return True

    def run(
        self, lr: Rate | list[Rate] = 0.0, weight_decay: float | list[float] = 0.0, **arguments: Any
    ) -> None:
        """Launch all; each kernel takes those of the arguments that it has."""
        if not self._launches:
            return
        self._set_rates(lr, weight_decay)
        # What a kernel is compiled for, besides what is a launch's own: the values of constants,
        # which have upper-case names, and the types of the rest.
        variant = tuple([v if k.isupper() else type(v) for k, v in arguments.items()])
        with torch.cuda.device(self._device.index if self._device.type == "cuda" else -1):
            if self._tables is None:
                whole = _upload(self._words, self._device)
                self._tables = [whole[launch.at :] for launch in self._launches]
            for launch, table in zip(self._launches, self._tables, strict=True):
                launch(table, arguments, variant)

    def _set_rates(self, lr: Rate | list[Rate], weight_decay: float | list[float]) -> None:
        count = len(self._addresses[0])
        lrs = lr if isinstance(lr, list) else [lr] * count
        decays = weight_decay if isinstance(weight_decay, list) else [weight_decay] * count
        away = [rate.data_ptr() if isinstance(rate, Tensor) else 0 for rate in lrs]
        numbers = [0.0 if isinstance(rate, Tensor) else rate for rate in lrs]
        if self._rates != (away, numbers, decays):
            self._rates = away, numbers, list(decays)
            pairs = array("f", itertools.chain.from_iterable(zip(numbers, decays, strict=True)))
            self._write(T.LR, away)
            self._write(T.RATES, memoryview(pairs).cast("B").cast("q").tolist())

    def _write(self, field: Any, values: list[int]) -> None:
        """Write a field of all tensors, whose values are in the order of the call."""
        for launch in self._launches:
            at = launch.at + field.value * len(launch.orders)
            some = array("q", [values[order] for order in launch.orders])
            self._words[at : at + len(some)] = some
        self._tables = None


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


def _aligned(record: Record) -> int:
    """Return where 16-byte loads fit: `EACH_ROW`'s beginning, the `FIRST_ROW`'s alone, or 0."""
    tensors = (t for t in record[:4] if t is not None)
    if any(t.data_ptr() % 16 for t in tensors):
        return 0
    if record.cols % 8:
        return int(T.FIRST_ROW.value) if record.cols > _SHORT else 0
    return int(T.EACH_ROW.value)


def _addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    return [0 if t is None else t.data_ptr() for t in tensors]


def _columns(bucket: list[Record], units: list[int]) -> Iterator[int]:
    """Return the table's values, field by field."""
    first = itertools.accumulate(units, initial=0)
    rows = [
        (*_addresses(record[:7]), 0, 0, *record[7:], start)
        for record, start in zip(bucket, first, strict=False)
    ]
    return itertools.chain.from_iterable(zip(*rows, strict=True))


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _upload(words: "array[int]", device: torch.device) -> Tensor:
    if device.type == "cpu":
        return torch.tensor(words, dtype=torch.int64)
    if _capturing(device):
        return _staging().upload(words, device)
    return _cached(words.tobytes(), device, _stream(device))


@functools.lru_cache(maxsize=64)
def _cached(words: bytes, device: torch.device, stream: int) -> Tensor:
    """Copy a table to the device; cached by content, and by the stream on which it is ready."""
    _staging()
    host = torch.frombuffer(bytearray(words), dtype=torch.int64).pin_memory()
    return host.to(device, non_blocking=True)


class _Staging:
    """Pinned memory from which captured graphs copy their tables at every replay: never reused.

    It is allocated at the first launch, as nothing may be pinned during a capture.
    """

    def __init__(self) -> None:
        self.buffer = torch.empty(_STAGING, dtype=torch.int64, pin_memory=True)
        self.used = 0

    def upload(self, words: "array[int]", device: torch.device) -> Tensor:
        part = self.buffer[self.used : self.used + len(words)]
        if len(part) < len(words):
            raise RuntimeError(
                f"CUDA graphs hold {self.used} words of kernel tables, all of {_STAGING}; "
                "capture fewer graphs in one process"
            )
        self.used += len(words)
        part.copy_(torch.frombuffer(words, dtype=torch.int64))
        return part.to(device, non_blocking=True)


_staging = functools.cache(_Staging)
