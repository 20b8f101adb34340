"""The tuned values that the package ships are those of the committed rows."""

import json
import math

import pytest

from benchmarks.experiments.plan import Plan, read_rows
from benchmarks.report import tuned_rates


def test_the_file_is_made_from_the_committed_rows():
    assert tuned_rates.PATH.read_text(encoding="utf-8") == tuned_rates.text()


def test_its_rates_are_the_middle_of_the_rows_within_2_percent_of_the_lowest_perplexity():
    nano = json.loads(tuned_rates.PATH.read_text(encoding="utf-8"))["nano"]
    assert nano["batch_tokens"] == 1024 and nano["width"] == 128
    rows = [row for row in read_rows(Plan("nano").tune_path) if row["protocol"] == "tuned"]
    for record in nano["methods"]:
        fitting = [
            row
            for row in rows
            if row["config"]["optimizer"] == record["optimizer"]
            and record["variant"].items() <= row["config"]["hyper"].items()
            and len(set(tuned_rates.VARIANT) & row["config"]["hyper"].keys())
            == len(record["variant"])
        ]
        best = min(row["valid_loss"] or math.inf for row in fitting)
        configs = [
            {**row["config"], **row["config"]["hyper"]}
            for row in sorted(fitting, key=lambda row: row["valid_loss"] or math.inf)
            if math.exp((row["valid_loss"] or math.inf) - best) <= 1.02
        ]
        options = {k: configs[0][k] for k in record["values"] if not k.endswith("lr")}
        near = [c for c in configs if all(c[key] == value for key, value in options.items())]
        for key, value in record["values"].items():
            expected = (
                math.prod(c[key] for c in near) ** (1 / len(near)) if key not in options else 0
            )
            assert value == options.get(key, pytest.approx(expected, rel=0.006)), record[
                "optimizer"
            ]


def test_a_method_whose_best_rate_is_at_an_edge_is_left_out(monkeypatch):
    edges = Plan.edges

    def but_muon(self, method, *rest):
        return ["lr"] if method == "muon" else edges(self, method, *rest)

    monkeypatch.setattr(Plan, "edges", but_muon)
    nano = json.loads(tuned_rates.text())["nano"]
    named = [(record["optimizer"], record["variant"]) for record in nano["methods"]]
    assert ("muon", {}) not in named and ("adamw", {}) in named
    monkeypatch.setattr(Plan, "edges", lambda self, *_: ["lr"])
    assert json.loads(tuned_rates.text()) == {}, "there is no ratio without AdamW"
