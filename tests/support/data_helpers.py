"""Small corpora for the tests of the benchmark data."""

from __future__ import annotations

import gzip
import json
import lzma
import random
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from benchmarks.data.corpus import Corpus, load_corpus
from benchmarks.data.sources import SPLITS
from benchmarks.data.text_files import zstd

ROOT = Path(__file__).resolve().parents[2]
VOCAB = 320
PACK = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": lambda raw: zstd.compress(raw[:100]) + zstd.compress(raw[100:]),
}


def make_texts(count: int = 200, seed: int = 0) -> list[str]:
    """Documents that differ, in several scripts, with odd spaces and a spelled special token."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 9))) for _ in range(200)]
    words += [
        "naïve",
        "данные",
        "数据",
        "🙂",
        "  \t",
        "\r\n",
        "\n\n",
        "<|endoftext|>",
        "\x00",
        "\ufeff",
    ]
    return [f"{i} " + " ".join(rng.choices(words, k=60)) for i in range(count)]


def write_words(path: Path, seed: int) -> Path:
    """Write documents of random words, enough of them for a vocabulary of 512."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=6)) for _ in range(2000)]
    return write_jsonl(path, [" ".join(rng.choices(words, k=50)) for _ in range(600)])


def write_jsonl(path: Path, texts: list[str]) -> Path:
    raw = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts))
    path.write_bytes(PACK[path.suffix if path.suffix in PACK else ""](raw.encode()))
    return path


def load(source: object, cache: Path, **options: object) -> Corpus:
    options = {"vocab_size": VOCAB, "progress": False, **options}
    return load_corpus(source, cache_dir=cache, **options)  # type: ignore[arg-type]


def entries(cache: Path) -> list[Path]:
    return sorted(path for path in cache.iterdir() if not path.name.startswith("."))


def unfinished(cache: Path) -> list[Path]:
    """Folders, not the locks beside them."""
    return sorted(path for path in cache.iterdir() if path.name.startswith(".") and path.is_dir())


def documents_of(
    corpus: Corpus, cache: Path, end_of_text: str = "<|endoftext|>"
) -> dict[str, list[str]]:
    """What the tokens of each split decode to, cut at the end-of-text token."""
    (folder,) = entries(cache)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    end = tokenizer.token_to_id(end_of_text)
    found = {}
    for split in SPLITS:
        tokens = np.asarray(getattr(corpus, split))
        pieces = np.split(tokens, np.flatnonzero(tokens == end) + 1)
        assert len(pieces[-1]) == 0  # the last token of a split ends a document
        found[split] = [tokenizer.decode(piece[:-1].tolist()) for piece in pieces[:-1]]
    return found


def assert_same(one: Corpus, other: Corpus) -> None:
    assert one.sha256 == other.sha256
    for split in SPLITS:
        np.testing.assert_array_equal(getattr(one, split), getattr(other, split))


def flip(path: Path) -> None:
    """Change one bit in the middle of a file."""
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
