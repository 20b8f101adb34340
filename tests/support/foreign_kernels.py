"""A pytest plugin: another machine's CPU kernels, in an emulator, in place of the local ones.

`make check-aarch64` loads it. Every call goes through csrc/cross/server.cpp, so each test that
calls a kernel is a case. What the test sees is the library as it ships. Beside it, two builds
without fused multiplications run on the same memory, one of the other machine and one of this.
They must agree: to the bit, but for sums whose order the compilers choose, within what rounding
allows.
"""

import ctypes
import json
import os
import struct
import subprocess
from collections import Counter

import pytest
from kernel_differences import disagreement

from optimzoo.kernels import native
from optimzoo.kernels.library import ABI

OPERATIONS = ("scale", "adam", "reduce", "apply", "center", "sinkhorn")
ARRAYS = ("history_dot", "history_combine", "nm_mask")
SIZES = (4, 2, 2)  # bytes of each enum oz_type
POINTERS = ("param", "grad", "exp_avg", "exp_avg_sq", "mask", "step", "extra", "lr_tensor")
WRITTEN = {
    "scale": ("param", "exp_avg", "exp_avg_sq"),
    "adam": ("param", "exp_avg", "exp_avg_sq"),
    "reduce": ("extra",),
    "apply": ("param",),
    "center": ("param",),
    "sinkhorn": ("param",),
}
UNUSED = {"scale": ("extra",), "reduce": ("param",)}


class Regions:
    """The memory that a call touches, each piece once."""

    def __init__(self):
        self.places = {}  # address: [number, bytes, written]

    def number(self, address, size, written=False):
        """What stands for the pointer; 0 for NULL."""
        if not address:
            return 0
        entry = self.places.setdefault(address, [len(self.places) + 1, size, written])
        entry[1:] = max(entry[1], size), entry[2] or written
        return entry[0]

    def packed(self):
        """All of them with their bytes, as the server reads them."""
        parts = [struct.pack("=i", len(self.places))]
        for address, (_, size, written) in self.places.items():
            parts += [struct.pack("=qii", size, written, address % 64)]
            parts += [ctypes.string_at(address, size)]
        return b"".join(parts)

    def written(self):
        """Address and size of what an answer brings."""
        return [(at, size) for at, (_, size, written) in self.places.items() if written]


def sizes_of(row, operation):
    """Bytes behind each pointer of an `oz_tensor`, by its name."""
    rows, cols, ptype, gtype, mtype, kind = (row[i] for i in (8, 9, 12, 13, 14, 15))
    n = rows * cols
    extra = 3 if operation == "adam" else {0: rows, 1: cols}.get(kind, 4)
    if operation == "apply" and kind == 2:
        extra = 1
    return {
        "param": n * SIZES[ptype],
        "grad": n * SIZES[gtype],
        **dict.fromkeys(("exp_avg", "exp_avg_sq"), n * SIZES[mtype]),
        "mask": -(-n // 8),
        **dict.fromkeys(("step", "lr_tensor"), 4),
        "extra": 4 * extra,
    }


class Server:
    """A process with a build of the kernels."""

    def __init__(self, command):
        self.command = command
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=2**20
        )

    def call(self, request, written):
        """The bytes of what was written, in the order of `written`."""
        self.process.stdin.write(request)
        self.process.stdin.flush()
        status = struct.unpack("=i", self.process.stdout.read(4))[0]
        assert status == 0, f"{self.command} returned {status}"
        return [self.process.stdout.read(size) for _, size in written]

    def close(self):
        """End it."""
        self.process.stdin.close()
        assert self.process.wait() == 0
        self.process.stdout.close()


class Entry:
    """One exported function, as ctypes has it."""

    def __init__(self, run):
        self.run = run
        self.restype = ctypes.c_int

    def __call__(self, *arguments):
        return self.run(*arguments)


