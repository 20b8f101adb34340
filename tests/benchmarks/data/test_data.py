"""Corpora, their splits and tokens, and batches of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_helpers import (
    ROOT,
    VOCAB,
    assert_same,
    documents_of,
    entries,
    load,
    make_texts,
    unfinished,
    write_jsonl,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from benchmarks.data import corpus as data
from benchmarks.data import tokenizer as tokens
from benchmarks.data.batches import Batches, iterate_eval
from benchmarks.data.sources import SPLITS, split_of, stdlib_source

# Splits and tokens


def test_tokens_decode_to_the_documents(corpus_file: Path, cache: Path) -> None:
    corpus = load(str(corpus_file), cache)
    expected: dict[str, list[str]] = {split: [] for split in SPLITS}
    for text in make_texts():
        expected[split_of(text)].append(text)
    assert all(expected.values())
    assert documents_of(corpus, cache) == expected
    assert (corpus.name, corpus.vocab_size) == ("small", VOCAB)
    assert isinstance(corpus.train, np.memmap) and corpus.train.dtype == np.uint16
    assert corpus.train.max() < VOCAB
    with pytest.raises(ValueError, match="read-only"):
        corpus.train[0] = 0


def test_split_shares() -> None:
    splits = [split_of(str(i)) for i in range(4000)]
    assert {split: splits.count(split) for split in SPLITS} == {
        "train": pytest.approx(3600, abs=60),
        "valid": pytest.approx(200, abs=45),
        "test": pytest.approx(200, abs=45),
    }
    assert [split_of(key) for key in ("os.py", "abc.py", "json/decoder.py")] == ["train"] * 3
    assert (split_of("16"), split_of("23")) == ("valid", "test")


@pytest.mark.thorough
def test_two_processes_at_once_give_what_one_gives(corpus_file: Path, cache: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from benchmarks.data.corpus import load_corpus\n"
        "c = load_corpus(sys.argv[1], vocab_size=320, cache_dir=Path(sys.argv[2]), progress=False)"
        "\nprint(c.sha256)"
    )
    children = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(corpus_file), str(cache)],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": seed},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in ("1", "2")
    ]
    sums = [child.communicate(timeout=120)[0].strip() for child in children]
    assert [child.returncode for child in children] == [0, 0]
    assert len(entries(cache)) == 1 and not unfinished(cache)
    theirs, ours = load(corpus_file, cache), load(corpus_file, cache.with_name("other"))
    assert_same(theirs, ours)
    assert sums == [ours.sha256] * 2
    meta, other = (
        json.loads((entries(path)[0] / "meta.json").read_text())
        for path in (cache, cache.with_name("other"))
    )
    assert meta == other


def test_sha256_is_of_text_and_split(tmp_path: Path, cache: Path) -> None:
    texts = make_texts()
    train = write_jsonl(tmp_path / "part.jsonl", texts[:150])
    rest = write_jsonl(tmp_path / "rest.jsonl", texts[150:])
    valid = write_jsonl(tmp_path / "part_valid.jsonl", texts[150:])
    changed = write_jsonl(tmp_path / "changed.jsonl", [*texts[150:-1], texts[-1] + "."])
    together = write_jsonl(tmp_path / "together.jsonl", texts)
    sums = [load([train, other], cache).sha256 for other in (rest, valid, changed)]
    assert len(set(sums)) == 3
    assert load(together, cache).sha256 == sums[0]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_no_text_in_two_splits(tmp_path: Path, cache: Path, order: tuple[int, ...]) -> None:
    texts = make_texts()
    train = write_jsonl(tmp_path / "train.jsonl", texts[:190])
    valid = write_jsonl(tmp_path / "x.val.jsonl", texts[100:180])
    test = write_jsonl(tmp_path / "x-test.jsonl", texts[170:])
    files = [train, valid, test]
    found = documents_of(load([files[i] for i in order], cache), cache)
    assert found == {"train": texts[:100], "valid": texts[100:170], "test": texts[170:]}


def test_tokenizer_learns_from_train_alone(tmp_path: Path, cache: Path) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", make_texts())
    test = write_jsonl(tmp_path / "test.jsonl", ["zq" * 30])
    learnt = []
    for held_out in ("xyz " * 5_000, "wvu " * 5_000):
        valid = write_jsonl(tmp_path / "valid.jsonl", [held_out])
        load([train, valid, test], cache / held_out[:3])
        learnt.append((entries(cache / held_out[:3])[0] / "tokenizer.json").read_text())
    assert learnt[0] == learnt[1]


def test_a_split_without_a_file_is_drawn_from_the_others(tmp_path: Path, cache: Path) -> None:
    texts = make_texts()
    train = write_jsonl(tmp_path / "train.jsonl", texts[:150])
    valid = write_jsonl(tmp_path / "valid.jsonl", texts[150:])
    found = documents_of(load([train, valid], cache), cache)
    drawn = [text for text in texts[:150] if split_of(text) == "test"]
    assert drawn and found["test"] == drawn
    assert found["valid"] == texts[150:]
    assert found["train"] == [text for text in texts[:150] if text not in drawn]


def test_standard_library_limited(cache: Path) -> None:
    corpus = load("stdlib", cache, max_chars=60_000)
    found = documents_of(corpus, cache)
    source = list(stdlib_source().documents())
    paths = [document.path for document in source]
    assert paths == sorted(paths) and {"os.py", "json/decoder.py"} <= set(paths)
    assert not any(part in ("test", "tests") for path in paths for part in path.split("/"))
    assert all(document.split == split_of(document.path) for document in source)
    assert sum(map(len, found["train"])) == 60_000
    assert "".join(document.text for document in source if document.split == "train").startswith(
        "".join(found["train"])
    )
    for split in ("valid", "test"):
        assert set(found[split]) == {d.text for d in source if d.split == split}
    assert not set(found["valid"]) & set(found["test"])


# Batches


def windows_of(pairs: Any) -> list[int]:
    """The first token of every row, having checked that each row is a window of 0, 1, 2, ..."""
    found = []
    for inputs, labels in pairs:
        assert inputs.dtype == labels.dtype == torch.int64
        assert inputs.is_contiguous() and labels.is_contiguous()
        assert inputs.shape == labels.shape
        rows = inputs[:, :1] + torch.arange(inputs.shape[1])
        assert torch.equal(inputs, rows) and torch.equal(labels, rows + 1)
        found += inputs[:, 0].tolist()
    return found


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_batches_cover_every_window_once_an_epoch(dtype: type) -> None:
    batches = Batches(np.arange(60_001, dtype=dtype), batch_size=6, seq_len=100, seed=3)
    assert len(batches) == 100
    epochs = [
        windows_of(batches[step] for step in range(100 * epoch, 100 * (epoch + 1)))
        for epoch in range(3)
    ]
    assert all(sorted(epoch) == list(range(0, 60_000, 100)) for epoch in epochs)
    assert all(epoch != sorted(epoch) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


@pytest.mark.parametrize(("tokens", "windows"), [(700, 99), (701, 100), (702, 100), (707, 100)])
def test_batches_drop_what_fills_no_batch(tokens: int, windows: int) -> None:
    batches = Batches(np.arange(tokens, dtype=np.uint16), batch_size=8, seq_len=7, seed=0)
    assert len(batches) == 12
    found = windows_of(batches[step] for step in range(12))
    assert len(set(found)) == len(found) == 96
    assert set(found) <= set(range(0, 7 * windows, 7))
    later = windows_of(batches[step] for step in range(120))
    assert set(later) == set(range(0, 7 * windows, 7))  # others are dropped in other epochs


def test_a_step_is_the_same_batch_whenever_it_is_asked_for() -> None:
    tokens = np.arange(5_000, dtype=np.uint16)
    batches = Batches(tokens, batch_size=4, seq_len=16, seed=5)
    steps = [0, 1, 200, 77, 78, 1_000_000]
    before = {step: batches[step][0] for step in steps}
    for step in reversed(steps):
        assert torch.equal(batches[step][0], before[step])
        assert torch.equal(Batches(tokens, 4, 16, 5)[step][0], before[step])
        assert not torch.equal(Batches(tokens, 4, 16, 6)[step][0], before[step])
    assert len({tuple(rows[:, 0].tolist()) for rows in before.values()}) == len(steps)


def test_eval_covers_the_split_in_order() -> None:
    tokens = np.arange(1_000, dtype=np.uint16)
    pairs = list(iterate_eval(tokens, batch_size=4, seq_len=30))
    assert windows_of(pairs) == list(range(0, 990, 30))
    assert [len(inputs) for inputs, _ in pairs] == [4] * 8 + [1]
    some = windows_of(iterate_eval(tokens, 4, 30, max_tokens=179))  # spread over the split
    assert some == [0, 180, 390, 570, 780]
    assert windows_of(iterate_eval(tokens, 2, 30, max_tokens=150)) == some
    assert windows_of(iterate_eval(tokens, 4, 30, max_tokens=10**9)) == windows_of(pairs)
    assert windows_of(iterate_eval(tokens[:31], 4, 30)) == [0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda t: Batches(t[:100], 1, 100, 0),
            "100 tokens, too few for one window of seq_len 100",
        ),
        (lambda t: Batches(t[:0], 1, 100, 0), "0 tokens, too few for one window of seq_len 100"),
        (lambda t: Batches(t, 11, 100, 0), "10 windows of seq_len 100, too few for batch_size 11"),
        (lambda t: Batches(t, 0, 100, 0), "batch_size must be at least 1, got 0"),
        (lambda t: Batches(t, 1, -1, 0), "seq_len must be at least 1, got -1"),
        (lambda t: Batches(t, 1, 1, -1), "seed must be at least 0, got -1"),
        (lambda t: iterate_eval(t[:100], 1, 100), "100 tokens, too few for one window"),
        (lambda t: iterate_eval(t, 1, 100, 99), "max_tokens 99 is less than one window of 100"),
    ],
)
def test_bad_windows(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        make(np.arange(1_001, dtype=np.uint16))
    assert "\n" not in str(caught.value)
    with pytest.raises(IndexError, match="step must be at least 0, got -1"):
        Batches(np.arange(9), 1, 1, 0)[-1]


# Progress


def test_progress_fits_in_80_columns_on_stderr(
    corpus_file: Path, cache: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    load(corpus_file, cache, progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    for step in ("reading", "counting words", "merging pairs", "encoding"):
        assert step in err
    assert "characters" in err and "…" not in err
    assert max(map(len, err.splitlines())) <= 80
    load(corpus_file, cache.with_name("silent"), progress=False)
    assert capfd.readouterr() == ("", "")


# C4, from a local folder that is laid out like the dataset on the hub


def make_c4(
    folder: Path, train: list[str], validation: list[str], monkeypatch: pytest.MonkeyPatch
) -> dict[str, str]:
    """A dataset with the configuration 'en', and a tokenizer that ends texts like T5's."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "hub")
    data_folder = folder / "c4" / "en"
    data_folder.mkdir(parents=True)
    write_jsonl(data_folder / "c4-train.00000-of-00002.json.gz", train[:100])
    write_jsonl(data_folder / "c4-train.00001-of-00002.json.gz", train[100:])
    write_jsonl(data_folder / "c4-validation.00000-of-00001.json.gz", validation)
    (folder / "c4" / "README.md").write_text(
        "---\nconfigs:\n- config_name: en\n  data_files:\n"
        "  - {split: train, path: en/c4-train.*.json.gz}\n"
        "  - {split: validation, path: en/c4-validation.*.json.gz}\n---\n"
    )
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "</s>", "<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator(train, trainer)
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=trained, eos_token="</s>")
    wrapped.save_pretrained(folder / "tokenizer")
    return {"c4_dataset": str(folder / "c4"), "tokenizer": str(folder / "tokenizer")}


