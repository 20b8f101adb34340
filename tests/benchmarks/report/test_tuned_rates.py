"""The tuned values that the package ships are those of the committed rows."""

import json

from benchmarks.experiments.plan import Plan
from benchmarks.experiments.summary import read_rows
from benchmarks.report import tuned_rates


def test_the_file_is_made_from_the_committed_rows():
    assert tuned_rates.stored() == tuned_rates.text()


def test_its_values_are_those_of_the_row_with_the_lowest_loss():
    nano = json.loads(tuned_rates.stored())["nano"]
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
        best = min(fitting, key=lambda row: row["valid_loss"] or float("inf"))
        config = {**best["config"], **best["config"]["hyper"]}
        for key, value in record["values"].items():
            assert config[key] == value, (record["optimizer"], key)


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
