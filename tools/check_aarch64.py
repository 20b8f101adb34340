"""Build the CPU kernels for aarch64 and run their tests on them, in an emulator.

    python tools/check_aarch64.py [--allow-missing] [-- PYTEST_ARGUMENTS]

It needs a cross compiler and qemu's user mode: on Debian and Ubuntu
``apt-get install g++-aarch64-linux-gnu qemu-user``.
tests/support/foreign_kernels.py says what is compared.
With ``--allow-missing`` their absence is reported and is not an error.
"""

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMPILER = os.environ.get("AARCH64_CXX", "aarch64-linux-gnu-g++")
EMULATORS = ("qemu-aarch64", "qemu-aarch64-static")
TESTS = (
    *(f"kernels/test_{name}.py" for name in ("kernels", "kernels_cpu", "kernels_float16")),
    *("kernels/test_kernel_inputs.py", "kernels/test_zoo_kernels.py"),
    *("optimizers/test_adam_rule.py", "sparsity/test_sparsity_masks.py"),
)
# Its 4 GB are mapped to 3 MB of memory, but would go through the pipe in full.
LEFT_OUT = "tests/kernels/test_kernels_cpu.py::test_elements_beyond_2_to_the_31"
build = runpy.run_path(str(ROOT / "csrc" / "build.py"))


def server(name: str, compiler: list[str], extra: tuple[str, ...], static: bool) -> str:
    """Compile csrc/cross/server.cpp with the kernels and return the program's path."""
    folder = ROOT / "build" / "aarch64" / name
    flags = (*build["openmp_flags"](compiler), *extra)
    objects = build["compile_cpu"](compiler, folder, flags)
    source, include = ROOT / "csrc" / "cross" / "server.cpp", ROOT / "csrc" / "include"
    command = [*compiler, "-std=c++17", "-O2", "-Wall", "-Wextra", *flags, f"-I{include}"]
    command += [str(source), *objects, "-o", str(folder / "server"), *["-static"] * static]
    build["run_all"]([command])
    return str(folder / "server")


def main() -> int:
    """Build three servers, run the tests and return pytest's exit status."""
    emulator = next(filter(None, map(shutil.which, EMULATORS)), None)
    missing = [
        n
        for n, there in ((COMPILER, shutil.which(COMPILER)), (EMULATORS[0], emulator))
        if not there
    ]
    if missing:
        print(
            f"no {' and no '.join(missing)}: the kernels are not checked for aarch64",
            file=sys.stderr,
        )
        return 0 if "--allow-missing" in sys.argv else 1
    exact = ("-ffp-contract=off",)
    commands = [
        [emulator, server("shipped", [COMPILER], (), True)],
        [emulator, server("exact", [COMPILER], exact, True)],
        [server("exact-here", build["cpu_compilers"]()[0], exact, False)],
    ]
    env = {
        **os.environ,
        "OPTIMZOO_FOREIGN": json.dumps(commands),
        "OPTIMZOO_CPU_ISA": "baseline",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")]),
    }
    more = sys.argv[sys.argv.index("--") + 1 :] if "--" in sys.argv else []
    tests = [str(ROOT / "tests" / name) for name in TESTS]
    return subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-p", "foreign_kernels", "-p", "no:xdist"),
            *("-m", "not distributed", "--deselect", LEFT_OUT, *tests, *more),
        ],
        env=env,
        cwd=ROOT,
    ).returncode


if __name__ == "__main__":
    sys.exit(main())
