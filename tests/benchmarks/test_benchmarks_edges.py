"""Benchmarks at their edges: a loss beyond exp, wrong words, a slow worker, a wide table."""

import copy
import json
import math
import time

import pytest
import tiny_benchmarks
from tiny_benchmarks import text_words, train_words
from torch.optim.optimizer import register_optimizer_step_post_hook

from benchmarks.__main__ import main
from benchmarks.experiments import plan, run_queue, summary
from benchmarks.experiments.run_queue import _train_in_worker as run_job
from benchmarks.training.config import RunConfig
from benchmarks.training.run import Run
from optimzoo.models.llama import CONFIGS


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The tiny text, model and plan, and an empty folder of results."""
    tiny_benchmarks.tiny_corpus(tmp_path)
    return tiny_benchmarks.patched(monkeypatch, tmp_path)


def test_a_loss_beyond_exp_has_diverged(folder, capsys):
    assert main([*train_words(folder, steps=1, lr=1e6), "--out", "run"]) == 1
    row = json.loads((folder / "run" / "row.json").read_text())
    assert row["diverged"] and 700 < row["valid_loss"] < math.inf
    assert capsys.readouterr().out == "sgd diverged; try a smaller --lr than 1e+06\n"


@pytest.mark.parametrize(
    ("hyper", "reason"),
    [
        ("[1]", "hyper is [1]; it must be an object"),
        ("3", "hyper is 3; it must be an object"),
        ('{"momentum": "x"}', "hyper {'momentum': 'x'} does not fit: '<' not supported"),
        ('{"lr": 1}', "hyper {'lr': 1} does not fit: "),
    ],
)
def test_hyperparameters_that_do_not_fit_are_one_line(folder, capsys, hyper, reason):
    assert main(train_words(folder, hyper=hyper)) == 2
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1].startswith(f"error: {reason}")
    assert "Traceback" not in captured.err and captured.out == ""


def test_without_a_folder_it_does_not_promise_to_go_on(folder, monkeypatch, capsys):
    def stopped(*_, **how):
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "train_step", stopped)
    assert main(train_words(folder)) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "stopped; nothing is saved without --out"
    assert main([*train_words(folder), "--out", "run"]) == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "stopped; the same command goes on from here"


def test_missing_values_are_found_before_anything_is_read_or_deleted(folder, capsys):
    tiny_benchmarks.write_plan(folder)
    kept = folder / "out" / "runs" / "some" / "row.json"
    kept.parent.mkdir(parents=True)
    kept.write_text("{}")
    words = ["compare", "--plan=tiny", "--fresh", "--out=out", *text_words(folder)]
    assert main(words) == 2
    error = "error: plan tiny has no tuned values; run compare --tune first\n"
    assert capsys.readouterr().err == error
    assert kept.exists()


def test_groups_give_a_role_options_of_its_own(folder, capsys):
    options = {"hyper": {"momentum": 0.0}, "groups": {"embedding": {"momentum": 0.9}}}
    config = RunConfig("scale", lr=0.01, model="tiny", steps=1, **options)
    run = Run(config, tiny_benchmarks.tiny_corpus(folder))
    run.train_step(log=False)
    held = {
        g["role"]: sum("exp_avg" in run.optimizer.state[p] for p in g["params"])
        for g in run.optimizer.param_groups
        if g["role"] != "vector"
    }
    assert held == {"hidden": 0, "embedding": 1, "head": 0}
    hyper, head = json.dumps(options["hyper"]), 2 * 32000 * 512
    plain = summary.bytes_at("60m", "scale", hyper)
    groups = json.dumps(options["groups"])
    assert summary.bytes_at("60m", "scale", hyper, "{}", groups) == plain + head
    capsys.readouterr()
    assert main(train_words(folder, groups='{"heads": {}}')) == 2
    error = "error: groups has the role 'heads'; there are hidden, embedding, head, vector\n"
    assert capsys.readouterr().err.endswith(error)


def slow_worker(args, entry, name, options):
    """A worker that says when it has begun to train; at one learning rate its steps take long."""
    CONFIGS["tiny"] = tiny_benchmarks.TINY

    def hook(*_):
        (options["out"] / "begun").touch()
        time.sleep(1 if entry.config.lr == 1e-2 else 0)

    register_optimizer_step_post_hook(hook)
    return run_job(args, entry, name, options)


@pytest.mark.thorough
def test_every_worker_saves_however_long_its_step(folder, monkeypatch, capsys):
    """Of the one that is done first the pool makes a SIGTERM more for the others."""
    values = copy.deepcopy(tiny_benchmarks.PLAN)
    values["steps"] = 10_000
    tiny_benchmarks.write_plan(folder, values)
    monkeypatch.setattr(run_queue, "_train_in_worker", slow_worker)
    runs = folder / "out" / "runs"

    def stopped(*_, **__):
        while len([*runs.glob("*/begun")]) < 2:
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr(run_queue, "wait", stopped)
    only = ["--optimizers", "scale", "--protocol", "paper", "--jobs=2", "--out=out"]
    assert main(["compare", "--plan=tiny", "--tune", *only, *text_words(folder)]) == 130
    assert "Traceback" not in capsys.readouterr().err
    saved = sorted(runs.glob("*/checkpoints/latest"))
    assert ["lr-0.01-" in str(saved[0]), "lr-0.02-" in str(saved[1])] == [True, True]
    for path in saved:
        assert tiny_benchmarks.saved_step(path.parents[1]) >= 1
    assert len([*runs.iterdir()]) == 2, "another run was begun"


def test_the_widest_table_fits(monkeypatch, capsys):
    """Every method of the committed plan, at long values of everything."""
    monkeypatch.setenv("COLUMNS", "80")
    nano = plan.Plan("nano")
    rows = []
    for method in nano.methods:
        for seed in (0, 1):
            rates = {"lr": 2.5e-4, "embedding_lr": 0.064, "head_lr": 0.016}
            entry = nano.entry(method, "tuned", seed, **rates, clip=0.0)
            row = {"method": method, "protocol": "tuned", "config": vars(entry.config)}
            row |= {"test_loss": 5.0 + seed / 10, "optimizer_ms": 123.4, "tokens": 10**7}
            row |= {"parameter_bytes": 60 << 20, "state_bytes": 70 << 20, "peak_bytes": 1 << 30}
            row |= {"tokens_per_second": 12_345.0, "precision": "bf16-autocast"}
            row["corpus"] = {"name": "stdlib", "sha256": "f" * 64}
            row["provenance"] = {"device": "x" * 50, "threads": 16, "torch": "2.13.0+cpu"}
            row["provenance"]["commit"] = "0123456789-dirty"
            rows.append(row)
    summary.comparison(nano, rows).print()
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80 and "…" not in out
    for cell in ("0.00025/0.064/0.016", "156.22 ±11.04", "130.0", "123.4"):
        assert out.count(cell) == len(nano.methods), cell


def test_growth_writes_a_row_a_size(tmp_path, capsys):
    rows = tmp_path / "growth.json"
    command = ["growth", "--sizes", "1024", "5000", "--repeats", "1", "--out", str(rows)]
    assert main([*command, "--optimizers", "sgd", "scale"]) == 0
    found = json.loads(rows.read_text())["rows"]
    assert [row["weights"] for row in found] == [1024, 4096]  # what is stepped, not 5,000
    assert all(set(row["ms"]) == {"sgd", "scale"} for row in found)
    assert main(["growth", "--sizes", "0"]) == 2
    assert "--sizes 0" in capsys.readouterr().err
