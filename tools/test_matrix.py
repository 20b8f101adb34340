#!/usr/bin/env python3
"""Run the tests in every environment that this machine can make, and print a table.

    make test-matrix                                  # every row
    make test-matrix ROWS="python3.13 native-off"     # some of them
    python tools/test_matrix.py --list                # the rows, and what each is

A row is ``make test`` with one thing changed: Python, torch, an instruction set, threads, no
kernels. Its result is ``runs/matrix/ROW.json``, its output ``runs/matrix/ROW.log``. A row that has
a result for this commit is not run again, so an interrupted matrix goes on where it stopped.
"""

import argparse
import configparser
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matrix_results import store, stored, summary, table, tree_key

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "runs" / "matrix"
# The ends of the range of optimzoo/_version.py, each with the Triton that was released with it.
OLDEST_TORCH = ("torch==2.9.0", "triton==3.5.0")
NEWEST_TORCH = ("torch==2.14.1", "triton==3.8.0")
# In the order of what a CPU must have: the flags of /proc/cpuinfo for each.
INSTRUCTION_SETS = {
    "avx2": {"avx2", "fma"},
    "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq"},
}
# More threads than cores: one that waits must not keep its core from one that works. With active
# waiting the row of two threads took five times as long, on two cores.
PASSIVE = {"OMP_WAIT_POLICY": "passive"}
# What would change a row from outside.
FOREIGN = re.compile(
    r"MAKE(FLAGS|LEVEL|OVERRIDES)|MFLAGS|ATEN_|OMP_|OPTIMZOO_|PYTHONPATH|VIRTUAL_ENV"
)


@dataclass(frozen=True)
class Row:
    """One environment to run the tests in.

    Args:
        name: name of the row.
        what: description in a few words.
        env: environment variables of the tests.
        python: the interpreter of an environment of its own; None: it shares that of ``make test``.
        pins: packages in other versions than those of constraints.txt.
        threads: value of OMP_NUM_THREADS.
        compiler: whether the installation finds a compiler.
    """

    name: str
    what: str
    env: dict[str, str] = field(default_factory=dict)
    python: str | None = None
    pins: tuple[str, ...] = ()
    threads: int = 1
    compiler: bool = True


class NotRunError(Exception):
    """Error of a row that this machine cannot run; the message says why."""


class InstallError(Exception):
    """Error of an environment that cannot be made, with the last line of its log."""


# The rows


def instruction_sets(flags: set[str]) -> list[str]:
    """Return the instruction sets of a CPU with these flags, worst first."""
    found = []
    for name, needed in INSTRUCTION_SETS.items():
        if not needed <= flags:
            break
        found.append(name)
    return found


def cpu_flags() -> set[str]:
    """Return the flags of this CPU; none where Linux does not list them."""
    with contextlib.suppress(OSError):
        match = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        return set(match[1].split()) if match else set()
    return set()


def claimed_pythons() -> list[str]:
    """Return the Python versions that setup.cfg claims, as in ``3.12``."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    return re.findall(r"Python :: (\d\.\d+)", config["metadata"]["classifiers"])


def find_pythons(versions: Sequence[str]) -> dict[str, str]:
    """Return an interpreter that can make environments for each version that is here."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = {}
    for version in versions:
        candidates = [str(p) for p in sorted(pyenv.glob(f"{version}.*/bin/python"), reverse=True)]
        for path in [*candidates, shutil.which(f"python{version}")]:
            if path is None:
                continue
            ask = "import ensurepip, sys, venv; print('%d.%d' % sys.version_info[:2])"
            done = subprocess.run([path, "-c", ask], capture_output=True, text=True)
            if done.stdout.strip() == version:
                found[version] = path
                break
    return found


