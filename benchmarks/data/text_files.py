"""Reader of .txt and .jsonl files, plain or compressed."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

from benchmarks.data.sources import Document, Source, grouped, split_of

BLOCK_CHARS = 10_000  # of a document cut from a .txt file, at least
TEXT_SUFFIXES = (".txt", ".jsonl")
_OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open, ".zst": zstd.open}
NAMED_SPLITS = {"valid": "valid", "val": "valid", "validation": "valid", "test": "test"}


def file_source(paths: Sequence[str | Path]) -> Source:
    """Return the documents of .txt and .jsonl files (key `text`), plain or .gz, .xz or .zst.

    A file with `valid`, `val` or `test` as a part of its name is that split. A split that no file
    is named for is drawn from the other files by the sha256 of each document's text.
    """
    files = [Path(path) for path in paths]
    if not files:
        raise ValueError("no source files given; give .txt or .jsonl files, 'stdlib' or 'c4'")
    for path in files:
        _check_file(path)
    named = {path: _named_split(path) for path in files}
    claimed = set(named.values())

    def documents() -> Iterator[Document]:
        for path in files:
            for text in _read_texts(path):
                split = named[path] or split_of(text)
                if named[path] is None and split in claimed:
                    split = "train"
                yield Document(split, text)

    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", files[0].name.split(".")[0])[:40] or "text"
    return Source(stem if len(files) == 1 else f"{stem}+{len(files) - 1}", documents)


def _check_file(path: Path) -> None:
    if _kind(path) not in TEXT_SUFFIXES:
        raise ValueError(f"{path}: unknown suffix; give .txt or .jsonl, plain or .gz, .xz, .zst")
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the files in it")
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; check the path")


def _kind(path: Path) -> str:
    name, suffix = os.path.splitext(path.name)
    return os.path.splitext(name)[1] if suffix in _OPENERS else suffix


def _named_split(path: Path) -> str | None:
    parts = re.split(r"[^a-z]+", path.name.lower())
    return next((NAMED_SPLITS[part] for part in parts if part in NAMED_SPLITS), None)


def _read_texts(path: Path) -> Iterator[str]:
    """Yield the non-empty documents of one file; an error is one line that names the file."""
    number = 0
    try:
        with _OPENERS.get(path.suffix, open)(path, "rb") as binary:
            # newline="\n" keeps the text exact; utf-8-sig drops the mark that some editors add.
            handle = io.TextIOWrapper(binary, encoding="utf-8-sig", newline="\n")
            if _kind(path) == ".txt":
                # Cut at line ends, or inside a longer line.
                pieces = iter(lambda: handle.readline(BLOCK_CHARS), "")
                yield from map("".join, grouped(pieces, len, BLOCK_CHARS))
                return
            for line in handle:
                number += 1
                if line.strip() and (text := _parse_line(line)):
                    yield text
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error, zstd.ZstdError) as error:
        raise ValueError(f"{path} is truncated or damaged ({error}); fetch it again") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason}); convert it") from error
    except _BadLineError as error:
        raise ValueError(f"{path}:{number}: {error}") from error


class _BadLineError(Exception):
    """Error in a line; the reader adds the file and the line number."""


def _parse_line(line: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _BadLineError(f"not a JSON line ({error}); write one object a line") from error
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise _BadLineError("no string under the key 'text'; write one in every line")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _BadLineError("the text has a lone surrogate, which UTF-8 cannot hold") from error
    return text
