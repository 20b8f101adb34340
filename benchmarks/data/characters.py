"""Corpus whose tokens are the characters of one text, split as nanoGPT splits it."""

import hashlib
from pathlib import Path

import numpy as np

from benchmarks.data.corpus import Corpus
from benchmarks.data.text_files import file_source

TRAIN_SHARE = 0.9


def character_corpus(path: Path, seq_len: int) -> Corpus:
    """Read a text (.txt, plain or .gz, .xz, .zst) as a corpus of characters.

    The vocabulary is the sorted characters of the whole text. The first 90 % are the train split,
    the rest is the validation split, and the test split too: nanoGPT holds out no other.

    Raises:
        ValueError: a split has no window of ``seq_len`` characters and the label after it.
    """
    source = file_source([path])
    text = "".join(document.text for document in source.documents())
    cut = int(TRAIN_SHARE * len(text))
    if min(cut, len(text) - cut) <= seq_len:
        raise ValueError(
            f"{path} has {len(text)} characters; its last tenth must have more than {seq_len}, "
            "give a longer text"
        )
    points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    vocabulary, tokens = np.unique(points, return_inverse=True)
    tokens = tokens.astype(np.uint32)
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    train, valid = tokens[:cut], tokens[cut:]
    return Corpus(source.name, sha256, len(vocabulary), train, valid, test=valid)
