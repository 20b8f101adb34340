"""Training of a byte-level BPE, and encoding with any tokenizer."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import Any

from benchmarks.common.progress import Bars
from benchmarks.data.sources import Document, Source, Survey, grouped, hash_document
from benchmarks.data.token_cache import TokenWriter

END_OF_TEXT = "<|endoftext|>"
GROUP_CHARS = 2_000_000  # encoded at once: bounds the memory


def train_tokenizer(source: Source, survey: Survey, vocab_size: int, bars: Bars) -> Any:
    """Train and return a byte-level BPE of exactly `vocab_size` tokens, on the train split.

    Raises:
        ValueError: the text has not enough words for so many tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )

    with ExitStack() as stack:
        train_characters = survey.characters["train"]
        advance = stack.enter_context(bars.bar("counting words", train_characters, "characters"))

        def texts() -> Iterator[str]:
            for document in source.documents():
                if document.split == "train" and survey.owns(document):
                    advance(len(document.text))
                    yield document.text
            stack.enter_context(bars.bar("merging pairs", None, ""))

        tokenizer.train_from_iterator(texts(), trainer)
    if (size := tokenizer.get_vocab_size()) < vocab_size:
        raise ValueError(
            f"vocab_size {vocab_size} is more than {source.name} supports ({size}); "
            f"take at most {size} or more text"
        )
    return tokenizer


def encode(
    documents: Iterable[Document],
    is_wanted: Callable[[Document], bool],
    tokenizer: Any,
    end: int,
    vocab_size: int,
    writer: TokenWriter,
    advance: Callable[[Document, int], None],
) -> str:
    """Write the tokens of the documents that `is_wanted`. Return the sha256 of all documents."""
    # Without a setting of its own, the library warns whenever a process forks after this.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # Text that happens to spell a special token must stay text.
    tokenizer.encode_special_tokens = True
    sha256 = hashlib.sha256()
    for group in grouped(documents, lambda document: len(document.text), GROUP_CHARS):
        for document in group:
            hash_document(sha256, document)
        selected = [document for document in group if is_wanted(document)]
        encodings = tokenizer.encode_batch_fast(
            [document.text for document in selected], add_special_tokens=False
        )
        for document, encoding in zip(selected, encodings, strict=True):
            ids = [*encoding.ids, end]
            if (largest := max(ids)) >= vocab_size:
                raise ValueError(
                    f"vocab_size {vocab_size} is too small for a tokenizer that gives the token "
                    f"{largest}; take {tokenizer.get_vocab_size()}"
                )
            advance(document, writer.write(document.split, ids))
    return sha256.hexdigest()