def all_rows(flags: set[str], pythons: dict[str, str], own: str) -> list[Row]:
    """Return the rows of a machine.

    Args:
        flags: flags of its CPU.
        pythons: its interpreters, by version.
        own: the version that ``make test`` has; an interpreter of it is used where one is needed.
    """
    base = pythons.get(own, getattr(sys, "_base_executable", sys.executable))
    rows = [Row("default", "as `make test` is: the best instruction set, one thread a worker")]
    # The best set is what every other row has.
    worse = ["", *instruction_sets(flags)][:-1]
    for name in worse:
        aten = name or "default"
        env = {"ATEN_CPU_CAPABILITY": aten}
        rows.append(Row(f"aten-{aten}", f"torch's own kernels in their {aten} build", env))
    for name in worse:
        isa = name or "baseline"
        env = {"OPTIMZOO_CPU_ISA": isa}
        rows.append(Row(f"isa-{isa}", f"optimzoo's kernels in their {isa} build", env))
    rows += [
        Row("native-off", "without optimzoo's kernels", {"OPTIMZOO_NATIVE": "0"}),
        Row("no-compiler", "installed where PATH is empty", python=base, compiler=False),
        *(Row(f"threads-{n}", f"OMP_NUM_THREADS={n}", PASSIVE, threads=n) for n in (2, 4)),
        Row("torch-oldest", " ".join(OLDEST_TORCH), python=base, pins=OLDEST_TORCH),
        Row("torch-newest", " ".join(NEWEST_TORCH), python=base, pins=NEWEST_TORCH),
    ]
    for version, path in pythons.items():
        if version != own:
            rows.append(Row(f"python{version}", path, python=path))
    return rows


def choose(rows: list[Row], names: Sequence[str]) -> list[Row]:
    """Return the rows of these names, in the matrix's order; without names all.

    Raises:
        ValueError: for a name that no row has.
    """
    known = [row.name for row in rows]
    for name in names:
        if name not in known:
            raise ValueError(f"no row {name!r}; the rows here are {', '.join(known)}")
    return [row for row in rows if not names or row.name in names]


def rotated(rows: list[Row], number: int) -> list[Row]:
    """Return all rows but ``default``, from the ``number``-th on and round."""
    others = [row for row in rows if row.name != "default"]
    first = number % len(others)
    return others[first:] + others[:first]


# Running them


def call(
    command: Sequence[str],
    log: Path,
    env: dict[str, str],
    cwd: Path = ROOT,
    progress: Callable[[str], None] = lambda text: None,
) -> int:
    """Run a command into a log and return its exit status; on interrupt, end its process group."""
    with log.open("a", encoding="utf-8") as file:
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(timeout=5)
            done = re.findall(r"\[ *(\d+%)\]", log.read_text(encoding="utf-8", errors="replace"))
            progress("".join(done[-1:]))
    finally:
        if process.returncode is None:
            for ending, patience in ((signal.SIGINT, 10), (signal.SIGKILL, None)):
                with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                    os.killpg(process.pid, ending)
                    process.wait(patience)


def run(row: Row, args: argparse.Namespace, progress: Callable[[str], None]) -> dict[str, Any]:
    """Make a row's environment, run the tests in it, and return the result.

    Raises:
        NotRunError: if it cannot be run here.
        InstallError: if its environment cannot be made.
    """
    log = RESULTS / f"{row.name}.log"
    log.write_text("")
    clean = {key: value for key, value in os.environ.items() if not FOREIGN.match(key)}
    venv = RESULTS / "env" / row.name if row.python else Path(args.venv).absolute()
    tree = ROOT if row.compiler else copy_tree(RESULTS / "tree" / row.name)
    variables = {
        "VENV": str(venv),
        "PYTHON": row.python or sys.executable,
        "WITH": " ".join(row.pins),
        "THREADS": str(row.threads),
        "WORKERS": str(args.workers),
    }
    make = ["make", *(f"{key}={value}" for key, value in variables.items())]

    def install(command: Sequence[str], env: dict[str, str]) -> None:
        if call(command, log, env, tree, progress):
            last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
            raise InstallError(f"installing failed: {''.join(last)}")

    begin = time.monotonic()
    progress("installing")
    install([*make, f"{venv}/bin/python"], clean)
    script = [f"{venv}/bin/python", ".ci/install"]
    if row.python and not args.cuda_builds and not (venv / ".test").exists():
        install([*script, "--dry-run", "bench,test", *row.pins], clean)
        if re.search(r"\bnvidia-", log.read_text(encoding="utf-8", errors="replace")):
            raise NotRunError("its torch is a CUDA build here, gigabytes; --cuda-builds takes it")
    if not row.compiler:
        nothing = {key: value for key, value in clean.items() if key != "CXX"} | {"PATH": ""}
        install([*script, "bench,test"], nothing)
        (venv / ".bench").touch()
        (venv / ".test").touch()
    install([*make, f"{venv}/.test"], clean)
    ask = "import sys, torch; print('Python', sys.version.split()[0], 'torch', torch.__version__)"
    command = [f"{venv}/bin/python", "-W", "ignore", "-c", ask]
    versions = subprocess.run(command, env=clean, capture_output=True, text=True).stdout.strip()
    installed = time.monotonic()
    status = call([*make, "test"], log, clean | row.env, tree, progress)
    result = {
        "row": row.name,
        "what": row.what,
        "versions": versions,
        "install_seconds": round(installed - begin),
        "seconds": round(time.monotonic() - installed),
        "log": os.path.relpath(log, ROOT),
    }
    return result | summary(log.read_text(encoding="utf-8", errors="replace"), status)


