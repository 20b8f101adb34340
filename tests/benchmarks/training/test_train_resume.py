"""Training that is interrupted, terminated or killed, and goes on to the same bits."""

import json
import os
import shutil
import signal
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import tiny_benchmarks
from processes import run_program
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_benchmarks import assert_same_bits, saved_step, stop_at
from toy import run_config

import benchmarks.training.loop as train_module
from benchmarks.common.files import write_atomic
from benchmarks.training.config import RunConfig
from benchmarks.training.loop import train
from benchmarks.training.run import Run

pytestmark = pytest.mark.usefixtures("tiny")
METHODS = ("adamw", "muon", "scale", "galore", "natural_galore", "apollo", "stable_spam")
HYPER = {name: run_config(name, gap=3) for name in METHODS}
SGD = RunConfig("sgd", 0.5, model="tiny", steps=9, batch_size=4, seq_len=16, eval_tokens=256)


@pytest.mark.sampled(5)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", HYPER)
def test_an_interrupted_run_goes_on_to_the_same_bits(name, precision, corpus, tmp_path):
    config = replace(
        SGD, optimizer=name, accumulate=2, clip=0.5, precision=precision, **HYPER[name]
    )
    straight = train(config, corpus, eval_every=2)
    out = tmp_path / "run"
    for last in (4, 8):
        with pytest.raises(KeyboardInterrupt):
            train(config, corpus, out=out, eval_every=2, progress=stop_at(last))
        assert saved_step(out) == last
    assert_same_bits(train(config, corpus, out=out, eval_every=2), straight)
    assert not (out / "checkpoints").exists()


@pytest.mark.parametrize("moment", ["after the last step", "while it evaluates"])
def test_interrupted_at_the_end(moment, corpus, tmp_path, monkeypatch):
    straight = train(SGD, corpus)

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if moment == "while it evaluates":
            patch.setattr(Run, "evaluate", interrupt)
        train(SGD, corpus, out=tmp_path / "run", progress=stop_at(9) if "last" in moment else None)
    assert saved_step(tmp_path / "run") == 9
    row = train(SGD, corpus, out=tmp_path / "run")
    assert_same_bits(row, straight)
    assert row["optimizer_ms"] is None and row["tokens_per_second"] > 0


def send_in_step(run_step: int, *signals: int):
    """A `train_step` that gets signals in its middle: weights moved, step not counted."""
    train_step = Run.train_step

    def stepped(self, log, **how):
        if self.step == run_step:
            handle = self.optimizer.register_step_post_hook(
                lambda *_: [os.kill(os.getpid(), number) for number in signals]
            )
            try:
                return train_step(self, log, **how)
            finally:
                handle.remove()
        return train_step(self, log, **how)

    return stepped


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_waits_for_the_end_of_the_step(number, corpus, tmp_path, monkeypatch):
    config = replace(SGD, optimizer="adamw", lr=1e-2)
    straight = train(config, corpus)
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "train_step", send_in_step(3, number))
        train(config, corpus, out=tmp_path / "run")
    assert saved_step(tmp_path / "run") == 4
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert_same_bits(train(config, corpus, out=tmp_path / "run"), straight)


def test_a_second_signal_does_not_wait_and_keeps_the_last_checkpoint(corpus, tmp_path, monkeypatch):
    straight = train(SGD, corpus)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "train_step", send_in_step(3, signal.SIGINT, signal.SIGINT))
        train(SGD, corpus, out=tmp_path / "run", save_every=2)
    assert saved_step(tmp_path / "run") == 2
    assert_same_bits(train(SGD, corpus, out=tmp_path / "run"), straight)


def test_a_signal_during_the_last_evaluation_is_not_lost(corpus, tmp_path, monkeypatch):
    evaluate = Run.evaluate

    def signalled(self, split):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(self, split)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "evaluate", signalled)
        train(SGD, corpus, out=tmp_path / "run", test=False)
    monkeypatch.setattr(train_module, "Run", None)  # finished: nothing is run again
    assert not train(SGD, corpus, out=tmp_path / "run", test=False)["diverged"]


