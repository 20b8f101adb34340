"""The published memory column of SCALE beside ours, and the file of published figures."""

import copy
import re
from functools import cache

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.papers import memory_columns
from optimzoo.models.llama import Llama, get_config

COMMAND = ["reproduce", "scale-main", "--memory-only"]
# Parameters and optimizer state in bfloat16, in 1e9 bytes, as the paper prints them.
PUBLISHED = {
    "Adam": {"60M": 0.35, "130M": 0.81, "350M": 2.21, "1B": 8.04, "7B": 40.43},
    "Muon": {"60M": 0.23, "130M": 0.54, "350M": 1.47, "1B": 5.36, "7B": 26.95},
    "SCALE": {"60M": 0.15, "130M": 0.32, "350M": 0.80, "1B": 2.81, "7B": 13.74},
}
# The two cells in which the paper adds its rounded parts.
ROUNDED_PARTS = {("Adam", "130M"), ("Adam", "1B")}
CELLS = [(method, size) for method, row in PUBLISHED.items() for size in row]
MEMORY: dict[tuple[str, str, str], tuple[float, float]] = {}


@cache
def gigabytes(method: str, size: str) -> tuple[float, float]:
    name, hyper = memory_columns.SCALE_MAIN[method][size]
    return memory_columns.memory_gigabytes(name, hyper, size)


@pytest.fixture(autouse=True)
def bytes_counted_once(monkeypatch):
    """A model of 7B without memory still takes a second to make."""
    count, known = memory_columns.memory_gigabytes, MEMORY

    def remembered(name, hyper, size):
        key = (name, repr(hyper), size)
        if key not in known:
            known[key] = count(name, hyper, size)
        return known[key]

    monkeypatch.setattr(memory_columns, "memory_gigabytes", remembered)


@pytest.mark.parametrize(("method", "size"), CELLS)
def test_each_published_cell_is_ours(method, size):
    paper = PUBLISHED[method][size]
    assert memory_columns.published_value("SCALE", "memory params+optimizer", method, size) == paper
    params, state = gigabytes(method, size)
    cell, same = memory_columns.memory_cell(params, state, paper)
    assert same
    if (method, size) in ROUNDED_PARTS:
        assert cell == f"{params + state:.2f}*"
        assert f"{round(params, 2) + round(state, 2):.2f}" == f"{paper:.2f}"
    else:
        assert cell == f"{params + state:.2f}" == f"{paper:.2f}"


@pytest.mark.parametrize("size", memory_columns.SIZES)
def test_bytes_are_those_of_the_shapes(size):
    """The same figures from the shapes alone, by hand."""
    with torch.device("meta"):
        shapes = [p.shape for p in Llama(get_config(size.lower())).parameters()]
    config = get_config(size.lower())
    head = config.vocab_size * config.hidden_size
    vectors = (2 * config.num_hidden_layers + 1) * config.hidden_size
    params = sum(shape.numel() for shape in shapes)
    hand = {
        "SGD": 0,
        "Adam": 2 * 2 * params + 4 * len(shapes),
        "SCALE": 2 * head + 2 * 4 * vectors + 4 * (2 * config.num_hidden_layers + 1),
    }
    for method, state in hand.items():
        assert gigabytes(method, size) == (2 * params / 1e9, state / 1e9)


def test_the_printed_table(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(COMMAND) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    rows = [line.split() for line in lines if len(line.split()) == 11]
    for method, row in PUBLISHED.items():
        (figures,) = (words for first, *words in rows if first == method)
        assert figures[::2] == [f"{row[size]:.2f}" for size in memory_columns.SIZES]
        starred = {s for s, ours in zip(row, figures[1::2], strict=True) if ours.endswith("*")}
        assert starred == {s for m, s in ROUNDED_PARTS if m == method}
    (sgd,) = (words for first, *words in rows if first == "SGD")
    assert sgd[::2] == ["-"] * 5  # no published figure
    assert not re.search(r"\d!|…", "".join(lines))


@pytest.mark.parametrize(
    ("method", "size", "value"), [("SCALE", "350M", 0.82), ("Adam", "1B", 8.05)]
)
def test_a_cell_that_differs_is_marked_and_fails(method, size, value, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    records = copy.deepcopy(memory_columns.published())
    for record in records:
        if record["paper"].startswith("SCALE") and record["metric"].startswith("memory"):
            record["values"].get(method, {}).update({size: value})
    monkeypatch.setattr(memory_columns, "published", lambda: records)
    assert main(COMMAND) == 1
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.split()[0] for line in lines if re.search(r"\d!", line)] == [method]


def test_only_cells_that_differ_are_called_explained():
    source = memory_columns.TABLES["scale-main"]
    differ = set()
    for method, row in memory_columns.SCALE_MAIN.items():
        for size in row:
            paper = memory_columns.published_value(source.paper, source.metric, method, size)
            if not memory_columns.memory_cell(*gigabytes(method, size), paper)[1]:
                differ.add((method, size))
    assert differ == source.explained


@pytest.mark.sampled(2)
@pytest.mark.parametrize("table", sorted(memory_columns.TABLES))
def test_every_table_prints_whole_and_explains_what_differs(table, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["reproduce", table, "--memory-only"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    assert ("?: at 350M" in text) == (table == "scale-main")
    assert ("?: the estimates" in text) == (table != "scale-main")


def test_a_table_of_memory_alone_says_so(capsys):
    assert main(["reproduce", "galore-table2"]) == 2
    error = capsys.readouterr().err
    assert error == "error: galore-table2 has a memory column alone; add --memory-only\n"


def test_every_published_figure_says_where_it_is_from():
    records = memory_columns.published()
    count = 0
    for record in records:
        for key in ("paper", "table", "metric", "provenance"):
            assert record[key].strip(), record
        assert "unit" in record
        for row in record["values"].values():
            for value in row.values():
                assert isinstance(value, int | float) or re.fullmatch(r"\d+/\d+", value), record
            count += len(row)
    assert count == 461
    papers = {r["paper"].split()[0] for r in records}
    assert papers == {"SCALE", "Natural", "Scalable", "CAST", "GaLore", "APOLLO"}


def test_versions_of_a_paper_agree_on_memory_and_the_secondary_one_says_so():
    figures: dict[tuple[str, str], set[float]] = {}
    for record in memory_columns.published():
        if not record["paper"].startswith("SCALE"):
            continue
        assert record["version"] in ("v1", "v3")
        assert record["provenance"].startswith("secondary") == (record["version"] == "v3")
        if record["metric"].startswith("memory"):
            for method, row in record["values"].items():
                for size, value in row.items():
                    figures.setdefault((method, size), set()).add(value)
    assert all(len(values) == 1 for values in figures.values())
    assert figures["Muon", "7B"] == {26.95}


def test_a_figure_that_is_not_published_is_none():
    assert memory_columns.published_value("SCALE", "memory params+optimizer", "SGD", "60M") is None
    assert memory_columns.published_value("SCALE", "eval perplexity", "SCALE", "60M") == 30.81
    assert memory_columns.memory_cell(1.0, 0.5, None) == ("1.50", True)
