"""Build the native kernel libraries: ``python csrc/build.py [--require | --sanitize]``.

setup.py calls it too. ``--sanitize`` makes, in place of them, ``build/sanitized/_cpu.so`` with the
address and undefined-behaviour sanitizers (``make sanitize`` runs the tests on it).

The libraries are plain C, found by ctypes, so nothing but a compiler is needed: no torch, and no
Python headers. The CPU library is made by ``CXX``, else by the first of g++, clang++ and c++ that
can; without OpenMP it runs in one thread. A library that no compiler makes is left out, the
installation goes on, and the reason is kept beside it, where ``optimzoo doctor`` reads it;
``OPTIMZOO_BUILD=require`` makes that an error. The CUDA library is built where there is a GPU, or
with ``OPTIMZOO_CUDA=1``; ``OPTIMZOO_CUDA=0`` leaves it out. ``OPTIMZOO_OPENMP=torch``, for wheels,
leaves the OpenMP runtime to be found in the process: optimzoo/kernels/native.py shows it torch's.
"""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "csrc"
OBJECTS = ROOT / "build" / "kernels"
TARGET = ROOT / "optimzoo" / "kernels"
OPERATIONS = ("scale", "adam", "reduce", "apply", "center", "sinkhorn", "history", "nm_mask")
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
    *("-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi", "-Wno-unknown-pragmas"),
]
USES_OPENMP = "#include <omp.h>\nint threads() { return omp_get_max_threads(); }\n"
CUDA_FLAGS = [
    *("-std=c++17", "-O3", "--compiler-options", "-fPIC,-fvisibility=hidden", "--cudart=static"),
    *(f"-gencode=arch=compute_{a},code=sm_{a}" for a in (80, 90, 100)),
    "-gencode=arch=compute_100,code=compute_100",
]


def fresh(target: Path, folder: Path) -> bool:
    """Return whether ``target`` is newer than all its sources."""
    sources = [*folder.iterdir(), *(SOURCES / "include").iterdir(), Path(__file__)]
    return target.exists() and all(s.stat().st_mtime <= target.stat().st_mtime for s in sources)


def run_all(commands: list[list[str]]) -> None:
    """Run compilers side by side; raise the first error with the compiler's own message."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(
            pool.map(lambda c: subprocess.run(c, capture_output=True, text=True), commands)
        )
    for command, result in zip(commands, results, strict=True):
        if result.returncode:
            raise RuntimeError(f"{shlex.join(command)}\n{result.stderr.strip()}")


def link(command: list[str], target: Path) -> None:
    """Link beside ``target`` and replace it at once: a process may have the old one open."""
    unfinished = target.with_suffix(".so.unfinished")
    run_all([[*command, "-o", str(unfinished)]])
    unfinished.replace(target)


def cpu_compilers() -> list[list[str]]:
    """Return the compiler commands to try, one after the other."""
    if os.name == "nt":
        raise RuntimeError("the kernels are not built on Windows")
    if named := os.environ.get("CXX"):
        return [shlex.split(named)]
    found = [[name] for name in ("g++", "clang++", "c++") if shutil.which(name)]
    if not found:
        raise RuntimeError("no g++ or clang++ on PATH")
    return found


def openmp_flags(compiler: list[str]) -> list[str]:
    """Return the flags that enable OpenMP; none where its header or library is missing."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "openmp.cpp"
        source.write_text(USES_OPENMP)
        command = [*compiler, "-fopenmp", "-fPIC", "-shared", str(source), "-o", f"{source}.so"]
        found = subprocess.run(command, capture_output=True).returncode == 0
    return ["-fopenmp"] if found else []


