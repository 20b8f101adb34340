"""The comparison: tuning, the table, what it writes, what it refuses."""

import copy
import json
import math
import shutil
import statistics
import time
from pathlib import Path

import matplotlib.image
import pytest
import tiny_benchmarks
from tiny_benchmarks import PLAN

from benchmarks.__main__ import main
from benchmarks.common.progress import RunProgress, SideBySide
from benchmarks.common.provenance import made_on
from benchmarks.experiments import plan, run_queue, summary
from benchmarks.experiments.plan import Plan, rows_of
from benchmarks.experiments.run_queue import merged
from benchmarks.report import readme as report
from benchmarks.report import tuned_rates
from benchmarks.training.metrics import perplexity
from benchmarks.training.run import Run
from optimzoo import get_info

PAIRS = [(m, p) for m in ("adamw", "scale") for p in ("tuned", "paper")]


def run(folder: Path, *options: object) -> int:
    words = ["compare", "--plan=tiny", "--jobs=1", "--out=out", *map(str, options)]
    return main([*words, *tiny_benchmarks.text_words(folder)])


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A folder in which the tiny plan is tuned and compared, made once."""
    folder = tmp_path_factory.mktemp("tuned")
    tiny_benchmarks.write_text(folder)
    tiny_benchmarks.write_plan(folder)
    with pytest.MonkeyPatch.context() as monkeypatch:
        tiny_benchmarks.patched(monkeypatch, folder)
        assert run(folder, "--tune") == 0
        assert run(folder, "--store") == 0  # in the folder of the tuning runs: not confused
    return folder


@pytest.fixture
def folder(monkeypatch, tmp_path, tuned):
    """The tuned plan, its texts and tokens, without any run."""
    shutil.copytree(tuned, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("out"))
    return tiny_benchmarks.patched(monkeypatch, tmp_path)


def tuning_rows(folder: Path) -> list[dict]:
    return json.loads((folder / "results" / "tiny-tune.json").read_text())["rows"]


def results(folder: Path) -> list[dict]:
    return json.loads((folder / "out" / "results.json").read_text())["rows"]


def point(row: dict) -> dict:
    return plan.settings(row)


def test_tuning_runs_the_search_and_stores_its_rows(folder):
    rows = tuning_rows(folder)
    assert not any("curve" in row for row in rows) and all("provenance" in row for row in rows)
    tiny = Plan("tiny")
    for method, protocol in PAIRS:
        mine = rows_of(rows, method, protocol)
        assert all(r["config"]["seed"] == 0 and r["test_loss"] is None for r in mine)
        assert tiny.tuning_runs(method, protocol, mine) == []
        assert tiny.edges(method, protocol, mine) == []
        best = min(mine, key=lambda r: r["valid_loss"])
        chosen = tiny.chosen(method, protocol, 7).config
        assert point({"config": vars(chosen)}) == point(best)
        assert (chosen.seed, chosen.steps, chosen.model) == (7, 6, "tiny")
    tuned = [point(r) for r in rows_of(rows, "adamw", "tuned")]
    assert len({p["embedding_lr"] for p in tuned}) >= 3 and len({p["lr"] for p in tuned}) >= 3
    assert {p["clip"] for p in tuned} == {0.0, 1.0}
    assert {tuple(p["betas"]) for p in tuned} == {(0.9, 0.95), (0.9, 0.99)}
    scale = [r["config"] for r in rows_of(rows, "scale", "paper")]
    assert {c["other_lr"] for c in scale} == {0.02} and {c["clip"] for c in scale} == {0.0}


def test_tuning_one_method_keeps_the_rows_of_the_others(folder, capsys):
    before = tuning_rows(folder)
    values = copy.deepcopy(PLAN)
    values["methods"]["scale"]["paper"]["start"]["lr"] = 0.5
    tiny_benchmarks.write_plan(folder, values)
    assert run(folder, "--tune", "--optimizers", "scale", "--protocol", "paper") == 0
    after = tuning_rows(folder)
    other = [r for r in before if (r["method"], r["protocol"]) != ("scale", "paper")]
    assert [r for r in after if r in other] == other
    new = [r["config"]["lr"] for r in after if r not in other]
    assert new and {0.25, 0.5, 1.0} <= set(new)
    assert f"(best of {len(new)})" in capsys.readouterr().out


def test_a_search_that_was_stopped_keeps_the_rows_it_had_not_come_to(folder, tmp_path):
    rows = tuning_rows(folder)
    path = tmp_path / "tune.json"
    path.write_text(json.dumps({"rows": rows}))
    first, *later = rows_of(rows, "adamw", "tuned")
    again = first | {"seconds": 1e6}
    others = [r for r in rows if (r["method"], r["protocol"]) != ("adamw", "tuned")]
    stopped = merged(path, [again], ended=False)
    assert len(stopped) == len(rows) and all(r in stopped for r in [*others, *later, again])
    assert merged(path, [again]) == [*others, again]


def test_a_best_rate_at_an_edge_is_named(tuned, folder):
    rows = [r for r in tuning_rows(folder) if r["method"] == "adamw"]
    best = min((r for r in rows if r["protocol"] == "tuned"), key=lambda r: r["valid_loss"])
    above = [r for r in rows if r["config"]["lr"] <= best["config"]["lr"]]
    (folder / "results" / "tiny-tune.json").write_text(json.dumps({"rows": above}))
    assert Plan("tiny").edges("adamw", "tuned", above) == ["lr", "lr and embedding_lr"]
    records = summary.summarise(Plan("tiny"), [r for r in results(tuned) if r["method"] == "adamw"])
    cells = {r["protocol"]: summary.cells(r)[2] for r in records}
    assert cells["tuned"].endswith(" edge")


RATES = ("embedding_lr", "head_lr", "lr")


def test_the_committed_plan_searches_alike_for_every_method():
    nano = Plan("nano")
    assert set(nano.select(None)) == {"sgd", "adamw", "muon", "scale"} <= set(nano.methods)
    configs = []
    for protocol, axes in (("tuned", (*((name,) for name in RATES), RATES)), ("paper", (("lr",),))):
        pairs = nano.pairs(nano.methods, [protocol])
        for method, _ in pairs:
            search = nano.search(method, protocol)
            together = method == "muon" and protocol == "paper"
            assert search.axes == ((("lr", "other_lr"),) if together else axes)
            if protocol == "tuned":
                assert search.choices["clip"] == [1.0, 0.0]
                second = {"betas", "other_betas", "momentum"} & search.choices.keys()
                assert second or method == "sgd"
                assert all(search.start[name] in values for name, values in search.choices.items())
            runs = nano.tuning_runs(method, protocol, [])
            assert len({entry.key for entry in runs}) == len(runs)
            configs += [entry.config for entry in runs]
        assert {m for m, _ in pairs} >= set(nano.select(None))
    assert [m for m, _ in nano.pairs(nano.methods, ["tuned"])] == list(nano.methods)
    for config in configs:
        get_info(config.optimizer)
    common = ("model", "steps", "batch_size", "seq_len", "accumulate", "eval_tokens", "seed")
    assert len({tuple(getattr(config, name) for name in common) for config in configs}) == 1


def test_compare_prints_the_table_and_writes_the_files(tuned, folder, capsys):
    assert run(folder) == 0
    printed = capsys.readouterr().out.splitlines()
    assert max(map(len, printed)) <= 80 and "…" not in "".join(printed)
    rows = results(folder)
    assert [(r["method"], r["protocol"]) for r in rows] == [
        (m, p) for p in ("tuned", "paper") for m in ("adamw", "scale")
    ]
    for row in rows:
        mine = rows_of(tuning_rows(folder), row["method"], row["protocol"])
        assert point(row) == point(min(mine, key=lambda r: r["valid_loss"]))
        label = PLAN["methods"][row["method"]]["label"]
        cells = [label, row["protocol"], f"{math.exp(row['test_loss']):.2f}"]
        assert any([*words[:2], *words[3:4]] == cells for words in map(str.split, printed))
    markdown = (folder / "out" / "table.md").read_text()
    assert markdown.startswith("# tiny\n\n| method | protocol |")
    assert sum(line.startswith(("| AdamW", "| SCALE")) for line in markdown.splitlines()) == 4
    for name in ("loss.png", "memory.png"):
        pixels = matplotlib.image.imread(folder / "out" / name)
        assert pixels.shape[0] > 300 and pixels.shape[1] > 500
        assert pixels[..., :3].std() > 0.02 and len({p.tobytes() for p in pixels[::7, ::7]}) > 5
    # The run of a tuning, which has no test loss, did not pass for one of the comparison:
    for ours, stored in zip(rows, results(tuned), strict=True):
        assert stored["test_loss"] == ours["test_loss"] > 0
        assert stored["curve"] == ours["curve"]
    kept = json.loads((tuned / "results" / "tiny-compare.json").read_text())
    assert kept["rows"] == results(tuned) and kept["plan"] == PLAN


def test_interrupted_in_the_middle_it_goes_on(folder, monkeypatch, capsys, tuned):
    train, started = run_queue.train, []

    def interrupted(config, corpus, *, progress, **options):
        started.append((config.optimizer, config.lr))

        def stop(step, loss, speed):
            if len(started) == 3 and step == 4:
                raise KeyboardInterrupt

        return train(config, corpus, progress=stop, **options)

    with monkeypatch.context() as patch:
        patch.setattr(run_queue, "train", interrupted)
        assert run(folder) == 130
    assert capsys.readouterr().err.endswith("stopped; the same command goes on from here\n")
    assert not (folder / "out" / "results.json").exists()
    assert len(list((folder / "out" / "runs").glob("*/row.json"))) == 2
    assert len(list((folder / "out" / "runs").glob("*/checkpoints/latest"))) == 1

    steps = []
    train_step = Run.train_step

    def counted(self, log, **how):
        steps.append(self.step)
        return train_step(self, log, **how)

    monkeypatch.setattr(Run, "train_step", counted)
    assert run(folder) == 0
    assert steps == [4, 5, *range(6)]  # the rest of the third run, and the fourth
    for ours, straight in zip(results(folder), results(tuned), strict=True):
        assert ours["test_loss"] == straight["test_loss"] and ours["curve"] == straight["curve"]
    steps.clear()
    assert run(folder) == 0 and steps == []
    assert run(folder, "--fresh", "--optimizers", "scale", "--protocol", "tuned") == 0
    assert steps == list(range(6))


def test_seeds_give_a_spread(folder, capsys):
    assert run(folder, "--seeds", 2, "--optimizers", "scale") == 0
    rows = results(folder)
    assert [(r["protocol"], r["config"]["seed"]) for r in rows] == [
        *[("tuned", 0), ("paper", 0), ("tuned", 1), ("paper", 1)]
    ]
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    for protocol in ("tuned", "paper"):
        values = [math.exp(r["test_loss"]) for r in rows if r["protocol"] == protocol]
        assert values[0] != values[1]
        text = f"{statistics.fmean(values):.2f} ±{abs(values[0] - values[1]) / math.sqrt(2):.2f}"
        assert text in printed and text in (folder / "out" / "table.md").read_text()
    assert "2 seeds" in printed.replace("\n", " ")


def test_runs_that_diverge_or_only_ended_here_have_their_row(folder, tuned, capsys):
    rows = results(tuned)
    rows += [{**row, "config": {**row["config"], "seed": 1}} for row in copy.deepcopy(rows)]
    rows[-1].update(test_loss=None, valid_loss=None, diverged=True)
    for row in rows:
        if row["method"] == "adamw":
            row["optimizer_ms"] = None
    rows[0]["test_loss"] = 1e5  # finite, and its exponential is not
    labels = copy.deepcopy(Plan("tiny"))
    labels.methods["scale"]["label"] = "Natural GaLore"
    summary.write_report(labels, rows, folder / "out")
    summary.comparison(labels, rows).print()
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80 and "…" not in "".join(lines)
    markdown = (folder / "out" / "table.md").read_text().splitlines()
    assert [("inf" in line, "±" in line) for line in markdown if line.startswith(("| A", "| N"))]
    records = summary.summarise(labels, rows)
    assert [r["perplexity"] == math.inf for r in records] == [False, True, False, True]
    assert [r["spread"] is None for r in records] == [False, True, False, True]
    assert perplexity(None) == perplexity(1e5) == math.inf


def test_compare_needs_tuned_values(folder, capsys):
    (folder / "results" / "tiny-tune.json").unlink()
    capsys.readouterr()
    assert run(folder) == 2
    lines = [x for x in capsys.readouterr().err.splitlines() if not x.startswith("reading")]
    assert lines == ["error: plan tiny has no tuned values; run compare --tune first"]


REFUSED = [
    (["--optimizers", "adamv"], "unknown method 'adamv': did you mean adamw"),
    (["--optimizers", "scale", "xyz"], "unknown method 'xyz': plan tiny has adamw, scale"),
    (["--plan", "tini"], "unknown plan 'tini': did you mean tiny? there are tiny"),
    (["--seeds", "0"], "--seeds and --jobs must be at least 1"),
    (["--jobs", "-1"], "--seeds and --jobs must be at least 1"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=str)
def test_bad_input_is_one_line(options, message, folder, capsys):
    assert run(folder, *options) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert printed.err.startswith("error: ") and message in printed.err


@pytest.mark.parametrize("options", [["--seeds", "two"], ["--protocol", "fair"], ["--tunes"]])
def test_bad_words_are_a_usage_error(options, folder, capsys):
    with pytest.raises(SystemExit) as caught:
        run(folder, *options)
    assert caught.value.code == 2
    assert options[0] in capsys.readouterr().err.splitlines()[-1]


def test_report_writes_and_checks_the_readme_and_the_pages(folder, monkeypatch, capsys):
    readme = folder / "README.md"
    old = "# zoo\n\n<!-- table: tiny -->\nold\n<!-- end -->\n\nrest <!-- end -->\n"
    readme.write_text(old)
    monkeypatch.setattr(report, "README", readme)
    monkeypatch.setattr(report, "DOCS", folder / "docs")
    (folder / "docs").mkdir()
    page = folder / "docs" / "page.md"
    page.write_text(old)
    (folder / "rates.json").write_text("{}\n")
    monkeypatch.setattr(tuned_rates, "PATH", folder / "rates.json")
    monkeypatch.setattr(tuned_rates, "PLANS", ())
    assert main(["report", "--check"]) == 1
    assert capsys.readouterr().out.count("\n") == 2
    assert readme.read_text() == page.read_text() == old
    assert main(["report"]) == 0
    new = readme.read_text()
    assert page.read_text() == new
    stored = json.loads((folder / "results" / "tiny-compare.json").read_text())["rows"]
    assert summary.comparison(Plan("tiny"), stored).markdown() in new
    assert new.startswith("# zoo\n") and new.endswith("<!-- end -->\n\nrest <!-- end -->\n")
    assert main(["report", "--check"]) == 0
    (folder / "rates.json").write_text("{}")
    assert main(["report", "--check"]) == 1
    assert capsys.readouterr().out.endswith(
        "rates.json differs from the results; run python -m benchmarks report\n"
    )
    (folder / "results" / "tiny-compare.json").unlink()
    capsys.readouterr()
    assert main(["report", "--check"]) == 2
    assert "is missing; run compare --store first\n" in capsys.readouterr().err


def test_runs_side_by_side_share_one_bar():
    bar = SideBySide(20)
    task = bar._bar.tasks[0]
    bar.report("one", "SGD tuned", 3, 4.5, 1000.0)
    assert (task.completed, task.description) == (3, "SGD tuned")
    assert task.fields["status"] == "loss 4.500  1,000 tok/s"
    bar.report("two", "SCALE tuned", 2, 4.0, 500.0)
    assert (task.completed, task.description) == (5, "SGD tuned and 1 more")
    assert task.fields["status"] == "loss 4.000 to 4.500  1,500 tok/s"
    bar.end("one", 10)
    bar.report("two", "SCALE tuned", 4, 3.5, 600.0)
    assert (task.completed, task.description) == (14, "SCALE tuned")
    assert task.fields["status"] == "loss 3.500  600 tok/s"


def test_into_a_pipe_a_line_a_minute(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    bar = RunProgress(2000)
    report = bar.start("SCALE", 2000)
    for step in range(1, 131):
        now[0] += 1.0
        report(step, 4.5, 1000.0)
    assert capsys.readouterr().err.splitlines() == [
        "SCALE: 60 of 2,000 steps, loss 4.500  1,000 tok/s",
        "SCALE: 120 of 2,000 steps, loss 4.500  1,000 tok/s",
    ]


def test_a_caption_names_a_machine_once():
    one = {"device": "A", "threads": 2, "torch": "2.13", "commit": "a1"}
    made = [one, one | {"threads": 1}, one | {"commit": "b2"}, one | {"device": "B"}]
    assert made_on(*made) == (
        "A, 1 or 2 threads, torch 2.13, commits a1, b2; B, 2 threads, torch 2.13, commit a1"
    )
    assert made_on(one | {"threads": 1}) == "A, 1 thread, torch 2.13, commit a1"
