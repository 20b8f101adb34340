"""Where kernels are missing: the build goes on, every step is eager, and it is said why."""

import ctypes
import importlib.util
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import emulated_cuda
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import optimzoo
from optimzoo import doctor
from optimzoo.cli import main
from optimzoo.kernels import dispatch, native, triton
from optimzoo.kernels.library import ABI

# What a compiler says of its target, and the file that it was asked for, with nothing in it.
WORKING = """#!/bin/sh
if [ "$1" = -dumpmachine ]; then echo aarch64-linux-gnu; fi
while [ $# -gt 0 ]; do
  if [ "$1" = -o ]; then : > "$2"; fi
  shift
done
"""
BROKEN = """#!/bin/sh
echo "in the beginning" >&2
echo "cc1plus: error: no such header" >&2
exit 1
"""


@pytest.fixture
def backends(monkeypatch):
    """Choose anew which kernels there are, within the test and after it."""
    monkeypatch.setenv("OPTIMZOO_NATIVE", "1")
    dispatch._backend.cache_clear()
    triton.why_not.cache_clear()
    yield lambda **devices: [
        monkeypatch.setitem(dispatch.BACKENDS, kind, found) for kind, found in devices.items()
    ]
    monkeypatch.undo()
    dispatch._backend.cache_clear()
    triton.why_not.cache_clear()


@pytest.fixture
def absent(tmp_path, backends):
    """A CPU library that was not built."""
    library = native.Library("cpu")
    library.path = tmp_path / "_cpu.so"
    library.path.with_suffix(".failure.txt").write_text("no g++ or clang++ on PATH\n")
    backends(cpu=(library,))
    return library


