"""Of tests with many cases `make test` takes a part, always the same; `-m thorough` the rest.

A test says so itself: ``@pytest.mark.sampled(8)``, one case of eight, ``@pytest.mark.each_method``,
one case of each optimizer. ``--part 2/4`` takes the second quarter of the thorough ones: CI takes
another with each commit.
"""

import gc
import inspect
import re
import zlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# In the brackets of pytest, or where PyTorch's own machinery puts it: before the device.
METHOD = re.compile(r"(?<=\[)\w+|[A-Za-z]+_(?:cpu|cuda)(?=_)")


# At the head of a file none of whose tests `make test` takes.
WHOLLY = re.compile(r"^pytestmark = (\[\s*)?pytest\.mark\.(thorough|distributed)", re.MULTILINE)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Do not even import such a file for nothing: some import whole frameworks."""
    without = {"thorough", "distributed"} <= set(re.findall(r"not (\w+)", config.option.markexpr))
    if not (without and collection_path.suffix == ".py"):
        return None
    return bool(WHOLLY.search(collection_path.read_text(encoding="utf-8"))) or None


def pytest_addoption(parser: pytest.Parser) -> None:
    """The option that shares the thorough tests out."""
    parser.addoption("--part", metavar="K/N", help="of the thorough tests the K-th of N parts")


def in_part(case: str, part: str | None) -> bool:
    """Whether a case belongs to the part `K/N`; one case always to the same."""
    if part is None:
        return True
    match = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", part)
    if match is None or int(match[1]) > int(match[2]):
        raise pytest.UsageError(f"--part {part!r} is not K/N with K from 1 to N, as in 2/3")
    # Of the name turned round: which of a test's cases are thorough goes by the name's own.
    return zlib.crc32(case[::-1].encode()) % int(match[2]) == int(match[1]) - 1


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Before `-m` selects."""
    mark_thorough(items)
    part = config.getoption("part")
    kept, left = [], []
    for item in items:
        out = item.get_closest_marker("thorough") and not in_part(item.nodeid, part)
        (left if out else kept).append(item)
    config.hook.pytest_deselected(items=left)
    items[:] = kept


def mark_thorough(items: list[pytest.Item]) -> None:
    """Mark as thorough what `make test` leaves out."""
    methods = defaultdict(list)
    for item in items:
        order = zlib.crc32(f"{item.path.name}::{item.name}".encode())
        if item.get_closest_marker("each_method"):
            # PyTorch's machinery makes a function, and a name, of its own for each dtype.
            test = item.path, inspect.unwrap(item.function).__name__
            methods[test, METHOD.search(item.name)[0]].append((order, item))
        elif (sampled := item.get_closest_marker("sampled")) and order % sampled.args[0]:
            item.add_marker(pytest.mark.thorough)
    for cases in methods.values():
        for _, item in sorted(cases, key=lambda case: case[0])[1:]:
            item.add_marker(pytest.mark.thorough)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A text of some thousand tokens, for the model `tiny`."""
    import tiny_benchmarks

    return tiny_benchmarks.tiny_corpus(tmp_path_factory.mktemp("text"))


@pytest.fixture
def corpus_file(tmp_path: Path) -> Path:
    """A file of documents that differ."""
    import data_helpers

    return data_helpers.write_jsonl(tmp_path / "small.jsonl", data_helpers.make_texts())


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Where the tokens of such files are kept: there is nothing yet."""
    return tmp_path / "cache" / "tokens"


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The benchmarks have the model `tiny`, and what they write lands in a folder of the test's."""
    import tiny_benchmarks

    monkeypatch.setitem(tiny_benchmarks.llama.CONFIGS, "tiny", tiny_benchmarks.TINY)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def few_objects() -> Iterator[None]:
    """Hide what is there already from the garbage collector, and from who asks it for all objects.

    A look at all that torch has imported takes half a second.
    """
    gc.freeze()
    yield
    gc.unfreeze()
