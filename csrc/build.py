"""Builds the native kernel libraries: ``python csrc/build.py [--require | --sanitize]``.

setup.py calls it too. ``--sanitize`` makes, in place of them, ``build/sanitized/_cpu.so`` with the
address and undefined-behaviour sanitizers (``make sanitize`` runs the tests on it).

The libraries are plain C, found by ctypes, so nothing but a compiler is needed: no torch, and no
Python headers. Without g++ (or nvcc) that library is left out, and ``optimzoo doctor`` says so;
``OPTIMZOO_BUILD=require`` makes that an error. The CUDA library is built where there is a GPU, or
with ``OPTIMZOO_CUDA=1``; ``OPTIMZOO_CUDA=0`` leaves it out.
"""

import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "csrc"
OBJECTS = ROOT / "build" / "kernels"
TARGET = ROOT / "optimzoo" / "kernels"
OPERATIONS = ("scale", "adam", "reduce", "apply", "center", "history", "nm_mask")
X86 = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": [
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"),
        "-mprefer-vector-width=512",
    ],
}
# Not -ffast-math: NaN and infinity must go through.
CPU_FLAGS = [
    *("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"),
    *("-fPIC", "-fvisibility=hidden", "-fopenmp", "-Wall", "-Wextra", "-Wno-psabi"),
]
CUDA_FLAGS = [
    *("-std=c++17", "-O3", "--compiler-options", "-fPIC,-fvisibility=hidden", "--cudart=static"),
    *(f"-gencode=arch=compute_{a},code=sm_{a}" for a in (80, 90, 100)),
    "-gencode=arch=compute_100,code=compute_100",
]


def fresh(target: Path, folder: Path) -> bool:
    """Whether ``target`` is newer than all that it is made from."""
    sources = [*folder.iterdir(), *(SOURCES / "include").iterdir(), Path(__file__)]
    return target.exists() and all(s.stat().st_mtime <= target.stat().st_mtime for s in sources)


def run_all(commands: list[list[str]]) -> None:
    """Run compilers side by side; the first error ends it with the compiler's own words."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(
            pool.map(lambda c: subprocess.run(c, capture_output=True, text=True), commands)
        )
    for command, result in zip(commands, results, strict=True):
        if result.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{result.stderr.strip()}")


def link(command: list[str], target: Path) -> None:
    """Link beside the target and move it there whole: a process may have the old one open."""
    unfinished = target.with_suffix(".so.unfinished")
    run_all([[*command, "-o", str(unfinished)]])
    unfinished.replace(target)


def build_cpu(target: Path = TARGET / "_cpu.so", extra: tuple[str, ...] = ()) -> None:
    """``_cpu.so``: every operation once for each instruction set."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise RuntimeError("no g++ or clang++")
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    sets = X86 if x86 else {"baseline": []}
    common = [compiler, *CPU_FLAGS, *extra, f"-I{SOURCES / 'include'}"]
    common += ["-DOZ_X86"] if x86 else []
    objects = OBJECTS if not extra else target.parent
    objects.mkdir(parents=True, exist_ok=True)
    jobs = {objects / "library.o": [*common, "-c", str(SOURCES / "cpu" / "library.cpp")]}
    for name, flags in sets.items():
        for operation in OPERATIONS:
            source = str(SOURCES / "cpu" / f"{operation}.cpp")
            jobs[objects / f"{operation}-{name}.o"] = [
                *common,
                *flags,
                f"-DOZ_ISA={name}",
                "-c",
                source,
            ]
    run_all([[*command, "-o", str(place)] for place, command in jobs.items()])
    link([compiler, "-shared", "-fopenmp", *extra, *map(str, jobs)], target)


def build_cuda() -> None:
    """``_cuda.so``, for sm_80, sm_90, sm_100 and what comes after."""
    compiler = shutil.which("nvcc")
    if compiler is None:
        raise RuntimeError("no nvcc")
    sources = sorted((SOURCES / "cuda").glob("*.cu"))
    OBJECTS.mkdir(parents=True, exist_ok=True)
    common = [compiler, *CUDA_FLAGS, f"-I{SOURCES / 'include'}"]
    jobs = {OBJECTS / f"{s.stem}-cuda.o": [*common, "-c", str(s)] for s in sources}
    run_all([[*command, "-o", str(place)] for place, command in jobs.items()])
    link([compiler, "-shared", "--cudart=static", *map(str, jobs)], TARGET / "_cuda.so")


def main() -> None:
    """Build what is not fresh."""
    if "--sanitize" in sys.argv:
        target = ROOT / "build" / "sanitized" / "_cpu.so"
        return build_cpu(target, ("-fsanitize=address,undefined", "-fno-sanitize-recover", "-g"))
    required = "--require" in sys.argv or os.environ.get("OPTIMZOO_BUILD") == "require"
    # Three architectures take a minute: where there is no GPU, only if asked.
    gpu = os.environ.get("OPTIMZOO_CUDA", "1" if shutil.which("nvidia-smi") else "0") == "1"
    for kind, build in (("cpu", build_cpu), ("cuda", build_cuda)):
        if (kind == "cuda" and not gpu) or fresh(TARGET / f"_{kind}.so", SOURCES / kind):
            continue
        try:
            build()
        except RuntimeError as error:
            print(f"the {kind} kernels were not built: {error}", file=sys.stderr)
            if required:
                sys.exit(1)


if __name__ == "__main__":
    main()
