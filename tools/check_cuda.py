"""Check the CUDA kernels by their machine code: ``python tools/check_cuda.py [--allow-missing]``.

Every ``csrc/cuda/*.cu`` is compiled for sm_80, sm_90 and sm_100, which needs no GPU. A kernel fails
with a spill, with local memory, with more registers than its budget, or without the instructions
that its budget names. Budgets are lines of the source, one a kernel::

    // budget: KERNEL REGISTERS [INSTRUCTION ...]

sm_90 is disassembled, by the ``cuobjdump`` of the toolkit or of Triton's wheel.
"""

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

SOURCES = Path(__file__).resolve().parent.parent / "csrc"
TARGETS = (80, 90, 100)
DISASSEMBLED = 90
FLAGS = ["-std=c++17", "-O3", f"-I{SOURCES / 'include'}", "-Xptxas", "-v,-warn-spills"]
LOCAL = ("LDL", "STL")


@dataclass
class Budget:
    """Registers that a kernel may use, and instructions that it must have."""

    registers: int
    instructions: list[str]


@dataclass
class Kernel:
    """Report of ptxas and the disassembler on a kernel."""

    name: str
    target: int
    registers: int
    stack: int
    spills: int
    shared: int
    counts: dict[str, int] = field(default_factory=dict)

    def faults(self, budget: Budget) -> list[str]:
        """Return why the kernel fails; empty if it does not."""
        found = []
        if self.registers > budget.registers:
            found.append(f"{self.registers} registers, over its budget of {budget.registers}")
        if self.stack or self.spills:
            found.append(f"{self.stack} bytes of local memory, {self.spills} bytes spilled")
        if self.target == DISASSEMBLED:
            found += [f"no {name}" for name in budget.instructions if not self.counts.get(name)]
            found += [f"{self.counts[name]} {name}" for name in LOCAL if self.counts.get(name)]
        return found


def budgets(source: str) -> dict[str, Budget]:
    """Return the budgets in a source, by kernel."""
    lines = re.findall(r"^// budget: (\w+) (\d+)(.*)$", source, re.MULTILINE)
    return {name: Budget(int(registers), rest.split()) for name, registers, rest in lines}


def kernel_name(symbol: str) -> str:
    """Return the last name in a mangled symbol, ``scale`` in ``_ZN12_GLOBAL__N__5scaleE5Table``."""
    place, name = symbol.index("_Z") + 2, symbol
    place += symbol[place] == "N"
    while match := re.match(r"\d+", symbol[place:]):
        begin = place + match.end()
        place = begin + int(match.group())
        name = symbol[begin:place]
    return name


def parse_report(report: str, target: int) -> list[Kernel]:
    """Return the kernels in the output of ``ptxas -v``."""
    kernels = []
    for part in report.split("Compiling entry function '")[1:]:
        symbol = part.split("'")[0]
        numbers = []
        for pattern in (
            r"Used (\d+) registers",
            r"(\d+) bytes stack frame",
            r"(\d+) bytes spill stores",
            r"(\d+) bytes smem",
        ):
            match = re.search(pattern, part)
            numbers.append(int(match.group(1)) if match else 0)
        registers, stack, spilled, shared = numbers
        kernels.append(Kernel(kernel_name(symbol), target, registers, stack, spilled, shared))
    return kernels


def count_instructions(listing: str) -> dict[str, dict[str, int]]:
    """Count instructions in ``cuobjdump -sass`` by kernel, under LDG and under LDG.E.128."""
    counts: dict[str, dict[str, int]] = {}
    for part in listing.split("Function : ")[1:]:
        symbol = part.split()[0]
        mine = counts.setdefault(kernel_name(symbol), {})
        for name in re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", part):
            words = name.split(".")
            for name in {words[0], ".".join(words[:3])}:
                mine[name] = mine.get(name, 0) + 1
    return counts


def disassembler() -> str | None:
    """Return the path of a ``cuobjdump``, on PATH or in Triton's wheel, or None."""
    found = shutil.which("cuobjdump")
    spec = None if found else importlib.util.find_spec("triton")
    if spec is not None and spec.origin:
        inside = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        found = str(inside) if inside.exists() else None
    return found


def output_of(command: list[str]) -> str:
    """Return the output of a command; exit with it if the command fails."""
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
    return result.stdout + result.stderr


def compile_one(source: Path, target: int, folder: Path, tool: str | None) -> list[Kernel]:
    """Compile a source for one architecture and return its kernels."""
    code = folder / f"{source.stem}-{target}.cubin"
    command = ["nvcc", *FLAGS, f"-arch=sm_{target}", "-cubin", str(source), "-o", str(code)]
    kernels = parse_report(output_of(command), target)
    if target == DISASSEMBLED and tool is not None:
        counts = count_instructions(output_of([tool, "-sass", str(code)]))
        for kernel in kernels:
            kernel.counts = counts[kernel.name]
    return kernels


def row(kernel: Kernel, budget: Budget, faults: list[str]) -> str:
    """Return a kernel's line of the table."""
    counted = " ".join(f"{name}={kernel.counts.get(name, 0)}" for name in budget.instructions)
    return (
        f"{kernel.name:<22} sm_{kernel.target:<4} {kernel.registers:>3}/{budget.registers:<3} "
        f"{kernel.shared:>6} {counted if kernel.counts else '':<28} {'; '.join(faults) or 'ok'}"
    )


def check(tool: str | None) -> bool:
    """Compile all sources, print the table and return whether every kernel passes."""
    sources = sorted((SOURCES / "cuda").glob("*.cu"))
    allowed: dict[str, Budget] = {}
    for source in sources:
        allowed |= budgets(source.read_text())
    jobs = [(source, target) for target in TARGETS for source in sources]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(lambda job: compile_one(job[0], job[1], Path(folder), tool), jobs)
        kernels = sorted((k for ks in results for k in ks), key=lambda k: (k.name, k.target))
    print(f"{'kernel':<22} {'target':<7} {'regs':>7} {'smem':>6} {'instructions':<28} verdict")
    bad = []
    for kernel in kernels:
        budget = allowed.get(kernel.name)
        faults = kernel.faults(budget) if budget else ["no budget line"]
        print(row(kernel, budget or Budget(0, []), faults))
        bad += faults
    absent = set(allowed) - {k.name for k in kernels}
    for name in sorted(absent):
        print(f"{name}: a budget line, but no kernel")
    return bool(kernels) and not bad and not absent


def main() -> int:
    """Run the check; return 1 if a kernel fails or a tool is missing."""
    parser = argparse.ArgumentParser(description="check the CUDA kernels' machine code")
    parser.add_argument("--allow-missing", action="store_true", help="pass without the tools")
    arguments = parser.parse_args()
    if shutil.which("nvcc") is None:
        print("no nvcc: nothing was checked", file=sys.stderr)
        return 0 if arguments.allow_missing else 1
    tool = disassembler()
    if tool is None:
        print("no cuobjdump: instructions go unchecked; pip install triton", file=sys.stderr)
        if not arguments.allow_missing:
            return 1
    return 0 if check(tool) else 1


if __name__ == "__main__":
    sys.exit(main())
