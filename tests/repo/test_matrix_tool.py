"""tools/test_matrix.py: which rows, which of them again, what pytest said, the table."""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import matrix_results as results  # noqa: E402
import test_matrix as matrix  # noqa: E402

from optimzoo._version import TESTED_TORCH  # noqa: E402

AVX2 = {"avx2", "fma", "f16c"}
AVX512 = {*AVX2, "avx512f", "avx512bw", "avx512vl", "avx512dq"}
PYTHONS = {"3.11": "/a/python3.11", "3.12": "/a/python3.12", "3.13": "/a/python3.13"}


def rows(flags=AVX512, pythons=PYTHONS, own="3.12"):
    return matrix.all_rows(flags, pythons, own)


def names(found):
    return [row.name for row in found]


def test_the_rows_are_what_this_machine_can_make():
    assert names(rows()) == [
        *("default", "aten-default", "aten-avx2", "isa-baseline", "isa-avx2"),
        *("native-off", "no-compiler", "threads-2", "threads-4", "torch-oldest", "torch-newest"),
        *("python3.11", "python3.13"),
    ]
    assert [n for n in names(rows(AVX2)) if n.startswith(("aten", "isa"))] == [
        "aten-default",
        "isa-baseline",
    ]
    assert not [n for n in names(rows(set(), {})) if n.startswith(("aten", "isa", "python"))]


def test_what_a_row_changes():
    by_name = {row.name: row for row in rows()}
    assert by_name["aten-avx2"].env == {"ATEN_CPU_CAPABILITY": "avx2"}
    assert by_name["isa-baseline"].env == {"OPTIMZOO_CPU_ISA": "baseline"}
    assert by_name["native-off"].env == {"OPTIMZOO_NATIVE": "0"}
    assert by_name["threads-4"].threads == 4
    assert by_name["python3.13"].python == "/a/python3.13"
    assert by_name["torch-oldest"].python == "/a/python3.12"
    own = {n for n, row in by_name.items() if row.python}
    assert own == {"no-compiler", "torch-oldest", "torch-newest", "python3.11", "python3.13"}


@pytest.mark.parametrize("end", [0, 1])
def test_the_torches_are_the_ends_of_the_tested_range(end):
    torch, triton = (matrix.OLDEST_TORCH, matrix.NEWEST_TORCH)[end]
    assert torch.startswith(f"torch=={TESTED_TORCH[end]}.")
    assert triton.startswith("triton==")


def test_rows_are_chosen_by_name_in_the_matrix_order():
    assert names(matrix.choose(rows(), ["python3.13", "native-off"])) == [
        "native-off",
        "python3.13",
    ]
    assert matrix.choose(rows(), []) == rows()
    with pytest.raises(ValueError, match=r"no row 'python3\.9'; the rows here are default, aten"):
        matrix.choose(rows(), ["python3.9"])


def test_every_row_has_its_turn():
    every = names(rows())[1:]
    assert [names(matrix.rotated(rows(), n))[0] for n in range(12)] == every
    assert names(matrix.rotated(rows(), 12)) == every
    assert names(matrix.rotated(rows(), 3)) == every[3:] + every[:3]


def test_the_interpreters_of_the_claimed_versions_are_found(tmp_path, monkeypatch):
    own = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert own in matrix.claimed_pythons()
    home = tmp_path / "versions" / f"{own}.99" / "bin"
    home.mkdir(parents=True)
    (home / "python").symlink_to(sys.executable)
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert matrix.find_pythons([own, "3.99"]) == {own: str(home / "python")}


QUIET = """\
..s.F                                  [100%]
=================================== FAILURES ===================================
=========================== short test summary info ============================
FAILED tests/test_a.py::test_one[3 failed] - AssertionError: 1 passed in 3s
ERROR tests/test_b.py
1 failed, 3 passed, 1 skipped, 2 warnings, 1 error in 312.11s (0:05:12)
"""


def test_the_closing_line_is_read():
    read = results.summary(QUIET, 1)
    assert read == {
        "status": "failed",
        "passed": 3,
        "skipped": 1,
        "failed": 2,
        "failures": [
            "tests/test_a.py::test_one[3 failed] - AssertionError: 1 passed in 3s",
            "tests/test_b.py",
        ],
    }
    assert results.summary("...\n===== 3 passed in 0.12s =====\n", 0)["status"] == "passed"
    assert results.summary("3 passed, 4 deselected in 0.12s\n", 0)["passed"] == 3