@pytest.fixture
def rocm(monkeypatch, backends):
    """A torch of ROCm with one GPU, and a library for CUDA beside the package."""
    monkeypatch.setattr(torch.version, "hip", "6.4.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 4))
    library = native.Library("cuda")
    library.path = Path(__file__)  # it exists; loading it would be an error
    backends(cuda=(library, triton))
    return library


def step(**options):
    """A weight on the CPU after a step of SCALE."""
    weight = torch.nn.Parameter(torch.linspace(-1, 1, 24).view(4, 6))
    weight.grad = torch.linspace(2, -1, 24).view(4, 6)
    optimizer = optimzoo.SCALE([{"params": [weight], "role": "hidden"}], lr=0.1, **options)
    optimizer.step()
    return weight.detach()


def test_the_structures_are_those_of_the_header():
    assert native._TENSOR.size == 104
    assert ctypes.sizeof(native._Options) == 136


def test_a_library_that_cannot_be_used_says_why(tmp_path, monkeypatch):
    monkeypatch.setenv("OPTIMZOO_NATIVE", "1")

    def reason(path):
        library = native.Library("cpu")
        library.path = path
        assert not library.available()
        with pytest.raises(RuntimeError, match="no cpu kernels: "):
            library.center_([torch.ones(1, 1)], [torch.ones(1, 1)], [(1, 1)], eps=1.0)
        return library.why_not()

    text = tmp_path / "_cpu.so"
    assert reason(text) == "_cpu.so was not built; install g++ or clang++, then optimzoo again"
    text.with_suffix(".failure.txt").write_text("no g++ or clang++ on PATH\n")
    assert "was not built (no g++ or clang++ on PATH); install g++ or" in reason(text)
    text.write_text("not a library")
    assert "cannot be loaded" in reason(text)
    if native.CPU.path.exists():
        monkeypatch.setattr("optimzoo.kernels.library.ABI", 999)
        assert f"{native.CPU.path.name} has ABI {ABI}, not 999" in reason(native.CPU.path)
    monkeypatch.setenv("OPTIMZOO_NATIVE", "0")
    assert "OPTIMZOO_NATIVE=0" in reason(native.CPU.path)


@pytest.fixture
def checkout(tmp_path):
    """What csrc/build.py needs of this repository, elsewhere."""
    source = Path(__file__).resolve().parents[2] / "csrc"
    (tmp_path / "csrc").mkdir()
    for part in ("cpu", "include"):
        shutil.copytree(source / part, tmp_path / "csrc" / part)
    shutil.copy(source / "build.py", tmp_path / "csrc" / "build.py")
    (tmp_path / "optimzoo" / "kernels").mkdir(parents=True)
    return tmp_path


def built(checkout, compilers, **variables):
    """Run it there with nothing on PATH but `compilers`, by name."""
    tools = checkout / "tools"
    shutil.rmtree(tools, ignore_errors=True)
    tools.mkdir()
    for name, text in compilers.items():
        (tools / name).write_text(text)
        (tools / name).chmod(stat.S_IRWXU)
    run = [sys.executable, str(checkout / "csrc" / "build.py")]
    env = {"PATH": str(tools), **variables}
    return subprocess.run(run, env=env, capture_output=True, text=True)


FAILURES = {
    "none": ({}, {}, "no g++ or clang++ on PATH"),
    "CXX fails": ({}, {"CXX": "/bin/false"}, "/bin/false"),
    "CXX is not there": ({}, {"CXX": "/no/such/compiler -O2"}, "/no/such/compiler"),
    "all fail": ({"g++": BROKEN, "clang++": BROKEN}, {}, "cc1plus: error: no such header"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_build_without_a_compiler_goes_on_and_says_so(checkout, case):
    compilers, variables, said = FAILURES[case]
    library = checkout / "optimzoo" / "kernels" / "_cpu.so"
    library.write_text("of older sources")
    os.utime(library, (0, 0))
    run = built(checkout, compilers, **variables)
    assert run.returncode == 0, run.stderr
    assert "the cpu kernels were not built" in run.stderr and said in run.stderr
    assert run.stderr.splitlines()[-1].startswith("optimzoo goes on without them, on the eager")
    assert not library.exists()
    reason = library.with_suffix(".failure.txt").read_text()
    assert said in reason and reason.count("\n") == 1
    assert built(checkout, compilers, **variables, OPTIMZOO_BUILD="require").returncode == 1


def test_a_compiler_that_fails_leaves_it_to_the_next_and_the_reason_goes_with_it(checkout):
    library = checkout / "optimzoo" / "kernels" / "_cpu.so"
    assert built(checkout, {"g++": BROKEN}).returncode == 0 and not library.exists()
    run = built(checkout, {"g++": BROKEN, "clang++": WORKING})
    assert run.returncode == 0 and not run.stderr
    assert library.exists() and not library.with_suffix(".failure.txt").exists()


def test_without_the_library_steps_are_eager_and_fused_is_an_error_of_one_line(absent):
    assert torch.equal(step(), step(fused=False))
    refusal = "fused=True cannot step .* on cpu: _cpu.so was not built"
    with pytest.raises(RuntimeError, match=refusal) as caught:
        step(fused=True)
    assert "leave fused=None" in str(caught.value) and "\n" not in str(caught.value)


def test_doctor_says_in_a_line_why_and_what_to_do_and_is_content(absent, capsys):
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == (
        "cpu, native:   none, every step is eager; _cpu.so was not built (no g++ or clang++ on "
        "PATH); install g++ or clang++, then optimzoo again"
    )


def test_doctor_tells_of_one_thread(capsys, backends, monkeypatch):
    backends(cpu=(native.CPU,))
    monkeypatch.setattr(native.Library, "available", lambda self: True)
    monkeypatch.setattr(native.Library, "variant", lambda self: "baseline")
    monkeypatch.setattr(doctor, "check", lambda kernels, device: {})
    for threaded, more in ((True, ""), (False, ", in one thread: its compiler had no OpenMP")):
        monkeypatch.setattr(native.Library, "threaded", lambda self, answer=threaded: answer)
        assert main(["doctor"]) == 0
        assert f"cpu, native:   baseline{more}\n" in capsys.readouterr().out


def test_rocm_never_meets_the_kernels_for_cuda(rocm, monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda path: pytest.fail(f"{path} was loaded"))
    assert not rocm.available() and "this torch is ROCm's" in rocm.why_not()
    for there in (True, False):
        dispatch._backend.cache_clear()
        triton.why_not.cache_clear()
        found = SimpleNamespace() if there else None
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, found=found: found)
        assert dispatch.backend("cuda") is (triton if there else None)


def test_a_gpu_too_old_for_the_machine_code_takes_the_eager_path(rocm, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace())
    assert dispatch.backend("cuda") is None
    assert "need a GPU of compute capability 8.0" in rocm.why_not()
    assert "need a GPU of compute capability 8.0" in triton.why_not()


def test_doctor_tells_of_rocm_and_of_accelerators_without_kernels(rocm, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace())
    monkeypatch.setattr(doctor, "check", lambda kernels, device: {})
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()[-4:]
    assert lines[0].startswith("cuda, native:  none; the native CUDA kernels are NVIDIA's alone")
    assert lines[1] == "cuda, Triton:  on ROCm, where nobody but you has tested them"
    assert lines[2] == "mps:           none, every step is eager; there are no kernels for mps"
    assert lines[3] == "xpu:           none, every step is eager; there are no kernels for xpu"


def test_a_cuda_library_says_what_it_was_built_for_and_refuses_an_older_driver(
    backends, monkeypatch, capsys
):
    """By the emulated one: for sm_80 and sm_90, by CUDA 13.0, on a driver for CUDA 12.8."""
    library = native.Library("cuda")
    library.path = Path(emulated_cuda.built()._name)
    backends(cpu=(), cuda=(library,))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert library.why_not() == "torch finds no CUDA device"
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out.splitlines()[1:3] == [
        "cuda, native:  none; torch finds no CUDA device",
        "  emulated_cuda.so is built for sm_80, sm_90 with CUDA 13.0",
    ]
    del library.__dict__["_loaded"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert not library.available()
    assert "was built with CUDA 13.0, the NVIDIA driver is for CUDA 12.8; update" in (
        library.why_not()
    )


@pytest.mark.parametrize("device", ["xpu", "mps", "meta"])
@pytest.mark.parametrize("fused", [None, True])
def test_tensors_of_other_devices_are_left_to_the_eager_path(device, fused):
    """By tensors that say they are there and hold nothing: no kernel may be asked."""
    with FakeTensorMode():
        weights = [torch.nn.Parameter(torch.ones(s, device=device)) for s in ((4, 6), (6,))]
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        items = [dispatch.vector(w, w.grad, w.grad, w.grad) for w in weights]
        assert dispatch.backend(device) is None
        if fused:
            with pytest.raises(RuntimeError, match=f"on {device}: there are none for it"):
                dispatch.partition_by_backend(items, fused)
        else:
            assert dispatch.partition_by_backend(items, fused) == ([], items)
