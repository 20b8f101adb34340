"""Checkpoints: whole or absent, checked to the last byte, refused with what differs."""

import errno
import json
import os
import re
import resource
import shutil
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_benchmarks
import torch
from data_helpers import flip
from tiny_benchmarks import assert_same_bits

import benchmarks.training.run as run_module
from benchmarks.__main__ import main
from benchmarks.training.checkpoint import Checkpoints, DamagedError
from benchmarks.training.config import RunConfig
from benchmarks.training.loop import train
from optimzoo.models.llama import CONFIGS

pytestmark = pytest.mark.usefixtures("tiny")
SGD = RunConfig("sgd", 0.5, model="tiny", steps=9, batch_size=4, seq_len=16, eval_tokens=256)
IDENTITY = {"format": 1, "lr": 0.5}
STATE = {"model": {"w": torch.arange(1000.0)}, "steps": [1, 2.5, "text"]}


@pytest.fixture
def saved(corpus, tmp_path) -> Checkpoints:
    """Those of steps 2 and 4 of a run that was interrupted."""
    with pytest.raises(KeyboardInterrupt):
        train(SGD, corpus, out=tmp_path / "run", save_every=2, progress=tiny_benchmarks.stop_at(4))
    return Checkpoints(tmp_path / "run" / "checkpoints")


def names(checkpoints: Checkpoints) -> list[str]:
    return sorted(path.name for path in checkpoints.folder.iterdir())


def test_the_last_few_are_kept_and_latest_names_the_newest(tmp_path):
    checkpoints = Checkpoints(tmp_path / "deep" / "folder", keep=2)
    assert checkpoints.steps() == [] and checkpoints.newest(IDENTITY) is None
    for step in (5, 10, 100_000_000):
        checkpoints.save(step, STATE, IDENTITY)
    assert names(checkpoints) == ["latest", "step-00000010", "step-100000000"]
    assert (checkpoints.folder / "latest").read_text() == "step-100000000\n"
    step, state = checkpoints.newest(IDENTITY)
    assert step == 100_000_000 and state["steps"] == STATE["steps"]
    assert torch.equal(state["model"]["w"], STATE["model"]["w"])
    checkpoints.clear()
    assert list(checkpoints.folder.parent.iterdir()) == []
    checkpoints.clear()
    with pytest.raises(ValueError, match="keep is 0; it must be at least 1"):
        Checkpoints(tmp_path, keep=0)


def test_what_killed_processes_left_goes_when_a_run_goes_on(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, STATE, IDENTITY)
    (tmp_path / ".step-00000003.17").mkdir()
    (tmp_path / ".step-00000003.17" / "state.pt").touch()
    (tmp_path / ".latest.17").touch()
    (tmp_path / "latest").write_text("step-00000001\n")  # killed before it was announced
    step, _ = checkpoints.newest(IDENTITY)
    checkpoints.prune_after_resume(step)
    assert names(checkpoints) == ["latest", "step-00000001", "step-00000002"]
    assert (tmp_path / "latest").read_text() == "step-00000002\n"


@contextmanager
def full_after(room: int):
    """As on a disk that is full: no file can become larger."""
    before, compiled = resource.getrlimit(resource.RLIMIT_FSIZE), sys.dont_write_bytecode
    # Python keeps a compiled module that was cut short here, and later processes fail to import it.
    sys.dont_write_bytecode = True
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        sys.dont_write_bytecode = compiled


@pytest.mark.parametrize("room", [0, 1, 100, 1000, 3000, 4096])
def test_a_full_disk_leaves_the_checkpoint_before(room, tmp_path):
    checkpoints = Checkpoints(tmp_path)
    message = r"checkpoint \S+step-0000000{} was not written \(File too large\); {}"
    none, one = message.format(1, "there is none"), message.format(2, r"\S+step-00000001 is whole")
    with full_after(room), pytest.raises(OSError, match=none):
        checkpoints.save(1, STATE, IDENTITY)
    assert names(checkpoints) == []
    checkpoints.save(1, STATE, IDENTITY)
    with full_after(room), pytest.raises(OSError, match=one):
        checkpoints.save(2, STATE, IDENTITY)
    assert names(checkpoints) == ["latest", "step-00000001"]
    assert checkpoints.newest(IDENTITY)[0] == 1