@pytest.mark.parametrize(("vocab", "dtype"), [(400, np.uint16), (65_536, np.uint32)])
def test_c4(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, vocab: int, dtype: type
) -> None:
    train, validation = make_texts(150), make_texts(40, seed=1)
    places = make_c4(tmp_path, [*train, "", "a </s> b"], validation, monkeypatch)
    corpus = load("c4", cache, vocab_size=vocab, max_tokens=10**6, **places)
    found = documents_of(corpus, cache, "</s>")
    assert found["train"] == [*train, "a </s> b"]
    assert found["valid"] and found["test"]
    assert sorted(found["valid"] + found["test"]) == sorted(validation)
    assert [t for t in validation if t in found["valid"]] == found["valid"]
    assert corpus.name == "c4" and corpus.train.dtype == dtype

    fresh = load("c4", cache.with_name("fresh"), vocab_size=vocab, max_tokens=10**6, **places)
    assert_same(corpus, fresh)
    monkeypatch.setattr(data, "encode", None)  # the cache needs no encoding
    assert_same(corpus, load("c4", cache, vocab_size=vocab, max_tokens=10**6, **places))
    copied = load(entries(cache)[0], cache, vocab_size=vocab)
    assert_same(corpus, copied)
    assert copied.name == "c4"


def test_c4_stops_at_its_budgets(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = make_c4(tmp_path, make_texts(150), make_texts(40, seed=1), monkeypatch)
    options = {"vocab_size": 400, **places}
    whole = load("c4", cache, max_tokens=10**6, **options)
    monkeypatch.setattr(data, "C4_EVAL_TOKENS", 321)
    monkeypatch.setattr(tokens, "GROUP_CHARS", 1)
    part = load("c4", cache.with_name("part"), max_tokens=1234, **options)
    for split, size in (("train", 1234), ("valid", 321), ("test", 321)):
        np.testing.assert_array_equal(getattr(part, split), getattr(whole, split)[:size])
    assert part.sha256 != whole.sha256


def test_c4_that_cannot_be_loaded(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = make_c4(tmp_path, make_texts(150), make_texts(40, seed=1), monkeypatch)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    nowhere = tmp_path / "nowhere"
    wrong = {
        "dataset 'nobody/nothing'": {"c4_dataset": "nobody/nothing"},
        "tokenizer 'nobody/nothing'": {"tokenizer": "nobody/nothing"},
        f"tokenizer '{nowhere}'": {"tokenizer": str(nowhere)},
        f"dataset '{nowhere}'": {"c4_dataset": str(nowhere)},
    }
    for what, change in wrong.items():
        with pytest.raises(ConnectionError, match=f"{what} from the .* check the net") as caught:
            load("c4", cache, vocab_size=400, max_tokens=99, **{**places, **change})
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"vocab_size 399 is too small .*; take 400") as error:
        load("c4", cache, vocab_size=399, max_tokens=10**6, **places)
    assert "\n" not in str(error.value)
    assert not entries(cache) and not unfinished(cache)
