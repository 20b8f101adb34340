"""Wheels and sdist: what is in them, for whom they are, and what an import of them costs.

They are built and installed for real by `make wheels test-wheels`, which takes minutes.
"""

import platform
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from optimzoo._version import __version__

ROOT = Path(__file__).resolve().parents[2]
# Notes its commands, and makes the file that it was asked for, with nothing in it.
COMPILER = """#!/bin/sh
echo "$@" >> "$0.log"
if [ "$1" = -dumpmachine ]; then echo aarch64-linux-gnu; fi
while [ $# -gt 0 ]; do
  if [ "$1" = -o ]; then : > "$2"; fi
  shift
done
"""
# Older ones, which a Python may bring, do not read setup.cfg or have no bdist_wheel.
pytest.importorskip("setuptools", "77", reason="the backend of pyproject.toml")
linux = pytest.mark.skipif(platform.system() != "Linux", reason="wheels are built on Linux")


@pytest.fixture
def tool(monkeypatch):
    """The functions of a script of tools/, by name."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return lambda name: runpy.run_path(str(ROOT / "tools" / f"{name}.py"))


def backend(call, folder, **variables):
    """Call setuptools as pip and build do, without an environment of its own."""
    code = f"import setuptools.build_meta as backend; print(backend.{call})"
    env = {"PATH": "/usr/bin:/bin", "OPTIMZOO_CUDA": "0", **variables}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The sdist of a checkout in which libraries were built, unpacked, and the names in it."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("optimzoo", "csrc", "tests/repo"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so"))
    for path in (*ROOT.glob("*.*"), ROOT / "LICENSE"):
        if path.is_file():
            shutil.copy(path, folder / path.name)
    for name in ("_cpu.so", "_cuda.so", "_cuda.failure.txt"):
        (folder / "optimzoo" / "kernels" / name).write_text("built here")
    name = backend("build_sdist('dist')", folder)
    assert name == f"optimzoo-{__version__}.tar.gz"
    with tarfile.open(folder / "dist" / name) as archive:
        archive.extractall(folder / "unpacked", filter="data")
        names = [member.partition("/")[2] for member in archive.getnames()]
    return folder / "unpacked" / f"optimzoo-{__version__}", names


def test_the_sdist_has_the_sources_and_nothing_that_was_built(sdist):
    _, names = sdist
    assert {"csrc/build.py", "csrc/cpu/scale.cpp", "csrc/cuda/scale.cu", "LICENSE"} <= set(names)
    assert {"csrc/include/optimzoo.h", "csrc/cuda/table.cuh", "optimzoo/py.typed"} <= set(names)
    assert not [name for name in names if name.endswith((".so", ".failure.txt"))]
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "notebooks"))]


def test_a_wheel_is_for_every_python_of_one_platform_and_leaves_openmp_to_torch(sdist, tmp_path):
    source, _ = sdist
    compiler = tmp_path / "c++"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    name = backend(
        "build_wheel('wheels', {'--build-option': '--plat-name=linux_aarch64'})",
        source,
        CXX=str(compiler),
        OPTIMZOO_BUILD="require",
        OPTIMZOO_OPENMP="torch",
    )
    assert name == f"optimzoo-{__version__}-py3-none-linux_aarch64.whl"
    with zipfile.ZipFile(source / "wheels" / name) as wheel:
        names = wheel.namelist()
        tags = wheel.read(f"optimzoo-{__version__}.dist-info/WHEEL").decode()
    assert "Tag: py3-none-linux_aarch64\n" in tags and "Root-Is-Purelib: false" in tags
    kernels = [name for name in names if name.endswith(".so")]
    assert kernels == ["optimzoo/kernels/_cpu.so"]
    assert {"optimzoo/py.typed", "optimzoo/tuned_rates.json"} <= set(names)
    rooms = {name.split("/")[0] for name in names}
    assert rooms == {"optimzoo", f"optimzoo-{__version__}.dist-info"}
    compiled, linked = [], []
    for line in Path(f"{compiler}.log").read_text().splitlines():
        if "openmp.cpp" not in line and "-dumpmachine" not in line:
            (compiled if " -c " in line else linked).append(line)
    assert len(compiled) > 5 and all("-fopenmp" in line for line in compiled)
    assert len(linked) == 1 and "-fopenmp" not in linked[0]


def test_machines_are_planned_by_the_tools_that_are_here(tool, monkeypatch, capsys, tmp_path):
    build = tool("build_wheels")
    paths = {"nvcc": "/cuda/bin/nvcc", build["CROSS"]: "/usr/bin/g++"}
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(build["shutil"], "which", paths.get)
    monkeypatch.setattr(build["sysconfig"], "get_path", lambda name: str(tmp_path))
    machines = build["plan"](without_cuda=False)
    assert machines["aarch64"] == {"OPTIMZOO_CUDA": "0", "CXX": build["CROSS"]}
    assert machines["x86_64"]["OPTIMZOO_CUDA"] == "1"
    assert machines["x86_64"]["PATH"].startswith("/cuda/bin:")
    assert build["plan"](without_cuda=True)["x86_64"] == {"OPTIMZOO_CUDA": "0"}
    assert not capsys.readouterr().out
    # The nvcc of the packages comes first.
    packaged = tmp_path / "nvidia" / "cu13" / "bin"
    packaged.mkdir(parents=True)
    (packaged / "nvcc").touch()
    assert build["plan"](without_cuda=False)["x86_64"]["PATH"].startswith(f"{packaged}:")
    (packaged / "nvcc").unlink()
    paths.clear()
    assert list(build["plan"](without_cuda=True)) == ["x86_64"]
    assert capsys.readouterr().out.count("\n") == 1
    with pytest.raises(SystemExit, match=r"error: no nvcc; install tools/wheels\.txt"):
        build["plan"](without_cuda=False)
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert build["plan"](without_cuda=False) == {"aarch64": {"OPTIMZOO_CUDA": "0"}}


def test_a_large_wheel_and_another_versions_tag_are_refused(tool):
    build = tool("build_wheels")
    build["refuse_large"](Path("a.whl"), 20_000_000)
    with pytest.raises(SystemExit, match=r"error: a.whl has 20\.1 MB, over the 20 of a wheel"):
        build["refuse_large"](Path("a.whl"), 20_100_000)
    build["check_tag"]({})
    build["check_tag"]({"GITHUB_REF_TYPE": "tag", "GITHUB_REF_NAME": f"v{__version__}"})
    with pytest.raises(SystemExit, match=r"error: the tag is v9\.9\.9"):
        build["check_tag"]({"GITHUB_REF_TYPE": "tag", "GITHUB_REF_NAME": "v9.9.9"})


def test_each_python_meets_another_torch(tool, tmp_path):
    check = tool("test_wheels")
    found = check["environments"]({"3.11": "/a", "3.12": "/b", "3.13": "/c"})
    torches = [check["pinned_torch"](), check["OLDEST_TORCH"][0], check["NEWEST_TORCH"][0]]
    assert [e.python for e in found] == ["3.11", "3.12", "3.13"]
    assert [e.torch for e in found] == torches and len(set(torches)) == 3
    assert len(check["environments"]({"3.12": "/b"})) == 1
    with pytest.raises(FileNotFoundError, match=r"no wheel for x86_64 .* run make wheels"):
        check["find_wheel"](tmp_path, "x86_64")
    for machine in ("x86_64", "aarch64"):
        (tmp_path / f"optimzoo-0.1.0-py3-none-manylinux_2_28_{machine}.whl").touch()
    assert check["find_wheel"](tmp_path, "aarch64").name.endswith("_aarch64.whl")


def test_importing_optimzoo_imports_torch_and_the_standard_library_alone():
    code = (
        "import sys, torch; before = set(sys.modules); import optimzoo; "
        "print(*(set(sys.modules) - before))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    added = set(run.stdout.split())
    assert {name.split(".")[0] for name in added} - {"optimzoo", "torch"} <= sys.stdlib_module_names
    # What compiles, trains, simulates or draws is for those who ask for it.
    for heavy in (
        *("torch._dynamo", "torch._inductor", "torch.onnx", "torch.testing"),
        *("optimzoo.memory", "optimzoo.models", "optimzoo.integrations", "optimzoo.lowrank"),
        *("optimzoo.cli", "optimzoo.doctor"),
    ):
        assert heavy not in added


@linux
def test_a_process_has_the_openmp_runtime_of_torch_alone():
    code = (
        "import torch; from pathlib import Path; from optimzoo.kernels import native; "
        "native.CPU.available(); maps = Path('/proc/self/maps').read_text().splitlines(); "
        "print(Path(torch.__file__).parent.parent); "
        "print(*{line.split()[-1] for line in maps if 'libgomp' in line})"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    place, runtimes = run.stdout.splitlines()
    if not list(Path(place, "torch").glob("lib/libgomp*")):
        pytest.skip("this torch brings no libgomp")
    assert len(runtimes.split()) == 1 and Path(place) in Path(runtimes).parents
