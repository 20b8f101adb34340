"""One list of runs, several processes: each run once, and a dead process's runs go on."""

import os
import signal
import time
from pathlib import Path

import pytest
from test_compare_jobs import compare, rows_of, tuned_folder
from tiny_benchmarks import start

from benchmarks.experiments.run_queue import lock_run

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc")


def test_a_run_has_one_holder_at_a_time(tmp_path):
    first = lock_run(tmp_path / "run")
    assert first.is_locked and lock_run(tmp_path / "run") is None
    other = lock_run(tmp_path / "other")
    first.release()
    second = lock_run(tmp_path / "run")
    assert second.is_locked and not first.is_locked and other.is_locked


def test_a_dead_process_loses_its_run_at_once(tmp_path):
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        lock = lock_run(tmp_path)
        os.write(writing, b"1" if lock else b"0")
        time.sleep(60)
    assert os.read(reading, 1) == b"1" and lock_run(tmp_path) is None
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    assert lock_run(tmp_path).is_locked


@pytest.fixture
def folder(tmp_path):
    """A plan of two runs, each longer than one process may start behind the other."""
    return tuned_folder(tmp_path, steps=1500)


@pytest.mark.distributed
def test_two_processes_share_one_list_and_one_is_killed(folder):
    both = [start(folder, compare(folder, 1, "out", "--seeds=1")) for _ in range(2)]
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            saved = list(folder.glob("out/runs/*/checkpoints/latest"))
            # A process has one run at a time: two that are locked have two holders.
            if len(saved) == 2 and not any(map(lock_run, folder.glob("out/runs/*"))):
                break
            time.sleep(0.005)
        else:
            raise AssertionError("the two never held a run each")
        both[0].send_signal(signal.SIGKILL)
        both[0].wait(timeout=60)
        _, error = both[1].communicate(timeout=240)
    finally:
        for process in both:
            process.kill()
    assert both[1].returncode == 0, error
    assert all(map(lock_run, folder.glob("out/runs/*")))
    assert not list(folder.glob("out/runs/*/checkpoints/latest"))
    shared = rows_of(folder / "out")
    alone = start(folder, compare(folder, 1, "alone", "--seeds=1"))
    assert alone.wait(timeout=240) == 0
    straight = rows_of(folder / "alone")
    assert shared.keys() == straight.keys() and len(shared) == 2
    for key, row in straight.items():  # to the same bits, the killed one's run included
        assert shared[key]["test_loss"] == row["test_loss"]
        assert shared[key]["curve"] == row["curve"]