def compile_cpu(compiler: list[str], objects: Path, extra: tuple[str, ...] = ()) -> list[str]:
    """Compile every operation for each instruction set of the target; return the object files."""
    described = subprocess.run([*compiler, "-dumpmachine"], capture_output=True, text=True)
    x86 = described.stdout.startswith(("x86_64", "amd64"))
    common = [*compiler, *CPU_FLAGS, *extra, f"-I{SOURCES / 'include'}"]
    common += ["-DOZ_X86"] if x86 else []
    objects.mkdir(parents=True, exist_ok=True)
    jobs = {objects / "library.o": [*common, "-c", str(SOURCES / "cpu" / "library.cpp")]}
    for name, flags in (X86 if x86 else {"baseline": []}).items():
        for operation in OPERATIONS:
            source = str(SOURCES / "cpu" / f"{operation}.cpp")
            command = [*common, *flags, f"-DOZ_ISA={name}", "-c", source]
            jobs[objects / f"{operation}-{name}.o"] = command
    run_all([[*command, "-o", str(place)] for place, command in jobs.items()])
    return [*map(str, jobs)]


def build_cpu(target: Path = TARGET / "_cpu.so", extra: tuple[str, ...] = ()) -> None:
    """Build ``_cpu.so`` with the first compiler that can."""
    failures = []
    for compiler in cpu_compilers():
        try:
            flags = (*openmp_flags(compiler), *extra)
            objects = compile_cpu(compiler, OBJECTS if not extra else target.parent, flags)
            runtime = flags
            if os.environ.get("OPTIMZOO_OPENMP") == "torch":
                runtime = tuple(flag for flag in flags if flag != "-fopenmp")
            return link([*compiler, "-shared", *runtime, *objects], target)
        except RuntimeError as error:
            failures.append(str(error))
        except OSError as error:
            failures.append(f"{compiler[0]} cannot be run: {error.strerror}")
    raise RuntimeError("\n".join(failures))


def build_cuda() -> None:
    """Build ``_cuda.so`` for sm_80, sm_90, sm_100 and later architectures."""
    compiler = shutil.which("nvcc")
    if compiler is None:
        raise RuntimeError("no nvcc")
    sources = sorted((SOURCES / "cuda").glob("*.cu"))
    OBJECTS.mkdir(parents=True, exist_ok=True)
    common = [compiler, *CUDA_FLAGS, f"-I{SOURCES / 'include'}"]
    jobs = {OBJECTS / f"{s.stem}-cuda.o": [*common, "-c", str(s)] for s in sources}
    run_all([[*command, "-o", str(place)] for place, command in jobs.items()])
    link([compiler, "-shared", "--cudart=static", *map(str, jobs)], TARGET / "_cuda.so")


def in_one_line(error: Exception) -> str:
    """Return the compiler's first error, for the file that ``optimzoo doctor`` reads."""
    lines = str(error).splitlines() or [type(error).__name__]
    return next((line for line in lines if "error" in line), lines[0]).strip()[:300]


def main() -> None:
    """Build the libraries that are not up to date."""
    if "--sanitize" in sys.argv:
        target = ROOT / "build" / "sanitized" / "_cpu.so"
        return build_cpu(target, ("-fsanitize=address,undefined", "-fno-sanitize-recover", "-g"))
    required = "--require" in sys.argv or os.environ.get("OPTIMZOO_BUILD") == "require"
    # Three architectures take a minute: where there is no GPU, only if asked.
    gpu = os.environ.get("OPTIMZOO_CUDA", "1" if shutil.which("nvidia-smi") else "0") == "1"
    for kind, build in (("cpu", build_cpu), ("cuda", build_cuda)):
        target = TARGET / f"_{kind}.so"
        reason = target.with_suffix(".failure.txt")
        if (kind == "cuda" and not gpu) or fresh(target, SOURCES / kind):
            continue
        try:
            build()
            reason.unlink(missing_ok=True)
        except (RuntimeError, OSError) as error:
            print(f"the {kind} kernels were not built: {error}", file=sys.stderr)
            if required:
                sys.exit(1)
            target.unlink(missing_ok=True)  # it is of older sources
            reason.write_text(in_one_line(error) + "\n", encoding="utf-8")
            print(
                "optimzoo goes on without them, on the eager path: "
                f"{in_one_line(error)}; `optimzoo doctor` says what to do",
                file=sys.stderr,
            )


if __name__ == "__main__":
    main()