@pytest.mark.parametrize(
    ("output", "status", "why"),
    [
        ("3 passed in 0.12s\nmake: *** [test] Error 1\n", 2, r"exit status 2: make: .* Error 1"),
        ("no tests ran in 0.01s\n", 0, "exit status 0: no tests ran in 0.01s"),
        ("..\n[gw0] node down: Not properly terminated\n", -9, "exit status -9: .gw0. node down"),
        ("", 0, "exit status 0: no output"),
    ],
)
def test_a_run_that_did_not_end_well_has_failed(output, status, why):
    read = results.summary(output, status)
    assert read["status"] == "failed"
    [failure] = read["failures"]
    assert re.match(why, failure)


def git(folder, *args):
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *who, *args], cwd=folder, check=True, capture_output=True)


def test_the_key_is_the_commit_and_what_was_changed_since(tmp_path):
    assert results.tree_key(tmp_path) is None
    git(tmp_path, "init", "-q")
    (tmp_path / "a").write_text("1")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-qm", "a")
    clean = results.tree_key(tmp_path)
    assert len(clean) == 40
    (tmp_path / "a").write_text("2")
    changed = results.tree_key(tmp_path)
    (tmp_path / "b").write_text("")
    added = results.tree_key(tmp_path)
    assert len({clean, changed, added}) == 3 and changed.startswith(f"{clean}+")
    (tmp_path / "b").unlink()
    (tmp_path / "a").write_text("1")
    assert results.tree_key(tmp_path) == clean


def test_a_result_is_of_one_tree_and_whole(tmp_path):
    result = {"row": "default", "tree": "abc", "status": "passed"}
    results.store(tmp_path, result)
    assert [p.name for p in tmp_path.iterdir()] == ["default.json"]
    assert results.stored(tmp_path, "default", "abc") == result
    assert results.stored(tmp_path, "default", "def") is None
    assert results.stored(tmp_path, "default", None) is None
    assert results.stored(tmp_path, "other", "abc") is None
    (tmp_path / "default.json").write_text(json.dumps(result)[:-3])
    assert results.stored(tmp_path, "default", "abc") is None


def done(name, status="passed", **more):
    result = {"row": name, "status": status, "seconds": 12, "passed": 3, "skipped": 1, "failed": 0}
    return {**result, "failures": [], "log": f"runs/matrix/{name}.log", **more}


def test_the_table():
    failures = [f"tests/test_a.py::test_{n}" for n in range(5)]
    text = results.table(
        [
            done("default", versions="Python 3.12.1 torch 2.13.0+cpu"),
            done("native-off", "failed", failed=5, failures=failures),
            {"row": "torch-oldest", "status": "not run", "failures": ["its torch is ..."]},
        ]
    )
    assert text.splitlines() == [
        "row           result   seconds  passed  skipped  failed  with",
        "default       passed        12       3        1       0  Python 3.12.1 torch 2.13.0+cpu",
        "native-off    failed        12       3        1       5",
        "    tests/test_a.py::test_0",
        "    tests/test_a.py::test_1",
        "    tests/test_a.py::test_2",
        "    and 2 more in runs/matrix/native-off.log",
        "torch-oldest  not run        -       -        -       -",
        "    its torch is ...",
    ]


@pytest.fixture
def matrix_of(monkeypatch, tmp_path, capsys):
    """Runs the tool with rows whose outcomes are given; returns its status and what it ran."""
    monkeypatch.setattr(matrix, "RESULTS", tmp_path)
    monkeypatch.setattr(matrix, "tree_key", lambda root: "abc")
    monkeypatch.setattr(matrix, "find_pythons", lambda versions: {})
    monkeypatch.setattr(signal, "signal", lambda *args: None)

    def call(outcomes, *args):
        ran = []

        def run(row, args, progress):
            ran.append(row.name)
            outcome = outcomes.get(row.name, "passed")
            if isinstance(outcome, BaseException):
                raise outcome
            return done(row.name, outcome)

        monkeypatch.setattr(matrix, "run", run)
        return matrix.main(args), ran, capsys.readouterr().out

    return call


def test_an_interrupted_matrix_goes_on(matrix_of):
    chosen = ("default", "native-off", "threads-2")
    status, ran, out = matrix_of({"native-off": KeyboardInterrupt()}, *chosen)
    assert (status, ran) == (130, ["default", "native-off"])
    assert out.splitlines()[-1].startswith("default")
    status, ran, out = matrix_of({}, *chosen)
    assert (status, ran) == (0, ["native-off", "threads-2"])
    assert [line.split()[0] for line in out.splitlines()[-3:]] == list(chosen)
    assert matrix_of({}, *chosen)[1] == []
    assert matrix_of({}, "--again", *chosen)[1] == list(chosen)


def test_a_failure_is_the_status_and_is_kept(matrix_of):
    assert matrix_of({"default": "failed"}, "default", "threads-2")[0] == 1
    assert matrix_of({}, "default", "threads-2")[:2] == (1, [])


