"""Reading documents from files, and what is said of a bad one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from data_helpers import PACK, ROOT, entries, load, make_texts, unfinished, write_jsonl

from benchmarks.data import corpus as data
from benchmarks.data import text_files


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("kind", [".txt", ".jsonl"])
def test_formats(tmp_path: Path, cache: Path, kind: str, packed: str) -> None:
    texts = make_texts()
    raw = "\n".join(texts) if kind == ".txt" else "\n".join(json.dumps({"text": t}) for t in texts)
    path = tmp_path / f"some{kind}{packed}"
    path.write_bytes(PACK[packed](("\ufeff" + raw).encode()))
    found = [document.text for document in text_files.file_source([path]).documents()]
    if kind == ".jsonl":
        assert found == texts
    else:
        assert "".join(found) == raw
        assert all(10_000 <= len(text) < 20_000 for text in found[:-1])
        assert all(text.endswith("\n") for text in found[:-1])
    if packed:  # a file that ends too early
        path.write_bytes(path.read_bytes()[:-30])
        with pytest.raises(ValueError, match=rf"{path} is truncated or damaged .*fetch") as caught:
            load(path, cache)
        assert "\n" not in str(caught.value)


def test_long_lines_of_text_are_cut(tmp_path: Path) -> None:
    raw = "x" * 25_000 + "\nend"
    (tmp_path / "long.txt").write_text(raw)
    found = [d.text for d in text_files.file_source([tmp_path / "long.txt"]).documents()]
    assert "".join(found) == raw and max(map(len, found)) <= 20_000


GOOD = json.dumps({"text": "fine"}) + "\n"
BAD_FILES = {
    "no.jsonl": (None, FileNotFoundError, "no.jsonl does not exist"),
    "a.csv": ("x", ValueError, "a.csv: unknown suffix; give .txt or .jsonl"),
    "a.jsonl.bz2": ("x", ValueError, "unknown suffix"),
    "a.gz": ("x", ValueError, "unknown suffix"),
    "empty.txt": ("", ValueError, "empty has no text"),
    "empty.jsonl": ('\n{"text": ""}\n', ValueError, "empty has no text"),
    "test.txt": ("some text", ValueError, "no training text .*1 documents, all held out"),
    "bad.jsonl": (GOOD + "\n{'text'}\n", ValueError, r"bad\.jsonl:3: not a JSON line"),
    "deep.jsonl": ("[" * 200_000, ValueError, r"deep\.jsonl:1: not a JSON line"),
    "key.jsonl": (GOOD + '{"body": "x"}\n', ValueError, r"key\.jsonl:2: no string .*'text'"),
    "list.jsonl": ("[1]\n", ValueError, r"list\.jsonl:1: no string under the key 'text'"),
    "type.jsonl": ('{"text": 3}\n', ValueError, r"type\.jsonl:1: no string under the key 'text'"),
    "half.jsonl": ('{"text": "\\ud800"}\n', ValueError, r"half\.jsonl:1: .*lone surrogate"),
    "latin.txt": (b"caf\xe9 au lait", ValueError, r"latin\.txt is not UTF-8"),
    "fake.txt.gz": ("not packed", ValueError, r"fake\.txt\.gz is truncated or damaged"),
    "fake.txt.xz": ("not packed", ValueError, r"fake\.txt\.xz is truncated or damaged"),
    "fake.txt.zst": ("not packed", ValueError, r"fake\.txt\.zst is truncated or damaged"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files(tmp_path: Path, cache: Path, name: str) -> None:
    content, kind, message = BAD_FILES[name]
    if content is not None:
        raw = content.encode() if isinstance(content, str) else content
        (tmp_path / name).write_bytes(raw)
    with pytest.raises(kind, match=message) as caught:
        load(tmp_path / name, cache)
    assert "\n" not in str(caught.value)
    assert not cache.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 299}, "vocab_size must be at least 300.*got 299"),
        ({"vocab_size": 60_000}, r"vocab_size 60000 is more than small supports \(\d+\); take at"),
        ({"max_chars": 0}, "max_chars must be at least 1, got 0"),
        ({"max_tokens": 5}, "max_tokens=5 is only for 'c4'; give max_chars"),
        ({"source": "c4"}, "'c4' needs max_tokens of at least 1, got None"),
        ({"source": "c4", "max_tokens": 9, "max_chars": 8}, "max_chars=8 is not for 'c4'"),
        ({"source": []}, "no source files given"),
        ({"source": [ROOT / "tests.txt" / ".."]}, "unknown suffix"),
    ],
)
def test_bad_arguments(corpus_file: Path, cache: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load(**{"source": corpus_file, "cache": cache, **options})
    assert "\n" not in str(caught.value)
    assert not cache.exists() or not (entries(cache) or unfinished(cache))


def test_folder_is_not_a_file(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(ValueError, match=r"folder\.txt is a folder; give the files in it"):
        load(tmp_path / "folder.txt", cache)


def test_source_that_changes_is_refused(
    corpus_file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = data.train_tokenizer

    def train_then_change(*args: object) -> object:
        write_jsonl(corpus_file, make_texts(seed=1))
        return train(*args)

    monkeypatch.setattr(data, "train_tokenizer", train_then_change)
    with pytest.raises(ValueError, match="small has changed while it was read; run again"):
        load(corpus_file, cache)
    assert not entries(cache) and not unfinished(cache)
