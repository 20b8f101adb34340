"""The harness under torchrun, which starts killed processes again by itself."""

import json
import os
import random
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from data_helpers import ROOT
from parallel_runs import distance
from tiny_benchmarks import saved_step, tiny_corpus
from toy import run_config

STEPS, KILLS = 110, 20
HYPER = run_config("galore", gap=3)["hyper"]
# Of each place how often it may be passed before the kill: up to some ten steps.
PLACES = {"step": 140, "refresh": 60, "write": 400, "sync": 20, "call": 40_000}


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    tiny_corpus(folder)
    return folder


def torchrun(text: Path, out: Path, faults=(), restarts=0, save_every=3):
    """Train GaLore, whose basis is renewed all the time, in two processes; status and stderr."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    words += [f"--max-restarts={restarts}", "--monitor-interval=0.1"]
    words += [str(Path(__file__).with_name("faulty_train.py")), str(out), json.dumps(faults)]
    words += ["train", "--parallel=fsdp", "--optimizer=galore", f"--hyper={json.dumps(HYPER)}"]
    words += ["--model=tiny", "--lr=1e-2", "--clip=0.5", f"--steps={STEPS}", "--batch-size=4"]
    words += ["--seq-len=16", "--eval-tokens=256", f"--save-every={save_every}", f"--out={out}"]
    words += ["--data", *(str(text / f"{name}.txt") for name in ("valid", "test", "train"))]
    words += [f"--cache-dir={text / 'cache'}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(words, env=environment, **pipes)
    try:
        _, error = process.communicate(timeout=1500)
    finally:
        process.terminate()  # after an error it ends its processes
        process.wait()
    return process.returncode, error


@pytest.fixture(scope="module")
def straight(text, tmp_path_factory) -> Path:
    """The run that nothing disturbs."""
    out = tmp_path_factory.mktemp("straight") / "run"
    status, error = torchrun(text, out)
    assert status == 0, error
    return out


def starts(out: Path) -> list[int]:
    """The steps at which the processes began."""
    return [int(line) for line in Path(f"{out}-starts.txt").read_text().split()]


def faults(out: Path) -> list[str]:
    """Where they came."""
    return Path(f"{out}-faults.txt").read_text().split()


def assert_as_undisturbed(out: Path, straight: Path) -> None:
    assert distance(out, straight) == 0
    left = [path.name for path in out.iterdir() if "tfevents" not in path.name]
    assert sorted(left) == ["row.json", "weights.pt"]


def test_a_killed_process_is_started_again(text, straight, tmp_path):
    out = tmp_path / "run"
    status, error = torchrun(text, out, [["step", 1, 100]], restarts=1)
    assert status == 0, error
    # Steps of fourteen weights; saved after every third.
    assert faults(out) == ["step"] and starts(out) == [0, 6]
    assert_as_undisturbed(out, straight)


def test_twenty_kills_cost_no_bit(text, straight, tmp_path):
    """In steps, in refreshes, in the writing and syncing of checkpoints, and anywhere."""
    out, rng, planned = tmp_path / "run", random.Random(0), []
    places = [*PLACES] * (KILLS // len(PLACES))
    rng.shuffle(places)
    for place in places:
        rank = 0 if place in ("write", "sync") else rng.randrange(2)  # the leader writes
        planned.append([place, rank, rng.randint(1, PLACES[place])])
    status, error = torchrun(text, out, planned, restarts=KILLS)
    assert status == 0, error
    assert faults(out) == places and len(places) == KILLS
    begun = starts(out)
    assert len(begun) == KILLS + 1, begun
    assert all(a <= b for a, b in pairwise(begun)) and begun[-1] > KILLS, begun
    assert_as_undisturbed(out, straight)


def test_sigterm_saves_and_leaves(text, straight, tmp_path):
    out = tmp_path / "run"
    status, error = torchrun(text, out, [["leave", 1, 10]], restarts=3, save_every=1000)
    assert status != 0 and faults(out) == ["leave"]
    assert "stopped; the same command goes on from here" in error
    assert saved_step(out) == 11 and not (out / "row.json").exists()
    status, error = torchrun(text, out, save_every=1000)
    assert status == 0, error
    assert starts(out) == [0, 11]
    assert_as_undisturbed(out, straight)
