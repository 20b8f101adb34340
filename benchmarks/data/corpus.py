"""Corpora of tokens: a byte-level BPE over local text, or C4, cached as memory-mapped files.

A cached folder is self-contained: copied to a machine without the text, it is a source there.

Documents are packed: each is followed by an end-of-text token and the next begins at once, with no
padding and no truncation, and a window may hold parts of several. (The published C4 runs pad or cut
each document to 256 tokens instead, so perplexities of the two protocols do not compare.)
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.progress import Bars
from benchmarks.data.sources import (
    SPLITS,
    Source,
    c4_source,
    hub_error,
    limited,
    stdlib_source,
    survey,
)
from benchmarks.data.text_files import file_source
from benchmarks.data.token_cache import (
    StaleCacheError,
    TokenWriter,
    build,
    open_copied,
    open_tokens,
)
from benchmarks.data.tokenizer import END_OF_TEXT, encode, train_tokenizer

FORMAT = 1  # of the cache; a higher number makes every older cache unused
MIN_VOCAB = 300  # 256 bytes, the end of text, and a few merges
C4_EVAL_TOKENS = 10_000_000  # of each of valid and test: what the published runs evaluate on

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Corpus:
    """Tokens of a source by split; `sha256` is that of its documents and their splits.

    `folder` is that of the token cache, with the tokenizer in it.
    """

    name: str
    sha256: str
    vocab_size: int
    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray
    folder: Path | None = None


def load_corpus(
    source: str | Sequence[str | Path] = "stdlib",
    *,
    vocab_size: int,
    cache_dir: Path = Path(".cache/optimzoo"),
    progress: bool = True,
    max_chars: int | None = None,
    max_tokens: int | None = None,
    c4_dataset: str = "allenai/c4",
    tokenizer: str = "t5-base",
    tokenized_as: Path | None = None,
) -> Corpus:
    """Load the tokens of a source from the cache, or tokenize the source and cache them.

    Args:
        source: "stdlib" (the running Python's standard library), "c4", .txt and .jsonl files, or
            one folder that this function made in some `cache_dir`, its .bin files plain or .bin.xz.
        vocab_size: of the tokenizer that is trained on the train split; for "c4" that of the model.
        cache_dir: holds one folder for each source, vocabulary size and version.
        progress: draw progress bars on stderr.
        max_chars: limit of the train split; valid and test stay whole. Only for text.
        max_tokens: limit of C4's train split. Only for "c4", and required there.
        c4_dataset: a dataset on the Hugging Face hub, or a local folder laid out like it
            (which must not change: a cache is found by the name of the dataset alone).
        tokenizer: a tokenizer on the hub, or a local folder. Only for "c4".
        tokenized_as: a folder of tokens whose tokenizer is taken, not trained. Only for text.
    """
    if vocab_size < MIN_VOCAB:
        raise ValueError(f"vocab_size must be at least {MIN_VOCAB} (bytes first), got {vocab_size}")
    paths = [source] if isinstance(source, (str, Path)) else source
    named = source in ("stdlib", "c4")
    with Bars(progress) as bars:
        if not named and len(paths) == 1 and (folder := Path(paths[0])).is_dir():
            limits = {
                "max_chars": max_chars,
                "max_tokens": max_tokens,
                "tokenized_as": tokenized_as,
            }
            return _copied(folder, vocab_size, limits, bars)
        if source == "c4":
            if tokenized_as is not None:
                raise ValueError(f"tokenized_as={tokenized_as} is not for 'c4'; give tokenizer")
            if max_chars is not None:
                raise ValueError(f"max_chars={max_chars} is not for 'c4'; give max_tokens")
            if max_tokens is None or max_tokens < 1:
                raise ValueError(f"'c4' needs max_tokens of at least 1, got {max_tokens}")
            recipe = _c4_recipe(vocab_size, max_tokens, c4_dataset, tokenizer, bars)
        else:
            if max_tokens is not None:
                raise ValueError(f"max_tokens={max_tokens} is only for 'c4'; give max_chars")
            text = stdlib_source() if source == "stdlib" else file_source(paths)
            recipe = _text_recipe(limited(text, max_chars), vocab_size, bars, tokenized_as)
        meta, tokens, cached = _from_cache(recipe, Path(cache_dir))
    return Corpus(recipe.name, meta["sha256"], vocab_size, **tokens, folder=cached)


@dataclass(frozen=True)
class _Recipe:
    """Identity of a cached folder, and the function that fills it."""

    name: str
    identity: dict[str, Any]
    fill: Callable[[Path], None]


def _from_cache(
    recipe: _Recipe, cache_dir: Path
) -> tuple[dict[str, Any], dict[str, np.ndarray], Path]:
    key = hashlib.sha256(json.dumps(recipe.identity, sort_keys=True).encode()).hexdigest()[:16]
    folder = cache_dir / f"{recipe.name}-{key}"
    if folder.exists():
        try:
            return *open_tokens(folder, recipe.identity), folder
        except StaleCacheError as reason:
            log.warning("cached tokens in %s: %s; building them again", folder, reason)
    build(folder, recipe.fill, recipe.identity)
    return *open_tokens(folder, recipe.identity), folder


def _copied(folder: Path, vocab_size: int, limits: Mapping[str, Any], bars: Bars) -> Corpus:
    if not (folder / "meta.json").exists():
        raise ValueError(
            f"{folder} is a folder; give the files in it, or a folder of tokens from the token "
            "cache (this one has no meta.json)"
        )
    for name, value in limits.items():
        if value is not None:
            raise ValueError(
                f"{name}={value} has no effect on the folder of tokens {folder}; leave it out, "
                "or give the text"
            )
    try:
        with bars.bar("checking", None, ""):
            identity = {"format": FORMAT, "vocab_size": vocab_size}
            meta, tokens = open_copied(folder, identity)
    except StaleCacheError as reason:
        raise ValueError(
            f"{folder}: {reason}; take a folder of tokens that was made for this model by this "
            "version, and copied whole"
        ) from reason
    return Corpus(meta["source"], meta["sha256"], vocab_size, **tokens, folder=folder)


def _text_recipe(source: Source, vocab_size: int, bars: Bars, tokenized_as: Path | None) -> _Recipe:
    import tokenizers

    reused_tokenizer = None if tokenized_as is None else _tokenizer_of(tokenized_as, vocab_size)
    with bars.bar("reading", None, "characters") as advance:
        surveyed = survey(source, advance)
    identity = {
        "format": FORMAT,
        "sha256": surveyed.sha256,
        "vocab_size": vocab_size,
        "tokenizers": tokenizers.__version__,
    }
    if reused_tokenizer is not None:
        text = reused_tokenizer.to_str().encode()
        identity["tokenizer_sha256"] = hashlib.sha256(text).hexdigest()

    def fill(folder: Path) -> None:
        tokenizer = reused_tokenizer or train_tokenizer(source, surveyed, vocab_size, bars)
        total = sum(surveyed.characters.values())
        with closing(TokenWriter(folder, _dtype(vocab_size))) as writer:
            with bars.bar("encoding", total, "characters") as advance:
                sha256 = encode(
                    source.documents(),
                    surveyed.owns,
                    tokenizer,
                    tokenizer.token_to_id(END_OF_TEXT),
                    vocab_size,
                    writer,
                    lambda document, _: advance(len(document.text)),
                )
            if sha256 != surveyed.sha256:
                raise ValueError(f"{source.name} has changed while it was read; run again")
            facts = {"characters": surveyed.characters, "documents": surveyed.documents}
            writer.finish(tokenizer.to_str(), identity, source=source.name, **facts)

    return _Recipe(source.name, identity, fill)


def _tokenizer_of(folder: Path, vocab_size: int) -> Any:
    import tokenizers

    path = folder / "tokenizer.json"
    try:
        tokenizer = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{folder} is no folder of tokens: {error}") from None
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(
            f"the tokenizer of {folder} has {tokenizer.get_vocab_size()} tokens, and the model "
            f"{vocab_size}; give one of this model"
        )
    return tokenizer


def _c4_recipe(vocab_size: int, max_tokens: int, dataset: str, name: str, bars: Bars) -> _Recipe:
    identity = {
        "format": FORMAT,
        "dataset": dataset,
        "tokenizer": name,
        "max_tokens": max_tokens,
        "vocab_size": vocab_size,
    }

    def fill(folder: Path) -> None:
        try:
            from transformers import AutoTokenizer

            loaded = AutoTokenizer.from_pretrained(name)
            tokenizer, end = loaded.backend_tokenizer, loaded.eos_token_id
        except Exception as error:
            raise hub_error(f"tokenizer {name!r}", error) from error
        if end is None:
            raise ValueError(f"tokenizer {name!r} has no end-of-text token; take one that has")
        limits = dict.fromkeys(SPLITS, C4_EVAL_TOKENS) | {"train": max_tokens}
        with closing(TokenWriter(folder, _dtype(vocab_size), limits)) as writer:
            source = c4_source(dataset, writer.full)
            with bars.bar("encoding train", max_tokens, "tokens") as advance:
                sha256 = encode(
                    source.documents(),
                    lambda _: True,
                    tokenizer,
                    end,
                    vocab_size,
                    writer,
                    lambda document, count: advance(count if document.split == "train" else 0),
                )
            if not writer.counts["train"]:
                raise ValueError(f"dataset {dataset!r} has no training text; check the dataset")
            writer.finish(tokenizer.to_str(), identity, sha256=sha256, source=source.name)

    return _Recipe("c4", identity, fill)


def _dtype(vocab_size: int) -> str:
    return "uint16" if vocab_size <= 65535 else "uint32"