class Foreign:
    """In place of the library that ctypes loads."""

    def __init__(self, shipped, exact_there, exact_here):
        self.servers = [Server(command) for command in (shipped, exact_there, exact_here)]
        self.calls = Counter()

    def __getattr__(self, name):
        operation = name.removeprefix("oz_cpu_")
        if operation in ("isa", "abi", "threaded"):
            answer = {"isa": b"baseline", "abi": ABI, "threaded": 1}[operation]
            return Entry(lambda: answer)
        run = self.on_tensors if operation in OPERATIONS else self.on_arrays
        return Entry(lambda *arguments: run(operation, *arguments))

    def on_tensors(self, operation, buffer, count, options, _stream):
        """`oz_cpu_scale` and those of its form."""
        regions, rows, packed = Regions(), [], []
        for row in native._TENSOR.iter_unpack(bytes(buffer)):
            sizes, numbers = sizes_of(row, operation), []
            for i, name in enumerate(POINTERS):
                address = 0 if name in UNUSED.get(operation, ()) else row[i]
                numbers.append(regions.number(address, sizes[name], name in WRITTEN[operation]))
            packed.append(native._TENSOR.pack(*numbers, *row[8:]))
            rows.append((numbers, row))
        assert len(rows) == count.value
        copy = native._Options.from_buffer_copy(options._obj)
        for name in ("grad_scale", "found_inf"):
            setattr(copy, name, regions.number(getattr(copy, name), 4))
        body = b"".join([struct.pack("=q", len(rows)), *packed, bytes(copy)])
        self.exchange(operation, regions, body, rows, copy)
        return 0

    def on_arrays(self, operation, *arguments):
        """The functions of a history and of masks."""
        values = [a.value for a in arguments]
        count = 2 if operation == "nm_mask" else 3
        pointers, (rows, cols), numbers = values[:count], values[count : count + 2], values[-4:]
        size = SIZES[values[count + 2]]
        regions = Regions()
        sizes = {
            "history_dot": (rows * cols * size, cols * size, 4 * rows),
            "history_combine": (rows * cols * size, 4 * rows, 4 * cols),
            "nm_mask": (rows * cols * size, rows * -(-cols // 8)),
        }[operation]
        places = [
            regions.number(at, n, i == count - 1)
            for i, (at, n) in enumerate(zip(pointers, sizes, strict=True))
        ]
        numbers = values[count + 2 :]
        padded = (*numbers, *[0] * (4 - len(numbers)))
        body = struct.pack("=3q2q4i", *places, *[0] * (3 - count), rows, cols, *padded)
        self.exchange(operation, regions, body, [(places, values)], None)
        return 0

    def exchange(self, operation, regions, body, rows, options):
        """Run it everywhere; compare the exact builds; write what the shipped one wrote."""
        number = (*OPERATIONS, *ARRAYS).index(operation)
        request = struct.pack("=i", number) + regions.packed() + body
        written = regions.written()
        before = {n: ctypes.string_at(at, size) for at, (n, size, _) in regions.places.items()}
        shipped, there, here = (server.call(request, written) for server in self.servers)
        names = [regions.places[address][0] for address, _ in written]
        fault = disagreement(
            operation,
            rows,
            options,
            before,
            dict(zip(names, there, strict=True)),
            dict(zip(names, here, strict=True)),
        )
        assert not fault, f"{operation}: {fault}"
        self.calls[operation] += 1
        for (address, size), data in zip(written, shipped, strict=True):
            ctypes.memmove(address, data, size)


def pytest_configure(config):
    """Put them in place."""
    library = Foreign(*json.loads(os.environ["OPTIMZOO_FOREIGN"]))
    config.foreign = library
    native.CPU.__dict__["_loaded"] = (library, "")


def pytest_sessionfinish(session):
    """A run in which an operation was not called checks nothing of it."""
    calls = session.config.foreign.calls
    missing = [name for name in (*OPERATIONS, *ARRAYS) if not calls[name]]
    if missing:
        session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED
    for server in session.config.foreign.servers:
        server.close()


def pytest_terminal_summary(terminalreporter, config):
    """How many calls were compared."""
    counts = ", ".join(f"{config.foreign.calls[n]} {n}" for n in (*OPERATIONS, *ARRAYS))
    terminalreporter.write_line(f"calls compared: {counts}")
