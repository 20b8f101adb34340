"""Starting values beside the best of a grid around them."""

import json
import math
from dataclasses import replace

import pytest
import torch
from data_helpers import write_words

from benchmarks.__main__ import main
from benchmarks.data.corpus import load_corpus
from benchmarks.experiments import start_check, starting_values
from benchmarks.experiments.plan import Plan
from benchmarks.experiments.start_tasks import Task
from benchmarks.experiments.starting_values import Check, moved_text, outcomes, summary
from benchmarks.training.config import fingerprint
from benchmarks.training.models import CHARACTERS, make_model
from benchmarks.training.run import Run
from optimzoo import param_groups
from optimzoo.models import get_config

SIZES = {"model": CHARACTERS, "steps": 2, "batch_size": 2, "seq_len": 16, "eval_tokens": 64}


NAMES = ("first", "then")


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(starting_values.TASKS, "script", Task("a test", 1e-3, SIZES, 32))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "made.txt"
    path.write_text("to be, or not to be: that is the question. " * 30, encoding="utf-8")
    return path


def made(check, method, values, seed, loss):
    config = vars(check.entry(method, values, seed).config)
    config = json.loads(json.dumps(config))
    return {"method": method, "protocol": "tuned", "config": config} | dict.fromkeys(
        ("valid_loss", "test_loss"), loss
    )


@pytest.mark.parametrize("task", starting_values.TASKS)
def test_the_grid_moves_one_rate_or_all_by_two(task):
    check = Check(task)
    for method in check.methods():
        start, *points = check.points(method)
        assert start == check.start(method)
        ratios = set()
        for point in points:
            changed = {k: v / start[k] for k, v in point.items() if v != start[k]}
            assert changed.keys() <= {"lr", "embedding_lr", "head_lr"}
            (ratio,) = {round(r, 4) for r in changed.values()}
            ratios.add((tuple(sorted(changed)), ratio))
        assert len(ratios) == 8 and {ratio for _, ratio in ratios} == {0.5, 2.0}


@pytest.mark.parametrize("task", starting_values.TASKS)
def test_the_roles_are_those_of_the_model_that_is_trained(task):
    def roles(groups):
        return [(group["role"], group["tied"], group["param_names"]) for group in groups]

    check = Check(task)
    trained = param_groups(make_model(check.task.sizes["model"]))
    assert roles(check.groups) == roles(trained)


def test_all_tuned_methods_but_sgd_are_checked():
    nano = Plan("nano")
    rows = nano.tuning_rows("adamw")
    searching = {method for method in nano.methods if nano.edges(method, "tuned", rows)}
    assert set(nano.methods) - set(Check("script").methods()) == {"sgd"} | searching


def test_the_outcome_is_paired_over_the_seeds():
    check = Check("script")
    rows = []
    for method, gain in (("scale", 0.015), ("muon", 0.03)):
        start, *points = check.points(method)
        for seed, loss in enumerate((2.0, 2.1, 2.3)):
            rows.append(made(check, method, start, seed, loss))
            rows.append(made(check, method, points[3], seed, loss - gain - 0.001 * seed))
        rows.append(made(check, method, points[0], 0, None))  # diverged
    near, far = outcomes(check, rows)
    assert (near.method, far.method) == ("scale", "muon")
    assert near.within and not far.within
    assert near.difference.mean == pytest.approx(0.016) and near.difference.seeds == 3
    assert near.perplexities == pytest.approx((math.exp(6.4 / 3), math.exp(6.4 / 3 - 0.016)))
    assert summary(check, rows).startswith("1 of 2 methods start within 2 % of the best")
    table = starting_values.table(check, rows)
    assert [row[0] for row in table.rows] == ["SCALE", "Muon"]
    assert [row[-1].endswith("far") for row in table.rows] == [False, True]
    assert table.rows[0][4] == "embedding x 0.5"


def test_rows_stay_those_of_the_values_that_they_were_made_with():
    """A new fit moves the starting values: the outcome stays, and the text says so."""
    today = Check("classifier")
    start = today.start("swan")
    older = start | {"lr": start["lr"] * 2, "betas": [0.9, 0.9]}
    check = Check("classifier", today.adamw_lr, {"swan": older, "muon": today.start("muon")})
    rows = [made(check, "swan", older, 0, 1.0), made(check, "swan", start, 0, 1.01)]
    (outcome,) = outcomes(check, rows)
    assert outcome.start is rows[0] and outcome.within
    assert check.moved() == ["swan"] and "the starting values of SWAN have" in moved_text(check)
    check.starts.pop("muon")
    assert "the starting values have moved" in moved_text(check)


def test_a_start_that_is_the_best_has_no_difference():
    check = Check("classifier")
    start, other, *_ = check.points("swan")
    rows = [made(check, "swan", start, seed, 1.0 + seed) for seed in range(2)]
    rows.append(made(check, "swan", other, 0, 1.5))
    (outcome,) = outcomes(check, rows)
    assert outcome.difference.mean == 0.0 and outcome.within


