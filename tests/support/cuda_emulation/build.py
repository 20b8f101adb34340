"""Build the emulated CUDA library: ``build(folder)``. See ``cuda_runtime.h`` beside this file."""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
# What the sanitizer finds (a misaligned access, an index out of bounds) ends the process.
# With FORTIFY_SOURCE, a default of some compilers, longjmp takes a switch of fibers for an attack.
FLAGS = [
    *("-std=c++17", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-fno-strict-aliasing"),
    *("-ffp-contract=off", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-unused-function"),
    "-U_FORTIFY_SOURCE",
    "-fsanitize=alignment,bounds,shift,signed-integer-overflow,null,integer-divide-by-zero",
    "-fsanitize-undefined-trap-on-error",
]


def build(folder: Path) -> Path:
    """Compile the kernels for the CPU, unless ``folder`` has them; return the library's path.

    Raises:
        RuntimeError: there is no g++, or it fails; the message is its own.
    """
    cuda = HERE.parents[2] / "csrc" / "cuda"
    target = folder / "emulated_cuda.so"
    inputs = [*HERE.iterdir(), *cuda.glob("*.cu*"), *(cuda.parent / "include").iterdir()]
    if target.exists() and all(
        s.stat().st_mtime <= target.stat().st_mtime for s in inputs if s.is_file()
    ):
        return target
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None:
        raise RuntimeError("no g++; install it to emulate the CUDA kernels")
    folder.mkdir(parents=True, exist_ok=True)
    include = [f"-I{HERE}", f"-I{cuda.parent / 'include'}", f"-I{cuda}"]
    sources = [*sorted(cuda.glob("*.cu")), *sorted(HERE.glob("*.cpp"))]
    objects = [folder / f"{s.stem}.{os.getpid()}.o" for s in sources]

    def compile_one(source: Path, place: Path) -> None:
        command = [compiler, *FLAGS, *include, "-x", "c++", "-c", str(source), "-o", str(place)]
        run(command)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, sources, objects))
    unfinished = folder / f"emulated_cuda.{os.getpid()}.so"
    run([compiler, "-shared", *map(str, objects), "-o", str(unfinished)])
    for place in objects:
        place.unlink()
    unfinished.replace(target)
    return target


def run(command: list[str]) -> None:
    """Run a compiler; raise an error with the compiler's own message."""
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr.strip()}")
