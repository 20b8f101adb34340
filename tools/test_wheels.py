"""Install what ``make wheels`` built where no compiler is, and check it: ``make test-wheels``.

    python tools/test_wheels.py [--list] [--cuda-builds] [ENVIRONMENT ...]

Each claimed Python that is here has an environment, with another torch in each: the one of
constraints.txt, the oldest, the newest. In the first the sdist is installed too, with a compiler
and without. What is checked is in tools/check_installed.py. A torch that is a CUDA build is
gigabytes, and installed with ``--cuda-builds`` alone.
"""

import argparse
import os
import platform
import re
import runpy
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from test_matrix import FOREIGN, NEWEST_TORCH, OLDEST_TORCH, ROOT, claimed_pythons, find_pythons

WHEELS = ROOT / "build" / "wheels"
ENVIRONMENTS = ROOT / "build" / "wheel-environments"
install = runpy.run_path(str(ROOT / ".ci" / "install"))


@dataclass(frozen=True)
class Environment:
    """A Python and the torch to install into its environment."""

    python: str
    torch: str
    interpreter: str

    @property
    def name(self) -> str:
        """Name of the environment: python3.12-torch2.9.0."""
        return f"python{self.python}-{self.torch.replace('==', '')}"

    @property
    def bin(self) -> Path:
        """Folder of its programs, all that PATH has in a check."""
        return ENVIRONMENTS / self.name / "bin"


class NotRunError(Exception):
    """Error of an environment that cannot be made here; the message says why."""


def pinned_torch() -> str:
    """Return the torch of constraints.txt, as a requirement."""
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    return next(line for line in text.splitlines() if line.startswith("torch=="))


def environments(pythons: dict[str, str]) -> list[Environment]:
    """Return an environment for each Python, with the pinned, oldest and newest torch in turn."""
    torches = (pinned_torch(), OLDEST_TORCH[0], NEWEST_TORCH[0])
    pairs = zip(pythons.items(), torches, strict=False)
    return [Environment(version, torch, path) for (version, path), torch in pairs]


def find_wheel(wheels: Path, machine: str) -> Path:
    """Return the wheel for a machine.

    Raises:
        FileNotFoundError: there is none.
    """
    found = sorted(wheels.glob(f"optimzoo-*_{machine}.whl"))
    if not found:
        raise FileNotFoundError(f"no wheel for {machine} in {wheels}; run make wheels")
    return found[-1]


def call(command: Sequence[str | Path], env: dict[str, str], folder: str) -> str:
    """Run a command outside of the checkout; return its output, exit with it if it fails."""
    result = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"error: {Path(command[0]).name} failed:\n{result.stdout}{result.stderr}")
    return result.stdout + result.stderr


def make(environment: Environment, cuda_builds: bool, clean: dict[str, str], folder: str) -> None:
    """Make an environment with torch and NumPy in it, unless it is there.

    Raises:
        NotRunError: its torch would be a CUDA build, and that was not asked for.
    """
    python = environment.bin / "python"
    stamp = environment.bin.with_name(".torch")
    if stamp.exists():
        return
    call([environment.interpreter, "-m", "venv", environment.bin.parent], clean, folder)
    what = [environment.torch, "numpy"]
    command, env = install["uv_install"](["--dry-run", *what], str(python))
    env = {key: value for key, value in env.items() if key in clean or key not in os.environ}
    if not cuda_builds and "nvidia-" in call(command, env, folder):
        raise NotRunError("its torch is a CUDA build here, gigabytes; CUDA_BUILDS=1 takes it")
    call(install["uv_install"](what, str(python))[0], env, folder)
    stamp.touch()


def checked(environment: Environment, options: list[str], folder: str) -> None:
    """Run tools/check_installed.py with nothing but the environment's programs on PATH."""
    env = {"PATH": str(environment.bin), "HOME": folder}
    script = ROOT / "tools" / "check_installed.py"
    output = call([environment.bin / "python", "-W", "error", script, *options], env, folder)
    print(re.sub("^", "  ", output.strip(), flags=re.MULTILINE), flush=True)


def check_environment(
    environment: Environment, wheel: Path, sdist: Path | None, args: argparse.Namespace
) -> None:
    """Install and check the wheel in an environment, then the sdist, if one is given."""
    clean = {key: value for key, value in os.environ.items() if not FOREIGN.match(key)}
    # Modules are compiled once, as pip does it for a user.
    clean.pop("PYTHONDONTWRITEBYTECODE", None)
    pip: list[str | Path] = [environment.bin / "python"]
    pip += ["-m", "pip", "install", "-q", "--disable-pip-version-check"]
    pip += ["--force-reinstall", "--no-deps", "--no-cache-dir"]
    with tempfile.TemporaryDirectory() as folder:
        make(environment, args.cuda_builds, clean, folder)
        call([*pip, wheel], clean, folder)
        with zipfile.ZipFile(wheel) as archive:
            cuda = any(name.endswith("/_cuda.so") for name in archive.namelist())
        print(f"{environment.name}: {wheel.name}", flush=True)
        checked(environment, ["--kernels", *["--cuda"] * cuda], folder)
        if sdist is None:
            return
        print(f"{environment.name}: {sdist.name}, without a compiler", flush=True)
        bare = {key: value for key, value in clean.items() if key != "CXX"}
        call([*pip, sdist], bare | {"PATH": str(environment.bin)}, folder)
        checked(environment, ["--eager"], folder)
        print(f"{environment.name}: {sdist.name}, with a compiler", flush=True)
        call([*pip, sdist], clean | {"OPTIMZOO_BUILD": "require", "OPTIMZOO_CUDA": "0"}, folder)
        checked(environment, ["--kernels"], folder)


def main(argv: Sequence[str] | None = None) -> int:
    """Check every environment that this machine can make; return 1 if it can make none."""
    parser = argparse.ArgumentParser(description="Install the wheels and check them.")
    parser.add_argument("names", nargs="*", metavar="ENVIRONMENT", help="some environments only")
    parser.add_argument("--list", action="store_true", help="list them, check nothing")
    parser.add_argument("--cuda-builds", action="store_true", help="install a torch for CUDA")
    parser.add_argument("--wheels-alone", action="store_true", help="do not install the sdist")
    args = parser.parse_args(argv)
    known = environments(find_pythons(claimed_pythons()))
    if args.list:
        print("\n".join(environment.name for environment in known))
        return 0
    unknown = set(args.names) - {environment.name for environment in known}
    if unknown:
        names = ", ".join(environment.name for environment in known)
        parser.error(f"no environment {sorted(unknown)[0]!r}; those here are {names}")
    try:
        wheel = find_wheel(WHEELS, platform.machine())
    except FileNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    sdist = None if args.wheels_alone else next(iter(sorted(WHEELS.glob("*.tar.gz"))), None)
    done = 0
    for environment in known:
        if args.names and environment.name not in args.names:
            continue
        try:
            check_environment(environment, wheel, None if done else sdist, args)
            done += 1
        except NotRunError as error:
            print(f"{environment.name}: not run, {error}")
    print(f"{done} environments checked")
    return 0 if done else 1


if __name__ == "__main__":
    sys.exit(main())