@pytest.mark.parametrize("best", [(1e-3, 0.064, 8e-3), (4e-3, 8e-3, 8e-3), (5e-4, 4e-3, 4e-3)])
def test_adamw_is_tuned_first(best):
    """Each rate is moved by two until both neighbours are worse; what fails counts as worse."""
    check, ran = Check("script"), []
    start = check.start("adamw")
    vectors = start["vector_lr"] / start["lr"]

    class Session:
        def __init__(self):
            self.rows = []

        def run(self, entries, *, test):
            for entry in entries:
                rates = [entry.config.lr, *(entry.config.hyper[f"{r}_lr"] for r in check.roles[1:])]
                ran.append(rates)
                followed = vectors * rates[0]
                assert entry.config.hyper["vector_lr"] == pytest.approx(followed, rel=0.05)
                loss = math.fsum(abs(math.log(x / b)) for x, b in zip(rates, best, strict=True))
                values = {**check.start("adamw"), "lr": rates[0]}
                values |= dict(zip(("embedding_lr", "head_lr"), rates[1:], strict=True))
                row = made(check, "adamw", values, 0, None if rates[0] > 9e-3 else loss)
                self.rows.append(row)

    check.tune_adamw(Session())
    assert list(check.adamw_lr.values()) == list(best)
    for role in range(3):
        for factor in (0.5, 2.0):
            beside = [b * factor if i == role else b for i, b in enumerate(best)]
            assert beside in ran or (factor * best[role] > 8e-3 and role == 0)
    start = check.start("adamw")
    assert [start[key] for key in ("lr", "embedding_lr", "head_lr")] == list(best)


def test_the_command_runs_stores_and_goes_on(small, text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(start_check, "RESULTS", tmp_path)
    words = ["starting-values", "script", "--data", str(text), "--jobs", "1", "--store"]
    command = [*words, "--optimizers", "scale", "--seeds", "2", "--out", str(tmp_path / "out")]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "SCALE" in printed and "of 1 methods start within 2 % of the best" in printed
    path = tmp_path / "starting-values-script.json"
    stored = json.loads(path.read_text())
    rows = stored["rows"]
    assert {row["config"]["steps"] for row in rows} == {2} and "curve" not in rows[0]
    assert sum(row["config"]["seed"] == 0 for row in rows) == 9
    assert sum(row["config"]["seed"] == 1 for row in rows) in (1, 2)
    monkeypatch.setattr("benchmarks.training.run.Run.train_step", None)  # finished runs are read
    assert main(command) == 0
    assert json.loads(path.read_text()) == stored
    [(check, again)] = start_check.stored()
    assert check.adamw_lr == stored["adamw_lr"] and again == rows
    assert stored["starts"].keys() == {"scale"} and check.moved() == [] and moved_text(check) == ""
    first = "/".join(f"{stored['adamw_lr'][role]:g}" for role in ("hidden", "embedding", "head"))
    assert f"rates (hidden/embedding/head) are {first}" in " ".join(printed.split())


def test_fine_tuning_begins_with_the_weights_and_the_tokens_of_the_first_text(
    tmp_path, capsys, monkeypatch
):
    sizes = {"model": "pico", "steps": 2, "batch_size": 2, "seq_len": 16, "eval_tokens": 64}
    task = Task("a test", 1e-3, sizes, 32, pretrained=3)
    monkeypatch.setitem(starting_values.TASKS, "fine-tuning", task)
    monkeypatch.setattr(start_check, "RESULTS", tmp_path)
    monkeypatch.chdir(tmp_path)
    files = [write_words(tmp_path / f"{name}.jsonl", seed) for seed, name in enumerate(NAMES)]
    words = ["starting-values", "fine-tuning", "--data", str(files[0]), "--jobs", "1"]
    command = [*words, "--optimizers", "muon", "--seeds", "1", "--store", "--out", "out"]
    assert main(command) == 2
    assert "give it as --then FILE" in capsys.readouterr().err
    assert main([*command, "--then", str(files[1])]) == 0
    pretrained = torch.load("out/pretrained/weights.pt", weights_only=True)
    [(check, rows)] = start_check.stored()
    assert len(rows) == 9 and {row["config"]["weights"] for row in rows} == {"weights.pt"}
    assert {row["corpus"]["name"] for row in rows} == {"then"}
    config = check.entry("muon", check.start("muon"), 0).config
    corpus = load_corpus(files[0], vocab_size=get_config("pico").vocab_size)
    then = load_corpus(
        files[1], vocab_size=get_config("pico").vocab_size, tokenized_as=corpus.folder
    )
    run = Run(replace(config, weights="out/pretrained/weights.pt"), then)
    assert all(torch.equal(p, pretrained[n]) for n, p in run.model.state_dict().items())
    assert fingerprint(run.config, then) in [row["fingerprint"] for row in rows]
    text = [(f.folder / "tokenizer.json").read_text() for f in (corpus, then)]
    assert text[0] == text[1]


def test_sgd_and_unknown_methods_are_refused(text, tmp_path, capsys):
    for name, message in (("sgd", "sgd has no starting values"), ("mun", "did you mean muon")):
        words = ["starting-values", "script", "--data", str(text), "--optimizers", name]
        assert main([*words, "--out", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err
