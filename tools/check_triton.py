"""Compile every Triton kernel ahead of time and check its machine code: no GPU is needed.

    python tools/check_triton.py [--arch 90] [--allow-missing]

For sm_90 each kernel is compiled for the types and options that matter, for sm_80 and sm_100 once.
The check fails, with exit status 1, if a kernel does not compile, spills registers, uses local
memory, needs more registers than its budget below, or, where rows are aligned, does not read or
write 16 bytes at a time. Without Triton it fails too, unless --allow-missing.
"""

import argparse
import importlib
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# Registers a thread: on the usual path, and where rounding is stochastic, weights are masked,
# momentum is Nesterov's, rows of SinkGD's are long, or rows are not aligned. 128 threads of 128
# registers fit an SM four times, with 64 KiB in flight.
BUDGETS = {
    "scale._rows": (112, 160),
    "scale._signs": (40, 40),
    "adam._adam": (96, 112),
    "reduce._rows": (64, 64),
    "reduce._column_parts": (96, 96),
    "reduce._column_ends": (64, 64),
    "reduce._clipped_parts": (64, 64),
    "reduce._clipped_ends": (48, 48),
    "apply._apply": (96, 112),
    "center._center": (104, 104),
    "sinkhorn._pass": (64, 240),
    "sinkhorn._column_scales": (64, 64),
    "sinkhorn._step": (64, 128),
}
BIN = "backends/nvidia/bin"
POINTERS = {"table": "*i64", "grad_scale": "*fp32", "found_inf": "*fp32"}
INTEGERS = ("count", "seed_low", "seed_high", "step_low", "step_high", "first_index")
ALL = (("bf16", "bf16"), ("fp32", "fp32"), ("fp16", "fp16"), ("bf16", "fp32"), ("fp32", "bf16"))
SAME = ALL[:2]


class Case(NamedTuple):
    """One kernel with one set of constants."""

    kernel: str
    constants: dict[str, Any]  # types by name; None: no such tensor, or no such pointer
    warps: int
    wide: bool  # must have 16-byte loads and, if it writes parameters, stores

    @property
    def usual(self) -> bool:
        """Return whether the first of the kernel's budgets applies."""
        rare = any(self.constants.get(name) for name in ("STOCHASTIC", "MASKED", "NESTEROV"))
        long = self.kernel.startswith("sinkhorn.") and bool(self.constants.get("LOOP"))
        return self.constants["ALIGNED"] == 1 and not rare and not long

    def __str__(self) -> str:
        shown = [f"{k}={v}" for k, v in self.constants.items() if v not in (None, False)]
        return f"{self.kernel} {' '.join(shown)}"


def rows_cases() -> Iterator[Case]:
    """Yield the cases of kernels over whole rows."""
    for cols in (64, 2048, 16384, 32768):
        for p, g in ALL if cols == 2048 else SAME:
            yield case("scale._rows", cols, P=p, G=g, M=None, L2=False)
        yield case("scale._rows", cols, P="bf16", G="bf16", M="bf16", L2=False)
    yield case("scale._rows", 4096, P="fp32", G="fp32", M="fp32", L2=False)
    for cols in (2048, 16384, 32768):
        for p, g in SAME:
            yield case("scale._rows", cols, P=p, G=g, M=p, L2=True, NESTEROV=True)
    yield case("scale._rows", 5461, P="bf16", G="bf16", M="bf16", L2=True, NESTEROV=1, ALIGNED=2)
    yield case("scale._rows", 4096, P="bf16", G="bf16", M="fp32", L2=True, grad_scale=True)
    yield case("scale._rows", 16384, P="bf16", G="bf16", M="fp32", L2=False)
    yield case("scale._rows", 32768, P="bf16", G="bf16", M="fp32", L2=False)
    yield case("scale._rows", 4096, P="bf16", G="bf16", M=None, L2=False, STOCHASTIC=True)
    yield case("scale._rows", 16384, P="bf16", G="bf16", M=None, L2=False, STOCHASTIC=True)
    yield case("scale._rows", 4096, P="fp16", G="fp16", M="fp16", L2=False, STOCHASTIC=True)
    yield case("scale._rows", 2048, P="bf16", G="bf16", M=None, L2=False, ALIGNED=0)
    for cols in (1025, 5461, 11009):
        for p, g in SAME:
            yield case("scale._rows", cols, P=p, G=g, M=None, L2=False, ALIGNED=2)
        yield case("scale._rows", cols, P="bf16", G="bf16", M="bf16", L2=False, ALIGNED=2)
    yield case("scale._rows", 4096, P="bf16", G="bf16", M=None, L2=0, STOCHASTIC=True, HUGE=True)
    for cols in (2048, 16384, 32768):
        for p, g in SAME:
            yield case("center._center", cols, P=p, G=g, M=None)
        yield case("reduce._rows", cols, P=None, G="bf16", M=None)
        for p, g in SAME:
            for normalize in (False, True):
                flags = {"M": None, "FIRST": normalize and cols == 2048, "NORMALIZE": normalize}
                yield case("sinkhorn._pass", cols, P=None, G=g, **flags)
                yield case("sinkhorn._step", cols, P=p, G=g, **flags)
    yield case("sinkhorn._step", 4096, P="bf16", G="bf16", M=None, STOCHASTIC=True, NORMALIZE=False)
    yield case("center._center", 4096, P="bf16", G="bf16", M=None, STOCHASTIC=True)


