"""Comparisons in several processes: the same numbers, and nothing left behind."""

import copy
import json
import os
import signal
import time
from pathlib import Path

import pytest
import tiny_benchmarks
from tiny_benchmarks import start

from benchmarks.__main__ import main

pytestmark = [
    pytest.mark.thorough,
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc"),
]


def tuned_folder(folder: Path, *, steps: int) -> Path:
    """The tiny text and plan, and tuning rows made up for it."""
    tiny_benchmarks.tiny_corpus(folder)
    write_plan(folder, steps=steps)
    row = {"protocol": "tuned", "valid_loss": 1.0}
    row["config"] = {"lr": 1e-2, "other_lr": 2e-2, "clip": 1.0}
    rows = [row | {"method": method} for method in ("adamw", "scale")]
    (folder / "results").mkdir()
    (folder / "results" / "tiny-tune.json").write_text(json.dumps({"rows": rows}))
    return folder


@pytest.fixture
def folder(tmp_path):
    return tuned_folder(tmp_path, steps=6)


def write_plan(folder: Path, *, steps: int) -> None:
    values = copy.deepcopy(tiny_benchmarks.PLAN)
    values["steps"] = steps
    tiny_benchmarks.write_plan(folder, values)


def compare(folder: Path, jobs: int, out: str, *options: str) -> list[str]:
    words = ["compare", "--plan=tiny", "--protocol=tuned", f"--jobs={jobs}", f"--out={out}"]
    return [*words, *options, *tiny_benchmarks.text_words(folder)]


def session_of(leader: int) -> list[str]:
    """The names of the processes of a session that are alive."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = path.read_text().rpartition(")")
        except OSError:
            continue  # it has just ended
        state, _, _, session = rest.split()[:4]
        if int(session) == leader and state != "Z":
            found.append(name)
    return found


def rows_of(out: Path) -> dict[tuple[str, int], dict]:
    rows = json.loads((out / "results.json").read_text())["rows"]
    return {(row["method"], row["config"]["seed"]): row for row in rows}


def test_two_jobs_give_the_rows_of_one(folder, monkeypatch):
    process = start(folder, compare(folder, 2, "two", "--seeds=2"))
    tiny_benchmarks.patched(monkeypatch, folder)
    status = main(compare(folder, 1, "one", "--seeds=2"))
    printed, error = process.communicate(timeout=600)
    assert status == 0
    assert process.returncode == 0, error
    assert "Traceback" not in error and "AdamW" in printed
    one, two = rows_of(folder / "one"), rows_of(folder / "two")
    assert len(one) == 4 and one.keys() == two.keys()
    for key, row in one.items():
        assert two[key]["config"] == row["config"]
        assert two[key]["state_bytes"] == row["state_bytes"]
        for name in ("valid_loss", "test_loss"):
            assert two[key][name] == pytest.approx(row[name], rel=1e-5)


def test_two_jobs_train_an_optimizer_of_ones_own(folder, monkeypatch):
    """The workers read the class from its file, as the process does that started them."""
    (folder / "mine.py").write_text(
        "import torch\n\n\nclass Slow(torch.optim.SGD):\n"
        "    def __init__(self, params, lr=1e-3, momentum=0.5):\n"
        "        super().__init__(params, lr, momentum)\n"
    )
    words = ("--optimizer", "mine.py:Slow", "--tune")
    process = start(folder, compare(folder, 2, "two", *words))
    tiny_benchmarks.patched(monkeypatch, folder)
    status = main(compare(folder, 1, "one", *words))
    error = process.communicate(timeout=600)[1]
    assert status == 0
    assert process.returncode == 0, error
    one, two = (
        {
            run.parent.name: json.loads(run.read_text())
            for run in folder.glob(f"{out}/runs/*/row.json")
        }
        for out in ("one", "two")
    )
    mine = [name for name, row in one.items() if row["config"]["optimizer"] == "mine.py:Slow"]
    assert len(mine) >= 5 and one.keys() == two.keys()
    for name in mine:
        assert two[name]["valid_loss"] == pytest.approx(one[name]["valid_loss"], rel=1e-5)


@pytest.mark.parametrize(
    "how",
    [
        "SIGKILL to the parent",
        pytest.param("SIGTERM to the parent", marks=pytest.mark.distributed),
        pytest.param("Ctrl-C", marks=pytest.mark.distributed),
    ],
)
def test_no_process_outlives_the_comparison(how, folder):
    write_plan(folder, steps=30_000)
    process = start(folder, compare(folder, 2, "out", "--seeds=2"))  # more runs than jobs
    try:
        while process.poll() is None and len(list(folder.glob("out/runs/*/events*"))) < 2:
            time.sleep(0.01)
        time.sleep(0.3)  # both are about to train
        assert len(session_of(process.pid)) >= 3
        if how == "Ctrl-C":  # a terminal sends it to all of them
            os.killpg(process.pid, signal.SIGINT)
        else:
            process.send_signal(signal.SIGTERM if "TERM" in how else signal.SIGKILL)
        process.wait(timeout=600)
        deadline = time.monotonic() + 120
        while session_of(process.pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        left = session_of(process.pid)
    finally:
        if session_of(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
    _, error = process.communicate()
    assert left == []
    if "KILL" not in how:
        assert process.returncode == 130
        assert error.splitlines()[-1] == "stopped; the same command goes on from here"
    assert "Traceback" not in error
    # A run stopped before its first step has nothing to save; what was saved is whole.
    for path in folder.glob("out/runs/*/checkpoints/latest"):
        assert tiny_benchmarks.saved_step(path.parents[1]) >= 1