@pytest.mark.thorough
def test_sigterm_saves_and_leaves_with_one_line(tmp_path):
    tiny_benchmarks.tiny_corpus(tmp_path)  # so that the process has only to open it
    out = tmp_path / "run"
    options = {"optimizer": "scale", "lr": 1e-3, "steps": 30_000, "save_every": 1, "out": out}
    process = tiny_benchmarks.start(tmp_path, tiny_benchmarks.train_words(tmp_path, **options))
    try:
        while process.poll() is None and not (out / "checkpoints" / "latest").exists():
            time.sleep(0.01)
        process.terminate()
        printed, error = process.communicate(timeout=600)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130
    lines = [line for line in error.splitlines() if not line.startswith("reading")]
    assert lines == ["stopped; the same command goes on from here"]
    assert "Traceback" not in printed
    assert saved_step(out) >= 1
    assert not list(out.rglob(".*"))


@pytest.mark.thorough
def test_killed_again_and_again(tmp_path):
    found = json.loads(run_program("killed_run.py", str(tmp_path), "0", "6", timeout=600))
    steps = found["steps"]  # after each kill that met a run at work
    assert len(steps) > 3 and all(a < b for a, b in pairwise(steps)), steps
    assert found["same"] == {"curve": True, "valid_loss": True, "test_loss": True}
    assert found["files"] == ["row.json"]


def test_a_finished_run_is_not_run_again(corpus, tmp_path, monkeypatch):
    row = train(SGD, corpus, out=tmp_path, test=False)
    assert row["test_loss"] is None
    with monkeypatch.context() as patch:
        patch.setattr(train_module, "Run", None)
        again = train(SGD, corpus, out=tmp_path, test=False)
        assert again == json.loads(json.dumps(row))
    tested = train(SGD, corpus, out=tmp_path)  # a row without what is asked for does not do
    assert tested["test_loss"] > 0 and tested["valid_loss"] == row["valid_loss"]
    assert train(replace(SGD, lr=0.1), corpus, out=tmp_path)["valid_loss"] != row["valid_loss"]
    (tmp_path / "row.json").write_text("{")
    with pytest.raises(ValueError, match=r"row\.json cannot be read .*delete it") as caught:
        train(SGD, corpus, out=tmp_path)
    assert "\n" not in str(caught.value)


def test_no_scalar_is_doubled_or_lost_by_going_on(corpus, tmp_path):
    config = replace(SGD, steps=45)
    straight = train(config, corpus, out=tmp_path / "straight", eval_every=7)
    out = tmp_path / "run"
    for last in (21, 37):  # at 21 both are logged
        with pytest.raises(KeyboardInterrupt):
            train(config, corpus, out=out, eval_every=7, progress=stop_at(last))
        time.sleep(1.1)  # the files of one second are read in any order
    # As after a kill: more is logged than the checkpoint knows.
    shutil.rmtree(out / "checkpoints" / "step-00000037")
    assert_same_bits(train(config, corpus, out=out, eval_every=7), straight)
    for name, steps in (("train/loss", [1, 11, 21, 31, 41, 45]), ("valid/loss", range(7, 46, 7))):
        events = [
            EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload().Scalars(name)
            for folder in (out, tmp_path / "straight")
        ]
        assert [e.step for e in events[0]] == list(steps)
        assert [e.value for e in events[0]] == [e.value for e in events[1]]


def test_files_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "file"
    write_atomic(path, "first")
    plain = tmp_path / "plain"
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode  # as the umask has it

    def fail(*_):
        raise OSError("disk full")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
            patch.setattr(os, name, fail)
            write_atomic(path, b"second")
        assert path.read_bytes() == b"first" and list(path.parent.iterdir()) == [path]
    write_atomic(path, b"second")
    assert path.read_bytes() == b"second" and list(path.parent.iterdir()) == [path]


def test_a_run_saved_by_3effa33_goes_on(corpus, tmp_path):
    """Its checkpoint has `vector_betas` in the groups; its straight end is known."""
    shutil.copytree(Path(__file__).with_name("run_3effa33"), tmp_path / "run")
    rates = {"lr": 0.01, "other_lr": 0.02, "hyper": {"vector_lr": 0.005}}
    config = replace(SGD, optimizer="scale", steps=6, **rates)
    steps = []
    row = train(config, corpus, out=tmp_path / "run", progress=lambda step, *_: steps.append(step))
    assert steps == [5, 6]
    losses = [row["valid_loss"], row["test_loss"], row["curve"][-1][1]]
    assert losses == pytest.approx([4.977958083, 4.973698378, 5.058541298], rel=1e-5)
