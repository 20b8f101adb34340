"""``optimzoo list`` and ``optimzoo doctor``."""

import os
import subprocess
import sys

import pytest
import torch
from needs import needs_cpu_kernels

import optimzoo
from optimzoo import doctor, list_optimizers
from optimzoo.cli import main
from optimzoo.kernels import native


def test_list_names_every_optimizer_on_a_line(capsys):
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    named = [line for line in lines if not line.startswith(" ")]
    assert [line.split()[0] for line in named] == list_optimizers()
    assert max(map(len, lines)) <= 80 and "(arXiv" in " ".join(lines)
    assert main(["list", "gal*"]) == 0
    assert capsys.readouterr().out.startswith("galore ")


def test_a_pattern_without_a_match_is_one_line(capsys):
    assert main(["list", "nothing*"]) == 2
    assert (
        capsys.readouterr().err == "error: no optimizer matches 'nothing*'; see `optimzoo list`\n"
    )


def test_ctrl_c_and_a_full_disk_are_one_line(capsys, monkeypatch):
    for error, status in ((KeyboardInterrupt(), 130), (OSError(28, "No space left"), 2)):

        def stopped(error=error):
            raise error

        monkeypatch.setattr(doctor, "main", stopped)
        assert main(["doctor"]) == status
        assert capsys.readouterr().err.count("\n") == 1


def test_a_closed_pipe_and_a_full_device_leave_no_traceback(capsys, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    for target, status, lines in ((writer, 141, 0), ("/dev/full", 2, 1)):
        if target == "/dev/full" and not os.path.exists(target):
            continue  # Linux has it
        with open(target, "w") as out:
            monkeypatch.setattr(sys, "stdout", out)
            assert main(["list"]) == status
            out.write("what an interpreter still has to write when it ends")
        assert capsys.readouterr().err.count("\n") == lines


def test_errors_of_the_parser_are_one_line(capsys):
    for arguments in ([], ["lst"], ["list", "a", "b"], ["doctor", "--fast"], ["memory"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        error = capsys.readouterr().err
        assert caught.value.code == 2
        assert error.startswith("error: ") and error.endswith("--help\n") and error.count("\n") == 1


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"optimzoo {optimzoo.__version__}\n"


@needs_cpu_kernels
def test_doctor_finds_the_cpu_kernels_right(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert f"cpu, native:   {native.CPU.variant()}\n" in out
    assert out.count("  ok\n") >= 4 and "sinkhorn" in out
    assert "WRONG" not in out
    assert ("torch finds no CUDA device" in out) == (not torch.cuda.is_available())


@needs_cpu_kernels
@pytest.mark.parametrize("kernel", ["adam_", "scale_", "sinkhorn_"])
def test_doctor_fails_for_a_kernel_that_is_wrong(kernel, capsys, monkeypatch):
    library = native.Library("cpu")
    right = getattr(library, kernel)

    def wrong(params, *args, **kwargs):
        right(params, *args, **kwargs)
        params[0].add_(1e-3)

    monkeypatch.setattr(library, kernel, wrong)
    monkeypatch.setitem(doctor.dispatch.BACKENDS, "cpu", (library,))
    assert main(["doctor"]) == 1
    assert "WRONG" in capsys.readouterr().out


@pytest.mark.thorough
def test_it_runs_as_a_module():
    run = subprocess.run(
        [sys.executable, "-m", "optimzoo", "list", "scale"], capture_output=True, text=True
    )
    assert run.returncode == 0
    assert run.stdout.startswith("scale ")


def test_the_command_line_needs_no_module_of_unix_alone():
    code = (
        "import sys; sys.modules['resource'] = None; from optimzoo.cli import main; main(['list'])"
    )
    assert (
        b"scale"
        in subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout
    )


def test_a_default_device_at_the_import_changes_nothing():
    code = (
        "import torch; torch.set_default_device('meta'); import optimzoo\n"
        "torch.set_default_device('cpu')\n"
        "w = torch.nn.Parameter(torch.ones(8, 16)); w.grad = torch.ones(8, 16)\n"
        "groups = [{'params': [w], 'role': 'hidden'}]\n"
        "o = optimzoo.create_optimizer('adams', groups, lr=1e-2, l1=1e-3, total_steps=10)\n"
        "o.step()\n"
        "print(int(o.state[w]['step']))\n"
        "optimzoo.create_optimizer('apollo', groups, lr=1e-2, rank=2).step()\n"
        "optimzoo.create_optimizer('galore', groups, lr=1e-2, rank=2).step()\n"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout
        == b"1\n"
    )
