"""The cache under damage, failures, kills and races."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data_helpers import (
    ROOT,
    VOCAB,
    assert_same,
    entries,
    load,
    make_texts,
    unfinished,
    write_jsonl,
)

from benchmarks import data
from benchmarks.corpus import SPLITS
from benchmarks.data import Corpus


@pytest.fixture
def corpus_file(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "small.jsonl", make_texts())


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "tokens"


def forbid_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def encode(*_: object) -> None:
        raise AssertionError("encoded again")

    monkeypatch.setattr(data, "encode", encode)


def test_second_load_does_not_encode(
    corpus_file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load(corpus_file, cache)
    forbid_encoding(monkeypatch)
    assert_same(first, load(corpus_file, cache))
    with pytest.raises(AssertionError, match="encoded again"):
        load(corpus_file, cache, vocab_size=VOCAB + 1)
    assert len(entries(cache)) == 1 and not unfinished(cache)


def edit_meta(folder: Path, key: str, value: object) -> None:
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, key: value}))


DAMAGE = {
    "truncated": (lambda f: os.truncate(f / "valid.bin", 10), r"valid\.bin has 10 bytes"),
    "missing": (lambda f: (f / "test.bin").unlink(), r"test\.bin"),
    "tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), r"tokenizer\.json is not"),
    "vocabulary": (lambda f: edit_meta(f, "vocab_size", 999), "vocab_size 999, expected 320"),
    "splits": (lambda f: edit_meta(f, "splits", 7), "TypeError"),
    "description": (lambda f: (f / "meta.json").write_text("{"), "JSONDecodeError"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_seen_and_repaired(
    corpus_file: Path, cache: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    first = load(corpus_file, cache)
    first = Corpus(**{**vars(first), **{split: getattr(first, split).copy() for split in SPLITS}})
    (folder,) = entries(cache)
    harm, message = DAMAGE[damage]
    harm(folder)
    with caplog.at_level(logging.WARNING):
        assert_same(first, load(corpus_file, cache))
    (record,) = caplog.records
    assert "\n" not in record.getMessage() and str(folder) in record.getMessage()
    assert record.getMessage().endswith("; building them again")
    assert re.search(message, record.getMessage())
    caplog.clear()
    assert load(corpus_file, cache).sha256 == first.sha256 and not caplog.records
    assert entries(cache) == [folder] and not unfinished(cache)


@pytest.mark.parametrize("damaged", [False, True])
def test_failure_at_any_step_leaves_all_or_nothing(
    corpus_file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, damaged: bool
) -> None:
    expected = load(corpus_file, cache.with_name("other"))
    (name,) = (folder.name for folder in entries(cache.with_name("other")))
    failures = 0
    for fail_at in range(1, 30):
        target = cache / str(fail_at)
        if damaged:
            load(corpus_file, target)
            os.truncate(target / name / "train.bin", 4)
        calls = 0

        def counted(real: Callable[..., Any], fail_at: int = fail_at) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls == fail_at:
                    raise OSError(28, "No space left on device")
                return real(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for step in ("mkdir", "fsync", "rename"):
                patch.setattr(os, step, counted(getattr(os, step)))
            try:
                load(corpus_file, target)
            except OSError as error:
                assert error.errno == 28
                failures += 1
        if (target / name).exists():
            sizes = {split: (target / name / f"{split}.bin").stat().st_size for split in SPLITS}
            whole = {split: getattr(expected, split).nbytes for split in SPLITS}
            assert sizes == whole or (damaged and sizes == {**whole, "train": 4})
        assert damaged or not target.exists() or not unfinished(target)
        assert_same(expected, load(corpus_file, target))
        assert [path.name for path in entries(target)] == [name] and not unfinished(target)
        if calls < fail_at:
            break
    # A folder, three token files, two descriptions, two folder syncs, and at least one rename.
    # (pathlib itself ignores the failure to make a cache folder that is there.)
    assert failures == fail_at - 1 - damaged and failures >= 9


KILLED = """
import os, sys, time
from pathlib import Path
from benchmarks.data import load_corpus
real, calls = os.fsync, 0
def fsync(handle):
    global calls
    calls += 1
    if calls == int(sys.argv[3]):
        print("here", flush=True)
        time.sleep(600)
    real(handle)
os.fsync = fsync
load_corpus(sys.argv[1], vocab_size=320, cache_dir=Path(sys.argv[2]), progress=False)
"""


@pytest.mark.parametrize(("sync", "complete"), [(2, False), (6, False), (7, True)])
def test_kill(corpus_file: Path, tmp_path: Path, cache: Path, sync: int, complete: bool) -> None:
    other = write_jsonl(tmp_path / "other.jsonl", make_texts(seed=2))
    command = [sys.executable, "-c", KILLED, str(corpus_file), str(cache), str(sync)]
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None and child.stdout.readline() == "here\n"
        living = unfinished(cache)
        assert len(living) == (0 if complete else 1)
        load(other, cache)  # must not touch what a living process writes
        assert unfinished(cache) == living
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert [path.name[:5] for path in entries(cache)] == ["other", "small"][: 1 + complete]
    assert_same(load(corpus_file, cache), load(corpus_file, cache.with_name("fresh")))
    assert not unfinished(cache) and len(entries(cache)) == 2


def test_slower_builder_keeps_what_the_faster_made(
    corpus_file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = os.rename
    faster: list[tuple[Corpus, int]] = []

    def rename_after_another(source: Path, target: Path) -> None:
        monkeypatch.setattr(os, "rename", rename)
        made = load(corpus_file, cache)
        faster.append((made, entries(cache)[0].stat().st_ino))
        rename(source, target)

    monkeypatch.setattr(os, "rename", rename_after_another)
    slower = load(corpus_file, cache)
    ((made, folder),) = faster
    assert_same(made, slower)
    assert entries(cache)[0].stat().st_ino == folder
    assert len(entries(cache)) == 1 and not unfinished(cache)
