"""Crash-safe cache of token files: a folder is complete or absent.

A folder is built under another name, synced, and renamed into place. Its builder holds a lock that
ends with its process; who finds it taken waits, and takes what was built.
"""

from __future__ import annotations

import hashlib
import logging
import lzma
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from benchmarks.common.files import read_json, sync_folder, write_atomic, write_json
from benchmarks.data.sources import SPLITS

log = logging.getLogger(__name__)


class StaleCacheError(Exception):
    """Reason why a cached folder cannot be used."""


class TokenWriter:
    """Writer of train.bin, valid.bin and test.bin, each up to its limit, if it has one."""

    def __init__(self, folder: Path, dtype: str, limits: Mapping[str, int] | None = None) -> None:
        self.counts: Counter[str] = Counter()
        self._folder = folder
        self._dtype = np.dtype(dtype)
        self._limits = dict(limits or {})
        self._stack = ExitStack()
        self._files = {
            split: self._stack.enter_context((folder / f"{split}.bin").open("wb"))
            for split in SPLITS
        }
        self._hashes = {split: hashlib.sha256() for split in SPLITS}

    def full(self, split: str) -> bool:
        """Return whether the split has reached its limit."""
        return split in self._limits and self.counts[split] >= self._limits[split]

    def write(self, split: str, ids: Sequence[int]) -> int:
        """Append tokens up to the limit, and return how many were written."""
        room = self._limits.get(split, len(ids) + self.counts[split]) - self.counts[split]
        data = np.asarray(ids[:room], dtype=self._dtype)
        self._files[split].write(data)
        self._hashes[split].update(data)
        self.counts[split] += len(data)
        return len(data)

    def finish(self, tokenizer: str, identity: Mapping[str, Any], **facts: Any) -> None:
        """Sync the tokens, then write tokenizer.json and, last, meta.json."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        self.close()
        write_atomic(self._folder / "tokenizer.json", tokenizer)
        meta = {
            **identity,
            **facts,
            "dtype": self._dtype.name,
            "tokenizer_sha256": hashlib.sha256(tokenizer.encode()).hexdigest(),
            "splits": {
                split: {"tokens": self.counts[split], "sha256": self._hashes[split].hexdigest()}
                for split in SPLITS
            },
        }
        write_json(self._folder / "meta.json", meta)

    def close(self) -> None:
        """Close the files; the caller keeps or removes the folder."""
        self._stack.close()


def open_tokens(
    folder: Path, identity: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the meta data and the memory-mapped tokens of a folder.

    Sizes, the tokenizer's sha256 and the identity are compared with meta.json every time; the
    tokens' sha256 is not, as that would read all of them.

    Raises:
        StaleCacheError: the folder cannot be used.
    """
    meta = _description(folder, identity)
    with _reasons():
        tokenizer = (folder / "tokenizer.json").read_bytes()
        if hashlib.sha256(tokenizer).hexdigest() != meta["tokenizer_sha256"]:
            raise StaleCacheError("tokenizer.json is not the one that meta.json describes")
        dtype = np.dtype(meta["dtype"])
        tokens = {}
        for split in SPLITS:
            path, expected = folder / f"{split}.bin", meta["splits"][split]["tokens"]
            if (size := path.stat().st_size) != expected * dtype.itemsize:
                raise StaleCacheError(
                    f"{path.name} has {size} bytes, meta.json says {expected * dtype.itemsize}"
                )
            tokens[split] = (
                np.memmap(path, dtype, "r") if expected else np.empty(0, dtype)  # no empty maps
            )
    return meta, tokens


def open_copied(
    folder: Path, identity: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Open a folder that was built elsewhere, and check the tokens' sha256 too.

    NAME.bin.xz without NAME.bin is unpacked first, and NAME.bin stays.
    """
    meta = _description(folder, identity)  # to refuse a wrong folder before it is unpacked
    if missing := sorted({"source", "sha256"} - meta.keys()):
        raise StaleCacheError(f"meta.json has no {missing[0]}")
    for split in SPLITS:
        _unpack(folder / f"{split}.bin")
    meta, tokens = open_tokens(folder, identity)
    with _reasons():
        for split in SPLITS:
            if hashlib.sha256(tokens[split]).hexdigest() != meta["splits"][split]["sha256"]:
                raise StaleCacheError(f"{split}.bin does not have the sha256 in meta.json")
    return meta, tokens


def _description(folder: Path, identity: Mapping[str, Any]) -> dict[str, Any]:
    with _reasons():
        meta = read_json(folder / "meta.json")
        for key, value in identity.items():
            if meta[key] != value:
                raise StaleCacheError(f"meta.json has {key} {meta[key]!r}, expected {value!r}")
    return meta


@contextmanager
def _reasons() -> Iterator[None]:
    """Convert any error in the files of a folder into a StaleCacheError."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StaleCacheError(f"{type(error).__name__}: {error}") from error


def _unpack(path: Path) -> None:
    packed = path.with_name(f"{path.name}.xz")
    if path.exists() or not packed.exists():
        return
    try:
        write_atomic(path, lzma.decompress(packed.read_bytes()))
    except lzma.LZMAError as error:
        raise StaleCacheError(f"{packed.name} is truncated or damaged ({error})") from error
    except OSError as error:
        raise OSError(
            f"{packed} cannot be unpacked in its folder ({error.strerror}); make the folder "
            "writable, with room for it, or unpack it before"
        ) from error


def build(folder: Path, fill: Callable[[Path], None], identity: Mapping[str, Any]) -> None:
    """Fill a new folder and rename it to ``folder``, unless another process has built that."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.with_name(f".{folder.name}")
    with _locked(folder.with_name(f".{folder.name}.lock")):
        with suppress(StaleCacheError):
            open_tokens(folder, identity)
            return
        shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
        try:
            unfinished.mkdir()
            fill(unfinished)
            sync_folder(unfinished)
            shutil.rmtree(folder, ignore_errors=True)  # what other processes have mapped stays
            os.rename(unfinished, folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        sync_folder(folder.parent)


def _locked(path: Path) -> AbstractContextManager[Any]:
    """Acquire a lock, and return the context at whose end it is released."""
    lock = FileLock(path)
    try:
        return lock.acquire(blocking=False)
    except Timeout:
        log.warning("another process is building the tokens that %s is for; waiting", path)
        return lock.acquire()
