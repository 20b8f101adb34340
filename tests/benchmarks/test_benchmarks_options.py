"""No option of `python -m benchmarks COMMAND` is dropped: it is heeded, or refused in one line."""

import json

import pytest
import tiny_benchmarks

from benchmarks.__main__ import main
from benchmarks.experiments import cast, compare, plan
from benchmarks.experiments import time_budget as budget
from benchmarks.microbench import memory_planner as memory
from benchmarks.microbench import sparsity as sparse_time
from benchmarks.microbench import step_time
from benchmarks.papers import cast as cast_beside
from benchmarks.papers import reproduce, table_runs
from benchmarks.report import readme as report
from benchmarks.training import cli as train
from optimzoo.models.llama import CONFIGS

BEGUN = "the work was begun"
TRAIN = "train --model tiny --optimizer sgd --lr 0.1"
OF_OUT = "it is of what --out keeps; add --out FOLDER, or leave"
MEMORY_ONLY = "--memory-only counts bytes and runs nothing; leave"
SHOWN = "the table cast shows the rows of `benchmarks cast --store`; leave"
FOLDER = "--data is a folder of tokens, which are read where they lie; leave --cache-dir out"
REFUSED = {
    # Also where the value is the default.
    f"{TRAIN} --save-every 100": f"--save-every 100: {OF_OUT} --save-every out",
    f"{TRAIN} --keep 2": f"--keep 2: {OF_OUT} --keep out",
    f"{TRAIN} --skip-damaged": f"--skip-damaged: {OF_OUT} --skip-damaged out",
    f"{TRAIN} --eval-every 5": f"--eval-every 5: {OF_OUT} --eval-every out",
    f"{TRAIN} --data tokens --cache-dir c": f"--cache-dir c: {FOLDER}",
    "compare --data tokens --cache-dir c": f"--cache-dir c: {FOLDER}",
    "cast --fresh --out tokens --data tokens --cache-dir c": f"--cache-dir c: {FOLDER}",
    "reproduce scale-main --data tokens --cache-dir c": f"--cache-dir c: {FOLDER}",
    "compare --tune --seeds 1": "--seeds 1: --tune runs seed 0 alone; leave --seeds out",
    "compare --tune --store": "--store: --tune always stores its rows; leave --store out",
    "compare --plan tiny --optimizers scale --protocol paper": (
        "--protocol paper: plan tiny has none for scale; leave it out"
    ),
    **{
        f"reproduce scale-main --memory-only {words}": (
            f"{words}: {MEMORY_ONLY} {words.split()[0]} out"
        )
        for words in (
            "--size nano",
            "--methods adamw scale",
            "--seeds 3",
            "--budget-minutes 2.0",
            "--stop-after 2.0",
            "--galore-eval",
            "--jobs 1",
            "--out a",
            "--store",
            "--fresh",
            "--data stdlib",
            "--max-chars 9",
            "--max-tokens 9",
            "--cache-dir c",
        )
    },
    "reproduce cast --seeds 2": f"--seeds 2: {SHOWN} --seeds out",
    "reproduce cast --out a --store": f"--store: {SHOWN} --store out",
    "reproduce scale-main --methods adamw galor": (
        "--methods galor: unknown; did you mean galore or apollo or scale? there are adamw, "
    ),
    "reproduce scale-main low-rank --methods apollo": (
        "--methods apollo: none is in low-rank; it has adamw, sltrain_restarts, "
    ),
    "reproduce cast galore-table2": "galore-table2 has a memory column alone; add --memory-only",
    "cast --fresh --out tokens --methods dense oneshot --lr 0.1": (
        "--lr 0.1: none of the --methods has it; add one of continued, fixed, l2, srste, cast, or "
        "leave --lr out"
    ),
    "cast --tune --l1 0.1": "--l1 0.1: --tune searches it; leave one of the two out",
    "cast --methods dense --steps 9": "--steps 9: none of the --methods has it; add one of ",
    "cast --methods dense --other-lr 9": "--other-lr 9.0: none of the --methods has it; add one",
    "cast --methods fixed continued --l1 0.1": (
        "--l1 0.1: none of the --methods has it; add one of l2, srste, cast, or leave --l1 out"
    ),
    "cast --methods continued --eta 0.5": "--eta 0.5: none of the --methods has it; add one of ",
    "memory --checks plan --optimizers sgd scale": (
        "--optimizers sgd scale: it is of the check account or simulate; add that to --checks, or "
        "leave --optimizers out"
    ),
    "memory --checks plan --models nano": "--models nano: it is of the check account or simulate;",
    "memory --checks plan account --dtype float32": "--dtype float32: it is of the check simulate;",
    "memory --checks account --batch 1": "--batch 1: it is of the check simulate; add that",
    "memory --checks account --seq 9": "--seq 9: it is of the check simulate; add that",
    "memory --checks account simulate --plan-model 9m": "--plan-model 9m: it is of the check plan;",
    "step-time --layers 0": "--layers 0: it must be at least 1; 60m has 8",
    "step-time --layers -1": "--layers -1: it must be at least 1; 60m has 8",
    "sparse-time --tokens 64": (
        "--tokens 64: it is of 2:4 layers, which are not measured on a CPU; leave --tokens out"
    ),
    "report --check --out runs/report": (
        "--out runs/report: --check writes nothing; leave --out out"
    ),
}
HEEDED = [
    TRAIN,
    f"{TRAIN} --out a --save-every 1 --keep 2 --skip-damaged --eval-every 5",
    f"{TRAIN} --data tokens",
    f"{TRAIN} --data stdlib --cache-dir c",
    f"{TRAIN} --data tokens tokens --cache-dir c",
    "compare --plan tiny --seeds 2 --store --fresh --out a",
    "compare --plan tiny --tune --committed --out a",
    "reproduce scale-main --memory-only",
    "reproduce cast --out a",
    "reproduce cast scale-main --size dry --seeds 1 --store --fresh --out a",
    "reproduce scale-main low-rank --size dry --methods galore apollo --out a",
    "cast --fresh --out a --lr 0.1 --other-lr 0.1 --l1 0.1 --eta 0.5 --steps 9",
    "memory --dtype float32 --batch 1 --seq 9 --optimizers sgd --models nano --plan-model 9m",
    "memory --checks plan --plan-model 9m",
    "memory --checks account --optimizers sgd --models nano",
    "step-time --layers 1 --repeats 6",
    "sparse-time --model nano --repeats 3",
    "report --check",
    "report --out a",
]
NOTES = {
    "compare --plan tiny --protocol paper --out a": (
        "note: left out, for they have no protocol paper: scale"
    ),
    "cast --methods oneshot cast --lr 0.1": "note: --lr 0.1 is without effect on oneshot",
    "step-time --repeats 9": "note: --repeats 9 is of the steps; refreshes are timed 5 times",
}


