"""A paper's table beside ours: ratios, ranks, tau; budgets; the command, resumed and shared."""

import json
import math
import re
from dataclasses import replace

import pytest
import tiny_benchmarks

from benchmarks.__main__ import main
from benchmarks.experiments import plan as plan_module
from benchmarks.experiments import time_budget as budget
from benchmarks.experiments.cast import Comparison
from benchmarks.experiments.model_sizes import MODEL_SIZES
from benchmarks.experiments.plan import MOST_ON_A_LINE, Plan, settings
from benchmarks.experiments.tuning import is_rate
from benchmarks.papers import cast as cast_beside
from benchmarks.papers import perplexity_tables, table_runs
from benchmarks.papers.perplexity_tables import TABLES
from benchmarks.papers.published import published

SCALE = TABLES["scale-main"]


def test_every_method_of_a_table_is_published_or_ours_alone():
    for name, table in TABLES.items():
        values = perplexity_tables.paper_values(table)
        known = {method for by_size in values.values() for method in by_size}
        assert known == {m for m, paper in table.methods.items() if paper}, name
        assert table.size in values and table.reference in values[table.size]
        size = "60m" if table.plans == ("full",) else "nano"
        found = [method for _, method in perplexity_tables.methods_at(table, size)]
        assert set(found) >= known - {"muon", "swan", "stable_spam"}, name


def test_ratios_ranks_and_tau_are_those_of_the_rows():
    rows = perplexity_tables.stored_rows(SCALE, "nano")
    made = {r["method"]: r for r in perplexity_tables.records(SCALE, "nano", rows)}
    means = {m: sum(math.exp(r["test_loss"]) for r in mine) / len(mine) for m, mine in rows.items()}
    for method, record in made.items():
        assert record["ratio"] == pytest.approx(means[method] / means["adamw"])
        assert record["perplexity"] == pytest.approx(means[method])
    assert made["scale"]["paper"] == 30.81 and made["adamw"]["paper"] == 30.05
    assert made["scale"]["paper_ratio"] == pytest.approx(30.81 / 30.05)
    assert made["scale_spectral"]["paper"] is None and "rank" not in made["scale_spectral"]
    common = [m for m in made if SCALE.methods[m]]
    assert sorted(made[m]["rank"] for m in common) == list(range(1, len(common) + 1))
    paper = perplexity_tables.paper_values(SCALE)["60M"]
    assert made[min(common, key=lambda m: paper[m])]["paper_rank"] == 1
    agree = [
        math.copysign(1, (paper[a] - paper[b]) * (means[a] - means[b]))
        for i, a in enumerate(common)
        for b in common[:i]
    ]
    tau = next(t for t in perplexity_tables.taus(SCALE, list(made.values())) if t["size"] == "60M")
    assert tau["methods"] == len(common) >= 3
    assert tau["tau"] == pytest.approx(sum(agree) / len(agree))


def test_a_table_takes_its_figures_from_one_version_of_the_paper():
    """Both versions of SCALE's main table are there, and differ at 1B alone."""
    methods = {method for method, name in SCALE.methods.items() if name}
    by_version = {
        version: perplexity_tables.paper_values(replace(SCALE, version=version))
        for version in ("v1", "v3")
    }
    five = ("adamw", "muon", "galore", "apollo_mini", "scale")
    columns = {
        "v1": dict(zip(five, (16.52, 14.18, 15.57, 14.13, 14.25), strict=True)),
        "v3": dict(zip(five, (15.79, 13.67, 15.05, 13.48, 13.49), strict=True)),
    }
    for version, column in columns.items():
        assert by_version[version]["1B"].items() >= column.items()
    assert by_version["v3"]["1B"] == columns["v3"] and set(by_version["v1"]["1B"]) == methods
    for size in ("60M", "130M", "350M"):
        assert by_version["v1"][size].items() >= by_version["v3"][size].items()

    used = {name: table.version for name, table in TABLES.items() if table.paper == "SCALE"}
    assert used == {"scale-main": "v1", "scale-ablation": "v3", "full": "v1"}
    assert perplexity_tables.paper_values(SCALE) == by_version["v1"]
    for name, version in used.items():
        notes = perplexity_tables.lines_below(TABLES[name], [])
        assert any(line.startswith(f"paper: {version}, C4 at 60M.") for line in notes)
        assert any(f"{version} of arXiv 2506.16659" in line for line in notes)


def test_the_order_of_the_records_does_not_matter(monkeypatch):
    values = {name: perplexity_tables.paper_values(table) for name, table in TABLES.items()}
    backwards = published()[::-1]
    monkeypatch.setattr(perplexity_tables, "published", lambda: backwards)
    for name, table in TABLES.items():
        assert perplexity_tables.paper_values(table) == values[name]


def test_log_perplexities_become_perplexities():
    values = perplexity_tables.paper_values(TABLES["natural-galore"])
    assert values["60M"]["galore"] == pytest.approx(math.exp(3.56))
    assert set(values) == {"60M", "130M", "350M", "1.1B"}