@pytest.mark.parametrize("call", ["fsync", "rename", "replace"])
def test_any_failing_call_leaves_the_checkpoint_before(call, tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, STATE, IDENTITY)

    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(OSError, match=r"step-00000002 was not written \(No space left on dev"):
            checkpoints.save(2, STATE, IDENTITY)
    assert names(checkpoints) == ["latest", "step-00000001"]
    checkpoints.save(2, STATE, IDENTITY)
    assert checkpoints.newest(IDENTITY)[0] == 2


def test_the_command_on_a_full_disk(tmp_path, monkeypatch, capsys):
    tiny_benchmarks.tiny_corpus(tmp_path)
    words = tiny_benchmarks.train_words(tmp_path, steps=9, out="run", save_every=1)
    save = Checkpoints.save

    def filling(self, step, *rest):
        with full_after(4096) if step == 3 else nullcontext():
            save(self, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", filling)
        assert main(words) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    reason = r"error: checkpoint run/\S+03 was not written \(File too large\); run/\S+02 is whole"
    assert re.fullmatch(reason, error), error
    assert tiny_benchmarks.saved_step(Path("run")) == 2
    assert main(words) == 0


SIZE, UNREADABLE = r"state.pt has bytes \d+, not \d+", r"manifest.json cannot be read: .*"
DAMAGE = {
    "short": (lambda s, _: s.write_bytes(s.read_bytes()[:-1]), SIZE),
    "half": (lambda s, _: os.truncate(s, s.stat().st_size // 2), SIZE),
    "long": (lambda s, _: s.write_bytes(s.read_bytes() + b"\0"), SIZE),
    "bit": (lambda s, _: flip(s), r"state.pt has sha256 \w{64}, not \w{64}"),
    "empty": (lambda s, _: s.write_bytes(b""), r"state.pt has bytes 0, not \d+"),
    "gone": (lambda s, _: s.unlink(), r"state.pt is missing"),
    "no manifest": (lambda _, m: m.unlink(), r"manifest.json is missing"),
    "manifest half": (lambda _, m: os.truncate(m, 50), UNREADABLE),
    "manifest bit": (
        lambda _, m: m.write_text(m.read_text().replace('"lr": 0.5', '"lr": 0.4')),
        r"manifest.json is not as it was written",
    ),
    "manifest list": (lambda _, m: m.write_text("[1]"), UNREADABLE),
    "manifest bytes": (lambda _, m: m.write_bytes(b"\xff\xfe"), UNREADABLE),
}


def damage(path: Path, how: str) -> None:
    """Spoil a checkpoint's folder."""
    DAMAGE[how][0](path / "state.pt", path / "manifest.json")


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_checkpoint_is_refused_and_the_one_before_offered(how, saved, corpus):
    damage(saved.path(4), how)
    message = f"{re.escape(str(saved.path(4)))} is damaged: {DAMAGE[how][1]}; "
    offer = "--skip-damaged goes on from step-00000002, the one before it"
    with pytest.raises(ValueError, match=message + offer) as caught:
        train(SGD, corpus, out=saved.folder.parent)
    assert "\n" not in str(caught.value)
    assert saved.steps() == [2, 4]
    damage(saved.path(2), how)
    with pytest.raises(ValueError, match=message + "no whole one is before it: delete it to start"):
        train(SGD, corpus, out=saved.folder.parent)


def test_the_one_before_is_taken_when_asked_for(saved, corpus, monkeypatch):
    straight = train(SGD, corpus)
    out = saved.folder.parent
    damage(saved.path(4), "bit")
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "clear", lambda self: None)
        assert_same_bits(train(SGD, corpus, out=out, save_every=2, skip_damaged=True), straight)
    whole = [f"step-0000000{step}" for step in (4, 6, 8)]
    assert names(saved) == ["damaged-step-00000004", "latest", *whole]
    (out / "row.json").unlink()
    for step in saved.steps():
        damage(saved.path(step), "half")
    assert_same_bits(train(SGD, corpus, out=out, skip_damaged=True), straight)  # from the start


def test_the_command_refuses_in_one_line_and_takes_its_own_advice(saved, tmp_path, capsys):
    damage(saved.path(4), "half")
    words = tiny_benchmarks.train_words(tmp_path, lr=0.5, steps=9, out=saved.folder.parent)
    assert main(words) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {saved.path(4)} is damaged") and "--skip-damaged" in error
    assert main([*words, "--skip-damaged"]) == 0


def test_a_checkpoint_of_other_settings_is_refused(saved, corpus, monkeypatch):
    out = saved.folder.parent
    others = {"lr": 0.25, "clip": 1.0, "seed": 3, "optimizer": "adamw", "model": "tiny2"}
    others["hyper"] = {"momentum": 0.5}
    monkeypatch.setitem(CONFIGS, "tiny2", replace(tiny_benchmarks.TINY, hidden_size=24))
    before = {path: path.read_bytes() for path in saved.folder.rglob("*.*")}
    for name, value in others.items():
        message = f"belongs to a run with {name}={getattr(SGD, name)!r}, not {value!r}"
        with pytest.raises(ValueError, match=re.escape(message)) as caught:
            train(replace(SGD, **{name: value}), corpus, out=out)
        assert str(caught.value).startswith(str(saved.path(4))) and "\n" not in str(caught.value)
        assert str(caught.value).endswith("; use another --out, or delete it")
        assert len(str(caught.value)) < 600
    with pytest.raises(ValueError, match=r"lr=0.5, not 0.25; seed=0, not 3;"):
        train(replace(SGD, lr=0.25, seed=3), corpus, out=out)
    with pytest.raises(ValueError, match=r"corpus='\w+', not 'other'"):
        train(SGD, replace(corpus, sha256="other"), out=out)
    assert {path: path.read_bytes() for path in saved.folder.rglob("*.*")} == before
    assert_same_bits(train(SGD, corpus, out=out), train(SGD, corpus))


def test_another_rank_role_or_version_is_refused_with_what_differs(corpus, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    hyper = {"rank": 4, "update_proj_gap": 3}
    config = replace(SGD, optimizer="galore", lr=1e-2, hyper=hyper)
    with pytest.raises(KeyboardInterrupt):
        train(config, corpus, out=tmp_path, progress=stop)
    other = replace(config, hyper={**hyper, "rank": 5})
    with pytest.raises(ValueError, match=r"with hyper=\{'rank': 4, .*\}, not \{'rank': 5"):
        train(other, corpus, out=tmp_path)
    role_of = run_module.role_of
    with monkeypatch.context() as patch:
        roles = lambda p, g: "hidden" if (r := role_of(p, g)) == "head" else r  # noqa: E731
        patch.setattr(run_module, "role_of", roles)
        message = r"lm_head.weight='head \[320, 16\]', not 'hidden \[320, 16\]'; use"
        with pytest.raises(ValueError, match=message):
            train(config, corpus, out=tmp_path)
    for name, target in (("FORMAT", run_module), ("__version__", run_module.optimzoo)):
        with monkeypatch.context() as patch:
            key = "format" if name == "FORMAT" else "optimzoo"
            patch.setattr(target, name, "99")
            with pytest.raises(ValueError, match=f"with {key}=.*, not '99'; use another"):
                train(config, corpus, out=tmp_path)


def test_a_checkpoint_with_objects_is_not_unpickled(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"run": SGD}, IDENTITY)  # whole, as its checksum says
    checkpoints.check(1)
    with pytest.raises(DamagedError, match="Weights only load failed"):
        checkpoints.load(1)


def test_a_manifest_says_what_it_is(saved):
    manifest = json.loads((saved.path(4) / "manifest.json").read_text())
    size = (saved.path(4) / "state.pt").stat().st_size
    assert manifest["step"] == 4 and manifest["files"]["state.pt"]["bytes"] == size
    assert manifest["identity"]["optimizer"] == "sgd"
    assert manifest["identity"]["model.embed_tokens.weight"] == "embedding [320, 16]"


def test_a_folder_of_another_process_is_not_taken_for_a_checkpoint(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    (tmp_path / "step-backup").mkdir()
    assert checkpoints.steps() == []
    checkpoints.save(1, STATE, IDENTITY)
    shutil.copytree(checkpoints.path(1), checkpoints.path(7))  # a step it is not
    with pytest.raises(ValueError, match=r"step-00000007 is damaged: manifest.json is not as it"):
        checkpoints.newest(IDENTITY)