def begun(*_, **__):
    raise ValueError(BEGUN)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder to be in, with one of tokens; whatever would take time says that it was begun."""
    (tmp_path / "tokens").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(CONFIGS, "tiny", tiny_benchmarks.TINY)
    for module in (train, compare, cast, table_runs):
        monkeypatch.setattr(module, "corpus_from", begun)
    monkeypatch.setattr(train, "refuse_early", lambda config: None)  # it builds an optimizer
    for name in ("account_rows", "simulate_rows", "one_peak"):
        monkeypatch.setattr(memory, name, begun)
    monkeypatch.setattr(cast_beside, "show", lambda out: None if out.name == "a" else begun())
    monkeypatch.setattr(reproduce, "print_memory", begun)
    monkeypatch.setattr(step_time, "measure_steps", begun)
    monkeypatch.setattr(sparse_time, "measure_mask", begun)
    monkeypatch.setattr(sparse_time.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(report, "filled", begun)
    return tmp_path


@pytest.fixture
def tiny_plan(folder, monkeypatch):
    """The plan `tiny` beside the committed ones; its SCALE has no protocol `paper`."""
    values = json.loads(json.dumps(tiny_benchmarks.PLAN))
    del values["methods"]["scale"]["paper"]
    for method in values["methods"].values():
        for rules in (method[name] for name in ("tuned", "paper") if name in method):
            rules.clear()  # nothing to tune
            rules["fixed"] = {"lr": 1e-3, "clip": 0.0, "other_lr": 1e-3}
    (folder / "configs").mkdir()
    for path in plan._CONFIGS.glob("*.json"):
        (folder / "configs" / path.name).write_bytes(path.read_bytes())
    tiny_benchmarks.write_plan(folder, values)
    monkeypatch.setattr(plan, "_CONFIGS", folder / "configs")


@pytest.mark.usefixtures("tiny_plan")
@pytest.mark.parametrize("words", REFUSED)
def test_what_would_be_dropped_is_refused_before_any_work(words, folder, capsys):
    before = sorted(folder.rglob("*"))
    assert main(words.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1
    assert captured.err.startswith(f"error: {REFUSED[words]}")
    assert sorted(folder.rglob("*")) == before


@pytest.mark.usefixtures("tiny_plan")
@pytest.mark.parametrize("words", HEEDED)
def test_what_is_heeded_is_not_refused(words, capsys):
    """`reproduce cast` alone has no work to begin."""
    status = main(words.split())
    error = capsys.readouterr().err.splitlines()[-1:]
    assert (status, error) == (
        (0, []) if words == "reproduce cast --out a" else (2, [f"error: {BEGUN}"])
    )


@pytest.mark.usefixtures("tiny_plan")
@pytest.mark.parametrize("words", NOTES)
def test_what_has_no_effect_on_a_part_is_said(words, capsys):
    assert main(words.split()) == 2
    assert capsys.readouterr().out == f"{NOTES[words]}\n"


def test_a_finished_run_says_what_it_does_not_heed(folder, monkeypatch, capsys):
    row = {"diverged": True}
    monkeypatch.setattr(train, "corpus_from", lambda *_, **__: None)
    monkeypatch.setattr(train, "finished", lambda *_: row)
    monkeypatch.setattr(train, "train", lambda *_, **__: row)
    assert main([*TRAIN.split(), "--out=a", "--save-every=9", "--parallel=none"]) == 1
    note = "note: without effect, a is finished: --save-every, --parallel; take another --out"
    assert capsys.readouterr().out.splitlines()[0] == note
    assert main([*TRAIN.split(), "--out=a"]) == 1
    assert "note" not in capsys.readouterr().out


def test_rows_are_stored_as_measured_and_that_is_said(folder, monkeypatch):
    """The table's losses are GaLore's, the rows' are not."""
    shown = []
    monkeypatch.setattr(table_runs.TableRuns, "__init__", lambda *_: None)
    monkeypatch.setattr(table_runs.TableRuns, "run", lambda _: ({}, []))
    monkeypatch.setattr(table_runs.perplexity_tables, "show", lambda *how: shown.append(how[-1]))
    words = "reproduce scale-main --size dry --out a"
    galore = "Test losses as GaLore's evaluation counts them: times n / (n + 1)."
    measured = "The rows that are stored have them as they were measured."
    for more in ("", "--store", "--galore-eval", "--galore-eval --store"):
        assert main(f"{words} {more}".split()) == 0
    assert shown == [[], [], [galore], [galore, measured]]