def other_cases() -> Iterator[Case]:
    """Yield the cases of kernels over blocks of elements and over columns."""
    for p, g in ALL:
        yield case("adam._adam", 4096, P=p, G=g, M=p, **adam())
    yield case("adam._adam", 4096, P="bf16", G="bf16", M="fp32", **adam(), STOCHASTIC=True)
    yield case("adam._adam", 4096, P="fp16", G="fp16", M="fp16", **adam(), STOCHASTIC=True)
    yield case("adam._adam", 4096, P="fp32", G="fp32", M="fp32", **adam(MASKED=True))
    yield case("adam._adam", 4096, P="fp32", G="bf16", M="fp32", **adam(CLIPPED=True, BEFORE=True))
    yield case("adam._adam", 4096, P="fp32", G="fp32", M="fp32", **adam(DIRECTION=True))
    for p, g in SAME:
        yield case("scale._signs", 4096, P=p, G=g, M=None)
        for kind in range(3):
            yield case("apply._apply", 4096, P=p, G=g, M=None, KIND=kind)
    yield case("apply._apply", 4096, P="bf16", G="bf16", M=None, KIND=1, STOCHASTIC=True)
    yield case("scale._signs", 4096, P="bf16", G="bf16", M="bf16", STOCHASTIC=True)
    yield case("apply._apply", 4096, P="bf16", G="bf16", M="bf16", KIND=1)
    yield case("apply._apply", 4096, P="fp32", G="fp32", M="fp32", KIND=1, NESTEROV=True)
    yield case("reduce._column_parts", 4096, P=None, G="fp32", M="fp32", NESTEROV=True)
    for g, m in (("bf16", None), ("fp32", None), ("bf16", "bf16"), ("fp32", "fp32")):
        yield case("reduce._column_parts", 4096, P=None, G=g, M=m)
    yield case("reduce._column_ends", 4096, P=None, G="fp32", M=None, INVERT=True, L2=False)
    yield case("sinkhorn._column_scales", 4096, P=None, G="fp32", M=None, FIRST=False)
    yield case("reduce._clipped_parts", 4096, P=None, G="bf16", M=None)
    yield case("reduce._clipped_ends", 4096, P=None, G="fp32", M=None)


def adam(**flags: bool) -> dict[str, bool]:
    """Return the flags of Adam's kernel, all off but those given."""
    return {"BEFORE": False, "DIRECTION": False, "MASKED": False, "CLIPPED": False, **flags}


def case(kernel: str, cols: int, **constants: Any) -> Case:
    """Return a case on tensors of `cols` columns, with the tile that a launch would choose."""
    import torch

    from optimzoo.kernels.triton import launch, reduce, sinkhorn
    from optimzoo.kernels.triton.table import Record

    types = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    param, average = (
        torch.empty(0, dtype=types[constants[name]]) if constants[name] else None for name in "PM"
    )
    grad = torch.empty(0, dtype=types[constants["G"]])
    record = Record(param, grad, average, None, None, None, None, 4096, cols, 0)
    name = kernel.split(".")[1]
    tiles = {
        "_adam": launch.flat_tile,
        "_signs": launch.flat_tile,
        "_apply": launch.block_tile,
        "_column_parts": reduce._part_tile,
        "_column_ends": reduce.end_tile,
        "_pass": sinkhorn._pass_tile,
        "_step": sinkhorn._step_tile,
        "_column_scales": reduce.end_tile,
        "_clipped_parts": reduce._span_tile,
        "_clipped_ends": reduce._last_tile,
    }
    tile = tiles.get(name, launch.row_tile)(record)
    if not constants.pop("grad_scale", False):
        constants.update(grad_scale=None, found_inf=None)
    constants = {
        "ALIGNED": 1,
        "HUGE": False,
        "SEARCH": 256,
        "STOCHASTIC": False,
        "NESTEROV": False,
        **constants,
    }
    wide = constants["ALIGNED"] > 0 and not name.endswith(("_ends", "_scales"))
    return Case(kernel, {**constants, **dict(tile.constants)}, tile.warps, wide)