def test_what_cannot_be_installed_has_failed_and_is_tried_again(matrix_of):
    broken = {"threads-2": matrix.InstallError("installing failed: no such version")}
    status, _, out = matrix_of(broken, "threads-2")
    assert status == 1 and "installing failed: no such version" in out
    assert matrix_of({}, "threads-2")[:2] == (0, ["threads-2"])


def test_the_rotation_passes_over_what_cannot_be_run(matrix_of):
    absent = {"threads-2": matrix.NotRunError("a CUDA build")}
    chosen = ("default", "threads-2", "threads-4")
    assert matrix_of(absent, "--rotate", "0", *chosen)[:2] == (0, ["threads-2", "threads-4"])
    assert matrix_of(absent, "--again", "--rotate", "3", *chosen)[:2] == (0, ["threads-4"])


def test_rows_of_a_tree_that_changed_are_not_kept(matrix_of, monkeypatch):
    keys = iter("abcd")
    monkeypatch.setattr(matrix, "tree_key", lambda root: next(keys))
    status, _, out = matrix_of({}, "default")
    assert status == 0 and "the tree changed meanwhile: not stored" in out
    monkeypatch.setattr(matrix, "tree_key", lambda root: "a")
    assert matrix_of({}, "default")[1] == ["default"]


def test_the_list_runs_nothing(matrix_of):
    status, ran, out = matrix_of({}, "--list", "threads-2")
    assert (status, ran, out) == (0, [], "threads-2  OMP_NUM_THREADS=2\n")


def test_an_interrupt_ends_what_a_row_started(tmp_path):
    log = tmp_path / "log"
    child = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"

    def interrupt():
        while not log.exists() or not log.read_text().strip():
            threading.Event().wait(0.05)
        signal.raise_signal(signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    # Who runs the tests in the background may have SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            matrix.call([sys.executable, "-c", program], log, {})
        thread.join()
    finally:
        signal.signal(signal.SIGINT, before)
    pid = int(log.read_text().split()[0])
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_row_is_make_test_in_its_environment(tmp_path, monkeypatch):
    calls = []

    def call(command, log, env, cwd=None, progress=None):
        calls.append((list(command), env))
        log.write_text("3 passed in 0.12s\n")
        return 0

    monkeypatch.setattr(matrix, "RESULTS", tmp_path)
    monkeypatch.setattr(matrix, "call", call)
    monkeypatch.setattr(matrix.subprocess, "run", lambda *a, **k: argparse.Namespace(stdout="3.12"))
    monkeypatch.setenv("OPTIMZOO_NATIVE", "1")
    monkeypatch.setenv("MAKEFLAGS", "n")
    args = argparse.Namespace(venv="/v", workers=1, cuda_builds=False)
    row = next(r for r in rows() if r.name == "isa-avx2")
    result = matrix.run(row, args, lambda text: None)
    command, env = calls[-1]
    assert command[0] == "make" and command[-1] == "test"
    assert {"VENV=/v", "THREADS=1", "WORKERS=1", "WITH="} <= set(command)
    assert env["OPTIMZOO_CPU_ISA"] == "avx2"
    assert "OPTIMZOO_NATIVE" not in env and "MAKEFLAGS" not in env
    assert result["status"] == "passed" and result["versions"] == "3.12"


def test_a_cuda_build_is_not_downloaded_unasked(tmp_path, monkeypatch):
    def call(command, log, env, cwd=None, progress=None):
        with log.open("a") as file:
            file.write(" + nvidia-cublas==13.1.1.3\n" if "--dry-run" in command else "\n")
        commands.append(command)
        return 0

    commands = []
    monkeypatch.setattr(matrix, "RESULTS", tmp_path)
    monkeypatch.setattr(matrix, "call", call)
    args = argparse.Namespace(venv="/v", workers=1, cuda_builds=False)
    row = next(r for r in rows() if r.name == "torch-oldest")
    with pytest.raises(matrix.NotRunError, match="its torch is a CUDA build here"):
        matrix.run(row, args, lambda text: None)
    assert not any(word.endswith(".test") for command in commands for word in command)


def test_the_time_of_ci_is_what_the_guide_says():
    guide = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    cells = re.findall(r"^\| (.+) \| ([\d.]+) \| (\d+) \|$", guide, re.MULTILINE)
    *parts, together = [(float(wanted), int(limit)) for _, wanted, limit in cells]
    limits = [int(n) for n in re.findall(r"^part (\d+) ", script, re.MULTILINE)]
    assert limits == [limit for _, limit in parts]
    assert together == (sum(wanted for wanted, _ in parts), sum(limits))
    assert together[0] <= 15 and together[1] < 90