def test_galores_evaluation_counts_one_batch_more():
    config = {"eval_tokens": 10_000, "seq_len": 256, "batch_size": 4}  # 39 windows, 10 batches
    assert (
        perplexity_tables.as_galore({"config": config, "test_loss": 3.3})["test_loss"]
        == 3.3 * 10 / 11
    )
    assert perplexity_tables.as_galore({"config": config, "test_loss": None})["test_loss"] is None


def test_cast_is_measured_against_the_dense_model_trained_as_long():
    made = {r["method"]: r for r in cast_beside.records(Comparison("nano").rows)}
    assert made["cast"]["paper_ratio"] == pytest.approx(5.58 / 5.49)
    assert made["continued"]["ratio"] == 1.0
    assert made["cast"]["ratio"] == made["cast"]["perplexity"] / made["continued"]["perplexity"]
    assert made["cast"]["tokens"] == made["continued"]["tokens"]


def test_a_plan_at_another_size_takes_its_ranks_and_searches_around_the_best():
    small, large = Plan("nano"), Plan("60m")
    best = small.best("galore", "tuned")
    runs = [e.config for e in large.tuning_runs("galore", "tuned", [])]
    rates = [name for name in best if is_rate(name)]
    assert len(rates) > 1
    for name in rates:
        tried = [settings({"config": vars(c)})[name] for c in runs]
        assert tried == pytest.approx([best[name] * factor for factor in (0.25, 0.5, 0.125)])
    assert {c.hyper["rank"] for c in runs} == {128} and {c.steps for c in runs} == {612}
    assert all(10e6 <= c.steps * c.tokens_per_step < 10.1e6 for c in runs)
    final = large.entry("galore", "tuned", 0, **best)
    assert final.config.steps * final.config.tokens_per_step >= 60e6
    keys = {e.key for e in [*large.tuning_runs("galore", "tuned", []), final]}
    assert len(keys) == 4  # a tuning run and a long one at its rates have folders of their own
    assert large.results_path.name == "60m-compare.json"
    with pytest.raises(ValueError, match="unknown plan '61m'"):
        Plan("61m")


def test_a_search_goes_on_where_its_best_is_at_an_end():
    plan = Plan("130m")

    def rows(best: float, count: int) -> list[dict]:
        """The first rows of a search whose loss is least at a multiple of the start's rates."""
        made: list[dict] = []
        while len(made) < count and (runs := plan.tuning_runs("galore", "tuned", made)):
            for entry in runs[: count - len(made)]:
                row = {"method": "galore", "protocol": "tuned", "config": vars(entry.config)}
                loss = abs(math.log2(entry.config.lr / start / best))
                made.append({**row, "valid_loss": 5.0 + loss if loss < 3 else None})
        return made

    start = plan.search("galore", "tuned").start["lr"]
    assert len(rows(1.0, 9)) == 3 and plan.edges("galore", "tuned", rows(1.0, 9)) == []
    for best in (0.5, 2.0):
        made = rows(best, 9)
        assert made[3]["config"]["lr"] == pytest.approx(start * best**2)
        assert len(made) == 4 and plan.edges("galore", "tuned", made) == []
        assert plan.edges("galore", "tuned", made[:3]) == ["lr and embedding_lr and head_lr"]
    assert len(rows(8.0, 9)) == MOST_ON_A_LINE and plan.edges("galore", "tuned", rows(8.0, 9))
    full = Plan("60m-full").tuning_runs("galore", "paper", [])
    assert [e.config.lr for e in full] == [0.01]


@pytest.mark.parametrize("size", [s for s in MODEL_SIZES if s.endswith("-full")])
def test_the_published_protocol_is_the_published_one(size):
    plan = Plan(size)
    tokens = {"60m": 1.44e9, "130m": 2.62e9, "350m": 7.86e9}[size.removesuffix("-full")]
    for method in plan.methods:
        config = plan.chosen(method, "paper", 0).config
        assert config.tokens_per_step == 512 * 256
        assert config.steps * config.tokens_per_step == pytest.approx(tokens, rel=0.01)
        assert (config.warmup, config.min_lr_ratio, config.clip) == (0.1, 0.1, 0.0)
    assert plan.chosen("scale", "paper", 0).config.hyper == {"vector_lr": 0.02}


def entries(name: str = "nano", count: int = 2):
    plan = Plan(name)
    methods = list(plan.methods)[:count]
    tuning = [e for m in methods for e in plan.tuning_runs(m, "tuned", [])]
    return [plan.entry(m, "tuned", 0, lr=0.1, other_lr=1.0, clip=1.0) for m in methods], tuning


