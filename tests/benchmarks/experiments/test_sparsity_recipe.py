"""`python -m benchmarks cast` at a size for tests: every method, its row, its resume."""

import json
import math
from dataclasses import replace

import pytest
import tiny_benchmarks
import torch
from tiny_benchmarks import TINY, VOCAB, tiny_corpus
from torch import nn

from benchmarks import __main__ as command
from benchmarks.experiments import cast
from benchmarks.experiments.sparse_run import MaskedForward
from optimzoo.models import llama
from optimzoo.models.llama import Llama
from optimzoo.sparsity import is_nm, linear_targets, nm_mask

SMALL = ["--model", "tiny", "--dense-steps", "4", "--steps", "13", "--batch-size", "2"]
SMALL += ["--seq-len", "16", "--eval-tokens", "64", "--jobs", "1"]
TRAINED = [name for name, method in cast.METHODS.items() if method.trained]


@pytest.fixture
def corpus(tmp_path_factory, monkeypatch):
    made = tiny_corpus(tmp_path_factory.mktemp("text"))
    assert made.vocab_size == VOCAB
    monkeypatch.setitem(llama.CONFIGS, "tiny", TINY)
    monkeypatch.setattr(cast, "corpus_from", lambda args, model: made)
    return made


def run(out, *words):
    assert command.main(["cast", *SMALL, "--out", str(out), *words]) == 0
    return {row["method"]: row for row in json.loads((out / "results.json").read_text())["rows"]}


def folder(out, method):
    [found] = (out / "runs").glob(f"{method}-*")
    return found


def weights(out, method):
    return torch.load(folder(out, method) / "weights.pt", weights_only=True)


def loaded(out, method):
    model = Llama(TINY)
    model.load_state_dict(weights(out, method))
    return model


def test_every_method_ends_in_a_plain_checkpoint(corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cast, "RESULTS", tmp_path / "kept")
    rows = run(tmp_path / "a", "--store")
    assert list(rows) == list(cast.METHODS)
    for name, row in rows.items():
        sparse = name not in ("dense", "continued")
        assert row["zeros"] == (0.5 if sparse else 0.0), name
        layers = linear_targets(loaded(tmp_path / "a", name)).values()
        assert all(is_nm(layer.weight, 2, 4) == sparse for layer in layers), name
        assert row["tokens"] == (13 * 32 if name in TRAINED else 0)
        assert all(math.isfinite(row[k]) for k in ("valid_before", "valid_loss", "test_loss"))
        if name in ("dense", "continued", "oneshot", "fixed", "srste"):
            assert row["valid_loss"] == pytest.approx(row["valid_before"], rel=1e-6)  # as trained
        else:
            assert row["valid_loss"] != row["valid_before"]
            assert [step for step, *_ in row["masked_curve"]] == [1, 11, 13]
    assert rows["dense"]["valid_loss"] != rows["continued"]["valid_loss"]
    kept = json.loads((tmp_path / "kept" / "tiny-cast.json").read_text())["rows"]
    assert [row["method"] for row in kept] == list(rows)
    text = capsys.readouterr().out
    assert "CAST" in text and "pruned" in text
    for name in ("table.md", "masked.png", "flips.png"):
        assert (tmp_path / "a" / name).stat().st_size > 0
    assert list(folder(tmp_path / "a", "cast").glob("events*"))


@pytest.mark.parametrize(
    "name", ["cast", *(pytest.param(n, marks=pytest.mark.thorough) for n in ("srste", "fixed"))]
)
def test_a_stopped_run_goes_on_to_the_same_bits(corpus, tmp_path, monkeypatch, name):
    whole = run(tmp_path / "whole", "--methods", name)[name]
    step = cast.SparseRun.train_step

    def stopping(self, log, **how):
        if self.step == 8:
            raise KeyboardInterrupt
        return step(self, log, **how)

    words = ["cast", *SMALL, "--out", str(tmp_path / "cut"), "--methods", name]
    monkeypatch.setattr(cast.SparseRun, "train_step", stopping)
    assert command.main(words) == 130
    assert tiny_benchmarks.saved_step(folder(tmp_path / "cut", name)) == 8
    monkeypatch.setattr(cast.SparseRun, "train_step", step)
    again = run(tmp_path / "cut", "--methods", name)[name]
    same = ("valid_before", "valid_loss", "test_loss", "curve", "masked_curve", "zeros")
    assert {k: again[k] for k in same} == {k: whole[k] for k in same}
    pair = [weights(tmp_path / out, name) for out in ("whole", "cut")]
    torch.testing.assert_close(*pair, rtol=0, atol=0)
    assert not (folder(tmp_path / "cut", name) / "checkpoints").exists()


