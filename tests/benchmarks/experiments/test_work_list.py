"""One list of runs, several processes: each run once, and a dead process's runs go on."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import tiny_benchmarks
from test_compare_jobs import compare, rows_of, write_plan
from tiny_benchmarks import start

from benchmarks.experiments import run_lock as work
from benchmarks.experiments.run_lock import Claim, WorkList

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc")


def claimed(folder: Path, work_list: WorkList) -> Claim:
    claim = work_list.claim(folder)
    assert claim is not None
    return claim


def test_a_run_has_one_holder_at_a_time(tmp_path):
    one, two = WorkList(), WorkList()
    with claimed(tmp_path / "run", one):
        assert one.claim(tmp_path / "run") is None
    with claimed(tmp_path / "run", two):
        assert [path.name for path in (tmp_path / "run").iterdir()] == ["claim.0"]
    assert list((tmp_path / "run").iterdir()) == []


def test_a_dead_process_loses_its_run_at_once(tmp_path):
    process = os.fork()
    if process == 0:
        WorkList().claim(tmp_path)
        os._exit(0)
    os.waitpid(process, 0)
    assert json.loads((tmp_path / "claim.0").read_text())["pid"] == process
    with claimed(tmp_path, WorkList()) as claim:
        assert claim.path.name == "claim.1"
    assert list(tmp_path.iterdir()) == []


def test_a_silent_machine_loses_its_run_after_a_while(tmp_path, monkeypatch):
    (tmp_path / "claim.3").write_text('{"place": "elsewhere", "pid": 1}')
    waiting, clock = WorkList(), [100.0]
    monkeypatch.setattr(work.time, "monotonic", lambda: clock[0])
    assert waiting.claim(tmp_path) is None
    clock[0] += work.STALE - 1
    os.utime(tmp_path / "claim.3")  # it has only been slow
    assert waiting.claim(tmp_path) is None
    clock[0] += work.STALE - 1
    assert waiting.claim(tmp_path) is None
    clock[0] += 2
    assert claimed(tmp_path, waiting).path.name == "claim.4"


def test_a_claim_half_written_is_left_alone(tmp_path):
    (tmp_path / "claim.0").write_text("")
    assert WorkList().claim(tmp_path) is None


def test_a_sleeper_sees_that_its_run_is_gone(tmp_path):
    claim = claimed(tmp_path, WorkList())
    claim.beat()
    claim.check()
    (tmp_path / "claim.1").write_text("")
    claim.beat()
    with pytest.raises(work.Lost, match="taken over by another process"):
        claim.check()


@pytest.fixture
def folder(tmp_path):
    """A plan of two runs, each longer than one process may start behind the other."""
    tiny_benchmarks.tiny_corpus(tmp_path)
    write_plan(tmp_path, steps=1500)
    rows = [
        {"method": m, "protocol": "tuned", "config": {"lr": 1e-2, "other_lr": 2e-2, "clip": 1.0}}
        for m in ("adamw", "scale")
    ]
    (tmp_path / "results").mkdir()
    text = json.dumps({"rows": [{**row, "valid_loss": 1.0} for row in rows]})
    (tmp_path / "results" / "tiny-tune.json").write_text(text)
    return tmp_path


@pytest.mark.distributed
def test_two_processes_share_one_list_and_one_is_killed(folder):
    both = [start(folder, compare(folder, 1, "out", "--seeds=1")) for _ in range(2)]
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            holders = {}
            for path in folder.glob("out/runs/*/claim.*"):
                try:
                    holders[path.parent.name] = json.loads(path.read_text())["pid"]
                except (OSError, ValueError):
                    continue
            saved = list(folder.glob("out/runs/*/checkpoints/latest"))
            if len(set(holders.values())) == 2 and len(saved) == 2:
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
    assert not list(folder.glob("out/runs/*/claim.*"))
    assert not list(folder.glob("out/runs/*/checkpoints/latest"))
    shared = rows_of(folder / "out")
    alone = start(folder, compare(folder, 1, "alone", "--seeds=1"))
    assert alone.wait(timeout=240) == 0
    straight = rows_of(folder / "alone")
    assert shared.keys() == straight.keys() and len(shared) == 2
    for key, row in straight.items():  # to the same bits, the killed one's run included
        assert shared[key]["test_loss"] == row["test_loss"]
        assert shared[key]["curve"] == row["curve"]
