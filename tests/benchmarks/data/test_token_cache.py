"""The cache under damage, failures, kills and races."""

from __future__ import annotations

import argparse
import json
import logging
import lzma
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from data_helpers import (
    ROOT,
    VOCAB,
    assert_same,
    entries,
    flip,
    load,
    make_texts,
    unfinished,
    write_jsonl,
)

from benchmarks.data import corpus as data
from benchmarks.data.corpus import Corpus
from benchmarks.data.sources import SPLITS
from benchmarks.training.cli import add_corpus_arguments, corpus_from
from benchmarks.training.config import RunConfig, fingerprint
from optimzoo.models import llama


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
    # Two folders, three token files, two descriptions, two folder syncs, and a rename. (pathlib
    # ignores the failure to make a folder that is there: for the lock, and for each description.)
    assert failures == fail_at - 4 - damaged and failures >= 9


KILLED = """
import os, sys, time
from pathlib import Path
from benchmarks.data.corpus import load_corpus
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


@pytest.mark.sampled(4)
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


def test_who_comes_while_another_builds_waits_for_its_tokens(
    corpus_file: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    encode, begun, go_on = data.encode, threading.Event(), threading.Event()

    def slow(*args: Any) -> str:
        begun.set()
        assert go_on.wait(60)
        return encode(*args)

    monkeypatch.setattr(data, "encode", slow)
    with ThreadPoolExecutor() as pool, caplog.at_level(logging.WARNING):
        first = pool.submit(load, corpus_file, cache)
        assert begun.wait(60)
        forbid_encoding(monkeypatch)
        second = pool.submit(load, corpus_file, cache)
        while not caplog.records:
            assert not second.done()
            time.sleep(0.01)
        go_on.set()
        assert_same(first.result(60), second.result(60))
    assert "another process is building the tokens" in caplog.records[0].getMessage()
    assert len(entries(cache)) == 1 and not unfinished(cache)


# A folder of tokens that was made on another machine


@pytest.fixture
def text(corpus_file: Path, cache: Path) -> Corpus:
    """The corpus of a file, whose tokens are then in the cache."""
    return load(corpus_file, cache, max_chars=50_000)


@pytest.fixture
def copied(text: Corpus, corpus_file: Path, cache: Path, tmp_path: Path) -> Path:
    """A copy of those tokens under another name, on a machine without the file."""
    folder = shutil.copytree(entries(cache)[0], tmp_path / "copied")
    corpus_file.unlink()
    return folder


def pack(folder: Path, split: str) -> Path:
    plain = folder / f"{split}.bin"
    packed = folder / f"{split}.bin.xz"
    packed.write_bytes(lzma.compress(plain.read_bytes()))
    plain.unlink()
    return packed


def test_copied_tokens_are_the_text(
    text: Corpus, copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = llama.LlamaConfig(VOCAB, 16, 24, 2, 2)
    monkeypatch.setitem(llama.CONFIGS, "tiny", config)
    parser = argparse.ArgumentParser()
    add_corpus_arguments(parser)
    nowhere = tmp_path / "nowhere"
    words = ["--data", str(copied), "--cache-dir", str(nowhere)]
    corpus = corpus_from(parser.parse_args(words), "tiny", progress=False)
    assert_same(text, corpus)
    assert (corpus.name, corpus.vocab_size) == (text.name, text.vocab_size) == ("small", VOCAB)
    run = RunConfig("scale", 1e-3, model="tiny")
    assert fingerprint(run, corpus) == fingerprint(run, text)
    assert not nowhere.exists()


def test_copied_tokens_are_unpacked_once(
    text: Corpus, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {path.name for path in copied.iterdir()}
    packed = {pack(copied, split).name for split in ("train", "test")}
    assert_same(text, load(copied, copied))
    assert {path.name for path in copied.iterdir()} == names | packed
    monkeypatch.setattr(lzma, "decompress", None)
    assert_same(text, load([str(copied)], copied))


COPY_DAMAGE = {
    **{name: DAMAGE[name] for name in ("truncated", "missing", "tokenizer", "vocabulary")},
    "format": (lambda f: edit_meta(f, "format", 2), "meta.json has format 2, expected 1"),
    "no name": (
        lambda f: (f / "meta.json").write_text(
            (f / "meta.json").read_text().replace('"source"', '"from"')
        ),
        "meta.json has no source",
    ),
    "bit": (lambda f: flip(f / "train.bin"), "train.bin does not have the sha256 in meta.json"),
    "packed bit": (lambda f: flip(pack(f, "test")), r"test\.bin\.xz is truncated or damaged"),
    "packed part": (
        lambda f: os.truncate(pack(f, "test"), 99),
        r"test\.bin\.xz is truncated or damaged \(Compressed data ended",
    ),
}


@pytest.mark.parametrize("damage", COPY_DAMAGE)
def test_copied_tokens_that_are_damaged_are_refused(copied: Path, damage: str) -> None:
    harm, message = COPY_DAMAGE[damage]
    harm(copied)
    names = sorted(copied.iterdir())
    with pytest.raises(ValueError, match=message) as caught:
        load(copied, copied)
    assert str(caught.value).startswith(f"{copied}: ") and "\n" not in str(caught.value)
    assert str(caught.value).endswith("for this model by this version, and copied whole")
    assert sorted(copied.iterdir()) == names


def test_what_does_not_go_with_a_folder_of_tokens(copied: Path, cache: Path) -> None:
    for option in ("max_chars", "max_tokens"):
        with pytest.raises(ValueError, match=rf"^{option}=9 has no effect on .*{copied}; leave"):
            load(copied, cache, **{option: 9})
    (copied / "meta.json").unlink()
    with pytest.raises(ValueError, match=rf"^{copied} is a folder; .* has no meta\.json\)$"):
        load(copied, cache, max_chars=9)


def test_packed_tokens_in_a_folder_that_cannot_be_written(
    copied: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(copied, "valid")
    real = Path.open

    def read_only(path: Path, mode: str = "r", **options: Any) -> Any:  # root may write anywhere
        if "w" in mode:
            raise PermissionError(13, "Permission denied")
        return real(path, mode, **options)

    monkeypatch.setattr(Path, "open", read_only)
    with pytest.raises(OSError, match=r"valid\.bin\.xz cannot be unpacked .*\(Permission denied\)"):
        load(copied, cache)


def test_another_text_takes_the_tokenizer_of_a_folder(corpus_file: Path, cache: Path) -> None:
    first = load(corpus_file, cache)
    assert first.folder is not None and entries(cache) == [first.folder]
    other = corpus_file.with_name("other.txt")
    other.write_text(corpus_file.read_text("utf-8").upper(), encoding="utf-8")
    own = load(other, cache)
    alike = load(other, cache, tokenized_as=first.folder)
    assert own.folder != alike.folder and own.sha256 == alike.sha256
    texts = {
        c.folder: (c.folder / "tokenizer.json").read_text("utf-8") for c in (first, own, alike)
    }
    assert texts[alike.folder] == texts[first.folder] != texts[own.folder]
    assert load(other, cache, tokenized_as=first.folder).folder == alike.folder
    same = load(corpus_file, cache, tokenized_as=first.folder)
    assert same.train.tolist() == first.train.tolist()


def test_a_tokenizer_that_will_not_do_is_refused(corpus_file: Path, cache: Path) -> None:
    folder = load(corpus_file, cache).folder
    with pytest.raises(ValueError, match=f"has {VOCAB} tokens, and the model {VOCAB - 1}"):
        load(corpus_file, cache, vocab_size=VOCAB - 1, tokenized_as=folder)
    with pytest.raises(ValueError, match="is no folder of tokens"):
        load(corpus_file, cache, tokenized_as=cache)
    with pytest.raises(ValueError, match=r"tokenized_as=.* has no effect on the folder of tokens"):
        load(folder, cache, tokenized_as=folder)
    with pytest.raises(ValueError, match=r"tokenized_as=.* is not for 'c4'"):
        load("c4", cache, tokenized_as=folder)