def test_finished_runs_are_read_and_others_run_again(corpus, tmp_path, monkeypatch):
    first = run(tmp_path, "--methods", "cast")["cast"]
    trained = []
    step = cast.SparseRun.train_step
    monkeypatch.setattr(
        cast.SparseRun,
        "train_step",
        lambda run, log, **how: trained.append(1) or step(run, log, **how),
    )
    assert run(tmp_path, "--methods", "cast")["cast"] == first
    assert not trained
    other = run(tmp_path, "--methods", "cast", "--l1", "0.5")["cast"]
    assert len(trained) == 13
    assert other["valid_loss"] != first["valid_loss"]
    run(tmp_path, "--methods", "cast", "--l1", "0.5", "--fresh")
    assert len(trained) == 26


def test_rates_and_decay_are_searched_and_kept(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(cast, "RESULTS", tmp_path / "kept")
    search_of = cast.search_of
    monkeypatch.setattr(cast, "search_of", lambda name: replace(search_of(name), most=5))
    words = ["--methods", "continued", "cast", "--seeds", "2", "--steps", "3", "--store"]
    run(tmp_path / "out", *words, "--tune")
    record = json.loads((tmp_path / "kept" / "tiny-cast.json").read_text())
    axes = {"continued": ["lr", "other_lr"], "cast": ["lr", "other_lr", "l1"]}
    comparison = cast.Comparison("tiny")
    for name, names in axes.items():
        points = [row for row in record["search"] if row["method"] == name]
        settings = [{**row["config"]["hyper"], **row["config"]} for row in points]
        tried = {tuple(config[key] for key in names) for config in settings}
        assert len(tried) == len(points) >= 5
        best = settings[min(range(len(points)), key=lambda i: points[i]["valid_loss"])]
        assert comparison.values(name) == {key: best[key] for key in names}
        rows = [row for row in record["rows"] if row["method"] == name]
        assert [row["config"]["seed"] for row in rows] == [1, 2]
        for row in rows:
            config = {**row["config"]["hyper"], **row["config"]}
            assert {key: config[key] for key in names} == comparison.values(name)
            assert config["weights"] == "weights.pt"
        assert rows[0]["fingerprint"]["weights"] != rows[1]["fingerprint"]["weights"]
        assert comparison.edges(name)  # five points do not end it
    run(tmp_path / "out", "--methods", "fixed", "--store")
    stored = json.loads((tmp_path / "kept" / "tiny-cast.json").read_text())
    assert stored["search"] == record["search"]
    assert [r for r in stored["rows"] if r["method"] != "fixed"] == record["rows"]
    assert len(stored["rows"]) == len(record["rows"]) + 1
    monkeypatch.setattr(cast, "tune", None)
    assert run(tmp_path / "again", *words)["cast"]["test_loss"] == pytest.approx(
        record["rows"][-1]["test_loss"]
    )


def test_the_fixed_mask_is_that_of_the_dense_model(corpus, tmp_path):
    run(tmp_path, "--methods", "fixed")
    start, end = loaded(tmp_path, "start"), loaded(tmp_path, "fixed")
    for before, after in zip(
        linear_targets(start).values(), linear_targets(end).values(), strict=True
    ):
        assert torch.equal(after.weight != 0, nm_mask(before.weight, 2, 4))
        assert not torch.equal(after.weight, before.weight * nm_mask(before.weight, 2, 4))


def test_a_masked_forward_sees_the_pruned_weight_and_teaches_all():
    weight = nn.Parameter(torch.tensor([[3.0, -4.0, 1.0, 2.0]]))
    out = MaskedForward(weight)(weight)
    assert out.tolist() == [[3.0, -4.0, 0.0, 0.0]]
    out.backward(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    assert weight.grad.tolist() == [[1.0, 2.0, 3.0, 4.0]]


def test_bad_input_is_one_line(corpus, tmp_path, capsys):
    for words, message in [
        (["--eta", "2"], "Invalid eta: 2.0"),
        (["--steps", "0"], "steps is 0; it must be at least 1"),
        (["--lr", "-1"], "Invalid learning rate: -1.0"),
    ]:
        out = tmp_path / words[0]
        assert command.main(["cast", *SMALL, "--out", str(out), "--methods", "cast", *words]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ") and message in error
