"""A file of documents, and the place of its tokens."""

from pathlib import Path

import pytest
from data_helpers import make_texts, write_jsonl


@pytest.fixture
def corpus_file(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "small.jsonl", make_texts())


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "tokens"
