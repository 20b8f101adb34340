"""Sources of documents with their splits: the standard library and C4.

A source can be read any number of times and never holds more than one document in memory.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, TypeVar

SPLITS = ("train", "valid", "test")
HELD_OUT_PERCENT = 5  # each of valid and test
EXCLUDED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
T = TypeVar("T")


class Document(NamedTuple):
    """One document of a split."""

    split: str
    text: str
    path: str = ""  # only where the path, not the text, decides the split


@dataclass(frozen=True)
class Source:
    """A name, and a function that returns a new iterator over the documents."""

    name: str
    documents: Callable[[], Iterator[Document]]


@dataclass
class Survey:
    """Statistics of a source: its sha256, its sizes, and the split of each held-out text."""

    sha256: str = ""
    characters: Counter[str] = field(default_factory=Counter)
    documents: Counter[str] = field(default_factory=Counter)
    owner: dict[bytes, str] = field(default_factory=dict)

    def owns(self, document: Document) -> bool:
        """Return False if another split has the same held-out text: no text is in two splits."""
        if not self.owner:
            return True
        digest = hashlib.sha256(document.text.encode()).digest()
        return self.owner.get(digest, document.split) == document.split


def hash_document(sha256: hashlib._Hash, document: Document) -> None:
    """Add path, split and text of a document, with their lengths, to a running sha256."""
    for part in (document.path, document.split, document.text):
        data = part.encode()
        sha256.update(len(data).to_bytes(8, "big"))
        sha256.update(data)


def grouped(items: Iterable[T], size: Callable[[T], int], least: int) -> Iterator[list[T]]:
    """Yield the items in lists that have at least a total size, except the last one."""
    group: list[T] = []
    total = 0
    for item in items:
        group.append(item)
        total += size(item)
        if total >= least:
            yield group
            group, total = [], 0
    if group:
        yield group


def survey(source: Source, advance: Callable[[int], None]) -> Survey:
    """Read the source once and return its statistics; `advance` gets each document's length."""
    result, sha256 = Survey(), hashlib.sha256()
    for document in source.documents():
        hash_document(sha256, document)
        result.characters[document.split] += len(document.text)
        result.documents[document.split] += 1
        if document.split != "train":
            digest = hashlib.sha256(document.text.encode()).digest()
            if result.owner.get(digest) != "test":
                result.owner[digest] = document.split
        advance(len(document.text))
    result.sha256 = sha256.hexdigest()
    if not result.characters["train"]:
        count = result.documents["valid"] + result.documents["test"]
        raise ValueError(
            f"{source.name} has no training text ({count} documents, all held out); give more text"
            if count
            else f"{source.name} has no text; give files that hold some"
        )
    return result


def split_of(key: str) -> str:
    """Map a key to train, valid or test (90/5/5) by its sha256, the same on every machine."""
    bucket = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % 100
    if bucket < HELD_OUT_PERCENT:
        return "valid"
    return "test" if bucket < 2 * HELD_OUT_PERCENT else "train"


def limited(source: Source, max_chars: int | None) -> Source:
    """Limit the train split to `max_chars` characters; valid and test stay, so losses compare."""
    if max_chars is None:
        return source
    if max_chars < 1:
        raise ValueError(f"max_chars must be at least 1, got {max_chars}")

    def documents() -> Iterator[Document]:
        remaining = max_chars
        for document in source.documents():
            if document.split != "train":
                yield document
            elif remaining > 0:
                yield document._replace(text=document.text[:remaining])
                remaining -= len(document.text)

    return replace(source, documents=documents)


def stdlib_source(root: Path | None = None) -> Source:
    """Return the running Python's standard library: .py files except tests, split by path."""
    folder = Path(sysconfig.get_path("stdlib")) if root is None else root

    def documents() -> Iterator[Document]:
        paths = []
        for parent, folders, files in os.walk(folder):
            folders[:] = [name for name in folders if name not in EXCLUDED_FOLDERS]
            # _sysconfigdata is generated by the build: it would tie the sha256 to one machine.
            paths += [
                Path(parent, name)
                for name in files
                if name.endswith(".py") and not name.startswith("_sysconfigdata")
            ]
        for relative, path in sorted((p.relative_to(folder).as_posix(), p) for p in paths):
            try:
                text = path.read_bytes().decode("utf-8")
            except UnicodeDecodeError:
                continue
            if text:
                yield Document(split_of(relative), text, relative)

    return Source("stdlib", documents)


def c4_source(dataset: str, full: Callable[[str], bool]) -> Source:
    """Stream C4 'en' from the Hugging Face hub, each split until `full(split)` is true.

    C4 has no test split: its validation split is halved by the sha256 of each document's text.
    """

    def documents() -> Iterator[Document]:
        with closing(_stream(dataset, "validation")) as texts:
            for text in texts:
                if full("valid") and full("test"):
                    break
                split = "valid" if hashlib.sha256(text.encode()).digest()[0] % 2 else "test"
                if not full(split):
                    yield Document(split, text)
        with closing(_stream(dataset, "train")) as texts:
            for text in texts:
                if full("train"):
                    break
                yield Document("train", text)

    return Source("c4", documents)


def hub_error(what: str, error: Exception) -> OSError:
    """Convert any error of the hub or its libraries into an OSError of one line."""
    if isinstance(error, ImportError):
        return OSError(f"{what} needs a package ({error}): pip install datasets transformers")
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
    return ConnectionError(
        f"cannot load {what} from the Hugging Face hub ({reason}); check the network, "
        "or give a local folder, or train on local files instead"
    )


def _stream(dataset: str, split: str) -> Generator[str, None, None]:
    try:
        from datasets import load_dataset

        for row in load_dataset(dataset, "en", split=split, streaming=True):
            if row["text"]:
                yield row["text"]
    except Exception as error:
        raise hub_error(f"split {split!r} of dataset {dataset!r}", error) from error