def test_a_budget_is_not_taken_for_another(folder, capsys):
    """Decided for three minutes and the machine's own --jobs."""
    words = "reproduce scale-main --size dry --methods scale adamw --seeds 2 --out a"
    path = folder / "a" / "scale-main-dry" / "budget.json"
    path.parent.mkdir(parents=True)
    asked = {"--budget-minutes": "3", "--seeds": "2", "--methods": "adamw scale", "--jobs": "99"}
    kept = budget.load_or_decide(path, asked, lambda: budget.Cut(1, False, 0.5))
    assert budget.load_or_decide(path, asked, begun) == kept
    for more, option in {
        "--budget-minutes 4": "--budget-minutes 4: {} was decided for --budget-minutes 3",
        "--budget-minutes 3 --seeds 1": "--seeds 1: {} was decided for --seeds 2",
        "--budget-minutes 3 --methods scale": (
            "--methods scale: {} was decided for --methods adamw scale"
        ),
        "--budget-minutes 3 --jobs 1": "--jobs 1: {} was decided for --jobs 99",
    }.items():
        assert main(f"{words} {more}".split()) == 2
        where = path.relative_to(folder)
        end = "; give that, or delete the file\n"
        assert capsys.readouterr().err == f"error: {option.format(where)}{end}"
    for more in ("", "--budget-minutes 3", "--budget-minutes 3 --jobs 99"):
        assert main(f"{words} {more}".split()) == 2
        assert capsys.readouterr().err == f"error: {BEGUN}\n"
    values = json.loads(path.read_text())
    del values["asked"]  # of before it was kept
    path.write_text(json.dumps(values))
    assert budget.load_or_decide(path, asked, begun) == kept
    assert main(f"{words} --budget-minutes 4".split()) == 2
    assert capsys.readouterr().err == f"error: {BEGUN}\n"