def copy_tree(target: Path) -> Path:
    """Copy the tree, without what git ignores, to a folder; return the folder."""
    names = subprocess.run(
        ["git", "ls-files", "-coz", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True
    ).stdout
    shutil.rmtree(target, ignore_errors=True)
    for name in map(os.fsdecode, names.split(b"\0")[:-1]):
        if (ROOT / name).exists():  # not deleted since the last commit
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    return target


@contextlib.contextmanager
def progress_of(name: str, number: str) -> Iterator[Callable[[str], None]]:
    """Show the progress of a row: on a terminal in one line, else in one line per minute."""
    begin = last = time.monotonic()

    def show(text: str) -> None:
        nonlocal last
        now = time.monotonic()
        minutes, seconds = divmod(round(now - begin), 60)
        line = f"[{number}] {name} {minutes}:{seconds:02} {text}"
        if sys.stdout.isatty():
            print(f"\r\033[K{line}", end="", flush=True)
        elif text == "installing" or now - last >= 60:
            last = now
            print(line, flush=True)

    try:
        yield show
    finally:
        if sys.stdout.isatty():
            print("\r\033[K", end="", flush=True)


def run_rows(rows: list[Row], args: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    """Run the rows that have no result, and append every result to ``results`` as it comes."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    for i, row in enumerate(rows):
        number = f"{i + 1}/{len(rows)}" if args.rotate is None else "one row"
        tree = tree_key(ROOT)
        result = None if args.again else stored(RESULTS, row.name, tree)
        if result is None:
            try:
                with progress_of(row.name, number) as progress:
                    result = {"tree": tree} | run(row, args, progress)
            except (NotRunError, InstallError) as error:
                status = "not run" if isinstance(error, NotRunError) else "failed"
                result = {"row": row.name, "status": status, "failures": [str(error)]}
            else:
                if tree_key(ROOT) == tree:
                    store(RESULTS, result)
                else:
                    result["failures"].insert(0, "the tree changed meanwhile: not stored")
        results.append(result)
        print(table([result]).split("\n", 1)[1], flush=True)
        if args.rotate is not None and result["status"] != "not run":
            return


def main(argv: Sequence[str] | None = None) -> int:
    """Run the matrix; return 1 if a row failed, 130 if interrupted."""
    parser = argparse.ArgumentParser(description="Run the tests in many environments.")
    add = parser.add_argument
    add("rows", nargs="*", metavar="ROW", help="some rows only")
    add("--list", action="store_true", help="list the rows of this machine, run nothing")
    add("--again", action="store_true", help="run rows that have a result for this commit, too")
    add("--rotate", type=int, metavar="N", help="one row, the N-th counted round, that runs here")
    add("--cuda-builds", action="store_true", help="install a torch that is a CUDA build")
    add("--venv", default=".venv", help="the environment of `make test` (default: %(default)s)")
    add("--workers", type=int, default=2, help="tests at once (default: %(default)s)")
    args = parser.parse_args(argv)
    own = "{}.{}".format(*sys.version_info)
    rows = all_rows(cpu_flags(), find_pythons(claimed_pythons()), own)
    try:
        chosen = choose(rows, args.rows)
    except ValueError as error:
        parser.error(str(error))
    if args.list:
        width = max(len(row.name) for row in chosen)
        print("\n".join(f"{row.name:<{width}}  {row.what}" for row in chosen))
        return 0
    results: list[dict[str, Any]] = []
    # SIGINT too: where it is ignored, as in a script's background, the tests would inherit that.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        run_rows(chosen if args.rotate is None else rotated(chosen, args.rotate), args, results)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    finally:
        if results:
            print(f"\n{table(results)}")
    return int(any(result["status"] == "failed" for result in results))


if __name__ == "__main__":
    sys.exit(main())