def compiled(case: Case, arch: int) -> bytes:
    """Compile a case and return its cubin."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, name = case.kernel.split(".")
    home = importlib.import_module(f"optimzoo.kernels.triton.{module}")
    kernel = getattr(home, name)
    types = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}
    constants = {
        k: types.get(v, v) if isinstance(v, str) else v
        for k, v in case.constants.items()
        if k in kernel.arg_names
    }
    signature = {
        arg: "constexpr"
        if arg in constants
        else POINTERS.get(arg, "i32" if arg in INTEGERS else "fp32")
        for arg in kernel.arg_names
    }
    source = ASTSource(kernel, signature, constants, {(0,): [["tt.divisibility", 16]]})
    options = {"num_warps": case.warps}
    result = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return bytes(result.asm["cubin"])


def examined(case: Case, arch: int) -> tuple[str, list[str]]:
    """Return a case's line of the table, and its faults."""
    try:
        cubin = compiled(case, arch)
    except Exception as error:  # the compiler's errors are of many types
        return f"{'-':>5} {'-':>6} {'-':>5} {'-':>5}", [f"does not compile: {error}"]
    bin_folder = Path(importlib.import_module("triton").__file__ or "").parent / BIN
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run(
                [bin_folder / "cuobjdump", flag, file.name], capture_output=True, text=True
            ).stdout
            for flag in ("-res-usage", "-sass")
        )
    registers, stack, local = (
        max(map(int, re.findall(rf"\b{name}:(\d+)", usage))) for name in ("REG", "STACK", "LOCAL")
    )
    loads, stores = (len(re.findall(rf"\b{op}\.E(?:\.\w+)*\.128", code)) for op in ("LDG", "STG"))
    spills = len(re.findall(r"\b(?:LDL|STL)\b", code))
    wrong = []
    if stack or local or spills:
        wrong.append(f"{stack} bytes of stack, {local} of local memory, {spills} LDL/STL")
    budget = BUDGETS[case.kernel][not case.usual]
    if registers > budget:
        wrong.append(f"{registers} registers, budget {budget}")
    # Rows that begin anywhere have elements beside their vectors.
    if case.wide and case.constants["ALIGNED"] == 1 and re.search(r"\b(?:LDG|STG)\.E\.U16\b", code):
        wrong.append("elements of 16 bits are read or written one by one")
    if case.wide and not loads:
        wrong.append("no LDG.E.128")
    if case.wide and case.constants["P"] and not stores:
        wrong.append("no STG.E.128")
    return f"{registers:>5} {local + stack:>6} {loads:>5} {stores:>5}", wrong


def main() -> int:
    """Run the check; return 0 if every kernel passes, else 1."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", type=int, help="all cases for this one, as 90 for sm_90")
    parser.add_argument("--allow-missing", action="store_true", help="pass without Triton")
    options = parser.parse_args()
    if importlib.util.find_spec("triton") is None:
        print("triton is not installed, so nothing was checked; pip install triton")
        return 0 if options.allow_missing else 1
    os.environ.pop("TRITON_INTERPRET", None)
    cases = [*rows_cases(), *other_cases()]
    work = [(c, options.arch or 90) for c in cases]
    if not options.arch:
        first = {c.kernel: c for c in reversed(cases)}.values()
        work += [(c, arch) for arch in (80, 100) for c in first]
    failed = 0
    print("arch   regs  local  ld128 st128  kernel")
    arguments = zip(*work, strict=True)
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(examined, *arguments)
        for (c, arch), (line, wrong) in zip(work, results, strict=True):
            print(f"sm_{arch:<4}{line}  {c}" + "".join(f"\n  FAILED: {w}" for w in wrong))
            failed += bool(wrong)
    print(f"{len(work)} compiled, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