def test_a_budget_cuts_seeds_then_tuning_then_steps():
    final, tuning = entries()
    seconds = {e.method: 0.1 for e in final}
    run = budget.seconds_of(final[0], 0.1)  # 400 steps and 2 x 64 evaluations a third each
    assert run == pytest.approx(0.1 * (400 + 2 * 65536 / 1024 / 3))
    minutes = run * (len(tuning) + 3 * len(final)) / 60

    def cut(share, **options):
        return budget.fit(share * minutes, final, tuning, seconds, seeds=3, **options)

    assert cut(1.01) == budget.Cut(3, True, 1.0)
    assert cut(0.501, workers=2).share == 1.0
    one = cut(0.9)
    assert (one.seeds, one.tune, one.share) == (1, True, 1.0) and "1 seed" in one.notes[0]
    bare = cut(0.2)
    assert (bare.seeds, bare.tune, bare.share) == (1, False, 1.0)
    short = cut(0.04)
    assert short.share == pytest.approx(0.04 * (len(tuning) + 3 * len(final)) / len(final))
    assert f"{int(400 * short.share)} steps a run instead of 400" in short.notes[0]
    with pytest.raises(ValueError, match="minutes are 1 steps") as error:
        cut(0.0003)
    least = float(re.search(r"at least ([\d.]+)", str(error.value))[1])
    assert budget.fit(least + 0.1, final, tuning, seconds, seeds=3).share > 0


def test_the_first_decision_is_everyones(tmp_path):
    path = tmp_path / "budget.json"
    asked = {"--budget-minutes": "3", "--seeds": "3"}
    first = budget.load_or_decide(path, asked, lambda: budget.Cut(1, False, 0.25, ("cut",)))
    assert budget.load_or_decide(path, asked, lambda: budget.Cut(3, True, 1.0)) == first
    assert [p.name for p in tmp_path.iterdir()] == ["budget.json"]


@pytest.fixture
def words(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    few = ["--methods", "adamw", "galore", "--seeds", "1", "--jobs", "1", "--out", "out"]
    return [*few, *tiny_benchmarks.text_words(tmp_path)]


def test_the_command_tunes_trains_and_writes(words, tmp_path, capsys, monkeypatch):
    assert main(["reproduce", "scale-main", "--size", "dry", *words]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80 and "…" not in printed
    made = json.loads((tmp_path / "out" / "scale-main-dry" / "scale-main.json").read_text())
    assert {r["method"] for r in made["records"]} == {"adamw", "galore"}
    assert all(r["seeds"] == 1 and r["tokens"] == 4 * 64 for r in made["records"])
    runs = list((tmp_path / "out" / "scale-main-dry" / "runs").iterdir())
    # Three rates a method, and two more at most where the best is at an end.
    tuning = [run.name for run in runs if "steps2" in run.name]
    assert 6 <= len(tuning) <= 10 and len(runs) == len(tuning) + 2
    markdown = (tmp_path / "out" / "scale-main-dry" / "scale-main.md").read_text()
    assert re.search(r"\| GaLore(, edge)? \| 34.58 \| 1.151 \|", markdown)
    assert "do not compare" in markdown
    # Again: nothing is trained.
    monkeypatch.setattr(table_runs.Session, "_train", None)
    assert main(["reproduce", "scale-main", "--size", "dry", *words]) == 0
    assert json.loads((tmp_path / "out" / "scale-main-dry" / "scale-main.json").read_text()) == made


def test_what_a_stopped_table_has_is_stored_and_not_run_again(words, tmp_path, monkeypatch):
    """A machine may be gone in minutes, and with it all else."""
    monkeypatch.setattr(plan_module, "_RESULTS", tmp_path / "results")
    train, trained = table_runs.Session._train, []

    def stopping(self, entry, *rest):
        trained.append(entry.key)
        if stop(trained):
            raise KeyboardInterrupt
        return train(self, entry, *rest)

    monkeypatch.setattr(table_runs.Session, "_train", stopping)
    words = ["reproduce", "scale-main", "--size", "dry", *words, "--store", "--out"]
    stop = lambda keys: len(keys) == 5  # noqa: E731 - in the second method's first three
    assert main([*words, "first"]) == 130
    rows = json.loads((tmp_path / "results" / "dry-tune.json").read_text())["rows"]
    assert [r["method"] for r in rows] == ["adamw"] * 3 + ["galore"]
    trained.clear()
    stop = lambda keys: sum("steps2" not in key for key in keys) == 2  # noqa: E731 - final runs
    assert main([*words, "second"]) == 130
    assert not any(key.startswith("adamw") for key in trained[:2]), "its first three are stored"
    rows = json.loads((tmp_path / "results" / "dry-compare.json").read_text())["rows"]
    assert [r["method"] for r in rows] == ["adamw"]
    trained.clear()
    stop = lambda keys: False  # noqa: E731
    assert main([*words, "third"]) == 0
    assert len(trained) == 1 and trained[0].startswith("galore")


def test_refusals_are_one_line(words, capsys):
    assert main(["reproduce", "scale-main", "--size", "dry", *words, "--methods", "x"]) == 2
    error = capsys.readouterr().err.splitlines()
    assert error == [f"error: --methods x: unknown; there are {', '.join(SCALE.methods)}"]
    for option in ("--budget-minutes", "--stop-after"):
        assert main(["reproduce", "scale-main", *words, f"{option}=-3"]) == 2
        assert capsys.readouterr().err == f"error: {option} is -3; it must be more than 0\n"
    assert main(["reproduce", "scale-main", *words, "--seeds", "0"]) == 2
