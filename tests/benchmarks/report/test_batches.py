"""The picture of perplexity against the batch, and the sentence beside it."""

import math

import pytest

from benchmarks.experiments import plan
from benchmarks.experiments.significance import Difference
from benchmarks.report import batches

RECORDS = {
    "nano-1k": {"scale": (0.10, 0.01, 0.02, 3), "muon": (-0.1, 0.02, 0.04, 3)},
    "nano-16k": {"scale": (0.25, None, None, 1), "swan": (-0.2, None, None, 1)},
}


@pytest.fixture(autouse=True)
def stored(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "_RESULTS", tmp_path)
    for name in RECORDS:
        (tmp_path / f"{name}-compare.json").touch()

    def tuned_records(name):
        records = {m: {"difference": Difference(*d), "edges": []} for m, d in RECORDS[name].items()}
        records["swan" if name == "nano-16k" else "muon"]["edges"] = ["lr"]
        return {**records, "adamw": {"difference": Difference(0.0, 0.0, 1.0, 1), "edges": []}}

    monkeypatch.setattr(batches, "tuned_records", tuned_records)


def test_methods_by_batch_without_those_at_an_edge():
    found = batches.differences("nano")
    assert {m: {b: d.mean for b, d in by.items()} for m, by in found.items()} == {
        "scale": {1024: 0.10, 16384: 0.25}
    }


def test_the_sentence_has_each_batch_and_the_paper():
    ratio = batches.published()["scale"]
    assert ratio == pytest.approx(30.81 / 30.05)
    assert batches.text("nano").endswith(
        "SCALE's perplexity to AdamW's, by the tokens of a batch: +10.5 ±1.0 %, behind at 1,024, "
        "+28.4 %, one seed at 16,384; in the paper +2.5 % at 131,072 (60M weights, C4)."
    )


def test_the_picture_has_a_line_a_method_and_the_paper():
    axes = batches.figure("nano").axes[0]
    [container] = axes.containers
    line, _, _ = container
    assert line.get_xdata().tolist() == [1024, 16384]
    expected = [100 * math.expm1(0.10), 100 * math.expm1(0.25)]
    assert line.get_ydata().tolist() == pytest.approx(expected)
    [paper] = [x for x in axes.lines if x.get_markerfacecolor() == "none"]
    assert paper.get_xdata()[0] == 131072
    assert paper.get_ydata()[0] == pytest.approx(100 * (30.81 / 30.05 - 1))
    assert [text.get_text() for text in axes.texts] == ["SCALE", "SCALE, paper"]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1,024", "16,384", "131,072"]
